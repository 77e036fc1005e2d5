"""Configs, tokenizers and models as transformers reads them: data alone, never code or pickles of a
checkpoint's own, and of the hub one commit. What cannot be read is one line.
"""

import contextlib
import re
import sys
from importlib.util import find_spec
from pathlib import Path

from pairwise import cli, files

import torch
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import AutoConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

# Our own progress bars say more, and what a checkpoint lacks is checked here instead of told.
transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()

# Buffers that older releases of transformers saved among a layer's weights.
BUFFERS = re.compile(r"rotary_emb|inv_freq|(attn|attention)\.(masked_)?bias$")


@contextlib.contextmanager
def readable(subject):
    """Make whatever a library raises inside an InputError that begins with `subject`.

    Of a broken file transformers, tokenizers, safetensors and peft raise anything, Exception itself
    too. A lack of memory, of which the file is innocent, is a MemoryError."""
    try:
        yield
    except cli.InputError:
        raise
    except Exception as error:
        reason = cli.first_line(error)
        if cli.lacks_memory(error):
            raise MemoryError(reason) from None
        if "trust_remote_code" in str(error):
            reason = "it needs code of its own, which is never run"
        elif not isinstance(error, (OSError, ValueError)):
            reason = f"{type(error).__name__}: {reason}"
        raise cli.InputError(f"{subject} ({reason})") from None


# ---- where a model is

# What a hub repository has beside code and weights; the weights are asked for by name.
DESCRIPTIONS = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
VOCABULARIES = ["tokenizer.json", "*.model", "vocab.*", "*.tiktoken"]  # one of them
INDEX = "model.safetensors.index.json"
SECONDS = 10  # until a hub that does not answer is given up


def pinned(name, named="--base", revision=None):
    """Return how a model is named from here on: a directory as it is, a hub id as ID@COMMIT.

    name: a directory, ID or ID@REVISION; revision: branch, tag or commit, `main` where there is
    none. The hub is asked only where its cache on this machine does not know the revision. named:
    what named it, for errors. Raises InputError where there is no such model."""
    if Path(name).is_dir():
        if revision:
            words = f"a revision is the hub's, and {named} {name} is a directory"
            raise cli.InputError(f"--revision {revision}: {words}")
        return name
    identifier, _, own = name.partition("@")
    if own and revision not in (None, own):
        raise cli.InputError(f"--revision {revision}: {named} {name} has another one")
    revision = revision or own or "main"
    try:
        validate_repo_id(identifier)
    except HFValidationError:
        raise cli.InputError(f"{named} {name}: no such directory") from None
    cache = _cache(identifier)
    if (cache / "snapshots" / revision).is_dir():
        return f"{identifier}@{revision}"
    if (ref := cache / "refs" / revision).is_file():
        return f"{identifier}@{ref.read_text(encoding='utf-8').strip()}"
    return f"{identifier}@{_ask(identifier, revision, named)}"


def _cache(identifier):
    """Return the directory of a hub id in the hub's cache on this machine, there or not."""
    return Path(constants.HF_HUB_CACHE) / f"models--{identifier.replace('/', '--')}"


def _ask(identifier, revision, named):
    """Return the commit of a revision as the hub knows it; raise InputError where it does not."""
    print(f"{named} {identifier}: asking the hub for revision {revision}", file=sys.stderr)
    snapshot = _cache(identifier) / "snapshots" / revision
    words = "no such directory, and the hub gave none of this name and revision"
    if snapshot.is_dir():
        words = f"{snapshot} is not complete, and the hub did not give the rest"
    words += "; of a gated model accept the licence there, then log in"
    with readable(f"{named} {identifier}: {words}"):
        return HfApi().model_info(identifier, revision=revision, timeout=SECONDS).sha


def place(name, named, weights=False):
    """Return the directory of a model, as of `pinned`, with its descriptions, and the weights if
    asked for.

    A snapshot in the hub's cache is completed from the hub, at its commit. Raises InputError where
    that fails, and where the checkpoint names weights outside its directory."""
    directory, identifier, commit = Path(name), None, None

    def complete(*downloads):
        _ask(identifier, commit, named)  # It says no at once where a download would try for long.
        with readable(f"{named} {name}: it could not be downloaded"):
            for allowed, ignored in downloads:
                options = {"allow_patterns": allowed, "ignore_patterns": ["*/*", *ignored]}
                snapshot_download(identifier, revision=commit, **options)

    if not directory.is_dir():
        identifier, commit = pinned(name, named).split("@")
        directory = _cache(identifier) / "snapshots" / commit
        configs = ("config.json", "tokenizer_config.json")
        has_vocabulary = any(any(directory.glob(pattern)) for pattern in VOCABULARIES)
        if not (has_vocabulary and all((directory / name).is_file() for name in configs)):
            last = [configs[-1]]  # With it a download that was broken off counts as complete.
            complete((DESCRIPTIONS, last), (last, []))
    for _ in range(2 if weights else 0):  # Then what the index names, once that is there.
        shards = weight_files(directory)
        if commit and not all((directory / shard).is_file() for shard in shards):
            complete(([*shards, INDEX], []))
    return directory


def weight_files(directory):
    """Return the names of a checkpoint's files of weights. Raises InputError where its index names
    others than safetensors of its directory."""
    index = directory / INDEX
    if not index.is_file():
        return ["model.safetensors"]
    shards = sorted({*files.read_json(index, {"weight_map": {str: str}})["weight_map"].values()})
    for shard in shards:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            words = f"{shard!r} found, a file of this directory, .safetensors, expected"
            raise cli.InputError(f"{index}: weight_map: {words}")
    return shards


# ---- what it is


def read(auto_class, name, named, failure, **options):
    """Return auto_class.from_pretrained(name, **options), of classes of transformers' own alone.

    name: as of `pinned`; named: what named it, for errors. Raises InputError, of the words of
    `failure`, where it cannot be read."""
    directory = place(name, named)
    with readable(f"{named} {name}: {failure}"):
        return auto_class.from_pretrained(directory, trust_remote_code=False, **options)


def config(name, named="--base", failure="no config could be read"):
    """Return the config of a model, hub id or directory; raise InputError where there is none."""
    found = read(AutoConfig, name, named, failure)
    check_layers(found, f"{named} {name}")
    return found


def check_layers(config, subject):
    """Raise InputError where a config has no layers, as nothing would then miss their weights."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", 1)
    if not isinstance(layers, int) or layers < 1:
        words = f"num_hidden_layers {layers!r} found, at least 1 expected"
        raise cli.InputError(f"{subject}: config.json: {words}")


def model(auto_class, name, named, failure, **options):
    """Return a transformers model, from safetensors alone, and the sorted names of the weights that
    its checkpoint lacks and of those that it has beside the model's.

    A weight of another shape counts as lacking. Raises InputError where it cannot be read."""
    check_quantized(config(name, named, failure), f"{named} {name}")
    directory = place(name, named, weights=True)
    if (directory / "adapter_config.json").exists():
        # transformers would load the model that the adapter names, wherever that is.
        words = "an adapter found; a model with all its weights, the adapter merged, expected"
        raise cli.InputError(f"{named} {name}: {words}")
    options |= {"use_safetensors": True, "output_loading_info": True}
    options["ignore_mismatched_sizes"] = True  # They are told with the names of what is missing.
    found, info = read(auto_class, name, named, failure, **options)
    check_layers(found.config, f"{named} {name}")
    missing = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    return found, sorted(missing), sorted(info["unexpected_keys"])


def of_layers(model, names):
    """Return those names of weights that belong to a layer, of a number that the model may not
    have, in a stack of layers that it has."""
    numbered = re.compile(r"(.+?)\.(\d+)\.")
    stacks = {match[1] for name, _ in model.named_parameters() if (match := numbered.match(name))}
    config = model.config.get_text_config()
    layers = getattr(config, "num_hidden_layers", 0)
    # Layers that predict later tokens, DeepSeek's say, follow in the same stack and are not run.
    later = range(layers, layers + (getattr(config, "num_nextn_predict_layers", None) or 0))
    own = []
    for name in names:
        match = numbered.match(name)
        if not match or BUFFERS.search(name) or int(match[2]) in later:
            continue
        if {match[1], f"{model.base_model_prefix}.{match[1]}"} & stacks:
            own.append(name)
    return own


# What reads quantized weights, by the quant_method of a config. MXFP4 (gpt-oss) needs nothing, and
# FP8 only on a GPU: elsewhere transformers takes them back to BF16.
PACKAGES = {
    "bitsandbytes": ("bitsandbytes",),
    "gptq": ("optimum", "gptqmodel"),
    "awq": ("gptqmodel",),
    "compressed-tensors": ("compressed-tensors",),
    "torchao": ("torchao",),
    "auto-round": ("auto-round",),
    "hqq": ("hqq",),
    "aqlm": ("aqlm",),
    "fp8": ("kernels",) if torch.cuda.is_available() else (),
}


def check_quantized(config, subject, train=None):
    """Raise InputError where the weights of a config's model are quantized in a way that nothing
    here can read, or where all of them are to be trained or written: train "full"."""
    if not (found := getattr(config, "quantization_config", None)):
        return
    found = found if isinstance(found, dict) else {"quant_method": found}
    method = found.get("quant_method", "bitsandbytes")  # Its first configs did not say so.
    subject = f"{subject}: its weights are quantized ({method})"
    if train == "full":
        words = "cannot be trained or saved; a base in BF16 or float32, or --train lora or head,"
        raise cli.InputError(f"{subject}, which {words} expected")
    if f"{method}" not in AUTO_QUANTIZATION_CONFIG_MAPPING | {"bitsandbytes": None}:
        # transformers would load them as if they were not, without their scales.
        raise cli.InputError(f"{subject} in a way that transformers cannot read")
    if lacking := [x for x in PACKAGES.get(method, ()) if not find_spec(x.replace("-", "_"))]:
        words = f"cannot be read without {' and '.join(lacking)}"
        raise cli.InputError(f"{subject} and {words}; pip install {' '.join(lacking)}")
