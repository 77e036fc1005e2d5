"""run_all.sh as a user runs it, on a small demo: complete, resumable, killable, and clear about what it does not accept."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "--prompts",
    "40",
    "--responses",
    "3",
    "--texts",
    "128",
    "--continuations",
    "3",
    "--threads",
    "1",
]
ENVIRONMENT = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
ENVIRONMENT.pop("PAIRWISE_COMMAND", None)


def run_all(*words, **options):
    return subprocess.run(
        ["bash", str(ROOT / "run_all.sh"), *map(str, words)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        **options,
    )


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }


def assert_refused(done, *words):
    """Exit code 2, and one line that says all of `words`."""
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    for word in words:
        assert word in lines[0]
    return lines[0]


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("demo") / "run"
    done = run_all("demo", 2, "--run", run, *SMALL)
    assert done.returncode == 0, done.stderr
    return run, done.stdout, (run / "metrics.json").read_bytes()


def test_everything_is_there(demo_run):
    run, printed, _ = demo_run
    names = contents(run).keys()
    for name in [
        "data/train.parquet",
        "data/valid.parquet",
        "data/test.parquet",
        "data/stats.json",
        "base/config.json",
        "continuations.parquet",
        "member_01/model.safetensors",
        "member_02/config.json",
        "rewards/01_train.npy",
        "rewards/02_test.npy",
        "rewards/02_continuations.npy",
        "logs/01.jsonl",
        "weights.json",
        "metrics.json",
        "report.html",
        "figures/calibration.png",
        "figures/kendall.png",
        "figures/votes.png",
        "figures/reliability.png",
        "figures/training.png",
        "figures/weights.png",
    ]:
        assert name in names
    assert not [name for name in names if "partial" in name]
    assert str(run / "report.html") in printed and "Brier" in printed
    page = (run / "report.html").read_text()
    assert (
        not re.search(r'(src|href)="http', page) and "<script" not in page
    )  # opens without a network
    assert f"bash run_all.sh demo 2 --run {shlex.quote(str(run))}" in page
    stages = json.loads((run / "manifest.json").read_text())["stages"]
    assert {
        "data",
        "base",
        "continuations",
        "member_01",
        "member_02",
        "weights",
        "evaluate",
    } <= stages.keys()
    assert all(
        stage["done"] and stage["seconds"] >= 0 and stage["versions"]["python"]
        for stage in stages.values()
    )


def test_second_run_skips_and_larger_k_continues(demo_run):
    run, _, _ = demo_run
    before = contents(run)
    done = run_all("demo", 2, "--run", run, *SMALL)
    assert done.returncode == 0, done.stderr
    assert contents(run) == before
    for stage in ("data", "base", "continuations", "member 1", "member 2", "weights", "evaluate"):
        assert re.search(rf"^{stage}: .*skipped$", done.stdout, re.MULTILINE), done.stdout

    done = run_all("demo", 3, "--run", run, *SMALL)
    assert done.returncode == 0, done.stderr
    after = contents(run)
    unchanged = [
        name
        for name in before
        if name.startswith(("data", "base", "member_", "rewards", "logs", "continuations"))
    ]
    assert unchanged and all(after[name] == before[name] for name in unchanged)
    assert json.loads(after["weights.json"])[:2] == json.loads(before["weights.json"])
    assert json.loads(after["metrics.json"])["k"] == 3

    done = run_all("demo", 2, "--run", run, *SMALL)  # fewer than there are: nothing is lost
    assert "holds more than K = 2 members" in done.stdout and contents(run) == after


def test_early_stop_ends_where_validation_says_and_again_when_resumed(demo_run, tmp_path):
    """Member 2 votes like member 1 on the validation prompts: no gain, so member 3 is not trained, now or later."""
    run = tmp_path / "run"
    shutil.copytree(demo_run[0], run)
    for path in [*run.glob("rewards/03_*"), *run.glob("logs/03*")]:  # of other tests
        path.unlink()
    shutil.copy(run / "rewards" / "01_valid.npy", run / "rewards" / "02_valid.npy")
    manifest = (run / "manifest.json").read_text().replace(str(demo_run[0]), str(run))
    (run / "manifest.json").write_text(manifest)
    for words in (["--early-stop", "4"], ["5", "--early-stop=1"]):
        (
            run / "rewards" / "02_continuations.npy"
        ).unlink()  # as if it had been killed while it scored them
        done = run_all("demo", *words, "--run", run, *SMALL)
        assert done.returncode == 0, done.stderr
        assert (run / "rewards" / "02_continuations.npy").exists()
        assert (
            "no gain from it, so member 2 is the last" in done.stdout
            and not (run / "rewards" / "03_test.npy").exists()
        )
        metrics = json.loads((run / "metrics.json").read_text())
        assert metrics["k"] == 2 and metrics["k_valid"] == 1


def test_other_arguments_are_refused_with_a_command_that_works(demo_run):
    run, _, _ = demo_run
    before = contents(run)
    line = assert_refused(
        run_all("demo", 2, "--run", run, *SMALL, "--lr", "1e-3"), "lr was 0.003, is 0.001"
    )
    assert f"--run {run}-2" in line and "--lr 1e-3" in line
    assert_refused(
        run_all("demo", 2, "--run", run, *SMALL, "--data-seed", "7"),
        "stage data",
        "seed was 0, is 7",
    )
    assert contents(run) == before


@pytest.mark.parametrize(
    "words, said",
    [
        (["demo", "0"], "K = '0'"),
        (["demo", "-1"], "K = '-1'"),
        (["demo", "x"], "K = 'x'"),
        (["demo", "2.5"], "K = '2.5'"),
        (["nosuch"], "unknown data set 'nosuch'"),
        (["demo", "2", "more"], "'more' found"),
        (["demo", "--nonsense", "1"], "--nonsense"),
        (["demo", "--lr"], "--lr needs a value"),
        (["demo", "--lr", "fast"], "--lr"),
        (["demo", "--data-seed", "x"], "--data-seed 'x'"),
        (["votes.csv", "2"], "needs --base"),
        (["missing.csv", "2", "--base", "x"], "missing.csv"),
        (["demo", "--prompts", "0"], "--prompts"),
        (["demo", "--target", "nothing"], "--target"),
        (["demo", "--iteration", "3"], "--iteration"),
        (["demo", "2", "--loss", "bt"], "no residual"),
        (["demo", "2", "--loss", "margin", "--target", "centered"], "no residual"),
        (["votes.csv", "2", "--base", "x", "--source", "other.csv"], "--source is for"),
        (["demo", "--prism-source", "x"], "--prism-source"),
        (["tldr", "--prism-source", "x"], "--prism-source"),
        (["multipref", "--continuations", "0", "--prism-source", "x"], "--prism-source"),
        (["votes.csv", "2", "--base", "x", "--early-stop"], "--valid-share"),
        (["demo", "--early-stop", "--valid-share", "0"], "--valid-share"),
        (["demo", "--early-stop=0"], "--early-stop=0 found"),
        (["demo", "--early-stop=", "2"], "--early-stop= found"),
        (["demo", "--early-stop", "2", "3"], "'3' found"),
    ],
)
def test_wrong_words_fail_before_anything_is_written(words, said, tmp_path):
    assert_refused(run_all(*words, "--run", tmp_path / "run"), said)
    assert not (tmp_path / "run").exists()


def test_help_is_one_screen():
    done = run_all("--help")
    assert (
        done.returncode == 0
        and len(done.stdout.splitlines()) <= 30
        and max(map(len, done.stdout.splitlines())) <= 120
    )


def test_killed_at_any_moment_it_ends_in_the_same_metrics(demo_run, tmp_path):
    """kill -9 of the whole process group at several moments, then the same command again."""
    reference, _, metrics = demo_run
    run = tmp_path / "run"
    for seconds in (4, 7, 9, 11):  # into the base model, the continuations, the members
        process = subprocess.Popen(
            ["bash", str(ROOT / "run_all.sh"), "demo", "2", "--run", str(run), *SMALL],
            env=ENVIRONMENT,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = run_all("demo", 2, "--run", run, *SMALL)
    assert done.returncode == 0, done.stderr
    assert (run / "metrics.json").read_bytes() == metrics
    assert (run / "base" / "model.safetensors").read_bytes() == (
        reference / "base" / "model.safetensors"
    ).read_bytes()
    assert not list(run.rglob(".partial-*"))


def test_your_own_votes_with_a_frozen_base(demo_run, tmp_path):
    run, _, _ = demo_run
    rows = [
        {
            "prompt": f"Name a fruit, number {i}.",
            "response_a": "An apple.",
            "response_b": "Perhaps it depends on you.",
            "votes_a": 1 + i % 4,
            "votes_b": 2,
        }
        for i in range(12)
    ]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "run"
    done = run_all(
        file,
        2,
        "--base",
        run / "base",
        "--train",
        "head",
        "--test-share",
        "0.25",
        "--run",
        out,
        "--epochs",
        "2",
        "--threads",
        "1",
    )
    assert done.returncode == 0, done.stderr
    assert "warning: only 3 test prompts" in done.stdout
    metrics = json.loads((out / "metrics.json").read_text())
    assert (
        metrics["dataset"] == "mine"
        and metrics["k"] == 2
        and metrics["splits"]["test"]["prompts"] == 3
        and metrics["diversity"] is None
    )
    assert metrics["splits"]["test"]["floor_true"] is None

    for weights, fit in (("qp", "qp"), ("learned", "fixed")):
        out = tmp_path / weights
        done = run_all(
            file,
            3,
            "--joint",
            "--weights",
            weights,
            "--base",
            run / "base",
            "--train",
            "head",
            "--test-share",
            "0.25",
            "--run",
            out,
            "--epochs",
            "2",
            "--threads",
            "1",
        )
        assert done.returncode == 0, done.stderr
        ensemble = json.loads((out / "metrics.json").read_text())["splits"]["test"]["ensemble"]
        assert ensemble[-1]["k"] == 3 and {entry["fit"] for entry in ensemble} == {fit}

    rows[4]["votes_a"] = -1
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert_refused(
        run_all(file, 2, "--base", tmp_path / "no-base", "--run", tmp_path / "other"),
        "mine.jsonl line 5",
        "votes_a",
    )
    assert not (tmp_path / "other").exists()
