"""Part f of benchmarks/card.py: what small models compute on the card, and its linear algebra.

Packed rows against one sequence alone and against padding, for every kind of attention; paged
optimizer state against resident; which kernel packing has chosen; how fast matrices are decomposed
and multiplied, and how fast the link is.
"""

import copy
from functools import partial
from types import SimpleNamespace

from pairwise import reward_model as rm
from pairwise import training

import numpy as np
import torch
from card_meter import product_rate, seconds_of
from transformers import (
    AutoModelForSequenceClassification,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 2000
# Allowed differences: of rewards from one sequence alone, of gradients packed from padded.
ALLOWED = {torch.float32: (2e-5, 1e-4), torch.bfloat16: (0.03, 0.05)}
PAGING_STEPS, SMALL_STEPS = 14, 7  # with new bases after every fifth


def kinds(small):
    """Return {name: config}; windows are shorter than the sequences."""
    width, window = 64 if small else 512, {"sliding_window": 16 if small else 64}
    shape = {
        "vocab_size": VOCABULARY,
        "pad_token_id": 0,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2 if small else 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
        "num_labels": 1,
    }
    wide = shape | {"head_dim": width // 8}
    return {
        "llama": LlamaConfig(**shape),
        "qwen2": Qwen2Config(**shape),
        "qwen3": Qwen3Config(**wide),
        "mistral, window": MistralConfig(**wide, **window),
        "gemma2": Gemma2Config(**wide, **window),
        "gemma3": Gemma3TextConfig(**wide, **window),
    }


def build(card, config, dtype):
    """Return a RewardModel with random weights."""
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    with torch.device(card.device):
        model = AutoModelForSequenceClassification.from_config(
            config, dtype=dtype, trust_remote_code=False
        )
    model.score.weight.data.normal_(0, 0.05)
    return rm.ready(model, card.device)


def sequences(small):
    """Return 18 lists of token ids; of six each the beginning is the same."""
    rng, scale = np.random.default_rng(0), 4 if small else 1

    def tokens(least, most):
        return rng.integers(1, VOCABULARY, rng.integers(least, most) // scale).tolist()

    shared = [tokens(40, 90) for _ in range(3)]
    return [prompt + tokens(20, 200) for prompt in shared for _ in range(6)]


def gradient(model, ids):
    """Return rewards (n,) and the layers' gradients of their squares' sum, as one vector."""
    model.model.zero_grad()
    rewards = rm.rewards_of_batch(model, ids)
    rewards.square().sum().backward()
    layers = model.model.base_model.layers.parameters()
    return rewards.detach(), torch.cat([p.grad.float().flatten() for p in layers])


def packing(card, config, dtype):
    """Return how rows are packed, and how far rewards and gradients are from other ways."""
    model, ids = build(card, config, dtype), sequences(card.small)
    packs = model.packs
    rewards, packed = gradient(model, ids)
    model.packs = None
    padded_rewards, padded = gradient(model, ids)
    with torch.no_grad():
        alone = torch.cat([rm.rewards_of_batch(model, [each]) for each in ids])

    def distance(a, b):
        return ((a - b).norm() / b.norm()).item()

    return {
        "packs": packs,
        "packed_from_alone": distance(rewards, alone),
        "padded_from_alone": distance(padded_rewards, alone),
        "gradients_packed_from_padded": distance(packed, padded),
    }


def check_packing(card):
    """Keep packing's numbers for every kind in both dtypes; return what is wrong."""
    found, wrong = {}, []
    for name, config in kinds(card.small).items():
        for dtype in ALLOWED:
            key, (reward, slope) = f"{name}, {str(dtype)[6:]}", ALLOWED[dtype]
            found[key] = packing(card, config, dtype)
            # Gemma 2 caps its scores, which no kernel does: it attends by segments, in both.
            varlen = card.device == "cuda" and (dtype == torch.bfloat16 or name == "gemma2")
            right = found[key]["packs"] == ("varlen" if varlen else "segments")
            right = right and found[key]["packed_from_alone"] < reward
            if not (right and found[key]["gradients_packed_from_padded"] < slope):
                wrong.append(key)
            card.keep(packing=found)
    return wrong


def parameters_after(card, budget):
    """Train in BF16 with the optimizer in `budget` bytes; return (parameters, its Offload)."""
    model = build(card, kinds(card.small)["llama"], torch.bfloat16)
    options = {"lr": 1e-3, "weight_decay": 0.1, "precondition_frequency": 5}
    args = SimpleNamespace(**options, max_precondition_dim=1024)
    optimizer = training.make_optimizer(training.parameter_groups(model.model), args, budget)
    # Of more than 128 keys attention's kernel adds up gradients in an order that has to be fixed.
    rng, lengths = np.random.default_rng(0), (10, 60) if card.small else (300, 700)
    for _ in range(SMALL_STEPS if card.small else PAGING_STEPS):
        ids = [rng.integers(1, VOCABULARY, rng.integers(*lengths)).tolist() for _ in range(8)]
        goals = torch.linspace(-1, 1, 8, device=card.device)
        loss = (rm.rewards_of_batch(model, ids) - goals).square().mean()
        with training.in_one_order():
            loss.backward()
        optimizer.step(1e-3)
    optimizer.close()
    return torch.cat([p.detach().float().flatten() for p in model.model.parameters()]), optimizer


def check_paging(card):
    """Keep whether paging changes a bit; return what is wrong."""
    resident, optimizer = parameters_after(card, None)
    whole, count = optimizer.nbytes, len(optimizer.params)
    found, wrong = {"parameters": count}, []
    for name, budget in {"resident": None, "all paged": 0, "some paged": whole * 3 // 4}.items():
        parameters, optimizer = parameters_after(card, budget)
        paged, equal = len(optimizer.paged), torch.equal(parameters, resident)
        found[name] = {"paged": paged, "equal": equal}
        expected = {"resident": paged == 0, "all paged": paged == count}
        if not (equal and expected.get(name, 0 < paged < count)):
            wrong.append(name)
    card.keep(paging=found)
    return wrong


def linear_algebra(card):
    """Return seconds of decompositions, TFLOP/s of products, and GB/s of the link."""
    device, sides = card.device, (32, 64) if card.small else (1024, 4096)
    seconds, rates = {"qr": {}, "eigh": {}}, {}
    for side in sides:
        x = torch.randn(side, side, device=device)
        seconds["qr"][side] = seconds_of(device, partial(torch.linalg.qr, x), 5)
        seconds["eigh"][side] = seconds_of(device, partial(torch.linalg.eigh, x @ x.T), 2)
    largest, allowed = sides[-1], torch.backends.cuda.matmul.allow_tf32
    for name, tf32 in {"float32": False, "tf32": True}.items():
        torch.backends.cuda.matmul.allow_tf32 = tf32
        rates[name] = product_rate(device, torch.float32, largest) / 1e12
    torch.backends.cuda.matmul.allow_tf32 = allowed
    rates["bfloat16"] = product_rate(device, torch.bfloat16, 2 * largest) / 1e12
    found = {"seconds": seconds, "tflops": rates}
    return found | ({"gb_a_second": link()} if device == "cuda" else {})


def link():
    """Return GB/s between card and pinned memory, one way and both ways at once, and of pinning."""
    nbytes = 2**30
    host = [torch.empty(nbytes // 4, pin_memory=True) for _ in range(2)]
    there = [torch.empty(nbytes // 4, device="cuda") for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]

    def copy_up():
        there[0].copy_(host[0], non_blocking=True)

    def copy_down():
        host[1].copy_(there[1], non_blocking=True)

    def copy_both():
        for stream, copy_one in zip(streams, (copy_up, copy_down)):
            with torch.cuda.stream(stream):
                copy_one()

    calls = {"to_the_card": copy_up, "from_the_card": copy_down, "each_of_both_at_once": copy_both}
    found = {name: nbytes / seconds_of("cuda", call) / 1e9 for name, call in calls.items()}
    runtime = torch.cuda.cudart()

    def pin():
        block = torch.empty(2 * nbytes // 4)  # Its pages are made as they are pinned.
        runtime.cudaHostRegister(block.data_ptr(), block.nbytes, 0)
        runtime.cudaHostUnregister(block.data_ptr())

    found["pinning"] = 2 * nbytes / seconds_of("cuda", pin, 1) / 1e9
    return found


def checks(card):
    rm.settle(SimpleNamespace(threads=torch.get_num_threads(), device=card.device))
    wrong = check_packing(card) + check_paging(card)
    card.keep(linear_algebra=linear_algebra(card))
    if wrong:
        raise AssertionError(f"other numbers expected: {'; '.join(wrong)}")


PARTS = {"f": checks}
