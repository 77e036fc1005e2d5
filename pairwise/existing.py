"""Existing reward models as members of a run: each is somebody's own, with its tokens and template.

member_0j/source.json: {model: hub id or directory, fingerprint: of its content, dtype, max_length};
beside it chat_template.jinja, where the model has no template of its own.
"""

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from pairwise import cli, provenance, run_dir
from pairwise import reward_model as rm


def load_reward_model(name, tokenizer, dtype, device, named="--from"):
    """Return an existing reward model, hub id or directory, as a RewardModel, its head in float32.

    Its rewards are those that transformers gives a sequence alone. Raises InputError where it
    cannot be read, where weights are missing, and where its head has not one output; named: what
    named it, for errors."""
    options = {"dtype": dtype, "pad_token_id": tokenizer.pad_token_id}
    model, missing = rm.read_model(AutoModelForSequenceClassification, name, named, **options)
    if missing:
        raise cli.InputError(
            f"{named} {name}: weights are missing: {', '.join(missing[:5])}; a trained reward "
            "model expected, head and all"
        )
    head = rm.head(model)
    if head is None or head.out_features != 1:
        wrong = f"{type(model).__name__} without a linear head"
        if head is not None:
            wrong = f"a head with {head.out_features} outputs"
        raise cli.InputError(
            f"{named} {name}: {wrong} found, a linear head with one output expected, called score "
            "or classifier"
        )
    # transformers reads a decoder before the last tokens that its own config calls padding.
    own_pad_id = AutoConfig.from_pretrained(name).get_text_config().pad_token_id
    return rm.ready(model, device, own_pad_id if hasattr(model, "score") else None)


def read_source(directory):
    """Return {model, fingerprint, dtype, max_length, template} of a member's directory.

    template: a path, or None. Raises InputError where the model is gone, or is another than the
    one that scored the data."""
    path, template = directory / "source.json", directory / "chat_template.jinja"
    source = run_dir.read_json(path)
    model = source["model"]
    try:
        fingerprint = provenance.fingerprint(model)
    except (OSError, ValueError) as error:
        raise cli.InputError(
            f"{path}: {model} cannot be read any more; a changed path belongs there "
            f"({cli.first_line(error)})"
        ) from None
    if fingerprint != source["fingerprint"]:
        raise cli.InputError(f"{path}: {model} is another model than the one that scored the data")
    return source | {"template": template if template.exists() else None}


def score(directories, questions, args):
    """Return the rewards of members with these directories, float32 (K, R), as members.Kind says.

    All models are there before the first is run."""
    rewards = []
    sources = [read_source(directory) for directory in directories]
    for j, (directory, source) in enumerate(zip(directories, sources), 1):
        named, dtype = f"{directory / 'source.json'}:", getattr(torch, source["dtype"])
        tokenizer = rm.load_tokenizer(source["model"], source["template"], named)
        model = load_reward_model(source["model"], tokenizer, dtype, args.device, named)
        sequences = rm.encode_split(
            tokenizer,
            [question.messages for question in questions],
            [question.responses for question in questions],
            source["max_length"],
        )
        rewards.append(rm.score_sequences(model, sequences, args.micro_batch_tokens, f"member {j}"))
    return np.stack(rewards)
