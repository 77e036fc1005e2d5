"""experiments/ and extras/plurality.py: populations, the choice on validation prompts, folds, and
the plurality gain where there are viewpoints and where there are none."""

import csv
import dataclasses
import json
import shutil

import evaluate
from pairwise import manifest, run_dir
from pairwise.cli import InputError
from pairwise.data import SPLITS, read_split

import gains
import harden
import make_members
import numpy as np
import plurality
import policy_pairs
import populations
import prune
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import steerable
import torch
import variants
from conftest import fit, fresh, without_hashes


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    made = {}
    for name in ("clusters", "continuum", "camps", "single"):
        made[name] = tmp_path_factory.mktemp(name) / "run"
        populations.main(
            populations.parse_args(
                ["--run", str(made[name]), "--population", name, "--dimension", "8"]
            )
        )
    return made


def table(run, tmp_path, *flags):
    variants.main(
        variants.parse_args(["--runs", str(run), "--out", str(tmp_path / "out.json"), *flags])
    )
    return {row["variant"]: row for row in json.loads((tmp_path / "out.json").read_text())}


def test_populations_are_what_they_say(runs, tmp_path):
    for run in runs.values():
        for split in SPLITS:
            data, x = read_split(run, split), np.load(run / "features" / f"{split}.npy")
            assert len(x) == data.response_start[-1] and (data.n == 5).all()
            assert abs(np.mean(data.p - data.p_true)) < 0.03 and abs(data.p.mean() - 0.5) < 0.05
    single, x = (
        read_split(runs["single"], "test"),
        np.load(runs["single"] / "features" / "test.npy"),
    )
    margin = np.log(single.p_true / (1 - single.p_true))
    w = np.linalg.lstsq(x[single.a] - x[single.b], margin, rcond=None)[0]
    np.testing.assert_allclose((x[single.a] - x[single.b]) @ w, margin, atol=1e-3)
    assert abs(np.linalg.norm(w) - 2) < 1e-3
    again = tmp_path / "again"
    populations.main(
        populations.parse_args(["--run", str(again), "--population", "camps", "--dimension", "8"])
    )
    assert (again / "data" / "test.parquet").read_bytes() == (
        runs["camps"] / "data" / "test.parquet"
    ).read_bytes()


def test_recommended_on_clusters_and_continuum(runs, tmp_path):
    """At k = 6: an error against the truth below a quarter of literal FSAM's where there are
    viewpoints, below .8 of it on a continuum."""
    for name, factor in (("clusters", 0.25), ("continuum", 0.8)):
        rows = table(
            runs[name],
            tmp_path,
            "--k",
            "6",
            "--variants",
            "fsam_residual",
            "joint",
            "hardened",
            "hardened_joint",
        )
        chosen = rows["recommended"]
        assert chosen["true_error"] < factor * rows["fsam_residual"]["true_error"]
        assert chosen["brier"] < min(rows["floor_single"]["brier"], rows["coin_flip"]["brier"])
        assert chosen["valid"] == min(
            rows[v]["valid"] for v in ("fsam_residual", "joint", "hardened", "hardened_joint")
        )
        assert (
            rows["irreducible"]["brier"] < chosen["brier"] and rows["soft_single"]["over_soft"] == 0
        )


def test_made_members_have_the_errors_of_the_table(runs, tmp_path, no_figures, capsys):
    """After fit_weights.py and evaluate.py; a second call finds them there."""
    run = shutil.copytree(runs["camps"], tmp_path / "camps")
    row = table(run, tmp_path, "--k", "3", "--variants", "fsam_centered")["fsam_centered"]
    words = ["--run", str(run), "--variant", "fsam_centered", "--k", "3"]
    make_members.main(make_members.parse_args(words))
    assert run_dir.kind_of(run) == "imported"
    fit(run)
    evaluate.main(evaluate.parse_args(["--run", str(run), "--resamples", "50"]))
    ensemble = json.loads((run / "metrics.json").read_text())["splits"]["test"]["ensemble"]
    for name in ("brier", "true_error"):
        assert ensemble[-1][name] == pytest.approx(row[name], abs=1e-9)
    make_members.main(make_members.parse_args(words))
    assert "member 3: its rewards are there, skipped" in capsys.readouterr().out
    with pytest.raises(InputError, match="set of rewards"):
        make_members.main(make_members.parse_args([*words, "--seed", "1"]))
    (run / "data" / "valid.parquet").unlink()
    (run / "manifest.json").unlink()
    with pytest.raises(InputError, match="no validation prompts found"):
        make_members.main(make_members.parse_args(words))


def test_folds_hold_every_prompt_once(runs):
    folds = variants.read_runs(runs["camps"], 0, 5)
    names = [set(fold["test"][0].prompt_id) for fold in folds]
    assert (
        sum(map(len, names))
        == len(set.union(*names))
        == sum(len(read_split(runs["camps"], split).prompt_id) for split in SPLITS)
    )
    for i, fold in enumerate(folds):
        assert set(fold["valid"][0].prompt_id) == names[(i + 1) % 5] and not names[i] & set(
            fold["train"][0].prompt_id
        )
        split, x = fold["test"]
        assert len(x) == split.response_start[-1] and split.a.max() < len(x)
    with pytest.raises(InputError, match="--folds 999: at least as many prompts"):
        variants.read_runs(runs["camps"], 0, 999)


def test_seeds_are_no_further_prompts(runs, tmp_path):
    """The same prompts under more seeds have no narrower interval."""
    flags = "--k", "2", "--variants", "fsam_centered"
    one = table(runs["single"], tmp_path, *flags)
    four = table(runs["single"], tmp_path, *flags, "--seeds", "0", "1", "2", "3")
    for name in ("coin_flip", "floor_single"):  # They have nothing of a seed.
        for figure in ("brier", "brier_ci", "true_error"):
            assert four[name][figure] == pytest.approx(one[name][figure])
    again = table(runs["single"], tmp_path, *flags, "--seeds", "0", "0")
    assert again["fsam_centered"]["brier_ci"] == one["fsam_centered"]["brier_ci"]
    folds = "--folds", "3", "--seeds", "0", "1"
    row = table(runs["single"], tmp_path, *flags, *folds)["coin_flip"]
    pairs = sum(len(read_split(runs["single"], split).p) for split in SPLITS)
    errors = sum(np.sum((read_split(runs["single"], x).p - 0.5) ** 2) for x in SPLITS)
    assert row["brier"] == pytest.approx(errors / pairs)


def test_single_votes_are_not_tested_in_folds(runs, tmp_path):
    run = fresh(runs["single"], tmp_path)
    path = run / "data" / "train.parquet"
    rows = pq.read_table(path).to_pylist()
    single = rows[0]["pairs"][0]
    single |= {"votes_a": 1, "votes_b": 0}
    pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(path)), path)
    without_hashes(run)
    n = np.concatenate([fold["test"].split.n for fold in variants.read_runs(run, 0, 4)])
    assert (n >= 2).all()
    assert len(n) == sum(len(read_split(run, split).p) for split in SPLITS) - 1


def test_what_variants_cannot_do_is_told_first(runs, tmp_path, capsys):
    words = ["--runs", str(runs["single"]), "--variants", "hardened_taste", "--k", "7"]
    with pytest.raises(SystemExit):
        variants.parse_args(words)
    assert "an even --k expected" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    args = variants.parse_args([*words[:-1], "2", "--out", str(tmp_path / "file" / "t.csv")])
    with pytest.raises(InputError, match="t.csv: cannot be written"):
        variants.main(args)
    assert capsys.readouterr().out == ""


def test_one_validation_prompt_shows_no_gain(runs):
    """Neither does a mixture that is not better at all."""
    splits = plurality.read_run(runs["camps"], 0)
    one = np.arange(len(splits["valid"].split.prompt_id)) == 0
    splits["valid"] = plurality.restricted(splits["valid"], one)
    assert plurality.plurality(splits, 0)["components"] == 1
    flat = {name: x._replace(features=0 * x.features) for name, x in splits.items()}
    assert plurality.plurality(flat, 0)["components"] == 1


def test_restricted_and_merged_are_inverse(runs):
    """And what data has beside votes goes with its pairs and prompts."""
    featured = plurality.read_features(runs["camps"])["test"]
    split = featured.split
    judgments = np.arange(2 * len(split.a), dtype=np.int32).reshape(-1, 2)
    categories = [{"topic": name} for name in split.prompt_id]
    split = dataclasses.replace(split, judgments=judgments, categories=categories)
    featured = featured._replace(split=split)
    keep = np.arange(len(split.prompt_id)) < 40
    first, second = (plurality.restricted(featured, mask) for mask in (keep, ~keep))
    assert first.split.judgments.tolist() == judgments[: split.pair_start[40]].tolist()
    assert second.split.categories == categories[40:]
    joined = variants.merged([first, second])
    np.testing.assert_array_equal(joined.features, featured.features)
    for field in dataclasses.fields(split):
        np.testing.assert_array_equal(getattr(joined.split, field.name), getattr(split, field.name))
    bare = second._replace(split=dataclasses.replace(second.split, judgments=None))
    assert variants.merged([first, bare]).split.judgments is None
    assert len(plurality.counted(featured).split.judgments) == len(split.a)


def test_pairs_of_one_vote_and_prompts_without_others_do_not_count(runs):
    """The same as if they were not there; without any other they stay."""
    featured = plurality.read_features(runs["camps"])["test"]
    split = featured.split
    votes_a, votes_b = split.votes_a.copy(), split.votes_b.copy()
    first = slice(split.pair_start[0], split.pair_start[1])  # all of the first prompt
    one = np.r_[np.arange(first.start, first.stop), split.pair_start[2]]
    votes_a[one], votes_b[one] = 1, 0
    single = featured._replace(split=dataclasses.replace(split, votes_a=votes_a, votes_b=votes_b))
    found = plurality.counted(single)
    assert found.split.prompt_id == split.prompt_id[1:] and len(found.split.p) == len(
        split.p
    ) - len(one)
    kept = np.delete(np.arange(len(split.p)), one)
    for name in ("a", "b"):
        before = featured.features[getattr(split, name)[kept]]
        np.testing.assert_array_equal(found.features[getattr(found.split, name)], before)
    np.testing.assert_array_equal(found.split.p, split.p[kept])
    assert (np.diff(found.split.pair_start) > 0).all()
    votes_a[:], votes_b[:] = 1, 0
    only = featured._replace(split=dataclasses.replace(split, votes_a=votes_a, votes_b=votes_b))
    assert plurality.counted(only) is only


def test_fit_is_at_a_minimum(runs):
    """The gradient of what fit minimises vanishes where it stops, and the same seed ends in the
    same weights."""
    train = plurality.read_run(runs["camps"], 0)["train"]
    split, x = train
    w = plurality.fit_single(train, split.p, 1e-2, 0)
    np.testing.assert_array_equal(w, plurality.fit_single(train, split.p, 1e-2, 0))
    at = torch.from_numpy(w).requires_grad_()
    q = torch.sigmoid(torch.from_numpy(x[split.a] - x[split.b]) @ at[0])
    ((q - torch.from_numpy(split.p)).square().mean() + 1e-2 * at.square().sum()).backward()
    assert at.grad.abs().max() < 1e-4


def test_plurality_gain(runs):
    """Its interval excludes zero where there are clusters and camps, and covers it where one
    viewpoint is voted on with noise."""
    for name, several in (("clusters", True), ("camps", True), ("single", False)):
        plurality.main(plurality.parse_args(["--run", str(runs[name])]))
        found = json.loads((runs[name] / "plurality.json").read_text())
        assert set(found) == {"single", "mixture", "components", "gain", "ci", "several"}
        best = found["several"]
        for each in (found, best):
            assert each["gain"] == pytest.approx(found["single"] - each["mixture"])
            assert each["ci"][0] <= each["gain"] <= each["ci"][1]
        assert best["components"] > 1 and best["ci"][0] < best["ci"][1]
        if several:
            assert found["ci"][0] > 0 and best == {key: found[key] for key in best}
        else:
            assert (found["gain"], found["ci"]) == (0, [0, 0]) and best["ci"][0] <= 0


def test_table_of_gains(runs, tmp_path):
    """The figures of plurality.json; the limits of few prompts are empty."""
    run = tmp_path / "few"
    run.mkdir()
    found = {"mixture": 0.03, "components": 3, "gain": 0.02, "ci": [None, None]}
    found = found | {"single": 0.05, "several": found}
    (run / "plurality.json").write_text(json.dumps(found))
    plurality.main(plurality.parse_args(["--run", str(runs["single"])]))
    several = json.loads((runs["single"] / "plurality.json").read_text())["several"]
    out = tmp_path / "gains.csv"
    gains.main(gains.parse_args(["--runs", str(run), str(runs["single"]), "--out", str(out)]))
    few, new = csv.DictReader(out.read_text().splitlines())
    cells = ["0.03", "3", "0.02", "", ""]
    assert list(few.values()) == ["few", "0.05", *cells, *cells]
    assert (new["components"], new["gain"]) == ("1", "0")
    for name, value in (("gain", several["gain"]), ("gain_high", several["ci"][1])):
        assert float(new[f"several_{name}"]) == pytest.approx(value, rel=1e-5)
    call = gains.parse_args(["--runs", str(run), "--out", str(out)])
    (run / "plurality.json").write_text("{}")
    with pytest.raises(InputError, match="no mixture found"):
        gains.main(call)
    (run / "plurality.json").unlink()
    with pytest.raises(InputError, match="plurality.json: no such file; extras/plurality.py makes"):
        gains.main(call)


def test_unlike_runs_together(runs, tmp_path):
    """No truth and no irreducible error of all where one of them has none."""
    run = fresh(runs["single"], tmp_path)
    path = run / "data" / "stats.json"
    path.write_text(path.read_text().replace('"sampled"', '"dependent"'))
    path = run / "data" / "test.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["p_true"]), path)
    without_hashes(run)
    words = ["--runs", str(runs["single"]), str(run), "--variants", "joint", "--k", "2"]
    rows = variants.rows_of(variants.parse_args(words), 2)
    assert {row["true_error"] for row in rows} == {None}
    assert "irreducible" not in [row["variant"] for row in rows]


def test_one_train_prompt_cannot_be_both(runs, tmp_path):
    run = fresh(runs["single"], tmp_path)
    (run / "data" / "valid.parquet").unlink()
    path = run / "data" / "train.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 1), path)
    responses, path = len(table["responses"][0]), run / "features" / "train.npy"
    np.save(path, np.load(path)[:responses])
    without_hashes(run)
    with pytest.raises(InputError, match="1 train prompt and none for validation"):
        plurality.main(plurality.parse_args(["--run", str(run)]))


def test_without_validation_prompts_and_csv(runs, tmp_path, capsys):
    run = tmp_path / "run"
    for split in ("train", "test"):
        for part in (f"data/{split}.parquet", f"features/{split}.npy", "data/stats.json"):
            (run / part).parent.mkdir(parents=True, exist_ok=True)
            (run / part).write_bytes((runs["single"] / part).read_bytes())
    variants.main(
        variants.parse_args(
            [
                "--runs",
                str(run),
                "--out",
                str(tmp_path / "t.csv"),
                "--variants",
                "hardened",
                "--k",
                "4",
            ]
        )
    )
    assert "no validation prompts" in capsys.readouterr().out
    [line] = (tmp_path / "t_splits.jsonl").read_text().splitlines()
    assert json.loads(line)["test"] == [*map(str, read_split(run, "test").prompt_id)]
    with open(tmp_path / "t.csv", newline="") as file:
        rows = {row["variant"]: row for row in csv.DictReader(file)}
    assert (
        rows["recommended"]["brier"] == rows["hardened"]["brier"]
        and float(rows["hardened"]["true_error"]) < 0.02
    )
    (run / "features" / "test.npy").unlink()
    with pytest.raises(InputError, match="train_rm.py --train head"):
        variants.main(variants.parse_args(["--runs", str(run)]))


def test_features_that_do_not_fit_are_one_line(runs, tmp_path):
    run = shutil.copytree(runs["camps"], tmp_path / "run")
    path = run / "features" / "test.npy"
    whole = np.load(path)
    for array, words in (
        (whole[:-1], "floats \\(600, d\\) expected"),
        (whole[0], "floats"),
        (whole.astype(int), "int64"),
        (whole[:, 1:], "7, 8 features found"),
        (np.where(whole == whole[3, 2], np.nan, whole), "not finite"),
    ):
        np.save(path, array)
        with pytest.raises(InputError, match="edited or damaged"):
            plurality.read_run(run, 0)
        manifest.accept_edited(run)
        with pytest.raises(InputError, match=words) as error:
            plurality.read_run(run, 0)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "script, flags",
    [
        (populations, ["--population", "camps", "--responses", "1"]),
        (populations, ["--population", "camps", "--votes", "1"]),
        (populations, ["--population", "camps", "--voters", "999999999"]),
        (variants, ["--folds", "2"]),
        (variants, ["--folds", "1_0"]),
        (variants, ["--k", "0"]),
        (variants, ["--k", "100"]),
        (steerable, ["--trials", "999999999"]),
        (prune, ["--out", "o", "--beta", "1e300"]),
        (prune, ["--out", "o", "--beta", "inf"]),
        (harden, ["--out", "o", "--k", "0"]),
        (harden, ["--out", "o", "--k", "999999999999"]),
        (policy_pairs, ["--out", "o", "--member", "1000000000"]),
    ],
)
def test_numbers_out_of_range_are_one_line(script, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        script.parse_args(["--run", "r", *flags])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and flags[-2] in line


def test_more_comparisons_than_pairs(full_run):
    flags = ["--run", str(full_run), "--comparisons", "9999"]
    with pytest.raises(InputError, match="fewer than the .* test pairs expected"):
        steerable.main(steerable.parse_args(flags))
