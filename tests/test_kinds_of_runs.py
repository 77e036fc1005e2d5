"""Every tool on every kind of run: it works, or says in one line why not, and nothing is
changed."""

import json

import harden
import prune
import pytest
import respond
import train_joint
from conftest import FLAGS, HEAD, export, fit, fresh, train

import evaluate
import score
from pairwise.cli import InputError


def arguments(*words):
    return [str(word) for word in words]


@pytest.fixture(scope="module")
def runs(full_run, head_run, data, base, tmp_path_factory):
    """{kind: run}, each in a directory beside the others; read only."""
    there = tmp_path_factory.mktemp("kinds")
    made = {
        "full": fresh(full_run, there, "full"),
        "head": fresh(head_run.run, there, "head"),
        "joint": fresh(data, there, "joint"),
        "learned": fresh(data, there, "learned"),
    }
    for kind, weights in (("joint", "qp"), ("learned", "learned")):
        flags = (
            "--base",
            base,
            "--train",
            "head",
            "--epochs",
            3,
            "--k",
            3,
            "--weights",
            weights,
            *FLAGS,
        )
        train_joint.main(train_joint.parse_args(arguments("--run", made[kind], *flags)))
    fit(made["joint"])
    for kind, source in (("hardened", "head"), ("hardened joint", "joint")):
        made[kind] = there / kind
        harden.main(
            harden.parse_args(arguments("--run", made[source], "--out", made[kind], "--k", 4))
        )
    for kind, source in (("pruned", "full"), ("pruned hardened", "hardened")):
        made[kind] = there / "deeper" / kind
        prune.main(
            prune.parse_args(arguments("--run", made[source], "--beta", 2.5, "--out", made[kind]))
        )
    return made


KINDS = (
    "full",
    "head",
    "joint",
    "learned",
    "hardened",
    "hardened joint",
    "pruned",
    "pruned hardened",
)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluated_and_scored(runs, base, tmp_path, kind):
    run = runs[kind]
    evaluate.main(
        evaluate.parse_args(arguments("--run", run, "--out", tmp_path / "out", "--resamples", 100))
    )
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["splits"]["test"]["soft_single"] is not None) == (
        kind in ("full", "head", "pruned")
    )
    (tmp_path / "questions.jsonl").write_text(
        json.dumps(
            {"prompt": "how can i get fit ?", "responses": ["run .", "walk more .", "rest ."]}
        )
        + "\n"
    )
    out = tmp_path / "scores.jsonl"
    score.main(
        score.parse_args(
            arguments(
                "--run",
                run,
                "--base",
                base,
                "--threads",
                1,
                "--device",
                "cpu",
                tmp_path / "questions.jsonl",
                "--out",
                out,
            )
        )
    )
    row = json.loads(out.read_text())
    assert (
        len(row["rewards"]) == 3
        and {len(rewards) for rewards in row["rewards"]} == {metrics["k"]}
        and len(row["p_hat"]) == 3
    )


@pytest.mark.parametrize("kind", KINDS)
def test_answers(runs, base, kind, capsys):
    flags = (
        "--base",
        base,
        "--mode",
        "overton",
        "--n",
        3,
        "--max-tokens",
        6,
        "--json",
        "--threads",
        1,
        "--device",
        "cpu",
    )
    respond.main(respond.parse_args(arguments("--run", runs[kind], *flags, "how can i get fit ?")))
    row = json.loads(capsys.readouterr().out)
    alpha = json.loads((runs[kind] / "weights.json").read_text())[-1]["alpha"]
    assert (
        row["weights"] == alpha and sum(candidate["count"] for candidate in row["candidates"]) == 3
    )
    assert {j for answer in row["answers"] for j in answer["members"]} == {
        j for j, weight in enumerate(alpha, 1) if weight
    }


@pytest.mark.parametrize("kind", ["joint", "learned", "hardened", "pruned"])
def test_takes_no_further_member(runs, base, kind):
    with pytest.raises(InputError, match="run found, whose members are complete"):
        train(runs[kind], base, *HEAD, iteration=4)


@pytest.mark.parametrize(
    "kind, said",
    [
        ("learned", "learned with the rewards, which stay"),
        ("hardened", "hardened weights found"),
        ("pruned", "pruned weights found"),
    ],
)
def test_weights_that_stay(runs, kind, said):
    before = (runs[kind] / "weights.json").read_bytes()
    with pytest.raises(InputError, match=said):
        fit(runs[kind])
    assert (runs[kind] / "weights.json").read_bytes() == before


@pytest.mark.parametrize("kind", ["hardened", "pruned", "pruned hardened"])
def test_not_hardened_twice(runs, tmp_path, kind):
    with pytest.raises(InputError, match="the one that it was made from expected"):
        harden.main(harden.parse_args(arguments("--run", runs[kind], "--out", tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_pruned_run_s_members_are_links(runs, base):
    with pytest.raises(InputError, match="a link to the run that this one was pruned from"):
        export(runs["pruned"], base, 1)


def test_continuations_after_joint_training(runs, full_run, base, tmp_path):
    run = fresh(runs["joint"], tmp_path)
    (run / "continuations.parquet").write_bytes((full_run / "continuations.parquet").read_bytes())
    with pytest.raises(InputError, match="trained before its continuations.parquet was there"):
        flags = "--base", base, "--train", "head", "--epochs", 3, "--k", 3, *FLAGS
        train_joint.main(train_joint.parse_args(arguments("--run", run, *flags)))


@pytest.mark.parametrize("script", [harden, train_joint])
def test_at_most_99_members(script, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(
            arguments(
                "--run",
                tmp_path,
                *(("--out", tmp_path) if script is harden else ("--base", "b")),
                "--k",
                100,
            )
        )
    assert "at most 99 expected" in capsys.readouterr().err
