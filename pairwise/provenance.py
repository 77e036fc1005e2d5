"""What a run was made from: its base model, at one commit, and its chat template, at one date."""

import argparse
import datetime
import hashlib
import os
from pathlib import Path

from pairwise import chats, cli, files, manifest, pretrained
from pairwise.scale import parallel

# ---- what is meant


def day(text):
    """argparse type: a date, as YYYY-MM-DD."""
    try:
        return datetime.date.fromisoformat(text).isoformat()
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} found, YYYY-MM-DD expected") from None


def add_flags(parser):
    """Add the flags of open_base, beside the base itself and --chat-template."""
    add = parser.add_argument
    words = "branch, tag or commit of a base on the hub (default: the run's, else main)"
    add("--revision", help=words)
    words = "what a chat template writes as today (default: when the run was made)"
    add("--date", type=day, metavar="YYYY-MM-DD", help=words)


def base_of(run, base, revision=None, named="--base"):
    """Return a base as of pretrained.pinned: a hub id that the run knows, at the run's commit."""
    if not revision:
        known = [entry["inputs"].get("base model", "") for entry in manifest.entries(run).values()]
        base = next((name for name in known if name.startswith(f"{base}@")), base)
    return pretrained.pinned(base, named, revision)


def date_of(run, given=None):
    """Return the run's date, YYYY-MM-DD: what its first stage that has one gave to a chat template,
    else what is given, else when its data were made, else today."""
    entries = manifest.entries(run)
    dates = [entry["settings"]["date"] for entry in entries.values() if "date" in entry["settings"]]
    dates += [given, entries.get("data", {}).get("date"), datetime.date.today().isoformat()]
    return next(date for date in dates if date)


def open_base(args, named="--base"):
    """Return the tokenizer of args.base, and make args say what every stage of the run must.

    args.base becomes base_of's; args.date the day that the chat template writes as today, None
    where it writes none. Raises InputError where --date is another day than that, where the run's
    data have no texts, and where a base that the run itself has made was edited."""
    run, given = args.run, args.date
    stats = files.read_json(run / "data" / "stats.json", dict, {})
    if "no_prompts" in stats:  # of data_prep/votes.py
        words = "its data have ids in the place of prompts, on which no model is put"
        raise cli.InputError(f"{run}: {words}; data with prompts and responses expected")
    args.base, date = parallel.of_first(
        lambda: (base_of(run, args.base, args.revision, named), date_of(run, given))
    )
    place, home = Path(args.base).resolve(), run.resolve()
    if place.is_dir() and place.is_relative_to(home):
        manifest.check(run, run / place.relative_to(home))
    tokenizer = chats.load_tokenizer(args.base, args.chat_template, named, date)
    args.date = chats.date_in(tokenizer.chat_template)
    if given not in (None, args.date):
        words = f"in this run the chat template writes {args.date or 'no date'}"
        raise cli.InputError(f"--date {given}: {words}")
    words = f": its chat template writes {args.date} as today (--date)" if args.date else ""
    if words or not Path(args.base).is_dir():
        print(f"{named} {args.base}{words}")
    return tokenizer


# ---- where it is, as a run's files have it


def kept(path, run, name="base"):
    """Return {name: path, name_from_run: path} of a directory: absolute, and relative to the run.

    Either may move without the other. One in the run is ./PATH alone, a hub id as it is."""
    if not Path(path).is_dir():
        return {name: str(path)}
    absolute = Path(path).resolve()
    relative = os.path.relpath(absolute, run.resolve())
    if absolute.is_relative_to(run.resolve()):
        return {name: f"./{relative}"}
    return {name: str(absolute), f"{name}_from_run": relative}


def found(entry, *runs, name="base"):
    """Return where the directory of `kept` is now, or the hub id; what was kept, if nowhere.

    runs: where the run may be, as the members of a pruned one are links into another."""
    places = [run / entry[name] for run in runs] + [Path(entry[name])]
    places += [run / entry.get(f"{name}_from_run", entry[name]) for run in runs]
    return next((str(place) for place in places if place.is_dir()), entry[name])


# ---- what it consists of


def fingerprint(base):
    """Return what identifies a base model's content: of a hub id, ID@COMMIT.

    Of a directory it is a hash over its files; of files beyond 64 MiB, over size, beginning,
    middle and end, as all of it would take a minute a stage."""
    directory = Path(base)
    if not directory.is_dir():
        return pretrained.pinned(base)
    kinds = (".json", ".safetensors", ".bin", ".jinja", ".model")
    if not (directory / "tokenizer.json").exists():  # Where it is, nothing reads the older files.
        kinds += (".txt", ".tiktoken")
    return _digest([path for path in sorted(directory.iterdir()) if path.suffix in kinds])


def weights_of(base):
    """Return a hash over a base's files of weights, the same of a hub id and its local copy."""
    directory = pretrained.place(base, "--base", weights=True)
    return _digest([directory / name for name in pretrained.weight_files(directory)])


def _digest(paths):
    digest = hashlib.sha256()
    for path in paths:
        if path.is_file():
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with open(path, "rb") as file:
                for start in (0, size // 2, size - 2**20) if size > 2**26 else (0,):
                    file.seek(start)
                    digest.update(file.read(2**20 if size > 2**26 else size))
    return digest.hexdigest()


def base_hashes(base, chat_template):
    """Return {name: hash} of the base model and, where one is given, the chat template."""
    hashes = {"base model": fingerprint(base)}
    if chat_template:
        hashes["chat template"] = files.hash_file(chat_template)
    return hashes


def check_base(entry, base, chat_template):
    """Raise InputError where a manifest's entry names another base or template than is given now.

    base: None where none is needed. Of a hub id and a directory the weights are compared, where
    the entry has their hash."""
    then, weights = entry["inputs"]["base model"], entry.get("base_weights")
    now = fingerprint(base) if base else then
    if ("@" in then) != ("@" in now):
        then, now = weights, weights and weights_of(base)
    if then != now:
        of = f" ({commit})" if "@" in (commit := entry["inputs"]["base model"]) else ""
        words = f"another base model than the run was made from{of}"
        raise cli.InputError(f"--base {base}: {words}")
    template = files.hash_file(chat_template) if chat_template else None
    if template != entry["inputs"].get("chat template"):
        other = "another" if "chat template" in entry["inputs"] else "none"
        raise cli.InputError(
            f"--chat-template {chat_template or 'is missing'}: the run was made with {other}"
        )
