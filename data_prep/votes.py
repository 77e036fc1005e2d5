"""Your own votes: a file with one comparison a row becomes RUN/data.

    python data_prep/votes.py --run runs/mine --source mine.jsonl

The ending decides how the file is read: .jsonl, .json (a list of rows), .csv or .parquet, each also with .gz behind it. A row has

    prompt                     a string, or chat messages [{role, content}, ..] that end with a user turn
    response_a, response_b     strings
    votes_a, votes_b, (ties)   how many chose a, chose b, called it a tie; or
    p, n                       the share of n votes for a, rounded or not, p n being a multiple of one half; or
    choice                     one vote: a, b or tie

with one of the three forms of votes for the whole file. Half votes are ties already shared out: as their number is then unknown, the
irreducible error is overestimated; give `ties` and --ties half instead. Optional, for all rows or for none: prompt_id (a string or an integer),
categories {name: label}, p_true (the population's fraction for a), split (train or test). Other columns are ignored. Rows belong
together by prompt_id, else by prompt; the votes of rows for the same two responses, in either order, are added up. In CSV an
empty cell means missing, and messages and categories are written as JSON. A line of a .jsonl:

    {"prompt": "Name a fruit.", "response_a": "An apple.", "response_b": "Fruit is nice.", "votes_a": 4, "votes_b": 1}
"""

import json
from pathlib import Path

from pairwise import cli, run_dir
from pairwise.prepare.prompts import VOTES, Comparison, add_arguments, prepare
from pairwise.rows import kind, messages, read_rows, text, wrong

HALVES = (
    lambda x: 0 <= x < 2**52 and 2 * x % 1 == 0,
    "a number of votes (at least 0, a multiple of one half)",
)
SHARE = lambda x: 0 <= x <= 1, "a number in [0, 1]"
WHOLE = (
    lambda x: 1 <= x < 2**52 and x % 1 == 0,
    "a positive integer",
)  # comparisons only: NaN, infinity and huge integers fail them
NUMBERS = {
    "votes_a": HALVES,
    "votes_b": HALVES,
    "ties": HALVES,
    "p": SHARE,
    "n": WHOLE,
    "p_true": SHARE,
}
ALL_OR_NONE = ("prompt_id", "p_true", "split", "categories")
FIELDS = (
    dict.fromkeys(NUMBERS, "number")
    | dict.fromkeys(("response_a", "response_b", "choice", "prompt_id", "split"), "text")
    | {"prompt": "messages", "categories": "json"}
)

# ---- one field


def number(where, row, field):
    value, (fits, expected) = row.get(field), NUMBERS[field]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not fits(value):
        raise wrong(where, field, value, expected)
    return float(value)


def label(where, field, value):
    return (
        str(value)
        if isinstance(value, int) and not isinstance(value, bool)
        else text(where, field, value)
    )


def categories(where, value):
    if not isinstance(value, dict) or not value:
        raise wrong(where, "categories", value, "an object {name: label}")
    return {
        text(where, "categories", name): label(where, f"categories: {name!r}", value[name])
        for name in value
    }


# ---- one row, with one of three forms of votes, each read as (votes_a, votes_b, ties)


def counts(where, row):
    return (
        number(where, row, "votes_a"),
        number(where, row, "votes_b"),
        number(where, row, "ties") if "ties" in row else 0.0,
    )


def fraction(where, row):
    """Votes from the exact m / 2n that p was rounded from. The slack of 1e-6 is for float32, in which parquet files often keep p."""
    p, n = number(where, row, "p"), number(where, row, "n")
    m = round(2 * n * p)
    decimals = next(d for d in range(7) if abs(round(p, d) - p) <= 1e-6)
    if abs(m / (2 * n) - p) > 10**-decimals / 2 + 1e-6:
        raise wrong(
            where, "p", p, f"a multiple of 1/{2 * n:.0f} (n = {n:.0f}), up to its rounding,"
        )
    return m / 2, n - m / 2, 0.0


def choice(where, row):
    if row["choice"] not in ("a", "b", "tie"):
        raise wrong(where, "choice", row["choice"], "a, b or tie")
    return tuple(float(row["choice"] == option) for option in ("a", "b", "tie"))


FORMS = {  # name: (the fields that tell it, its reader)
    "votes_a and votes_b": ({"votes_a", "votes_b", "ties"}, counts),
    "p and n": ({"p", "n"}, fraction),
    "choice": ({"choice"}, choice),
}


def form_of(where, row):
    found = [name for name, (fields, _) in FORMS.items() if fields & row.keys()]
    if len(found) != 1:
        raise cli.InputError(
            f"{where}: {' beside '.join(found) or 'no votes'} found, one of these expected: {'; '.join(FORMS)}"
        )
    return found[0]


def comparison(where, row):
    """The Comparison of one row."""
    if row.get("split") not in (None, "train", "test"):
        raise wrong(where, "split", row["split"], "train or test")
    return Comparison(
        label(where, "prompt_id", row["prompt_id"]) if "prompt_id" in row else None,
        messages(where, row.get("prompt")),
        text(where, "response_a", row.get("response_a")),
        text(where, "response_b", row.get("response_b")),
        *FORMS[form_of(where, row)][1](where, row),
        p_true=number(where, row, "p_true") if "p_true" in row else None,
        categories=categories(where, row["categories"]) if "categories" in row else None,
        split=row.get("split"),
        where=where,
    )


# ---- the file


def comparisons(path):
    """The Comparison of every row. Raises InputError where a row is not like the first in its form of votes or its optional fields."""
    first, homes = None, {}
    for where, row in read_rows(path, FIELDS):
        made = comparison(where, row)
        traits = {"votes": form_of(where, row)} | {
            field: "given" if field in row else "missing" for field in ALL_OR_NONE
        }
        if made.categories:
            traits["categories"] = f"given for {sorted(made.categories)}"
        first = first or traits
        for name in traits:
            if traits[name] != first[name]:
                raise cli.InputError(
                    f"{where}: {name}: {traits[name]} found, {first[name]} in the first row; all rows alike expected"
                )
        home = homes.setdefault(made.prompt_id or json.dumps(made.messages), made.split)
        if home != made.split:
            raise cli.InputError(
                f"{where}: split {made.split!r} found, {home!r} before for the same prompt; a prompt is in one split"
            )
        yield made
    if first is None:
        raise cli.InputError(f"{path}: no row found, at least one comparison expected")


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--source", required=True, type=Path, help="the file of comparisons")
    parser.add_argument(
        "--votes",
        choices=VOTES,
        default="sampled",
        help="voters drawn from a population; all of it; or votes that are not independent draws",
    )
    add_arguments(parser)
    return parser.parse_args(argv)


def main(args):
    try:
        name, _, _ = kind(args.source)
        inputs = {"source": run_dir.hash_file(args.source)}
    except OSError as error:
        raise cli.InputError(f"{args.source}: cannot be read ({error.strerror})") from None
    prepare(args, name, lambda: comparisons(args.source), args.votes, inputs, {})


if __name__ == "__main__":
    cli.run_main(main, parse_args())
