"""Checkpoints of a training under way: RUN/checkpoint_0J/STEP/.

Each is written aside and renamed, then the one before it is removed. When the member itself is
written and its rewards are not, RUN/checkpoint_0J/trained.json says so instead. A checkpoint holds
masters and optimizer state (Offload.save), the log so far, torch's random state, its threads, and
the settings and inputs that it belongs to. The seed decides the steps, so their number says where
data stand.
"""

import contextlib
import json
import os
import re
import shutil
import time

from pairwise import cli, files
from pairwise.scale import parallel

import torch
from safetensors.torch import load_file, save_file

KEY = {"settings": dict, "inputs": dict, "threads?": int}
STATE = KEY | {"log": list, "optimizer": (dict, list)}


class Checkpoints:
    """Those of one member, with its settings and inputs; minutes lie between two (0: none)."""

    def __init__(self, run, j, settings, inputs, minutes):
        self.run, self.directory = run, run / f"checkpoint_{j:02d}"
        self.key = {"settings": settings, "inputs": inputs}
        self.seconds, self.last = 60 * minutes, time.time()

    def due(self):
        """Return whether the minutes since the last checkpoint are over, by the first's clock."""
        return self.seconds > 0 and parallel.of_first(
            lambda: time.time() - self.last >= self.seconds
        )

    def write(self, optimizer, log):
        """Write the state after len(log) steps: each process what it owns, the first the rest."""
        path, first = self.directory / f"{len(log):06d}", parallel.rank() == 0
        with files.replacing(path, hashed=False) if first else contextlib.nullcontext() as partial:
            if first:
                partial.mkdir()
                save_file(_random_state(), partial / "random.safetensors")
            partial = parallel.gathered(partial)[0]
            state = self.key | {"threads": torch.get_num_threads(), "log": log}
            state["optimizer"] = optimizer.save(partial)
            parallel.gathered(None)  # By now all is written.
            if first:
                text = json.dumps(state, allow_nan=False)
                (partial / "state.json").write_text(text, encoding="utf-8")
                for file in partial.iterdir():  # All is on the disk before a power cut counts.
                    with open(file, "rb") as opened:
                        os.fsync(opened.fileno())
        self._remove_all_but(path)
        self.last = time.time()

    def threads(self, given):
        """Return the threads that the member was begun with, as its last bits depend on them, on as
        many cores as there are; `given` for a new one, or where several processes train it."""
        paths = [*self.directory.glob("[0-9]*/state.json"), *self.directory.glob("trained.json")]
        if not paths or parallel.count() > 1:
            return given
        state = files.read_json(max(paths), KEY)
        begun = min(state.get("threads", given), os.cpu_count())
        if {name: state[name] for name in self.key} != self.key or begun == given:
            return given
        print(f"{max(paths).parent}: begun with --threads {begun}, which go on", flush=True)
        return begun

    def resume(self, optimizer):
        """Put the newest checkpoint into the optimizer; return its log lines, [] without one."""
        # The first decides, as another machine may see the directory as it was a minute ago.
        found = self.directory.glob("[0-9]*/state.json")
        newest, log = parallel.of_first(lambda: max((p.parent for p in found), default=None)), []
        if newest:
            state = files.read_json(newest / "state.json", STATE)
            if {name: state[name] for name in self.key} == self.key:
                log = state["log"]
                optimizer.load(newest, state["optimizer"])
                _set_random_state(load_file(newest / "random.safetensors"))
                print(f"{newest}: continued after step {len(log)}", flush=True)
            else:
                print(f"{newest}: made with other arguments or inputs, not used", flush=True)
                newest = None
        parallel.gathered(None)  # By now all have read.
        self._remove_all_but(newest)
        return log

    def finish(self):
        """Keep the member, which is written, in place of checkpoints until its rewards are too."""
        state = self.key | {"threads": torch.get_num_threads()}
        state["outputs"] = files.hashes_beneath(self.run, keep=True)
        files.write_json(self.directory / "trained.json", state, hashed=False)
        self._remove_all_but(self.directory / "trained.json")

    def finished(self):
        """Return whether finish() was called with these settings and inputs, and what it kept is
        there; then it counts as written by this process."""
        kept = files.read_json(self.directory / "trained.json", dict, {})
        outputs = kept.pop("outputs", {})
        kept.pop("threads", None)
        if kept != self.key or not outputs:
            return False
        for name, value in outputs.items():
            path = self.run / name
            if not path.is_file() or files.hash_file(path) != value:
                return False
        files.add_hashes(self.run, outputs)
        return True

    def check_disk(self, nbytes, member):
        """Raise InputError where the disk holds too little for two checkpoints and the member.

        A checkpoint has nbytes, the member `member` bytes; old checkpoints' bytes count as free.
        """
        if self.directory.is_symlink() and not self.directory.is_dir():
            words = "a link to nothing found, a directory or a link to one expected"
            raise cli.InputError(f"{self.directory}: {words}")
        place = self.directory if self.directory.is_dir() else self.directory.parent
        place.mkdir(parents=True, exist_ok=True)
        mark = place / f".partial-{parallel.of_first(time.time_ns)}"
        if parallel.rank() == 0:
            mark.mkdir()
        parallel.gathered(None)  # By now it is there.
        seen = parallel.gathered(mark.is_dir())
        if parallel.rank() == 0:
            mark.rmdir()
        if not all(seen):
            words = f"process {seen.index(False)} does not see what the first writes there"
            raise cli.InputError(f"{place}: {words}; a directory that all machines share expected")
        inside = [file for path in self.own() for file in (path, *path.rglob("*"))]
        old = sum(file.stat().st_size for file in inside if file.is_file())
        free, old = parallel.of_first(lambda: (shutil.disk_usage(place).free, old))
        need = (2 * nbytes if self.seconds else 0) + member - old
        if need > free:
            hint = "; --checkpoint-minutes 0 writes no checkpoints" if self.seconds else ""
            raise cli.InputError(
                f"{place}: {free / 1e9:.1f} GB free, {need / 1e9:.1f} GB needed for checkpoints "
                f"and the member{hint}"
            )

    def remove(self):
        """Remove all checkpoints, and the directory unless it is a link or has more in it."""
        self._remove_all_but(None)
        if parallel.rank() == 0 and self.directory.is_dir() and not self.directory.is_symlink():
            with contextlib.suppress(OSError):  # It is not empty.
                self.directory.rmdir()

    def own(self):
        """Return the paths in the directory that this class has written, and nobody else.

        The first process alone looks, which alone removes them; the others return [].
        """
        if parallel.rank():
            return []
        whole = [path.parent for path in self.directory.glob("[0-9]*/state.json")]
        names = {"trained.json", *(path.name for path in whole)}
        partial = r"\.(partial|lock)-([0-9]{6,}|trained\.json)"  # of a call that was killed
        return [
            path
            for path in self.directory.glob("*")
            if (path.name in names or re.fullmatch(partial, path.name)) and not path.is_symlink()
        ]

    def _remove_all_but(self, path):
        """Remove all of its own paths but one, or all where the path is None."""
        for other in self.own():
            if other != path:
                files.remove(other)


def _random_state():
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda {i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _set_random_state(states):
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available():
        cards = min(len(states) - 1, torch.cuda.device_count())  # It may go on with fewer.
        torch.cuda.set_rng_state_all([states[f"cuda {i}"] for i in range(cards)])
