"""Ranked continuations: what the members make of the same n answers to a prompt. Pure functions, without torch.

Higher rewards are better, infinite ones included; none is NaN.
"""

import re

import numpy as np
from scipy.special import expit
from scipy.stats import rankdata

# What shows in a text: how often its pattern is found, capitals or not. A data set with attributes of its own has theirs in stats.json.
ATTRIBUTES = {
    "words": r"\S+",
    "hedging words": r"\b(?:perhaps|maybe|might|may|could|possibly|probably|likely|seems?|appears?|depends?|sometimes|often|usually|I think|not sure)\b",
    "list items": r"(?m)^[ \t]*(?:[-*•]|\d+[.)])[ \t]",
    "lines": r"(?m)^.*\S.*$",
    "question marks": r"\?",
    "exclamation marks": "!",
    "digits": r"\d",
}


def attribute_counts(texts, patterns):
    """float32 (attributes, prompts, n): how often each pattern, {name: regular expression}, is found in each text; texts: lists of n str."""
    found = [
        [[len(re.findall(pattern, text, re.IGNORECASE)) for text in row] for row in texts]
        for pattern in patterns.values()
    ]
    return np.array(found, np.float32).reshape(len(patterns), len(texts), -1)


def distinct(texts):
    """Indices of a prompt's texts without those that repeat an earlier one."""
    return np.array(sorted({text: i for i, text in reversed(list(enumerate(texts)))}.values()))


def ranks(scores):
    """float64 (.., n): each member's rank of each continuation, 1 the best, equal ones share their mean; scores float32 (.., n)."""
    return rankdata(-scores, axis=-1).astype(np.float64)


def favourites(scores):
    """int (..,): the index of the best continuation, of equals the first; scores (.., n)."""
    return scores.argmax(-1)


def win_shares(scores):
    """float64 (prompts, K, K): [x, i, j] is the share of prompt x's other continuations that member j ranks below member i's favourite, equals
    counting half: 1 where it is j's only favourite too, 1/2 where it is any to j. scores float32 (K, prompts, n), n >= 2."""
    k, prompts, n = scores.shape
    rank, best = ranks(scores), favourites(scores)
    return (n - rank[:, np.arange(prompts)[:, None], best.T].transpose(1, 2, 0)) / (
        n - 1
    )  # from (j, x, i) to (x, i, j)


def reward_mixture(scores, alpha):
    """p_hat, the weighted share of members that prefer y1 to y2, of every pair of a prompt's continuations: as `policy_mixture`, which tends to it as
    beta tends to 0."""
    a, b = np.triu_indices(scores.shape[1], 1)
    return alpha @ ((scores[:, a] > scores[:, b]) * 0.5 + (scores[:, a] >= scores[:, b]) * 0.5)


def policy_mixture(scores, logprob, alpha, beta):
    """Probability that the mixture of the members' optimal policies prefers y1 to y2 (appendix A), of every pair of a prompt's continuations:

        p_bar_j = sigmoid((r_j(y1) - r_j(y2)) / beta + log pi_0(y1) - log pi_0(y2)),     p_bar = sum_j alpha_j p_bar_j

    scores (K, n), logprob (n,): log pi_0; alpha (K,); beta > 0, inf: the base alone. -> float64 (n (n-1) / 2,), ordered as itertools.combinations.
    """
    a, b = np.triu_indices(len(logprob), 1)
    scores = np.asarray(scores, np.float64)
    with np.errstate(invalid="ignore"):
        margin = np.nan_to_num(scores[:, a] - scores[:, b])  # of equal infinite rewards: 0
    return alpha @ expit(margin / beta + (logprob[a] - logprob[b]))
