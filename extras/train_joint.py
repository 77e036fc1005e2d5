"""All K reward models at once, on the squared error of their mixture: one training run and one forward pass instead of K.

    python extras/train_joint.py --run runs/demo-joint --k 8 --base runs/demo/base --lr 3e-3          (then fit_weights.py, evaluate.py)
    python extras/train_joint.py --run runs/mine --k 8 --base NAME_OR_DIR --train head               (K heads on features of the frozen base)

minimise  mean over train pairs of (sum_j alpha_j sigmoid(s (r_j(y1) - r_j(y2))) - p)^2

over a backbone that all share, K heads on it and alpha on the simplex; s rises from 1 to --sharpen, so that soft votes become hard ones. Near the
irreducible error where there are viewpoints; where there are none it can overfit, so choose --k and --weight-decay on validation prompts, which
experiments/variants.py does on features.

Writes RUN/joint (a num_labels=K model; of --train head the heads alone), RUN/rewards/0j_SPLIT.npy and RUN/logs/joint.jsonl; members in order of
their learned weight, so that prefixes of weights.json are sensible. --export J writes member J as a plain directory. All other flags are
train_rm.py's; of --train head the defaults are --lr 3e-2 --epochs 20 --weight-decay 0.1. Full training writes no checkpoints.
"""

import time
from pathlib import Path

import numpy as np
import torch

from pairwise import cli, data, members, provenance, run_dir, training
from pairwise import reward_model as rm
from pairwise.scale.offload import MAX_PRECONDITION_DIM


def mixture_error(reward_a, reward_b, target, logits, s):
    """Sum over pairs of (sum_j alpha_j sigmoid(s (r_j(x, y1) - r_j(x, y2))) - t)^2, alpha = softmax(logits).

    reward_a, reward_b float32 (pairs, K); target (pairs,); logits (K,).
    """
    p_hat = torch.sigmoid(s * (reward_a - reward_b)) @ torch.softmax(logits, 0)
    return (p_hat - target).square().sum()


def draw_heads(weight, seed):
    """Draw K heads (K, d), normal with standard deviation 1 / sqrt(d): rewards of features of unit scale have variance one.

    Heads that begin close together stay so for long: nothing but their beginning tells them apart.
    """
    weight.data.copy_(
        torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        / weight.shape[1] ** 0.5
    )


def score_heads(features, weight):
    """Rewards float32 (R, K) of features (R, d) under K heads (K, d)."""
    return np.stack(
        [rm.score_features(torch.from_numpy(features), row[None]) for row in weight.detach().cpu()],
        axis=1,
    )


def export(args):
    """Split member args.export off joint/: a plain num_labels=1 directory."""
    directory, entry = (
        args.run / run_dir.member_name(args.export),
        run_dir.read_json(args.run / "manifest.json")["stages"].get("joint"),
    )
    if not entry or args.export > entry["settings"]["k"] or directory.exists():
        raise cli.InputError(
            f"{directory}: "
            + ("already there" if directory.exists() else "no such member of a jointly trained run")
        )
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
    with run_dir.replacing(directory) as partial:
        members.save_member(model.model, tokenizer, partial)
    print(f"{directory}: plain directory written")


def main(args):
    run, k = args.run, args.k
    training.settle(args)
    if args.export:
        return export(args)
    splits, _ = data.read_splits(run)
    train = splits["train"]
    tokenizer = rm.load_tokenizer(args.base, args.chat_template)
    base = data.hashes(run) | provenance.base_hashes(args.base, args.chat_template)
    settings = {
        name: getattr(args, name)
        for name in ("train", "k", "sharpen", "weights", *training.SETTINGS)
    }
    texts = run_dir.read_continuations(run)
    texts = texts and (texts["messages"], texts["texts"])
    inputs = base | (
        {"continuations.parquet": run_dir.hash_file(run / "continuations.parquet")} if texts else {}
    )
    names = [*splits, *(["continuations"] if texts else [])]
    outputs = [
        run / "joint",
        run / "logs" / "joint.jsonl",
        *(run_dir.reward_path(run, j, name) for j in range(1, k + 1) for name in names),
    ]
    entry = run_dir.read_json(run / "manifest.json", {"stages": {}})["stages"].get("joint", {})
    if texts and entry.get("done") and "continuations.parquet" not in entry["inputs"]:
        raise cli.InputError(
            f"{run}: trained before its continuations.parquet was there, which is scored with the training; another --run expected"
        )
    if run_dir.stage_done(run, "joint", settings, inputs, outputs):
        print(f"joint: {run / 'joint'} is there, skipped")
        return
    started = run_dir.begin_stage(run, "joint", settings, inputs)
    torch.manual_seed(args.seed)
    head_seed, order_seed = (
        int(s) for s in np.random.SeedSequence([args.seed, 0]).generate_state(2)
    )
    rng, logits = (
        np.random.default_rng(order_seed),
        torch.nn.Parameter(torch.zeros(k, device=args.device)),
    )

    def loss(reward_a, reward_b, target, done):
        return mixture_error(reward_a, reward_b, target, logits, args.sharpen**done)

    with (
        run_dir.replacing(run / "logs" / "joint.jsonl") as partial,
        open(partial, "w", encoding="utf-8") as log,
    ):
        if args.train == "head":
            found = training.ask_features(
                args,
                "features",
                {name: (s.messages, s.responses) for name, s in splits.items()},
                tokenizer,
                base,
            )
            if texts:
                found |= training.ask_features(
                    args, "features_continuations", {"continuations": texts}, tokenizer, inputs
                )
            keep = (found["train"][train.a] != found["train"][train.b]).any(1)
            weight = torch.nn.Parameter(torch.empty(k, found["train"].shape[1], device=args.device))
            draw_heads(weight, head_seed)
            training.train_head(
                args, weight, train, found["train"], (train.p,), loss, keep, rng, log, [logits]
            )
        else:
            encoded = {name: (s.messages, s.responses) for name, s in splits.items()} | (
                {"continuations": texts} if texts else {}
            )
            encoded = {
                name: rm.encode_split(tokenizer, *both, args.max_length)
                for name, both in encoded.items()
            }
            keep = np.array(
                [encoded["train"][a] != encoded["train"][b] for a, b in zip(train.a, train.b)]
            )
            model = rm.load_base(args.base, tokenizer, getattr(torch, args.dtype), args.device, k)
            weight = model.head.weight
            draw_heads(weight, head_seed)
            training.train_full(
                args,
                model,
                train,
                encoded["train"],
                (train.p,),
                loss,
                keep,
                rng,
                log,
                None,
                [logits],
            )
        alpha, order = (
            torch.softmax(logits.detach(), 0),
            torch.argsort(logits.detach(), descending=True, stable=True),
        )
        weight.data.copy_(weight.data[order])
        if args.train == "head":
            scores = {name: score_heads(features, weight) for name, features in found.items()}
        else:
            scores = {
                name: rm.score_sequences(model, ids, args.micro_batch_tokens, f"joint, {name}")
                for name, ids in encoded.items()
            }
        for name, values in scores.items():
            if not np.isfinite(values).all():
                raise cli.InputError(
                    f"joint: rewards of {name} are not finite after the last step; a lower --lr may help"
                )
    for name, values in scores.items():
        for j in range(1, k + 1):
            own = np.ascontiguousarray(values[:, j - 1])
            run_dir.write_array(
                run_dir.reward_path(run, j, name),
                own.reshape(len(texts[0]), -1) if name == "continuations" else own,
            )
    with run_dir.replacing(run / "joint") as partial:
        (
            members.save_head(weight, partial)
            if args.train == "head"
            else members.save_member(model.model, tokenizer, partial)
        )
    if args.weights == "learned":
        learned = alpha[order].double().cpu().numpy()
        learned /= learned.sum()
        votes = (
            cli.import_evaluator().votes(np.ascontiguousarray(scores["train"].T), train.a, train.b)
            / 2
        )
        train_mse = float(np.mean((learned @ votes - train.p) ** 2))
        run_dir.write_json(
            run / "weights.json",
            [{"k": k, "alpha": learned.tolist(), "fit": "fixed", "train_mse": train_mse}],
        )
    run_dir.end_stage(
        run,
        "joint",
        settings,
        inputs,
        started,
        base=str(args.base),
        learned_weights=alpha[order].tolist(),
        threads=args.threads,
        device=args.device,
        micro_batch_tokens=args.micro_batch_tokens,
        identical_pairs=int((~keep).sum()),
    )
    said = (
        f", {int((~keep).sum())} pairs left out, identical after encoding" if not keep.all() else ""
    )
    weights = " ".join(f"{x:.3f}" for x in alpha[order].tolist())
    print(
        f"joint: {k} members trained on {int(keep.sum()):,} pairs in {time.time() - started:.0f} s, weights {weights}{said}"
    )


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--run", required=True, type=Path, help="run directory with data/")
    add("--base", required=True, help="base model: hub id or transformers directory")
    add(
        "--export",
        type=cli.natural,
        metavar="J",
        help="train nothing: write member J as a plain directory",
    )
    add("--k", type=cli.member_number, default=8, help="reward models, at least 2")
    add(
        "--train",
        choices=("full", "head"),
        default="full",
        help="all parameters, or K heads on features of the frozen base",
    )
    add(
        "--sharpen",
        type=cli.positive,
        default=4.0,
        metavar="S",
        help="the steepness of the votes at the last step; 1: soft throughout",
    )
    add(
        "--weights",
        choices=("qp", "learned"),
        default="qp",
        help="fit_weights.py's of the hard votes (to be run after), or those learned with the rewards",
    )
    training.add_flags(parser)
    args = parser.parse_args(argv)
    if args.k < 2:
        parser.error(f"--k {args.k} found, at least 2 expected; train_rm.py trains one")
    head, cpu = args.train == "head", args.device == "cpu"
    training.fill_in(  # of heads: a weight decay that suits one reward keeps K of them alike
        args,
        lr=3e-2 if head else 2e-5,
        epochs=20 if head else 1,
        weight_decay=0.1,
        max_precondition_dim=MAX_PRECONDITION_DIM,
        dtype="float32" if cpu else "bfloat16",
        micro_batch_tokens=1024 if cpu else 8192,
    )
    args.iteration = f"1 to {args.k}"
    return args


if __name__ == "__main__":
    cli.run_main(main, parse_args())
