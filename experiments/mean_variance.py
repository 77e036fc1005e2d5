"""Mean-and-variance rewards, and the hard ensembles that follow them.

A response's utility is normal, of mean mu and deviation s, drawn anew by every voter:

    p_hat = Phi((mu(y1) - mu(y2)) / sqrt(s(y1)^2 + s(y2)^2))

as in distributional preference learning (Siththaranjan et al., ICLR 2024) and, trained on vote
fractions, in "Variance-aware Reward Modeling with Anchor Guidance" (arXiv 2605.11865, here without
anchors). mu and log s are linear in the features that all variants have; log s has no intercept,
as the scale of mu takes its place.

Members are deterministic rewards. Three ensembles of k follow p_hat; none reads a vote:

    quantile    of 65 quantiles r_z = mu + z s, k and their weights picked. With z ~ N(0, 1) they
                vote for y1 with the probability Phi((mu(y1) - mu(y2)) / |s(y1) - s(y2)|). As
                |s1 - s2| <= sqrt(s1^2 + s2^2), that is never nearer to 1/2 than p_hat, and 0 or 1
                where the deviations are equal, whatever k: one z for all responses is one mood of
                a voter, where p_hat has a mood for each response
    moods       of 512 rewards r_w = mu + s w'x/|x| with w ~ N(0, I) and mu itself, likewise. They
                vote with the probability Phi((mu(y1) - mu(y2)) / |s(y1) x1/|x1| - s(y2) x2/|x2||),
                which is p_hat where x1 and x2 are orthogonal; but the mean of k of them is off by
                the variance p_hat (1 - p_hat) / k
    levels      of the levels (harden.py, layout `fitted`) of five quantiles, likewise
"""

from pairwise import levels, soft_model

import harden
import numpy as np
import plurality
import torch
from scipy.special import log_ndtr, logit

LAYOUTS = "quantile", "moods", "levels"
SPREADS = 0.0, 0.3, 1.0  # of log s; at 0 all deviations are equal
QUANTILES = np.linspace(-4, 4, 65)
LEVELLED = np.linspace(-1, 1, 5)


def fit(train, l2, spread, loss, seed):
    """Weights (2, d) of mu and log s; loss: "mse" or "bce", of p_hat against the vote fractions.

    The penalty l2 is on log s / spread, so a larger spread leaves the deviations freer.
    """
    p = torch.from_numpy(train.split.p)

    def error(rewards_a, rewards_b, _):
        (mu_a, s_a), (mu_b, s_b) = rewards_a.T, rewards_b.T
        z = (mu_a - mu_b) * torch.exp(-torch.logaddexp(2 * spread * s_a, 2 * spread * s_b) / 2)
        if loss == "mse":
            return (torch.special.ndtr(z) - p).square().sum()
        return -(p * torch.special.log_ndtr(z) + (1 - p) * torch.special.log_ndtr(-z)).sum()

    d = train.features.shape[1]
    start = np.random.default_rng(seed).normal(size=(2, d)) / np.sqrt(d)
    start[1] = 0
    return plurality.fit(train, error, 2, l2, seed, (start, np.zeros(0)))[0] * [[1], [spread]]


def log_odds(rewards, a, b):
    """log(p_hat / (1 - p_hat)), float64 (1, N); rewards float32 (2, R): mu and log s."""
    mu, s = rewards.astype(np.float64)
    z = (mu[a] - mu[b]) * np.exp(-np.logaddexp(2 * s[a], 2 * s[b]) / 2)
    return (log_ndtr(z) - log_ndtr(-z))[None]


def soft_fit(chosen, weights, splits):
    """The plurality.SoftFit of these weights (2, d), scale and lapses fitted on valid."""
    odds = {
        name: log_odds(rewards, splits[name].split.a, splits[name].split.b)
        for name, rewards in plurality.rewards_of(weights, splits).items()
    }
    tau, lapses = soft_model.fit_scale_and_lapses(odds["valid"], [1.0], splits["valid"].split.p)
    p_hat = {name: soft_model.predict(x, [1.0], tau, lapses) for name, x in odds.items()}
    return plurality.SoftFit(chosen, weights, p_hat)


def soft(splits, seed):
    """The best SoftFit over losses, spreads and L2 penalties."""
    return plurality.best_on_valid(
        [
            soft_fit(
                f"{loss}, spread {spread:g}, l2 {l2:g}",
                fit(splits["train"], l2, spread, loss, seed),
                splits,
            )
            for loss in ("mse", "bce")
            for spread in SPREADS
            for l2 in plurality.L2_PENALTIES
        ],
        splits,
    )


def candidates(weights, features, layout):
    """Deterministic rewards mu + s t, float32 (P, R), for weights (2, d) and features (R, d)."""
    mu, log_s = plurality.rewards_of(weights, {"": plurality.Featured(None, features)})[""]
    if layout == "moods":
        w = np.random.default_rng(0).normal(size=(512, features.shape[1]))
        w[0] = 0
        t = w @ (features / np.linalg.norm(features, axis=1, keepdims=True)).T
    else:
        t = (QUANTILES if layout == "quantile" else LEVELLED)[:, None]
    return (mu + t * np.exp(log_s)).astype(np.float32)


def ensemble(fitted, splits, k, layout):
    """({split: votes (k, N)}, alpha (k,)) of the members that follow a SoftFit of `soft`."""
    split, p_hat = splits["train"].split, fitted.p_hat["train"]
    last = len(p_hat) - 1
    some = np.unique(np.linspace(0, last, min(last + 1, harden.MOST_PAIRS)).astype(int))
    a, b, p_hat = split.a[some], split.b[some], p_hat[some]
    rewards = {name: candidates(fitted.weights, x.features, layout) for name, x in splits.items()}
    train = rewards["train"]
    if layout == "levels":  # The grid's widths are in log-odds.
        odds, middle = np.clip(logit(p_hat), -10, 10), train[len(train) // 2]
        scale = float(np.abs(odds).mean() / np.abs(middle[a] - middle[b]).mean())
        model = soft_model.SoftModel(range(1, len(train) + 1), None, scale, 0.0)
        formulas, alpha = harden.ensemble_of_levels(model, train, a, b, p_hat, k)
    else:
        formulas = [levels.formula(member, 1.0) for member in range(1, len(train) + 1)]
        off = harden.hardened_votes(formulas, train, a, b) - p_hat
        chosen, alpha = harden.pick(off @ off.T / len(p_hat), k)
        formulas = [formulas[i] for i in chosen]
    return {
        name: harden.hardened_votes(formulas, rewards[name], x.split.a, x.split.b)
        for name, x in splits.items()
    }, alpha
