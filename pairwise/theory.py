"""Section 3 of the paper: Lemma 1, theorems 2 and 4, and outliers. Never imports torch.

p is the fraction of the annotators that prefer the first response, p* that of the population.
Theorem 3's ensemble is extras/prune.py's; experiments/theorems.py has theorem 1.
"""

from math import e, log, sqrt

import numpy as np

# ---- Lemma 1 and theorem 2: what n sampled annotators leave unknown


def irreducible(p, n, ties_as_halves):
    """Unbiased estimate (N,) of Lemma 1's C = E (p - p*)^2 in each pair, the error that n sampled
    annotators leave even to perfect calibration.

    ties_as_halves (N,): tie votes counted as half for each side, which have 1/4 less variance each;
    where a side's votes are no whole number there was at least one.
    """
    uneven = np.abs(p * n % 1 - 0.5) < 0.25
    return (p * (1 - p) - np.maximum(ties_as_halves, uneven) / (4 * n)) / (n - 1)


def irreducible_of(split, stats):
    """Lemma 1's C in each pair of a data.Split, float64 (N,), by how its votes arose, as stats of
    stats.json say: `irreducible` of sampled ones, 0 of a whole population's; None where they are no
    independent draws."""
    zero = np.zeros(len(split.p))
    if stats["votes"] != "sampled":
        return zero if stats["votes"] == "population" else None
    return irreducible(split.p, split.n, split.ties if stats["ties"] == "half" else zero)


def theorem2(k, c=0):
    """Some k-ensemble has at most this calibration error, 1/(4k), and at most this expected Brier
    score where c is Lemma 1's C."""
    return 1 / (4 * k) + c


# ---- outliers, of which theorem 3 speaks


def outlier_below(phi, phi_min, epsilon):
    """The number such that a member of disagreement score phi is a (beta, (beta+1) sqrt(epsilon))
    outlier, phi > beta phi_min + (beta+1) sqrt(epsilon), for exactly the beta below it.

    None where phi_min and epsilon are both zero.
    """
    scale = phi_min + epsilon**0.5
    return (phi - epsilon**0.5) / scale if scale else None


# ---- theorem 4: from the sample to the population


def theorem4(pairs, k, d, delta):
    """Bound, with probability 1 - delta, of |expected - empirical Brier score| for all k-ensembles,
    from this many independent pairs; d: the VC dimension of the comparisons 1{r(y1) >= r(y2)} (of
    linear rewards on l features at most l).

    Both scores are in [0, 1]: the bound is at most 1, which is what fewer than d' pairs give.
    """
    dimension = 20 * (d + 1) * k * log(2 * (d + 1) * k)  # d', it bounds the pseudo-dimension
    if pairs < dimension:
        return 1.0
    complexity = sqrt(2 * dimension * log(e * pairs / dimension) / pairs)
    return min(1.0, complexity + sqrt(log(1 / delta) / (2 * pairs)))
