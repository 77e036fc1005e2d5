"""Ranked continuations against brute force."""

from pairwise import diversity
from pairwise.ranking import (
    ATTRIBUTES,
    attribute_counts,
    distinct,
    favourites,
    ranks,
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


def texts_of(prompts):
    """Two continuations of each prompt."""
    return {
        "prompt_id": list(prompts),
        "messages": [[{"role": "user", "content": f"{prompt}?"}] for prompt in prompts],
        "texts": [["yes", "no"]] * len(prompts),
        "logprob": None,
    }


def test_two_continuations_have_favourites():
    scores = np.array([[[1, 0]], [[0, 1]]], np.float32)
    measured = diversity.measure(scores, texts_of("a"), np.full(2, 0.5), {"words": "yes"}, 10, 0)
    assert measured["favourites"] == [
        {"prompt_id": "a", "prompt": "a?", "disagreement": 1, "texts": ["yes", "no"]}
    ]


def test_one_continuation_has_no_rank():
    texts = texts_of("ab") | {"texts": [["yes"], ["no"]]}
    scores = np.zeros((2, 2, 1), np.float32)
    measured = diversity.measure(scores, texts, np.full(2, 0.5), {"words": "yes"}, 10, 0)
    assert measured["win"] == measured["kendall_tau"] == [[None, None], [None, None]]
    assert measured["constant_rankings"] == [2, 2] and measured["favourites"] == []


def test_prompts_of_equal_disagreement_but_for_rounding_stay_in_order():
    scores = np.zeros((2, 4, 2), np.float32)
    wins = 0.3 - 1e-15 * np.arange(4)[:, None, None] * np.ones((2, 2))
    cases = diversity.favourites(scores, texts_of("abcd"), wins)
    assert [case["prompt_id"] for case in cases] == ["a", "b", "c"]
    assert cases[0]["disagreement"] < cases[2]["disagreement"]


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
