"""Every number of a run: metrics with intervals, figures and report, from stored rewards.

    python evaluate.py --run runs/demo
    python evaluate.py --run results/demo --out /tmp/demo     (a committed run stays as it is)

Reads data/, rewards/ and weights.json of the run; writes metrics.json, report.html and figures/ into
it, or into --out. CPU only, without torch, in seconds. extras/compare.py sets runs side by side.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pairwise import cli, data, metrics, ranking, report, run_dir

evaluator = cli.import_evaluator()

BETAS = np.logspace(
    1, -4, 11
)  # of appendix A's policies, from near the base to near the favourites
CASES = 3  # prompts of which the members' favourites are shown
FIGURES = "calibration", "votes", "reliability", "weights"  # those that every run has
# The files whose code makes the numbers and shows them.
CODE = (
    "evaluate.py",
    "pairwise/metrics.py",
    "pairwise/ranking.py",
    "pairwise/report.py",
    "pairwise/theory.py",
    "pairwise/weights.py",
    "csrc/*.[ch]pp",
)


# ---- diversity on continuations: P prompts, n continuations each, K members


def diversity(scores, texts, alpha, patterns, resamples, seed):
    """How differently the members rank every prompt's continuations (figure 3, appendices A and G).

    kendall_tau: tau-b between two members' rankings; win: how far one's favourite falls with another;
    character: tau-b between a ranking and what shows in the texts; policy: |p_bar - p_hat| of the
    members' optimal policies. A prompt where a ranking is constant has no tau and is left out there.

    scores float32 (K, P, n); texts: of `run_dir.read_continuations`, or None; alpha (K,): the mixture
    weights; patterns: {attribute: regular expression}.
    """
    k, prompts, n = scores.shape
    counts = np.empty((0, prompts, n), np.float32)
    if texts:
        counts = ranking.attribute_counts(texts["texts"], patterns)
    tau = evaluator.kendall_tau(np.concatenate([scores, counts]))  # (P, K + attributes, likewise)
    known = ~np.isnan(tau)
    tau, has_tau = np.where(known, tau, 0), known.astype(np.float64)
    wins = ranking.win_shares(scores) if n > 1 else np.full((prompts, k, k), 0.5)
    figures = {
        "prompts": prompts,
        "continuations": n,
        "kendall_tau": metrics.Ratio(tau[:, :k, :k], has_tau[:, :k, :k]),
        "constant_rankings": (~known).diagonal(axis1=1, axis2=2).sum(0)[:k].tolist(),
        "win": metrics.Ratio(wins, np.full(prompts, float(n > 1))),
        "repeated": None,
        "character": None,
        "policy": None,
        "favourites": None,
    }
    if texts:
        figures["repeated"] = prompts * n - sum(len(set(row)) for row in texts["texts"])
        character = metrics.Ratio(tau[:, k:, :k], has_tau[:, k:, :k])
        figures["character"] = {"attributes": list(patterns), "tau": character}
        figures["favourites"] = favourites(scores, texts, wins)
    if texts and texts["logprob"]:
        distance = metrics.Ratio(*policy_distance(scores, texts, alpha))
        figures["policy"] = {"beta": BETAS.tolist(), "distance": distance}
    return metrics.estimate(figures, resamples, seed)


def policy_distance(scores, texts, alpha):
    """(float64 (P, betas), float64 (P,)): |p_bar - p_hat| with each of BETAS, summed over all pairs of a
    prompt's distinct continuations, and the number of these pairs."""
    sums, pairs = np.empty((len(texts["texts"]), len(BETAS))), np.empty(len(texts["texts"]))
    for x, (answers, logprob) in enumerate(zip(texts["texts"], texts["logprob"])):
        distinct = ranking.distinct(answers)
        rewards, logprob = scores[:, x, distinct], np.array(logprob)[distinct]
        p_hat = ranking.reward_mixture(rewards, alpha)
        pairs[x] = len(p_hat)
        for i, beta in enumerate(BETAS):
            p_bar = ranking.policy_mixture(rewards, logprob, alpha, beta)
            sums[x, i] = np.abs(p_bar - p_hat).sum()
    return sums, pairs


def favourites(scores, texts, wins):
    """The CASES prompts on which members rank each other's favourites lowest (of equals the first), with
    every member's favourite (appendix G)."""
    k, best = len(scores), ranking.favourites(scores)
    disagreement = np.zeros(scores.shape[1])
    if k > 1:
        disagreement = 1 - wins[:, ~np.eye(k, dtype=bool)].mean(1)
    return [
        {
            "prompt_id": texts["prompt_id"][x],
            "prompt": texts["messages"][x][-1]["content"],
            "disagreement": float(disagreement[x]),
            "texts": [texts["texts"][x][y] for y in best[:, x]],
        }
        for x in np.argsort(-np.round(disagreement, 12), kind="stable")[:CASES]
    ]


# ---- the whole run


def best_size(ensemble):
    """The k with the least Brier score; of scores that are equal but for rounding (1e-9, as in
    fit_weights.py) the smallest k."""
    least = min(entry["brier"] for entry in ensemble)
    return min(entry["k"] for entry in ensemble if entry["brier"] <= least + 1e-9)


def read_logs(run, k):
    """{"member j": the lines of logs/0j.jsonl}, for members that have a log; of a joint run
    {"all members": those of logs/joint.jsonl}."""
    paths = {f"member {j}": run / "logs" / f"{j:02d}.jsonl" for j in range(1, k + 1)}
    paths["all members"] = run / "logs" / "joint.jsonl"
    return {
        name: [json.loads(line) for line in path.read_text().splitlines()]
        for name, path in paths.items()
        if path.exists()
    }


class Stored(NamedTuple):
    """What the stages before have left in a run: {split: Split}, stats.json, the entries of
    weights.json, {split: rewards float32 (K, R)}, and, or None, the rewards of the continuations,
    float32 (K, P, n), and the continuations."""

    splits: dict
    stats: dict
    prefixes: list
    rewards: dict
    scores: np.ndarray | None
    texts: dict | None


def read_stored(run):
    """Read all of it. Raises InputError where a file is missing or unfit."""
    splits, stats = data.read_splits(run)
    prefixes = metrics.read_prefixes(run)
    k = run_dir.count_members(run)
    rewards = {
        name: run_dir.read_rewards(run, name, k, (int(split.response_start[-1]),))
        for name, split in splits.items()
    }
    scores, texts = run_dir.read_continuation_rewards(run, k), run_dir.read_continuations(run)
    return Stored(splits, stats, prefixes, rewards, scores, texts)


def hash_inputs(run, stored):
    """{name: SHA-256} of every file that the results depend on, the code included."""
    files = [run / "weights.json"]
    for name in (*stored.splits, "continuations"):
        if name in stored.splits or stored.scores is not None:
            k = len(stored.rewards["test"])
            files += [run_dir.reward_path(run, j, name) for j in range(1, k + 1)]
    files += [run / name for name in ("continuations.parquet", "plurality.json")]
    files += sorted((run / "logs").glob("*.jsonl"))
    hashes = {
        str(path.relative_to(run)): run_dir.hash_file(path) for path in files if path.exists()
    }
    code = [path for pattern in CODE for path in sorted(cli.REPOSITORY.glob(pattern))]
    return data.hashes(run) | hashes | {path.name: run_dir.hash_file(path) for path in code}


def compute(run, stored, args):
    """metrics.json as a dictionary."""
    sampling = args.resamples, args.seed
    result = {
        "dataset": stored.stats["dataset"],
        "k": len(stored.rewards["test"]),
        "k_valid": None,
        "votes": stored.stats["votes"],
        "splits": {},
        "diversity": None,
        "plurality": run_dir.read_json(run / "plurality.json", {}) or None,
    }
    if stored.scores is not None:
        alpha = np.array(stored.prefixes[-1]["alpha"])
        patterns = stored.stats.get("attributes", ranking.ATTRIBUTES)
        result["diversity"] = diversity(stored.scores, stored.texts, alpha, patterns, *sampling)
    soft_single = metrics.trained_on_p(run)
    counted = {name: data.counted_pairs(split) for name, split in stored.splits.items()}
    forms = {}
    for name, split in counted.items():
        if split is not None:
            result["splits"][name], forms[name] = metrics.split_metrics(
                split, stored.rewards[name], stored.prefixes, stored.stats, soft_single, *sampling
            )
    if "valid" in result["splits"]:
        result["k_valid"] = best_size(result["splits"]["valid"]["ensemble"])
    if args.refit:
        fitted = counted["train"] or stored.splits["train"]
        sizes = [prefix["k"] for prefix in stored.prefixes if prefix["fit"] == "qp"]
        # Another seed, so that splits of as many prompts are not drawn alike.
        alphas = metrics.refitted_weights(
            fitted, stored.rewards["train"], sizes, args.resamples, args.seed + 1
        )
        for name in forms.keys() - {"train"}:
            pairs = np.diff(counted[name].pair_start)
            limits = metrics.refitted_intervals(forms[name], pairs, alphas, *sampling)
            for entry in result["splits"][name]["ensemble"]:
                entry |= limits.get(entry["k"], {})
    return result


def main(args):
    run = args.run
    in_place = args.out is None or args.out.resolve() == run.resolve()
    out = run if in_place else args.out
    if not in_place and (out / "manifest.json").exists():
        raise cli.InputError(
            f"--out {out}: another run directory found; its own results stay as they are"
        )
    stored = read_stored(run)
    settings = {"resamples": args.resamples, "seed": args.seed, "refit": args.refit}
    inputs = hash_inputs(run, stored)
    outputs = [run / "metrics.json", run / "report.html"]
    outputs += [run / "figures" / f"{name}.png" for name in FIGURES]
    if in_place and run_dir.unchanged(run, "evaluate", settings, inputs, outputs):
        print("evaluate: nothing has changed, skipped")
        result = run_dir.read_json(run / "metrics.json")
    else:
        if in_place:
            started = run_dir.begin_stage(run, "evaluate", settings, inputs)
        result = compute(run, stored, args)
        run_dir.write_json(out / "metrics.json", result)
        test, alpha = stored.splits["test"], np.array(stored.prefixes[-1]["alpha"])
        p_hat = alpha @ evaluator.votes(stored.rewards["test"], test.a, test.b) / 2
        manifest = run_dir.read_json(run / "manifest.json")
        logs = read_logs(run, result["k"])
        report.write(out, result, stored.prefixes, manifest, logs, test.p, p_hat)
        if in_place:
            run_dir.end_stage(run, "evaluate", settings, inputs, started)
    print(report.table(result))
    print(f"report: {out / 'report.html'}")


def parse_args(argv=None):
    cli.moved(argv, {"--compare": "python extras/compare.py RUN RUN .. --out DIR"})
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--run", type=Path, required=True, help="run with data/, rewards/ and weights.json")
    add("--out", type=Path, help="write the results there instead of into the run")
    add("--resamples", type=cli.natural, default=10000, help="bootstrap resamples over prompts")
    add("--seed", type=cli.seed, default=0, help="of the bootstrap")
    refit = "intervals also with the weights fitted anew to each resample of the train prompts (minutes)"
    add("--refit", action="store_true", help=refit)
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
