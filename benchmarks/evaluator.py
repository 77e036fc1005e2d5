"""The C++ evaluator beside scipy, pandas, polars-ds, hyper-corr, numba and numpy.

    pip install -r benchmarks/requirements.txt
    python benchmarks/evaluator.py --json benchmarks/evaluator.json       (1 to 2 minutes)

Results are compared first, then times, which are medians of one process. Everyone calls in turn,
again and again; slow ones call in every n-th round only. Packages run on one thread, which is all
that they use; ours runs as it is called, and on one thread too. evaluate.py is timed as a program
of its own.
"""

import os

# These are read when numpy is imported. evaluate.py is run in the environment as it was.
ENVIRONMENT = dict(os.environ)
os.environ |= {f"{library}_NUM_THREADS": "1" for library in ("OPENBLAS", "MKL", "OMP")}
os.environ["POLARS_MAX_THREADS"] = "1"

import contextlib
import gc
import io
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from functools import partial
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pairwise import cli, data, files, metrics, run_dir
from pairwise.prepare import prompts

import numpy as np
from scipy.stats import kendalltau

MISSING = None
try:
    import pandas as pd
    import polars as pl
    import polars_ds as pds
    from hyper_corr import kendalltau_noties, kendalltau_ties
    from numba import njit
except ImportError as error:  # --help does without.
    MISSING = error.name

    def njit(function):
        return function


evaluator = cli.import_evaluator()
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
K, RESAMPLES, BLOCK, OURS = 8, 10_000, 2**14, "this repository"
LOWER = np.tril_indices(K, -1)


# ---- comparing and timing


def ours(name, *args):
    """Return {contender: call} of a function: as it is called, on one thread, and without AVX2."""
    function = getattr(evaluator, name)
    return {
        OURS: partial(function, *args),
        f"{OURS}, one thread": partial(function, *args, threads=1),
        f"{OURS}, one thread without AVX2": partial(function, *args, threads=1, path="portable"),
    }


def check_equal(name, values, expected, tolerance=0):
    """Raise AssertionError where a contender differs from ours; tolerance 0: in the last bit."""
    wrong = ~np.isclose(values, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    if wrong.any():
        raise AssertionError(
            f"{name} differs from {OURS} in {wrong.sum()} of {wrong.size} numbers, by up to "
            f"{np.nanmax(np.abs(values - expected))}"
        )


def race(calls, rounds):
    """Return the table rows of {contender: call}, which call in turn.

    Those that take longer than 50 ms sit rounds out, but call three times at least.
    """
    times, every = {name: [] for name in calls}, {}
    gc.collect()
    gc.disable()
    for turn in range(-1, rounds):  # turn -1 warms up
        for name, call in calls.items():
            if turn < 0 or turn % every[name] == 0:
                if turn >= 0 and every[name] == 1:
                    call()  # The caches are then no longer as the contender before left them.
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
            if turn < 0:
                every[name] = max(1, min(rounds // 3, round(times[name].pop() / 0.05)))
    gc.enable()
    return [
        {
            "contender": name,
            "median_ms": 1e3 * float(np.median(t)),
            "min_ms": 1e3 * min(t),
            "max_ms": 1e3 * max(t),
            "calls": len(t),
            "times_ours": float(np.median(t) / np.median(times[OURS])),
        }
        for name, t in times.items()
    ]


def growth(call):
    """Return the MiB by which resident memory grew, at its peak, during one call.

    Return None where the system does not say; Linux does.
    """

    def resident(field):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # The peak begins anew.
    except OSError:
        return None
    before = resident("VmRSS:")
    call()
    return resident("VmHWM:") - before


# ---- Kendall's tau-b of scores (k, prompts, n): (prompts, k, k)


def draw(rng, shape):
    """Return float32 rewards (K, ..) that agree in part; every second model has many ties."""
    rewards = rng.normal(size=(K, *shape)) + rng.normal(size=shape)
    rewards[1::2] = np.round(4 * rewards[1::2]) / 4
    return rewards.astype(np.float32)


def both_triangles(tau):
    """Return (prompts, k, k) of tau (pairs of models, prompts)."""
    full = np.tile(np.eye(K), (tau.shape[1], 1, 1))
    full[:, *LOWER] = full[:, *LOWER[::-1]] = tau.T
    return full


def scipy_loop(scores):
    taus = [
        [kendalltau(x, y).statistic for x, y in zip(scores[i], scores[j])] for i, j in zip(*LOWER)
    ]
    return both_triangles(np.array(taus))


def scipy_axis(scores):
    """Call scipy once for everything."""
    i, j = LOWER
    return both_triangles(kendalltau(scores[i], scores[j], axis=-1).statistic)


def pandas_corr(scores):
    """Call pandas once a prompt, on scores that are converted once for all prompts."""
    frames = np.ascontiguousarray(scores.transpose(1, 2, 0), np.float64)
    return np.stack([pd.DataFrame(frame).corr(method="kendall").to_numpy() for frame in frames])


def polars_corr(scores):
    """Ask polars-ds for all pairs of models at once, prompt by prompt of one table."""
    k, count, n = scores.shape
    columns = {str(j): scores[j].ravel() for j in range(k)}
    table = pl.DataFrame({"prompt": np.repeat(np.arange(count), n)} | columns)
    pairs = [pds.kendall_tau(str(i), str(j)).alias(f"{i} {j}") for i, j in zip(*LOWER)]
    taus = table.group_by("prompt", maintain_order=True).agg(pairs).drop("prompt")
    return both_triangles(taus.to_numpy().T)


def numpy_signs(scores):
    """Take the signs of all differences as a row for each model, so that a matrix product counts.

    It goes prompt by prompt, which stays in the cache. Sums of signs are exact in float32 to 2^24.
    """
    k, count, n = scores.shape
    tau, signs = np.empty((count, k, k)), np.empty((k, n, n), np.float32)
    for p in range(count):
        x, y = scores[:, p, :, None], scores[:, p, None, :]
        np.subtract((x > y).view(np.int8), (x < y).view(np.int8), out=signs)
        tau[p] = signs.reshape(k, -1) @ signs.reshape(k, -1).T
    roots = np.sqrt(np.einsum("pii->pi", tau))
    return tau / roots[:, :, None] / roots[:, None, :]


@njit
def numba_brute_force(scores):
    """Compare every pair of continuations of every pair of models.

    A model with itself counts the pairs without a tie.
    """
    k, count, n = scores.shape
    tau, roots = np.ones((count, k, k)), np.empty(k)
    for p in range(count):
        for i in range(k):
            for j in range(i, -1, -1):
                x, y, difference = scores[i, p], scores[j, p], 0  # concordant minus discordant
                for a in range(n):
                    for b in range(a):
                        sign_x, sign_y = (
                            (x[a] > x[b]) - (x[a] < x[b]),
                            (y[a] > y[b]) - (y[a] < y[b]),
                        )
                        difference += sign_x * sign_y
                if i == j:
                    roots[i] = np.sqrt(difference)
                else:
                    tau[p, i, j] = tau[p, j, i] = difference / roots[i] / roots[j]
    return tau


@njit
def numba_signs(scores):
    """Do as numpy_signs does, with every pair of continuations once and no temporary arrays."""
    k, count, n = scores.shape
    tau, roots = np.ones((count, k, k)), np.empty(k)
    signs = np.empty((k, n * (n - 1) // 2), np.float32)
    for p in range(count):
        for i in range(k):
            x, start = scores[i, p], 0
            for a in range(n):
                for b in range(a):
                    signs[i, start + b] = np.float32(x[a] > x[b]) - np.float32(x[a] < x[b])
                start += a
        product = np.dot(signs, signs.T)
        for i in range(k):
            roots[i] = np.sqrt(np.float64(product[i, i]))
            for j in range(i):
                tau[p, i, j] = tau[p, j, i] = product[i, j] / roots[i] / roots[j]
    return tau


@njit
def hyper_corr(scores):
    """Call hyper-corr's compiled functions, without p-values, in a compiled loop.

    They want x sorted, so each model is sorted once, and ranks are sorted faster than scores. Which
    of the two is called when is as in hyper_corr.kendalltau, which is plain Python.
    """
    k, count, n = scores.shape
    tau, tied = np.ones((count, k, k)), np.empty(k, np.bool_)
    rank, order = np.empty((k, n), np.int32), np.empty((k, n), np.int64)
    for p in range(count):
        for i in range(k):
            order[i] = np.argsort(scores[i, p])
            x, last = scores[i, p], 0
            for q in range(n):
                last += q > 0 and x[order[i, q]] != x[order[i, q - 1]]
                rank[i, order[i, q]] = last
            tied[i] = last < n - 1
        for i in range(k):
            x = rank[i][order[i]]
            for j in range(i):
                y = rank[j][order[i]]
                if tied[i] or tied[j] or n > 300:
                    statistic, _ = kendalltau_ties(x, y, n, False)
                else:
                    statistic, _ = kendalltau_noties(x, y, n, False)
                tau[p, i, j] = tau[p, j, i] = statistic
    return tau


PACKAGES = {
    "scipy, a call a pair": scipy_loop,
    "pandas, DataFrame.corr": pandas_corr,
    "polars-ds": polars_corr,
    "hyper-corr in numba": hyper_corr,
}
OTHERS = {
    "scipy, axis=-1": scipy_axis,
    "numba brute force": numba_brute_force,
    "numba signs and BLAS": numba_signs,
    "numpy signs and BLAS": numpy_signs,
}


def kendall(shape, contenders, rounds):
    """Compare the evaluator with {name: function} on scores of shape (prompts, continuations)."""
    scores = draw(np.random.default_rng(0), shape)
    calls = ours("kendall_tau", scores)
    tau = calls[OURS]()
    for name, call in calls.items():
        check_equal(name, call(), tau)
    for name, function in contenders.items():
        values = function(scores)
        # scipy was asked for (i, j) with i > j; of (j, i) the last bit may differ.
        tolerance = 0 if name.startswith("scipy") else 1e-12
        check_equal(name, values[:, *LOWER], tau[:, *LOWER], tolerance)
        check_equal(name, values, tau, 1e-12)
        calls[name] = partial(function, scores)
    prompts_word = "prompt" if shape[0] == 1 else "prompts"
    size = f"{shape[0]:,} {prompts_word} x {shape[1]:,} continuations"
    return [{"title": f"tau-b, {K} models x {size}", "rows": race(calls, rounds)}]


# ---- sums over pairs


def numpy_pairs(rewards, a, b, p, block):
    """Return the totals of pair_statistics, `block` pairs at a time.

    They come from the votes as signs s: matrix products of s, of |s|, and of s with p.
    """
    k, pairs = len(rewards), len(a)
    products, untied, with_p = np.zeros((k, k)), np.zeros((k, k)), np.zeros((k, 3))
    columns = np.stack([np.ones(pairs), p, np.sign(p - 0.5)], 1)
    for start in range(0, pairs, block):
        at = slice(start, start + block)
        x, y = rewards.take(a[at], 1), rewards.take(b[at], 1)
        s = ((x > y).view(np.int8) - (x < y).view(np.int8)).astype(np.float64)
        size = s * s
        products += s @ s.T
        untied += size @ size.T
        with_p += s @ columns[at]
    s, own, sum_p = with_p[:, 0], untied.diagonal(), p.sum()
    decided = np.count_nonzero(columns[:, 2])
    return {
        "pairs": pairs,
        "decided": decided,
        "p": sum_p,
        "p_p": p @ p,
        "ties": pairs - own,
        "vote": (pairs + s) / 2,
        "vote_p": (sum_p + with_p[:, 1]) / 2,
        "majority": (decided + with_p[:, 2]) / 2,
        "vote_vote": (products + s[:, None] + s + pairs) / 4,
        # |x - y| = x^2 + y^2 - xy - x^2 y^2 for x, y in {-1, 0, 1}
        "disagreement": (own[:, None] + own - products - untied) / 2,
    }


def draw_pairs(rng, pairs):
    """Return (rewards, a, b, p): all 28 pairs of the 8 responses to a prompt, in random order.

    Each has eight votes, so that sums with p are exact in any order.
    """
    count = -(-pairs // 28)
    i, j = np.triu_indices(8, 1)
    starts, swap = 8 * np.arange(count)[:, None], rng.random((count, 28)) < 0.5
    a, b = ((starts + np.where(swap, *sides)).ravel()[:pairs] for sides in ((i, j), (j, i)))
    return draw(rng, (8 * count,)), a, b, rng.integers(0, 9, pairs) / 8


def pair_sums(pairs, blocks, rounds):
    rewards, a, b, p = draw_pairs(np.random.default_rng(0), pairs)
    calls = ours("pair_statistics", rewards, a, b, p, np.array([0, pairs]))
    grown = growth(calls[OURS])
    totals = calls[OURS]()
    calls |= {name: partial(numpy_pairs, rewards, a, b, p, block) for name, block in blocks.items()}
    for name, call in calls.items():
        sums = call()
        for figure, value in totals.items():
            check_equal(f"{name}: {figure}", np.reshape(sums[figure], value.shape), value)
    title = f"all sums over {pairs:,} pairs, {K} models"
    return {
        "title": title,
        "rows": race(calls, rounds),
        "growth_mib": grown,
        "rewards_mib": rewards.nbytes / 2**20,
    }


# ---- bootstrap


def numpy_bootstrap(sums, at_once=100):
    """Return resampled sums, with numpy's fastest generator."""
    prompts, rng = len(sums), np.random.Generator(np.random.SFC64(0))
    shift, totals = prompts * np.arange(at_once)[:, None], []
    for _ in range(RESAMPLES // at_once):
        drawn = rng.integers(prompts, size=(at_once, prompts)) + shift
        counts = np.bincount(drawn.ravel(), minlength=prompts * at_once)
        totals.append(counts.reshape(at_once, prompts).astype(np.float64) @ sums)
    return np.concatenate(totals)


def bootstrap():
    sums = np.random.default_rng(0).normal(size=(1000, 20)) + 1
    call, other = partial(metrics.resampled, sums, RESAMPLES, 0), numpy_bootstrap(sums)
    expected = call()
    # The two are equal in distribution only.
    standard_error = expected.std(0) * np.sqrt(2 / RESAMPLES)
    distance = np.abs(other.mean(0) - expected.mean(0)) / standard_error
    spread = np.abs(other.std(0) / expected.std(0) - 1)
    assert distance.max() < 5 and spread.max() < 0.05, f"numpy's bootstrap differs from {OURS}"
    calls = {OURS: call, "numpy, integers and bincount": partial(numpy_bootstrap, sums)}
    title = f"{RESAMPLES:,} resamples of 1,000 prompts, 20 sums"
    return [{"title": title, "rows": race(calls, 15)}]


# ---- evaluate.py


def comparisons(rng):
    """Yield comparisons of MultiPref's size: 9,413 pairs of 5,323 prompts, four annotators."""
    for number in range(9413):
        (pair, prompt), votes = divmod(number, 5323), int(rng.integers(0, 5))
        messages = [{"role": "user", "content": f"Question {prompt}?"}]
        yield prompts.Comparison(
            f"prompt {prompt}",
            messages,
            f"Answer {2 * pair}.",
            f"Answer {2 * pair + 1}.",
            votes,
            4 - votes,
            0,
        )


def program(name, run):
    """Run a script of the repository on a run directory."""
    path = os.pathsep.join(filter(None, [str(cli.REPOSITORY), ENVIRONMENT.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, cli.REPOSITORY / name, "--run", run],
        capture_output=True,
        encoding="utf-8",
        env=ENVIRONMENT | {"PYTHONPATH": path},
    )
    if done.returncode:
        raise cli.InputError(f"{name} failed: {done.stderr.strip()}")


def evaluate():
    def call():
        (run / "metrics.json").unlink(missing_ok=True)  # else the stage is skipped
        program("evaluate.py", run)

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as directory:
        # This process keeps the directory that it prepares locked: what is timed is a copy.
        prepared, run = Path(directory) / "prepared", Path(directory) / "run"
        args = Namespace(
            run=prepared, seed=0, ties="drop", min_votes=2, test_share=0.1, valid_share=0.0
        )
        with contextlib.redirect_stdout(io.StringIO()):
            prompts.prepare(args, "made", lambda: comparisons(rng), "sampled", {}, {})
        shutil.copytree(prepared, run)
        splits, _ = data.read_splits(run)
        shapes = {name: (split.n_responses,) for name, split in splits.items()}
        for name, shape in (shapes | {"continuations": (50, 100)}).items():
            for j, rewards in enumerate(draw(rng, shape), 1):
                files.write_array(run_dir.reward_path(run, j, name), rewards)
        program("fit_weights.py", run)
        rows = race({OURS: call}, 3)
        assert (run / "report.html").exists() and (run / "figures" / "kendall.png").exists()
    title = f"python evaluate.py: 9,413 pairs, {K} models, 50 x 100 continuations, figures"
    return [{"title": title, "rows": rows}]


# ---- the whole


def pairs():
    """Sum over PersonalLLM's number of pairs, and over ten million."""
    size, blocks = 9402 * 28, {f"numpy, {BLOCK:,} at a time": BLOCK}
    return [
        pair_sums(size, {"numpy": size} | blocks, 30),
        pair_sums(10_000_000, blocks, 5),
    ]


PARTS = {
    "kendall": lambda: kendall((50, 100), PACKAGES | OTHERS, 30),
    "block": lambda: kendall((1, 100_000), PACKAGES, 5),  # the others are quadratic
    "pairs": pairs,
    "bootstrap": bootstrap,
    "evaluate": evaluate,
}


def table(part):
    """Return a part as a table in markdown, and what else was measured."""
    lines = [f"| {part['title']} | median ms | min to max | times ours |", "|---|---|---|---|"]
    for row in part["rows"]:
        digits = max(0, 2 - int(np.floor(np.log10(row["median_ms"]))))
        median, low, high = (f"{row[key]:,.{digits}f}" for key in ("median_ms", "min_ms", "max_ms"))
        lines.append(
            f"| {row['contender']} | {median} | {low} to {high} | {row['times_ours']:,.1f} |"
        )
    if part.get("growth_mib") is not None:
        words = f"\nresident memory grew by {part['growth_mib']:.1f} MiB in one call; "
        lines.append(f"{words}the rewards are {part['rewards_mib']:.1f} MiB")
    return "\n".join(lines)


def machine():
    """Return what the times depend on."""
    info = Path("/proc/cpuinfo")
    info = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in info)}
    flags = [f for f in facts.get("flags", "").split() if f == "avx2" or f.startswith("avx512")]
    return {
        "cpu": facts.get("model name", platform.processor()),
        "cores": CORES,
        "flags": " ".join(flags),
        "system": platform.platform(),
    }


def main(args):
    if MISSING:
        words = f"{MISSING} is missing; pip install -r benchmarks/requirements.txt"
        raise cli.InputError(words)
    packages = ("numpy", "scipy", "pandas", "polars-ds", "polars", "numba", "hyper-corr")
    versions = {"python": platform.python_version()}
    versions |= {package: metadata.version(package) for package in packages}
    date, facts, parts = time.strftime("%Y-%m-%d"), machine(), {}
    print("{cpu}, {cores} cores, {flags}, {system}".format_map(facts), date, sep=", ")
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    for name in [args.only] if args.only else PARTS:
        parts[name] = PARTS[name]()
        for part in parts[name]:
            print(f"\n{table(part)}", flush=True)
    if args.json:
        result = {"date": date, "machine": facts, "versions": versions, "parts": parts}
        files.write_json(args.json, result)


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--only", choices=PARTS, help="one part (default: all)")
    parser.add_argument("--json", type=run_dir.output, help="also write everything to this file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
