"""What a run was made from: the content of its base model and its chat template, as hashes."""

import hashlib
from pathlib import Path

from pairwise import cli, files, pretrained


def fingerprint(base):
    """Return what identifies a base model's content: of a hub id, its name and commit.

    Of a directory it is a hash over its files; of files beyond 64 MiB, over size, beginning,
    middle and end, as all of it would take a minute a stage."""
    directory = Path(base)
    if not directory.is_dir():
        return f"{base}@{getattr(pretrained.config(base), '_commit_hash', None)}"
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.suffix in (".json", ".safetensors", ".bin", ".jinja", ".model") and path.is_file():
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

    A hub id and a local copy of it are not compared."""
    then = entry["inputs"]["base model"]
    if Path(base).is_dir() and "@" not in then and fingerprint(base) != then:
        raise cli.InputError(f"--base {base}: another base model than the run was made from")
    template = files.hash_file(chat_template) if chat_template else None
    if template != entry["inputs"].get("chat template"):
        other = "another" if "chat template" in entry["inputs"] else "none"
        raise cli.InputError(
            f"--chat-template {chat_template or 'is missing'}: the run was made with {other}"
        )
