"""Your own votes: a file with one comparison a row becomes RUN/data.

    python data_prep/votes.py --run runs/mine --source mine.jsonl

The ending decides how the file is read: .jsonl, .json (a list of rows), .csv or .parquet, each also with .gz behind it. A row has

    prompt                     a string, or chat messages [{role, content}, ..] that end with a user turn
    response_a, response_b     strings
    votes_a, votes_b, (ties)   how many chose a, chose b, called it a tie; or
    p, n                       the share of n votes for a, rounded or not, p n being a multiple of one half; or
    choice                     one vote: a, b or tie

with one of the three forms of votes for the whole file. Optional, for all rows or for none: prompt_id (a string or an integer),
categories {name: label}, p_true (the population's fraction for a), split (train or test). Other columns are ignored. Rows belong
together by prompt_id, else by prompt; the votes of rows for the same two responses, in either order, are added up. In CSV an
empty cell means missing, and messages and categories are written as JSON. A line of a .jsonl:

    {"prompt": "Name a fruit.", "response_a": "An apple.", "response_b": "Fruit is nice.", "votes_a": 4, "votes_b": 1}
"""

import csv
import gzip
import json
import reprlib
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pairwise.prompts import VOTES, Comparison, add_arguments, prepare
from pairwise.run_dir import InputError, Parser, hash_file, run_main

HALVES = lambda x: 0 <= x < 2**52 and 2 * x % 1 == 0, "a number of votes (at least 0, a multiple of one half)"
SHARE = lambda x: 0 <= x <= 1, "a number in [0, 1]"
WHOLE = lambda x: 1 <= x < 2**52 and x % 1 == 0, "a positive integer"  # comparisons only: NaN, infinity and huge integers fail them
NUMBERS = {"votes_a": HALVES, "votes_b": HALVES, "ties": HALVES, "p": SHARE, "n": WHOLE, "p_true": SHARE}
ALL_OR_NONE = ("prompt_id", "p_true", "split", "categories")
FIELDS = {"prompt", "response_a", "response_b", "choice", *NUMBERS, *ALL_OR_NONE}

# ---- one reader per ending: it takes a binary file and its name, and yields (where, row)


def read_jsonl(file, name):
    for line, text in decoded_lines(file, name):
        if text.strip():
            yield f"{name} line {line}", parse_json(text.strip(), name, line)


def read_json(file, name):
    text = "".join(text for _, text in decoded_lines(file, name))
    rows = parse_json(text, name) if text.strip() else []
    if not isinstance(rows, list):
        raise wrong(name, "the file", rows, "a list of rows")
    yield from ((f"{name} row {row}", value) for row, value in enumerate(rows, 1))


def read_csv(file, name):
    csv.field_size_limit(2**31 - 1)  # a response may be longer than the default of 128 kB
    reader = csv.reader((text for _, text in decoded_lines(file, name)), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise wrong(f"{name} line 1", "header", header, "distinct names")
        start = reader.line_num + 1  # a quoted cell may hold line breaks: a row is named by its first line
        for cells in reader:
            where, start = f"{name} line {start}", reader.line_num + 1
            if cells and len(cells) != len(header):
                raise InputError(f"{where}: {len(cells)} cells found, {len(header)} expected, as in the header")
            if cells:
                yield where, {field: from_cell(field, cell) for field, cell in zip(header, cells) if cell}
    except csv.Error as error:
        raise InputError(f"{name} line {reader.line_num}: not CSV ({error})") from None


def read_parquet(file, name):
    data, row = pa.BufferReader(file.read()), 0
    try:
        table = pq.ParquetFile(data)
        for batch in table.iter_batches(4096, columns=[field for field in table.schema_arrow.names if field in FIELDS]):
            for row, value in enumerate(batch.to_pylist(), row + 1):
                yield f"{name} row {row}", value
    except UnicodeDecodeError:
        raise InputError(f"{name} after row {row}: not UTF-8") from None
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{name}: not parquet ({str(error).splitlines()[0]})") from None


READERS = {".jsonl": read_jsonl, ".json": read_json, ".csv": read_csv, ".parquet": read_parquet}


def decoded_lines(file, name):
    """(line number, text), decoded line by line, so that an error can name the line; a byte order mark is skipped."""
    for line, raw in enumerate(file, 1):
        try:
            text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{name} line {line}: not UTF-8 (byte {raw[error.start]:#x})") from None
        yield line, text


def parse_json(text, name, line=1):
    """The value of a JSON text that begins in this line. NaN and Infinity come through, and no field accepts them."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # besides JSONDecodeError: a number of thousands of digits, thousands of brackets
        raise InputError(f"{name} line {line + getattr(error, 'lineno', 1) - 1}: not JSON ({getattr(error, 'msg', error)})") from None


def from_cell(field, cell):
    """The value of a CSV cell. One that does not have its field's form stays text, and is refused where the field is read."""
    try:
        if field in NUMBERS:
            return float(cell)
        if field == "categories":
            return json.loads(cell)
        if field == "prompt" and cell.startswith("["):
            value = json.loads(cell)
            return value if value and all(isinstance(message, dict) and "role" in message for message in value) else cell
    except (ValueError, RecursionError):
        pass
    return cell


# ---- one field


def wrong(where, field, found, expected):
    return InputError(f"{where}: {field}: {'nothing' if found is None else reprlib.repr(found)} found, {expected} expected")


def number(where, row, field):
    value, (fits, expected) = row.get(field), NUMBERS[field]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not fits(value):
        raise wrong(where, field, value, expected)
    return float(value)


def text(where, field, value):
    if not isinstance(value, str) or not value.strip():
        raise wrong(where, field, value, "text that is not empty")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can escape half a surrogate pair, which no UTF-8 file can hold
        raise wrong(where, field, value, "whole characters") from None
    return value


def label(where, field, value):
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else text(where, field, value)


def messages(where, prompt):
    """Chat messages: a string is one user turn."""
    if not isinstance(prompt, list):
        return [{"role": "user", "content": text(where, "prompt", prompt)}]
    for message in prompt:
        if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
            raise wrong(where, "prompt", message, "a message {role, content} with the role system, user or assistant")
    if not prompt or prompt[-1]["role"] != "user":
        raise wrong(where, "prompt", prompt[-1]["role"] if prompt else prompt, "messages that end with a user turn")
    return [{"role": message["role"], "content": text(where, "prompt message", message.get("content"))} for message in prompt]


def categories(where, value):
    if not isinstance(value, dict) or not value:
        raise wrong(where, "categories", value, "an object {name: label}")
    return {text(where, "categories", name): label(where, f"categories: {name!r}", value[name]) for name in value}


# ---- one row, with one of three forms of votes, each read as (votes_a, votes_b, ties)


def counts(where, row):
    return number(where, row, "votes_a"), number(where, row, "votes_b"), number(where, row, "ties") if "ties" in row else 0.0


def fraction(where, row):
    """Votes from the exact m / 2n that p was rounded from. The slack of 1e-6 is for float32, in which parquet files often keep p."""
    p, n = number(where, row, "p"), number(where, row, "n")
    m = round(2 * n * p)
    decimals = next(d for d in range(7) if abs(round(p, d) - p) <= 1e-6)
    if abs(m / (2 * n) - p) > 10**-decimals / 2 + 1e-6:
        raise wrong(where, "p", p, f"a multiple of 1/{2 * n:.0f} (n = {n:.0f}), up to its rounding,")
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
        raise InputError(f"{where}: {' beside '.join(found) or 'no votes'} found, one of these expected: {'; '.join(FORMS)}")
    return found[0]


def comparison(where, row):
    """The Comparison of one row."""
    if row.get("split") not in (None, "train", "test"):
        raise wrong(where, "split", row["split"], "train or test")
    return Comparison(
        label(where, "prompt_id", row["prompt_id"]) if "prompt_id" in row else None, messages(where, row.get("prompt")),
        text(where, "response_a", row.get("response_a")), text(where, "response_b", row.get("response_b")),
        *FORMS[form_of(where, row)][1](where, row), p_true=number(where, row, "p_true") if "p_true" in row else None,
        categories=categories(where, row["categories"]) if "categories" in row else None, split=row.get("split"), where=where)


# ---- the file


def kind(path):
    """(name, ending, whether gzipped) of an existing file: ("mine", ".csv", True) for data/mine.csv.gz."""
    zipped = path.suffix.lower() == ".gz"
    inner = Path(path.stem) if zipped else Path(path.name)
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if not path.is_file():
        raise InputError(f"{path}: {'a directory' if path.is_dir() else 'a device or pipe'} found, a file expected")
    if inner.suffix.lower() not in READERS:
        raise InputError(f"{path}: ending {inner.suffix or 'none'} found, one of {', '.join(READERS)} expected, or one of them with .gz")
    return inner.stem, inner.suffix.lower(), zipped


def read_rows(path):
    """(where, row) of every row, without the fields whose value is missing."""
    _, ending, zipped = kind(path)
    try:
        with (gzip.open if zipped else open)(path, "rb") as file:
            for where, row in READERS[ending](file, path.name):
                if not isinstance(row, dict):
                    raise wrong(where, "the row", row, "an object")
                yield where, {field: value for field, value in row.items() if value is not None}
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: not a whole gzip file ({error})") from None


def comparisons(path):
    """The Comparison of every row. Raises InputError where a row is not like the first in its form of votes or its optional fields."""
    first = None
    for where, row in read_rows(path):
        made = comparison(where, row)
        traits = {"votes": form_of(where, row)} | {field: "given" if field in row else "missing" for field in ALL_OR_NONE}
        if made.categories:
            traits["categories"] = f"given for {sorted(made.categories)}"
        first = first or traits
        for name in traits:
            if traits[name] != first[name]:
                raise InputError(f"{where}: {name}: {traits[name]} found, {first[name]} in the first row; all rows alike expected")
        yield made
    if first is None:
        raise InputError(f"{path}: no row found, at least one comparison expected")


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--source", required=True, type=Path, help="the file of comparisons")
    parser.add_argument("--votes", choices=VOTES, default="sampled", help="voters drawn from a population; all of it; or votes that are not independent draws")
    add_arguments(parser)
    return parser.parse_args(argv)


def main(args):
    try:
        name, _, _ = kind(args.source)
        inputs = {"source": hash_file(args.source)}
    except OSError as error:
        raise InputError(f"{args.source}: cannot be read ({error.strerror})") from None
    prepare(args, name, lambda: comparisons(args.source), args.votes, inputs, {})


if __name__ == "__main__":
    run_main(main, parse_args())
