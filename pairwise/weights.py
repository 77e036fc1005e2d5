"""The mixture weights that minimise the squared error of p_hat = sum_j alpha_j V_j: a quadratic program on the simplex (equation 2 in alpha).

fit_weights.py solves it for the train pairs; evaluate.py --refit for resampled ones.
"""

import numpy as np


def error_matrix(vote_vote, vote_p, p_p):
    """Q float64 (k, k) with alpha' Q alpha = mean (p_hat - p)^2 wherever sum alpha = 1: Q = mean (V_i - p)(V_j - p).

    vote_vote (k, k): mean V_i V_j; vote_p (k,): mean V_j p; p_p: mean p^2.
    """
    return vote_vote - vote_p[:, None] - vote_p[None, :] + p_p


def simplex_weights(q):
    """argmin of alpha' Q alpha over the simplex, float64 (k,); q float64 (k, k), symmetric and positive semidefinite.

    Nonnegative least squares finds u = argmin |L u|^2 + t^2 (sum u - 1)^2 with Q = L'L: for any sum s the best u is s times the wanted
    alpha, so alpha = u / sum u is exact, not a penalty's approximation. t only sets the scale. Members that vote alike (all entries of Q
    equal) cannot be told apart: uniform weights.
    """
    k = len(q)
    if np.ptp(q) == 0:
        return np.full(k, 1 / k)
    values, vectors = np.linalg.eigh(q)
    root = np.sqrt(np.clip(values, 0, None))[:, None] * vectors.T
    t = np.sqrt(np.trace(q) / k)
    u = nonnegative_least_squares(np.vstack([root, np.full((1, k), t)]), np.append(np.zeros(k), t))
    return u / u.sum()


def nonnegative_least_squares(a, b):
    """argmin |A u - b|^2 over u >= 0, float64 (k,), for A of any rank: Lawson and Hanson's active set method.

    scipy.optimize.nnls (1.15 to 1.17 at least) can return a point that is not optimal where a member is as good in the mixture as out of
    it, which copies and opposites of members bring about (scipy issue 25389): seen in 28 of 39,175 random problems.
    """
    k = a.shape[1]
    u, free = np.zeros(k), np.zeros(k, bool)

    def best_on(members):
        found = np.zeros(k)
        found[members] = np.linalg.lstsq(a[:, members], b, rcond=None)[0]
        return found

    for _ in range(100 * k):  # a few per member are needed; rounding cannot make it endless
        gain = np.where(free, -np.inf, a.T @ (b - a @ u))
        j = gain.argmax()
        if gain[j] <= 1e-14 * np.sum(a * a):
            break
        grown = free | (np.arange(k) == j)
        wanted = best_on(grown)
        if wanted[j] <= 0:  # the largest gain was rounding
            break
        free = grown
        while (
            wanted[free] <= 0
        ).any():  # go towards the wanted point as far as all stay positive, and drop who reaches zero
            low = np.flatnonzero(free & (wanted <= 0))
            steps = u[low] / (u[low] - wanted[low])
            u = u + steps.min() * (wanted - u)
            u[low[steps.argmin()]] = 0
            free &= u > 0
            u[~free] = 0
            wanted = best_on(free)
        u = wanted
    return u


def kkt_residual(q, alpha):
    """How far alpha is from optimal: max of the duality gap alpha'g - min_j g_j with g = 2 Q alpha (an upper bound on the excess training
    error), of the slackness |alpha_j (g_j - min g)| of each member, and of the constraints' violation. Zero at the optimum."""
    gradient = 2 * q @ alpha
    slack = gradient - gradient.min()
    return float(max(alpha @ slack, (alpha * slack).max(), abs(alpha.sum() - 1), -alpha.min(), 0.0))
