"""Your own votes: a file with one comparison a row becomes RUN/data.

    python data_prep/votes.py --run runs/mine --source mine.jsonl

The ending decides how the file is read: .jsonl, .json (a list of rows), .csv or .parquet, each also
with .gz behind it. A row has

    prompt                     a string, or chat messages [{role, content}, ..] that end with a user
                               turn
    response_a, response_b     strings
    votes_a, votes_b, (ties)   how many chose a, chose b, called it a tie; or
    p, n                       the share of n votes for a, rounded or not, p n being a multiple of
                               one half; or
    choice                     one vote: a, b or tie

with one of the three forms of votes for the whole file. Half votes are ties already shared out: as
their number is then unknown, the irreducible error is overestimated; give `ties` and --ties half
instead. A file with prompt_id and no prompt, whose responses may be ids, takes rewards from
elsewhere alone (extras/import_scores.py). Optional, for all rows or for none: prompt_id (a string
or an integer), categories {name: label}, p_true (the population's fraction for a), split (train or
test). Other columns are named and not used. Rows belong together by prompt_id, else by prompt; the
votes of rows for the same two responses, in either order, are added up. In CSV an empty cell means
missing, and messages and categories are written as JSON. A line of a .jsonl:

    {"prompt": "A fruit?", "response_a": "Apple.", "response_b": "Fig.", "votes_a": 4, "votes_b": 1}
"""

import json

from pairwise import cli, files, rows
from pairwise.prepare import prompts

HALVES, WHOLE = "a number of votes (at least 0, a multiple of one half)", "a positive integer"
FRACTION = "a number in [0, 1]"
IS_VALID = {  # NaN, infinity and huge integers fail the comparisons.
    HALVES: lambda x: 0 <= x < 2**52 and 2 * x % 1 == 0,
    WHOLE: lambda x: 1 <= x < 2**52 and x % 1 == 0,
    FRACTION: lambda x: 0 <= x <= 1,
}
NUMBERS = dict.fromkeys(("votes_a", "votes_b", "ties"), HALVES)
NUMBERS |= {"p": FRACTION, "n": WHOLE, "p_true": FRACTION}
ALL_OR_NONE = ("prompt", "prompt_id", "p_true", "split", "categories")
FIELDS = (
    dict.fromkeys(NUMBERS, "number")
    | dict.fromkeys(("response_a", "response_b", "choice", "prompt_id", "split"), "text")
    | {"prompt": "messages", "categories": "json"}
)


# ---- one field


def number(where, row, field):
    """Return a number of the row. Raises InputError unless it is as NUMBERS has it."""
    value, expected = row.get(field), NUMBERS[field]
    if not rows.is_number(value) or not IS_VALID[expected](value):
        raise rows.wrong(where, field, value, expected)
    return float(value)


def categories(where, labels):
    """Return {name: label}."""
    if not isinstance(labels, dict) or not labels:
        raise rows.wrong(where, "categories", labels, "an object {name: label}")
    names = [rows.text(where, "categories", name) for name in labels]
    return {name: rows.label(where, f"categories: {name!r}", labels[name]) for name in names}


# ---- the votes of one row: each of three forms is read as (votes_a, votes_b, ties)


def counts(where, row):
    """Read how many chose a, chose b and called it a tie."""
    ties = number(where, row, "ties") if "ties" in row else 0.0
    return number(where, row, "votes_a"), number(where, row, "votes_b"), ties


def fraction(where, row):
    """Read the votes from the exact m / 2n that p was rounded from.

    The slack of 1e-6 is for float32, in which parquet files often keep p.
    """
    p, n = number(where, row, "p"), number(where, row, "n")
    m = round(2 * n * p)
    decimals = next(d for d in range(7) if abs(round(p, d) - p) <= 1e-6)
    if abs(m / (2 * n) - p) > 10**-decimals / 2 + 1e-6:
        expected = f"a multiple of 1/{2 * n:.0f} (n = {n:.0f}), up to its rounding,"
        raise rows.wrong(where, "p", p, expected)
    return m / 2, n - m / 2, 0.0


def choice(where, row):
    """Read one vote."""
    if row["choice"] not in ("a", "b", "tie"):
        raise rows.wrong(where, "choice", row["choice"], "a, b or tie")
    return tuple(float(row["choice"] == option) for option in ("a", "b", "tie"))


FORMS = {  # name: (the fields that tell it, its reader)
    "votes_a and votes_b": ({"votes_a", "votes_b", "ties"}, counts),
    "p and n": ({"p", "n"}, fraction),
    "choice": ({"choice"}, choice),
}


def form_of(where, row):
    """Return the name of the row's form of votes. Raises InputError unless it has exactly one."""
    forms = [name for name, (fields, _) in FORMS.items() if fields & row.keys()]
    if len(forms) != 1:
        expected = f"one of these expected: {'; '.join(FORMS)}"
        raise cli.InputError(f"{where}: {' beside '.join(forms) or 'no votes'} found, {expected}")
    return forms[0]


# ---- rows


def comparison(where, row):
    """Return the Comparison of one row."""
    if row.get("split") not in (None, "train", "test"):
        raise rows.wrong(where, "split", row["split"], "train or test")
    prompt_id = rows.label(where, "prompt_id", row["prompt_id"]) if "prompt_id" in row else None
    messages = rows.messages(where, row.get("prompt", prompt_id))
    text = rows.text if "prompt" in row else rows.label  # without a prompt they are ids
    responses = [text(where, name, row.get(name)) for name in ("response_a", "response_b")]
    _, read_votes = FORMS[form_of(where, row)]
    votes = read_votes(where, row)
    p_true = number(where, row, "p_true") if "p_true" in row else None
    labels = categories(where, row["categories"]) if "categories" in row else None
    optional = (p_true, labels, row.get("split"), where)
    return prompts.Comparison(prompt_id, messages, *responses, *votes, *optional)


def comparisons(path, others, facts):
    """Yield the Comparison of every row; the set `others` gets the names of other columns, the dict
    `facts` no_prompts where prompt_id takes their place.

    Raises InputError where a row is not like the first in its form of votes or its optional fields,
    and where a prompt is in two splits.
    """
    first, split_of = None, {}
    for where, row in rows.read_rows(path, FIELDS, others=others):
        votes = comparison(where, row)
        traits = {"votes": form_of(where, row)}
        traits |= {field: "given" if field in row else "missing" for field in ALL_OR_NONE}
        if votes.categories:
            traits["categories"] = f"given for {sorted(votes.categories)}"
        first = first or traits
        if "prompt" not in row:
            facts["no_prompts"] = True
        for name in traits:
            if traits[name] != first[name]:
                unlike = f"{traits[name]} found, {first[name]} in the first row"
                raise cli.InputError(f"{where}: {name}: {unlike}; all rows alike expected")
        key = votes.prompt_id or json.dumps(votes.messages)
        before = split_of.setdefault(key, votes.split)
        if before != votes.split:
            conflict = f"split {votes.split!r} found, {before!r} before for the same prompt"
            raise cli.InputError(f"{where}: {conflict}; a prompt is in one split")
        yield votes
    if first is None:
        raise cli.InputError(f"{path}: no row found, at least one comparison expected")


def main(args):
    name, _, _ = rows.kind(args.source)
    try:
        inputs = {"source": files.hash_file(args.source)}
    except OSError as error:
        raise cli.InputError(f"{args.source}: cannot be read ({cli.reason(error)})") from None
    others, facts = set(), {}
    given = (args, name, lambda: comparisons(args.source, others, facts), args.votes, inputs, {})
    prompts.prepare(*given, facts=facts)
    if facts:
        words = "nothing can be trained or scored, extras/import_scores.py brings the rewards"
        print(f"data: no prompts, of which prompt_id takes the place; {words}")
    rows.print_unused(args.source, others)


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--source", required=True, type=cli.path, help="the file of comparisons")
    votes_help = (
        "voters drawn from a population; all of it; or votes that are not independent draws"
    )
    parser.add_argument("--votes", choices=prompts.VOTE_KINDS, default="sampled", help=votes_help)
    prompts.add_arguments(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
