"""Counts of prepared data, as printed and stored, and beside the paper's tables 1 and 2.

Prompts and their pairs are those of pairwise/prepare/prompts.py. ties: its IN_N is a reading of the
paper in which a tie counts in n; any other value changes nothing here.
"""

from pairwise import data

import numpy as np

PAPER = "tables 1 and 2 of the paper"
LABELS = {  # the columns of tables 1 and 2
    "responses": "responses",
    "pairs": "pairs, train and test",
    "train_pairs": "pairs, train",
    "train_prompts": "prompts, train",
    "test_prompts": "prompts, test",
    "annotators_mean": "votes a pair",
    "majority_mean": "majority share",
}


def in_all(splits):
    """Return the prompts of all splits."""
    return [prompt for prompts in splits.values() for prompt in prompts]


def majority_share(prompts, ties="drop"):
    """Return the larger side's share of n for every pair, float64 (pairs,).

    It is the paper's p in tables 1 and 2 and in figure 4.
    """
    pairs = [pair for prompt in prompts for pair in prompt.pairs.values()]
    return np.array([max(pair.votes_a, pair.votes_b) / pair.n(ties) for pair in pairs])


def describe(prompts, ties="drop"):
    """Return the counts of one split. majority_mean is the paper's average p, mean max(p, 1-p)."""
    n = np.array([pair.n(ties) for prompt in prompts for pair in prompt.pairs.values()])
    responses = [len({index for key in prompt.pairs for index in key}) for prompt in prompts]
    return {
        "prompts": len(prompts),
        "responses": sum(responses),
        "pairs": len(n),
        "annotators_mean": float(n.mean()),
        "majority_mean": float(majority_share(prompts, ties).mean()),
    }


def added_up(prompts):
    """Return {"rows_a_pair": of how many rows the votes were added up}; {} where none were."""
    rows = np.array([pair.rows for prompt in prompts for pair in prompt.pairs.values()])
    if (rows == 1).all():
        return {}
    counts = {"pairs": len(rows), "pairs_of_several": int((rows > 1).sum())}
    counts |= {"mean": float(rows.mean()), "most": int(rows.max())}
    return {"rows_a_pair": counts | {"annotators": any(prompt.given for prompt in prompts)}}


def paper_columns(splits, ties):
    """Return the columns of the paper's tables 1 and 2.

    The paper does not say whether its pairs are those of train alone, so both are given.
    """
    train = describe(splits["train"] + splits.get("valid", []), ties)
    columns = {"train_pairs": train["pairs"], "train_prompts": train["prompts"]}
    columns |= describe(in_all(splits), ties) | {"test_prompts": len(splits["test"])}
    return {name: columns[name] for name in LABELS}


def print_counts(stats):
    """Print what stats.json holds."""
    for split, counts in stats["splits"].items():
        print(
            f"data: {split:5} {counts['prompts']:6,} prompts {counts['responses']:7,} responses "
            f"{counts['pairs']:8,} pairs   {counts['annotators_mean']:.2f} votes a pair, "
            f"majority {counts['majority_mean']:.3f}"
        )
    if rows := stats.get("rows_a_pair"):
        twice = "" if rows["annotators"] else "; an annotator in two of them counts twice"
        print(
            f"data: {rows['pairs_of_several']:,} of {rows['pairs']:,} pairs add up several rows "
            f"({rows['mean']:.2f} a pair, at most {rows['most']:,}){twice}"
        )
    for reason, count in stats["dropped"].items():
        print(f"data: {count:,} dropped: {reason}")
    for split, count in stats.get("distinct_texts", {}).items():
        print(
            f"data: warning: the {stats['splits'][split]['prompts']:,} {split} prompts have "
            f"{count:,} distinct texts; intervals take them for independent (without prompt_id "
            "equal texts are one prompt)"
        )
    if few := data.few_prompts(stats["splits"]["test"]["prompts"], stats["own_split"]):
        print(f"data: warning: {few}")
    if "paper" in stats:
        print(comparison_with_paper(stats))


def comparison_with_paper(stats):
    """Return the figures of the paper, or of a data set's own authors, beside ours, as text."""
    columns = {"paper" if stats["beside"] == PAPER else "published": stats["paper"]}
    columns |= {name: stats[name] for name in ("here", "difference")} | stats["other_readings"]
    lines = [f"{stats['dataset']} beside {stats['beside']}"]
    lines.append(" " * 22 + "".join(f"  {column:>10}" for column in columns))
    for key, label in LABELS.items():
        line = f"{label:22}"
        number = ",.3f" if key.endswith("mean") else ","
        for column, figures in columns.items():
            form = f"+{number}" if column == "difference" else number
            cell = format(figures[key], form) if key in figures else "-"
            line += f"  {cell:>{max(10, len(column))}}"
        lines.append(line)
    return "\n".join(f"data: {line}" for line in lines)
