"""Every variant of the ensemble beside each other, on the frozen features of any run, and the one that validation prompts recommend.

    python experiments/variants.py --run runs/mine --out variants.json                       (half a minute to a few minutes on one thread)
    python experiments/variants.py --run runs/mine --folds 8 --k 8 32 --out variants.csv     (every prompt a test prompt once)

RUN: data/ and features/SPLIT.npy (train_rm.py --train head makes them, populations.py too). The losses are those of train_rm.py and train_joint.py,
of heads on standardised features, minimised to convergence by L-BFGS with an L2 penalty in place of weight decay. Every hyper-parameter, and the
recommendation, is chosen on validation prompts, of hard variants by the Brier score of their hard votes at k; where a run has none, on a fifth of
its train prompts. Test prompts are reported only.
"""

import csv
import dataclasses
import itertools
import sys
import time
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "extras")]
import harden
import train_joint

import train_rm
from evaluate import by_prompt, floor_single, irreducible, resampled
from pairwise import cli, data, run_dir
from pairwise.weights import error_matrix, simplex_weights

L2 = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
COMPONENTS = (1, 2, 3, 4, 6, 8)
HARD = (
    "fsam_p",
    "fsam_residual",
    "fsam_centered",
    "fsam_mixture",
    "joint",
    "hardened",
    "hardened_taste",
    "hardened_joint",
)


# ---- data


def subset(split, keep):
    """(Split, responses kept (R,)) of the prompts `keep`, bool (P,)."""
    pairs, responses = (
        np.repeat(keep, np.diff(split.pair_start)),
        np.repeat(keep, np.diff(split.response_start)),
    )
    place = np.cumsum(responses) - 1
    fields = {
        name: getattr(split, name)[pairs]
        for name in ("votes_a", "votes_b", "ties", "p_true")
        if getattr(split, name) is not None
    }
    starts = {
        name: np.concatenate([[0], np.cumsum(np.diff(getattr(split, name))[keep])])
        for name in ("response_start", "pair_start")
    }
    lists = {
        name: [x for x, kept in zip(getattr(split, name), keep) if kept]
        for name in ("prompt_id", "messages", "responses")
    }
    return dataclasses.replace(
        split, a=place[split.a[pairs]], b=place[split.b[pairs]], **fields, **starts, **lists
    ), responses


def merged(parts):
    """One Split of all prompts of several."""
    shifts = {
        name: np.cumsum([0, *(int(getattr(part, name)[-1]) for part in parts)])
        for name in ("response_start", "pair_start")
    }
    there = [
        name
        for name in ("votes_a", "votes_b", "ties", "p_true")
        if getattr(parts[0], name) is not None
    ]
    fields = {name: np.concatenate([getattr(part, name) for part in parts]) for name in there}
    fields |= {
        name: np.concatenate(
            [getattr(part, name) + shift for part, shift in zip(parts, shifts["response_start"])]
        )
        for name in ("a", "b")
    }
    fields |= {
        name: np.concatenate(
            [[0], *(getattr(part, name)[1:] + shift for part, shift in zip(parts, each))]
        )
        for name, each in shifts.items()
    }
    fields |= {
        name: [x for part in parts for x in getattr(part, name)]
        for name in ("prompt_id", "messages", "responses")
    }
    return dataclasses.replace(parts[0], **fields)


def read_run(run, seed, folds=0):
    """[{split: (Split, features float64 (R, d), standardised by train)}]: train, valid and test of the run, or of each fold of all its prompts.

    Of a fold the next one is its validation split.
    """
    found = {}
    for name in data.SPLITS:
        path = run / "features" / f"{name}.npy"
        if (run / "data" / f"{name}.parquet").exists():
            if not path.exists():
                raise cli.InputError(f"{path}: no such file; train_rm.py --train head makes it")
            found[name] = data.read_split(run, name), np.load(path).astype(np.float64)
    if folds:
        split, x = (
            merged([split for split, _ in found.values()]),
            np.concatenate([x for _, x in found.values()]),
        )
        if len(split.prompt_id) < folds or folds < 3:
            raise cli.InputError(
                f"--folds {folds}: at least 3 folds and as many prompts expected, {len(split.prompt_id)} prompts found in {run}"
            )
        number = np.random.default_rng(seed).permutation(np.arange(len(split.prompt_id)) % folds)
        made = [
            {
                "test": number == i,
                "valid": number == (i + 1) % folds,
                "train": (number != i) & (number != (i + 1) % folds),
            }
            for i in range(folds)
        ]
        return [
            standardised({name: cut(split, x, keep) for name, keep in each.items()})
            for each in made
        ]
    if "valid" not in found:
        split, x = found["train"]
        held = np.random.default_rng(seed).permutation(np.arange(len(split.prompt_id)) % 5) == 0
        found |= {"valid": cut(split, x, held), "train": cut(split, x, ~held)}
        print(f"{run}: no validation prompts; {held.sum()} of its train prompts serve")
    return [standardised(found)]


def cut(split, x, keep):
    part, responses = subset(split, keep)
    return part, x[responses]


def standardised(found):
    mean, scale = found["train"][1].mean(0), found["train"][1].std(0) + 1e-6
    return {name: (split, (x - mean) / scale) for name, (split, x) in found.items()}


# ---- fits


def fit(x, split, loss, heads, l2, seed, start=None, more=0):
    """(weights float64 (heads, d), further parameters (more,)) that minimise loss(r_a, r_b, further) / N + l2 |weights|^2.

    loss: sum over pairs, of tensors (N, heads); start: (weights, further), else drawn from seed so that rewards have unit variance.
    """
    d = x.shape[1]
    draw = np.random.default_rng(seed).normal(size=(heads, d)) / np.sqrt(d)
    first = (
        np.concatenate([draw.ravel(), np.zeros(more)])
        if start is None
        else np.concatenate([start[0].ravel(), start[1]])
    )
    features, a, b = torch.from_numpy(x), torch.from_numpy(split.a), torch.from_numpy(split.b)

    def value(flat):
        at = torch.from_numpy(flat).requires_grad_()
        weight, further = at[: heads * d].view(heads, d), at[heads * d :]
        rewards = features @ weight.T
        total = loss(rewards[a], rewards[b], further) / len(a) + l2 * weight.square().sum()
        total.backward()
        return total.item(), at.grad.numpy()

    found = minimize(value, first, jac=True, method="L-BFGS-B", options={"maxiter": 300}).x
    return found[: heads * d].reshape(heads, d), found[heads * d :]


def fit_single(x, split, target, l2, seed):
    """Weights (1, d) of one reward on `target` (N,)."""
    goal = torch.from_numpy(target)
    return fit(
        x,
        split,
        lambda a, b, _: train_rm.LOSSES["mse"](a[:, 0] - b[:, 0], goal, None).sum(),
        1,
        l2,
        seed,
    )[0]


def fit_joint(x, split, heads, l2, seed, s=1.0, start=None):
    """(weights (heads, d), logits (heads,)) of the mixture's own error."""
    goal = torch.from_numpy(split.p)
    return fit(
        x,
        split,
        lambda a, b, logits: train_joint.mixture_error(a, b, goal, logits, s),
        heads,
        l2,
        seed,
        start,
        heads,
    )


def rewards_of(weights, data):
    """{split: float32 (K, R)}: equal rows of features have equal rewards."""
    return {
        name: np.stack([(x * row).sum(1) for row in weights]).astype(np.float32)
        for name, (_, x) in data.items()
    }


def votes(rewards, split):
    return harden.evaluator.votes(rewards, split.a, split.b) / 2


def fitted_weights(rewards, split):
    """fit_weights.py's of all members."""
    v, p = votes(rewards, split), split.p
    return simplex_weights(error_matrix(v @ v.T / len(p), v @ p / len(p), p @ p / len(p)))


def hard_predictions(weights, data):
    """{split: p_hat (N,)} of members with QP weights."""
    rewards = rewards_of(weights, data)
    alpha = fitted_weights(rewards["train"], data["train"][0])
    return {name: alpha @ votes(rewards[name], split) for name, (split, _) in data.items()}


def brier(p_hat, split):
    return float(np.mean((p_hat - split.p) ** 2))


# ---- variants: each {split: p_hat (N,)} and what was chosen, by the least error on validation prompts


def best(tried, data):
    """Of [(what, {split: p_hat})], the one with the least Brier score on validation prompts."""
    return min(tried, key=lambda each: brier(each[1]["valid"], data["valid"][0]))


def fsam(target, data, k, seed):
    """k members one after the other (train_rm.py, --target)."""
    split, x = data["train"]
    tried = []
    for l2 in L2:
        weights, alpha = np.zeros((0, x.shape[1])), np.zeros(0)
        for j in range(k):
            rewards = rewards_of(weights, data)["train"] if j else None
            goal = train_rm.target_of(target, split.p, rewards, alpha, split.a, split.b)
            weights = np.concatenate([weights, fit_single(x, split, goal, l2, [seed, j])])
            alpha = fitted_weights(rewards_of(weights, data)["train"], split)
        tried.append((f"l2 {l2:g}", hard_predictions(weights, data)))
    return best(tried, data)


def joint(data, k, seed):
    """k heads at once (train_joint.py): s is raised step by step from 1, each time from where it was."""
    tried = []
    for l2 in L2:
        found = None
        for s in (1, 4, 16):
            found = fit_joint(data["train"][1], data["train"][0], k, l2, seed, s, found)
            tried.append((f"l2 {l2:g}, s {s}", hard_predictions(found[0], data)))
    return best(tried, data)


def soft_single(data, seed):
    """(what, weights (1, d), {split: p_hat}) of a + (1 - 2a) sigmoid(tau du), the best that one reward without hard votes does."""
    split, x = data["train"]
    return min(
        (
            (f"l2 {l2:g}", w, soft_predictions(w, data))
            for l2 in L2
            for w in [fit_single(x, split, split.p, l2, seed)]
        ),
        key=lambda each: brier(each[2]["valid"], data["valid"][0]),
    )


def soft_mixtures(data, seed):
    """{M: as soft_single} for mixtures of M soft components trained jointly."""
    split, x = data["train"]
    return {
        m: min(
            (
                (f"M {m}, l2 {l2:g}", w, soft_predictions(w, data))
                for l2 in L2
                for w in [fit_joint(x, split, m, l2, seed)[0]]
            ),
            key=lambda each: brier(each[2]["valid"], data["valid"][0]),
        )
        for m in COMPONENTS
    }


def soft_predictions(weights, data):
    """{split: p_hat} of the soft mixture, tuned as harden.py does."""
    du = {
        name: harden.differences(rewards, data[name][0])
        for name, rewards in rewards_of(weights, data).items()
    }
    mix = harden.soft_weights(du["train"], data["train"][0].p)
    tau, a = harden.tune(du["valid"], mix, data["valid"][0].p)
    return {name: harden.lapsed(mix @ harden.expit(tau * each), a) for name, each in du.items()}


def hardened(weights, data, k, layout="auto"):
    """(what, {split: p_hat}) of harden.py on rewards with these weights (M, d), all M components."""
    rewards = rewards_of(weights, data)
    m = len(weights) if layout == "auto" else 1
    found = harden.harden(
        *((data[name][0], rewards[name]) for name in ("train", "valid")), k, layout, [m]
    )
    return found["layout"], {
        name: found["alpha"] @ harden.votes_of(found["formulas"], rewards[name], split.a, split.b)
        for name, (split, _) in data.items()
    }


def variants(data, k, seed, wanted):
    """{name: (what was chosen, {split: p_hat}, seconds)} of the variants wanted, of the recommended one and of the soft references."""
    found = {}

    def enter(name, make):
        started = time.time()
        found[name] = *make(), time.time() - started

    what, single, predictions = soft_single(data, seed)
    found["soft_single"] = what, predictions, 0.0
    mixtures = soft_mixtures(data, seed) if {"hardened_joint", "soft_mixture"} & set(wanted) else {}
    if mixtures:
        found["soft_mixture"] = (
            *best([(what, predictions) for what, _, predictions in mixtures.values()], data),
            0.0,
        )
    for name in wanted:
        if name.startswith("fsam_"):
            enter(name, lambda: fsam(name.removeprefix("fsam_"), data, k, seed))
        elif name == "joint":
            enter(name, lambda: joint(data, k, seed))
        elif name == "hardened":
            enter(name, lambda: hardened(single, data, k))
        elif (
            name == "hardened_taste" and k % 2 == 0
        ):  # the taste votes nothing: any other reward will do
            taste = np.random.default_rng(seed).normal(size=single.shape)
            enter(name, lambda: hardened(np.concatenate([single, taste]), data, k, "equal"))
        elif name == "hardened_joint":
            enter(
                name,
                lambda: best(
                    [
                        (f"{what}, {layout}", p)
                        for what, w, _ in mixtures.values()
                        for layout, p in [hardened(w, data, k)]
                    ],
                    data,
                ),
            )
    hard = {name: each for name, each in found.items() if name in HARD}
    chosen = min(hard, key=lambda name: brier(hard[name][1]["valid"], data["valid"][0]))
    found["recommended"] = f"{chosen}: {hard[chosen][0]}", *hard[chosen][1:]
    return found


# ---- the table


def references(split):
    """{name: prediction (N,)} that need no training; floor: the better of 0 and 1 for each pair, by the votes."""
    return {"coin_flip": np.full(len(split.p), 0.5), "floor_single": (split.p > 0.5).astype(float)}


def summary(terms, pairs, draw):
    """[{variant, brier, brier_ci, over_soft, over_soft_ci, true_error, ..}] of terms {variant: (errors (P,), true errors (P,) or None, facts)}.

    pairs (P,); over_soft: the Brier score less that of soft_single; intervals of 95 % over resampled prompts.
    """
    rows = []
    for name, (errors, true, facts) in terms.items():
        over = errors - terms["soft_single"][0]
        sums = draw(np.stack([errors, over, pairs], 1))
        limits = np.percentile(sums[:, :2] / sums[:, 2:], [2.5, 97.5], axis=0).T.tolist()
        rows.append(
            {
                "variant": name,
                "brier": errors.sum() / pairs.sum(),
                "brier_ci": limits[0],
                "over_soft": over.sum() / pairs.sum(),
                "over_soft_ci": limits[1],
                "true_error": None if true is None else true.sum() / pairs.sum(),
            }
            | facts
        )
    return rows


def main(args):
    torch.set_num_threads(args.threads)
    table = []
    for k in args.k:
        collected = {"pairs": []}
        for run, number in itertools.product(args.run, args.seeds):
            stats = run_dir.read_json(run / "data" / "stats.json")
            for data in read_run(run, number, args.folds):
                split = data["test"][0]
                found = variants(data, k, number, args.variants)
                found |= {
                    name: ("", {"test": p_hat}, 0.0) for name, p_hat in references(split).items()
                }
                for name, (what, predictions, seconds) in found.items():
                    true = (
                        None
                        if split.p_true is None
                        else by_prompt(split, (predictions["test"] - split.p_true) ** 2)
                    )
                    if name == "floor_single" and true is not None:
                        true = by_prompt(split, floor_single(split.p_true))
                    valid = (
                        brier(predictions["valid"], data["valid"][0])
                        if "valid" in predictions
                        else None
                    )
                    collected.setdefault(name, []).append(
                        (
                            by_prompt(split, (predictions["test"] - split.p) ** 2),
                            true,
                            valid,
                            what,
                            seconds,
                        )
                    )
                    if valid is not None:
                        print(
                            f"{run} seed {number} k {k}: {name:15} valid {valid:.4f} test {brier(predictions['test'], split):.4f}  {what}  "
                            f"{seconds:.0f} s",
                            file=sys.stderr,
                        )
                collected["pairs"].append(np.diff(split.pair_start).astype(float))
                if stats["votes"] == "sampled":
                    c = irreducible(split.p, split.n, split.ties * (stats["ties"] == "half"))
                    collected.setdefault("irreducible", []).append(by_prompt(split, c))
        pairs = np.concatenate(collected.pop("pairs"))
        c, terms = collected.pop("irreducible", None), {}
        for name, each in collected.items():
            errors, true, valid, what, seconds = zip(*each)
            terms[name] = (
                np.concatenate(errors),
                None if true[0] is None else np.concatenate(true),
                {
                    "valid": None if valid[0] is None else float(np.mean(valid)),
                    "seconds": round(float(np.mean(seconds)), 1),
                    "chosen": "; ".join(dict.fromkeys(filter(None, what))),
                },
            )
        rows = summary(terms, pairs, lambda sums: resampled(sums, 10000, 0))
        if c is not None:
            true = 0.0 if rows[0]["true_error"] is not None else None
            rows.append(
                {
                    "variant": "irreducible",
                    "brier": np.concatenate(c).sum() / pairs.sum(),
                    "true_error": true,
                }
            )
        table += [{"k": k} | row for row in rows]
        for row in rows:
            over = (
                "  over soft {:+.4f} [{:+.4f}, {:+.4f}]".format(
                    row["over_soft"], *row["over_soft_ci"]
                )
                if "over_soft" in row
                else ""
            )
            true = "" if row["true_error"] is None else f"  true {row['true_error']:.4f}"
            print(
                f"k {k:2} {row['variant']:15} Brier {row['brier']:.4f}{over}{true}  {row.get('chosen', '')[:100]}",
                flush=True,
            )
    if args.out and args.out.suffix == ".csv":
        with (
            run_dir.replacing(args.out) as partial,
            open(partial, "w", newline="", encoding="utf-8") as file,
        ):
            names = list(dict.fromkeys(name for row in table for name in row))
            rows = csv.DictWriter(file, names)
            rows.writeheader()
            rows.writerows(
                {name: f"{x:.6f}" if isinstance(x, float) else x for name, x in row.items()}
                for row in table
            )
    elif args.out:
        run_dir.write_json(args.out, table)


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add(
        "--run",
        required=True,
        type=Path,
        nargs="+",
        help="run directories with data/ and features/; several are pooled",
    )
    add("--k", type=cli.natural, nargs="+", default=[8], help="members")
    add("--seeds", type=cli.seed, nargs="+", default=[0], help="of the fits; pooled too")
    add(
        "--folds",
        type=int,
        default=0,
        metavar="N",
        help="all prompts of a run in N folds, each the test prompts once, instead of its own splits",
    )
    add("--variants", nargs="+", choices=HARD, default=HARD, help="which to try (default: all)")
    add("--out", type=Path, help="FILE.json or FILE.csv")
    add("--threads", type=cli.natural, default=1, help="CPU threads")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
