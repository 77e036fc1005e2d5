"""evaluate.py: every number against a second computation from the files alone, intervals against a
second bootstrap, and what may change none of them."""

import argparse
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import evaluate
import fit_weights
from pairwise import metrics as figures
from pairwise import soft_model, theory
from pairwise.cli import BUILD_COMMAND, InputError
from pairwise.data import read_split, write_split
from pairwise.files import hash_file
from pairwise.prepare import prompts
from pairwise.ranking import ATTRIBUTES
from pairwise.weights import simplex_weights

import numpy as np
import plurality
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import without_hashes
from scipy.special import expit, xlogy
from scipy.stats import binom, kendalltau, multinomial, pearsonr
from scipy.stats import t as student

REPOSITORY = Path(__file__).resolve().parent.parent
TOP = {"dataset", "k", "k_valid", "votes", "own_split", "splits", "diversity", "plurality"} | {
    "policy"
}
FIGURES = {
    "annotators_mean",
    "majority_mean",
    "tie_rate",
    "floor_single",
    "coin_flip",
    *soft_model.LINES,
    *soft_model.LINES.values(),
    "irreducible",
    "floor_excess",
    "floor_true",
    "coin_true",
    "pairwise_disagreement",
}
ERRORS, OF_MEMBER = (
    {"brier", "brier_soft", "excess", "true_error", "l1", "l1_soft", "pearson", "pearson_soft"}
    | {"cross_entropy_soft"},
    {"brier", "disagreement", "regret", "accuracy", "tie_rate"},
)
CI = {
    f"{name}_ci"
    for name in FIGURES
    | ERRORS
    | OF_MEMBER
    | {
        "brier_soft_1",
        "l1_soft_1",
        "pearson_soft_1",
        "kendall_tau",
        "win",
        "tau",
        "distance",
        "least",
    }
}  # every figure has an interval
SPLIT = {
    "prompts",
    "pairs",
    "soft_fit",
    "ensemble",
    "members",
    "agreement",
    "categories",
    "cross_entropy",
    *FIGURES,
    *(f"{name}_ci" for name in FIGURES),
}
SOFT_LINES = "soft_single", "soft_true", "soft_scaled", "soft_scaled_true"
COMPARED = {"floor_single", "coin_flip", *soft_model.LINES}
ENSEMBLE = {"k", "alpha", "fit", "less", *ERRORS, *(f"{name}_ci" for name in ERRORS)}
MEMBER = {"j", "outlier_below", *OF_MEMBER, *(f"{name}_ci" for name in OF_MEMBER)}
DIVERSITY = {
    "prompts",
    "continuations",
    "repeated",
    "kendall_tau",
    "kendall_tau_ci",
    "constant_rankings",
    "win",
    "win_ci",
    "character",
    "policy",
    "favourites",
}


# ---- runs made by hand


def labels(i, kind):
    """Of prompt i: nine of one name, more of the other, and prompts without one."""
    return (
        {"topic": f"topic {i % 9}", "asker": None if i % 4 == 1 else f"asker {i * i % 17:02d}"}
        if kind
        else None
    )


def comparisons(rng, count, ties, truth, single, categories=False):
    """Prompts with 2 to 6 responses and 1 to 15 of their pairs; `single`: also pairs of one vote,
    and a prompt with nothing else."""
    for i in range(count):
        responses = int(rng.integers(2, 7))
        pairs = list(itertools.combinations(range(responses), 2))
        for a, b in [
            pairs[x] for x in sorted(rng.permutation(len(pairs))[: rng.integers(1, len(pairs) + 1)])
        ]:
            n = 1 if single and (i == 0 or rng.random() < 0.3) else int(rng.integers(2, 9))
            votes = int(rng.binomial(n, rng.choice([0.1, 0.5, 0.8])))
            yield prompts.Comparison(
                f"prompt {i}",
                [{"role": "user", "content": f"Question {i}?"}],
                f"Answer {a}.",
                f"Answer {b}.",
                votes,
                n - votes,
                int(rng.integers(0, 4)) if ties else 0,
                float(rng.random()) if truth else None,
                labels(i, categories),
                ("test" if i % 3 == 1 else "train") if single else None,
            )


def draw_rewards(rng, j, size):
    """Odd members on a coarse grid, with exact ties; even ones without."""
    return (rng.integers(0, 5, size) / 4 - 0.5 if j % 2 else rng.normal(size=size)).astype(
        np.float32
    )


def write_texts(run, seed, logprob):
    """continuations.parquet of 5 prompts and 12 texts, some of them twice; the third attribute of a
    text without lines is constant."""
    rng = np.random.default_rng([seed, 9])
    words = ["perhaps", "Maybe", "yes!", "why?", "12", "go", "I think", "then"]
    rows = [
        {
            "prompt_id": f"c{x}",
            "messages": [
                {"role": "user", "content": f"First {x}"},
                {"role": "user", "content": f"Last {x}"},
            ],
            "texts": [" ".join(rng.choice(words, rng.integers(1, 4))) for _ in range(12)],
        }
        for x in range(5)
    ]
    for row in rows:
        row["texts"][7] = row["texts"][2]
        if logprob:
            row["logprob"] = rng.normal(-20, 5, 12).tolist()
    pq.write_table(pa.Table.from_pylist(rows), run / "continuations.parquet")


def make(
    run,
    *,
    votes="sampled",
    ties="drop",
    truth=True,
    valid=0.2,
    continuations=True,
    k=3,
    count=24,
    single=False,
    categories=False,
    seed=0,
):
    """A run directory as the stages before evaluate.py leave it, without a model."""
    rng = np.random.default_rng(seed)
    args = argparse.Namespace(
        run=run,
        seed=seed,
        ties=ties,
        min_votes=1 if single else 2,
        test_share=0.4,
        valid_share=valid,
    )
    prompts.prepare(
        args,
        "made",
        lambda: comparisons(rng, count, ties == "half" or not truth, truth, single, categories),
        votes,
        {},
        {},
    )
    (run / "rewards").mkdir()
    (run / "logs").mkdir()
    for j in range(1, k + 1):
        for path in (run / "data").glob("*.parquet"):
            np.save(
                run / "rewards" / f"{j:02d}_{path.stem}.npy",
                draw_rewards(rng, j, sum(map(len, pq.read_table(path)["responses"].to_pylist()))),
            )
        if continuations:
            scores = draw_rewards(rng, j, (5, 12))
            if j > 1:
                scores[: 5 if j == k > 2 else 2] = (
                    0.25  # a constant ranking on two prompts; the last member is constant on all
                )
            np.save(run / "rewards" / f"{j:02d}_continuations.npy", scores)
        steps = [
            {
                "step": n,
                "loss": 0.3 / n + 0.01 * j,
                "lr": 1e-3,
                "tokens": 100,
                "pairs": 8,
                "seconds": 1.0,
                "grad_norm": 1.0,
            }
            for n in range(1, 6)
        ]
        (run / "logs" / f"{j:02d}.jsonl").write_text(
            "".join(json.dumps(step) + "\n" for step in steps)
        )
    if continuations and votes != "population":
        write_texts(run, seed, logprob=truth)
    fit_weights.main(fit_weights.parse_args(["--run", str(run)]))
    return without_hashes(run)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Not evaluated; read only."""
    return make(tmp_path_factory.mktemp("prepared") / "run")


@pytest.fixture
def run(prepared, tmp_path):
    """A copy to spoil."""
    return Path(shutil.copytree(prepared, tmp_path / "run"))


@pytest.fixture(scope="module")
def whole(prepared, tmp_path_factory):
    """Evaluated with figures and report; read only."""
    run = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("whole") / "run"))
    run_evaluate(run)
    return run


def run_evaluate(run, *flags):
    evaluate.main(evaluate.parse_args(["--run", str(run), *flags]))


def evaluated(run, *flags):
    run_evaluate(run, *flags)
    return json.loads((run / "metrics.json").read_text())


def files_of(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_best_size_is_the_smallest_of_those_equal_but_for_rounding():
    def best(*briers):
        return evaluate.best_size([{"k": k, "brier": brier} for k, brier in enumerate(briers, 1)])

    assert (
        best(0.2, 0.1, 0.1 - 1e-16) == 2
        and best(0.2, 0.1, 0.1 - 1e-8) == 3
        and best(0.1 + 1e-16, 0.1, 0.3) == 1
    )


# ---- the second computation: parquet, .npy and weights.json, pair by pair


def read_pairs(run, split):
    """Prompt number, indices into all responses, votes and truth of every pair that counts, and the
    rewards (K, R)."""
    rows, start, pairs = pq.read_table(run / "data" / f"{split}.parquet").to_pylist(), 0, []
    for number, row in enumerate(rows):
        for i, pair in enumerate(row["pairs"]):
            n = pair["votes_a"] + pair["votes_b"]
            if n >= 2:
                pairs.append(
                    (
                        number,
                        start + pair["a"],
                        start + pair["b"],
                        pair["votes_a"] / n,
                        n,
                        pair["ties"],
                        row["p_true"][i] if "p_true" in row else np.nan,
                    )
                )
        start += len(row["responses"])
    prompt, a, b, p, n, ties, truth = np.array(pairs).T
    rewards = np.stack([np.load(path) for path in sorted((run / "rewards").glob(f"*_{split}.npy"))])
    assert rewards.dtype == np.float32 and rewards.shape[1] == start
    return (
        prompt.astype(int),
        rewards[:, a.astype(int)],
        rewards[:, b.astype(int)],
        p,
        n,
        ties,
        truth,
    )


def both_orders(p_hat, p):
    """Pearson's correlation over both orders of every pair; None where one side does not vary."""
    x, y = np.concatenate([p_hat, 1 - p_hat]), np.concatenate([p, 1 - p])
    return None if np.ptp(x) < 1e-9 or np.ptp(y) < 1e-9 else pearsonr(x, y).statistic


def entropy(p, q):
    """The mean cross-entropy of forecasts q that are neither 0 nor 1, where p is not q."""
    return np.mean(-xlogy(p, q) - xlogy(1 - p, 1 - q))


def part(prompt, forecasts, p, here):
    """A row of agreement and categories without its head; forecasts: of the ensemble, and soft."""
    row = {"prompts": len(set(prompt[here])), "pairs": int(here.sum())}
    for p_hat, suffix in zip(forecasts, ("", "_soft_1")):
        row |= {
            f"brier{suffix}": np.mean((p_hat - p)[here] ** 2),
            f"l1{suffix}": np.mean(np.abs(p_hat - p)[here]),
            f"pearson{suffix}": both_orders(p_hat[here], p[here]),
        }
    return row


def expected_groups(run, split, prompt, p_hat, p):
    """p_hat: of the ensemble, and the sigmoid of member 1."""
    level = np.select(
        [np.abs(2 * p - 1) > 1 - 1e-9, np.abs(p - 0.5) >= 0.25 - 1e-9, np.abs(p - 0.5) > 1e-9],
        ["unanimous", "at least 3/4", "above 1/2"],
        "even",
    )
    agreement = [
        {"level": name} | part(prompt, p_hat, p, level == name)
        for name in ("unanimous", "at least 3/4", "above 1/2", "even")
        if (level == name).any()
    ]
    rows = pq.read_table(run / "data" / f"{split}.parquet").to_pylist()
    if "categories" not in rows[0]:
        return {"agreement": agreement, "categories": None}
    counted = sorted(set(prompt))
    categories = {}
    for name in ("topic", "asker"):
        label = {i: rows[i]["categories"][name] for i in counted}
        order = sorted(set(label.values()), key=lambda x: (-list(label.values()).count(x), str(x)))
        of_pair = np.array([order.index(label[i]) for i in prompt])
        shown = order if len(order) <= 9 else order[:8]
        categories[name] = [
            {"label": x, "labels": 1} | part(prompt, p_hat, p, of_pair == i)
            for i, x in enumerate(shown)
        ]
        if len(order) > 9:
            categories[name].append(
                {"label": None, "labels": len(order) - 8} | part(prompt, p_hat, p, of_pair >= 8)
            )
    return {"agreement": agreement, "categories": categories}


def expected(run):
    weights, stats = (
        json.loads((run / "weights.json").read_text()),
        json.loads((run / "data" / "stats.json").read_text()),
    )
    k = max(entry["k"] for entry in weights)
    result = {
        "dataset": "made",
        "k": k,
        "k_valid": None,
        "votes": stats["votes"],
        "own_split": stats["own_split"],
        "splits": {},
        "diversity": None,
        "policy": None,  # tests/test_policies.py has it
        "plurality": None,
    }
    tuned = "valid" if (run / "data" / "valid.parquet").exists() else "train"
    _, first, second, p, *_ = read_pairs(run, tuned)
    tau, a = soft_model.fit_scale_and_lapses((first - second).astype(float)[:1], np.ones(1), p)
    for path in (run / "data").glob("*.parquet"):
        prompt, first, second, p, n, ties, truth = read_pairs(run, path.stem)
        scaled = a + (1 - 2 * a) / (1 + np.exp(-tau * (first - second).astype(float)[0]))
        known = not np.isnan(truth).any()
        mean_true = lambda values, known=known: np.mean(values) if known else None  # noqa: E731
        votes = np.where(first > second, 1, np.where(first < second, 0, 0.5))
        soft = 1 / (1 + np.exp(-(first - second).astype(float)))
        h = ties if stats["ties"] == "half" else 0 * ties
        c = {
            "sampled": np.mean((p * (1 - p) - h / (4 * n)) / (n - 1)),
            "population": 0,
            "dependent": None,
        }[stats["votes"]]
        ensemble, members = [], []
        for entry in weights:
            alpha = np.array(entry["alpha"])
            p_hat, p_soft = alpha @ votes[: len(alpha)], alpha @ soft[: len(alpha)]
            brier = np.mean((p_hat - p) ** 2)
            ensemble.append(
                {
                    "k": entry["k"],
                    "alpha": entry["alpha"],
                    "fit": entry["fit"],
                    "brier": brier,
                    "brier_soft": np.mean((p_soft - p) ** 2),
                    "cross_entropy_soft": entropy(p, p_soft),
                    "excess": None if c is None else brier - c,
                    "true_error": mean_true((p_hat - truth) ** 2),
                    "l1": np.mean(np.abs(p_hat - p)),
                    "l1_soft": np.mean(np.abs(p_soft - p)),
                    "pearson": both_orders(p_hat, p),
                    "pearson_soft": both_orders(p_soft, p),
                    "less": {
                        "floor_single": brier - np.mean(np.minimum(p, 1 - p) ** 2),
                        "coin_flip": brier - np.mean((p - 0.5) ** 2),
                        "soft_single": brier - np.mean((soft[0] - p) ** 2),
                        "soft_scaled": brier - np.mean((scaled - p) ** 2),
                        "soft_hardened": None,
                    },
                }
            )
        for j, vote in enumerate(votes):
            regret = np.select([vote > 0.5, vote < 0.5], [1 - p, p], 0.5) - np.minimum(p, 1 - p)
            right = np.where(vote == 0.5, 0.5, (vote > 0.5) == (p > 0.5))[p != 0.5]
            members.append(
                {
                    "j": j + 1,
                    "brier": np.mean((vote - p) ** 2),
                    "disagreement": np.mean(vote * (1 - p) + (1 - vote) * p),
                    "regret": np.mean(regret),
                    "accuracy": right.mean() if len(right) else None,
                    "tie_rate": np.mean(vote == 0.5),
                }
            )
        epsilon, phi = c is not None and max(0, brier - c), [m["disagreement"] for m in members]
        for m in members:
            m["outlier_below"] = (
                None
                if c is None
                else [
                    (m["disagreement"] - epsilon**0.5) / (least + epsilon**0.5)
                    for least in (min(phi), np.mean(np.minimum(p, 1 - p)))
                ]
            )
        if path.stem == "valid":
            result["k_valid"] = weights[int(np.argmin([e["brier"] for e in ensemble]))]["k"]
        result["splits"][path.stem] = expected_groups(
            run, path.stem, prompt, (p_hat, soft[0]), p
        ) | {
            "prompts": len(set(prompt)),
            "pairs": len(p),
            "annotators_mean": n.mean(),
            "majority_mean": np.mean(np.maximum(p, 1 - p)),
            "tie_rate": np.mean(first == second),
            "floor_single": np.mean(np.minimum(p, 1 - p) ** 2),
            "coin_flip": np.mean((p - 0.5) ** 2),
            "soft_single": np.mean((soft[0] - p) ** 2),
            "irreducible": c,
            "floor_excess": None if c is None else np.mean(np.minimum(p, 1 - p) ** 2) - c,
            "floor_true": mean_true(np.minimum(truth, 1 - truth) ** 2),
            "coin_true": mean_true((truth - 0.5) ** 2),
            "soft_true": mean_true((soft[0] - truth) ** 2),
            "soft_scaled": np.mean((scaled - p) ** 2),
            "soft_scaled_true": mean_true((scaled - truth) ** 2),
            "soft_hardened": None,
            "soft_hardened_true": None,
            "soft_fit": {"split": tuned, "tau": tau, "a": a},
            "cross_entropy": {
                "soft_single": entropy(p, soft[0]),
                "soft_scaled": entropy(p, scaled),
                "soft_hardened": None,
                "least": entropy(p, np.clip(p, 1e-17, 1)),
            },
            "ensemble": ensemble,
            "members": members,
            "pairwise_disagreement": [[np.mean(np.abs(x - y)) for y in votes] for x in votes],
        }
    if (run / "rewards" / "01_continuations.npy").exists():
        scores = np.stack(
            [np.load(run / "rewards" / f"{j:02d}_continuations.npy") for j in range(1, k + 1)]
        )
        tau = np.full((k, k, scores.shape[1]), np.nan)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for i, j, x in np.ndindex(tau.shape):
                tau[i, j, x] = kendalltau(scores[i, x], scores[j, x]).statistic
        mean = [[None if np.isnan(cell).all() else np.nanmean(cell) for cell in row] for row in tau]
        constant = [
            int(sum(len(set(ranking)) < 2 for ranking in rankings)) for rankings in scores.tolist()
        ]
        result["diversity"] = {
            "prompts": scores.shape[1],
            "continuations": scores.shape[2],
            "kendall_tau": mean,
            "constant_rankings": constant,
        }
        result["diversity"] |= expected_of_texts(
            run, scores.astype(float), np.array(weights[-1]["alpha"])
        )
    return result


def expected_of_texts(run, scores, alpha):
    """The win matrix and what needs the texts, by loops."""
    k, size, n = scores.shape
    best = [[row.index(max(row)) for row in member] for member in scores.tolist()]
    wins = np.zeros((size, k, k))
    for x, i, j in np.ndindex(wins.shape):
        chosen = best[i][x]
        wins[x, i, j] = np.mean(
            [
                (scores[j, x, y] < scores[j, x, chosen])
                + (scores[j, x, y] == scores[j, x, chosen]) / 2
                for y in range(n)
                if y != chosen
            ]
        )
    path = run / "continuations.parquet"
    if not path.exists():
        return {
            "win": wins.mean(0).tolist(),
            "repeated": None,
            "character": None,
            "policy": None,
            "favourites": None,
        }
    rows = pq.read_table(path).to_pylist()
    tau = {name: [[] for _ in range(k)] for name in ATTRIBUTES}
    for (name, pattern), j, (x, row) in itertools.product(
        ATTRIBUTES.items(), range(k), enumerate(rows)
    ):
        counts = [len(re.findall(pattern, text, re.IGNORECASE)) for text in row["texts"]]
        if len(set(counts)) > 1 and len(set(scores[j, x])) > 1:
            tau[name][j].append(kendalltau(scores[j, x], counts).statistic)
    apart = [
        np.mean([1 - wins[x, i, j] for i, j in itertools.permutations(range(k), 2)] or [0])
        for x in range(size)
    ]
    order = sorted(range(size), key=lambda x: (-round(apart[x], 12), x))[:3]
    policy = None
    if "logprob" in rows[0]:
        betas = [10 ** (1 - i / 2) for i in range(11)]
        distance = [[] for _ in betas]
        for x, row in enumerate(rows):
            kept = [y for y in range(n) if row["texts"][y] not in row["texts"][:y]]
            for (a, b), (beta, terms) in itertools.product(
                itertools.combinations(kept, 2), zip(betas, distance)
            ):
                d = scores[:, x, a] - scores[:, x, b]
                p_bar = alpha @ expit(d / beta + row["logprob"][a] - row["logprob"][b])
                terms.append(abs(p_bar - alpha @ ((np.sign(d) + 1) / 2)))
        policy = {"beta": betas, "distance": [np.mean(terms) for terms in distance]}
    return {
        "win": wins.mean(0).tolist(),
        "repeated": sum(n - len(set(row["texts"])) for row in rows),
        "policy": policy,
        "character": {
            "attributes": list(ATTRIBUTES),
            "tau": [[np.mean(x) if x else None for x in of] for of in tau.values()],
        },
        "favourites": [
            {
                "prompt_id": f"c{x}",
                "prompt": f"Last {x}",
                "disagreement": apart[x],
                "texts": [rows[x]["texts"][best[j][x]] for j in range(k)],
            }
            for x in order
        ],
    }


def compare(found, wanted, tolerance, skip=(), where="metrics"):
    """Equal up to tolerance in every number; null, text, whole numbers and the keys exactly."""
    if isinstance(wanted, dict):
        assert set(found) - set(skip) == set(wanted) - set(skip), where
        for name in set(wanted) - set(skip):
            compare(found[name], wanted[name], tolerance, skip, f"{where}.{name}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), where
        for i, pair in enumerate(zip(found, wanted)):
            compare(*pair, tolerance, skip, f"{where}[{i}]")
    elif wanted is None or isinstance(wanted, str | int):
        alike = isinstance(found, bool) == isinstance(wanted, bool)
        assert found == wanted and alike, f"{where}: {found} and {wanted}"
    else:
        assert isinstance(found, float | int) and abs(found - wanted) <= tolerance, (
            f"{where}: {found} and {wanted}"
        )


def flat(value, path=""):
    """[(path, leaf)] of nested dicts and lists."""
    if not isinstance(value, dict | list):
        return [(path, value)]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [leaf for name, part in items for leaf in flat(part, f"{path}.{name}")]


def no_constant(name):
    raise AssertionError(f"{name} in JSON")


KINDS = {
    "truth": {},
    "no truth": {"truth": False},
    "population": {"votes": "population"},
    "dependent": {"votes": "dependent", "truth": False},
    "ties half": {"ties": "half", "truth": False},
    "ties half, truth": {"ties": "half", "votes": "dependent"},
    "no valid": {"valid": 0.0, "continuations": False},
    "categories": {"categories": True, "count": 60, "truth": False},
    "categories, one vote": {"categories": True, "single": True},
    "one member": {"k": 1},
    "seven members": {"k": 7, "count": 12},
    "few prompts": {"count": 4, "valid": 0.0},
    "one vote": {"single": True, "truth": True, "ties": "half"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_again_from_the_files(kind, tmp_path, no_figures):
    run = make(tmp_path / "run", **KINDS[kind], seed=len(kind))
    metrics = evaluated(run, "--resamples", "50")
    json.loads((run / "metrics.json").read_text(), parse_constant=no_constant)
    compare(metrics, expected(run), 1e-9, skip=CI)
    assert set(metrics) == TOP and set(metrics["splits"]) == {
        path.stem for path in (run / "data").glob("*.parquet")
    }
    assert metrics["diversity"] is None or set(metrics["diversity"]) == DIVERSITY
    assert ("valid" in metrics["splits"]) == (KINDS[kind].get("valid", 1) > 0) and (
        metrics["diversity"] is None
    ) == (kind == "no valid")
    for s in metrics["splits"].values():
        assert (
            set(s) == SPLIT
            and all(set(e) == ENSEMBLE for e in s["ensemble"])
            and all(set(m) == MEMBER for m in s["members"])
        )
        for limits in (e["brier_ci"] for e in s["ensemble"]):
            assert (limits is None) == (s["prompts"] < figures.FEWEST)
            assert limits is None or 0 <= limits[0] <= limits[1] <= 1
    test = metrics["splits"]["test"]
    assert test["tie_rate"] > 0 or kind == "few prompts"
    assert (test["ensemble"][0]["true_error"] is None) == (not KINDS[kind].get("truth", True))
    if KINDS[kind].get("continuations", True) and kind != "one member":
        tau = metrics["diversity"]["kendall_tau"]
        assert tau[-1] == [None] * len(tau) and tau[0][0] == 1 and abs(tau[0][1]) < 1


def test_the_data_s_own_attributes_are_counted(run, no_figures, monkeypatch):
    own = {"letter e": "e", "why": r"\bwhy\b"}
    stats(attributes=own)(run)
    monkeypatch.setitem(globals(), "ATTRIBUTES", own)  # what `expected` counts
    compare(evaluated(run, "--resamples", "50"), expected(run), 1e-9, skip=CI)


def test_pairs_of_one_vote_count_in_no_number(tmp_path, no_figures):
    """--min-votes 1 keeps them in train, for hard-label losses; a prompt with nothing else is no
    prompt of the evaluation, nor of its bootstrap."""
    run = make(tmp_path / "run", single=True, valid=0.0)
    before = evaluated(run, "--resamples", "200")["splits"]["train"]
    split = read_split(run, "train")
    assert before["pairs"] == (split.n >= 2).sum() < len(split.n) and before["prompts"] < len(
        split.prompt_id
    )
    rows, rewards = (
        pq.read_table(run / "data" / "train.parquet").to_pylist(),
        [np.load(run / "rewards" / f"{j:02d}_train.npy") for j in (1, 2, 3)],
    )
    for row in rows:
        keep = [i for i, pair in enumerate(row["pairs"]) if pair["votes_a"] + pair["votes_b"] >= 2]
        row["pairs"], row["p_true"] = (
            [row["pairs"][i] for i in keep],
            [row["p_true"][i] for i in keep],
        )
    kept = [bool(row["pairs"]) for row in rows]
    write_split(run / "data" / "train.parquet", [row for row in rows if row["pairs"]])
    for j in (1, 2, 3):
        np.save(
            run / "rewards" / f"{j:02d}_train.npy",
            rewards[j - 1][np.repeat(kept, [len(row["responses"]) for row in rows])],
        )
    compare(evaluated(run, "--resamples", "200")["splits"]["train"], before, 1e-12)
    for pair in (pair for row in rows for pair in row["pairs"]):
        pair["votes_a"], pair["votes_b"] = 1.0, 0.0
    write_split(run / "data" / "train.parquet", [row for row in rows if row["pairs"]])
    assert set(evaluated(run)["splits"]) == {"test"}  # no pair of train is left to evaluate


def test_figures_show_the_pairs_that_count_alone(run, monkeypatch):
    """A pair of one vote is in no number, and in no figure of all pairs."""
    path = run / "data" / "test.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[0]["pairs"][0] |= {"votes_a": 1.0, "votes_b": 0.0}
    write_split(path, rows)
    shown, draw_inputs = {}, evaluate.report.draw_inputs

    def drawn(prefixes, logs, p, p_hat, ranked):
        shown.update(p=p, p_hat=p_hat)
        return draw_inputs(prefixes, logs, p, p_hat, ranked)

    monkeypatch.setattr(evaluate.report, "draw_inputs", drawn)
    monkeypatch.setattr(evaluate.cli, "usable_cores", lambda: 1)  # drawn by this process
    metrics, split = evaluated(run, "--resamples", "50")["splits"]["test"], read_split(run, "test")
    assert metrics["pairs"] == len(shown["p"]) == len(shown["p_hat"]) == len(split.p) - 1
    np.testing.assert_array_equal(shown["p"], np.delete(split.p, 0))


def test_a_plurality_of_test_pairs_of_one_vote_is_refused(run):
    one_vote_each(run)
    with pytest.raises(InputError, match="test.parquet: no pair of two votes found"):
        plurality.read_features(run)


def test_a_figure_of_the_members_that_does_not_exist_is_null_for_each():
    members = {"disagreement": [0.2, 0.3], "one_s_own": None, "one_s_own_ci": None}
    entry = {"ensemble": [{"excess": None}], "members": members, "majority_mean": 0.7}
    for row in figures.member_rows(entry):
        assert row["one_s_own"] is row["one_s_own_ci"] is None and row["disagreement"] > 0


def test_weights_from_elsewhere_have_one_entry(run, no_figures):
    (run / "weights.json").write_text(
        json.dumps(
            [{"k": 3, "alpha": [0.5, 0.25, 0.25], "fit": "fixed", "train_mse": 0.1, "kkt": None}]
        )
    )
    metrics = evaluated(run, "--resamples", "50")
    compare(metrics, expected(run), 1e-9, skip=CI)
    assert [(e["k"], e["fit"]) for e in metrics["splits"]["test"]["ensemble"]] == [(3, "fixed")]


def test_accuracy_is_null_where_no_pair_has_a_majority(run, no_figures):
    rows = pq.read_table(run / "data" / "test.parquet").to_pylist()
    for pair in (pair for row in rows for pair in row["pairs"]):
        pair["votes_a"] = pair["votes_b"] = 2.0
    write_split(run / "data" / "test.parquet", rows)
    metrics = evaluated(run, "--resamples", "50")
    compare(metrics, expected(run), 1e-9, skip=CI)
    assert [m["accuracy"] for m in metrics["splits"]["test"]["members"]] == [None] * 3


def test_infinite_rewards_are_ranks_like_others(run, no_figures):
    """A difference that overflows float32 is certain; two equal infinities are a tie. No number
    becomes NaN."""
    path = run / "rewards" / "02_test.npy"
    rewards = np.load(path)
    outcomes = []
    for low, high in ((-np.inf, np.inf), (-3e38, 3e38)):
        extreme = rewards.copy()
        extreme[: len(extreme) // 2], extreme[len(extreme) // 2 :: 3] = high, low
        np.save(path, extreme)
        outcomes.append(evaluated(run, "--resamples", "50"))
    compare(outcomes[0], outcomes[1], 1e-12)


# ---- intervals


def clustered(prompt_count=60):
    """Errors that depend on the prompt, which have 1 to 20 pairs: (prompt of each pair, error of
    each pair)."""
    rng = np.random.default_rng(3)
    sizes = rng.integers(1, 21, prompt_count)
    prompt = np.repeat(np.arange(prompt_count), sizes)
    return prompt, rng.beta(1, 3, prompt_count)[prompt] * rng.uniform(0.5, 1, len(prompt))


def resample(prompt, errors, seed, counts=1.0):
    """sum(errors) / sum(counts) of 10,000 resamples, by numpy's own generator."""
    sums, pairs = (
        np.bincount(prompt, errors * counts),
        np.bincount(prompt, np.broadcast_to(counts, len(prompt))),
    )
    drawn = np.random.default_rng(seed).integers(0, len(sums), (10_000, len(sums)))
    with np.errstate(invalid="ignore"):
        return sums[drawn].sum(1) / pairs[drawn].sum(1)


def agrees(limits, resampled):
    """Within sampling error of both bootstraps: the standard error of a 2.5 % quantile of 10,000 is
    .16 % in probability, of the difference .22 %."""
    return all(
        np.quantile(resampled, q - 0.008) < limit < np.quantile(resampled, q + 0.008)
        for limit, q in zip(limits, (0.025, 0.975))
    )


def drawn_counts(prompts, resamples, seed):
    """How often each prompt is drawn, (resamples, prompts)."""
    return figures.evaluator.bootstrap_sums(np.eye(prompts), resamples, seed)


def test_estimate_is_that_of_an_independent_bootstrap_over_prompts():
    prompt, errors = clustered()
    sums, pairs = np.bincount(prompt, errors), np.bincount(prompt).astype(float)
    both = figures.Ratio(np.column_stack([sums, 2 * sums]), pairs)
    value, limits = figures.estimate({"x": both}, 10_000, 0).values()
    assert np.allclose(value, [errors.mean(), 2 * errors.mean()]) and np.allclose(
        limits[1], 2 * np.array(limits[0]), rtol=1e-12
    )
    assert agrees(limits[0], resample(prompt, errors, 1))
    assert not agrees(
        limits[0], resample(np.arange(len(errors)), errors, 1)
    )  # pairs drawn one by one: too narrow
    mean_of_prompts = resample(np.arange(len(sums)), sums / pairs, 1)
    assert not agrees(limits[0], mean_of_prompts) and not agrees(
        np.quantile(resample(prompt, errors, 2), [0.05, 0.95]), resample(prompt, errors, 1)
    )
    x, y = np.random.default_rng(0).random((2, 2100)) + 0.5
    value, limits = figures.estimate({"x": figures.Ratio(x, y)}, 10_000, 5).values()
    assert value == pytest.approx(x.sum() / y.sum(), rel=1e-14)
    many = drawn_counts(2100, 10_000, 5)
    np.testing.assert_allclose(
        limits, np.percentile(many @ x / (many @ y), [2.5, 97.5]), rtol=1e-12
    )


def test_estimate_keeps_the_nesting_and_resamples_all_figures_alike():
    """What is no figure stays as it is; a ratio and its copy elsewhere agree, and so does the
    correlation of x and x, which is 1 in every resample."""
    x, pairs = np.random.default_rng(0).random((2, 50)) + 0.5
    ratio = figures.Ratio(x, pairs)
    nested = {
        "name": "kept",
        "none": figures.Ratio(None, pairs),
        "list": [{"k": 1, "x": ratio}, {"k": 2, "x": ratio}],
        "dict": {"r": figures.Correlation(x, x, x), "alpha": [0.5, 0.5], "null": None},
    }
    result = figures.estimate(nested, 300, 0)
    assert list(result) == ["name", "none", "none_ci", "list", "dict"]
    assert result["name"] == "kept" and result["none"] is result["none_ci"] is None
    first, second = result["list"]
    assert first == second | {"k": 1} and list(first) == ["k", "x", "x_ci"]
    assert first["x"] == x.sum() / pairs.sum() and first["x_ci"][0] < first["x"] < first["x_ci"][1]
    assert result["dict"]["r"] == pytest.approx(1, abs=1e-15)
    assert result["dict"]["r_ci"] == pytest.approx([1, 1], abs=1e-15)
    assert result["dict"]["alpha"] == [0.5, 0.5] and result["dict"]["null"] is None
    assert nested["list"][0]["x"] is ratio  # what was given is not changed


def test_estimate_where_nothing_is_to_be_counted(monkeypatch):
    """Resamples without any pair that counts are left out; where there is none at all, the figure
    does not exist; where there are few, its interval does not."""
    monkeypatch.setattr(figures, "FEWEST", 1)
    top, bottom = (
        np.array([[1.0, 0, 3], [0, 0, 0], [0, 0, 0]]),
        np.array([[2.0, 0, 4], [0, 0, 0], [0, 0, 0]]),
    )
    value, limits = figures.estimate({"x": figures.Ratio(top, bottom)}, 2000, 0).values()
    assert value == [0.5, None, 0.75] and limits == [[0.5, 0.5], [None, None], [0.75, 0.75]]
    monkeypatch.undo()
    ones = np.ones(20)
    for few, limits in ((9, None), (10, [1, 1])):
        here = (np.arange(20) < few).astype(float)
        given = {"x": figures.Ratio(here, here), "r": figures.Correlation(here, here, here)}
        result = figures.estimate(given | {"y": figures.Ratio(here, ones)}, 300, 0)
        assert result["x_ci"] == result["r_ci"] == limits and result["x"] == result["r"] == 1
        assert result["y_ci"] is not None and figures.interval(ones, few) == limits


def test_a_prompt_counts_in_a_correlation_where_one_side_varies():
    ones, nine = np.ones(10), np.minimum(np.arange(10.0), 1)
    for sides, counted in (((nine, ones), True), ((ones, nine), True), ((nine, nine), False)):
        result = figures.estimate({"r": figures.Correlation(nine, *sides)}, 50, 0)
        assert (result["r_ci"] is not None) == counted


def test_no_correlation_is_beyond_1():
    ones = np.ones(2)
    assert figures.Correlation.value((1 + 1e-15) * ones, ones, ones).tolist() == [1, 1]
    assert figures.Correlation.value((-1 - 1e-15) * ones, ones, ones).tolist() == [-1, -1]


def test_one_half_but_for_rounding_has_no_correlation():
    terms = figures.agreement_terms(np.nextafter(0.5, [0, 1]), np.array([0.25, 1.0]))
    assert terms[1:3].tolist() == [[0, 0], [0, 0]]


def test_a_member_that_sides_with_every_majority_has_no_regret():
    """Not one below 0 either, by rounding: prompts of all two pairs of seven annotators."""
    p = np.array(list(itertools.product(range(8), repeat=2))).ravel() / 7
    a, b = np.arange(len(p)), np.full(len(p), len(p))
    rewards = np.append(np.sign(p - 0.5), 0).astype(np.float32)[None]
    split = SimpleNamespace(p=p, pair_start=np.arange(0, len(p) + 1, 2))
    sums = figures.evaluator.pair_statistics(rewards, a, b, p, split.pair_start)
    form = sums["vote_vote"], sums["vote_p"], sums["p_p"]
    regret = figures.member_figures(split, sums, form)["regret"].top
    assert (regret >= 0).all() and regret == pytest.approx(0, abs=1e-15)


def test_rounding_leaves_no_range(tmp_path, no_figures):
    """Weights that add to more than one, members that are always wrong or right: no share, error or
    correlation is above 1, no correlation below -1, no regret below 0."""
    run = make(tmp_path / "run", valid=0.0, continuations=False, count=40)
    signs = {1: 1, 2: 1, 3: -1}
    for split in ("train", "test"):
        rows = pq.read_table(run / "data" / f"{split}.parquet").to_pylist()
        for pair in (pair for row in rows for pair in row["pairs"]):
            pair["votes_a"], pair["votes_b"] = (3.0, 0.0) if pair["a"] > pair["b"] else (0.0, 3.0)
        write_split(run / "data" / f"{split}.parquet", rows)
        sizes = [np.arange(len(row["responses"])) for row in rows]
        for j, sign in signs.items():
            reward = -sign * np.concatenate(sizes).astype(np.float32)
            np.save(run / "rewards" / f"{j:02d}_{split}.npy", reward)
    alphas = [1.0], [0.9, 0.1 + 4e-10], [0.3, 0.7 + 4e-10, 0.0]
    entries = [{"k": len(alpha), "alpha": alpha, "fit": "fixed"} for alpha in alphas]
    (run / "weights.json").write_text(json.dumps(entries))
    metrics = evaluated(run, "--resamples", "50")
    test = metrics["splits"]["test"]
    wrong = test["ensemble"][-1]
    assert wrong["brier"] == wrong["l1"] == 1 and wrong["pearson"] == -1
    assert [m["regret"] for m in test["members"]] == [1, 1, 0]
    for where, x in flat(metrics["splits"]):
        name = re.split(r"[.\[]", where)[-1] if "_ci" not in where else where.split(".")[-1]
        low = -1 if name.startswith(("pearson", "excess")) else 0
        if ".less." in where:
            low = -1
        if "cross_entropy" in where:  # It has no upper end.
            assert x is None or x >= 0, (where, x)
        elif name.startswith(tuple(FIGURES | ERRORS | OF_MEMBER)) and "annotators" not in name:
            assert x is None or low <= x <= 1, (where, x)


def test_every_interval_of_a_run_is_that_of_an_independent_bootstrap(
    tmp_path, no_figures, monkeypatch
):
    monkeypatch.setattr(figures, "FEWEST", 1)  # The continuations are of five prompts.
    run = make(tmp_path / "run", count=240)
    metrics = evaluated(run)
    for split, s in metrics["splits"].items():
        prompt, first, second, p, n, _, truth = read_pairs(run, split)
        votes, soft, c = (
            (np.sign(first - second) + 1) / 2,
            1 / (1 + np.exp(-(first - second).astype(float))),
            p * (1 - p) / (n - 1),
        )
        tau, a = s["soft_fit"]["tau"], s["soft_fit"]["a"]
        scaled = a + (1 - 2 * a) * expit(tau * (first - second).astype(float)[0])
        terms = {
            "annotators_mean": n,
            "majority_mean": np.maximum(p, 1 - p),
            "tie_rate": (votes == 0.5).mean(0),
            "floor_single": np.minimum(p, 1 - p) ** 2,
            "coin_flip": (p - 0.5) ** 2,
            "soft_single": (soft[0] - p) ** 2,
            "irreducible": c,
            "floor_excess": np.minimum(p, 1 - p) ** 2 - c,
            "floor_true": np.minimum(truth, 1 - truth) ** 2,
            "coin_true": (truth - 0.5) ** 2,
            "soft_true": (soft[0] - truth) ** 2,
            "soft_scaled": (scaled - p) ** 2,
            "soft_scaled_true": (scaled - truth) ** 2,
        }
        checks = [(s[f"{name}_ci"], term, 1.0) for name, term in terms.items()]
        for e in s["ensemble"]:
            hard, mixed = (
                np.array(e["alpha"]) @ votes[: e["k"]],
                np.array(e["alpha"]) @ soft[: e["k"]],
            )
            checks += [
                (e["brier_ci"], (hard - p) ** 2, 1.0),
                (e["brier_soft_ci"], (mixed - p) ** 2, 1.0),
                (e["excess_ci"], (hard - p) ** 2 - c, 1.0),
                (e["true_error_ci"], (hard - truth) ** 2, 1.0),
                *(
                    (e["less"][f"{name}_ci"], (hard - p) ** 2 - terms[name], 1.0)
                    for name in COMPARED - {"soft_hardened"}
                ),
                (e["l1_ci"], np.abs(hard - p), 1.0),
                (e["l1_soft_ci"], np.abs(mixed - p), 1.0),
            ]
            for name, p_hat in (
                ("pearson_ci", hard),
                ("pearson_soft_ci", mixed),
            ):  # of the counts of prompts, over both orders
                xy, xx, yy = (
                    np.bincount(prompt, x)
                    for x in ((p_hat - 0.5) * (p - 0.5), (p_hat - 0.5) ** 2, (p - 0.5) ** 2)
                )
                drawn = np.random.default_rng(e["k"]).integers(0, len(xy), (10_000, len(xy)))
                assert agrees(
                    e[name], xy[drawn].sum(1) / np.sqrt(xx[drawn].sum(1) * yy[drawn].sum(1))
                ), (split, name)
        for row in s["agreement"]:
            share = np.maximum(p, 1 - p)
            low, high = {
                "unanimous": (1, 2),
                "at least 3/4": (0.75, 1),
                "above 1/2": (0.501, 0.75),
                "even": (0.5, 0.501),
            }[row["level"]]
            here = (share >= low) & (share < high)
            checks += [
                (row["brier_ci"], np.where(here, (hard - p) ** 2, 0), here),
                (row["l1_ci"], np.where(here, np.abs(hard - p), 0), here),
                (row["brier_soft_1_ci"], np.where(here, (soft[0] - p) ** 2, 0), here),
                (row["l1_soft_1_ci"], np.where(here, np.abs(soft[0] - p), 0), here),
            ]
        for m, v in zip(s["members"], votes):
            phi, majority = (
                v * (1 - p) + (1 - v) * p,
                np.where(v == 0.5, 0.5, (v > 0.5) == (p > 0.5)),
            )
            checks += [
                (m["brier_ci"], (v - p) ** 2, 1.0),
                (m["disagreement_ci"], phi, 1.0),
                (m["regret_ci"], phi - np.minimum(p, 1 - p), 1.0),
                (m["accuracy_ci"], majority, p != 0.5),
            ]
        checks += [
            (s["pairwise_disagreement_ci"][i][j], np.abs(votes[i] - votes[j]), 1.0)
            for i, j in ((0, 1), (2, 1))
        ]
        assert len(checks) == len(FIGURES) - 3 + 3 * 10 + 4 * 4 + 3 * 4 + 2
        for number, (limits, term, counts) in enumerate(checks):
            drawn = resample(prompt, term, number, counts)
            drawn = drawn[~np.isnan(drawn)]  # a resample can lack all pairs of a level
            assert agrees(limits, drawn), (
                split,
                number,
                limits,
                np.quantile(drawn, [0.025, 0.975]),
            )
    scores = np.stack([np.load(run / "rewards" / f"{j:02d}_continuations.npy") for j in (1, 2, 3)])
    tau = np.array(
        [
            np.nan,
            np.nan,
            *(kendalltau(x, y).statistic for x, y in zip(scores[1, 2:], scores[0, 2:])),
        ]
    )  # member 2 is constant on two prompts
    limits, drawn = (
        metrics["diversity"]["kendall_tau_ci"],
        resample(np.arange(5), np.nan_to_num(tau), 0, 1.0 - np.isnan(tau)),
    )
    assert np.allclose(
        limits[1][0], np.nanquantile(drawn, [0.025, 0.975]), atol=0.1 * np.ptp(limits[1][0])
    )
    d = metrics["diversity"]
    stands = [
        np.mean([(y < row[best]) + (y == row[best]) / 2 for i, y in enumerate(row) if i != best])
        for row, best in zip(scores[1].astype(float), scores[0].argmax(1))
    ]
    words = [
        [len(re.findall(ATTRIBUTES["words"], text)) for text in row["texts"]]
        for row in pq.read_table(run / "continuations.parquet").to_pylist()
    ]
    taus = np.array([kendalltau(x, y).statistic for x, y in zip(scores[0], words)])
    for limits_of, terms in (
        (d["win_ci"][0][1], np.array(stands)),
        (d["character"]["tau_ci"][0][0], taus),
    ):
        assert np.allclose(
            limits_of,
            np.quantile(resample(np.arange(5), terms, 0, 1.0), [0.025, 0.975]),
            atol=0.1 * np.ptp(limits_of),
        )
    assert all(
        low <= x <= high
        for x, (low, high) in zip(d["policy"]["distance"], d["policy"]["distance_ci"])
    )
    assert (
        limits[2] == [[None, None]] * 3
        and limits[0][0] == [1, 1]
        and metrics["diversity"]["constant_rankings"] == [0, 2, 5]
    )


def test_refitted_intervals_are_those_of_weights_fitted_to_each_resample(tmp_path, no_figures):
    run = make(tmp_path / "run", count=40)
    plain, metrics = (
        evaluated(run, "--resamples", "60"),
        evaluated(run, "--resamples", "60", "--refit"),
    )
    (prompt, first, second, p, *_), (at, one, two, q, n, _, truth) = (
        read_pairs(run, "train"),
        read_pairs(run, "test"),
    )
    votes, test_votes = (np.sign(first - second) + 1) / 2, (np.sign(one - two) + 1) / 2
    soft, c = 1 / (1 + np.exp(-(one - two).astype(float))), q * (1 - q) / (n - 1)
    counts = [drawn_counts(int(x.max()) + 1, 60, seed)[:, x] for x, seed in ((prompt, 1), (at, 0))]
    for e in metrics["splits"]["test"]["ensemble"]:
        size, drawn = e["k"], []
        for train, test in zip(*counts):
            off = np.sqrt(train) * (votes[:size] - p)
            alpha = simplex_weights(off @ off.T / train.sum())
            hard, mixed = alpha @ test_votes[:size], alpha @ soft[:size]
            drawn.append(
                [
                    np.average(x, weights=test)
                    for x in (
                        (hard - q) ** 2,
                        (mixed - q) ** 2,
                        (hard - q) ** 2 - c,
                        (hard - truth) ** 2,
                    )
                ]
            )
        limits = [e[f"{name}_refit_ci"] for name in ("brier", "brier_soft", "excess", "true_error")]
        np.testing.assert_allclose(limits, np.percentile(drawn, [2.5, 97.5], axis=0).T, atol=1e-9)
    for split in metrics["splits"]:
        for e in metrics["splits"][split]["ensemble"]:
            refitted = {name for name in e if name.endswith("_refit_ci")}
            assert len(refitted) == (0 if split == "train" else 4)
            for name in refitted:
                del e[name]
    compare(metrics, plain, 0)


def test_few_train_prompts_have_no_refitted_interval(tmp_path, no_figures):
    run = make(tmp_path / "run", valid=0.5, continuations=False, count=25)
    splits = evaluated(run, "--resamples", "20", "--refit")["splits"]
    assert splits["train"]["prompts"] < 10 == splits["test"]["prompts"]
    for e in splits["test"]["ensemble"]:
        assert e["brier_ci"] is not None and e["brier_refit_ci"] is None


def test_refitted_weights_are_those_of_the_pairs_that_count(tmp_path, no_figures, monkeypatch):
    """Train's pairs of one vote are in no weights, those fitted anew included."""
    monkeypatch.setattr(figures, "FEWEST", 1)
    run = make(tmp_path / "run", single=True, valid=0.0)
    monkeypatch.setattr(
        figures.evaluator,
        "bootstrap_sums",
        lambda sums, resamples, seed: np.tile(sums.sum(0), (resamples, 1)),
    )
    for e in evaluated(run, "--resamples", "3", "--refit")["splits"]["test"]["ensemble"]:
        assert e["brier_refit_ci"] == pytest.approx([e["brier"]] * 2, abs=1e-9)


def test_more_pairs_of_the_same_prompts_do_not_narrow_the_interval(run, no_figures):
    before = evaluated(run)
    for split in before["splits"]:
        rows = pq.read_table(run / "data" / f"{split}.parquet").to_pylist()
        for row in rows:
            row["pairs"], row["p_true"] = 3 * row["pairs"], 3 * row["p_true"]
        write_split(run / "data" / f"{split}.parquet", rows)
    after = evaluated(run)
    assert after["splits"]["test"]["pairs"] == 3 * before["splits"]["test"]["pairs"]
    compare(after, before, 1e-12, skip={"pairs"})


def test_seed_and_resamples_change_the_intervals_only(run, no_figures):
    first = evaluated(run, "--resamples", "300")
    for flags in (("--resamples", "301"), ("--resamples", "300", "--seed", "1")):
        other = evaluated(run, *flags)
        compare(other, first, 1e-15, skip=CI)
        assert (
            other["splits"]["test"]["ensemble"][-1]["brier_ci"]
            != first["splits"]["test"]["ensemble"][-1]["brier_ci"]
        )


# ---- the irreducible error, exactly: all outcomes with their probabilities

SHARES = [0, 0.1, 0.25, 1 / 3, 0.5, 0.77, 0.9, 1]


def estimate(p, n, halves=0.0):
    return float(
        theory.irreducible(np.array([p]), np.array([float(n)]), np.array([float(halves)])).item()
    )


@pytest.mark.parametrize("n", [2, 3, 4, 7, 20])
@pytest.mark.parametrize("truth", SHARES)
def test_irreducible_is_unbiased(n, truth):
    outcomes = np.arange(n + 1)
    chance = binom.pmf(outcomes, n, truth)
    variance = chance @ (outcomes / n - truth) ** 2
    assert abs(chance @ [estimate(x / n, n) for x in outcomes] - variance) < 1e-12
    assert abs(variance - truth * (1 - truth) / n) < 1e-12
    for predicted in (0, 0.3, 0.5, 1):  # Lemma 1: the expected Brier score is the true error and C
        assert (
            abs(chance @ (predicted - outcomes / n) ** 2 - (predicted - truth) ** 2 - variance)
            < 1e-12
        )


@pytest.mark.parametrize("n", [2, 3, 4, 7])
@pytest.mark.parametrize("a, tie", [(0.2, 0.3), (0.5, 0.5), (0, 1), (0.7, 0), (0.1, 0.8), (0, 0.5)])
def test_irreducible_is_unbiased_with_ties_as_halves(n, a, tie):
    chance, value, estimates = [], [], []
    for x, t in itertools.product(range(n + 1), repeat=2):
        if x + t <= n:
            chance.append(multinomial.pmf([x, t, n - x - t], n, [a, tie, 1 - a - tie]))
            value.append((x + t / 2) / n)
            estimates.append(estimate(value[-1], n, t))
    chance, value = np.array(chance), np.array(value)
    assert abs(chance.sum() - 1) < 1e-12
    variance = chance @ (value - a - tie / 2) ** 2
    assert abs(chance @ estimates - variance) < 1e-12
    for predicted in (0, 0.3, 1):
        assert (
            abs(chance @ (predicted - value) ** 2 - (predicted - a - tie / 2) ** 2 - variance)
            < 1e-12
        )


def test_irreducible_with_ties_dropped_is_unbiased_given_the_votes_that_remain():
    n, a, b = 5, 0.3, 0.4
    # Given that `left` votes are no ties they are binomial, with the share of a among the decided.
    for left in range(2, n + 1):
        chance = binom.pmf(np.arange(left + 1), left, a / (a + b))
        assert (
            abs(
                chance @ [estimate(x / left, left) for x in range(left + 1)]
                - a * b / (a + b) ** 2 / left
            )
            < 1e-12
        )


def test_reference_lines_by_hand():
    p = np.array([0, 0.25, 0.5, 0.75, 1])
    assert figures.floor_single(p).tolist() == [
        0,
        0.25**2,
        0.25,
        0.25**2,
        0,
    ] and figures.coin_flip(p).tolist() == [0.25, 0.0625, 0, 0.0625, 0.25]
    assert theory.irreducible(p[1:3], np.array([4.0, 2.0]), np.array([0.0, 0.0])) == pytest.approx(
        [0.25 * 0.75 / 3, 0.25]
    )
    assert (
        theory.irreducible(p[2:3], np.array([2.0]), np.array([2.0])) == 0
    )  # both votes were ties, and always would be
    halves, n, none = np.array([1.5, 2.5, 1.0]), np.array([2.0, 3.0, 2.0]), np.zeros(3)
    c = theory.irreducible(halves / n, n, none)  # Where votes are halves one was a tie, at least.
    assert c == pytest.approx(theory.irreducible(halves / n, n, np.array([1.0, 1.0, 0.0])))
    assert (figures.floor_excess(halves / n, c) >= 0).all()


def test_cross_entropy_of_what_rounding_has_made_certain():
    """A forecast is 2^-53 away from 0 and from 1, even where float64 has a nearer one."""
    q, p = np.array([0, 2.0**-60, 1, 0, 1]), np.array([1, 1, 0, 0, 1])
    wrong = 53 * math.log(2)
    assert figures.cross_entropy(q, p) == pytest.approx([wrong, wrong, wrong, 0, 0], abs=1e-12)


def test_floor_less_irreducible_is_the_chance_that_two_annotators_dissent():
    """docs/method.md: term by term, for all votes a, b and ties as halves of up to eight people."""
    for a, b, ties in itertools.product(range(9), repeat=3):
        n = a + b + ties
        if not 2 <= n <= 8 or a < b:
            continue
        p = np.array([(a + ties / 2) / n, (b + ties / 2) / n])  # both orders of the pair
        c = theory.irreducible(p, np.full(2, n), np.full(2, ties))
        people = [0.0] * a + [1.0] * b + [0.5] * ties
        both = np.mean([x * y for x, y in itertools.permutations(people, 2)])
        found = figures.floor_excess(p, c)
        assert found == pytest.approx([both] * 2, abs=1e-12)
        assert (found == 0).all() == (b + ties <= 1)  # exactly zero, not by a tolerance
        assert not np.signbit(found).any() and (ties or n > 3 or not found.any())
    assert figures.floor_excess(np.array([0.5]), 1 / 12) == pytest.approx(1 / 4 - 1 / 12)


def test_nothing_is_below_the_floor_in_expectation_with_three_votes():
    """Over all outcomes of n votes: E (q - p)^2 - E floor is (q - truth)^2 for n of 2 and 3, so the
    truth itself has 0; with four votes it is below."""
    for n, truth, q in itertools.product([2, 3, 4], SHARES, SHARES):
        chance, p = binom.pmf(np.arange(n + 1), n, truth), np.arange(n + 1) / n
        least = chance @ ((q - p) ** 2 - figures.floor_single(p))
        assert least == pytest.approx((q - truth) ** 2, abs=1e-12) or n == 4
        assert n < 4 or truth in (0, 1) or q != truth or least < -1e-4


# ---- what changes no number


def rewrite(run, change):
    """change(rows, list of rewards per prompt) -> the same of every split; weights are fitted
    anew."""
    for path in (run / "data").glob("*.parquet"):
        rows = pq.read_table(path).to_pylist()
        files = sorted((run / "rewards").glob(f"*_{path.stem}.npy"))
        starts = np.cumsum([len(row["responses"]) for row in rows])[:-1]
        rewards = [np.split(np.load(file), starts) for file in files]
        rows, rewards = change(rows, rewards)
        write_split(path, rows)
        for file, parts in zip(files, rewards):
            np.save(file, np.concatenate(parts))
    fit_weights.main(fit_weights.parse_args(["--run", str(run)]))


@pytest.mark.parametrize("ties", ["drop", "half"])
def test_swapping_the_sides_of_every_pair_changes_no_number(ties, tmp_path, no_figures):
    run = make(tmp_path / "run", ties=ties)

    def swap(rows, rewards):
        for row in rows:
            row["pairs"] = [
                {
                    "a": x["b"],
                    "b": x["a"],
                    "votes_a": x["votes_b"],
                    "votes_b": x["votes_a"],
                    "ties": x["ties"],
                }
                for x in row["pairs"]
            ]
            row["p_true"] = [1 - x for x in row["p_true"]]
        return rows, rewards

    before, weights = (
        evaluated(run, "--resamples", "300"),
        json.loads((run / "weights.json").read_text()),
    )
    rewrite(run, swap)
    compare(evaluated(run, "--resamples", "300"), before, 1e-12)
    compare(json.loads((run / "weights.json").read_text()), weights, 1e-12)


def test_order_of_prompts_and_of_pairs_changes_intervals_only(run, no_figures):
    def shuffle(rows, rewards):
        rng = np.random.default_rng(len(rows))
        for row in rows:
            order = rng.permutation(len(row["pairs"]))
            row["pairs"], row["p_true"] = (
                [row["pairs"][i] for i in order],
                [row["p_true"][i] for i in order],
            )
        order = rng.permutation(len(rows))
        return [rows[i] for i in order], [[parts[i] for i in order] for parts in rewards]

    before = evaluated(run)
    rewrite(run, shuffle)
    after = evaluated(run)
    compare(after, before, 1e-12, skip=CI)
    ci = [m["splits"]["test"]["ensemble"][-1]["brier_ci"] for m in (before, after)]
    assert ci[0] != ci[1] and np.allclose(*ci, atol=0.1 * (ci[0][1] - ci[0][0]))


def test_monotone_transforms_of_rewards_change_no_hard_number(run, no_figures):
    before = evaluated(run)
    for path in (run / "rewards").glob("*.npy"):
        old = np.load(path)
        ranks = np.unique(old, return_inverse=True)[1].reshape(old.shape).astype(np.float32)
        np.save(path, {1: ranks**2, 2: ranks - 1000, 3: np.exp(ranks / 50)}[int(path.name[:2])])
    fit_weights.main(fit_weights.parse_args(["--run", str(run)]))
    soft = {
        f"{name}{ci}"
        for figure in ("brier", "l1", "pearson")
        for name in (f"{figure}_soft", f"{figure}_soft_1", "cross_entropy_soft", *SOFT_LINES)
        for ci in ("", "_ci")
    }
    after = evaluated(run)
    assert (
        after["diversity"].pop("policy")["distance"]
        != before["diversity"].pop("policy")["distance"]
    )  # a policy knows how much better
    compare(after, before, 0, skip=soft | {"soft_fit", "cross_entropy"})
    assert all(
        after["splits"]["test"][name] != before["splits"]["test"][name] for name in SOFT_LINES
    )


# ---- the stage


def test_two_evaluations_give_the_same_bytes_and_out_leaves_the_run_alone(whole, tmp_path):
    before = files_of(whole)
    run_evaluate(whole, "--out", str(tmp_path / "new" / "out"))
    assert files_of(whole) == before
    out = files_of(tmp_path / "new" / "out")
    figures = {name for name in before if name.startswith("figures/")} - {
        "figures/data_votes.png",
        "figures/data_votes.pdf",
    }  # data preparation's
    assert {
        f"figures/{name}.png"
        for name in (
            "calibration",
            "votes",
            "reliability",
            "kendall",
            "wins",
            "policies",
            "weights",
            "training",
        )
    } <= figures
    assert set(out) == {"metrics.json", "report.html"} | figures
    assert all(out[name] == before[name] for name in {"metrics.json"} | figures)


def test_finished_stage_is_skipped_and_says_so(whole, tmp_path, capsys):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    run_evaluate(run)
    out = capsys.readouterr().out
    assert (
        "evaluate: nothing has changed, skipped" in out
        and "floor of any single" in out
        and str(run / "report.html") in out
    )
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "change",
    [
        lambda run: np.save(
            run / "rewards/01_train.npy", np.load(run / "rewards/01_train.npy")[::-1]
        ),
        lambda run: np.save(run / "rewards/02_continuations.npy", np.zeros((5, 12), np.float32)),
        lambda run: (run / "metrics.json").unlink(),
        lambda run: (run / "weights.json").write_text(
            (run / "weights.json").read_text().replace("qp", "fixed")
        ),
    ],
)
def test_whatever_changes_is_evaluated_again(run, change, no_figures, capsys):
    run_evaluate(run, "--resamples", "50")
    run_evaluate(run, "--resamples", "50")
    assert "skipped" in capsys.readouterr().out
    change(run)
    compare(evaluated(run, "--resamples", "50"), expected(run), 1e-9, skip=CI)
    assert "skipped" not in capsys.readouterr().out


# ---- bad input


def texts_of(run, change):
    path = run / "continuations.parquet"
    pq.write_table(
        pa.Table.from_pylist([change(row) for row in pq.read_table(path).to_pylist()]), path
    )


def put(name, array):
    return lambda run: np.save(run / "rewards" / name, array)


def poke(name, value):
    def spoil(run):
        rewards = np.load(run / "rewards" / name)
        rewards.flat[3] = value
        np.save(run / "rewards" / name, rewards)

    return spoil


def delete(pattern):
    return lambda run: [path.unlink() for path in run.glob(pattern)]


def text(name, content):
    return lambda run: (run / name).write_text(content)


def weights(*alphas, **more):
    return text(
        "weights.json",
        json.dumps([{"k": len(alpha), "alpha": alpha, "fit": "qp"} | more for alpha in alphas]),
    )


def stats(**changes):
    def spoil(run):
        path = run / "data" / "stats.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def column(file, name, values):
    """A column of a Parquet file of the run, in the place of the one that it may have."""

    def spoil(run):
        table = pq.read_table(run / file)
        table = table.drop_columns([name]) if name in table.column_names else table
        pq.write_table(table.append_column(name, [values * table.num_rows]), run / file)

    return spoil


def one_vote_each(run):
    def change(row):
        of_one = {"votes_a": 1.0, "votes_b": 0.0, "ties": 0.0}
        return row | {"pairs": [pair | of_one for pair in row["pairs"]]}

    path = run / "data" / "test.parquet"
    table = pq.read_table(path)
    rows = [change(row) for row in table.to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)


W3 = [0.5, 0.25, 0.25]
BAD = {
    "votes of no kind": (
        stats(votes="Population"),
        "stats.json: votes: 'Population' found, sampled, population or dependent expected",
    ),
    "a broken pattern": (
        stats(attributes={"stars": "*"}),
        r"stats.json: attributes: stars: '\*' found, a regular expression expected",
    ),
    "no attributes": (stats(attributes={}), "stats.json: attributes: none found, at least 1"),
    "a text that is null": (
        column("continuations.parquet", "texts", [["x", None] * 6]),
        r"continuations.parquet: prompt 1: texts\[1\]: null found, text expected",
    ),
    "a logprob that is null": (
        column("continuations.parquet", "logprob", [[None] * 12]),
        r"continuations.parquet: prompt 1: logprob\[0\]: null found, a number expected",
    ),
    "messages as text": (
        column("continuations.parquet", "messages", ["why?"]),
        "continuations.parquet: prompt 1: messages: text found, a list expected",
    ),
    "categories as text": (
        column("data/test.parquet", "categories", ["coding"]),
        "test.parquet: not prepared data .categories: string found, a struct",
    ),
    "one vote each": (one_vote_each, "test.parquet: no pair of two votes found"),
    "a step without its loss": (
        text("logs/01.jsonl", '{"loss": 0.1}\n{"step": 2}\n'),
        r"01.jsonl: \[1\]: no loss found",
    ),
    "NaN in test": (
        poke("02_test.npy", np.nan),
        r"02_test.npy: member 2, split test: 1 rewards are NaN, the first at index 3",
    ),
    "NaN in train": (poke("03_train.npy", np.nan), r"member 3, split train: .* NaN"),
    "NaN in valid": (poke("01_valid.npy", np.nan), r"member 1, split valid: .* NaN"),
    "NaN in continuations": (
        poke("02_continuations.npy", np.nan),
        r"member 2, split continuations: .* NaN",
    ),
    "no test rewards of the last": (
        delete("rewards/03_test.npy"),
        r"weights for K = 3 found, rewards of K = 2",
    ),
    "no train rewards": (delete("rewards/02_train.npy"), r"02_train.npy: no such file"),
    "no valid rewards": (delete("rewards/01_valid.npy"), r"01_valid.npy: no such file"),
    "no continuations of one": (
        delete("rewards/02_continuations.npy"),
        r"02_continuations.npy: no such file",
    ),
    "no continuations of the first": (
        delete("rewards/01_continuations.npy"),
        r"01_continuations.npy: no such file",
    ),
    "no continuations' rewards": (
        delete("rewards/*_continuations.npy"),
        r"01_continuations.npy: no such file",
    ),
    "gap": (delete("rewards/02_*"), r"members \[1, 3\] found, 1 to 2 expected"),
    "no rewards": (delete("rewards/*"), "no rewards; train_rm.py makes them"),
    "too short": (
        put("02_test.npy", np.zeros(3, np.float32)),
        r"02_test.npy: float32 \(3,\) found, float32 \(\d+,\) expected",
    ),
    "two columns": (put("02_test.npy", np.zeros((3, 2), np.float32)), r"float32 \(3, 2\) found"),
    "float64": (
        lambda run: np.save(
            run / "rewards/02_test.npy", np.load(run / "rewards/02_test.npy").astype(float)
        ),
        r"02_test.npy: float64 \(\d+,\) found, float32",
    ),
    "other continuations": (
        put("02_continuations.npy", np.zeros((5, 11), np.float32)),
        r"02_continuations.npy: float32 \(5, 11\) found, float32 \(5, 12\) expected",
    ),
    "flat continuations": (
        put("01_continuations.npy", np.zeros(60, np.float32)),
        r"01_continuations.npy: float32 \(60,\) found, float32 \(5, 12\) expected",
    ),
    "texts of other continuations": (
        lambda run: texts_of(
            run, lambda row: row | {"texts": row["texts"][:11], "logprob": row["logprob"][:11]}
        ),
        r"float32 \(5, 12\) found, float32 \(5, 11\) expected",
    ),
    "uneven texts": (
        lambda run: texts_of(
            run, lambda row: row | {"texts": row["texts"][: 12 - int(row["prompt_id"] == "c3")]}
        ),
        r"continuations.parquet: prompt 4: 11 texts found, 12 expected",
    ),
    "uneven logprob": (
        lambda run: texts_of(run, lambda row: row | {"logprob": row["logprob"][:3]}),
        r"continuations.parquet: prompt 1: 3 logprob found, 12 expected",
    ),
    "no texts": (
        lambda run: texts_of(
            run, lambda row: {"prompt_id": row["prompt_id"], "messages": row["messages"]}
        ),
        r"continuations.parquet: not continuations .*texts",
    ),
    "continuations no array": (
        text("rewards/01_continuations.npy", "reward"),
        "01_continuations.npy: not a .npy array",
    ),
    "no array": (text("rewards/01_train.npy", "reward"), "01_train.npy: not a .npy array"),
    "empty file": (text("rewards/01_train.npy", ""), "01_train.npy: not a .npy array"),
    "pickle": (
        lambda run: np.save(run / "rewards/01_train.npy", np.array([None]), allow_pickle=True),
        "01_train.npy: not a .npy array",
    ),
    "weights for fewer": (
        weights([1.0], [0.5, 0.5]),
        r"weights.json: weights for K = 2 found, rewards of K = 3 members; "
        "fit_weights.py fits them anew",
    ),
    "weights for more": (weights([0.25] * 4), r"weights for K = 4 found, rewards of K = 3"),
    "no weights": (delete("weights.json"), "weights.json: no such file"),
    "weights no JSON": (
        text("weights.json", '[{"k": 1, '),
        r"weights.json: not JSON \(.*line 1 column",
    ),
    "weights {}": (text("weights.json", "{}"), "weights.json: "),
    "weights []": (text("weights.json", "[]"), "weights.json: "),
    "weights null": (text("weights.json", "null"), "weights.json: "),
    "weights of numbers": (text("weights.json", "[0.5, 0.5]"), "weights.json: "),
    "weights without k": (
        text("weights.json", '[{"alpha": [1.0], "fit": "qp"}]'),
        "weights.json: ",
    ),
    "weights without alpha": (text("weights.json", '[{"k": 3, "fit": "qp"}]'), "weights.json: "),
    "weights without fit": (
        text("weights.json", '[{"k": 3, "alpha": [0.5, 0.25, 0.25]}]'),
        "weights.json: ",
    ),
    "k as text": (
        text("weights.json", '[{"k": "3", "alpha": [0.5, 0.25, 0.25], "fit": "qp"}]'),
        "weights.json: ",
    ),
    "weights as text": (weights(["a", "b", "c"]), "weights.json: "),
    "ragged weights": (weights([[0.5], 0.25, 0.25]), "weights.json: "),
    "one weight too few": (
        weights([0.5, 0.5], k=3),
        r"k=3: \[0.5, 0.5\] found, 3 weights that are at least 0 and sum to 1",
    ),
    "negative weight": (weights([1.5, -0.25, -0.25]), "at least 0 and sum to 1"),
    "sum is .9": (weights([0.5, 0.25, 0.15]), "at least 0 and sum to 1"),
    "NaN weight": (weights([math.nan, 0.5, 0.5]), "at least 0 and sum to 1"),
    "no test data": (
        delete("data/test.parquet"),
        r"test.parquet: no such file; data_prep/ makes it",
    ),
    "no train data": (delete("data/train.parquet"), "train.parquet: no such file"),
    "no stats": (delete("data/stats.json"), "stats.json: no such file"),
    "data no parquet": (text("data/test.parquet", "data"), "test.parquet: not prepared data"),
    "stats no JSON": (text("data/stats.json", "{"), "stats.json: not JSON"),
    "no data": (lambda run: shutil.rmtree(run / "data"), "no such file"),
    "no run": (shutil.rmtree, "no such file"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_before_anything_is_written(kind, run, no_figures):
    spoil, message = BAD[kind]
    (run / "metrics.json").write_text("before")
    spoil(run)
    before = files_of(run)
    with pytest.raises(InputError, match=message) as error:
        run_evaluate(run, "--resamples", "50")
    assert len(str(error.value).splitlines()) == 1 and str(run) in str(error.value)
    assert files_of(run) == before


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--resamples", "0"],
            "--resamples: 0 found, an integer of at least 1",
        ),
        (["--seed", "-1"], "--seed: -1 found, an integer from 0 to"),
        (["--seed", "x"], "--seed"),
        (["--res", "5"], "unrecognized arguments"),
        ([], None),
    ],
)
def test_bad_flag_is_one_line(flags, message, capsys):
    if message is None:  # it is the flag that fails
        assert evaluate.parse_args(["--run", "r"]).resamples == 10_000
        return
    with pytest.raises(SystemExit) as stop:
        evaluate.parse_args(["--run", "r", *flags])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and message in lines[0]


# ---- as a program


def program(code, *words, cwd):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        "OPENBLAS_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, *(["-c", code] if code else []), *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
    )


HIDE = """
import runpy, sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name in {hidden!r}:
            named = {{"name": name}} if {error} is ModuleNotFoundError else {{}}
            raise {error}(name + " was imported", **named)
sys.meta_path.insert(0, Hide())
for sys.argv in {commands!r}:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("name", ["fit_weights.py", "evaluate.py"])
def test_without_the_extension_the_command_that_builds_it_is_named(name, run):
    before = files_of(run)
    code = HIDE.format(
        hidden=["pairwise.evaluator"],
        error="ModuleNotFoundError",
        commands=[[str(REPOSITORY / name), "--run", str(run)]],
    )
    done = program(code, cwd=run.parent)
    assert (
        done.returncode == 2
        and len(done.stderr.splitlines()) == 1
        and done.stderr.startswith(f"{name}: error: ")
        and BUILD_COMMAND in done.stderr
    )
    assert files_of(run) == before


def test_bad_input_as_a_program_is_exit_code_2_and_one_line(whole, tmp_path):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    metrics = hash_file(run / "metrics.json")
    poke("02_test.npy", np.nan)(run)
    done = program("", REPOSITORY / "evaluate.py", "--run", run, cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(
        r"evaluate.py: error: .*02_test.npy: member 2, split test: 1 rewards are NaN, "
        r"the first at index 3\n",
        done.stderr,
    )
    assert hash_file(run / "metrics.json") == metrics


def test_fewest_prompts_hold_the_truth_nine_times_in_ten():
    """Percentiles over P prompts of normal errors end 1.96 deviations from the mean, of the
    deviation that divides by P; Student's t says how often that holds the truth."""
    held = {p: 1 - 2 * student.sf(1.96 * ((p - 1) / p) ** 0.5, p - 1) for p in range(2, 31)}
    assert min(p for p in held if held[p] >= 0.9) == figures.FEWEST
    for p, share in ((5, 0.84), (10, 0.9)):
        assert held[p] == pytest.approx(share, abs=0.01)
