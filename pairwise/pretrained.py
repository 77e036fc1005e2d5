"""Configs, tokenizers and models as transformers reads them: data alone, never code or pickles of a
checkpoint's own. What cannot be read is one line.
"""

import contextlib
import re
from importlib.util import find_spec
from pathlib import Path

from pairwise import cli, files

import torch
from transformers import AutoConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils import find_adapter_config_file

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


def read(auto_class, name, named, failure, **options):
    """Return auto_class.from_pretrained(name, **options), of classes of transformers' own alone.

    name: hub id or directory; named: what named it, for errors. Raises InputError, of the words of
    `failure`, where it cannot be read."""
    with readable(f"{named} {name}: {failure}"):
        return auto_class.from_pretrained(name, trust_remote_code=False, **options)


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
    with readable(f"{named} {name}: {failure}"):
        if find_adapter_config_file(str(name)):
            # transformers would load the model that the adapter names, wherever that is.
            words = "an adapter found; a model with all its weights, the adapter merged, expected"
            raise cli.InputError(f"{named} {name}: {words}")
    index = Path(name) / "model.safetensors.index.json"
    if index.is_file():
        for shard in files.read_json(index, {"weight_map": {str: str}})["weight_map"].values():
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                words = f"{shard!r} found, a file of this directory, .safetensors, expected"
                raise cli.InputError(f"{index}: weight_map: {words}")
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
