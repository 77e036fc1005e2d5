"""extras/compare.py: every number and paired interval from the files alone, what is refused, and
what the settings are called."""

import json
import shutil
from pathlib import Path

import evaluate
from pairwise import drawing, manifest, metrics
from pairwise.cli import InputError
from pairwise.data import write_split

import compare
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import of_one_vote
from test_evaluate import draw_rewards, files_of, make, read_pairs

RESAMPLES = 400


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three runs on the same data, the third with fixed weights of two members; read only."""
    root = tmp_path_factory.mktemp("runs")
    first = make(root / "first", count=30, continuations=False)
    for number, name in enumerate(("seed_1", "seed_2", "fixed"), 1):
        run, rng = Path(shutil.copytree(first, root / name)), np.random.default_rng(number)
        for path in sorted((run / "rewards").glob("*.npy")):
            np.save(path, draw_rewards(rng, int(path.name[:2]), len(np.load(path))))
        for path in (run / "rewards").glob("03_*" if name == "fixed" else "none"):
            path.unlink()
        evaluate_weights(run, [[0.25, 0.75]] if name == "fixed" else None)
    return root


def evaluate_weights(run, fixed):
    import fit_weights

    (run / "weights.json").unlink()
    if fixed:
        (run / "weights.json").write_text(
            json.dumps(
                [
                    {
                        "k": len(alpha),
                        "alpha": alpha,
                        "fit": "fixed",
                        "train_mse": None,
                        "kkt": None,
                    }
                    for alpha in fixed
                ]
            )
        )
        manifest.accept_edited(run)
    else:
        fit_weights.main(fit_weights.parse_args(["--run", str(run)]))


def compared(out, *settings):
    words = [*map(str, settings), "--out", str(out), "--resamples", str(RESAMPLES)]
    compare.main(compare.parse_args(words))
    return json.loads((out / "compare.json").read_text())


def brier_terms(run):
    """(prompt of each pair, {k: squared error of each pair}) from the files."""
    prompt, first, second, p, *_ = read_pairs(run, "test")
    votes = (np.sign(first - second) + 1) / 2
    weights = [np.array(entry["alpha"]) for entry in json.loads((run / "weights.json").read_text())]
    return prompt, {len(alpha): (alpha @ votes[: len(alpha)] - p) ** 2 for alpha in weights}


def test_every_number_and_interval_from_the_files(runs, tmp_path):
    before = files_of(runs)
    found = compared(
        tmp_path / "out", runs / "first", f"{runs / 'seed_1'},{runs / 'seed_2'}", runs / "fixed"
    )
    assert files_of(runs) == before
    prompt, first = brier_terms(runs / "first")
    (_, one), (_, two), (_, fixed) = (
        brier_terms(runs / name) for name in ("seed_1", "seed_2", "fixed")
    )
    seeds = {k: (one[k] + two[k]) / 2 for k in one}
    terms = {"first": first, "seed": seeds, "fixed": fixed}
    each = np.eye(prompt.max() + 1).take(prompt, 1)  # the same resampled prompts for all
    counts = metrics.evaluator.bootstrap_sums(each, RESAMPLES, 0)

    def check(entry, errors):
        assert entry["brier"] == pytest.approx(errors.mean(), abs=1e-12)
        assert entry["brier_ci"] == pytest.approx(
            np.percentile(counts @ errors / counts.sum(1), [2.5, 97.5]), abs=1e-12
        )

    assert [s["name"] for s in found["settings"]] == list(terms) and [
        s["k"] for s in found["settings"]
    ] == [[3], [3, 3], [2]]
    for s in found["settings"]:
        check(s, terms[s["name"]][max(terms[s["name"]])])
        assert [e["k"] for e in s["ensemble"]] == sorted(terms[s["name"]])
        for e in s["ensemble"]:
            check(e, terms[s["name"]][e["k"]])
    assert found["settings"][1]["brier_of_runs"] == pytest.approx([one[3].mean(), two[3].mean()])
    assert [(d["a"], d["b"]) for d in found["differences"]] == [
        ("first", "seed"),
        ("first", "fixed"),
        ("seed", "fixed"),
    ]
    for d in found["differences"]:
        a, b = terms[d["a"]], terms[d["b"]]
        check(d, a[max(a)] - b[max(b)])  # each at its own largest k
        assert [e["k"] for e in d["by_k"]] == sorted(a.keys() & b.keys())
        for e in d["by_k"]:
            check(e, a[e["k"]] - b[e["k"]])


def test_settings_agree_with_the_metrics_of_their_runs(runs, tmp_path):
    found = compared(tmp_path / "out", runs / "first", runs / "fixed")
    for s in found["settings"]:
        evaluate.main(
            evaluate.parse_args(
                [
                    "--run",
                    s["runs"][0],
                    "--out",
                    str(tmp_path / s["name"]),
                    "--resamples",
                    str(RESAMPLES),
                ]
            )
        )
        test = json.loads((tmp_path / s["name"] / "metrics.json").read_text())["splits"]["test"]
        names = [
            f"{name}{ci}"
            for name in ("brier", "brier_soft", "excess", "true_error")
            for ci in ("", "_ci")
        ]
        assert {name: s[name] for name in names} == {
            name: pytest.approx(test["ensemble"][-1][name], abs=1e-12) for name in names
        }
        for name in ("soft_single", "soft_scaled"):
            assert s[name] == test[name] and s[f"{name}_ci"] == test[f"{name}_ci"]
        assert found["lines"] == {
            name: pytest.approx(test[name], abs=1e-12) for name in found["lines"]
        }


def test_a_copy_differs_by_nothing_and_the_order_turns_the_sign(runs, tmp_path):
    """Prompts that are resampled together: apart from each other, two copies would differ."""
    copy = shutil.copytree(runs / "first", tmp_path / "copy")
    (d,) = compared(tmp_path / "out", runs / "first", copy)["differences"]
    assert (
        d["brier"] == 0
        and d["brier_ci"] == [0, 0]
        and all(e["brier_ci"] == [0, 0] for e in d["by_k"])
    )
    one, other = (
        compared(tmp_path / "out", *(runs / name for name in names))["differences"][0]
        for names in (("first", "fixed"), ("fixed", "first"))
    )
    assert other["brier"] == -one["brier"] and other["brier_ci"] == pytest.approx(
        [-x for x in one["brier_ci"][::-1]], abs=1e-15
    )


def test_what_is_written_and_printed(runs, tmp_path, capsys):
    compared(tmp_path / "out", runs / "first", runs / "seed_1", runs / "fixed")
    printed = capsys.readouterr().out
    assert {
        str(path.relative_to(tmp_path / "out"))
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    } == {"compare.json", "compare.html", "figures/compare.png", "figures/compare.pdf"}
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "http" not in page.replace("http://www.w3.org", "") and "<script" not in page
    for name in ("first", "seed_1", "fixed"):
        assert name in printed and f">{name}<" in page
    before = files_of(tmp_path / "out")
    compared(tmp_path / "out", runs / "first", runs / "seed_1", runs / "fixed")
    assert files_of(tmp_path / "out") == before


def test_names_are_text_in_the_figure_and_on_the_page(runs, tmp_path, monkeypatch, recwarn):
    """A run may be called anything: _x, which matplotlib hides, $ for its mathematics, tags."""
    names = ["_x", "a$\\frac$", "$5 -1 p_hat", "<script>", "日本", "b\n"]
    saved, save = [], drawing.save
    monkeypatch.setattr(drawing, "save", lambda *to: saved.append(to[0]) or save(*to))
    for name in names:
        shutil.copytree(runs / "first", tmp_path / name)
    words = [str(tmp_path / name) for name in names]
    compared(tmp_path / "out", *words)
    (fig,) = saved
    drawn = [*names[:5], "b\\n"]
    (legend,) = fig.legends
    assert [text.get_text() for text in legend.get_texts()][:6] == drawn
    labels = [text.get_text() for text in fig.axes[1].get_yticklabels()]
    assert labels[0] == f"{drawn[0]} − {drawn[1]}" and labels[-1] == f"{drawn[4]} − {drawn[5]}"
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "&lt;script&gt;" in page and "<script" not in page
    assert page.count(">$5 -1 p_hat</t") > 1  # in cells and as a column's head
    assert compare.figures.drawable("\udcff") == "\\udcff"
    assert not [str(warning.message) for warning in recwarn if "lyph" in str(warning.message)]


@pytest.mark.parametrize("words", [["a,", "b"], ["a", ",b"], ["a,,c", "b"], ["", "b"]])
def test_a_comma_without_a_run_is_one_line(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="a run expected on both sides of a comma") as error:
        compare.named_settings(words)
    assert "\n" not in str(error.value)


def test_resamples_that_no_memory_holds_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        compare.parse_args(["a", "b", "--out", "o", "--resamples", "1000001"])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "at most 10^6" in line


def rewritten(run, change):
    path = run / "data" / "test.parquet"
    rows = pq.read_table(path).to_pylist()
    write_split(path, change(rows) or rows)
    manifest.accept_edited(run)


def more_votes(rows):
    rows[2]["pairs"][0]["votes_a"] += 1


def other_text(rows):
    rows[1]["responses"][0] += "!"


def swap(rows):
    rows[0]["pairs"][0] |= {"a": rows[0]["pairs"][0]["b"], "b": rows[0]["pairs"][0]["a"]}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda run: rewritten(run, more_votes), "of prompt 3 the pairs"),
        (lambda run: rewritten(run, other_text), "of prompt 2 the responses"),
        (lambda run: rewritten(run, swap), "of prompt 1 the pairs"),
        (
            lambda run: rewritten(run, lambda rows: [row | {"prompt_id": "x"} for row in rows]),
            "of prompt 1 the prompt_id",
        ),
        (
            lambda run: rewritten(
                run, lambda rows: [{x: y for x, y in row.items() if x != "p_true"} for row in rows]
            ),
            "of prompt 1 the p_true",
        ),
        (
            lambda run: (run / "data" / "stats.json").write_text(
                (run / "data" / "stats.json").read_text().replace('"sampled"', '"population"')
            ),
            "votes 'population' found",
        ),
        (
            lambda run: (run / "data" / "stats.json").write_text(
                (run / "data" / "stats.json").read_text().replace('"drop"', '"half"')
            ),
            "ties 'half' found, 'drop' expected",
        ),
        (lambda run: shutil.rmtree(run / "data"), "no such file"),
        (lambda run: shutil.rmtree(run / "rewards"), "no rewards"),
        (lambda run: (run / "data" / "test.parquet").write_text("x"), "not prepared data"),
    ],
)
def test_runs_on_other_test_data_are_refused(runs, tmp_path, change, message):
    other = Path(shutil.copytree(runs / "first", tmp_path / "other"))
    change(other)
    manifest.accept_edited(other)
    with pytest.raises(InputError, match=message) as error:
        compared(tmp_path / "out", runs / "seed_1", other)
    assert (
        len(str(error.value).splitlines()) == 1
        and str(other) in str(error.value)
        and not (tmp_path / "out").exists()
    )


def test_a_setting_lacks_what_one_of_its_runs_lacks(runs, tmp_path):
    """A run of majority labels has no soft model as trained, but a scaled one."""
    hard = Path(shutil.copytree(runs / "seed_1", tmp_path / "hard"))
    entries = manifest.entries(hard)
    entries["member_01"] = {"settings": {}, "inputs": {}, "tied_pairs": 0, "done": True}
    (hard / "manifest.json").write_text(json.dumps({"stages": entries}))
    words = [f"{runs / 'first'},{hard}", str(runs / "seed_2")]
    both, soft = compare.compare(compare.named_settings(words), 20, 0)["settings"]
    assert both["soft_single"] is None and both["soft_scaled"] is not None
    assert soft["soft_single"] is not None and both["brier"] is not None


def test_fewer_prompts_are_refused(runs, tmp_path):
    other = Path(shutil.copytree(runs / "first", tmp_path / "other"))
    rows = pq.read_table(other / "data" / "test.parquet").to_pylist()
    write_split(other / "data" / "test.parquet", rows[:-1])
    for path in (other / "rewards").glob("*_test.npy"):
        np.save(path, np.load(path)[: -len(rows[-1]["responses"])])
    manifest.accept_edited(other)
    with pytest.raises(InputError, match=f"{len(rows) - 1} prompts found, {len(rows)} expected"):
        compared(tmp_path / "out", runs / "seed_1", other)


def test_other_bytes_and_other_categories_are_the_same_data(runs, tmp_path):
    other = Path(shutil.copytree(runs / "first", tmp_path / "other"))
    rewritten(other, lambda rows: [row | {"categories": {"topic": "tea"}} for row in rows])
    assert compared(tmp_path / "out", runs / "first", other)["differences"][0]["brier_ci"] == [0, 0]


def test_pairs_of_one_vote_do_not_count(runs, tmp_path):
    single, without = map(compare.test_errors, of_one_vote(runs / "first", tmp_path))
    pairs, _, _ = compare.test_errors(runs / "first")
    assert single[0].sum() < pairs.sum()
    np.testing.assert_equal(single, without)


def test_names_are_short_and_distinct(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "with,comma").mkdir()
    for words, names in [
        (["runs/a", "runs/b"], ["a", "b"]),
        (["x/a_s0,x/a_s1", "x/b_s0,x/b_s1"], ["a_s", "b_s"]),
        (["a/run", "b/run"], ["a/run", "b/run"]),
        (["fsam/0,fsam/1", "joint/0,joint/1"], ["fsam", "joint"]),
        (["with,comma", "b"], ["with,comma", "b"]),
        (["r-1,r-2", "r-3,r-4"], ["r-1+r-2", "r-3+r-4"]),
    ]:
        assert [name for name, _ in compare.named_settings(words)] == names
    for words in (["a", "a"], ["a,b", "./b"]):
        with pytest.raises(InputError, match="is given twice"):
            compare.named_settings(words)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["a", "b"], "--out"),
        (["--out", "o"], "RUN,RUN"),
        (["a", "b", "--out", "o", "--refit"], "--refit"),
        (["a", "b", "--out", "o", "--run", "c"], "--run"),
    ],
)
def test_bad_flags_are_one_line(flags, said, capsys):
    with pytest.raises(SystemExit) as stop:
        compare.parse_args(flags)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and said in lines[0]


def test_one_setting_and_a_run_as_out_are_refused(runs, tmp_path):
    with pytest.raises(InputError, match="1 setting found, at least 2"):
        compared(tmp_path / "out", f"{runs / 'seed_1'},{runs / 'seed_2'}")
    before = files_of(runs)
    with pytest.raises(InputError, match="another run directory"):
        compared(runs / "first", runs / "seed_1", runs / "seed_2")
    assert files_of(runs) == before


def test_the_page_is_of_the_same_call_as_the_numbers(runs, tmp_path, monkeypatch):
    """A call that is killed between them leaves no page of an earlier one."""
    compared(tmp_path / "out", runs / "seed_1", runs / "seed_2")
    monkeypatch.setattr(compare, "write", None)
    with pytest.raises(TypeError):
        compared(tmp_path / "out", runs / "seed_2", runs / "seed_1")
    assert not (tmp_path / "out" / "compare.html").exists()
