"""Your own votes: a file with one comparison or one annotator's judgment a row becomes RUN/data.

    python data_prep/votes.py --run runs/mine --source mine.jsonl

The ending decides how the file is read: .jsonl, .json (a list of rows), .csv or .parquet, each also
with .gz behind it. A row has

    prompt                     a string, or chat messages [{role, content}, ..] that end with a user
                               turn

and one of five forms of votes, the same in the whole file. Votes on two responses have response_a
and response_b, strings, and

    votes_a, votes_b, (ties)   how many chose a, chose b, called it a tie; or
    p, n                       the share of n votes for a, rounded or not, p n being a multiple of
                               one half; or
    choice                     one vote: a, b or tie

One annotator's judgment has responses, a list of strings, and

    ranking                    indices into responses, the first of which is 0, best first; an inner
                               list is a tie: [2, [0, 1]]; or
    ratings                    a number for each response, higher is better, equal ones are a tie;
                               null is not rated

It is one vote on each pair of responses that are both ranked or rated; of identical texts the first
counts. Places (1 is best) are ratings with a minus sign.

A file without the column prompt has prompt_id in its place, and its responses may be ids: such data
take rewards from elsewhere alone (extras/import_scores.py).

Half votes are ties already shared out: as their number is then unknown, the irreducible error is
overestimated; give `ties` and --ties half instead. Optional, for all rows or for none: prompt_id (a
string or an integer), categories {name: label}, p_true (the population's fraction for a), split
(train or test) and, with choice, ranking or ratings, annotator (a string or an integer): two votes
of one annotator on the same two responses are then an error, or --repeated last. Other columns are
named and not used. Rows belong together by prompt_id, else by prompt; the votes of rows for the
same two responses, in either order, are added up. A row without a prompt or a response, or with a
blank one, is dropped and counted. In CSV an empty cell means missing, and messages, categories,
responses, ranking and ratings are written as JSON. Lines of a .jsonl:

    {"prompt": "A fruit?", "response_a": "Apple.", "response_b": "Fig.", "votes_a": 4, "votes_b": 1}
    {"prompt": "A fruit?", "responses": ["Apple.", "Fig.", "Leek."], "ranking": [1, 0, 2]}
"""

import functools
import itertools
import json

from pairwise import cli, data, files, rows
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
ALL_OR_NONE = ("prompt_id", "p_true", "split", "categories", "annotator")
IDS = ("prompt_id", "annotator")
IDS_OR_TEXTS = ("response_a", "response_b", "responses")
PAIR = ("response_a", "response_b", "votes_a", "votes_b", "ties")  # of Comparison
TEXTS = ("response_a", "response_b", "choice", "prompt_id", "split", "annotator")
FIELDS = dict.fromkeys(NUMBERS, "number") | dict.fromkeys(TEXTS, "text")
FIELDS |= dict.fromkeys(("categories", "responses", "ranking"), "json")
FIELDS |= {"prompt": "messages", "ratings": "numbers"}


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


# ---- the votes of one row on two responses: each of three forms is (votes_a, votes_b, ties)


def counts(where, row):
    """Read how many chose a, chose b and called it a tie."""
    ties = number(where, row, "ties") if "ties" in row else 0.0
    return number(where, row, "votes_a"), number(where, row, "votes_b"), ties


def fraction(where, row):
    """Read the votes from the exact m / 2n that p is or was rounded from; of what it can have been
    rounded from whole votes come first.

    The slack of 1e-6 is for float32, in which parquet files often keep p.
    """
    p, n = number(where, row, "p"), number(where, row, "n")
    decimals = next(d for d in range(7) if abs(round(p, d) - p) <= 1e-6)
    halves, whole, rounding = round(2 * n * p) / 2, float(round(n * p)), 10**-decimals / 2 + 1e-6
    for votes, slack in ((halves, 1e-6), (whole, rounding), (halves, rounding)):
        if abs(votes / n - p) <= slack:
            return votes, n - votes, 0.0
    expected = f"a multiple of 1/{2 * n:.0f} (n = {n:.0f}), up to its rounding,"
    raise rows.wrong(where, "p", p, expected)


def choice(where, row):
    """Read one vote."""
    if row["choice"] not in ("a", "b", "tie"):
        raise rows.wrong(where, "choice", row["choice"], "a, b or tie")
    return tuple(float(row["choice"] == option) for option in ("a", "b", "tie"))


# ---- the votes of one row on several responses: each of two forms is a level for each response,
# the higher the better, None for one that the annotator left out


def ranking(where, row, count):
    """Read the levels of `count` responses from their indices, the best first."""
    groups, levels = row["ranking"], [None] * count
    if not isinstance(groups, list):
        raise rows.wrong(where, "ranking", groups, "a list (in CSV as JSON)")
    for place, group in enumerate(groups):
        for index in group if isinstance(group, list) else [group]:
            if not rows.is_number(index) or index not in range(count):
                expected = f"an index into the {count} responses, counted from 0,"
                raise rows.wrong(where, "ranking", index, expected)
            if levels[int(index)] is not None:
                raise rows.wrong(where, "ranking", groups, "each index once at most")
            levels[int(index)] = -place
    return levels


def ratings(where, row, count):
    """Read the levels of `count` responses from a number for each."""
    levels = row["ratings"]
    if not isinstance(levels, list) or len(levels) != count:
        expected = f"a list of {count} numbers (in CSV as JSON), as there are {count} responses,"
        raise rows.wrong(where, "ratings", levels, expected)
    for level in levels:
        if level is not None and not (rows.is_number(level) and abs(level) < float("inf")):
            raise rows.wrong(where, "ratings", level, "a number or null")
    return levels


FORMS = {  # name: (the fields that tell it, its reader, what of the other forms it has no use for)
    "votes_a and votes_b": ({"votes_a", "votes_b", "ties"}, counts, {"responses", "annotator"}),
    "p and n": ({"p", "n"}, fraction, {"responses", "annotator"}),
    "choice": ({"choice"}, choice, {"responses"}),
    "ranking": ({"ranking"}, ranking, {"response_a", "response_b"}),
    "ratings": ({"ratings"}, ratings, {"response_a", "response_b"}),
}
OF_LISTS = {"ranking", "ratings"}


def form_of(where, row):
    """Return the name of the row's form of votes. Raises InputError unless it has exactly one."""
    forms = [name for name, (fields, *_) in FORMS.items() if fields & row.keys()]
    if len(forms) != 1:
        expected = f"one of these expected: {'; '.join(FORMS)}"
        raise cli.InputError(f"{where}: {' beside '.join(forms) or 'no votes'} found, {expected}")
    return forms[0]


def compared(where, row):
    """Yield (response, other, votes for it, for the other, ties) of every pair of a row.

    Or the reason why there is none.
    """
    form = form_of(where, row)
    _, read, _ = FORMS[form]
    if form not in OF_LISTS:
        pair = [rows.string(where, name, row.get(name)) for name in ("response_a", "response_b")]
        yield *pair, *read(where, row)
        return
    responses = row["responses"]
    if not isinstance(responses, list):
        raise rows.wrong(where, "responses", responses, "a list of texts (in CSV as JSON)")
    responses = ["" if x is None else rows.string(where, "responses", x) for x in responses]
    levels, held, texts = read(where, row, len(responses)), [], set()
    for response, level in zip(responses, levels):
        if level is not None and response in texts and response.strip():
            yield "identical responses"
        elif level is not None:
            held.append((response, level))
            texts.add(response)
    if len(levels) - levels.count(None) < 2:
        yield "fewer than two responses ranked or rated"
    for (response, level), (other, level_of_other) in itertools.combinations(held, 2):
        better, worse = level > level_of_other, level < level_of_other
        yield response, other, float(better), float(worse), float(not better and not worse)


# ---- rows


def text_fields(names):
    """Return the fields for texts of a row, or a file, that has fields of these names."""
    pair = ("response_a", "response_b")
    of_lists = OF_LISTS & names or "responses" in names and not names.intersection(pair)
    return ("prompt", "responses") if of_lists else ("prompt", *pair)


def blank(row):
    """Return why a row is left out, whatever else it has; None where it is not."""
    for name in text_fields(set(row)):
        value = row.get(name, "")
        if isinstance(value, str) and not value.strip():
            return "empty prompt" if name == "prompt" else "empty response"
    return None


def shared(where, row):
    """Return the fields of Comparison that the row gives to all of its own, {name: value}."""
    if row.get("split") not in (None, "train", "test"):
        raise rows.wrong(where, "split", row["split"], "train or test")
    if "p_true" in row and (form := form_of(where, row)) in OF_LISTS:
        raise rows.wrong(where, "p_true", row["p_true"], f"none beside {form}")
    common = {"prompt_id": None, "messages": rows.messages(where, row["prompt"], rows.string)}
    common |= {name: rows.label(where, name, row[name]) for name in IDS if name in row}
    if "p_true" in row:
        common["p_true"] = number(where, row, "p_true")
    if "categories" in row:
        common["categories"] = categories(where, row["categories"])
    return common | {"split": row.get("split"), "where": where}


def traits_of(where, row):
    """Return {name: text} of what all rows of a file have alike."""
    traits = {"votes": form_of(where, row)}
    traits |= {field: "given" if field in row else "missing" for field in ALL_OR_NONE}
    if "categories" in row:
        traits["categories"] = f"given for {sorted(row['categories'])}"
    return traits


def with_ids(where, row):
    """Return a row of a file without prompts: prompt_id is the prompt, responses may be ids too."""

    def text(value):
        if isinstance(value, list):
            return [text(each) for each in value]
        return rows.label(where, "response", value) if rows.is_number(value) else value

    named = {"prompt": "prompt_id"} | {name: name for name in IDS_OR_TEXTS}
    return row | {name: text(row[source]) for name, source in named.items() if source in row}


def comparisons(path, others, facts, replaces=False):
    """Yield the Comparisons of every row; the set `others` gets the names of other columns, the
    dict `facts` no_prompts where prompt_id takes their place.

    replaces: as of Comparison. Raises InputError where a row is not like the first in its form of
    votes or its optional fields, where a prompt is in two splits, where no row has a text, and
    where annotators are missing of whom a vote is to replace another.
    """
    where, first, split_of, found = None, None, {}, set()
    if not any("prompt" in row for _, row in rows.read_rows(path, FIELDS)):
        facts["no_prompts"] = True
    for where, row in rows.read_rows(path, FIELDS, others=others):
        row = with_ids(where, row) if facts else row
        found |= row.keys()
        if reason := blank(row):
            yield reason
            continue
        _, _, useless = FORMS[form_of(where, row)]
        others |= useless & row.keys()
        row = {field: row[field] for field in row.keys() - useless}
        common, pairs = shared(where, row), list(compared(where, row))
        traits = traits_of(where, row)
        first = first or traits
        for name in traits:
            if traits[name] != first[name]:
                unlike = f"{traits[name]} found, {first[name]} in the first row"
                raise cli.InputError(f"{where}: {name}: {unlike}; all rows alike expected")
        key = common["prompt_id"] or json.dumps(common["messages"])
        before = split_of.setdefault(key, common["split"])
        if before != common["split"]:
            conflict = f"split {common['split']!r} found, {before!r} before for the same prompt"
            raise cli.InputError(f"{where}: {conflict}; a prompt is in one split")
        of_row = functools.partial(prompts.Comparison, **common, replaces=replaces)
        for pair in pairs:
            yield pair if isinstance(pair, str) else of_row(**dict(zip(PAIR, pair)))
    if where is None:
        raise cli.InputError(f"{path}: no row found, at least one comparison expected")
    for name in text_fields(found):
        if name not in found:
            raise rows.wrong(f"{path}: all rows", name, None, "text")
    if replaces and first and first["annotator"] == "missing":
        expected = "choice, ranking or ratings with an annotator expected"
        raise cli.InputError(f"{path}: no annotator found; with --repeated last {expected}")


def main(args):
    name, _, _ = rows.kind(args.source)
    try:
        inputs = {"source": files.hash_file(args.source)}
    except OSError as error:
        raise cli.InputError(f"{args.source}: cannot be read ({cli.reason(error)})") from None
    others, facts, settings = set(), {}, {"repeated": args.repeated}
    given = functools.partial(comparisons, args.source, others, facts, args.repeated == "last")
    prompts.prepare(args, name, given, args.votes, inputs, settings, facts=facts)
    if facts:
        words = "nothing can be trained or scored; extras/import_scores.py brings the rewards"
        print(f"data: no column prompt, prompt_id takes its place: {words}")
    rows.print_unused(args.source, others)


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--source", required=True, type=cli.path, help="the file of comparisons")
    votes_help = (
        "voters drawn from a population; all of it; or votes that are not independent draws"
    )
    parser.add_argument("--votes", choices=data.VOTE_KINDS, default="sampled", help=votes_help)
    repeated_help = "an annotator's second vote on two responses: an error, or the last one counts"
    choices = ("error", "last")
    parser.add_argument("--repeated", choices=choices, default="error", help=repeated_help)
    prompts.add_flags(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
