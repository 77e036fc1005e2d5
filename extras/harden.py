"""An ensemble of hard votes that follows the soft model of a finished run: levels of its rewards, without training, without torch.

    python extras/harden.py --run runs/demo --out runs/demo-hard --k 8          (seconds)

A soft reward u = scale r predicts sigmoid(u(y1) - u(y2)). Members that are *steps* of u share that out among hard votes: with
level = floor((u + o) / w) two responses far apart in u are in different levels, and every member orders them alike; inside a level the members
disagree and cancel.

    quantile, equal    k/2 levels (w_i, o_i) and two members each, which inside a level follow a taste, another member's reward, and its opposite:
                       weight 1/k each, p_hat = 1/2 + sign(du) (share of the levels that separate the two) / 2, whatever the taste.
                       quantile: w_i at the quantiles of F below, for which p_hat is sigmoid(du) on average over random offsets;
                       equal: one w, offsets w i/(k/2)
    fitted             with u itself for the taste, the k/2 members of the one order are all u: one member of weight 1/2 does for them, and
                       k - 1 levels instead of k/2 are left for the others, whose order inside a level is that of u reversed. Levels and
                       weights are picked from a grid of (w, o)

--layout auto takes the one with the least mean (p_hat - soft)^2 on train pairs, for which no vote is read. Of a run with several members the soft
model is a mixture sum_c w_c sigmoid(du_c) of the first of them: as many as give the least Brier score of the hard votes on validation prompts, on
which the scale and the lapses of the soft model are fitted too.
"""

import os
import shutil
from pathlib import Path

import numpy as np
from scipy.optimize import brentq, minimize
from scipy.special import expit

from pairwise import cli, data, run_dir
from pairwise.levels import formula, hardened
from pairwise.weights import error_matrix, simplex_weights

evaluator = cli.import_evaluator()
PAIRS = 10_000  # that a layout is fitted to; more change nothing that shows


# ---- the soft model


def differences(rewards, split):
    """r(a) - r(b), float64 (K, N)."""
    return rewards[:, split.a].astype(np.float64) - rewards[:, split.b]


def soft_weights(du, p):
    """Weights (M,) on the simplex of the soft votes sigmoid(du), (M, N), that minimise the squared error against p."""
    soft = expit(du)
    return simplex_weights(error_matrix(soft @ soft.T / len(p), soft @ p / len(p), p @ p / len(p)))


def tune(du, weights, p):
    """(tau, a): the scale and the lapse rate in [0, 1/2) that minimise mean (a + (1 - 2a) sum_c w_c sigmoid(tau du_c) - p)^2."""

    def error(x):
        return np.mean((lapsed(weights @ expit(np.exp(x[0]) * du), x[1]) - p) ** 2)

    found = min(
        (
            minimize(error, [start, 0.02], method="Nelder-Mead", bounds=[(-4, 4), (0, 0.49)])
            for start in (-1.0, 0.0, 1.0)
        ),
        key=lambda r: r.fun,
    )
    return float(np.exp(found.x[0])), float(found.x[1])


def lapsed(soft, a):
    """What a + (1 - 2a) soft predicts: with probability 2a a voter flips a coin."""
    return a + (1 - 2 * a) * soft


# ---- layouts


def mixing(width):
    """F(w) = tanh(w/2) - (w/2) sech^2(w/2): for widths of this distribution, and random offsets, mean min(|d|/w, 1) = 2 sigmoid(|d|) - 1."""
    return np.tanh(width / 2) - width / 2 / np.cosh(width / 2) ** 2


def quantile_layout(levels):
    """(widths, offsets), float64 (levels,) each: the quantiles of F at (i + 1/2) / levels, offsets at the golden ratio's steps."""
    widths = np.array(
        [brentq(lambda w: mixing(w) - (i + 0.5) / levels, 1e-6, 500) for i in range(levels)]
    )
    return widths, 0.618 * np.arange(levels) % 1 * widths


def equal_layout(levels, width):
    return np.full(levels, width), width * np.arange(levels) / levels


def paired(member, scale, layout, taste, taste_scale):
    """Two formulas for each level of a layout: the taste and its opposite."""
    return [
        formula(member, scale, w, o, taste, sign * taste_scale)
        for w, o in zip(*map(np.ndarray.tolist, layout))
        for sign in (1, -1)
    ]


def largest_remainder(weights, k):
    """Even k_c, of sum k, in proportion to the weights, (M,); k even."""
    share = np.asarray(weights) * (k / 2)
    counts = np.floor(share).astype(int)
    counts[np.argsort(counts - share, kind="stable")[: k // 2 - counts.sum()]] += 1
    return 2 * counts


def pick(q, k, sweeps=1, tries=4):
    """(chosen (k,), weights (k,)): of the pool with error matrix q (P, P), members and simplex weights of a small error alpha' Q alpha.

    Forward selection by the gradient with all weights fitted anew, then every member exchanged once where that helps.
    """

    def solved(chosen):
        part = q[np.ix_(chosen, chosen)]
        alpha = simplex_weights(part)
        return alpha @ part @ alpha, alpha

    def grown(chosen):
        gain = q[:, chosen] @ solved(chosen)[1] if chosen else np.diag(q).copy()
        gain[chosen] = np.inf
        return min(
            ([*chosen, int(j)] for j in np.argsort(gain, kind="stable")[:tries]),
            key=lambda chosen: solved(chosen)[0],
        )

    chosen = []
    for _ in range(k):
        chosen = grown(chosen)
    for _ in range(sweeps):
        for member in list(chosen):
            other = grown([j for j in chosen if j != member])
            chosen = min(chosen, other, key=lambda chosen: solved(chosen)[0])
    return chosen, solved(chosen)[1]


def pool_of(component, scale):
    """Formulas to pick from: u, its opposite (lapses), and levels of widths from .7 to 12 with u reversed inside."""
    levels = [
        formula(component, scale, float(w), float(w * o))
        for w in np.geomspace(0.7, 12, 14)
        for o in np.arange(12) / 12
    ]
    return [formula(component, scale), formula(component, -scale), *levels]


def votes_of(formulas, rewards, a, b):
    """V_j, float64 (k, N)."""
    parts = [
        formulas[at : at + 1000] for at in range(0, len(formulas), 1000)
    ]  # the evaluator takes 1,024 at once
    return np.concatenate([evaluator.votes(hardened(part, rewards), a, b) for part in parts]) / 2


def layouts(rewards, split, components, weights, tau, a, k, tastes, wanted="auto"):
    """{layout: (formulas, alpha (k,), mean (p_hat - soft)^2)} over the pairs of `split`, of which no vote is read.

    rewards float32 (K, R); components: the members (from 1) whose soft votes are mixed with `weights`; tau, a: as tuned; tastes: {component: its
    taste or None}.
    """
    some = (
        np.unique(np.linspace(0, len(split.a) - 1, PAIRS).astype(int))
        if len(split.a) > PAIRS
        else np.arange(len(split.a))
    )
    first, second = split.a[some], split.b[some]
    du = tau * (rewards[:, first].astype(np.float64) - rewards[:, second])[np.array(components) - 1]
    soft = lapsed(weights @ expit(du), a)
    found = {}

    def enter(name, formulas, alpha):
        error = np.mean((alpha @ votes_of(formulas, rewards, first, second) - soft) ** 2)
        if name not in found or error < found[name][2]:
            found[name] = formulas, alpha, float(error)

    counts = largest_remainder(weights, k) if k % 2 == 0 else []
    kept = [(c, n) for c, n in zip(components, counts) if n]
    if kept and all(tastes[c] for c, _ in kept):

        def both(layout):
            units = {c: 1 / max(float(rewards[tastes[c] - 1].std()), 1e-6) for c, _ in kept}
            formulas = [
                f for c, n in kept for f in paired(c, tau, layout(n // 2), tastes[c], units[c])
            ]
            alpha = np.concatenate([np.full(n, weights[components.index(c)] / n) for c, n in kept])
            return formulas, alpha / alpha.sum()

        if wanted in ("auto", "quantile"):
            enter("quantile", *both(quantile_layout))
        if wanted in ("auto", "equal"):
            for width in np.geomspace(1, 12, 40):
                enter("equal", *both(lambda levels: equal_layout(levels, float(width))))
    if wanted in ("auto", "fitted"):
        pool = [f for c in components for f in pool_of(c, tau)]
        votes = votes_of(pool, rewards, first, second)
        chosen, alpha = pick((votes - soft) @ (votes - soft).T / len(soft), k)
        heaviest = np.argsort(-alpha, kind="stable")
        enter("fitted", [pool[chosen[i]] for i in heaviest], alpha[heaviest])
    return found


def centred(formulas, rewards):
    """The formulas with offsets that bring the levels of the median reward to zero, where float32 is finest."""
    middle = np.median(rewards, axis=1).astype(np.float64)
    levels = [
        0
        if f["width"] is None
        else np.floor((f["scale"] * middle[f["member"] - 1] + f["offset"]) / f["width"])
        for f in formulas
    ]
    return [
        f | {"offset": float(f["offset"] - f["width"] * level) if level else f["offset"]}
        for f, level in zip(formulas, levels)
    ]


def harden(train, tuned, k, wanted="auto", counts=None):
    """The hardened ensemble with the least Brier score of its hard votes on `tuned`, over the number of soft components.

    train, tuned: (Split, rewards float32 (K, R)), members in the order in which they become components; counts: the numbers of them that are tried.
    Returns {formulas, alpha, layout, components, weights, tau, a, misfit, brier}. Raises InputError where k members cannot have the wanted layout.
    """
    (split, rewards), (asked, asked_rewards) = train, tuned
    best = None
    for m in counts or range(1, len(rewards) + 1):
        weights = soft_weights(differences(rewards[:m], split), split.p)
        components, weights = (
            [c for c in range(1, m + 1) if weights[c - 1] > 0],
            weights[weights > 0],
        )
        tau, a = tune(differences(asked_rewards[np.array(components) - 1], asked), weights, asked.p)
        tastes = {
            c: next((other for other in range(1, len(rewards) + 1) if other != c), None)
            for c in components
        }
        found = layouts(rewards, split, components, weights, tau, a, k, tastes, wanted)
        if not found:
            raise cli.InputError(
                f"--layout {wanted}: pairs of members with a taste need an even --k and a run of at least two members; "
                f"--k {k} and {len(rewards)} found"
            )
        name = min(found, key=lambda name: found[name][2])
        formulas, alpha, misfit = found[name]
        brier = np.mean(
            (alpha @ votes_of(formulas, asked_rewards, asked.a, asked.b) - asked.p) ** 2
        )
        if best is None or brier < best["brier"]:
            best = {
                "formulas": centred(formulas, rewards),
                "alpha": alpha,
                "layout": name,
                "components": components,
                "weights": weights,
                "tau": tau,
                "a": a,
                "misfit": misfit,
                "brier": float(brier),
            }
    return best


def main(args):
    run, out, k = args.run, args.out, args.k
    if (
        out.exists()
        and any(out.iterdir())
        and "harden" not in run_dir.read_json(out / "manifest.json", {"stages": {}})["stages"]
    ):
        raise cli.InputError(
            f"--out {out}: a directory of something else found, one of its own expected"
        )
    if run_dir.made_otherwise(run) in ("hardened", "pruned"):
        raise cli.InputError(
            f"{run}: a {run_dir.made_otherwise(run)} run found; the one that it was made from expected"
        )
    splits, _ = data.read_splits(run)
    splits = {
        name: data.counted_pairs(split) or split for name, split in splits.items()
    }  # as in fit_weights.py
    trained = run_dir.count_members(run)
    rewards = {
        name: run_dir.read_rewards(run, name, trained, (int(split.response_start[-1]),))
        for name, split in splits.items()
    }
    if (continued := run_dir.read_continuation_rewards(run, trained)) is not None:
        rewards["continuations"] = continued
    settings = {
        "k": k,
        "layout": args.layout,
        "source": os.path.relpath(run.resolve(), out.resolve()),
    }
    files = [run_dir.reward_path(run, j, name) for j in range(1, trained + 1) for name in rewards]
    inputs = data.hashes(run) | {
        str(path.relative_to(run)): run_dir.hash_file(path) for path in files
    }
    if run_dir.unchanged(
        out, "harden", settings, inputs, [out / "weights.json", out / "members.json"]
    ):
        print(f"harden: {out} is up to date, skipped")
        return
    tuned = "valid" if "valid" in splits else "train"
    if tuned == "train":
        print(
            "harden: no validation prompts (--valid-share): scale, lapses and number of components are fitted on train prompts"
        )
    if trained == 1:
        print(
            "harden: one member, so there is no taste: inside a level the order is the member's own, or its reverse"
        )
    found = harden(
        (splits["train"], rewards["train"]), (splits[tuned], rewards[tuned]), k, args.layout
    )
    started = run_dir.begin_stage(out, "harden", settings, inputs)
    with run_dir.replacing(out / "data") as partial:
        shutil.copytree(run / "data", partial)
    (out / "continuations.parquet").unlink(missing_ok=True)
    if (run / "continuations.parquet").exists():
        shutil.copyfile(run / "continuations.parquet", out / "continuations.parquet")
    with run_dir.replacing(out / "rewards") as partial:
        for name, trained_rewards in rewards.items():
            for j, values in enumerate(hardened(found["formulas"], trained_rewards), 1):
                run_dir.write_array(partial / run_dir.reward_path(out, j, name).name, values)
    run_dir.write_json(
        out / "members.json", {"source": settings["source"], "members": found["formulas"]}
    )
    train = splits["train"]
    train_mse = np.mean(
        (found["alpha"] @ votes_of(found["formulas"], rewards["train"], train.a, train.b) - train.p)
        ** 2
    )
    run_dir.write_json(
        out / "weights.json",
        [{"k": k, "alpha": found["alpha"].tolist(), "fit": "fixed", "train_mse": float(train_mse)}],
    )
    facts = {name: found[name] for name in ("layout", "components", "tau", "a", "misfit", "brier")}
    run_dir.end_stage(
        out,
        "harden",
        settings,
        inputs,
        started,
        **facts,
        weights=found["weights"].tolist(),
        tuned_on=tuned,
    )
    mixed = " ".join(
        f"{weight:.3f} r{c}" for weight, c in zip(found["weights"], found["components"])
    )
    print(
        f"harden: k={k}, layout {found['layout']}, of {mixed}, scale {found['tau']:.3f}, lapses {found['a']:.3f}; off the soft model by "
        f"{found['misfit']:.5f} (train pairs); Brier score on {tuned} prompts {found['brier']:.4f}"
    )


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--run", required=True, type=Path, help="a finished run, with data/ and rewards/"
    )
    parser.add_argument(
        "--out", required=True, type=Path, help="the hardened ensemble's own run directory"
    )
    parser.add_argument(
        "--k", type=cli.member_number, default=8, help="hardened members (default 8)"
    )
    parser.add_argument(
        "--layout",
        choices=("auto", "quantile", "equal", "fitted"),
        default="auto",
        help="how the levels are laid out (see above)",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
