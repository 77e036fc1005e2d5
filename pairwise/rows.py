"""Files of rows, as users bring them: .jsonl, .json, .csv, .parquet, each also with .gz; every error names the file and the row."""

import csv
import gzip
import json
import reprlib
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pairwise import cli

# ---- one reader per ending: it takes a binary file, its name and the fields that are wanted, and yields (where, row)


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
    csv.field_size_limit(2**31 - 1)  # a response may be longer than the default of 128 kB
    reader = csv.reader((text for _, text in decoded_lines(file, name)), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise wrong(f"{name} line 1", "header", header, "distinct names")
        start = (
            reader.line_num + 1
        )  # a quoted cell may hold line breaks: a row is named by its first line
        for cells in reader:
            where, start = f"{name} line {start}", reader.line_num + 1
            if cells and len(cells) != len(header):
                raise cli.InputError(
                    f"{where}: {len(cells)} cells found, {len(header)} expected, as in the header"
                )
            if cells:
                yield (
                    where,
                    {
                        field: from_cell(field, cell, fields.get(field))
                        for field, cell in zip(header, cells)
                        if cell
                    },
                )
    except csv.Error as error:
        raise cli.InputError(f"{name} line {reader.line_num}: not CSV ({error})") from None


def read_parquet(file, name, fields):
    data, row = (
        pa.BufferReader(file.read()) if isinstance(file, gzip.GzipFile) else file,
        0,
    )  # parquet is not read from front to end
    try:
        table = pq.ParquetFile(data)
        for batch in table.iter_batches(
            4096, columns=[field for field in table.schema_arrow.names if field in fields]
        ):
            for row, value in enumerate(batch.to_pylist(), row + 1):
                yield f"{name} row {row}", value
    except UnicodeDecodeError:
        raise cli.InputError(f"{name} after row {row}: not UTF-8") from None
    except (pa.ArrowException, OSError) as error:
        raise cli.InputError(f"{name}: not parquet ({str(error).splitlines()[0]})") from None


READERS = {".jsonl": read_jsonl, ".json": read_json, ".csv": read_csv, ".parquet": read_parquet}


def decoded_lines(file, name):
    """(line number, text), decoded line by line, so that an error can name the line; a byte order mark is skipped."""
    for line, raw in enumerate(file, 1):
        try:
            text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise cli.InputError(
                f"{name} line {line}: not UTF-8 (byte {raw[error.start]:#x})"
            ) from None
        yield line, text


def parse_json(text, name, line=1):
    """The value of a JSON text that begins in this line. NaN and Infinity come through, and no field accepts them."""
    try:
        return json.loads(text)
    except (
        ValueError,
        RecursionError,
    ) as error:  # besides JSONDecodeError: a number of thousands of digits, thousands of brackets
        raise cli.InputError(
            f"{name} line {line + getattr(error, 'lineno', 1) - 1}: not JSON ({getattr(error, 'msg', error)})"
        ) from None


def from_cell(field, cell, form):
    """The value of a CSV cell of the given form. One that does not have this form stays text, and is refused where the field is read."""
    try:
        if form == "number":
            return float(cell)
        if form == "json":
            return json.loads(cell)
        if form == "messages" and cell.startswith("["):
            value = json.loads(cell)
            return (
                value
                if value
                and all(isinstance(message, dict) and "role" in message for message in value)
                else cell
            )
    except (ValueError, RecursionError):
        pass
    return cell


# ---- the file


def kind(path):
    """(name, ending, whether gzipped) of an existing file: ("mine", ".csv", True) for data/mine.csv.gz."""
    zipped = path.suffix.lower() == ".gz"
    inner = Path(path.stem) if zipped else Path(path.name)
    if not path.exists():
        raise cli.InputError(f"{path}: no such file")
    if not path.is_file():
        raise cli.InputError(
            f"{path}: {'a directory' if path.is_dir() else 'a device or pipe'} found, a file expected"
        )
    if inner.suffix.lower() not in READERS:
        raise cli.InputError(
            f"{path}: ending {inner.suffix or 'none'} found, one of {', '.join(READERS)} expected, or one of them with .gz"
        )
    return inner.stem, inner.suffix.lower(), zipped


def read_rows(path, fields, name=None):
    """(where, row) of every row, without the fields whose value is missing. name: what `where` calls the file.

    fields: {name: form} of the fields that are wanted, with the form that a CSV cell has: "text", "number", "json" or "messages" (text, or
    a JSON list of messages). Other columns may be there or not. Raises InputError for a file that cannot be read as its ending says.
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


# ---- fields that are read alike everywhere


def wrong(where, field, found, expected):
    return cli.InputError(
        f"{where}: {field}: {'nothing' if found is None else reprlib.repr(found)} found, {expected} expected"
    )


def string(where, field, value):
    if not isinstance(value, str):
        raise wrong(where, field, value, "text")
    try:
        value.encode()
    except (
        UnicodeEncodeError
    ):  # JSON can escape half a surrogate pair, which no UTF-8 file can hold
        raise wrong(where, field, value, "whole characters") from None
    return value


def text(where, field, value):
    if not isinstance(value, str) or not value.strip():
        raise wrong(where, field, value, "text that is not empty")
    return string(where, field, value)


def one_of(where, field, value, vocabulary):
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value not in vocabulary:
        raise wrong(where, field, value, f"one of {', '.join(map(str, vocabulary))}")
    return value


def list_of(where, field, value, kind):
    """A list of which every element is of the given type: str, int, dict."""
    if not isinstance(value, list) or not all(
        isinstance(each, kind) and not isinstance(each, bool) for each in value
    ):
        raise wrong(where, field, value, f"a list of {kind.__name__}")
    return value


def messages(where, prompt):
    """Chat messages: a string is one user turn."""
    if not isinstance(prompt, list):
        return [{"role": "user", "content": text(where, "prompt", prompt)}]
    for message in prompt:
        if not isinstance(message, dict) or message.get("role") not in (
            "system",
            "user",
            "assistant",
        ):
            raise wrong(
                where,
                "prompt",
                message,
                "a message {role, content} with the role system, user or assistant",
            )
    if not prompt or prompt[-1]["role"] != "user":
        raise wrong(
            where,
            "prompt",
            prompt[-1]["role"] if prompt else prompt,
            "messages that end with a user turn",
        )
    return [
        {"role": message["role"], "content": text(where, "prompt message", message.get("content"))}
        for message in prompt
    ]
