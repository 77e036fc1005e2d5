"""experiments/real_votes.py in miniature: chosen rate, members, hardened ones, and little time."""

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from pairwise import manifest

import pytest
import real_votes
from conftest import REPOSITORY

FLAGS = "--test-share 0.4 --valid-share 0.2 --pairs-per-step 8 --device cpu".split()


def words(votes, base, out, *more):
    return ["--votes", votes, "--base", base, "--out", out, "--at-once", "2", *more, *FLAGS]


def start(*words):
    command = [sys.executable, REPOSITORY / "experiments" / "real_votes.py", *words]
    return subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture
def votes(tmp_path):
    """Fifteen prompts with one pair each, of which annotators disagree."""
    path = tmp_path / "votes.jsonl"
    rows = [
        {
            "prompt": f"which of the two, number {i}?",
            "response_a": "one " * (i % 4 + 1),
            "response_b": "two " * (i % 3 + 1),
            "votes_a": i % 4,
            "votes_b": 3 - i % 4,
        }
        for i in range(15)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_rates_members_and_table(votes, base, tmp_path):
    out = tmp_path / "out"
    more = "--k", "2", "--seeds", "3", "--lr", "1e-3", "1e-2"
    process = start(*words(votes, base, out, *more))
    said, errors = process.communicate()
    assert process.returncode == 0, errors
    name = base.name
    soft = {lr: real_votes.soft_on_validation(out / f"{name}_{lr}_3") for lr in ("0.001", "0.01")}
    best = min(soft, key=soft.get)
    assert f"{name}: --lr {best}; soft" in said.decode()
    with open(out / "table.csv", encoding="utf-8", newline="") as file:
        rows = {(row["run"], row["k"]): row for row in csv.DictReader(file)}
    other = next(lr for lr in soft if lr != best)
    chosen = f"{name}_{best}_3"
    assert {*rows} == {
        *((chosen, "1"), (chosen, "2"), (f"{name}_{other}_3", "1")),
        *((f"{name}_{best}_bce_3", "1"), (f"{name}_{best}_hard_3", "2")),
    }
    bce = rows[f"{name}_{best}_bce_3", "1"]
    assert bce["loss"] == "bce" and float(bce["lr"]) == float(best) and bce["data_seed"] == "3"
    settings = manifest.entries(out / chosen)["member_02"]["settings"]
    assert settings["seed"] == 3 and settings["train"] == "full" and settings["lr"] == float(best)
    lines = (out / "table_splits.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1  # one split for all


@pytest.fixture(autouse=True)
def handlers():
    """main has its own; afterwards they are what they were."""
    before = {word: signal.getsignal(word) for word in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for word, handler in before.items():
        signal.signal(word, handler)


@pytest.fixture
def args(tmp_path):
    """Of two bases, with the default rates."""
    (tmp_path / "votes.jsonl").touch()
    given = ["--votes", str(tmp_path / "votes.jsonl"), "--base", "one", "b/two", "--at-once", "2"]
    given += ["--out", str(tmp_path), "--seeds", "0", "--k", "3", "--valid-share", "0.2"]
    return real_votes.parse_args(given)


def test_the_best_rate_is_that_of_validation_prompts(args, tmp_path):
    for lr, valid, test in (("0.0001", 0.2, 0.1), ("0.0003", 0.1, 0.3), ("0.001", 0.3, 0.2)):
        splits = {"valid": {"soft_single": valid}, "test": {"soft_single": test}}
        run = tmp_path / f"one_{lr}_0"
        run.mkdir()
        (run / "metrics.json").write_text(json.dumps({"splits": splits}), encoding="utf-8")
    assert real_votes.best_rate(args, "one") == 3e-4
    (run / "metrics.json").write_text(json.dumps({"splits": {"test": {}}}), encoding="utf-8")
    with pytest.raises(real_votes.cli.InputError, match="no validation prompts"):
        real_votes.best_rate(args, "one")
    args.lr = [1e-3]  # There is nothing to choose.
    assert real_votes.best_rate(args, "one") == 1e-3


def test_a_rate_that_fails_holds_up_its_base_alone(args, tmp_path, monkeypatch, capsys):
    """Then what is missing and why is said, and no member of that base is trained."""

    def line(args, run, k, *_):
        failing = run == "one_0.001_0"
        return (
            ["bash", "-c", "echo first; echo train: error: this; echo; exit 2"]
            if failing
            else ["true"]
        )

    monkeypatch.setattr(real_votes, "run_all", line)
    monkeypatch.setattr(real_votes, "best_rate", lambda args, name: 3e-4)
    monkeypatch.setattr(real_votes, "python", lambda *words: ["true"])
    with pytest.raises(SystemExit) as stop:
        real_votes.main(args)
    assert stop.value.code == 3
    assert capsys.readouterr().err.count("members found") == 1
    said = [path.name for path in tmp_path.glob("*.log")]
    assert {name for name in said if name.startswith("one")} == {
        f"one_{lr}_0.log" for lr in args.lr
    }
    assert {"two_0.0003_bce_0.log", "two_0.0003_hard_0.log"} < {*said}


def test_unfinished_runs_are_evaluated(args, full_run, tmp_path, monkeypatch, capsys):
    """Two of three members were trained in time: the table has both."""
    args.base, args.lr, args.minutes = ["one"], [1e-3], 0.5
    shutil.copytree(full_run, tmp_path / "one_0.001_0")
    monkeypatch.setattr(real_votes, "EVALUATION", 0.9)
    long = lambda args, run, k, *_: ["true"] if k == 1 else ["sleep", "600"]  # noqa: E731
    monkeypatch.setattr(real_votes, "run_all", long)
    with pytest.raises(SystemExit) as stop:
        real_votes.main(args)
    path = tmp_path / "one_0.001_0"
    words = f"{path}: 2 members found; no time was left (one_0.001_0.log)"
    assert stop.value.code == 3 and words in capsys.readouterr().err
    with open(tmp_path / "table.csv", encoding="utf-8", newline="") as file:
        assert [(row["run"], row["k"]) for row in csv.DictReader(file)] == [
            ("one_0.001_0", "1"),
            ("one_0.001_0", "2"),
        ]


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").split()[2] != "Z"


def test_what_is_begun_ends_with_the_time(args, tmp_path):
    """Also what the commands have started, as soon as that wants; what was waiting is named too."""
    (tmp_path / "pids").mkdir()
    child = "trap 'sleep 1; touch ended; exit' TERM; touch $BASHPID; while :; do sleep 0.1; done"
    jobs = {name: (1, [["bash", "-c", f"cd {tmp_path}/pids; ({child}); true"]]) for name in "abc"}
    missing = real_votes.run_jobs(args, jobs, time.monotonic() + 2)
    assert missing == dict.fromkeys("abc", real_votes.NO_TIME)
    assert (tmp_path / "pids" / "ended").exists()
    pids = [int(path.name) for path in (tmp_path / "pids").iterdir() if path.name.isdecimal()]
    assert len(pids) == 2 and not any(map(is_alive, pids))


def test_of_one_that_fails_the_last_line_is_said(args, tmp_path):
    """Of this call, and what needed it is not begun."""
    (tmp_path / "c.log").write_text("an older line\n", encoding="utf-8")
    script = "echo first; echo train: error: this >&2; echo; exit 2"
    jobs = {
        "a": (1, [["bash", "-c", script], ["touch", str(tmp_path / "after")]]),
        "b": (1, [["true"], ["bash", "-c", "echo second >&2"], ["touch", str(tmp_path / "b")]]),
        "c": (1, [["false"]]),
    }
    missing = real_votes.run_jobs(args, jobs, time.monotonic() + 60)
    assert missing == {"a": "train: error: this", "c": "it said nothing"}
    assert not (tmp_path / "after").exists() and (tmp_path / "b").exists()
    assert (tmp_path / "b.log").read_text(encoding="utf-8") == "second\n"


def test_little_time_and_a_signal(votes, base, tmp_path):
    out = tmp_path / "out"
    process = start(*words(votes, base, out, "--minutes", "0.02"))
    _, errors = process.communicate()
    assert process.returncode == 3
    lines = [line for line in errors.decode().splitlines() if "no time was left" in line]
    assert len(lines) == 3 and "Traceback" not in errors.decode()
    process = start(*words(votes, base, out))
    while process.poll() is None and not list(out.glob("*/data")):
        time.sleep(0.1)
    process.send_signal(signal.SIGHUP)
    _, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGHUP and "Traceback" not in errors.decode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            assert str(out).encode() not in path.read_bytes()


def test_wrong_words(votes, base, tmp_path, capsys):
    for given, expected in (
        (words(votes, base, tmp_path, "--seed", "1"), "--seed found, which is set here"),
        (words(votes, base, tmp_path, "--lr=x"), "invalid positive value"),
        (words(votes, base, tmp_path)[:-6], "no --valid-share found"),
    ):
        with pytest.raises(SystemExit) as stop:
            real_votes.parse_args([*map(str, given)])
        assert stop.value.code == 2 and expected in capsys.readouterr().err
    for given, expected in (
        (["--votes", str(votes), "--base", "a/x", "b/x"], "different names"),
        (["--votes", str(votes), "--base", "."], "different names"),
        (["--votes", str(tmp_path / "none"), "--base", "x"], "no such file"),
    ):
        args = real_votes.parse_args([*given, "--out", str(tmp_path / "out"), "--lr", "1"])
        with pytest.raises(real_votes.cli.InputError, match=expected):
            real_votes.main(args)
    assert not (tmp_path / "out").exists()
