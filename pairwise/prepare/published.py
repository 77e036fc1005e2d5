"""Published data sets: their rows, from the hub or from a local copy, by the same code.

`datasets` finds and downloads the files of a data set on the hub; pairwise/rows.py reads them, as
it reads a local copy. No script of a repository is ever run, and no type is guessed or changed on
the way: what is not in the expected form is an error that names file and row.
"""

import argparse
import hashlib
import json
import logging
from collections import Counter
from itertools import product
from pathlib import Path
from typing import NamedTuple

from pairwise import cli, manifest, rows
from pairwise.files import hash_file
from pairwise.prepare import prompts, tables

from tqdm import tqdm

THEIR_SPLITS = ("train", "validation", "test")  # as the files of a published data set name them
ENDINGS = ".parquet, .json or .jsonl"


class Published(NamedTuple):
    """What is known of a data set before it is read."""

    name: str  # of its script in data_prep/
    hub: str  # hub id
    options: dict  # of datasets.load_dataset: name, data_dir, data_files, revision
    files: str  # what to download by hand, for the message when the hub cannot be read
    rows: dict  # {split: published number of rows}
    fields: tuple  # the columns that are used
    beside: str = tables.PAPER  # whose figures are put beside ours


def parser(doc):
    """Return a Parser with the flags that every published data set has."""
    flags = cli.Parser(doc)
    add_source_flags(flags)
    prompts.add_flags(flags)
    return flags


def add_source_flags(flags):
    """Add --source and --revision to a parser."""
    source_help = (
        "a local copy instead of the hub: a .parquet, .json or .jsonl file, also .gz, or a "
        "directory, of which the files (or folders) named train*, validation* and test* are the "
        "splits"
    )
    flags.add_argument("--source", type=cli.path, metavar="PATH", help=source_help)
    newest = "the newest; the commit that was read is recorded"
    revision_help = f"commit, branch or tag on the hub (default: {newest})"
    flags.add_argument("--revision", help=revision_help)


# ---- files


def local_files(path):
    """Return {their split: [Path, ..]} of a directory; {None: [path]} of a file."""
    if not path.is_dir():
        return {None: [path]}
    files = {}
    stems = set()
    for file in sorted(path.rglob("*")):
        split = split_by_name(file.relative_to(path))
        if split and file.is_file() and readable(file):
            files.setdefault(split, []).append(file)
            stem = file.parent / file.name.split(".")[0]
            if stem in stems:
                several = "found in several forms, of which each would count"
                raise cli.InputError(f"{stem}.*: one file expected, {several}")
            stems.add(stem)
    if not files:
        names = "no file named train*, validation* or test* found"
        raise cli.InputError(f"{path}: {names}, with an ending {ENDINGS}, also .gz")
    return files


def split_by_name(file):
    """Return the split that a file, or else its innermost folder that does, names; or None.

    file is relative to the source. Files and folders with a dot before their names are hidden.
    """
    if any(name.startswith(".") for name in file.parts):
        return None
    names = product(reversed(file.parts), THEIR_SPLITS)
    return next((split for name, split in names if name.lower().startswith(split)), None)


def readable(file):
    """Tell whether a file has an ending that a published data set may have."""
    ending = (Path(file.stem) if file.suffix.lower() == ".gz" else file).suffix.lower()
    return ending in rows.READERS and ending != ".csv"


def hub_files(dataset, revision, flag):
    """Return ({their split: [Path, ..]}, commit) of a data set, downloaded into the hub's cache.

    flag: the script's flag for a local copy. Raises InputError where the hub cannot be read, with
    what to download by hand and the command to run then.
    """
    import datasets  # It takes seconds, so it is imported only where it is needed.

    # These would print a line for each of many attempts.
    for library in ("datasets", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    options = dataset.options | ({"revision": revision} if revision else {})
    print(f"data: asking the hub for {dataset.hub}")
    try:
        urls = datasets.load_dataset_builder(dataset.hub, **options).config.data_files
        urls = {str(split): list(urls[split]) for split in urls}
        files = datasets.DownloadManager().download(urls)
    except Exception as error:  # It may come from half a dozen libraries, down to the socket's.
        reason = f"{type(error).__name__}: {cli.first_line(error).rstrip('.')}"
        command = manifest.command_with(flag, "PATH", without="--revision")
        raise cli.InputError(
            f"{dataset.hub} could not be read from the hub ({reason}); download {dataset.files} "
            f"from https://huggingface.co/datasets/{dataset.hub} and run: {command}"
        ) from None
    commits = {url.split("@", 1)[1].split("/", 1)[0] for split in urls for url in urls[split]}
    paths = {split: [Path(file) for file in files[split]] for split in files}
    return paths, ", ".join(sorted(commits))


def read(files, fields):
    """Yield (their split, where, row) of every row of {their split: [Path, ..]}."""
    names = Counter(path.name for paths in files.values() for path in paths)
    for split, paths in files.items():
        for path in paths:
            if path.is_file() and not readable(path):
                expected = f"a file that ends in {ENDINGS}, also with .gz, expected"
                raise cli.InputError(f"{path}: {expected}")
            name = path.name if names[path.name] == 1 else f"{path.parent.name}/{path.name}"
            for where, row in rows.read_rows(path, dict.fromkeys(fields, "text"), name):
                yield split, where, row


def our_splits(files):
    """Return {their split: ours}.

    Validation is our test split where they have no other. One split alone, or a file, is divided by
    prompts.py: None.
    """
    if set(files) <= {None, "train"}:
        return dict.fromkeys(files)
    if "train" not in files:
        raise cli.InputError(f"{' and '.join(files)} files found, but none named train*")
    return {"train": "train", "test": "test", "validation": "valid" if "test" in files else "test"}


# ---- the stage


def hash_source(path, files):
    """Return one hash of all files of a local copy, by their names and bytes."""
    source_files = sum(files.values(), [])
    try:
        hashes = {str(file.relative_to(path)): hash_file(file) for file in source_files}
    except OSError as error:
        raise cli.InputError(f"{path}: cannot be read ({cli.reason(error)})") from None
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


class Source:
    """The rows of a data set. Its files are found when rows are first wanted, and read each time.

    inputs: {name: hash} for the manifest; facts: a dict for stats.json, filled by reading.
    """

    def __init__(self, args, dataset, flag="--source"):
        if args.source and args.revision:
            hubs = "a revision is the hub's"
            raise cli.InputError(f"--revision {args.revision}: {hubs}, and {flag} is given")
        self.args, self.dataset, self.flag = args, dataset, flag
        self.facts = {"hub": dataset.hub, "commit": None, "rows": {}}
        self.files, self.inputs = None, {"source": f"{dataset.hub}@{args.revision or 'newest'}"}
        if args.source:
            self.files = local_files(args.source)
            self.inputs = {"source": hash_source(args.source, self.files)}

    def rows(self):
        """Yield (our split, where, row) in the order of the files.

        A number of rows that is not the published one is a warning, the first time.
        """
        args, dataset, total = self.args, self.dataset, sum(self.dataset.rows.values())
        if self.files is None:
            self.files, self.facts["commit"] = hub_files(dataset, args.revision, self.flag)
        ours, counts = our_splits(self.files), dict.fromkeys(self.files, 0)
        # disable=None: no bar where stderr is a file.
        bar = {"leave": False, "unit": "row", "mininterval": 1, "disable": None}
        for split, where, row in tqdm(read(self.files, dataset.fields), "data", total, **bar):
            counts[split] += 1
            yield ours[split], where, row
        if not any(counts.values()):
            raise cli.InputError(f"{args.source or dataset.hub}: no row found")
        if not self.facts["rows"]:
            self.facts["rows"] = {split or "all": count for split, count in counts.items()}
            warn_of_rows(counts, {None: total} if None in counts else dataset.rows)


def warn_of_rows(counts, published):
    """Print a warning for each split whose number of rows is not the published one."""
    for split in counts | published:
        count, expected = counts.get(split, 0), published.get(split, 0)
        if count != expected:
            in_split = f" in {split}" if split else ""
            print(f"data: warning: {count:,} rows found{in_split}, {expected:,} published")


def prepare_published(args, dataset, comparisons, votes, paper, choices):
    """Read a published data set and turn it into RUN/data (pairwise/prepare/prompts.py).

    comparisons(source_rows, args) turns (our split, where, row) into Comparisons, or into the
    reasons why there is none; votes: how they arose. paper: the figures of dataset.beside. choices:
    {flag: every value} of what the paper leaves open: ours is recorded, and the figures under every
    other value are put beside the paper's too.
    """
    source = Source(args, dataset)

    def reading(**changes):
        changed_args = argparse.Namespace(**(vars(args) | changes))
        return lambda: comparisons(source.rows(), changed_args), changed_args.ties

    readings = {
        f"--{flag} {value}": reading(**{flag: value})
        for flag, values in choices.items()
        for value in values
        if value != getattr(args, flag)
    }
    shared = vars(parser("").parse_args(["--run", "RUN"]))
    own = {x: value for x, value in vars(args).items() if x in choices or x not in shared}
    settings = {x: str(value) if isinstance(value, Path) else value for x, value in own.items()}
    facts = {"source": source.facts, "beside": dataset.beside}
    beside = {"paper": paper, "readings": readings, "facts": facts}
    ours, _ = reading()
    prompts.prepare(args, dataset.name, ours, votes, source.inputs, settings, **beside)
