"""Do the members find the viewpoints? On simulated populations that have several.

    for S in 0 1 2 3 4 5 6 7 8 9; do
        python experiments/populations.py --run runs/camps_$S --population camps --seed $S; done
    python experiments/viewpoints.py --runs runs/camps_? --out viewpoints.csv        (two minutes)

--out has a row for every member of every ensemble: its mixture weight, and its agreement with each
viewpoint, the share of test pairs on which it votes as the viewpoint's own direction does (a tie
agrees by half). What is printed, a mean over the runs of a population each:

    nearest    the members' agreement with that viewpoint with which it is greatest, by weight
    found      the viewpoints' agreement with that member of the ensemble with which it is greatest
    variation  sum_v |w_v - share_v| / 2, where w_v is the weight of the members whose nearest
               viewpoint is v, and share_v the share of the voters around it; with its 95 % interval
               over the runs (Student's t)

Beside the variants of variants.py stand `random`, k directions at random of equal weight, and
`viewpoints`, the viewpoints themselves, which tells how far they agree with each other.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "extras"))
from pairwise import cli, data, run_dir, weights

import collect
import numpy as np
import plurality
import populations
import torch
import variants
from scipy.stats import t as student

VARIANTS = "fsam_residual", "fsam_centered", "fsam_mixture", "joint", "hardened", "hardened_joint"


def read_viewpoints(run):
    """(population, seed, directions float64 (V, d), shares (V,)) of a run of populations.py."""
    stats, expected = data.read_stats(run), "a run of populations.py with several viewpoints"
    if "population" not in stats:
        raise cli.InputError(f"{run}: no population in data/stats.json, {expected} expected")
    name, seed = stats["population"], stats["seed"]
    rng = populations.random_of(name, seed)
    directions, shares, _ = populations.viewpoints(name, stats["dimension"], rng)
    if len(shares) < 2:
        raise cli.InputError(f"{run}: population {name} found, {expected} expected")
    return name, seed, directions, shares


def agreement(votes, viewpoint_votes):
    """float64 (k, V): the share of pairs on which votes (k, N) and (V, N) are the same."""
    return 1 - np.abs(votes[:, None] - viewpoint_votes).mean(-1)


def votes_of(directions, featured):
    """V_j float64 (k, N) of rewards that are linear in the features; directions float64 (k, d)."""
    rewards = (directions @ featured.features.T).astype(np.float32)
    return weights.member_votes(rewards, featured.split.a, featured.split.b)


def rows_of(run, args):
    """A row for each member of each ensemble on one run."""
    name, seed, directions, shares = read_viewpoints(run)
    test = plurality.read_features(run)["test"]  # The directions are of features as they were.
    own = votes_of(directions, test)
    at_random = np.random.default_rng(seed).normal(size=(args.k, directions.shape[1]))
    at_random = votes_of(at_random, test)
    ensembles = {
        "random": (at_random, np.full(args.k, 1 / args.k)),
        "viewpoints": (own, shares),
    }
    made = variants.variants(plurality.read_run(run, args.seed), args.k, args.seed, args.variants)
    for variant in args.variants:
        ensembles[variant] = made[variant].votes["test"], made[variant].alpha
    return [
        {"population": name, "seed": seed, "variant": variant, "member": j, "weight": float(weight)}
        | {f"agreement_{v}": float(x) for v, x in enumerate(agrees, 1)}
        for variant, (votes, alpha) in ensembles.items()
        for j, (weight, agrees) in enumerate(zip(alpha, agreement(votes, own)), 1)
    ]


def measures(weights, agrees, shares):
    """(nearest, found, variation) of weights (k,), agrees (k, V) and shares (V,)."""
    held = np.bincount(agrees.argmax(1), weights, len(shares))
    found = agrees[weights > 0].max(0).mean()
    return weights @ agrees.max(1), found, np.abs(held - shares).sum() / 2


def summary(rows):
    """{(population, variant): {runs, nearest, found, variation, low, high}} of the rows."""
    ensembles = {}
    for row in rows:
        key = row["population"], row["variant"]
        ensembles.setdefault(key, {}).setdefault(row["seed"], []).append(row)
    table = {}
    for (name, variant), by_seed in ensembles.items():
        shares = populations.viewpoints(name, 1, np.random.default_rng(0))[1]
        columns = ["weight", *(f"agreement_{v}" for v in range(1, len(shares) + 1))]
        each = []
        for members in by_seed.values():
            values = np.array([[float(row[column]) for column in columns] for row in members])
            each.append(measures(values[:, 0], values[:, 1:], shares))
        nearest, found, variation = np.mean(each, 0)
        half, n = np.nan, len(each)  # One run has no interval.
        if n > 1:
            half = student.ppf(0.975, n - 1) * np.std(each, 0, ddof=1)[2] / n**0.5
        table[name, variant] = {"runs": n, "nearest": nearest, "found": found}
        table[name, variant] |= {"variation": variation}
        table[name, variant] |= {"low": variation - half, "high": variation + half}
    return table


def main(args):
    torch.set_num_threads(args.threads)
    rows = [row for run in args.runs for row in rows_of(run, args)]
    if args.out:
        collect.write_csv(args.out, rows)
    for (name, variant), x in summary(rows).items():
        print(
            f"{name:8} {variant:14} runs {x['runs']:2}  nearest {x['nearest']:.3f}  found "
            f"{x['found']:.3f}  variation {x['variation']:.3f} [{x['low']:.3f}, {x['high']:.3f}]"
        )


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--runs", required=True, type=cli.path, nargs="+", help="runs that populations.py made")
    add("--k", type=cli.member_number, default=8, help="members")
    add("--seed", type=cli.seed, default=0, help="of the fits")
    names = [name for name in variants.HARD if name != "hardened_taste"]
    add("--variants", nargs="+", choices=names, default=VARIANTS, help="which ensembles")
    add("--out", type=run_dir.output, help="FILE.csv")
    add("--threads", type=cli.threads, default=1, help="CPU threads")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
