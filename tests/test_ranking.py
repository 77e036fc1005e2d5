"""Ranked continuations against brute force."""

import itertools
import math

from pairwise.ranking import (
    ATTRIBUTES,
    attribute_counts,
    distinct,
    favourites,
    policy_mixture,
    ranks,
    reward_mixture,
    win_shares,
)

import numpy as np
import pytest


@pytest.fixture(scope="module")
def scores():
    """Three members, four prompts, six continuations, with ties and infinite rewards."""
    scores = np.random.default_rng(0).integers(-2, 3, (3, 4, 6)).astype(np.float32)
    scores[0, 0, 2], scores[1, 1, 3] = np.inf, -np.inf
    return scores


def test_ranks_and_favourites(scores):
    rank, best = ranks(scores), favourites(scores)
    for j, x in np.ndindex(3, 4):
        row = scores[j, x].tolist()
        assert rank[j, x].tolist() == [
            sum(other > r for other in row) + (sum(other == r for other in row) + 1) / 2
            for r in row
        ]
        assert best[j, x] == row.index(max(row))


def test_win_matrix_by_counting(scores):
    shares = win_shares(scores)
    for x, i, j in np.ndindex(4, 3, 3):
        mine, theirs = scores[i, x].tolist(), scores[j, x].tolist()
        chosen = mine.index(max(mine))
        others = [theirs[y] for y in range(6) if y != chosen]
        assert shares[x, i, j] == pytest.approx(
            sum((y < theirs[chosen]) + (y == theirs[chosen]) / 2 for y in others) / 5, abs=1e-15
        )
    opposite = np.random.default_rng(1).permutation(60).reshape(1, 10, 6).astype(np.float32)
    assert win_shares(np.concatenate([opposite, -opposite])).mean(0).tolist() == [[1, 0], [0, 1]]


def test_policy_mixture_by_definition(scores):
    logprob, alpha = np.random.default_rng(2).normal(-20, 3, 6), np.array([0.5, 0.3, 0.2])
    finite = scores[:, 2].astype(np.float64)

    def preferred(a, b, beta):  # softmax over the pair, as the paper has it before the sigmoid
        total = 0
        for j, weight in enumerate(alpha):
            one, other = (math.exp(logprob[y]) * math.exp(finite[j, y] / beta) for y in (a, b))
            total += weight * one / (one + other)
        return total

    pairs = list(itertools.combinations(range(6), 2))
    for beta in (0.3, 1, 10):
        np.testing.assert_allclose(
            policy_mixture(finite, logprob, alpha, beta),
            [preferred(a, b, beta) for a, b in pairs],
            rtol=1e-12,
        )
    order = np.array([3, 0, 5, 1, 4, 2])
    moved = dict(
        zip(
            itertools.combinations(range(6), 2),
            policy_mixture(finite[:, order], logprob[order], alpha, 2),
        )
    )
    for (a, b), value in zip(pairs, policy_mixture(finite, logprob, alpha, 2)):
        one, other = order.tolist().index(a), order.tolist().index(b)
        assert (moved[one, other] if one < other else 1 - moved[other, one]) == pytest.approx(
            value, abs=1e-14
        )


def test_policy_mixture_at_its_limits():
    rng = np.random.default_rng(3)
    scores, logprob, alpha = (
        rng.normal(size=(3, 8)).astype(np.float32),
        rng.normal(-30, 5, 8),
        np.array([0.2, 0.3, 0.5]),
    )
    pairs = list(itertools.combinations(range(8), 2))
    votes = [alpha @ (scores[:, a] > scores[:, b]) for a, b in pairs]
    np.testing.assert_allclose(policy_mixture(scores, logprob, alpha, 1e-9), votes, atol=1e-12)
    np.testing.assert_allclose(reward_mixture(scores, alpha), votes, atol=1e-12)
    assert reward_mixture(np.array([[1, 1, np.inf, np.inf]]), np.ones(1)).tolist() == [
        0.5,
        0,
        0,
        0,
        0,
        0.5,
    ]
    base = [1 / (1 + math.exp(logprob[b] - logprob[a])) for a, b in pairs]
    np.testing.assert_allclose(policy_mixture(scores, logprob, alpha, np.inf), base, rtol=1e-12)
    np.testing.assert_allclose(policy_mixture(scores, logprob, alpha, 1e12), base, rtol=1e-9)
    infinite = np.array([[np.inf, np.inf, 0, -np.inf]])
    np.testing.assert_allclose(
        policy_mixture(infinite, np.log([3, 1, 1, 1.0]), np.ones(1), 1), [0.75, 1, 1, 1, 1, 1]
    )


def test_attributes_of_texts():
    texts = [["Perhaps it is so. Maybe not!", "- one\n- two 2\n\n3. three?"], ["", "perhapsy"]]
    found = dict(zip(ATTRIBUTES, attribute_counts(texts, ATTRIBUTES).tolist()))
    assert found == {
        "words": [[6, 7], [0, 1]],
        "hedging words": [[2, 0], [0, 0]],
        "list items": [[0, 3], [0, 0]],
        "lines": [[1, 3], [0, 1]],
        "question marks": [[0, 1], [0, 0]],
        "exclamation marks": [[1, 0], [0, 0]],
        "digits": [[0, 2], [0, 0]],
    }
    assert distinct(["b", "a", "b", "c", "a"]).tolist() == [0, 1, 3]
