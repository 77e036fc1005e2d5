"""Low-rank adapters (Hu et al., arXiv 2106.09685) on all linear layers of a frozen base, by PEFT.

A linear layer W x becomes W x + (alpha / rank) B A x with A (rank, in) and B (out, rank) in the
base's dtype: others would cost a copy of every input, and products at another rate. Offload keeps
float32 masters of those in BF16. The reward head is trained too, in float32. PEFT is imported where
it is used: that takes two seconds, for which other kinds of training need not wait.
"""

import copy
import functools
import math
import weakref
from pathlib import Path

from pairwise import cli, files, pretrained

import torch
from safetensors.torch import load_file, save_file


def add(model, rank, alpha, dtype=None):
    """Freeze a reward model but for its head, and put adapters on the linear layers of its base.

    draw or load gives the adapters their values; dtype: theirs, None for the base's. Raises
    InputError where the base pools with weights of its own: they are drawn with the head, and an
    adapter cannot carry them.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    if not hasattr(model, "score"):
        raise cli.InputError(
            f"--train lora: {type(model).__name__} pools with weights of its own, which have to be "
            "trained; --train full, or a decoder, expected"
        )
    place = {"target_modules": "all-linear", "task_type": "SEQ_CLS"}
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, **place), model.eval())
    model.eval().score.requires_grad_(True)
    dtype = dtype or model.dtype  # Quantized weights have another one than what they are used in.
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_A.to(dtype), layer.lora_B.to(dtype)
            is_plain = type(layer.base_layer) is torch.nn.Linear
            if is_plain and layer.base_layer.weight.dtype == dtype == torch.bfloat16:
                # Of itself it would keep the base's weights when the model is dropped.
                layer.forward = functools.partial(_forward, weakref.proxy(layer))


def _forward(layer, x):
    """Return W x + (alpha / rank) B A x, (.., out), of a LoRA layer and its input (.., in).

    PEFT's own makes three tensors of that size where this adds B's product to W x in place, and it
    rounds three times. In float32 PEFT's is used, so that its rewards are the same to the bit."""
    rows = x.reshape(-1, x.shape[-1])
    low, b = layer.lora_A["default"](rows), layer.lora_B["default"].weight
    out = layer.base_layer(rows).addmm_(low, b.T, alpha=layer.scaling["default"])
    return out.view(*x.shape[:-1], -1)


def trained(model):
    """Return {name in PEFT's files: parameter} of all that is trained: A, B and the head."""
    return {
        "base_model.model." + name.replace(".default.", "."): p
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def draw(model, seed):
    """Draw every A as PEFT does, uniform up to 1 / sqrt(in); B is zero, as training starts."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in trained(model).items():
        if ".lora_A." in name:
            p.data.copy_((2 * torch.rand(p.shape, generator=generator) - 1) / p.shape[1] ** 0.5)


def save(model, base, directory):
    """Write adapters and head as PEFT does: a config and a safetensors file, of what scores.

    base: as of pretrained.pinned; PEFT then finds it from any directory."""
    config = copy.copy(model.peft_config["default"])
    if Path(base).is_dir():
        name, revision = str(Path(base).resolve()), None
    else:
        name, revision = base.split("@")
    config.base_model_name_or_path, config.revision = name, revision
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)  # a set's order differs by process
    config.modules_to_save = ["score"]
    config.save_pretrained(directory)
    tensors = {name: p.detach().cpu().contiguous() for name, p in trained(model).items()}
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})


def load(model, directory):
    """Put the adapters and the head that save() wrote into a base.

    Raises InputError where a tensor is missing, of another shape or one too many.
    """
    form = {"r": int, "lora_alpha": files.NUMBER}
    config = files.read_json(directory / "adapter_config.json", form)
    path = directory / "adapter_model.safetensors"
    with pretrained.readable(f"{path}: no adapter could be read"):
        tensors = load_file(path)
    rank, alpha = config["r"], config["lora_alpha"]
    found = [tensor for name, tensor in tensors.items() if ".lora_A." in name]
    ranks = {tensor.shape[0] for tensor in found}
    if ranks != {rank} or not 0 < alpha < math.inf:
        words = f"r {rank} and lora_alpha {alpha} found, the rank of {path.name} and a scale"
        raise cli.InputError(f"{directory / 'adapter_config.json'}: {words} above 0 expected")
    add(model, rank, alpha, found[0].dtype)  # float32 beside BF16 too, as it was once trained
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = {name: tuple(p.shape) for name, p in trained(model).items()}
    wrong = sorted({name for name, _ in shapes.items() ^ expected.items()})
    if wrong:
        name = wrong[0]
        raise cli.InputError(
            f"{path}: {name} (and {len(wrong) - 1} more): {shapes.get(name, 'no tensor')} found, "
            f"{expected.get(name, 'no tensor')} expected"
        )
    for name, p in trained(model).items():
        p.data.copy_(tensors[name])


def merge(model):
    """Add every adapter to the weight beside it and take it out, which leaves a plain reward model.

    The sum is made in float32 and rounded to the weight's dtype. BF16 has 8 bits: each weight is
    off by up to 2^-9 of itself, and where an adapter changes it by less, that change is lost or
    doubled. Rewards move by about as much as BF16's own rounding moves them.
    """
    from peft.tuners.lora import LoraLayer

    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.lora_A.float(), layer.lora_B.float()
            weight = layer.base_layer.weight.data
            weight.copy_(weight.float() + layer.get_delta_weight("default"))
            model.set_submodule(name, layer.base_layer)
    del model.peft_config
