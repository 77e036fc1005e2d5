"""report.py and figures.py: what page, table and figures show, whatever a run has or lacks."""

import functools
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from importlib.metadata import packages_distributions

import evaluate
import fit_weights
from pairwise import cli, drawing, figures, report, weights

import compare as compare_runs
import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPOSITORY
from test_evaluate import CI, compare, expected, flat, make

ALWAYS = {"calibration", "votes", "reliability", "weights", "training"}
OF_CONTINUATIONS = {"kendall", "wins"}
RUNS = {  # what `make` is told, and the figures beyond ALWAYS
    "everything": ({"categories": True}, {*OF_CONTINUATIONS, "policies"}),
    "no log probabilities": ({"truth": False}, OF_CONTINUATIONS),
    "no continuations": ({"valid": 0.0, "continuations": False}, set()),
    "dependent votes, one member": (
        {"votes": "dependent", "truth": False, "k": 1},
        OF_CONTINUATIONS,
    ),
}


class Page(HTMLParser):
    """The tags, attributes and tables of a page; it fails where tags are not nested."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.addresses, self.tables, self.words = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        elif "style" not in self.open:
            self.words.append(data)


def evaluated(directory, **options):
    """(run, its metrics) of a run made by hand."""
    run = make(directory / "run", **options)
    evaluate.main(evaluate.parse_args(["--run", str(run), "--resamples", "50"]))
    return run, json.loads((run / "metrics.json").read_text())


@pytest.fixture
def of_demo():
    """metrics.json of results/demo: four members, a known truth, policies. A test may change it."""
    return json.loads((REPOSITORY / "results" / "demo" / "metrics.json").read_text())


def page_of(run):
    return Page((run / "report.html").read_text(encoding="utf-8"))


def no_formats(fig):
    """Stand in for drawing.formats, which takes longer than all the rest."""
    return {"png": b"", "pdf": b"", "svg": b"<svg/>"}


@pytest.fixture
def unsaved(monkeypatch):
    monkeypatch.setattr(drawing, "formats", no_formats)


@pytest.fixture(scope="module", params=RUNS)
def written(request, tmp_path_factory):
    """(run, metrics, page, figures expected); read only. Only the run with everything is saved."""
    options, more = RUNS[request.param]
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "everything":
            patch.setattr(drawing, "formats", no_formats)
        run, metrics = evaluated(tmp_path_factory.mktemp("written"), **options)
    return run, metrics, page_of(run), ALWAYS | more


def shown(x):
    """Write a number as the page does: with a minus sign, not a hyphen."""
    return figures.num(x).replace("-", "−")


def test_page_has_every_figure_and_needs_no_network(written):
    run, _, page, expected = written
    drawn = {path.stem for path in (run / "figures").glob("*.png")} - {"data_votes"}
    assert drawn == expected == {path.stem for path in run.glob("figures/*.pdf")} - {"data_votes"}
    assert len(page.addresses) == page.tags.count("figcaption") == len(expected)
    assert all(x.startswith("data:image/svg+xml;base64,") for x in page.addresses)
    assert "script" not in page.tags and "link" not in page.tags


def test_every_row_of_a_table_has_all_columns(written):
    _, metrics, page, _ = written
    assert all(len(row) == len(table[0]) for table in page.tables for row in table)
    test = metrics["splits"]["test"]
    of_k = next(table for table in page.tables if table[0][:2] == ["k", "Brier"])
    marked = [row[0] for row in of_k if row[0].startswith("●")]
    chosen = metrics["k_valid"] if len(test["ensemble"]) > 1 else None
    assert marked == ([] if chosen is None else [f"● {chosen}"])
    assert [row[1] for row in of_k[1:]] == [figures.num(e["brier"]) for e in test["ensemble"]]
    assert [row[7] for row in of_k[1:]] == [shown(e["pearson"]) for e in test["ensemble"]]
    of_members = next(table for table in page.tables if table[0][:2] == ["member", "Brier"])
    assert [row[3] for row in of_members[1:]] == [
        figures.num(m["disagreement"]) for m in test["members"]
    ]
    labels = [row[0] for table in page.tables for row in table if table[0][0] == "agreement"]
    assert labels == ["agreement", *(group["level"] for group in test["agreement"])]
    soft = next(table for table in page.tables if table[0][0] == "agreement: member 1, soft")
    assert [row[7] for row in soft[1:]] == [
        shown(group["pearson_soft_1"]) for group in test["agreement"]
    ]


def test_verdict_names_what_is_known(written):
    _, metrics, page, _ = written
    test = metrics["splits"]["test"]
    last = test["ensemble"][-1]
    assert f"a pairwise calibration error of {figures.num(last['brier'])}, 95 %" in page.text
    assert ("irreducible part of the error is not known" in page.text) == (
        test["irreducible"] is None
    )
    assert ("Against the population's true fractions" in page.text) == (
        last["true_error"] is not None
    )
    assert ("There is no single soft model" in page.text) == (test["soft_single"] is None)
    assert "with k = 1 it is" in page.text or last["k"] == 1
    assert test["prompts"] < 20 and f"Only {test['prompts']} test prompts" in page.text
    room = "" if test["floor_excess"] is None else shown(test["floor_excess"])
    assert (f"Floor − Ĉ is {room}, 95 % interval [" in page.text) == bool(room)
    worse = last["brier"] > test["coin_flip"]
    printed = " ".join(report.table(metrics).split())
    for text in (page.text, printed):
        assert ("The ensemble is worse than a coin flip" in text) == worse
    assert ("a true err. of at most 1/(4k)" in printed) == (test["floor_true"] is not None)
    for line in report.comparisons(test):
        brier, value, (low, high) = last["brier"], line["value"], line["less_ci"]
        assert line["less"] == pytest.approx(brier - value, abs=1e-12)
        assert line["side"] == ("below" if brier < value else "above")
        assert line["certain"] == (not low <= 0 <= high)
        less = f"{shown(line['less'])} {figures.pretty(report.interval([low, high]))}"
        doubt = f"; {less}" + ", which contains 0" * (not line["certain"])
        assert f"{line['side']} the {line['name']} ({figures.num(value)}{doubt})" in page.text


def test_table_is_at_most_100_columns_wide(written):
    _, metrics, _, _ = written
    lines = report.table(metrics).splitlines()
    assert max(map(len, lines)) <= 100
    members = metrics["splits"]["test"]["members"]
    start = next(i for i, line in enumerate(lines) if line.startswith("member "))
    for line, member in zip(lines[start + 1 :], members):
        assert line.split()[:3] == [
            str(member["j"]),
            figures.num(member["brier"]),
            figures.num(member["disagreement"]),
        ]


def test_text_of_the_data_is_escaped(tmp_path, unsaved):
    run, metrics = evaluated(tmp_path, categories=True)
    metrics["dataset"] = "<i>a & b</i>"
    for groups in metrics["splits"]["test"]["categories"].values():
        groups[0]["label"] = "<script>alert(1)</script>"
    metrics["diversity"]["favourites"][0] |= {"prompt": "a < b", "texts": ["</td>", " x ", "</td>"]}
    stage = {"command": "python train_rm.py --run 'a & b'", "settings": {"note": "<b>"}}
    weights = json.loads((run / "weights.json").read_text())
    p = np.array([0.25, 1.0])
    inputs = functools.partial(report.draw_inputs, weights, {}, p, p, metrics["diversity"])
    report.write(tmp_path / "out", metrics, weights, {"member_01": stage}, inputs)
    page = page_of(tmp_path / "out")
    cells = [text for table in page.tables for row in table for text in row]
    assert {"<i>a & b</i>", "<script>alert(1)</script>", "a < b", "</td>", " x "} <= {*cells}
    assert "note <b>" in cells and "python train_rm.py --run 'a & b'" in page.text
    assert "script" not in page.tags and "i" not in page.tags and "Training" not in page.text
    shared = next(table for table in page.tables if table[0] == ["member", "a < b"])
    assert shared[1:] == [["1, 3", "</td>"], ["2", " x "]]


def test_manifest_tells_how_the_run_came_about(tmp_path, unsaved):
    run, metrics = evaluated(tmp_path, continuations=False)
    settings = {"target": "centered", "train": "head", "base": "/models/of/base", "lr": 0.1}
    stage = {"settings": settings | {"seed": 3}, "target_formula": "t = 1/2 + (p - p_hat)"}
    removal = {"beta": 3.0, "removed": [2], "weight_removed": 0.25, "guarantee": "at most .3"}
    stages = {
        "data": {"settings": {"seed": 7}, "date": "2020-01-01", "seconds": 1.5},
        "member_01": stage | {"git_commit": "0123456789abcdef+", "date": "2020-01-02"},
        "member_02": stage | {"versions": {"numpy": "2.0", "python": "3.11"}},
        "weights": {"pruned": removal, "edited": ["weights.json", "rewards/01_test.npy"]},
        "evaluate": {"command": "python evaluate.py --run r\udcff"},
    }
    weights = json.loads((run / "weights.json").read_text())
    p = np.array([0.5, 1.0])
    inputs = functools.partial(report.draw_inputs, weights, {}, p, p, metrics["diversity"])
    report.write(run, metrics, weights, stages, inputs)
    page = page_of(run)
    facts = dict(page.tables[0])
    formula = (
        "centered: t = 1/2 + (p − p̂), where p̂ is the ensemble before member j (member 1: t = p)"
    )
    assert facts["Target"] == formula
    assert facts["Trained"] == "reward head only, on frozen features"
    assert facts["Base model"] == "of/base" and facts["Settings"] == "lr 0.1"
    assert facts["Seeds"] == "training 3; data 7" and facts["Date"] == "2020-01-02"
    assert facts["Git commit"] == "0123456789ab+"
    assert facts["Versions"] == "numpy 2.0, python 3.11"
    pruned = "β = 3, removed: 2, of weight .25; on train prompts at most .3"
    assert " ".join(facts["Pruned"].split()) == pruned
    assert facts["Edited by hand"] == "rewards/01_test.npy, weights.json"
    assert r"python evaluate.py --run r\udcff" in page.text  # UTF-8 cannot hold such a byte.
    assert ["data", "1.5", "–", "–", "2020-01-01"] in page.tables[-1]
    assert not (run / "figures" / "training.png").exists()  # The logs are gone, so is the figure.
    joint = {"settings": {"train": "full", "k": 4, "sharpen": 2.0, "seed": 5}}
    told = report.origin({"joint": joint, "weights": {"settings": {}}})
    assert told["settings"] == ["k 4", "sharpen 2.0"] and told["seeds"] == ["5"]
    assert report.origin({"harden": {"settings": {"layout": "equal"}}})["settings"] == [
        "layout equal"
    ]


def test_plurality_gain_where_it_was_measured(tmp_path, unsaved):
    run, metrics = evaluated(tmp_path, continuations=False)
    assert metrics["plurality"] is None and "Plurality" not in page_of(run).text
    gain = {"mixture": 0.03, "components": 3, "gain": 0.02, "ci": [0.015, 0.025]}
    gain = gain | {"single": 0.05, "several": gain}
    (run / "plurality.json").write_text(json.dumps(gain))
    evaluate.main(evaluate.parse_args(["--run", str(run), "--resamples", "50"]))
    assert json.loads((run / "metrics.json").read_text())["plurality"] == gain
    sentence = "a mixture of 3 rewards .0300: a gain of .0200, 95 % interval [.0150, .0250]"
    assert sentence in page_of(run).text
    several = gain["several"] | {"gain": -0.001, "mixture": 0.051, "ci": [-0.004, 0.002]}
    gain |= {"mixture": 0.05, "components": 1, "gain": 0.0, "ci": [0.0, 0.0], "several": several}
    (run / "plurality.json").write_text(json.dumps(gain))
    evaluate.main(evaluate.parse_args(["--run", str(run), "--resamples", "50"]))
    sentence = "on test prompts: a gain of −.0010, 95 % interval [−.0040, .0020]"
    assert sentence in page_of(run).text


@pytest.mark.parametrize("n, equal, k", [(1, False, 2), (3, True, 1), (2, False, 2), (1, False, 1)])
def test_continuations_that_rank_nothing(n, equal, k, tmp_path, unsaved):
    """One of a prompt, or several that are equal: no figure of rankings and no infinite number."""
    run = make(tmp_path / "run", valid=0.0, k=k)
    path, kept = run / "continuations.parquet", [0] * n if equal else list(range(n))
    rows = pq.read_table(path).to_pylist()
    for row, name in itertools.product(rows, ("texts", "logprob")):
        row[name] = [row[name][i] for i in kept]
    pq.write_table(pa.Table.from_pylist(rows), path)
    for path in (run / "rewards").glob("*_continuations.npy"):
        scores = np.arange(60, dtype=np.float32).reshape(5, 12)
        np.save(path, scores[:, kept])
    evaluate.main(evaluate.parse_args(["--run", str(run), "--resamples", "50"]))
    text = (run / "metrics.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    diversity, page = json.loads(text)["diversity"], page_of(run)
    ranked = n == 2
    assert diversity["kendall_tau"] == [[1.0 if ranked else None] * k] * k
    assert diversity["constant_rankings"] == [0 if ranked else 5] * k
    win = {1: None, 2: 1.0, 3: 0.5}[n]
    assert diversity["win"] == [[win] * k] * k
    assert n > 1 or diversity["favourites"] == []
    assert ("which is no ranking and has no τ, on 5 (member 1)" in page.text) != ranked
    drawn = {path.stem for path in (run / "figures").glob("*.png")}
    wanted = {"kendall": ranked, "wins": n > 1, "policies": ranked}
    assert {name: name in drawn for name in wanted} == wanted


def test_members_that_mostly_tie_are_named(tmp_path, unsaved, capsys):
    """A head of zeros takes all of the weight from one that is mostly wrong: V = 1/2 is a member,
    and the best one here. What it is stands in the console and on the page."""
    run = make(tmp_path / "run", valid=0.0, continuations=False, k=2)
    for path in (run / "rewards").glob("02_*.npy"):
        np.save(path, np.zeros_like(np.load(path)))
    capsys.readouterr()
    fit_weights.main(fit_weights.parse_args(["--run", str(run)]))
    evaluate.main(evaluate.parse_args(["--run", str(run), "--resamples", "50"]))
    words = "exact ties on most {} pairs, which count as votes of 1/2, like a coin flip's: member 2"
    printed, page = " ".join(capsys.readouterr().out.split()), page_of(run).text
    test = f"E{words.format('test')[1:]} (100.0%)."
    assert f"weights: {words.format('train')} (100.0%)" in printed and test in printed
    assert test in page
    assert weights.tied_words([0.5, 0.2], "pairs") == ""
    assert weights.tied_words([0.51, 0.5, 0.999], "pairs").endswith("1 (51.0%), 3 (99.9%)")


def test_members_that_are_mostly_wrong_are_named(tmp_path, unsaved, capsys):
    """Of the first member's rewards turned round, Phi is 1 - Phi: one of the two is contrary."""
    run = make(tmp_path / "run", valid=0.0, continuations=False, k=2)
    for path in (run / "rewards").glob("01_*.npy"):
        np.save(path.with_name(path.name.replace("01", "02")), -np.load(path))
    fit_weights.main(fit_weights.parse_args(["--run", str(run)]))
    evaluate.main(evaluate.parse_args(["--run", str(run), "--resamples", "50"]))
    printed, page = " ".join(capsys.readouterr().out.split()), page_of(run).text
    split = json.loads((run / "metrics.json").read_text())["splits"]["test"]
    phis = [member["disagreement"] for member in split["members"]]
    assert sum(phis) == pytest.approx(1) and phis[0] != phis[1]
    j = phis.index(max(phis))
    words = "Sides with fewer than half of the annotators of test pairs: member"
    words += f" {j + 1} (Phi {figures.num(phis[j])})."
    assert printed.count(words) == page.count(words) == 1
    rounded = {"members": [{"disagreement": phi} for phi in (0.5, 0.5 + 1e-12, 0.4)]}
    assert report.contrary(rounded) == ""
    for phis, later in (((0.6, 0.4), False), ((0.4, 0.6), True), ((0.6, 0.7), True)):
        words = report.contrary({"members": [{"disagreement": phi} for phi in phis]})
        for each in ("FSAM", "--target mixture", "extras/prune.py removes"):
            assert (each in words) == later
        assert "wrong sign" in words


def test_nothing_below_the_floor_is_said_in_words(tmp_path, unsaved, capsys):
    """Three votes a pair leave no room; a split of the data's own has another advice."""
    run = make(tmp_path / "run", valid=0.0, continuations=False, single=True)
    for path in (run / "data").glob("*.parquet"):
        table = pq.read_table(path)
        rows = table.to_pylist()
        for number, pair in enumerate(pair for row in rows for pair in row["pairs"]):
            pair |= {"votes_a": float(number % 4), "votes_b": 3.0 - number % 4}
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    capsys.readouterr()
    evaluate.main(evaluate.parse_args(["--run", str(run), "--resamples", "50"]))
    metrics = json.loads((run / "metrics.json").read_text())
    printed, page = " ".join(capsys.readouterr().out.split()), page_of(run).text
    for split in metrics["splits"].values():
        assert split["floor_excess"] == 0 < split["floor_single"]
        assert split["floor_single"] == pytest.approx(split["irreducible"], abs=1e-15)
    assert "nothing can be expected below the floor, not even the true" in printed
    assert "nothing can be expected below the floor, not even the true" in page
    own = (
        f"Only {metrics['splits']['test']['prompts']} test prompts, which tell little about others"
    )
    own += "; they are the data's own split, and without one a larger --test-share of data"
    assert own in printed and own in page


@pytest.mark.parametrize("first, last", [(0.1, 0.3), (0.3, 0.1)])
def test_all_members_are_compared_with_a_coin_flip_and_theorem_2(first, last, of_demo):
    test = of_demo["splits"]["test"]
    test["ensemble"][0]["brier"], test["ensemble"][-1]["brier"] = first, last
    assert 0.1 < test["coin_flip"] < 0.3
    assert ("worse than a coin flip" in report.notes(of_demo)) == (last == 0.3)
    line = report.references(test)[-1]
    assert line.name == "Theorem 2 at k = 4" and line.true_error == 1 / 16
    assert line.brier == pytest.approx(1 / 16 + test["irreducible"])


@pytest.mark.parametrize(
    "limits, doubt",
    [
        ([0.01, 0.3], ""),
        ([0.0, 0.3], ", by a difference whose interval contains 0"),
        ([-0.1, 0.3], ", by a difference whose interval contains 0"),
        (None, ", on too few prompts to tell"),
    ],
)
def test_worse_than_a_coin_flip_is_as_sure_as_its_interval(limits, doubt, of_demo):
    last = of_demo["splits"]["test"]["ensemble"][-1]
    last["brier"], last["less"]["coin_flip_ci"] = 0.3, limits
    words = f"The ensemble is worse than a coin flip, which says 1/2 for every pair{doubt}. "
    assert words in report.notes(of_demo) + " "


@pytest.mark.parametrize(
    "less, limits, certain",
    [
        (0.01, [0.0, 0.02], False),
        (0.01, [1e-9, 0.02], True),
        (-0.01, [-0.02, 0.0], False),
        (-0.01, [-0.02, -1e-9], True),
    ],
)
def test_an_interval_that_ends_at_0_is_not_certain(less, limits, certain, of_demo):
    test = of_demo["splits"]["test"]
    test["ensemble"][-1]["less"] |= {"floor_single": less, "floor_single_ci": limits}
    line = report.comparisons(test)[0]
    assert (line["name"], line["less_ci"]) == (figures.FLOOR, limits)
    assert line["side"] == ("above" if less > 0 else "below") and line["certain"] is certain


def test_the_losses_of_each_beta_are_in_its_row(of_demo):
    policy, sampled = of_demo["policy"], of_demo["diversity"]["policy"]
    betas = [f"{beta:.2g}" for beta in policy["beta"]]
    names = "brier", "brier_ci", "cross_entropy", "cross_entropy_ci", "distance"
    policy |= {name: [f"{name} of {beta}" for beta in betas] for name in names}
    sampled["distance"] = [f"sampled at {beta}" for beta in betas]
    rows = report.both_losses(of_demo)[-len(betas) :]
    for beta, row in zip(betas, rows, strict=True):
        own = [f"{name} of {beta}" for name in names]
        assert row == (f"policies, β = {beta}", *own, f"sampled at {beta}")


def test_few_prompts_have_no_interval(tmp_path, unsaved, capsys):
    run, metrics = evaluated(tmp_path, count=12, valid=0.0)  # five test prompts
    test = metrics["splits"]["test"]
    assert test["prompts"] < 10 and not any("_ci" in at and x for at, x in flat(test))
    assert "[" not in report.table(metrics)
    assert f"There is no interval: {test['prompts']} prompts" in page_of(run).text
    out = tmp_path / "out"
    shutil.copytree(run, tmp_path / "again")
    compare_runs.main(
        compare_runs.parse_args([str(run), str(tmp_path / "again"), "--out", str(out)])
    )
    (difference,) = json.loads((out / "compare.json").read_text())["differences"]
    assert difference["brier"] == 0 and difference["brier_ci"] is None


def test_another_template_has_the_same_layout(tmp_path):
    template = tmp_path / "other.html.jinja"
    template.write_text(
        '{% extends "report.html.jinja" %}{% block body %}'
        '{{ table(["name", "Brier", "interval"], rows | map("cells", "n", "x", "x_ci"), "wrr") }}'
        '{% call figure("one") %}{{ vote_kinds.sampled }}{% endcall %}{% endblock %}'
    )
    rows = [{"n": "<a>", "x": 0.5, "x_ci": [0, None]}, {"n": 3, "x": None, "x_ci": [0.1, 0.2]}]
    values = {"title": "Other & more", "rows": rows}
    page = Page(report.render(template, images={}, **values))
    table = [["name", "Brier", "interval"], ["<a>", ".5000", "–"], ["3", "–", "[.1000, .2000]"]]
    assert page.tables == [table] and "figure" not in page.tags
    assert page.text.startswith("Other & more Other & more")
    page = Page(report.render(template, images={"one": {"svg": "abc", "width": 3}}, **values))
    assert page.addresses == ["data:image/svg+xml;base64,abc"]
    assert "each pair's annotators are drawn from a population" in page.text


# ---- numbers as text, and bins


def test_numbers_as_text():
    assert [figures.num(x) for x in (0.09451, -0.5, 1.25, -0.00001, None)] == [
        ".0945",
        "-.5000",
        "1.2500",
        ".0000",
        "–",
    ]
    words = "less -.5 [-.25, .1]: 2026-11-28, cross-1, --seed 3, 1e-4, p_hat - 1"
    assert figures.pretty(words) == (
        "less −.5 [−.25, .1]: 2026-11-28, cross-1, --seed 3, 1e-4, p̂ − 1"
    )
    assert [figures.short(x) for x in (0.25, -0.25, 0, -0.001, 1)] == [
        ".25",
        "−.25",
        "0",
        ".00",
        "1.00",
    ]
    assert report.interval([0.1, 0.2]) == "[.1000, .2000]" and report.interval(None, "-") == "-"
    assert figures.pretty("p_hat - C_hat^2") == "p̂ − Ĉ²"


@pytest.mark.parametrize("n", [2, 3, 4, 7, 20, 100])
def test_each_bin_of_majority_shares_is_closed_on_the_left(n):
    counts, edges = figures.majority_bins(np.maximum(np.arange(n + 1), n - np.arange(n + 1)) / n)
    expected = [0] * 10
    for votes in range(n + 1):
        majority = max(votes, n - votes)
        expected[min((20 * majority - 10 * n) // n, 9)] += 1
    assert counts.tolist() == expected
    assert np.allclose(edges, np.linspace(0.5, 1, 11), atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 500])
def test_figures_of_few_and_of_many_values(size):
    rng = np.random.default_rng(size)
    p, p_hat = rng.random((2, size))
    for p_of_pair, predicted in ((p, p_hat), (np.round(p), np.full(size, 0.5))):
        assert figures.majority_shares(p_of_pair).axes[0].get_ylabel() == "pairs (%)"
        below = figures.reliability(p_of_pair, predicted).axes[1]
        percent = [bar.get_height() for bar in below.patches]
        assert sum(percent) == pytest.approx(100)


def test_figures_are_the_same_whatever_the_matplotlibrc(tmp_path):
    """A person's own settings, usetex without LaTeX among them, change no bit of a picture."""

    def drawn(stem):
        p = np.array([0.1, 0.5, 0.75])
        with drawing.style():
            return drawing.save(figures.majority_shares(p), tmp_path / stem)

    plain = drawn("plain")
    own = {"text.usetex": True, "font.size": 30, "savefig.bbox": "tight", "lines.linewidth": 9}
    own |= {"axes.grid": True, "figure.facecolor": "red", "svg.fonttype": "none", "backend": "ps"}
    own |= {"savefig.transparent": True, "figure.dpi": 30, "axes.titlecolor": "green"}
    with matplotlib.rc_context():
        matplotlib.rcParams.update(own)
        assert drawn("own") == plain
    for kind in ("png", "pdf"):
        one, other = (tmp_path / f"{stem}.{kind}" for stem in ("plain", "own"))
        assert one.read_bytes() == other.read_bytes()


def test_reliability_counts_each_pair_in_both_orders():
    axes = figures.reliability(np.array([0.2, 0.6]), np.array([0.25, 0.25])).axes[0]
    x, y = axes.lines[1].get_data()
    assert np.allclose(x, [0.25, 0.75]) and np.allclose(y, [0.4, 0.6])
    bars = axes.collections[0].get_segments()  # The deviation of .2 and .6 is .2.
    np.testing.assert_allclose(bars, [[[0.25, 0.2], [0.25, 0.6]], [[0.75, 0.4], [0.75, 0.8]]])


def test_reliability_has_eleven_bins():
    """Two values on either side of each middle; 0 and 1 are in the first bin and the last."""
    middles = (np.arange(11) + 0.5) / 11
    p_hat = np.concatenate([middles - 0.01, middles + 0.01, [0, 1]])
    bars = figures.reliability(p_hat, p_hat).axes[1].patches
    assert [bar.get_x() + bar.get_width() / 2 for bar in bars] == pytest.approx(middles)
    percent = 100 * np.array([3, *[2] * 9, 3]) / 24
    assert [bar.get_height() for bar in bars] == pytest.approx(percent)


def test_each_panel_draws_its_own_error_and_the_chosen_size(of_demo):
    test = of_demo["splits"]["test"]
    panels = figures.calibration(test, 2).axes
    for axes, name in zip(panels, ("brier", "true_error"), strict=True):
        drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
        (curve,) = (points for label, points in drawn.items() if label.startswith("ensemble"))
        assert curve == [[entry["k"], entry[name]] for entry in test["ensemble"]]
        assert drawn["k = 2: best on validation prompts"] == [[2, test["ensemble"][1][name]]]


def test_the_running_mean_of_the_loss_is_of_the_steps_that_there_are():
    """Of 40 steps it is over five; at the ends over three and four."""
    loss = np.random.default_rng(0).random(40)
    lines = [{"loss": x, "pairs": 4} for x in loss]
    pairs, mean = figures.training({"member 1": lines}).axes[0].lines[1].get_data()
    assert pairs.tolist() == [4 * step for step in range(1, 41)]
    assert mean == pytest.approx([loss[max(i - 2, 0) : i + 3].mean() for i in range(40)])


# ---- a second process


@pytest.mark.parametrize("cores", [1, 2])
def test_what_another_process_draws_is_the_same(cores, monkeypatch):
    monkeypatch.setattr(cli, "usable_cores", lambda: cores)
    calls = {"weights": (figures.mixture_weights, [{"k": 1, "alpha": [1.0]}])}
    with drawing.elsewhere(os.getpid) as pid, drawing.elsewhere(report.draw, calls) as drawn:
        assert (pid() == os.getpid()) == (cores == 1 or sys.platform != "linux")
        assert drawn() == report.draw(calls)


def test_what_another_process_fails_at_is_done_here(monkeypatch, capfd):
    monkeypatch.setattr(cli, "usable_cores", lambda: 2)
    here = os.getpid()
    with drawing.elsewhere(lambda: os.getpid() == here or os.kill(os.getpid(), 9)) as value:
        assert value() is True
    with drawing.elsewhere(lambda: 1 / 0) as value, pytest.raises(ZeroDivisionError):
        value()
    assert not any(capfd.readouterr())


@pytest.mark.skipif(sys.platform != "linux", reason="no second process")
@pytest.mark.parametrize("word", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_is_left(word, monkeypatch):
    """Of a process that is stopped with one beside it: both have let go of a pipe."""
    monkeypatch.setattr(cli, "usable_cores", lambda: 2)
    receive, send = os.pipe()
    process = os.fork()
    if not process:
        try:
            with drawing.elsewhere(lambda: os.write(send, b"begun") and time.sleep(60)):
                time.sleep(60)
        finally:
            os._exit(1)
    os.close(send)
    with open(receive, "rb", buffering=0) as pipe:
        assert pipe.read(5) == b"begun"
        os.kill(process, word)
        os.waitpid(process, 0)
        assert select.select([pipe], [], [], 10)[0] and pipe.read(1) == b""


# ---- as a program

# Distributions that evaluating a finished run may import from, with what matplotlib needs in turn.
NEEDED = {"numpy", "scipy", "pyarrow", "matplotlib", "jinja2", "markupsafe", "setuptools"}
NEEDED |= {"pybind11", "contourpy", "cycler", "fonttools", "kiwisolver", "packaging", "pillow"}
NEEDED |= {"pyparsing", "python-dateutil", "six", "pairwise-calibrated-rewards"}
HIDE = """
import runpy, sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name in {hidden!r}:
            raise ModuleNotFoundError("hidden: " + name, name=name)
sys.meta_path.insert(0, Hide())
for sys.argv in {commands!r}:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_finished_run_needs_few_packages(tmp_path):
    # It is copied because this process holds the lock of the one that it made.
    run = shutil.copytree(make(tmp_path / "made"), tmp_path / "run")
    (run / "weights.json").unlink()
    hidden = {
        name
        for name, distributions in packages_distributions().items()
        if not NEEDED & {distribution.lower() for distribution in distributions}
    }
    assert {"torch", "transformers", "datasets", "safetensors", "tqdm"} <= hidden

    def python(commands, more=""):
        code = HIDE.format(hidden=hidden, commands=commands) + more
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        words = [sys.executable, "-c", code]
        return subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)

    stages = ("fit_weights.py", "evaluate.py")
    done = python([[str(REPOSITORY / name), "--run", str(run)] for name in stages])
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert page_of(run).tables and (run / "figures" / "policies.pdf").exists()
    compare(json.loads((run / "metrics.json").read_text()), expected(run), 1e-9, skip=CI)
    assert "hidden: torch" in python([], "import torch").stderr  # The hook works.
