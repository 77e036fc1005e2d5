"""Checkpoints of a training under way: RUN/checkpoint_0J/STEP/, written aside and renamed, then the older one removed. When the member itself is
written and its rewards are not, RUN/checkpoint_0J/trained.json says so instead.

One holds the masters and the optimizer's state (Offload.save), the log so far, torch's random state, and the settings and inputs that it
belongs to. Order and content of the steps follow from the seed, so the number of steps done says where the data stand. No pickle.
"""

import contextlib
import json
import os
import shutil
import time

import torch
from safetensors.torch import load_file, save_file

from pairwise import cli, run_dir
from pairwise.scale import parallel


class Checkpoints:
    """Those of one member; settings and inputs as in the manifest, minutes between two of them (0: none are written)."""

    def __init__(self, run, j, settings, inputs, minutes):
        self.directory, self.member = run / f"checkpoint_{j:02d}", run / f"member_{j:02d}"
        self.key = {"settings": settings, "inputs": inputs}
        self.seconds, self.last = 60 * minutes, time.time()

    def due(self):
        return self.seconds > 0 and parallel.of_first(
            lambda: time.time() - self.last >= self.seconds
        )

    def write(self, optimizer, log):
        """Write the state after len(log) steps; log: the JSON lines so far. Each process writes what it owns, the first all else."""
        path, first = self.directory / f"{len(log):06d}", parallel.rank() == 0
        with run_dir.replacing(path) if first else contextlib.nullcontext() as partial:
            if first:
                partial.mkdir()
                save_file(_random_state(), partial / "random.safetensors")
            partial = parallel.gathered(partial)[0]
            state = self.key | {"log": log, "optimizer": optimizer.save(partial)}
            parallel.gathered(None)  # all is written
            if first:
                (partial / "state.json").write_text(
                    json.dumps(state, allow_nan=False), encoding="utf-8"
                )
                for (
                    file
                ) in partial.iterdir():  # on the disk before it counts: a power cut is a kill too
                    with open(file, "rb") as opened:
                        os.fsync(opened.fileno())
        self._remove_all_but(path)
        self.last = time.time()

    def resume(self, optimizer):
        """Put the newest checkpoint's state into `optimizer` and return its log lines: [] where there is none of these settings and inputs."""
        found = sorted(
            path for path in self.directory.glob("[0-9]*") if (path / "state.json").is_file()
        )
        path, log = None, []
        if found:
            facts = run_dir.read_json(found[-1] / "state.json")
            if {name: facts[name] for name in self.key} == self.key:
                path, log = found[-1], facts["log"]
                optimizer.load(path, facts["optimizer"])
                _set_random_state(load_file(path / "random.safetensors"))
                print(f"{path}: continued after step {len(log)}", flush=True)
            else:
                print(f"{found[-1]}: made with other arguments or inputs, not used", flush=True)
        parallel.gathered(None)  # all have read
        self._remove_all_but(path)
        return log

    def finish(self):
        """Training is done and the member written: that is kept in place of the checkpoints until its rewards are there too."""
        with run_dir.replacing(self.directory / "trained.json") as partial:
            partial.write_text(json.dumps(self.key, allow_nan=False), encoding="utf-8")
        self._remove_all_but(self.directory / "trained.json")

    def finished(self):
        """Whether finish() was called with these settings and inputs."""
        return (
            self.member.is_dir()
            and run_dir.read_json(self.directory / "trained.json", {}) == self.key
        )

    def check_disk(self, nbytes, member):
        """Raise InputError where the disk does not hold a checkpoint of nbytes beside the one before it, and the member of `member` bytes."""
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        there = sum(file.stat().st_size for file in self.directory.rglob("*") if file.is_file())
        need, free = (
            (2 * nbytes if self.seconds else 0) + member - there,
            shutil.disk_usage(self.directory.parent).free,
        )
        if need > free:
            hint = "; --checkpoint-minutes 0 writes no checkpoints" if self.seconds else ""
            raise cli.InputError(
                f"{self.directory.parent}: {free / 1e9:.1f} GB free, {need / 1e9:.1f} GB needed for checkpoints and the member{hint}"
            )

    def remove(self):
        if parallel.rank() == 0:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _remove_all_but(self, path):
        if path is None:
            return self.remove()
        for other in self.directory.iterdir() if parallel.rank() == 0 else []:
            if other.is_dir() and other != path:
                shutil.rmtree(other)
            elif other != path:
                other.unlink()


def _random_state():
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda {i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _set_random_state(states):
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all([states[f"cuda {i}"] for i in range(len(states) - 1)])
