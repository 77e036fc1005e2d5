"""Reddit TL;DR: pairs of summaries that at least two workers compared.

    python data_prep/tldr.py --run runs/tldr              (from the hub: its conversion to parquet)
    python data_prep/tldr.py --run runs/tldr --source DIR (train and validation files in DIR)

Source: openai/summarize_from_feedback, comparisons. Writes RUN/data. A row is one worker's choice:
info {id, post, title, subreddit, article, ..}, summaries [{text, ..}, {text, ..}], choice 0 or 1,
worker, batch. Rows of one post and the same two summaries, in either order, are added up. The
official split is kept, its validation as test.

Most comparisons have one label; the paper keeps those with two or more. Whether it counts a worker
who labelled the same two summaries again it does not say: --repeated last takes the last label;
labels without a worker all count. Some validation rows are about CNN/DM news articles: the paper
speaks of "a Reddit post (or article)" under the name Reddit TL;DR, so they are left out unless
--cnndm keep.
"""

from pairwise import cli, rows
from pairwise.prepare import prompts, published

CNNDM = ("batch0_cnndm", "cnndm0", "cnndm2")
BATCHES = (*(f"batch{i}" for i in range(3, 23)), "edit_b2_eval_test", *CNNDM)
FILES = {split: f"comparisons/{split}/*.parquet" for split in ("train", "validation")}
DATA = published.Published(
    name="tldr",
    hub="openai/summarize_from_feedback",
    options={"data_files": FILES, "revision": "refs/convert/parquet"},
    files="comparisons/train and comparisons/validation (revision refs/convert/parquet)",
    rows={"train": 92858, "validation": 86086},
    fields=("info", "summaries", "choice", "worker", "batch", "split"),
)
# Of a row's own split, where the file's name says nothing.
OUR_SPLITS = {"train": "train", "valid1": "test", "valid2": "test"}
PAPER = {
    "pairs": 3217,
    "train_pairs": 3217,
    "train_prompts": 729,
    "test_prompts": 845,
    "annotators_mean": 7.56,
    "majority_mean": 0.84,
}


def prompt(where, info, news):
    """Return the text that is to be summarised, in the layout of Stiennon et al. (2020)."""

    def part(field):
        return rows.string(where, f"info: {field}", info.get(field))

    if news:
        return f"Article:\n{part('article').strip()}\n\nTL;DR:"
    title = f"SUBREDDIT: r/{part('subreddit')}\n\nTITLE: {part('title')}"
    return f"{title}\n\nPOST: {part('post').strip()}\n\nTL;DR:"


def comparisons(source_rows, args):
    """Yield the Comparison of every row: one vote."""
    for split, where, row in source_rows:
        news = rows.one_of(where, "batch", row.get("batch"), BATCHES) in CNNDM
        if news and args.cnndm == "drop":
            yield "label on a CNN/DM article"
            continue
        info, summaries = row.get("info"), row.get("summaries")
        if not isinstance(info, dict):
            raise rows.wrong(where, "info", info, "an object")
        if len(rows.list_of(where, "summaries", summaries, dict)) != 2:
            raise rows.wrong(where, "summaries", summaries, "two of them")
        choice = rows.one_of(where, "choice", row.get("choice"), (0, 1))
        first, second = (
            rows.string(where, "summaries: text", summary.get("text")).strip()
            for summary in summaries
        )
        messages = [{"role": "user", "content": prompt(where, info, news)}]
        if split is None and row.get("split"):
            split = OUR_SPLITS[rows.one_of(where, "split", row["split"], OUR_SPLITS)]
        post = None if info.get("id") is None else rows.string(where, "info: id", info["id"])
        worker = row.get("worker") if args.repeated == "last" else None
        if worker is not None:
            worker = rows.string(where, "worker", worker)
        votes = (1 - choice, choice, 0)
        more = {"split": split, "where": where, "annotator": worker, "replaces": True}
        yield prompts.Comparison(post, messages, first, second, *votes, **more)


def main(args):
    choices = {"cnndm": ("drop", "keep"), "repeated": ("count", "last")}
    published.prepare_published(args, DATA, comparisons, "sampled", PAPER, choices)


def parse_args(argv=None):
    parser = published.parser(__doc__)
    cnndm_help = "rows about CNN/DM articles"
    parser.add_argument("--cnndm", choices=("drop", "keep"), default="drop", help=cnndm_help)
    repeated_help = "a worker's second label on two summaries"
    parser.add_argument(
        "--repeated", choices=("count", "last"), default="count", help=repeated_help
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
