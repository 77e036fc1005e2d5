"""experiments/real_votes.py in miniature: chosen rate, members, hardened ones, and little time."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import real_votes
from conftest import REPOSITORY, manifest

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
        *((f"{name}_bce_3", "1"), (f"{name}_hard_3", "2")),
    }
    bce = rows[f"{name}_bce_3", "1"]
    assert bce["loss"] == "bce" and float(bce["lr"]) == float(best) and bce["data_seed"] == "3"
    settings = manifest(out / chosen)["member_02"]["settings"]
    assert settings["seed"] == 3 and settings["train"] == "full" and settings["lr"] == float(best)
    lines = (out / "table_splits.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1  # one split for all


def test_the_best_rate_is_that_of_validation_prompts(tmp_path, capsys):
    for lr, valid, test in (("0.0001", 0.2, 0.1), ("0.0003", 0.1, 0.3), ("0.001", 0.3, 0.2)):
        splits = {"valid": {"soft_single": valid}, "test": {"soft_single": test}}
        run = tmp_path / f"base_{lr}_0"
        run.mkdir()
        (run / "metrics.json").write_text(json.dumps({"splits": splits}), encoding="utf-8")
    args = real_votes.parse_args(["--votes", "v", "--base", "base", "--out", str(tmp_path)])
    assert real_votes.best_rate(args, "base", 0) == 3e-4
    (run / "metrics.json").write_text(json.dumps({"splits": {"test": {}}}), encoding="utf-8")
    with pytest.raises(real_votes.cli.InputError, match="--valid-share"):
        real_votes.best_rate(args, "base", 0)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
        return file.read().split()[2] != "Z"


@pytest.fixture
def args(tmp_path):
    given = ["--votes", "v", "--base", "base", "--out", str(tmp_path), "--at-once", "2"]
    return real_votes.parse_args(given)


def test_what_is_begun_ends_with_the_time(args, tmp_path):
    """Also what the command itself has started; what was waiting is named too."""
    child = f"sleep 600 & echo $! >{tmp_path}/pid; wait"
    jobs = {name: (1, [["bash", "-c", child]]) for name in "abc"}
    missing = real_votes.do(args, jobs, time.monotonic() + 1)
    assert missing == dict.fromkeys("abc", "no time was left")
    pid = int((tmp_path / "pid").read_text(encoding="utf-8"))
    assert not is_alive(pid)


def test_of_one_that_fails_the_last_line_is_said(args, tmp_path):
    done = tmp_path / "done"
    jobs = {
        "a": (
            1,
            [["bash", "-c", "echo first; echo train: error: this >&2; exit 2"], ["touch", done]],
        ),
        "b": (1, [["true"], ["bash", "-c", "echo second >&2"], ["touch", tmp_path / "b"]]),
    }
    missing = real_votes.do(args, jobs, time.monotonic() + 60)
    assert missing == {"a": "train: error: this"}
    assert not done.exists() and (tmp_path / "b").exists()
    assert (tmp_path / "b.log").read_text(encoding="utf-8") == "second\n"


def test_little_time_and_a_signal(votes, base, tmp_path):
    out = tmp_path / "out"
    process = start(*words(votes, base, out, "--minutes", "0.02"))
    _, errors = process.communicate()
    assert process.returncode == 3
    lines = [line for line in errors.decode().splitlines() if "no time was left" in line]
    assert len(lines) == 3 and "Traceback" not in errors.decode()
    process = start(*words(votes, base, out))
    while not list(out.glob("*/data")):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 143 and "Traceback" not in errors.decode()
    ran = subprocess.run(["pgrep", "-f", str(out)], capture_output=True, text=True)
    assert not ran.stdout


def test_wrong_words(votes, base, tmp_path, capsys):
    for more, expected in (
        (["--seed", "1"], "--seed found, which is set here"),
        (["--lr=x"], "invalid positive value"),
    ):
        with pytest.raises(SystemExit) as stop:
            real_votes.parse_args([*map(str, words(votes, base, tmp_path, *more))])
        assert stop.value.code == 2 and expected in capsys.readouterr().err
    args = real_votes.parse_args(["--votes", "v", "--base", "a/x", "b/x", "--out", "o"])
    with pytest.raises(real_votes.cli.InputError, match="two of one name"):
        real_votes.main(args)
