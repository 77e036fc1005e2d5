"""Train reward model j: one iteration of forward stagewise additive modelling (section 4).

    python train_rm.py --run runs/demo --iteration 1 --base runs/demo/base --lr 3e-3   (20 seconds)
    python train_rm.py --run runs/multipref --iteration 1 --base OpenRLHF/Llama-3-8b-sft-mixture

Stage j reads the prepared data, the rewards of members 1 to j-1 and their mixture weights, computes
the residual eps_j = p - p_hat_{j-1}, trains r_j from the same base on the target that it makes, and
scores every response. It writes RUN/member_0j, RUN/rewards/0j_SPLIT.npy and RUN/logs/0j.jsonl. On N
GPUs: torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node N -- train_rm.py --run ..
"""

import time

from pairwise import (
    bases,
    cli,
    data,
    files,
    manifest,
    members,
    pretrained,
    provenance,
    run_dir,
    stages,
    training,
    weights,
)
from pairwise import reward_model as rm
from pairwise.scale import adapter, parallel
from pairwise.scale.checkpoint import Checkpoints
from pairwise.scale.offload import MAX_PRECONDITION_DIM, names_memory_flags

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

# ---- the method: to add a target or a loss, write a function and name it in the table; a loss on
# majority labels is named in ON_MAJORITY too, one that uses the margin in WITH_MARGIN

# A target is made from the vote fractions p, the ensemble so far p_hat, float64 (N,), and j > 1;
# member 1 is trained on p. What a docstring says before the colon is recorded in the manifest.


def vote_fraction(p, p_hat, j):
    """t = p: no residual, a baseline (an ensemble of seeds with fitted weights)."""
    return p


def residual(p, p_hat, j):
    """t = p - p_hat: eps_j as section 4 prints it."""
    return p - p_hat


def centered(p, p_hat, j):
    """t = 1/2 + (p - p_hat): section 4's objective averaged over both orders of a pair."""
    return 0.5 + (p - p_hat)


def mixture(p, p_hat, j):
    """t = p_hat + j (p - p_hat): the error of the mixture that gives member j the weight 1/j."""
    return p_hat + j * (p - p_hat)


TARGETS = {"p": vote_fraction, "residual": residual, "centered": centered, "mixture": mixture}


def target_of(name, p, rewards, alpha, a, b):
    """Return the target t_j, float64 (N,), of stage j = len(alpha) + 1.

    p (N,): vote fractions; rewards float32 (j-1, R), alpha (j-1,): the ensemble; a, b (N,): pairs.
    """
    if not len(alpha):
        return p
    p_hat = alpha @ weights.member_votes(rewards, a, b)  # sum_i alpha_i V_i, section 2
    return TARGETS[name](p, p_hat, len(alpha) + 1)


# A loss is made from d = r(x, y1) - r(x, y2), target t and margin m, float32 (pairs,). Losses on
# majority labels have t = p and leave out pairs whose votes tie: sign(2t - 1) d is r_w - r_l, the
# reward of the majority's winner less the loser's.


def mse(d, t, m):
    """(t - sigmoid(d))^2: section 4's objective."""
    return (t - torch.sigmoid(d)).square()


def bce(d, t, m):
    """-(t log sigmoid(d) + (1 - t) log sigmoid(-d)), t clipped to [0, 1]: its log-likelihood."""
    return binary_cross_entropy_with_logits(d, t.clamp(0, 1), reduction="none")


def bt(d, t, m):
    """-log sigmoid(r_w - r_l): Bradley and Terry's model of the majority's choice."""
    return -logsigmoid((2 * t - 1).sign() * d)


def margin(d, t, m):
    """-log sigmoid(r_w - r_l - m): equation 4 of Beyond the Binary."""
    return -logsigmoid((2 * t - 1).sign() * d - m)


LOSSES = {"mse": mse, "bce": bce, "bt": bt, "margin": margin}
ON_MAJORITY = {"bt", "margin"}
WITH_MARGIN = {"margin"}


def margin_of(split, source):
    """m = |sum - n/2| / (n/2), float64 (N,) in [0, 1]: equation 3 of Beyond the Binary."""
    first, n = split.votes_a, split.n
    if source == "judgments":
        first, n = split.judgments[:, 0], split.judgments.sum(1)
    return np.abs(2 * first - n) / np.maximum(n, 1)  # 0 without a judgment


def formula(function):
    """Return the formula of a target or a loss: its docstring up to the colon, or its name."""
    return (function.__doc__ or function.__name__).split(": ")[0]


def formulas(functions):
    """Return the formulas of TARGETS or LOSSES, for argparse's help."""
    words = (f"{name}: {formula(function)}" for name, function in functions.items())
    return "; ".join(words).replace("%", "%%")


def hash_method(args):
    """Return {name: SHA-256} of the code of target and loss, which a run's members share."""
    return {
        f"code of --target {args.target}": manifest.hash_function(TARGETS[args.target]),
        f"code of --loss {args.loss}": manifest.hash_function(LOSSES[args.loss]),
    }


# ---- the stage


def targets_of_stage(args, train):
    """Return (t, m, tied), each (N,): targets and margins, float64, and bool, pairs to leave out.

    Raises InputError where judgments are asked for and there are none."""
    run, j = args.run, args.iteration
    if args.margin_from == "judgments" and train.judgments is None:
        path, script = run / "data" / "train.parquet", "extras/synthetic_judgments.py"
        words = f"no column judgments found for --margin-from; {script} makes it"
        raise cli.InputError(f"{path}: {words}")
    alpha = run_dir.read_weights(run, j - 1) if j > 1 else np.zeros(0)
    rewards = run_dir.read_rewards(run, "train", j - 1, (train.n_responses,))
    t = target_of(args.target, train.p, rewards, alpha, train.a, train.b)
    tied = (train.votes_a == train.votes_b) & (args.loss in ON_MAJORITY)
    return t, margin_of(train, args.margin_from), tied


def train_member(args, train, encoded, targets, keep, tokenizer, checkpoints, log):
    """Train member j on the pairs of keep, bool (N,); return a head's weight or a RewardModel.

    encoded: {split: features float32 (R, d), or token ids, R lists}; targets: (t, m).
    """
    torch.manual_seed(args.seed)
    seeds = np.random.SeedSequence([args.seed, args.iteration]).generate_state(3)
    head_seed, order_seed, adapter_seed = (int(seed) for seed in seeds)

    def loss(reward_a, reward_b, t, m, done):
        return LOSSES[args.loss](reward_a - reward_b, t, m).sum()

    task = (train, encoded["train"], targets, loss, keep, np.random.default_rng(order_seed), log)
    if args.train == "head":
        weight = torch.nn.Parameter(torch.empty(1, encoded["train"].shape[1], device=args.device))
        rm.draw_head(weight, pretrained.config(args.base), head_seed)
        training.train_head(args, weight, *task)
        return weight
    member = rm.load_base(args.base, tokenizer, getattr(torch, args.dtype), args.device)
    rm.draw_head(member.head.weight, member.model.config, head_seed)
    if args.train == "lora":
        adapter.add(member.model, args.lora_rank, args.lora_alpha)
        adapter.draw(member.model, adapter_seed)
    training.train_full(args, member, *task, checkpoints)
    return member


def facts_of(args, train, identical, tied, encoding):
    """Return facts for the manifest, and words on pairs left out; identical, tied: bool (N,);
    encoding: of stages.encoding_facts."""
    encoding_facts, encoding_words = encoding
    facts, words = stages.facts(args) | encoding_facts, ""
    facts["target_formula"] = formula(TARGETS[args.target])
    facts["loss_formula"] = formula(LOSSES[args.loss])
    facts |= {"processes": parallel.count(), "identical_pairs": int(identical.sum())}
    if args.loss in ON_MAJORITY:
        facts["tied_pairs"] = int((~identical & tied).sum())
        words += f", {facts['tied_pairs']:,} dropped, their votes tie"
    if args.margin_from == "judgments":
        unjudged = ~identical & ~tied & (train.judgments.sum(1) == 0)
        facts["pairs_without_judgment"] = int(unjudged.sum())
        words += f", {unjudged.sum():,} trained on without a judgment, m = 0"
    return facts, words + encoding_words


def train_and_score(args, stage, splits, targets, tokenizer, base_inputs, checkpoints):
    """Train member j, write it, score all splits with it, write the rewards; return the member.

    stage: (run, name, settings, inputs) for manifest's functions; targets: targets_of_stage's.
    """
    run, j, is_first = args.run, args.iteration, parallel.rank() == 0
    directory, log_path = run / run_dir.member_name(j), run / "logs" / f"{j:02d}.jsonl"
    train, texts, (t, m, tied) = splits["train"], stages.texts_of(splits), targets
    started = parallel.of_first(lambda: manifest.begin_stage(*stage))
    encoded, counts = stages.encode_for(args, "features", texts, tokenizer, base_inputs)
    identical = stages.identical_pairs(train, encoded["train"])
    keep = ~identical & ~tied
    trained = parallel.of_first(checkpoints.finished)  # by a call that was killed while it scored
    if trained and args.train != "head":
        member = stages.load(args, j, tokenizer)
    else:
        with stages.open_log(log_path, is_first and not trained) as log:
            member = train_member(args, train, encoded, (t, m), keep, tokenizer, checkpoints, log)
    if is_first and not trained:
        with files.replacing(directory) as partial:
            members.KINDS[args.train].save(member, partial, tokenizer, args.base)
        checkpoints.finish()
    scores = stages.score(args, member, encoded, f"member {j}")
    outputs = (directory, log_path, *checkpoints.own())
    stages.check_finite(scores, f"member {j}", outputs=outputs)
    encoding = stages.encoding_facts(splits, encoded, counts)
    facts, words = facts_of(args, train, identical, tied, encoding)
    facts["texts_with_special_tokens"] = special = stages.count_special(texts, tokenizer)
    if is_first:
        stages.write_rewards(run, j, scores)
        manifest.end_stage(*stage, started, **facts)
    print(
        f"member {j}: trained on {keep.sum():,} pairs in {time.time() - started:.0f} s"
        f"{stages.special_words(special)}{words}"
    )
    return member


@parallel.together
@names_memory_flags
def main(args):
    """Train member j and score everything with it, unless that is done; score the continuations."""
    if args.check:
        return
    run, j, name, member = args.run, args.iteration, run_dir.member_name(args.iteration), None
    if (count := parallel.count()) > 1 and args.train == "head":
        words = "1 expected: --train head shares no work; leave out torchrun"
        raise cli.InputError(f"{count} processes found, {words}")
    run_dir.check_own_run(run)
    rm.settle(args)
    # The data and the ensemble so far are read before the base model is looked for.
    splits, _ = data.read_splits(run)
    targets = targets_of_stage(args, splits["train"])
    tokenizer = provenance.open_base(args)
    bases.check_trainable(args.base, args.train)
    base_inputs = data.hashes(run) | provenance.base_hashes(args.base, args.chat_template)
    settings = {name: value for name in SETTINGS if (value := getattr(args, name)) is not None}
    inputs = base_inputs | hash_method(args)
    if first := run_dir.first_with_model(run, j):  # trained members differ in their residual only
        before = run_dir.hash_ensemble(run, first - 1)
        manifest.must_agree(run, run_dir.member_name(first), settings, inputs | before)
    run_dir.check_whole(run, j - 1)
    inputs |= run_dir.hash_ensemble(run, j - 1)
    stage = (run, name, settings, inputs)
    texts = run_dir.read_continuations(run)
    # These two decide which collective calls a process makes; one that others do not make hangs.
    calls = {"continuations": len(texts or ()), "checkpoint_minutes": args.checkpoint_minutes}
    parallel.check_alike(settings | inputs | calls)
    outputs = [run / name, run / "logs" / f"{j:02d}.jsonl"]
    outputs += [run_dir.reward_path(run, j, split) for split in splits]
    checkpoints = Checkpoints(run, j, settings, inputs, args.checkpoint_minutes)
    args.threads = checkpoints.threads(args.threads)
    torch.set_num_threads(args.threads)
    if parallel.of_first(lambda: manifest.stage_done(*stage, outputs)):
        print(f"member {j}: {run / name} is there, skipped")
    else:
        member = train_and_score(args, stage, splits, targets, tokenizer, base_inputs, checkpoints)
    checkpoints.remove()
    if texts:
        stages.score_continuations(args, j, member, tokenizer, texts, inputs)


# ---- flags: SETTINGS change the result, and all members of a run have the same

SETTINGS = ("train", "loss", "margin_from", "target", "lora_rank", "lora_alpha", *training.SETTINGS)


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    cli.add_run(parser, "run directory with data/")
    add("--iteration", required=True, type=cli.member_number, metavar="J", help="1 to 99")
    add("--base", required=True, help="base model: hub id or transformers directory")
    add("--check", action="store_true", help="check the flags, and do nothing else")
    words = "all parameters (appendix F.1), low-rank adapters and the head, or the head (section 4)"
    add("--train", choices=("full", "lora", "head"), default="full", help=words)
    add("--lora-rank", type=cli.natural, help="of adapters on all linear layers (default 16)")
    add("--lora-alpha", type=cli.positive, help="over the rank: their scale (default 2 x rank)")
    words = f"{formulas(LOSSES)}. {' and '.join(sorted(ON_MAJORITY))} have no residual: "
    words += "--iteration 1 or --target p; tied votes are dropped"
    add("--loss", choices=tuple(LOSSES), default="mse", help=words)
    words = "--loss margin takes m from the votes (default) or extras/synthetic_judgments.py's"
    add("--margin-from", choices=("votes", "judgments"), help=words)
    add("--target", choices=tuple(TARGETS), default="centered", help=formulas(TARGETS))
    training.add_flags(parser)
    training.add_checkpoint_flag(parser)
    args = parser.parse_args(argv)
    head, lora = args.train == "head", args.train == "lora"
    if not lora and (args.lora_rank or args.lora_alpha):
        parser.error("--lora-rank and --lora-alpha are for --train lora")
    if args.margin_from and args.loss not in WITH_MARGIN:
        parser.error(f"--margin-from is for --loss {' or '.join(sorted(WITH_MARGIN))}")
    if args.loss in ON_MAJORITY and args.iteration > 1 and args.target != "p":
        words = "which have no residual: one member, or --target p, expected"
        parser.error(f"--loss {args.loss} is on majority labels, {words}")
    rank = (args.lora_rank or 16) if lora else None
    training.fill_in(
        args,
        lr={"full": 2e-5, "lora": 2e-4, "head": 1e-3}[args.train],
        epochs=10 if head else 1,
        weight_decay=5.0 if head else 0.1,
        lora_rank=rank,
        lora_alpha=rank and 2.0 * rank,
        margin_from="votes" if args.loss in WITH_MARGIN else None,
        max_precondition_dim=rank if lora else MAX_PRECONDITION_DIM,
    )
    return args


if __name__ == "__main__":
    cli.run_main(main, parse_args())
