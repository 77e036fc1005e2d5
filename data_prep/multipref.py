"""MultiPref: two crowd workers and two experts on every pair of answers.

    python data_prep/multipref.py --run runs/multipref                       (from the hub)
    python data_prep/multipref.py --run runs/multipref --source multipref.parquet

Source: allenai/multipref. Writes RUN/data from the overall preferences. A row is a comparison:
text, completion_a, completion_b, and normal_worker_annotations and expert_worker_annotations, lists
of {overall_pref, ..}. Slightly and clearly better are the same vote. There is no official split:
10 % of the prompts are held out.

The paper excludes "annotations indicating ties" and reports p in {.25, .5, .75, 1} and 4.00
annotators a pair, which only fits if a tie still counts in n. The default leaves ties out of votes
and n; "--ties in n" in the printed comparison is the other reading (without pairs of ties alone).
"""

from collections import Counter

from pairwise import cli, rows
from pairwise.prepare import prompts, published

CHOICES = {
    "A-is-clearly-better": "a",
    "A-is-slightly-better": "a",
    "Tie": "tie",
    "B-is-slightly-better": "b",
    "B-is-clearly-better": "b",
}
ANNOTATIONS = ("normal_worker_annotations", "expert_worker_annotations")
DATA = published.Published(
    name="multipref",
    hub="allenai/multipref",
    options={},
    files="the parquet file",
    rows={"train": 10461},
    fields=("prompt_id", "text", "completion_a", "completion_b", *ANNOTATIONS),
)
PAPER = {
    "pairs": 9413,
    "train_pairs": 9413,
    "train_prompts": 4791,
    "test_prompts": 532,
    "annotators_mean": 4.0,
    "majority_mean": 0.63,
}


def comparisons(source_rows, args):
    """Yield the Comparison of every row."""
    for split, where, row in source_rows:
        votes = Counter()
        for column in ANNOTATIONS:
            for annotation in rows.list_of(where, column, row.get(column), dict):
                field, preference = f"{column}: overall_pref", annotation.get("overall_pref")
                votes[CHOICES[rows.one_of(where, field, preference, CHOICES)]] += 1
        prompt = rows.string(where, "text", row.get("text"))
        yield prompts.Comparison(
            prompt_id=rows.text(where, "prompt_id", row.get("prompt_id")),
            messages=[{"role": "user", "content": prompt}],
            response_a=rows.string(where, "completion_a", row.get("completion_a")),
            response_b=rows.string(where, "completion_b", row.get("completion_b")),
            votes_a=votes["a"],
            votes_b=votes["b"],
            ties=votes["tie"],
            split=split,
            where=where,
        )


def main(args):
    choices = {"ties": ("drop", "half", prompts.IN_N)}
    published.prepare_published(args, DATA, comparisons, "sampled", PAPER, choices)


def parse_args(argv=None):
    return published.parser(__doc__).parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
