"""A member's preference pairs for DPO: what is chosen, what is never, and the form that TRL reads."""

import json

from pairwise.cli import InputError
from pairwise.run_dir import read_continuations

import numpy as np
import pytest
from conftest import fresh, rewards, script

policy_pairs = script("policy_pairs")


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
