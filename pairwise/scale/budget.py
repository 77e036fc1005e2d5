"""How many bytes training takes, and how many of a card it leaves for the optimizer.

The bytes of tensors follow exactly from their shapes, which a model on torch's meta device has too;
those of activations and of temporary tensors are estimates, for dense decoders such as Llama.
"""

import functools
import math

from pairwise.scale import offload, parallel
from pairwise.scale.recompute import Room

import torch

# The share of a card that torch may not take, as libraries allocate beside it: 3.2 GiB of 79.2.
LEFT = 1 / 25


def reserve(total):
    """Return the bytes of a card of `total` that are set aside for what is not counted here.

    That is LEFT, fragmentation, workspaces of kernels, gradients on their way to float32."""
    return int(total / 16) + 2**30


def weight_bytes(model):
    """Return the bytes of all parameters of a model."""
    return sum(p.nbytes for p in model.parameters())


def optimizer_bytes(p, max_precondition_dim):
    """Return the bytes that SOAP keeps beside a parameter p, in float32.

    They are a dict of masters (0 for a float32 parameter, which is its own), moments and
    preconditioners.
    """
    shapes = offload.state_shapes(p.shape, max_precondition_dim)
    counts = [math.prod(shape) for shape in shapes]
    return {
        "masters": 4 * p.numel() * (p.dtype != torch.float32),
        "moments": 4 * sum(counts[:2]),
        "preconditioners": 4 * sum(counts[2:]),
    }


def step_bytes(p, max_precondition_dim):
    """Return about how many bytes of temporary tensors the library's step of p takes, at most.

    These are the projected gradient and moments and their quotient and, for the longest
    preconditioned side, two covariances, two bases, two products and a QR decomposition.
    """
    longest = max(offload.preconditioned_sides(p.shape, max_precondition_dim), default=0)
    return 4 * (p.numel() * (6 if longest > 1 else 3) + 7 * longest**2)


def mlp_size(config):
    """Return the width of the MLP, which is four times the hidden size where none is named."""
    return getattr(config, "intermediate_size", None) or 4 * config.hidden_size


def query_size(config):
    """Return the width of all queries of a layer together."""
    head_size = getattr(config, "head_dim", None)
    return config.num_attention_heads * (
        head_size or config.hidden_size // config.num_attention_heads
    )


def activation_bytes(config, tokens, width, rank=None):
    """Return the bytes of activations of `tokens` tokens at the peak of backward(), recomputed.

    width is the bytes of a number: 2 in BF16, 4 in float32. A dense decoder layer with hidden size
    h, MLP size m, queries of size q, keys and values of size v keeps, per token:

    - of each of its 2 norms the input in float32, the normalised and the scaled one,
      (4 + 2 width) h; in float32 the first norm's input is the layer's own, counted below;
    - queries, keys, values and attention's output, 2 (q + v) width, and the MLP's 4 m width.

    backward() adds gradients in the MLP, 2 m width, and of the residual stream, 2 h width. Every
    layer's input, h width, is kept too. Models with more norms (Qwen 3) take more, and those
    without fused attention (Gemma 2) take several times that.

    With adapters of a rank, a frozen norm does not keep the normalised input, backward() holds one
    h width less, and each of the 7 adapters keeps A x, width rank.
    """
    h, m, q = config.hidden_size, mlp_size(config), query_size(config)
    key_value_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    v = q // config.num_attention_heads * key_value_heads
    of_norm = 1 if rank else 2
    norms = 2 * (4 + of_norm * width) - (4 if width == 4 else 0)
    layer = norms * h + width * (2 * (q + v) + 6 * m + of_norm * h + 7 * (rank or 0))
    return tokens * (layer + config.num_hidden_layers * h * width)


def with_dims(groups, max_precondition_dim):
    """Return (parameter, largest side that is preconditioned) of all that is trained.

    groups are training.parameter_groups(model); in the second one nothing is preconditioned.
    """
    dims = (max_precondition_dim, 1)
    return [(p, dim) for dim, group in zip(dims, groups) for p in group]


def passing_bytes(model, groups, args):
    """Return the bytes of (activations, the optimizer's temporary tensors).

    The two take turns on the card. groups are training.parameter_groups(model); args hold
    micro_batch_tokens, train, lora_rank and max_precondition_dim.
    """
    activations = activation_bytes(model.config, *_pass_of(model, args))
    parameters = with_dims(groups, args.max_precondition_dim)
    return activations, max(step_bytes(p, dim) for p, dim in parameters)


def _pass_of(model, args):
    """Return (tokens, width, rank) of a pass, for activation_bytes."""
    width = model.get_input_embeddings().weight.element_size()
    rank = args.lora_rank if args.train == "lora" else None
    return args.micro_batch_tokens, width, rank


def optimizer_budget(free, model, groups, args):
    """Return the bytes of the card for masters, state and copy buffers.

    They are --optimizer-memory-gb or, without it, what is left of the `free` bytes beside weights
    and reserve, where float32 gradients of all that is trained stay; negative where none are left.
    """
    if args.optimizer_memory_gb is not None:
        return args.optimizer_memory_gb * 2**30
    return _beside(free, groups) - max(passing_bytes(model, groups, args))


def _beside(free, groups):
    """Return what float32 gradients leave of `free` bytes."""
    return free - 4 * sum(p.numel() for group in groups for p in group)


def activation_room(free, memory, model, groups, args):
    """Return (bytes of the card for activations, those that a layer keeps if it is not recomputed).

    memory: of optimizer_budget, which is served first. On an H100, with 7 micro-batches a step, a
    byte of activations saves 34 ps (2,200 FLOPs a micro-batch) and one of state 24 ps (its two
    copies); but state that leaves the card takes host memory."""
    sizes = [
        4 * offload.TrainedParameter(p, dim).numbers
        for p, dim in with_dims(groups, args.max_precondition_dim)
    ]
    owned = parallel.deal(range(len(sizes)), sizes)[parallel.rank()]
    held = offload.on_card([sizes[i] for i in owned], memory)
    tokens, width, rank = _pass_of(model, args)
    working = 2 * (mlp_size(model.config) + model.config.hidden_size)
    inputs = model.config.num_hidden_layers * model.config.hidden_size
    layer = activation_bytes(model.config, tokens, width, rank) - tokens * width * (
        inputs + working
    )
    return _beside(free, groups) - held, layer


def layers_kept(room, model, args):
    """Return how many layers a Room keeps whole, by the estimates of activation_room, `room`."""
    nbytes, layer = room
    tokens, width, _ = _pass_of(model, args)
    layers, hidden = model.config.num_hidden_layers, tokens * width * model.config.hidden_size
    return sum((i + 3) * layer + (layers - i) * hidden <= nbytes for i in range(layers))


def free_bytes(device):
    """Return the bytes of a card that this process may still take.

    They are what other processes leave, and within torch's set_per_process_memory_fraction."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return min(free, limit_of(device) - torch.cuda.memory_reserved(device))


def limit_of(device):
    """Return the bytes of a card that torch may take in this process: all, but for
    set_per_process_memory_fraction."""
    total = torch.cuda.mem_get_info(device)[1]
    return int(total * torch.cuda.get_per_process_memory_fraction(device))


def leave_free(device):
    """Let torch give back what it does not use, rather than take the last of a card."""
    free, total = torch.cuda.mem_get_info(device)
    most = (torch.cuda.memory_reserved(device) + free) / total - LEFT
    before = torch.cuda.get_per_process_memory_fraction(device)
    torch.cuda.set_per_process_memory_fraction(max(0.0, min(before, most)), device)


def of_card(model, groups, args):
    """Return, as training starts, the card's bytes for the optimizer, the Room for activations."""
    free = free_bytes(model.device) - reserve(limit_of(model.device))
    leave_free(model.device)
    memory = optimizer_budget(free, model, groups, args)
    room = activation_room(free, memory, model, groups, args)
    return memory, Room(*room, functools.partial(torch.cuda.memory_allocated, model.device))
