"""HelpSteer3: two answers to every conversation, compared by up to three annotators.

    python data_prep/helpsteer3.py --run runs/helpsteer3                      (from the hub)
    python data_prep/helpsteer3.py --run runs/helpsteer3 --source DIR

Source: nvidia/HelpSteer3, config preference, which is none of the paper's data sets. Writes
RUN/data. A row is a comparison: domain, language, context (chat messages, often of several turns),
response1, response2, and individual_preference, a list of {score, reasoning, ..}, one for each
annotator. A score from -3 to 3 is above 0 where response 2 is better, and 0 is a tie; slightly and
much better are the same vote, and overall_preference, which sums them up, is not used. DIR has the
files train.jsonl.gz and validation.jsonl.gz, or is a copy of all that is on the hub.

The official split is kept, its validation as test. Rows with equal contexts are one prompt;
domain and language, those of its first row, are its categories.
"""

import json

from pairwise import cli, rows
from pairwise.prepare import prompts, published

ROLES, SCORES = ("system", "user", "assistant"), range(-3, 4)
DATA = published.Published(
    name="helpsteer3",
    hub="nvidia/HelpSteer3",
    options={"name": "preference"},
    files="preference/train.jsonl.gz and preference/validation.jsonl.gz",
    rows={"train": 38459, "validation": 2017},
    fields=("domain", "language", "context", "response1", "response2", "individual_preference"),
    beside="its data card",
)
CARD = {"pairs": 40476, "train_pairs": 38459}


def messages(where, context):
    """Return the chat messages of a context. Raises InputError for another role or no text."""
    return [
        {
            "role": rows.one_of(where, "context: role", turn.get("role"), ROLES),
            "content": rows.string(where, "context: content", turn.get("content")),
        }
        for turn in rows.list_of(where, "context", context, dict)
    ]


def comparisons(source_rows, args):
    """Yield the Comparison of every row, or the reason why there is none."""
    first, field = {}, "individual_preference"
    for split, where, row in source_rows:
        labels = {name: rows.text(where, name, row.get(name)) for name in ("domain", "language")}
        context = messages(where, row.get("context"))
        answers = [rows.string(where, name, row.get(name)) for name in ("response1", "response2")]
        scores = [
            rows.one_of(where, f"{field}: score", annotation.get("score"), SCORES)
            for annotation in rows.list_of(where, field, row.get(field), dict)
        ]
        if not context or context[-1]["role"] != "user":
            yield "prompt that does not end with a turn of the user's"
            continue
        labels = first.setdefault((split, json.dumps(context)), labels)
        votes = (sum(x < 0 for x in scores), sum(x > 0 for x in scores), scores.count(0))
        source = {"categories": labels, "split": split, "where": where}
        yield prompts.Comparison(None, context, *answers, *votes, **source)


def main(args):
    if args.source and (args.source / "preference").is_dir():  # feedback/, edit/ are beside it
        args.source /= "preference"
    choices = {"ties": ("drop", "half")}
    published.prepare_published(args, DATA, comparisons, "sampled", CARD, choices)


def parse_args(argv=None):
    return published.parser(__doc__).parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
