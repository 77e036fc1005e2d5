"""Reddit TL;DR (openai/summarize_from_feedback, comparisons): pairs of summaries that at least two workers compared; RUN/data.

    python data_prep/tldr.py --run runs/tldr                                 (from the hub: its own conversion to parquet, no script is run)
    python data_prep/tldr.py --run runs/tldr --source DIR                    (train and validation files in DIR)

A row is one worker's choice: info {id, post, title, subreddit, article, ..}, summaries [{text, ..}, {text, ..}], choice 0 or 1, worker, batch. Rows of one
post and the same two summaries, in either order, are added up. The official split is kept, its validation as test.

Most comparisons have one label; the paper keeps those with two or more. Some validation rows are about CNN/DM news articles: the paper speaks of "a
Reddit post (or article)" under the name Reddit TL;DR, so they are left out unless --cnndm keep.
"""

from pairwise import cli
from pairwise.prepare.prompts import Comparison
from pairwise.prepare.published import Published, parser, prepare_published
from pairwise.rows import list_of, one_of, string, wrong

CNNDM = ("batch0_cnndm", "cnndm0", "cnndm2")
BATCHES = (*(f"batch{i}" for i in range(3, 23)), "edit_b2_eval_test", *CNNDM)
FILES = {split: f"comparisons/{split}/*.parquet" for split in ("train", "validation")}
DATA = Published(
    "tldr",
    "openai/summarize_from_feedback",
    {"data_files": FILES, "revision": "refs/convert/parquet"},
    "comparisons/train and comparisons/validation (revision refs/convert/parquet)",
    {"train": 92858, "validation": 86086},
    ("info", "summaries", "choice", "batch", "split"),
)
SPLIT = {
    "train": "train",
    "valid1": "test",
    "valid2": "test",
}  # of a row, where the file's name says nothing
PAPER = {
    "pairs": 3217,
    "train_pairs": 3217,
    "train_prompts": 729,
    "test_prompts": 845,
    "annotators_mean": 7.56,
    "majority_mean": 0.84,
}


def prompt(where, info, news):
    """What is to be summarised, in the layout of Stiennon et al. (2020)."""

    def part(field):
        return string(where, f"info: {field}", info.get(field))

    if news:
        return f"Article:\n{part('article').strip()}\n\nTL;DR:"
    return f"SUBREDDIT: r/{part('subreddit')}\n\nTITLE: {part('title')}\n\nPOST: {part('post').strip()}\n\nTL;DR:"


def comparisons(rows, args):
    """The Comparison of every row: one vote."""
    for split, where, row in rows:
        news = one_of(where, "batch", row.get("batch"), BATCHES) in CNNDM
        if news and args.cnndm == "drop":
            yield "label on a CNN/DM article"
            continue
        info, summaries = row.get("info"), row.get("summaries")
        if not isinstance(info, dict):
            raise wrong(where, "info", info, "an object")
        if len(list_of(where, "summaries", summaries, dict)) != 2:
            raise wrong(where, "summaries", summaries, "two of them")
        chosen = one_of(where, "choice", row.get("choice"), (0, 1))
        first, second = (
            string(where, "summaries: text", summary.get("text")).strip() for summary in summaries
        )
        messages = [{"role": "user", "content": prompt(where, info, news)}]
        if split is None and row.get("split"):
            split = SPLIT[one_of(where, "split", row["split"], SPLIT)]
        post = None if info.get("id") is None else string(where, "info: id", info["id"])
        yield Comparison(
            post, messages, first, second, 1 - chosen, chosen, 0, split=split, where=where
        )


def main(args):
    prepare_published(args, DATA, comparisons, "sampled", PAPER, {"cnndm": ("drop", "keep")})


def parse_args(argv=None):
    made = parser(__doc__)
    made.add_argument(
        "--cnndm", choices=("drop", "keep"), default="drop", help="rows about CNN/DM articles"
    )
    return made.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
