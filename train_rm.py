"""One iteration of forward stagewise additive modelling (section 4): train reward model j, score everything with it.

    python train_rm.py --run runs/demo --iteration 1 --base runs/demo/base --lr 3e-3          (20 seconds on 2 cores)
    python train_rm.py --run runs/multipref --iteration 1 --base OpenRLHF/Llama-3-8b-sft-mixture

Stage j reads the prepared data, the rewards of members 1..j-1 and their weights, computes the residual
eps_j = p - p_hat_{j-1}, trains r_j from the same base on the target that --target makes of it, and writes
RUN/member_0j, RUN/rewards/0j_SPLIT.npy and RUN/logs/0j.jsonl.   --export J turns member J of a head or lora run into a plain directory;
--plan --base llama-3-8b trains nothing and says what training takes in memory, disk and hours. On N GPUs of one machine:
torchrun --standalone --nproc-per-node N -- train_rm.py --run .., where the lone -- keeps --run from torchrun.
"""

import contextlib
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from pytorch_optimizer import SOAP
from tqdm import tqdm
from transformers import AutoConfig

from pairwise import adapter, parallel, plan
from pairwise import reward_model as rm
from pairwise.checkpoint import Checkpoints
from pairwise.offload import MAX_PRECONDITION_DIM, Offload, names_memory_flags, recompute_activations
from pairwise.run_dir import (
    InputError, Parser, begin_stage, data_hashes, end_stage, hash_file, import_evaluator, member_name, must_agree, natural, nonnegative, positive,
    read_continuations, read_json, read_rewards, read_splits, read_weights, replacing, reward_path, run_main, seed, share, stage_done,
    write_array)

# ---- the method

# What member j > 1 is trained towards, from the votes p, the ensemble so far p_hat, and j. Member 1 has t = p in all of them.
# Adding yours is adding a line. `residual` is the paper's text; `centered` its objective averaged over both orders of a pair.
TARGETS = {
    "p": ("t = p", lambda p, p_hat, j: p),
    "residual": ("t = p - p_hat", lambda p, p_hat, j: p - p_hat),
    "centered": ("t = 1/2 + (p - p_hat)", lambda p, p_hat, j: 0.5 + (p - p_hat)),
    "mixture": ("t = p_hat + j (p - p_hat)", lambda p, p_hat, j: p_hat + j * (p - p_hat)),
}


def target_of(name, p, rewards, alpha, a, b):
    """Target t_j, float64 (N,), of stage j = len(alpha) + 1.

    p (N,): vote fractions; rewards float32 (j-1, R) and alpha (j-1,): the ensemble so far; a, b (N,): the responses of each pair.
    """
    if not len(alpha):
        return p
    votes = import_evaluator().votes(rewards, a, b) / 2  # V_i, (j-1, N): 1, 0, or 1/2 on an exact tie
    p_hat = alpha @ votes  # section 2
    return TARGETS[name][1](p, p_hat, len(alpha) + 1)  # eps_j = p - p_hat is in there


def squared_error(reward_a, reward_b, target):
    """Sum over pairs of (t - sigmoid(r(x, y1) - r(x, y2)))^2, section 4's objective; all float32 (pairs,)."""
    return (target - torch.sigmoid(reward_a - reward_b)).square().sum()


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
    return [[order[at : at + pairs_per_step]] for order in (rng.permutation(pairs) for _ in range(epochs)) for at in range(0, len(order), pairs_per_step)]


def micro_batches(step, a, b, lengths, size, tokens):
    """Split a step for gradient accumulation: arrays of pair indices whose distinct responses run at most `tokens` tokens.

    step: arrays of pair indices, each of one prompt; lengths (R,): tokens per response; size(responses) -> tokens that are run for them
    in one forward pass. Prompts stay whole, those of similar length go together; one that is too large alone is a micro-batch.
    """
    out = []
    for part in sorted(step, key=lambda part: (max(lengths[a[part]].max(), lengths[b[part]].max()), part[0]), reverse=True):
        together = np.concatenate([out[-1], part]) if out else part
        if out and size(np.union1d(a[together], b[together])) <= tokens:
            out[-1] = together
        else:
            out.append(part)
    return out


def schedule(step, steps, warmup):
    """Learning-rate factor of a step: linear over the first `warmup` share of the steps (at least one), then cosine to zero."""
    rise = max(1, round(warmup * steps))
    return (step + 1) / rise if step < rise else 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


# ---- training


def parameter_groups(model):
    """SOAP's groups of what is trained: the layers' matrices, or adapters, are preconditioned; for embedding, head and norms it is plain Adam."""
    apart, trained = (rm.head(model).weight, model.get_input_embeddings().weight), [p for p in model.parameters() if p.requires_grad]
    plain = [p for p in trained if p.ndim < 2 or any(p is other for other in apart)]
    return [[p for p in trained if not any(p is other for other in plain)], plain]


def train(groups, rewards_at, steps, pairs, args, log, prompts=None, checkpoints=None, budget=None):
    """Minimise the squared error over `steps`, one optimizer step each; updates the parameters, appends a JSON line per step to `log`.

    groups: [matrices that SOAP preconditions, other parameters]; rewards_at(responses) -> (float32 rewards of these responses, with gradient;
    tokens); steps: of each, for each process, its micro-batches, arrays of pair indices; pairs: (a, b, target) arrays over all pairs; prompts: prompt
    id of every pair; checkpoints: where to resume from and write to; budget: Offload's. Raises InputError where there is nothing to train on, and
    where the loss or a gradient is not finite.
    """
    if not steps:
        raise InputError(f"member {args.iteration}: no pair is left to train on: all are identical after encoding; a larger --max-length may help")
    a, b, target = pairs
    # The optimizer works on float32 masters: in BF16 alone most of a small update is lost to rounding. In float32 they are the parameters.
    optimizer = Offload(
        [{"params": groups[0], "max_precondition_dim": args.max_precondition_dim}, {"params": groups[1], "max_precondition_dim": 1}],
        lambda groups: SOAP(groups, lr=args.lr, weight_decay=args.weight_decay, precondition_frequency=args.precondition_frequency), budget)
    lines = []
    if checkpoints:
        checkpoints.check_disk(optimizer.nbytes, sum(p.nbytes for group in groups for p in group))
        lines = checkpoints.resume(optimizer)
        log.write("".join(lines))
    before = json.loads(lines[-1])["seconds"] if lines else 0
    started, seen, pairs_seen = time.time(), 0, 0
    with tqdm(total=len(steps), initial=len(lines), desc=f"member {args.iteration}", unit="step", mininterval=1, disable=parallel.rank() > 0) as bar:
        for number in range(len(lines), len(steps)):
            step = steps[number]
            whole = np.concatenate([micro for share in step for micro in share])  # the pairs of all processes
            count, loss, tokens = len(whole), 0.0, 0
            for micro in step[parallel.rank()]:
                responses, index = np.unique(np.concatenate([a[micro], b[micro]]), return_inverse=True)  # each response once
                rewards, used = rewards_at(responses)
                index = torch.from_numpy(index).to(rewards.device)
                goal = torch.from_numpy(target[micro]).to(rewards)
                error = squared_error(rewards[index[: len(micro)]], rewards[index[len(micro) :]], goal) / count
                error.backward()
                loss += error.item()
                tokens += used
            optimizer.sum_gradients()
            norm = torch.nn.utils.get_total_norm(optimizer.gradients()).item()
            loss, tokens, square = map(sum, zip(*parallel.gathered((loss, tokens, norm**2))))
            norm = math.sqrt(square)
            if not math.isfinite(loss) or not math.isfinite(norm):
                named = list(dict.fromkeys(prompts[whole].tolist()))[:5] if prompts is not None else []
                raise InputError(f"member {args.iteration}, step {number + 1}: loss {loss}, gradient norm {norm}; a lower --lr may help" +
                                 (f", or leaving out a prompt of this step ({', '.join(map(str, named))}, ..)" if named else ""))
            rate = args.lr * schedule(number, len(steps), args.warmup)
            optimizer.step(rate)
            seen, pairs_seen = seen + tokens, pairs_seen + count
            line = {"step": number + 1, "loss": loss, "lr": rate, "tokens": tokens, "pairs": count,
                    "seconds": round(before + time.time() - started, 3), "grad_norm": norm}
            lines.append(json.dumps(line) + "\n")
            log.write(lines[-1])
            if checkpoints and checkpoints.due():
                checkpoints.write(optimizer, lines)
            bar.update()
            done, what = (seen, "tokens") if seen else (pairs_seen, "pairs")
            bar.set_postfix_str(f"loss {loss:.4f}, {done / (time.time() - started):,.0f} {what}/s", refresh=False)
    optimizer.close()


def train_full(args, model, split, sequences, target, keep, rng, log, checkpoints=None):
    """All parameters, or adapters and head, on whole prompts, for args.epochs epochs; sequences: token ids of every distinct response."""
    lengths = np.array([len(ids) for ids in sequences])
    rm.check_positions(model, sequences)

    def size(responses):
        return rm.count_tokens(model, [sequences[i] for i in responses])

    def rewards_at(responses):
        return rm.rewards_of_batch(model, [sequences[i] for i in responses], args.micro_batch_tokens), int(lengths[responses].sum())

    steps = [step for _ in range(args.epochs) for step in steps_of_prompts(split.pair_start, keep, args.pairs_per_step, rng)]
    steps = [parallel.deal(step, [lengths[np.union1d(split.a[part], split.b[part])].sum() for part in step]) for step in steps]
    steps = [[micro_batches(part, split.a, split.b, lengths, size, args.micro_batch_tokens) for part in step] for step in steps]
    device = next(model.parameters()).device
    groups = parameter_groups(model)
    budget = None if args.optimizer_memory_gb is None else args.optimizer_memory_gb * 2**30
    if device.type == "cuda" and budget is None:
        budget = plan.optimizer_budget(torch.cuda.mem_get_info(device)[0], model, groups, args)
    recompute_activations(model, device.type == "cuda")  # memory is what a card has least of
    train(groups, rewards_at, steps, (split.a, split.b, target), args, log, prompts_of(split), checkpoints, budget)
    recompute_activations(model, False)


def prompts_of(split):
    """The prompt id of every pair, (N,)."""
    return np.repeat(np.array(split.prompt_id, object), np.diff(split.pair_start))


def train_head(args, weight, split, features, target, keep, rng, log):
    """The head's weight (1, d) alone, on stored features float32 (R, d) and shuffled pairs: section 4's frozen backbone."""
    scale = torch.from_numpy(features.std(0) + 1e-6).to(weight.device)  # one learning rate for all features: train on unit scale, fold it in after
    scaled = torch.from_numpy(features).to(weight.device) / scale
    steps = [[step] for step in steps_of_pairs(keep, args.pairs_per_step, args.epochs, rng)]
    train([[], [weight]], lambda responses: (scaled[responses] @ weight[0], 0), steps, (split.a, split.b, target), args, log, prompts_of(split))
    weight.data.div_(scale)


# ---- stages


def ask_features(args, stage, texts, tokenizer, inputs):
    """{name: float32 (R, d)}: a feature per response under the frozen base, computed once for all members of a run, in a stage of its own.

    texts: {name: (messages (P,), responses (P,) lists of str)}.
    """
    settings = {name: getattr(args, name) for name in ("max_length", "dtype")}
    paths = {name: args.run / "features" / f"{name}.npy" for name in texts}
    if not stage_done(args.run, stage, settings, inputs, list(paths.values())):
        started = begin_stage(args.run, stage, settings, inputs)
        model = rm.load_base(args.base, tokenizer, getattr(torch, args.dtype), args.device)
        for name, (messages, responses) in texts.items():
            sequences = rm.encode_split(tokenizer, messages, responses, args.max_length)
            features = rm.features_of(model, sequences, args.micro_batch_tokens, f"features, {name}")
            write_array(paths[name], features)
        end_stage(args.run, stage, settings, inputs, started, threads=args.threads, device=args.device)
    return {name: np.load(path) for name, path in paths.items()}


def score_continuations(args, j, model, tokenizer, texts, inputs):
    """Write rewards/0j_continuations.npy, float32 (prompts, n): a stage of its own, so that continuations may come later."""
    run, messages, responses = args.run, texts["messages"], texts["texts"]
    stage, path = f"{member_name(j)}_continuations", reward_path(run, j, "continuations")
    inputs = inputs | {"continuations.parquet": hash_file(run / "continuations.parquet")}
    if parallel.of_first(lambda: stage_done(run, stage, {}, inputs, [path])):
        return
    started = parallel.of_first(lambda: begin_stage(run, stage, {}, inputs))
    if args.train == "head":
        asked = {name: inputs[name] for name in inputs if not name.startswith("rewards")}
        features = ask_features(args, "features_continuations", {"continuations": (messages, responses)}, tokenizer, asked)["continuations"]
        rewards = rm.score_features(torch.from_numpy(features), rm.load_head(run / member_name(j)))
    else:
        model = model or rm.load_member(run, j, args.base, tokenizer, getattr(torch, args.dtype), args.device)
        sequences = rm.encode_split(tokenizer, messages, responses, args.max_length)
        rewards = rm.score_sequences(model, sequences, args.micro_batch_tokens, f"member {j}, continuations")
    if parallel.rank() == 0:
        write_array(path, rewards.reshape(len(messages), -1))
        end_stage(run, stage, {}, inputs, started)


def export(args):
    """Make the directory of member args.export, of a head or lora run, a plain one: all weights together, beside the head or the adapter alone.

    The adapter stays in a directory of its own: transformers would put one that lies beside the merged weights on top of them.
    """
    directory = args.run / member_name(args.export)
    kept = [name for name in ("head.safetensors", "adapter") if (directory / name).exists()]
    if not kept or (directory / "model.safetensors").exists():
        raise InputError(f"{directory}: " + ("already a plain directory" if (directory / "config.json").exists() else "no such member"))
    entry = read_json(args.run / "manifest.json")["stages"][member_name(args.export)]
    rm.check_base(entry, args.base, args.chat_template)
    tokenizer = rm.load_tokenizer(args.base, args.chat_template)
    model = rm.load_member(args.run, args.export, args.base, tokenizer, getattr(torch, entry["settings"]["dtype"]), args.device)
    if kept == ["adapter"]:
        adapter.merge(model)
    partial = directory.with_name(f".partial-{directory.name}")
    rm.save_member(model, tokenizer, partial)
    for path in sorted(partial.iterdir(), key=lambda path: path.suffix == ".safetensors"):  # the weights last: they say that all is there
        path.replace(directory / path.name)
    partial.rmdir()
    print(f"{directory}: plain directory written")


@parallel.together
@names_memory_flags
def main(args):
    run, j, first = args.run, args.iteration, parallel.rank() == 0
    if parallel.count() > 1 and (args.train == "head" or args.export or args.plan):
        raise InputError(f"{parallel.count()} processes found, 1 expected: --train head, --export and --plan share no work; leave torchrun out")
    if args.plan:
        return plan.show(args, parameter_groups)
    torch.set_num_threads(args.threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what is not decided by the seed is a bug, on a GPU too
    torch.use_deterministic_algorithms(True, warn_only=True)
    if args.export:
        return export(args)

    # The data and the ensemble so far, before the base model is looked for.
    splits, _ = read_splits(run)
    data = splits["train"]
    alpha = read_weights(run, j - 1) if j > 1 else np.zeros(0)
    rewards = read_rewards(run, "train", j - 1, (data.response_start[-1],))
    target = target_of(args.target, data.p, rewards, alpha, data.a, data.b)

    tokenizer = rm.load_tokenizer(args.base, args.chat_template)
    inputs = data_hashes(run) | rm.base_hashes(args.base, args.chat_template)
    ensemble = {f"rewards of member {i}": hash_file(reward_path(run, i, "train")) for i in range(1, j)}
    settings = {name: value for name in SETTINGS if (value := getattr(args, name)) is not None}
    if j > 1:
        must_agree(run, member_name(1), settings, inputs)  # the members of a run differ in their residual only
    outputs = [run / member_name(j), run / "logs" / f"{j:02d}.jsonl", *(reward_path(run, j, name) for name in splits)]
    texts, model = read_continuations(run), None
    checkpoints = Checkpoints(run, j, settings, inputs | ensemble, args.checkpoint_minutes)
    if parallel.of_first(lambda: stage_done(run, member_name(j), settings, inputs | ensemble, outputs)):
        print(f"member {j}: {run / member_name(j)} is there, skipped")
    else:
        started = parallel.of_first(lambda: begin_stage(run, member_name(j), settings, inputs | ensemble))
        torch.manual_seed(args.seed)
        head_seed, order_seed, adapter_seed = (int(s) for s in np.random.SeedSequence([args.seed, j]).generate_state(3))
        rng = np.random.default_rng(order_seed)
        trained = parallel.of_first(checkpoints.finished)  # by a call that was killed while it scored
        written = replacing(run / "logs" / f"{j:02d}.jsonl") if first and not trained else contextlib.nullcontext(os.devnull)
        with written as partial, open(partial, "w", encoding="utf-8") as log:
            if args.train == "head":
                found = ask_features(args, "features", {name: (s.messages, s.responses) for name, s in splits.items()}, tokenizer, inputs)
                keep = (found["train"][data.a] != found["train"][data.b]).any(1)
                weight = torch.nn.Parameter(torch.empty(1, found["train"].shape[1], device=args.device))
                rm.draw_head(weight, AutoConfig.from_pretrained(args.base), head_seed)
                train_head(args, weight, data, found["train"], target, keep, rng, log)
            else:
                sequences = {name: rm.encode_split(tokenizer, s.messages, s.responses, args.max_length) for name, s in splits.items()}
                keep = np.array([sequences["train"][a] != sequences["train"][b] for a, b in zip(data.a, data.b)])
                dtype = getattr(torch, args.dtype)
                if trained:
                    model = rm.load_member(run, j, args.base, tokenizer, dtype, args.device)
                else:
                    model = rm.load_base(args.base, tokenizer, dtype, args.device)
                    rm.draw_head(rm.head(model).weight, model.config, head_seed)
                    if args.train == "lora":
                        adapter.add(model, args.lora_rank, args.lora_alpha)
                        adapter.draw(model, adapter_seed)
                    train_full(args, model, data, sequences["train"], target, keep, rng, log, checkpoints)
        if first and not trained:
            with replacing(run / member_name(j)) as partial:
                if args.train == "head":
                    rm.save_head(weight, partial)
                elif args.train == "lora":
                    adapter.save(model, args.base, partial / "adapter")
                else:
                    rm.save_member(model, tokenizer, partial)
            checkpoints.finish()
        if args.train == "head":
            scores = {name: rm.score_features(torch.from_numpy(f), weight.detach().cpu()) for name, f in found.items()}
        else:
            scores = {name: rm.score_sequences(model, s, args.micro_batch_tokens, f"member {j}, {name}") for name, s in sequences.items()}
        for name, values in scores.items():
            if not np.isfinite(values).all():
                raise InputError(f"member {j}: rewards of {name} are not finite after the last step; a lower --lr may help")
        if first:
            for name, values in scores.items():
                write_array(reward_path(run, j, name), values)
            end_stage(run, member_name(j), settings, inputs | ensemble, started, base=str(args.base), target_formula=TARGETS[args.target][0],
                      threads=args.threads, device=args.device, processes=parallel.count(), micro_batch_tokens=args.micro_batch_tokens,
                      identical_pairs=int((~keep).sum()))
        said = f", {int((~keep).sum())} pairs left out, identical after encoding" if not keep.all() else ""
        print(f"member {j}: trained on {int(keep.sum()):,} pairs in {time.time() - started:.0f} s{said}")
    checkpoints.remove()
    if texts:
        score_continuations(args, j, model, tokenizer, texts, {"base model": inputs["base model"]} | ensemble)


# Flags that change the result; a run directory holds one choice of them. The others are about speed, memory and place.
SETTINGS = ("train", "target", "seed", "lr", "epochs", "pairs_per_step", "weight_decay", "warmup", "precondition_frequency", "max_precondition_dim",
            "lora_rank", "lora_alpha", "dtype", "max_length")


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    # what
    add("--run", type=Path, help="run directory with data/; --plan does without")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--iteration", type=natural, metavar="J", help="train member J, 1..")
    task.add_argument("--export", type=natural, metavar="J", help="train nothing: make the directory of member J of a head or lora run a plain one")
    task.add_argument("--plan", action="store_true", help="train nothing: print what training takes in memory, disk and hours; no weights, no GPU")
    add("--base", required=True, help="base model: hub id or transformers directory; for --plan also llama-3-8b")
    add("--chat-template", metavar="FILE", help="Jinja chat template, for a base without one")
    # objective
    add("--train", choices=("full", "lora", "head"), default="full", help="all parameters (the paper's appendix F.1), low-rank adapters and the head (ours, "
        "for a card of 24 GB), or the head on a frozen base (section 4)")
    add("--lora-rank", type=natural, help="of the adapters on every linear layer of the base (default 16)")
    add("--lora-alpha", type=positive, help="they are scaled by alpha / rank (default: twice the rank, so that another rank keeps the scale)")
    add("--target", choices=tuple(TARGETS), default="centered", help="; ".join(f"{name}: {formula}" for name, (formula, _) in TARGETS.items()))
    add("--seed", type=seed, default=0, help="of head and order; with J, so every member draws its own")
    # optimizer (SOAP)
    add("--lr", type=positive, help="peak learning rate (default 2e-5; head: 1e-3; lora: 2e-4, ours: adapters begin at zero and have few steps)")
    add("--epochs", type=natural, help="passes over the train pairs (default 1; head: 10)")
    add("--pairs-per-step", type=natural, default=64, help="pairs in an optimizer step, whole prompts (the paper: up to 512)")
    add("--weight-decay", type=nonnegative, help="decoupled (default 0.1; head: 5, the regularisation of a linear fit to convergence)")
    add("--warmup", type=share, default=0.03, help="share of the steps, at least one step, then cosine to zero")
    add("--precondition-frequency", type=natural, default=5, help="steps between updates of SOAP's eigenbases")
    add("--max-precondition-dim", type=natural, help="larger dimensions are not preconditioned (default 4096; lora: the rank, as the other side of an "
        "adapter is as long as the base's layer, and its preconditioner would be larger than the layer)")
    # size and speed
    add("--max-length", type=natural, default=2048, help="tokens of prompt and response; longer ones lose the prompt's beginning")
    add("--dtype", choices=("bfloat16", "float32"), help="of the parameters (default bfloat16 on a GPU, float32 on a CPU)")
    add("--micro-batch-tokens", type=natural, help="tokens run in one forward pass (default 8192; lora: 4096; on a CPU 1024)")
    add("--optimizer-memory-gb", type=nonnegative, metavar="GB", help="GiB of the device for float32 masters, SOAP's state and copy buffers; the rest is paged "
        "through host memory (default: what is free; on a CPU all)")
    add("--checkpoint-minutes", type=nonnegative, default=30, help="between checkpoints from which a killed full or lora training continues; 0: none (default 30)")
    add("--threads", type=natural, default=max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))), help="CPU threads (default: all; of "
        "several processes, of each its share)")
    add("--device", type=rm.device, default=rm.device(), help="cpu or cuda (default: cuda where there is one)")
    # the plan alone
    add("--members", type=natural, default=8, metavar="K", help="--plan: reward models to train")
    add("--gpu-gb", type=positive, default=80, help="--plan: memory of the card, in units of 10^9 bytes as on its label")
    add("--tflops", type=positive, default=790, help="--plan: BF16 TFLOP/s that large matrix products reach on the card (assumed: 790)")
    add("--utilisation", type=share, default=0.4, help="--plan: share of --tflops that training reaches")
    args = parser.parse_args(argv)
    if not args.run and not args.plan:
        parser.error("--run is missing")
    head, lora = args.train == "head", args.train == "lora"
    if not lora and not args.plan and (args.lora_rank or args.lora_alpha):
        parser.error("--lora-rank and --lora-alpha are for --train lora")
    cpu = args.device == "cpu" and not args.plan  # a plan is for a card
    rank = (args.lora_rank or 16) if lora or args.plan else None
    defaults = {"lr": {"full": 2e-5, "lora": 2e-4, "head": 1e-3}[args.train], "epochs": 10 if head else 1, "weight_decay": 5.0 if head else 0.1,
                "lora_rank": rank, "lora_alpha": rank and 2.0 * rank, "max_precondition_dim": rank if lora else MAX_PRECONDITION_DIM,
                "dtype": "float32" if cpu else "bfloat16", "micro_batch_tokens": 1024 if cpu else 4096 if lora else 8192}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


if __name__ == "__main__":
    run_main(main, parse_args())
