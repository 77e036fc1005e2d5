"""The command line: errors of one line, argparse types, and how a script runs its main."""

import argparse
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


BUILD_COMMAND = f"cd {REPOSITORY} && python setup.py build_ext --inplace"


class InputError(Exception):
    """Something the user can mend; its text is the one line that is printed before exit code 2."""


def first_line(error):
    """What an exception of a library says, as part of a message of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class Parser(argparse.ArgumentParser):
    """argparse, with an error of one line instead of the whole usage."""

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
            print(
                f"{Path(sys.argv[0]).name}: error: {flag} is now: {commands[flag]}", file=sys.stderr
            )
            sys.exit(2)


def natural(text):
    """argparse type: an integer of at least one."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} found, an integer of at least 1 expected")
    return value


def member_number(text):
    """argparse type: a number or a count of members, which has two digits in file names."""
    value = natural(text)
    if value > 99:
        raise argparse.ArgumentTypeError(f"{text} found, at most 99 expected")
    return value


def positive(text):
    """argparse type: a number above zero."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} found, a number above 0 expected")
    return value


def nonnegative(text):
    """argparse type: a number of at least zero."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} found, a number of at least 0 expected")
    return value


def seed(text):
    """argparse type: an integer of at least zero."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} found, an integer from 0 to 2^63 - 1 expected")
    return value


def fraction(text):
    """argparse type: a number in [0, 1)."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} found, a number in [0, 1) expected")
    return value


def run_main(main, args):
    """Run main(args) as a script does: an InputError, or a path that cannot be read or written, is one line on stderr and exit code 2."""
    try:
        main(args)
        return
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        sys.stdout = None
        sys.exit(1)
    except InputError as error:
        said = str(error)
    except (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        said = f"{error.filename}: {error.strerror}"
    print(f"{Path(sys.argv[0]).name}: error: {said}", file=sys.stderr)
    sys.exit(2)


def import_evaluator():
    """The compiled evaluator; without it, one line that names the command that builds it, and exit code 2."""
    try:
        from pairwise import evaluator
    except ImportError:
        print(
            f"{Path(sys.argv[0]).name}: error: the C++ evaluator is not built for this Python; build it with: {BUILD_COMMAND}",
            file=sys.stderr,
        )
        sys.exit(2)
    return evaluator
