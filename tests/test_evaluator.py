"""The compiled evaluator against brute force, scipy and malformed calls, on this CPU's paths."""

import inspect
import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

from pairwise import evaluator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2, kendalltau

seeds = st.integers(0, 2**32 - 1)
SHARE = float(
    os.environ.get("EVALUATOR_TESTS", 1)
)  # of the random cases; tests/sanitize.sh takes fewer


def cases(count):
    return settings(max_examples=max(1, int(count * SHARE)), deadline=None)


def offers(path):
    try:
        evaluator.kendall_tau(np.zeros((1, 0, 0)), path=path)
    except ValueError:
        return False
    return True


PATHS = [path for path in ("portable", "avx2", "avx512") if offers(path)]
STATISTICS = [
    "pairs",
    "decided",
    "ties",
    "vote",
    "majority",
    "vote_vote",
    "disagreement",
    "p",
    "p_p",
    "vote_p",
]
VALUES = np.array(
    [-np.inf, -2, -1e-45, -0.0, 0.0, 1e-45, 1, 1 + 2**-23, np.inf], np.float32
)  # +-1e-45: denormal


def in_a_process(code):
    """Run Python code that may crash, with this session's path; return what it printed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 0, (done.returncode, done.stderr.decode()[-2000:])
    return done.stdout.decode()


def draw_pairs(seed):
    """Arguments of pair_statistics with many ties, prompts without pairs, and empty cases."""
    rng = np.random.default_rng(seed)
    k, responses = rng.integers(1, 11), rng.integers(1, 30)
    prompt_start = np.concatenate([[0], np.cumsum(rng.integers(0, 7, rng.integers(0, 6)))])
    n = prompt_start[-1]
    rewards = rng.choice(VALUES, (k, responses)).astype(rng.choice([np.float32, np.float64]))
    a, b = (rng.integers(0, responses, n, dtype=rng.choice([np.int32, np.int64])) for _ in range(2))
    return rewards, a, b, rng.integers(0, 8, n) / rng.choice([7, 8], n), prompt_start


def brute_votes(rewards, a, b):
    return np.where(
        rewards[:, a] > rewards[:, b], 1.0, np.where(rewards[:, a] < rewards[:, b], 0.0, 0.5)
    )


def added(values, less_half_of=0.0):
    """Sum over the last axis, in the documented order.

    That is one by one in pieces of 16,384, then piece by piece.
    """
    less = np.broadcast_to(less_half_of, values.shape)
    pieces = [
        np.cumsum(values[..., part], axis=-1)[..., -1]
        - 0.5 * np.cumsum(less[..., part], axis=-1)[..., -1]
        for part in (slice(i, i + 16384) for i in range(0, values.shape[-1], 16384))
    ]
    return np.cumsum(pieces, axis=0)[-1] if pieces else np.zeros(values.shape[:-1])


def brute_statistics(rewards, a, b, p, prompt_start, path=None, threads=None):
    rows = []
    for begin, end in zip(prompt_start[:-1], prompt_start[1:]):
        v, q = brute_votes(rewards, a[begin:end], b[begin:end]), p[begin:end]
        decided = q != 0.5
        rows.append({
            "pairs": end - begin, "decided": decided.sum(), "ties": (v == 0.5).sum(1),
            "p": added(q), "p_p": added(q * q),
            "vote": v.sum(1), "vote_p": added((v > 0) * q, (v == 0.5) * q),
            "vote_vote": (v[:, None] * v[None]).sum(2),
            "disagreement": np.abs(v[:, None] - v[None]).sum(2),
            "majority": np.where(v == 0.5, 0.5, (v > 0.5) == (q > 0.5))[:, decided].sum(1),
        })  # fmt: skip
    return {name: np.array([row[name] for row in rows]) for name in STATISTICS}


def check_statistics(*arguments, threads=(0, 1, 3)):
    """Every path and number of threads, to the last bit."""
    k, prompts = len(arguments[0]), len(arguments[4]) - 1
    want = brute_statistics(*arguments)
    shapes = {
        "vote": (k,),
        "vote_p": (k,),
        "ties": (k,),
        "majority": (k,),
        "vote_vote": (k, k),
        "disagreement": (k, k),
    }
    for path in PATHS:
        for number in threads:
            got = evaluator.pair_statistics(*arguments, path=path, threads=number)
            assert set(got) == set(STATISTICS)
            for name in got:
                assert got[name].shape == (prompts, *shapes.get(name, ()))
                assert got[name].dtype == (
                    np.int64 if name in ("pairs", "decided", "ties") else np.float64
                )
                assert not prompts or np.array_equal(got[name], want[name]), (name, path, number)


@cases(300)
@given(seeds)
def test_statistics_and_votes_equal_brute_force(seed):
    rewards, a, b, p, prompt_start = draw_pairs(seed)
    check_statistics(rewards, a, b, p, prompt_start)
    votes = evaluator.votes(rewards, a, b)
    assert votes.dtype == np.uint8 and np.array_equal(votes / 2, brute_votes(rewards, a, b))


@pytest.mark.parametrize("rewards_type", [np.float32, np.float64])
@pytest.mark.parametrize(
    "a_type, b_type", [(x, y) for x in (np.int32, np.int64) for y in (np.int32, np.int64)]
)
@pytest.mark.parametrize("ties", [False, True])
def test_statistics_at_the_borders_of_blocks(rewards_type, a_type, b_type, ties):
    """Pairs are around 64 (a word), 256 (a chunk) and 16,384 (a piece), members around 8."""
    rng = np.random.default_rng(0)
    counts = (0, 1, 2, 3, 4, 5, 63, 64, 65, 127, 129, 255, 256, 257, 511, 513)
    for n in (*counts, *((16383, 16384, 16385, 33000) if ties else ())):
        k, responses = (
            rng.choice([1, 3, 7, 8, 9, 16, 17] if n < 1000 else [1, 9]),
            rng.choice([2, 2 * n + 1, 5000]),
        )
        rewards = (
            rng.permuted(np.tile(np.arange(responses), (k, 1)), axis=1) % (9 if ties else responses)
            - 4.0
        )
        a, b = rng.integers(0, responses, (2, n))
        if not ties:
            b = np.where(a == b, (a + 1) % responses, b)
        a[:1], b[-1:] = responses - 1, 0
        p = rng.choice(
            [0, 1, 0.5, 0.3, 1 / 3, 5e-324, np.nextafter(0.5, 0), np.nextafter(0.5, 1)], n
        )
        typed = rewards.astype(rewards_type), a.astype(a_type), b.astype(b_type)
        check_statistics(*typed, p, np.array([0, n]), threads=(0, 1, 2, 5))


def test_statistics_of_long_and_short_prompts():
    """Prompts in pieces between prompts that share one, and more work than a thread takes alone."""
    rng = np.random.default_rng(0)
    start = np.concatenate(
        [[0], np.cumsum([0, 28, 20_000, 1, 0, 16_384, 16_385, 40_000, 5, 16_000, 300, 300, 0])]
    )
    rewards = rng.normal(size=(3, 4000)).astype(np.float32).round(2)
    a, b = rng.integers(0, 4000, (2, start[-1]))
    check_statistics(rewards, a, b, rng.integers(0, 8, start[-1]) / 7, start, threads=range(7))


def test_rewards_that_differ_only_in_float64():
    rewards = np.array([[1, 1 + 2**-52, 5e-324, 0, -0.0, 1e308, np.inf]])
    a, b = (x.astype(np.int32) for x in np.indices((7, 7)).reshape(2, -1))
    check_statistics(rewards, a, b, np.linspace(0, 1, 49), np.array([0, 20, 49]))


@pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""),
    reason="the sanitizer's own memory is in the count",
)
def test_neither_rewards_nor_pairs_are_copied():
    """The process doesn't grow by what it is given, 88 MB."""
    code = """
import resource, sys
import numpy as np
from pairwise import evaluator
n, k = 1_000_000, 8
rewards, a, p = np.random.default_rng(0).normal(size=(k, n)), np.arange(n), np.full(n, 0.3)
b = a[::-1].copy()
few = slice(1000)
start = np.array([0, 1000])
evaluator.pair_statistics(rewards[:, few].copy(), a[few], a[few], p[few], start, threads=2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
evaluator.pair_statistics(rewards, a, b, p, np.array([0, n]), threads=2)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    assert int(in_a_process(code)) < 4_000  # kB


def test_metrics_from_the_sums():
    """The formulas in the docstring, against their definitions in the paper and in appendix E."""
    rng = np.random.default_rng(0)
    rewards = rng.integers(0, 4, (3, 20)).astype(np.float32)
    a, b = rng.integers(0, 20, (2, 50))
    p, alpha = rng.integers(0, 5, 50) / 4, rng.dirichlet(np.ones(3))
    s = {
        name: x.sum(0)
        for name, x in evaluator.pair_statistics(
            rewards, a, b, p, np.array([0, 20, 20, 50])
        ).items()
    }
    v = brute_votes(rewards, a, b)
    brier = (alpha @ s["vote_vote"] @ alpha - 2 * alpha @ s["vote_p"] + s["p_p"]) / s["pairs"]
    phi = (s["vote"] + s["p"] - 2 * s["vote_p"]) / s["pairs"]
    regret = np.where(v > 0.5, 1 - p, np.where(v < 0.5, p, 0.5)) - np.minimum(p, 1 - p)
    np.testing.assert_allclose(brier, np.mean((alpha @ v - p) ** 2), rtol=1e-13)
    np.testing.assert_allclose(phi, np.mean(v * (1 - p) + (1 - v) * p, axis=1), rtol=1e-13)
    np.testing.assert_allclose(phi - np.minimum(p, 1 - p).mean(), regret.mean(1), rtol=1e-13)
    assert (v == 0.5).any()


@cases(100)
@given(seeds)
def test_swapping_the_sides_of_every_pair(seed):
    rewards, a, b, p, prompt_start = draw_pairs(seed)
    before = evaluator.pair_statistics(rewards, a, b, p, prompt_start)
    after = evaluator.pair_statistics(rewards, b, a, 1 - p, prompt_start)
    pairs = before["pairs"][:, None]
    for name in ["pairs", "decided", "ties", "majority", "disagreement"]:
        assert np.array_equal(before[name], after[name]), name
    assert np.array_equal(after["vote"], pairs - before["vote"])
    phi_before, phi_after = (s["vote"] + s["p"][:, None] - 2 * s["vote_p"] for s in (before, after))
    np.testing.assert_allclose(phi_after, phi_before, atol=1e-13)
    assert np.array_equal(evaluator.votes(rewards, b, a), 2 - evaluator.votes(rewards, a, b))


@cases(100)
@given(seeds)
def test_permuting_prompts_permutes_rows(seed):
    rewards, a, b, p, prompt_start = draw_pairs(seed)
    order = np.random.default_rng(seed).permutation(len(prompt_start) - 1)
    pairs = np.concatenate(
        [np.arange(prompt_start[i], prompt_start[i + 1]) for i in order] + [np.arange(0)]
    )
    new_start = np.concatenate([[0], np.cumsum(np.diff(prompt_start)[order])])
    before = evaluator.pair_statistics(rewards, a, b, p, prompt_start)
    after = evaluator.pair_statistics(rewards, a[pairs], b[pairs], p[pairs], new_start)
    for name in before:
        assert np.array_equal(after[name], before[name][order]), name


@cases(100)
@given(seeds)
def test_only_the_order_of_rewards_counts(seed):
    rewards, a, b, p, prompt_start = draw_pairs(seed)
    ranks = np.array([np.unique(row, return_inverse=True)[1] for row in rewards], np.float32)
    ranks[0] = 7 * ranks[0] - 3
    before = evaluator.pair_statistics(rewards, a, b, p, prompt_start)
    after = evaluator.pair_statistics(ranks, a, b, p, prompt_start)
    for name in before:
        assert np.array_equal(after[name], before[name]), name


@cases(100)
@given(seeds)
def test_a_duplicated_member_votes_like_the_first(seed):
    rewards, *pairs = draw_pairs(seed)
    s = evaluator.pair_statistics(np.concatenate([rewards, rewards[:1]]), *pairs)
    for name in ["vote", "vote_p", "ties", "majority"]:
        assert np.array_equal(s[name][:, -1], s[name][:, 0]), name
    for name in ["vote_vote", "disagreement"]:
        assert np.array_equal(s[name][:, -1], s[name][:, 0]) and np.array_equal(
            s[name], s[name].swapaxes(1, 2)
        ), name
    assert not s["disagreement"][:, 0, -1].any()


# ---- Kendall ----


def scipy_taus(scores):
    k, prompts, _ = scores.shape
    taus = np.empty((prompts, k, k))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # p-values of tiny samples
        for i, j, prompt in np.ndindex(k, k, prompts):
            taus[prompt, i, j] = kendalltau(scores[i, prompt], scores[j, prompt]).statistic
    for i in range(k):  # exactly 1 by definition; scipy's rounding can leave it one step below
        taus[:, i, i] = np.where(np.isnan(taus[:, i, i]), np.nan, 1)
    return taus


def draw_scores(seed, n):
    rng = np.random.default_rng(seed)
    dtype = rng.choice([np.float32, np.float64])
    tiny = np.finfo(dtype).smallest_subnormal
    values = np.array(
        [-np.inf, -1, -2 * tiny, -tiny, -0.0, 0.0, tiny, 2 * tiny, 1, 2, np.inf], dtype
    )
    shape = (3, 2, n)
    drawn = [
        rng.choice(values, shape),
        rng.choice(values[4:6], shape),
        rng.normal(size=shape),
        rng.integers(0, n + 1, shape),
    ]
    source = rng.integers(0, len(drawn), (3, 2, 1))
    return np.choose(source, drawn).astype(dtype)


@cases(700)
@given(seeds, st.integers(0, 40))
def test_kendall_equals_scipy_bit_for_bit(seed, n):
    scores = draw_scores(seed, n)
    check_taus(scores)


def check_taus(scores, paths=("auto", *PATHS), threads=(0, 1, 3)):
    """Every path and number of threads, to the last bit."""
    want = scipy_taus(scores)
    for path in paths:
        for number in threads:
            taus = evaluator.kendall_tau(scores, path=path, threads=number)
            assert taus.shape == want.shape and taus.dtype == np.float64
            assert np.array_equal(taus, want, equal_nan=True), (path, number)


def draw_rankings(n, prompts, dtype):
    """Correlated, tied in part, opposite, and of few values."""
    rng = np.random.default_rng(n)
    common = rng.normal(size=(prompts, n))
    noisy = np.round(common + rng.normal(size=(prompts, n)), 1)
    return np.stack([common, noisy, -common, rng.integers(0, 3, (prompts, n))]).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_kendall_equals_scipy_at_the_borders_of_blocks(dtype):
    """Lengths are around 8, 32 (vectors), 64 (words), powers of two (halving), a path's change."""
    small = (7, 8, 9, 31, 32, 33, 63, 64, 65, 71, 72, 73, 127, 128, 129, 130, 191)
    for n in (*small, 255, 256, 257, 260, 300, 511, 513, 700, 1025):
        check_taus(draw_rankings(n, 1, dtype), threads=(1,))
        check_taus(draw_rankings(n, 1, dtype)[[0, 2]], threads=(1,))  # no ties


def test_infinite_scores_beyond_the_first_block():
    """Their difference is no zero where they are equal: they are found wherever they are."""
    for n, places in ((17, [16]), (300, [3, 250, 299]), (300, [290, 291])):
        for value in (np.inf, -np.inf):
            scores = draw_rankings(n, 2, np.float32)
            scores[1, 1, places] = scores[2, 0, places[:1]] = value
            check_taus(scores, threads=(1,))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_kendall_equals_scipy_on_long_rankings(dtype):
    check_taus(draw_rankings(5000, 1, dtype), threads=(0, 1, 2, 5))
    check_taus(draw_rankings(100_000, 1, dtype)[[0, 1]], ["auto", "portable"], threads=(0, 1, 2, 5))


@pytest.mark.parametrize("path", ["auto", *PATHS])
def test_threads_share_prompts(path):
    scores = draw_rankings(50, 301, np.float32)
    one = evaluator.kendall_tau(scores, path=path, threads=1)
    for threads in (0, 2, 3, 7):
        assert np.array_equal(
            evaluator.kendall_tau(scores, path=path, threads=threads), one, equal_nan=True
        )


def test_a_path_for_what_the_cpu_has():
    cpu = Path("/proc/cpuinfo")
    for line in cpu.read_text().splitlines() if cpu.exists() else []:
        if line.startswith("flags"):
            flags = set(line.split())
            assert ("avx2" in PATHS) == ({"avx2", "popcnt"} <= flags)
            assert ("avx512" in PATHS) == (
                {
                    "avx2",
                    "popcnt",
                    "avx512f",
                    "avx512bw",
                    "avx512dq",
                    "avx512vl",
                    "avx512_vpopcntdq",
                }
                <= flags
            )


def test_kendall_by_hand():
    scores = np.array([[[1, 2, 3, 4]], [[1, 2, 4, 3]], [[4, 3, 2, 1]], [[5, 5, 5, 5]]], np.float32)
    expected = np.array([[1, 2 / 3, -1], [2 / 3, 1, -2 / 3], [-1, -2 / 3, 1]])
    taus = evaluator.kendall_tau(scores)[0]
    np.testing.assert_allclose(taus[:3, :3], expected, rtol=1e-15)
    assert np.isnan(taus[3]).all() and np.isnan(taus[:, 3]).all()


@cases(100)
@given(seeds, st.integers(2, 40))
def test_kendall_properties(seed, n):
    scores = draw_scores(seed, n)
    taus, rng = evaluator.kendall_tau(scores), np.random.default_rng(seed)
    same = partial(np.array_equal, equal_nan=True)
    assert same(evaluator.kendall_tau(np.ascontiguousarray(scores[:, ::-1])), taus[::-1])
    assert same(evaluator.kendall_tau(np.ascontiguousarray(scores[:, :, rng.permutation(n)])), taus)
    reversed_first = scores.copy()
    reversed_first[0] *= -1
    negated = evaluator.kendall_tau(reversed_first)
    assert same(negated[:, 1:, 1:], taus[:, 1:, 1:]) and same(negated[:, 0, 1:], -taus[:, 0, 1:])
    duplicated = evaluator.kendall_tau(np.concatenate([scores, scores[:1]]))
    assert same(duplicated[:, 3, 1:3], taus[:, 0, 1:])
    ranks = np.array(
        [[np.unique(row, return_inverse=True)[1] for row in rows] for rows in scores], np.float32
    )
    assert same(evaluator.kendall_tau(7 * ranks - 3), taus)
    constant = (scores == scores[:, :, :1]).all(2).T
    assert np.array_equal(np.isnan(taus), constant[:, :, None] | constant[:, None, :])


# ---- bootstrap ----


def reference_draws(prompts, resamples, seed):
    """The documented generator, one array of outputs per resample."""

    def mix(z):
        z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        return z ^ z >> np.uint64(31)

    draws = np.zeros((resamples, prompts), int)
    steps = np.arange(1, prompts + prompts // 100 + 50, dtype=np.uint64) * np.uint64(
        0x9E3779B97F4A7C15
    )
    for resample in range(resamples):
        state = mix(mix(np.array([seed], np.uint64)) + np.uint64(resample))
        product = (mix(state + steps) >> np.uint64(32)) * np.uint64(prompts)
        if prompts:  # Lemire: drop outputs until as many are left for each prompt
            product = product[product % 2**32 >= 2**32 % prompts]
        draws[resample] = (product >> np.uint64(32))[:prompts]
    return draws


def reference_counts(prompts, resamples, seed):
    draws = reference_draws(prompts, resamples, seed)
    return np.array([np.bincount(row, minlength=prompts) for row in draws], np.int32).reshape(
        resamples, prompts
    )


def reference_sums(sums, resamples, seed):
    """Counts times sums, added prompt by prompt in pieces of 128."""
    counts, pieces = reference_counts(len(sums), resamples, seed), range(0, len(sums), 128)
    products = [counts[:, i : i + 128, None] * sums[i : i + 128] for i in pieces]
    return sum((x.cumsum(1)[:, -1] for x in products), np.zeros((resamples, sums.shape[1])))


def counts_of(prompts, resamples, seed):
    return evaluator.bootstrap_sums(np.eye(prompts), resamples, seed)


@cases(50)
@given(st.integers(0, 300), st.integers(0, 20), st.integers(0, 40), st.integers(0, 2**64 - 1))
def test_bootstrap_is_that_of_the_documented_generator(prompts, columns, resamples, seed):
    sums = np.random.default_rng(prompts).normal(size=(prompts, columns))
    want = reference_sums(sums, resamples, seed)
    for path in PATHS:
        found = evaluator.bootstrap_sums(sums, resamples, seed, path)
        assert found.dtype == np.float64 and found.shape == (resamples, columns)
        assert np.array_equal(found, want), path
    more = evaluator.bootstrap_sums(sums, resamples + 3, seed)
    assert np.array_equal(more[:resamples], want)
    counts = counts_of(prompts, resamples, seed)
    assert np.array_equal(counts, reference_counts(prompts, resamples, seed))
    np.testing.assert_allclose(want, counts @ sums, rtol=0, atol=1e-11)


@pytest.mark.parametrize("path", PATHS)
def test_threads_share_resamples(path):
    sums = np.random.default_rng(0).normal(size=(300, 19))
    expected = evaluator.bootstrap_sums(sums, 3001, 5, "portable", 1)
    for threads in (0, 1, 2, 3, 7):
        assert np.array_equal(evaluator.bootstrap_sums(sums, 3001, 5, path, threads), expected)


def test_values_that_are_not_finite_stay_in_their_column():
    sums = np.ones((200, 10))
    sums[7, 2], sums[150, 9] = np.nan, np.inf
    for path in PATHS:
        found = evaluator.bootstrap_sums(sums, 40, 1, path)
        assert np.isnan(found[:, 2]).all() and not np.isfinite(found[:, 9]).any()
        assert (np.delete(found, (2, 9), axis=1) == 200).all()


def test_outputs_that_would_bias_the_draw_are_rejected():
    prompts = 1_000_003  # 2^32 mod prompts is large, so that some 200 of a million outputs are
    numbers = np.arange(prompts, dtype=np.float64)
    sums = np.stack([numbers, numbers**2 % 1009], 1)  # whole numbers, exact in any order
    found = evaluator.bootstrap_sums(sums, 1, 5)
    assert np.array_equal(found, reference_counts(prompts, 1, 5) @ sums)


def test_seed_and_resample_matter():
    counts = counts_of(100, 50, 0)
    assert len(np.unique(counts, axis=0)) == 50
    for seed in (1, 2**32, 2**63):
        assert not (counts[:, None] == counts_of(100, 50, seed)[None]).all(2).any()


@pytest.mark.parametrize("prompts", [2, 3, 10, 37])
def test_counts_are_multinomial(prompts):
    resamples = 40_000
    counts = counts_of(prompts, resamples, 7)
    variance = 1 - 1 / prompts
    mean_error = (counts.mean(0) - 1) / np.sqrt(variance / resamples)
    assert np.abs(mean_error).max() < 5
    # uniform draws: Pearson's statistic of all draws lies between the .001 % quantiles of chi2
    total = counts.sum(0)
    assert (
        chi2.ppf(1e-5, prompts - 1)
        < ((total - resamples) ** 2 / resamples).sum()
        < chi2.isf(1e-5, prompts - 1)
    )
    covariance = np.cov(counts.T)
    np.testing.assert_allclose(np.diag(covariance), variance, atol=0.06)
    np.testing.assert_allclose(covariance[~np.eye(prompts, dtype=bool)], -1 / prompts, atol=0.04)
    # resamples drawn one after the other are not correlated
    assert abs(np.mean((counts[1:] - 1) * (counts[:-1] - 1))) < 0.01


# ---- malformed calls ----


def good():
    rewards = np.array([[0, 1, 2], [2, 1, 0]], np.float32)
    return {
        "pair_statistics": {
            "rewards": rewards, "a": np.array([0, 1, 2]), "b": np.array([1, 2, 0]),
            "p": np.array([0, 0.5, 1]),
            "prompt_start": np.array([0, 1, 3]), "path": "auto", "threads": 0,
        },
        "votes": {"rewards": rewards, "a": np.array([0, 1]), "b": np.array([1, 2])},
        "kendall_tau": {
            "scores": np.arange(12, dtype=np.float64).reshape(2, 2, 3),
            "path": "auto", "threads": 0,
        },
        "bootstrap_sums": {
            "sums": np.arange(6, dtype=np.float64).reshape(3, 2),
            "resamples": 2, "seed": 1, "path": "auto", "threads": 0,
        },
    }  # fmt: skip


def edited(array, index, value):
    array = array.copy()
    array[index] = value
    return array


def unaligned(array):
    buffer = np.zeros(array.nbytes + 1, np.uint8)
    view = buffer[1:].view(array.dtype).reshape(array.shape)
    view[:] = array
    return view


def strided(array):
    return np.repeat(array, 2, axis=-1)[..., ::2]


ARRAYS = [
    (f, name) for f in good() for name in good()[f] if isinstance(good()[f][name], np.ndarray)
]
INTEGERS = [
    (f, name) for f in good() for name in good()[f] if name in ("resamples", "seed", "threads")
]
R, P, S = (("pair_statistics", name) for name in ("rewards", "p", "prompt_start"))
K = ("kendall_tau", "scores")
MALFORMED = [
    *[(f, name, change, TypeError, "must be a numpy array of") for f, name in ARRAYS
      for change in (np.ndarray.tolist, lambda x: None, lambda x: x.astype(np.float16),
                     lambda x: x.astype(np.uint32),
                     lambda x: x.astype(x.dtype.newbyteorder()), lambda x: x.astype(object))],
    *[(f, name, lambda x: x[None], ValueError, "must have shape") for f, name in ARRAYS],
    *[(f, name, strided, ValueError, "must be C-contiguous") for f, name in ARRAYS],
    *[(f, name, unaligned, ValueError, "must be C-contiguous and aligned") for f, name in ARRAYS],
    (*R, np.asfortranarray, ValueError, "must be C-contiguous"),
    (*R, lambda x: x[:0], ValueError, r"must hold 1 to 1024 models, not shape \(0, 3\)"),
    (*R, lambda x: np.zeros((1025, 3), np.float32), ValueError,
     r"must hold 1 to 1024 models, not shape \(1025, 3\)"),
    (*R, lambda x: edited(x, (1, 2), np.nan), ValueError,
     r"must not be NaN, but is for member 2 \(counted from 1\), response 2"),
    (*R, lambda x: x.astype(np.int64), TypeError,
     "must be a numpy array of float32 or float64, not int64"),
    (*P, lambda x: x.astype(np.float32), TypeError,
     "must be a numpy array of float64, not float32"),
    (*S, lambda x: x.astype(np.int32), TypeError, "must be a numpy array of int64, not int32"),
    ("votes", "a", lambda x: x.astype(np.int16), TypeError,
     "must be a numpy array of int64 or int32, not int16"),
    *[(f, name, change, ValueError, message) for f in ("pair_statistics", "votes")
      for name, change, message in (
        ("a", lambda x: edited(x, 1, -1), r"must index the 3 responses, but a\[1\] is -1"),
        ("a", lambda x: edited(x, 0, 3), r"must index the 3 responses, but a\[0\] is 3"),
        ("b", lambda x: edited(x, 1, -(2**63)),
         r"must index the 3 responses, but b\[1\] is -9223372036854775808"),
        ("b", lambda x: edited(x, -1, 2**62), "must index the 3 responses"),
        ("b", lambda x: edited(x.astype(np.int32), 1, -(2**31)),
         r"must index the 3 responses, but b\[1\] is -2147483648"),
        ("b", lambda x: x[:-1].copy(), r"must have shape \(\d,\) as a, not"))],
    *[(*P, lambda x, value=value: edited(x, 1, value), ValueError,
       r"must be in \[0, 1\], but p\[1\] is " + text)
      for value, text in ((-1e-9, "-1.0"), (1 + 2**-52, r"1\.0000000000000002"),
                          (np.nan, "-?nan"), (np.inf, "inf"))],
    (*P, lambda x: x[:2].copy(), ValueError, r"must have shape \(3,\) as a, not \(2,\)"),
    (*S, lambda x: np.array([0, 3, 1, 3]), ValueError,
     r"must not decrease, but prompt_start\[2\] is 1 after 3"),
    (*S, lambda x: np.array([1, 3]), ValueError, "must begin with 0, not 1"),
    (*S, lambda x: np.array([-1, 3]), ValueError, "must begin with 0, not -1"),
    (*S, lambda x: np.array([0, 2]), ValueError, "must end with the number of pairs, 3, not 2"),
    (*S, lambda x: np.array([0, 5, 3]), ValueError, "must not decrease"),
    (*S, lambda x: x[:0], ValueError, r"must have shape \(prompts \+ 1,\), not \(0,\)"),
    ("votes", "rewards", lambda x: np.lib.stride_tricks.as_strided(x, (1, 2**31)), ValueError,
     r"must hold fewer than 2\^31 responses, not shape \(1, 2147483648\)"),
    (*K, lambda x: edited(x, (1, 0, 2), np.nan), ValueError,
     r"must not be NaN, but is for model 2 \(counted from 1\), prompt 0, index 2"),
    (*K, lambda x: edited(x.astype(np.float32), (0, 1, 0), np.nan), ValueError,
     ".* model 1 .*, prompt 1, index 0"),
    (*K, lambda x: x[:0], ValueError, "must hold 1 to 1024 models"),
    (*K, lambda x: np.lib.stride_tricks.as_strided(x, (1, 1, 2**31)), ValueError,
     r"must hold fewer than 2\^31 continuations, not shape \(1, 1, 2147483648\)"),
    *[(f, name, lambda x, value=value: value, error, message) for f, name in INTEGERS
      for value, error, message in (
        (-1, ValueError, "must be from 0 to .*, not -1"), (2**64, ValueError, "must be from 0 to"),
        (1.0, TypeError, "must be an integer, not float"),
        ("1", TypeError, "must be an integer, not str"))],
    *[(f, "path", lambda x, value=value: value, error,
       'must be one of "auto", "portable".* on this CPU, not ' + given)
      for f in ("pair_statistics", "kendall_tau", "bootstrap_sums")
      for value, error, given in (("sse", ValueError, '"sse"'), ("", ValueError, '""'),
                                  (None, TypeError, "NoneType"))],
    ("kendall_tau", "threads", lambda x: 1025, ValueError, "must be from 0 to 1024, not 1025"),
    ("bootstrap_sums", "sums", lambda x: np.lib.stride_tricks.as_strided(x, (2**31, 1)), ValueError,
     r"must hold fewer than 2\^31 prompts, not shape \(2147483648, 1\)"),
    ("bootstrap_sums", "resamples", lambda x: 2**31, ValueError,
     "must be from 0 to 2147483647, not 2147483648"),
]  # fmt: skip


@pytest.mark.parametrize("function, name, change, error, message", MALFORMED)
def test_malformed_argument_is_named(function, name, change, error, message):
    arguments = good()[function]
    getattr(evaluator, function)(**arguments)  # it is the change that fails
    arguments[name] = change(arguments[name])
    with pytest.raises(error, match=f"^{name} {message}"):
        getattr(evaluator, function)(**arguments)


def test_nan_is_found_wherever_it_is():
    rewards, pair = np.zeros((1, 100_000), np.float32), (np.array([0]), np.array([1]))
    for place in (0, 65_535, 65_536, 99_999):
        rewards[:] = 0
        rewards[0, place] = np.nan
        with pytest.raises(ValueError, match=f"for member 1 .counted from 1., response {place}"):
            evaluator.votes(rewards, *pair)


def test_as_many_models_as_are_documented():
    rewards, pair = np.tile(np.array([1, 0], np.float32), (1024, 1)), (np.array([0]), np.array([1]))
    assert (evaluator.votes(rewards, *pair) == 2).all()
    with pytest.raises(ValueError, match="rewards must hold 1 to 1024 models"):
        evaluator.votes(np.concatenate([rewards, rewards[:1]]), *pair)


def test_pairs_without_responses():
    with pytest.raises(ValueError, match=r"^a must index the 0 responses, but a\[0\] is 0"):
        evaluator.votes(np.zeros((2, 0), np.float32), np.array([0]), np.array([0]))


OTHER_DTYPES = [
    np.float16, np.float32, np.float64, np.int32, np.int64, np.complex64, bool, object,
]  # fmt: skip
MUTATIONS = [
    lambda x, rng: x.astype(rng.choice(OTHER_DTYPES)),
    lambda x, rng: x[None],
    lambda x, rng: x[..., ::-1],
    lambda x, rng: x[: rng.integers(0, len(x) + 1)],
    lambda x, rng: np.swapaxes(x, 0, -1),
    lambda x, rng: x.reshape(-1),
    lambda x, rng: x.tolist(),
    lambda x, rng: np.broadcast_to(x, (2, *x.shape)),
    lambda x, rng: np.zeros((0,) * x.ndim, x.dtype),
    lambda x, rng: edited(
        x, tuple(rng.integers(0, x.shape)), rng.choice([-1, 2, 3, 2**40, -(2**63)])
    ),
    lambda x, rng: edited(
        x.astype(np.float64), tuple(rng.integers(0, x.shape)), rng.choice([np.nan, np.inf])
    ),
    lambda x, rng: rng.choice(np.array([None, 1, "x", 2.5, b"", ()], object)),
]


def test_random_malformed_calls_raise_or_return():
    """They raise TypeError or ValueError, or what they return is right; sanitizers see more."""
    rng, raised, calls = np.random.default_rng(0), 0, int(15_000 * SHARE)
    functions, scipys = (
        {function: [name for f, name in ARRAYS if f == function] for function in good()},
        {},
    )
    for _ in range(calls):
        function = rng.choice(list(functions))
        arguments = good()[function]
        for name in rng.permutation(functions[function])[: rng.integers(1, 3)]:
            arguments[name] = MUTATIONS[rng.integers(len(MUTATIONS))](arguments[name], rng)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = getattr(evaluator, function)(**arguments)
        except (TypeError, ValueError):
            raised += 1
            continue
        if function == "votes":
            assert np.array_equal(result / 2, brute_votes(**arguments))
        elif function == "kendall_tau":
            scores = arguments["scores"]
            key = scores.shape, scores.tobytes()
            scipys[key] = scipys[key] if key in scipys else scipy_taus(scores)
            assert np.array_equal(result, scipys[key], equal_nan=True)
        elif function == "bootstrap_sums":
            with np.errstate(invalid="ignore"):
                want = reference_sums(arguments["sums"], 2, 1)
            assert np.array_equal(result, want, equal_nan=True)
        elif len(arguments["prompt_start"]) > 1:
            want = brute_statistics(**arguments)
            assert all(np.array_equal(result[name], want[name]) for name in want)
    assert raised > 10_000 * SHARE


def test_arguments_that_other_threads_change():
    """Either an error or a result: an index is used as it was when it was checked."""
    code = """
import sys, threading
import numpy as np
from pairwise import evaluator
sys.setswitchinterval(1e-5)
n, k = 5000, 4
rewards = np.random.default_rng(0).normal(size=(k, n)).astype(np.float32)
a, b, p = np.arange(n), np.arange(n)[::-1].copy(), np.full(n, 0.3)
start, scores = np.arange(0, n + 1, 10), rewards.reshape(k, 50, 100).copy()
changes = (a, 2**40, 7), (b, -(2**40), 7), (start, 2**40, n), (p, 2.0, 0.5), (scores, np.nan, 1)
stopped = False

def scribble(array, wrong, right):
    at = len(array) // 2
    while not stopped:
        array[at:] = wrong
        array[at:] = right

kept, same = start.copy(), np.arange(n)
threads = [threading.Thread(target=scribble, args=change) for change in changes]
for thread in threads:
    thread.start()
errors, results = 0, 0
for call in range(200):
    for function, arguments in (
        (evaluator.votes, (rewards, a, b)),
        (evaluator.pair_statistics, (rewards, a, b, p, kept)),
        (evaluator.pair_statistics, (rewards, same, same, same / n, start)),
        (evaluator.kendall_tau, (scores,)),
    ):
        try:
            function(*arguments)
            results += 1
        except ValueError:
            errors += 1
stopped = True
print(errors, results)
"""
    errors, results = map(int, in_a_process(code).split())
    assert errors and errors + results == 800


@pytest.mark.skipif(SHARE < 1, reason="torch is not imported under the sanitizers")
def test_comparisons_where_denormals_are_flushed():
    """torch.set_flush_denormal makes denormals zero, and their differences, in every thread."""
    import torch

    rng, tiny = np.random.default_rng(0), np.finfo(np.float32).tiny
    for dtype, least in ((np.float32, 2**-149), (np.float64, 2**-1074)):
        values = np.array([0.0, -0.0, least, -least, 3 * least, tiny, np.nextafter(tiny, dtype(1))])
        rewards = rng.choice(values.astype(dtype), (4, 3, 100))
        ranks = np.unique(rewards, return_inverse=True)[1].reshape(rewards.shape).astype(np.float64)
        a, b = rng.integers(0, 300, (2, 40_000))
        p, start = rng.integers(0, 9, len(a)) / 8, np.array([0, 20_000, 20_003, 40_000])
        if not torch.set_flush_denormal(True):
            pytest.skip("this CPU does not flush denormals")
        try:
            assert not np.float64(2**-1074) > 0  # It does.
            got, want = (evaluator.votes(x.reshape(4, -1), a, b) for x in (rewards, ranks))
            assert np.array_equal(got, want)
            for path in PATHS:
                got, want = (
                    evaluator.pair_statistics(x.reshape(4, -1), a, b, p, start, path, 2)
                    for x in (rewards, ranks)
                )
                assert all(np.array_equal(got[name], want[name]) for name in got), path
                got, want = (evaluator.kendall_tau(x, path, 2) for x in (rewards, ranks))
                assert np.array_equal(got, want), path
            with pytest.raises(ValueError, match=r"^p must be in \[0, 1\], but p\[0\] is -"):
                evaluator.pair_statistics(
                    ranks.reshape(4, -1), a[:1], b[:1], np.array([-(2**-1074)]), np.array([0, 1])
                )
            assert not np.float64(2**-1074) > 0  # The mode of this thread is as it was.
        finally:
            torch.set_flush_denormal(False)


def test_arguments_are_neither_copied_nor_changed():
    for function, arguments in good().items():
        for value in arguments.values():
            if isinstance(value, np.ndarray):
                value.setflags(write=False)
        before = {name: np.copy(value) for name, value in arguments.items()}
        getattr(evaluator, function)(**arguments)
        assert all(np.array_equal(before[name], arguments[name]) for name in arguments)


def test_empty_input():
    none = np.zeros(0, np.int64)
    s = evaluator.pair_statistics(
        np.zeros((2, 0), np.float32), none, none, np.zeros(0), np.array([0, 0, 0])
    )
    assert all(len(x) == 2 and not x.any() for x in s.values())
    s = evaluator.pair_statistics(
        np.zeros((2, 0), np.float32), none, none, np.zeros(0), np.array([0])
    )
    assert all(len(x) == 0 for x in s.values()) and s["vote_vote"].shape == (0, 2, 2)
    assert evaluator.votes(np.zeros((2, 3), np.float32), none, none).shape == (2, 0)
    assert evaluator.kendall_tau(np.zeros((2, 0, 5))).shape == (0, 2, 2)
    for path in PATHS:
        assert np.isnan(evaluator.kendall_tau(np.zeros((2, 3, 0)), path=path)).all()
        assert np.isnan(evaluator.kendall_tau(np.ones((1, 1, 1)), path=path)).all()


@pytest.mark.parametrize("function", list(good()))
def test_documented_signature_is_the_real_one(function):
    function, arguments = getattr(evaluator, function), good()[function]
    assert list(inspect.signature(function).parameters) == list(arguments)
    assert "Raises" in function.__doc__ and all(name in function.__doc__ for name in arguments)
