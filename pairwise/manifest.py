"""The manifest of a run, DIR/manifest.json: of every stage its settings, the hashes of its inputs
and outputs, versions and time. By it a stage is skipped, done again or refused. torch is never
imported.

A stage enters itself in the manifest as begun, writes under temporary names, renames its outputs
into place, and enters itself as done. A stage that was begun and not done is done again.
"""

import ast
import contextlib
import hashlib
import inspect
import os
import platform
import resource
import shlex
import subprocess
import sys
import textwrap
import time
from importlib import metadata
from pathlib import Path

from pairwise import cli, files

VERSIONS_OF = ("numpy", "scipy", "torch", "transformers", "peft", "pytorch_optimizer", "pyarrow")

_locks = {}  # run directory -> descriptor of the file that locks it for this process
_seen = {}  # (run directory, stage) -> its entry when this process decided to do the stage

# settings: {flag: value}; inputs: {name: SHA-256}; outputs, of a finished stage: {path in the run:
# SHA-256}; edited: those of the outputs that somebody has edited and accepted.
STAGE = {"settings": dict, "inputs": {str: str}, "done": bool, "outputs?": {str: str}}
MANIFEST = {"stages": {str: STAGE | {"edited?": [str]}}}


def entries(run):
    """Return the manifest's entries, {stage: STAGE}; {} before the first."""
    return files.read_json(run / "manifest.json", MANIFEST, {"stages": {}})["stages"]


def _outputs(run):
    """Return {path in the run: (stage, SHA-256)} of all files that the manifest knows."""
    return {
        name: (stage, value)
        for stage, entry in entries(run).items()
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
    """Enter the files of `run` that differ from what their stages wrote as edited, with new hashes,
    and data and continuations that no stage wrote and that differ from what members were made from.

    They are printed. Files that are gone stay as they were."""
    for name, (stage, value) in _outputs(run).items():
        if (run / name).is_file() and (now := files.hash_file(run / name)) != value:
            _accept(run, stage, name, {"outputs": entries(run)[stage]["outputs"] | {name: now}})
    others = "data", "weights", "evaluate"  # made from files elsewhere, or made anew
    made = {name: x for name, x in entries(run).items() if name not in others}
    of_run = [(stage, name) for stage in made for name in made[stage]["inputs"] if is_of_run(name)]
    for stage, name in of_run:
        edited = {x for entry in entries(run).values() for x in entry.get("edited", ())}
        if name in edited or not (run / name).is_file():
            continue
        if files.hash_file(run / name) != made[stage]["inputs"][name]:
            _accept(run, stage, name, {})


def _accept(run, stage, name, more):
    """Enter a file of `run` as edited in the entry of `stage`, and `more` keys."""
    lock(run)
    entry = entries(run)[stage]
    edited = {"edited": sorted({*entry.get("edited", ()), name})}
    _enter(run, stage, entry | more | edited)
    print(f"{run / name}: edited, accepted")


def is_of_run(name):
    """Tell whether a stage's input is a file that the run is made of, by its path in the run."""
    return name.startswith("data/") or name == "continuations.parquet"


def stage_done(run, stage, settings, inputs, outputs):
    """Tell whether `stage` is complete in `run` with these settings and inputs.

    settings: {flag: value}, every flag that can change the result; inputs: {name: hash}; outputs:
    the paths that it makes. Raises InputError where it was completed with other settings or inputs,
    or where an output is there that no stage has made.
    """
    existing, entry = [path for path in outputs if path.exists()], entries(run).get(stage)
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
    entry = entries(run).get(stage)
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
    """Tell whether a stage that takes seconds is complete and up to date; else it is to be done
    again. Raises InputError where an output that is up to date was edited, and where one that is to
    be written is a link.
    """
    entry = entries(run).get(stage)
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


def begin_stage(run, stage, settings, inputs, rewrites=(), anew=False):
    """Enter `stage` in the manifest as begun, and return the start time for end_stage.

    This process keeps `run` until it ends. rewrites: paths in the run, outputs of other stages that
    this one will change; their hashes count no more. anew: other stages have no entry any more.
    Raises InputError where `run` is no directory, and where another process has it, or has done
    this stage since `stage_done` or `unchanged` looked.
    """
    cli.check_directory("run", run)
    run.mkdir(parents=True, exist_ok=True)
    lock(run)
    now = entries(run).get(stage)
    if _seen.pop((run.resolve(), stage), now) != now:
        words = f"another process has done this stage ({stage}) meanwhile"
        raise cli.InputError(f"{run}: {words}; the same command goes on from there")
    entry = {"settings": settings, "inputs": inputs, "done": False}
    _enter(run, stage, entry, rewrites, anew)
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


def _enter(run, stage, entry, rewrites=(), anew=False):
    """Write a stage's entry into the manifest, alone where the run begins anew. What it has
    written, and what it rewrites, is no other stage's output any more."""
    new = ({} if anew else entries(run)) | {stage: entry}
    for name, other in new.items():
        if name != stage and "outputs" in other:
            rest = other["outputs"].keys() - entry.get("outputs", {}).keys() - set(rewrites)
            other["outputs"] = {path: other["outputs"][path] for path in sorted(rest)}
    files.write_json(run / "manifest.json", {"stages": new}, hashed=False)


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
