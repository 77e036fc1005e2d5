"""SOAP within a memory budget, checkpoints and recomputation: the same bits as without.

That holds whatever the budget, and wherever training was killed.
"""

import contextlib
import importlib
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pairwise
import train_rm
from pairwise import files, manifest, training
from pairwise.cli import InputError
from pairwise.scale import checkpoint, offload
from pairwise.scale.checkpoint import Checkpoints
from pairwise.scale.offload import (
    BUFFERS,
    Offload,
    choose_resident,
    names_memory_flags,
    state_shapes,
)
from pairwise.scale.recompute import Room, recompute_activations

import numpy as np
import pytest
import steps
import torch
from conftest import FLAGS, FULL, HEAD, REPOSITORY, fresh, leftovers, train
from pytorch_optimizer import SOAP
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, LlamaConfig, OPTConfig


def tiny(dtype, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=200,
        num_labels=1,
        pad_token_id=0,
    )
    model = AutoModelForSequenceClassification.from_config(config, dtype=dtype).eval()
    model.score.float()
    return model


def groups_of(model, dim=64):
    matrices, plain = training.parameter_groups(model)
    return [
        {"params": matrices, "max_precondition_dim": dim},
        {"params": plain, "max_precondition_dim": 1},
    ]


def soap(groups):
    return SOAP(groups, lr=1e-2, weight_decay=0.1, precondition_frequency=3)


def loss_of(model, step, part):
    ids = torch.from_numpy(np.random.default_rng([step, part]).integers(1, 200, (3, 17)))
    return (
        model.score(model.model(input_ids=ids, use_cache=False).last_hidden_state[:, -1].float())
        .square()
        .sum()
    )


def run_plainly(dtype, steps, seed=0):
    """Run one library optimizer over all parameters and float32 masters, which offloading equals.

    Return the masters and the model.
    """
    model = tiny(dtype, seed)
    groups = groups_of(model)
    twins = [
        (p, p if p.dtype == torch.float32 else p.detach().float())
        for group in groups
        for p in group["params"]
    ]
    known = {id(p): master for p, master in twins}
    optimizer = soap(
        [group | {"params": [known[id(p)] for p in group["params"]]} for group in groups]
    )
    for step in range(steps):
        for part in range(2):
            loss_of(model, step, part).backward()
            for p, master in twins:
                if p is not master:
                    master.grad = (
                        p.grad.float() if master.grad is None else master.grad.add_(p.grad)
                    )
                    p.grad = None
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        for _ in range(2 if step == 0 else 1):
            optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for p, master in twins:
                p.copy_(master)
    return [master.detach() for _, master in twins], model


def masters_of(offload):
    return [param.value() for param in offload.params]


def steps_of(offload, model, steps):
    for step in steps:
        for part in range(2):
            loss_of(model, step, part).backward()
        offload.step(1e-2 / (step + 1))


def share_of_all(share, dtype):
    """Bytes of a share of all that the optimizer may move."""
    return (
        None
        if share is None
        else int(
            share * 4 * sum(part.numbers for part in Offload(groups_of(tiny(dtype)), soap).params)
        )
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [None, 0, 0.5, 0.7, 0.9])
def test_any_budget_gives_the_same_bits(dtype, budget):
    """Nine steps with two new bases equal those of one optimizer over all parameters.

    budget: the fraction of all masters and states.
    """
    expected, plain = run_plainly(dtype, 9)
    model = tiny(dtype)
    offload = Offload(groups_of(model), soap, share_of_all(budget, dtype))
    steps_of(offload, model, range(9))
    offload.close()
    assert bool(offload.paged) == (budget is not None) and bool(offload.resident) == (budget != 0)
    for found, value in zip(masters_of(offload), expected):
        assert torch.equal(found, value)
    for (name, found), value in zip(model.named_parameters(), plain.parameters()):
        assert torch.equal(found, value), name
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_masters_hold_what_bfloat16_cannot():
    model = tiny(torch.bfloat16)
    offload = Offload(groups_of(model), soap, 0)
    steps_of(offload, model, range(2))
    for master, part in zip(masters_of(offload), offload.params):
        assert torch.equal(master.to(part.p.dtype), part.p)
    assert not torch.equal(masters_of(offload)[0], offload.params[0].p.float())


def test_state_shapes_are_the_library_s():
    """...in order, for matrices within, on and beyond the largest dimension, a row, a vector."""
    shapes = [(5, 7), (8, 8), (9, 4), (4, 9), (9, 9), (1, 6), (6,), (9,)]
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for dim in (8, 1):
        optimizer = SOAP(params, max_precondition_dim=dim)
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        for p, shape in zip(params, shapes):
            state = optimizer.state[p]
            found = [
                state["exp_avg"],
                state["exp_avg_sq"],
                *(m for name in ("GG", "Q") for m in state[name] if len(m)),
            ]
            assert [tuple(t.shape) for t in found] == state_shapes(shape, dim) and {
                t.dtype for t in found
            } == {torch.float32}


@pytest.mark.parametrize("budget", [0, 10, 100, 250, 399, 400, 10**6])
def test_what_stays_fits_with_its_buffers(budget):
    """...and no other choice lets more stay, by trying all of them."""
    sizes = [50, 3, 120, 7, 7, 90, 1, 60, 62]

    def staying(resident):
        rest = max((size for i, size in enumerate(sizes) if i not in resident), default=0)
        stays = sum(sizes[i] for i in resident)
        return stays if stays + BUFFERS * rest <= budget else 0

    found = choose_resident(sizes, budget)
    best = max(staying({i for i in range(9) if number >> i & 1}) for number in range(512))
    assert not found or staying(found) > 0
    assert 0.9 * best <= staying(found) <= best and (staying(found) == 400) == (budget >= 400)


def test_buffers_are_allocated_once_and_hold_the_largest():
    model = tiny(torch.bfloat16)
    offload = Offload(groups_of(model), soap, 0)
    places = [offload.host.data_ptr(), *(buffer.data_ptr() for buffer in offload.buffers)]
    assert offload.buffers[0].nbytes == 4 * max(part.numbers for part in offload.params)
    steps_of(offload, model, range(4))
    assert [offload.host.data_ptr(), *(buffer.data_ptr() for buffer in offload.buffers)] == places
    assert all(
        places[0] <= part.host.data_ptr() < places[0] + offload.host.nbytes
        for part in offload.params
    )
    held = [
        t
        for state in offload.optimizer.state.values()
        for t in state.values()
        if torch.is_tensor(t)
    ]
    assert not held, "the library still holds state of paged parameters"


class SideStream:
    """It takes the place of a CUDA stream: copies are done as late as the events allow."""

    inside, pinned = None, []

    def __init__(self):
        self.queue, self.done, self.copies = [], 0, 0

    def run(self, until=None):
        while self.done < (len(self.queue) if until is None else until):
            self.done += 1
            self.queue[self.done - 1]()

    synchronize = run

    def record_event(self):
        return self, len(self.queue)

    def wait_event(self, event):
        self.queue.append(lambda: event[0].run(event[1]))

    def wait_stream(self, other):
        pass


@pytest.fixture
def streams(monkeypatch):
    """Those that Offload makes, in that order: to the device, and from it."""
    made, copy = [], torch.Tensor.copy_

    def copied(to, what, non_blocking=False):
        if not SideStream.inside:
            return copy(to, what)
        assert non_blocking
        SideStream.inside.queue.append(lambda: copy(to, what))
        SideStream.inside.copies += 1

    @contextlib.contextmanager
    def entered(stream):
        SideStream.inside = stream
        yield
        SideStream.inside = None

    cudart = SimpleNamespace(
        cudaHostRegister=lambda *block: SideStream.pinned.append(block) or 0,
        cudaHostUnregister=lambda start: SideStream.pinned.pop(),
    )
    monkeypatch.setattr(torch.Tensor, "copy_", copied)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(
        torch.cuda,
        "current_stream",
        lambda device: SimpleNamespace(wait_event=lambda event: event[0].run(event[1])),
    )
    monkeypatch.setattr(
        "pairwise.scale.offload._side_stream", lambda device: made.append(SideStream()) or made[-1]
    )
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [0, 0.5, 0.7])
def test_copies_on_side_streams_are_waited_for(dtype, budget, streams, tmp_path):
    """Copies as late as a card could do them give the same bits, in a checkpoint too."""
    expected, plain = run_plainly(dtype, 9)
    model, nbytes = tiny(dtype), share_of_all(budget, dtype)
    offload = Offload(groups_of(model), soap, nbytes)
    assert SideStream.pinned == [(offload.host.data_ptr(), offload.host.nbytes, 0)]
    steps_of(offload, model, range(5))
    assert [stream.copies for stream in streams] == [5 * len(offload.paged)] * 2 and streams[
        1
    ].done < len(streams[1].queue)
    facts = offload.save(tmp_path)
    offload.close()
    assert not SideStream.pinned
    model = tiny(dtype)
    offload = Offload(groups_of(model), soap, nbytes)
    offload.load(tmp_path, facts)
    steps_of(offload, model, range(5, 9))
    offload.close()
    for found, value in zip(
        [*masters_of(offload), *model.parameters()], [*expected, *plain.parameters()]
    ):
        assert torch.equal(found, value)


def test_too_little_host_memory(monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 10)
    with pytest.raises(
        InputError,
        match="GB of host memory needed for the optimizer, 0 GB are there; a larger --optimizer-",
    ):
        Offload(groups_of(tiny(torch.float32)), soap, 0)


# ---- checkpoints


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("then, now", [(None, 0), (0, None), (0.5, 0.3), (None, None)])
def test_a_checkpoint_continues_with_the_same_bits(dtype, then, now, tmp_path):
    """Saved after 4 of 9 steps under one budget, loaded under another into another model."""
    expected, plain = run_plainly(dtype, 9)
    model = tiny(dtype)
    first = Offload(groups_of(model), soap, share_of_all(then, dtype))
    steps_of(first, model, range(4))
    facts = json.loads(json.dumps(first.save(tmp_path)))
    model = tiny(dtype, seed=1)
    second = Offload(groups_of(model), soap, share_of_all(now, dtype))
    second.load(tmp_path, facts)
    steps_of(second, model, range(4, 9))
    for found, value in zip(masters_of(second), expected):
        assert torch.equal(found, value)
    for found, value in zip(model.parameters(), plain.parameters()):
        assert torch.equal(found, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_of_a_checkpoint_are_known_before(dtype, tmp_path):
    model = tiny(dtype)
    offload = Offload(groups_of(model), soap)
    steps_of(offload, model, range(1))
    offload.save(tmp_path)
    tensors = [tensor for path in tmp_path.iterdir() for tensor in load_file(path).values()]
    written = sum(tensor.nbytes for tensor in tensors)
    assert written <= offload.nbytes <= 1.05 * written


def test_minutes_lie_between_two_checkpoints(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(checkpoint.time, "time", lambda: now[0])
    own, none = (Checkpoints(tmp_path, 1, {}, {}, minutes) for minutes in (10, 0))
    optimizer, found = SimpleNamespace(save=lambda path: {}), []
    for second in (599, 600, 601, 1199, 1200):
        now[0] = 1000.0 + second
        found.append(own.due())
        if own.due():
            own.write(optimizer, [{}])
    assert found == [False, True, False, False, True] and not none.due()


def test_the_newest_of_two_checkpoints_is_taken(tmp_path, monkeypatch):
    """Killed after one is written and before the other is removed."""
    own, loaded = Checkpoints(tmp_path, 1, {}, {}, 1), []
    optimizer = SimpleNamespace(save=lambda path: {}, load=lambda path, _: loaded.append(path.name))
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_remove_all_but", lambda self, path: None)
        for steps in (9, 10):
            own.write(optimizer, [{}] * steps)
    assert len(own.resume(optimizer)) == 10 and loaded == ["000010"]
    assert [path.name for path in own.own()] == ["000010"]


def test_a_member_that_has_changed_is_not_finished(tmp_path):
    member, own = tmp_path / "member.json", Checkpoints(tmp_path, 1, {}, {}, 0)
    files.write_json(member, {"reward": 1})
    own.finish()
    assert own.finished()
    member.write_text(json.dumps({"reward": 2}))
    assert not own.finished()


def test_only_safetensors_and_json(tmp_path):
    """...as large as was said before the start."""
    model = tiny(torch.bfloat16)
    offload = Offload(groups_of(model), soap, 0)
    steps_of(offload, model, range(1))
    Checkpoints(tmp_path, 1, {"a": 1}, {"b": "c"}, 1).write(offload, ["{}\n"])
    assert {path.suffix for path in (tmp_path / "checkpoint_01" / "000001").iterdir()} == {
        ".json",
        ".safetensors",
    }
    size = sum(
        path.stat().st_size for path in (tmp_path / "checkpoint_01").rglob("[0-9]*.safetensors")
    )
    assert offload.nbytes * 0.98 < size < offload.nbytes + 500 * len(offload.params)


HARNESS = """
import json, os, signal, sys
from pathlib import Path
import torch, train_rm
from pairwise import manifest, members, training
from pairwise.scale import checkpoint, offload

def main(run):
    sys.stdout = open(os.devnull, "w"); sys.stderr = open(os.devnull, "w")
    train_rm.main(train_rm.parse_args(["--run", run, "--iteration", "1", *flags]))

def dying(owner, name, number):
    count, function = [0], getattr(owner, name)
    def counted(*args, **kwargs):
        count[0] += 1
        if count[0] == number: os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    setattr(owner, name, counted)

PLACES = {
    "step": (offload.Offload, "step"),
    "file": (offload, "save_file"),
    "random": (checkpoint, "save_file"),
    "rename": (os, "replace"),
    "removal": (checkpoint.shutil, "rmtree"),
    "sync": (os, "fsync"),
    "member": (members, "save_member"),
    "end": (manifest, "end_stage"),
}

def forked(run, *death):
    child = os.fork()
    if not child:
        try:
            if death: dying(*PLACES[death[0]], int(death[1]))
            main(run)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.__stderr__, flush=True)
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, (run, status)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0

manifest._git_commit = lambda: None
os.fsync = lambda file: None  # the disk is slow, and no power is cut here
runs, flags, resumed = json.loads(sys.argv[1]), json.loads(sys.argv[2]), {}
torch.set_num_threads(1)
often = [*flags, "--checkpoint-minutes", "1e-9"]
flags += ["--checkpoint-minutes", "0"]
main(runs["whole"])  # here, so that all is imported before the forks
flags = often
for name, run in runs.items():
    if name == "whole":
        continue
    for death in name.split(", "):
        assert forked(run, *death.split()) == 9, (name, death)
    resumed[name] = sorted(int(path.name) for path in Path(run).glob("checkpoint_01/[0-9]*"))
    assert forked(run) == 0, name
Path(sys.argv[3]).write_text(json.dumps(resumed))
"""


def outputs(run):
    """Every byte of a run but its manifest, and the log without times."""
    found = {
        str(path.relative_to(run)): path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    return found | {
        name: [{**json.loads(line), "seconds": None} for line in found[name].splitlines()]
        for name in found
        if name.startswith("logs/")
    }


@pytest.mark.parametrize(
    "dtype, deaths",
    [
        (
            "float32",
            (
                "step 1, step 3, step 3",
                "file 1, file 30, file 22",
                "rename 4, rename 3, sync 40",
                "removal 2, random 3",
                "member 1, end 1",
            ),
        ),
        ("bfloat16", ("step 3, file 30",)),
    ],
)
def test_killed_and_continued(data, base, tmp_path, dtype, deaths):
    """After SIGKILL, also while a checkpoint is written, the same command ends in the same bits.

    deaths: at the n-th step, file of a checkpoint, rename, ..., one after another in the same run;
    against a run that writes no checkpoint.
    """
    runs = {name: fresh(data, tmp_path, name.replace(" ", "_")) for name in ("whole", *deaths)}
    flags = ["--base", str(base), *FLAGS, *FULL, "--dtype", dtype, "--precondition-frequency", "2"]
    flags += ["--optimizer-memory-gb", "0"] if dtype == "bfloat16" else []
    out = tmp_path / "resumed.json"
    words = [
        json.dumps({name: str(run) for name, run in runs.items()}),
        json.dumps(flags),
        str(out),
    ]
    subprocess.run(
        [sys.executable, "-c", HARNESS, *words],
        check=True,
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""},
    )
    resumed, expected = json.loads(out.read_text()), outputs(runs["whole"])
    assert len(expected["logs/01.jsonl"]) == 6
    known = {
        "step 1, step 3, step 3": [4],
        "file 1, file 30, file 22": [2],
        "member 1, end 1": [],
        "step 3, file 30": [3],
    }
    for name, run in runs.items():
        assert name not in known or resumed[name] == known[name], (name, resumed[name])
        assert not leftovers(run) and not list(run.glob("checkpoint_*")), name
        found = outputs(run)
        assert found.keys() == expected.keys(), name
        for file in expected:
            assert found[file] == expected[file], (name, file)
        assert all(entry["done"] for entry in manifest.entries(run).values()), name


class Killed(BaseException):
    pass


def killed(*args):
    raise Killed


def killed_after(run, base, monkeypatch, steps, *flags):
    """train_rm.py with a checkpoint a step, ended by an exception after so many steps."""
    count, step = [0], Offload.step

    def counted(self, lr):
        if count[0] == steps:
            raise Killed
        count[0] += 1
        step(self, lr)

    with monkeypatch.context() as patch:
        patch.setattr(Offload, "step", counted)
        with pytest.raises(Killed):
            train(run, base, *FULL, "--checkpoint-minutes", "1e-9", *flags)


@pytest.mark.parametrize("kind", [["--dtype", "bfloat16"], ["--train", "lora"]])
def test_killed_while_scoring_does_not_train_again(data, base, tmp_path, monkeypatch, capsys, kind):
    """What is trained is kept, and its rewards come out the same.

    With other arguments, or without the member, it is trained anew.
    """
    whole, broken = fresh(data, tmp_path, "whole"), fresh(data, tmp_path, "broken")
    train(whole, base, *FULL, *kind)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train_rm.rm, "score_sequences", killed)
        train(broken, base, *FULL, *kind)
    assert [path.name for path in (broken / "checkpoint_01").iterdir()] == [
        "trained.json"
    ] and not list(broken.glob("rewards/*"))
    for change in ("arguments", "member"):
        other = fresh(broken, tmp_path, change)
        if change == "member":
            shutil.rmtree(other / "member_01")
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(training, "train", killed)
            train(other, base, *FULL, *kind, *(["--seed", "7"] if change == "arguments" else []))
    with monkeypatch.context() as patch:
        patch.setattr(training, "train", killed)
        train(broken, base, *FULL, *kind)
    assert (
        not (broken / "checkpoint_01").exists()
        and not leftovers(broken)
        and manifest.entries(broken)["member_01"]["done"]
    )
    names = [
        "logs/01.jsonl",
        "rewards/01_train.npy",
        "rewards/01_test.npy",
        *(str(path.relative_to(whole)) for path in whole.rglob("*.safetensors")),
    ]
    for name in names[1:]:
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), name
    assert [json.loads(line)["loss"] for line in open(broken / names[0])] == [
        json.loads(line)["loss"] for line in open(whole / names[0])
    ]


def test_a_member_goes_on_with_the_threads_it_was_begun_with(
    data, base, tmp_path, monkeypatch, capsys
):
    """From a checkpoint, and where only its rewards are missing; the manifest says so too."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    threads, trained = [], fresh(data, tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    killed_after(trained, base, monkeypatch, 2, "--threads", "2")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train_rm.rm, "score_sequences", killed)
        train(trained, base, *FULL, "--threads", "1")
    assert f"{trained / 'checkpoint_01/000002'}: begun with --threads 2" in capsys.readouterr().out
    train(trained, base, *FULL, "--threads", "1")
    assert threads == [2, 2, 1, 2, 1, 2]  # as asked for, then as begun
    assert f"{trained / 'checkpoint_01'}: begun with --threads 2" in capsys.readouterr().out
    assert manifest.entries(trained)["member_01"]["threads"] == 2
    other = fresh(data, tmp_path, "other")
    killed_after(other, base, monkeypatch, 2, "--threads", "2")
    train(other, base, *FULL, "--threads", "1", "--lr", "1e-4")  # another member
    assert threads[-1] == manifest.entries(other)["member_01"]["threads"] == 1
    fewer = fresh(data, tmp_path, "fewer")
    killed_after(fewer, base, monkeypatch, 2, "--threads", "2")
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # on another machine
    train(fewer, base, *FULL, "--threads", "1")
    assert threads[-1] == manifest.entries(fewer)["member_01"]["threads"] == 1


def test_a_checkpoint_of_other_arguments_is_not_used(data, base, tmp_path, monkeypatch, capsys):
    run = fresh(data, tmp_path)
    killed_after(run, base, monkeypatch, 2)
    assert [path.name for path in run.glob("checkpoint_01/*")] == ["000002"]
    capsys.readouterr()
    killed_after(run, base, monkeypatch, 1, "--lr", "1e-4")
    assert (
        "checkpoint_01/000002: made with other arguments or inputs, not used"
        in capsys.readouterr().out
    )
    assert [path.name for path in run.glob("checkpoint_01/*")] == ["000001"]
    train(
        run, base, *FULL, "--lr", "1e-4", "--micro-batch-tokens", "300", "--checkpoint-minutes", "0"
    )
    assert "checkpoint_01/000001: continued after step 1" in capsys.readouterr().out
    seconds = [
        json.loads(line)["seconds"] for line in (run / "logs" / "01.jsonl").read_text().splitlines()
    ]
    assert len(seconds) == 6 and seconds == sorted(seconds) and not list(run.glob("checkpoint_*"))


def test_no_checkpoint_without_need(data, base, tmp_path, monkeypatch):
    """Not before the minutes are over, none with 0, none for a head."""
    monkeypatch.setattr(Checkpoints, "write", lambda *args: pytest.fail("written"))
    train(fresh(data, tmp_path, "short"), base, *FULL)
    train(fresh(data, tmp_path, "none"), base, *FULL, "--checkpoint-minutes", "0")
    train(fresh(data, tmp_path, "head"), base, *HEAD, "--checkpoint-minutes", "1e-9")


def test_a_disk_that_is_too_small(data, base, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 100_000}))
    with pytest.raises(
        InputError,
        match=r"0.0 GB free, 0.\d GB needed for checkpoints and the member; --checkpoint-minutes 0",
    ):
        train(fresh(data, tmp_path), base, *FULL)


# ---- what stops training


def test_not_finite_names_step_and_prompts_and_keeps_the_checkpoint(
    data, base, tmp_path, monkeypatch
):
    run, count, error = fresh(data, tmp_path), [0], torch.sigmoid

    def broken(*args):
        count[0] += 1
        return error(*args) * (float("nan") if count[0] > 4 else 1)

    monkeypatch.setattr(torch, "sigmoid", broken)  # the loss's own
    with pytest.raises(
        InputError,
        match=r"member 1, step \d: loss nan, gradient norm nan; .* a prompt of this step \(demo",
    ):
        train(run, base, *FULL, "--checkpoint-minutes", "1e-9")
    (kept,) = run.glob("checkpoint_01/*")
    assert int(kept.name) >= 1 and not leftovers(run)
    monkeypatch.undo()
    train(run, base, *FULL)
    assert manifest.entries(run)["member_01"]["done"]


@pytest.mark.parametrize(
    "error, told",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), True),
        (RuntimeError("shapes differ"), False),
    ],
)
def test_out_of_memory_names_the_flags(error, told, monkeypatch):
    @names_memory_flags
    def main(args):
        raise error

    args = train_rm.parse_args(
        ["--run", "r", "--base", "b", "--iteration", "1", "--micro-batch-tokens", "777"]
    )
    expected = (
        r"out of memory; lower --micro-batch-tokens \(now 777\) or --optimizer-memory-gb"
        if told
        else "shapes differ"
    )
    with pytest.raises(InputError if told else RuntimeError, match=expected):
        main(args)
    if told:  # A script that trains nothing has no optimizer.
        del args.optimizer_memory_gb
        with pytest.raises(InputError, match=r"lower --micro-batch-tokens \(now 777\) \("):
            main(args)


def test_the_cpu_runs_out_of_memory_for_real(data, base, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "sigmoid", lambda *args: torch.empty(2**46))
    with pytest.raises(
        InputError,
        match=r"lower --micro-batch-tokens \(now 5555\) or --optimizer-memory-gb \(now 0.5\)",
    ):
        train(
            fresh(data, tmp_path),
            base,
            *FULL,
            "--micro-batch-tokens",
            "5555",
            "--optimizer-memory-gb",
            "0.5",
        )


# ---- precision on a GPU


@pytest.mark.parametrize("made", [SOAP, offload.SOAP])
def test_new_bases_are_ordered_in_float32_and_all_else_is_projected_in_tf32(made):
    """A spectrum of six decades, whose order a basis in TF32 loses: the library's own does."""
    d, generator = 64, torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(d, 8, generator=generator))
    optimizer = Offload(
        [{"params": [p], "max_precondition_dim": d}],
        lambda groups: made(groups, lr=0.1, precondition_frequency=1),
    )
    p.grad = torch.randn(d, 8, generator=generator)
    optimizer.step(0.1)
    basis, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    eigenvalues = 10 ** torch.linspace(0, -6, d, dtype=torch.float64)
    mixed = torch.randperm(d, generator=generator)
    state = optimizer.optimizer.state[p]
    state["GG"][0] = (basis * eigenvalues @ basis.T).float()
    state["Q"][0] = basis[:, mixed].float()
    state["exp_avg_sq"] = mixed[:, None].expand(d, 8).float()
    p.grad = torch.zeros(d, 8)
    with steps.TensorCores() as cores:
        optimizer.step(0.1)
    order = state["exp_avg_sq"][:, 0] / state["exp_avg_sq"].max() * (d - 1)
    found = torch.allclose(order, torch.arange(d).float(), atol=1e-3)
    overlap = (state["Q"][0].double() * basis).sum(0).abs()
    assert found == (made is offload.SOAP) and (overlap.min() > 0.99) == found
    assert cores.rounded >= 6 and not torch.backends.cuda.matmul.allow_tf32


# ---- recomputation


def pass_of(model, on, calls):
    """Return the gradients of a pass, and add a number to calls for each layer that is run."""
    recompute_activations(model, on)
    hooks = [
        layer.self_attn.register_forward_hook(lambda *args, n=n: calls.append(n))
        for n, layer in enumerate(model.model.layers)
    ]
    loss_of(model, 0, 0).backward()
    recompute_activations(model, False)
    for hook in hooks:
        hook.remove()
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_with_and_without_recomputation(dtype):
    """...of all layers, of some and of none: the layers that fit are run once, the others twice."""
    model, found = tiny(dtype), []
    inputs = 3 * 17 * 48 * dtype.itemsize
    full = 5 * inputs  # A layer is seen to take as much as its input.
    for on, twice in (
        (False, ""),
        (True, "01"),
        (full, ""),
        (full - 1, "1"),
        (2 * inputs + 299, "01"),
    ):
        if on > 1:
            readings = iter((1000, 1000 + inputs))
            on = Room(on, 100, lambda readings=readings: next(readings), start=1000)
        calls = []
        found.append(pass_of(model, on, calls))
        assert sorted(calls) == sorted([0, 1, *map(int, twice)]), on
        assert not any(module.training for module in model.modules())
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_what_a_layer_keeps_is_measured_from_one_layer_to_the_next():
    """What is allocated before the first one of a micro-batch is no layer's."""
    used = iter([5, 50, 60, 65])
    room = Room(100, 1, lambda: next(used))
    room.begin()
    assert [room.has(0, is_first) for is_first in (True, False, False)] == [True, True, True]
    assert room.layer == 10


def test_recomputation_leaves_dropout_off():
    """OPT's layers drop out themselves, whenever they are in training mode."""
    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=200,
        dropout=0.5,
        num_labels=1,
    )
    model, found = AutoModelForSequenceClassification.from_config(config).eval(), []
    for on in (False, True):
        recompute_activations(model, on)
        model(input_ids=torch.arange(2, 20)[None]).logits.sum().backward()
        found.append([p.grad for p in model.parameters()])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("name", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_how_a_card_s_memory_is_mapped(name, monkeypatch):
    """Page by page, where the user says nothing."""
    for known in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        monkeypatch.delenv(known, raising=False)
    if name:
        monkeypatch.setenv(name, "max_split_size_mb:64")
    before = dict(os.environ)
    importlib.reload(pairwise)
    ours = {} if name else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert dict(os.environ) == before | ours


def test_random_states_of_more_cards_than_are_here(monkeypatch):
    """A checkpoint may be continued on fewer; those of the first ones are theirs."""
    found = []
    for name, value in (("is_available", True), ("device_count", 2), ("get_rng_state_all", "ab")):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", found.append)
    states = checkpoint._random_state()
    assert [*states] == ["cpu", "cuda 0", "cuda 1"]
    for here in (1, 2, 3):
        monkeypatch.setattr(torch.cuda, "device_count", lambda here=here: here)
        checkpoint._set_random_state(states)
    assert found == [["a"], ["a", "b"], ["a", "b"]]
