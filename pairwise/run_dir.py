"""The run directory: prepared data, stored rewards, manifest, and how outputs appear in it. Never imports torch.

Prepared data, one row a prompt, in DIR/data/{train,test}.parquet (and valid.parquet with --valid-share):

    prompt_id  str
    messages   list of {role, content}     the context x, ending with a user turn
    responses  list of str                 distinct, in first-seen order
    pairs      list of {a, b: int, votes_a, votes_b, ties: float}     indices into responses
    p_true     list of float, optional     the population's true fraction per pair (simulation)
    categories {name: label}, optional     the user's own labels of the prompt
    judgments  list of {a, b}, optional    synthetic judgments per pair (extras/synthetic_judgments.py), kept apart from the votes

Rewards, one float32 per distinct response in data order: DIR/rewards/JJ_SPLIT.npy; DIR/rewards/JJ_continuations.npy has
shape (prompts, n). Mixture weights: DIR/weights.json. A stage enters itself in DIR/manifest.json as begun, writes under temporary names,
renames, and enters itself as done; one that was begun and not done is done again.
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

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pairwise import cli

LATER = {"loss": "mse"}  # settings of stages that were done before there was such a flag


_locks = {}  # run directory -> the open file that locks it for this process


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path`; on success rename it to `path` (a file, or a directory), on failure remove it.

    Only a directory ever replaces a directory: os.replace raises where a file should.
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
    """Write JSON without NaN or infinity (a number that does not exist is null)."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_array(path, array):
    """Write a float32 array as .npy."""
    with replacing(path) as partial, open(partial, "wb") as file:
        np.save(file, array.astype(np.float32, copy=False))


def write_lines(path, rows):
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def remembered_rows(path, key, count, make, label, write=write_lines):
    """[make(i) for i in range(count)], dicts, written to `path` by write(path, rows).

    What a killed call with the same key (a dict for JSON) has made is kept beside `path` line by line, and not made again.
    """
    from tqdm import tqdm  # only here: the stages after training do without it

    kept, rows = path.with_name(f".kept-{path.name}"), []
    if kept.exists():
        lines = [
            json.loads(line) for line in kept.read_bytes().split(b"\n")[:-1]
        ]  # a line without its end is not whole
        rows = lines[1:] if lines[:1] == [key] else []
    with replacing(kept) as whole:
        write_lines(whole, [key, *rows])
    with open(kept, "a", encoding="utf-8") as file:
        for number in tqdm(
            range(len(rows), count),
            initial=len(rows),
            total=count,
            desc=label,
            unit="prompt",
            leave=False,
        ):
            rows.append(make(number))
            file.write(json.dumps(rows[-1]) + "\n")
            file.flush()
    with replacing(path) as whole:
        write(whole, rows)
    kept.unlink()
    return rows


def read_json(path, otherwise=None):
    """The JSON value of a file; `otherwise` where there is no such file and a default was given."""
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
    """SHA-256 of a file's bytes, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stage_done(run, stage, settings, inputs, outputs):
    """True where `stage` is complete in `run` with these settings and inputs.

    settings: {flag: value}, every flag that can change the result; inputs: {name: hash}; outputs: paths that must exist.
    Raises InputError where it was completed with other settings or inputs, or where an output was not made by a run.
    """
    entry = read_json(run / "manifest.json", {"stages": {}})["stages"].get(stage)
    if entry is None:
        strange = [path for path in outputs if path.exists()]
        if strange:
            raise cli.InputError(
                f"{strange[0]} exists but was not made by this stage ({stage}); choose another --run"
            )
        return False
    if not entry["done"]:  # begun and broken off: done again, from the start
        return False
    must_agree(run, stage, settings, inputs)
    return all(path.exists() for path in outputs)


def must_agree(run, stage, settings, inputs):
    """Raise InputError where `stage` of `run` is complete and was done with other settings or inputs."""
    entry = read_json(run / "manifest.json", {"stages": {}})["stages"].get(stage)
    if not entry or not entry["done"]:
        return
    for name in sorted(
        entry["settings"].keys() | settings.keys(), key=lambda name: (name != "train", name)
    ):  # the kind of training decides others
        was, now = (found.get(name, LATER.get(name)) for found in (entry["settings"], settings))
        if was != now:
            raise cli.InputError(
                f"{run} was made with other arguments (stage {stage}): {name.replace('_', '-')} was {was}, is {now}; "
                f"to have both, run: {_command_elsewhere(run)}"
            )
    for name in sorted(entry["inputs"].keys() | inputs.keys()):
        if entry["inputs"].get(name) != inputs.get(name):
            raise cli.InputError(
                f"{run} was made from another {name} than it is given now (stage {stage}); to have both, run: {_command_elsewhere(run)}"
            )


def made_otherwise(run):
    """ "joint", "hardened" or "pruned": where the members or weights of `run` are not train_rm.py's and fit_weights.py's; else None."""
    stages = read_json(run / "manifest.json", {"stages": {}})["stages"]
    if "prune" in stages.get("weights", {}).get("settings", {}):
        return "pruned"
    return "hardened" if "harden" in stages else "joint" if "joint" in stages else None


def kind_of(run, beneath=False):
    """How the members of `run` came about, as its manifest says: "full", "lora", "head", "joint",
    "existing", "hardened" or "pruned"; None where it has no member yet. beneath: of a pruned run,
    the kind of the run that it was made from."""
    stages = read_json(run / "manifest.json", {"stages": {}})["stages"]
    if not beneath and "prune" in stages.get("weights", {}).get("settings", {}):
        return "pruned"
    if "harden" in stages:
        return "hardened"
    if "joint" in stages:
        return "joint"
    train = stages.get(member_name(1), {}).get("settings", {}).get("train")
    return "existing" if train == "from" else train  # the manifest of an existing model says "from"


def unchanged(run, stage, settings, inputs, outputs):
    """True where a stage of seconds, with no flags that others depend on, is complete and up to date; where not, it is simply done again."""
    entry = read_json(run / "manifest.json", {"stages": {}})["stages"].get(stage, {})
    return (
        bool(entry.get("done"))
        and entry["settings"] == settings
        and entry["inputs"] == inputs
        and all(path.exists() for path in outputs)
    )


def begin_stage(run, stage, settings, inputs):
    """Enter `stage` in the manifest as begun and return the start time, to be handed to end_stage.

    Raises InputError where another process works in `run`: this one keeps the directory until it ends.
    """
    run.mkdir(parents=True, exist_ok=True)
    if run.resolve() not in _locks:
        lock = open(run / ".lock", "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise cli.InputError(
                f"{run}: another process is working in this run directory"
            ) from None
        _locks[run.resolve()] = lock
    _update_manifest(run, stage, {"settings": settings, "inputs": inputs, "done": False})
    return time.time()


def end_stage(run, stage, settings, inputs, started, **facts):
    """Enter `stage` in the manifest as complete, after its outputs have been renamed into place."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    entry = {
        "settings": settings,
        "inputs": inputs,
        "done": True,
        "command": _command(),
        "date": time.strftime("%Y-%m-%d", time.gmtime(started)),
        "seconds": round(time.time() - started, 1),
        "peak_memory_mb": round(peak / (2**20 if sys.platform == "darwin" else 2**10)),
        "threads": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "versions": _versions(),
        "git_commit": _git_commit(),
    } | facts
    _update_manifest(run, stage, entry)


def _update_manifest(run, stage, entry):
    manifest = read_json(run / "manifest.json", {"stages": {}})
    manifest["stages"][stage] = entry
    write_json(run / "manifest.json", manifest)


def _command():
    """What the user typed: run_all.sh leaves its own command in the environment for the stages it calls."""
    return os.environ.get("PAIRWISE_COMMAND") or shlex.join(["python", *sys.argv])


def _command_without(flag):
    """The words of the user's command without a flag and its value."""
    words = shlex.split(_command())
    if flag in words[:-1]:
        at = words.index(flag)
        del words[at : at + 2]
    return [word for word in words if not word.startswith(f"{flag}=")]


def command_with(*more):
    """The user's command for a local copy: with more words, without --revision, which is the hub's."""
    return shlex.join([*_command_without("--revision"), *more])


def _command_elsewhere(run):
    """The user's command with a run directory of its own."""
    number = next(n for n in range(2, 10**6) if not Path(f"{run}-{n}").exists())
    return shlex.join([*_command_without("--run"), "--run", f"{run}-{number}"])


def _versions():
    versions = {"python": platform.python_version()}
    for package in (
        "numpy",
        "scipy",
        "torch",
        "transformers",
        "peft",
        "pytorch_optimizer",
        "pyarrow",
    ):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def _git_commit():
    """The commit of this repository, with '+' where files differ from it; null outside git."""

    def git(*words):
        return subprocess.run(
            ["git", "-C", str(cli.REPOSITORY), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (
            "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def read_continuations(run):
    """{column: list} of continuations.parquet, where data_prep/continuations.py has the format; `logprob` is None where the file has none.
    None where there is no file. Raises InputError unless there is a prompt and every one has as many texts and logprobs."""
    path = run / "continuations.parquet"
    if not path.exists():
        return None
    try:
        table = pq.read_table(path)
        found = {name: table[name].to_pylist() for name in ("prompt_id", "messages", "texts")}
    except (pa.ArrowException, KeyError) as error:
        raise cli.InputError(
            f"{path}: not continuations ({cli.first_line(error)}); the columns prompt_id, messages and texts expected"
        ) from None
    found["logprob"] = table["logprob"].to_pylist() if "logprob" in table.column_names else None
    for name in ("texts", "logprob"):
        for number, row in enumerate(found[name] or (), 1):
            if not row or len(row) != len(found["texts"][0]):
                raise cli.InputError(
                    f"{path}: prompt {number}: {len(row or ())} {name} found, {len(found['texts'][0] or ()) or 'at least 1'} expected"
                )
    if not found["texts"]:
        raise cli.InputError(f"{path}: no prompt found, at least 1 expected")
    return found


def member_name(j):
    return f"member_{j:02d}"


def reward_path(run, j, split):
    return run / "rewards" / f"{j:02d}_{split}.npy"


def count_members(run):
    """The number K of members whose rewards are there; members 1..K without a gap."""
    found = sorted(int(path.name[:2]) for path in (run / "rewards").glob("[0-9][0-9]_test.npy"))
    if not found:
        raise cli.InputError(f"{run / 'rewards'}: no rewards; train_rm.py makes them")
    if found != list(range(1, len(found) + 1)):
        raise cli.InputError(
            f"{run / 'rewards'}: members {found} found, 1 to {len(found)} expected"
        )
    return len(found)


def read_rewards(run, split, k, shape):
    """float32 (k, *shape): rewards of members 1..k. Raises InputError for a missing file, a wrong shape or dtype, or NaN."""
    rewards = np.empty((k, *shape), np.float32)
    for j in range(1, k + 1):
        path = reward_path(run, j, split)
        if not path.is_file():
            raise cli.InputError(f"{path}: no such file")
        try:
            found = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise cli.InputError(f"{path}: not a .npy array ({error})") from None
        if found.dtype != np.float32 or found.shape != shape:
            raise cli.InputError(
                f"{path}: {found.dtype} {found.shape} found, float32 {shape} expected"
            )
        if np.isnan(found).any():
            nan = np.isnan(found).ravel()
            raise cli.InputError(
                f"{path}: member {j}, split {split}: {nan.sum()} rewards are NaN, the first at index {nan.argmax()}"
            )
        rewards[j - 1] = found
    return rewards


def read_continuation_rewards(run, k):
    """Rewards of the continuations, float32 (K, prompts, n); None where there are none."""
    if not (run / "continuations.parquet").exists() and not list(
        (run / "rewards").glob("*_continuations.npy")
    ):
        return None
    path = reward_path(run, 1, "continuations")
    try:
        shape = np.load(path, allow_pickle=False).shape
    except (OSError, ValueError, EOFError):
        shape = (0, 0)  # read_rewards says what is wrong
    if len(shape) != 2:
        raise cli.InputError(f"{path}: shape {shape} found, (prompts, n) expected")
    scores, texts = read_rewards(run, "continuations", k, shape), read_continuations(run)
    if texts and (size := (len(texts["texts"]), len(texts["texts"][0]))) != shape:
        raise cli.InputError(
            f"{path}: shape {shape} found, {size} expected, by continuations.parquet"
        )
    return scores


def read_weights(run, k):
    """The mixture weights of the first k members, float64 (k,). Raises InputError where weights.json has none for this k, or broken ones."""
    path = run / "weights.json"
    try:
        prefixes = {entry["k"]: np.array(entry["alpha"], np.float64) for entry in read_json(path)}
        alpha = prefixes.get(k)
        broken = alpha is not None and (
            alpha.shape != (k,) or not (alpha >= 0).all() or not abs(alpha.sum() - 1) <= 1e-9
        )  # NaN fails both
    except (KeyError, TypeError, ValueError):
        raise cli.InputError(
            f"{path}: a list of {{k, alpha, fit}} expected; fit_weights.py makes it"
        ) from None
    if broken:
        raise cli.InputError(
            f"{path}: k={k}: {alpha.tolist()} found, {k} weights that are at least 0 and sum to 1 expected"
        )
    if alpha is None:
        raise cli.InputError(
            f"{path}: weights for k = {', '.join(map(str, prefixes))} found, k = {k} expected; fit_weights.py makes them"
        )
    return alpha
