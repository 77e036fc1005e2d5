"""From single comparisons to prompt groups and splits: the steps that all of data_prep/ shares."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pairwise.run_dir import SPLITS, InputError, begin_stage, end_stage, replacing, seed, share, stage_done, write_json, write_split

VOTES = ("sampled", "population", "dependent")  # how the votes of a pair arose; decides the irreducible error


class Comparison(NamedTuple):
    """Votes on one pair of responses to one prompt; rows for the same pair, in either order, are added up."""

    prompt_id: str | None  # None: the prompt itself is the key
    messages: list  # [{role, content}, ..], ending with a user turn
    response_a: str
    response_b: str
    votes_a: float
    votes_b: float
    ties: float
    p_true: float | None = None
    categories: dict | None = None
    split: str | None = None
    where: str = ""  # file and row, for error messages


def add_arguments(parser, test_share=0.1, valid_share=0.0):
    """The flags that every converter has."""
    parser.add_argument("--run", required=True, type=Path, help="run directory; the result is RUN/data")
    parser.add_argument("--seed", type=seed, default=0, help="decides the split and which response stands first")
    parser.add_argument("--ties", choices=("drop", "half"), default="drop", help="a tie vote counts for nothing, or half for each side")
    parser.add_argument("--min-votes", type=int, choices=(1, 2), default=2, help="1 keeps train pairs with one vote, for hard-label losses")
    parser.add_argument("--test-share", type=share, default=test_share, help="share of the prompts held out, where the data has no split of its own")
    parser.add_argument("--valid-share", type=share, default=valid_share, help="share of the train prompts set aside for choices among variants")


def group(comparisons, ties):
    """Group comparisons by prompt, each response once, each pair once with its votes added up.

    ties: "drop", or "half" to give half of every tie vote to each side (`ties` keeps the raw count either way).
    Returns prompt rows (contract columns and `split`) in first-seen order, and a Counter of what was dropped, by reason.
    """
    rows, dropped = {}, Counter()
    for c in comparisons:
        if not c.response_a.strip() or not c.response_b.strip():
            dropped["empty response"] += 1
            continue
        if c.response_a == c.response_b:
            dropped["identical responses"] += 1
            continue
        context = json.dumps(c.messages, ensure_ascii=False, sort_keys=True)
        row = rows.setdefault(c.prompt_id or context, {
            "prompt_id": c.prompt_id or hashlib.sha256(context.encode()).hexdigest()[:16], "messages": c.messages, "context": context,
            "responses": {}, "pairs": {}, "p_true": {}, "categories": c.categories, "split": c.split})
        if row["context"] != context:
            raise InputError(f"{c.where}: prompt_id {c.prompt_id!r} has another prompt than before")
        if row["split"] != c.split:
            raise InputError(f"{c.where}: split {c.split!r} found, {row['split']!r} before for the same prompt; a prompt is in one split")
        if row["categories"] != c.categories:
            raise InputError(f"{c.where}: categories {c.categories} found, {row['categories']} before for the same prompt")
        a, b = (row["responses"].setdefault(text, len(row["responses"])) for text in (c.response_a, c.response_b))
        half = c.ties / 2 if ties == "half" else 0.0
        votes, p_true = (c.votes_a + half, c.votes_b + half), c.p_true
        if a > b:
            a, b, votes = b, a, votes[::-1]
            p_true = None if p_true is None else 1 - p_true
        pair = row["pairs"].setdefault((a, b), [0.0, 0.0, 0.0])
        pair[0] += votes[0]
        pair[1] += votes[1]
        pair[2] += c.ties
        if abs((row["p_true"].setdefault((a, b), p_true) or 0) - (p_true or 0)) > 1e-6:  # float32 files give p and 1 - p
            raise InputError(f"{c.where}: p_true differs from an earlier row for the same two responses")
    return list(rows.values()), dropped


def drop_pairs(rows, least, dropped):
    """The rows of `group` without their pairs of fewer than `least` votes, which are counted in `dropped`, and without empty rows."""
    for row in rows:
        for pair, (votes_a, votes_b, _) in list(row["pairs"].items()):
            if votes_a + votes_b < least:
                dropped["fewer than two votes" if least == 2 else "no vote"] += 1
                del row["pairs"][pair]
    return [row for row in rows if row["pairs"]]


def finish(row, rng):
    """One row of `group` in the contract's form.

    Responses without a pair are left out, and which response of a pair stands first is drawn from rng: it carries no information.
    """
    texts = list(row["responses"])
    used = sorted({index for pair in row["pairs"] for index in pair})
    new = {old: index for index, old in enumerate(used)}
    pairs, p_true = [], []
    for (a, b), (votes_a, votes_b, ties) in row["pairs"].items():
        truth = row["p_true"][a, b]
        if rng.random() < 0.5:
            a, b, votes_a, votes_b = b, a, votes_b, votes_a
            truth = None if truth is None else 1 - truth
        pairs.append({"a": new[a], "b": new[b], "votes_a": votes_a, "votes_b": votes_b, "ties": ties})
        p_true.append(truth)
    done = {"prompt_id": row["prompt_id"], "messages": row["messages"], "responses": [texts[old] for old in used], "pairs": pairs}
    if p_true[0] is not None:
        done["p_true"] = p_true
    if row["categories"]:
        done["categories"] = row["categories"]
    return done


def split_prompts(rows, test_share, valid_share, rng):
    """{split: rows}: the split the rows name where they name one, else `test_share` of the prompts, at least two, for test.

    valid_share of the train prompts become the validation split (at least one, where the share is not zero). Rows with equal messages stay
    together whatever their ids, so that no text is in two splits; where named splits part them, a warning says so.
    """
    def draw(rows, share, least):
        """(drawn, rest): `share` of the distinct prompts, at least `least`."""
        contexts = list(dict.fromkeys(row["context"] for row in rows))
        order = rng.permutation(len(contexts))
        drawn = {contexts[i] for i in order[: max(least, round(share * len(contexts)))]}
        return [row for row in rows if row["context"] in drawn], [row for row in rows if row["context"] not in drawn]

    split = {}
    if rows[0]["split"] is None:
        split["test"], split["train"] = draw(rows, test_share, 2)
    else:
        split = {name: [row for row in rows if row["split"] == name] for name in ("train", "test")}
        twice = {row["context"] for row in split["train"]} & {row["context"] for row in split["test"]}
        if twice:
            print(f"data: warning: {len(twice)} texts of prompts are in train and in test, under different prompt_ids")
    if valid_share:
        split["valid"], split["train"] = draw(split["train"], valid_share, 1)
    return split


def prepare(args, name, comparisons, votes, inputs, settings, more_stats=None):
    """Turn comparisons into RUN/data: group, split by prompt, orient, write parquet and stats.json.

    comparisons: called to get them, only where the stage is not done; votes: how the votes arose (VOTES); inputs: {name: hash}.
    Raises InputError where fewer than three prompts, or an empty split, would remain.
    """
    run = args.run
    settings = {"dataset": name, "votes": votes, "seed": args.seed, "ties": args.ties, "min_votes": args.min_votes,
                "test_share": args.test_share, "valid_share": args.valid_share} | settings
    if stage_done(run, "data", settings, inputs, [run / "data"]):
        print(f"data: {run / 'data'} is there, skipped")
        return
    rng = np.random.default_rng([args.seed, 1])
    rows, dropped = group(comparisons(), args.ties)
    rows = drop_pairs(rows, args.min_votes, dropped)
    if not rows:
        raise InputError(f"{name}: no pair with {args.min_votes} votes or more found{because(dropped)}")
    if len(rows) < 3:
        raise InputError(f"{name}: {len(rows)} prompts found, at least three expected{because(dropped)}")
    kept = split_prompts(rows, args.test_share, args.valid_share, rng)
    for split, members in kept.items():
        if split != "train":
            kept[split] = members = drop_pairs(members, 2, dropped)  # evaluation counts pairs with two votes or more only
        least = 2 if split == "test" else 1
        if len(members) < least:
            raise InputError(f"{name}: {len(members)} {split} prompts, at least {least} expected{because(dropped)}")
    kept = {split: [finish(row, rng) for row in kept[split]] for split in SPLITS if split in kept}
    stats = {"dataset": name, "votes": votes, "ties": args.ties, "seed": args.seed, "dropped": dict(sorted(dropped.items())),
             "splits": {split: describe(members) for split, members in kept.items()}} | (more_stats or {})
    started = begin_stage(run, "data", settings, inputs)
    with replacing(run / "data") as partial:
        partial.mkdir()
        for split, members in kept.items():
            write_split(partial / f"{split}.parquet", members)
        write_json(partial / "stats.json", stats)
    end_stage(run, "data", settings, inputs, started)
    for split, s in stats["splits"].items():
        print(f"data: {split:5} {s['prompts']:6,} prompts {s['responses']:7,} responses {s['pairs']:8,} pairs   "
              f"{s['annotators_mean']:.2f} votes a pair, majority {s['majority_mean']:.3f}")
    for reason, count in sorted(dropped.items()):
        print(f"data: {count:,} dropped: {reason}")
    if len(kept["test"]) < 20:
        print(f"data: warning: only {len(kept['test'])} test prompts, so the intervals will be wide")


def because(dropped):
    """What was dropped so far, as the end of a message; nothing where nothing was."""
    said = "; ".join(f"{count} dropped: {reason}" for reason, count in sorted(dropped.items()))
    return f" ({said})" if said else ""


def describe(rows):
    """Counts of one split; majority_mean is the paper's average p, mean max(p, 1-p)."""
    votes = np.array([(pair["votes_a"], pair["votes_b"]) for row in rows for pair in row["pairs"]])
    n = votes.sum(1)
    return {"prompts": len(rows), "responses": sum(len(row["responses"]) for row in rows), "pairs": len(n),
            "annotators_mean": float(n.mean()), "majority_mean": float((votes.max(1) / n).mean())}
