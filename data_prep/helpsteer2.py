"""HelpSteer2: two answers to every prompt, each rated for helpfulness by 2 to 5 annotators.

    python data_prep/helpsteer2.py --run runs/helpsteer2           (from the hub: disagreements/)
    python data_prep/helpsteer2.py --run runs/helpsteer2 --source disagreements.jsonl.gz
    python data_prep/helpsteer2.py --run runs/helpsteer2 --annotators preference \\
        --source preference.jsonl.gz

Source: nvidia/HelpSteer2. Writes RUN/data. A row of the disagreements is one answer: prompt,
response and helpfulness, a list of ratings from 0 to 4; two rows in succession are the answers to
one prompt. Ratings are not votes, and nothing says which rating of the one answer is from the
annotator of which of the other:

    --annotators zip         (default) the ratings are matched by position, up to the shorter list;
                             equal ratings are a tie
    --annotators cross       every rating of the one is matched with every rating of the other:
                             more votes, but not independent ones
    --annotators preference  another file has each annotator's own comparison,
                             all_preferences_unprocessed[].strength from -3 to 3, above 0 where
                             response 2 is better; -100, neither answer is any good, is left out

The paper's 21,000 pairs are more than there are; it is the number of rated responses, so it is put
beside both. The disagreements have no official split: 10 % of the prompts are held out. The
preference rows say train or val. Prompts of several turns, written with <extra_id_1>, become chat
messages.
"""

import re
from itertools import product

from pairwise import cli, rows
from pairwise.prepare import prompts, published

STRENGTHS = (-100, *range(-3, 4))
RATINGS = published.Published(
    name="helpsteer2",
    hub="nvidia/HelpSteer2",
    options={"data_dir": "disagreements"},
    files="disagreements/disagreements.jsonl.gz",
    rows={"train": 23652},
    fields=("prompt", "response", "helpfulness"),
)
PREFERENCES = RATINGS._replace(
    options={"data_dir": "preference"},
    files="preference/preference.jsonl.gz",
    rows={"train": 9125},
    fields=("split", "prompt", "response_1", "response_2", "all_preferences_unprocessed"),
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
    """Return the chat messages of a prompt.

    In it later turns begin with a line <extra_id_1>Assistant or <extra_id_1>User.
    """
    first, *rest = re.split(r"\n?<extra_id_1>([^\n]*)\n?", prompt)
    turns = [{"role": "user", "content": first}] if first or not rest else []
    for speaker, content in zip(rest[::2], rest[1::2]):
        speaker = speaker.strip().lower()
        role = rows.one_of(where, "prompt: <extra_id_1>", speaker, ("user", "assistant"))
        turns.append({"role": role, "content": content})
    return turns


def comparison(split, where, prompt, answers, strengths):
    """Return the Comparison of two answers, or the reason why there is none.

    strengths: a number for each vote, above 0 for the second answer, below 0 for the first, 0 for a
    tie.
    """
    context = messages(where, prompt)
    if context[-1]["role"] != "user":
        return "prompt that does not end with a turn of the user's"
    votes_a = sum(strength < 0 for strength in strengths)
    votes_b = sum(strength > 0 for strength in strengths)
    votes = (votes_a, votes_b, len(strengths) - votes_a - votes_b)
    return prompts.Comparison(None, context, *answers, *votes, split=split, where=where)


def rated(source_rows, args):
    """Yield the Comparison of every two rows in succession with the same prompt."""
    match = zip if args.annotators == "zip" else product
    waiting = None  # the (split, prompt, response, ratings) that may have a second answer
    alone = "answer without a second one beside it"
    for split, where, row in source_rows:
        prompt = rows.string(where, "prompt", row.get("prompt"))
        response = rows.string(where, "response", row.get("response"))
        ratings = row.get("helpfulness")
        if isinstance(ratings, (int, float)):
            expected = "each annotator's rating, as in disagreements/disagreements.jsonl.gz,"
            raise rows.wrong(where, "helpfulness", ratings, expected)
        for rating in rows.list_of(where, "helpfulness", ratings, int):
            rows.one_of(where, "helpfulness", rating, range(5))
        if waiting and waiting[:2] == (split, prompt):
            strengths = [second - first for first, second in match(waiting[3], ratings)]
            yield comparison(split, where, prompt, (waiting[2], response), strengths)
            waiting = None
        else:
            if waiting:
                yield alone
            waiting = split, prompt, response, ratings
    if waiting:
        yield alone


def preferred(source_rows, args):
    """Yield the Comparison of every row of the preference file."""
    ours, field = {"train": "train", "val": "test"}, "all_preferences_unprocessed"
    for _, where, row in source_rows:
        split = ours[rows.one_of(where, "split", row.get("split"), ours)]
        answers = [rows.string(where, name, row.get(name)) for name in ("response_1", "response_2")]
        strengths = [
            rows.one_of(where, f"{field}: strength", annotation.get("strength"), STRENGTHS)
            for annotation in rows.list_of(where, field, row.get(field), dict)
        ]
        prompt = rows.string(where, "prompt", row.get("prompt"))
        strengths = [strength for strength in strengths if strength != -100]
        yield comparison(split, where, prompt, answers, strengths)


def main(args):
    choices = {"annotators": ("zip", "cross"), "ties": ("drop", "half", prompts.IN_N)}
    dataset, comparisons = RATINGS, rated
    if args.annotators == "preference":
        choices["annotators"] = ("preference",)
        dataset, comparisons = PREFERENCES, preferred
    votes = "dependent" if args.annotators == "cross" else "sampled"
    published.prepare_published(args, dataset, comparisons, votes, PAPER, choices)


def parse_args(argv=None):
    parser = published.parser(__doc__)
    kinds = ("zip", "cross", "preference")
    votes_help = "what a vote is (above)"
    parser.add_argument("--annotators", choices=kinds, default="zip", help=votes_help)
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
