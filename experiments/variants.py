"""Every variant of the ensemble beside each other, on the frozen features of any run, and the one
that validation prompts recommend.

    python experiments/variants.py --runs runs/mine --out variants.json
    python experiments/variants.py --runs runs/mine --folds 8 --k 8 32 --out variants.csv

The first takes from half a minute to a few minutes on one thread; in the second every prompt is a
test prompt once. Beside FILE.csv FILE_splits.jsonl has the prompts of each split.

RUN has data/ and features/SPLIT.npy (train_rm.py --train head makes them, populations.py too). The
losses are those of train_rm.py, extras/train_joint.py and mean_variance.py, of heads on
standardised features, with an L2 penalty in place of weight decay, minimised to convergence by
L-BFGS. Every hyper-parameter, and the recommendation, is chosen on validation prompts, of hard
variants by the Brier score of their hard votes at k; where a run has none, on a fifth of its train
prompts. Test prompts are reported only.
"""

import dataclasses
import itertools
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "extras"))
import fit_weights
import train_rm
from pairwise import cli, data, files, metrics, run_dir, theory, weights

import harden
import mean_variance
import numpy as np
import plurality
import torch
import train_joint
from collect import write_csv, write_splits
from plurality import L2_PENALTIES, brier

HARD = (
    *(f"fsam_{target}" for target in train_rm.TARGETS),
    "joint",
    "hardened",
    "hardened_taste",
    "hardened_joint",
    *(f"mean_variance_{layout}" for layout in mean_variance.LAYOUTS),
)


class Prediction(NamedTuple):
    """What was chosen, in words; {split: p_hat (N,)}; of an ensemble the mixture weights (k,) and
    {split: votes (k, N)}, and of one of linear rewards these (k, d); seconds that it took."""

    chosen: str
    p_hat: dict
    alpha: np.ndarray | None = None
    votes: dict | None = None
    heads: np.ndarray | None = None
    seconds: float = 0.0


# ---- folds


def merged(featured_splits):
    """One Featured of all prompts of several. What one of them lacks it lacks as well."""
    splits = [featured.split for featured in featured_splits]
    fields = {}
    for name in (*data.VOTE_COLUMNS, "p_true", "judgments"):
        values = [getattr(split, name) for split in splits]
        fields[name] = None if any(x is None for x in values) else np.concatenate(values)
    for name in ("prompt_id", "messages", "responses", "categories"):
        values = [getattr(split, name) for split in splits]
        fields[name] = None if None in values else list(itertools.chain(*values))
    for name in ("response_start", "pair_start"):
        shifts = np.cumsum([0, *(int(getattr(split, name)[-1]) for split in splits)])
        starts = [getattr(split, name)[1:] + shift for split, shift in zip(splits, shifts)]
        fields[name] = np.concatenate([[0], *starts])
    shifts = np.cumsum([0, *(split.n_responses for split in splits)])
    for name in ("a", "b"):
        indices = [getattr(split, name) + shift for split, shift in zip(splits, shifts)]
        fields[name] = np.concatenate(indices)
    features = np.concatenate([featured.features for featured in featured_splits])
    return plurality.Featured(dataclasses.replace(splits[0], **fields), features)


def read_runs(run, seed, folds=0, folds_seed=0):
    """[{split: Featured}], standardised: the run's own train, valid and test, or those of each fold
    of all its prompts, where the next fold is the validation split. Pairs of fewer than two votes
    are trained on alone."""
    if not folds:
        return [plurality.read_run(run, seed)]
    featured = merged(list(plurality.read_features(run).values()))
    prompts = len(featured.split.prompt_id)
    if prompts < folds:
        expected = "at least as many prompts expected"
        raise cli.InputError(f"--folds {folds}: {expected}, {prompts} found in {run}")
    fold_of = np.random.default_rng(folds_seed).permutation(np.arange(prompts) % folds)
    runs = []
    for fold in range(folds):
        test, valid = fold_of == fold, fold_of == (fold + 1) % folds
        masks = {"test": test, "valid": valid, "train": ~test & ~valid}
        splits = {name: plurality.restricted(featured, keep) for name, keep in masks.items()}
        for name in ("test", "valid"):
            counted = data.counted_pairs(splits[name].split)
            if counted is None:
                words = "no pair of two votes found in a fold, at least 1 expected"
                raise cli.InputError(f"--folds {folds}: {run}: {words}")
            splits[name] = splits[name]._replace(split=counted)
        runs.append(plurality.standardised(splits))
    return runs


# ---- the variants: each is a Prediction, the one of least error on validation prompts


def best(predictions, splits):
    """The Prediction with the least Brier score on validation prompts."""
    return min(predictions, key=lambda each: brier(each.p_hat["valid"], splits["valid"].split))


def fitted_alpha(rewards, split):
    """The mixture weights of all members, as fit_weights.py fits them."""
    return weights.simplex_weights(fit_weights.quadratic_form(rewards, split))


def prediction_of(chosen, votes, alpha):
    """The Prediction of an ensemble; votes {split: (k, N)}, alpha (k,)."""
    return Prediction(chosen, {name: alpha @ x for name, x in votes.items()}, alpha, votes)


def hard_prediction(chosen, heads, splits):
    """The Prediction of the hard votes of members with weights `heads` (K, d), alpha fitted."""
    rewards = plurality.rewards_of(heads, splits)
    alpha = fitted_alpha(rewards["train"], splits["train"].split)
    votes = {
        name: weights.member_votes(rewards[name], x.split.a, x.split.b)
        for name, x in splits.items()
    }
    return prediction_of(chosen, votes, alpha)._replace(heads=heads)


def fsam(target, splits, k, seed):
    """k members one after the other (train_rm.py, --target)."""
    train = splits["train"]
    split, predictions = train.split, []
    for l2 in L2_PENALTIES:
        heads, rewards, alpha = np.zeros((0, train.features.shape[1])), None, np.zeros(0)
        for j in range(k):
            t = train_rm.target_of(target, split.p, rewards, alpha, split.a, split.b)
            heads = np.concatenate([heads, plurality.fit_single(train, t, l2, [seed, j])])
            rewards = plurality.rewards_of(heads, splits)["train"]
            alpha = fitted_alpha(rewards, split)
        predictions.append(hard_prediction(f"l2 {l2:g}", heads, splits))
    return best(predictions, splits)


def joint(splits, k, seed):
    """k heads at once (train_joint.py): the sharpness s is raised step by step from 1, each time
    from the heads and weights of the last."""
    train, predictions = splits["train"], []
    p = torch.from_numpy(train.split.p)
    for l2 in L2_PENALTIES:
        fit = None
        for s in (1, 4, 16):

            def loss(rewards_a, rewards_b, logits, s=s):
                return train_joint.mixture_error(rewards_a, rewards_b, p, logits, s)

            fit = plurality.fit(train, loss, k, l2, seed, fit, k)
            predictions.append(hard_prediction(f"l2 {l2:g}, s {s}", fit[0], splits))
    return best(predictions, splits)


def hardened(heads, splits, k, layout="auto", label=""):
    """The Prediction of harden.py on rewards with the weights heads (M, d); of --layout auto all M
    are in the soft model, else one."""
    rewards = plurality.rewards_of(heads, splits)
    train, valid = ((splits[name].split, rewards[name]) for name in ("train", "valid"))
    size = len(heads) if layout == "auto" else 1
    ensemble = harden.harden(train, valid, k, layout, [size])
    votes = {
        name: harden.hardened_votes(ensemble.formulas, rewards[name], x.split.a, x.split.b)
        for name, x in splits.items()
    }
    return prediction_of(label + ensemble.layout, votes, ensemble.alpha)


def hardened_with_taste(head, splits, k, seed):
    """Pairs of members on one reward (1, d); the taste votes nothing, so any other reward does."""
    taste = np.random.default_rng(seed).normal(size=head.shape)
    return hardened(np.concatenate([head, taste]), splits, k, "equal")


def hardened_joint(mixtures, splits, k):
    """The best of the soft mixtures, {M: plurality.SoftFit}, by its hard votes."""
    predictions = [
        hardened(fit.weights, splits, k, label=f"{fit.chosen}, ") for fit in mixtures.values()
    ]
    return best(predictions, splits)


def soft_bce(splits, seed):
    """The plurality.SoftFit of the best single reward trained on the likelihood of the votes."""
    train = splits["train"]
    p = torch.from_numpy(train.split.p)

    def loss(rewards_a, rewards_b, _):
        return train_rm.bce(rewards_a[:, 0] - rewards_b[:, 0], p, None).sum()

    return plurality.best_penalty(lambda l2: plurality.fit(train, loss, 1, l2, seed)[0], splits)


def variants(splits, k, seed, names):
    """{name: Prediction} of the named variants, the recommended one and the soft references."""
    soft, mixtures = {"single": (single := plurality.soft_single(splits, seed))}, {}
    if "hardened_joint" in names:
        mixtures = plurality.soft_mixtures(splits, seed)
        soft["mixture"] = plurality.best_on_valid(mixtures.values(), splits)
    if any(name.startswith("mean_variance") for name in names):
        soft["bce"] = soft_bce(splits, seed)
        soft["mean_variance"] = mean_variance.soft(splits, seed)
    predictions = {f"soft_{name}": Prediction(x.chosen, x.p_hat) for name, x in soft.items()}

    def of_mean_variance(layout):
        fit = soft["mean_variance"]
        return prediction_of(fit.chosen, *mean_variance.ensemble(fit, splits, k, layout))

    makers = {
        **{f"fsam_{x}": lambda x=x: fsam(x, splits, k, seed) for x in train_rm.TARGETS},
        "joint": lambda: joint(splits, k, seed),
        "hardened": lambda: hardened(single.weights, splits, k),
        "hardened_taste": lambda: hardened_with_taste(single.weights, splits, k, seed),
        "hardened_joint": lambda: hardened_joint(mixtures, splits, k),
        **{f"mean_variance_{x}": lambda x=x: of_mean_variance(x) for x in mean_variance.LAYOUTS},
    }
    for name in names:
        if name != "hardened_taste" or k % 2 == 0:
            started = time.time()
            prediction = makers[name]()
            predictions[name] = prediction._replace(seconds=time.time() - started)
    hard = {name: prediction for name, prediction in predictions.items() if name in HARD}
    name = min(hard, key=lambda name: brier(hard[name].p_hat["valid"], splits["valid"].split))
    predictions["recommended"] = hard[name]._replace(chosen=f"{name}: {hard[name].chosen}")
    return predictions


def references(split):
    """{name: Prediction} that need no training; floor: the better of 0 and 1 by the votes."""
    floor, half = (split.p > 0.5).astype(float), np.full(len(split.p), 0.5)
    return {
        "coin_flip": Prediction("", {"test": half}),
        "floor_single": Prediction("", {"test": floor}),
    }


# ---- the table


class Errors(NamedTuple):
    """One variant on one test split: squared errors against p, and against p_true or None, summed
    over each prompt (P,); the Brier score on validation prompts or None; chosen, seconds."""

    errors: np.ndarray
    true_errors: np.ndarray | None
    valid: float | None
    chosen: str
    seconds: float


def errors_of(name, prediction, splits):
    """The Errors of a Prediction."""
    split, p_hat, true_errors, valid = splits["test"].split, prediction.p_hat, None, None
    if split.p_true is not None:
        true_errors = (p_hat["test"] - split.p_true) ** 2
        if name == "floor_single":  # the floor by p_true, not by the votes
            true_errors = metrics.floor_single(split.p_true)
        true_errors = metrics.by_prompt(split, true_errors)
    if "valid" in p_hat:
        valid = brier(p_hat["valid"], splits["valid"].split)
    errors = metrics.by_prompt(split, (p_hat["test"] - split.p) ** 2)
    return Errors(errors, true_errors, valid, prediction.chosen, prediction.seconds)


def collect(args, k):
    """({variant: {(run, fold): [Errors of each seed]}}, {(run, fold): pairs (P,)}, likewise the
    irreducible errors, where they are known)."""
    collected, pairs, irreducible = {}, {}, {}
    for run, seed in itertools.product(args.runs, args.seeds):
        stats = data.read_stats(run)
        for fold, splits in enumerate(read_runs(run, seed, args.folds, args.seeds[0])):
            split, part = splits["test"].split, (run, fold)
            predictions = variants(splits, k, seed, args.variants) | references(split)
            for name, prediction in predictions.items():
                errors = errors_of(name, prediction, splits)
                collected.setdefault(name, {}).setdefault(part, []).append(errors)
                if errors.valid is not None:
                    test = brier(prediction.p_hat["test"], split)
                    print(
                        f"{run} seed {seed} k {k}: {name:22} valid {errors.valid:.4f} "
                        f"test {test:.4f}  {errors.chosen}  {errors.seconds:.0f} s",
                        file=sys.stderr,
                    )
            pairs[part] = np.diff(split.pair_start).astype(float)
            if (c := theory.irreducible_of(split, stats)) is not None:
                irreducible[part] = metrics.by_prompt(split, c)
    return collected, pairs, irreducible


def mean_over_seeds(parts, name):
    """The figure `name` (P,) of all prompts of {(run, fold): [Errors]}; None where one has none.

    Seeds are averaged first: the same prompts under another seed are no further prompts."""
    of_parts = [[getattr(errors, name) for errors in seeds] for seeds in parts.values()]
    if any(errors is None for seeds in of_parts for errors in seeds):
        return None
    return np.concatenate([np.mean(seeds, 0) for seeds in of_parts])


def row_of(name, parts, soft_errors, pairs):
    """The table's row of one variant; parts: {(run, fold): [Errors]}; soft_errors (P,): those of
    soft_single; pairs (P,). Intervals are of 95 % over resampled prompts."""
    errors, true_error = (mean_over_seeds(parts, x) for x in ("errors", "true_errors"))
    over_soft = errors - soft_errors
    sums = metrics.resampled(np.stack([errors, over_soft, pairs], 1), 10000, 0)
    intervals = [metrics.interval(x / sums[:, 2], len(pairs)) for x in sums[:, :2].T]
    if true_error is not None:
        true_error = true_error.sum() / pairs.sum()
    every = [errors for seeds in parts.values() for errors in seeds]
    _, _, valid, chosen, seconds = zip(*every)
    return {
        "variant": name,
        "brier": errors.sum() / pairs.sum(),
        "brier_ci": intervals[0],
        "over_soft": over_soft.sum() / pairs.sum(),
        "over_soft_ci": intervals[1],
        "true_error": true_error,
        "valid": None if valid[0] is None else float(np.mean(valid)),
        "seconds": round(float(np.mean(seconds)), 1),
        "chosen": "; ".join(dict.fromkeys(filter(None, chosen))),
    }


def rows_of(args, k):
    """The table's rows for ensembles of k members."""
    collected, pairs_of, irreducible = collect(args, k)
    pairs = np.concatenate(list(pairs_of.values()))
    soft_errors = mean_over_seeds(collected["soft_single"], "errors")
    rows = [row_of(name, parts, soft_errors, pairs) for name, parts in collected.items()]
    if irreducible.keys() == pairs_of.keys():
        c = np.concatenate(list(irreducible.values())).sum() / pairs.sum()
        true_error = 0.0 if rows[0]["true_error"] is not None else None
        rows.append({"variant": "irreducible", "brier": c, "true_error": true_error})
    return [{"k": k} | row for row in rows]


def splits_of(args):
    """Yield (name of a run, {split: data.Split}) of all that rows_of pools."""
    for run, seed in itertools.product(args.runs, args.seeds):
        for splits in read_runs(run, seed, args.folds, args.seeds[0]):
            yield run.name, {name: featured.split for name, featured in splits.items()}


def print_row(row):
    over_soft = ""
    if "over_soft" in row:
        over_soft = f"  over soft {row['over_soft']:+.4f}"
        if row["over_soft_ci"]:  # Few prompts have none.
            over_soft += " [{:+.4f}, {:+.4f}]".format(*row["over_soft_ci"])
    true_error = "" if row["true_error"] is None else f"  true {row['true_error']:.4f}"
    print(
        f"k {row['k']:2} {row['variant']:22} Brier {row['brier']:.4f}{over_soft}{true_error}"
        f"  {row.get('chosen', '')[:100]}",
        flush=True,
    )


def main(args):
    torch.set_num_threads(args.threads)
    if args.out:
        files.check_writable(args.out)
    table = []
    for k in args.k:
        rows = rows_of(args, k)
        table += rows
        for row in rows:
            print_row(row)
    if args.out and args.out.suffix == ".csv":
        write_csv(args.out, table)
        write_splits(args.out, splits_of(args))
    elif args.out:
        files.write_json(args.out, table)


# Each fold is the validation split of another, and something is left to train on.
folds = cli.number_type("folds", cli.integer, lambda v: v == 0 or v >= 3, "0 or at least 3")


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add(
        "--runs",
        required=True,
        type=cli.path,
        nargs="+",
        help="run directories with data/ and features/; several are pooled",
    )
    add("--k", type=cli.member_number, nargs="+", default=[8], help="members")
    words = "of the fits, whose errors are averaged; the first is also that of --folds"
    add("--seeds", type=cli.seed, nargs="+", default=[0], help=words)
    add(
        "--folds",
        type=folds,
        default=0,
        metavar="N",
        help="all prompts of a run in N folds, each the test prompts once, "
        "instead of its own splits",
    )
    add("--variants", nargs="+", choices=HARD, default=HARD, help="which to try (default: all)")
    add("--out", type=run_dir.output, help="FILE.json or FILE.csv")
    add("--threads", type=cli.threads, default=1, help="CPU threads")
    args = parser.parse_args(argv)
    if args.variants == ["hardened_taste"] and any(k % 2 for k in args.k):
        parser.error("--variants hardened_taste is of pairs of members, an even --k expected")
    return args


if __name__ == "__main__":
    cli.run_main(main, parse_args())
