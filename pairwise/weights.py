"""The mixture weights: the point of the probability simplex with the least calibration error.

    minimise  mean (sum_j alpha_j V_j - p)^2   over alpha_j >= 0, sum_j alpha_j = 1     (equation 2)

It is a quadratic program, of the train pairs in fit_weights.py, of resampled ones in evaluate.py.
"""

from pairwise import cli

import numpy as np

# A member that ties on more than this share of the pairs votes 1/2 on most of them, like a coin
# flip: its figures, and even an optimal weight, say little about its reward.
MOSTLY_TIED = 0.5


def tied_words(shares, pairs):
    """Return what names the members whose pairs mostly tie; "" where there are none.

    shares (K,): of the pairs, which each member ties on; pairs: what these are called."""
    tied = [f"{j} ({share:.1%})" for j, share in enumerate(shares, 1) if share > MOSTLY_TIED]
    words = f"exact ties on most {pairs}, which count as votes of 1/2, like a coin flip's: member "
    return words + ", ".join(tied) if tied else ""


def error_matrix(vote_vote, vote_p, p_p):
    """Q = mean (V_i - p)(V_j - p), float64 (k, k): where alpha sums to one, alpha' Q alpha is
    mean (sum_j alpha_j V_j - p)^2, the objective of equation (2).

    vote_vote (k, k): mean V_i V_j; vote_p (k,): mean V_j p; p_p: mean p^2.
    """
    return vote_vote - vote_p[:, None] - vote_p[None, :] + p_p


def simplex_weights(q):
    """argmin of alpha' Q alpha over the simplex, float64 (k,); Q float64 (k, k), symmetric and
    positive semidefinite.

    With Q = L'L, nonnegative least squares minimises |L u|^2 + t^2 (sum u - 1)^2. For any sum s the
    best u is s times the wanted alpha, so alpha = u / sum u is exact, no penalty's approximation.
    Members that vote alike (Q is constant) cannot be told apart: they get uniform weights.
    """
    k = len(q)
    if np.ptp(q) == 0:
        return np.full(k, 1 / k)
    values, vectors = np.linalg.eigh(q)
    root = np.sqrt(np.clip(values, 0, None))[:, None] * vectors.T  # L
    t = np.sqrt(np.trace(q) / k)  # It sets the scale alone.
    u = nonnegative_least_squares(np.vstack([root, np.full((1, k), t)]), np.append(np.zeros(k), t))
    return u / u.sum()


def nonnegative_least_squares(a, b):
    """argmin |A u - b|^2 over u >= 0, float64 (k,), A of any rank: Lawson and Hanson's active set.

    scipy.optimize.nnls (1.15 to 1.17 at least) can return a point that is not optimal where members
    are copies or opposites of others (scipy issue 25389): it did in 28 of 39,175 random problems.
    """
    k = a.shape[1]
    u, free = np.zeros(k), np.zeros(k, bool)

    def unconstrained(on):
        minimum = np.zeros(k)
        minimum[on] = np.linalg.lstsq(a[:, on], b, rcond=None)[0]
        return minimum

    for _ in range(100 * k):  # A few rounds per member are needed; rounding cannot make it endless.
        gain = np.where(free, -np.inf, a.T @ (b - a @ u))
        j = gain.argmax()
        if gain[j] <= 1e-14 * np.sum(a * a):
            break
        target = unconstrained(free | (np.arange(k) == j))
        if target[j] <= 0:  # The largest gain was rounding.
            break
        free[j] = True
        while (target[free] <= 0).any():
            # u goes towards the target until a coordinate reaches zero, which is then fixed there.
            negative = np.flatnonzero(free & (target <= 0))
            steps = u[negative] / (u[negative] - target[negative])
            u = u + steps.min() * (target - u)
            u[negative[steps.argmin()]] = 0
            free &= u > 0
            u[~free] = 0
            target = unconstrained(free)
        u = target
    return u


def member_votes(rewards, a, b):
    """V_j of each pair (section 2), float64 (K, N): 1 where member j prefers a, 0 where b, 1/2 on a
    tie. rewards float32 (K, R); a, b (N,): indices into the R responses."""
    return cli.import_evaluator().votes(rewards, a, b) / 2


def p_hat_of(alpha, votes):
    """p_hat = sum_j alpha_j V_j of each pair (section 2), float64 (N,), in [0, 1]; alpha (K,),
    votes V_j float64 (K, N), as of `member_votes`.

    Weights sum to one up to rounding alone: members that all vote alike give exactly their vote.
    In a mean square of what is not shown `alpha @ votes` serves, the same but for rounding.
    """
    votes = votes[alpha > 0]
    alike = (votes == votes[0]).all(0)
    return np.where(alike, votes[0], np.clip(alpha[alpha > 0] @ votes, 0, 1))


def kkt_residual(q, alpha):
    """How far alpha is from optimal, zero at the optimum: with g = 2 Q alpha, the larger of the
    duality gap alpha'g - min_j g_j, which bounds the excess training error, and the violation of
    the constraints."""
    gradient = 2 * q @ alpha
    gap = alpha @ (gradient - gradient.min())
    return float(max(gap, abs(alpha.sum() - 1), -alpha.min(), 0.0))
