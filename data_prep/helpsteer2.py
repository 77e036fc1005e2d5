"""HelpSteer2 (nvidia/HelpSteer2): two answers to every prompt, each rated for helpfulness by 2 to 5 annotators; RUN/data.

    python data_prep/helpsteer2.py --run runs/helpsteer2                     (from the hub: disagreements/)
    python data_prep/helpsteer2.py --run runs/helpsteer2 --source disagreements.jsonl.gz
    python data_prep/helpsteer2.py --run runs/helpsteer2 --annotators preference --source preference.jsonl.gz

A row of the disagreements is one answer: prompt, response and helpfulness, a list of ratings from 0 to 4; two rows in succession are the answers to
one prompt. Ratings are not votes, and nothing says which rating of the one answer is from the annotator of which of the other:

    --annotators zip         (default) the ratings are matched by position, up to the shorter list; equal ratings are a tie
    --annotators cross       every rating of the one with every rating of the other: more votes, but not independent ones
    --annotators preference  another file: each annotator's own comparison, all_preferences_unprocessed[].strength from -3 to 3, above 0 where
                             response 2 is better; -100, neither answer is any good, is left out

The paper's 21,000 pairs are more than there are; it is the number of rated responses, so it is put beside both.
The disagreements have no official split: 10 % of the prompts are held out. The preference rows say train or val. Prompts of several turns,
written with <extra_id_1>, become chat messages.
"""

import re
from itertools import product

from pairwise import cli
from pairwise.prepare.prompts import IN_N, Comparison
from pairwise.prepare.published import Published, parser, prepare_published
from pairwise.rows import list_of, one_of, string, wrong

HUB, STRENGTHS = "nvidia/HelpSteer2", (-100, *range(-3, 4))
RATINGS = Published(
    "helpsteer2",
    HUB,
    {"data_dir": "disagreements"},
    "disagreements/disagreements.jsonl.gz",
    {"train": 23652},
    ("prompt", "response", "helpfulness"),
)
PREFERENCES = Published(
    "helpsteer2",
    HUB,
    {"data_dir": "preference"},
    "preference/preference.jsonl.gz",
    {"train": 9125},
    ("split", "prompt", "response_1", "response_2", "all_preferences_unprocessed"),
)
PAPER = {
    "responses": 21000,
    "pairs": 21000,
    "train_pairs": 21000,
    "train_prompts": 10000,
    "test_prompts": 1000,
    "annotators_mean": 3.5,
    "majority_mean": 0.74,
}


def messages(where, prompt):
    """Chat messages of a prompt in which later turns begin with a line <extra_id_1>Assistant or <extra_id_1>User."""
    first, *rest = re.split(r"\n?<extra_id_1>([^\n]*)\n?", prompt)
    turns = [{"role": "user", "content": first}] if first or not rest else []
    for speaker, content in zip(rest[::2], rest[1::2]):
        turns.append(
            {
                "role": one_of(
                    where, "prompt: <extra_id_1>", speaker.strip().lower(), ("user", "assistant")
                ),
                "content": content,
            }
        )
    return turns


def comparison(split, where, prompt, first, second, compared):
    """compared: above 0 for each vote for the second answer, below 0 for the first, 0 for a tie."""
    context = messages(where, prompt)
    if context[-1]["role"] != "user":
        return "prompt that does not end with a turn of the user's"
    a, b = sum(x < 0 for x in compared), sum(x > 0 for x in compared)
    return Comparison(
        None, context, first, second, a, b, len(compared) - a - b, split=split, where=where
    )


def rated(rows, args):
    """The Comparison of every two rows in succession with the same prompt."""
    waiting = None
    for split, where, row in rows:
        prompt, response = (
            string(where, "prompt", row.get("prompt")),
            string(where, "response", row.get("response")),
        )
        if isinstance(row.get("helpfulness"), (int, float)):
            raise wrong(
                where,
                "helpfulness",
                row["helpfulness"],
                "each annotator's rating, as in disagreements/disagreements.jsonl.gz,",
            )
        ratings = [
            one_of(where, "helpfulness", rating, range(5))
            for rating in list_of(where, "helpfulness", row.get("helpfulness"), int)
        ]
        if waiting and waiting[:2] == (split, prompt):
            match = zip if args.annotators == "zip" else product
            yield comparison(
                split,
                where,
                prompt,
                waiting[2],
                response,
                [y - x for x, y in match(waiting[3], ratings)],
            )
            waiting = None
        else:
            if waiting:
                yield "answer without a second one beside it"
            waiting = split, prompt, response, ratings
    if waiting:
        yield "answer without a second one beside it"


def preferred(rows, args):
    """The Comparison of every row of the preference file."""
    for _, where, row in rows:
        split = {"train": "train", "val": "test"}[
            one_of(where, "split", row.get("split"), ("train", "val"))
        ]
        answers = [string(where, field, row.get(field)) for field in ("response_1", "response_2")]
        annotations = list_of(
            where, "all_preferences_unprocessed", row.get("all_preferences_unprocessed"), dict
        )
        strengths = [
            one_of(
                where,
                "all_preferences_unprocessed: strength",
                annotation.get("strength"),
                STRENGTHS,
            )
            for annotation in annotations
        ]
        yield comparison(
            split,
            where,
            string(where, "prompt", row.get("prompt")),
            *answers,
            [strength for strength in strengths if strength != -100],
        )


def main(args):
    ties = ("drop", "half", IN_N)
    if args.annotators == "preference":
        prepare_published(
            args,
            PREFERENCES,
            preferred,
            "sampled",
            PAPER,
            {"annotators": ("preference",), "ties": ties},
        )
    else:
        votes = "sampled" if args.annotators == "zip" else "dependent"
        prepare_published(
            args, RATINGS, rated, votes, PAPER, {"annotators": ("zip", "cross"), "ties": ties}
        )


def parse_args(argv=None):
    made = parser(__doc__)
    made.add_argument(
        "--annotators",
        choices=("zip", "cross", "preference"),
        default="zip",
        help="what a vote is (above)",
    )
    return made.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
