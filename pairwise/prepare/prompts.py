"""From single comparisons to prompt groups and splits: the steps that all of data_prep/ shares."""

import contextlib
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pairwise import cli, data, figures, run_dir

VOTES = (
    "sampled",
    "population",
    "dependent",
)  # how the votes of a pair arose; decides the irreducible error


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
    parser.add_argument(
        "--run", required=True, type=Path, help="run directory; the result is RUN/data"
    )
    parser.add_argument(
        "--seed", type=cli.seed, default=0, help="decides the split and which response stands first"
    )
    parser.add_argument(
        "--ties",
        choices=("drop", "half"),
        default="drop",
        help="a tie vote counts for nothing, or half for each side",
    )
    parser.add_argument(
        "--min-votes",
        type=int,
        choices=(1, 2),
        default=2,
        help="1 keeps train pairs with one vote, for hard-label losses",
    )
    parser.add_argument(
        "--test-share",
        type=cli.fraction,
        default=test_share,
        help="share of the prompts held out, where the data has no split of its own",
    )
    parser.add_argument(
        "--valid-share",
        type=cli.fraction,
        default=valid_share,
        help="share of the train prompts set aside for choices among variants",
    )


def group(comparisons, ties):
    """Group comparisons by prompt, each response once, each pair once with its votes added up.

    comparisons: Comparison, or a text that says why one was left out before it came to that, to be counted.
    ties: "half" gives half of every tie vote to each side, anything else leaves them out (`ties` keeps the raw count either way).
    Returns prompt rows (contract columns and `split`) in first-seen order, and a Counter of what was dropped, by reason.
    """
    rows, dropped = {}, Counter()
    for c in comparisons:
        if isinstance(c, str):
            dropped[c] += 1
            continue
        if not all(message["content"].strip() for message in c.messages):
            dropped["empty prompt"] += 1
            continue
        if not c.response_a.strip() or not c.response_b.strip():
            dropped["empty response"] += 1
            continue
        if c.response_a == c.response_b:
            dropped["identical responses"] += 1
            continue
        context = json.dumps(c.messages, ensure_ascii=False, sort_keys=True)
        row = rows.setdefault(
            (c.split, c.prompt_id or context),
            {
                "prompt_id": c.prompt_id or hashlib.sha256(context.encode()).hexdigest()[:16],
                "messages": c.messages,
                "context": context,
                "responses": {},
                "pairs": {},
                "p_true": {},
                "categories": c.categories,
                "split": c.split,
            },
        )
        if row["context"] != context:
            raise cli.InputError(
                f"{c.where}: prompt_id {c.prompt_id!r} has another prompt than before"
            )
        if row["categories"] != c.categories:
            raise cli.InputError(
                f"{c.where}: categories {c.categories} found, {row['categories']} before for the same prompt"
            )
        a, b = (
            row["responses"].setdefault(text, len(row["responses"]))
            for text in (c.response_a, c.response_b)
        )
        half = c.ties / 2 if ties == "half" else 0.0
        votes, p_true = (c.votes_a + half, c.votes_b + half), c.p_true
        if a > b:
            a, b, votes = b, a, votes[::-1]
            p_true = None if p_true is None else 1 - p_true
        pair = row["pairs"].setdefault((a, b), [0.0, 0.0, 0.0])
        pair[0] += votes[0]
        pair[1] += votes[1]
        pair[2] += c.ties
        if (
            abs((row["p_true"].setdefault((a, b), p_true) or 0) - (p_true or 0)) > 1e-6
        ):  # float32 files give p and 1 - p
            raise cli.InputError(
                f"{c.where}: p_true differs from an earlier row for the same two responses"
            )
    return list(rows.values()), dropped


IN_N = "in n"  # a reading of the paper beside --ties drop and half, for counts alone: a tie is no vote, but one of the n annotators


def count_votes(pair, ties):
    """n of a pair [votes_a, votes_b, ties]; with ties IN_N, 0 where there are only ties."""
    voted = pair[0] + pair[1]
    return voted + pair[2] if ties == IN_N and voted else voted


def drop_pairs(rows, least, dropped, ties="drop"):
    """The rows of `group` without their pairs of fewer than `least` votes, which are counted in `dropped`, and without empty rows."""
    for row in rows:
        for pair, votes in list(row["pairs"].items()):
            if count_votes(votes, ties) < least:
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
        pairs.append(
            {"a": new[a], "b": new[b], "votes_a": votes_a, "votes_b": votes_b, "ties": ties}
        )
        p_true.append(truth)
    done = {
        "prompt_id": row["prompt_id"],
        "messages": row["messages"],
        "responses": [texts[old] for old in used],
        "pairs": pairs,
    }
    if p_true[0] is not None:
        done["p_true"] = p_true
    if row["categories"]:
        done["categories"] = row["categories"]
    return done


def split_prompts(rows, test_share, valid_share, rng, dropped):
    """{split: rows}: the split the rows name where they name one, else `test_share` of the prompts, at least two, for test.

    valid_share of the train prompts become the validation split (at least one, where the share is not zero). Rows with equal messages stay
    together whatever their ids, so that no text is in two splits; where named splits part them, train loses its pairs, as `dropped` counts.
    """

    def draw(rows, share, least):
        """(drawn, rest): `share` of the distinct prompts, at least `least`."""
        contexts = list(dict.fromkeys(row["context"] for row in rows))
        order = rng.permutation(len(contexts))
        drawn = {contexts[i] for i in order[: max(least, round(share * len(contexts)))]}
        return [row for row in rows if row["context"] in drawn], [
            row for row in rows if row["context"] not in drawn
        ]

    split, named = {}, {row["split"] for row in rows}
    if None in named and len(named) > 1:
        raise cli.InputError("rows with and without a split found, all alike expected")
    if None in named:
        split["test"], split["train"] = draw(rows, test_share, 2)
    else:
        held_out = set()
        for name in ("test", "valid", "train"):
            mine = [row for row in rows if row["split"] == name]
            split[name] = [row for row in mine if row["context"] not in held_out]
            if again := sum(len(row["pairs"]) for row in mine if row["context"] in held_out):
                dropped[f"{name} pair of a prompt that is in a held-out split too"] += again
            held_out |= {row["context"] for row in mine}
    if valid_share and not split.get("valid"):
        split["valid"], split["train"] = draw(split["train"], valid_share, 1)
    return {name: members for name, members in split.items() if members or name != "valid"}


def prepare(
    args, name, comparisons, votes, inputs, settings, paper=None, readings=None, facts=None
):
    """Turn comparisons into RUN/data: group, split by prompt, orient, write parquet and stats.json.

    comparisons: called to get them, only where the stage is not done; votes: how the votes arose (VOTES); inputs: {name: hash}.
    paper: {column of `table`: the paper's figure}, then a comparison with it is printed and stored, together with the same columns under other
    readings of the paper, {what differs: (comparisons, ties)}. facts: a dict for stats.json, which comparisons() may still fill.
    Raises InputError where fewer than three prompts, or an empty split, would remain.
    """
    run = args.run
    settings = {
        "dataset": name,
        "votes": votes,
        "seed": args.seed,
        "ties": args.ties,
        "min_votes": args.min_votes,
        "test_share": args.test_share,
        "valid_share": args.valid_share,
    } | settings
    if run_dir.stage_done(run, "data", settings, inputs, [run / "data"]):
        print(f"data: {run / 'data'} is there, skipped")
        return
    rng = np.random.default_rng([args.seed, 1])
    rows, dropped = group(comparisons(), args.ties)
    kept = choose(args, name, rows, dropped, rng)
    stats = settings | {
        "dropped": dict(sorted(dropped.items())),
        "splits": {split: describe(members) for split, members in kept.items()},
    }
    majority = majority_share([row for members in kept.values() for row in members], args.ties)
    counts, edges = figures.majority_bins(majority)
    stats["histogram"] = {
        "majority_share_from": edges[:-1].round(2).tolist(),
        "pairs": counts.tolist(),
    }  # figure 4
    if paper:
        stats["paper"], stats["here"] = paper, table(kept, args.ties)
        stats["difference"] = {
            column: stats["here"][column] - figure for column, figure in paper.items()
        }
        stats["other_readings"] = {}
        for reading, (again, ties) in (readings or {}).items():
            with contextlib.suppress(
                cli.InputError
            ):  # too little is left under this reading, or rows that it alone reads are broken: no column
                others, reasons = group(again(), ties)
                stats["other_readings"][reading] = table(
                    choose(
                        args, name, others, reasons, np.random.default_rng([args.seed, 1]), ties
                    ),
                    ties,
                )
    stats |= facts or {}
    kept = {split: [finish(row, rng) for row in members] for split, members in kept.items()}
    started = run_dir.begin_stage(run, "data", settings, inputs)
    with run_dir.replacing(run / "data") as partial:
        partial.mkdir()
        for split, members in kept.items():
            data.write_split(partial / f"{split}.parquet", members)
        run_dir.write_json(partial / "stats.json", stats)
    figures.write_votes(majority, run / "figures" / "data_votes")
    run_dir.end_stage(run, "data", settings, inputs, started)
    for split, s in stats["splits"].items():
        print(
            f"data: {split:5} {s['prompts']:6,} prompts {s['responses']:7,} responses {s['pairs']:8,} pairs   "
            f"{s['annotators_mean']:.2f} votes a pair, majority {s['majority_mean']:.3f}"
        )
    for reason, count in sorted(dropped.items()):
        print(f"data: {count:,} dropped: {reason}")
    if len(kept["test"]) < 20:
        print(
            f"data: warning: only {len(kept['test'])} test prompts, so the intervals will be wide"
        )
    if paper:
        print(comparison_with_paper(stats))


def choose(args, name, rows, dropped, rng, ties="drop"):
    """{split: rows of `group`} with the pairs that have enough votes, split by prompt; `dropped` goes on counting."""
    rows = drop_pairs(rows, args.min_votes, dropped, ties)
    if not rows:
        raise cli.InputError(
            f"{name}: no pair with {args.min_votes} votes or more found{because(dropped)}"
        )
    if len(rows) < 3:
        raise cli.InputError(
            f"{name}: {len(rows)} prompts found, at least three expected{because(dropped)}"
        )
    kept = split_prompts(rows, args.test_share, args.valid_share, rng, dropped)
    for split, members in kept.items():
        if split != "train":
            kept[split] = members = drop_pairs(
                members, 2, dropped, ties
            )  # evaluation counts pairs with two votes or more only
        least = 2 if split == "test" else 1
        if len(members) < least:
            raise cli.InputError(
                f"{name}: {len(members)} {split} prompts, at least {least} expected{because(dropped)}"
            )
    return {split: kept[split] for split in data.SPLITS if split in kept}


def because(dropped):
    """What was dropped so far, as the end of a message; nothing where nothing was."""
    said = "; ".join(f"{count} dropped: {reason}" for reason, count in sorted(dropped.items()))
    return f" ({said})" if said else ""


# ---- counts


def majority_share(rows, ties="drop"):
    """The larger side's share of n for every pair of the rows of `group`, float64 (pairs,): the paper's p in tables 1 and 2 and in figure 4."""
    return np.array(
        [max(pair[:2]) / count_votes(pair, ties) for row in rows for pair in row["pairs"].values()]
    )


def describe(rows, ties="drop"):
    """Counts of one split's rows of `group`; majority_mean is the paper's average p, mean max(p, 1-p)."""
    n = np.array([count_votes(pair, ties) for row in rows for pair in row["pairs"].values()])
    return {
        "prompts": len(rows),
        "responses": sum(len({index for pair in row["pairs"] for index in pair}) for row in rows),
        "pairs": len(n),
        "annotators_mean": float(n.mean()),
        "majority_mean": float(majority_share(rows, ties).mean()),
    }


def table(kept, ties):
    """The columns of the paper's tables 1 and 2. It does not say whether its pairs are those of train alone, so both are given."""
    every = describe([row for members in kept.values() for row in members], ties)
    train = describe([row for split in ("train", "valid") for row in kept.get(split, [])], ties)
    return {
        "responses": every["responses"],
        "pairs": every["pairs"],
        "train_pairs": train["pairs"],
        "train_prompts": train["prompts"],
        "test_prompts": len(kept["test"]),
        "annotators_mean": every["annotators_mean"],
        "majority_mean": every["majority_mean"],
    }


def comparison_with_paper(stats):
    """The paper's figures beside ours, as text."""
    columns = {
        "paper": stats["paper"],
        "here": stats["here"],
        "difference": stats["difference"],
        **stats["other_readings"],
    }
    names = {
        "responses": "responses",
        "pairs": "pairs, train and test",
        "train_pairs": "pairs, train",
        "train_prompts": "prompts, train",
        "test_prompts": "prompts, test",
        "annotators_mean": "votes a pair",
        "majority_mean": "majority share",
    }
    lines = [" " * 22 + "".join(f"  {column:>10}" for column in columns)]
    for key, words in names.items():
        line = f"{words:22}"
        for column, values in columns.items():
            form = ("+" if column == "difference" else "") + (
                ",.3f" if key.endswith("mean") else ","
            )
            line += (
                f"  {format(values[key], form) if key in values else '-':>{max(10, len(column))}}"
            )
        lines.append(line)
    return "\n".join(
        f"data: {line}"
        for line in [f"{stats['dataset']} beside tables 1 and 2 of the paper", *lines]
    )
