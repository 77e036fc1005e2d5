"""How K members rank the same n continuations of each of P prompts. Never imports torch.

Higher rewards are better. They may be infinite, and none is NaN.
"""

import re

import numpy as np

# A pattern is matched in capitals or not. A data set with attributes of its own has them in
# stats.json.
ATTRIBUTES = {
    "words": r"\S+",
    "hedging words": r"\b(?:perhaps|maybe|might|may|could|possibly|probably|likely|seems?|appears?"
    r"|depends?|sometimes|often|usually|I think|not sure)\b",
    "list items": r"(?m)^[ \t]*(?:[-*•]|\d+[.)])[ \t]",
    "lines": r"(?m)^.*\S.*$",
    "question marks": r"\?",
    "exclamation marks": "!",
    "digits": r"\d",
}


def attribute_counts(texts, patterns):
    """Count how often patterns, {name: regular expression}, occur in texts, P lists of n str:
    float32 (attributes, P, n)."""
    counts = [
        [[len(re.findall(pattern, text, re.IGNORECASE)) for text in answers] for answers in texts]
        for pattern in patterns.values()
    ]
    return np.array(counts, np.float32).reshape(len(patterns), len(texts), -1)


def distinct(texts):
    """Return the indices of a prompt's texts without those that repeat an earlier one."""
    return np.array([i for i, text in enumerate(texts) if text not in texts[:i]])


def ranks(scores):
    """Rank along the last axis, float64, 1 is the best; equal scores share their mean rank."""
    from scipy.stats import rankdata  # It takes a third of a second, and evaluations need none.

    return rankdata(-scores, axis=-1).astype(np.float64)


def favourites(scores):
    """Return the index of the best along the last axis, of equal ones the first."""
    return scores.argmax(-1)


def win_shares(scores):
    """Return float64 (P, K, K): [x, i, j] is the share of prompt x's other continuations that
    member j ranks below member i's favourite, where equal ones count half. It is 1 where j has the
    same only favourite, and 1/2 where all are equal to j. scores float32 (K, P, n), n >= 2."""
    k, prompts, n = scores.shape
    best = scores[:, np.arange(prompts)[:, None], favourites(scores).T, None]  # (j, x, i, 1)
    others = scores[:, :, None]
    below = (others < best).sum(-1) + ((others == best).sum(-1) - 1) / 2
    return below.transpose(1, 2, 0) / (n - 1)
