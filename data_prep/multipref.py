"""MultiPref (allenai/multipref): two crowd workers and two experts on every pair of answers; RUN/data from their overall preference.

    python data_prep/multipref.py --run runs/multipref                       (from the hub)
    python data_prep/multipref.py --run runs/multipref --source multipref.parquet

A row is a comparison: text, completion_a, completion_b, and normal_worker_annotations and expert_worker_annotations, lists of {overall_pref, ..}.
Slightly and clearly better are the same vote. There is no official split: 10 % of the prompts are held out.

The paper excludes "annotations indicating ties" and reports p in {.25, .5, .75, 1} and 4.00 annotators a pair, which only fits if a tie still
counts in n. The default leaves them out of votes and n; "--ties in n" in the printed comparison is the other reading (without pairs of ties alone).
"""

from pairwise import cli
from pairwise.prepare.prompts import IN_N, Comparison
from pairwise.prepare.published import Published, parser, prepare_published
from pairwise.rows import list_of, one_of, string, text

VOTE = {
    "A-is-clearly-better": "a",
    "A-is-slightly-better": "a",
    "Tie": "tie",
    "B-is-slightly-better": "b",
    "B-is-clearly-better": "b",
}
ANNOTATIONS = ("normal_worker_annotations", "expert_worker_annotations")
DATA = Published(
    "multipref",
    "allenai/multipref",
    {},
    "the parquet file",
    {"train": 10461},
    ("prompt_id", "text", "completion_a", "completion_b", *ANNOTATIONS),
)
PAPER = {
    "pairs": 9413,
    "train_pairs": 9413,
    "train_prompts": 4791,
    "test_prompts": 532,
    "annotators_mean": 4.0,
    "majority_mean": 0.63,
}


def comparisons(rows, args):
    """The Comparison of every row."""
    for split, where, row in rows:
        cast = {"a": 0, "b": 0, "tie": 0}
        for group in ANNOTATIONS:
            for annotation in list_of(where, group, row.get(group), dict):
                cast[
                    VOTE[
                        one_of(
                            where, f"{group}: overall_pref", annotation.get("overall_pref"), VOTE
                        )
                    ]
                ] += 1
        yield Comparison(
            text(where, "prompt_id", row.get("prompt_id")),
            [{"role": "user", "content": string(where, "text", row.get("text"))}],
            string(where, "completion_a", row.get("completion_a")),
            string(where, "completion_b", row.get("completion_b")),
            cast["a"],
            cast["b"],
            cast["tie"],
            split=split,
            where=where,
        )


def main(args):
    prepare_published(args, DATA, comparisons, "sampled", PAPER, {"ties": ("drop", "half", IN_N)})


def parse_args(argv=None):
    return parser(__doc__).parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
