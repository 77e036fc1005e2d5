"""How calibrated the policies are that the members stand for (appendix A): "policy" of metrics.json
and of its diversity. Never imports torch.

The optimal policy of member j is in proportion to pi_0(y | x) exp(r_j(x, y) / beta). Of two
responses it gives the first with probability p_bar_j, and the mixture of all policies with p_bar:

    p_bar_j = sigmoid((r_j(y1) - r_j(y2)) / beta + log pi_0(y1) - log pi_0(y2))
    p_bar = sum_j alpha_j p_bar_j

As beta tends to 0, p_bar tends to p_hat.
"""

from pairwise import metrics, ranking, soft_model, weights

import numpy as np
import scipy  # Not scipy.special: see soft_model.

BETAS = np.logspace(1, -4, 11)  # They reach from the base model to the members' favourites.


def log_mixture(differences, ratio, alpha, beta):
    """Return log p_bar and log (1 - p_bar), float64 (2, N), however near to 0 or 1 p_bar is.

    differences: r_j(y1) - r_j(y2), float64 (K, N); ratio: log pi_0(y1) - log pi_0(y2), float64
    (N,); alpha (K,); beta > 0, infinite for the base alone."""
    margins = differences / beta + ratio
    logs = [-np.logaddexp(0, sign * margins) for sign in (-1, 1)]
    mixed = [scipy.special.logsumexp(log, axis=0, b=alpha[:, None]) for log in logs]
    return np.minimum(mixed, 0)  # Rounding can take a sum of weights above 1.


def distances(scores, texts, alpha):
    """Return |p_bar - p_hat| with each of BETAS, float64 (P, betas), summed over all pairs of a
    prompt's distinct continuations, and the number of these pairs, float64 (P,).

    scores float32 (K, P, n); texts: of `run_dir.read_continuations`; alpha (K,)."""
    sums, pairs = [], []
    for x, (answers, logprob) in enumerate(zip(texts["texts"], texts["logprob"])):
        distinct = ranking.distinct(answers)
        rewards = np.ascontiguousarray(scores[:, x, distinct])
        a, b = np.triu_indices(len(distinct), 1)
        differences = soft_model.reward_differences(rewards, a, b)
        p_hat = weights.p_hat_of(alpha, weights.member_votes(rewards, a, b))
        logprob = np.array(logprob)[distinct]
        ratio = logprob[a] - logprob[b]
        p_bars = [soft_model.predict(differences / beta + ratio, alpha) for beta in BETAS]
        sums.append([np.abs(p_bar.clip(0, 1) - p_hat).sum() for p_bar in p_bars])
        pairs.append(float(len(p_hat)))
    return np.array(sums), np.array(pairs)


def calibration(split, rewards, logprob, alpha):
    """Return the figures of the condition p_bar = p on annotated pairs, by BETAS: how far p_bar is
    from p_hat, and its squared error and cross-entropy against p (appendix E); `base` is the base
    alone, beta infinite, and the ensemble's Brier score is that of beta 0.

    rewards float32 (K, R), logprob (R,), alpha (K,)."""
    differences = soft_model.reward_differences(rewards, split.a, split.b)
    p_hat = weights.p_hat_of(alpha, weights.member_votes(rewards, split.a, split.b))
    ratio, p = logprob[split.a].astype(np.float64) - logprob[split.b], split.p
    sums = []  # of (distance, squared error, cross-entropy), (P, 3) for every beta
    for beta in (*BETAS, np.inf):
        log_first, log_second = log_mixture(differences, ratio, alpha, beta)
        p_bar = np.exp(log_first)
        terms = np.abs(p_bar - p_hat), (p_bar - p) ** 2, -p * log_first - (1 - p) * log_second
        sums.append(metrics.by_prompt(split, np.stack(terms)))
    tops, pairs = np.stack(sums, 1), np.diff(split.pair_start).astype(np.float64)
    names = "distance", "brier", "cross_entropy"
    figures = {name: metrics.Ratio(tops[:, :-1, i], pairs) for i, name in enumerate(names)}
    base = {name: metrics.Ratio(tops[:, -1, i], pairs) for i, name in enumerate(names)}
    return {"beta": BETAS.tolist()} | figures | {"base": base}
