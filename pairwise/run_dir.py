"""The run directory: how stages enter it, and how what they left is read. torch is never imported.

    DIR/data/                          prepared data (pairwise/data.py)
    DIR/member_JJ/                     the reward model of member J, or only its head or adapter
    DIR/rewards/JJ_SPLIT.npy           float32, one per distinct response, in data order
    DIR/continuations.parquet          answers for the diversity measurement, n for each prompt
    DIR/rewards/JJ_continuations.npy   float32 (prompts, n)
    DIR/weights.json                   the mixture weights alpha of every prefix k
    DIR/metrics.json, report.html, figures/, logs/JJ.jsonl (a line a training step)
    DIR/manifest.json                  of every stage: settings, input hashes, versions, time

A stage enters itself in the manifest as begun, writes under temporary names, renames its outputs
into place, and enters itself as done. A stage that was begun and not done is done again.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import resource
import shlex
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

from pairwise import cli

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

LATER_SETTINGS = {"loss": "mse"}  # what a stage had before there was such a flag
VERSIONS_OF = ("numpy", "scipy", "torch", "transformers", "peft", "pytorch_optimizer", "pyarrow")

_locks = {}  # run directory -> the open file that locks it for this process


# ---- files: outputs appear by rename


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path`, a file or a directory, and rename it to `path`.

    On failure `path` stays as it was. os.replace raises where a file should replace a directory.
    """
    path = Path(path)
    partial = path.with_name(f".partial-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(partial)
    try:
        yield partial
        if path.is_dir() and partial.is_dir():
            _remove(path)
        os.replace(partial, path)
    finally:
        _remove(partial)


def _remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path, value):
    """Write JSON without NaN or infinity: a number that does not exist is null."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_array(path, array):
    """Write an array as float32 .npy."""
    with replacing(path) as partial, open(partial, "wb") as file:
        np.save(file, array.astype(np.float32, copy=False))


def write_lines(path, rows):
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_json(path, otherwise=None):
    """Return the JSON value of a file; `otherwise` where there is none and a default was given.

    Raises InputError where the file is missing or is not JSON.
    """
    path = Path(path)
    if not path.is_file():
        if otherwise is not None:
            return otherwise
        raise cli.InputError(f"{path}: no such file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise cli.InputError(f"{path}: not JSON ({error})") from None


def hash_file(path):
    """Return the SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- stages


def stages(run):
    """Return the manifest's entries, {stage: {settings, inputs, done, ..}}; {} before the first."""
    return read_json(run / "manifest.json", {"stages": {}})["stages"]


def stage_done(run, stage, settings, inputs, outputs):
    """Tell whether `stage` is complete in `run` with these settings and inputs.

    settings: {flag: value}, every flag that can change the result; inputs: {name: hash}; outputs:
    the paths that it makes. Raises InputError where it was completed with other settings or inputs,
    or where an output is there that no stage has made.
    """
    existing, entry = [path for path in outputs if path.exists()], stages(run).get(stage)
    if entry is None:
        if existing:
            unknown = f"{existing[0]} exists but was not made by this stage ({stage})"
            raise cli.InputError(f"{unknown}; choose another --run")
        return False
    must_agree(run, stage, settings, inputs)
    return entry["done"] and len(existing) == len(outputs)


def must_agree(run, stage, settings, inputs):
    """Raise InputError where `stage` of `run` is complete with other settings or inputs."""
    entry = stages(run).get(stage)
    if not entry or not entry["done"]:  # A stage that was broken off starts again.
        return
    number = next(n for n in range(2, 10**6) if not Path(f"{run}-{n}").exists())
    elsewhere = command_with("--run", f"{run}-{number}", without="--run")
    names = entry["settings"].keys() | settings.keys()
    for name in sorted(names, key=lambda name: (name != "train", name)):  # --train decides others.
        default = LATER_SETTINGS.get(name)
        was, now = entry["settings"].get(name, default), settings.get(name, default)
        if was != now:
            raise cli.InputError(
                f"{run} was made with other arguments (stage {stage}): {name.replace('_', '-')} "
                f"was {was}, is {now}; to have both, run: {elsewhere}"
            )
    for name in sorted(entry["inputs"].keys() | inputs.keys()):
        if entry["inputs"].get(name) != inputs.get(name):
            raise cli.InputError(
                f"{run} was made from another {name} than it is given now (stage {stage}); "
                f"to have both, run: {elsewhere}"
            )


def unchanged(run, stage, settings, inputs, outputs):
    """Tell whether a stage of seconds is complete and up to date. Where not, it is done again."""
    entry = stages(run).get(stage, {"done": False})
    same = entry["done"] and entry["settings"] == settings and entry["inputs"] == inputs
    return same and all(path.exists() for path in outputs)


def begin_stage(run, stage, settings, inputs):
    """Enter `stage` in the manifest as begun, and return the start time for end_stage.

    This process keeps `run` until it ends. Raises InputError where another process has it.
    """
    run.mkdir(parents=True, exist_ok=True)
    if run.resolve() not in _locks:
        lock = open(run / ".lock", "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy = f"{run}: another process is working in this run directory"
            raise cli.InputError(busy) from None
        _locks[run.resolve()] = lock
    _enter(run, stage, {"settings": settings, "inputs": inputs, "done": False})
    return time.time()


def end_stage(run, stage, settings, inputs, started, **facts):
    """Enter `stage` in the manifest as complete, its outputs being in place. facts: more keys."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on a Mac, else in KiB
    versions = {"python": platform.python_version()}
    for package in VERSIONS_OF:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    entry = {
        "settings": settings,
        "inputs": inputs,
        "done": True,
        "command": _command(),
        "date": time.strftime("%Y-%m-%d", time.gmtime(started)),
        "seconds": round(time.time() - started, 1),
        "peak_memory_mb": round(peak / (2**20 if sys.platform == "darwin" else 2**10)),
        "threads": cli.usable_cores(),
        "versions": versions,
        "git_commit": _git_commit(),
    }
    _enter(run, stage, entry | facts)


def _enter(run, stage, entry):
    """Write a stage's entry into the manifest."""
    write_json(run / "manifest.json", {"stages": stages(run) | {stage: entry}})


def kind_of(run, beneath=False):
    """Return how the members of `run` came about, by its manifest; None where it has none yet.

    "full", "lora", "head", "joint", "existing", "hardened" or "pruned"; with beneath, the kind of
    the run that a pruned one was made from.
    """
    entries = stages(run)
    if not beneath and "prune" in entries.get("weights", {}).get("settings", {}):
        return "pruned"
    if "harden" in entries:
        return "hardened"
    if "joint" in entries:
        return "joint"
    train = entries.get(member_name(1), {}).get("settings", {}).get("train")
    return "existing" if train == "from" else train  # extras/adopt.py enters "from".


# ---- what the manifest and messages say of a call


def _command():
    """Return what the user typed. run_all.sh leaves its own command in PAIRWISE_COMMAND."""
    return os.environ.get("PAIRWISE_COMMAND") or shlex.join(["python", *sys.argv])


def command_with(*words, without):
    """Return the user's command without a flag and its value, and with more words at its end."""
    command = shlex.split(_command())
    if without in command[:-1]:
        at = command.index(without)
        del command[at : at + 2]
    return shlex.join([*(w for w in command if not w.startswith(f"{without}=")), *words])


def _git_commit():
    """Return the repository's commit, with '+' where files differ from it; None outside git."""
    command = "git describe --always --abbrev=40 --exclude=* --dirty=+".split()
    try:
        return subprocess.check_output(
            command, cwd=cli.REPOSITORY, stderr=subprocess.DEVNULL, text=True
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# ---- what the stages left


def member_name(j):
    """Return the name of member j's directory and of the stage that made it."""
    return f"member_{j:02d}"


def reward_path(run, j, split):
    """Return the path of member j's rewards of a split, or of the "continuations"."""
    return run / "rewards" / f"{j:02d}_{split}.npy"


def count_members(run):
    """Return the number K of members that have rewards. Raises InputError unless they are 1..K."""
    folder = run / "rewards"
    numbers = sorted(int(path.name[:2]) for path in folder.glob("[0-9][0-9]_test.npy"))
    if not numbers:
        raise cli.InputError(f"{folder}: no rewards; train_rm.py makes them")
    if numbers != list(range(1, len(numbers) + 1)):
        raise cli.InputError(f"{folder}: members {numbers} found, 1 to {len(numbers)} expected")
    return len(numbers)


def hash_rewards(run, k):
    """Return {name: SHA-256} of the train rewards of members 1..k, for a stage made from them."""
    paths = {f"rewards of member {j}": reward_path(run, j, "train") for j in range(1, k + 1)}
    return {name: hash_file(path) for name, path in paths.items()}


def read_rewards(run, split, k, shape):
    """Return the rewards of members 1..k, float32 (k, *shape).

    Raises InputError for a missing file, a wrong shape or dtype, and for NaN.
    """
    rewards = np.empty((k, *shape), np.float32)
    for j in range(1, k + 1):
        path = reward_path(run, j, split)
        stored = _read_array(path)
        if stored.dtype != np.float32 or stored.shape != shape:
            its_form = f"{stored.dtype} {stored.shape}"
            raise cli.InputError(f"{path}: {its_form} found, float32 {shape} expected")
        nan = np.isnan(stored).ravel()
        if nan.any():
            raise cli.InputError(
                f"{path}: member {j}, split {split}: {nan.sum()} rewards are NaN, "
                f"the first at index {nan.argmax()}"
            )
        rewards[j - 1] = stored
    return rewards


def _read_array(path):
    """Return the array of a .npy file. Raises InputError where it is missing or broken."""
    if not path.is_file():
        raise cli.InputError(f"{path}: no such file")
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise cli.InputError(f"{path}: not a .npy array ({error})") from None


def read_continuations(run):
    """Return {column: list} of DIR/continuations.parquet; None where there is no such file.

    data_prep/continuations.py has the format; `logprob` is None where the file has none. Raises
    InputError unless there is a prompt, and all have as many texts and logprobs.
    """
    path = run / "continuations.parquet"
    if not path.exists():
        return None
    try:
        table = pq.read_table(path)
        columns = {name: table[name].to_pylist() for name in ("prompt_id", "messages", "texts")}
    except (pa.ArrowException, KeyError) as error:
        raise cli.InputError(
            f"{path}: not continuations ({cli.first_line(error)}); "
            "the columns prompt_id, messages and texts expected"
        ) from None
    has_logprob = "logprob" in table.column_names
    columns["logprob"] = table["logprob"].to_pylist() if has_logprob else None
    if not columns["texts"]:
        raise cli.InputError(f"{path}: no prompt found, at least 1 expected")
    n = len(columns["texts"][0] or ())
    for name in ("texts", "logprob"):
        for number, values in enumerate(columns[name] or (), 1):
            count = len(values or ())
            if count != n or count == 0:
                expected = f"{n or 'at least 1'} expected"
                raise cli.InputError(f"{path}: prompt {number}: {count} {name} found, {expected}")
    return columns


def read_continuation_rewards(run, k):
    """Return the rewards of the continuations, float32 (k, prompts, n); None where none are."""
    path = reward_path(run, 1, "continuations")
    if continuations := read_continuations(run):
        shape = len(continuations["texts"]), len(continuations["texts"][0])
    elif not any(path.parent.glob("*_continuations.npy")):
        return None
    else:
        shape = _read_array(path).shape
    if len(shape) != 2:
        raise cli.InputError(f"{path}: shape {shape} found, (prompts, n) expected")
    return read_rewards(run, "continuations", k, shape)


def read_weights(run, k):
    """Return the mixture weights of the first k members, float64 (k,).

    Raises InputError where weights.json has none for this k, or broken ones.
    """
    path = run / "weights.json"
    try:
        prefixes = {entry["k"]: np.array(entry["alpha"], np.float64) for entry in read_json(path)}
    except (KeyError, TypeError, ValueError):
        expected = "a list of {k, alpha, fit} expected"
        raise cli.InputError(f"{path}: {expected}; fit_weights.py makes it") from None
    if k not in prefixes:
        known = ", ".join(map(str, prefixes))
        expected = f"weights for k = {known} found, k = {k} expected"
        raise cli.InputError(f"{path}: {expected}; fit_weights.py makes them")
    alpha = prefixes[k]  # NaN fails each of the conditions.
    if not (alpha.shape == (k,) and (alpha >= 0).all() and abs(alpha.sum() - 1) <= 1e-9):
        expected = f"{k} weights that are at least 0 and sum to 1 expected"
        raise cli.InputError(f"{path}: k={k}: {alpha.tolist()} found, {expected}")
    return alpha
