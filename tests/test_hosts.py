"""Two machines, as two network namespaces that a cable joins, train as one process does.

torchrun's own launcher and rendezvous start the processes. A machine that dies, or whose cable is
cut, ends the other with one line, and the same command continues.
"""

import json
import os
import shutil
import subprocess
import sys

from pairwise import manifest
from pairwise.scale import parallel

import pytest
from conftest import FLAGS, REPOSITORY, fresh, leftovers
from test_offload import outputs
from test_parallel import SAME

HARNESS = """
import ctypes, json, os, signal, subprocess, sys, threading, time
from pathlib import Path
import torch, tqdm, train_rm
from pairwise import cli, manifest
from pairwise.scale import offload, parallel
from torch.distributed.launcher import LaunchConfig, elastic_launch

def process(job):
    if number := job.get("number"):
        count, step = [0], offload.Offload.step
        def counted(*args):
            count[0] += 1
            if count[0] == number and os.environ["RANK"] == str(job["processes"]):
                if job["end"] == "killed":
                    os.killpg(0, signal.SIGKILL)
                if job["end"] == "cut":
                    subprocess.run("ip link set v1 down".split(), check=True)
                else:
                    subprocess.Popen(["sh", "-c", f"sleep 5; kill -CONT {os.getpid()}"])
                    os.kill(os.getpid(), signal.SIGSTOP)
            return step(*args)
        offload.Offload.step = counted
    tqdm.tqdm.set_lock(threading.RLock())
    sys.argv[0] = "train_rm.py"
    words = ["--run", job["run"], "--iteration", "1", *job["flags"]]
    cli.run_main(train_rm.main, train_rm.parse_args(words))

def host(number, job, port):
    os.setpgrp()
    os.environ["GLOO_SOCKET_IFNAME"] = f"v{number}"
    files = [os.open(f"{job['run']}.{number}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
             for name in ("stdout", "stderr")]
    [os.dup2(file, at) for at, file in enumerate(files, 1)]
    config = LaunchConfig(
        2, 2, job["processes"], run_id="none", rdzv_backend="static", start_method="fork",
        rdzv_endpoint=f"10.99.0.1:{port}", rdzv_configs={"rank": number}, max_restarts=0)
    elastic_launch(config, process)(job)

def forked(function, *args):
    child = os.fork()
    if not child:
        code = 1
        try:
            function(*args)
            code = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        sys.stderr.flush(), sys.stdout.flush()
        os._exit(code)
    return child

def isolated(ready, go, *args):
    assert ctypes.CDLL(None, use_errno=True).unshare(0x40000000) == 0  # CLONE_NEWNET
    os.write(ready, b"!"), os.read(go, 1)
    host(*args)

def hosts(job, port):
    (is_ready, ready), (go, may_go) = os.pipe(), os.pipe()
    second = forked(isolated, ready, go, 1, job, port)
    os.read(is_ready, 1)
    def ip(words, *before):
        subprocess.run([*before, "ip", *words.split()], check=True)
    inside = ("nsenter", "-n", "-t", str(second))
    ip(f"link add v0 type veth peer name v1 netns {second}")
    for i, before in enumerate(((), inside)):
        ip(f"addr add 10.99.0.{i + 1}/24 dev v{i}", *before)
        ip(f"link set v{i} up", *before), ip("link set lo up", *before)
    os.write(may_go, b"!")
    first = forked(host, 0, job, port)
    started, ended = time.time(), {}
    while len(ended) < 2:
        child, status = os.wait()
        ended[child] = os.waitstatus_to_exitcode(status)
    subprocess.run("ip link del v0".split(), stderr=subprocess.DEVNULL)
    return [ended[first], ended[second], time.time() - started]

manifest._git_commit = lambda: None
os.fsync = lambda file: None
torch.set_num_threads(1)
parallel.UNWINDING = 0.5
parallel.KEEPALIVE = {"TCP_KEEPIDLE": 1, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 2}
jobs = json.loads(sys.argv[1])
process(jobs[0])  # here, so that all is imported before the forks
done = [hosts(job, 29600 + i) for i, job in enumerate(jobs[1:])]
Path(sys.argv[2]).write_text(json.dumps(done))
"""
OFTEN = ("--checkpoint-minutes", "1e-9")
# Runs, processes of a machine, flags, and what befalls the second machine, at which step. The first
# job runs alone in the harness itself.
JOBS = [
    ("one", 1, SAME, {}),
    ("two", 1, SAME, {"end": "stopped", "number": 3}),
    ("lost", 1, (*SAME, *OFTEN), {"end": "killed", "number": 3}),
    ("lost", 2, (*SAME, *OFTEN), {"end": "cut", "number": 2}),
    ("lost", 2, SAME, {}),
]
PRIVATE = ("unshare", "-rnm")


def why_not():
    """Return why there can be no namespaces here; None where there can."""
    if missing := [name for name in ("unshare", "nsenter", "ip") if not shutil.which(name)]:
        return f"no {missing[0]} here"
    words = [*PRIVATE, "ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1"]
    done = subprocess.run(words, capture_output=True, text=True)
    return f"no network namespaces here: {done.stderr.strip()}" if done.returncode else None


@pytest.fixture(scope="module")
def ran(data, base, tmp_path_factory):
    """Return the directory of the runs in JOBS, and of each job but the first both machines' exit
    codes and the seconds that it took."""
    if reason := why_not():
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp("hosts")
    for name in ("one", "two", "lost"):
        fresh(data, directory, name)
    jobs = [
        {"run": str(directory / name), "processes": processes}
        | more
        | {"flags": ["--base", str(base), *FLAGS, *flags, "--dtype", "float32"]}
        for name, processes, flags, more in JOBS
    ]
    changes = {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run(
        [*PRIVATE, sys.executable, "-c", HARNESS, json.dumps(jobs), str(directory / "done")],
        check=True,
        cwd=REPOSITORY,
        timeout=400,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | changes,
    )
    return directory, json.loads((directory / "done").read_text())


def said(ran, run, host, name="stderr"):
    return (ran[0] / f"{run}.{host}.{name}").read_text()


@pytest.mark.parametrize("name, processes", [("two", 2), ("lost", 4)])
def test_two_machines_give_the_bits_of_one_process(ran, name, processes):
    """...where a micro-batch is a process's: where a process stands still for longer than a machine
    may, and where the second machine was lost twice on the way."""
    found, expected = outputs(ran[0] / name), outputs(ran[0] / "one")
    assert "logs/01.jsonl" in found, said(ran, name, 0) + said(ran, name, 1)
    for ours, theirs in zip(found.pop("logs/01.jsonl"), expected.pop("logs/01.jsonl"), strict=True):
        assert abs(ours["loss"] / theirs["loss"] - 1) < 1e-6 and ours["pairs"] == theirs["pairs"]
    assert found == expected and not leftovers(ran[0] / name)
    assert manifest.entries(ran[0] / name)["member_01"]["processes"] == processes
    assert said(ran, name, 0, "stdout").count("trained on 72 pairs") == 1
    assert not said(ran, name, 1, "stdout")


def test_a_lost_machine_ends_the_other_with_a_line(ran):
    """The first time all that runs on it is killed; the second time its cable is cut, and neither
    hears a word of the other. Both times training goes on after the last checkpoint."""
    (whole, killed, cut, continued), line = ran[1], "train_rm.py: error: a process on 10.99.0."
    assert whole[:2] == continued[:2] == [0, 0] and killed[:2] == [1, -9] and cut[:2] == [1, 1]
    first, second = said(ran, "lost", 0), said(ran, "lost", 1)
    ended, timed_out = f"{line}2 is lost (it ended)", f"{line}2 is lost (Connection timed out)"
    assert first.count(line) == 2 and first.index(ended) < first.index(timed_out)
    assert second.count(line) == 1 and f"{line}1 is lost (Connection timed out)" in second
    for path in ("train_rm.py", "pairwise"):  # as a traceback of ours would have it
        assert f'File "{REPOSITORY}/{path}' not in first + second
    assert said(ran, "lost", 0, "stdout").count("continued after step") == 2


def test_it_ends_soon(ran):
    """A machine may be silent for 3 seconds here, and for 40 otherwise. A minute is for a loaded
    machine: where the loss is not noticed, they wait for ten or longer."""
    assert max(seconds for *_, seconds in ran[1][1:3]) < 60
    kept = parallel.KEEPALIVE
    assert kept["TCP_KEEPIDLE"] + kept["TCP_KEEPINTVL"] * kept["TCP_KEEPCNT"] <= 45
