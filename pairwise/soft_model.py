"""The soft model: what rewards predict as probabilities, before their votes are made hard.

    p_hat = a + (1 - 2a) sum_c w_c sigmoid(tau (r_c(y1) - r_c(y2)))

The weights w are on the simplex, tau is a scale, and a in [0, 1/2) is a rate of lapses: a voter
flips a coin with probability 2a. extras/harden.py follows p_hat with hard votes;
extras/plurality.py asks whether it takes more than one reward.
"""

from pairwise import weights

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit


def reward_differences(rewards, a, b):
    """r(y1) - r(y2), float64 (K, N); rewards float32 (K, R); a, b (N,): the pairs' responses."""
    return rewards[:, a].astype(np.float64) - rewards[:, b]


def predict(differences, w, tau=1.0, a=0.0):
    """p_hat float64 (N,); differences float64 (M, N), w float64 (M,)."""
    return a + (1 - 2 * a) * (w @ expit(tau * differences))


def fit_mixture(differences, p):
    """The weights w (M,) with the least mean (p_hat - p)^2 where tau = 1 and a = 0."""
    soft, pairs = expit(differences), len(p)
    q = weights.error_matrix(soft @ soft.T / pairs, soft @ p / pairs, p @ p / pairs)
    return weights.simplex_weights(q)


def fit_scale_and_lapses(differences, w, p):
    """(tau, a) with the least mean (p_hat - p)^2."""

    def error(x):
        return np.mean((predict(differences, w, np.exp(x[0]), x[1]) - p) ** 2)

    bounds = [(-4, 4), (0, 0.49)]  # of log tau and a
    starts = ([-1.0, 0.02], [0.0, 0.02], [1.0, 0.02])
    fits = [minimize(error, start, method="Nelder-Mead", bounds=bounds) for start in starts]
    log_tau, a = min(fits, key=lambda fit: fit.fun).x
    return float(np.exp(log_tau)), float(a)
