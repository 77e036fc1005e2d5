"""Every number of a run: metrics with intervals, figures and report, from stored rewards. CPU only, without torch, in seconds.

    python evaluate.py --run runs/demo
    python evaluate.py --run results/demo --out /tmp/demo          (a committed run stays as it is)
    python evaluate.py --compare runs/a1,runs/a2 runs/b1,runs/b2 --out /tmp/ab          (settings side by side, two seeds each)

Reads data/, rewards/ and weights.json of the run; writes metrics.json, report.html and figures/ into it, or into --out.
--compare: settings on the same test data, with a paired interval over prompts of every difference in Brier score; writes compare.json, compare.html and
figures/compare.png, .pdf. Runs whose test data differ are refused.
"""

import collections
import itertools
import json
import os
from functools import partial
from pathlib import Path

import numpy as np
from scipy.special import expit

from pairwise import cli, data, ranking, report, run_dir
from pairwise import compare as comparison
from pairwise.theory import irreducible, outlier_below
from pairwise.weights import error_matrix, simplex_weights

evaluator = cli.import_evaluator()


# ---- single quantities, a term for each pair, of which the mean is reported; p, n, ties: float64 (N,)


def floor_single(p):
    """Smallest squared error of any single deterministic reward: min(p, 1-p)^2 (section 5)."""
    return np.minimum(p, 1 - p) ** 2


def coin_flip(p):
    """Squared error of predicting one half everywhere."""
    return (p - 0.5) ** 2


# ---- figures and their intervals: every figure is a ratio of sums over prompts, so the sums over resampled prompts give it anew


def drawn_sums(parts, draw):
    """The sums over resampled prompts, (resamples, ..) each, of parts (P, ..): drawn together, so that a resample has the same prompts in all.

    draw: sums (P, m) -> float64 (resamples, m).
    """
    flat = [part.reshape(len(part), -1) for part in parts]
    sums = np.split(draw(np.hstack(flat)), np.cumsum([part.shape[1] for part in flat])[:-1], axis=1)
    return [drawn.reshape(len(drawn), *part.shape[1:]) for drawn, part in zip(sums, parts)]


def estimate(figures, draw):
    """{name: (value, its 95 % percentile interval)} of {name: (top, bottom)}: sum(top) / sum(bottom) over prompts; of (top, one, two), as
    correlations are: sum(top) / sqrt(sum(one) sum(two)).

    top float64 (P, ..); bottom, one, two float64 (P,), or shaped like top; draw: as for `drawn_sums`.
    Values and intervals are nested lists, with None where bottom is zero.
    """

    def quotient(top, bottom, other=None):
        return top / (bottom if other is None else np.sqrt(bottom * other))

    columns = {
        id(part): part.reshape(len(part), -1) for figure in figures.values() for part in figure
    }  # many have one bottom in common
    totals, drawn = (
        {key: part.sum(0) for key, part in columns.items()},
        dict(zip(columns, drawn_sums(list(columns.values()), draw))),
    )
    found = {}
    for name, parts in figures.items():
        with np.errstate(divide="ignore", invalid="ignore"):
            value, ratios = (quotient(*(of[id(part)] for part in parts)) for of in (totals, drawn))
        limits = np.percentile(ratios, [2.5, 97.5], axis=0)
        for column in np.flatnonzero(
            np.isnan(limits[0]) & ~np.isnan(value)
        ):  # some resamples have no pair that counts
            limits[:, column] = np.nanpercentile(ratios[:, column], [2.5, 97.5])
        found[name] = (
            listed(value.reshape(parts[0].shape[1:])),
            listed(limits.T.reshape(*parts[0].shape[1:], 2)),
        )
    return found


def listed(values):
    """Nested lists of an array, with None for NaN."""
    return (
        [listed(value) for value in values]
        if values.ndim
        else None
        if np.isnan(values)
        else float(values)
    )


def by_prompt(split, terms):
    """Sums over each prompt's pairs, float64 (P, ..), of terms (.., N)."""
    return np.moveaxis(np.add.reduceat(terms, split.pair_start[:-1], axis=-1), -1, 0)


def squared_errors(split, sums, rewards, soft, c):
    """{figure: (A (P, k, k), b (P, k), c (P,))}: the squared error alpha'A alpha - 2 alpha'b + c of any weights alpha, summed over each prompt's pairs.

    sums: evaluator.pair_statistics of the votes against p; soft float64 (k, N): sigmoid(r_j(a) - r_j(b)); c (N,): terms of the irreducible
    error, or None where it is not known.
    """
    forms = {
        "brier": (sums["vote_vote"], sums["vote_p"], sums["p_p"]),
        "brier_soft": (
            np.stack([by_prompt(split, soft * row) for row in soft], 1),
            by_prompt(split, soft * split.p),
            sums["p_p"],
        ),
    }
    if c is not None:
        forms["excess"] = sums["vote_vote"], sums["vote_p"], sums["p_p"] - by_prompt(split, c)
    if split.p_true is not None:
        true = evaluator.pair_statistics(rewards, split.a, split.b, split.p_true, split.pair_start)
        forms["true_error"] = true["vote_vote"], true["vote_p"], true["p_p"]
    return forms


def error_of(form, alpha):
    """Summed squared error (..,) of the mixture of the first members with weights alpha (.., size); form: (A (.., k, k), b (.., k), c (..,))."""
    size = alpha.shape[-1]
    a, b, c = form[0][..., :size, :size], form[1][..., :size], form[2]
    return ((a @ alpha[..., None])[..., 0] * alpha).sum(-1) - 2 * (b * alpha).sum(-1) + c


def not_negative(figure, errors):
    """Squared errors without what rounding took below zero; the excess may be below it."""
    return errors if figure == "excess" else np.maximum(errors, 0)


def trained_on_p(run):
    """Whether member 1 is trained on the vote fractions, t_1 = p, so that its sigmoid is a soft model of them; as far as the manifest says."""
    stages = run_dir.read_json(run / "manifest.json", {}).get("stages", {})
    settings = stages.get("member_01", {}).get("settings", {})
    return (
        not {"joint", "harden"} & stages.keys()
        and settings.get("train") != "from"
        and settings.get("loss", "mse") in ("mse", "bce")
    )


def measure(split, rewards, stats, soft_single):
    """(sums of evaluator.pair_statistics, soft votes float64 (K, N), `squared_errors`, {reference line: (N,) or None}).

    rewards float32 (K, R); soft_single: whether member 1 is one (`trained_on_p`).
    """
    sums = evaluator.pair_statistics(rewards, split.a, split.b, split.p, split.pair_start)
    p, n, truth = split.p, split.n, split.p_true
    with np.errstate(
        over="ignore", invalid="ignore"
    ):  # infinite rewards are ranks too: the difference of two equal ones is 0
        soft = expit(np.nan_to_num(rewards[:, split.a] - rewards[:, split.b]).astype(np.float64))
    halves = split.ties if stats["ties"] == "half" else np.zeros(len(p))
    c = {"sampled": irreducible(p, n, halves), "population": np.zeros(len(p)), "dependent": None}[
        stats["votes"]
    ]
    lines = {
        "floor_single": floor_single(p),
        "coin_flip": coin_flip(p),
        "soft_single": (soft[0] - p) ** 2 if soft_single else None,
        "irreducible": c,
        "floor_true": None if truth is None else floor_single(truth),
        "coin_true": None if truth is None else coin_flip(truth),
        "soft_true": (soft[0] - truth) ** 2 if soft_single and truth is not None else None,
    }
    return sums, soft, squared_errors(split, sums, rewards, soft, c), lines


def agreement_terms(p_hat, p):
    """float64 (4, N): |p_hat - p|, and x y, x^2, y^2 with x = p_hat - 1/2, y = p - 1/2. Pearson's correlation over both orders of every pair is
    sum x y / sqrt(sum x^2 sum y^2): all means are 1/2, and the other order of a pair only turns both signs."""
    x, y = (
        np.round(p_hat - 0.5, 12),
        p - 0.5,
    )  # opposite members with equal weights say 1/2, up to rounding
    return np.stack([np.abs(p_hat - p), x * y, x * x, y * y])


ERRORS = "brier", "brier_soft", "excess", "true_error"
ENSEMBLE = *ERRORS, "l1", "l1_soft", "pearson", "pearson_soft"
LABELS = 8  # of a category, the most frequent; more are counted together


def groups_of(split):
    """[(None or category, head of the row, pairs bool (N,))]: the levels of agreement that occur, and the labels of the user's own categories.

    The labels that follow the LABELS most frequent, by prompts, are one row {"label": None, "labels": their number}; {"label": None, "labels": 1}
    are prompts without one.
    """
    share = np.round(np.maximum(split.p, 1 - split.p), 9)
    levels = {
        "unanimous": share == 1,
        "at least 3/4": (share >= 0.75) & (share < 1),
        "above 1/2": (share > 0.5) & (share < 0.75),
        "even": share == 0.5,
    }
    groups = [(None, {"level": level}, pairs) for level, pairs in levels.items() if pairs.any()]
    rows = [row or {} for row in split.categories or ()]
    for name in dict.fromkeys(itertools.chain(*rows)):
        labels = [row.get(name) for row in rows]
        counts = sorted(
            collections.Counter(labels).items(), key=lambda item: (-item[1], str(item[0]))
        )
        size = (
            LABELS if len(counts) > LABELS + 1 else len(counts)
        )  # a row for the rest is not for one label
        number = {label: min(i, size) for i, (label, _) in enumerate(counts)}
        of_pair = np.repeat([number[label] for label in labels], np.diff(split.pair_start))
        heads = [{"label": label, "labels": 1} for label, _ in counts[:size]] + [
            {"label": None, "labels": len(counts) - size}
        ] * (size < len(counts))
        groups += [(name, head, of_pair == i) for i, head in enumerate(heads)]
    return groups


def both(found, name, key, *at):
    """{name: value, name_ci: interval} of `estimate`'s entry for key, or of the entry of it at a place; None where there is none."""
    value, limits = found.get(key, (None, None))
    for place in at:
        value, limits = value[place], limits[place]
    return {name: value, f"{name}_ci": limits if value is not None else None}


def split_metrics(split, rewards, alphas, fits, stats, soft_single, draw):
    """(the S of metrics.json for one split, its `squared_errors`).

    rewards float32 (K, R); alphas: the weights of each prefix; fits: how each was found; soft_single: as for `measure`; draw: as for `estimate`.
    """
    sums, soft, forms, lines = measure(split, rewards, stats, soft_single)
    p, k, pairs = split.p, len(rewards), sums["pairs"].astype(np.float64)
    terms = {"annotators_mean": split.n, "majority_mean": np.maximum(p, 1 - p)} | lines
    figures = {
        name: (by_prompt(split, term), pairs) for name, term in terms.items() if term is not None
    }
    figures["tie_rate"] = sums["ties"].sum(1) / k, pairs
    figures["pairwise_disagreement"] = sums["disagreement"], pairs
    hard = evaluator.votes(rewards, split.a, split.b) / 2
    for e, alpha in enumerate(alphas):
        figures |= {
            (e, name): (not_negative(name, error_of(form, alpha)), pairs)
            for name, form in forms.items()
        }
        p_hat = alpha @ hard[: len(alpha)]
        for kind, predicted in (("", p_hat), ("_soft", alpha @ soft[: len(alpha)])):
            l1, both_sides, own, _ = by_prompt(split, agreement_terms(predicted, p)).T
            figures |= {
                (e, f"l1{kind}"): (l1, pairs),
                (e, f"pearson{kind}"): (both_sides, own, figures["coin_flip"][0]),
            }
    groups, of_pair = (
        groups_of(split),
        np.stack([np.ones(len(p)), (p_hat - p) ** 2, *agreement_terms(p_hat, p)]),
    )  # of the whole ensemble
    for g, (_, _, counted) in enumerate(groups):
        count, error, l1, *correlation = by_prompt(split, of_pair * counted).T
        figures |= {
            ("group", g, "brier"): (error, count),
            ("group", g, "l1"): (l1, count),
            ("group", g, "pearson"): correlation,
        }
    phi = sums["vote"] - 2 * sums["vote_p"] + sums["p"][:, None]  # mean V(1-p) + (1-V)p
    least = by_prompt(split, np.minimum(p, 1 - p))
    members = {
        "brier": np.stack(
            [not_negative("brier", error_of(forms["brier"], row)) for row in np.eye(k)], 1
        ),
        "disagreement": phi,
        "regret": phi - least[:, None],
    }  # appendix E; a tie's V(1-p) + (1-V)p is its 1/2
    figures |= {("members", name): (values, pairs) for name, values in members.items()}
    figures["members", "accuracy"] = sums["majority"], sums["decided"].astype(np.float64)
    found = estimate(figures, draw)

    s = {"prompts": len(split.prompt_id), "pairs": len(p)}
    for name in ("tie_rate", *terms):
        s |= both(found, name, name)
    s["ensemble"] = [
        {"k": len(alpha), "alpha": alpha.tolist(), "fit": fit}
        | {x: y for name in ENSEMBLE for x, y in both(found, name, (e, name)).items()}
        for e, (alpha, fit) in enumerate(zip(alphas, fits))
    ]
    s["members"] = [
        {"j": j + 1}
        | {
            x: y
            for name in (*members, "accuracy")
            for x, y in both(found, name, ("members", name), j).items()
        }
        for j in range(k)
    ]
    excess, least, best = (
        s["ensemble"][-1]["excess"],
        1 - s["majority_mean"],
        min(m["disagreement"] for m in s["members"]),
    )
    for m in s[
        "members"
    ]:  # theorem 3 under both bounds of the unknown infimum of Phi: the best member's, and mean min(p, 1-p)
        m["outlier_below"] = (
            None
            if excess is None
            else [
                outlier_below(m["disagreement"], bound, max(0.0, excess)) for bound in (best, least)
            ]
        )

    s |= {"agreement": [], "categories": None if split.categories is None else {}}
    for g, (category, head, counted) in enumerate(groups):
        table = s["agreement"] if category is None else s["categories"].setdefault(category, [])
        count = by_prompt(split, counted.astype(int))
        table.append(
            head
            | {"prompts": int((count > 0).sum()), "pairs": int(count.sum())}
            | {
                x: y
                for name in ("brier", "l1", "pearson")
                for x, y in both(found, name, ("group", g, name)).items()
            }
        )
    return s | both(found, "pairwise_disagreement", "pairwise_disagreement"), forms


def refit(train, tested, sizes, resamples, seed):
    """{(figure, size): 95 % interval} of the squared errors of a split with the weights of the first `size` members fitted anew to resampled train
    prompts every time, so that the intervals hold what the weights owe to chance, too (the rewards stay as they are).

    train, tested: ({figure: as of squared_errors}, pairs (P,)), train over all pairs that the weights were fitted to.
    """
    from tqdm import tqdm  # only here: without it, numbers are derived where it is not installed

    def drawn(forms, pairs, seed):
        *sums, pairs = drawn_sums(
            [*itertools.chain(*forms.values()), pairs],
            partial(resampled, resamples=resamples, seed=seed),
        )
        return {figure: sums[3 * i : 3 * i + 3] for i, figure in enumerate(forms)}, pairs

    (train, train_pairs), (test, test_pairs) = (
        drawn(*train, seed + 1),
        drawn(*tested, seed),
    )  # two seeds: splits of one size are drawn apart
    q = [
        error_matrix(vote_vote / n, vote_p / n, p_p / n)
        for vote_vote, vote_p, p_p, n in zip(*train["brier"], train_pairs)
    ]
    limits = {}
    for size in sizes:
        alpha = np.array(
            [
                simplex_weights(part[:size, :size])
                for part in tqdm(
                    q,
                    f"weights of {size}",
                    unit="resample",
                    leave=False,
                    mininterval=1,
                    disable=None,
                )
            ]
        )
        for figure, form in test.items():
            limits[figure, size] = listed(
                np.percentile(not_negative(figure, error_of(form, alpha)) / test_pairs, [2.5, 97.5])
            )
    return limits


def resampled(sums, resamples, seed):
    """Sums over resampled prompts, float64 (resamples, m), of sums (P, m)."""
    counts = evaluator.bootstrap_counts(len(sums), resamples, seed)
    return np.concatenate(
        [
            part.astype(np.float64) @ sums
            for part in np.array_split(counts, max(1, counts.size // 10**6))
        ]
    )


BETAS = np.logspace(
    1, -4, 11
)  # of appendix A's policies, from near the base to near the favourites
CASES = 3  # prompts of which the members' favourites are shown


def diversity(scores, texts, alpha, patterns, draw):
    """Kendall's tau-b between the members' rankings of every prompt's continuations, averaged over prompts (figure 3), and between each ranking and
    what shows in the texts (`character`); how far one's favourite falls with another (`win`); favourites side by side (appendix G); policies (A).

    scores float32 (K, prompts, n), or None: then None. texts: of `read_continuations`, or None; alpha (K,): the mixture's weights; patterns: as for
    `attribute_counts`. A prompt on which a member or an attribute is constant has no tau for it and is left out of that cell.
    """
    if scores is None:
        return None
    k, prompts, n = scores.shape
    counts = (
        ranking.attribute_counts(texts["texts"], patterns)
        if texts
        else np.empty((0, prompts, n), np.float32)
    )
    tau = evaluator.kendall_tau(np.concatenate([scores, counts]))
    known = ~np.isnan(tau)
    figures = {
        name: (np.where(known, tau, 0)[:, rows, :k], known[:, rows, :k].astype(np.float64))
        for name, rows in (("kendall_tau", slice(k)), ("character", slice(k, None)))
    }
    wins = ranking.win_shares(scores) if n > 1 else np.full((prompts, k, k), 0.5)
    figures["win"] = wins, np.full(prompts, float(n > 1))
    policies = texts and texts["logprob"] and policy_terms(scores, texts, alpha)
    if policies:
        figures["distance"] = policies
    found = estimate(figures, draw)
    of = {"prompts": prompts, "continuations": n} | both(found, "kendall_tau", "kendall_tau")
    of |= {"constant_rankings": (~known).diagonal(axis1=1, axis2=2).sum(0)[:k].tolist()} | both(
        found, "win", "win"
    )
    of |= {"repeated": texts and prompts * n - sum(len(set(row)) for row in texts["texts"])}
    of |= {"character": texts and {"attributes": list(patterns)} | both(found, "tau", "character")}
    of |= {
        "policy": {"beta": BETAS.tolist()} | both(found, "distance", "distance")
        if policies
        else None
    }
    return of | {"favourites": favourites(scores, texts, wins) if texts else None}


def policy_terms(scores, texts, alpha):
    """(float64 (prompts, betas), (prompts,)): |p_bar - p_hat| with each of BETAS, summed over all pairs of a prompt's distinct continuations, and the
    number of these pairs."""
    sums, pairs = np.empty((len(texts["texts"]), len(BETAS))), []
    for x, (row, logprob) in enumerate(zip(texts["texts"], texts["logprob"])):
        keep = ranking.distinct(row)
        mine, logprob = scores[:, x, keep], np.array(logprob)[keep]
        p_hat = ranking.reward_mixture(mine, alpha)
        sums[x] = [
            np.abs(ranking.policy_mixture(mine, logprob, alpha, beta) - p_hat).sum()
            for beta in BETAS
        ]
        pairs.append(len(p_hat))
    return sums, np.array(pairs, np.float64)


def favourites(scores, texts, wins):
    """The CASES prompts on which members rank each other's favourites lowest (equal ones: the first), with every member's favourite (appendix G)."""
    k, best = len(scores), ranking.favourites(scores)
    disagreement = (
        1 - wins[:, ~np.eye(k, dtype=bool)].mean(1) if k > 1 else np.zeros(scores.shape[1])
    )
    return [
        {
            "prompt_id": texts["prompt_id"][x],
            "prompt": texts["messages"][x][-1]["content"],
            "disagreement": float(disagreement[x]),
            "texts": [texts["texts"][x][y] for y in best[:, x]],
        }
        for x in np.argsort(-np.round(disagreement, 12), kind="stable")[:CASES]
    ]


def read_ensemble(run):
    """(K, weights.json, weights of each prefix, how each was found). Raises InputError where weights and rewards are of different K."""
    k, path = run_dir.count_members(run), run / "weights.json"
    prefixes = run_dir.read_json(path)
    try:
        largest, fits = max(entry["k"] for entry in prefixes), [entry["fit"] for entry in prefixes]
        if largest != k:
            raise cli.InputError(
                f"{path}: weights for K = {largest} found, rewards of K = {k} members; fit_weights.py fits them anew"
            )
        return k, prefixes, [run_dir.read_weights(run, entry["k"]) for entry in prefixes], fits
    except (KeyError, TypeError, ValueError):
        raise cli.InputError(
            f"{path}: a list of {{k, alpha, fit}} expected; fit_weights.py makes it"
        ) from None


def best_size(ensemble):
    """The k with the least Brier score; of scores that are equal but for rounding (1e-9, as in fit_weights.py) the smallest k."""
    least = min(entry["brier"] for entry in ensemble)
    return min(entry["k"] for entry in ensemble if entry["brier"] <= least + 1e-9)


# ---- several runs


def named_settings(words):
    """[(name, [run directories])] of the words of --compare: RUN or RUN,RUN,.. each. Names: what the names of its directories have in common at the
    beginning, else all of them; with as much of the directories above as makes the settings distinct."""
    settings = [
        [Path(word)] if Path(word).is_dir() else [Path(part) for part in word.split(",")]
        for word in words
    ]
    paths = [[run.resolve() for run in runs] for runs in settings]
    given = list(itertools.chain(*paths))
    if len(set(given)) < len(given):
        raise cli.InputError(
            f"--compare: {next(run for run in given if given.count(run) > 1)} is given twice"
        )
    for depth in itertools.count(1):
        last = [["/".join(run.parts[-depth:]) for run in runs] for runs in paths]
        alike = [
            runs[0] if len(runs) == 1 else os.path.commonprefix(runs).rstrip("/-_.") or runs[0]
            for runs in last
        ]
        for names in (alike, ["+".join(runs) for runs in last]):
            if len(set(names)) == len(names):
                return list(zip(names, settings))


def test_errors(run):
    """The test split of a run: (prompts' pair counts (P,), {k: {figure: squared errors (P,)}}, {reference line: (P,) or None})."""
    stats, split = (
        run_dir.read_json(run / "data" / "stats.json"),
        data.counted_pairs(data.read_split(run, "test")),
    )
    if split is None:
        raise cli.InputError(f"{run / 'data' / 'test.parquet'}: no pair of at least two votes")
    k, _, alphas, _ = read_ensemble(run)
    sums, _, forms, lines = measure(
        split,
        run_dir.read_rewards(run, "test", k, (int(split.response_start[-1]),)),
        stats,
        trained_on_p(run),
    )
    errors = {
        len(alpha): {
            name: not_negative(name, error_of(form, alpha)) for name, form in forms.items()
        }
        for alpha in alphas
    }
    return (
        sums["pairs"].astype(np.float64),
        errors,
        {name: None if term is None else by_prompt(split, term) for name, term in lines.items()},
    )


def compare(args):
    """compare.json, compare.html and figures/compare.* in --out: settings side by side on the test split that all their runs share."""
    settings = named_settings(args.compare)
    if len(settings) < 2:
        raise cli.InputError(
            f"--compare: {len(settings)} setting found, at least 2 expected; a comma joins the seeds of one setting, a space settings"
        )
    first = settings[0][1][0]
    measured = [[test_errors(run) for run in runs] for _, runs in settings]
    for run in itertools.chain(*(runs for _, runs in settings)):
        data.must_share_test_data(first, run)
    pairs, _, lines = measured[0][0]

    def mean(parts):
        return None if any(part is None for part in parts) else np.mean(parts, 0)

    terms = []  # of each setting: {figure at its own K, or ("k", size): squared errors (P,), the mean of its runs}
    for runs in measured:
        last = [errors[max(errors)] for _, errors, _ in runs]
        sizes = sorted(set.intersection(*(set(errors) for _, errors, _ in runs)))
        terms.append(
            {figure: mean([errors.get(figure) for errors in last]) for figure in ERRORS}
            | {"soft_single": mean([of_run["soft_single"] for _, _, of_run in runs])}
            | {("run", i): errors["brier"] for i, errors in enumerate(last)}
            | {("k", k): mean([errors[k]["brier"] for _, errors, _ in runs]) for k in sizes}
        )
    of_two = list(itertools.combinations(range(len(settings)), 2))
    figures = {(None, key): term for key, term in lines.items()} | {
        (i, key): term for i, of in enumerate(terms) for key, term in of.items()
    }
    figures |= {
        (i, j, key): terms[i][key] - terms[j][key]
        for i, j in of_two
        for key in terms[i]
        if terms[i][key] is not None and terms[j].get(key) is not None
    }
    draw = partial(resampled, resamples=args.resamples, seed=args.seed)
    found = estimate(
        {key: (term, pairs) for key, term in figures.items() if term is not None}, draw
    )

    def by_size(*which):
        return [
            {"k": key[-1][1]} | both(found, "brier", key)
            for key in found
            if key[:-1] == which and key[-1][0] == "k"
        ]

    def all_of(names, *which):
        return {x: y for name in names for x, y in both(found, name, (*which, name)).items()}

    stats = run_dir.read_json(first / "data" / "stats.json")
    result = {
        "dataset": stats["dataset"],
        "votes": stats["votes"],
        "prompts": len(pairs),
        "pairs": int(pairs.sum()),
        "resamples": args.resamples,
        "seed": args.seed,
        "lines": all_of(
            ("floor_single", "coin_flip", "irreducible", "floor_true", "coin_true"), None
        ),
    }
    result["settings"] = [
        {
            "name": name,
            "runs": [str(run) for run in runs],
            "k": [max(errors) for _, errors, _ in measured[i]],
            "brier_of_runs": [found[i, ("run", r)][0] for r in range(len(runs))],
        }
        | all_of((*ERRORS, "soft_single"), i)
        | {"ensemble": by_size(i)}
        for i, (name, runs) in enumerate(settings)
    ]
    result["differences"] = [
        {"a": settings[i][0], "b": settings[j][0]}
        | all_of(("brier", "brier_soft", "true_error"), i, j)
        | {"by_k": by_size(i, j)}
        for i, j in of_two
    ]
    run_dir.write_json(args.out / "compare.json", result)
    page = comparison.write(args.out, result)
    print(comparison.table(result))
    print(f"comparison: {page}")


def read_logs(run, k):
    """{"member j": the lines of logs/0j.jsonl}, for members that have a log; of a joint run {"all members": those of logs/joint.jsonl}."""
    paths = {f"member {j}": run / "logs" / f"{j:02d}.jsonl" for j in range(1, k + 1)} | {
        "all members": run / "logs" / "joint.jsonl"
    }
    return {
        j: [json.loads(line) for line in path.read_text().splitlines()]
        for j, path in paths.items()
        if path.exists()
    }


def main(args):
    if (
        args.out
        and (args.out / "manifest.json").exists()
        and not (args.run and args.out.resolve() == args.run.resolve())
    ):
        raise cli.InputError(
            f"--out {args.out}: another run directory found; its own results stay as they are"
        )
    if args.compare:
        compare(args)
        return
    run = args.run
    out = run if args.out is None or args.out.resolve() == run.resolve() else args.out
    splits, stats = data.read_splits(run)
    k, prefixes, alphas, fits = read_ensemble(run)
    rewards = {
        name: run_dir.read_rewards(run, name, k, (int(split.response_start[-1]),))
        for name, split in splits.items()
    }
    scores, texts = run_dir.read_continuation_rewards(run, k), run_dir.read_continuations(run)
    settings = {"resamples": args.resamples, "seed": args.seed, "refit": args.refit}
    names = [*splits, *(["continuations"] if scores is not None else [])]
    files = [
        run / "weights.json",
        *(run_dir.reward_path(run, j, name) for j in range(1, k + 1) for name in names),
    ]
    files += [
        path for path in (run / "continuations.parquet", run / "plurality.json") if path.exists()
    ]
    outputs = [
        run / "metrics.json",
        run / "report.html",
        *(
            run / "figures" / f"{name}.png"
            for name in ("calibration", "votes", "reliability", "weights")
        ),
    ]
    logs = sorted((run / "logs").glob("*.jsonl"))
    scripts = (
        "evaluate.py",
        "pairwise/ranking.py",
        "pairwise/report.py",
        "pairwise/theory.py",
        "pairwise/weights.py",
    )
    code = [
        *(cli.REPOSITORY / name for name in scripts),
        *sorted((cli.REPOSITORY / "csrc").glob("*.[ch]pp")),
    ]
    inputs = (
        data.hashes(run)
        | {str(path.relative_to(run)): run_dir.hash_file(path) for path in [*files, *logs]}
        | {path.name: run_dir.hash_file(path) for path in code}
    )

    if out == run and run_dir.unchanged(run, "evaluate", settings, inputs, outputs):
        print("evaluate: nothing has changed, skipped")
        metrics = run_dir.read_json(run / "metrics.json")
    else:
        if out == run:
            started = run_dir.begin_stage(run, "evaluate", settings, inputs)
        draw = partial(resampled, resamples=args.resamples, seed=args.seed)
        metrics = {
            "dataset": stats["dataset"],
            "k": k,
            "k_valid": None,
            "votes": stats["votes"],
            "splits": {},
            "diversity": diversity(
                scores, texts, alphas[-1], stats.get("attributes", ranking.ATTRIBUTES), draw
            ),
            "plurality": run_dir.read_json(run / "plurality.json", {}) or None,
        }  # extras/plurality.py makes it
        errors = {}  # of each split, for the intervals with weights fitted anew
        for name, split in splits.items():
            if (counted := data.counted_pairs(split)) is not None:
                metrics["splits"][name], forms = split_metrics(
                    counted, rewards[name], alphas, fits, stats, trained_on_p(run), draw
                )
                errors[name] = forms, np.diff(counted.pair_start)
        if "valid" in metrics["splits"]:
            metrics["k_valid"] = best_size(metrics["splits"]["valid"]["ensemble"])
        if args.refit:
            train, fitted = (
                data.counted_pairs(splits["train"]) or splits["train"],
                [entry["k"] for entry in prefixes if entry["fit"] == "qp"],
            )
            sums = evaluator.pair_statistics(
                rewards["train"], train.a, train.b, train.p, train.pair_start
            )
            asked = (
                {"brier": (sums["vote_vote"], sums["vote_p"], sums["p_p"])},
                np.diff(train.pair_start),
            )
            for name in (name for name in errors if name != "train"):
                for (figure, size), limits in refit(
                    asked, errors[name], fitted, args.resamples, args.seed
                ).items():
                    entry = next(e for e in metrics["splits"][name]["ensemble"] if e["k"] == size)
                    entry[f"{figure}_refit_ci"] = limits
        run_dir.write_json(out / "metrics.json", metrics)
        test = splits["test"]
        p_hat = alphas[-1] @ evaluator.votes(rewards["test"], test.a, test.b) / 2
        report.write(
            out,
            metrics,
            prefixes,
            run_dir.read_json(run / "manifest.json"),
            read_logs(run, k),
            test.p,
            p_hat,
        )
        if out == run:
            run_dir.end_stage(run, "evaluate", settings, inputs, started)
    print(report.table(metrics))
    print(f"report: {out / 'report.html'}")


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--run", type=Path, help="run directory with data/, rewards/ and weights.json"
    )
    what.add_argument(
        "--compare",
        nargs="+",
        metavar="RUN,RUN",
        help="settings; a comma joins runs of one setting, seeds say, which are averaged",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="write metrics.json, report.html and figures/ there instead of into the run, or what --compare finds",
    )
    parser.add_argument(
        "--resamples", type=cli.natural, default=10000, help="bootstrap resamples over prompts"
    )
    parser.add_argument("--seed", type=cli.seed, default=0, help="of the bootstrap")
    parser.add_argument(
        "--refit",
        action="store_true",
        help="intervals also with the weights fitted anew to each resample of the train prompts (minutes)",
    )
    args = parser.parse_args(argv)
    if args.compare and (args.out is None or args.refit):
        parser.error("--compare RUN RUN .. needs --out DIR, and has no --refit")
    return args


if __name__ == "__main__":
    cli.run_main(main, parse_args())
