"""A reward model: a base model with a scalar head, and the forward pass.

Parameters may be BF16; the head, the rewards and everything after them are float32.
"""

import argparse
import os
import time
from dataclasses import dataclass

from pairwise import bases, cli
from pairwise.scale import norms, packed, parallel, passes, rope

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification

DTYPES = ("bfloat16", "float32")  # in which a model can run


# ---- batches


def batches(sequences, tokens):
    """Yield the indices of sequences in batches of similar length, for padding.

    The longest times the count is at most `tokens`; a sequence that is longer alone is a batch.
    The longest come first, so that a lack of memory shows at once."""
    order = sorted(range(len(sequences)), key=lambda i: (-len(sequences[i]), i))
    while order:
        count = max(1, tokens // max(1, len(sequences[order[0]])))
        yield order[:count]
        order = order[count:]


def pad(sequences, pad_id, device):
    """Return ids and mask, int64 (n, longest), padded on the right; mask is 1 on real tokens."""
    longest = max(map(len, sequences))
    ids = torch.tensor([ids + [pad_id] * (longest - len(ids)) for ids in sequences])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in sequences])
    return ids.to(device), mask.to(device)


# ---- model


@dataclass
class RewardModel:
    """A reward model that is ready to score, and how its sequences are run."""

    model: torch.nn.Module  # transformers', with the head in float32 and dropout off
    packs: str | None = None  # how packed.py runs rows: "varlen" or "segments"; None: padded
    skips: int | None = None  # the token id that an existing decoder leaves unread at the end

    @property
    def head(self):
        """The scalar head, Linear (d -> 1), or (d -> K) where K rewards share the model."""
        return head(self.model)


def device(name=None):
    """argparse type: a device that is there, as a string; without a name, cuda where it is."""
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    name = name or ("cuda" if cards else "cpu")
    if name not in ("cpu", *(["cuda"] if cards else []), *(f"cuda:{i}" for i in range(cards))):
        numbered = f"cpu, cuda or cuda:0 to cuda:{cards - 1}"
        expected = numbered if cards else "cpu, as there is no cuda here,"
        raise argparse.ArgumentTypeError(f"{name} found, {expected} expected")
    return name


def add_flags(parser):
    """Add the flags of every script that runs a model."""
    add = parser.add_argument
    add("--chat-template", metavar="FILE", help="Jinja chat template, for a base without one")
    words = "CPU threads (default: OMP_NUM_THREADS, else all; of several processes, its share)"
    add("--threads", type=cli.threads, default=cli.default_threads(), help=words)
    words = "cpu or cuda (default: cuda where there is one)"
    add("--device", type=device, default=device(), help=words)


def settle(args):
    """Use the threads and the GPU asked for, and nothing that the seed does not decide."""
    torch.set_num_threads(args.threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # It would fill every new tensor first, in a kernel each; all are written before they are read.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cuda.matmul.allow_tf32 = False  # Some images of a GPU's maker set it.
    if args.device != "cpu":
        torch.cuda.set_device(torch.device(args.device).index or 0)


def add_tokens_flag(parser):
    """Add --micro-batch-tokens, whose default, None, stands for `default_tokens`."""
    usual = f"default {default_tokens('cuda')}; on a CPU {default_tokens('cpu')}"
    words = f"tokens run in one forward pass ({usual})"
    parser.add_argument("--micro-batch-tokens", type=cli.natural, help=words)


def default_tokens(device):
    """Return how many tokens are run in one forward pass where no flag says it."""
    return 1024 if device == "cpu" else 8192


def load_base(base, tokenizer, dtype, device, heads=1):
    """Return the base as a RewardModel: its token head dropped and `heads` scalar heads attached.

    Section 4 has it. Parameters are in dtype, the head in float32; its values are not drawn here:
    draw_head does. Raises InputError where the checkpoint lacks anything but the head."""
    options = {"num_labels": heads, "dtype": dtype, "pad_token_id": tokenizer.pad_token_id}
    model, missing = bases.read_model(AutoModelForSequenceClassification, base, "--base", **options)
    if head(model) is None:
        raise cli.InputError(
            f"--base {base}: {type(model).__name__} has no linear head called score or classifier; "
            "a decoder such as Llama, Mistral, Qwen or Gemma expected, or an encoder such as "
            "DeBERTa"
        )
    # An encoder's head is two layers, of which transformers draws the pooler's.
    own = {"score"} if hasattr(model, "score") else {"classifier", "pooler"}
    missing = [name for name in missing if not own & set(name.split("."))]
    if missing:
        words = "a checkpoint with all weights but the reward head's expected"
        names = ", ".join(missing[:5])
        raise cli.InputError(f"--base {base}: weights are missing: {names}; {words}")
    if head(model).bias is not None:  # It cancels in every comparison.
        head(model).bias.data.zero_()
        head(model).bias.requires_grad_(False)
    return ready(model, device)


def head(model):
    """Return the scalar head of a transformers model, Linear (d -> 1), or None.

    A decoder's is called score, an encoder's classifier."""
    layer = getattr(model, "score", None) or getattr(model, "classifier", None)
    return layer if isinstance(layer, torch.nn.Linear) else None


def ready(model, device, skips=None):
    """Return the RewardModel of a transformers model, on its device, set up to run packed rows.

    Its head is in float32 and its dropout off, in training too. Where it cannot be packed, rows
    are padded."""
    head(model).float()
    model.eval().to(device)
    for layer in model.modules():  # bitsandbytes' kernel for AVX512 passes no gradient on.
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    if model.device.type == "cuda":  # A CPU gains nothing, and keeps transformers' bits.
        norms.use_kernels(model)
    return RewardModel(model, packed.prepare(model) if hasattr(model, "score") else None, skips)


def draw_head(weight, config, seed):
    """Draw the weight of a reward head (1, d), or of K (K, d), anew.

    It is normal with the standard deviation with which the base itself was initialised."""
    generator = torch.Generator().manual_seed(seed)
    deviation = getattr(config.get_text_config(), "initializer_range", 0.02)
    weight.data.copy_(torch.randn(weight.shape, generator=generator) * deviation)


def last_hidden(model, ids, mask):
    """Return the hidden state of each sequence's last real token, float32 (n, d).

    model: transformers'; ids, mask (n, longest): padded on the right. Of an encoder, which pools
    in its own way, it is what its head sees."""
    if not hasattr(model, "score"):
        pooled = []
        with head(model).register_forward_pre_hook(
            lambda module, args: pooled.append(args[0].float()) or (args[0].float(),)
        ):
            model(input_ids=ids, attention_mask=mask)
        return pooled[0]
    hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return hidden[torch.arange(len(ids), device=ids.device), mask.sum(1) - 1].float()


def hidden_of_batch(reward_model, sequences):
    """Return what the head sees, float32 (n, d), with gradient; sequences: n lists of token ids."""
    model = reward_model.model
    groups = rope.apart(model.config.get_text_config(), sequences)
    if len(groups) > 1:
        hidden = [hidden_of_batch(reward_model, [sequences[i] for i in group]) for group in groups]
        return torch.cat(hidden)[np.argsort(np.concatenate(groups))]
    rope.reset(model)
    if reward_model.packs:
        return packed.last_hidden(model, sequences, reward_model.packs)
    return last_hidden(model, *pad(sequences, model.config.pad_token_id, model.device))


def rewards_of_batch(reward_model, sequences, tokens=None):
    """Return the rewards r_theta(x, y) of n lists of token ids, float32 (n,), of K heads (n, K),
    with gradient: the head on the last real token.

    They are run in one forward pass. Where that is more than `tokens` tokens, in several, each run
    again in the backward pass: a third more work, and memory for one of them."""
    if tokens is None or count_tokens(reward_model, sequences) <= tokens:
        return reward_model.head(hidden_of_batch(reward_model, sequences)).squeeze(-1)

    def run(own):
        return rewards_of_batch(reward_model, [sequences[i] for i in own])

    groups = list(batches_of(reward_model, sequences, tokens))
    return passes.in_several(run, groups, reward_model.model.device)


def count_tokens(reward_model, sequences):
    """Return the tokens that are run for these sequences together, padding included."""
    groups = rope.apart(reward_model.model.config.get_text_config(), sequences)
    of_groups = [[sequences[i] for i in group] for group in groups]
    if reward_model.packs:
        return sum(map(packed.count_tokens, of_groups))
    return sum(len(own) * max(map(len, own)) for own in of_groups)


def batches_of(reward_model, sequences, tokens):
    """Yield the indices of sequences in batches that run at most `tokens` tokens, largest first.

    A sequence that is longer alone is a batch."""
    for group in rope.apart(reward_model.model.config.get_text_config(), sequences):
        own = [sequences[i] for i in group]
        for batch in (packed.batches if reward_model.packs else batches)(own, tokens):
            yield [group[i] for i in batch]


def check_positions(reward_model, sequences, flag="--max-length "):
    """Raise InputError where a sequence is longer than the model has positions for, or has a token
    that it does not know. flag: of the script, that shortens them; "" where it has none."""
    check_tokens(reward_model.model, sequences)
    config, longest = reward_model.model.config.get_text_config(), max(map(len, sequences))
    positions = getattr(config, "max_position_embeddings", None)
    # DeBERTa's distances have no end.
    unbounded = getattr(config, "relative_attention", False) or rope.is_dynamic(config)
    if positions and longest > positions and not unbounded:
        raise cli.InputError(
            f"a prompt with its response has {longest} tokens, and the base has positions for "
            f"{positions}; {flag}{positions} or less expected"
        )


def check_tokens(model, sequences):
    """Raise InputError where a token id lies beyond the embedding of a transformers model."""
    known, largest = model.get_input_embeddings().weight.shape[0], max(map(max, sequences))
    if largest >= known:
        words = f"the tokenizer makes the token {largest}, and the model knows {known}"
        raise cli.InputError(f"{words}; a tokenizer made for this model expected")


@torch.no_grad()
def over_sequences(reward_model, function, sequences, tokens, label):
    """Return function(reward_model, sequences) for all sequences, float32 (n, ..), in their order.

    They are run in batches of at most `tokens` tokens. Equal sequences are computed once: apart,
    even in one batch, they can differ in the last bit, and then they would not tie. The batches
    are dealt to the processes, and all have the result. label None: no bar shows progress."""
    numbers = {}  # of the distinct sequences
    places = [numbers.setdefault(tuple(ids), len(numbers)) for ids in sequences]
    distinct = [list(ids) for ids in numbers]
    check_positions(reward_model, distinct, "")
    groups = parallel.of_first(lambda: list(batches_of(reward_model, distinct, tokens)))
    sizes = [sum(len(distinct[i]) for i in group) for group in groups]
    own = parallel.deal(groups, sizes)[parallel.rank()]
    computed, started, done = [], time.time(), 0
    options = {"desc": label, "unit": "response", "leave": False, "mininterval": 1}
    options["disable"] = label is None or parallel.rank() > 0
    with tqdm(total=sum(map(len, own)), **options) as bar:
        for group in own:
            batch = [distinct[i] for i in group]
            computed.append((group, function(reward_model, batch).cpu().numpy()))
            done += sum(map(len, batch))
            bar.update(len(group))
            bar.set_postfix_str(f"{done / (time.time() - started):,.0f} tokens/s", refresh=False)
    everywhere = [pair for pairs in parallel.gathered(computed) for pair in pairs]
    indices, values = map(np.concatenate, zip(*everywhere))
    return values[np.argsort(indices)][places]


def score_sequences(reward_model, sequences, tokens, label="score"):
    """Return the rewards of sequences, float32 (n,), of K heads (n, K), each scored once."""

    def last(ids):
        real = (i for i, token in enumerate(ids, 1) if token != reward_model.skips)
        return max(real, default=len(ids))

    sequences = [ids[: last(ids)] for ids in sequences]
    return over_sequences(reward_model, rewards_of_batch, sequences, tokens, label)


def features_of(reward_model, sequences, tokens, label="features"):
    """Return last-token hidden states, float32 (n, d): what a head on the frozen base sees."""
    if not hasattr(reward_model.model, "score"):
        raise cli.InputError(
            f"--train head: {type(reward_model.model).__name__} pools with weights of its own, "
            "which have to be trained; --train full, or a decoder, expected"
        )
    return over_sequences(reward_model, hidden_of_batch, sequences, tokens, label)


def score_features(features, weight):
    """Return rewards float32 (R,) of features float32 (R, d) under a head's weight (1, d), of K
    heads (K, d) rewards (R, K).

    It is not a matrix product, which can give equal rows unequal rewards."""
    features = torch.as_tensor(features)
    rewards = [(features * head).sum(1) for head in weight.detach().cpu()]
    return (rewards[0] if len(rewards) == 1 else torch.stack(rewards, 1)).numpy()
