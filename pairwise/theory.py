"""What section 3 of the paper proves, as functions: Lemma 1, theorems 2 to 4, and the single-context case of theorem 1, solved exactly for few responses.

No torch. Votes are 0, 1/2 (a tie) or 1; p is a share of annotators, p_hat a weighted share of members.
"""

from itertools import combinations, permutations

import numpy as np
from scipy.optimize import linprog

# ---- Lemma 1 and theorem 2: what n sampled annotators leave unknown


def irreducible(p, n, ties_as_halves):
    """Unbiased estimate of Lemma 1's C = E (p - p*)^2, the error that even perfect calibration has for n sampled annotators.

    ties_as_halves (N,): tie votes that were counted as half for each side, whose variance is a quarter less each.
    """
    return (p * (1 - p) - ties_as_halves / (4 * n)) / (n - 1)


def sampling_error(p_true, n):
    """E (share - p*)^2 of n annotators drawn with replacement, p*(1-p*)/n, of a pair each: Lemma 1's C where a pair has n annotators, and the
    expected error of theorem 2's ensemble, k = n drawn annotators with equal weights."""
    return p_true * (1 - p_true) / n


def theorem2(k, c=0):
    """Some k-ensemble has at most this calibration error, 1/(4k), and at most this expected Brier score where c is Lemma 1's C."""
    return 1 / (4 * k) + c


# ---- theorem 3: an ensemble without outliers


def outlier_below(phi, phi_min, epsilon):
    """A member with disagreement score phi is a (beta, (beta+1) sqrt(epsilon))-outlier, phi > beta phi_min + (beta+1) sqrt(epsilon), for every beta
    below this number, and for no other. None where phi_min and epsilon are both zero."""
    scale = phi_min + epsilon**0.5
    return (phi - epsilon**0.5) / scale if scale else None


def kept_members(votes, alpha, beta):
    """Which members theorem 3's ensemble keeps, bool (k,): in the order of their distance E |V_j - p_hat|, the farthest are removed as long as their
    weight together is at most 1/(beta-1). Equal distances: the later member counts as farther.

    votes float64 (k, N), alpha float64 (k,) on the simplex, beta above 2, so that something is left. Divided by their sum, the weights that are left
    are the new ensemble's. Where members tie, the theorem holds with phi = E |V_j - p| and phi_min over rewards that never tie: then
    |V_i - V_j| is linear in V_j, as the proof needs.
    """
    distance = np.abs(votes - alpha @ votes).mean(1)
    order = np.argsort(distance, kind="stable")
    kept = np.empty(len(alpha), bool)
    kept[order] = np.cumsum(alpha[order][::-1])[::-1] > 1 / (
        beta - 1
    )  # weight of the member and all that are farther
    return kept


def theorem3(epsilon, removed):
    """Calibration error that an epsilon-calibrated ensemble has at most when members of this weight are removed; the theorem has removed = 1/(beta-1)."""
    return (epsilon**0.5 + removed) ** 2


# ---- theorem 4: from the sample to the population


def theorem4(pairs, k, d, delta):
    """Largest |expected - empirical Brier score| over all k-ensembles, with probability 1 - delta, from this many independent pairs, for a class of
    comparisons 1{r(y1) >= r(y2)} of VC dimension d (linear rewards on l features: at most l).

    Both scores are in [0, 1], so it is never more than 1, which is also what is known from fewer than d' pairs.
    """
    log = np.log
    dimension = 20 * (d + 1) * k * log(2 * (d + 1) * k)  # d', a bound of the pseudo-dimension
    if pairs < dimension:
        return 1.0
    return min(
        1.0,
        float(
            np.sqrt(2 * dimension * log(np.e * pairs / dimension) / pairs)
            + np.sqrt(log(1 / delta) / (2 * pairs))
        ),
    )


# ---- theorem 1's setting: one context, all pairs of m responses


def calibrated_ensemble(p):
    """(orders int (s, m), best first; weights (s,); distance; certificate): the mixture of rankings that is nearest to a preference matrix.

    p float64 (m, m), m from 2 to 5: p[i, j] is the share that prefers i to j, p + p' = 1. distance: sum over i < j of |p_hat - p|, the least of any
    mixture. Zero (at most 1e-9 by rounding) says that p is in the linear ordering polytope and the mixture is perfectly calibrated, with s at most
    m(m-1)/2 + 1 rankings (appendix C.1). Otherwise the certificate y (m, m) proves that no mixture is: sum over i < j of y[i, j] p[i, j] exceeds
    the largest such sum of any ranking by the distance; None where the distance is zero. A linear programme over all m! rankings.

    Raises ValueError for another shape, or shares that are out of range or do not add up to one.
    """
    p = np.asarray(p, np.float64)
    m = len(p)
    if p.shape != (m, m) or not 2 <= m <= 5:
        raise ValueError(f"p: shape {p.shape} found, (m, m) with m from 2 to 5 expected")
    i, j = np.array(list(combinations(range(m), 2))).T
    if (
        not (np.abs(p[i, j] + p[j, i] - 1) <= 1e-9).all()
        or not (np.abs(p[i, j] - 0.5) <= 0.5 + 1e-9).all()
    ):  # NaN fails too
        raise ValueError("p: shares in [0, 1] with p[i, j] + p[j, i] = 1 expected")
    orders = np.array(list(permutations(range(m))))
    place = np.argsort(orders, 1)
    wins = (place[:, i] < place[:, j]).T.astype(
        np.float64
    )  # (pairs, m!): does the ranking have i before j
    pairs, count = wins.shape
    # least sum of over + under, where wins @ weights - over + under = p and the weights sum to one
    rows = np.block(
        [[wins, -np.eye(pairs), np.eye(pairs)], [np.ones((1, count)), np.zeros((1, 2 * pairs))]]
    )
    solved = linprog(
        np.append(np.zeros(count), np.ones(2 * pairs)),
        A_eq=rows,
        b_eq=np.append(p[i, j], 1),
        method="highs-ds",
    )  # simplex: few rankings
    weights, distance = solved.x[:count], max(0.0, solved.fun)
    used = weights > 1e-12
    certificate = np.zeros((m, m))
    certificate[i, j] = solved.eqlin.marginals[:pairs]
    return (
        orders[used],
        weights[used] / weights[used].sum(),
        distance,
        certificate if distance > 1e-9 else None,
    )
