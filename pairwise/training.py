"""What every kind of training shares: steps and batches, the loop over steps, features of a frozen base, and the flags.

The objectives are the scripts' own: train_rm.py has the method's, train_joint.py the mixture's.
"""

import json
import math
import os
import time

import numpy as np
import torch
from pytorch_optimizer import SOAP
from tqdm import tqdm

from pairwise import cli, run_dir
from pairwise import reward_model as rm
from pairwise.scale import parallel
from pairwise.scale.offload import Offload, recompute_activations

# ---- steps and batches


def steps_of_prompts(pair_start, keep, pairs_per_step, rng):
    """Shuffle prompts and fill steps with whole prompts up to a budget of pairs: a list of steps, each a list of arrays of pair indices.

    pair_start (P+1,): the pairs of prompt i; keep bool (N,): pairs to train on. A prompt with more pairs than the budget is shuffled
    and split over several steps.
    """
    steps, room = [], 0
    for prompt in rng.permutation(len(pair_start) - 1):
        pairs = np.arange(pair_start[prompt], pair_start[prompt + 1])
        pairs = pairs[keep[pairs]]
        if len(pairs) > pairs_per_step:
            pairs = rng.permutation(pairs)
        for at in range(0, len(pairs), pairs_per_step):
            part = pairs[at : at + pairs_per_step]
            if len(part) > room:
                steps.append([])
                room = pairs_per_step
            steps[-1].append(part)
            room -= len(part)
    return [steps[i] for i in rng.permutation(len(steps))]


def steps_of_pairs(keep, pairs_per_step, epochs, rng):
    """Shuffle single pairs, anew in every epoch: a list of steps, each a list of one array of pair indices."""
    pairs = np.flatnonzero(keep)
    return [
        [order[at : at + pairs_per_step]]
        for order in (rng.permutation(pairs) for _ in range(epochs))
        for at in range(0, len(order), pairs_per_step)
    ]


def micro_batches(step, a, b, lengths, size, tokens):
    """Split a step for gradient accumulation: arrays of pair indices whose distinct responses run at most `tokens` tokens.

    step: arrays of pair indices, each of one prompt; lengths (R,): tokens per response; size(responses) -> tokens that are run for them
    in one forward pass. Prompts stay whole, those of similar length go together; one that is too large alone is a micro-batch.
    """
    out = []
    for part in sorted(
        step,
        key=lambda part: (max(lengths[a[part]].max(), lengths[b[part]].max()), part[0]),
        reverse=True,
    ):
        together = np.concatenate([out[-1], part]) if out else part
        if out and size(np.union1d(a[together], b[together])) <= tokens:
            out[-1] = together
        else:
            out.append(part)
    return out


def schedule(step, steps, warmup):
    """Learning-rate factor of a step: linear over the first `warmup` share of the steps (at least one), then cosine to zero."""
    rise = max(1, round(warmup * steps))
    return (
        (step + 1) / rise
        if step < rise
        else 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
    )


# ---- training


def settle(args):
    """Threads as asked, and nothing that the seed does not decide: that would be a bug, on a GPU too."""
    torch.set_num_threads(args.threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)


def parameter_groups(model):
    """SOAP's groups of what is trained: the layers' matrices, or adapters, are preconditioned; for embedding, head and norms it is plain Adam."""
    apart, trained = (
        (rm.head(model).weight, model.get_input_embeddings().weight),
        [p for p in model.parameters() if p.requires_grad],
    )
    plain = [p for p in trained if p.ndim < 2 or any(p is other for other in apart)]
    return [[p for p in trained if not any(p is other for other in plain)], plain]


def train(
    groups, rewards_at, steps, pairs, loss, args, log, prompts=None, checkpoints=None, budget=None
):
    """Minimise the mean loss over `steps`, one optimizer step each; updates the parameters, appends a JSON line per step to `log`.

    groups: [matrices that SOAP preconditions, other parameters]; rewards_at(responses) -> (float32 rewards of these responses, with gradient;
    tokens); steps: of each, for each process, its micro-batches, arrays of pair indices; pairs: (a, b, *targets), arrays over all pairs;
    loss(reward_a, reward_b, *targets, done) -> sum over these pairs, done being the share of the steps that lies behind, in [0, 1); prompts:
    prompt id of every pair; checkpoints: where to resume from and write to; budget: Offload's. Raises InputError where there is nothing to train
    on, and where the loss or a gradient is not finite.
    """
    if not steps:
        raise cli.InputError(
            f"member {args.iteration}: no pair is left to train on: all are identical after encoding (a larger --max-length may help)"
            + " or have tied votes (--loss bt, margin)"
        )
    a, b, *targets = pairs
    # The optimizer works on float32 masters: in BF16 alone most of a small update is lost to rounding. In float32 they are the parameters.
    optimizer = Offload(
        [
            {"params": groups[0], "max_precondition_dim": args.max_precondition_dim},
            {"params": groups[1], "max_precondition_dim": 1},
        ],
        lambda groups: SOAP(
            groups,
            lr=args.lr,
            weight_decay=args.weight_decay,
            precondition_frequency=args.precondition_frequency,
        ),
        budget,
    )
    lines = []
    if checkpoints:
        checkpoints.check_disk(optimizer.nbytes, sum(p.nbytes for group in groups for p in group))
        lines = checkpoints.resume(optimizer)
        log.write("".join(lines))
    before = json.loads(lines[-1])["seconds"] if lines else 0
    started, seen, pairs_seen = time.time(), 0, 0
    with tqdm(
        total=len(steps),
        initial=len(lines),
        desc=f"member {args.iteration}",
        unit="step",
        mininterval=1,
        disable=parallel.rank() > 0,
    ) as bar:
        for number in range(len(lines), len(steps)):
            step = steps[number]
            whole = np.concatenate(
                [micro for share in step for micro in share]
            )  # the pairs of all processes
            count, total, tokens = len(whole), 0.0, 0
            for micro in step[parallel.rank()]:
                responses, index = np.unique(
                    np.concatenate([a[micro], b[micro]]), return_inverse=True
                )  # each response once
                rewards, used = rewards_at(responses)
                index = torch.from_numpy(index).to(rewards.device)
                goals = (torch.from_numpy(values[micro]).to(rewards) for values in targets)
                error = (
                    loss(
                        rewards[index[: len(micro)]],
                        rewards[index[len(micro) :]],
                        *goals,
                        number / len(steps),
                    )
                    / count
                )
                error.backward()
                total += error.item()
                tokens += used
            optimizer.sum_gradients()
            norm = torch.nn.utils.get_total_norm(optimizer.gradients()).item()
            total, tokens, square = map(sum, zip(*parallel.gathered((total, tokens, norm**2))))
            norm = math.sqrt(square)
            if not math.isfinite(total) or not math.isfinite(norm):
                named = (
                    list(dict.fromkeys(prompts[whole].tolist()))[:5] if prompts is not None else []
                )
                raise cli.InputError(
                    f"member {args.iteration}, step {number + 1}: loss {total}, gradient norm {norm}; a lower --lr may help"
                    + (
                        f", or leaving out a prompt of this step ({', '.join(map(str, named))}, ..)"
                        if named
                        else ""
                    )
                )
            rate = args.lr * schedule(number, len(steps), args.warmup)
            optimizer.step(rate)
            seen, pairs_seen = seen + tokens, pairs_seen + count
            line = {
                "step": number + 1,
                "loss": total,
                "lr": rate,
                "tokens": tokens,
                "pairs": count,
                "seconds": round(before + time.time() - started, 3),
                "grad_norm": norm,
            }
            lines.append(json.dumps(line) + "\n")
            log.write(lines[-1])
            if checkpoints and checkpoints.due():
                checkpoints.write(optimizer, lines)
            bar.update()
            done, what = (seen, "tokens") if seen else (pairs_seen, "pairs")
            bar.set_postfix_str(
                f"loss {total:.4f}, {done / (time.time() - started):,.0f} {what}/s", refresh=False
            )
    optimizer.close()


def train_full(
    args, reward_model, split, sequences, targets, loss, keep, rng, log, checkpoints=None, more=()
):
    """All parameters, or adapters and head, on whole prompts, for args.epochs epochs.

    sequences: token ids of every distinct response; targets, loss: as for `train`; keep bool (N,): pairs to train on; more: parameters of the loss.
    """
    lengths = np.array([len(ids) for ids in sequences])
    rm.check_positions(reward_model, sequences)

    def size(responses):
        return rm.count_tokens(reward_model, [sequences[i] for i in responses])

    def rewards_at(responses):
        return rm.rewards_of_batch(
            reward_model, [sequences[i] for i in responses], args.micro_batch_tokens
        ), int(lengths[responses].sum())

    steps = [
        step
        for _ in range(args.epochs)
        for step in steps_of_prompts(split.pair_start, keep, args.pairs_per_step, rng)
    ]
    steps = [
        parallel.deal(
            step, [lengths[np.union1d(split.a[part], split.b[part])].sum() for part in step]
        )
        for step in steps
    ]
    steps = [
        [
            micro_batches(part, split.a, split.b, lengths, size, args.micro_batch_tokens)
            for part in step
        ]
        for step in steps
    ]
    device, groups = reward_model.device, parameter_groups(reward_model.model)
    groups[1].extend(more)
    budget = None if args.optimizer_memory_gb is None else args.optimizer_memory_gb * 2**30
    if device.type == "cuda" and budget is None:
        budget = budget.optimizer_budget(
            torch.cuda.mem_get_info(device)[0], reward_model.model, groups, args
        )
    recompute_activations(
        reward_model.model, device.type == "cuda"
    )  # memory is what a card has least of
    train(
        groups,
        rewards_at,
        steps,
        (split.a, split.b, *targets),
        loss,
        args,
        log,
        prompts_of(split),
        checkpoints,
        budget,
    )
    recompute_activations(reward_model.model, False)


def prompts_of(split):
    """The prompt id of every pair, (N,)."""
    return np.repeat(np.array(split.prompt_id, object), np.diff(split.pair_start))


def train_head(args, weight, split, features, targets, loss, keep, rng, log, more=()):
    """Heads (K, d) alone, on stored features float32 (R, d) and shuffled pairs: section 4's frozen backbone. Rewards are (n,), of several heads (n, K)."""
    scale = torch.from_numpy(features.std(0) + 1e-6).to(
        weight.device
    )  # one learning rate for all features: train on unit scale, fold it in after
    scaled = torch.from_numpy(features).to(weight.device) / scale
    steps = [[step] for step in steps_of_pairs(keep, args.pairs_per_step, args.epochs, rng)]
    train(
        [[], [weight, *more]],
        lambda responses: (scaled[responses] @ (weight[0] if len(weight) == 1 else weight.T), 0),
        steps,
        (split.a, split.b, *targets),
        loss,
        args,
        log,
        prompts_of(split),
    )
    weight.data.div_(scale)


# ---- features


def ask_features(args, stage, texts, tokenizer, inputs):
    """{name: float32 (R, d)}: a feature per response under the frozen base, computed once for all members of a run, in a stage of its own.

    texts: {name: (messages (P,), responses (P,) lists of str)}.
    """
    settings = {name: getattr(args, name) for name in ("max_length", "dtype")}
    paths = {name: args.run / "features" / f"{name}.npy" for name in texts}
    if not run_dir.stage_done(args.run, stage, settings, inputs, list(paths.values())):
        started = run_dir.begin_stage(args.run, stage, settings, inputs)
        reward_model = rm.load_base(args.base, tokenizer, getattr(torch, args.dtype), args.device)
        for name, (messages, responses) in texts.items():
            sequences = rm.encode_split(tokenizer, messages, responses, args.max_length)
            features = rm.features_of(
                reward_model, sequences, args.micro_batch_tokens, f"features, {name}"
            )
            run_dir.write_array(paths[name], features)
        run_dir.end_stage(
            args.run, stage, settings, inputs, started, threads=args.threads, device=args.device
        )
    return {name: np.load(path) for name, path in paths.items()}


# ---- flags

# Those that change the result.
SETTINGS = (
    "seed",
    "lr",
    "epochs",
    "pairs_per_step",
    "weight_decay",
    "warmup",
    "precondition_frequency",
    "max_precondition_dim",
    "dtype",
    "max_length",
)


def add_flags(parser):
    """The flags that all training scripts have."""
    add = parser.add_argument
    rm.add_flags(parser)
    add(
        "--seed",
        type=cli.seed,
        default=0,
        help="of head and order; with J, so every member draws its own",
    )
    # optimizer (SOAP)
    add(
        "--lr",
        type=cli.positive,
        help="peak learning rate (default 2e-5; head: 1e-3; lora: 2e-4, ours: adapters begin at zero and have few steps)",
    )
    add("--epochs", type=cli.natural, help="passes over the train pairs (default 1; head: 10)")
    add(
        "--pairs-per-step",
        type=cli.natural,
        default=64,
        help="pairs in an optimizer step, whole prompts (the paper: up to 512)",
    )
    add(
        "--weight-decay",
        type=cli.nonnegative,
        help="decoupled (default 0.1; head: 5, the regularisation of a linear fit to convergence)",
    )
    add(
        "--warmup",
        type=cli.fraction,
        default=0.03,
        help="share of the steps, at least one step, then cosine to zero",
    )
    add(
        "--precondition-frequency",
        type=cli.natural,
        default=5,
        help="steps between updates of SOAP's eigenbases",
    )
    add(
        "--max-precondition-dim",
        type=cli.natural,
        help="larger dimensions are not preconditioned (default 4096; lora: the rank, as the other side of an "
        "adapter is as long as the base's layer, and its preconditioner would be larger than the layer)",
    )
    # size and speed
    add(
        "--max-length",
        type=cli.natural,
        default=2048,
        help="tokens of prompt and response; longer ones lose the prompt's beginning",
    )
    add(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="of the parameters (default bfloat16 on a GPU, float32 on a CPU)",
    )
    add(
        "--micro-batch-tokens",
        type=cli.natural,
        help="tokens run in one forward pass (default 8192; lora: 4096; on a CPU 1024)",
    )
    add(
        "--optimizer-memory-gb",
        type=cli.nonnegative,
        metavar="GB",
        help="GiB of the device for float32 masters, SOAP's state and copy buffers; the rest is paged "
        "through host memory (default: what is free; on a CPU all)",
    )
    add(
        "--checkpoint-minutes",
        type=cli.nonnegative,
        default=30,
        help="between checkpoints from which a killed full or lora training of "
        "train_rm.py continues; 0: none (default 30)",
    )


def fill_in(args, **defaults):
    """Set the flags that were not given."""
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
