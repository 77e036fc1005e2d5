"""The run directory: how stages enter it, and how what they left is read. torch is never imported.

    DIR/data/                          prepared data (pairwise/data.py)
    DIR/member_JJ/                     the reward model of member J, or only its head or adapter
    DIR/rewards/JJ_SPLIT.npy           float32, one per distinct response, in data order
    DIR/continuations.parquet          answers for the diversity measurement, n for each prompt
    DIR/rewards/JJ_continuations.npy   float32 (prompts, n)
    DIR/rewards/source_SPLIT.npy       float32 (K, responses): what a hardened run was made from
    DIR/logprob/test.npy               float32, log pi_0 of each test response, in data order
    DIR/weights.json                   the mixture weights alpha of every prefix k
    DIR/metrics.json, report.html, figures/, logs/JJ.jsonl (a line a training step)
    DIR/manifest.json                  of every stage: settings, input hashes, versions, time

A stage enters itself in the manifest as begun, writes under temporary names, renames its outputs
into place, and enters itself as done. A stage that was begun and not done is done again.
"""

import argparse
import ast
import contextlib
import hashlib
import inspect
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
import textwrap
import time
from importlib import metadata
from pathlib import Path

from pairwise import cli, files

import numpy as np
import pyarrow as pa

# what evaluate.py reads beside data and rewards, where it is there
EVALUATED = "weights.json", "continuations.parquet", "plurality.json", "logprob/test.npy"
VERSIONS_OF = ("numpy", "scipy", "torch", "transformers", "peft", "pytorch_optimizer", "pyarrow")

_locks = {}  # run directory -> descriptor of the file that locks it for this process
_seen = {}  # (run directory, stage) -> its entry when this process decided to do the stage


# ---- stages


# settings: {flag: value}; inputs: {name: SHA-256}; outputs: {path in the run: SHA-256}, since they
# are kept; edited: those of the outputs that somebody has edited and accepted.
STAGE = {"settings": dict, "inputs": {str: str}, "done": bool, "outputs?": {str: str}}
MANIFEST = {"stages": {str: STAGE | {"edited?": [str]}}}


def stages(run):
    """Return the manifest's entries, {stage: STAGE}; {} before the first."""
    return files.read_json(run / "manifest.json", MANIFEST, {"stages": {}})["stages"]


def _outputs(run):
    """Return {path in the run: (stage, SHA-256)} of all files that the manifest knows."""
    return {
        name: (stage, value)
        for stage, entry in stages(run).items()
        for name, value in entry.get("outputs", {}).items()
    }


def check(run, *paths):
    """Raise InputError where a file of `run` is not what the stage that made it has written.

    paths: files, or directories of which all files are checked. Files of which the manifest has no
    hash, of a run made by hand, say, are not checked.
    """
    names = [path.relative_to(run) for path in paths]
    for name, (_, value) in _outputs(run).items():
        if any(Path(name).is_relative_to(each) for each in names):
            path = run / name
            if not path.exists():
                raise cli.InputError(f"{path}: no such file; {run / 'manifest.json'} names it")
            if files.hash_file(path) != value:
                wrong = (
                    f"edited or damaged since it was written, by its hash in {run}/manifest.json"
                )
                words = f"evaluate.py --run {run} --accept-edited takes it as it is"
                raise cli.InputError(f"{path}: {wrong}; {words}")


def accept_edited(run):
    """Enter the files of `run` that differ from what their stages wrote as edited, with new hashes.

    They are printed. Files that are gone stay as they were."""
    for name, (stage, value) in _outputs(run).items():
        if (run / name).is_file() and (now := files.hash_file(run / name)) != value:
            lock(run)
            entry = stages(run)[stage]
            entry["outputs"][name] = now
            entry["edited"] = sorted({*entry.get("edited", ()), name})
            _enter(run, stage, entry)
            print(f"{run / name}: edited, accepted")


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
    else:
        must_agree(run, stage, settings, inputs)
        if entry["done"] and len(existing) == len(outputs):
            return True
    _refuse_links(outputs)
    _seen[run.resolve(), stage] = entry
    return False


def _refuse_links(outputs):
    """Raise InputError where an output that a stage is about to write is a link."""
    if links := [path for path in outputs if path.is_symlink()]:
        words = "a link found, in whose place the stage would write; a path without one expected"
        raise cli.InputError(f"{links[0]}: {words}")


def must_agree(run, stage, settings, inputs):
    """Raise InputError where `stage` of `run` is complete with other settings or inputs."""
    entry = stages(run).get(stage)
    if not entry or not entry["done"]:  # A stage that was broken off starts again.
        return
    number = next(n for n in range(2, 10**6) if not Path(f"{run}-{n}").exists())
    advice = f"to have both, start another run from the data on, say {run}-{number}"
    if stage in ("data", "base") or _command().startswith("bash run_all.sh"):  # begins a run
        advice = f"to have both, run: {command_with('--run', f'{run}-{number}', without='--run')}"
    names = entry["settings"].keys() | settings.keys()
    for name in sorted(names, key=lambda name: (name != "train", name)):  # --train decides others.
        was, now = entry["settings"].get(name), settings.get(name)
        if was != now:
            raise cli.InputError(
                f"{run} was made with other arguments (stage {stage}): {name.replace('_', '-')} "
                f"was {was}, is {now}; {advice}"
            )
    for name in sorted(entry["inputs"].keys() | inputs.keys()):
        if entry["inputs"].get(name) != inputs.get(name):
            raise cli.InputError(
                f"{run} was made from another {name} than it is given now (stage {stage}); {advice}"
            )


def unchanged(run, stage, settings, inputs, outputs):
    """Tell whether a stage of seconds is complete and up to date. Where not, it is done again.

    Raises InputError where it is, and one of its outputs was edited; where not, and one is a link.
    """
    entry = stages(run).get(stage)
    same = entry and entry["done"] and entry["settings"] == settings and entry["inputs"] == inputs
    if not same or not all(path.exists() for path in outputs):
        _refuse_links(outputs)
        _seen[run.resolve(), stage] = entry
        return False
    check(run, *outputs)
    return True


def hash_code(*paths):
    """Return {name: SHA-256} of files of code, paths in the repository or absolute: inputs of a
    stage that is to be done again when its code has changed."""
    names = {Path(path).name.split(".cpython-")[0]: path for path in paths}  # of any Python
    return {name: files.hash_file(cli.REPOSITORY / path) for name, path in names.items()}


def hash_function(function):
    """Return the SHA-256 of a function's code without comments and docstring: an input of a stage
    that it decides. Raises InputError where it is no function, or one without a name."""
    if not inspect.isfunction(function) or function.__name__ == "<lambda>":
        raise cli.InputError(f"{function!r} found, a function expected that def gives a name")
    [node] = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    if ast.get_docstring(node) is not None:
        node.body = node.body[1:]
    return hashlib.sha256(ast.unparse(node).encode()).hexdigest()


def begin_stage(run, stage, settings, inputs, rewrites=()):
    """Enter `stage` in the manifest as begun, and return the start time for end_stage.

    This process keeps `run` until it ends. rewrites: paths in the run, outputs of other stages that
    this one will change; their hashes count no more. Raises InputError where `run` is no directory,
    and where another process has it, or has done this stage since `stage_done` or `unchanged`
    looked.
    """
    check_directory("run", run)
    run.mkdir(parents=True, exist_ok=True)
    lock(run)
    now = stages(run).get(stage)
    if _seen.pop((run.resolve(), stage), now) != now:
        words = f"another process has done this stage ({stage}) meanwhile"
        raise cli.InputError(f"{run}: {words}; the same command goes on from there")
    entry = {"settings": settings, "inputs": inputs, "done": False}
    _enter(run, stage, entry, rewrites)
    files.hashes_beneath(run)  # From here on what is written there is this stage's.
    return time.time()


def lock(run):
    """Keep `run` for this process until it ends. Raises InputError where another one has it."""
    if run.resolve() in _locks:
        return
    descriptor = files.lock(run / ".lock")
    if descriptor is None:
        raise cli.InputError(f"{run}: another process is working in this run directory")
    _locks[run.resolve()] = descriptor


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
        "outputs": files.hashes_beneath(run),
        "command": _command(),
        "date": time.strftime("%Y-%m-%d", time.gmtime(started)),
        "seconds": round(time.time() - started, 1),
        "peak_memory_mb": round(peak / (2**20 if sys.platform == "darwin" else 2**10)),
        "threads": cli.usable_cores(),
        "versions": versions,
        "git_commit": _git_commit(),
    }
    _enter(run, stage, entry | facts)


def _enter(run, stage, entry, rewrites=()):
    """Write a stage's entry into the manifest. What it has written, and what it rewrites, is no
    other stage's output any more."""
    entries = stages(run) | {stage: entry}
    for name, other in entries.items():
        if name != stage and "outputs" in other:
            rest = other["outputs"].keys() - entry.get("outputs", {}).keys() - set(rewrites)
            other["outputs"] = {path: other["outputs"][path] for path in sorted(rest)}
    files.write_json(run / "manifest.json", {"stages": entries}, hashed=False)


def kind_of(run, beneath=False, j=1):
    """Return how member j of `run` came about, by its manifest; None where it has none yet.

    "full", "lora", "head", "joint", "existing", "imported", "hardened" or "pruned"; with beneath,
    the kind of the run that a pruned one was made from.
    """
    entries = stages(run)
    if not beneath and "prune" in entries.get("weights", {}).get("settings", {}):
        return "pruned"
    if "harden" in entries:
        return "hardened"
    if "joint" in entries:
        return "joint"
    train = entries.get(member_name(j), {}).get("settings", {}).get("train")
    # extras/adopt.py enters "from", extras/import_scores.py "import".
    return {"from": "existing", "import": "imported"}.get(train, train)


def imported(run):
    """Return the numbers of the members of `run` that are rewards alone, without a model."""
    trained = {name: entry["settings"].get("train") for name, entry in stages(run).items()}
    return [j for j in range(1, 100) if trained.get(member_name(j)) == "import"]


def first_with_model(run, j):
    """Return the first member before j that is not imported, done or not; None: all are, or j = 1.

    It decides of what kind a run's other members with a model are."""
    alone = imported(run)
    return next((i for i in range(1, j) if i not in alone), None)


def check_own_run(run):
    """Raise InputError where the members of the run are not made one by one, by one call each."""
    if (kind := kind_of(run)) in ("joint", "hardened", "pruned"):
        raise cli.InputError(
            f"{run}: a {kind} run found, whose members are complete; "
            "a run of this script's own, or a new one, expected"
        )


# ---- outputs that a user names

CONTRACT = re.compile(
    r"data|base|joint|rewards|logprob|features|logs|figures|(member|checkpoint)_\d\d|"
    r"report\.html|\.lock|(prompts|continuations)\.parquet|"
    r"(manifest|weights|metrics|members|plurality)\.json|judgments\.jsonl"
)


def output(text):
    """argparse type: a path to write to, none of those that a run directory consists of."""
    path = cli.path(text)
    if len(os.fsencode(path.name)) > 240:  # It is written under a longer name first.
        raise argparse.ArgumentTypeError(f"{text}: a name of at most 240 bytes expected")
    for place in {Path(os.path.abspath(path)), path.resolve()}:
        for run in place.parents:
            first = place.relative_to(run).parts[0]
            if CONTRACT.fullmatch(first) and is_run(run):
                words = f"{run} is a run directory, whose own {first} this is; another path"
                raise argparse.ArgumentTypeError(f"{text}: {words} expected")
    return path


def check_directory(flag, path):
    """Raise InputError where something else than a directory is at the path of --flag."""
    if not path.is_dir() and (path.exists() or path.is_symlink()):
        found = "a link to nothing" if path.is_symlink() else "a file"
        raise cli.InputError(f"--{flag} {path}: {found} found, a directory expected")


def check_no_run(out):
    """Raise InputError where --out is no directory, or is a run."""
    check_directory("out", out)
    if is_run(out):
        words = "another run directory found; its own results stay as they are"
        raise cli.InputError(f"--out {out}: {words}")


def is_run(directory):
    """Tell whether a directory is a run: by its manifest, or by what an evaluation needs."""
    if (directory / "rewards").is_dir() and (directory / "data").is_dir():
        return True
    try:  # Other programs have files of this name too.
        return "stages" in files.read_json(directory / "manifest.json", dict, {})
    except cli.InputError:
        return True


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
    options = {"cwd": cli.REPOSITORY, "stderr": subprocess.DEVNULL, "encoding": "utf-8"}
    status = "git --no-optional-locks status --porcelain --untracked-files=no"  # no commit waits
    try:
        commit, changes = (
            subprocess.check_output(command.split(), **options).strip()
            for command in ("git rev-parse HEAD", status)
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + "+" * bool(changes)


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


def check_next(run, j):
    """Raise InputError where a member j would leave a gap after those that have rewards."""
    if j > 1 and (k := count_members(run)) < j - 1:
        raise cli.InputError(f"--iteration {j}: {run} has {k} members, {k + 1} at most expected")


def hash_ensemble(run, k):
    """Return {name: SHA-256} of members 1..k as member k + 1 is trained beside them: of their train
    rewards and, rounded as another machine might, of their mixture weights."""
    hashes = hash_rewards(run, k)
    if k > 1:  # One member has the weight 1.
        alpha = np.round(read_weights(run, k), 9)
        hashes[f"mixture weights of members 1 to {k}"] = hashlib.sha256(alpha.tobytes()).hexdigest()
    return hashes


def hash_rewards(run, k):
    """Return {name: SHA-256} of the train rewards of members 1..k, for a stage made from them."""
    paths = {f"rewards of member {j}": reward_path(run, j, "train") for j in range(1, k + 1)}
    return {name: files.hash_file(path) for name, path in paths.items()}


def read_rewards(run, split, k, shape, first=1):
    """Return the rewards of members first..k, float32 (k - first + 1, *shape).

    Raises InputError for a missing file, a wrong shape or dtype, and for NaN.
    """
    rewards = np.empty((k - first + 1, *shape), np.float32)
    for j in range(first, k + 1):
        path = reward_path(run, j, split)
        check(run, path)
        stored = files.read_array(path)
        if stored.dtype != np.float32 or stored.shape != shape:
            its_form = f"{stored.dtype} {stored.shape}"
            raise cli.InputError(f"{path}: {its_form} found, float32 {shape} expected")
        nan = np.isnan(stored).ravel()
        if nan.any():
            raise cli.InputError(
                f"{path}: member {j}, split {split}: {nan.sum()} rewards are NaN, "
                f"the first at index {nan.argmax()}"
            )
        rewards[j - first] = stored
    return rewards


CONTINUATIONS = {"messages": [{"role": str, "content": str}], "texts": [str]}
CONTINUATIONS |= {"logprob": [files.NUMBER]}


def read_continuations(run):
    """Return {column: list} of DIR/continuations.parquet; None where there is no such file.

    data_prep/continuations.py has the format; `logprob` is None where the file has none. Raises
    InputError unless there is a prompt, and all have messages, and as many texts and logprobs.
    """
    path = run / "continuations.parquet"
    if not path.exists():
        return None
    check(run, path)
    try:
        table = files.read_parquet(path)
        columns = {name: table[name].to_pylist() for name in ("prompt_id", "messages", "texts")}
    except (pa.ArrowException, KeyError, OSError, ValueError) as error:
        raise cli.InputError(
            f"{path}: not continuations ({cli.first_line(error)}); "
            "the columns prompt_id, messages and texts expected"
        ) from None
    has_logprob = "logprob" in table.column_names
    columns["logprob"] = table["logprob"].to_pylist() if has_logprob else None
    if not columns["texts"]:
        raise cli.InputError(f"{path}: no prompt found, at least 1 expected")
    n = len(columns["texts"][0] or ())
    for name, form in CONTINUATIONS.items():
        for number, values in enumerate(columns[name] or (), 1):
            if wrong := files.misfit(values or [], form, name):
                raise cli.InputError(f"{path}: prompt {number}: {wrong}")
            count = len(values or ())
            if name != "messages" and (count != n or count == 0):
                expected = f"{n or 'at least 1'} expected"
                raise cli.InputError(f"{path}: prompt {number}: {count} {name} found, {expected}")
    return columns


def read_continuation_rewards(run, k):
    """Return the rewards of the continuations, float32 (k, prompts, n); None where none are, or
    where imported members have none."""
    path = reward_path(run, 1, "continuations")
    if imported(run):
        return None
    if continuations := read_continuations(run):
        shape = len(continuations["texts"]), len(continuations["texts"][0])
        for j in range(1, k + 1):
            if not (missing := reward_path(run, j, "continuations")).exists():
                words = "the script that made this member scores them when it is called again"
                raise cli.InputError(f"{missing}: no such file; {words}")
    elif not any(path.parent.glob("*_continuations.npy")):
        return None
    else:
        shape = files.read_array(path).shape
    if len(shape) != 2:
        raise cli.InputError(f"{path}: shape {shape} found, (prompts, n) expected")
    return read_rewards(run, "continuations", k, shape)


def read_logprob(run, responses):
    """Return log pi_0 of each test response, float32 (R,), that extras/policy_logprob.py has left;
    None where it has not. Raises InputError where they are not R finite numbers."""
    path = run / "logprob" / "test.npy"
    check(run, path)
    if not path.exists():
        return None
    stored = files.read_array(path)
    if stored.dtype != np.float32 or stored.shape != (responses,) or not np.isfinite(stored).all():
        found = f"{stored.dtype} {stored.shape} found"
        raise cli.InputError(f"{path}: {found}, float32 ({responses},) expected, all of it finite")
    return stored


METRICS = {"dataset": str, "k": int, "k_valid": (int, type(None)), "votes": str, "splits": dict}


def read_metrics(run):
    """Return the value of metrics.json. Raises InputError where there is none, or an edited one."""
    check(run, run / "metrics.json")
    return files.read_json(run / "metrics.json", METRICS)


WEIGHTS = [{"k": int, "alpha": [files.NUMBER], "fit": str}]


def read_prefixes(run):
    """Return the entries of weights.json, {k, alpha, fit, ..}, in the order of k.

    Raises InputError where it has another form, weights that are not on the simplex, or a k twice.
    """
    path = run / "weights.json"
    check(run, path)
    prefixes = sorted(files.read_json(path, WEIGHTS), key=lambda entry: entry["k"])
    for before, entry in zip([{"k": None}, *prefixes], prefixes):
        k, alpha = entry["k"], np.array(entry["alpha"], np.float64)  # NaN fails each condition.
        if not (alpha.shape == (k,) and (alpha >= 0).all() and abs(alpha.sum() - 1) <= 1e-9):
            expected = f"{k} weights that are at least 0 and sum to 1 expected"
            raise cli.InputError(f"{path}: k={k}: {alpha.tolist()} found, {expected}")
        if k == before["k"]:
            raise cli.InputError(f"{path}: k={k}: two entries found, one expected")
    return prefixes


def read_weights(run, k):
    """Return the mixture weights of the first k members, float64 (k,).

    Raises InputError where weights.json has none for this k, or broken ones.
    """
    prefixes = {entry["k"]: entry["alpha"] for entry in read_prefixes(run)}
    if k not in prefixes:
        known = ", ".join(map(str, prefixes)) or "no k"
        expected = f"weights for k = {known} found, k = {k} expected"
        raise cli.InputError(f"{run / 'weights.json'}: {expected}; fit_weights.py makes them")
    return np.array(prefixes[k], np.float64)
