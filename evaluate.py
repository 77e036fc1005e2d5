"""Compute every number of a run from stored rewards: metrics with intervals, figures and report.

    python evaluate.py --run runs/demo
    python evaluate.py --run results/demo --out /tmp/demo     (a committed run stays as it is)

It reads data/, rewards/ and weights.json of the run, and writes metrics.json, report.html and
figures/ into it, or into --out. It needs neither a GPU nor torch, and takes seconds.
pairwise/metrics.py has the mathematics; extras/compare.py compares runs.
"""

import itertools
from typing import NamedTuple

from pairwise import (
    cli,
    data,
    diversity,
    drawing,
    files,
    manifest,
    metrics,
    policies,
    ranking,
    report,
    run_dir,
    soft_model,
    weights,
)

import numpy as np

evaluator = cli.import_evaluator()

# of extras/plurality.py; the limits are null where there are few prompts
GAIN = {"mixture": files.NUMBER, "components": int, "gain": files.NUMBER}
GAIN |= {"ci": [(*files.NUMBER, type(None))]}
PLURALITY = GAIN | {"single": files.NUMBER, "several": GAIN}
LOG = [{"loss": files.NUMBER}]
FIGURES = "calibration", "votes", "reliability", "weights"  # Every run has these.
# These files hold the numbers and show them: a change of one makes the stage run again.
CODE = (
    "evaluate.py",
    "pairwise/data.py",
    "pairwise/metrics.py",
    "pairwise/diversity.py",
    "pairwise/policies.py",
    "pairwise/ranking.py",
    "pairwise/figures.py",
    "pairwise/drawing.py",
    "pairwise/report.py",
    "pairwise/report.html.jinja",
    "pairwise/soft_model.py",
    "pairwise/theory.py",
    "pairwise/weights.py",
    evaluator.__file__,
)


def best_size(ensemble):
    """Return the smallest k whose Brier score is within 1e-9, which is rounding, of the least."""
    least = min(entry["brier"] for entry in ensemble)
    return min(entry["k"] for entry in ensemble if entry["brier"] <= least + 1e-9)


def read_logs(run, k):
    """Return {"member j": the steps of logs/0j.jsonl} of the members that have a log, and of a
    joint run {"all members": those of logs/joint.jsonl}."""
    paths = {f"member {j}": run / "logs" / f"{j:02d}.jsonl" for j in range(1, k + 1)}
    paths["all members"] = run / "logs" / "joint.jsonl"
    manifest.check(run, *paths.values())
    logs = {name: files.read_lines(path) for name, path in paths.items() if path.exists()}
    for name, lines in logs.items():
        if wrong := files.misfit(lines, LOG):
            raise cli.InputError(f"{paths[name]}: {wrong}")
    return logs


class Stored(NamedTuple):
    """What the stages before this one have left in a run."""

    splits: dict  # {name: data.Split}
    stats: dict  # data/stats.json
    prefixes: list  # The entries of weights.json, of run_dir.read_all_prefixes.
    rewards: dict  # {split: float32 (K, R)}
    scores: np.ndarray | None  # Rewards of the continuations, float32 (K, P, n).
    texts: dict | None  # The continuations, of run_dir.read_continuations.
    logprob: np.ndarray | None  # log pi_0 of the test responses, of run_dir.read_logprob.


def read_stored(run):
    """Read what `Stored` holds. Raises InputError where a file is missing or unfit."""
    splits, stats = data.read_splits(run)
    prefixes = run_dir.read_all_prefixes(run)
    k = run_dir.count_members(run)
    run_dir.check_whole(run, k, *run_dir.BESIDE)
    rewards = {
        name: run_dir.read_rewards(run, name, k, (split.n_responses,))
        for name, split in splits.items()
    }
    scores, texts = run_dir.read_continuation_rewards(run, k), run_dir.read_continuations(run)
    data.some_counted_pairs(run, "test", splits["test"])  # There must be some to evaluate.
    logprob = run_dir.read_logprob(run, splits["test"].n_responses)
    return Stored(splits, stats, prefixes, rewards, scores, texts, logprob)


def hash_inputs(run, stored):
    """Return {name: SHA-256} of every file that the results depend on, the code included."""
    paths = [run / name for name in run_dir.BESIDE.values()]
    for j in range(1, len(stored.rewards["test"]) + 1):
        names = *stored.splits, "continuations"
        paths += [run_dir.reward_path(run, j, name) for name in names]
    paths += [soft_model.source_path(run, name) for name in stored.splits]
    paths += sorted((run / "logs").glob("[!.]*.jsonl"))
    hashes = {str(x.relative_to(run)): files.hash_file(x) for x in paths if x.exists()}
    before = [entry for name, entry in manifest.entries(run).items() if name != "evaluate"]
    if edited := [name for entry in before for name in entry.get("edited", [])]:
        hashes["edited by hand"] = ", ".join(edited)  # The report says so.
    return data.hashes(run) | hashes | manifest.hash_code(*CODE)


def refitted_weights(split, rewards, sizes, resamples, seed):
    """Fit the weights of the first k members to each resample of the prompts, for all k of sizes.

    split: the train pairs that the run's weights are fitted to; rewards float32 (K, R). Returns
    {k: float64 (resamples, k)}.
    """
    from tqdm import tqdm  # All other numbers are computed where tqdm is not installed, too.

    sums = evaluator.pair_statistics(rewards, split.a, split.b, split.p, split.pair_start)
    sums = [sums[name] for name in ("vote_vote", "vote_p", "p_p", "pairs")]
    matrices = [
        weights.error_matrix(vote_vote / n, vote_p / n, p_p / n)
        for vote_vote, vote_p, p_p, n in zip(*metrics.drawn_sums(sums, resamples, seed))
    ]
    look = {"unit": "resample", "leave": False, "mininterval": 1, "disable": None}
    alphas = {}
    for k in sizes:
        bar = tqdm(matrices, f"weights of {k}", **look)
        alphas[k] = np.array([weights.simplex_weights(q[:k, :k]) for q in bar])
    return alphas


def refitted_intervals(forms, pairs, prompts, alphas, resamples, seed):
    """Return {k: {NAME_refit_ci: limits}}, intervals that the chance in the weights widens.

    forms: of a split, by metrics.squared_errors; pairs (P,): its pairs of each prompt; prompts:
    the number of this split's or of train's, whichever is less, by which there is an interval or
    none; alphas: of `refitted_weights`.
    """
    sums = metrics.drawn_sums([*itertools.chain(*forms.values()), pairs], resamples, seed)
    forms = {name: sums[3 * i : 3 * i + 3] for i, name in enumerate(forms)}
    limits = {k: {} for k in alphas}
    for (k, alpha), (name, form) in itertools.product(alphas.items(), forms.items()):
        errors = metrics.error_of(name, form, alpha, sums[-1]) / sums[-1]
        limits[k][f"{name}_refit_ci"] = metrics.interval(errors, prompts)
    return limits


def rank(stored, args):
    """Return "diversity" of metrics.json, None where there are no continuations."""
    if stored.scores is None:
        return None
    alpha = np.array(stored.prefixes[-1]["alpha"])
    patterns = stored.stats.get("attributes", ranking.ATTRIBUTES)
    ranked = stored.scores, stored.texts, alpha, patterns
    return diversity.measure(*ranked, args.resamples, args.seed)


def compute(run, stored, ranked, args):
    """Return metrics.json as a dictionary; ranked: of `rank`."""
    resampling = args.resamples, args.seed
    manifest.check(run, run / "plurality.json")
    result = {
        "dataset": stored.stats["dataset"],
        "k": len(stored.rewards["test"]),
        "k_valid": None,
        "votes": stored.stats["votes"],
        "own_split": stored.stats.get("own_split"),  # not in data brought by hand
        "splits": {},
        "diversity": ranked,
        "policy": None,
        "plurality": files.read_json(run / "plurality.json", PLURALITY, {}) or None,
    }
    soft = soft_model.read_models(run, stored.splits)
    counted = {name: data.counted_pairs(split) for name, split in stored.splits.items()}
    if stored.logprob is not None:
        rewards, alpha = stored.rewards["test"], np.array(stored.prefixes[-1]["alpha"])
        figures = policies.calibration(counted["test"], rewards, stored.logprob, alpha)
        result["policy"] = metrics.estimate(figures, *resampling)
    forms = {}
    for name, split in counted.items():
        if split is not None:
            common = stored.prefixes, stored.stats, soft.predict(name, split), *resampling
            entry, forms[name] = metrics.split_metrics(split, stored.rewards[name], *common)
            result["splits"][name] = entry | {"soft_fit": soft.fit}
    if "valid" in result["splits"]:
        result["k_valid"] = best_size(result["splits"]["valid"]["ensemble"])
    if args.refit:
        fitted = data.fitted_pairs(stored.splits["train"])
        sizes = [prefix["k"] for prefix in stored.prefixes if prefix["fit"] == "qp"]
        # The seed is another one, so that splits of as many prompts are not drawn alike.
        draws = args.resamples, args.seed + 1
        alphas = refitted_weights(fitted, stored.rewards["train"], sizes, *draws)
        for name in forms.keys() - {"train"}:
            pairs = np.diff(counted[name].pair_start)
            prompts = min(len(pairs), len(fitted.prompt_id))
            limits = refitted_intervals(forms[name], pairs, prompts, alphas, *resampling)
            for entry in result["splits"][name]["ensemble"]:
                entry.update(limits.get(entry["k"], {}))
    return result


def main(args):
    run = args.run
    in_place = args.out is None or args.out.resolve() == run.resolve()
    out = run if in_place else args.out
    if not in_place:
        run_dir.check_no_run(out)
    stored = read_stored(run)
    if args.refit and all(prefix["fit"] != "qp" for prefix in stored.prefixes):
        words = "the run's weights are not fitted to votes, weights of fit_weights.py expected"
        raise cli.InputError(f"--refit: {words}")
    settings = {"resamples": args.resamples, "seed": args.seed, "refit": args.refit}
    inputs = hash_inputs(run, stored)
    outputs = [run / "metrics.json", run / "report.html"]
    outputs += [run / "figures" / f"{name}.png" for name in FIGURES]
    if in_place and manifest.unchanged(run, "evaluate", settings, inputs, outputs):
        print("evaluate: nothing has changed, skipped")
        if edited := manifest.entries(run)["evaluate"].get("edited"):
            print(f"evaluate: edited by hand, and shown so: {', '.join(edited)}")
        result = run_dir.read_metrics(run)
    else:
        logs = read_logs(run, len(stored.rewards["test"]))
        if in_place:
            started = manifest.begin_stage(run, "evaluate", settings, inputs)
        test = data.counted_pairs(stored.splits["test"])  # read_stored has found some.
        alpha = np.array(stored.prefixes[-1]["alpha"])
        votes = weights.member_votes(stored.rewards["test"], test.a, test.b)
        ranked = rank(stored, args)
        shown = stored.prefixes, logs, test.p, weights.p_hat_of(alpha, votes), ranked
        with drawing.elsewhere(report.draw_inputs, *shown) as drawn:
            result = compute(run, stored, ranked, args)
            files.write_json(out / "metrics.json", result)
            report.write(out, result, stored.prefixes, manifest.entries(run), drawn)
        if in_place:
            manifest.end_stage(run, "evaluate", settings, inputs, started)
    print(report.table(result))
    print(f"report: {out / 'report.html'}")


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    cli.add_run(parser, "run with data/, rewards/ and weights.json")
    add("--out", type=run_dir.output, help="write the results there instead of into the run")
    add("--resamples", type=cli.resamples, default=10000, help="bootstrap resamples over prompts")
    add("--seed", type=cli.seed, default=0, help="seed of the bootstrap")
    refit = "intervals also with weights fitted to each resample of the train prompts (minutes)"
    add("--refit", action="store_true", help=refit)
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
