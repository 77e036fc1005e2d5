"""The figures of metrics.json, from stored rewards, and their intervals. Never imports torch.

A figure is a ratio of sums over prompts, so its sums over resampled prompts give it anew: that is
all that an interval needs. `estimate` takes figures nested in dicts and lists, in the shape of the
JSON that they become.

In all docstrings there are P prompts, N pairs, K members and R distinct responses; p float64 (N,)
in [0, 1] is the share of a pair's annotators that prefer its first response, V_j in {0, 1/2, 1} is
the vote of member j, and p_hat = sum_j alpha_j V_j is the share that the mixture predicts.
"""

import collections
import itertools
from typing import NamedTuple

from pairwise import cli, soft_model, theory, weights

import numpy as np
import scipy  # Not scipy.special: see soft_model.

evaluator = cli.import_evaluator()

ERRORS = "brier", "brier_soft", "excess", "true_error"  # These are squared errors of p_hat.
# Reference lines whose error a mixture's is less than, or not: their difference has an interval.
COMPARED = "floor_single", "coin_flip", *soft_model.LINES
LABELS = 8  # So many labels of a category have their own row; others are counted together.
# A figure of fewer prompts has no interval. Over P prompts of normal errors, percentiles hold the
# truth in 50 % of the cases with P = 2, 84 % with 5 and 90 % with 10, the least P that reaches
# it (as |t| < 1.96 sqrt((P-1)/P) says); over P prompts of results/demo, in 50, 83 and 89 %.
FEWEST = 10


# ---- terms of pairs


def floor_single(p):
    """Return the error min(p, 1-p)^2 that no single deterministic reward is below (section 5)."""
    return np.minimum(p, 1 - p) ** 2


def floor_excess(p, c):
    """Return floor_single(p) - c, float64 (N,), how far below the floor a forecast that knows the
    true fractions can expect to be; c (N,): terms of the irreducible error. docs/method.md proves
    that it is at least 0, and exactly 0 where at most one annotator dissents: there rounding is
    taken away."""
    return np.round(floor_single(p) - c, 12) + 0.0  # It has no -0.0.


def coin_flip(p):
    """Return the squared error of predicting one half everywhere."""
    return (p - 0.5) ** 2


def cross_entropy(q, p):
    """Return -(p log q + (1-p) log (1-q)), float64 (N,): appendix E's other proper loss, of soft
    forecasts q. What rounding has made 0 or 1 is 2^-53 away from it."""
    q = np.clip(q, 2.0**-53, 1 - 2.0**-53)
    return -p * np.log(q) - (1 - p) * np.log1p(-q)


# ---- figures and their intervals


class Ratio(NamedTuple):
    """A figure sum(top) / sum(bottom), where the sums are over prompts.

    top float64 (P, ..), None for a figure that does not exist; bottom (P,) or shaped like top.
    """

    top: np.ndarray | None
    bottom: np.ndarray

    @staticmethod
    def value(top, bottom):
        return top / np.where(bottom == 0, np.nan, bottom)

    def counts(self):
        """Return which prompts count, bool, shaped like bottom."""
        return self.bottom != 0


class Correlation(NamedTuple):
    """A figure sum(top) / sqrt(sum(one) sum(two)) of float64 (P,); the sums are over prompts."""

    top: np.ndarray
    one: np.ndarray
    two: np.ndarray

    @staticmethod
    def value(top, one, two):
        return np.clip(top / np.sqrt(one * two), -1, 1)  # Rounding can leave the range.

    def counts(self):
        return self.one + self.two != 0


def estimate(figures, resamples, seed):
    """Copy nested dicts and lists, where every Ratio and Correlation `name` becomes its value, and
    its 95 % percentile interval over resampled prompts stands beside it as `name_ci`.

    All figures of a call see the same resampled prompts. Values and intervals are nested lists of
    shapes (..) and (.., 2); they are None where the bottom is zero or the figure does not exist,
    intervals also where fewer than FEWEST prompts count.
    """
    waiting = []  # It has every figure, its name, and the dict of the copy that it belongs in.

    def copied(node):
        if isinstance(node, list):
            return [copied(entry) for entry in node]
        if not isinstance(node, dict):
            return node
        copy = {}
        for name, entry in node.items():
            if isinstance(entry, Ratio | Correlation):
                copy[name] = copy[f"{name}_ci"] = None
                if entry.top is not None:
                    waiting.append((entry, name, copy))
            else:
                copy[name] = copied(entry)
        return copy

    result = copied(figures)
    sums = [array for figure, _, _ in waiting for array in figure]
    drawn = iter(drawn_sums(sums, resamples, seed))
    for figure, name, copy in waiting:
        copy[name], limits = value_and_interval(figure, [next(drawn) for _ in figure])
        copy[f"{name}_ci"] = None if None in (copy[name], *limits) else limits
    return result


def value_and_interval(figure, drawn):
    """Return the value (..) and the limits (.., 2) of a Ratio or Correlation as nested lists.

    drawn: the sums over resampled prompts, float64 (resamples, ..), of each array of the figure.
    """
    totals = [array.reshape(len(array), -1).sum(0) for array in figure]
    with np.errstate(divide="ignore", invalid="ignore"):
        value = figure.value(*totals)
        values = figure.value(*(array.reshape(len(array), -1) for array in drawn))
    limits = np.percentile(values, [2.5, 97.5], axis=0)
    for column in np.flatnonzero(np.isnan(limits[0]) & ~np.isnan(value)):
        # Resamples without any pair that counts are left out.
        limits[:, column] = np.nanpercentile(values[:, column], [2.5, 97.5])
    prompts = figure.counts().reshape(len(figure.top), -1).sum(0)
    limits = np.where(prompts < FEWEST, np.nan, limits)
    shape = figure.top.shape[1:]
    arrays = value.reshape(shape), limits.T.reshape(*shape, 2)
    return tuple(np.where(np.isnan(array), None, array).tolist() for array in arrays)


def interval(values, prompts):
    """Return the 95 % percentile interval, [low, high], of a figure of so many prompts; values
    (resamples,). None where it has none."""
    return None if prompts < FEWEST else np.percentile(values, [2.5, 97.5]).tolist()


def drawn_sums(arrays, resamples, seed):
    """Sum each of the arrays (P, ..) over resampled prompts: float64 (resamples, ..) each.

    A resample has the same prompts in all arrays. Equal columns are drawn once: many figures have
    the same bottom.
    """
    columns = np.hstack([array.reshape(len(array), -1) for array in arrays]).T
    numbers = {}  # The bytes of a column find its number among the distinct ones.
    places = [numbers.setdefault(column.tobytes(), len(numbers)) for column in columns]
    distinct = np.empty((len(columns[0]), len(numbers)))
    distinct[:, places] = columns.T
    drawn = resampled(distinct, resamples, seed)
    ends = np.cumsum([array[0].size for array in arrays])[:-1]
    return [
        drawn.take(chosen, axis=1).reshape(resamples, *array.shape[1:])
        for chosen, array in zip(np.split(places, ends), arrays)
    ]


def resampled(sums, resamples, seed):
    """Sum the sums (P, m) of prompts over resampled prompts: float64 (resamples, m)."""
    return evaluator.bootstrap_sums(np.ascontiguousarray(sums, np.float64), resamples, seed)


def by_prompt(split, terms):
    """Sum terms (.., N) over each prompt's pairs: float64 (P, ..)."""
    return np.moveaxis(np.add.reduceat(terms, split.pair_start[:-1], axis=-1), -1, 0)


# ---- the squared error of any mixture


def squared_errors(split, sums, rewards, soft, c):
    """Return {name of ERRORS: (A (P, K, K), b (P, K), c (P,))}: the sums of V V', V p and p^2 over
    each prompt's pairs, of which `error_of` makes the squared error of any mixture.

    sums: evaluator.pair_statistics of the votes against p; rewards float32 (K, R); soft float64
    (K, N): sigmoid(r_j(a) - r_j(b)); c (N,): terms of the irreducible error, or None.
    """
    soft_soft = np.stack([by_prompt(split, soft * member) for member in soft], 1)
    forms = {
        "brier": (sums["vote_vote"], sums["vote_p"], sums["p_p"]),
        "brier_soft": (soft_soft, by_prompt(split, soft * split.p), sums["p_p"]),
    }
    if c is not None:
        forms["excess"] = sums["vote_vote"], sums["vote_p"], sums["p_p"] - by_prompt(split, c)
    if split.p_true is not None:
        true = evaluator.pair_statistics(rewards, split.a, split.b, split.p_true, split.pair_start)
        forms["true_error"] = true["vote_vote"], true["vote_p"], true["p_p"]
    return forms


def error_of(name, form, alpha, pairs):
    """Sum (p_hat - p)^2 = alpha'A alpha - 2 alpha'b + c over pairs, for a mixture of weights alpha.

    The mean over pairs is the pairwise calibration error, equation (2), also called Brier score.
    name, form: A (.., K, K), b (.., K), c (..,) of `squared_errors`; alpha float64 (.., k): the
    weights of the first k members; pairs (..,): how many are summed. Returns float64 (..,).
    """
    k = alpha.shape[-1]
    a, b, c = form[0][..., :k, :k], form[1][..., :k], form[2]
    errors = ((a @ alpha[..., None])[..., 0] * alpha).sum(-1) - 2 * (b * alpha).sum(-1) + c
    # Rounding can leave the range of a square; the excess may be below zero.
    return np.clip(errors, -np.inf if name == "excess" else 0, pairs)


def measure(split, rewards, stats, predicted):
    """Return what the figures of a split need: evaluator.pair_statistics, the soft votes float64
    (K, N), `squared_errors`, and {reference line: its terms (N,), or None}.

    split: with the pairs that count; rewards float32 (K, R); stats: of stats.json; predicted:
    {key: p_hat (N,)} of the soft models that exist, by soft_model.Models.predict.
    """
    sums = evaluator.pair_statistics(rewards, split.a, split.b, split.p, split.pair_start)
    p, truth = split.p, split.p_true
    soft = scipy.special.expit(soft_model.reward_differences(rewards, split.a, split.b))
    c = theory.irreducible_of(split, stats)
    lines = {
        "floor_single": floor_single(p),
        "coin_flip": coin_flip(p),
        "irreducible": c,
        "floor_excess": None if c is None else floor_excess(p, c),
        "floor_true": None if truth is None else floor_single(truth),
        "coin_true": None if truth is None else coin_flip(truth),
    }
    for name, true_name in soft_model.LINES.items():
        p_hat = predicted.get(name)
        lines[name] = None if p_hat is None else (p_hat - p) ** 2
        lines[true_name] = None if p_hat is None or truth is None else (p_hat - truth) ** 2
    return sums, soft, squared_errors(split, sums, rewards, soft, c), lines


# ---- one split


def split_metrics(split, rewards, prefixes, stats, predicted, resamples, seed):
    """Return the entry of metrics.json for one split, and its `squared_errors`.

    rewards float32 (K, R); prefixes: of run_dir.read_prefixes; stats, predicted: as for `measure`.
    """
    sums, soft, forms, lines = measure(split, rewards, stats, predicted)
    votes = weights.member_votes(rewards, split.a, split.b)
    pairs = sums["pairs"].astype(np.float64)
    terms = {"annotators_mean": split.n, "majority_mean": np.maximum(split.p, 1 - split.p)} | lines
    figures = {"prompts": len(split.prompt_id), "pairs": len(split.p)}
    figures["tie_rate"] = Ratio(sums["ties"].sum(1) / len(rewards), pairs)
    for name, term in terms.items():
        figures[name] = Ratio(None if term is None else by_prompt(split, term), pairs)
    soft_lines = {name: predicted.get(name) for name in soft_model.LINES}
    figures["cross_entropy"] = {
        name: Ratio(None if q is None else by_prompt(split, cross_entropy(q, split.p)), pairs)
        for name, q in (soft_lines | {"least": split.p}).items()
    }
    figures["ensemble"] = [
        {name: prefix[name] for name in ("k", "alpha", "fit")}
        | mixture_figures(split, votes, soft, forms, np.array(prefix["alpha"]), lines)
        for prefix in prefixes
    ]
    figures["members"] = member_figures(split, sums, forms["brier"])
    figures |= group_figures(split, np.array(prefixes[-1]["alpha"]) @ votes, soft[0])
    figures["pairwise_disagreement"] = Ratio(sums["disagreement"], pairs)
    entry = estimate(figures, resamples, seed)
    entry["members"] = member_rows(entry)
    return entry, forms


def agreement_terms(p_hat, p):
    """Return float64 (4, N): |p_hat - p|, and x y, x^2, y^2 of x = p_hat - 1/2, y = p - 1/2.

    Pearson's correlation over both orders of every pair is sum x y / sqrt(sum x^2 sum y^2): all
    means are 1/2, and the other order of a pair only turns both signs.
    """
    x = np.round(p_hat - 0.5, 12)  # Opposite members of equal weights say 1/2, but for rounding.
    y = p - 0.5
    return np.stack([np.minimum(np.abs(p_hat - p), 1), x * y, x * x, y * y])


def mixture_figures(split, votes, soft, forms, alpha, lines):
    """Return the figures of the first k members' mixture; votes, soft (K, N), alpha (k,).

    lines: of `measure`; `less` is the mixture's Brier score less theirs, on the same pairs."""
    pairs = np.diff(split.pair_start).astype(np.float64)
    errors = {name: error_of(name, form, alpha, pairs) for name, form in forms.items()}
    hard = by_prompt(split, agreement_terms(alpha @ votes[: len(alpha)], split.p)).T
    p_soft = alpha @ soft[: len(alpha)]
    mixed = by_prompt(split, agreement_terms(p_soft, split.p)).T
    terms = {name: lines[name] for name in COMPARED if lines[name] is not None}
    less = {name: errors["brier"] - by_prompt(split, term) for name, term in terms.items()}
    return {name: Ratio(errors.get(name), pairs) for name in ERRORS} | {
        "less": {name: Ratio(less.get(name), pairs) for name in COMPARED},
        "cross_entropy_soft": Ratio(by_prompt(split, cross_entropy(p_soft, split.p)), pairs),
        "l1": Ratio(hard[0], pairs),
        "l1_soft": Ratio(mixed[0], pairs),
        "pearson": Correlation(*hard[1:]),
        "pearson_soft": Correlation(*mixed[1:]),
    }


def member_figures(split, sums, form):
    """Return the figures of all members at once, tops (P, K); form: that of the Brier score."""
    pairs = sums["pairs"].astype(np.float64)
    errors = [error_of("brier", form, alone, pairs) for alone in np.eye(sums["vote"].shape[1])]
    # The disagreement score Phi_j (section 2) is the mean of V_j (1-p) + (1-V_j) p.
    phi = sums["vote"] - 2 * sums["vote_p"] + sums["p"][:, None]
    phi = np.clip(phi, 0, pairs[:, None])  # It is so, but for rounding; the regret likewise.
    least = by_prompt(split, np.minimum(split.p, 1 - split.p))
    return {
        "brier": Ratio(np.stack(errors, 1), pairs),
        "disagreement": Ratio(phi, pairs),
        "regret": Ratio(np.maximum(phi - least[:, None], 0), pairs),  # appendix E
        "accuracy": Ratio(sums["majority"], sums["decided"].astype(np.float64)),
        "tie_rate": Ratio(sums["ties"].astype(np.float64), pairs),
    }


def member_rows(entry):
    """Return the members of a split's entry as a list of rows.

    outlier_below has two numbers: for every beta below them the member is an outlier (theorem 3),
    if the unknown infimum of Phi is the best member's Phi, and if it is mean min(p, 1-p).
    """
    excess, phis = entry["ensemble"][-1]["excess"], entry["members"]["disagreement"]
    bounds = min(phis), 1 - entry["majority_mean"]
    rows = []
    for j, phi in enumerate(phis):
        row = {"j": j + 1} | {
            name: values and values[j] for name, values in entry["members"].items()
        }
        row |= {name: None for name, value in row.items() if value == [None, None]}
        row["outlier_below"] = None
        if excess is not None:
            row["outlier_below"] = [theory.outlier_below(phi, x, max(0.0, excess)) for x in bounds]
        rows.append(row)
    return rows


def group_figures(split, p_hat, first):
    """Return the figures by how far annotators agree, and by the user's own categories.

    p_hat (N,): of the whole ensemble; first (N,): the soft votes of member 1, whose figures are
    those that Beyond the Binary reports of one reward."""
    p = split.p

    def terms_of(forecast):
        return np.minimum((forecast - p) ** 2, 1), *agreement_terms(forecast, p)

    terms = np.stack([np.ones(len(p)), *terms_of(p_hat), *terms_of(first)])

    def figures(counted):
        count, *sums = by_prompt(split, terms * counted).T
        figures = {"prompts": int((count > 0).sum()), "pairs": int(count.sum())}
        for suffix, (error, l1, *correlation) in (("", sums[:5]), ("_soft_1", sums[5:])):
            figures[f"brier{suffix}"] = Ratio(error, count)
            figures[f"l1{suffix}"] = Ratio(l1, count)
            figures[f"pearson{suffix}"] = Correlation(*correlation)
        return figures

    majority = np.round(np.maximum(p, 1 - p), 9)
    level_of_pair = np.digitize(majority, [0.5 + 1e-10, 0.75, 1])
    levels = "even", "above 1/2", "at least 3/4", "unanimous"
    agreement = [
        {"level": levels[i]} | figures(level_of_pair == i) for i in np.unique(level_of_pair)[::-1]
    ]
    if split.categories is None:
        return {"agreement": agreement, "categories": None}
    labels = [labels or {} for labels in split.categories]
    categories = {
        name: [
            head | figures(np.repeat(prompts, np.diff(split.pair_start)))
            for head, prompts in by_label([named.get(name) for named in labels])
        ]
        for name in dict.fromkeys(itertools.chain(*labels))
    }
    return {"agreement": agreement, "categories": categories}


def by_label(labels):
    """Return [({label, labels}, bool (P,))] of the LABELS most frequent labels of the prompts, and
    of the others together, as None and their number; None and 1 mean prompts without a label."""
    counts = collections.Counter(labels)
    order = sorted(counts, key=lambda label: (-counts[label], str(label)))
    size = len(order) if len(order) <= LABELS + 1 else LABELS  # One label alone is no rest.
    groups = [({"label": label, "labels": 1}, {label}) for label in order[:size]]
    if size < len(order):
        groups.append(({"label": None, "labels": len(order) - size}, set(order[size:])))
    return [(head, np.array([label in group for label in labels])) for head, group in groups]
