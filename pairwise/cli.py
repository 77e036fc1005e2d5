"""The command line, as all scripts share it: errors of one line, argparse types, running `main`.

A mistake of the user's is an InputError. The script then prints its one line and exits with code 2.
"""

import argparse
import math
import os
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


# ---- arguments


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the whole usage before it."""

    def __init__(self, doc, **kwargs):
        super().__init__(
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **kwargs,
        )

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help explains)\n")


def moved(argv, commands):
    """Answer an old flag by one line that names its new command, and exit code 2.

    argv: the words of the command line, None for sys.argv[1:]; commands: {old flag: new command}.
    """
    for word in sys.argv[1:] if argv is None else argv:
        flag = word.split("=")[0]
        if flag in commands:
            exit_with(f"{flag} is now: {commands[flag]}")


def number_type(name, convert, is_valid, expected):
    """Return an argparse type: the text converted to a number, refused unless it is valid."""

    def parse(text):
        value = convert(text)
        if not is_valid(value):
            raise argparse.ArgumentTypeError(f"{text} found, {expected} expected")
        return value

    parse.__name__ = name  # argparse quotes it where the text is no number.
    return parse


natural = number_type("natural", int, lambda value: value >= 1, "an integer of at least 1")
positive = number_type("positive", float, lambda value: 0 < value < math.inf, "a number above 0")
nonnegative = number_type(
    "nonnegative", float, lambda value: 0 <= value < math.inf, "a number of at least 0"
)
fraction = number_type("fraction", float, lambda value: 0 <= value < 1, "a number in [0, 1)")
# torch and numpy accept these seeds.
seed = number_type("seed", int, lambda value: 0 <= value < 2**63, "an integer from 0 to 2^63 - 1")


def member_number(text):
    """argparse type: a number or count of members, 1 to 99: two digits in file names."""
    value = natural(text)
    if value > 99:
        raise argparse.ArgumentTypeError(f"{text} found, at most 99 expected")
    return value


# ---- running a script


def run_main(main, args):
    """Run main(args) as a script does.

    An InputError, or a path that cannot be read or written, is one line on stderr and exit code 2.
    """
    try:
        main(args)
        return
    except BrokenPipeError:  # The reader of the output has gone, as in `| head`.
        sys.stdout = None
        sys.exit(1)
    except InputError as error:
        message = str(error)
    except (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        message = f"{error.filename}: {error.strerror}"
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
    threads = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if threads.isdecimal() and int(threads) >= 1 and not (processes > 1 and threads == "1"):
        return int(threads)
    return otherwise or max(1, usable_cores() // processes)
