"""What every kind of training shares: steps and batches, the loop over steps, and the flags.

The objectives are the scripts' own: train_rm.py has the method's.
"""

import contextlib
import json
import math
import time

from pairwise import bases, cli, provenance
from pairwise import reward_model as rm
from pairwise.scale import budget, packed, parallel
from pairwise.scale.offload import SOAP, Offload
from pairwise.scale.recompute import recompute_activations

import numpy as np
import torch
from tqdm import tqdm

# ---- steps and batches


def steps_of_prompts(pair_start, keep, pairs_per_step, rng):
    """Shuffle prompts and fill steps with whole prompts up to a budget of pairs.

    pair_start (P+1,): the pairs of prompt i; keep bool (N,): pairs to train on. Return a list of
    steps, each a list of arrays of pair indices. A prompt with more pairs than the budget is
    shuffled and split over several steps.
    """
    steps, room = [], 0
    for prompt in rng.permutation(len(pair_start) - 1):
        pairs = np.arange(pair_start[prompt], pair_start[prompt + 1])
        pairs = pairs[keep[pairs]]
        if len(pairs) > pairs_per_step:
            pairs = rng.permutation(pairs)
        for at in range(0, len(pairs), pairs_per_step):
            chunk = pairs[at : at + pairs_per_step]
            if len(chunk) > room:
                steps.append([])
                room = pairs_per_step
            steps[-1].append(chunk)
            room -= len(chunk)
    return [steps[i] for i in rng.permutation(len(steps))]


def steps_of_pairs(keep, pairs_per_step, epochs, rng):
    """Shuffle single pairs, anew in every epoch: a list of steps, each [array of pair indices]."""
    pairs = np.flatnonzero(keep)
    return [
        [order[at : at + pairs_per_step]]
        for order in (rng.permutation(pairs) for _ in range(epochs))
        for at in range(0, len(order), pairs_per_step)
    ]


def micro_batches(step, a, b, lengths, size, tokens):
    """Split a step for gradient accumulation: arrays of pairs that run at most `tokens` tokens.

    step: arrays of pair indices, each of one prompt; lengths (R,): tokens per response;
    size(responses) -> tokens that are run for them in one forward pass. Prompts stay whole, those
    of similar length go together; a prompt that is too large alone is a micro-batch.
    """

    def longest(pairs):
        return max(lengths[a[pairs]].max(), lengths[b[pairs]].max()), pairs[0]

    batches = []
    for pairs in sorted(step, key=longest, reverse=True):
        merged = np.concatenate([*batches[-1:], pairs])
        if batches and size(np.union1d(a[merged], b[merged])) <= tokens:
            batches[-1] = merged
        else:
            batches.append(pairs)
    return batches


def schedule(step, steps, warmup):
    """Learning-rate factor: linear over the first `warmup` of the steps, then cosine to zero."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


# ---- the loop


def parameter_groups(model):
    """SOAP's groups of what is trained: [matrices of the layers or adapters, all other parameters].

    SOAP preconditions the first. For the embedding, the head and the norms it is plain Adam.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    plain = {id(rm.head(model).weight), id(model.get_input_embeddings().weight)}
    plain |= {id(p) for p in trained if p.ndim < 2}
    return [[p for p in trained if id(p) not in plain], [p for p in trained if id(p) in plain]]


def make_optimizer(groups, args, memory):
    """SOAP on float32 masters: BF16 would round small updates away; memory: bytes, None for all."""
    dims = (args.max_precondition_dim, 1)
    groups = [{"params": p, "max_precondition_dim": dim} for p, dim in zip(groups, dims)]
    names = ("lr", "weight_decay", "precondition_frequency")
    options = {name: getattr(args, name) for name in names}
    return Offload(groups, lambda groups: SOAP(groups, **options), memory)


@contextlib.contextmanager
def in_one_order():
    """Have a GPU add up the gradients of attention in one order, so that the seed decides them.

    torch does only while it may take no algorithm without one (rm.settle lets it, with a
    warning), and then raises a RuntimeError where it knows no other."""
    lenient = torch.is_deterministic_algorithms_warn_only_enabled()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=lenient)


def has_one_order(reward_model, sequences):
    """Tell whether a model can be run forward and backward `in_one_order`; where not, stderr has
    the reason. sequences: token ids, of two of which the beginning is tried."""
    try:
        with in_one_order():
            few = [ids[:64] for ids in sequences[:2]]
            rm.rewards_of_batch(reward_model, few).sum().backward()
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        words = "gradients may differ in their last bits from run to run"
        bases.say_once(f"training: warning: {words} ({cli.first_line(error)[:150]})")
        return False
    finally:
        reward_model.model.zero_grad()
    return True


def backward(batches, count, rewards_at, split, targets, loss, done):
    """Add up the gradient of a step's mean loss; return this process's (loss, tokens).

    batches: arrays of pair indices, this process's; count: pairs of the step on all processes.
    """
    errors, total, tokens = [], 0.0, 0
    for batch in batches:
        sides = np.concatenate([split.a[batch], split.b[batch]])
        responses, index = np.unique(sides, return_inverse=True)  # Each response is run once.
        rewards, tokens_run = rewards_at(responses)
        index = packed.onto(rewards.device, torch.from_numpy(index))
        first, second = rewards[index[: len(batch)]], rewards[index[len(batch) :]]
        goals = (torch.from_numpy(values[batch]).float() for values in targets)
        goals = (packed.onto(rewards.device, values) for values in goals)
        error = loss(first, second, *goals, done) / count
        error.backward()
        errors.append(error.detach())
        tokens += tokens_run
    for error in torch.stack(errors).tolist() if errors else ():  # Here alone a card is waited for.
        total += error
    return total, tokens


class StepLog:
    """One JSON line a step, in `file` and in `lines`, and a progress bar that shows the same."""

    def __init__(self, file, lines, steps, label):
        self.file, self.lines, self.started = file, lines, time.time()
        self.before = json.loads(lines[-1])["seconds"] if lines else 0
        self.tokens = self.pairs = 0  # of this process's call, without the steps it resumed from
        file.write("".join(lines))
        options = {"desc": label, "unit": "step", "mininterval": 1, "disable": parallel.rank() > 0}
        self.bar = tqdm(total=steps, initial=len(lines), **options)

    def add(self, loss, lr, tokens, pairs, grad_norm):
        """Add the line of the next step."""
        seconds = time.time() - self.started
        line = {"step": len(self.lines) + 1, "loss": loss, "lr": lr, "tokens": tokens}
        line |= {"pairs": pairs, "seconds": round(self.before + seconds, 3), "grad_norm": grad_norm}
        self.lines.append(json.dumps(line) + "\n")
        self.file.write(self.lines[-1])
        self.tokens, self.pairs = self.tokens + tokens, self.pairs + pairs
        count, unit = (self.tokens, "tokens") if self.tokens else (self.pairs, "pairs")
        self.bar.set_postfix_str(f"loss {loss:.4f}, {count / seconds:,.0f} {unit}/s", refresh=False)
        self.bar.update()


def train(
    groups,
    rewards_at,
    steps,
    split,
    targets,
    loss,
    args,
    log,
    checkpoints=None,
    memory=None,
    ordered=False,
):
    """Minimise the mean loss over `steps`, one optimizer step and one JSON line in `log` for each.

    groups: [matrices that SOAP preconditions, other parameters], updated in place;
    rewards_at(responses) -> (their float32 rewards, with gradient; tokens run); steps: of each, for
    each process, its micro-batches, arrays of pair indices; targets: arrays (N,) for the loss;
    loss(reward_a, reward_b, *targets, done) -> the sum over these pairs, where done in [0, 1) says
    how much of the training lies behind; checkpoints: where to resume from and write to; memory:
    Offload's, in bytes; ordered: whether gradients are added up `in_one_order`. Raise InputError
    where there is nothing to train on, and where the loss or a gradient is not finite.
    """
    member = f"member {args.iteration}"
    if not steps:
        raise cli.InputError(
            f"{member}: no pair is left to train on: all are identical after encoding (a larger "
            "--max-length may help, with --train head in another run) or have tied votes, which "
            "losses on majority labels leave out"
        )
    optimizer, lines = make_optimizer(groups, args, memory), []
    if checkpoints:
        checkpoints.check_disk(optimizer.nbytes, sum(p.nbytes for group in groups for p in group))
        lines = checkpoints.resume(optimizer)
    step_log = StepLog(log, lines, len(steps), member)
    with step_log.bar:
        for number in range(len(lines), len(steps)):
            pairs = np.concatenate([batch for batches in steps[number] for batch in batches])
            batches, done = steps[number][parallel.rank()], number / len(steps)
            given = batches, len(pairs), rewards_at, split, targets, loss, done
            with in_one_order() if ordered else contextlib.nullcontext():
                value, tokens = backward(*given)
            optimizer.sum_gradients()
            norm = torch.nn.utils.get_total_norm(optimizer.gradients()).item()
            values = parallel.gathered((value, tokens, norm**2))
            value, tokens, square = map(sum, zip(*values))
            norm = math.sqrt(square)
            if not (math.isfinite(value) and math.isfinite(norm)):
                prompts = dict.fromkeys(np.searchsorted(split.pair_start, pairs, "right") - 1)
                names = ", ".join(split.prompt_id[i] for i in list(prompts)[:5])
                raise cli.InputError(
                    f"{member}, step {number + 1}: loss {value}, gradient norm {norm}; a lower "
                    f"--lr may help, or leaving out a prompt of this step ({names}, ..)"
                )
            rate = args.lr * schedule(number, len(steps), args.warmup)
            optimizer.step(rate)
            step_log.add(value, rate, tokens, len(pairs), norm)
            if checkpoints and checkpoints.due():
                checkpoints.write(optimizer, lines)
    optimizer.close()


def train_full(
    args, reward_model, split, sequences, targets, loss, keep, rng, log, checkpoints=None, more=()
):
    """Train all parameters, or adapters and head, on whole prompts, for args.epochs epochs.

    sequences: token ids of every distinct response; targets, loss: as for `train`; keep bool (N,):
    pairs to train on; more: parameters of the loss.
    """
    rm.check_positions(reward_model, sequences)
    a, b, lengths = split.a, split.b, np.array([len(ids) for ids in sequences])

    def size(responses):
        return rm.count_tokens(reward_model, [sequences[i] for i in responses])

    def rewards_at(responses):
        ids = [sequences[i] for i in responses]
        if room:
            room.begin()
        rewards = rm.rewards_of_batch(reward_model, ids, args.micro_batch_tokens)
        return rewards, int(lengths[responses].sum())

    def dealt(step):
        """The micro-batches of each process: whole prompts are dealt to them by their tokens."""
        loads = [lengths[np.union1d(a[pairs], b[pairs])].sum() for pairs in step]
        return [
            micro_batches(prompts, a, b, lengths, size, args.micro_batch_tokens)
            for prompts in parallel.deal(step, loads)
        ]

    order = split.pair_start, keep, args.pairs_per_step, rng
    steps = [dealt(s) for _ in range(args.epochs) for s in steps_of_prompts(*order)]
    model, on_gpu = reward_model.model, reward_model.model.device.type == "cuda"
    groups = parameter_groups(model)
    groups[1].extend(more)
    memory = None if args.optimizer_memory_gb is None else args.optimizer_memory_gb * 2**30
    room, ordered = None, False
    if on_gpu:  # Memory is what a card has least of.
        ordered = has_one_order(reward_model, sequences)
        memory, room = budget.of_card(model, groups, args)
    recompute_activations(model, room)
    given = groups, rewards_at, steps, split, targets, loss, args, log
    train(*given, checkpoints, memory, ordered)
    recompute_activations(model, False)


def spread(features):
    """Return the standard deviation of each feature, (d,) of features (R, d), by which they are
    divided; infinite where a feature is constant, so that it counts for nothing anywhere."""
    return np.where(np.ptp(features, 0) > 0, features.std(0) + 1e-6, np.inf).astype(features.dtype)


def train_head(args, weight, split, features, targets, loss, keep, rng, log, more=()):
    """Train heads (K, d) alone, on features float32 (R, d) of section 4's frozen backbone.

    The loss is given rewards (n,), of several heads (n, K). All features are trained at unit scale,
    so that one learning rate fits them all; the scale is folded into the heads afterwards.
    """
    scale = torch.from_numpy(spread(features)).to(weight.device)
    scaled = torch.from_numpy(features).to(weight.device) / scale

    def rewards_at(responses):
        return scaled[responses] @ (weight[0] if len(weight) == 1 else weight.T), 0

    steps = [[step] for step in steps_of_pairs(keep, args.pairs_per_step, args.epochs, rng)]
    train([[], [weight, *more]], rewards_at, steps, split, targets, loss, args, log)
    weight.data.div_(scale)


# ---- flags

# These flags change the result. The others are about speed, memory and place.
SETTINGS = (
    "seed lr epochs pairs_per_step weight_decay warmup precondition_frequency "
    "max_precondition_dim dtype max_length date"
).split()


def add_scoring_flags(parser):
    """Add the flags of every script that scores the data of a run."""
    add = parser.add_argument
    provenance.add_flags(parser)
    words = "tokens of prompt and response; longer ones lose the prompt's beginning"
    add("--max-length", type=cli.natural, default=2048, help=words)
    words = "of the parameters (default bfloat16 on a GPU, float32 on a CPU)"
    add("--dtype", choices=rm.DTYPES, help=words)
    rm.add_tokens_flag(parser)


def add_flags(
    parser, lr="full 2e-5; lora 2e-4; head 1e-3", epochs="1; head: 10", weight_decay="0.1; head: 5"
):
    """Add the flags that all training scripts have; None stands for a default that fill_in sets,
    of which the words say what it is."""
    add = parser.add_argument
    rm.add_flags(parser)
    words = "of heads and order; each training draws its own from it"
    add("--seed", type=cli.seed, default=0, help=words)
    # optimizer (SOAP)
    add("--lr", type=cli.positive, help=f"peak learning rate ({lr})")
    add("--epochs", type=cli.natural, help=f"passes over the train pairs (default {epochs})")
    add("--pairs-per-step", type=cli.natural, default=64, help="the paper: up to 512")
    add("--weight-decay", type=cli.nonnegative, help=f"decoupled (default {weight_decay})")
    words = "fraction of the steps in which the rate rises, before it falls to zero"
    add("--warmup", type=cli.fraction, default=0.03, help=words)
    words = "steps between updates of SOAP's eigenbases"
    add("--precondition-frequency", type=cli.natural, default=5, help=words)
    words = "larger dimensions are not preconditioned (default 4096; of adapters the rank)"
    add("--max-precondition-dim", type=cli.natural, help=words)
    add_scoring_flags(parser)
    words = "GiB of the device for float32 masters, SOAP's state and copy buffers; the rest is "
    words += "paged through host memory (default: what is free; on a CPU all)"
    add("--optimizer-memory-gb", type=cli.nonnegative, metavar="GB", help=words)


def add_checkpoint_flag(parser):
    """Add --checkpoint-minutes, which joint training does without."""
    words = "between checkpoints, from which killed training continues; 0: none"
    parser.add_argument("--checkpoint-minutes", type=cli.nonnegative, default=30, help=words)


def fill_in(args, **defaults):
    """Set the flags that were not given: to `defaults`, and else to what --device decides."""
    of_device = {"dtype": "float32" if args.device == "cpu" else "bfloat16"}
    of_device["micro_batch_tokens"] = rm.default_tokens(args.device)
    for name, value in (of_device | defaults).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
