"""One iteration of forward stagewise additive modelling (section 4): train reward model j, score everything with it.

    python train_rm.py --run runs/demo --iteration 1 --base runs/demo/base --lr 3e-3          (20 seconds on 2 cores)
    python train_rm.py --run runs/multipref --iteration 1 --base OpenRLHF/Llama-3-8b-sft-mixture

Stage j reads the prepared data, the rewards of members 1..j-1 and their weights, computes the residual
eps_j = p - p_hat_{j-1}, trains r_j from the same base on the target that --target makes of it, and writes
RUN/member_0j, RUN/rewards/0j_SPLIT.npy and RUN/logs/0j.jsonl.   --export J turns member J of a head or lora run into a plain directory;
--plan --base llama-3-8b trains nothing and says what training takes in memory, disk and hours. --from MODEL --iteration J trains nothing either:
an existing reward model scores the data and becomes member J of a run of such models. On N GPUs of one machine:
torchrun --standalone --nproc-per-node N -- train_rm.py --run .., where the lone -- keeps --run from torchrun.
"""

import contextlib
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid
from transformers import AutoConfig

from pairwise import cli, data, existing, members, provenance, run_dir, training
from pairwise import reward_model as rm
from pairwise.scale import adapter, budget, parallel
from pairwise.scale.checkpoint import Checkpoints
from pairwise.scale.offload import MAX_PRECONDITION_DIM, names_memory_flags

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
    votes = (
        cli.import_evaluator().votes(rewards, a, b) / 2
    )  # V_i, (j-1, N): 1, 0, or 1/2 on an exact tie
    p_hat = alpha @ votes  # section 2
    return TARGETS[name][1](p, p_hat, len(alpha) + 1)  # eps_j = p - p_hat is in there


# The loss of each pair, float32 (pairs,), of d = r(x, y1) - r(x, y2), target t and margin m, all of that shape. Adding yours is adding a line.
# `mse` is section 4's objective, `bce` its like by log-likelihood. `bt` (Bradley-Terry) and `margin` (Beyond the Binary, equation 4) are on majority
# labels: t = p, so sign(2t - 1) d is r_w - r_l, the winner's reward less the loser's, and pairs whose votes tie are dropped.
LOSSES = {  # name: (formula, function, whether on majority labels)
    "mse": ("(t - sigmoid(d))^2", lambda d, t, m: (t - torch.sigmoid(d)).square(), False),
    "bce": (
        "-(t log sigmoid(d) + (1 - t) log sigmoid(-d)), t clipped to [0, 1]",
        lambda d, t, m: binary_cross_entropy_with_logits(d, t.clamp(0, 1), reduction="none"),
        False,
    ),
    "bt": ("-log sigmoid(r_w - r_l)", lambda d, t, m: -logsigmoid((2 * t - 1).sign() * d), True),
    "margin": (
        "-log sigmoid(r_w - r_l - m)",
        lambda d, t, m: -logsigmoid((2 * t - 1).sign() * d - m),
        True,
    ),
}


def margin_of(split, source):
    """m = |sum - n/2| / (n/2), float64 (N,) in [0, 1], Beyond the Binary's equation 3: of each pair's votes, or of its judgments (none: 0)."""
    first, n = (
        (split.judgments[:, 0], split.judgments.sum(1))
        if source == "judgments"
        else (split.votes_a, split.n)
    )
    return np.abs(2 * first - n) / np.maximum(n, 1)


# ---- stages


def score_continuations(args, j, model, tokenizer, texts, inputs):
    """Write rewards/0j_continuations.npy, float32 (prompts, n): a stage of its own, so that continuations may come later."""
    run, messages, responses = args.run, texts["messages"], texts["texts"]
    stage, path = (
        f"{run_dir.member_name(j)}_continuations",
        run_dir.reward_path(run, j, "continuations"),
    )
    inputs = inputs | {"continuations.parquet": run_dir.hash_file(run / "continuations.parquet")}
    if parallel.of_first(lambda: run_dir.stage_done(run, stage, {}, inputs, [path])):
        return
    started = parallel.of_first(lambda: run_dir.begin_stage(run, stage, {}, inputs))
    if args.train == "head":
        asked = {name: inputs[name] for name in inputs if not name.startswith("rewards")}
        features = training.ask_features(
            args,
            "features_continuations",
            {"continuations": (messages, responses)},
            tokenizer,
            asked,
        )["continuations"]
        rewards = rm.score_features(
            torch.from_numpy(features), members.load_head(run / run_dir.member_name(j))
        )
    else:
        model = model or members.load_member(
            run, j, args.base, tokenizer, getattr(torch, args.dtype), args.device
        )
        sequences = rm.encode_split(tokenizer, messages, responses, args.max_length)
        rewards = rm.score_sequences(
            model, sequences, args.micro_batch_tokens, f"member {j}, continuations"
        )
    if parallel.rank() == 0:
        run_dir.write_array(path, rewards.reshape(len(messages), -1))
        run_dir.end_stage(run, stage, {}, inputs, started)


def export(args):
    """Make the directory of member args.export, of a head or lora run, a plain one: all weights together, beside the head or the adapter alone.

    The adapter stays in a directory of its own: transformers would put one that lies beside the merged weights on top of them.
    """
    directory = args.run / run_dir.member_name(args.export)
    if directory.is_symlink():
        raise cli.InputError(
            f"{directory}: a link to the run that this one was pruned from found; --export with --run of that one"
        )
    kept = [name for name in ("head.safetensors", "adapter") if (directory / name).exists()]
    if not kept or (directory / "model.safetensors").exists():
        raise cli.InputError(
            f"{directory}: "
            + (
                "already a plain directory"
                if (directory / "config.json").exists()
                else "no such member"
            )
            + "; train_joint.py --export writes those of a joint run"
            * (run_dir.made_otherwise(args.run) == "joint")
        )
    entry = run_dir.read_json(args.run / "manifest.json")["stages"][
        run_dir.member_name(args.export)
    ]
    provenance.check_base(entry, args.base, args.chat_template)
    tokenizer = rm.load_tokenizer(args.base, args.chat_template)
    model = members.load_member(
        args.run,
        args.export,
        args.base,
        tokenizer,
        getattr(torch, entry["settings"]["dtype"]),
        args.device,
    )
    if kept == ["adapter"]:
        adapter.merge(model.model)
    partial = directory.with_name(f".partial-{directory.name}")
    members.save_member(model.model, tokenizer, partial)
    for path in sorted(
        partial.iterdir(), key=lambda path: path.suffix == ".safetensors"
    ):  # the weights last: they say that all is there
        path.replace(directory / path.name)
    partial.rmdir()
    print(f"{directory}: plain directory written")


def adopt(args):
    """Member args.iteration is an existing reward model: nothing is trained, it scores all data, each model in its own tokens and template."""
    run, j, settings = (
        args.run,
        args.iteration,
        {"train": "from", "dtype": args.dtype, "max_length": args.max_length},
    )
    splits, _ = data.read_splits(run)
    if (
        j > 1
        and run_dir.read_json(run / "manifest.json")["stages"]
        .get(run_dir.member_name(1), {"settings": {}})["settings"]
        .get("train")
        != "from"
    ):
        raise cli.InputError(
            f"{run}: member 1 is not one of --from; a run is of existing models, the first with --iteration 1, or of trained ones"
        )
    tokenizer = rm.load_tokenizer(args.base, args.chat_template, "--from")
    inputs, texts = (
        data.hashes(run) | provenance.base_hashes(args.base, args.chat_template),
        run_dir.read_continuations(run),
    )
    model, directory = None, run / run_dir.member_name(j)
    if run_dir.stage_done(
        run,
        run_dir.member_name(j),
        settings,
        inputs,
        [directory, *(run_dir.reward_path(run, j, name) for name in splits)],
    ):
        print(f"member {j}: {directory} is there, skipped")
    else:
        model = existing.load_reward_model(
            args.base, tokenizer, getattr(torch, args.dtype), args.device
        )
        started = run_dir.begin_stage(run, run_dir.member_name(j), settings, inputs)
        scores = {
            name: rm.score_sequences(
                model,
                rm.encode_split(tokenizer, split.messages, split.responses, args.max_length),
                args.micro_batch_tokens,
                f"member {j}, {name}",
            )
            for name, split in splits.items()
        }
        for name, values in scores.items():
            if not np.isfinite(values).all():
                raise cli.InputError(
                    f"--from {args.base}: rewards of {name} are not finite; --dtype float32 may help"
                )
        for name, values in scores.items():
            run_dir.write_array(run_dir.reward_path(run, j, name), values)
        with run_dir.replacing(directory) as partial:
            partial.mkdir()
            place = str(Path(args.base).resolve()) if Path(args.base).is_dir() else args.base
            source = {
                "model": place,
                "fingerprint": inputs["base model"],
                "dtype": args.dtype,
                "max_length": args.max_length,
            }
            run_dir.write_json(partial / "source.json", source)
            if args.chat_template:
                shutil.copy(args.chat_template, partial / "chat_template.jinja")
        run_dir.end_stage(
            run,
            run_dir.member_name(j),
            settings,
            inputs,
            started,
            base=str(args.base),
            threads=args.threads,
            device=args.device,
            micro_batch_tokens=args.micro_batch_tokens,
        )
        print(f"member {j}: {args.base} scored all data in {time.time() - started:.0f} s")
    if texts:
        score_continuations(args, j, model, tokenizer, texts, {"base model": inputs["base model"]})


@parallel.together
@names_memory_flags
def main(args):
    run, j, first = args.run, args.iteration, parallel.rank() == 0
    if parallel.count() > 1 and (args.train in ("head", "from") or args.export or args.plan):
        raise cli.InputError(
            f"{parallel.count()} processes found, 1 expected: --train head, --from, --export, --plan share no work; leave torchrun out"
        )
    if args.plan:
        return budget.show(args, training.parameter_groups)
    training.settle(args)
    if args.export:
        return export(args)
    if made := run_dir.made_otherwise(run):
        raise cli.InputError(
            f"{run}: a {made} run found, whose members are complete; a run of this script's own, or a new one, expected"
        )
    if args.train == "from":
        return adopt(args)

    # The data and the ensemble so far, before the base model is looked for.
    splits, _ = data.read_splits(run)
    train = splits["train"]
    if args.margin_from == "judgments" and train.judgments is None:
        raise cli.InputError(
            f"{run / 'data' / 'train.parquet'}: no column judgments found for --margin-from; extras/synthetic_judgments.py makes it"
        )
    tied = (train.votes_a == train.votes_b) & LOSSES[args.loss][2]
    alpha = run_dir.read_weights(run, j - 1) if j > 1 else np.zeros(0)
    rewards = run_dir.read_rewards(run, "train", j - 1, (train.response_start[-1],))
    targets = (
        target_of(args.target, train.p, rewards, alpha, train.a, train.b),
        margin_of(train, args.margin_from),
    )

    def loss(reward_a, reward_b, t, m, done):
        return LOSSES[args.loss][1](reward_a - reward_b, t, m).sum()

    tokenizer = rm.load_tokenizer(args.base, args.chat_template)
    inputs = data.hashes(run) | provenance.base_hashes(args.base, args.chat_template)
    ensemble = {
        f"rewards of member {i}": run_dir.hash_file(run_dir.reward_path(run, i, "train"))
        for i in range(1, j)
    }
    settings = {name: value for name in SETTINGS if (value := getattr(args, name)) is not None}
    if j > 1:
        run_dir.must_agree(
            run, run_dir.member_name(1), settings, inputs
        )  # the members of a run differ in their residual only
    outputs = [
        run / run_dir.member_name(j),
        run / "logs" / f"{j:02d}.jsonl",
        *(run_dir.reward_path(run, j, name) for name in splits),
    ]
    texts, model = run_dir.read_continuations(run), None
    checkpoints = Checkpoints(run, j, settings, inputs | ensemble, args.checkpoint_minutes)
    if parallel.of_first(
        lambda: run_dir.stage_done(
            run, run_dir.member_name(j), settings, inputs | ensemble, outputs
        )
    ):
        print(f"member {j}: {run / run_dir.member_name(j)} is there, skipped")
    else:
        started = parallel.of_first(
            lambda: run_dir.begin_stage(run, run_dir.member_name(j), settings, inputs | ensemble)
        )
        torch.manual_seed(args.seed)
        head_seed, order_seed, adapter_seed = (
            int(s) for s in np.random.SeedSequence([args.seed, j]).generate_state(3)
        )
        rng = np.random.default_rng(order_seed)
        trained = parallel.of_first(
            checkpoints.finished
        )  # by a call that was killed while it scored
        written = (
            run_dir.replacing(run / "logs" / f"{j:02d}.jsonl")
            if first and not trained
            else contextlib.nullcontext(os.devnull)
        )
        with written as partial, open(partial, "w", encoding="utf-8") as log:
            if args.train == "head":
                found = training.ask_features(
                    args,
                    "features",
                    {name: (s.messages, s.responses) for name, s in splits.items()},
                    tokenizer,
                    inputs,
                )
                keep = (found["train"][train.a] != found["train"][train.b]).any(1)
                weight = torch.nn.Parameter(
                    torch.empty(1, found["train"].shape[1], device=args.device)
                )
                rm.draw_head(weight, AutoConfig.from_pretrained(args.base), head_seed)
                training.train_head(
                    args, weight, train, found["train"], targets, loss, keep & ~tied, rng, log
                )
            else:
                sequences = {
                    name: rm.encode_split(tokenizer, s.messages, s.responses, args.max_length)
                    for name, s in splits.items()
                }
                keep = np.array(
                    [
                        sequences["train"][a] != sequences["train"][b]
                        for a, b in zip(train.a, train.b)
                    ]
                )
                dtype = getattr(torch, args.dtype)
                if trained:
                    model = members.load_member(run, j, args.base, tokenizer, dtype, args.device)
                else:
                    model = rm.load_base(args.base, tokenizer, dtype, args.device)
                    rm.draw_head(model.head.weight, model.model.config, head_seed)
                    if args.train == "lora":
                        adapter.add(model.model, args.lora_rank, args.lora_alpha)
                        adapter.draw(model.model, adapter_seed)
                    training.train_full(
                        args,
                        model,
                        train,
                        sequences["train"],
                        targets,
                        loss,
                        keep & ~tied,
                        rng,
                        log,
                        checkpoints,
                    )
        if first and not trained:
            with run_dir.replacing(run / run_dir.member_name(j)) as partial:
                if args.train == "head":
                    members.save_head(weight, partial)
                elif args.train == "lora":
                    adapter.save(model.model, args.base, partial / "adapter")
                else:
                    members.save_member(model.model, tokenizer, partial)
            checkpoints.finish()
        if args.train == "head":
            scores = {
                name: rm.score_features(torch.from_numpy(f), weight.detach().cpu())
                for name, f in found.items()
            }
        else:
            scores = {
                name: rm.score_sequences(model, s, args.micro_batch_tokens, f"member {j}, {name}")
                for name, s in sequences.items()
            }
        for name, values in scores.items():
            if not np.isfinite(values).all():
                if first:
                    shutil.rmtree(run / run_dir.member_name(j))
                    outputs[1].unlink(missing_ok=True)
                    checkpoints.remove()
                raise cli.InputError(
                    f"member {j}: rewards of {name} are not finite after the last step; a lower --lr may help"
                )
        counts = {"identical_pairs": int((~keep).sum())}
        said = f", {counts['identical_pairs']:,} pairs left out, identical after encoding" * (
            not keep.all()
        )
        if LOSSES[args.loss][2]:
            counts["tied_pairs"] = int((keep & tied).sum())
            said += f", {counts['tied_pairs']:,} dropped, their votes tie"
        if args.margin_from == "judgments":
            counts["pairs_without_judgment"] = int(
                (keep & ~tied & (train.judgments.sum(1) == 0)).sum()
            )
            said += f", {counts['pairs_without_judgment']:,} trained on without a judgment, m = 0"
        if first:
            for name, values in scores.items():
                run_dir.write_array(run_dir.reward_path(run, j, name), values)
            run_dir.end_stage(
                run,
                run_dir.member_name(j),
                settings,
                inputs | ensemble,
                started,
                base=str(args.base),
                target_formula=TARGETS[args.target][0],
                loss_formula=LOSSES[args.loss][0],
                threads=args.threads,
                device=args.device,
                processes=parallel.count(),
                micro_batch_tokens=args.micro_batch_tokens,
                **counts,
            )
        print(
            f"member {j}: trained on {int((keep & ~tied).sum()):,} pairs in {time.time() - started:.0f} s{said}"
        )
    checkpoints.remove()
    if texts:
        score_continuations(
            args, j, model, tokenizer, texts, {"base model": inputs["base model"]} | ensemble
        )


# Flags that change the result; a run directory holds one choice of them. The others are about speed, memory and place.
SETTINGS = "train", "loss", "margin_from", "target", "lora_rank", "lora_alpha", *training.SETTINGS


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    # what
    add("--run", type=Path, help="run directory with data/; --plan does without")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument(
        "--iteration", type=cli.member_number, metavar="J", help="train member J, 1 to 99"
    )
    task.add_argument(
        "--export",
        type=cli.natural,
        metavar="J",
        help="train nothing: make the directory of member J of a head or lora run a plain one",
    )
    task.add_argument(
        "--plan",
        action="store_true",
        help="train nothing: print what training takes in memory, disk and hours; no weights, no GPU",
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--base", help="base model: hub id or transformers directory; for --plan also llama-3-8b"
    )
    model.add_argument(
        "--from",
        dest="source",
        metavar="MODEL",
        help="train nothing: this reward model (hub id or directory, num_labels 1) scores "
        "the data and becomes member J; so are all members of its run, models of any kind, each with its tokens, --dtype, --max-length",
    )
    # objective
    add(
        "--train",
        choices=("full", "lora", "head"),
        default="full",
        help="all parameters (the paper's appendix F.1), low-rank adapters and the head (ours, "
        "for a card of 24 GB), or the head on a frozen base (section 4)",
    )
    add(
        "--lora-rank",
        type=cli.natural,
        help="of the adapters on every linear layer of the base (default 16)",
    )
    add(
        "--lora-alpha",
        type=cli.positive,
        help="they are scaled by alpha / rank (default: twice the rank, so that another rank keeps the scale)",
    )
    add(
        "--loss",
        choices=tuple(LOSSES),
        default="mse",
        help="; ".join(f"{name}: {formula}" for name, (formula, *_) in LOSSES.items())
        + ". The last two: the majority's winner w, tied votes dropped; no residual, so --iteration 1 or --target p",
    )
    add(
        "--margin-from",
        choices=("votes", "judgments"),
        help="what m of --loss margin is, |2p - 1|, comes from: the votes (default), or the column "
        "judgments, made by extras/synthetic_judgments.py; the winner is always the votes'",
    )
    add(
        "--target",
        choices=tuple(TARGETS),
        default="centered",
        help="; ".join(f"{name}: {formula}" for name, (formula, _) in TARGETS.items()),
    )
    training.add_flags(parser)
    # the plan alone
    add(
        "--members", type=cli.natural, default=8, metavar="K", help="--plan: reward models to train"
    )
    add(
        "--gpu-gb",
        type=cli.positive,
        default=80,
        help="--plan: memory of the card, in units of 10^9 bytes as on its label",
    )
    add(
        "--tflops",
        type=cli.positive,
        default=790,
        help="--plan: BF16 TFLOP/s that large matrix products reach on the card (assumed: 790)",
    )
    add(
        "--utilisation",
        type=cli.fraction,
        default=0.4,
        help="--plan: share of --tflops that training reaches",
    )
    args = parser.parse_args(argv)
    if not args.run and not args.plan:
        parser.error("--run is missing")
    head, lora = args.train == "head", args.train == "lora"
    if not lora and not args.plan and (args.lora_rank or args.lora_alpha):
        parser.error("--lora-rank and --lora-alpha are for --train lora")
    if args.margin_from and args.loss != "margin":
        parser.error("--margin-from is for --loss margin")
    if LOSSES[args.loss][2] and (args.iteration or 1) > 1 and args.target != "p":
        parser.error(
            f"--loss {args.loss} is on majority labels, which have no residual: one member, or --target p, expected"
        )
    if args.source and not args.iteration:
        parser.error("--from MODEL needs --iteration J")
    cpu = args.device == "cpu" and not args.plan  # a plan is for a card
    rank = (args.lora_rank or 16) if lora or args.plan else None
    training.fill_in(
        args,
        lr={"full": 2e-5, "lora": 2e-4, "head": 1e-3}[args.train],
        epochs=10 if head else 1,
        weight_decay=5.0 if head else 0.1,
        lora_rank=rank,
        lora_alpha=rank and 2.0 * rank,
        margin_from="votes" if args.loss == "margin" else None,
        max_precondition_dim=rank if lora else MAX_PRECONDITION_DIM,
        dtype="float32" if cpu else "bfloat16",
        micro_batch_tokens=1024 if cpu else 4096 if lora else 8192,
    )
    if args.source:
        args.base, args.train = args.source, "from"
    return args


if __name__ == "__main__":
    cli.run_main(main, parse_args())
