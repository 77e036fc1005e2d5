"""Every number of a run: metrics with intervals, figures and report, from stored rewards. CPU only, without torch, in seconds.

    python evaluate.py --run runs/demo
    python evaluate.py --run results/demo --out /tmp/demo          (a committed run stays as it is)

Reads data/, rewards/ and weights.json of the run; writes metrics.json, report.html and figures/ into it, or into --out.
"""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
from scipy.special import expit

from pairwise import report
from pairwise.run_dir import (
    REPOSITORY, InputError, Parser, begin_stage, count_members, data_hashes, end_stage, hash_file, import_evaluator, natural, read_json,
    read_rewards, read_splits, read_weights, reward_path, run_main, seed, unchanged, write_json)

evaluator = import_evaluator()


# ---- single quantities; p, n, ties, p_true: float64 (N,), one entry a pair


def irreducible(p, n, ties_as_halves):
    """Unbiased estimate of Lemma 1's C = E (p - p*)^2, the error that even perfect calibration has for n sampled annotators.

    ties_as_halves (N,): tie votes that were counted as half for each side, whose variance is a quarter less each.
    """
    return float(np.mean((p * (1 - p) - ties_as_halves / (4 * n)) / (n - 1)))


def floor_single(p):
    """Smallest squared error of any single deterministic reward: mean min(p, 1-p)^2 (section 5)."""
    return float(np.mean(np.minimum(p, 1 - p) ** 2))


def coin_flip(p):
    """Squared error of predicting one half everywhere."""
    return float(np.mean((p - 0.5) ** 2))


def interval(errors, pairs, counts):
    """95 % percentile intervals, float64 (m, 2), of sum(errors) / sum(pairs) over resampled prompts.

    errors float64 (P, m): summed squared errors per prompt; pairs (P,); counts int (resamples, P): how often each prompt was drawn.
    """
    both = np.column_stack([errors, pairs])
    sums = np.concatenate([part.astype(np.float64) @ both for part in np.array_split(counts, max(1, counts.size // 10**7))])
    resampled = sums[:, :-1] / sums[:, -1:]
    return np.percentile(resampled, [2.5, 97.5], axis=0).T


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


def split_metrics(split, rewards, alphas, fits, stats, counts):
    """The S of metrics.json for one split.

    rewards float32 (K, R); alphas: the weights of each prefix; fits: how each was found; counts int (resamples, P).
    """
    sums = evaluator.pair_statistics(rewards, split.a, split.b, split.p, split.pair_start)
    total = {name: values.sum(0) for name, values in sums.items()}
    p, n, truth, pairs, k = split.p, split.n, split.p_true, len(split.p), len(rewards)
    with np.errstate(over="ignore", invalid="ignore"):  # infinite rewards are ranks too: the difference of two equal ones is 0
        soft = expit(np.nan_to_num(rewards[:, split.a] - rewards[:, split.b]).astype(np.float64))  # (K, N)
    halves = split.ties if stats["ties"] == "half" else np.zeros(pairs)
    c = {"sampled": irreducible(p, n, halves), "population": 0.0, "dependent": None}[stats["votes"]]
    votes = evaluator.votes(rewards, split.a, split.b) / 2 if truth is not None else None

    # Squared error of a prefix, per prompt: alpha' (V V') alpha - 2 alpha' (V p) + p p, from the sums alone.
    errors = np.stack([
        np.einsum("pij,i,j->p", sums["vote_vote"][:, : len(alpha), : len(alpha)], alpha, alpha) - 2 * sums["vote_p"][:, : len(alpha)] @ alpha + sums["p_p"]
        for alpha in alphas], axis=1)
    limits = interval(errors, sums["pairs"], counts)
    ensemble = []
    for column, (alpha, fit) in enumerate(zip(alphas, fits)):
        size = len(alpha)
        brier = float(errors[:, column].sum() / pairs)
        ensemble.append({
            "k": size, "alpha": alpha.tolist(), "fit": fit, "brier": brier, "brier_ci": limits[column].tolist(),
            "brier_soft": float(np.mean((alpha @ soft[:size] - p) ** 2)), "excess": None if c is None else brier - c,
            "true_error": None if truth is None else float(np.mean((alpha @ votes[:size] - truth) ** 2))})

    least = float(np.mean(np.minimum(p, 1 - p)))
    members = []
    for j in range(k):
        phi = float((total["vote"][j] - 2 * total["vote_p"][j] + total["p"]) / pairs)  # mean V(1-p) + (1-V)p
        members.append({
            "j": j + 1, "brier": float((total["vote_vote"][j, j] - 2 * total["vote_p"][j] + total["p_p"]) / pairs), "disagreement": phi,
            "regret": phi - least,  # appendix E; a tie's V(1-p) + (1-V)p is its 1/2
            "accuracy": float(total["majority"][j] / total["decided"]) if total["decided"] else None})
    return {
        "prompts": len(split.prompt_id), "pairs": pairs, "annotators_mean": float(n.mean()), "majority_mean": float(np.maximum(p, 1 - p).mean()),
        "tie_rate": float(total["ties"].sum() / (k * pairs)),
        "floor_single": floor_single(p), "coin_flip": coin_flip(p),
        "soft_single": float(np.mean((soft[0] - p) ** 2)),  # member 1 is trained on t_1 = p whatever the target
        "irreducible": c,
        "floor_true": None if truth is None else floor_single(truth), "coin_true": None if truth is None else coin_flip(truth),
        "soft_true": None if truth is None else float(np.mean((soft[0] - truth) ** 2)),
        "ensemble": ensemble, "members": members, "pairwise_disagreement": (total["disagreement"] / pairs).tolist()}


def read_continuations(run, k):
    """Rewards of the continuations, float32 (K, prompts, n); None where there are none."""
    if not (run / "continuations.parquet").exists() and not list((run / "rewards").glob("*_continuations.npy")):
        return None
    path = reward_path(run, 1, "continuations")
    try:
        shape = np.load(path, allow_pickle=False).shape
    except (OSError, ValueError, EOFError):
        shape = (0, 0)  # read_rewards says what is wrong
    if len(shape) != 2:
        raise InputError(f"{path}: shape {shape} found, (prompts, n) expected")
    return read_rewards(run, "continuations", k, shape)


def diversity(scores):
    """Kendall's tau-b between the members' rankings of every prompt's continuations, averaged over prompts (figure 3).

    scores float32 (K, prompts, n), or None: then None. A prompt on which a member is constant has no tau for it and is left out of that cell.
    """
    if scores is None:
        return None
    tau = evaluator.kendall_tau(scores)
    known = ~np.isnan(tau)
    mean = np.where(known, tau, 0).sum(0) / np.maximum(known.sum(0), 1)
    return {"prompts": scores.shape[1], "continuations": scores.shape[2],
            "kendall_tau": [[float(x) if seen else None for x, seen in zip(*row)] for row in zip(mean, known.any(0))]}


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
    settings = {"resamples": args.resamples, "seed": args.seed}
    names = [*splits, *(["continuations"] if scores is not None else [])]
    files = [run / "weights.json", *(reward_path(run, j, name) for j in range(1, k + 1) for name in names)]
    if out != run and (out / "manifest.json").exists():
        raise InputError(f"--out {out}: another run directory found; its own results stay as they are")
    outputs = [run / "metrics.json", run / "report.html", *(run / "figures" / f"{name}.png" for name in ("calibration", "votes", "reliability", "weights"))]
    logs = sorted((run / "logs").glob("[0-9]*.jsonl"))
    code = [REPOSITORY / "evaluate.py", REPOSITORY / "pairwise" / "report.py", *sorted((REPOSITORY / "csrc").glob("*"))]
    inputs = data_hashes(run) | {str(path.relative_to(run)): hash_file(path) for path in [*files, *logs]} | {path.name: hash_file(path) for path in code}

    if out == run and unchanged(run, "evaluate", settings, inputs, outputs):
        print("evaluate: nothing has changed, skipped")
        metrics = read_json(run / "metrics.json")
    else:
        if out == run:
            started = begin_stage(run, "evaluate", settings, inputs)
        metrics = {"dataset": stats["dataset"], "k": k, "votes": stats["votes"], "splits": {}, "diversity": diversity(scores)}
        for name, split in splits.items():
            if (counted := counted_pairs(split)) is not None:
                counts = evaluator.bootstrap_counts(len(counted.prompt_id), args.resamples, args.seed)
                metrics["splits"][name] = split_metrics(counted, rewards[name], alphas, fits, stats, counts)
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
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_main(main, parse_args())
