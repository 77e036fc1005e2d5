"""extras/paper.py: what it shows is the numbers of the runs, beside those that the paper prints."""

import json
import shutil
import warnings
from pathlib import Path

import evaluate
from pairwise import cli, drawing, figures

import numpy as np
import paper
import pytest
from conftest import REPOSITORY, edited, of_one_vote, script
from test_evaluate import files_of, make
from test_report import Page, no_formats


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two evaluated runs, one with continuations and three members, one without; read only."""
    root = tmp_path_factory.mktemp("runs")
    make(root / "first", count=40)
    make(root / "second", count=40, continuations=False, truth=False, k=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.report, "write", lambda *_: None)
        for name in ("first", "second"):
            words = ["--run", str(root / name), "--resamples", "50"]
            evaluate.main(evaluate.parse_args(words))
    return root


@pytest.fixture
def unsaved(monkeypatch):
    monkeypatch.setattr(drawing, "formats", no_formats)
    monkeypatch.setattr(paper, "draw_table", lambda *_: figures.Figure())  # the slowest


def shown(out, *runs):
    """What main writes of runs: paper.json's entries, and the page."""
    paper.main(paper.parse_args(["--runs", *map(str, runs), "--out", str(out)]))
    entries = json.loads((out / "paper.json").read_text())["runs"]
    return entries, Page((out / "paper.html").read_text(encoding="utf-8"))


def change(run, edit):
    """Edit metrics.json, as somebody who accepts it, and so that nothing else is changed."""
    path = run / "metrics.json"
    result = json.loads(path.read_text())
    edit(result)
    path.write_text(json.dumps(result))
    return edited(run)


def drawn_curve(entries, number):
    fig = paper.draw_figure_2(entries)
    return next(x for x in fig.axes[number].lines if x.get_label().startswith("ensemble"))


def test_a_changed_number_is_in_table_figure_and_its_data(runs, tmp_path, unsaved):
    copy = Path(shutil.copytree(runs / "first", tmp_path / "copy"))
    before, page = shown(tmp_path / "out", copy, runs / "second")
    metrics = json.loads((copy / "metrics.json").read_text())
    errors = [entry["brier"] for entry in metrics["splits"]["test"]["ensemble"]]
    assert [x["brier"] for x in before[0]["figure_2"]["curve"]] == errors
    assert drawn_curve(before, 0).get_ydata() == pytest.approx(errors)
    assert not any(".0123" in cell for table in page.tables for row in table for cell in row)

    def edit(result):
        result["splits"]["test"]["ensemble"][1]["brier"] = 0.0123
        result["diversity"]["kendall_tau"][0][2] = -0.77

    after, page = shown(tmp_path / "out", change(copy, edit), runs / "second")
    assert drawn_curve(after, 0).get_ydata() == pytest.approx([errors[0], 0.0123, errors[2]])
    of_k = next(table for table in page.tables if table[0] == ["", "copy", "second"])
    (row,) = (row for row in of_k if row[0] == "k = 2")
    assert row[1].startswith(".0123")
    matrix = next(x for x in paper.draw_figure_3(after).axes if x.get_title() == "copy")
    assert "−.77" in [text.get_text() for text in matrix.texts]
    assert after[0]["figure_2"]["first_below"] == 2 and after[1] == before[1]
    for entry in (before[0], after[0]):  # Nothing else has changed.
        entry["figure_2"]["curve"][1]["brier"] = entry["figure_3"]["kendall_tau"][0][2] = 0
        entry["figure_3"]["mean"] = 0
        for name in ("first_below", "least_at"):
            entry["figure_2"][name] = 0
    assert after[0] == before[0]


def test_counts_are_those_of_the_data(runs, tmp_path, unsaved):
    from pairwise.data import read_splits

    (entry,), page = shown(tmp_path / "out", runs / "first")
    splits, _ = read_splits(runs / "first")
    p = np.concatenate([split.p for split in splits.values()])
    assert entry["test_pairs"] == len(splits["test"].p)
    assert entry["train_pairs"] == len(p) - len(splits["test"].p)
    majority = np.maximum(p, 1 - p)
    assert entry["majority_mean"] == pytest.approx(majority.mean())
    assert sum(entry["figure_4"]["percent"]) == pytest.approx(100)
    assert page.tables[0][1][-1] == f"{100 * majority.mean():.1f}%"


def test_pairs_of_one_vote_do_not_count(runs, tmp_path):
    whole = paper.data_set(runs / "first")
    single, without = map(paper.data_set, of_one_vote(runs / "first", tmp_path))
    assert single == without and single["test_pairs"] < whole["test_pairs"]


def test_characters_that_no_font_has_are_drawn_without_a_warning():
    with warnings.catch_warnings(record=True) as seen, drawing.style():
        fig = paper.draw_table(
            ["$name", "apple \U0001f34e"], [["a\tb\xa0€", "bell \x07\nend"]], [20, 20]
        )
    assert not seen
    assert {text.get_text() for text in fig.texts} >= {"$name", "a       b\xa0€", "bell \\x07\nend"}


def test_what_a_run_lacks_is_said_and_an_older_picture_goes(runs, tmp_path, unsaved, capsys):
    out = tmp_path / "out"
    shown(out, runs / "first")
    assert (out / "figures/figure_3.png").exists() and (out / "figures/appendix_g_1.pdf").exists()
    capsys.readouterr()
    (entry,), page = shown(out, runs / "second")
    assert entry["figure_3"] is None and entry["appendix_g"] is None
    words = "second is not in figure 3 and appendix G: its members have no rewards of continuations"
    assert words in page.text and words in capsys.readouterr().out
    lone = {"name": "lone", "figure_3": entry, "appendix_g": None}
    words = "lone is not in appendix G: of a prompt's continuations no two have rewards."
    assert paper.missing([lone]) == [words]
    left = {path.name for path in (out / "figures").iterdir()}
    names = "table_1", "table_2", "figure_2", "figure_4"
    assert left == {f"{name}.{kind}" for name in names for kind in ("png", "pdf")}


def test_the_page_names_no_network_and_two_calls_write_the_same(runs, tmp_path, monkeypatch):
    """All is drawn, and two pictures are saved: saving takes longest."""
    saved, save = {"table_1", "figure_3"}, drawing.save

    def some(fig, stem):
        return save(fig, stem) if stem.name in saved else drawing.keep(no_formats(fig), stem)

    monkeypatch.setattr(drawing, "save", some)
    for name in ("a", "b"):
        _, page = shown(tmp_path / name, runs / "second", runs / "first")
    assert (tmp_path / "a/figures/table_1.pdf").stat().st_size > 5000
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert all(x.startswith("data:image/svg+xml;base64,") for x in page.addresses)
    assert len(page.addresses) == 3 and "script" not in page.tags
    assert all(len(row) == len(table[0]) for table in page.tables for row in table)


def test_printed_numbers_are_those_that_data_preparation_compares_with():
    for name, row in paper.PRINTED.items():
        of_set = script(name).PAPER
        numbers = [float(x.replace(",", "")) for x in (row["pairs"], row["annotators"])]
        assert numbers == [of_set["pairs"], of_set["annotators_mean"]], name
        prompts = [int(x.replace(",", "")) for x in row["prompts"].split(" / ")]
        assert prompts == [of_set["train_prompts"], of_set["test_prompts"]], name
        assert int(row["p"][:-1]) == round(100 * of_set["majority_mean"]), name
        assert float(row["annotators_2"]) == of_set["annotators_mean"], name


def test_a_run_on_a_data_set_of_the_paper_stands_above_what_it_prints(runs, tmp_path, unsaved):
    entries, _ = shown(tmp_path / "out", runs / "first", runs / "second")
    entries[1]["dataset"] = "helpsteer2"
    names = [row[0] for row in paper.printed_beside(entries, paper.TABLE_1)]
    printed = [f"{row['name']}, in the paper" for row in paper.PRINTED.values()]
    assert names == ["first", *printed[:2], "second", *printed[2:]]


def test_names_are_text_and_distinct(runs, tmp_path, unsaved):
    names = ["a/$\\frac$<script>_a_name_as_long_as_this", "b/x", "c/x"]
    copies = [shutil.copytree(runs / "second", tmp_path / name) for name in names]
    entries, page = shown(tmp_path / "out", *copies)
    assert [entry["name"] for entry in entries] == ["a/" + names[0][2:], "b/x", "c/x"]
    assert "script" not in page.tags and entries[0]["name"] in page.tables[0][1]


def stale(run):
    rewards = np.load(run / "rewards/01_test.npy")
    np.save(run / "rewards/01_test.npy", rewards + 1)
    edited(run)


def later(run):
    """A result that an evaluation shows, but was not there yet."""
    (run / "plurality.json").write_text("{}")


def member(run):
    for path in sorted(run.glob("rewards/02_*")):
        shutil.copy(path, path.with_name(path.name.replace("02_", "03_")))


def broken(run):
    change(run, lambda result: result["splits"]["test"].update(floor_single="low"))


BAD = {
    "no evaluation": (lambda run: (run / "metrics.json").unlink(), "no finished evaluation found"),
    "changed since": (stale, "01_test.npy: changed since"),
    "after it": (later, "plurality.json: changed since"),
    "another member": (member, "an evaluation of 2 members found, 3 expected"),
    "edited": (lambda run: (run / "metrics.json").write_text("{}"), "edited or damaged"),
    "another form": (broken, "splits.test.floor_single: text found, a number expected"),
    "nothing": (shutil.rmtree, "no finished evaluation found"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(kind, runs, tmp_path, unsaved, capsys):
    harm, words = BAD[kind]
    run = Path(shutil.copytree(runs / "second", tmp_path / "run"))
    harm(run)
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        args = paper.parse_args(["--runs", str(runs / "first"), str(run), "--out", str(out)])
        cli.run_main(paper.main, args)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and words in line and str(run) in line and not out.exists()


def test_a_run_twice_or_as_out_is_refused(runs, tmp_path):
    with pytest.raises(cli.InputError, match="is given twice"):
        shown(tmp_path / "out", runs / "first", runs / "second" / ".." / "first")
    with pytest.raises(cli.InputError, match="another run directory"):
        shown(runs / "second", runs / "first")


def test_surely_below_is_by_the_interval_of_the_difference():
    """Not by that of the error alone, as floor and error move together."""
    less = ([-0.02, 0.01], [-0.03, -0.01], None)
    curve = [
        {"k": k, "brier": 0.1 - 0.01 * k, "brier_ci": [0, 0.01], "less": {"floor_single_ci": ci}}
        for k, ci in enumerate(less, 1)
    ]
    found = paper.first_sizes({"ensemble": curve, "floor_single": 0.095})
    assert found == {"first_below": 1, "first_surely_below": 2, "least_at": 3}


def test_at_the_floor_is_not_below_it_and_rounding_gains_nothing():
    def entry(k, brier, high):
        return {"k": k, "brier": brier, "less": {"floor_single_ci": [-0.02, high]}}

    curve = [entry(1, 0.09, -0.01), entry(2, 0.08, 0.0), entry(3, 0.08 - 1e-12, 0.0)]
    found = paper.first_sizes({"ensemble": curve, "floor_single": 0.09})
    assert found == {"first_below": 2, "first_surely_below": None, "least_at": 2}


def test_what_the_page_says_of_figure_2_is_the_committed_file():
    """results/paper/paper.json was written with the figure that docs/results.md shows."""
    entries = json.loads((REPOSITORY / "results/paper/paper.json").read_text(encoding="utf-8"))
    by_name = {entry["name"]: entry for entry in entries["runs"]}
    below = {name: entry["figure_2"]["first_below"] for name, entry in by_name.items()}
    real = ("ukp_full_centered_0", "writing_mse_0")
    assert below == {"demo": 4, "camps": 2} | dict.fromkeys(real)
    assert by_name["demo"]["figure_2"]["first_surely_below"] is None
    assert by_name["writing_mse_0"]["figure_2"]["floor_excess"] == pytest.approx(0, abs=1e-9)
    page = " ".join((REPOSITORY / "docs/results.md").read_text(encoding="utf-8").split())
    assert "that of camps is with two, that of the demo with four" in page
    for name in real:
        assert f"{by_name[name]['test_prompts']} test prompts" in page.split(name)[-1][:80]
