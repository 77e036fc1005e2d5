"""Every number of a run: metrics with intervals, figures and report, from stored rewards. CPU only, without torch, in seconds.

    python evaluate.py --run runs/demo
    python evaluate.py --run results/demo --out /tmp/demo          (a committed run stays as it is)

Reads data/, rewards/ and weights.json of the run; writes metrics.json, report.html and figures/ into it, or into --out.
"""

import dataclasses
import itertools
import json
from functools import partial
from pathlib import Path

import numpy as np
from scipy.special import expit

from pairwise import report
from pairwise.run_dir import (
    REPOSITORY, InputError, Parser, begin_stage, count_members, data_hashes, end_stage, hash_file, import_evaluator, natural, read_json,
    read_continuations, read_rewards, read_splits, read_weights, reward_path, run_main, seed, unchanged, write_json)
from pairwise.weights import error_matrix, simplex_weights

evaluator = import_evaluator()


# ---- single quantities, a term for each pair, of which the mean is reported; p, n, ties: float64 (N,)


def irreducible(p, n, ties_as_halves):
    """Unbiased estimate of Lemma 1's C = E (p - p*)^2, the error that even perfect calibration has for n sampled annotators.

    ties_as_halves (N,): tie votes that were counted as half for each side, whose variance is a quarter less each.
    """
    return (p * (1 - p) - ties_as_halves / (4 * n)) / (n - 1)


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
    """{name: (value, its 95 % percentile interval)} of {name: (top, bottom)}: sum(top) / sum(bottom) over prompts.

    top float64 (P, ..); bottom float64 (P,), or shaped like top; draw: as for `drawn_sums`.
    Values and intervals are nested lists, with None where bottom is zero.
    """
    columns = {id(part): part.reshape(len(part), -1) for figure in figures.values() for part in figure}  # many have one bottom in common
    drawn = dict(zip(columns, drawn_sums(list(columns.values()), draw)))
    found = {}
    for name, (top, bottom) in figures.items():
        with np.errstate(divide="ignore", invalid="ignore"):
            value, ratios = columns[id(top)].sum(0) / columns[id(bottom)].sum(0), drawn[id(top)] / drawn[id(bottom)]
        limits = np.percentile(ratios, [2.5, 97.5], axis=0)
        for column in np.flatnonzero(np.isnan(limits[0]) & ~np.isnan(value)):  # some resamples have no pair that counts
            limits[:, column] = np.nanpercentile(ratios[:, column], [2.5, 97.5])
        found[name] = listed(value.reshape(top.shape[1:])), listed(limits.T.reshape(*top.shape[1:], 2))
    return found


def listed(values):
    """Nested lists of an array, with None for NaN."""
    return [listed(value) for value in values] if values.ndim else None if np.isnan(values) else float(values)


def by_prompt(split, terms):
    """Sums over each prompt's pairs, float64 (P, ..), of terms (.., N)."""
    return np.moveaxis(np.add.reduceat(terms, split.pair_start[:-1], axis=-1), -1, 0)


def counted_pairs(split):
    """The split without its pairs of fewer than two votes, which train has with --min-votes 1, and without prompts that have no other.

    None where nothing is left.
    Responses keep their places, so that rewards still fit.
    """
    keep = split.n >= 2
    start = np.concatenate([[0], np.cumsum(keep)])[split.pair_start]
    pairs = {name: getattr(split, name)[keep] for name in ("a", "b", "votes_a", "votes_b", "ties", "p_true") if getattr(split, name) is not None}
    prompt_id = list(itertools.compress(split.prompt_id, np.diff(start)))
    return dataclasses.replace(split, prompt_id=prompt_id, pair_start=np.unique(start), **pairs) if keep.any() else None


def squared_errors(split, sums, rewards, soft, c):
    """{figure: (A (P, k, k), b (P, k), c (P,))}: the squared error alpha'A alpha - 2 alpha'b + c of any weights alpha, summed over each prompt's pairs.

    sums: evaluator.pair_statistics of the votes against p; soft float64 (k, N): sigmoid(r_j(a) - r_j(b)); c (N,): terms of the irreducible
    error, or None where it is not known.
    """
    forms = {"brier": (sums["vote_vote"], sums["vote_p"], sums["p_p"]),
             "brier_soft": (np.stack([by_prompt(split, soft * row) for row in soft], 1), by_prompt(split, soft * split.p), sums["p_p"])}
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


def split_metrics(split, rewards, alphas, fits, stats, draw, single=True):
    """(the S of metrics.json for one split, its `squared_errors`).

    rewards float32 (K, R); alphas: the weights of each prefix; fits: how each was found; draw: as for `estimate`; single: whether member 1 alone is a soft
    model, trained on t_1 = p as in every run of train_rm.py.
    """
    sums = evaluator.pair_statistics(rewards, split.a, split.b, split.p, split.pair_start)
    p, n, truth, k = split.p, split.n, split.p_true, len(rewards)
    with np.errstate(over="ignore", invalid="ignore"):  # infinite rewards are ranks too: the difference of two equal ones is 0
        soft = expit(np.nan_to_num(rewards[:, split.a] - rewards[:, split.b]).astype(np.float64))  # (K, N)
    halves = split.ties if stats["ties"] == "half" else np.zeros(len(p))
    c = {"sampled": irreducible(p, n, halves), "population": np.zeros(len(p)), "dependent": None}[stats["votes"]]
    forms = squared_errors(split, sums, rewards, soft, c)

    pairs = sums["pairs"].astype(np.float64)
    terms = {"annotators_mean": n, "majority_mean": np.maximum(p, 1 - p), "floor_single": floor_single(p), "coin_flip": coin_flip(p),
             "soft_single": (soft[0] - p) ** 2 if single else None, "irreducible": c, "floor_true": None if truth is None else floor_single(truth),
             "coin_true": None if truth is None else coin_flip(truth), "soft_true": None if truth is None or not single else (soft[0] - truth) ** 2}
    figures = {name: (by_prompt(split, term), pairs) for name, term in terms.items() if term is not None}
    figures["tie_rate"] = sums["ties"].sum(1) / k, pairs
    figures["pairwise_disagreement"] = sums["disagreement"], pairs
    for e, alpha in enumerate(alphas):
        figures |= {(e, name): (not_negative(name, error_of(form, alpha)), pairs) for name, form in forms.items()}
    phi = sums["vote"] - 2 * sums["vote_p"] + sums["p"][:, None]  # mean V(1-p) + (1-V)p
    least = by_prompt(split, np.minimum(p, 1 - p))
    members = {"brier": np.stack([not_negative("brier", error_of(forms["brier"], row)) for row in np.eye(k)], 1), "disagreement": phi,
               "regret": phi - least[:, None]}  # appendix E; a tie's V(1-p) + (1-V)p is its 1/2
    figures |= {("members", name): (values, pairs) for name, values in members.items()}
    figures["members", "accuracy"] = sums["majority"], sums["decided"].astype(np.float64)
    found = estimate(figures, draw)

    def both(name, key, *at):
        """{name: value, name_ci: interval}, or the entry of it at a place."""
        value, limits = found.get(key, (None, None))
        for place in at:
            value, limits = value[place], limits[place]
        return {name: value, f"{name}_ci": limits if value is not None else None}

    s = {"prompts": len(split.prompt_id), "pairs": len(p)}
    for name in ("tie_rate", *terms):
        s |= both(name, name)
    s["ensemble"] = [{"k": len(alpha), "alpha": alpha.tolist(), "fit": fit} |
                     {x: y for name in ("brier", "brier_soft", "excess", "true_error") for x, y in both(name, (e, name)).items()}
                     for e, (alpha, fit) in enumerate(zip(alphas, fits))]
    s["members"] = [{"j": j + 1} | {x: y for name in (*members, "accuracy") for x, y in both(name, ("members", name), j).items()} for j in range(k)]
    return s | both("pairwise_disagreement", "pairwise_disagreement"), forms


def refit(train, tested, sizes, resamples, seed):
    """{(figure, size): 95 % interval} of the squared errors of a split with the weights of the first `size` members fitted anew to resampled train
    prompts every time, so that the intervals hold what the weights owe to chance, too (the rewards stay as they are).

    train, tested: ({figure: as of squared_errors}, pairs (P,)), train over all pairs that the weights were fitted to.
    """
    from tqdm import tqdm  # only here: without it, numbers are derived where it is not installed

    def drawn(forms, pairs, seed):
        *sums, pairs = drawn_sums([*itertools.chain(*forms.values()), pairs], partial(resampled, resamples=resamples, seed=seed))
        return {figure: sums[3 * i : 3 * i + 3] for i, figure in enumerate(forms)}, pairs

    (train, train_pairs), (test, test_pairs) = drawn(*train, seed + 1), drawn(*tested, seed)  # two seeds: splits of one size are drawn apart
    q = [error_matrix(vote_vote / n, vote_p / n, p_p / n) for vote_vote, vote_p, p_p, n in zip(*train["brier"], train_pairs)]
    limits = {}
    for size in sizes:
        alpha = np.array([simplex_weights(part[:size, :size]) for part in tqdm(q, f"weights of {size}", unit="resample", leave=False, mininterval=1,
                                                                             disable=None)])
        for figure, form in test.items():
            limits[figure, size] = listed(np.percentile(not_negative(figure, error_of(form, alpha)) / test_pairs, [2.5, 97.5]))
    return limits


def resampled(sums, resamples, seed):
    """Sums over resampled prompts, float64 (resamples, m), of sums (P, m)."""
    counts = evaluator.bootstrap_counts(len(sums), resamples, seed)
    return np.concatenate([part.astype(np.float64) @ sums for part in np.array_split(counts, max(1, counts.size // 10**6))])


def diversity(scores, draw):
    """Kendall's tau-b between the members' rankings of every prompt's continuations, averaged over prompts (figure 3).

    scores float32 (K, prompts, n), or None: then None. A prompt on which a member is constant has no tau for it and is left out of that cell.
    """
    if scores is None:
        return None
    tau = evaluator.kendall_tau(scores)
    known = ~np.isnan(tau)
    value, limits = estimate({"tau": (np.where(known, tau, 0), known.astype(np.float64))}, draw)["tau"]
    constant = (~known).diagonal(axis1=1, axis2=2).sum(0).tolist()
    return {"prompts": scores.shape[1], "continuations": scores.shape[2], "kendall_tau": value, "kendall_tau_ci": limits, "constant_rankings": constant}


def read_ensemble(run):
    """(K, weights.json, weights of each prefix, how each was found). Raises InputError where weights and rewards are of different K."""
    k, path = count_members(run), run / "weights.json"
    prefixes = read_json(path)
    try:
        largest, fits = max(entry["k"] for entry in prefixes), [entry["fit"] for entry in prefixes]
        if largest != k:
            raise InputError(f"{path}: weights for K = {largest} found, rewards of K = {k} members; fit_weights.py fits them anew")
        return k, prefixes, [read_weights(run, entry["k"]) for entry in prefixes], fits
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path}: a list of {{k, alpha, fit}} expected; fit_weights.py makes it") from None


def read_logs(run, k):
    """{j: the lines of logs/0j.jsonl}, for members that have a log."""
    paths = {j: run / "logs" / f"{j:02d}.jsonl" for j in range(1, k + 1)}
    return {j: [json.loads(line) for line in path.read_text().splitlines()] for j, path in paths.items() if path.exists()}


def main(args):
    run = args.run
    out = run if args.out is None or args.out.resolve() == run.resolve() else args.out
    splits, stats = read_splits(run)
    k, prefixes, alphas, fits = read_ensemble(run)
    rewards = {name: read_rewards(run, name, k, (int(split.response_start[-1]),)) for name, split in splits.items()}
    scores = read_continuations(run, k)
    settings = {"resamples": args.resamples, "seed": args.seed, "refit": args.refit}
    names = [*splits, *(["continuations"] if scores is not None else [])]
    files = [run / "weights.json", *(reward_path(run, j, name) for j in range(1, k + 1) for name in names)]
    if out != run and (out / "manifest.json").exists():
        raise InputError(f"--out {out}: another run directory found; its own results stay as they are")
    outputs = [run / "metrics.json", run / "report.html", *(run / "figures" / f"{name}.png" for name in ("calibration", "votes", "reliability", "weights"))]
    logs = sorted((run / "logs").glob("[0-9]*.jsonl"))
    code = [*(REPOSITORY / name for name in ("evaluate.py", "pairwise/report.py", "pairwise/weights.py")), *sorted((REPOSITORY / "csrc").glob("*.[ch]pp"))]
    inputs = data_hashes(run) | {str(path.relative_to(run)): hash_file(path) for path in [*files, *logs]} | {path.name: hash_file(path) for path in code}

    if out == run and unchanged(run, "evaluate", settings, inputs, outputs):
        print("evaluate: nothing has changed, skipped")
        metrics = read_json(run / "metrics.json")
    else:
        if out == run:
            started = begin_stage(run, "evaluate", settings, inputs)
        draw = partial(resampled, resamples=args.resamples, seed=args.seed)
        metrics = {"dataset": stats["dataset"], "k": k, "votes": stats["votes"], "splits": {}, "diversity": diversity(scores, draw)}
        single = not (run / "members.json").exists() and "joint" not in read_json(run / "manifest.json", {"stages": {}})["stages"]
        errors = {}  # of each split, for the intervals with weights fitted anew
        for name, split in splits.items():
            if (counted := counted_pairs(split)) is not None:
                metrics["splits"][name], forms = split_metrics(counted, rewards[name], alphas, fits, stats, draw, single)
                errors[name] = forms, np.diff(counted.pair_start)
        if args.refit:
            train, fitted = splits["train"], [entry["k"] for entry in prefixes if entry["fit"] == "qp"]
            sums = evaluator.pair_statistics(rewards["train"], train.a, train.b, train.p, train.pair_start)
            asked = {"brier": (sums["vote_vote"], sums["vote_p"], sums["p_p"])}, np.diff(train.pair_start)
            for name in (name for name in errors if name != "train"):
                for (figure, size), limits in refit(asked, errors[name], fitted, args.resamples, args.seed).items():
                    entry = next(e for e in metrics["splits"][name]["ensemble"] if e["k"] == size)
                    entry[f"{figure}_refit_ci"] = limits
        write_json(out / "metrics.json", metrics)
        test = splits["test"]
        p_hat = alphas[-1] @ evaluator.votes(rewards["test"], test.a, test.b) / 2
        report.write(out, metrics, prefixes, read_json(run / "manifest.json"), read_logs(run, k), test.p, p_hat)
        if out == run:
            end_stage(run, "evaluate", settings, inputs, started)
    print(report.table(metrics))
    print(f"report: {out / 'report.html'}")


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--run", required=True, type=Path, help="run directory with data/, rewards/ and weights.json")
    parser.add_argument("--out", type=Path, help="write metrics.json, report.html and figures/ there instead of into the run")
    parser.add_argument("--resamples", type=natural, default=10000, help="bootstrap resamples over prompts")
    parser.add_argument("--seed", type=seed, default=0, help="of the bootstrap")
    parser.add_argument("--refit", action="store_true", help="intervals also with the weights fitted anew to each resample of the train prompts (minutes)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_main(main, parse_args())
