"""How the members rank the candidates for one prompt. Never imports torch."""

import numpy as np
from scipy.stats import rankdata


def ranks(scores):
    """Rank of every candidate in every member's ranking, float64 (K, n): 1 is best, equal scores share their mean rank. scores: float32 (K, n)."""
    return rankdata(-scores, axis=1)


def favourites(scores):
    """The candidate that each member ranks first, int64 (K,); of equal ones the first. scores: float32 (K, n)."""
    return np.argmax(scores, axis=1)
