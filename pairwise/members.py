"""The kinds of members that a run can have, one table: how each is saved, loaded and scored.

full       member_0j is a plain transformers directory, num_labels=1
lora       member_0j/adapter goes onto the base, the head among its tensors
head       member_0j/head.safetensors goes onto the base
joint      joint/ has K heads: a plain directory, num_labels=K, or the heads alone, for the base
existing   member_0j/source.json names somebody's reward model
hardened   members.json has formulas of the rewards of another run's members
pruned     member_0j or joint are links into the run that it was made from
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pairwise import cli, existing, levels, provenance, run_dir
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
    """What can be done with a kind of member; None where no training makes it, or it has no model.

    save(trained, directory, tokenizer, base): write into the directory, which it makes, what
    training made of the base: a RewardModel, or of heads on a frozen base their weight, float32
    (1, d), of a joint run (K, d).
    load(run, j, base, tokenizer, dtype, device): return the RewardModel of member j.
    score(run, settings, questions, args): return the rewards of all members, float32 (K, R), of
    the R responses in the order of the questions, each encoded as in training. settings: those of
    the run's first member, its base as it is found now; args: with add_arguments' flags.
    """

    save: Callable | None
    load: Callable | None
    score: Callable


# ---- files


def save_member(model, tokenizer, directory):
    """Write a transformers model and its tokenizer as a plain directory, with safetensors, that
    transformers 4 and 5 read alike."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    # transformers 4 reads rope_theta and torch_dtype at the top of the config, and does not know
    # the tokenizer class that 5 writes.
    config = run_dir.read_json(directory / "config.json")
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        scaled = scaling.get("rope_type", "default") != "default"
        config |= {"rope_theta": rope["rope_theta"], "rope_scaling": scaling if scaled else None}
    dtype = str(next(model.base_model.parameters()).dtype).removeprefix("torch.")
    config |= {"torch_dtype": dtype, "dtype": dtype}
    described = run_dir.read_json(directory / "tokenizer_config.json") | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    for name, values in (("config.json", config), ("tokenizer_config.json", described)):
        (directory / name).write_text(json.dumps(values, indent=2) + "\n")


def save_head(weight, directory):
    """Write the weight of a head alone: all that training it on a frozen base changes."""
    directory.mkdir(parents=True)
    save_file({"score.weight": weight.detach().cpu().contiguous()}, directory / "head.safetensors")


def load_head(directory):
    """Return the weight of the head in a member's directory, float32 (1, d), of joint/ (K, d)."""
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in {"score.weight", "classifier.weight"} & set(file.keys()):
                return file.get_tensor(name).float()
    raise cli.InputError(f"{directory}: no score.weight in its safetensors files")


def member_directory(run, j):
    """Return the directory of member j; raise InputError where it is missing."""
    directory = run / run_dir.member_name(j)
    if not directory.is_dir():
        raise cli.InputError(f"{directory}: no such directory")
    return directory


# ---- load


def load_full(run, j, base, tokenizer, dtype, device):
    """Load member j of a full run: a plain directory; base and tokenizer are not needed."""
    directory = member_directory(run, j)
    model, info = AutoModelForSequenceClassification.from_pretrained(
        directory, num_labels=1, dtype=dtype, output_loading_info=True
    )
    missing, unexpected = info["missing_keys"], info["unexpected_keys"]
    if missing or unexpected:
        raise cli.InputError(f"{directory}: weights missing {missing}, unexpected {unexpected}")
    rm.head(model).float().weight.data.copy_(load_head(directory))  # It was rounded to dtype.
    return rm.ready(model, device)


def load_lora(run, j, base, tokenizer, dtype, device):
    """Load member j of a lora run: the base with its adapters and head."""
    reward_model = rm.load_base(base, tokenizer, dtype, device)
    adapter.load(reward_model.model, member_directory(run, j) / "adapter")
    return reward_model


def load_frozen(run, j, base, tokenizer, dtype, device):
    """Load member j of a head run: the base with its head."""
    weight = load_head(member_directory(run, j))
    reward_model = rm.load_base(base, tokenizer, dtype, device)
    reward_model.head.weight.data.copy_(weight)
    return reward_model


def load_joint(run, base, tokenizer, dtype, device):
    """Load all members of a joint run: one RewardModel whose rewards are (n, K)."""
    directory, weight = run / "joint", load_head(run / "joint")
    if (directory / "head.safetensors").exists():
        reward_model = rm.load_base(base, tokenizer, dtype, device, len(weight))
    else:
        model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=dtype)
        reward_model = rm.ready(model, device)
    reward_model.head.weight.data.copy_(weight)
    return reward_model


def load_one_of_joint(run, j, base, tokenizer, dtype, device):
    """Load member j of a joint run: the shared model with one of its heads."""
    reward_model = load_joint(run, base, tokenizer, dtype, device)
    model, head = reward_model.model, reward_model.head
    model.config.num_labels = model.num_labels = head.out_features = 1
    head.weight = torch.nn.Parameter(head.weight.detach()[j - 1 : j].clone())
    return reward_model


# ---- score


def encode_questions(source, settings, questions, args):
    """Return the tokenizer of `source`, a base or a plain directory, and the token ids of all
    responses."""
    tokenizer = rm.load_tokenizer(source, args.chat_template)
    chats, texts = [q.messages for q in questions], [q.responses for q in questions]
    return tokenizer, rm.encode_split(tokenizer, chats, texts, settings["max_length"])


def score_each(run, settings, questions, args):
    """Score with the members of a full or lora run, one after the other."""
    base, dtype = settings["base"], getattr(torch, settings["dtype"])
    source = member_directory(run, 1) if settings["train"] == "full" else base
    tokenizer, sequences = encode_questions(source, settings, questions, args)
    rewards, tokens = [], args.micro_batch_tokens
    for j in range(1, run_dir.count_members(run) + 1):
        reward_model = load_member(run, j, base, tokenizer, dtype, args.device)
        rewards.append(rm.score_sequences(reward_model, sequences, tokens, f"member {j}"))
    return np.stack(rewards)


def score_frozen(run, settings, questions, args):
    """Score with the heads of a head run: they share one pass over the base."""
    numbers = range(1, run_dir.count_members(run) + 1)
    weights = [load_head(member_directory(run, j)) for j in numbers]
    return score_heads(torch.cat(weights), settings, questions, args)


def score_heads(weights, settings, questions, args):
    """Score with K heads on the frozen base; weights: float32 (K, d)."""
    base, dtype = settings["base"], getattr(torch, settings["dtype"])
    tokenizer, sequences = encode_questions(base, settings, questions, args)
    reward_model = rm.load_base(base, tokenizer, dtype, args.device)
    features = torch.from_numpy(rm.features_of(reward_model, sequences, args.micro_batch_tokens))
    return np.stack([rm.score_features(features, weight[None]) for weight in weights])


def score_joint(run, settings, questions, args):
    """Score with all heads of a joint run in one pass."""
    if settings["train"] == "head":
        return score_heads(load_head(run / "joint"), settings, questions, args)
    tokenizer, sequences = encode_questions(run / "joint", settings, questions, args)
    dtype = getattr(torch, settings["dtype"])
    reward_model = load_joint(run, settings["base"], tokenizer, dtype, args.device)
    rewards = rm.score_sequences(reward_model, sequences, args.micro_batch_tokens, "joint")
    return np.ascontiguousarray(rewards.T)


def score_hardened(run, settings, questions, args):
    """Score with the members of the run that was hardened, then apply the formulas."""
    source, formulas = levels.read_members(run)
    return levels.hardened(formulas, rewards_of_run(source, settings, questions, args))


# ---- the table


def save_full(reward_model, directory, tokenizer, base):
    save_member(reward_model.model, tokenizer, directory)


def save_lora(reward_model, directory, tokenizer, base):
    adapter.save(reward_model.model, base, directory / "adapter")


def save_frozen(weight, directory, tokenizer, base):
    save_head(weight, directory)


def save_joint(trained, directory, tokenizer, base):
    save = save_frozen if isinstance(trained, torch.Tensor) else save_full
    save(trained, directory, tokenizer, base)


def load_member(run, j, base, tokenizer, dtype, device):
    """Return the RewardModel of member j, of a pruned run of the one that it was made from."""
    kind = KINDS[run_dir.kind_of(run, beneath=True)]
    return kind.load(run, j, base, tokenizer, dtype, device)


def rewards_of_run(run, settings, questions, args):
    """Return every member's reward of every response, float32 (K, R), as Kind.score does."""
    return KINDS[run_dir.kind_of(run, beneath=True)].score(run, settings, questions, args)


KINDS = {
    "full": Kind(save_full, load_full, score_each),
    "lora": Kind(save_lora, load_lora, score_each),
    "head": Kind(save_frozen, load_frozen, score_frozen),
    "joint": Kind(save_joint, load_one_of_joint, score_joint),
    "existing": Kind(None, existing.load, existing.score),
    "hardened": Kind(None, None, score_hardened),
    "pruned": Kind(None, load_member, rewards_of_run),
}


# ---- a trained run at work


def add_arguments(parser):
    """Add the flags of every script that puts a run's members to work."""
    add = parser.add_argument
    add("--run", required=True, type=Path, help="a trained run directory")
    add("--base", help="the base model, where it is no longer where the run found it")
    tokens, words = 8192 if torch.cuda.is_available() else 1024, "tokens run in one forward pass"
    add("--micro-batch-tokens", type=cli.natural, default=tokens, help=words)
    rm.add_flags(parser)


def open_run(args, samples=False):
    """Return the weights of all members, float64 (K,), and the run's settings, of member 1.

    The settings have the base as it is found now. samples: the base itself is needed too, to
    sample from. Raises InputError where members or weights are missing, or the base is another."""
    run = args.run
    alpha = run_dir.read_weights(run, run_dir.count_members(run))
    if run_dir.kind_of(run, beneath=True) == "hardened":
        run = levels.read_members(run)[0]  # The run whose members the formulas are of.
    kind = run_dir.kind_of(run, beneath=True)
    name = "joint" if kind == "joint" else run_dir.member_name(1)
    if kind not in KINDS or not (run / name).is_dir():
        raise cli.InputError(
            f"{run}: no trained members found; a run directory with {name}/ expected"
        )
    entry = run_dir.read_json(run / "manifest.json")["stages"][name]
    base = args.base or (str(run / "base") if (run / "base").is_dir() else entry["base"])
    if kind == "existing" and samples and not args.base:
        raise cli.InputError(
            f"{run}: its members are existing models; --base, the model that samples the answers, "
            "expected"
        )
    if kind == "existing" and not samples and (args.base or args.chat_template):
        raise cli.InputError(
            "--base and --chat-template are for trained members; where those of "
            f"{run} are, each member's source.json says"
        )
    # A directory of all weights has base and template in it.
    needs_base = samples or args.chat_template or entry["settings"]["train"] != "full"
    if kind != "existing" and needs_base:
        provenance.check_base(entry, base, args.chat_template)
    return alpha, entry["settings"] | {"base": base}
