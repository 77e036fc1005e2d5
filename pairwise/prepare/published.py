"""Published data sets: their rows, from the hub or from a local copy by the same code, to prompt groups and a comparison with the paper.

`datasets` finds and downloads the files of a data set on the hub; rows.py reads them, as it reads a local copy. No script of a repository is
ever run, and no type is guessed or changed on the way: what is not in the expected form is an error that names file and row.
"""

import hashlib
import json
import logging
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from pairwise import cli, run_dir
from pairwise.prepare.prompts import add_arguments, prepare
from pairwise.rows import READERS, read_rows

THEIR_SPLITS = ("train", "validation", "test")  # as the files of a published data set name them


class Published(NamedTuple):
    """What is known of a data set before it is read."""

    name: str  # of its script in data_prep/
    hub: str  # hub id
    options: dict  # of datasets.load_dataset: name, data_dir, data_files, revision
    files: str  # what to download by hand, for the message when the hub cannot be read
    rows: dict  # {split: published number of rows}
    fields: tuple  # the columns that are used


def parser(doc):
    """A Parser with the flags that every published data set has."""
    made = cli.Parser(doc)
    add_source_arguments(made)
    add_arguments(made)
    return made


def add_source_arguments(made):
    made.add_argument(
        "--source",
        type=Path,
        metavar="PATH",
        help="a local copy instead of the hub: a .parquet, .json or .jsonl file, also .gz, or a "
        "directory, of which the files (or folders) named train*, validation* and test* are the splits",
    )
    made.add_argument(
        "--revision",
        help="commit, branch or tag on the hub (default: the newest; the commit that was read is recorded)",
    )


# ---- files


def local_files(path):
    """{split: [Path, ..]} of a directory; {None: [path]} of a file."""
    if not path.is_dir():
        return {None: [path]}
    found = {}
    for file in sorted(path.rglob("*")):
        parts = file.relative_to(path).parts
        if file.is_file() and readable(file) and not any(part.startswith(".") for part in parts):
            for split in (
                split
                for part in reversed(parts)
                for split in THEIR_SPLITS
                if part.lower().startswith(split)
            ):
                found.setdefault(split, []).append(file)
                break
    for split, files in found.items():
        twice = [
            name
            for name, count in Counter(
                file.parent / file.name.split(".")[0] for file in files
            ).items()
            if count > 1
        ]
        if twice:
            raise cli.InputError(
                f"{twice[0]}.*: one file expected, found in several forms, of which each would count"
            )
    if not found:
        raise cli.InputError(
            f"{path}: no file named train*, validation* or test* found, with an ending .parquet, .json or .jsonl, also .gz"
        )
    return found


def readable(file):
    ending = (Path(file.stem) if file.suffix.lower() == ".gz" else file).suffix.lower()
    return ending in READERS and ending != ".csv"


def hub_files(data, revision, flag):
    """({split: [Path, ..]}, commit) of a data set on the hub, downloaded into the hub's cache.

    Raises InputError where the hub cannot be read, with what to download by hand and the command to run then.
    """
    import datasets  # seconds: only where it is needed
    import huggingface_hub

    for library in (datasets, huggingface_hub):
        library.utils.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a line for each of many attempts
    options = data.options | ({"revision": revision} if revision else {})
    print(f"data: asking the hub for {data.hub}")
    try:
        found = datasets.load_dataset_builder(data.hub, **options).config.data_files
        files = datasets.DownloadManager().download(
            {split: list(urls) for split, urls in found.items()}
        )
    except Exception as error:  # of half a dozen libraries, down to the socket's
        raise cli.InputError(
            f"{data.hub} could not be read from the hub ({type(error).__name__}: {cli.first_line(error).rstrip('.')}); download {data.files} from "
            f"https://huggingface.co/datasets/{data.hub} and run: {run_dir.command_with(flag, 'PATH')}"
        ) from None
    commits = {url.split("@", 1)[1].split("/", 1)[0] for urls in found.values() for url in urls}
    return {
        str(split): [Path(file) for file in paths] for split, paths in files.items()
    }, ", ".join(sorted(commits))


def read(files, fields):
    """(split, where, row) of every row of {split: [Path, ..]}."""
    names = Counter(path.name for paths in files.values() for path in paths)
    for split, paths in files.items():
        for path in paths:
            if path.is_file() and not readable(path):
                raise cli.InputError(
                    f"{path}: a file that ends in .parquet, .json or .jsonl, also with .gz, expected"
                )
            name = path.name if names[path.name] == 1 else f"{path.parent.name}/{path.name}"
            for where, row in read_rows(path, dict.fromkeys(fields, "text"), name):
                yield split, where, row


def our_splits(files):
    """{their split: ours}. Validation is the test split where there is no other; one split alone, or a file, is divided by us (None)."""
    if set(files) <= {None, "train"}:
        return dict.fromkeys(files)
    if "train" not in files:
        raise cli.InputError(f"{' and '.join(files)} files found, but none named train*")
    return {"train": "train", "test": "test", "validation": "valid" if "test" in files else "test"}


# ---- the stage


def hash_source(path, files):
    """One hash of all files of a local copy: of a file its bytes, of a directory its files' names and bytes."""
    try:
        hashes = {
            str(file.relative_to(path)): run_dir.hash_file(file)
            for paths in files.values()
            for file in paths
        }
    except OSError as error:
        raise cli.InputError(f"{path}: cannot be read ({error.strerror})") from None
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


class Source:
    """The rows of a data set: the files are looked for once, when rows are first wanted, and can then be read again and again."""

    def __init__(self, args, data, flag="--source"):
        if args.source and args.revision:
            raise cli.InputError(
                f"--revision {args.revision}: a revision is the hub's, and {flag} is given"
            )
        self.args, self.data, self.flag = args, data, flag
        self.files = local_files(args.source) if args.source else None
        self.inputs = {
            "source": hash_source(args.source, self.files)
            if args.source
            else f"{data.hub}@{args.revision or 'newest'}"
        }
        self.facts = {"hub": data.hub, "commit": None, "rows": {}}  # for stats.json

    def rows(self):
        """(our split, where, row) in the order of the files. A number of rows that is not the published one is a warning."""
        if self.files is None:
            self.files, self.facts["commit"] = hub_files(self.data, self.args.revision, self.flag)
        names, counts = our_splits(self.files), dict.fromkeys(self.files, 0)
        for split, where, row in tqdm(
            read(self.files, self.data.fields),
            "data",
            sum(self.data.rows.values()),
            leave=False,
            unit="row",
            mininterval=1,
            disable=None,
        ):  # none where stderr is a file
            counts[split] += 1
            yield names[split], where, row
        if not any(counts.values()):
            raise cli.InputError(f"{self.args.source or self.data.hub}: no row found")
        if not self.facts["rows"]:
            self.facts["rows"] = {split or "all": count for split, count in counts.items()}
            published = (
                self.data.rows if None not in counts else {None: sum(self.data.rows.values())}
            )
            for split in counts | published:
                if counts.get(split, 0) != published.get(split, 0):
                    print(
                        f"data: warning: {counts.get(split, 0):,} rows found{f' in {split}' if split else ''}, {published.get(split, 0):,} published"
                    )


def prepare_published(args, data, comparisons, votes, paper, choices):
    """Read a published data set and turn it into RUN/data (pairwise/prepare/prompts.py).

    comparisons(rows, args): of (our split, where, row), the Comparison or the reason why there is none; votes: how they arose.
    paper: its figures; choices: {flag: every value}, what the paper leaves open: ours is recorded, and the figures under every other value
    stand beside the paper's too.
    """
    source = Source(args, data)

    def reading(**changed):
        return lambda: comparisons(source.rows(), Namespace(**(vars(args) | changed)))

    readings = {
        f"--{flag} {value}": (reading(**{flag: value}), value if flag == "ties" else args.ties)
        for flag, values in choices.items()
        for value in values
        if value != getattr(args, flag)
    }
    settings = {flag: getattr(args, flag) for flag in choices}
    prepare(
        args,
        data.name,
        reading(),
        votes,
        source.inputs,
        settings,
        paper,
        readings,
        {"source": source.facts},
    )
