"""The command line, as all scripts share it: errors of one line, argparse types, running `main`.

A mistake of the user's is an InputError. The script then prints its one line and exits with code 2.
"""

import argparse
import os
import re
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
BUILD_COMMAND = f"cd {REPOSITORY} && python setup.py build_ext --inplace"

# ---- errors


class InputError(Exception):
    """Something that the user can mend. Its text is the one line that is printed."""


def first_line(error):
    """Return the first line of what a library's exception says, to be quoted in a message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def reason(error):
    """Return why a file could not be read or written: the system's words, without the number."""
    return getattr(error, "strerror", None) or first_line(error)


def lacks_memory(error):
    """Tell whether an exception says that memory ran out: torch's are RuntimeErrors."""
    words = "not enough memory|can't allocate memory|out of memory"
    return isinstance(error, MemoryError) or re.search(words, str(error)) is not None


# ---- arguments


class _Help(argparse.RawDescriptionHelpFormatter):
    """The docstring as it is, and a flag's default after its words, where they do not say it."""

    def _get_help_string(self, action):
        shown = isinstance(action.default, (int, float, str)) and action.default is not False
        if not shown or action.default == argparse.SUPPRESS or "default" in action.help:
            return action.help
        return f"{action.help} (default %(default)s)"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the whole usage before it."""

    def __init__(self, doc, **kwargs):
        super().__init__(
            description=doc,
            formatter_class=_Help,
            allow_abbrev=False,
            **kwargs,
        )
        for name in ("stdout", "stderr"):
            # It is None where it was closed, by >&-.
            stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")
            setattr(sys, name, stream)
            if hasattr(stream, "reconfigure"):  # What its encoding lacks is written as an escape.
                stream.reconfigure(errors="backslashreplace")

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help explains)\n")


def number_type(name, convert, is_valid, expected):
    """Return an argparse type: the text converted to a number, refused unless it is valid."""

    def parse(text):
        value = convert(text)
        if not is_valid(value):
            raise argparse.ArgumentTypeError(f"{text} found, {expected} expected")
        return value

    parse.__name__ = name  # argparse quotes it where the text is no number.
    return parse


def decimal(text):
    """Return the float of a plain decimal number; float() also reads 1_0, inf and other digits."""
    if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text):
        raise ValueError(f"no decimal number: {text!r}")
    return float(text)


def integer(text):
    """Return the int of a plain decimal number."""
    if not re.fullmatch(r"[+-]?[0-9]{1,20}", text):
        raise ValueError(f"no integer: {text!r}")
    return int(text)


# The largest still fit into memory as a count, and float32, in which models compute, as a number.
natural = number_type(
    "natural", integer, lambda v: 1 <= v <= 10**9, "an integer of at least 1, at most 10^9,"
)
positive = number_type(
    "positive", decimal, lambda v: 1e-30 <= v <= 1e30, "a number above 0, from 1e-30 to 1e30,"
)
nonnegative = number_type(
    "nonnegative", decimal, lambda v: v == 0 or 1e-30 <= v <= 1e30, "0 or a number up to 1e30"
)
fraction = number_type("fraction", decimal, lambda v: 0 <= v < 1, "a number in [0, 1)")
# A million resamples of twenty sums are 160 MB.
resamples = number_type(
    "resamples", integer, lambda v: 1 <= v <= 10**6, "an integer of at least 1, at most 10^6,"
)
# torch and numpy accept these seeds.
seed = number_type("seed", integer, lambda v: 0 <= v < 2**63, "an integer from 0 to 2^63 - 1")
# A million threads are more than libgomp can make.
threads = number_type(
    "threads",
    integer,
    lambda v: 1 <= v <= os.cpu_count(),
    f"an integer from 1 to {os.cpu_count()}, the cores of this machine,",
)


def path(text):
    """argparse type: a path. An empty word, such as an unset variable's, names none."""
    if not text:
        raise argparse.ArgumentTypeError("an empty word found, a path expected")
    return Path(text)


def add_run(parser, words):
    """Add --run, of a script that reads a run directory, and the flag that accepts its edits."""
    parser.add_argument("--run", required=True, type=path, help=words)
    words = "take files of the run that were edited after a stage wrote them, and note it there"
    parser.add_argument("--accept-edited", action="store_true", help=words)


def member_number(text):
    """argparse type: a number or count of members, 1 to 99: two digits in file names."""
    value = natural(text)
    if value > 99:
        raise argparse.ArgumentTypeError(f"{text} found, at most 99 expected")
    return value


# ---- running a script


def check_directory(flag, path):
    """Raise InputError where something else than a directory is at the path of --flag."""
    if not path.is_dir() and (path.exists() or path.is_symlink()):
        found = "a link to nothing" if path.is_symlink() else "a file"
        raise InputError(f"--{flag} {path}: {found} found, a directory expected")


def run_main(main, args):
    """Run main(args) as a script does.

    An InputError, what a file system cannot read or write, and a lack of memory are one line on
    stderr and exit code 2.
    """
    try:
        is_first = os.environ.get("RANK", "0") == "0"  # of the processes of a torchrun
        if getattr(args, "accept_edited", False) and is_first:
            from pairwise import manifest

            manifest.accept_edited(args.run)
        main(args)
        sys.stdout.flush()
        return
    except BrokenPipeError:  # The reader of the output has gone, as in `| head`.
        sys.stdout = None
        sys.exit(1)
    except InputError as error:
        message = str(error)
    except OSError as error:
        message = ": ".join(str(word) for word in (error.filename, reason(error)) if word)
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        message = f"not enough memory ({first_line(error)[:150]})"
    try:
        sys.stdout.flush()
    except OSError:  # It cannot be written, which Python would say once more when it ends.
        sys.stdout = None
    exit_with(message)


def exit_with(message):
    """Print the error as one line that names the script, and exit with 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def import_evaluator():
    """Import the compiled evaluator; where it is not built, say how to build it and exit with 2."""
    try:
        from pairwise import evaluator
    except ImportError:
        exit_with(f"the C++ evaluator is not built for this Python; build it with: {BUILD_COMMAND}")
    return evaluator


def usable_cores():
    """Count the CPU cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def default_threads(otherwise=None):
    """The default of --threads: OMP_NUM_THREADS where the user has set it; otherwise all cores.

    Processes of one torchrun share the cores. It sets OMP_NUM_THREADS=1 by itself in each of them,
    so that a 1 there says nothing about the user.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    words = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if words.isdecimal() and int(words) >= 1 and not (processes > 1 and words == "1"):
        return min(int(words), os.cpu_count())
    return otherwise or max(1, usable_cores() // processes)
