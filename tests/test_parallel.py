"""Several processes, as torchrun starts them, on the CPU: the results of one process, state in shares, checkpoints for any number of them."""

import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import FLAGS, FULL, REPOSITORY, fresh, leftovers, manifest
from safetensors.numpy import load_file
from test_offload import outputs

from pairwise import parallel

SAME = (*FULL, "--micro-batch-tokens", "400", "--precondition-frequency", "2")  # a step is two prompts, each a micro-batch: no other order of sums
HARNESS = """
import json, os, signal, sys
from pathlib import Path
import torch, train_rm
from pairwise import checkpoint, offload, run_dir

PLACES = {"step": (offload.Offload, "step"), "file": (offload, "save_file"), "sync": (os, "fsync"), "error": (train_rm, "squared_error")}

def at(place, number, do):
    count, (owner, name) = [0], PLACES[place]
    function = getattr(owner, name)
    def counted(*args, **kwargs):
        count[0] += 1
        return do(function, *args, **kwargs) if count[0] == number else function(*args, **kwargs)
    setattr(owner, name, counted)

def held(directory, rank):
    close = offload.Offload.close
    def told(self):
        tensors = [t for state in self.optimizer.state.values() for t in offload._tensors(state)]
        tensors += [part.master for part in self.parts if part.twin]
        (directory / f"held-{rank}").write_text(str(sum(t.untyped_storage().nbytes() for t in tensors)))
        close(self)
    offload.Offload.close = told

def process(rank, job):
    if job.get("rank") == rank:
        die = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
        at(job["place"], job["number"], (lambda function, *args: function(*args) * float("nan")) if job["place"] == "error" else die)
    if job.get("plain"):  # an optimizer that does not make much of a rounding error
        train_rm.SOAP = lambda groups, lr, weight_decay, precondition_frequency: torch.optim.SGD(groups, lr)
    if job.get("held"):
        held(Path(job["held"]), rank)
    sys.argv[0] = "train_rm.py"
    run_dir.run_main(train_rm.main, train_rm.parse_args(["--run", job["run"], "--iteration", "1", *flags, *job["flags"]]))

def started(rank, job, store):
    child = os.fork()
    if not child:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["processes"]), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port),
                          TORCHELASTIC_USE_AGENT_STORE="True")
        sys.stderr = open(f"{job['run']}.stderr", "a")
        sys.stdout = open(f"{job['run']}.stdout", "a")
        code = 0
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

run_dir._git_commit = lambda: None
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


def ended(jobs, base, directory, *flags):
    """Exit codes of every job's processes, the first one's apart, which runs alone in this very process."""
    subprocess.run([sys.executable, "-c", HARNESS, json.dumps(jobs), json.dumps(["--base", str(base), *FLAGS, *flags]), str(directory / "codes")], check=True,
                   cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}, timeout=120)
    return json.loads((directory / "codes").read_text())


def job(run, processes, *flags, **more):
    return {"run": str(run), "processes": processes, "flags": flags} | more


def assert_same(run, expected):
    """Every byte but the manifest; the log but for times and the last digits of sums that have another order."""
    found, expected = outputs(run), outputs(expected)
    logs = [files.pop("logs/01.jsonl") for files in (found, expected)]
    assert found == expected
    for one, other in zip(*logs, strict=True):
        for name in ("loss", "grad_norm"):
            assert abs(one.pop(name) / other.pop(name) - 1) < 1e-6
    assert logs[0] == logs[1] and not leftovers(run)


@pytest.fixture(scope="module")
def prompts(data, tmp_path_factory):
    """The prepared data, and four continuations of two prompts to rank; two are equal."""
    run = fresh(data, tmp_path_factory.mktemp("prompts"))
    messages = [[{"role": "user", "content": text}] for text in ("how can i get fit ?", "what is for dinner ?")]
    pq.write_table(pa.table({"messages": messages, "texts": [["run .", "walk more .", "run .", "rest ."], ["soup .", "rice .", "soup .", "tea ."]]}), run / "continuations.parquet")
    return run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_number_of_processes_gives_the_same_bits(prompts, base, tmp_path, dtype):
    """...as one, where the order of sums is the same: two, three of which one has no micro-batch, two that page, killed and continued, also by other numbers."""
    often, paged = ("--checkpoint-minutes", "1e-9"), ("--optimizer-memory-gb", "0")
    one, two, three, paging, broken, fewer, more = (fresh(prompts, tmp_path, name) for name in ("one", "two", "three", "paging", "broken", "fewer", "more"))
    jobs = [(job(one, 1), 0), (job(two, 2, held=str(tmp_path)), 0), (job(two, 2), 0), (job(three, 3), 0), (job(paging, 2, *paged), 0),
            (job(broken, 2, *often, rank=1, place="step", number=3), 9), (job(broken, 2, *often, rank=1, place="file", number=16), 9),
            (job(broken, 2, *often, rank=0, place="sync", number=25), 9), (job(broken, 2), 0),
            (job(fewer, 2, *often, rank=0, place="step", number=4), 9), (job(fewer, 1), 0),
            (job(more, 1, *often, rank=0, place="step", number=4), 9), (job(more, 2, *paged), 0)]
    jobs = jobs if dtype == "float32" else jobs[:9]
    codes = ended([job for job, _ in jobs], base, tmp_path, *SAME, "--dtype", dtype)
    for (done, dead), found in zip(jobs[1:], codes):
        assert found == [0] * done["processes"] if not dead else found[done["rank"]] == -9 and 0 not in found, done
    for run in {done["run"] for done, _ in jobs[1:]}:
        assert_same(tmp_path / run, one)
    assert [manifest(run)["member_01"]["processes"] for run in (one, two, three, broken)] == [1, 2, 3, 2]
    said = (tmp_path / "two.stdout").read_text()
    assert said.count("trained on 72 pairs") == said.count("is there, skipped") == 1
    assert (tmp_path / "broken.stdout").read_text().count("continued after step") == 3
    rewards = np.load(two / "rewards" / "01_continuations.npy")
    assert rewards.shape == (2, 4) and (rewards[:, 0] == rewards[:, 2]).all() and len(np.unique(rewards)) == 6
    held = [int((tmp_path / f"held-{rank}").read_text()) for rank in (0, 1)]
    whole = sum(4 * (2 * p.size + 2 * sum(d * d for d in p.shape) * (p.ndim > 1 and "layers" in name) + p.size * (dtype == "bfloat16" and name != "score.weight"))
                for name, p in load_file(one / "member_01" / "model.safetensors").items())
    assert sum(held) == pytest.approx(whole, rel=0.01) and 0.45 < held[0] / whole < 0.55


def test_other_orders_of_sums_give_other_roundings_alone(data, base, tmp_path):
    """Six prompts a step, with plain gradient descent: SOAP divides by the size of gradients, and of zero only rounding is left."""
    flags = ("--pairs-per-step", "40", "--lr", "0.1", "--warmup", "0", "--dtype", "float32", "--checkpoint-minutes", "0")
    runs = [fresh(data, tmp_path, f"run{count}") for count in (1, 2, 3)]
    codes = ended([job(run, count, plain=True) for count, run in enumerate(runs, 1)], base, tmp_path, *flags)
    assert codes == [[0] * 2, [0] * 3]
    logs = [[json.loads(line) for line in (run / "logs" / "01.jsonl").read_text().splitlines()] for run in runs]
    assert [line["pairs"] for line in logs[0]] == [36, 36]
    before, after = load_file(base / "model.safetensors"), [load_file(run / "member_01" / "model.safetensors") for run in runs]
    assert max(np.abs(before[name] - after[0][name]).max() for name in before) > 1e-2
    for log, weights, run in zip(logs[1:], after[1:], runs[1:]):
        for one, other in zip(logs[0], log, strict=True):
            assert all(one[name] == other[name] for name in ("step", "pairs", "lr"))
            assert all(abs(one[name] / other[name] - 1) < 1e-5 for name in ("loss", "grad_norm"))
        for name in weights:
            np.testing.assert_allclose(weights[name], after[0][name], atol=1e-5, rtol=0)
        for name in ("train", "valid", "test"):
            np.testing.assert_allclose(*(np.load(run / "rewards" / f"01_{name}.npy") for run in (run, runs[0])), atol=1e-4)


def test_an_error_of_one_is_told_once(data, base, tmp_path):
    """...and ends both: a loss that is not finite in the second process, an input that neither can use, a lock that the first alone asks for."""
    runs = [fresh(data, tmp_path, name) for name in ("one", "nan", "head")]
    codes = ended([job(runs[0], 1), job(runs[1], 2, rank=1, place="error", number=3), job(runs[2], 2, "--train", "head")], base, tmp_path, *SAME)
    assert codes == [[2, 2]] * 2
    (line,) = [line for line in (tmp_path / "nan.stderr").read_text().split("\n") if "step/s" not in line and line]
    assert line.startswith("train_rm.py: error: member 1, step 3: loss nan, gradient norm nan; a lower --lr may help, or leaving out a prompt of this step (demo-")
    assert (tmp_path / "head.stderr").read_text() == ("train_rm.py: error: 2 processes found, 1 expected: --train head, --export and --plan do not share their "
                                                      "work; leave torchrun out\n")
    assert not leftovers(runs[1]) and not list(runs[1].glob("member_*")) and not list(runs[1].glob("logs/*"))


def test_torchrun_itself(data, base, tmp_path):
    """Two steps of a training that does not stay finite: a line, before torchrun's own report, and no success."""
    words = ["--run", fresh(data, tmp_path), "--iteration", "1", "--base", base, *FLAGS, *SAME, "--lr", "1e30"]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--", REPOSITORY / "train_rm.py", *words],
                          capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"})
    assert done.returncode and done.stderr.count("error: member 1, step 2: loss nan") == done.stderr.count("train_rm.py: error:") == 1


@pytest.mark.parametrize("flags, expected", [((), "train_rm.py"), (("--gpus", "1"), "train_rm.py"),
                                             (("--gpus", "2"), "-m torch.distributed.run --standalone --nproc-per-node 2 -- train_rm.py")])
def test_run_all_starts_it(tmp_path, flags, expected):
    """With an interpreter that prints what it is given."""
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "python").chmod(0o755)
    done = subprocess.run(["bash", REPOSITORY / "run_all.sh", "demo", "2", "--run", tmp_path / "run", *flags], capture_output=True, text=True, check=True,
                          env=os.environ | {"PYTHON": str(tmp_path / "python")})
    lines = [line for line in done.stdout.replace(f"{REPOSITORY}/", "").splitlines() if "--iteration" in line and not line.startswith("- ")]
    assert lines == [f"{expected} --run {tmp_path}/run --iteration {j} --base {tmp_path}/run/base --lr 3e-3 --threads 2 --dtype float32" for j in (1, 2)]


@pytest.mark.parametrize("flags, said", [(("--gpus", "two"), "--gpus 'two' found"), (("--gpus", "0"), "--gpus '0' found"),
                                         (("--gpus", "2", "--train", "head"), "--gpus is for all parameters")])
def test_run_all_refuses(tmp_path, flags, said):
    done = subprocess.run(["bash", REPOSITORY / "run_all.sh", "demo", "--run", tmp_path / "run", *flags], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("run_all.sh: error: ") and said in done.stderr and not (tmp_path / "run").exists()


def test_dealt_evenly_and_in_order(monkeypatch):
    rng = np.random.default_rng(0)
    for processes in (1, 2, 3, 8):
        monkeypatch.setattr(parallel, "count", lambda: processes)
        for size in (0, 1, 2, 7, 50):
            sizes = rng.integers(1, 100, size).tolist()
            dealt = parallel.deal(list(range(size)), sizes)
            assert len(dealt) == processes and sorted(sum(dealt, [])) == list(range(size)) and all(share == sorted(share) for share in dealt)
            loads = [sum(sizes[i] for i in share) for share in dealt]
            assert max(loads) - min(loads) <= max(sizes, default=0)
