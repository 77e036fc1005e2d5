"""benchmarks/card.sh in miniature: every part runs on a CPU, and what goes wrong is in the file."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import REPOSITORY

sys.path.append(str(REPOSITORY / "benchmarks"))
import card

PYTHON = """#!/bin/sh
case "$1" in
    -c) exit 0 ;;
esac
part=$2; shift 2
echo "$part $*" | sed "s#--work [^ ]* --out [^ ]*##" >>$LOG
case "$part $*" in
    *--ended*) ;;
    b1" "*) exit 1 ;;
    c" "*) kill -9 $$ ;;
    f" "*) exit 3 ;;
    e" "*) exit 124 ;;
esac
"""


def measure(part, work, out=None):
    """One part in this process; its entry in the file."""
    out = out or work
    words = [part, "--work", str(work), "--out", str(out), "--device", "cpu"]
    card.main(card.parse_args(words))
    return entry_of(out, part)


def entry_of(out, part):
    whole = json.loads((out / "card-cpu.json").read_text(encoding="utf-8"))
    assert whole.keys() >= {"card", "driver", "memory", "cores", "host_gb"}
    return whole["parts"][part]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A directory with a base, and the entry of part base."""
    work = tmp_path_factory.mktemp("card") / "work"
    assert measure("base", work)["state"] == "done"
    return work


def test_members(work):
    for part, member in (("a1", 1), ("a2", 2)):
        found = measure(part, work)
        assert found["state"] == "done" and found["small"], found
        assert found.keys() >= {"date", "command", "commit", "versions", "seconds", "gib"}
        phases = found["phases"]
        assert [*phases] == ["load_base", "offload", "forward_backward", "step", "save", "score"]
        assert len(phases["forward_backward"]) == len(phases["step"]) == 4
        assert "first_bases" in phases["step"][0] and "new_bases" in phases["step"][3], member
        assert len(found["steps_with_new_bases"]) == 1 and len(found["steps_without"]) == 2
        calls = phases["forward_backward"]
        assert all(0 < call["run_tokens"] < call["distinct_tokens"] for call in calls)
        # Of two responses to a prompt the prompt is run once; the last layer is not counted.
        assert found["run_tokens_per_second"] < found["distinct_tokens_per_second"]
        # A CPU keeps all activations.
        assert found["layers_recomputed"] == 0
        assert found["with_recomputation"] == found["model_flops_utilisation"]
    assert not (work / "run-a").exists()


def test_memory_runs_out(work, monkeypatch):
    """What was measured before that is in the file."""
    from pairwise import training

    def runs_out(*_):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(training, "backward", runs_out)
    with pytest.raises(SystemExit):
        measure("a1", work)
    found = entry_of(work, "a1")
    assert found["state"] == "failed" and "lower --micro-batch-tokens" in found["reason"]
    assert [*found["phases"]] == ["load_base", "offload"] and found["gib"]["host"] > 0


def test_adapters_and_answers(work):
    found = measure("b2", work)
    assert found["state"] == "done" and found["phases"]["save"], found
    found = measure("c", work)
    assert found["state"] == "done" and found["tokens_per_second"] > 0, found
    assert [call["tokens"] for call in found["phases"]["generate"]] == [24, 24]


def test_killed_and_continued(work):
    found = measure("e", work)
    assert found["state"] == "done", found
    assert found["killed_after"] == ["000002"] and found["steps"] == [2, 4]
    assert len(found["equal"]) == 3 and all(found["equal"].values())
    assert found["largest_difference_of_rewards"] == 0
    offload = found["in_one_go"]["phases"]["offload"][0]
    assert offload["paged"] > 0 and offload["resident"] > 0


def test_numbers_of_small_models(tmp_path):
    found = measure("f", tmp_path)
    assert found["state"] == "done", found
    assert len(found["packing"]) == 12 and len(found["paging"]) == 4
    assert all(row["packs"] == "segments" for row in found["packing"].values())
    assert found["linear_algebra"]["seconds"]["qr"].keys() == {"32", "64"}


def test_parts_of_a_layer(tmp_path, monkeypatch):
    """Every way to run norms and adapters that a CPU has gives the same rewards, but for BF16."""
    import card_layers

    monkeypatch.setattr(card_layers, "FUSED", (card_layers.native,))
    monkeypatch.setattr(card_layers, "LAYERS", (2, 1))
    monkeypatch.setattr(card_layers, "TIMES", 1)
    found = measure("l", tmp_path)
    assert found["state"] == "done" and len(found["products"]) == 3, found
    assert len(found["a_layer"]) == 6
    for name, row in found["a_layer"].items():
        assert row["rewards_from_the_first"] < 0.02, name


@pytest.mark.parametrize("name", ["trl", "datasets"])
def test_without_trl(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    found = measure("d", tmp_path)
    words = f"{name} is missing; pip install"
    assert found["state"] == "skipped" and found["reason"].startswith(words)


def test_time_runs_out(work, monkeypatch):
    """As test_memory_runs_out; the next call says why the part ended."""
    from pairwise import training

    monkeypatch.setattr(training, "backward", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(card.Stopped):
        measure("a1", work)
    signal.signal(signal.SIGTERM, before)
    words = ["a1", "--work", str(work), "--out", str(work), "--device", "cpu"]
    card.main(card.parse_args([*words, "--ended", "failed", "out of time"]))
    found = entry_of(work, "a1")
    assert found["reason"] == "out of time" and [*found["phases"]] == ["load_base", "offload"]


def test_our_side_of_the_race():
    """TRL's is in benchmarks/requirements.txt alone."""
    import card_trl

    small = SimpleNamespace(small=True, device="cpu")
    card_trl.bench.KINDS["small"] = next(iter(card_trl.SMALL_KINDS.values()))[0]
    data = card_trl.bench.make_data("small", 1)
    for recompute in (True, False):
        make = functools.partial(card_trl.ours, small, data, 128, recompute)
        found = card_trl.measure(small, make)
        assert len(found["seconds"]) == card_trl.TURNS, found


def test_a_name_that_has_gone_or_is_not_called(tmp_path):
    import card_meter
    import card_train

    hooks = (*card_train.TRAINING, card_train.SAVING, *card_train.BASES, *card_train.SAMPLING)
    for owner, name, *_ in hooks:
        assert callable(getattr(owner, name))
    meter, owner = card_meter.Meter("cpu"), SimpleNamespace(here=lambda: 1)
    hook = (owner, "here", "phase", card_meter.nothing)
    before = owner.here
    with card_meter.hooked([hook], card_meter.clocked(meter)):
        with pytest.raises(AssertionError, match=r"^never called: here \(phase\)$"):
            card_meter.check_called(meter, [hook])
        assert owner.here() == 1
    card_meter.check_called(meter, [hook])
    assert owner.here is before and meter.phases["phase"][0]["seconds"] >= 0
    with pytest.raises(AttributeError, match="gone"):
        with card_meter.hooked([(owner, "gone", "phase", None)], card_meter.clocked(meter)):
            pass


def test_what_fails_keeps_its_numbers(tmp_path, monkeypatch):
    def part(card):
        card.keep(first=1.23456, second=float("nan"))
        raise ValueError("a reason\nand more")

    monkeypatch.setitem(sys.modules, "card_checks", SimpleNamespace(PARTS={"f": part}))
    with pytest.raises(SystemExit) as stop:
        measure("f", tmp_path)
    found = entry_of(tmp_path, "f")
    assert stop.value.code == 1 and found["first"] == 1.235 and found["second"] is None
    assert found["state"] == "failed" and found["reason"] == "ValueError: a reason"
    # One that was stopped keeps them too; of an earlier call that ended, nothing stays.
    for state, kept in (("running", True), ("done", False)):
        card.enter(tmp_path / "card-cpu.json", "f", {"state": state, "first": 1})
        words = ["f", "--work", "w", "--out", str(tmp_path), "--device", "cpu"]
        card.main(card.parse_args([*words, "--ended", "failed", "stopped"]))
        found = entry_of(tmp_path, "f")
        assert found["reason"] == "stopped" and ("first" in found) == kept


def test_name_of_the_file():
    names = {"NVIDIA H100 80GB HBM3": "h100-80gb", "NVIDIA A100-SXM4-80GB": "a100-sxm4-80gb"}
    names |= {"NVIDIA GeForce RTX 4090": "geforce-rtx-4090", "NVIDIA H200": "h200"}
    assert {card_name: card.file_name(card_name) for card_name in names} == names


def shell(tmp_path, *words, **environment):
    """card.sh with an interpreter that notes what it would measure."""
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(PYTHON, encoding="utf-8")
    python.chmod(0o755)
    log.write_text("", encoding="utf-8")
    environment = {"PYTHON": str(python), "LOG": str(log), "OUT": str(tmp_path)} | environment
    command = ["bash", str(REPOSITORY / "benchmarks" / "card.sh"), *words]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True)
    lines = log.read_text(encoding="utf-8").splitlines()
    return done.returncode, [" ".join(line.split()) for line in lines]


def test_order_and_ends_of_parts(tmp_path):
    code, lines = shell(tmp_path)
    stopped = [
        "c --ended failed killed, as where memory runs out",
        "f --ended failed exit code 3",
        "e --ended failed out of time: stopped after 180 seconds",
    ]
    c, f, e = zip("cfe", stopped)
    assert code == 1 and lines == ["base", "a1", *c, "b2", *e, *f, "d", "a2", "b1", "l"]
    assert shell(tmp_path, "d", "--small") == (0, ["d --small"])
    assert shell(tmp_path, "a", WORK=str(tmp_path / "w")) == (0, ["base", "a1", "a2"])
    assert shell(tmp_path, "x") == (2, [])
    for minutes, left in (("0", "-1[0-9]"), ("1", "[345][0-9]")):
        words = f"e --ended skipped about 90 seconds needed, {left} left of {minutes} minutes"
        code, lines = shell(tmp_path, "e", WORK=str(tmp_path / "w"), MINUTES=minutes)
        assert code == 0 and re.fullmatch(words, lines[-1]), lines
