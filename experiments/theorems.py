"""Theorem 1 for one context, and theorem 4, as functions; tests/test_theory.py checks them.

p is the fraction of the annotators that prefer the first response, p* that of the population, and
p_hat the prediction of a mixture.
"""

from itertools import permutations

import numpy as np
from scipy.optimize import linprog

# ---- what n sampled annotators leave unknown


def sampling_error(p_true, n):
    """E (p - p*)^2 = p* (1 - p*) / n of n annotators drawn with replacement: Lemma 1's C of a pair,
    and the expected error of theorem 2's ensemble of k = n drawn annotators with equal weights."""
    return p_true * (1 - p_true) / n


# ---- theorem 4: from the sample to the population


def theorem4(pairs, k, d, delta):
    """Bound, with probability 1 - delta, of |expected - empirical Brier score| for all k-ensembles,
    from this many independent pairs; d: the VC dimension of the comparisons 1{r(y1) >= r(y2)} (of
    linear rewards on l features at most l).

    Both scores are in [0, 1]: the bound is at most 1, which is what fewer than d' pairs give.
    """
    dimension = 20 * (d + 1) * k * np.log(2 * (d + 1) * k)  # d', it bounds the pseudo-dimension
    if pairs < dimension:
        return 1.0
    complexity = np.sqrt(2 * dimension * np.log(np.e * pairs / dimension) / pairs)
    confidence = np.sqrt(np.log(1 / delta) / (2 * pairs))
    return min(1.0, float(complexity + confidence))


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
