"""The run directory: what the stages leave in it, and how it is read. torch is never imported.

    DIR/data/                          prepared data (pairwise/data.py)
    DIR/member_JJ/                     the reward model of member J, or only its head or adapter
    DIR/rewards/JJ_SPLIT.npy           float32, one per distinct response, in data order
    DIR/continuations.parquet          answers for the diversity measurement, n for each prompt
    DIR/rewards/JJ_continuations.npy   float32 (prompts, n)
    DIR/rewards/source_SPLIT.npy       float32 (K, responses): what a hardened run was made from
    DIR/logprob/test.npy               float32, log pi_0 of each test response, in data order
    DIR/weights.json                   the mixture weights alpha of every prefix k
    DIR/metrics.json, report.html, figures/, logs/JJ.jsonl (a line a training step)
    DIR/manifest.json                  what made them (pairwise/manifest.py)

The readers refuse a file that was edited or damaged since its stage wrote it.
"""

import argparse
import functools
import hashlib
import os
import re
from pathlib import Path

from pairwise import cli, files, manifest

import numpy as np
import pyarrow as pa

# what a run has beside data and members: the stage, and the file that it leaves
BESIDE = {
    "weights": "weights.json",
    "continuations": "continuations.parquet",
    "logprob": "logprob/test.npy",
    "plurality": "plurality.json",
}

DONE = {"done": True}  # what is known of members that no stage has made

# ---- how the members came about


def kind_of(run, beneath=False, j=1):
    """Return how member j of `run` came about, by its manifest; None where it has none yet.

    "full", "lora", "head", "joint", "existing", "imported", "hardened" or "pruned"; with beneath,
    the kind of the run that a pruned one was made from.
    """
    made = manifest.entries(run)
    if not beneath and "prune" in made.get("weights", {}).get("settings", {}):
        return "pruned"
    if "harden" in made:
        return "hardened"
    if "joint" in made:
        return "joint"
    train = made.get(member_name(j), {}).get("settings", {}).get("train")
    # extras/adopt.py enters "from", extras/import_scores.py "import".
    return {"from": "existing", "import": "imported"}.get(train, train)


def imported(run):
    """Return the numbers of the members of `run` that are rewards alone, without a model."""
    made = manifest.entries(run)
    kinds = {name: entry["settings"].get("train") for name, entry in made.items()}
    return [j for j in range(1, 100) if kinds.get(member_name(j)) == "import"]


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


def check_whole(run, k, *beside):
    """Raise InputError where members 1..k, or what is `beside` them, names of BESIDE, were broken
    off, or made from other data, rewards or continuations than are there now.

    What somebody has edited and accepted may differ. Of a stage that the manifest does not have,
    of rewards made by hand, say, nothing is known, and what has no file beside them is left out."""
    stages = ["data", "joint", "harden"]
    for j in range(1, k + 1):
        stages.append(member_name(j))
        if "continuations" in beside and reward_path(run, j, "continuations").exists():
            stages.append(f"{member_name(j)}_continuations")
    check_stages(run, *stages, *(name for name in beside if (run / BESIDE[name]).exists()))


def check_stages(run, *stages):
    """Raise InputError where one of `stages`, if it was begun, is as `check_whole` says."""
    made, hash_file = manifest.entries(run), functools.cache(files.hash_file)
    edited = {run / name for entry in made.values() for name in entry.get("edited", ())}
    for stage in (name for name in stages if name in made):
        if not made[stage]["done"]:
            words = "was broken off, or is not done yet; the command that began it finishes it"
            raise cli.InputError(f"{run}: stage {stage} {words}")
        # The data's own inputs are files elsewhere, whatever their names.
        for name, value in made[stage]["inputs"].items() if stage != "data" else ():
            path = run / name if manifest.is_of_run(name) else None
            if match := re.fullmatch(r"rewards of member (\d+)", name):
                path = reward_path(run, int(match[1]), "train")
            if path and path.exists() and path not in edited and hash_file(path) != value:
                advice = "another run expected"
                if stage == "weights":
                    advice = "fit_weights.py fits them anew"
                elif manifest.is_of_run(name):
                    advice = f"evaluate.py --run {run} --accept-edited takes it as it is"
                changed = f"{name} changed since stage {stage} was made"
                raise cli.InputError(f"{run}: {changed}; {advice}")


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


def check_no_run(out):
    """Raise InputError where --out is no directory, or is a run."""
    cli.check_directory("out", out)
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


# ---- what the stages left


def member_name(j):
    """Return the name of member j's directory and of the stage that made it."""
    return f"member_{j:02d}"


def reward_path(run, j, split):
    """Return the path of member j's rewards of a split, or of the "continuations"."""
    return run / "rewards" / f"{j:02d}_{split}.npy"


def count_members(run):
    """Return the number K of members that have rewards, up to one that was broken off. Raises
    InputError where there is none, or where a number is missing."""
    folder = run / "rewards"
    numbers = sorted(int(path.name[:2]) for path in folder.glob("[0-9][0-9]_test.npy"))
    if not numbers:
        raise cli.InputError(f"{folder}: no rewards; train_rm.py makes them")
    if numbers != list(range(1, len(numbers) + 1)):
        raise cli.InputError(f"{folder}: members {numbers} found, 1 to {len(numbers)} expected")
    made = manifest.entries(run)
    k = next((j - 1 for j in numbers if not made.get(member_name(j), DONE)["done"]), len(numbers))
    if k == 0:
        check_stages(run, member_name(1))  # It raises: this one was broken off.
    return k


def check_next(run, j):
    """Raise InputError where a member j would leave a gap after those that have rewards."""
    if j > 1 and (k := count_members(run)) < j - 1:
        raise cli.InputError(f"--iteration {j}: {run} has {k} members, {k + 1} at most expected")


def hash_ensemble(run, k):
    """Return {name: SHA-256} of what member k + 1 is trained beside: the train rewards of members
    1..k and their mixture weights, to nine digits, as the last ones differ between machines."""
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
        manifest.check(run, path)
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
    manifest.check(run, path)
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
    manifest.check(run, path)
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
    manifest.check(run, run / "metrics.json")
    return files.read_json(run / "metrics.json", METRICS)


WEIGHTS = [{"k": int, "alpha": [files.NUMBER], "fit": str}]


def read_prefixes(run):
    """Return the entries of weights.json, {k, alpha, fit, ..}, in the order of k.

    Raises InputError where it has another form, weights that are not on the simplex, or a k twice.
    """
    path = run / "weights.json"
    manifest.check(run, path)
    prefixes = sorted(files.read_json(path, WEIGHTS), key=lambda entry: entry["k"])
    for before, entry in zip([{"k": None}, *prefixes], prefixes):
        k, alpha = entry["k"], np.array(entry["alpha"], np.float64)  # NaN fails each condition.
        if not (alpha.shape == (k,) and (alpha >= 0).all() and abs(alpha.sum() - 1) <= 1e-9):
            expected = f"{k} weights that are at least 0 and sum to 1 expected"
            raise cli.InputError(f"{path}: k={k}: {alpha.tolist()} found, {expected}")
        if k == before["k"]:
            raise cli.InputError(f"{path}: k={k}: two entries found, one expected")
    return prefixes


def read_all_prefixes(run):
    """Return `read_prefixes`. Raises InputError unless the last is of as many members as there are
    rewards of."""
    k, prefixes = count_members(run), read_prefixes(run)
    largest = max((entry["k"] for entry in prefixes), default=0)
    if largest != k:
        sizes = f"weights for K = {largest} found, rewards of K = {k} members"
        raise cli.InputError(f"{run / 'weights.json'}: {sizes}; fit_weights.py fits them anew")
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
