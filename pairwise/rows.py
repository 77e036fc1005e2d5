"""Files of rows, as users bring them: .jsonl, .json, .csv or .parquet, each also with .gz.

`read_rows` reads one, and the functions below it check a field. Every error names file and row.
"""

import csv
import gzip
import json
import reprlib
import zlib
from pathlib import Path

from pairwise import cli

import pyarrow as pa
import pyarrow.parquet as pq

# ---- one reader for each ending: of a binary file, its name and the fields of read_rows, it yields
# (where, row)


def read_jsonl(file, name, fields):
    for line, text in decoded_lines(file, name):
        if text.strip():
            yield f"{name} line {line}", parse_json(text.strip(), name, line)


def read_json(file, name, fields):
    text = "".join(text for _, text in decoded_lines(file, name))
    rows = parse_json(text, name) if text.strip() else []
    if not isinstance(rows, list):
        raise wrong(name, "the file", rows, "a list of rows")
    yield from ((f"{name} row {row}", value) for row, value in enumerate(rows, 1))


def read_csv(file, name, fields):
    csv.field_size_limit(2**31 - 1)  # A response may be longer than the default of 128 kB.
    reader = csv.reader((text for _, text in decoded_lines(file, name)), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise wrong(f"{name} line 1", "header", header, "distinct names")
        # A quoted cell may hold line breaks: a row is named by its first line.
        start = reader.line_num + 1
        for cells in reader:
            where, start = f"{name} line {start}", reader.line_num + 1
            if not cells:
                continue
            if len(cells) != len(header):
                expected = f"{len(header)} expected, as in the header"
                raise cli.InputError(f"{where}: {len(cells)} cells found, {expected}")
            filled = [(field, cell) for field, cell in zip(header, cells) if cell]
            yield where, {field: from_cell(cell, fields.get(field)) for field, cell in filled}
    except csv.Error as error:
        raise cli.InputError(f"{name} line {reader.line_num}: not CSV ({error})") from None


def read_parquet(file, name, fields):
    # Parquet is not read from front to end, which a gzipped file would have to be.
    source = pa.BufferReader(file.read()) if isinstance(file, gzip.GzipFile) else file
    row = 0
    try:
        table = pq.ParquetFile(source)
        columns = [field for field in table.schema_arrow.names if field in fields]
        for batch in table.iter_batches(4096, columns=columns):
            for value in batch.to_pylist():
                row += 1
                yield f"{name} row {row}", value
    except UnicodeDecodeError:
        raise cli.InputError(f"{name} after row {row}: not UTF-8") from None
    except (pa.ArrowException, OSError) as error:
        raise cli.InputError(f"{name}: not parquet ({cli.first_line(error)})") from None


READERS = {".jsonl": read_jsonl, ".json": read_json, ".csv": read_csv, ".parquet": read_parquet}


def decoded_lines(file, name):
    """Yield (line number, text) of a binary file, without a byte order mark.

    It is decoded line by line, so that an error can name the line.
    """
    for line, raw in enumerate(file, 1):
        try:
            text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
        except UnicodeDecodeError as error:
            byte = f"byte {raw[error.start]:#x}"
            raise cli.InputError(f"{name} line {line}: not UTF-8 ({byte})") from None
        yield line, text


def parse_json(text, name, line=1):
    """Return the value of a JSON text that begins in this line. No field accepts NaN, Infinity."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where, message = f"{name} line {line + error.lineno - 1}", error.msg
    except (ValueError, RecursionError) as error:  # from thousands of digits or brackets
        where, message = f"{name} line {line}", error
    raise cli.InputError(f"{where}: not JSON ({message})")


def from_cell(cell, form):
    """Return the value of a CSV cell of the given form, as read_rows has them.

    A cell without this form stays text, and is refused where the field is read.
    """
    try:
        if form == "number":
            return float(cell)
        if form == "json":
            return json.loads(cell)
        if form == "messages" and cell.startswith("["):
            value = json.loads(cell)
            if value and all(isinstance(turn, dict) and "role" in turn for turn in value):
                return value
    except (ValueError, RecursionError):
        pass
    return cell


# ---- the file


def kind(path):
    """Return (name, ending, whether gzipped) of a file: ("mine", ".csv", True) for mine.csv.gz.

    Raises InputError where it is no file, or has another ending.
    """
    zipped = path.suffix.lower() == ".gz"
    inner = Path(path.stem) if zipped else Path(path.name)
    if not path.exists():
        raise cli.InputError(f"{path}: no such file")
    if not path.is_file():
        what = "a directory" if path.is_dir() else "a device or pipe"
        raise cli.InputError(f"{path}: {what} found, a file expected")
    if inner.suffix.lower() not in READERS:
        expected = f"one of {', '.join(READERS)} expected, or one of them with .gz"
        raise cli.InputError(f"{path}: ending {inner.suffix or 'none'} found, {expected}")
    return inner.stem, inner.suffix.lower(), zipped


def read_rows(path, fields, name=None):
    """Yield (where, row) of every row, without the fields whose value is missing.

    fields: {name: form} of the fields that are wanted, other columns may be there or not. The form
    is that of a CSV cell: "text", "number", "json" or "messages" (text, or a JSON list of
    messages). name: what `where` calls the file. Raises InputError for a file that cannot be read
    as its ending says.
    """
    _, ending, zipped = kind(path)
    try:
        with (gzip.open if zipped else open)(path, "rb") as file:
            for where, row in READERS[ending](file, name or path.name, fields):
                if not isinstance(row, dict):
                    raise wrong(where, "the row", row, "an object")
                yield where, {field: value for field, value in row.items() if value is not None}
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise cli.InputError(f"{path}: not a whole gzip file ({error})") from None


# ---- fields: each function returns the value, or raises the InputError of `wrong`


def wrong(where, field, value, expected):
    """Return the InputError for a value that is not what is expected."""
    shown = "nothing" if value is None else reprlib.repr(value)
    return cli.InputError(f"{where}: {field}: {shown} found, {expected} expected")


def is_number(value):
    """Tell whether a value is an integer or a float, of which JSON's true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def string(where, field, value):
    """Text, which may be empty."""
    if not isinstance(value, str):
        raise wrong(where, field, value, "text")
    try:
        value.encode()
    except UnicodeEncodeError:
        # JSON can escape half a surrogate pair, which no UTF-8 file can hold.
        raise wrong(where, field, value, "whole characters") from None
    return value


def text(where, field, value):
    """Text that is more than white space."""
    if not isinstance(value, str) or not value.strip():
        raise wrong(where, field, value, "text that is not empty")
    return string(where, field, value)


def one_of(where, field, value, vocabulary):
    """A word or an integer of a vocabulary."""
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value not in vocabulary:
        raise wrong(where, field, value, f"one of {', '.join(map(str, vocabulary))}")
    return value


def list_of(where, field, value, element):
    """A list of which every element is of the given type: str, int, dict."""
    if not isinstance(value, list) or not all(
        isinstance(each, element) and not isinstance(each, bool) for each in value
    ):
        raise wrong(where, field, value, f"a list of {element.__name__}")
    return value


def messages(where, prompt):
    """Chat messages that end with a user turn; a string is one user turn."""
    if not isinstance(prompt, list):
        return [{"role": "user", "content": text(where, "prompt", prompt)}]
    for message in prompt:
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "user", "assistant"):
            expected = "a message {role, content} with the role system, user or assistant"
            raise wrong(where, "prompt", message, expected)
    if not prompt or prompt[-1]["role"] != "user":
        last = prompt[-1]["role"] if prompt else prompt
        raise wrong(where, "prompt", last, "messages that end with a user turn")
    name = "prompt message"
    return [
        {"role": turn["role"], "content": text(where, name, turn.get("content"))} for turn in prompt
    ]
