"""An ensemble of hard votes that follows the soft model of a finished run: levels of its rewards,
without training, without torch.

    python extras/harden.py --run runs/demo --out runs/demo-hard --k 8          (seconds)

A soft reward u = scale r predicts sigmoid(u(y1) - u(y2)). Members that are *steps* of u follow it
with hard votes: with level = floor((u + o) / w), two responses far apart in u are in different
levels, and every member orders them alike; inside a level the members disagree and cancel.

    quantile, equal    k/2 levels (w_i, o_i) and two members each, which inside a level follow a
                       taste, another member's reward, and its opposite, of weight 1/k each:
                       p_hat = 1/2 + sign(du) (fraction of the levels that separate the two) / 2,
                       whatever the taste. quantile: w_i at the quantiles of F (width_distribution),
                       for which p_hat is sigmoid(du) on average over random offsets;
                       equal: one w, offsets w i/(k/2)
    fitted             with u itself for the taste, the k/2 members of the one order are all u: one
                       member of weight 1/2 does for them, and k - 1 levels instead of k/2 are left
                       for the others, whose order inside a level is that of u reversed. Levels and
                       weights are picked from a grid of (w, o)

--layout auto takes the one with the least mean (p_hat - soft)^2 on train pairs, for which no vote
is read. Of a run with several members the soft model is a mixture sum_c w_c sigmoid(du_c) of the
first of them: as many as give the least Brier score of the hard votes on validation prompts, on
which the scale and the lapses of the soft model are fitted too.
"""

import functools
import os
import shutil
from typing import NamedTuple

from pairwise import cli, data, files, levels, manifest, run_dir, soft_model, weights

import numpy as np
from scipy.optimize import brentq

# A run is hardened again when one of these changes.
CODE = (
    "extras/harden.py",
    "pairwise/data.py",
    "pairwise/levels.py",
    "pairwise/soft_model.py",
    "pairwise/weights.py",
    cli.import_evaluator().__file__,
)
MOST_PAIRS = 10_000  # A layout is fitted to so many pairs; more change nothing that shows.
EQUAL_WIDTHS = np.geomspace(1, 12, 40)  # widths that the layout `equal` chooses from


def hardened_votes(formulas, rewards, a, b):
    """V_j, float64 (k, N), of formulas over the trained members' rewards, float32 (K, R)."""
    # The evaluator takes 1,024 members at once.
    chunks = [formulas[start : start + 1000] for start in range(0, len(formulas), 1000)]
    votes = [weights.member_votes(levels.hardened(chunk, rewards), a, b) for chunk in chunks]
    return np.concatenate(votes)


# ---- the layouts quantile and equal: pairs of members


def width_distribution(width):
    """F(w) = tanh(w/2) - (w/2) sech^2(w/2): for widths of this distribution, and random offsets,
    mean min(|d|/w, 1) = 2 sigmoid(|d|) - 1."""
    return np.tanh(width / 2) - width / 2 / np.cosh(width / 2) ** 2


def quantile_layout(count):
    """(widths, offsets), float64 (count,) each: the quantiles of F at (i + 1/2) / count, and
    offsets at the golden ratio's steps."""
    quantiles = (np.arange(count) + 0.5) / count
    widths = [brentq(lambda w, q=q: width_distribution(w) - q, 1e-6, 500) for q in quantiles]
    return np.array(widths), 0.618 * np.arange(count) % 1 * np.array(widths)


def equal_layout(count, width):
    """(widths, offsets), float64 (count,) each: one width, and offsets at equal steps of it."""
    return np.full(count, width), width * np.arange(count) / count


def opposed_pairs(member, scale, layout, taste, taste_scale):
    """Two formulas for each level of a layout: one of the taste and one of its opposite."""
    return [
        levels.formula(member, scale, width, offset, taste, sign * taste_scale)
        for width, offset in zip(*map(np.ndarray.tolist, layout))
        for sign in (1, -1)
    ]


def largest_remainder(w, k):
    """Even numbers of members, int (M,), of sum k (even), in proportion to the weights w (M,)."""
    exact = np.asarray(w) * (k / 2)
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: k // 2 - counts.sum()]] += 1
    return 2 * counts


def ensemble_of_pairs(model, rewards, k, make_layout):
    """(formulas, alpha (k,)): each reward of the soft model gets the members that its weight is
    worth, k in all, laid out by make_layout(count); the taste is another member of the run."""
    formulas, alpha = [], []
    for member, weight, count in zip(model.members, model.w, largest_remainder(model.w, k)):
        if count:
            taste = 2 if member == 1 else 1
            # A taste of unit spread does not saturate the sigmoid in float32.
            taste_scale = 1 / max(float(rewards[taste - 1].std()), 1e-6)
            layout = make_layout(count // 2)
            formulas += opposed_pairs(member, model.tau, layout, taste, taste_scale)
            alpha += [weight / count] * count
    return formulas, np.array(alpha) / np.sum(alpha)


# ---- the layout fitted: levels picked from a grid


def refitted(q, alpha):
    """argmin of alpha' Q alpha over the simplex, float64 (k,): that of weights.simplex_weights but
    for rounding, and much faster from an alpha on the simplex that is nearly optimal."""
    alpha, free = np.array(alpha), np.array(alpha) > 0
    size = np.trace(q) / len(q) or 1.0
    # Any sum of the weights is as good where their sum is a penalty's, as in simplex_weights.
    penalised = q + size * (1 + 1e-12 * np.eye(len(q)))
    for _ in range(100 * len(q)):
        target = np.zeros(len(q))
        target[free] = np.linalg.solve(penalised[np.ix_(free, free)], np.ones(free.sum()))
        target /= target.sum()
        out = np.flatnonzero(free & (target <= 0))
        if len(out):  # alpha goes towards the target until a weight is zero.
            steps = alpha[out] / (alpha[out] - target[out])
            alpha = alpha + steps.min() * (target - alpha)
            free[out[steps.argmin()]] = False
            alpha[~free] = 0
            continue
        alpha, gradient = target, q @ target
        gradient[free] = np.inf
        j = gradient.argmin()
        if gradient[j] > alpha @ q @ alpha - 1e-14 * size:
            break
        free[j] = True
    return alpha


def pick(q, k, tries=4):
    """(chosen (k,), weights (k,)): of P formulas with error matrix q (P, P), k of a small error
    alpha' Q alpha and their weights on the simplex.

    Forward selection by the gradient, with all weights fitted anew, then one exchange of every
    formula where that helps.
    """

    def fitted(chosen, start):
        """(error, chosen, weights), fitted from the weights `start`."""
        own = q[np.ix_(chosen, chosen)]
        alpha = refitted(own, start)
        return alpha @ own @ alpha, chosen, alpha

    def with_one_more(chosen, alpha):
        gradient = q[:, chosen] @ alpha if chosen else np.diag(q).copy()
        gradient[chosen] = np.inf
        steepest = np.argsort(gradient, kind="stable")[:tries]
        start = np.append(alpha, 0.0 if chosen else 1.0)
        return min((fitted([*chosen, int(j)], start) for j in steepest), key=lambda fit: fit[0])

    error, chosen, alpha = np.inf, [], np.zeros(0)
    for _ in range(k):
        error, chosen, alpha = with_one_more(chosen, alpha)
    for formula in list(chosen):
        kept = np.array(chosen) != formula
        rest, start = [j for j in chosen if j != formula], alpha[kept]
        if rest:
            uniform = np.full(len(rest), 1 / len(rest))
            _, rest, start = fitted(rest, start / start.sum() if start.any() else uniform)
        exchanged = with_one_more(rest, start)
        if exchanged[0] < error and set(exchanged[1]) != set(chosen):
            error, chosen, alpha = exchanged
    return chosen, weights.simplex_weights(q[np.ix_(chosen, chosen)])


def grid_of_formulas(member, scale):
    """Formulas to pick from: u, its opposite (lapses), and levels of widths from .7 to 12 with u
    reversed inside."""
    stepped = [
        levels.formula(member, scale, width, width * offset)
        for width in np.geomspace(0.7, 12, 14).tolist()
        for offset in (np.arange(12) / 12).tolist()
    ]
    return [levels.formula(member, scale), levels.formula(member, -scale), *stepped]


def ensemble_of_levels(model, rewards, a, b, soft, k):
    """(formulas, alpha (k,)): the k of the grid whose mixture follows soft (N,) on the pairs a, b,
    the heaviest first."""
    grid = [entry for member in model.members for entry in grid_of_formulas(member, model.tau)]
    votes = hardened_votes(grid, rewards, a, b)
    chosen, alpha = pick((votes - soft) @ (votes - soft).T / len(soft), k)
    heaviest = np.argsort(-alpha, kind="stable")
    return [grid[chosen[i]] for i in heaviest], alpha[heaviest]


# ---- the choice among them


def fit_layouts(model, rewards, split, k, layout="auto"):
    """{layout: (formulas, alpha (k,), misfit)}, with the misfit mean (p_hat - soft)^2 over the
    pairs of `split`, of which no vote is read; rewards float32 (K, R).

    Pairs of members with a taste need an even k and a second member, so there may be none.
    """
    last = len(split.a) - 1
    spaced = np.unique(np.linspace(0, last, min(last + 1, MOST_PAIRS)).astype(int))
    a, b = split.a[spaced], split.b[spaced]
    soft = model.predict(rewards, a, b)

    def with_misfit(formulas, alpha):
        p_hat = alpha @ hardened_votes(formulas, rewards, a, b)
        return formulas, alpha, float(np.mean((p_hat - soft) ** 2))

    def paired(make_layout):
        return with_misfit(*ensemble_of_pairs(model, rewards, k, make_layout))

    ensembles = {}
    if k % 2 == 0 and len(rewards) > 1:
        if layout in ("auto", "quantile"):
            ensembles["quantile"] = paired(quantile_layout)
        if layout in ("auto", "equal"):
            layouts = [functools.partial(equal_layout, width=x) for x in EQUAL_WIDTHS.tolist()]
            ensembles["equal"] = min(map(paired, layouts), key=lambda ensemble: ensemble[2])
    if layout in ("auto", "fitted"):
        ensembles["fitted"] = with_misfit(*ensemble_of_levels(model, rewards, a, b, soft, k))
    return ensembles


def centred(formulas, rewards):
    """The formulas with offsets that bring the levels of the median reward to zero, where float32
    is finest."""
    medians = np.median(rewards, axis=1).astype(np.float64)

    def moved(entry):
        if entry["width"] is None:
            return entry
        u = entry["scale"] * medians[entry["member"] - 1]
        level = np.floor((u + entry["offset"]) / entry["width"])
        return entry | {"offset": float(entry["offset"] - entry["width"] * level)}

    return [moved(entry) for entry in formulas]


class Hardened(NamedTuple):
    """What `harden` chooses: the formulas of k members, their mixture weights float64 (k,), the
    layout, its soft model, the misfit, and the Brier score of the hard votes on tuning pairs."""

    formulas: list
    alpha: np.ndarray
    layout: str
    model: soft_model.SoftModel
    misfit: float
    brier: float


def harden(train, tuning, k, layout="auto", sizes=None):
    """The Hardened ensemble of least Brier score on `tuning`, over the size of the soft model.

    train, tuning: (Split, rewards float32 (K, R)); a soft model of size m is a mixture of the first
    m members; sizes: those that are tried (default: 1..K). Raises InputError where k members cannot
    have the layout.
    """
    (split, rewards), (tuning_split, tuning_rewards) = train, tuning
    differences = soft_model.reward_differences(rewards, split.a, split.b)
    tuning_pairs = tuning_split.a, tuning_split.b
    tuning_differences = soft_model.reward_differences(tuning_rewards, *tuning_pairs)
    ensembles, models = [], set()
    for m in sizes or range(1, len(rewards) + 1):
        w = soft_model.fit_mixture(differences[:m], split.p)
        used = np.flatnonzero(w > 0)
        tau, a = soft_model.fit_scale_and_lapses(tuning_differences[used], w[used], tuning_split.p)
        model = soft_model.SoftModel((used + 1).tolist(), w[used], tau, a)
        key = repr(model._replace(w=w[used].tolist()))
        if key in models:  # A larger mixture may give all weight to the same members.
            continue
        models.add(key)
        by_layout = fit_layouts(model, rewards, split, k, layout)
        if not by_layout:
            expected = "an even --k and a run of at least two members"
            problem = f"pairs of members with a taste need {expected}"
            raise cli.InputError(f"--layout {layout}: {problem}; --k {k} and {len(rewards)} found")
        best = min(by_layout, key=lambda name: by_layout[name][2])
        formulas, alpha, misfit = by_layout[best]
        p_hat = alpha @ hardened_votes(formulas, tuning_rewards, *tuning_pairs)
        brier = float(np.mean((p_hat - tuning_split.p) ** 2))
        formulas = centred(formulas, rewards)
        ensembles.append(Hardened(formulas, alpha, best, model, misfit, brier))
    return min(ensembles, key=lambda ensemble: ensemble.brier)


# ---- the run


def check_directories(run, out):
    """Raise InputError where `out` has something else in it, or `run` is not a trained run."""
    cli.check_directory("out", out)
    inside = [path for path in out.iterdir() if path.name != ".lock"] if out.exists() else []
    begun = ".lock-manifest.json", ".partial-manifest.json"  # by a call that was killed at once
    if any(path.name not in begun for path in inside) and "harden" not in manifest.entries(out):
        wrong = "a directory of something else found, one of its own expected"
        raise cli.InputError(f"--out {out}: {wrong}")
    kind = run_dir.kind_of(run)
    if kind in ("hardened", "pruned"):
        raise cli.InputError(f"{run}: a {kind} run found; the one that it was made from expected")


def read_trained(run):
    """({split: Split}, {split or "continuations": rewards float32 (K, ..)}) of a trained run."""
    splits, _ = data.read_splits(run)
    splits = {name: data.fitted_pairs(split) for name, split in splits.items()}
    k = run_dir.count_members(run)
    run_dir.check_whole(run, k, "continuations")
    rewards = {
        name: run_dir.read_rewards(run, name, k, (split.n_responses,))
        for name, split in splits.items()
    }
    if (scores := run_dir.read_continuation_rewards(run, k)) is not None:
        rewards["continuations"] = scores
    for name, values in rewards.items():
        if not np.isfinite(values).all():  # A level has no place for it.
            j = 1 + int(np.argwhere(~np.isfinite(values))[0, 0])
            path = run_dir.reward_path(run, j, name)
            raise cli.InputError(f"{path}: infinite rewards found, finite ones expected")
    return splits, rewards


def write_run(run, out, source, hardened, rewards, train):
    """Write data, continuations, rewards, members.json and weights.json of the hardened run;
    source: where `run` is, relative to `out`; train: the pairs of which train_mse is the error."""
    # Without weights there is nothing to evaluate, should this end between two files.
    files.remove(out / "weights.json")
    with files.replacing(out / "data") as partial:
        shutil.copytree(run / "data", partial)
    files.remove(out / "continuations.parquet")
    if "continuations" in rewards and (run / "continuations.parquet").exists():
        with files.replacing(out / "continuations.parquet") as partial:
            shutil.copyfile(run / "continuations.parquet", partial)
    with files.replacing(out / "rewards") as partial:
        for name, trained_rewards in rewards.items():
            for j, values in enumerate(levels.hardened(hardened.formulas, trained_rewards), 1):
                files.write_array(partial / run_dir.reward_path(out, j, name).name, values)
            if name in data.SPLITS:  # The soft models that evaluate.py shows are of these.
                path = soft_model.source_path(out, name)
                files.write_array(partial / path.name, trained_rewards)
    files.write_json(out / "members.json", {"source": source, "members": hardened.formulas})
    p_hat = hardened.alpha @ hardened_votes(hardened.formulas, rewards["train"], train.a, train.b)
    entry = {"k": len(hardened.alpha), "alpha": hardened.alpha.tolist(), "fit": "fixed"}
    entry["train_mse"] = float(np.mean((p_hat - train.p) ** 2))
    files.write_json(out / "weights.json", [entry])


def main(args):
    run, out, k = args.run, args.out, args.k
    check_directories(run, out)
    splits, rewards = read_trained(run)
    trained = len(rewards["train"])
    source = os.path.relpath(run.resolve(), out.resolve())
    settings = {"k": k, "layout": args.layout, "source": source}
    paths = [run_dir.reward_path(run, j, name) for j in range(1, trained + 1) for name in rewards]
    hashes = {str(path.relative_to(run)): files.hash_file(path) for path in paths}
    inputs = data.hashes(run) | hashes | manifest.hash_code(*CODE)
    outputs = [out / "weights.json", out / "members.json", soft_model.source_path(out, "test")]
    if manifest.unchanged(out, "harden", settings, inputs, outputs):
        print(f"harden: {out} is up to date, skipped")
        return
    tuned = soft_model.tuning_split(splits)
    if tuned == "train":
        fitted = "scale, lapses and number of components are fitted on train prompts"
        print(f"harden: no validation prompts (--valid-share): {fitted}")
    if trained == 1:
        order = "inside a level the order is the member's own, or its reverse"
        print(f"harden: one member, so there is no taste: {order}")
    train, tuning = ((splits[name], rewards[name]) for name in ("train", tuned))
    hardened = harden(train, tuning, k, args.layout)
    other_data = data.hashes(out) != data.hashes(run)
    started = manifest.begin_stage(out, "harden", settings, inputs, anew=other_data)
    if other_data:
        files.remove(out / "logprob")  # It is of other responses.
    write_run(run, out, source, hardened, rewards, splits["train"])
    model = hardened.model
    facts = {"layout": hardened.layout, "components": model.members, "tau": model.tau, "a": model.a}
    facts |= {"misfit": hardened.misfit, "brier": hardened.brier, "weights": model.w.tolist()}
    facts |= {"tuned_on": tuned, "trained_on_p": soft_model.trained_on_p(run)}
    manifest.end_stage(out, "harden", settings, inputs, started, **facts)
    mixture = " ".join(f"{weight:.3f} r{j}" for weight, j in zip(model.w, model.members))
    print(
        f"harden: k={k}, layout {hardened.layout}, of {mixture}, scale {model.tau:.3f}, "
        f"lapses {model.a:.3f}; off the soft model by {hardened.misfit:.5f} (train pairs); "
        f"Brier score on {tuned} prompts {hardened.brier:.4f}"
    )


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    cli.add_run(parser, "a finished run, with data/ and rewards/")
    words = "the hardened ensemble's own run directory"
    add("--out", required=True, type=run_dir.output, help=words)
    add("--k", type=cli.member_number, default=8, help="hardened members")
    layouts = "auto", "quantile", "equal", "fitted"
    add("--layout", choices=layouts, default="auto", help="how the levels are laid out (see above)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
