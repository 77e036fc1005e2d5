"""Mixture weights for every prefix of the ensemble: the weights that minimise the training error (section 4), a small quadratic program.

    python fit_weights.py --run runs/demo                                  (under a second)
    python fit_weights.py --run runs/demo --early-stop                     (is another member worth training? exit code 3: no)
    python fit_weights.py --run runs/demo --prune 4 --out runs/pruned      (theorem 3: a run directory without the outliers)

minimise  mean over train pairs of (sum_j alpha_j V_j - p)^2    subject to    alpha_j >= 0, sum_j alpha_j = 1        (equation 2 in alpha)

Writes RUN/weights.json: for k = 1..K {k, alpha, fit: "qp", train_mse, kkt}. With --prune RUN stays as it is: OUT gets its data, rewards and logs,
links to its models, and weights.json with the one entry k = K, fit "fixed", in which the removed members have weight 0.
"""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np

from pairwise import cli, data, run_dir
from pairwise.theory import irreducible, kept_members, theorem3
from pairwise.weights import error_matrix, kkt_residual, simplex_weights

evaluator = cli.import_evaluator()
STOP = 3  # exit code of --early-stop where no further member is worth training


def fit_prefixes(q):
    """The list of weights.json for error matrix q (K, K)."""
    prefixes = []
    for k in range(1, len(q) + 1):
        part = q[:k, :k]
        alpha = simplex_weights(part)
        prefixes.append(
            {
                "k": k,
                "alpha": alpha.tolist(),
                "fit": "qp",
                "train_mse": float(alpha @ part @ alpha),
                "kkt": kkt_residual(part, alpha),
            }
        )
    return prefixes


# ---- --early-stop


def stops_at(errors, patience):
    """The first k at which the last `patience` members did not bring the error below that of every smaller ensemble; None where there is no such k.

    errors: of k = 1, 2, ..; a gain of less than 1e-9 is rounding. It depends on errors[:k] alone, so a continued run stops where a new one does.
    """
    return next(
        (
            k
            for k in range(patience + 1, len(errors) + 1)
            if min(errors[k - patience : k]) > min(errors[: k - patience]) - 1e-9
        ),
        None,
    )


def early_stop(run, k, prefixes, patience):
    """Print the validation error of every prefix and whether to stop; exit with STOP where to."""
    if not (run / "data" / "valid.parquet").exists():
        raise cli.InputError(
            f"{run / 'data' / 'valid.parquet'}: no such file; --early-stop needs validation prompts: data prepared with --valid-share"
        )
    split = data.counted_pairs(data.read_split(run, "valid"))
    if split is None:
        raise cli.InputError(
            f"{run / 'data' / 'valid.parquet'}: no pair of two votes found, by which --early-stop could tell"
        )
    votes = (
        evaluator.votes(
            run_dir.read_rewards(run, "valid", k, (int(split.response_start[-1]),)),
            split.a,
            split.b,
        )
        / 2
    )
    errors = [
        float(np.mean((entry["alpha"] @ votes[: entry["k"]] - split.p) ** 2)) for entry in prefixes
    ]
    last = stops_at(errors, patience)
    said = (
        f"no gain from {'it' if patience == 1 else f'the last {patience}'}, so member {last} is the last"
        if last
        else "goes on"
    )
    print(
        f"early stop: Brier score on validation prompts {' '.join(f'{error:.4f}' for error in errors)}; {said}"
    )
    if last:
        sys.exit(STOP)


# ---- --prune


def prune(run, out, beta, k, split, rewards, inputs):
    """Write the run directory `out`: `run` without theorem 3's outliers. Distances and epsilon are those of the train pairs with at least two votes."""
    alpha, settings = run_dir.read_weights(run, k), {"prune": beta}
    inputs = inputs | {"weights.json": run_dir.hash_file(run / "weights.json")}
    if run_dir.unchanged(out, "weights", settings, inputs, [out / "weights.json"]):
        print(f"prune: {out} is up to date, skipped")
        return
    if out.exists():
        raise cli.InputError(
            f"--out {out}: found, a new directory expected; the pruned run is a run directory of its own"
        )
    stats, split = run_dir.read_json(run / "data" / "stats.json"), data.counted_pairs(split)
    if split is None:
        raise cli.InputError(
            f"{run / 'data' / 'train.parquet'}: no pair of two votes found, by which members are compared"
        )
    p, n, ties = split.p, split.n, split.ties
    votes = evaluator.votes(rewards, split.a, split.b) / 2
    kept = kept_members(votes, alpha, beta)
    pruned, removed = alpha * kept / alpha[kept].sum(), float(alpha[~kept].sum())
    mse = [float(np.mean((weights @ votes - p) ** 2)) for weights in (alpha, pruned)]
    c = {
        "sampled": np.mean(irreducible(p, n, ties if stats["ties"] == "half" else 0)),
        "population": 0.0,
        "dependent": None,
    }[stats["votes"]]
    epsilon = None if c is None else max(0.0, mse[0] - c)
    facts = {
        "beta": beta,
        "removed": (np.flatnonzero(~kept) + 1).tolist(),
        "weight_removed": removed,
        "epsilon": epsilon,
        "gamma": None if c is None else (beta + 1) * epsilon**0.5,
        "bound": None if c is None else theorem3(epsilon, 1 / (beta - 1)),
        "bound_of_weight_removed": None if c is None else theorem3(epsilon, removed),
        "error": None if c is None else mse[1] - c,
    }
    facts["guarantee"] = (
        "the error of the weights is not known for these votes, so there is no bound"
        if c is None
        else (
            f"no member is left with Phi > {beta:g} Phi_min + {facts['gamma']:.4f} (epsilon {epsilon:.4f}); the error is {facts['error']:.4f}, at most "
            f"{facts['bound']:.4f} by theorem 3, {facts['bound_of_weight_removed']:.4f} for the weight removed"
        )
    )

    with run_dir.replacing(
        out
    ) as partial:  # all of it or nothing, so the stage need not be entered as begun
        started = time.time()
        partial.mkdir()
        for path in sorted(run.iterdir()):
            if path.name in ("data", "rewards", "logs"):
                shutil.copytree(path, partial / path.name)
            elif path.name == "continuations.parquet":
                shutil.copy(path, partial)
            elif path.name == "members.json":  # the place of its source is told from here
                found = run_dir.read_json(path)
                run_dir.write_json(
                    partial / path.name,
                    found
                    | {"source": os.path.relpath((run / found["source"]).resolve(), out.resolve())},
                )
            elif path.name in ("base", "joint") or path.name.startswith("member_"):
                (partial / path.name).symlink_to(path.resolve())  # gigabytes
        stages = run_dir.read_json(run / "manifest.json", {"stages": {}})["stages"]
        run_dir.write_json(
            partial / "manifest.json",
            {
                "stages": {
                    name: stages[name] for name in stages if name not in ("weights", "evaluate")
                }
            },
        )
        run_dir.write_json(
            partial / "weights.json",
            [{"k": k, "alpha": pruned.tolist(), "fit": "fixed", "train_mse": mse[1], "kkt": None}],
        )
        run_dir.end_stage(partial, "weights", settings, inputs, started, pruned=facts)
    names = (
        f"member{'s' * (len(facts['removed']) > 1)} {', '.join(map(str, facts['removed']))}"
        if facts["removed"]
        else "no member"
    )
    print(
        f"prune: {names} of {k} removed, weight {removed:.4f} of at most 1/(beta-1) = {1 / (beta - 1):.4f}"
    )
    print(f"prune: {facts['guarantee']}\nprune: {out}")


def main(args):
    run = args.run
    split, k = data.read_split(run, "train"), run_dir.count_members(run)
    rewards = run_dir.read_rewards(run, "train", k, (int(split.response_start[-1]),))
    inputs = data.hashes(run) | {
        f"rewards of member {j}": run_dir.hash_file(run_dir.reward_path(run, j, "train"))
        for j in range(1, k + 1)
    }
    if args.prune:
        prune(run, args.out, args.prune, k, split, rewards, inputs)
        return
    made = run_dir.made_otherwise(run)
    if made in ("hardened", "pruned"):
        raise cli.InputError(
            f"{run / 'weights.json'}: {made} weights found, which stay; those of the run that it was made from are fitted, with --run of that one"
        )
    if (
        made
        and run_dir.read_json(run / "manifest.json")["stages"]["joint"]["settings"]["weights"]
        == "learned"
    ):
        raise cli.InputError(
            f"{run / 'weights.json'}: weights found that were learned with the rewards, which stay; train_joint.py --weights qp leaves them "
            "to be fitted"
        )
    if run_dir.unchanged(run, "weights", {}, inputs, [run / "weights.json"]):
        print(f"weights: {run / 'weights.json'} is up to date, skipped")
        prefixes = run_dir.read_json(run / "weights.json")
    else:
        split = (
            data.counted_pairs(split) or split
        )  # as in evaluate.py; where every pair has one vote, those are all there is
        pairs = len(split.a)
        sums = evaluator.pair_statistics(
            rewards, split.a, split.b, split.p, np.array([0, pairs])
        )  # of all prompts as of one
        q = error_matrix(
            sums["vote_vote"][0] / pairs, sums["vote_p"][0] / pairs, sums["p_p"][0] / pairs
        )
        started = run_dir.begin_stage(run, "weights", {}, inputs)
        prefixes = fit_prefixes(q)
        run_dir.write_json(run / "weights.json", prefixes)
        run_dir.end_stage(run, "weights", {}, inputs, started)
        last = prefixes[-1]
        alpha = " ".join(f"{weight:.3f}" for weight in last["alpha"])
        print(
            f"weights: k={k}, train error {last['train_mse']:.4f}, alpha {alpha}, KKT residual {last['kkt']:.0e}"
        )
    if args.early_stop:
        early_stop(run, k, prefixes, args.early_stop)


def above_two(text):
    """argparse type: a number above two, of which theorem 3 leaves something."""
    value = float(text)
    if not 2 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} found, a number above 2 expected")
    return value


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--run", required=True, type=Path, help="run directory with data/ and rewards/"
    )
    parser.add_argument(
        "--early-stop",
        nargs="?",
        const=1,
        type=cli.natural,
        metavar="PATIENCE",
        help=f"exit with code {STOP} where the last PATIENCE members (1) did not lower the Brier score on the validation prompts",
    )
    parser.add_argument(
        "--prune",
        type=above_two,
        metavar="BETA",
        help="above 2: remove the members farthest from p_hat, of weight at most 1/(BETA-1)",
    )
    parser.add_argument("--out", type=Path, help="of --prune: the pruned run, a new directory")
    args = parser.parse_args(argv)
    if (args.prune is None) != (args.out is None) or args.prune and args.early_stop:
        parser.error("--prune BETA and --out DIR expected together, without --early-stop")
    return args


if __name__ == "__main__":
    cli.run_main(main, parse_args())
