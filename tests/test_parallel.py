"""Several processes, as torchrun starts them, on the CPU, give the results of one process.

Each owns some of the optimizer's state, and checkpoints are for any number of processes.
"""

import functools
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

from pairwise import manifest
from pairwise.cli import InputError
from pairwise.scale import offload, parallel
from pairwise.scale.checkpoint import Checkpoints

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import FLAGS, FULL, REPOSITORY, fresh, leftovers
from safetensors.torch import load_file
from test_offload import outputs

SAME = (
    *FULL,
    "--micro-batch-tokens",
    "400",
    "--precondition-frequency",
    "2",
)  # a step is two prompts, each a micro-batch: no other order of sums
HARNESS = """
import json, os, signal, sys, threading
from pathlib import Path
import torch, tqdm, train_rm
from pairwise import cli, manifest, training
from pairwise.scale import checkpoint, offload

PLACES = {
    "step": (offload.Offload, "step"),
    "file": (offload, "save_file"),
    "sync": (os, "fsync"),
    "error": (torch, "sigmoid"),
}

def at(place, number, do):
    count, (owner, name) = [0], PLACES[place]
    function = getattr(owner, name)
    def counted(*args, **kwargs):
        count[0] += 1
        return do(function, *args, **kwargs) if count[0] == number else function(*args, **kwargs)
    setattr(owner, name, counted)

def held(path):
    close = offload.Offload.close
    def told(self):
        tensors = [t for state in self.optimizer.state.values() for t in offload._tensors(state)]
        tensors += [part.master for part in self.params if part.has_master]
        Path(path).write_text(str(sum(t.untyped_storage().nbytes() for t in tensors)))
        close(self)
    offload.Offload.close = told

def process(rank, job):
    if job.get("rank") == rank:
        def die(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGKILL)
        def spoil(function, *args):
            return function(*args) * float("nan")
        at(job["place"], job["number"], spoil if job["place"] == "error" else die)
    if job.get("plain"):  # This optimizer does not make much of a rounding error.
        training.SOAP = lambda groups, lr, **others: torch.optim.SGD(groups, lr)
    if job.get("held"):
        held(f"{job['run']}-held-{rank}")
    sys.argv[0] = "train_rm.py"
    words = ["--run", job["run"], "--iteration", "1", *flags, *job["flags"]]
    words += job.get("second", []) if rank == 1 else []
    cli.run_main(train_rm.main, train_rm.parse_args(words))

def started(rank, job, store):
    child = os.fork()
    if not child:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["processes"]))
        os.environ["LOCAL_WORLD_SIZE"] = str(job["processes"])
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port))
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        sys.stderr = open(f"{job['run']}.stderr", "a")
        sys.stdout = open(f"{job['run']}.stdout", "a")
        code = 0
        # Forked processes share the other lock, which one that is killed may hold.
        tqdm.tqdm.set_lock(threading.RLock())
        try:
            process(rank, job)
        except SystemExit as ended:
            code = ended.code
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            code = 1
        sys.stderr.flush(), sys.stdout.flush()
        os._exit(code)
    return child

manifest._git_commit = lambda: None
os.fsync = lambda file: None
torch.set_num_threads(1)
jobs, flags, codes = json.loads(sys.argv[1]), json.loads(sys.argv[2]), []
process(0, jobs[0])  # here, so that all is imported before the forks
for job in jobs[1:]:
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    children = [started(rank, job, store) for rank in range(job["processes"])]
    ended = {}
    while len(ended) < len(children):
        child, status = os.wait()
        ended[child] = os.waitstatus_to_exitcode(status)
        if ended[child] == -9:  # torchrun ends the others
            [os.kill(other, signal.SIGTERM) for other in children if other not in ended]
    codes.append([ended[child] for child in children])
Path(sys.argv[3]).write_text(json.dumps(codes))
"""


OFTEN, PAGED, PLAIN = (
    ("--checkpoint-minutes", "1e-9"),
    ("--optimizer-memory-gb", "0"),
    ("--pairs-per-step", "40", "--lr", "0.1", "--warmup", "0"),
)
# These are run, processes, flags, and what befalls one of them at a number of calls. The first job
# runs alone in the harness itself.
JOBS = [
    ("float32", 1, SAME, {}),
    ("bfloat16", 1, SAME, {}),
    ("plain", 1, PLAIN, {"plain": True}),
    ("float32 two", 2, SAME, {}),
    ("float32 two", 2, SAME, {}),
    ("float32 three", 3, SAME, {}),
    ("bfloat16 two", 2, SAME, {"held": True}),
    ("plain two", 2, PLAIN, {"plain": True}),
    ("plain three", 3, PLAIN, {"plain": True}),
    ("float32 killed", 2, (*SAME, *OFTEN), {"rank": 1, "place": "step", "number": 3}),
    ("float32 killed", 2, (*SAME, *OFTEN), {"rank": 1, "place": "file", "number": 16}),
    ("float32 killed", 2, (*SAME, *OFTEN), {"rank": 0, "place": "sync", "number": 25}),
    ("float32 killed", 2, SAME, {}),
    ("float32 fewer", 2, (*SAME, *OFTEN), {"rank": 0, "place": "step", "number": 4}),
    ("float32 fewer", 1, SAME, {}),
    ("float32 more", 1, (*SAME, *OFTEN), {"rank": 0, "place": "step", "number": 4}),
    ("float32 more", 2, SAME, {}),
    ("bfloat16 paged", 2, (*SAME, *OFTEN, *PAGED), {"rank": 1, "place": "file", "number": 16}),
    ("bfloat16 paged", 2, (*SAME, *PAGED), {}),
    ("nan", 2, SAME, {"rank": 1, "place": "error", "number": 3}),
    ("head", 2, ("--train", "head"), {}),
    ("unlike", 2, SAME, {"second": ["--lr", "0.5"]}),
]


@pytest.fixture(scope="module")
def ran(data, base, tmp_path_factory):
    """Return the directory of the runs in JOBS, and the exit codes of every job's processes.

    Each run has continuations of two prompts to score.
    """
    directory = tmp_path_factory.mktemp("parallel")
    messages = [
        [{"role": "user", "content": text}]
        for text in ("how can i get fit ?", "what is for dinner ?")
    ]
    texts = pa.table(
        {
            "prompt_id": ["1", "2"],
            "messages": messages,
            "texts": [
                ["run .", "walk more .", "run .", "rest ."],
                ["soup .", "rice .", "soup .", "tea ."],
            ],
        }
    )
    for name in {name for name, *_ in JOBS}:
        pq.write_table(texts, fresh(data, directory, name) / "continuations.parquet")
    jobs = [
        {"run": str(directory / name), "processes": processes, "flags": flags} | more
        for name, processes, flags, more in JOBS
    ]
    for job in jobs:
        job["flags"] += ("--dtype", "bfloat16" if "bfloat16" in job["run"] else "float32")
    words, changes = (
        [json.dumps(jobs), json.dumps(["--base", str(base), *FLAGS])],
        {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"},
    )
    subprocess.run(
        [sys.executable, "-c", HARNESS, *words, str(directory / "codes")],
        check=True,
        cwd=REPOSITORY,
        timeout=400,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | changes,
    )
    return directory, json.loads((directory / "codes").read_text())


def test_all_end_together(ran):
    """With code 0, or, where one is killed or finds an error, none with it."""
    for (name, processes, _, more), codes in zip(JOBS[1:], ran[1], strict=True):
        if name in ("nan", "head", "unlike"):
            assert codes == [2, 2], name
        elif "rank" not in more:
            assert codes == [0] * processes, name
        else:
            assert codes[more["rank"]] == -9 and 0 not in codes, name


@pytest.mark.parametrize(
    "name", sorted({name for name, *_ in JOBS if "32 " in name or "16 " in name})
)
def test_any_number_of_processes_gives_the_same_bits(ran, name):
    """They are those of one, where the order of sums is the same.

    They stay so with a process that has nothing to do, paged, killed, and continued by fewer or
    more.
    """
    one, run = ran[0] / name.split()[0], ran[0] / name
    found, expected = outputs(run), outputs(one)
    for ours, theirs in zip(found.pop("logs/01.jsonl"), expected.pop("logs/01.jsonl"), strict=True):
        for sums in ("loss", "grad_norm"):  # these are added up in another order
            assert abs(ours.pop(sums) / theirs.pop(sums) - 1) < 1e-6
        assert ours == theirs
    assert found == expected and not leftovers(run)
    jobs = [(processes, more) for job, processes, _, more in JOBS if job == name]
    said = (ran[0] / f"{name}.stdout").read_text()
    assert manifest.entries(run)["member_01"]["processes"] == jobs[-1][0] and all(
        stage["done"] for stage in manifest.entries(run).values()
    )
    assert said.count("trained on 72 pairs") == 1 and said.count("is there, skipped") == (
        name == "float32 two"
    )
    assert said.count("continued after step") == len([more for _, more in jobs if "rank" in more])


def test_the_first_alone_writes_and_equal_responses_tie(ran):
    rewards = np.load(ran[0] / "float32 two" / "rewards" / "01_continuations.npy")
    assert (
        rewards.shape == (2, 4)
        and (rewards[:, 0] == rewards[:, 2]).all()
        and len(np.unique(rewards)) == 6
    )


def test_each_holds_half_of_masters_and_state(ran):
    held = [int((ran[0] / f"bfloat16 two-held-{rank}").read_text()) for rank in (0, 1)]
    whole = 4 * sum(
        (2 + (p.dtype != torch.float32)) * p.numel()
        + (2 * sum(d * d for d in p.shape) if p.ndim > 1 and "layers" in name else 0)
        for name, p in load_file(ran[0] / "bfloat16" / "member_01" / "model.safetensors").items()
    )
    assert sum(held) == pytest.approx(whole, rel=0.01) and 0.45 < held[0] / whole < 0.55


@pytest.mark.parametrize("name", ["plain two", "plain three"])
def test_other_orders_of_sums_give_other_roundings_alone(ran, base, name):
    """Steps are of six prompts, with plain gradient descent.

    SOAP divides by the size of a gradient, and of zero only rounding is left.
    """
    one, run, before = ran[0] / "plain", ran[0] / name, load_file(base / "model.safetensors")
    logs = [
        [json.loads(line) for line in (run / "logs" / "01.jsonl").read_text().splitlines()]
        for run in (one, run)
    ]
    for ours, theirs in zip(*logs, strict=True):
        assert ours["pairs"] == 36 and all(
            ours[fact] == theirs[fact] for fact in ("step", "pairs", "lr")
        )
        assert all(abs(ours[fact] / theirs[fact] - 1) < 1e-5 for fact in ("loss", "grad_norm"))
    expected, found = (load_file(run / "member_01" / "model.safetensors") for run in (one, run))
    assert max((before[weight] - expected[weight]).abs().max() for weight in before) > 5e-3
    for weight in expected:
        torch.testing.assert_close(found[weight], expected[weight], atol=1e-6, rtol=0)
    for split in ("train", "valid", "test", "continuations"):
        np.testing.assert_allclose(
            *(np.load(run / "rewards" / f"01_{split}.npy") for run in (run, one)), atol=1e-5
        )


def test_an_error_is_told_once(ran):
    """...by one of them: a loss that is not finite in the second alone, what none can do, and
    another flag on the second."""
    # Before it stands the progress bar, which may not have ended its line.
    said = (ran[0] / "nan.stderr").read_text().split("train_rm.py: error: ")
    assert (
        len(said) == 2
        and said[1].startswith("member 1, step 3: loss nan, gradient norm nan; ")
        and "a prompt of this step (demo-" in said[1]
    )
    (line,) = (ran[0] / "head.stderr").read_text().splitlines()
    assert line.startswith("train_rm.py: error: 2 processes found, 1 expected: --train head ")
    (line,) = (ran[0] / "unlike.stderr").read_text().splitlines()
    assert line == "train_rm.py: error: process 1: lr 0.5 found, 0.003 expected, as in the first"
    assert not (ran[0] / "unlike" / "logs").exists()
    assert not leftovers(ran[0] / "nan") and not any((ran[0] / "nan").glob("[mlr]*/*01*"))


def nameless():
    """The words before a command that run it where the host's name cannot be resolved, where this
    is allowed here."""
    words = ["unshare", "-u", "sh", "-c", 'hostname no-such-name; exec "$@"', "sh"]
    allowed = shutil.which("unshare") and not subprocess.run([*words, "true"]).returncode
    return words if allowed else []


def test_torchrun_itself(data, base, tmp_path):
    """A training that does not stay finite ends with one line before torchrun's own report."""
    words = [
        "--run",
        fresh(data, tmp_path),
        "--iteration",
        "1",
        "--base",
        base,
        *FLAGS,
        *SAME,
        "--lr",
        "1e30",
    ]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr",
        "127.0.0.1",
        "--nproc-per-node",
        "2",
        "--",
    ]
    done = subprocess.run(
        [*nameless(), *torchrun, REPOSITORY / "train_rm.py", *words],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
    )
    assert (
        done.returncode
        and done.stderr.count("error: member 1, step 2: loss nan")
        == done.stderr.count("train_rm.py: error:")
        == 1
    )


@pytest.mark.parametrize(
    "flags, expected",
    [
        ((), "train_rm.py"),
        (("--gpus", "1"), "train_rm.py"),
        (
            ("--gpus", "2"),
            "-m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node 2 -- "
            "train_rm.py",
        ),
    ],
)
def test_run_all_starts_it(tmp_path, flags, expected):
    """With an interpreter that prints what it is given."""
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "python").chmod(0o755)
    done = subprocess.run(
        ["bash", REPOSITORY / "run_all.sh", "demo", "2", "--run", tmp_path / "run", *flags],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHON": str(tmp_path / "python"), "OMP_NUM_THREADS": ""},
    )
    lines = [
        line
        for line in done.stdout.replace(f"{REPOSITORY}/", "").splitlines()
        if "--iteration" in line and "--check" not in line and not line.startswith("- ")
    ]
    words = f"--base {tmp_path}/run/base --threads 1 --lr 3e-3 --dtype float32"
    assert lines == [f"{expected} --run {tmp_path}/run --iteration {j} {words}" for j in (1, 2)]


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--gpus", "two"), "--gpus 'two' found"),
        (("--gpus", "0"), "--gpus '0' found"),
        (("--gpus", "2", "--train", "head"), "--gpus is for all parameters"),
    ],
)
def test_run_all_refuses(tmp_path, flags, said):
    done = subprocess.run(
        ["bash", REPOSITORY / "run_all.sh", "demo", "--run", tmp_path / "run", *flags],
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 2
        and done.stderr.startswith("run_all.sh: error: ")
        and said in done.stderr
        and not (tmp_path / "run").exists()
    )


def test_dealt_evenly_and_in_order(monkeypatch):
    rng = np.random.default_rng(0)
    for processes in (1, 2, 3, 8):
        monkeypatch.setattr(parallel, "count", lambda processes=processes: processes)
        for size in (0, 1, 2, 7, 50):
            sizes = rng.integers(1, 100, size).tolist()
            dealt = parallel.deal(list(range(size)), sizes)
            assert (
                len(dealt) == processes
                and sorted(sum(dealt, [])) == list(range(size))
                and all(share == sorted(share) for share in dealt)
            )
            loads = [sum(sizes[i] for i in share) for share in dealt]
            assert max(loads) - min(loads) <= max(sizes, default=0)


@pytest.mark.parametrize("here", [1, 2])
def test_processes_of_a_machine_share_its_memory(here, monkeypatch):
    """...and those of other machines do not: two of four processes have half of a machine's."""
    monkeypatch.setattr(parallel, "count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    pages, group = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 2000}, {"max_precondition_dim": 1}
    monkeypatch.setattr(os, "sysconf", pages.get)
    group["params"] = [torch.nn.Parameter(torch.zeros(100, dtype=torch.bfloat16))]  # 1,200 bytes
    make = functools.partial(torch.optim.SGD, lr=0)
    with pytest.raises(InputError, match="memory needed") if here == 2 else nullcontext():
        offload.Offload([group], make, 0)


def test_all_machines_must_see_the_run(tmp_path, monkeypatch):
    """A run directory of the first machine alone is refused before the first step."""
    monkeypatch.setattr(parallel, "gathered", lambda value: [value] + [False] * (value is True))
    with pytest.raises(InputError, match="process 1 does not see what the first writes there"):
        Checkpoints(tmp_path, 1, {}, {}, 30).check_disk(0, 0)
    assert not list(tmp_path.iterdir())


def test_the_first_alone_looks_at_checkpoints(tmp_path, monkeypatch):
    """Another would meet what the first is removing; it takes the first's word for their bytes."""
    (tmp_path / "checkpoint_01").mkdir()
    monkeypatch.setattr(parallel, "rank", lambda: 1)
    monkeypatch.setattr(type(tmp_path), "glob", lambda *args: pytest.fail("looked"))
    monkeypatch.setattr(type(tmp_path), "rglob", lambda *args: pytest.fail("looked"))
    free, old = 100, 50  # of the first
    answers = itertools.cycle([[0], [None, None], [True, True], [(free, old)]])
    monkeypatch.setattr(parallel, "gathered", lambda value: next(answers))
    checkpoints = Checkpoints(tmp_path, 1, {}, {}, 30)
    assert checkpoints.own() == []
    checkpoints.check_disk(50, 50)
    with pytest.raises(InputError, match="GB needed"):
        checkpoints.check_disk(50, 51)


def test_all_are_of_a_kind():
    """A machine whose driver is broken would take the CPU, and the others wait for its GPU."""
    store = torch.distributed.HashStore()
    for number in range(2):
        parallel.check_same_device(store, number, "a GPU")
    words = r"process 2: the CPU found \(--device\), a GPU expected, as in the first"
    with pytest.raises(InputError, match=words):
        parallel.check_same_device(store, 2, "the CPU")


def test_strangers_do_not_count(monkeypatch):
    """The first waits for all others, who know the token, and each notices how the other ends."""
    store, threads = torch.distributed.HashStore(), ThreadPoolExecutor(2)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    first = threads.submit(parallel.connect, store, 0, 2)
    port = int(store.get("watch").split()[0])
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
        other = parallel.connect(store, 1, 2)
        (peers,) = [first.result(10)]
    assert list(peers.values()) == list(other.values()) == ["127.0.0.1"]
    watching = threads.submit(parallel.watch, peers, True)
    parallel.tell(other, parallel.ENDS_WELL)
    [peer.close() for peer in other]
    watching.result(10)  # Any other word would have ended this process.
