"""Lemma 1 and theorems 2 to 4 where everything is known and each statement can be computed exactly;
the ranking solver against the known facets; and what docs/method.md says of them."""

import csv
import itertools
import math
import sys

from pairwise import theory

import numpy as np
import prune
import pytest
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multinomial

sys.path.insert(0, str(REPOSITORY / "experiments"))
import theorems

seeds = st.integers(0, 2**32 - 1)


def population(rng, annotators, pairs):
    """Votes of everyone on every pair, 0 or 1 (annotators, pairs)."""
    return (rng.random((annotators, pairs)) < rng.random(pairs)).astype(float)


# ---- Lemma 1, theorem 2: every draw of annotators, each as likely as any other


def sampling_error(p_true, n):
    """E (p - p*)^2 of n annotators drawn with replacement: Lemma 1's C of a pair, and the expected
    error of theorem 2's ensemble of k = n drawn annotators with equal weights."""
    return p_true * (1 - p_true) / n


@pytest.mark.parametrize(
    "annotators, n, seed", [(2, 5, 0), (3, 4, 1), (4, 3, 2), (5, 2, 3), (3, 1, 4)]
)
def test_lemma_1_by_all_draws_of_annotators(annotators, n, seed):
    rng = np.random.default_rng(seed)
    votes, p_hat = population(rng, annotators, 6), rng.random(6)
    p_true = votes.mean(0)
    empirical = np.mean(
        [
            (p_hat - votes[list(drawn)].mean(0)) ** 2
            for drawn in itertools.product(range(annotators), repeat=n)
        ],
        0,
    )
    np.testing.assert_allclose(
        empirical, (p_hat - p_true) ** 2 + sampling_error(p_true, n), atol=1e-12
    )
    if n > 1:
        estimates = [
            theory.irreducible(votes[list(drawn)].mean(0), n, 0)
            for drawn in itertools.product(range(annotators), repeat=n)
        ]
        np.testing.assert_allclose(np.mean(estimates, 0), sampling_error(p_true, n), atol=1e-12)


def test_lemma_1_sees_halves_whatever_the_rounding():
    """One of the n votes was a tie, at least, where a side has a half: 1/4 less variance."""
    for n in range(2, 61):
        votes = np.arange(2 * n + 1) / 2
        halves, p = votes % 1, votes / n
        wanted = (p * (1 - p) - halves / (2 * n)) / (n - 1)
        np.testing.assert_allclose(theory.irreducible(p, n, 0), wanted, atol=1e-15)


@pytest.mark.parametrize("annotators, k, seed", [(2, 1, 0), (2, 6, 1), (3, 4, 2), (5, 3, 3)])
def test_theorem_2_by_all_draws_of_annotators(annotators, k, seed):
    votes = population(np.random.default_rng(seed), annotators, 7)
    p_true = votes.mean(0)
    errors = [
        np.mean((votes[list(drawn)].mean(0) - p_true) ** 2)
        for drawn in itertools.product(range(annotators), repeat=k)
    ]
    assert np.mean(errors) == pytest.approx(sampling_error(p_true, k).mean(), abs=1e-12)
    assert min(errors) <= np.mean(errors) <= theory.theorem2(k) and theory.theorem2(
        k, 0.1
    ) == pytest.approx(0.1 + 0.25 / k)


def test_theorem_2_is_tight_for_an_even_split():
    votes = np.array([[1.0], [0.0]])
    errors = [
        (votes[list(drawn)].mean() - 0.5) ** 2 for drawn in itertools.product(range(2), repeat=3)
    ]
    assert np.mean(errors) == pytest.approx(theory.theorem2(3), rel=1e-12)


# ---- theorem 3


def distance(x, y):
    return np.abs(x - y).mean(-1)


def draw_ensemble(rng):
    """Members that never tie, with weights some of which are zero or equal, and the true shares of
    a population that they are more or less near to."""
    k, pairs = int(rng.integers(1, 9)), int(rng.integers(1, 8))
    votes = population(rng, k, pairs)
    for j in range(k):
        if rng.random() < 0.3:
            votes[j] = 1 - votes[rng.integers(k)]
    alpha = (
        rng.dirichlet(np.full(k, rng.choice([0.2, 1, 5])))
        if rng.random() < 0.7
        else np.full(k, 1 / k)
    )
    if rng.random() < 0.3:
        alpha[: k - 1 : 2] = 0
        alpha /= alpha.sum()
    p_true = np.clip(alpha @ votes + rng.choice([0, 0.01, 0.1, 0.4]) * rng.normal(size=pairs), 0, 1)
    return votes, alpha, p_true


@settings(max_examples=250, deadline=None)
@given(seeds, st.sampled_from([2.01, 2.2, 2.5, 3, 4, 6, 11]), st.booleans())
def test_theorem_3_holds_for_random_ensembles(seed, beta, ties):
    """Both statements, exactly: the pairs are the whole distribution, the rewards are all 0/1
    patterns on them (the largest class there is), or the members alone."""
    rng = np.random.default_rng(seed)
    votes, alpha, p_true = draw_ensemble(rng)
    everything = np.array(list(itertools.product([0.0, 1.0], repeat=votes.shape[1])))
    if ties:
        votes[:, rng.integers(votes.shape[1])] = 0.5
    p_hat = alpha @ votes
    epsilon = np.mean((p_hat - p_true) ** 2)
    kept = prune.remaining_members(votes, alpha, beta)
    removed = alpha[~kept].sum()
    assert kept.any() and removed <= 1 / (beta - 1) + 1e-12
    for rewards in (everything, votes) if not ties else (everything,):
        phi_min = distance(rewards, p_true).min()
        outliers = distance(votes, p_true) > beta * phi_min + (beta + 1) * np.sqrt(epsilon) + 1e-12
        assert alpha[outliers].sum() <= 1 / (beta - 1) + 1e-12 and not outliers[kept].any()
        below = [theory.outlier_below(phi, phi_min, epsilon) for phi in distance(votes, p_true)]
        assert all(x is None or (x > beta + 1e-9) <= outlier for x, outlier in zip(below, outliers))
        assert all(
            x is None or (x < beta - 1e-9) <= (not outlier) for x, outlier in zip(below, outliers)
        )
    pruned = alpha * kept / alpha[kept].sum()
    assert np.abs(pruned @ votes - p_hat).max() <= removed + 1e-12
    error = np.mean((pruned @ votes - p_true) ** 2)
    assert (
        error
        <= prune.theorem3(epsilon, removed) + 1e-12
        <= prune.theorem3(epsilon, 1 / (beta - 1)) + 2e-12
    )
    farthest = distance(
        votes, p_hat
    )  # as much as may be removed, and nothing nearer than what is kept
    if not kept.all():
        assert farthest[~kept].min() >= farthest[kept].max() - 1e-12
    last = np.flatnonzero(kept)[np.argsort(farthest[kept], kind="stable")[-1]]
    assert removed + alpha[last] > 1 / (beta - 1) - 1e-12


def test_remaining_members_by_hand():
    votes = np.array(
        [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]], float
    )  # p_hat 3/4, 3/4, 1/2, 1/4: distances 7/16, 5/16, 5/16, 9/16
    assert prune.remaining_members(votes, np.full(4, 0.25), 5).tolist() == [
        True,
        True,
        True,
        False,
    ]  # a weight of 1/4 may go
    assert prune.remaining_members(votes, np.full(4, 0.25), 3).tolist() == [
        False,
        True,
        True,
        False,
    ]
    assert prune.remaining_members(votes, np.full(4, 0.25), 5.1).all()
    assert prune.remaining_members(votes[::-1], np.full(4, 0.25), 3).tolist() == [
        False,
        True,
        True,
        False,
    ]  # a permutation moves with its members
    assert prune.remaining_members(1 - votes, np.full(4, 0.25), 3).tolist() == [
        False,
        True,
        True,
        False,
    ]  # so does the order of the two responses
    assert (
        prune.theorem3(0.04, 0.5) == pytest.approx(0.49)
        and theory.outlier_below(0.5, 0.0, 0.0) is None
    )
    assert (
        theory.outlier_below(0.5, 0.1, 0.01) == pytest.approx(2)
        and theory.outlier_below(0.2, 0.1, 0.09) < 0
    )


# ---- theorem 4


@pytest.mark.parametrize(
    "n, truth, pairs, delta",
    [
        (1, 0.5, 400, 0.5),
        (1, 0.5, 1500, 0.1),
        (1, 0.3, 3000, 0.9),
        (2, 0.5, 300, 0.5),
        (2, 0.1, 300, 0.9),
    ],
)
def test_theorem_4_by_all_samples_of_one_comparison(n, truth, pairs, delta):
    """One triple, rewards for and against: VC dimension 1, p_hat = alpha any number in [0, 1].

    The gap (1 - 2 alpha) times a difference of means, plus one of means of squares, is largest at
    alpha 0 or 1; its distribution over all samples of vote fractions is multinomial."""
    values = np.arange(n + 1) / n
    chance = np.array([math.comb(n, x) * truth**x * (1 - truth) ** (n - x) for x in range(n + 1)])
    counts = np.array(
        [
            (*c, pairs - sum(c))
            for c in itertools.product(range(pairs + 1), repeat=n)
            if sum(c) <= pairs
        ]
    )
    of_alpha = [(values - alpha) ** 2 for alpha in (0, 1)]
    gap = np.max([np.abs(counts @ x / pairs - chance @ x) for x in of_alpha], 0)
    likely = multinomial.pmf(counts, pairs, chance)
    assert likely.sum() == pytest.approx(1)
    for k in (1, 2):
        assert likely[gap > theory.theorem4(pairs, k, 1, delta)].sum() <= delta
    simple = np.sqrt(
        np.log(2 * 2 / delta) / (2 * pairs)
    )  # Hoeffding for two ensembles: the test could fail
    assert likely[gap > simple].sum() <= delta and likely[gap > simple / 20].sum() > delta


def test_theorem_4_by_hand_and_its_limits():
    dimension = 20 * 4 * 2 * math.log(16)  # k = 2, d = 3
    assert theory.theorem4(10**6, 2, 3, 0.05) == pytest.approx(
        math.sqrt(2 * dimension * (1 + math.log(10**6) - math.log(dimension)) / 10**6)
        + math.sqrt(math.log(20) / (2 * 10**6)),
        rel=1e-12,
    )
    bounds = [theory.theorem4(n, 4, 10, 0.05) for n in (1, 10, 10**4, 10**5, 10**7, 10**10)]
    assert bounds[:2] == [1, 1] and bounds == sorted(bounds, reverse=True) and bounds[-1] < 0.01
    assert (
        theory.theorem4(10**6, 4, 10, 0.05)
        < theory.theorem4(10**6, 8, 10, 0.05)
        < theory.theorem4(10**6, 8, 20, 0.05)
    )


# ---- theorem 1's setting


def mixture(orders, weights):
    """The preference matrix of a mixture of rankings, one pair at a time."""
    m = len(orders[0])
    p = np.full((m, m), 0.5)
    for i, j in itertools.permutations(range(m), 2):
        p[i, j] = sum(
            weight
            for order, weight in zip(orders, weights)
            if list(order).index(i) < list(order).index(j)
        )
    return p


def matrix(values, m):
    p = np.full((m, m), 0.5)
    for (i, j), x in zip(itertools.combinations(range(m), 2), values):
        p[i, j], p[j, i] = x, 1 - x
    return p


def worst_cycle(p):
    """Largest p_ij + p_jk + p_ki - 2 over cycles of three: at most zero is all of the polytope for
    m <= 5."""
    return max(
        (p[i, j] + p[j, k] + p[k, i] - 2 for i, j, k in itertools.permutations(range(len(p)), 3)),
        default=-1,
    )


@settings(max_examples=150, deadline=None)
@given(seeds, st.integers(2, 5))
def test_solver_agrees_with_the_three_cycles(seed, m):
    rng = np.random.default_rng(seed)
    p = matrix(
        rng.choice([0, 0.25, 1 / 3, 0.5, 2 / 3, 1], 10)
        if rng.random() < 0.3
        else np.clip(rng.normal(0.5, rng.choice([0.1, 0.3, 1]), 10), 0, 1),
        m,
    )
    orders, weights, far, certificate = theorems.calibrated_ensemble(p)
    assert (far <= 1e-9) == (worst_cycle(p) <= 1e-9) == (certificate is None)
    assert (
        (weights > 0).all()
        and weights.sum() == pytest.approx(1)
        and len(weights) <= m * (m - 1) // 2 + 1
    )
    upper = np.triu_indices(m, 1)
    assert np.abs(mixture(orders, weights) - p)[upper].sum() == pytest.approx(far, abs=1e-9)
    if (
        certificate is not None
    ):  # a sum that no ranking reaches, so no mixture does: weak duality, checked by itself
        best = max(
            (certificate * mixture([order], [1.0]))[upper].sum()
            for order in itertools.permutations(range(m))
        )
        assert (certificate * p)[upper].sum() - best == pytest.approx(far, abs=1e-9) and np.abs(
            certificate
        ).max() <= 1 + 1e-9


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(2, 5))
def test_solver_calibrates_every_population_and_moves_with_the_names(seed, m):
    rng = np.random.default_rng(seed)
    rankings = [rng.permutation(m) for _ in range(rng.integers(1, 8))]
    p = mixture(rankings, rng.dirichlet(np.ones(len(rankings))))
    orders, weights, far, certificate = theorems.calibrated_ensemble(p)
    assert far <= 1e-9 and certificate is None
    np.testing.assert_allclose(mixture(orders, weights), p, atol=1e-9)
    spoiled = matrix(
        np.clip(p[np.triu_indices(m, 1)] + rng.normal(0, 0.5, m * (m - 1) // 2), 0, 1), m
    )
    order = rng.permutation(m)
    distances = [
        theorems.calibrated_ensemble(x)[2]
        for x in (spoiled, spoiled[np.ix_(order, order)], spoiled.T)
    ]  # renamed; everybody's opposite
    np.testing.assert_allclose(distances, distances[0], atol=1e-9)


def test_condorcet_cycle():
    """Two thirds prefer each to the next: three rankings. A whole cycle is a distance of 1 away, by
    reversing one pair."""
    orders, weights, far, _ = theorems.calibrated_ensemble(matrix([2 / 3, 1 / 3, 2 / 3], 3))
    assert (
        far < 1e-12
        and sorted(map(tuple, orders.tolist())) == [(0, 1, 2), (1, 2, 0), (2, 0, 1)]
        and weights == pytest.approx([1 / 3] * 3)
    )
    assert theorems.calibrated_ensemble(matrix([1, 0, 1], 3))[2] == pytest.approx(1)


@pytest.mark.parametrize(
    "p",
    [
        np.eye(3),
        np.full((6, 6), 0.5),
        np.full((2, 3), 0.5),
        [[0.5]],
        [[0.5, 1.5], [-0.5, 0.5]],
        [[0.5, np.nan], [0.5, 0.5]],
    ],
)
def test_what_is_no_preference_matrix_is_refused(p):
    with pytest.raises(ValueError, match="p: "):
        theorems.calibrated_ensemble(p)


# ---- docs/method.md


def table_rows():
    with open(REPOSITORY / "results" / "theorem1.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("target", theorems.TARGETS)
def test_rows_of_theorem_1_are_made_again(target):
    rows = table_rows()
    for m, seed in ((2, 0), (3, 1), (4, 2), (5, 3)):
        wanted = theorems.compared(m, seed, target)
        (row,) = [
            row
            for row in rows
            if (row["m"], row["seed"], row["target"]) == (str(m), str(seed), target)
        ]
        assert row.keys() == wanted.keys()
        for name, value in wanted.items():
            assert name == "target" or float(row[name]) == pytest.approx(value, abs=2e-6), name


def test_fsam_by_hand():
    """Two responses, p = .6: member 1 votes for the first; centered, member 2 for the other."""
    p, rng = matrix([0.6], 2), np.random.default_rng(0)
    votes, prefixes = theorems.fsam(p, 2, "centered", rng)
    assert votes.tolist() == [[1.0], [0.0]] and prefixes[0].tolist() == [1.0]
    assert prefixes[1] == pytest.approx([0.6, 0.4])
    votes, prefixes = theorems.fsam(p, 2, "residual", rng)  # t = -.4: the opposite too
    assert votes.tolist() == [[1.0], [0.0]]
    votes, _ = theorems.fsam(1 - p, 2, "residual", rng)  # 0, then t = .4, below one half: 0 again
    assert votes.tolist() == [[0.0], [0.0]]


def test_the_page_shows_the_table_and_the_bound():
    page, rows = (REPOSITORY / "docs" / "method.md").read_text(encoding="utf-8"), table_rows()
    assert max(float(row["exact"]) for row in rows) < 1e-9
    for m in "2345":
        own = [row for row in rows if row["m"] == m]
        cells = [m, f"{np.mean([int(row['rankings']) for row in own]):.1f}", "0"]
        for target in theorems.TARGETS:
            errors = [float(row["brier_8"]) for row in own if row["target"] == target]
            exact = sum(error < 1e-6 for error in errors)
            cells.append(f"{np.mean(errors):.4f}, {exact} of {len(errors)}".replace("0.", "."))
        assert f"| {' | '.join(cells)} |" in page, cells
    assert theory.theorem4(9413, 8, 4096, 0.05) == theory.theorem4(263256, 8, 4096, 0.05) == 1.0
    assert "N = 9,413, k = 8, d = 4,096 it is 1.0" in page
    assert theory.theorem4(38_900_000, 8, 4096, 0.05) == 1 > theory.theorem4(39e6, 8, 4096, 0.05)
    assert "39 million" in page and "268 million" in page
    assert theory.theorem4(268e6, 8, 4096, 0.05) == pytest.approx(0.5, abs=1e-3)
    assert f"d = 1 it is {theory.theorem4(9413, 1, 1, 0.05):.2f}".replace("0.", ".") in page
