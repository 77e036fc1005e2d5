"""run_all.sh as a user runs it, on a small demo: complete, resumable, killable, clear."""

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
from conftest import without_hashes

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--prompts 40 --responses 3 --texts 128 --continuations 3 --threads 1".split()
ENVIRONMENT = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
ENVIRONMENT.pop("PAIRWISE_COMMAND", None)


def command(*words):
    return ["bash", str(ROOT / "run_all.sh"), *map(str, words)]


def run_all(*words, python=sys.executable):
    environment = ENVIRONMENT | {"PYTHON": str(python)}
    return subprocess.run(command(*words), capture_output=True, text=True, env=environment)


def run_script(name, *words):
    """One stage, as run_all.sh starts it."""
    command = [sys.executable, str(ROOT / name), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=True)


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }


def stages(run):
    path = run / "manifest.json"
    return json.loads(path.read_text())["stages"] if path.exists() else {}


def assert_refused(done, *words):
    """Exit code 2, and one line that says all of `words`."""
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    for word in words:
        assert word in lines[0]
    return lines[0]


@pytest.fixture(scope="session")
def demo_run(made_once):
    """A run of two members, which no test may change, and what run_all.sh printed."""

    def make(directory):
        done = run_all("demo", 2, "--run", directory / "run", *SMALL)
        assert done.returncode == 0, done.stderr
        (directory / "printed.txt").write_text(done.stdout)

    directory = made_once("demo", make)
    return directory / "run", (directory / "printed.txt").read_text()


@pytest.fixture
def copied_run(demo_run, tmp_path):
    """A copy of it to change, whose manifest names its own place."""
    run = Path(shutil.copytree(demo_run[0], tmp_path / "run"))
    manifest = run / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(demo_run[0]), str(run)))
    return run


FILES = """
data/train.parquet data/valid.parquet data/test.parquet data/stats.json base/config.json
continuations.parquet member_01/model.safetensors member_02/config.json rewards/01_train.npy
rewards/02_test.npy rewards/02_continuations.npy logs/01.jsonl weights.json metrics.json report.html
figures/calibration.png figures/kendall.png figures/votes.png figures/reliability.png
figures/training.png figures/weights.png
"""
STAGES = {"data", "base", "continuations", "member_01", "member_02", "weights", "evaluate"}


def test_everything_is_there(demo_run):
    run, printed = demo_run
    names = contents(run).keys()
    assert set(FILES.split()) <= names
    assert not [name for name in names if "partial" in name]
    assert str(run / "report.html") in printed and "Brier" in printed
    page = (run / "report.html").read_text()
    # It opens without a network.
    assert not re.search(r'(src|href)="http', page) and "<script" not in page
    assert f"bash run_all.sh demo 2 --run {shlex.quote(str(run))}" in page
    assert STAGES <= stages(run).keys()
    for stage in stages(run).values():
        assert stage["done"] and stage["seconds"] >= 0 and stage["versions"]["python"]


@pytest.mark.parametrize("member", ["member_02", "member_01"])
def test_after_a_kill_between_a_member_s_rewards_and_its_end(member, copied_run):
    """Rewards are there, and the manifest knows of none: the same command goes on."""
    run, before = copied_run, contents(copied_run)
    entries = stages(run)
    entries[member] = {key: entries[member][key] for key in ("settings", "inputs")}
    entries[member]["done"] = False
    (run / "manifest.json").write_text(json.dumps({"stages": entries}))
    if member == "member_02":
        printed = run_script("fit_weights.py", "--run", run).stdout
        assert "weights: member 2 was broken off and does not count\n" in printed
    done = run_all("demo", 2, "--run", run, *SMALL)
    assert done.returncode == 0, done.stderr
    after = contents(run)
    assert {name for name in before if before[name] != after[name]} <= {
        *(f"logs/{j:02d}.jsonl" for j in (1, 2)),  # They hold the seconds.
        "report.html",
    }


def test_larger_k_continues_and_a_finished_run_is_skipped(copied_run):
    run = copied_run
    before = contents(run)
    done = run_all("demo", 3, "--run", run, *SMALL)
    assert done.returncode == 0, done.stderr
    after = contents(run)
    prefixes = ("data", "base", "member_", "rewards", "logs", "continuations")
    unchanged = [name for name in before if name.startswith(prefixes)]
    assert unchanged and all(after[name] == before[name] for name in unchanged)
    for stage in ("data", "base", "continuations", "member 1", "member 2"):
        assert re.search(rf"^{stage}: .*skipped$", done.stdout, re.MULTILINE), done.stdout
    assert json.loads(after["weights.json"])[:2] == json.loads(before["weights.json"])
    assert json.loads(after["metrics.json"])["k"] == 3
    for script in ("fit_weights.py", "evaluate.py"):
        printed = run_script(script, "--run", run).stdout
        assert re.search(r"^(weights|evaluate): .*skipped$", printed, re.MULTILINE), printed
    assert contents(run) == after


def test_early_stop_ends_where_validation_says(copied_run):
    """Member 2 votes like member 1 on the validation prompts: no gain, so there is no member 3.

    It is as if it had been killed while it scored continuations: they are scored now.
    """
    run = copied_run
    shutil.copy(run / "rewards" / "01_valid.npy", run / "rewards" / "02_valid.npy")
    without_hashes(run, inputs=True)
    (run / "rewards" / "02_continuations.npy").unlink()
    done = run_all("demo", 4, "--early-stop", "--run", run, *SMALL)
    assert done.returncode == 0, done.stderr
    assert (run / "rewards" / "02_continuations.npy").exists()
    assert "no gain from it, so member 2 is the last" in done.stdout
    assert not (run / "rewards" / "03_test.npy").exists()
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["k"] == 2 and metrics["k_valid"] == 1


# An interpreter that tells its arguments, trains members that are files, and has fit_weights.py say
# (exit code 3) that the second is the last.
TELLING = """#!/bin/bash
[[ $1 != -c && $* != *--check* ]] || exit 0
echo "$(basename "$1") ${*:4}"
while [ $# -gt 0 ]; do
    case $1 in --run) RUN=$2 ;; --iteration) touch "$RUN/rewards/0$2_test.npy" ;; esac
    [[ $1 != --early-stop* || ! -e $RUN/rewards/02_test.npy ]] || exit 3
    shift
done
"""


@pytest.mark.parametrize(
    "words, trained, expected, more",
    [
        (["4"], 0, [1, 2, 3, 4], False),
        (["2"], 3, [1, 2], True),
        (["4", "--early-stop"], 0, [1, 2], False),
        (["--early-stop", "4"], 1, [1, 2], False),
        (["5", "--early-stop=1"], 2, [1, 2], False),  # resumed, it stops again
        (["5", "--early-stop=1"], 3, [1, 2, 3], False),  # those that are there are gone through
    ],
)
def test_which_members_are_trained(words, trained, expected, more, tmp_path):
    """In a directory whose name has a letter that means something to the shell's replacement."""
    python, rewards = tmp_path / "python", tmp_path / "a&b" / "rewards"
    python.write_text(TELLING)
    python.chmod(0o755)
    rewards.mkdir(parents=True)
    for j in range(1, trained + 1):
        (rewards / f"0{j}_test.npy").touch()
    done = run_all("demo", *words, "--run", tmp_path / "a&b", python=python)
    assert done.returncode == 0, done.stderr
    assert f"--base {tmp_path}/a&b/base" in done.stdout
    called = [line.split()[0] for line in done.stdout.splitlines() if ".py " in line]
    members = ["train_rm.py", "fit_weights.py"] * len(expected)
    assert called == ["demo.py", "continuations.py", *members, "evaluate.py"]
    numbers = re.findall(r"^train_rm.py --iteration (\d)", done.stdout, re.MULTILINE)
    assert [int(number) for number in numbers] == expected
    assert ("holds more than K = " in done.stdout) == more


@pytest.mark.parametrize(
    "words, members, training",
    [
        ([], 1, "--loss bt"),
        (["2", "--target", "p"], 2, "--loss bt --target p"),
        (["1", "--loss", "margin"], 1, "--loss bt --loss margin"),
    ],
)
def test_a_set_of_one_vote_a_pair(words, members, training, tmp_path):
    python, run = tmp_path / "python", tmp_path / "run"
    python.write_text(TELLING)
    python.chmod(0o755)
    (run / "rewards").mkdir(parents=True)
    given = ["--test", "rated.jsonl", "--source", "w.parquet", "--base", "base"]
    done = run_all("webgpt", *words, *given, "--run", run, python=python)
    assert done.returncode == 0, done.stderr
    called = [line for line in done.stdout.splitlines() if ".py " in line]
    of_data = "--set webgpt --test rated.jsonl --source w.parquet"
    assert called[0] == f"binary.py --seed 0 {of_data}" and called[-1].startswith("evaluate.py")
    flags = [line.split(" ", 5)[-1] for line in called if line.startswith("train_rm.py")]
    assert flags == [training] * members


def test_other_arguments_are_refused_with_a_command_that_works(copied_run):
    run = copied_run
    before = contents(run)
    done = run_all("demo", 2, "--run", run, *SMALL, "--lr", "1e-3")
    line = assert_refused(done, "lr was 0.003, is 0.001")
    assert f"--run {run}-2" in line and "--lr 1e-3" in line
    done = run_all("demo", 2, "--run", run, *SMALL, "--data-seed", "7")
    assert_refused(done, "stage data", "seed was 0, is 7")
    assert contents(run) == before


@pytest.mark.parametrize(
    "words, said",
    [
        (["demo", "0"], "K = '0'"),
        (["demo", "-1"], "K = '-1'"),
        (["demo", "x"], "K = 'x'"),
        (["demo", "2.5"], "K = '2.5'"),
        (["nosuch"], "unknown data set 'nosuch'"),
        (["votes"], "unknown data set 'votes'"),
        (["demo", "2", "more"], "'more' found"),
        (["demo", "--nonsense", "1"], "--nonsense"),
        (["demo", "--lr"], "--lr needs a value"),
        (["demo", "--accept-edited"], "a flag of the stages"),
        (["demo", "--data-seed", "x"], "--data-seed 'x'"),
        (["votes.csv", "2"], "needs --base"),
        (["missing.csv", "2", "--base", "x"], "missing.csv"),
        (["ukpconvarg1", "2", "--base", "x"], "needs --source"),
        (["webgpt", "--base", "x"], "needs --test"),
        (["hh", "--test", "rated.jsonl"], "and --base"),
        (["gptj", "2", "--base", "x", "--test", "rated.jsonl"], "no residual"),
        (["demo", "--prompts", "0"], "--prompts"),
        (["demo", "--iteration", "3"], "--iteration"),
        (["demo", "2", "--loss", "bt"], "no residual"),
        (["votes.csv", "2", "--base", "x", "--source", "other.csv"], "--source is for"),
        (["demo", "--prism-source", "x"], "--prism-source"),
        (["tldr", "--prism-source", "x"], "--prism-source"),
        (["multipref", "--continuations", "0", "--prism-source", "x"], "--prism-source"),
        (["tldr", "--continuations", "0", "--top-p", "0.5"], "--top-p: nothing is sampled"),
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
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) <= 30 and max(map(len, lines)) <= 120


def test_killed_at_any_moment_it_ends_in_the_same_metrics(demo_run, tmp_path):
    """kill -9 of the whole process group in several stages, then the same command again."""
    reference, run = demo_run[0], tmp_path / "run"
    for stage in ("base", "continuations", "member_01"):
        kill_within(stage, run, "demo", 2, "--run", run, *SMALL)
    done = run_all("demo", 2, "--run", run, *SMALL)
    assert done.returncode == 0, done.stderr
    for name in ("metrics.json", "base/model.safetensors"):
        assert (run / name).read_bytes() == (reference / name).read_bytes()
    assert not list(run.rglob(".partial-*"))


def kill_within(stage, run, *words):
    """Start run_all.sh, and kill it and its children once the manifest says that stage has begun.

    Of a member, some steps are waited for.
    """
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command(*words), env=ENVIRONMENT, start_new_session=True, **quiet)
    log = run / "logs" / f".partial-{stage[-2:]}.jsonl"
    deadline = time.monotonic() + 300
    while stage not in stages(run) or stage.startswith("member") and not log.exists():
        assert process.poll() is None and time.monotonic() < deadline, f"{stage} has not begun"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not stages(run)[stage]["done"]


FLAGS = "--train head --test-share 0.25 --epochs 2 --threads 1".split()


@pytest.fixture
def rows():
    """Votes on one pair of responses to each of twelve prompts."""
    shared = {"response_a": "An apple.", "response_b": "Perhaps it depends on you.", "votes_b": 2}
    prompts = [f"Name a fruit, number {i}." for i in range(12)]
    return [{"prompt": prompt, "votes_a": 1 + i % 4} | shared for i, prompt in enumerate(prompts)]


def write_votes(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_your_own_votes_with_a_frozen_base(demo_run, rows, tmp_path):
    file, run = write_votes(tmp_path / "mine.jsonl", rows), tmp_path / "run"
    done = run_all(file, 2, "--base", demo_run[0] / "base", "--run", run, *FLAGS)
    assert done.returncode == 0, done.stderr
    assert "warning: only 3 test prompts" in done.stdout
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["dataset"] == "mine" and metrics["k"] == 2 and metrics["diversity"] is None
    test = metrics["splits"]["test"]
    assert test["prompts"] == 3 and test["floor_true"] is None


@pytest.mark.parametrize("weights, fit", [("qp", "qp"), ("learned", "fixed")])
def test_your_own_votes_trained_jointly(demo_run, rows, weights, fit, tmp_path):
    file, run = write_votes(tmp_path / "mine.jsonl", rows), tmp_path / "run"
    words = ["--joint", "--weights", weights, "--base", demo_run[0] / "base", "--run", run]
    done = run_all(file, 3, *words, *FLAGS)
    assert done.returncode == 0, done.stderr
    ensemble = json.loads((run / "metrics.json").read_text())["splits"]["test"]["ensemble"]
    assert ensemble[-1]["k"] == 3 and {entry["fit"] for entry in ensemble} == {fit}


def test_a_wrong_row_is_named(rows, tmp_path):
    rows[4]["votes_a"] = -1
    file, run = write_votes(tmp_path / "mine.jsonl", rows), tmp_path / "run"
    done = run_all(file, 2, "--base", tmp_path / "no-base", "--run", run)
    assert_refused(done, "mine.jsonl line 5", "votes_a")
    assert not run.exists()
