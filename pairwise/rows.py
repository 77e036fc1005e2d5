"""Files of rows, as users bring them: .jsonl, .json, .csv or .parquet, each also with .gz.

`read_rows` reads one, and the functions below it check a field. Every error names file and row.
"""

import csv
import gzip
import json
import re
import reprlib
import zlib
from pathlib import Path

from pairwise import cli, files

import pyarrow as pa
import pyarrow.parquet as pq

# The most bytes of a line, of a row of CSV, and of a whole .json or .parquet.gz, which are read at
# once: a file of a few kB may unpack to terabytes. Ten million tokens are a sixth of it.
LONGEST = 2**28

# ---- a reader for each ending: it takes a binary file, its name and the fields of read_rows, and
# yields (where, row)


def read_jsonl(file, name, fields):
    for line, text in decoded_lines(file, name):
        if text.strip():
            yield f"{name} line {line}", parse_json(text.strip(), name, line)


def read_json(file, name, fields):
    content = file.read(LONGEST + 1)
    if len(content) > LONGEST:
        raise too_long(f"{name}: the file", "a .jsonl with a row a line may be longer")
    text = decoded(content, name)
    rows = parse_json(text, name) if text.strip() else []
    if not isinstance(rows, list):
        raise wrong(name, "the file", rows, "a list of rows")
    yield from ((f"{name} row {row}", value) for row, value in enumerate(rows, 1))


def read_csv(file, name, fields):
    csv.field_size_limit(LONGEST)  # A response may be longer than the default of 128 kB.
    start, size = 1, 0  # of the row that is being read: its first line, its characters so far

    def texts():
        nonlocal size
        for _, text in decoded_lines(file, name):
            size += len(text)
            if size > LONGEST:
                raise too_long(f"{name} line {start}: the row")
            yield text

    reader = csv.reader(texts(), strict=True)
    try:
        header = next(filter(None, reader), [])
        if header and not set(header) & set(fields):  # another separator, or no header
            expected = f"some of {', '.join(fields)}, separated by commas,"
            raise wrong(f"{name} line {reader.line_num}", "columns", header, expected)
        check_distinct(f"{name} line {reader.line_num}", header)
        # A quoted cell may hold line breaks: a row is named by its first line.
        start, size = reader.line_num + 1, 0
        for cells in reader:
            where, start, size = f"{name} line {start}", reader.line_num + 1, 0
            if not cells:
                continue
            if len(cells) != len(header):
                expected = f"{len(header)} expected, as in the header"
                raise cli.InputError(f"{where}: {len(cells)} cells found, {expected}")
            filled = [(field, cell) for field, cell in zip(header, cells) if cell]
            yield where, {field: from_cell(where, field, cell, fields) for field, cell in filled}
    except csv.Error as error:
        words = f"not CSV ({error}); cells separated by commas expected"
        raise cli.InputError(f"{name} line {reader.line_num}: {words}") from None


def read_parquet(file, name, fields):
    # Parquet is not read from front to end, which a gzipped file would have to be.
    zipped = isinstance(file, gzip.GzipFile)
    content = file.read(LONGEST + 1) if zipped else b""
    if len(content) > LONGEST:
        raise too_long(f"{name}: the file", "without .gz it may be longer")
    row = 0
    try:
        table = pq.ParquetFile(pa.BufferReader(content) if zipped else file)
        columns = table.schema_arrow.names
        check_distinct(name, columns)
        unread = {field: None for field in columns if field not in fields}
        wanted = [field for field in columns if field in fields]
        for batch in table.iter_batches(4096, columns=wanted):
            for value in batch.to_pylist():
                row += 1
                yield f"{name} row {row}", unread | value
    except UnicodeDecodeError:
        raise cli.InputError(f"{name} after row {row}: not UTF-8") from None
    except (pa.ArrowException, OSError) as error:
        raise cli.InputError(f"{name}: not parquet ({cli.first_line(error)})") from None
    except (ValueError, OverflowError, LookupError) as error:
        # of what Arrow holds and Python does not, such as dates after the year 9999
        words = f"a value that cannot be read ({cli.first_line(error)})"
        raise cli.InputError(f"{name} after row {row}: {words}") from None


READERS = {".jsonl": read_jsonl, ".json": read_json, ".csv": read_csv, ".parquet": read_parquet}


def check_distinct(where, columns):
    """Raise InputError where two columns have one name."""
    if len(set(columns)) < len(columns):
        twice = sorted({name for name in columns if columns.count(name) > 1})
        raise wrong(where, "columns found twice", twice, "distinct names")


def decoded_lines(file, name):
    """Yield (line number, text) of a binary file or of a list of lines."""
    is_file = hasattr(file, "readline")
    lines = iter(lambda: file.readline(LONGEST + 1), b"") if is_file else file
    for line, raw in enumerate(lines, 1):
        if len(raw) > LONGEST:
            raise too_long(f"{name} line {line}")
        yield line, decoded(raw, name, line)


def decoded(raw, name, line=1):
    """Return the text of bytes that begin in this line, without a byte order mark."""
    try:
        return raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line += error.object.count(b"\n", 0, error.start)
        byte = f"byte {error.object[error.start]:#x}"
        raise cli.InputError(f"{name} line {line}: not UTF-8 ({byte})") from None


def too_long(what, remedy=""):
    """Return the InputError for what is longer than LONGEST."""
    expected = f"more than {LONGEST >> 20} MiB found, at most that expected"
    return cli.InputError(f"{what}: {expected}{'; ' + remedy if remedy else ''}")


def parse_json(text, name, line=None):
    """Return the value of a JSON text that begins in this line, None for all of a file.

    No field accepts NaN, Infinity. Raises InputError for an object with a key twice too.
    """
    try:
        return files.parse_json(text)
    except json.JSONDecodeError as error:
        where, message = f"{name} line {(line or 1) + error.lineno - 1}", error.msg
    except ValueError as error:  # from a key twice, and from thousands of digits or brackets
        where, message = f"{name} line {line}" if line else name, error
    raise cli.InputError(f"{where}: not JSON ({message})")


def from_cell(where, field, cell, fields):
    """Return the value of a CSV cell in the form that read_rows' fields have for it.

    A cell without this form stays text, and is refused where the field is read.
    """
    form = fields.get(field)
    try:
        if form == "number":
            return cli.decimal(cell.strip())
        if form in ("json", "numbers"):
            value, number = files.parse_json(cell), {field: "number"}
            if form == "json" or not isinstance(value, list):
                return value
            return [from_cell(where, field, x, number) if isinstance(x, str) else x for x in value]
        if form == "messages" and cell.startswith("["):
            value = files.parse_json(cell)
            if any(isinstance(turn, dict) and "role" in turn for turn in value):
                return value
    except ValueError as error:
        # Of JSON with a key twice, a prompt would become that text.
        if form != "number" and not isinstance(error, json.JSONDecodeError):
            raise cli.InputError(f"{where}: {field}: not JSON ({error})") from None
        # As pandas writes a list; as text the chat would be a prompt of one turn.
        if form == "messages" and re.match(r"\[\s*\{\s*['\"](role|content)['\"]", cell):
            raise cli.InputError(
                f"{where}: {field}: messages that are not JSON ({error})"
            ) from None
    return cell


# ---- the file


def kind(path):
    """Return (name, ending, whether gzipped) of a file: ("mine", ".csv", True) for mine.csv.gz.

    The name is text that can be written: what of it is not UTF-8 becomes a question mark. Raises
    InputError where it is no file, has another ending, or has no name before it.
    """
    zipped = path.suffix.lower() == ".gz"
    inner = Path(path.stem) if zipped else Path(path.name)
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise cli.InputError(f"{path}: no such file") from None
    except OSError as error:
        raise cli.InputError(f"{path}: cannot be read ({cli.reason(error)})") from None
    if not path.is_file():
        what = "a directory" if path.is_dir() else "a device or pipe"
        raise cli.InputError(f"{path}: {what} found, a file expected")
    if inner.suffix.lower() not in READERS:
        expected = f"one of {', '.join(READERS)} expected, or one of them with .gz"
        raise cli.InputError(f"{path}: ending {inner.suffix or 'none'} found, {expected}")
    if not inner.stem.strip(". "):  # A run directory is named after it.
        raise cli.InputError(f"{path}: no name before the ending found, one expected")
    return inner.stem.encode(errors="replace").decode(), inner.suffix.lower(), zipped


def read_rows(path, fields, name=None, others=None):
    """Yield (where, row) of every row, without the fields whose value is missing.

    fields: {name: form} of the fields that are wanted, other columns may be there or not. The form
    is that of a CSV cell: "text", "number", "json", "numbers" (a JSON list) or "messages"
    (text, or a JSON list of messages). name: what `where` calls the file. others: a set that gets
    the names of other columns. Raises InputError for a file that cannot be read as its ending says.
    """
    _, ending, zipped = kind(path)
    try:
        with (gzip.open if zipped else open)(path, "rb") as file:
            for where, row in READERS[ending](file, name or path.name, fields):
                if not isinstance(row, dict):
                    raise wrong(where, "the row", row, "an object")
                if others is not None:
                    others |= row.keys() - fields.keys()
                yield where, {field: value for field, value in row.items() if value is not None}
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise cli.InputError(f"{path}: not a whole gzip file ({error})") from None
    except OSError as error:
        raise cli.InputError(f"{path}: cannot be read ({cli.reason(error)})") from None


def print_unused(path, others):
    """Print one line that names the columns of a file that are not used, where there are any.

    One of them may be a misspelt name.
    """
    names = [reprlib.repr(name) for name in sorted(others)]
    if names:
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        print(f"{path.name}: columns that are not used: {', '.join(names[:10])}{more}")


# ---- fields: each function returns the value, or raises the InputError of `wrong`


def wrong(where, field, value, expected):
    """Return the InputError for a value that is not what is expected."""
    shown = "nothing" if value is None else reprlib.repr(value)
    shown = shown if len(shown) <= 200 else f"{shown[:200]}.."
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


def label(where, field, value):
    """Return a text, or an integer as text: 3 of 3.0 too, which pandas makes of it beside null."""
    if is_number(value) and value % 1 == 0:
        return str(int(value))
    return text(where, field, value)


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


def messages(where, prompt, content=text):
    """Chat messages that end with a user turn; a string is one user turn.

    content: text, or string, which may be empty.
    """
    if not isinstance(prompt, list):
        return [{"role": "user", "content": content(where, "prompt", prompt)}]
    for message in prompt:
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "user", "assistant"):
            expected = "a message {role, content} with the role system, user or assistant"
            raise wrong(where, "prompt", message, expected)
    if not prompt or prompt[-1]["role"] != "user":
        last = prompt[-1]["role"] if prompt else prompt
        raise wrong(where, "prompt", last, "messages that end with a user turn")
    name = "prompt message"
    for turn in prompt:
        unknown = [key for key in turn if key not in ("role", "content") and turn[key] is not None]
        if unknown:
            raise wrong(where, name, unknown, "no keys besides role and content")
    contents = [content(where, name, turn.get("content")) for turn in prompt]
    return [{"role": turn["role"], "content": each} for turn, each in zip(prompt, contents)]
