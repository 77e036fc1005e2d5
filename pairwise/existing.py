"""Existing reward models as members of a run: each is somebody's own, with its tokens and template.

member_0j/source.json: {model: hub id or directory, fingerprint: of its content, dtype, max_length};
beside it chat_template.jinja, where the model has no template of its own.
"""

from pairwise import bases, chats, cli, files, pretrained, provenance, run_dir
from pairwise import reward_model as rm

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification

SOURCE = {"model": str, "fingerprint": str, "dtype": str, "max_length": (int, type(None))}


def load_reward_model(name, tokenizer, dtype, device, named):
    """Return an existing reward model, hub id or directory, as a RewardModel, its head in float32.

    named: what named it, for errors. Raises InputError where it cannot be read, where weights are
    missing, and where its head has not one output."""
    options = {"dtype": dtype, "pad_token_id": tokenizer.pad_token_id}
    model, missing = bases.read_model(AutoModelForSequenceClassification, name, named, **options)
    if missing:
        words = f"{', '.join(missing[:5])}; a trained reward model expected, head and all"
        raise cli.InputError(f"{named} {name}: weights are missing: {words}")
    head = rm.head(model)
    if head is None or head.out_features != 1:
        wrong = f"{type(model).__name__} without a linear head"
        if head is not None:
            wrong = f"a head with {head.out_features} outputs"
        words = "a linear head with one output expected, called score or classifier"
        raise cli.InputError(f"{named} {name}: {wrong} found, {words}")
    # transformers reads a decoder before the last tokens that its own config calls padding.
    own_pad_id = pretrained.config(name, named).get_text_config().pad_token_id
    return rm.ready(model, device, own_pad_id if hasattr(model, "score") else None)


def read_source(directory):
    """Return {model, fingerprint, dtype, max_length, template} of a member's directory.

    template: a path, or None. Raises InputError where the model is gone, or is another than the
    one that scored the data."""
    path, template = directory / "source.json", directory / "chat_template.jinja"
    source = files.read_json(path, SOURCE)
    runs = directory.parent, directory.resolve().parent
    source["model"] = model = provenance.found(source, *runs, name="model")
    try:
        fingerprint = provenance.fingerprint(model)
    except (OSError, cli.InputError) as error:
        words = f"cannot be read any more; a changed path belongs there ({cli.first_line(error)})"
        raise cli.InputError(f"{path}: {model} {words}") from None
    if fingerprint != source["fingerprint"]:
        raise cli.InputError(f"{path}: {model} is another model than the one that scored the data")
    longest = source["max_length"]
    if source["dtype"] not in rm.DTYPES or (longest is not None and longest < 1):
        words = f"dtype {' or '.join(rm.DTYPES)}, and max_length at least 1 or null, expected"
        raise cli.InputError(f"{path}: {words}")
    return source | {"template": template if template.exists() else None}


def load(run, j, base, tokenizer, dtype, device):
    """Load member j; base: the model that its source.json names. The rest is as in members.Kind."""
    source = run / run_dir.member_name(j) / "source.json"
    return load_reward_model(base, tokenizer, dtype, device, f"{source}:")


def score(run, settings, questions, args):
    """Score with every member in its own tokens and template, as members.Kind says.

    All models are there before the first is run."""
    directories = [run / run_dir.member_name(j + 1) for j in range(run_dir.count_members(run))]
    rewards, sources = [], [read_source(directory) for directory in directories]
    asked, texts = [q.messages for q in questions], [q.responses for q in questions]
    for j, (directory, source) in enumerate(zip(directories, sources), 1):
        base, dtype = source["model"], getattr(torch, source["dtype"])
        tokenizer = chats.load_tokenizer(base, source["template"], f"{directory / 'source.json'}:")
        sequences, cut = chats.encode_counted(tokenizer, asked, texts, source["max_length"])
        bases.tell_cut(directory, cut, sequences)
        member, tokens = load(run, j, base, tokenizer, dtype, args.device), args.micro_batch_tokens
        rewards.append(rm.score_sequences(member, sequences, tokens, f"member {j}"))
        del member  # Two are too much for a card.
    return np.stack(rewards)
