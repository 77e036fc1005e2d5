"""Files: outputs appear by rename and are hashed as they do; what is read has the expected form.

torch is never imported.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from pairwise import cli

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_hashes = {}  # path of a file that this process wrote -> SHA-256, until hashes_beneath takes it
_unlocked = []  # paths on file systems without locks; the first is told

# ---- write

# What flock says on Lustre and some NFS; the last of another user's file on NFS.
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EBADF)


def check_writable(path):
    """Raise InputError where no file can be written at `path`, before long work for it is done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(mode="w+b", dir=path.parent):
            return
    except OSError as error:
        raise cli.InputError(f"{path}: cannot be written ({cli.reason(error)})") from None


@contextlib.contextmanager
def replacing(path, hashed=True):
    """Yield a temporary path beside `path`, a file or a directory, and rename it to `path`.

    On failure `path` stays as it was, and what was written is gone. hashed: keep the SHA-256 of
    every file for hashes_beneath. Raises InputError where a file system or a library cannot write,
    and where another process is writing `path`.
    """
    path = Path(path)
    partial, lock_path = (path.with_name(f".{word}-{path.name}") for word in ("partial", "lock"))
    locked = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        locked = lock(lock_path)
        if locked is None:
            raise cli.InputError(f"{path}: another process is writing it")
        remove(partial)  # of a call that was killed
        yield partial
        hashes = _hashes_of(partial) if hashed else {}
        if path.is_dir() and not path.is_symlink() and partial.is_dir():
            remove(path)
        os.replace(partial, path)  # It raises where a file should replace a directory.
        hashes_beneath(partial)  # Files written into a directory have their last names from now on.
        add_hashes(path, hashes)
    except Exception as error:
        # Of safetensors and tokenizers, which are not imported, as an evaluation does without them:
        # the one has an error of its own, the other a bare Exception.
        unwritable = isinstance(error, (OSError, pa.ArrowException, UnicodeEncodeError))
        if unwritable or type(error).__name__ in ("SafetensorError", "Exception"):
            words = f"{path}: cannot be written ({cli.reason(error)})"
            raise cli.InputError(words) from None
        raise
    finally:
        if locked is not None:
            with contextlib.suppress(OSError):  # of a file system that cannot be written any more
                remove(partial)
                lock_path.unlink()
            os.close(locked)


def lock(path):
    """Lock a file, made where there is none, never through a link; return its open descriptor.

    It is None where another process has it. The lock ends with the descriptor or the process. On a
    file system without locks there is none, and a warning says so."""
    if path.is_symlink():
        raise cli.InputError(f"{path}: a link found, a file expected")
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except PermissionError:  # of another user's file, which can be locked all the same
        if not path.exists():
            raise
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    with contextlib.suppress(BlockingIOError, FileNotFoundError):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno in NO_LOCKS:
                if not _unlocked:
                    words = "cannot be locked on this file system; let no second command write here"
                    print(f"warning: {path}: {words}", file=sys.stderr)
                _unlocked.append(path)
                return descriptor
            os.close(descriptor)
            raise
        # The one who had it may have removed the file since it was opened here.
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
    os.close(descriptor)
    return None


def remove(path):
    """Remove a file, a directory or a link, but never what a link names."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path, value, hashed=True):
    """Write JSON without NaN or infinity: a number that does not exist is null."""
    with replacing(path, hashed) as partial:
        partial.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_array(path, array):
    """Write an array as float32 .npy."""
    with replacing(path) as partial, open(partial, "wb") as file:
        np.save(file, array.astype(np.float32, copy=False))


def write_lines(path, rows):
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_parquet(path, table):
    """Write a pyarrow table. pyarrow itself opens no path that is not UTF-8."""
    content = pa.BufferOutputStream()
    pq.write_table(table, content, compression="zstd")
    path.write_bytes(content.getvalue())


# ---- hashes


def hash_file(path):
    """Return the SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hashes_of(path):
    """Return {path relative to `path`: SHA-256} of a file or of all files of a directory."""
    inside = [path] if path.is_file() else sorted(path.rglob("*"))
    return {x.relative_to(path).as_posix(): hash_file(x) for x in inside if x.is_file()}


def _absolute(path):
    """Return an absolute path in which links stay, so that it lies beneath its run directory."""
    return Path(os.path.abspath(path))


def hashes_beneath(directory, keep=False):
    """Return {relative path: SHA-256} of what this process wrote there since the last call.

    keep: the next call returns them too."""
    here = _absolute(directory)
    paths = [path for path in _hashes if path.is_relative_to(here)]
    hashes = {path.relative_to(here).as_posix(): _hashes[path] for path in paths}
    for path in paths if not keep else ():
        del _hashes[path]
    return hashes


def add_hashes(directory, hashes):
    """Count files as written by this process; hashes: of hashes_beneath, of an earlier process."""
    _hashes.update({_absolute(directory / name): value for name, value in hashes.items()})


# ---- read


def read_json(path, form, otherwise=None):
    """Return the JSON value of a file; `otherwise` where there is none and a default was given.

    form: what `misfit` expects. Raises InputError where the file is missing, is not JSON or has
    another form.
    """
    path = Path(path)
    if not path.is_file():
        if otherwise is not None:
            return otherwise
        raise cli.InputError(f"{path}: no such file")
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise cli.InputError(f"{path}: not JSON ({error})") from None
    if wrong := misfit(value, form):
        raise cli.InputError(f"{path}: {wrong}")
    return value


def parse_json(text):
    """Return the value of a JSON text. Raises ValueError, for an object with a key twice too."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("brackets nested too deep") from None


def _object(pairs):
    """Return an object of JSON; raise ValueError where two of its keys are equal."""
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} twice in one object")
    return value


def read_lines(path):
    """Return the values of a file of JSON lines. Raises InputError where one is not JSON."""
    values = []
    for number, line in enumerate(
        path.read_text(encoding="utf-8", errors="replace").split("\n"), 1
    ):
        try:
            values += [parse_json(line)] if line.strip() else []
        except ValueError as error:
            raise cli.InputError(f"{path} line {number}: not JSON ({error})") from None
    return values


NUMBER = (int, float)


def misfit(value, form, at=""):
    """Return what is wrong with a JSON value, in words that name the place; "" where it fits.

    A form is a type or a tuple of types; [form] of every element; {"key": form, ..} of an object
    that has these keys, others too, where "key?" may be missing; {str: form} of every value.
    """
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return _expected(value, dict, at)
        for key, inner in form.items():
            name = key.removesuffix("?") if key is not str else None
            if name is not None and name == key and name not in value:
                return f"{at + ': ' if at else ''}no {name} found"
            for each in value.keys() if key is str else {name} & value.keys():
                if wrong := misfit(value[each], inner, f"{at}.{each}" if at else each):
                    return wrong
        return ""
    if isinstance(form, list):
        if not isinstance(value, list):
            return _expected(value, list, at)
        wrongs = (misfit(each, form[0], f"{at}[{i}]") for i, each in enumerate(value))
        return next(filter(None, wrongs), "")
    types = form if isinstance(form, tuple) else (form,)
    fits = isinstance(value, types) and (not isinstance(value, bool) or bool in types)
    return "" if fits else _expected(value, types, at)


def _expected(value, types, at):
    """Return the words of misfit on a value of another type."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    names |= {int: "a number", float: "a number", type(None): "null"}
    types = dict.fromkeys(names[each] for each in (types if isinstance(types, tuple) else (types,)))
    found = names.get(type(value), type(value).__name__)  # The latter not in JSON.
    return f"{at + ': ' if at else ''}{found} found, {' or '.join(types)} expected"


def read_parquet(path):
    """Return the pyarrow table of a file. Raises ArrowException, OSError or ValueError where it
    cannot be read, as pyarrow does."""
    try:
        str(path).encode()
    except UnicodeEncodeError:  # pyarrow opens no such path.
        path = pa.BufferReader(path.read_bytes())
    # Not a file of Python's: a thread of pyarrow may let go of it when the interpreter has ended,
    # which aborts the process. And not pq.read_table, which imports pandas where it is installed.
    with pq.ParquetFile(path) as file:
        return file.read()


def read_array(path):
    """Return the array of a .npy file. Raises InputError where it is missing or broken."""
    if not path.is_file():
        raise cli.InputError(f"{path}: no such file")
    try:
        if path.stat().st_size == 0:
            raise ValueError("an empty file")
        # As a map: of a false header that promises terabytes nothing is allocated.
        with np.errstate(over="ignore"):  # of such a header; it is refused by the file's size
            return np.array(np.lib.format.open_memmap(path, mode="r"))
    except (ValueError, OverflowError, EOFError, SyntaxError, TypeError) as error:
        reason = cli.first_line(error)
        raise cli.InputError(f"{path}: not a .npy array ({reason})") from None
