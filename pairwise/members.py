"""The kinds of members that a run can have, one table: how each is saved, loaded and scored.

full       member_0j is a plain transformers directory, num_labels=1
lora       member_0j/adapter goes onto the base, the head among its tensors
head       member_0j/head.safetensors goes onto the base
joint      joint/ has K heads: a plain directory, num_labels=K, or the heads alone, for the base
existing   member_0j/source.json names somebody's reward model
imported   rewards computed elsewhere, without a model; in a run beside members of another kind
hardened   members.json has formulas of the rewards of another run's members
pruned     member_0j or joint are links into the run that it was made from
"""

import json
from collections.abc import Callable
from typing import NamedTuple

from pairwise import (
    bases,
    chats,
    cli,
    existing,
    files,
    levels,
    manifest,
    pretrained,
    provenance,
    run_dir,
)
from pairwise import reward_model as rm
from pairwise.scale import adapter

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification


class Question(NamedTuple):
    """A prompt with the responses that are to be scored."""

    prompt: str | list  # as it was given
    messages: list  # of {role, content}
    responses: list  # of str


class Kind(NamedTuple):
    """What can be done with a kind of member; None where it has no model, or no training makes it.

    save(trained, directory, tokenizer, base): write into a new directory what training made of the
    base: a RewardModel, or of heads on a frozen base their weight, float32 (K, d).
    load(run, j, base, tokenizer, dtype, device): return the RewardModel of member j.
    score(run, settings, questions, args): return the rewards of all members, float32 (K, R), of
    the R responses in the order of the questions, each encoded as in training. settings: those of
    the run's first member, its base as it is found now; args: with add_flags' flags.
    """

    save: Callable | None
    load: Callable | None
    score: Callable | None


# ---- files


def save_member(model, tokenizer, directory):
    """Write a transformers model and its tokenizer as a plain directory, with safetensors, that
    transformers 4 and 5 read alike."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    # transformers 4 reads rope_theta and torch_dtype at the top of the config, does not know the
    # tokenizer class that 5 writes, and has special tokens without a name of their own under the
    # older key, which 5 reads too.
    config = files.read_json(directory / "config.json", dict)
    rope = config.get("rope_parameters") or {}
    if sliding := rope.get("sliding_attention"):  # Gemma 3: one for each kind of layer
        rope, config["rope_local_base_freq"] = rope["full_attention"], sliding["rope_theta"]
    if "rope_theta" in rope:
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        scaled = scaling.get("rope_type", "default") != "default"
        config |= {"rope_theta": rope["rope_theta"], "rope_scaling": scaling if scaled else None}
    dtype = str(next(model.base_model.parameters()).dtype).removeprefix("torch.")
    config |= {"torch_dtype": dtype, "dtype": dtype}
    tokenizer_config = files.read_json(directory / "tokenizer_config.json", dict) | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if isinstance(tokenizer_config.get("extra_special_tokens"), list):
        unnamed = tokenizer_config.pop("extra_special_tokens")
        tokenizer_config["additional_special_tokens"] = unnamed
    for name, values in (("config.json", config), ("tokenizer_config.json", tokenizer_config)):
        (directory / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def save_full(trained, directory, tokenizer, base):
    save_member(trained.model, tokenizer, directory)


def save_lora(trained, directory, tokenizer, base):
    adapter.save(trained.model, base, directory / "adapter")
    save_template(tokenizer, directory)


def save_head(weight, directory, tokenizer, base):
    """Write the weight of a head alone: all that training it on a frozen base changes."""
    directory.mkdir(parents=True)
    save_file({"score.weight": weight.detach().cpu().contiguous()}, directory / "head.safetensors")
    save_template(tokenizer, directory)


def save_template(tokenizer, directory):
    """Write the chat template that a member was trained with beside it, to be read, not loaded."""
    template = tokenizer.chat_template
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


def save_joint(trained, directory, tokenizer, base):
    write = save_head if isinstance(trained, torch.Tensor) else save_full
    write(trained, directory, tokenizer, base)


# ---- load


def load_head(directory, width=None):
    """Return the weight of the head in a member's directory, float32 (1, d), of joint/ (K, d).

    Raises InputError where there is none, or where d is not `width`."""
    for path in sorted(directory.glob("*.safetensors")):
        with pretrained.readable(f"{path}: no head could be read"), safe_open(path, "pt") as file:
            for name in {"score.weight", "classifier.weight"} & set(file.keys()):
                weight = file.get_tensor(name).float()
                if weight.ndim != 2 or width not in (None, weight.shape[1]):
                    words = f"shape {tuple(weight.shape)} found, (heads, {width or 'd'}) expected"
                    raise cli.InputError(f"{path}: {name}: {words}")
                return weight
    raise cli.InputError(f"{directory}: no score.weight in its safetensors files")


def member_directory(run, j):
    """Return the directory of member j; raise InputError where it is missing."""
    directory = run / run_dir.member_name(j)
    if not directory.is_dir():
        raise cli.InputError(f"{directory}: no such directory")
    return directory


def load_directory(directory, base, tokenizer, dtype, device):
    """Return the RewardModel of a plain directory, or of a head alone put onto the base.

    Raises InputError where it is not what training wrote."""
    manifest.check(directory.parent, directory)
    if (directory / "head.safetensors").exists():
        reward_model = rm.load_base(base, tokenizer, dtype, device, len(load_head(directory)))
    else:
        failure = "the member could not be loaded"
        model, missing, unexpected = pretrained.model(
            AutoModelForSequenceClassification, directory, "member", failure, dtype=dtype
        )
        if missing or unexpected:
            raise cli.InputError(f"{directory}: weights missing {missing}, unexpected {unexpected}")
        if rm.head(model) is None:
            raise cli.InputError(f"{directory}: {type(model).__name__} without a linear head found")
        reward_model = rm.ready(model, device)
    # It was rounded to dtype.
    reward_model.head.weight.data.copy_(load_head(directory, reward_model.head.in_features))
    return reward_model


def load_own(run, j, base, tokenizer, dtype, device):
    """Load member j of a full or head run from its own directory."""
    directory = member_directory(run, j)
    reward_model = load_directory(directory, base, tokenizer, dtype, device)
    if (outputs := reward_model.head.out_features) != 1:
        raise cli.InputError(f"{directory}: a head with {outputs} outputs found, one expected")
    return reward_model


def load_lora(run, j, base, tokenizer, dtype, device):
    """Load member j of a lora run: the base with its adapters and head."""
    directory = member_directory(run, j)
    manifest.check(run, directory)
    reward_model = rm.load_base(base, tokenizer, dtype, device)
    adapter.load(reward_model.model, directory / "adapter")
    return reward_model


def load_one_of_joint(run, j, base, tokenizer, dtype, device):
    """Load member j of a joint run: the shared model with one of its heads."""
    reward_model = load_directory(run / "joint", base, tokenizer, dtype, device)
    model, head = reward_model.model, reward_model.head
    model.config.num_labels = model.num_labels = head.out_features = 1
    head.weight = torch.nn.Parameter(head.weight.detach()[j - 1 : j].clone())
    return reward_model


def load_member(run, j, base, tokenizer, dtype, device):
    """Return the RewardModel of member j, of a pruned run of the one that it was made from."""
    first = run_dir.first_with_model(run, j + 1) or 1
    kind = KINDS[run_dir.kind_of(run, beneath=True, j=first)]
    return kind.load(run, j, base, tokenizer, dtype, device)


# ---- score


def score_trained(run, settings, questions, args):
    """Score with the members of a trained run: one after the other, or in one pass over the model
    or the frozen base that they share."""
    base, dtype = settings["base"], getattr(torch, settings["dtype"])
    is_joint = run_dir.kind_of(run, beneath=True) == "joint"
    numbers = range(1, run_dir.count_members(run) + 1)
    directories = [run / "joint"] if is_joint else [member_directory(run, j) for j in numbers]
    of_base = settings["train"] != "full"
    source, named = (base, "--base") if of_base else (directories[0], "member")
    tokenizer = chats.load_tokenizer(source, args.chat_template, named, settings["date"])
    tokens = args.micro_batch_tokens
    asked, texts = [q.messages for q in questions], [q.responses for q in questions]
    sequences, cut = chats.encode_counted(tokenizer, asked, texts, settings["max_length"])
    bases.tell_cut(run, cut, sequences)
    options = base, tokenizer, dtype, args.device
    if settings["train"] == "head":
        manifest.check(run, *directories)
        frozen = rm.load_base(*options)
        width = frozen.head.in_features
        weight = torch.cat([load_head(directory, width) for directory in directories])
        features = rm.features_of(frozen, sequences, tokens)
        rewards = rm.score_features(features, weight).T
    elif is_joint:
        joint = load_directory(run / "joint", *options)
        rewards = rm.score_sequences(joint, sequences, tokens, "joint").T
    else:
        rewards = [
            rm.score_sequences(load_member(run, j, *options), sequences, tokens, f"member {j}")
            for j in numbers
        ]
    return np.ascontiguousarray(np.atleast_2d(rewards))


def score_hardened(run, settings, questions, args):
    """Score with the members of the run that was hardened, then apply the formulas."""
    source, formulas = levels.read_members(run)
    return levels.hardened(formulas, rewards_of_run(source, settings, questions, args))


def rewards_of_run(run, settings, questions, args):
    """Return every member's reward of every response, float32 (K, R), as Kind.score does.

    Raises InputError where one is not a finite number, or where there are more or fewer members
    than the run has rewards of."""
    kind = KINDS[run_dir.kind_of(run, beneath=True)]
    rewards = kind.score(run, settings, questions, args)
    if len(rewards) != (k := run_dir.count_members(run)):
        raise cli.InputError(f"{run}: {len(rewards)} members found, {k} expected, as in rewards/")
    if wrong := sorted({j + 1 for j in np.argwhere(~np.isfinite(rewards))[:, 0].tolist()}):
        raise cli.InputError(f"{run}: member {wrong[0]}: its rewards are not finite")
    return rewards


KINDS = {
    "full": Kind(save_full, load_own, score_trained),
    "lora": Kind(save_lora, load_lora, score_trained),
    "head": Kind(save_head, load_own, score_trained),
    "joint": Kind(save_joint, load_one_of_joint, score_trained),
    "existing": Kind(None, existing.load, existing.score),
    "imported": Kind(None, None, None),  # check_models says so.
    "hardened": Kind(None, None, score_hardened),
    "pruned": Kind(None, load_member, rewards_of_run),  # of the kind beneath
}


# ---- a trained run at work


def check_models(run, numbers=range(1, 100)):
    """Raise InputError where one of these members of the run has no model."""
    if alone := set(run_dir.imported(run)) & set(numbers):
        words = "has no model: its rewards were imported (extras/import_scores.py)"
        raise cli.InputError(f"{run}: member {min(alone)} {words}")


def add_flags(parser):
    """Add the flags of every script that puts a run's members to work."""
    add = parser.add_argument
    cli.add_run(parser, "a trained run directory")
    add("--base", help="the base model, where it is no longer where the run found it")
    rm.add_tokens_flag(parser)
    rm.add_flags(parser)


def open_run(args, needs_base=False):
    """Return the weights of all members, float64 (K,), and the run's settings, of member 1.

    The settings have the base as it is found now, where it is needed, and the run's date; args gets
    its micro_batch_tokens, where none were given. needs_base: to sample from.
    Raises InputError where members or weights are missing, or the base is another."""
    run = args.run
    args.micro_batch_tokens = args.micro_batch_tokens or rm.default_tokens(args.device)
    alpha = run_dir.read_weights(run, k := run_dir.count_members(run))
    run_dir.check_whole(run, k, "weights")
    if run_dir.kind_of(run, beneath=True) == "hardened":
        run = levels.read_members(run)[0]  # The run whose members the formulas are of.
        run_dir.check_whole(run, run_dir.count_members(run))
    check_models(run)
    kind = run_dir.kind_of(run, beneath=True)
    name = "joint" if kind == "joint" else run_dir.member_name(1)
    if kind not in KINDS or not (run / name).is_dir():
        words = f"no trained members found; a run directory with {name}/"
        raise cli.InputError(f"{run}: {words}, which its manifest.json has, expected")
    entry, base = manifest.entries(run)[name], None
    if kind == "existing":
        if needs_base and not args.base:
            words = "its members are existing models; --base, the model that samples the answers,"
            raise cli.InputError(f"{run}: {words} expected")
        if not needs_base and (args.base or args.chat_template):
            raise cli.InputError(
                "--base and --chat-template are for trained members; where those of "
                f"{run} are, each member's source.json says"
            )
    if needs_base or entry["settings"]["train"] in ("head", "lora"):
        base = args.base or provenance.found(entry, run, (run / name).resolve().parent)
        base = provenance.base_of(run, base)
    if kind != "existing" and (base or args.chat_template):
        # Otherwise a directory of all weights has base and template in it.
        provenance.check_base(entry, base, args.chat_template)
    return alpha, entry["settings"] | {"base": base, "date": provenance.date_of(run)}
