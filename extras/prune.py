"""Theorem 3: a run without its outliers, the members that are far from the mixture.

    python extras/prune.py --run runs/demo --beta 4 --out runs/pruned      (seconds, no training)

The members farthest from p_hat, by E |V_j - p_hat|, are removed, of weight at most 1/(BETA-1)
together. RUN stays as it is: OUT gets its data, rewards and logs, links to its models, and
weights.json with the one entry k = K, fit "fixed", in which the removed members have weight 0.
Distances, errors and the theorem's guarantee are those of the train pairs with at least two votes:
of others it says nothing, so the Brier score on test pairs is printed beside it.
"""

import os
import shutil
import time

from pairwise import cli, data, files, levels, manifest, run_dir, theory, weights

import numpy as np

# A pruned run is not up to date when one of these has changed.
CODE = (
    "extras/prune.py",
    "pairwise/data.py",
    "pairwise/theory.py",
    "pairwise/weights.py",
    cli.import_evaluator().__file__,
)


def remaining_members(votes, alpha, beta):
    """Which members theorem 3's ensemble keeps, bool (k,); their weights are divided by their sum.

    votes V_j float64 (k, N), alpha float64 (k,) on the simplex, beta above 2, so that something
    remains. The members of the largest distance E |V_j - p_hat| are removed (of equal ones the
    later first) as long as their weights together are at most 1/(beta-1). Where members tie, the
    theorem holds with phi = E |V_j - p| and phi_min over rewards that never tie: then |V_i - V_j|
    is linear in V_j, as the proof needs.
    """
    distance = np.abs(votes - alpha @ votes).mean(1)
    order = np.argsort(distance, kind="stable")
    weight_from_here = np.cumsum(alpha[order][::-1])[::-1]  # of a member and all that are farther
    remaining = np.empty(len(alpha), bool)
    remaining[order] = weight_from_here > 1 / (beta - 1)
    return remaining


def theorem3(epsilon, removed):
    """Bound of the calibration error of an epsilon-calibrated ensemble from which members of the
    weight `removed` are taken away; the theorem has removed = 1/(beta-1)."""
    return (epsilon**0.5 + removed) ** 2


def prune(split, rewards, alpha, beta, stats):
    """(pruned weights float64 (k,), their train error, facts for the manifest); stats: the data's.

    epsilon is the train error of alpha less Lemma 1's C. Where C is not known (dependent votes),
    epsilon and what theorem 3 says by it are None.
    """
    votes = weights.member_votes(rewards, split.a, split.b)
    remaining = remaining_members(votes, alpha, beta)
    pruned, removed = alpha * remaining / alpha[remaining].sum(), float(alpha[~remaining].sum())
    mse, pruned_mse = (float(np.mean((x @ votes - split.p) ** 2)) for x in (alpha, pruned))
    numbers = (np.flatnonzero(~remaining) + 1).tolist()
    facts = {"beta": beta, "removed": numbers, "weight_removed": removed}
    if (c := theory.irreducible_of(split, stats)) is None:
        facts |= dict.fromkeys(("epsilon", "gamma", "bound", "bound_of_weight_removed", "error"))
        facts["guarantee"] = (
            "the error of the weights is not known for these votes, so there is no bound"
        )
        return pruned, pruned_mse, facts
    epsilon, error = (x - float(np.mean(c)) for x in (mse, pruned_mse))
    epsilon = max(0.0, epsilon)
    gamma = (beta + 1) * epsilon**0.5
    bound, tighter_bound = (theorem3(epsilon, x) for x in (1 / (beta - 1), removed))
    facts |= {"epsilon": epsilon, "gamma": gamma, "bound": bound}
    facts |= {"bound_of_weight_removed": tighter_bound, "error": error}
    facts["guarantee"] = (
        f"no member is left with Phi > {beta:g} Phi_min + {gamma:.4f} (epsilon {epsilon:.4f}); "
        f"the error is {error:.4f}, at most {bound:.4f} by theorem 3, "
        f"{tighter_bound:.4f} for the weight removed, by estimates on the pairs that were trained "
        "on, which are too low"
    )
    return pruned, pruned_mse, facts


def test_words(run, k, alphas):
    """What the console says of test pairs; alphas: the pruned weights and those before, (k,)."""
    test = data.read_split(run, "test")
    rewards = run_dir.read_rewards(run, "test", k, (test.n_responses,))
    if (test := data.counted_pairs(test)) is None:
        return "no test pair of two votes, so nothing is known beyond train pairs"
    votes = weights.member_votes(rewards, test.a, test.b)
    now, before = (np.mean((alpha @ votes - test.p) ** 2) for alpha in alphas)
    words = f"the Brier score is {now:.4f}, and was {before:.4f}"
    return f"on test pairs, for which the theorem guarantees nothing, {words}"


COPIED = ("data", "rewards", "logs", "logprob", "continuations.parquet", "members.json")


def hash_copied(run):
    """Return {path in the run: SHA-256} of all that `copy_run` copies."""
    places = [path for name in COPIED for path in (run / name, *sorted((run / name).rglob("*")))]
    return {str(x.relative_to(run)): files.hash_file(x) for x in places if x.is_file()}


def copy_run(run, partial, out):
    """Copy `run` without its weights and their evaluation to `partial`, which will be `out`."""
    partial.mkdir()
    for path in sorted(run.iterdir()):
        if path.name == "members.json":  # It names its source relative to its directory.
            formulas = files.read_json(path, levels.MEMBERS)
            source = os.path.relpath((run / formulas["source"]).resolve(), out.resolve())
            files.write_json(partial / path.name, formulas | {"source": source})
        elif path.name in COPIED:
            (shutil.copytree if path.is_dir() else shutil.copy)(path, partial / path.name)
        elif path.name in ("base", "joint") or path.name.startswith("member_"):
            (partial / path.name).symlink_to(path.resolve())  # Models are large.
    stages = manifest.entries(run)
    stages = {
        name: stages[name] for name in stages if name not in ("weights", "evaluate", "plurality")
    }
    files.write_json(partial / "manifest.json", {"stages": stages}, hashed=False)


def must_be_new(out):
    """Raise InputError where `out` is there."""
    if out.exists():
        raise cli.InputError(
            f"--out {out}: found, a new directory expected, or what these flags, inputs and code "
            "made; the pruned run is a run directory of its own"
        )


def main(args):
    run, out = args.run, args.out
    split, k = data.read_split(run, "train"), run_dir.count_members(run)
    run_dir.check_whole(run, k, "weights", "continuations", "logprob")
    rewards = run_dir.read_rewards(run, "train", k, (split.n_responses,))
    alpha, settings = run_dir.read_weights(run, k), {"prune": args.beta}
    inputs = hash_copied(run) | manifest.hash_code(*CODE)
    inputs["weights.json"] = files.hash_file(run / "weights.json")
    if manifest.unchanged(out, "weights", settings, inputs, [out / "weights.json"]):
        print(f"prune: {out} is up to date, skipped")
        return
    must_be_new(out)
    stats, split = data.read_stats(run), data.some_counted_pairs(run, "train", split)
    pruned, mse, facts = prune(split, rewards, alpha, args.beta, stats)
    on_test = test_words(run, k, (pruned, alpha))
    entry = {"k": k, "alpha": pruned.tolist(), "fit": "fixed", "train_mse": mse, "kkt": None}
    with files.replacing(out) as partial:  # The run appears whole, so it is not entered as begun.
        must_be_new(out)  # Another call may have made it since.
        started = time.time()
        copy_run(run, partial, out)
        files.write_json(partial / "weights.json", [entry])
        manifest.end_stage(partial, "weights", settings, inputs, started, pruned=facts)
    numbers = ", ".join(map(str, facts["removed"]))
    names = f"member{'s' * (len(facts['removed']) > 1)} {numbers}" if numbers else "no member"
    limit = 1 / (args.beta - 1)
    weight = f"weight {facts['weight_removed']:.4f} of at most 1/(beta-1) = {limit:.4f}"
    print(f"prune: {names} of {k} removed, {weight}")
    print(f"prune: on train pairs {facts['guarantee']}\nprune: {on_test}\nprune: {out}")


# Of two or less theorem 3 leaves nothing.
above_two = cli.number_type(
    "number above 2", cli.decimal, lambda v: 2 < v <= 1e6, "a number above 2, at most 10^6,"
)


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    cli.add_run(parser, "a run directory with weights.json")
    parser.add_argument(
        "--beta",
        required=True,
        type=above_two,
        help="above 2: the members removed have weight at most 1/(BETA-1)",
    )
    out = {"type": run_dir.output, "help": "the pruned run, a new directory"}
    parser.add_argument("--out", required=True, **out)
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
