"""What training takes, before it is started: memory on card and host, tokens, FLOPs, disk, hours. Bytes of tensors are exact, the rest estimates.

No weights are read and no card is needed: the model is made on torch's meta device, which has shapes alone.
"""

import argparse
import math

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, LlamaConfig

from pairwise import cli, data
from pairwise import reward_model as rm
from pairwise.scale import adapter
from pairwise.scale.offload import (
    ALIGN,
    BUFFERS,
    MAX_PRECONDITION_DIM,
    choose_resident,
    state_shapes,
)

LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
# For a run without data: train prompts and pairs (the paper's, where it counts pairs), distinct responses of train and of test, and tokens of a
# response with its prompt, which are a guess.
PAPER = {
    "multipref": (4791, 9413, 18826, 2096, 450),
    "personalllm": (9402, 263256, 75216, 8000, 450),
    "helpsteer2": (10643, 10643, 21286, 2366, 600),
    "tldr": (729, 3217, 6434, 7400, 550),
}
RESERVE = (
    4 * 2**30
)  # bytes of the card for what is not counted: fragments, workspaces of the kernels, gradients on their way to float32
FLOAT32_SHARE = (
    1 / 16
)  # of the BF16 rate, which float32 matrix products reach (H100: 50 of 790 TFLOP/s)
TF32_SHARE = (
    1 / 2
)  # the same of the optimizer's products, whose factors are rounded to 11 bits (H100: 495 of 989 at best)
QR_RATE = 4e12  # FLOP/s in float32 of the QR decomposition of a matrix with a side of 1,024 to 4,096: assumed
LINK = 40e9  # bytes a second each way between card and host memory (PCIe 5 x16: 64e9 at best)
SAMPLE = 1000  # responses that are tokenized to count the tokens of all


def describe(base, dtype, rank=None):
    """(config, model on the meta device) of a base as a reward model in dtype, head in float32; llama-3-8b needs neither network nor files.

    rank: of adapters on all linear layers, which alone are trained then, with the head.
    """
    try:
        config = (
            LlamaConfig(**LLAMA_3_8B) if base == "llama-3-8b" else AutoConfig.from_pretrained(base)
        )
        config.num_labels, config.pad_token_id = 1, None
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    except (OSError, ValueError) as error:
        raise cli.InputError(
            f"--base {base}: no config could be read: llama-3-8b, a directory with config.json, or a hub id that can be reached "
            f"expected ({cli.first_line(error)})"
        ) from None
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        raise cli.InputError(
            f"--base {base}: {type(model).__name__} has no linear head called score; a decoder such as Llama or Qwen expected"
        )
    model.score.float()
    if rank:
        with torch.device("meta"):
            adapter.add(model, rank, rank)
    return config, model


def optimizer_bytes(p, dim):
    """Bytes beside a parameter p: {masters, moments, preconditioners}, of state_shapes(p.shape, dim) in float32."""
    shapes = state_shapes(p.shape, dim)
    count = [math.prod(shape) for shape in shapes]
    return {
        "masters": 4 * p.numel() * (p.dtype != torch.float32),
        "moments": 4 * sum(count[:2]),
        "preconditioners": 4 * sum(count[2:]),
    }


def step_bytes(p, dim):
    """Bytes that the library's step of p takes for a moment, at most about: projections, quotient; of two bases, new and old, products, QR."""
    sides = [d for d in p.shape if d <= dim] if p.ndim > 1 else []
    return 4 * (
        p.numel() * (6 if max(sides, default=1) > 1 else 3) + 7 * max(sides, default=0) ** 2
    )


def _mlp(config):
    return getattr(config, "intermediate_size", None) or 4 * config.hidden_size


def activation_bytes(config, tokens, width, rank=None):
    """Bytes of activations at the peak of backward(), with recomputation, of `tokens` tokens; width: bytes of a number (BF16 2, float32 4).

    A dense decoder layer with hidden size h, MLP size m, queries of size q, keys and values of size v keeps, per token: of each of its 2 norms the
    input in float32, the normalised and the scaled one, (4 + 2 width) h (a float32 layer's first is its own input, counted below); queries, keys,
    values and attention's output, 2 (q + v) width; the MLP's 4 m width. backward() adds gradients in the MLP, 2 m, and of the residual stream, 2 h.
    Of every layer its input, h, is kept too. Models with more norms (Qwen 3) take more, those without fused attention (Gemma 2) several times that.

    With adapters of a rank, a frozen layer keeps nothing, but each of the 7 adapters its input in float32 and A x, 4 rank. In BF16 the inputs are
    copies, 4 (5 h + q + m), beside the norms' inputs, 8 h, attention's 4 (q + v) and the MLP's 6 m, and backward() adds 12 h and 4 m. In float32
    there are no copies.
    """
    h, heads = config.hidden_size, config.num_attention_heads
    m, head = _mlp(config), getattr(config, "head_dim", None) or h // heads
    q, v = heads * head, (getattr(config, "num_key_value_heads", None) or heads) * head
    layer = (
        (8 + 4 * width - (4 if width == 4 else 0)) * h
        + 2 * (q + v) * width
        + 4 * m * width
        + width * (2 * m + 2 * h)
    )
    if rank:
        layer = (
            16 * h + 8 * q + 8 * v + 24 * m if width == 4 else 40 * h + 8 * q + 4 * v + 14 * m
        ) + 7 * 4 * rank
    return tokens * (layer + config.num_hidden_layers * h * width)


def passing_bytes(model, groups, args):
    """Bytes of (activations, the optimizer's temporary tensors), which take turns on the card."""
    activations = activation_bytes(
        model.config,
        args.micro_batch_tokens,
        model.get_input_embeddings().weight.element_size(),
        args.lora_rank if args.train == "lora" else None,
    )
    return activations, max(
        step_bytes(p, dim)
        for dim, group in zip((args.max_precondition_dim, 1), groups)
        for p in group
    )


def optimizer_budget(free, model, groups, args):
    """Bytes for masters, state and copy buffers where `free` bytes of the card are free with the weights on it; negative where there are none.

    Float32 gradients of all that is trained stay.
    """
    return (
        free
        - 4 * sum(p.numel() for group in groups for p in group)
        - max(passing_bytes(model, groups, args))
        - RESERVE
    )


def memory(model, groups, args, card, optimizer_memory=None):
    """Training by args.train: ({row: (bytes on the card, bytes on the host)}, whether it fits a card of `card` bytes).

    optimizer_memory: bytes as by --optimizer-memory-gb; None: what is free.
    """
    if args.train == "head":
        width, h, m = (
            model.get_input_embeddings().weight.element_size(),
            model.config.hidden_size,
            _mlp(model.config),
        )
        rows = {
            f"weights, {args.dtype}": (sum(p.nbytes for p in model.parameters()), 0),
            f"activations, {args.micro_batch_tokens:,} tokens, forward": (
                args.micro_batch_tokens * width * 3 * (h + m),
                0,
            ),
            "reserve": (RESERVE, 0),
        }
        return rows, sum(here for here, _ in rows.values()) <= card
    dims, weights = (args.max_precondition_dim, 1), sum(p.nbytes for p in model.parameters())
    parts = [optimizer_bytes(p, dim) for dim, group in zip(dims, groups) for p in group]
    sizes = [4 * sum(math.ceil(n / 4 / ALIGN) * ALIGN for n in part.values()) for part in parts]
    budget = (
        optimizer_budget(card - weights, model, groups, args)
        if optimizer_memory is None
        else optimizer_memory
    )
    resident = choose_resident(sizes, budget)
    activations, temporary = passing_bytes(model, groups, args)
    adapters = sum(p.nbytes for p in groups[0]) if args.train == "lora" else 0
    rows = {f"weights, {args.dtype}": (weights - adapters, 0)} | (
        {f"adapters of rank {args.lora_rank}, float32": (adapters, 0)} if adapters else {}
    )
    rows["gradients, float32"] = (4 * sum(p.numel() for group in groups for p in group), 0)
    for name in ("masters", "moments", "preconditioners"):
        stays = sum(parts[i][name] for i in resident)
        rows[f"{name}, float32"] = (stays, sum(part[name] for part in parts) - stays)
    rows["copy buffers"] = (
        BUFFERS * max((sizes[i] for i in range(len(parts)) if i not in resident), default=0),
        0,
    )
    if activations >= temporary:
        rows[f"activations, {args.micro_batch_tokens:,} tokens, recomputed"] = (activations, 0)
    else:
        rows["temporary in the optimizer's step (activations: less)"] = (temporary, 0)
    rows["reserve"] = (RESERVE, 0)
    return rows, sum(here for here, _ in rows.values()) <= card


def count_tokens(args):
    """({prompts, pairs, train, scored, tokens}, where the numbers are from): of train, of all splits (scored), and the mean tokens of a response."""
    if args.run is None or not (args.run / "data" / "train.parquet").exists():
        name = args.run.name if args.run is not None and args.run.name in PAPER else "multipref"
        prompts, pairs, train, test, tokens = PAPER[name]
        counts = {
            "prompts": prompts,
            "pairs": pairs,
            "train": train,
            "scored": train + test,
            "tokens": tokens,
        }
        return counts, f"assumed: {name}, its counts as published, tokens guessed"
    splits, _ = data.read_splits(args.run)
    texts = [
        (messages, text)
        for split in splits.values()
        for messages, many in zip(split.messages, split.responses)
        for text in many
    ]
    chosen = [
        texts[i]
        for i in np.unique(
            np.linspace(0, len(texts) - 1, min(len(texts), SAMPLE)).round().astype(int)
        )
    ]
    try:
        if args.base == "llama-3-8b":
            raise cli.InputError("dimensions alone")
        tokenizer = rm.load_tokenizer(args.base, args.chat_template)
        lengths, how = (
            [
                len(rm.encode(tokenizer, messages, text, args.max_length))
                for messages, text in chosen
            ],
            "its tokenizer",
        )
    except cli.InputError:
        lengths = [
            min(args.max_length, (sum(len(m["content"]) for m in messages) + len(text)) / 4)
            for messages, text in chosen
        ]
        how = "characters / 4, as no tokenizer was found"
    train = splits["train"]
    counts = {
        "prompts": len(train.prompt_id),
        "pairs": len(train.a),
        "train": int(train.response_start[-1]),
        "scored": len(texts),
        "tokens": float(np.mean(lengths)),
    }
    return counts, f"{args.run}, tokens by {how}" + (
        f" from {len(chosen):,} responses" if len(chosen) < len(texts) else ""
    )


def count_steps(args, counts):
    """Optimizer steps of a member, about: whole prompts of the mean size in a step."""
    mean = max(1, counts["pairs"] / max(1, counts["prompts"]))
    whole = (
        args.pairs_per_step // mean * mean
        if args.train != "head" and mean <= args.pairs_per_step
        else args.pairs_per_step
    )
    return math.ceil(counts["pairs"] / whole) * args.epochs


def flops(config, model, groups, args, counts):
    """FLOPs (of one member's training and scoring in args.dtype, of its adapters in float32, of one optimizer step's products, of its QR).

    Forward 2 per weight and token besides the embedding's, and 2 T q a layer for causal attention over T tokens; backward twice that, once where
    the weights are frozen; recomputation once. SOAP's step of an (a, b) matrix: four products of 2 a b d for each side d, and every
    --precondition-frequency steps a product of 2 d^3 and a QR of 8/3 d^3.
    """
    adapters = sum(p.numel() for p in groups[0]) if args.train == "lora" else 0
    dense = (
        sum(p.numel() for p in model.parameters())
        - model.get_input_embeddings().weight.numel()
        - adapters
    )
    q = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    attention = 2 * counts["tokens"] * q * config.num_hidden_layers
    trained = args.train != "head"
    sides = (
        [(p.numel(), d) for p in groups[0] for d in p.shape if d <= args.max_precondition_dim]
        if trained
        else []
    )
    seen, scored = (
        counts["tokens"] * counts["train"] * args.epochs * trained,
        counts["tokens"] * counts["scored"],
    )
    work = seen * (2 * dense * (3 if adapters else 4) + 4 * attention) + scored * (
        2 * dense + attention
    )
    products = sum(8 * n * d + 2 * d**3 / args.precondition_frequency for n, d in sides)
    return (
        work,
        2 * adapters * (4 * seen + scored),
        products,
        sum(8 / 3 * d**3 / args.precondition_frequency for _, d in sides),
    )


def verdict(args, model, groups, *limits):
    """Whether training by args.train fits the limits of memory(), if need be with a smaller --micro-batch-tokens, as a few words."""
    for part in (1, 2, 4, 8):
        own = argparse.Namespace(
            **vars(args) | {"micro_batch_tokens": args.micro_batch_tokens // part}
        )
        rows, fits = memory(model, groups, own, *limits)
        if fits:
            host = sum(paged for _, paged in rows.values())
            return (
                f"{args.train} fits"
                + (f" with --micro-batch-tokens {own.micro_batch_tokens}" if part > 1 else "")
                + (
                    f", with {(host + sum(p.nbytes for p in model.parameters())) / 1e9:,.0f} GB of host memory"
                    if host
                    else ""
                )
            )
    return f"{args.train} does not fit"


def show(args, parameter_groups):
    """Print the plan; parameter_groups(model) -> [preconditioned, other parameters]."""
    trains, lora, dims = args.train != "head", args.train == "lora", (args.max_precondition_dim, 1)
    config, model = describe(
        args.base, getattr(torch, args.dtype), args.lora_rank if lora else None
    )
    groups, (counts, source) = parameter_groups(model), count_tokens(args)
    weights, number = (
        sum(p.nbytes for p in model.parameters()),
        sum(p.numel() for p in model.parameters()),
    )

    # memory
    limits = (
        args.gpu_gb * 1e9,
        None if args.optimizer_memory_gb is None else args.optimizer_memory_gb * 2**30,
    )
    rows, _ = memory(model, groups, args, *limits)
    paged = sum(host for _, host in rows.values())
    print(
        f"{args.base}: {number:,} parameters as a reward model; --train {args.train}; planned, not measured\n"
    )
    print(f"{'memory, GiB':55}{'card':>8}{'host':>8}")
    for name, (card, host) in [
        *rows.items(),
        ("total", [sum(row[side] for row in rows.values()) for side in (0, 1)]),
    ]:
        print(f"{name:55}{card / 2**30:8.2f}{host / 2**30:8.2f}")

    # work, time, disk
    work, slow, products, refresh = flops(config, model, groups, args, counts)
    steps, rate = count_steps(args, counts), args.tflops * 1e12
    seconds = max(
        products / (rate * TF32_SHARE) + refresh / QR_RATE, paged / LINK
    )  # of an optimizer step; copies, both ways, overlap with the computation
    times = args.members if trains else 1  # the frozen base is run once for all heads
    hours, stepping = (
        times * (work + slow / FLOAT32_SHARE) / (rate * args.utilisation) / 3600,
        times * steps * seconds / 3600,
    )
    state = sum(
        sum(optimizer_bytes(p, dim).values()) + 4 * p.numel() * (p.dtype == torch.float32)
        for dim, group in zip(dims, groups)
        for p in group
    )
    member = {
        "full": weights,
        "lora": sum(p.nbytes for group in groups for p in group),
        "head": 4 * config.hidden_size,
    }[args.train]
    kept, aside = args.members * member, 2 * state if trains and args.checkpoint_minutes else 0
    seen = counts["tokens"] * (counts["train"] * args.epochs if trains else counts["scored"])
    print(
        f"\ndata ({source}): {counts['pairs']:,} train pairs, {counts['train']:,} train responses, {counts['scored']:,} to score, "
        f"{counts['tokens']:,.0f} tokens each with the prompt"
    )
    print(
        f"{'a member' if trains else 'all members'}: {seen / 1e6:,.1f} M tokens {'trained' if trains else 'through the frozen base, once'}, "
        f"about {steps:,} steps of {args.pairs_per_step} pairs, {work:.2e} FLOPs"
        + (f", {slow:.2e} more in float32 in the adapters" if lora else "")
    )
    if trains:
        print(
            f"an optimizer step: {seconds:.1f} s; products {products:.2e} FLOPs at {rate * TF32_SHARE / 1e12:,.0f} TFLOP/s, QR {refresh:.2e} at "
            f"{QR_RATE / 1e12:.0f} (assumed)"
            + (f", {paged / 1e9:,.0f} GB each way at {LINK / 1e9:.0f} GB/s" if paged else "")
        )
    print(
        f"{args.members} members: {hours + stepping:,.1f} hours at {args.utilisation:.0%} of {args.tflops:,.0f} TFLOP/s"
        + (f", {stepping:,.1f} of them in the optimizer" if trains else "")
        + f"; disk {(kept + aside) / 1e9:,.1f} GB"
        + (f", {aside / 1e9:,.1f} of them for checkpoints" if aside else "")
    )
    verdicts = []
    for train, dim, rank in (
        ("full", MAX_PRECONDITION_DIM, None),
        ("lora", args.lora_rank, args.lora_rank),
        ("head", 1, None),
    ):
        if train == args.train:
            verdicts.append(verdict(args, model, groups, *limits))
        else:
            _, other = describe(args.base, getattr(torch, args.dtype), rank)
            own = argparse.Namespace(**vars(args) | {"train": train, "max_precondition_dim": dim})
            verdicts.append(verdict(own, other, parameter_groups(other), *limits))
    print(
        f"a card of {args.gpu_gb:g} GB: {'; '.join(verdicts)}"
        + (
            "; a smaller --max-precondition-dim or base may"
            if trains and f"{args.train} does not fit" in verdicts
            else ""
        )
    )
