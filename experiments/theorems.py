"""Theorem 1 for one context: the exact ensemble, by a linear program, and what FSAM finds there.

    python experiments/theorems.py --out results/theorem1.csv      (ten seconds)

A row is a population of five rankings, drawn uniformly, of m = 2 to 5 responses, and a --target of
FSAM. exact: the least mean |p_hat - p| of any mixture, 0 as each p is that of a population, and
rankings, how many the linear program needs; l1_K, brier_K: mean |p_hat - p| and (p_hat - p)^2 of
FSAM with K rewards. tests/test_theory.py checks the functions, and makes some of the rows again.

p is the fraction of the annotators that prefer the first response, p* that of the population, and
p_hat the prediction of a mixture.
"""

import csv
import sys
from itertools import permutations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_rm
from pairwise import cli, files, run_dir, weights

import numpy as np
from scipy.optimize import linprog
from scipy.special import expit

STEPS, RATE = 500, 2.0  # of gradient descent on a reward
SIZES = 1, 2, 4, 8
TARGETS = "residual", "centered", "mixture"

# ---- theorem 1 for one context: all pairs of m responses


def calibrated_ensemble(p):
    """The mixture of rankings that is nearest to a preference matrix, by a linear program over all
    m! rankings: (orders int (s, m), best response first; weights (s,); distance; certificate).

    p float64 (m, m), m from 2 to 5: p[i, j] is the fraction that prefers i to j, and p + p' = 1.
    distance: the least sum over i < j of |p_hat - p| of any mixture. Zero (1e-9 with rounding) says
    that p is in the linear ordering polytope: the mixture is perfectly calibrated, by s at most
    m(m-1)/2 + 1 rankings (appendix C.1), and the certificate is None. Otherwise the certificate y
    (m, m) proves that no mixture is: sum over i < j of y[i, j] p[i, j] exceeds the largest such sum
    of any ranking by the distance. Raises ValueError where p is no such matrix.
    """
    p = np.asarray(p, np.float64)
    m = len(p)
    if p.shape != (m, m) or not 2 <= m <= 5:
        raise ValueError(f"p: shape {p.shape} found, (m, m) with m from 2 to 5 expected")
    i, j = np.triu_indices(m, 1)
    adds_up, in_range = np.abs(p[i, j] + p[j, i] - 1) <= 1e-9, np.abs(p[i, j] - 0.5) <= 0.5 + 1e-9
    if not (adds_up & in_range).all():  # NaN is neither.
        raise ValueError("p: shares in [0, 1] with p[i, j] + p[j, i] = 1 expected")
    orders = np.array(list(permutations(range(m))))
    position = np.argsort(orders, 1)
    wins = (position[:, i] < position[:, j]).T.astype(np.float64)  # (pairs, m!): i before j?
    pairs, rankings = wins.shape
    # Minimise sum (over + under) where wins @ weights - over + under = p and sum weights = 1.
    cost = np.append(np.zeros(rankings), np.ones(2 * pairs))
    equalities = np.vstack([np.hstack([wins, -np.eye(pairs), np.eye(pairs)]), 1 - cost])
    # The simplex method, highs-ds, ends at a corner: few rankings have a weight.
    solution = linprog(cost, A_eq=equalities, b_eq=np.append(p[i, j], 1), method="highs-ds")
    weights, distance = solution.x[:rankings], max(0.0, solution.fun)
    used = weights > 1e-12
    certificate = None
    if distance > 1e-9:
        certificate = np.zeros((m, m))
        certificate[i, j] = solution.eqlin.marginals[:pairs]
    return orders[used], weights[used] / weights[used].sum(), distance, certificate


def fsam(p, k, target, rng):
    """FSAM on one context: (votes float64 (k, pairs), [weights float64 (j,) of the first j]).

    p as above, the pairs as of np.triu_indices(m, 1). A reward is a number a response, of which any
    ranking can come; from normal ones (rng) of deviation .02 it descends on train_rm.py's
    (t - sigmoid(r_i - r_j))^2, summed, and the weights are those of fit_weights.py. target: of
    train_rm.TARGETS.
    """
    i, j = np.triu_indices(len(p), 1)
    shares, votes, prefixes = p[i, j], np.empty((0, len(i))), []
    signs = np.eye(len(p))[i] - np.eye(len(p))[j]  # r_i - r_j of each pair is signs @ r.
    for number in range(1, k + 1):
        p_hat = prefixes[-1] @ votes if prefixes else shares
        t = train_rm.TARGETS[target](shares, p_hat, number) if prefixes else shares
        r = rng.normal(size=len(p)) * 0.02
        for _ in range(STEPS):
            q = expit(signs @ r)
            r -= RATE * ((q - t) * q * (1 - q)) @ signs
        votes = np.vstack([votes, signs @ r > 0])
        residuals = votes - shares
        prefixes.append(weights.simplex_weights(residuals @ residuals.T / len(shares)))
    return votes, prefixes


def compared(m, seed, target):
    """A row: the exact solver and FSAM on one population of five rankings of m responses."""
    rng = np.random.default_rng([m, seed])
    position = np.array([rng.permutation(m) for _ in range(5)])
    p = (position[:, :, None] < position[:, None, :]).mean(0) + 0.5 * np.eye(m)
    orders, _, distance, _ = calibrated_ensemble(p)
    votes, prefixes = fsam(p, max(SIZES), target, rng)
    pairs = np.triu_indices(m, 1)
    row = {"m": m, "seed": seed, "target": target, "rankings": len(orders)}
    row["exact"] = distance / len(pairs[0])
    for k in SIZES:
        error = np.abs(prefixes[k - 1] @ votes[:k] - p[pairs])
        row |= {f"l1_{k}": error.mean(), f"brier_{k}": (error**2).mean()}
    return {name: round(x, 6) if isinstance(x, float) else x for name, x in row.items()}


def main(args):
    populations = [(m, seed) for m in range(2, 6) for seed in range(args.populations)]
    rows = [compared(*each, target) for each in populations for target in TARGETS]
    with (
        files.replacing(args.out) as partial,
        open(partial, "w", encoding="utf-8", newline="") as f,
    ):
        writer = csv.DictWriter(f, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"theorems: {len(rows)} rows in {args.out}")


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--out", required=True, type=run_dir.output, metavar="FILE", help="the table, CSV")
    add("--populations", type=cli.natural, default=10, help="of each m")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
