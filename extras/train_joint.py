"""Train all K reward models at once on the squared error of their mixture: one training, one pass.

    python extras/train_joint.py --run runs/demo-joint --k 8 --base runs/demo/base --lr 3e-3
    python extras/train_joint.py --run runs/mine --k 8 --base NAME_OR_DIR --train head

minimise  mean over train pairs of (sum_j alpha_j sigmoid(s (r_j(y1) - r_j(y2))) - p)^2

over a backbone that all share, K heads on it and alpha on the simplex; s rises from 1 to --sharpen,
so that soft votes become hard ones. It has to rise early and far: as long as votes are soft, one
reward says as much as K, the heads stay alike, and their hard votes differ by noise. With --train
head the K heads are on features of the frozen base. The error comes near the irreducible one where
there are viewpoints; where there are none it can overfit, so choose --k, --sharpen and
--weight-decay on validation prompts, as experiments/variants.py does on features. Run
fit_weights.py and evaluate.py afterwards.

It writes RUN/joint (a num_labels=K model; of --train head the heads alone), RUN/logs/joint.jsonl
and RUN/rewards/0j_SPLIT.npy. The members are in the order of their learned weight, so that prefixes
of weights.json are sensible; extras/export_member.py makes a plain directory of one. There
are no checkpoints, and no low-rank adapters.
"""

import time

from pairwise import (
    bases,
    cli,
    data,
    files,
    manifest,
    members,
    provenance,
    run_dir,
    stages,
    training,
    weights,
)
from pairwise import reward_model as rm
from pairwise.scale.offload import MAX_PRECONDITION_DIM, names_memory_flags

import numpy as np
import torch


def mixture_error(reward_a, reward_b, target, logits, s):
    """Sum over pairs of (sum_j alpha_j sigmoid(s (r_j(x, y1) - r_j(x, y2))) - t)^2.

    reward_a, reward_b float32 (pairs, K); target (pairs,); logits (K,), alpha = softmax(logits).
    """
    p_hat = torch.sigmoid(s * (reward_a - reward_b)) @ torch.softmax(logits, 0)
    return (p_hat - target).square().sum()


def draw_heads(weight, seed):
    """Draw K heads (K, d), normal with standard deviation 1 / sqrt(d).

    Rewards of features of unit scale then have variance one. Heads that begin close together stay
    so for long: nothing but their beginning tells them apart.
    """
    values = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    weight.data.copy_(values / weight.shape[1] ** 0.5)


def train_members(args, train, encoded, keep, tokenizer, log):
    """Train on the pairs of keep, bool (N,); return (heads' weight or RewardModel, alpha (K,)).

    encoded: features float32 (R, d) of the train responses, or their token ids. The heads, and the
    mixture weights alpha, float32, are in descending order of alpha.
    """
    torch.manual_seed(args.seed)
    seeds = np.random.SeedSequence([args.seed, 0]).generate_state(2)
    head_seed, order_seed = (int(seed) for seed in seeds)
    logits = torch.nn.Parameter(torch.zeros(args.k, device=args.device))

    def loss(reward_a, reward_b, target, done):
        return mixture_error(reward_a, reward_b, target, logits, args.sharpen**done)

    task = (train, encoded, (train.p,), loss, keep, np.random.default_rng(order_seed), log)
    if args.train == "head":
        trained = torch.nn.Parameter(torch.empty(args.k, encoded.shape[1], device=args.device))
        weight = trained
        draw_heads(weight, head_seed)
        training.train_head(args, weight, *task, more=[logits])
    else:
        dtype = getattr(torch, args.dtype)
        trained = rm.load_base(args.base, tokenizer, dtype, args.device, args.k)
        weight = trained.head.weight
        draw_heads(weight, head_seed)
        training.train_full(args, trained, *task, more=[logits])
    order = torch.argsort(logits.detach(), descending=True, stable=True)
    weight.data.copy_(weight.data[order])
    return trained, torch.softmax(logits.detach(), 0)[order]


def write_learned_weights(run, train, rewards, alpha):
    """Write RUN/weights.json with the learned weights alpha (K,); rewards float32 (R, K)."""
    alpha = alpha.double().cpu().numpy()
    alpha /= alpha.sum()
    rewards, train = np.ascontiguousarray(rewards.T), data.fitted_pairs(train)
    votes = weights.member_votes(rewards, train.a, train.b)
    train_mse = float(np.mean((alpha @ votes - train.p) ** 2))
    entry = {"k": len(alpha), "alpha": alpha.tolist(), "fit": "fixed", "train_mse": train_mse}
    files.write_json(run / "weights.json", [entry])


def train_and_score(args, stage, splits, texts, tokenizer, base_inputs):
    """Train all members, score all data with them, and write both.

    stage: (run, name, settings, inputs) for manifest's functions; texts: stages.texts_of's, with
    those of the continuations.
    """
    run, train, started = args.run, splits["train"], manifest.begin_stage(*stage)
    for path in (*(run / "rewards").glob("[0-9][0-9]_*.npy"), run / "weights.json"):
        files.remove(path)  # of a call that was killed, perhaps with a larger --k
    continuations = {name: texts[name] for name in texts if name not in splits}
    of_splits = {name: texts[name] for name in splits}
    encoded, counts = stages.encode_for(args, "features", of_splits, tokenizer, base_inputs)
    if continuations:
        more = (args, "features_continuations", continuations, tokenizer, stage[3])
        encoded_more, counts_more = stages.encode_for(*more)
        encoded, counts = encoded | encoded_more, counts | counts_more
    encoding, words = stages.encoding_facts(splits, encoded, counts)
    identical = stages.identical_pairs(train, encoded["train"])
    with stages.open_log(run / "logs" / "joint.jsonl") as log:
        trained, alpha = train_members(args, train, encoded["train"], ~identical, tokenizer, log)
        scores = stages.score(args, trained, encoded, "joint")
        stages.check_finite(scores, "joint")
    for j in range(args.k):
        member = {name: np.ascontiguousarray(rewards[:, j]) for name, rewards in scores.items()}
        for name, (messages, _) in continuations.items():
            member[name] = member[name].reshape(len(messages), -1)
        stages.write_rewards(run, j + 1, member)
    with files.replacing(run / "joint") as partial:
        members.KINDS["joint"].save(trained, partial, tokenizer, args.base)
    if args.weights == "learned":
        write_learned_weights(run, train, scores["train"], alpha)
    facts = encoding | {"learned_weights": alpha.tolist()}
    facts["identical_pairs"] = int(identical.sum())
    facts["texts_with_special_tokens"] = special = stages.count_special(of_splits, tokenizer)
    manifest.end_stage(*stage, started, **stages.facts(args), **facts)
    learned = " ".join(f"{x:.3f}" for x in alpha.tolist())
    print(
        f"joint: {args.k} members trained on {(~identical).sum():,} pairs in "
        f"{time.time() - started:.0f} s, weights {learned}"
        f"{stages.special_words(special)}{words}"
    )


@names_memory_flags
def main(args):
    """Train K members and score everything with them, unless that is done."""
    if args.check:
        return
    run = args.run
    rm.settle(args)
    splits, _ = data.read_splits(run)
    texts, continuations = stages.texts_of(splits), run_dir.read_continuations(run)
    tokenizer = provenance.open_base(args)
    bases.check_trainable(args.base, args.train)
    base_inputs = data.hashes(run) | provenance.base_hashes(args.base, args.chat_template)
    inputs = base_inputs | {"code of mixture_error": manifest.hash_function(mixture_error)}
    if continuations:
        texts["continuations"] = continuations["messages"], continuations["texts"]
        path = run / "continuations.parquet"
        inputs["continuations.parquet"] = files.hash_file(path)
    names = ("train", "k", "sharpen", "weights", *training.SETTINGS)
    stage = (run, "joint", {name: getattr(args, name) for name in names}, inputs)
    outputs = [run / "joint", run / "logs" / "joint.jsonl"]
    outputs += [run_dir.reward_path(run, j + 1, name) for j in range(args.k) for name in texts]
    entry = manifest.entries(run).get("joint", {})
    if continuations and entry.get("done") and "continuations.parquet" not in entry["inputs"]:
        raise cli.InputError(
            f"{run}: trained before its continuations.parquet was there, which is scored with the "
            "training; another --run expected"
        )
    if manifest.stage_done(*stage, outputs):
        print(f"joint: {run / 'joint'} is there, skipped")
    else:
        train_and_score(args, stage, splits, texts, tokenizer, base_inputs)


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    cli.add_run(parser, "run directory with data/")
    add("--base", required=True, help="base model: hub id or transformers directory")
    add("--check", action="store_true", help="check the flags, and do nothing else")
    add("--k", type=cli.member_number, default=8, help="reward models, at least 2")
    words = "all parameters, or K heads on features of the frozen base"
    add("--train", choices=("full", "head"), default="full", help=words)
    words = "what the steepness of the votes rises to (4096; head: 4), from 1; 1: soft throughout"
    add("--sharpen", type=cli.positive, metavar="S", help=words)
    words = "those that fit_weights.py gives the hard votes, or those learned with the rewards"
    add("--weights", choices=("qp", "learned"), default="qp", help=words)
    decay = "0.1"  # of heads too: one that suits a single reward keeps K of them alike
    training.add_flags(parser, "full 2e-5; head 3e-2", "1; head: 20", decay)
    args = parser.parse_args(argv)
    if args.k < 2:
        parser.error(f"--k {args.k} found, at least 2 expected; train_rm.py trains one")
    head = args.train == "head"
    training.fill_in(
        args,
        sharpen=4.0 if head else 4096.0,
        lr=3e-2 if head else 2e-5,
        epochs=20 if head else 1,
        weight_decay=float(decay),
        max_precondition_dim=MAX_PRECONDITION_DIM,
    )
    args.iteration = f"1 to {args.k}"  # what the progress bar and errors call the member
    return args


if __name__ == "__main__":
    cli.run_main(main, parse_args())
