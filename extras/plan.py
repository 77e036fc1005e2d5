"""Print what training takes before it starts: memory on card and host, tokens, FLOPs, disk, hours.

    python extras/plan.py --base llama-3-8b                                       (10 seconds)
    python extras/plan.py --base NAME_OR_DIR --run runs/mine --gpu-gb 24 --train lora --members 4

No weights are read, no card is needed and nothing is trained: the model is made on torch's meta
device, which has shapes alone. Bytes of tensors are exact, everything else is an estimate. The
flags of training are those of train_rm.py; those that change no size or time have no effect here.
"""

import argparse
import math

from pairwise import bases, chats, cli, data, pretrained, training
from pairwise.scale import adapter, budget, offload

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig

LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
# argparse type of --utilisation
share = cli.number_type(
    "share", cli.decimal, lambda v: 1e-6 <= v <= 1, "a number above 0, up to 1,"
)
# For a run without data: prompts and pairs to train on (the paper's, where it counts pairs),
# distinct responses of train and of all splits, a guess of a response's tokens with its prompt.
COUNTS = ("prompts", "pairs", "train", "scored", "tokens")
PAPER = {
    "multipref": (4791, 9413, 18826, 20922, 450),
    "personalllm": (9402, 263256, 75216, 83216, 450),
    "helpsteer2": (10643, 10643, 21286, 23652, 600),
    "tldr": (729, 3217, 6434, 13834, 550),
}
SAMPLE = 1000  # So many responses are tokenized to count the tokens of all.
# Measured on one H100 80GB (benchmarks/card-first.json); another card is taken to be like it but
# for its --tflops, of which the optimizer's products in TF32, and those of new bases, in float32,
# reach these parts.
TFLOPS, TF32_RATE, FLOAT32_RATE = 785, 393 / 785, 52 / 785
MEMORY = 2.7e12  # Bytes a second of the card's memory: 80 % of its data sheet's, not measured.
LINK = 42e9  # Bytes a second go each way between card and host when both ways are busy,
PINNING = 3.7e9  # and so many into pinned memory before the first step.
# Seconds of float32 decompositions of matrices with sides of 1,024 and 4,096; those between and
# beyond are taken to lie on the power law through both.
QR, EIGH = (4.5e-3, 28.9e-3), (11e-3, 97e-3)
# Seconds in which the host issues the kernels of a recomputed layer with adapters (card-h100-80gb,
# part l), and the part of --micro-batch-tokens that passes hold, as prompts stay whole.
ISSUING, FILLED = 19e-3, 0.7
LIBRARIES = 2.6e9  # Bytes of the host beside what is paged.


def describe(args):
    """Return (the base as a reward model on the meta device, its optimizer's parameter groups).

    The model is in args.dtype, its head in float32. --train lora puts adapters on it; --train head
    has empty groups. Raises InputError where no config can be read or there is no linear head.
    """
    named, dtype = args.base == "llama-3-8b", getattr(torch, args.dtype)
    known = "llama-3-8b, a directory with config.json, or a hub id that can be reached"
    failure = f"no config could be read: {known} expected"
    if named:
        config = LlamaConfig(**LLAMA_3_8B)
    else:
        whole = pretrained.config(args.base, "--base", failure)
        config = bases.text_side(whole, f"--base {args.base}")
    with pretrained.readable(f"--base {args.base}: no model can be made of its config"):
        config.num_labels, config.pad_token_id = 1, None
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(
                config, dtype=dtype, trust_remote_code=False
            )
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        missing = f"{type(model).__name__} has no linear head called score"
        expected = "a decoder such as Llama or Qwen expected"
        raise cli.InputError(f"--base {args.base}: {missing}; {expected}")
    model.score.float()
    if args.train == "lora":
        with torch.device("meta"):
            adapter.add(model, args.lora_rank, args.lora_rank)
    return model, ([], []) if args.train == "head" else training.parameter_groups(model)


def card_budget(model, groups, args):
    """Return (the optimizer's bytes of the card, those a layer keeps whole, layers that do)."""
    free = args.gpu_gb * 1e9 - budget.weight_bytes(model) - budget.reserve(args.gpu_gb * 1e9)
    optimizer = budget.optimizer_budget(free, model, groups, args)
    room = budget.activation_room(free, optimizer, model, groups, args)
    return optimizer, room[1], budget.layers_kept(room, model, args)


def memory(model, groups, args):
    """Return {row: (bytes on the card, bytes on the host)} of training by args.train."""
    weights, tokens = budget.weight_bytes(model), args.micro_batch_tokens
    if args.train == "head":
        # One forward pass of the frozen base takes more than training the head.
        width = model.get_input_embeddings().weight.element_size()
        activations = 3 * width * (model.config.hidden_size + budget.mlp_size(model.config))
        return {
            f"weights, {args.dtype}": (weights, 0),
            f"activations, {tokens:,} tokens, forward": (tokens * activations, 0),
            "reserve": (budget.reserve(args.gpu_gb * 1e9), 0),
        }
    parameters = budget.with_dims(groups, args.max_precondition_dim)
    tensors = [budget.optimizer_bytes(p, dim) for p, dim in parameters]
    sizes = [4 * offload.TrainedParameter(p, dim).numbers for p, dim in parameters]
    optimizer, layer, whole = card_budget(model, groups, args)
    resident = offload.choose_resident(sizes, optimizer)
    largest_paged = max((size for i, size in enumerate(sizes) if i not in resident), default=0)
    adapters = sum(p.nbytes for p in groups[0]) if args.train == "lora" else 0
    rows = {f"weights, {args.dtype}": (weights - adapters, 0)}
    if adapters:
        rows[f"adapters of rank {args.lora_rank}, {args.dtype}"] = (adapters, 0)
    rows["gradients, float32"] = (4 * sum(p.numel() for p, _ in parameters), 0)
    for name in ("masters", "moments", "preconditioners"):
        on_card = sum(tensors[i][name] for i in resident)
        rows[f"{name}, float32"] = (on_card, sum(nbytes[name] for nbytes in tensors) - on_card)
    rows["copy buffers"] = (offload.BUFFERS * largest_paged, 0)
    activations, temporary = budget.passing_bytes(model, groups, args)
    activations += whole * layer
    if temporary > activations:
        rows["temporary in the optimizer's step (activations: less)"] = (temporary, 0)
    else:
        layers = f"{whole} of {model.config.num_hidden_layers} layers whole"
        rows[f"activations, {tokens:,} tokens, {layers}"] = (activations, 0)
    rows["reserve"] = (budget.reserve(args.gpu_gb * 1e9), 0)
    return rows


def totals(rows):
    """Return the bytes of all rows of memory(): (on the card, on the host)."""
    return tuple(map(sum, zip(*rows.values())))


def count_tokens(args):
    """Return ({prompts, pairs, train, scored, tokens}, where the numbers are from).

    train and scored count the distinct responses of the train split and of all splits; tokens is
    the mean length of a response with its prompt.
    """
    if args.run is None or not (args.run / "data" / "train.parquet").exists():
        name = args.run.name if args.run else "multipref"
        if name not in PAPER:
            words = f"a prepared run, or runs/NAME with NAME one of {', '.join(PAPER)}, expected"
            raise cli.InputError(f"--run {args.run}: no data/train.parquet found; {words}")
        source = f"assumed: {name}, its counts as published, tokens guessed"
        return dict(zip(COUNTS, PAPER[name])), source
    splits, _ = data.read_splits(args.run)
    prompts = [prompt for x in splits.values() for prompt in zip(x.messages, x.responses)]
    texts = [(messages, text) for messages, responses in prompts for text in responses]
    places = np.linspace(0, len(texts) - 1, min(len(texts), SAMPLE)).round().astype(int)
    sample = [texts[i] for i in np.unique(places)]
    lengths, method = token_counts(args, sample)
    if len(sample) < len(texts):
        method += f" from {len(sample):,} responses"
    train = splits["train"]
    sizes = (len(train.prompt_id), len(train.a), train.n_responses, len(texts))
    counts = dict(zip(COUNTS, (*sizes, float(np.mean(lengths)))))
    return counts, f"{args.run}, tokens by {method}"


def token_counts(args, sample):
    """Return (the tokens of each (messages, response) of a sample, how they were counted)."""
    try:
        if args.base == "llama-3-8b":
            raise cli.InputError("llama-3-8b stands for dimensions alone")
        tokenizer = chats.load_tokenizer(args.base, args.chat_template)
        lengths = [len(chats.encode(tokenizer, *pair, args.max_length)) for pair in sample]
        return lengths, "its tokenizer"
    except cli.InputError:
        texts = ("".join(m["content"] for m in messages) + text for messages, text in sample)
        lengths = [min(args.max_length, len(text) / 4) for text in texts]
        return lengths, "characters / 4, as no tokenizer was found"


def count_steps(args, counts):
    """Return about how many optimizer steps a member takes, with whole prompts of the mean size."""
    mean, pairs = max(1, counts["pairs"] / max(1, counts["prompts"])), args.pairs_per_step
    if args.train != "head" and mean <= pairs:
        pairs = pairs // mean * mean
    return math.ceil(counts["pairs"] / pairs) * args.epochs


def flops(model, groups, args, counts, recomputed=1):
    """Return (FLOPs of a member, bytes that its adapters move in memory, both of training and
    scoring; FLOPs of one optimizer step's products, of those that new bases take beside them).

    A forward pass takes 2 FLOPs per weight and token besides the embedding's, and 2 T q a layer
    for causal attention over T tokens; backward takes twice that, or once where the weights are
    frozen; recomputation takes it once, for that share of the layers. An adapter reads its layer's
    input i and adds to the output o, i + 2 o; backward reads o twice and i once, writes the
    gradient of i and adds it to another. SOAP's step of an (a, b) matrix is four products of
    2 a b d for each side d, and three of 2 d^3 for a new basis.
    """
    adapters = sum(p.numel() for p in groups[0]) if args.train == "lora" else 0
    embedding = model.get_input_embeddings().weight.numel()
    dense = sum(p.numel() for p in model.parameters()) - embedding - adapters
    attention = 2 * counts["tokens"] * budget.query_size(model.config)
    attention *= model.config.num_hidden_layers
    trained = counts["tokens"] * counts["train"] * args.epochs * (args.train != "head")
    scored = counts["tokens"] * counts["scored"]
    passes, again = 2 + recomputed if adapters else 3 + recomputed, 3 + recomputed
    training_flops = trained * (2 * dense * passes + again * (2 * adapters + attention))
    scoring_flops = scored * (2 * (dense + adapters) + attention)
    a, b = (groups[0][::2], groups[0][1::2]) if adapters else ((), ())  # They take turns.
    i, o = sum(p.nbytes // len(p) for p in a), sum(p.nbytes // p.shape[1] for p in b)
    forward = i + 2 * o
    moved = trained * ((1 + recomputed) * forward + 5 * i + 2 * o) + scored * forward
    products = sum(8 * p.numel() * d for p in groups[0] for d in sides_of(p, args))
    new_bases = sum(6 * d**3 for p in groups[0] for d in sides_of(p, args))
    return training_flops + scoring_flops, moved, products, new_bases


def passing(work, moved, args):
    """Return the seconds of FLOPs and of bytes that are moved, both of `flops`."""
    return (work / args.utilisation / 1e12 + moved * TFLOPS / MEMORY) / args.tflops


def sides_of(p, args):
    """Return the sides of a parameter that have a basis."""
    return offload.preconditioned_sides(p.shape, args.max_precondition_dim)


def decomposing(groups, args, times):
    """Return the seconds of one decomposition for each basis; times: QR or EIGH."""
    power = math.log(times[1] / times[0], 4)
    sides = [d for p in groups[0] for d in sides_of(p, args)]
    return sum(times[1] * (d / 4096) ** power for d in sides) * TFLOPS / args.tflops


def stepping(products, new_bases, groups, args, paged):
    """Return the seconds of (an optimizer step, one with new bases, all before the first).

    products, new_bases: FLOPs, of `flops`; paged: bytes of the optimizer on the host, whose copies
    to and from the card overlap with the computation."""
    peak, link = args.tflops * 1e12, paged / LINK
    plain = products / (peak * TF32_RATE)
    refreshed = plain + new_bases / (peak * FLOAT32_RATE)
    refreshed += decomposing(groups, args, QR)
    first = decomposing(groups, args, EIGH) + paged / PINNING
    return max(plain, link), max(refreshed, link), first


def issuing(model, args, tokens):
    """Return the least seconds in which the host issues adapters' passes over so many tokens."""
    passes = tokens / (FILLED * args.micro_batch_tokens)
    return passes * model.config.num_hidden_layers * ISSUING * (args.train == "lora")


def print_work(model, groups, args, paged, counts, source):
    """Print tokens, steps, FLOPs, hours and disk; paged: bytes of the optimizer on the host;
    counts, source: count_tokens'."""
    steps, trains = count_steps(args, counts), args.train != "head"
    whole = card_budget(model, groups, args)[-1] if trains else 0
    recomputed = 1 - whole / model.config.num_hidden_layers
    work, moved, *of_step = flops(model, groups, args, counts, recomputed)
    plain, refreshed, first = stepping(*of_step, groups, args, paged)
    seconds = plain + (refreshed - plain) / args.precondition_frequency
    repeats = args.members if trains else 1  # The frozen base is run once for all heads.
    trained = counts["tokens"] * counts["train"] * args.epochs
    hours = repeats * max(passing(work, moved, args), issuing(model, args, trained)) / 3600
    optimizing = repeats * (first + steps * seconds) / 3600 if trains else 0
    disk, checkpoints = disk_bytes(model, groups, args)
    sizes = f"{counts['pairs']:,} train pairs, {counts['train']:,} train responses"
    scored = f"{counts['scored']:,} to score, {counts['tokens']:,.0f} tokens each with the prompt"
    print(f"\ndata ({source}): {sizes}, {scored}")
    subject, responses, manner = "a member", counts["train"] * args.epochs, "trained"
    if not trains:
        subject, responses = "all members", counts["scored"]
        manner = "through the frozen base, once"
    tokens = f"{counts['tokens'] * responses / 1e6:,.1f} M tokens {manner}"
    more = f", {moved / 1e12:.2g} TB moved by adapters" if args.train == "lora" else ""
    per_step = f"{args.pairs_per_step} pairs"
    print(f"{subject}: {tokens}, about {steps:,} steps of {per_step}, {work:.2e} FLOPs{more}")
    if trains:
        one = counts | {"train": 1 / args.epochs, "scored": 0}
        alone = flops(model, groups, args, one, recomputed)[:2]
        copies = f" ({paged / 1e9:,.0f} GB each way)" if paged else ""
        one_response = issuing(model, args, counts["tokens"])
        rate = counts["tokens"] / max(passing(*alone, args), one_response)
        print(
            f"training: {rate:,.0f} tokens/s; an optimizer step: "
            f"{plain:.1f} s{copies}, with new bases {refreshed:.1f} s; before the first: "
            f"{first:.0f} s"
        )
    optimizer = f", {optimizing:,.1f} of them in the optimizer" if trains else ""
    aside = f", {checkpoints / 1e9:,.1f} of them for checkpoints" if checkpoints else ""
    speed = f"{args.utilisation:.0%} of {args.tflops:,.0f} TFLOP/s"
    total = f"{hours + optimizing:,.1f} hours at {speed}{optimizer}"
    print(f"{args.members} members: {total}; disk {disk / 1e9:,.1f} GB{aside}")


def disk_bytes(model, groups, args):
    """Return the bytes on disk of (all members and two checkpoints, the checkpoints)."""
    member = {
        "full": budget.weight_bytes(model),
        "lora": sum(p.nbytes for group in groups for p in group),
        "head": 4 * model.config.hidden_size,
    }[args.train]
    state = sum(
        sum(budget.optimizer_bytes(p, dim).values()) + 4 * p.numel() * (p.dtype == torch.float32)
        for p, dim in budget.with_dims(groups, args.max_precondition_dim)
    )
    checkpoints = 2 * state if args.checkpoint_minutes else 0
    return args.members * member + checkpoints, checkpoints


def changed(args, **values):
    """Return a copy of args with other values of some flags."""
    return argparse.Namespace(**vars(args) | values)


def verdict(args):
    """Say whether training by args.train fits the card, if need be in smaller micro-batches."""
    model, groups = describe(args)
    if args.train == "full" and getattr(model.config, "quantization_config", None):
        return "full does not train quantized weights"
    for divisor in (1, 2, 4, 8):
        tokens = args.micro_batch_tokens // divisor
        card, host = totals(memory(model, groups, changed(args, micro_batch_tokens=tokens)))
        if card <= args.gpu_gb * 1e9:
            micro = f" with --micro-batch-tokens {tokens}" if divisor > 1 else ""
            needed = (host + LIBRARIES) / 1e9
            paged = f", with {needed:,.0f} GB of host memory" if host else ""
            return f"{args.train} fits{micro}{paged}"
    return f"{args.train} does not fit"


def print_verdicts(args):
    """Print which kinds of training fit the card; those not asked for have their defaults."""
    dims = {"full": offload.MAX_PRECONDITION_DIM, "lora": args.lora_rank, "head": 1}
    dims[args.train] = args.max_precondition_dim
    verdicts = [verdict(changed(args, train=x, max_precondition_dim=dims[x])) for x in dims]
    too_small = args.train != "head" and f"{args.train} does not fit" in verdicts
    hint = "; a smaller --max-precondition-dim or base may" if too_small else ""
    print(f"a card of {args.gpu_gb:g} GB: {'; '.join(verdicts)}{hint}")


def main(args):
    if args.base != "llama-3-8b":
        args.base = pretrained.pinned(args.base, revision=args.revision)
    counted = count_tokens(args)
    model, groups = describe(args)
    pretrained.check_quantized(model.config, f"--base {args.base}", args.train)
    rows = memory(model, groups, args)
    card, host = totals(rows)
    number = sum(p.numel() for p in model.parameters())
    print(f"{args.base}: {number:,} parameters as a reward model; --train {args.train};", end=" ")
    print(f"a plan, not a measurement\n\n{'memory, GiB':55}{'card':>8}{'host':>8}")
    for name, nbytes in [*rows.items(), ("total", (card, host))]:
        print(f"{name:55}{nbytes[0] / 2**30:8.2f}{nbytes[1] / 2**30:8.2f}")
    print_work(model, groups, args, host, *counted)
    print_verdicts(args)


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    # what is planned
    add("--base", required=True, help="hub id, transformers directory, or llama-3-8b")
    words = "run directory whose data/ is counted, or runs/NAME of one of the paper's data sets, "
    words += "not prepared yet (default: multipref)"
    add("--run", type=cli.path, help=words)
    add("--members", type=cli.natural, default=8, metavar="K", help="reward models to train")
    add("--train", choices=("full", "lora", "head"), default="full", help="as of train_rm.py")
    add("--lora-rank", type=cli.natural, default=16, help="of --train lora's adapters")
    # the card
    words = "its memory in 10^9 bytes; an H100 of 80 GB has 85"
    add("--gpu-gb", type=cli.positive, default=80, help=words)
    add("--tflops", type=cli.positive, default=TFLOPS, help="its BF16 rate in large products")
    words = "share of --tflops that is reached, recomputation included"
    add("--utilisation", type=share, default=0.65, help=words)
    training.add_flags(parser)
    training.add_checkpoint_flag(parser)
    args = parser.parse_args(argv)
    args.device = "cuda"  # A plan is for a card, wherever it is made.
    epochs = 10 if args.train == "head" else 1
    dim = args.lora_rank if args.train == "lora" else offload.MAX_PRECONDITION_DIM
    training.fill_in(args, epochs=epochs, max_precondition_dim=dim)
    return args


if __name__ == "__main__":
    cli.run_main(main, parse_args())
