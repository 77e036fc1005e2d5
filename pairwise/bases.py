"""From a checkpoint to a model: of a composite one the text side alone. One that has a reward head
already is reported, and never used to write text.
"""

import functools
import re
import sys

from pairwise import cli, pretrained
from pairwise.scale import parallel

from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
)

# Weights of heads that score, of transformers, TRL and others.
HEADS = re.compile(
    r"(\w+\.)?(score|classifier|rewards?|regression_layer|"
    r"(\w+_)?(v|rm|value|reward|score|regression|critic)_head)\."
)
MODELS = re.compile("Classification|Reward|Score|Critic")  # their classes
# What the weights of a text side are called in a composite checkpoint, and alone.
TEXT_NAMES = {
    r"^language_model\.lm_head\.": "lm_head.",
    r"^(?:model\.)?language_model\.(?:model\.)?": "model.",
}


def read_model(auto_class, name, named, failure="the model could not be loaded", **options):
    """Return a transformers model, and the sorted names of weights that its checkpoint lacks.

    A weight of another shape counts as lacking. Weights that the model has no use for are named on
    stderr, as is a head where num_labels asks for a new one. Of a composite model, a reward model
    is its text side alone. name: as of pretrained.pinned; named: what named it, for errors. Raises
    InputError where the checkpoint cannot be read, where it has more of the model's layers than are
    used, and where a reward model is to write text."""
    rewards, anew = auto_class is AutoModelForSequenceClassification, "num_labels" in options
    if rewards:
        config = pretrained.config(name, named, failure)
        text = text_side(config, f"{named} {name}")
        if text is not config:
            for key in {"num_labels", "pad_token_id"} & options.keys():
                setattr(text, key, options.pop(key))
            options |= {"config": text, "key_mapping": TEXT_NAMES}
    model, missing, unused = pretrained.model(auto_class, name, named, failure, **options)
    if "key_mapping" in options:  # It is saved by the names that it has alone.
        vars(model).pop("_weight_conversions", None)
    if layers := pretrained.of_layers(model, unused):
        words = f"{len(layers)} weights of layers found that its config.json does not use"
        raise cli.InputError(f"{named} {name}: {words}: {', '.join(layers[:3])}")
    heads = [key for key in unused if HEADS.match(key)]
    heads += [key for key in model.state_dict() if HEADS.match(key) and key not in missing]
    saved_as = [each for each in model.config.architectures or () if MODELS.search(each)]
    if found := ", ".join((heads + saved_as)[:1]):
        words = f"{named} {name}: a reward model found ({found})"
        if not rewards:
            raise cli.InputError(f"{words}, which writes no text; a language model expected")
        if anew:
            say_once(f"{words}; its head is not used, a new one is made")
    if rewards:  # It predicts no token.
        unused = [key for key in unused if not key.startswith("lm_head.")]
    if unused:
        words = f"{len(unused)} weights are not used: {', '.join(unused[:3])}"
        say_once(f"{named} {name}: {words}{' ..' * (len(unused) > 3)}")
    return model, missing


def text_side(config, subject):
    """Return the config of the text side of a composite model, such as Gemma 3 from 4B, whose
    weights have TEXT_NAMES; of any other model, its own.

    Raises InputError where transformers has no reward model of that side."""
    if "text_config" not in config.sub_configs:
        return config
    text = config.get_text_config()
    if type(text) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        words = f"{type(config).__name__} found, and transformers has no reward model of its text"
        raise cli.InputError(f"{subject}: {words} side; a model of text alone expected")
    for key in ("num_labels", "architectures", "quantization_config"):
        if hasattr(config, key):
            setattr(text, key, getattr(config, key))
    return text


def check_trainable(base, train):
    """Raise InputError where a base, as of pretrained.pinned, cannot be trained by --train."""
    config, subject = pretrained.config(base), f"--base {base}"
    pretrained.check_quantized(config, subject, train)
    text_side(config, subject)


def tell_cut(subject, cut, texts):
    """Say how many of the texts were cut to the --max-length of a training; nothing if none was."""
    if cut:
        say_once(f"{subject}: {cut:,} of {len(texts):,} texts cut to its --max-length")


@functools.cache
def say_once(words):
    """Write a line to stderr, once, and of several processes from the first alone."""
    if parallel.rank() == 0:
        print(words, file=sys.stderr)
