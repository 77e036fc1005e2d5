"""Make rewards from elsewhere members of a run: of a served model, a judge, another framework.

    python extras/import_scores.py --run RUN --iteration J scores.jsonl        (then fit_weights.py)
    python extras/import_scores.py --run RUN --iteration 1 judged.csv --reward gpt4,llama

The file is .jsonl, .json, .csv or .parquet, each also with .gz, in one of two forms:

    response, reward                        a row per response, or
    response_a, response_b, r_a, r_b        a row per pair; a response in several has one reward

and has prompt_id, or prompt as the votes had it. --reward NAME reads the columns NAME, or NAME_a
and NAME_b, instead; several names, with commas, become members J, J+1, .. A file that has votes too
makes the run, where its prompts and responses may be ids:

    python data_prep/votes.py --run RUN --source judged.csv

Every response of every split needs its reward; rewards of other responses are counted and left out.
They are stored as float32, RUN/rewards/0j_SPLIT.npy: the order of a prompt's responses is all that
counts.
"""

import argparse
import hashlib
import json
import reprlib
from collections import defaultdict
from typing import NamedTuple

from pairwise import cli, data, files, manifest, rows, run_dir

import numpy as np

LARGEST = float(np.finfo(np.float32).max)
TEXTS = dict.fromkeys(("prompt_id", "response", "response_a", "response_b"), "text")


class Prompt(NamedTuple):
    """A prompt of the run."""

    context: str  # its messages as text
    places: dict  # {response: its place among the R responses of all splits}


def context_of(messages):
    return json.dumps(messages, sort_keys=True)


def prompts_of(splits):
    """Return the Prompts of {name: Split}, {prompt_id: list} and {context: list}.

    A prompt may be there with two ids, or an id in two splits."""
    by_id, by_context, place = defaultdict(list), defaultdict(list), 0
    for split in splits.values():
        for name, messages, responses in zip(split.prompt_id, split.messages, split.responses):
            prompt = Prompt(context_of(messages), {x: place + i for i, x in enumerate(responses)})
            by_id[name].append(prompt)
            by_context[prompt.context].append(prompt)
            place += len(responses)
    return by_id, by_context


def meant(where, row, by_id, by_context):
    """Return the Prompts that a row is of: by its prompt_id where the run has it, else its prompt.

    Raises InputError where it has neither, or both and the run's is another prompt."""
    context = name = None
    if "prompt" in row:
        # data_prep/votes.py drops a blank prompt, so it is one that the run does not have.
        context = context_of(rows.messages(where, row["prompt"], rows.string))
    if "prompt_id" in row:
        name = rows.label(where, "prompt_id", row["prompt_id"])
    if context is name is None:
        raise rows.wrong(where, "prompt_id", None, "prompt_id or prompt")
    if name not in by_id:
        return by_context.get(context, [])
    prompts = [prompt for prompt in by_id[name] if context in (None, prompt.context)]
    if not prompts:
        words = "another prompt than in the run; without the column prompt, prompt_id alone counts"
        raise cli.InputError(f"{where}: prompt_id {name!r} has {words}")
    return prompts


def scored(where, row, names):
    """Yield (response, {name: column of its reward}) of a row, but not of an empty response."""
    if "response" in row:
        sides = {"response": {name: name or "reward" for name in names}}
    else:
        sides = {f"response_{x}": {name: f"{name or 'r'}_{x}" for name in names} for x in "ab"}
        if not sides.keys() & row.keys():
            raise rows.wrong(where, "response", None, "response, or response_a and response_b,")
    for field, columns in sides.items():
        if str(row.get(field, "")).strip():
            yield rows.label(where, field, row[field]), columns


def finite(where, row, column, others):
    """Return a reward, float. Raises InputError unless it is a number that float32 can hold."""
    value = row.get(column)
    if not rows.is_number(value) or not abs(value) <= LARGEST:  # NaN is not.
        named = value is None and others and reprlib.repr(sorted(others))
        known = f" (--reward names other columns, of {named})" if named else ""
        raise rows.wrong(where, column, value, f"a finite number that float32 holds{known}")
    return float(value)


def read_scores(path, names, splits, others):
    """Return the rewards of a file, float64 (names, R), and what of it was left out, in words.

    R: the responses of all splits in data order. names: as of --reward, [None] for the columns
    reward, r_a and r_b; the set `others` gets the names of other columns. Raises InputError where a
    response has no reward, or two."""
    by_id, by_context = prompts_of(splits)
    count = sum(split.n_responses for split in splits.values())
    rewards, source, unknown = np.full((len(names), count), np.nan), [""] * count, []
    columns = [f"{name}{x}" for name in names if name for x in ("", "_a", "_b")]
    columns = columns or ["reward", "r_a", "r_b"]
    fields = dict.fromkeys(columns, "number") | TEXTS | {"prompt": "messages"}
    for where, row in rows.read_rows(path, fields, others=others):
        prompts = meant(where, row, by_id, by_context)
        for response, column_of in scored(where, row, names):
            places = [x.places[response] for x in prompts if response in x.places]
            if not places:
                unknown.append(where)
                continue
            new = [finite(where, row, column_of[name], others) for name in names]
            for place in places:
                if not source[place]:
                    rewards[:, place], source[place] = new, where
                for column, a, b in zip(column_of.values(), rewards[:, place], new):
                    if np.float32(a) != np.float32(b):
                        words = f"{b} found, {a} at {source[place]} for the same response"
                        raise cli.InputError(f"{where}: {column}: {words}; one reward expected")
    left_out = ""
    if unknown:
        words = "of responses that the run does not have, left out, the first at"
        left_out = f"{len(unknown):,} rewards {words} {unknown[0]}"
    if missing := [place for place, where in enumerate(source) if not where]:
        words = f"{len(missing):,} of the run's {count:,} responses have no reward, the first"
        first = words_on(splits, missing[0])
        raise cli.InputError(f"{path}: {words}: {first}{left_out and '; '}{left_out}")
    return rewards, left_out


def words_on(splits, place):
    """Return words for the response at a place among those of all splits."""
    every = [
        (name, prompt_id, response)
        for name, split in splits.items()
        for prompt_id, responses in zip(split.prompt_id, split.responses)
        for response in responses
    ]
    name, prompt_id, response = every[place]
    return f"{name} prompt_id {reprlib.repr(prompt_id)}, response {reprlib.repr(response)}"


def by_split(rewards, splits):
    """Return {name: rewards (R of it,)} of the rewards (R,) of all splits."""
    ends = np.cumsum([split.n_responses for split in splits.values()])
    return dict(zip(splits, np.split(rewards, ends[:-1])))


def write_member(run, source, j, name, rewards, splits):
    """Write the rewards (R,) as member j's, unless that is done; say what float32 loses.

    source: where they are from, in words."""
    scores = by_split(rewards.astype(np.float32), splits)
    digest = hashlib.sha256(b"".join(scores[split].tobytes() for split in scores)).hexdigest()
    inputs = data.hashes(run) | {"set of rewards": digest}
    settings = {"train": "import"} | ({"reward": name} if name else {})
    stage = (run, run_dir.member_name(j), settings, inputs)
    paths = {split: run_dir.reward_path(run, j, split) for split in splits}
    if manifest.stage_done(*stage, list(paths.values())):
        print(f"member {j}: its rewards are there, skipped")
        return
    started = manifest.begin_stage(*stage)
    for split, path in paths.items():
        files.write_array(path, scores[split])
    exact, lost = by_split(rewards, splits), 0
    for split, x in splits.items():
        differ, stored = (each[split][x.a] != each[split][x.b] for each in (exact, scores))
        lost += int((differ & ~stored).sum())
    manifest.end_stage(*stage, started, source=source, pairs_equal_in_float32=lost)
    words = "pairs tie in float32 though their rewards differ; nearer to 0 it has more digits"
    words = f"; {lost:,} {words}" if lost else ""
    print(f"member {j}: {name or 'rewards'} of {source}{words}")


def main(args):
    """Read all members' rewards, then write them."""
    run, j, others = args.run, args.iteration, set()
    run_dir.check_own_run(run)
    splits, _ = data.read_splits(run)
    run_dir.check_next(run, j)
    rewards, left_out = read_scores(args.file, args.reward, splits, others)
    for number, (name, values) in enumerate(zip(args.reward, rewards), j):
        write_member(run, args.file.name, number, name, values, splits)
    if left_out:
        print(f"{args.file.name}: {left_out}")
    if (run / "continuations.parquet").exists():
        print("continuations: imported members have no rewards of them, so none are evaluated")
    rows.print_unused(args.file, others)


def names_of(text):
    """argparse type: names of columns, with commas between them."""
    names = text.split(",")
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} found, distinct names expected")
    return names


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    cli.add_run(parser, "run directory with data/")
    words = "make the rewards member J, 1 to 99, the first of several"
    add("--iteration", required=True, type=cli.member_number, metavar="J", help=words)
    words = "columns NAME, or NAME_a and NAME_b, a member each (reward, or r_a and r_b)"
    add("--reward", type=names_of, default=[None], metavar="NAME,..", help=words)
    add("file", type=cli.path, metavar="FILE", help="rows of prompts, responses and rewards")
    args = parser.parse_args(argv)
    if args.iteration + len(args.reward) > 100:
        parser.error(f"--iteration {args.iteration}: at most 99 members expected")
    return args


if __name__ == "__main__":
    cli.run_main(main, parse_args())
