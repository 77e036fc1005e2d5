"""Features of a frozen base, and the cache in which runs share them.

In its last bits a feature depends on what else is in its forward pass. So the texts of a prompt,
those of all splits, distinct and sorted, are run apart from other prompts': under another split
their features are the same, and what the cache has is, to the bit, what would be computed.

    DIR/features/KEY/SHA-256.safetensors      float32 (n, d) by the hash of a prompt's n texts

A file is never changed, and one whose SHA-256 is not its name is not used.
"""

import contextlib
import hashlib
import json
import os
import platform
import sys
import time
from pathlib import Path

from pairwise import cli, files, manifest, pretrained
from pairwise import reward_model as rm

import numpy as np
import safetensors.numpy
import torch
import transformers
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

# What computes the features.
CODE = (
    *(f"pairwise/{name}.py" for name in ("bases", "features", "pretrained", "reward_model")),
    *(f"pairwise/scale/{name}.py" for name in ("norms", "packed", "passes", "rope")),
)
SECONDS = 60  # of work that a kill costs


def where():
    """Return the directory of the cache: in PAIRWISE_CACHE, else among the user's caches.

    It is None where PAIRWISE_CACHE is empty, and where the user has no home."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = os.path.expanduser(os.environ.get("PAIRWISE_CACHE", f"{home}/pairwise"))
    return None if path[:1] in ("", "~") else Path(path) / "features"


def key(args, tokenizer):
    """Return a hash of all that features depend on, to the bit, beside the texts of their prompt.

    The weights are read whole: others may differ from them in a single layer."""
    directory = pretrained.place(args.base, "--base", weights=True)
    paths = [directory / name for name in ("config.json", *pretrained.weight_files(directory))]
    parts = [files.hash_file(path) for path in paths if path.is_file()]
    parts += manifest.hash_code(*CODE).values()
    parts += [args.dtype, args.micro_batch_tokens, tokenizer.pad_token_id]
    parts += [torch.__version__, transformers.__version__]
    if args.device == "cpu":
        parts += [args.threads, *processor()]
    else:
        parts.append(torch.cuda.get_device_name(args.device))
    return hash_of(parts)


def hash_of(value):
    """Return the SHA-256 of a JSON value, in hex."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def processor():
    """Return what the kernel says of the kind of CPU, in sorted lines."""
    info, names = Path("/proc/cpuinfo"), ("model name", "flags", "CPU part", "Features")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return sorted({line for line in lines if line.startswith(names)}) or [platform.processor()]


def kept(directory, names):
    """Return {name: float32 (n, d)} of those of a set of names that are in a directory's files."""
    found = {}
    for path in sorted(directory.glob("[!.]*.safetensors")):  # not what `keep` is writing there
        try:
            with safe_open(path, "numpy") as file:
                if own := (names - found.keys()).intersection(file.keys()):
                    if files.hash_file(path) != path.stem:
                        raise ValueError
                    found |= {name: file.get_tensor(name) for name in own}
        except OSError:  # It cannot be read, or was removed meanwhile.
            continue
        except (ValueError, SafetensorError):
            print(f"{path}: damaged; its features are computed again", file=sys.stderr)
            with contextlib.suppress(OSError):  # of another user's file
                path.unlink()
    return found


def keep(directory, features):
    """Write {name: float32 (n, d)} as a new file of a directory; where that fails, say so."""
    content = safetensors.numpy.save(features)
    path = directory / f"{hashlib.sha256(content).hexdigest()}.safetensors"
    try:
        with files.replacing(path, hashed=False) as partial:
            partial.write_bytes(content)
    except cli.InputError as error:
        tqdm.write(f"warning: features are not kept: {error}", file=sys.stderr)


def compute(args, tokenizer, units, directory):
    """Return {name: float32 (n, d)} of {name: the n token sequences of a prompt}; each minute what
    is new goes into the directory, if there is one."""
    base = rm.load_base(args.base, tokenizer, getattr(torch, args.dtype), args.device)
    rm.check_positions(base, [ids for own in units.values() for ids in own])
    computed, new, since = {}, {}, time.time()
    # The longest first, so that a lack of memory shows at once.
    units = dict(sorted(units.items(), key=lambda unit: -max(map(len, unit[1]))))
    options = {"desc": "features", "unit": "response", "leave": False, "mininterval": 1}
    with tqdm(total=sum(map(len, units.values())), **options) as bar:
        for i, (name, own) in enumerate(units.items(), 1):
            new[name] = rm.features_of(base, own, args.micro_batch_tokens, None)
            bar.update(len(own))
            if time.time() - since > SECONDS or i == len(units):
                if directory:
                    keep(directory, new)
                computed, new, since = computed | new, {}, time.time()
    return computed


def of_texts(args, stage, texts, encoded, tokenizer):
    """Return {split: features float32 (R, d)}, one per response, and how many distinct responses
    to their prompts were in the cache, which a line tells.

    texts: stages.texts_of's; encoded: {split: their token ids, R lists}."""
    places, of_prompt = {}, {}  # {split: (prompt, token ids) of each response}, {prompt: its texts}
    for split, (messages, responses) in texts.items():
        prompts = [json.dumps(chat) for chat, own in zip(messages, responses) for _ in own]
        places[split] = list(zip(prompts, map(tuple, encoded[split])))
    for prompt, ids in sorted({place for own in places.values() for place in own}):
        of_prompt.setdefault(prompt, []).append(ids)
    names = {prompt: hash_of(own) for prompt, own in of_prompt.items()}
    directory, within, found, in_cache = where(), None, {}, 0
    if directory:
        within = directory / key(args, tokenizer)
        found = kept(within, set(names.values()))
        in_cache = sum(len(own) for x, own in of_prompt.items() if names[x] in found)
        words = f"{in_cache:,} of {sum(map(len, of_prompt.values())):,} responses from the cache"
        print(f"{stage.replace('_', ' of ')}: {words} {directory}", flush=True)
    lacking = {names[x]: own for x, own in of_prompt.items() if names[x] not in found}
    if lacking:
        found |= compute(args, tokenizer, lacking, within)
    rows = {}
    for prompt, own in of_prompt.items():
        rows |= {(prompt, ids): row for ids, row in zip(own, found[names[prompt]])}
    made = {split: np.stack([rows[place] for place in own]) for split, own in places.items()}
    return made, in_cache
