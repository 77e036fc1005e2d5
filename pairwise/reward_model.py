"""A reward model: base model with a scalar head, one encode() for every use, and the forward pass. Parameters may be BF16;
head, rewards and everything after them are float32."""

import argparse
import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.utils import logging as transformers_logging

from pairwise import cli, run_dir
from pairwise.scale import adapter, packed, parallel

transformers_logging.disable_progress_bar()  # ours say more, and what is missing from a checkpoint is checked here, not told
transformers_logging.set_verbosity_error()

PAD_NAMES = (
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_0|>",
    "<|pad|>",
    "<pad>",
    "[PAD]",
    "<|endoftext|>",
    "<unk>",
)


# ---- tokens


def load_tokenizer(base, chat_template=None, named="--base"):
    """The base's tokenizer with a chat template, right padding and a pad token of its own, never eos: spare or reserved tokens serve.

    base: hub id or directory; chat_template: file with a Jinja template for a base that has none; named: what named the base, for errors.
    Raises InputError where the base cannot be read, has no chat template and none is given, or has no token that can pad.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise cli.InputError(
            f"{named} {base}: no tokenizer could be loaded: a directory made by save_pretrained, or a hub id that can be "
            f"reached (gated models: accept the licence on the hub, then log in), expected ({cli.first_line(error)})"
        ) from None
    if chat_template:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise cli.InputError(f"--chat-template {chat_template}: {error}") from None
    if not tokenizer.chat_template:
        raise cli.InputError(
            f"{named} {base} has no chat template; name a Jinja file with --chat-template FILE"
        )
    taken = {tokenizer.eos_token, tokenizer.bos_token, None}
    vocabulary = tokenizer.get_vocab()
    spare = [
        name
        for name in (tokenizer.pad_token, *PAD_NAMES)
        if name not in taken and name in vocabulary
    ]
    if not spare:
        raise cli.InputError(
            f"{named} {base}: its pad token is its eos token, and no spare one was found among {', '.join(PAD_NAMES)}"
        )
    tokenizer.pad_token = spare[0]
    tokenizer.padding_side = "right"
    try:
        encode(tokenizer, [{"role": "user", "content": "a question"}], "an answer")
    except cli.InputError as error:
        named = f"--chat-template {chat_template}" if chat_template else f"{named} {base}"
        raise cli.InputError(f"{named}: {error}") from None
    return tokenizer


def encode(tokenizer, messages, response=None, max_length=None):
    """Token ids (list of int) of a prompt and a response, or of a prompt ready to be answered (response None).

    messages: [{role, content}, ..]; exactly one BOS where the tokenizer has one. Longer than max_length: tokens are cut from the
    left, of the prompt first and then of the response, never its end; the BOS stays.
    """
    chat = messages if response is None else [*messages, {"role": "assistant", "content": response}]
    try:
        ids = tokenizer.apply_chat_template(
            chat, tokenize=True, return_dict=True, add_generation_prompt=response is None
        )["input_ids"]
    except jinja2.TemplateError as error:
        raise cli.InputError(
            f"the chat template fails ({cli.first_line(error)}) on turns of {', '.join(message['role'] for message in chat)}"
        ) from None
    bos = [tokenizer.bos_token_id]
    lead = next(i for i in range(len(ids) + 1) if ids[i : i + 1] != bos)
    if not lead and tokenizer("").input_ids[:1] != bos:
        bos = []  # neither the template nor the tokenizer begins with one
    body = ids[lead:]
    if max_length:
        body = body[max(0, len(body) - (max_length - len(bos))) :]
    return bos + body


def encode_split(tokenizer, messages, responses, max_length):
    """Token ids of every distinct response with its prompt, in data order: list of R lists.

    messages (P,): the prompts; responses (P,): lists of str.
    """
    return [
        encode(tokenizer, context, text, max_length)
        for context, texts in zip(messages, responses)
        for text in texts
    ]


def batches(sequences, tokens):
    """Indices of sequences in batches of similar length, longest first (out of memory shows at once): longest times count <= tokens."""
    order = sorted(range(len(sequences)), key=lambda i: (-len(sequences[i]), i))
    while order:
        count = max(1, tokens // max(1, len(sequences[order[0]])))
        yield order[:count]
        order = order[count:]


def pad(sequences, pad_id, device):
    """ids, mask: int64 (batch, longest), padded on the right; mask is 1 on real tokens."""
    longest = max(len(ids) for ids in sequences)
    ids = torch.tensor([ids + [pad_id] * (longest - len(ids)) for ids in sequences])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in sequences])
    return ids.to(device), mask.to(device)


# ---- model


@dataclass
class RewardModel:
    """A reward model that is ready to score, and how its sequences are run.

    model: transformers' *ForSequenceClassification, its head float32, dropout off.
    packs: "varlen" or "segments", how scale/packed.py runs sequences in one row; None: they are padded.
    skips: the token id that an existing decoder's reward is read before, where a sequence ends with it; None: there is none.
    """

    model: torch.nn.Module
    packs: str | None = None
    skips: int | None = None

    @property
    def head(self):
        """The scalar head, Linear (d -> 1), or (d -> K) of a jointly trained run."""
        return head(self.model)

    @property
    def device(self):
        """The torch.device of its parameters."""
        return next(self.model.parameters()).device


def device(name=None):
    """argparse type: a device that is there, as a string; without a name, cuda where there is one."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = name.split(":")[0]
    if kind not in ("cpu", "cuda") or kind == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(
            f"{name} found, {'cpu or cuda' if torch.cuda.is_available() else 'cpu, as there is no cuda here,'} expected"
        )
    return name


def add_flags(parser):
    """The flags of every script that runs a model."""
    add = parser.add_argument
    add("--chat-template", metavar="FILE", help="Jinja chat template, for a base without one")
    add(
        "--threads",
        type=cli.natural,
        default=max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))),
        help="CPU threads (default: all; of several processes, of each its share)",
    )
    add(
        "--device",
        type=device,
        default=device(),
        help="cpu or cuda (default: cuda where there is one)",
    )


def load_base(base, tokenizer, dtype, device, heads=1):
    """The base with its token-prediction head dropped and a scalar head attached (section 4), or several, in dtype; the head in float32.

    The head's values are not drawn here: draw_head does. Raises InputError where the checkpoint lacks anything but the head.
    """
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            base,
            num_labels=heads,
            dtype=dtype,
            pad_token_id=tokenizer.pad_token_id,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (
        OSError,
        ValueError,
        AssertionError,
    ) as error:  # AssertionError: a pad token outside the embedding
        raise cli.InputError(
            f"--base {base}: the model could not be loaded ({cli.first_line(error)})"
        ) from None
    if head(model) is None:
        raise cli.InputError(
            f"--base {base}: {type(model).__name__} has no linear head called score or classifier; a decoder such as Llama, Mistral, Qwen or Gemma "
            "expected, or an encoder such as DeBERTa"
        )
    missing = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])} - {
        "score.weight"
    }  # a head of another shape is dropped too
    if not hasattr(
        model, "score"
    ):  # an encoder's head is two layers: its pooler's are drawn by transformers
        missing = {name for name in missing if not {"classifier", "pooler"} & set(name.split("."))}
    if missing:
        raise cli.InputError(
            f"--base {base}: weights are missing: {', '.join(sorted(missing)[:5])}; a checkpoint with all weights but the reward head's expected"
        )
    if head(model).bias is not None:  # it cancels in every comparison
        head(model).bias.data.zero_()
        head(model).bias.requires_grad_(False)
    return ready(model, device)


def load_reward_model(name, tokenizer, dtype, device, named="--from"):
    """An existing reward model, hub id or directory, as it is, head in float32; its rewards are those that transformers gives a sequence alone.

    Raises InputError where it cannot be read, where weights are missing, and where its head has not one output; named: what named it, for errors.
    """
    try:
        own = AutoConfig.from_pretrained(name).get_text_config().pad_token_id
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name,
            dtype=dtype,
            pad_token_id=tokenizer.pad_token_id,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, AssertionError) as error:
        raise cli.InputError(
            f"{named} {name}: the model could not be loaded ({cli.first_line(error)})"
        ) from None
    missing = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if missing:
        raise cli.InputError(
            f"{named} {name}: weights are missing: {', '.join(missing[:5])}; a trained reward model expected, head and all"
        )
    if head(model) is None or head(model).out_features != 1:
        found = (
            f"a head with {head(model).out_features} outputs"
            if head(model)
            else f"{type(model).__name__} without a linear head"
        )
        raise cli.InputError(
            f"{named} {name}: {found} found, a linear head with one output expected, called score or classifier"
        )
    # transformers reads a decoder before the last tokens that its config calls padding
    return ready(model, device, own if hasattr(model, "score") else None)


def load_language_model(base, device):
    """The base as it is, to sample text from: in BF16 on a GPU, in float32 on a CPU."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=torch.float32 if device == "cpu" else torch.bfloat16,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise cli.InputError(
            f"--base {base}: no causal language model could be loaded ({cli.first_line(error)})"
        ) from None
    if info[
        "missing_keys"
    ]:  # a reward model has no head for tokens, and would be given a random one
        raise cli.InputError(
            f"--base {base}: no causal language model: weights are missing: {', '.join(sorted(info['missing_keys'])[:5])}"
        )
    return model.eval().to(device)


def head(model):
    """The scalar head, Linear (d -> 1): a decoder's is called score, an encoder's classifier; None where there is none."""
    found = getattr(model, "score", None) or getattr(model, "classifier", None)
    return found if isinstance(found, torch.nn.Linear) else None


def ready(model, device, skips=None):
    """The RewardModel of a transformers model: on its device, head in float32, dropout off (in training too), set up to run
    packed rows, or padded ones."""
    head(model).float()
    model.eval().to(device)
    return RewardModel(model, packed.prepare(model) if hasattr(model, "score") else None, skips)


def load_member(run, j, base, tokenizer, dtype, device):
    """Reward model j of a run: its directory, or the base with the head or the adapters that were trained on it, or the base itself (--from)."""
    directory = run / f"member_{j:02d}"
    if (run / "joint").is_dir() and not (directory / "config.json").exists():
        joint = load_joint(run, base, tokenizer, dtype, device)
        weight = load_head(run / "joint")[j - 1 : j]
        joint.model.config.num_labels = joint.model.num_labels = 1
        joint.head.weight, joint.head.out_features = torch.nn.Parameter(weight.to(device)), 1
        return joint
    if (directory / "source.json").exists():
        return load_reward_model(base, tokenizer, dtype, device, f"{directory / 'source.json'}:")
    if (directory / "adapter").is_dir():
        reward_model = load_base(base, tokenizer, dtype, device)
        adapter.load(reward_model.model, directory / "adapter")
        return reward_model
    if (directory / "head.safetensors").exists():
        reward_model = load_base(base, tokenizer, dtype, device)
        reward_model.head.weight.data.copy_(load_head(directory))
        return reward_model
    if not directory.is_dir():
        raise cli.InputError(f"{directory}: no such directory")
    model, info = AutoModelForSequenceClassification.from_pretrained(
        directory, num_labels=1, dtype=dtype, output_loading_info=True
    )
    if info["missing_keys"] or info["unexpected_keys"]:
        raise cli.InputError(
            f"{directory}: weights missing {info['missing_keys']}, unexpected {info['unexpected_keys']}"
        )
    head(model).float().weight.data.copy_(
        load_head(directory)
    )  # the loader has rounded it to dtype
    return ready(model, device)


def load_joint(run, base, tokenizer, dtype, device):
    """All rewards of a jointly trained run in one model, whose forward pass gives (n, K): run/joint, or the base with the heads of its frozen features."""
    directory, weight = run / "joint", load_head(run / "joint")
    if (directory / "head.safetensors").exists():
        reward_model = load_base(base, tokenizer, dtype, device, len(weight))
    else:
        reward_model = ready(
            AutoModelForSequenceClassification.from_pretrained(directory, dtype=dtype), device
        )
    reward_model.head.weight.data.copy_(weight)
    return reward_model


def draw_head(weight, config, seed):
    """Draw a reward head's weight (1, d), or several (K, d), anew, normal with the base's own initial standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    weight.data.copy_(
        torch.randn(weight.shape, generator=generator) * getattr(config, "initializer_range", 0.02)
    )


def last_hidden(model, ids, mask):
    """Of a transformers model, padded: hidden state of each sequence's last real token, float32 (batch, d); padding is on the right. Of an encoder, what its head sees."""
    if not hasattr(model, "score"):
        seen = []  # an encoder pools in its own way before its head
        with head(model).register_forward_pre_hook(
            lambda module, args: seen.append(args[0].float()) or (args[0].float(),)
        ):
            model(input_ids=ids, attention_mask=mask)
        return seen[0]
    hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return hidden[torch.arange(len(ids), device=ids.device), mask.sum(1) - 1].float()


def rewards_of(reward_model, ids, mask):
    """Rewards float32 (batch,): r_theta(x, y), the head on the last real token."""
    return reward_model.head(last_hidden(reward_model.model, ids, mask)).squeeze(-1)


def hidden_of_batch(reward_model, sequences):
    """What the head sees, float32 (n, d), with gradient: packed where the base allows it, else padded. sequences: n lists of token ids."""
    model = reward_model.model
    if reward_model.packs:
        return packed.last_hidden(model, sequences, reward_model.packs)
    return last_hidden(model, *pad(sequences, model.config.pad_token_id, reward_model.device))


def rewards_of_batch(reward_model, sequences, tokens=None):
    """Rewards float32 (n,), or (n, K) of K heads, with gradient, of n lists of token ids in one forward pass.

    Where that is more than `tokens` tokens, in several, each run again in the backward pass: a third more work, and memory for one of them.
    """
    if tokens is None or count_tokens(reward_model, sequences) <= tokens:
        return reward_model.head(hidden_of_batch(reward_model, sequences)).squeeze(-1)
    anchor = torch.empty(0, device=reward_model.device, requires_grad=torch.is_grad_enabled())
    parts = list(batches_of(reward_model, sequences, tokens))
    return InParts.apply(anchor, reward_model, sequences, parts)


class InParts(torch.autograd.Function):
    """Rewards float32 (n,) of sequences in parts; backward() runs each part again and goes through it at once, so that gradients are added up
    part by part, in float32 (Offload), and the graph of one part is there at a time. anchor: any tensor that wants a gradient."""

    @staticmethod
    def forward(ctx, anchor, reward_model, sequences, parts):
        ctx.reward_model, ctx.sequences, ctx.parts = reward_model, sequences, parts
        rewards = [rewards_of_batch(reward_model, [sequences[i] for i in part]) for part in parts]
        return torch.cat(rewards)[np.argsort(np.concatenate(parts))]

    @staticmethod
    def backward(ctx, grad):
        for part in ctx.parts:
            with torch.enable_grad():
                rewards = rewards_of_batch(ctx.reward_model, [ctx.sequences[i] for i in part])
                rewards.backward(grad[part])
        return None, None, None, None


def count_tokens(reward_model, sequences):
    """Tokens that one forward pass over these sequences runs, padding included."""
    if reward_model.packs:
        return packed.count_tokens(sequences)
    return len(sequences) * max(map(len, sequences))


def check_positions(reward_model, sequences):
    """Raise InputError where a sequence is longer than the model has positions for."""
    config, longest = reward_model.model.config.get_text_config(), max(map(len, sequences))
    most = getattr(config, "max_position_embeddings", None)
    if (
        most and longest > most and not getattr(config, "relative_attention", False)
    ):  # DeBERTa's distances have no end
        raise cli.InputError(
            f"a prompt with its response has {longest} tokens, and the base has positions for {most}; --max-length {most} or less expected"
        )


def batches_of(reward_model, sequences, tokens):
    """Indices of sequences in batches that run at most `tokens` tokens each, largest first; a sequence that is longer alone is a batch."""
    return (packed.batches if reward_model.packs else batches)(sequences, tokens)


@torch.no_grad()
def over_sequences(reward_model, function, sequences, tokens, label):
    """function(reward_model, sequences) for all of them, in batches that run at most `tokens` tokens: float32 (sequences, ..), in their order.

    Equal sequences are computed once: apart, even in one batch, they can differ in the last bit, and then they would not tie. The batches are
    dealt to the processes, and all have the result.
    """
    numbers = {}
    places = [numbers.setdefault(tuple(ids), len(numbers)) for ids in sequences]
    sequences = [list(ids) for ids in numbers]
    check_positions(reward_model, sequences)
    parts = list(batches_of(reward_model, sequences, tokens))
    mine = parallel.deal(parts, [sum(len(sequences[i]) for i in part) for part in parts])[
        parallel.rank()
    ]
    found, started, done = [], time.time(), 0
    with tqdm(
        total=sum(map(len, mine)),
        desc=label,
        unit="response",
        leave=False,
        mininterval=1,
        disable=parallel.rank() > 0,
    ) as bar:
        for batch in mine:
            values = function(reward_model, [sequences[i] for i in batch])
            found.append((batch, values.cpu().numpy()))
            done += sum(len(sequences[i]) for i in batch)
            bar.update(len(batch))
            bar.set_postfix_str(f"{done / (time.time() - started):,.0f} tokens/s", refresh=False)
    found = [pair for theirs in parallel.gathered(found) for pair in theirs]
    out = np.empty((len(sequences), *found[0][1].shape[1:]), np.float32)
    for batch, values in found:
        out[batch] = values
    return out[places]


def score_sequences(reward_model, sequences, tokens, label="score"):
    """Rewards float32 (sequences,), each sequence scored once."""
    sequences = [
        ids[
            : max(
                (i + 1 for i, token in enumerate(ids) if token != reward_model.skips),
                default=len(ids),
            )
        ]
        for ids in sequences
    ]
    return over_sequences(reward_model, rewards_of_batch, sequences, tokens, label)


def features_of(reward_model, sequences, tokens, label="features"):
    """Last-token hidden states float32 (sequences, d): what a reward head on the frozen base sees."""
    if not hasattr(reward_model.model, "score"):
        raise cli.InputError(
            f"--train head: {type(reward_model.model).__name__} pools with weights of its own, which have to be trained; --train full, or a decoder, expected"
        )
    return over_sequences(reward_model, hidden_of_batch, sequences, tokens, label)


# ---- checkpoints


def save_member(model, tokenizer, directory):
    """Write a plain AutoModelForSequenceClassification directory (num_labels=1, safetensors) that transformers 4 and 5 read alike."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    # transformers 4 does not know the tokenizer class that 5 writes, and reads rope_theta and torch_dtype at the top of the config.
    config = json.loads((directory / "config.json").read_text())
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        config["rope_scaling"] = (
            scaling if scaling.get("rope_type", "default") != "default" else None
        )
    config["torch_dtype"] = config["dtype"] = str(
        next(model.base_model.parameters()).dtype
    ).removeprefix("torch.")
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    path = directory / "tokenizer_config.json"
    described = json.loads(path.read_text()) | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    path.write_text(json.dumps(described, indent=2) + "\n")


def save_head(weight, directory):
    """Write the head's weight alone, as head.safetensors: all that training a head on a frozen base changes."""
    directory.mkdir(parents=True)
    save_file({"score.weight": weight.detach().cpu().contiguous()}, directory / "head.safetensors")


def load_head(directory):
    """The head's weight, float32 (1, d), of joint/ (K, d), from a member's directory of either kind."""
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in {"score.weight", "classifier.weight"} & set(file.keys()):
                return file.get_tensor(name).float()
    raise cli.InputError(f"{directory}: no score.weight in its safetensors files")


def score_features(features, weight):
    """Rewards float32 (R,) of features float32 (R, d) under a head's weight float32 (1, d)."""
    return (
        (features * weight).sum(1).numpy()
    )  # not a matrix product, which can give equal rows unequal rewards


def fingerprint(base):
    """What identifies a base model's content: of a directory a hash over its files (of files beyond 64 MiB, over size, beginning, middle
    and end: all of it would take a minute a stage), of a hub id its name and commit."""
    directory = Path(base)
    if not directory.is_dir():
        return f"{base}@{getattr(AutoConfig.from_pretrained(base), '_commit_hash', None)}"
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.suffix in (".json", ".safetensors", ".bin", ".jinja", ".model"):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with open(path, "rb") as file:
                for start in (0, size // 2, size - 2**20) if size > 2**26 else (0,):
                    file.seek(start)
                    digest.update(file.read(2**20 if size > 2**26 else size))
    return digest.hexdigest()


def base_hashes(base, chat_template):
    """{name: hash} of the base model and, where one is given, the chat template: what a stage that runs the base was made from."""
    return {"base model": fingerprint(base)} | (
        {"chat template": run_dir.hash_file(chat_template)} if chat_template else {}
    )


def read_source(directory):
    """{model, fingerprint, dtype, max_length, template} of a member that is an existing model; template: a path, or None.

    Raises InputError where the model is gone, or is another than the one that scored the data.
    """
    path, template = directory / "source.json", directory / "chat_template.jinja"
    source = run_dir.read_json(path)
    try:
        found = fingerprint(source["model"])
    except (OSError, ValueError) as error:
        raise cli.InputError(
            f"{path}: {source['model']} cannot be read any more; a changed path belongs there ({cli.first_line(error)})"
        ) from None
    if found != source["fingerprint"]:
        raise cli.InputError(
            f"{path}: {source['model']} is another model than the one that scored the data"
        )
    return source | {"template": template if template.exists() else None}


def check_base(entry, base, chat_template):
    """Raise InputError where a member's manifest entry names another base or chat template than it is given now.

    A hub id and a local copy of it are not compared.
    """
    was = entry["inputs"]["base model"]
    if Path(base).is_dir() and "@" not in was and fingerprint(base) != was:
        raise cli.InputError(f"--base {base}: another base model than the run was made from")
    template = run_dir.hash_file(chat_template) if chat_template else None
    if template != entry["inputs"].get("chat template"):
        raise cli.InputError(
            f"--chat-template {chat_template or 'is missing'}: the run was made with {'another' if 'chat template' in entry['inputs'] else 'none'}"
        )
