"""Part l of benchmarks/card.py: what the layers of an 8B Llama cost, and the parts of them.

Seconds of a forward pass, and of a forward and backward pass that is recomputed, are those of one
whole layer: models of six and of two layers, whose last one is cut, differ by four. They are
compared with other norms, activations and rotary positions, and with other ways of running
adapters.
"""

import functools
import importlib
import time
from types import SimpleNamespace

from pairwise import reward_model as rm
from pairwise.scale import adapter, norms
from pairwise.scale.recompute import recompute_activations

import plan
import torch
from card_meter import Meter, as_transformers, kernel_seconds, seconds_of
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForSequenceClassification, LlamaConfig
from transformers.models.llama import modeling_llama

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2}
LAYERS, TOKENS, SMALL_TOKENS, LENGTH = (6, 2), (4096, 8192), (64,), 1024
RANK = 16
TIMES = 5  # A time is the median of so many.


# ---- other ways to run parts of a layer


class Adapted(torch.autograd.Function):
    """W x + s B A x, whose backward pass adds to one gradient of x."""

    @staticmethod
    def forward(ctx, x, w, a, b, scale):
        low = x @ a.T
        ctx.save_for_backward(x, w, a, b, low)
        ctx.scale = scale
        return (x @ w.T).addmm_(low, b.T, alpha=scale)

    @staticmethod
    def backward(ctx, g):
        x, w, a, b, low = ctx.saved_tensors
        low_g = (g @ b).mul_(ctx.scale)
        return (
            (g @ w).addmm_(low_g, a),
            None,
            low_g.T @ x,
            (low.T @ g).mul_(ctx.scale).T,
            None,
        )


def adapted(layer, x):
    rows = x.reshape(-1, x.shape[-1])
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    out = Adapted.apply(rows, layer.base_layer.weight, a, b, layer.scaling["default"])
    return out.view(*x.shape[:-1], -1)


def product_of(gate, up):
    return F.silu(gate) * up


def fused_mlp(function, mlp, x):
    return mlp.down_proj(function(mlp.gate_proj(x), mlp.up_proj(x)))


def set_forward(model, kind, function):
    for module in model.modules():
        if isinstance(module, kind):
            module.forward = functools.partial(function, module)


def eager(model):
    pass


def native(model):
    """torch's own kernel of the norm, as on a card."""
    norms.use_kernels(model)


def compiled(model):
    """And torch.compile's of activation and positions."""
    native(model)
    act = functools.partial(fused_mlp, torch.compile(product_of, dynamic=True))
    set_forward(model, modeling_llama.LlamaMLP, act)
    modeling_llama.apply_rotary_pos_emb = torch.compile(ROTARY, dynamic=True)


def liger(model):
    """liger-kernel's norm, activation and positions."""
    ops = importlib.import_module("liger_kernel.ops")
    rope = importlib.import_module("liger_kernel.transformers.rope")

    def norm(module, x):
        rest = module.variance_epsilon, 0.0, "llama", True, None
        return ops.LigerRMSNormFunction.apply(x, module.weight, *rest)

    def act(gate, up):
        return ops.LigerSiLUMulFunction.apply(gate, up, 1.0, 1.0)

    set_forward(model, modeling_llama.LlamaRMSNorm, norm)
    set_forward(model, modeling_llama.LlamaMLP, functools.partial(fused_mlp, act))
    modeling_llama.apply_rotary_pos_emb = rope.liger_rotary_pos_emb


def native_and_liger(model):
    """torch's norm, liger-kernel's activation and positions."""
    liger(model)
    native(model)


ROTARY = modeling_llama.apply_rotary_pos_emb
FUSED = native, liger, native_and_liger, compiled
ADAPTERS = {"as peft runs them": None, "now": adapter._forward, "one function": adapted}


# ---- what is measured


def build(card, layers):
    torch.manual_seed(0)
    shape = (SMALL if card.small else plan.LLAMA_3_8B) | {"vocab_size": 2000, "pad_token_id": 0}
    config = LlamaConfig(**shape | {"num_hidden_layers": layers}, num_labels=1)
    with torch.device(card.device):
        model = AutoModelForSequenceClassification.from_config(
            config, dtype=torch.bfloat16, trust_remote_code=False
        )
    ready = rm.ready(model, card.device)
    as_transformers(ready.model)  # What is compared puts its own in place.
    return ready


def ids_of(tokens):
    generator = torch.Generator().manual_seed(0)
    length = min(LENGTH, tokens // 2)
    return torch.randint(1, 2000, (tokens // length, length), generator=generator).tolist()


def forward(model, ids):
    with torch.no_grad():
        return rm.rewards_of_batch(model, ids)


def train(model, ids):
    rewards = rm.rewards_of_batch(model, ids)
    rewards.sum().backward()
    model.model.zero_grad()
    return rewards


def issued(card, call):
    """Return the median seconds until a call returns, which waits for nothing."""
    meter, seconds = Meter(card.device), []
    for _ in range(TIMES):
        start = meter.now()
        call()
        seconds.append(time.perf_counter() - start)
        meter.now()
    return sorted(seconds)[TIMES // 2]


def kernels(card, call):
    """Return the kernels' seconds of a call, empty where the profiler finds none."""
    if card.device == "cpu":
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return kernel_seconds(profiler)


def per_layer(card, change, tokens, profiled=False):
    """Return {what: seconds a layer}; change(model) sets the model up."""
    found, rewards, ids = {}, None, ids_of(tokens)
    for layers, sign in zip(LAYERS, (1, -1)):
        model = build(card, layers)
        change(model.model)
        calls = {"forward": functools.partial(forward, model, ids)}
        recompute_activations(model.model, False)
        calls["kept"] = functools.partial(train, model, ids)
        for name, call in calls.items():
            measure(card, found, name, call, sign)
        recompute_activations(model.model)
        measure(card, found, "recomputed", calls["kept"], sign)
        if sign > 0:
            rewards = forward(model, ids)
            if profiled:
                found["kernels"] = kernels(card, calls["kept"])
        del model
    return found, rewards


def measure(card, found, name, call, sign):
    share = sign / (LAYERS[0] - LAYERS[1])
    for key, seconds in {
        name: seconds_of(card.device, call, TIMES),
        f"{name}, issued": issued(card, call),
    }.items():
        found[key] = found.get(key, 0) + share * seconds


def low_rank(function, change, model):
    adapter.add(model, RANK, 2 * RANK)
    adapter.draw(model, 0)
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            vars(layer).pop("forward", None)
            if function:
                layer.forward = functools.partial(function, layer)
    change(model)


def products(card, tokens, into, out):
    """Return {product: seconds} of what an adapter takes, beside the layer's own."""
    options = {"device": card.device, "dtype": torch.bfloat16}
    x, g = torch.randn(tokens, into, **options), torch.randn(tokens, out, **options)
    w, low = torch.randn(out, into, **options), torch.randn(tokens, RANK, **options)
    a, b = torch.randn(RANK, into, **options), torch.randn(out, RANK, **options)
    gx = torch.randn_like(x)
    calls = {
        "x W": lambda: x @ w.T,
        "g W": lambda: g @ w,
        "A x": lambda: x @ a.T,
        "+= B low": lambda: g.addmm_(low, b.T, alpha=2.0),
        "g B": lambda: g @ b,
        "g low, (out, r)": lambda: g.T @ low,
        "g low, (r, out)": lambda: low.T @ g,
        "x low, (r, in)": lambda: low.T @ x,
        "x low, (in, r)": lambda: x.T @ low,
        "+= A low": lambda: gx.addmm_(low, a),
        "sum of two": lambda: gx + x,
    }
    return {name: seconds_of(card.device, call, TIMES) for name, call in calls.items()}


def layers(card):
    if card.device == "cuda":
        with profile(activities=[ProfilerActivity.CUDA]):  # before there is much on the card
            torch.zeros(1, device="cuda")
        rm.settle(SimpleNamespace(threads=torch.get_num_threads(), device=card.device))
    found, first = {}, {}

    def add(name, change, tokens, profiled=False):
        modeling_llama.apply_rotary_pos_emb = ROTARY
        key = f"{name}, {tokens} tokens"
        try:
            found[key], rewards = per_layer(card, change, tokens, profiled)
            first.setdefault((tokens, "adapters" in name), rewards)
            other = first[tokens, "adapters" in name]
            found[key]["rewards_from_the_first"] = ((rewards - other).norm() / other.norm()).item()
        except Exception as error:
            found[key] = {"failed": f"{type(error).__name__}: {error}"[:300]}
        modeling_llama.apply_rotary_pos_emb = ROTARY
        card.keep(a_layer=found)

    few, many = (SMALL_TOKENS[0], SMALL_TOKENS[0]) if card.small else TOKENS
    add("all parameters, eager", eager, many, profiled=True)
    change = functools.partial(low_rank, ADAPTERS["now"], eager)
    add("adapters now, eager", change, few, profiled=True)
    h, m = (64, 128) if card.small else (4096, 14336)
    sides = (h, h), (h, m), (m, h)
    card.keep(
        products={
            f"{tokens}, {into} to {out}": products(card, tokens, into, out)
            for tokens in (few, many)
            for into, out in sides
        }
    )
    for name in ("one function", "as peft runs them"):
        add(f"adapters {name}, eager", functools.partial(low_rank, ADAPTERS[name], eager), few)
    add("all parameters, eager", eager, few)
    add("adapters one function, eager", functools.partial(low_rank, adapted, eager), many)
    for fused in FUSED:  # Those that torch compiles take longest.
        add(f"all parameters, {fused.__name__}", fused, many)
        change = functools.partial(low_rank, adapted, fused)
        add(f"adapters one function, {fused.__name__}", change, few)


PARTS = {"l": layers}
