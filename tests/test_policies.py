"""A member's preference pairs for DPO: what is chosen, and the form that TRL reads; and that no
script writes over the files of a run."""

import argparse
import importlib.util
import json
import sys

from pairwise.cli import InputError
from pairwise.run_dir import output, read_continuations

import numpy as np
import pytest
from conftest import REPOSITORY, fresh, rewards, script

export_pairs, policy_pairs = script("export_pairs"), script("policy_pairs")


def module_at(path):
    """A script as a module; path: from the repository's root."""
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), REPOSITORY / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def export(run, *flags):
    policy_pairs.main(policy_pairs.parse_args(["--run", str(run), *map(str, flags)]))


def test_chosen_is_of_the_best_quarter_and_rejected_of_the_worst():
    rng = np.random.default_rng(0)
    texts, scores = [f"text {i % 14}" for i in range(16)], rng.normal(size=16).astype(np.float32)
    scores[14:] = scores[:2]
    order = sorted(range(14), key=lambda i: -scores[i])
    allowed = {(a, b) for a in order[:3] for b in order[-3:]}
    assert (
        set(policy_pairs.pairs(texts, scores, 100, rng)) == allowed
    )  # 14 distinct texts: quarters of 3
    some = policy_pairs.pairs(texts, scores, 4, rng)
    assert len(set(some)) == 4 and set(some) < allowed
    assert (
        policy_pairs.pairs(["a", "b", "c"], np.float32([1, 1, 1]), 8, rng)
        == []
        == policy_pairs.pairs(["a", "a"], np.float32([1, 1]), 8, rng)
    )
    assert policy_pairs.pairs(["a", "b"], np.float32([0, 1]), 8, rng) == [(1, 0)]


def test_rows_are_what_trl_reads(full_run, tmp_path, capsys):
    out = tmp_path / "new" / "train.jsonl"
    export(full_run, "--member", 2, "--out", out, "--pairs", 3)
    texts, scores = read_continuations(full_run), rewards(full_run, 2, "continuations")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows and f"{len(rows)} pairs of member 2 from 2 prompts" in capsys.readouterr().out
    for row in rows:
        assert set(row) == {"prompt", "chosen", "rejected"} and row["prompt"][-1]["role"] == "user"
        assert [turn["role"] for name in ("chosen", "rejected") for turn in row[name]] == [
            "assistant"
        ] * 2
        x = texts["messages"].index(row["prompt"])
        chosen, rejected = (
            scores[x, texts["texts"][x].index(row[name][0]["content"])]
            for name in ("chosen", "rejected")
        )
        assert chosen > rejected
    before = out.read_bytes()
    export(full_run, "--member", 2, "--out", out, "--pairs", 3)
    assert out.read_bytes() == before


def test_bad_input_of_policy_pairs(full_run, data, tmp_path):
    with pytest.raises(InputError, match="03_continuations.npy: no such file"):
        export(full_run, "--member", 3, "--out", tmp_path / "x.jsonl")
    with pytest.raises(InputError, match="continuations.parquet: no such file"):
        export(fresh(data, tmp_path), "--member", 1, "--out", tmp_path / "x.jsonl")
    assert not (tmp_path / "x.jsonl").exists()


def test_no_output_is_a_file_of_a_run(data, tmp_path, monkeypatch):
    """By its path as it is typed, and by where links lead."""
    run = fresh(data, tmp_path)
    (tmp_path / "link").symlink_to(run)
    (tmp_path / "new.parquet").symlink_to(run / "data" / "valid.parquet")
    (tmp_path / "bare" / "data").mkdir(parents=True)
    (tmp_path / "bare" / "rewards").mkdir()
    monkeypatch.chdir(run / "data")
    for path in (
        *("test.parquet", "../weights.json", "new/deep.jsonl", "../../run/rewards/x.npy"),
        *(run / "manifest.json", run / "base", run / "member_01" / "x", run / "x/../metrics.json"),
        *(tmp_path / "link" / "data" / "x.jsonl", tmp_path / "link" / "report.html"),
        *(tmp_path / "new.parquet", tmp_path / "bare" / "weights.json"),
        *(tmp_path / "link" / ".lock", run / "checkpoint_01", run / "data"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match="is a run directory, whose own"):
            output(str(path))
    for path in (run / "pairs.jsonl", run / "dpo" / "data", tmp_path / "data" / "x.jsonl", "../a"):
        assert str(output(str(path))) == str(path)
    with pytest.raises(argparse.ArgumentTypeError, match="an empty word"):
        output("")


@pytest.mark.parametrize(
    "name, flags",
    [
        ("extras/export_pairs", ["--run", "r", "--out"]),
        ("extras/policy_pairs", ["--run", "r", "--member", "1", "--out"]),
        ("extras/harden", ["--run", "r", "--out"]),
        ("extras/prune", ["--run", "r", "--beta", "3", "--out"]),
        ("extras/compare", ["r", "s", "--out"]),
        ("experiments/variants", ["--run", "r", "--out"]),
        ("experiments/steps", ["--run", "r", "--out"]),
        ("experiments/policies", ["--run", "r", "--out"]),
        ("benchmarks/training", ["--json"]),
    ],
)
def test_every_script_refuses_a_file_of_a_run(name, flags, data, tmp_path, capsys):
    module = module_at(f"{name}.py")
    path = fresh(data, tmp_path) / "data" / "test.parquet"
    before = path.read_bytes()
    with pytest.raises(SystemExit) as stop:
        module.parse_args([*flags, str(path)])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "whose own data this is" in line
    assert path.read_bytes() == before


def test_a_run_that_another_call_has_pruned_meanwhile(full_run, tmp_path, monkeypatch):
    prune, out = script("prune"), tmp_path / "out"
    computed = prune.prune

    def slowly(*arguments):
        out.mkdir()
        (out / "weights.json").write_text("theirs")
        return computed(*arguments)

    monkeypatch.setattr(prune, "prune", slowly)
    with pytest.raises(InputError, match="found, a new directory expected"):
        prune.main(prune.parse_args(["--run", str(full_run), "--beta", "3", "--out", str(out)]))
    assert (out / "weights.json").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_help_without_the_packages_of_the_benchmarks(monkeypatch, capsys):
    for name in ("OPENBLAS", "MKL", "OMP"):  # They are set by it, and here restored.
        monkeypatch.setenv(f"{name}_NUM_THREADS", "1")
    for name in ("hyper_corr", "numba", "pandas"):
        monkeypatch.setitem(sys.modules, name, None)
    benchmark = module_at("benchmarks/evaluator.py")
    with pytest.raises(SystemExit) as stop:
        benchmark.parse_args(["--help"])
    assert stop.value.code == 0 and "--only" in capsys.readouterr().out
    with pytest.raises(InputError, match="is missing; pip install -r"):
        benchmark.main(benchmark.parse_args([]))


def test_the_same_export_again(data, tmp_path):
    run = fresh(data, tmp_path)
    for path in (run / "pairs.jsonl", tmp_path / "pairs.parquet"):
        words = ["--run", str(run), "--out", str(path)]
        export_pairs.main(export_pairs.parse_args(words))
        before = path.read_bytes()
        export_pairs.main(export_pairs.parse_args(words))
        assert before == path.read_bytes()
