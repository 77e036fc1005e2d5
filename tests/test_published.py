"""The published data sets: rows in their native schemas; votes and counts worked out by hand."""

import copy
import gzip
import itertools
import json
import os
import subprocess
import sys

from pairwise import drawing, figures, manifest
from pairwise.cli import InputError
from pairwise.data import write_split

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import REPOSITORY, script
from test_votes import by_texts, save

SCRIPTS = {
    name: script(name)
    for name in ("multipref", "personalllm", "helpsteer2", "helpsteer3", "tldr", "prism")
}
SCRIPTS["export_pairs"] = script("export_pairs")
PREFERENCE = ("--annotators", "preference")
AGAIN = "pair of a prompt that is in a held-out split too"
GONE = object()


@pytest.fixture(autouse=True)
def no_figure(monkeypatch):
    """The figure of data preparation takes longer than all the rest; one test looks at it."""
    monkeypatch.setattr(figures, "majority_shares", lambda share: None)
    monkeypatch.setattr(drawing, "save", lambda figure, path: None)


def call(name, run, *flags):
    SCRIPTS[name].main(SCRIPTS[name].parse_args(["--run", str(run), *map(str, flags)]))


def splits_of(run):
    return {path.stem: pq.read_table(path).to_pylist() for path in (run / "data").glob("*.parquet")}


def convert(name, run, source, *flags):
    """{split: prompt rows} and stats.json of a data set made from a local copy."""
    call(name, run, "--source", source, *flags)
    return splits_of(run), json.loads((run / "data" / "stats.json").read_text())


def folder(path, splits, ending=".jsonl"):
    """A directory of one file a split."""
    path.mkdir(parents=True)
    for split, rows in splits.items():
        save(path / f"{split}{ending}", rows)
    return path


def both(expected):
    """Return votes by (prompt, response, other response) in both orders, as by_texts does."""
    return expected | {
        (prompt, b, a): (votes_b, votes_a, ties)
        for (prompt, a, b), (votes_a, votes_b, ties) in expected.items()
    }


def prompts(splits):
    return {name: {row["messages"][-1]["content"] for row in rows} for name, rows in splits.items()}


def snapshot(run):
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in run.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


# ---- rows in the native schemas, every column

PREFS = {
    "A": "A-is-clearly-better",
    "a": "A-is-slightly-better",
    "=": "Tie",
    "b": "B-is-slightly-better",
    "B": "B-is-clearly-better",
}
FRUIT = ("apple", "banana", "cherry", "date", "elder", "fig", "grape", "honeydew")
MODELS = (
    "gemma_2b",
    "gemma_7b",
    "mistral_raft",
    "mistral_ray",
    "mistral_weqweasdas",
    "llama3_sfairx",
    "oasst_deberta_v3",
    "beaver_7b",
    "oasst_pythia_7b",
    "oasst_pythia_1b",
)
CHAT = "Hi<extra_id_1>Assistant\nHello!\nYes?\n<extra_id_1>User\nWhy?"
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!\nYes?"},
    {"role": "user", "content": "Why?"},
]


def annotation(pref):
    parts = {
        "pref": "Tie",
        "confidence": "absolutely-confident",
        "checked_reasons": ["x"],
        "own_reason": "",
    }
    aspects = {
        f"{aspect}_{part}": value
        for aspect in ("helpful", "truthful", "harmless")
        for part, value in parts.items()
    }
    return {
        "evaluator": "worker_1",
        "overall_pref": PREFS[pref],
        "overall_confidence": "fairly-confident",
        "time_spent": 35,
        "timestamp": "2024-05-10T02:46:00",
    } | aspects


def multipref(prompt_id, text, a, b, votes):
    """votes: two of crowd workers, two of experts."""
    cast = [annotation(pref) for pref in votes]
    return {
        "comparison_id": f"c_{prompt_id}",
        "prompt_id": prompt_id,
        "text": text,
        "model_a": "gpt-4",
        "completion_a": a,
        "model_b": "llama-2",
        "completion_b": b,
        "source": "anthropic_helpful",
        "category": "Open QA",
        "subject_study": None,
        "highest_level_degree": None,
        "normal_worker_annotations": cast[:2],
        "expert_worker_annotations": cast[2:],
    }


def personalllm(prompt, scores, responses=FRUIT):
    """scores: of (answer 1..8, reward model), its score."""
    row = {"prompt": prompt, "subset": "anthropic_helpful", "prompt_id": 3} | {
        f"response_{i}": text for i, text in enumerate(responses, 1)
    }
    row |= {f"response_{i}_model": f"model-{i}" for i in range(1, 9)}
    return row | {
        f"response_{i}_{model}": float(scores(i, model)) for i in range(1, 9) for model in MODELS
    }


def ladder(i, model):
    """Six prefer the later answer, two the earlier one, one tells nothing.

    llama3 prefers the later one too, but cannot tell 2 from 3, 4 from 5, 6 from 7.
    """
    if model in ("gemma_2b", "gemma_7b"):
        return -i
    return {"llama3_sfairx": i // 2, "oasst_pythia_1b": 0.25}.get(model, i)


def rated(prompt, response, ratings):
    others = {
        trait: [2] * len(ratings)
        for trait in ("correctness", "coherence", "complexity", "verbosity")
    }
    return {"prompt": prompt, "response": response, "helpfulness": ratings} | others


def preferred(split, prompt, first, second, strengths):
    return {
        "split": split,
        "prompt": prompt,
        "response_1": first,
        "response_2": second,
        "preference_strength": 1,
        "preference_statement": "x",
        "preference_elaboration": None,
        "three_most_similar_preferences": [{"strength": 1, "statement": "x", "elaboration": None}],
        "all_preferences_unprocessed": [
            {"strength": strength, "statement": "x", "elaboration": "y"} for strength in strengths
        ],
    }


def helpsteer3(context, first, second, scores, domain="general", language="english"):
    """context: messages, or the text of a user's turn."""
    prompt = [{"role": "user", "content": context}]
    return {
        "domain": domain,
        "language": language,
        "context": prompt if isinstance(context, str) else context,
        "response1": first,
        "response2": second,
        "overall_preference": -1,
        "individual_preference": [
            {"score": score, "reasoning": "x", "feedback1": "y", "feedback2": ""}
            for score in scores
        ],
    }


WORKERS = itertools.count()


def tldr(post, first, second, choice, batch="batch3", split="train", worker=None):
    info = {
        "id": f"t3_{post}",
        "post": f"Post {post}.\n",
        "title": f"Title {post}",
        "subreddit": "tifu",
        "site": None,
        "article": None,
    }
    if "cnndm" in batch:
        info = {
            "id": post,
            "post": None,
            "title": None,
            "subreddit": None,
            "site": "cnn",
            "article": f" News {post}.\n",
        }
    summaries = [
        {"text": text, "policy": policy, "note": None}
        for text, policy in ((first, "sup4"), (second, "ref"))
    ]
    return {
        "info": info,
        "summaries": summaries,
        "choice": choice,
        "worker": worker or f"w{next(WORKERS)}",
        "batch": batch,
        "split": split,
        "extra": {"confidence": None},
    }


def post(name):
    return f"SUBREDDIT: r/tifu\n\nTITLE: Title {name}\n\nPOST: Post {name}.\n\nTL;DR:"


MULTIPREF = [
    multipref("p1", "Q1", "apple", "pear", "Aa=b"),
    multipref("p2", "Q2", "apple", "pear", "BbbA"),
    multipref("p3", "Q3", "apple", "pear", "==aB"),
    multipref("p4", "Q4", "apple", "pear", "===A"),
    multipref("p5", "Q5", "apple", "pear", "===="),
    multipref("p6", "Q6", "same", "same", "AAAA"),
    multipref("p7", "Q7", " ", "pear", "AAAA"),
    multipref("p1", "Q1", "pear", "apple", "BBBb"),
    multipref("p1", "Q1", "fig", "pear", "aaab"),
    multipref("p8", "", "apple", "pear", "AAAA"),
    multipref("p9", "Q9", "apple", "pear", "AAaa"),
    multipref("p10", "Q10", "apple", "pear", "bbBB"),
]
TWICE = (
    "apple",
    "banana",
    "cherry",
    "date",
    "cherry",
    "fig",
    "grape",
    "honeydew",
)  # answers 3 and 5 are equal
SEVEN = (*FRUIT[:7], "")  # answer 8 is empty
PERSONALLLM = {
    "train": [
        personalllm("P1", ladder),
        personalllm("P2", ladder, TWICE),
        personalllm("T1", ladder),
    ],
    "test": [personalllm("T1", ladder), personalllm("T2", lambda i, model: max(i, 2), SEVEN)],
}  # T2: all tie on answers 1 and 2
HELPSTEER2 = [
    rated("P1", "apple", [4, 3, 1]),
    rated("P1", "pear", [2, 3, 3, 0]),
    rated("P2", "apple", [0, 1]),
    rated("P2", "pear", [4, 4, 2, 0, 1]),
    rated("P3", "apple", [2, 2]),
    rated("P3", "pear", [2, 2]),
    rated(CHAT, "apple", [3, 3, 3, 3]),
    rated(CHAT, "pear", [1, 1, 1, 1]),
    rated("P5", "alone", [4, 4]),
    rated("P6", "apple", [1, 2, 3]),
    rated("P6", "pear", [3, 2, 1]),
    rated("P7", "apple", [4, 2]),
    rated("P7", "pear", [1, 2]),
    rated("Hi\n<extra_id_1>Assistant\nHello", "apple", [4, 4]),
    rated("Hi\n<extra_id_1>Assistant\nHello", "pear", [0, 0]),
    rated("P8", "apple", [4, 4]),
    rated("P8", "pear", [0, 0]),
    rated("P8", "fig", [0, 0, 0]),
    rated("P8", "plum", [4, 4, 1]),
    rated("P9", "alone", [4, 4]),
]
PREFERENCES = [
    preferred("train", "T1", "apple", "pear", [-1, -1, 0]),
    preferred("train", "T2", "apple", "pear", [-100, -100, 2]),
    preferred("val", "V1", "apple", "pear", [-3, -2, -1, 1, 2, 3, 0, -100]),
    preferred("val", "V2", "apple", "pear", [1, 2, 3]),
    preferred("train", "T3", "apple", "pear", [-3, 1]),
    preferred("train", "V1", "apple", "pear", [1, 1]),
]
HELPSTEER3 = {
    "train": [
        helpsteer3("C1", "apple", "pear", [-3, -1, 2]),
        helpsteer3("C2", "apple", "pear", [0, 0, 1]),
        helpsteer3(TURNS, "apple", "pear", [1, 2, 3], "code", "python"),
        helpsteer3("C1", "pear", "apple", [-2, -1], "stem"),
        helpsteer3("C1", "apple", "fig", [0, -1, -2]),
        helpsteer3(TURNS[:2], "apple", "pear", [1, 1]),
        helpsteer3([], "apple", "pear", [1, 1]),
        helpsteer3("C4", " \n", "pear", [1, 1]),
        helpsteer3("C5", "apple", "apple", [1, 1]),
        helpsteer3([{"role": "system", "content": "Be kind."}, *TURNS[2:]], "a", "b", [-1, 1, 0]),
        helpsteer3("V1", "apple", "pear", [1, 1]),
    ],
    "validation": [
        helpsteer3("V1", "apple", "pear", [-1, 1, 3], "multilingual", "korean"),
        helpsteer3("V2", "apple", "pear", [2, 2, -3]),
        helpsteer3("V3", "apple", "pear", []),
    ],
}
TLDR = {
    "train": [
        tldr("t1", "apple", "pear", 0),
        tldr("t1", "apple ", "\npear", 1),
        tldr("t1", "pear", "apple", 0),
        tldr("t1", "pear", "apple", 1),
        tldr("t1", "apple", "pear", 0),
        tldr("t2", "apple", "pear", 0),
        tldr("t3", "apple", "pear", 0),
        tldr("t3", "apple", "pear", 0),
        tldr("t3", "apple", "fig", 1),
        tldr("t3", "fig", "apple", 0),
        tldr("t4", "same", " same", 0),
        *(tldr("t5", "apple", "pear", i % 2, f"batch{i}") for i in range(3, 23)),
        tldr("t5", "apple", "pear", 0, "edit_b2_eval_test"),
        tldr("v1", "apple", "pear", 1),
        tldr("v1", "apple", "pear", 1),
    ],
    "validation": [
        *(
            tldr("v1", *answers, "batch6", "valid1")
            for answers in (("apple", "pear", 0), ("pear", "apple", 1))
        ),
        *(tldr("v2", "apple", "pear", choice, "batch7", "valid2") for choice in (1, 1, 0)),
        tldr("n1", "apple", "pear", 0, "batch0_cnndm", "valid2"),
        tldr("n1", "apple", "pear", 1, "cnndm0", "valid1"),
        tldr("n1", "pear", "apple", 1, "cnndm2", "valid2"),
    ],
}
ROWS = {
    "multipref": MULTIPREF,
    "personalllm": [row for rows in PERSONALLLM.values() for row in rows],
    "helpsteer2": HELPSTEER2,
    "preference": PREFERENCES,
    "helpsteer3": [row for rows in HELPSTEER3.values() for row in rows],
    "tldr": [row for rows in TLDR.values() for row in rows],
}
SPLIT = {
    "multipref": {"train": MULTIPREF},
    "personalllm": PERSONALLLM,
    "helpsteer2": {"train": HELPSTEER2},
    "preference": {"train": PREFERENCES},
    "helpsteer3": HELPSTEER3,
    "tldr": TLDR,
}
KINDS = {name: (name, ()) for name in ROWS} | {
    "preference": ("helpsteer2", PREFERENCE)
}  # the script and the flags that read these rows


def of(kind, run, source, *flags):
    name, more = KINDS[kind]
    return convert(name, run, source, *more, *flags)


# ---- votes, counts and splits, by hand


def check(stats, splits, votes, dropped, n, majority, test=None):
    """n and majority: the sums over all pairs of the votes and of the majority's share."""
    assert by_texts(splits) == both(votes)
    assert stats["dropped"] == dropped
    here = stats["here"]
    assert here["pairs"] == len(votes) and here["annotators_mean"] == pytest.approx(n / len(votes))
    assert here["majority_mean"] == pytest.approx(majority / len(votes))
    assert {row["prompt_id"] for row in splits["train"]}.isdisjoint(
        row["prompt_id"] for row in splits["test"]
    )
    if test is None:  # ours: two prompts at least
        assert len(splits["test"]) == 2
    else:
        assert prompts(splits)["test"] == test


def test_multipref(tmp_path):
    source = save(tmp_path / "multipref.jsonl", MULTIPREF)
    splits, stats = convert("multipref", tmp_path / "run", source)
    votes = {
        ("Q1", "apple", "pear"): (6, 1, 1),  # Aa=b and, the other way round, BBBb
        ("Q1", "fig", "pear"): (3, 1, 0),
        ("Q2", "apple", "pear"): (1, 3, 0),
        ("Q3", "apple", "pear"): (1, 1, 2),
        ("Q9", "apple", "pear"): (4, 0, 0),
        ("Q10", "apple", "pear"): (0, 4, 0),
    }
    dropped = {"identical responses": 1, "empty response": 1, "empty prompt": 1}  # Q6, Q7, Q8
    check(
        stats,
        splits,
        votes,
        dropped | {"fewer than two votes": 2},
        7 + 4 + 4 + 2 + 4 + 4,
        6 / 7 + 3 / 4 + 3 / 4 + 1 / 2 + 1 + 1,
    )  # Q4 and Q5 tie
    assert (
        stats["votes"] == "sampled" and stats["ties"] == "drop" and stats["dataset"] == "multipref"
    )
    assert {row["prompt_id"] for rows in splits.values() for row in rows} == {
        "p1",
        "p2",
        "p3",
        "p9",
        "p10",
    }
    half, other = convert("multipref", tmp_path / "half", source, "--ties", "half")
    votes |= {
        ("Q1", "apple", "pear"): (6.5, 1.5, 1),
        ("Q3", "apple", "pear"): (2, 2, 2),
        ("Q4", "apple", "pear"): (2.5, 1.5, 3),
        ("Q5", "apple", "pear"): (2, 2, 4),
    }
    check(
        other,
        half,
        votes,
        dropped,
        8 + 7 * 4,
        6.5 / 8 + 3 / 4 + 3 / 4 + 1 / 2 + 2.5 / 4 + 1 / 2 + 1 + 1,
    )
    assert set(stats["other_readings"]) == {"--ties half", "--ties in n"} and set(
        other["other_readings"]
    ) == {"--ties drop", "--ties in n"}
    assert (
        stats["other_readings"]["--ties half"] == other["here"]
        and other["other_readings"]["--ties drop"] == stats["here"]
    )
    ties_in_n = stats["other_readings"][
        "--ties in n"
    ]  # Without ties alone: 6, 3, 3, 1, 1, 4 and 4 votes for the larger side, of 8, 4, ..
    assert ties_in_n["pairs"] == 7 and ties_in_n["annotators_mean"] == 32 / 7
    assert ties_in_n["majority_mean"] == pytest.approx((6 / 8 + (3 + 3 + 1 + 1 + 4 + 4) / 4) / 7)


@pytest.mark.parametrize("beaver", ["published", "negated"])
def test_personalllm(tmp_path, beaver):
    splits, stats = convert(
        "personalllm",
        tmp_path / "run",
        folder(tmp_path / "source", PERSONALLLM),
        "--beaver",
        beaver,
    )
    # the earlier answer: both gemmas; the later: six, of them beaver, and llama3 where it can tell
    a, b = (2, 7) if beaver == "published" else (3, 6)
    pairs = [(i, j) for j in range(8) for i in range(j)]
    blind = {(1, 2), (3, 4), (5, 6)}  # counted from 0
    each = {pair: (a, b - 1, 2) if pair in blind else (a, b, 1) for pair in pairs}
    votes = {(prompt, FRUIT[i], FRUIT[j]): each[i, j] for prompt in ("P1", "T1") for i, j in pairs}
    votes |= {
        ("P2", FRUIT[i], FRUIT[j]): each[i, j] for i, j in pairs if 4 not in (i, j)
    }  # 21: the fifth answer is the third again
    last = (0, 10, 0) if beaver == "published" else (1, 9, 0)
    votes |= {
        ("T2", FRUIT[i], FRUIT[j]): last for i, j in pairs if 7 not in (i, j) and (i, j) != (0, 1)
    }  # 20: the eighth is empty, 1 and 2 tie
    dropped = {
        "pair of answers that is there already": 6,
        "identical responses": 1,
        "empty response": 7,
        "fewer than two votes": 1,
        f"train {AGAIN}": 28,
    }
    n = (28 * 9 - 3) * 2 + (21 * 9 - 2) + 20 * 10  # in P2 the pair 4, 5 is gone
    majority = (25 * b / 9 + 3 * (b - 1) / 8) * 2 + 19 * b / 9 + 2 * (b - 1) / 8 + 20 * last[1] / 10
    check(stats, splits, votes, dropped, n, majority, test={"T1", "T2"})
    assert (
        stats["votes"] == "population"
        and stats["beaver"] == beaver
        and stats["here"]["train_pairs"] == 28 + 21
    )
    assert list(stats["other_readings"]) == [
        f"--beaver {'negated' if beaver == 'published' else 'published'}"
    ]


def test_readings_are_of_the_same_split(tmp_path):
    """Without ties they do not differ. The prompts have 1 to 12 pairs."""
    rows = [
        multipref(f"p{i}", f"Q{i}?", "apple", f"pear {j}", "AAAB")
        for i in range(12)
        for j in range(i + 1)
    ]
    _, stats = convert("multipref", tmp_path / "run", save(tmp_path / "m.jsonl", rows))
    assert stats["other_readings"] == {f"--ties {x}": stats["here"] for x in ("half", "in n")}


def test_personalllm_ties_half(tmp_path):
    splits, stats = convert(
        "personalllm", tmp_path / "run", folder(tmp_path / "source", PERSONALLLM), "--ties", "half"
    )
    found = by_texts(splits)
    assert found["P1", "apple", "banana"] == (2.5, 7.5, 1) and found["P1", "banana", "cherry"] == (
        3,
        7,
        2,
    )
    assert found["T2", "apple", "banana"] == (5, 5, 10)
    assert stats["here"]["annotators_mean"] == 10 and "fewer than two votes" not in stats["dropped"]


def test_scores_may_be_whole_numbers(tmp_path):
    rows = [
        {
            field: int(4 * value) if isinstance(value, float) else value
            for field, value in row.items()
        }
        for row in PERSONALLLM["test"] * 2
    ]
    rows[2:] = [row | {"prompt": f"{row['prompt']} again"} for row in rows[2:]]
    assert by_texts(convert("personalllm", tmp_path / "run", save(tmp_path / "p.jsonl", rows))[0])[
        "T1", "apple", "banana"
    ] == (2, 7, 1)


# P5, P9; one that ends with the assistant's
RATED = {
    "answer without a second one beside it": 2,
    "prompt that does not end with a turn of the user's": 1,
}


@pytest.mark.parametrize(
    "flags, votes, dropped, n, majority",
    [
        (
            (),
            {
                # By position: P1 4 2, 3 3, 1 3; P2 0 4, 1 4; P3 2 2, 2 2; P6 1 3, 2 2, 3 1;
                # P7 4 1, 2 2.
                ("P1", "apple", "pear"): (1, 1, 1),
                ("P2", "apple", "pear"): (0, 2, 0),
                ("Why?", "apple", "pear"): (4, 0, 0),
                ("P6", "apple", "pear"): (1, 1, 1),
                ("P8", "apple", "pear"): (2, 0, 0),
                ("P8", "fig", "plum"): (0, 3, 0),
            },
            2,
            2 + 2 + 4 + 2 + 2 + 3,
            0.5 + 1 + 1 + 0.5 + 1 + 1,
        ),
        (
            ("--ties", "half"),
            {
                ("P1", "apple", "pear"): (1.5, 1.5, 1),
                ("P2", "apple", "pear"): (0, 2, 0),
                ("P3", "apple", "pear"): (1, 1, 2),
                ("Why?", "apple", "pear"): (4, 0, 0),
                ("P6", "apple", "pear"): (1.5, 1.5, 1),
                ("P7", "apple", "pear"): (1.5, 0.5, 1),
                ("P8", "apple", "pear"): (2, 0, 0),
                ("P8", "fig", "plum"): (0, 3, 0),
            },
            0,
            3 + 2 + 2 + 4 + 3 + 2 + 2 + 3,
            0.5 + 1 + 0.5 + 1 + 0.5 + 0.75 + 1 + 1,
        ),
        (
            ("--annotators", "cross"),
            {
                # P1: 4 beats all four, 3 beats 2 and 0 and ties twice, 1 beats 0 alone; P2: 0 ties
                # once, 1 beats 0 and ties once.
                ("P1", "apple", "pear"): (7, 3, 2),
                ("P2", "apple", "pear"): (1, 7, 2),
                ("Why?", "apple", "pear"): (16, 0, 0),
                ("P6", "apple", "pear"): (3, 3, 3),
                ("P7", "apple", "pear"): (3, 0, 1),
                ("P8", "apple", "pear"): (4, 0, 0),
                ("P8", "fig", "plum"): (0, 9, 0),
            },
            1,
            10 + 8 + 16 + 6 + 3 + 4 + 9,
            0.7 + 0.875 + 1 + 0.5 + 1 + 1 + 1,
        ),
    ],
)
def test_helpsteer2(tmp_path, flags, votes, dropped, n, majority):
    splits, stats = convert(
        "helpsteer2",
        tmp_path / "run",
        save(tmp_path / "disagreements.jsonl.gz", HELPSTEER2),
        *flags,
    )
    # P3, and by position P7, have no two votes
    check(
        stats,
        splits,
        votes,
        RATED | ({"fewer than two votes": dropped} if dropped else {}),
        n,
        majority,
    )
    cross = "cross" in flags
    assert stats["votes"] == ("dependent" if cross else "sampled") and stats["annotators"] == (
        "cross" if cross else "zip"
    )
    ties = "half" if "half" in flags else "drop"
    assert set(stats["other_readings"]) == {
        f"--annotators {'zip' if cross else 'cross'}",
        f"--ties {'drop' if ties == 'half' else 'half'}",
        "--ties in n",
    }
    [chat] = [row for rows in splits.values() for row in rows if len(row["messages"]) > 1]
    assert chat["messages"] == TURNS


def test_helpsteer2_preferences(tmp_path):
    splits, stats = convert(
        "helpsteer2",
        tmp_path / "run",
        save(tmp_path / "preference.jsonl.gz", PREFERENCES),
        *PREFERENCE,
    )
    votes = {
        ("T1", "apple", "pear"): (2, 0, 1),
        ("T3", "apple", "pear"): (1, 1, 0),
        ("V1", "apple", "pear"): (3, 3, 1),
        ("V2", "apple", "pear"): (0, 3, 0),
    }
    # T2; V1 in train
    check(
        stats,
        splits,
        votes,
        {"fewer than two votes": 1, f"train {AGAIN}": 1},
        2 + 2 + 6 + 3,
        1 + 0.5 + 0.5 + 1,
        test={"V1", "V2"},
    )
    assert (
        stats["votes"] == "sampled"
        and stats["annotators"] == "preference"
        and set(stats["other_readings"]) == {"--ties half", "--ties in n"}
    )


@pytest.mark.parametrize("place", ["", "preference"])
def test_helpsteer3(tmp_path, capsys, place):
    """Of the files alone, and of a copy of all that is on the hub."""
    folder(tmp_path / "source" / place, HELPSTEER3, ".jsonl.gz")
    if place:
        folder(tmp_path / "source" / "feedback", {"train": [{"x": 1}], "validation": [{"x": 1}]})
    splits, stats = convert("helpsteer3", tmp_path / "run", tmp_path / "source")
    votes = {
        ("C1", "apple", "pear"): (2, 3, 0),
        ("C1", "apple", "fig"): (2, 0, 1),
        ("Why?", "apple", "pear"): (0, 3, 0),
        ("Why?", "a", "b"): (1, 1, 1),
        ("V1", "apple", "pear"): (1, 2, 0),
        ("V2", "apple", "pear"): (1, 2, 0),
    }
    dropped = {
        "prompt that does not end with a turn of the user's": 2,
        "empty response": 1,
        "identical responses": 1,
        "fewer than two votes": 2,
        f"train {AGAIN}": 1,
    }
    majority = 3 / 5 + 1 + 1 + 1 / 2 + 2 / 3 + 2 / 3
    check(stats, splits, votes, dropped, 5 + 2 + 3 + 2 + 3 + 3, majority, test={"V1", "V2"})
    rows = {len(row["messages"]): row for row in splits["train"]}
    assert rows[1]["categories"] == {"domain": "general", "language": "english"}
    assert rows[3]["categories"] == {"domain": "code", "language": "python"}
    assert rows[3]["messages"] == TURNS and rows[2]["messages"][0]["role"] == "system"
    (v1,) = (row for row in splits["test"] if row["messages"][-1]["content"] == "V1")
    assert v1["categories"] == {"domain": "multilingual", "language": "korean"}  # not train's
    assert stats["votes"] == "sampled" and set(stats["other_readings"]) == {"--ties half"}
    out = capsys.readouterr().out
    assert "helpsteer3 beside its data card" in out and " of the paper" not in out


def test_answers_in_two_splits_are_not_compared(tmp_path):
    rows = [
        rated(f"P{i}", response, [i, 2]) for i in (0, 1, 3, 4) for response in ("apple", "pear")
    ]
    splits = {
        "train": [*rows[:4], rated("P9", "alone", [4, 4])],
        "validation": [rated("P9", "too", [0, 0]), *rows[4:]],
    }
    flags = ("--ties", "half")
    made, stats = convert(
        "helpsteer2", tmp_path / "run", folder(tmp_path / "source", splits), *flags
    )
    assert prompts(made) == {"train": {"P0", "P1"}, "test": {"P3", "P4"}} and stats["dropped"] == {
        "answer without a second one beside it": 2
    }


@pytest.mark.parametrize(
    "prompt, roles, contents",
    [
        ("Hi", "u", ["Hi"]),
        (
            "Hi\n<extra_id_1>Assistant\nA\n\nB\n<extra_id_1>User\nWhy?\n",
            "uau",
            ["Hi", "A\n\nB", "Why?\n"],
        ),
        ("<extra_id_1>User\nHi", "u", ["Hi"]),
        (
            "Hi<extra_id_1>Assistant\nA<extra_id_1>User\nB"
            "<extra_id_1>Assistant\nC<extra_id_1>User\nD",
            "uauau",
            ["Hi", *"ABCD"],
        ),
    ],
)
def test_turns_of_a_helpsteer2_prompt(prompt, roles, contents):
    found = SCRIPTS["helpsteer2"].messages("here", prompt)
    assert "".join(turn["role"][0] for turn in found) == roles
    assert [turn["content"] for turn in found] == contents


@pytest.mark.parametrize("cnndm", ["drop", "keep"])
def test_tldr(tmp_path, cnndm):
    splits, stats = convert(
        "tldr", tmp_path / "run", folder(tmp_path / "source", TLDR), "--cnndm", cnndm
    )
    votes = {
        (post("t1"), "apple", "pear"): (
            3,
            2,
            0,
        ),  # apple, pear, pear (first of the two), apple (second), apple
        (post("t3"), "apple", "pear"): (2, 0, 0),
        (post("t3"), "apple", "fig"): (0, 2, 0),
        (post("t5"), "apple", "pear"): (
            11,
            10,
            0,
        ),  # the ten even ones of batch3 .. batch22 and edit_b2_eval_test; the ten odd ones
        (post("v1"), "apple", "pear"): (2, 0, 0),
        (post("v2"), "apple", "pear"): (1, 2, 0),
    }
    dropped = {
        "fewer than two votes": 1,
        "identical responses": 1,
        f"train {AGAIN}": 1,
    }  # t2, t4, v1
    n, majority, test = (
        5 + 2 + 2 + 21 + 2 + 3,
        3 / 5 + 1 + 1 + 11 / 21 + 1 + 2 / 3,
        {post("v1"), post("v2")},
    )
    if cnndm == "keep":
        news = "Article:\nNews n1.\n\nTL;DR:"
        check(
            stats,
            splits,
            votes | {(news, "apple", "pear"): (2, 1, 0)},
            dropped,
            n + 3,
            majority + 2 / 3,
            test=test | {news},
        )
    else:
        check(
            stats, splits, votes, dropped | {"label on a CNN/DM article": 3}, n, majority, test=test
        )
    assert stats["votes"] == "sampled" and stats["cnndm"] == cnndm
    other = f"--cnndm {'keep' if cnndm == 'drop' else 'drop'}"
    assert list(stats["other_readings"]) == [other, "--repeated last"]
    assert {row["prompt_id"] for row in splits["test"]} >= {"t3_v1", "t3_v2"}


def test_a_worker_who_labels_twice_counts_once_with_repeated_last(tmp_path):
    rows = [
        tldr("t1", "apple", "pear", 0, worker="w1"),
        tldr("t1", "apple", "pear", 0, worker="w2"),
        tldr("t1", "pear", "apple", 0, worker="w1"),  # for pear, in place of the first
        *[tldr("t1", "apple", "pear", 1) | {"worker": None}] * 2,
        tldr("t1", "apple", "fig", 0, worker="w1"),
        tldr("t1", "apple", "fig", 0, worker="w2"),
    ]
    source = folder(tmp_path / "source", {"train": rows, "validation": TLDR["validation"]})
    splits, stats = convert("tldr", tmp_path / "count", source)
    assert by_texts(splits)[post("t1"), "apple", "pear"] == (2, 3, 0)
    reading = stats["other_readings"]["--repeated last"]
    assert stats["here"]["annotators_mean"] == 3.0 and reading["annotators_mean"] == 2.75
    splits, stats = convert("tldr", tmp_path / "last", source, "--repeated", "last")
    assert by_texts(splits)[post("t1"), "apple", "pear"] == (1, 3, 0)
    assert stats["here"] == reading and stats["repeated"] == "last"
    assert stats["dropped"]["earlier vote of the same annotator"] == 1


def test_a_flag_of_a_script_s_own_decides_the_data(tmp_path):
    """It need not be a reading of the paper."""
    module, words = SCRIPTS["multipref"], ["--run", str(tmp_path / "run"), "--source"]
    words.append(str(save(tmp_path / "m.jsonl", MULTIPREF)))
    given = module.parse_args([*words, "--test-share", "0.4"])
    given.list = tmp_path / "list"
    for least in (0, 0, 3):
        given.least = least
        if least:
            with pytest.raises(InputError, match="least was 0, is 3"):
                module.main(given)
        else:
            module.main(given)
    stats = json.loads((tmp_path / "run" / "data" / "stats.json").read_text(encoding="utf-8"))
    assert stats["least"] == 0 and stats["list"] == str(given.list)
    settings = manifest.entries(tmp_path / "run")["data"]["settings"]
    assert settings["least"] == 0 and not {"source", "revision", "run"} & settings.keys()


def test_min_votes_1_keeps_train_pairs_of_one_label(tmp_path):
    source = folder(
        tmp_path / "source",
        {**TLDR, "validation": [*TLDR["validation"], tldr("v3", "apple", "pear", 0)]},
    )
    splits, stats = convert("tldr", tmp_path / "run", source, "--min-votes", "1")
    assert (
        by_texts(splits)[post("t2"), "apple", "pear"] == (1, 0, 0)
        and post("v3") not in prompts(splits)["test"]
    )
    assert stats["dropped"]["fewer than two votes"] == 1 and stats["min_votes"] == 1  # v3


# ---- stats.json


def recount(splits):
    """The columns of the paper's tables, from the prepared rows alone."""
    pairs = {name: [pair for row in rows for pair in row["pairs"]] for name, rows in splits.items()}
    every = [(pair["votes_a"], pair["votes_b"]) for rows in pairs.values() for pair in rows]
    return {
        "pairs": len(every),
        "train_pairs": len(pairs["train"]) + len(pairs.get("valid", [])),
        "responses": sum(len(row["responses"]) for rows in splits.values() for row in rows),
        "train_prompts": len(splits["train"]) + len(splits.get("valid", [])),
        "test_prompts": len(splits["test"]),
        "annotators_mean": sum(map(sum, every)) / len(every),
        "majority_mean": sum(max(v) / sum(v) for v in every) / len(every),
    }


PUBLISHED = {  # tables 1 and 2
    "multipref": (9413, 4791, 532, 4.0, 0.63),
    "personalllm": (263256, 9402, 1000, 10.0, 0.76),
    "helpsteer2": (21000, 10000, 1000, 3.5, 0.74),
    "preference": (21000, 10000, 1000, 3.5, 0.74),
    "helpsteer3": (40476, None, None, None, None),  # its data card's
    "tldr": (3217, 729, 845, 7.56, 0.84),
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("flags", [(), ("--ties", "half", "--seed", "5", "--valid-share", "0.3")])
def test_stats_agree_with_the_data(tmp_path, kind, flags, capsys):
    splits, stats = of(kind, tmp_path / "run", folder(tmp_path / "source", SPLIT[kind]), *flags)
    assert stats["here"] == pytest.approx(recount(splits), rel=1e-12)
    assert (
        tuple(
            stats["paper"].get(key)
            for key in (
                "pairs",
                "train_prompts",
                "test_prompts",
                "annotators_mean",
                "majority_mean",
            )
        )
        == PUBLISHED[kind]
    )
    assert set(stats["difference"]) == set(stats["paper"])
    assert all(
        stats["difference"][key] == stats["here"][key] - stats["paper"][key]
        for key in stats["paper"]
    )
    assert ("valid" in splits) == bool(flags) and set(stats["splits"]) == set(splits)
    for name, rows in splits.items():
        pairs = [pair for row in rows for pair in row["pairs"]]
        assert stats["splits"][name] | {"annotators_mean": 0, "majority_mean": 0} == {
            "prompts": len(rows),
            "responses": sum(len(row["responses"]) for row in rows),
            "pairs": len(pairs),
            "annotators_mean": 0,
            "majority_mean": 0,
        }
        for row in rows:
            assert {i for pair in row["pairs"] for i in (pair["a"], pair["b"])} == set(
                range(len(row["responses"]))
            )
            assert len(set(row["responses"])) == len(row["responses"])
            assert row["messages"][-1]["role"] == "user" and all(
                pair["votes_a"] + pair["votes_b"] >= 2 for pair in row["pairs"]
            )
    settings = {
        "dataset": KINDS[kind][0],
        "ties": "half",
        "seed": 5,
        "valid_share": 0.3,
        "test_share": 0.1,
        "min_votes": 2,
    }
    assert {key: stats[key] for key in settings} == settings | (
        {} if flags else {"ties": "drop", "seed": 0, "valid_share": 0.0}
    )
    share = [
        max(pair["votes_a"], pair["votes_b"]) / (pair["votes_a"] + pair["votes_b"])
        for rows in splits.values()
        for row in rows
        for pair in row["pairs"]
    ]
    assert stats["histogram"]["pairs"] == [
        sum(min(int((s + 1e-6 - 0.5) * 20), 9) == i for s in share) for i in range(10)
    ]
    assert stats["histogram"]["majority_share_from"] == [
        0.5,
        0.55,
        0.6,
        0.65,
        0.7,
        0.75,
        0.8,
        0.85,
        0.9,
        0.95,
    ]
    assert stats["source"]["hub"] and stats["source"]["commit"] is None
    assert stats["source"]["rows"] == {name: len(rows) for name, rows in SPLIT[kind].items()}
    out = capsys.readouterr().out
    for words, key in (
        ("pairs, train and test", "pairs"),
        ("prompts, train", "train_prompts"),
        ("prompts, test", "test_prompts"),
    ):
        [line] = [line for line in out.splitlines() if line.startswith(f"data: {words}  ")]
        assert line.split()[-2 - len(stats["other_readings"])] == f"{stats['here'][key]:,}" and (
            key not in stats["paper"] or f"{stats['paper'][key]:,}" in line
        )
    for reason, count in stats["dropped"].items():
        assert f"data: {count} dropped: {reason}\n" in out


def test_figure_of_the_votes(tmp_path, monkeypatch):
    monkeypatch.undo()
    convert("multipref", tmp_path / "run", save(tmp_path / "m.jsonl", MULTIPREF))
    assert (tmp_path / "run" / "figures" / "data_votes.png").stat().st_size > 1000


def test_orientation_is_drawn(tmp_path):
    rows = [multipref(f"p{i}", f"Q{i}", "apple", "pear", "AAAA") for i in range(40)]
    first = []
    for seed in ("0", "1"):
        splits, _ = convert(
            "multipref", tmp_path / seed, save(tmp_path / "m.jsonl", rows), "--seed", seed
        )
        first.append(
            {
                row["prompt_id"]: row["pairs"][0]["votes_a"]
                for members in splits.values()
                for row in members
            }
        )
        assert (
            len(splits["test"]) == 4 and 10 <= sum(votes == 4 for votes in first[-1].values()) <= 30
        )
    assert first[0] != first[1]


# ---- files


@pytest.mark.parametrize("kind", ROWS)
def test_every_ending_gives_the_same_data(tmp_path, kind):
    expected = of(kind, tmp_path / "jsonl", save(tmp_path / "rows.jsonl", ROWS[kind]))
    for ending in (".json", ".parquet", ".jsonl.gz", ".json.gz", ".parquet.gz", ".PARQUET"):
        assert (
            of(kind, tmp_path / f"run{ending}", save(tmp_path / f"rows{ending}", ROWS[kind]))
            == expected
        )
    assert expected[1]["source"]["rows"] == {"all": len(ROWS[kind])}


@pytest.mark.parametrize("kind", ROWS)
def test_every_layout_of_a_directory_gives_the_same_data(tmp_path, kind):
    expected = of(kind, tmp_path / "flat", folder(tmp_path / "source_flat", SPLIT[kind]))
    for ending in (".json", ".jsonl.gz", ".parquet", ".parquet.gz"):
        assert (
            of(
                kind,
                tmp_path / f"run{ending}",
                folder(tmp_path / f"source{ending}", SPLIT[kind], ending),
            )
            == expected
        )
    sharded, folders = tmp_path / "sharded" / "data", tmp_path / "folders" / "test of folders"
    sharded.mkdir(parents=True)
    for split, rows in SPLIT[kind].items():
        for i, part in enumerate(
            (rows[:3], rows[3:])
        ):  # between the two answers to a prompt of HelpSteer2
            save(sharded / f"{split}-{i:05}-of-00002.parquet", part)
            (folders / split).mkdir(parents=True, exist_ok=True)
            save(folders / split / f"{i:04}.jsonl", part)
    for path in (sharded.parent, folders.parent):  # what is not a file of a split
        (path / "README.md").write_text("train")
        (path / "train.csv").write_text("x\n1\n")
        (path / "other.jsonl").write_text("none")
        (path / ".cache").mkdir()
        (path / ".cache" / "train.jsonl").write_text("none")
        assert of(kind, path / "run", path) == expected


def test_article_that_is_null_in_all_train_rows(tmp_path):
    assert all(row["info"]["article"] is None for row in TLDR["train"]) and any(
        row["info"]["article"] for row in TLDR["validation"]
    )
    jsonl, parquet = (
        convert(
            "tldr",
            tmp_path / f"run{ending}",
            folder(tmp_path / f"source{ending}", TLDR, ending),
            "--cnndm",
            "keep",
        )
        for ending in (".jsonl", ".parquet")
    )
    assert jsonl == parquet and "Article:\nNews n1.\n\nTL;DR:" in prompts(jsonl[0])["test"]


# ---- splits


def seven(names, kind="personalllm"):
    """{split: rows} of six prompts a split, and of one more that is in all of them."""
    made = {
        "personalllm": lambda prompt: [personalllm(prompt, ladder)],
        "tldr": lambda prompt: [tldr(prompt, "apple", "pear", 0)] * 2,
    }[kind]
    return {
        name: [
            row
            for prompt in (*(f"{name}{i}" for i in range(6)), "everywhere")
            for row in made(prompt)
        ]
        for name in names
    }


@pytest.mark.parametrize(
    "kind, names, homes",
    [
        ("personalllm", ("train", "test"), {"train": "train", "test": "test"}),
        ("tldr", ("train", "validation"), {"train": "train", "validation": "test"}),
        (
            "personalllm",
            ("train", "validation", "test"),
            {"train": "train", "validation": "valid", "test": "test"},
        ),
        (
            "tldr",
            ("train", "validation", "test"),
            {"train": "train", "validation": "valid", "test": "test"},
        ),
    ],
)
def test_official_splits_are_kept(tmp_path, kind, names, homes):
    splits, stats = convert(
        kind,
        tmp_path / "run",
        folder(tmp_path / "source", seven(names, kind)),
        "--test-share",
        "0.5",
    )
    word = post if kind == "tldr" else str
    expected = {homes[name]: {word(f"{name}{i}") for i in range(6)} for name in names}
    expected["test"] |= {word("everywhere")}
    assert prompts(splits) == expected
    lost = {
        f"{homes[name]} {AGAIN}": 28 if kind == "personalllm" else 1
        for name in names
        if homes[name] != "test"
    }
    assert stats["dropped"] == lost


def test_tldr_rows_of_one_file_name_their_split(tmp_path):
    expected, stats = convert("tldr", tmp_path / "folder", folder(tmp_path / "source", TLDR))
    splits, of_one = convert("tldr", tmp_path / "file", save(tmp_path / "t.jsonl", ROWS["tldr"]))
    assert (
        splits == expected
        and of_one["dropped"] == stats["dropped"]
        and of_one["here"] == stats["here"]
    )
    swapped = {
        "train": TLDR["train"],
        "validation": [row | {"split": "train"} for row in TLDR["validation"]],
    }  # a file's name goes before
    assert (
        convert("tldr", tmp_path / "swapped", folder(tmp_path / "swapped_source", swapped))[0]
        == expected
    )
    for i, split in enumerate((None, "")):
        splits, _ = convert(
            "tldr",
            tmp_path / str(i),
            save(tmp_path / "none.jsonl", [row | {"split": split} for row in ROWS["tldr"]]),
        )
        assert (
            len(splits["test"]) == 2 and len(splits["train"]) == 3
        )  # of t1, t3, t5, v1 and v2, two at least


def test_valid_share_is_taken_from_train(tmp_path):
    splits, _ = convert(
        "tldr",
        tmp_path / "run",
        folder(tmp_path / "source", seven(("train", "validation"), "tldr")),
        "--valid-share",
        "0.3",
    )
    assert prompts(splits)["test"] == {post(f"validation{i}") for i in range(6)} | {
        post("everywhere")
    }
    assert len(splits["valid"]) == 2 and prompts(splits)["train"] | prompts(splits)["valid"] == {
        post(f"train{i}") for i in range(6)
    }


@pytest.mark.parametrize("as_folder", [False, True])
def test_one_file_is_divided(tmp_path, as_folder):
    rows = [
        row
        for i in range(30)
        for row in [multipref(f"p{i}", f"Q{i // 2}", "apple", "pear", "AAAA")] * 2
    ]  # each text under two ids
    source = (
        folder(tmp_path / "source", {"train": rows})
        if as_folder
        else save(tmp_path / "m.jsonl", rows)
    )
    for share, expected in (("0.1", 2), ("0.4", 6)):  # of 15 texts: 1.5, so the even number, and 6
        splits, stats = convert("multipref", tmp_path / share, source, "--test-share", share)
        assert (
            len(prompts(splits)["test"]) == expected
            and len(splits["test"]) == 2 * expected
            and stats["dropped"] == {}
        )
        assert (
            prompts(splits)["train"].isdisjoint(prompts(splits)["test"])
            and len(prompts(splits)["train"]) == 15 - expected
        )


# ---- bad input


def changed(row, path, value):
    """The row with another value at a path of keys and indices; GONE takes it away."""
    row = copy.deepcopy(row)
    inner = row
    for key in path[:-1]:
        inner = inner[key]
    if value is GONE:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return row


NORMAL, EXPERT, STRENGTH = (
    "normal_worker_annotations",
    "expert_worker_annotations",
    "all_preferences_unprocessed",
)
VOCABULARY = (
    "one of A-is-clearly-better, A-is-slightly-better, Tie, B-is-slightly-better, "
    "B-is-clearly-better expected"
)
RATING, STRENGTHS = "one of 0, 1, 2, 3, 4 expected", "one of -100, -3, -2, -1, 0, 1, 2, 3 expected"
ANNOTATORS, SCORE = "individual_preference", "one of -3, -2, -1, 0, 1, 2, 3 expected"
BAD = [  # data set, where in the third row, what is there, what the line must say
    ("multipref", ("text",), GONE, "text: nothing found, text expected"),
    ("multipref", ("text",), 7, "text: 7 found, text expected"),
    ("multipref", ("text",), "\ud83d", "text: '\\ud83d' found, whole characters expected"),
    (
        "multipref",
        ("prompt_id",),
        None,
        "prompt_id: nothing found, text that is not empty expected",
    ),
    ("multipref", ("prompt_id",), 7, "prompt_id: 7 found"),
    ("multipref", ("prompt_id",), "p1", "prompt_id 'p1' has another prompt than before"),
    ("multipref", ("completion_a",), GONE, "completion_a: nothing found, text expected"),
    ("multipref", ("completion_b",), ["x"], "completion_b: ['x'] found, text expected"),
    ("multipref", (NORMAL,), GONE, f"{NORMAL}: nothing found, a list of dict expected"),
    ("multipref", (EXPERT,), "[]", f"{EXPERT}: '[]' found, a list of dict expected"),
    ("multipref", (EXPERT, 0), None, f"{EXPERT}: [None"),
    (
        "multipref",
        (NORMAL, 1, "overall_pref"),
        GONE,
        f"{NORMAL}: overall_pref: nothing found, {VOCABULARY}",
    ),
    (
        "multipref",
        (EXPERT, 1, "overall_pref"),
        "A-is-better",
        f"{EXPERT}: overall_pref: 'A-is-better' found, {VOCABULARY}",
    ),
    (
        "multipref",
        (EXPERT, 0, "overall_pref"),
        "tie",
        f"{EXPERT}: overall_pref: 'tie' found, {VOCABULARY}",
    ),
    ("multipref", (EXPERT, 0, "overall_pref"), ["Tie"], f"{EXPERT}: overall_pref: ['Tie'] found"),
    ("personalllm", ("prompt",), GONE, "prompt: nothing found, text expected"),
    ("personalllm", ("response_8",), GONE, "response_8: nothing found, text expected"),
    ("personalllm", ("response_1",), 1.5, "response_1: 1.5 found, text expected"),
    (
        "personalllm",
        ("response_8_oasst_pythia_1b",),
        GONE,
        "response_8_oasst_pythia_1b: nothing found, a finite number expected",
    ),
    *(
        (
            "personalllm",
            ("response_3_beaver_7b",),
            value,
            f"response_3_beaver_7b: {said} found, a finite number expected",
        )
        for value, said in (
            (None, "nothing"),
            (float("nan"), "nan"),
            (float("inf"), "inf"),
            (-float("inf"), "-inf"),
            ("1.5", "'1.5'"),
            (True, "True"),
            ([1.5], "[1.5]"),
        )
    ),
    ("helpsteer2", ("prompt",), GONE, "prompt: nothing found, text expected"),
    ("helpsteer2", ("response",), GONE, "response: nothing found, text expected"),
    ("helpsteer2", ("helpfulness",), GONE, "helpfulness: nothing found, a list of int expected"),
    (
        "helpsteer2",
        ("helpfulness",),
        3,
        "helpfulness: 3 found, each annotator's rating, as in "
        "disagreements/disagreements.jsonl.gz, expected",
    ),
    (
        "helpsteer2",
        ("helpfulness",),
        "[3, 4]",
        "helpfulness: '[3, 4]' found, a list of int expected",
    ),
    ("helpsteer2", ("helpfulness", 0), 5, f"helpfulness: 5 found, {RATING}"),
    ("helpsteer2", ("helpfulness", 1), -1, f"helpfulness: -1 found, {RATING}"),
    ("helpsteer2", ("helpfulness", 1), 2.5, "helpfulness: [0, 2.5] found, a list of int expected"),
    (
        "helpsteer2",
        ("helpfulness", 1),
        None,
        "helpfulness: [0, None] found, a list of int expected",
    ),
    (
        "helpsteer2",
        ("helpfulness", 1),
        True,
        "helpfulness: [0, True] found, a list of int expected",
    ),
    (
        "helpsteer2",
        ("helpfulness", 1),
        float("nan"),
        "helpfulness: [0, nan] found, a list of int expected",
    ),
    ("preference", ("split",), GONE, "split: nothing found, one of train, val expected"),
    ("preference", ("split",), "test", "split: 'test' found, one of train, val expected"),
    ("preference", ("response_1",), GONE, "response_1: nothing found, text expected"),
    ("preference", ("prompt",), None, "prompt: nothing found, text expected"),
    ("preference", (STRENGTH,), GONE, f"{STRENGTH}: nothing found, a list of dict expected"),
    ("preference", (STRENGTH, 0), 1, f"{STRENGTH}: [1, "),
    (
        "preference",
        (STRENGTH, 0, "strength"),
        GONE,
        f"{STRENGTH}: strength: nothing found, {STRENGTHS}",
    ),
    *(
        (
            "preference",
            (STRENGTH, 0, "strength"),
            value,
            f"{STRENGTH}: strength: {value!r} found, {STRENGTHS}",
        )
        for value in (4, -4, 100, 1.5, True, "1")
    ),
    ("tldr", ("info",), GONE, "info: nothing found, an object expected"),
    ("tldr", ("info",), "x", "info: 'x' found, an object expected"),
    ("tldr", ("info", "post"), GONE, "info: post: nothing found, text expected"),
    ("tldr", ("info", "title"), None, "info: title: nothing found, text expected"),
    ("tldr", ("info", "subreddit"), GONE, "info: subreddit: nothing found, text expected"),
    ("tldr", ("info", "id"), 7, "info: id: 7 found, text expected"),
    ("tldr", ("summaries",), GONE, "summaries: nothing found, a list of dict expected"),
    (
        "tldr",
        ("summaries",),
        [{"text": "one"}],
        "summaries: [{'text': 'one'}] found, two of them expected",
    ),
    (
        "tldr",
        ("summaries",),
        [{"text": "a"}, {"text": "b"}, {"text": "c"}],
        "found, two of them expected",
    ),
    ("tldr", ("summaries", 1, "text"), GONE, "summaries: text: nothing found, text expected"),
    (
        "tldr",
        ("split",),
        "validation",
        "split: 'validation' found, one of train, valid1, valid2 expected",
    ),
    ("tldr", ("split",), 7, "split: 7 found, one of train, valid1, valid2 expected"),
    ("tldr", ("batch",), GONE, "batch: nothing found, one of batch3, "),
    ("tldr", ("batch",), "batch2", "batch: 'batch2' found, one of batch3, "),
    ("tldr", ("batch",), "cnndm1", "batch: 'cnndm1' found, one of batch3, "),
    *(
        (
            "helpsteer3",
            (ANNOTATORS, 1, "score"),
            value,
            f"{ANNOTATORS}: score: {said} found, {SCORE}",
        )
        for value, said in ((4, "4"), (-4, "-4"), (0.5, "0.5"), ("1", "'1'"), (GONE, "nothing"))
    ),
    ("helpsteer3", (ANNOTATORS,), GONE, f"{ANNOTATORS}: nothing found, a list of dict expected"),
    ("helpsteer3", (ANNOTATORS,), [1, 2], f"{ANNOTATORS}: [1, 2] found, a list of dict expected"),
    ("helpsteer3", ("context",), "Hi", "context: 'Hi' found, a list of dict expected"),
    (
        "helpsteer3",
        ("context", 1, "role"),
        "bot",
        "context: role: 'bot' found, one of system, user",
    ),
    ("helpsteer3", ("context", 0, "content"), None, "context: content: nothing found, text expect"),
    ("helpsteer3", ("response1",), None, "response1: nothing found, text expected"),
    ("helpsteer3", ("domain",), "", "domain: '' found, text that is not empty expected"),
    ("helpsteer3", ("language",), GONE, "language: nothing found, text that is not empty expected"),
    *(
        ("tldr", ("choice",), value, f"choice: {said} found, one of 0, 1 expected")
        for value, said in (
            (2, "2"),
            (-1, "-1"),
            (0.5, "0.5"),
            (True, "True"),
            ("1", "'1'"),
            (None, "nothing"),
            (GONE, "nothing"),
        )
    ),
]


def refused(kind, tmp_path, source, *flags):
    """The one line that a source is refused with; nothing may be left of the run."""
    run = tmp_path / "run"
    with pytest.raises(InputError) as error:
        of(kind, run, source, *flags)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600 and not run.exists()
    return str(error.value)


@pytest.mark.parametrize(
    "kind, path, value, said",
    BAD,
    ids=[
        f"{kind} {'.'.join(map(str, path))} {'gone' if value is GONE else ascii(value)}"
        for kind, path, value, _ in BAD
    ],
)
def test_bad_row_is_one_line(tmp_path, kind, path, value, said):
    rows = [*ROWS[kind][:2], changed(ROWS[kind][2], path, value), *ROWS[kind][3:]]
    line = refused(kind, tmp_path, save(tmp_path / "bad.jsonl", rows))
    assert line.startswith("bad.jsonl line 3: ") and said in line


@pytest.mark.parametrize("ending", [".parquet", ".parquet.gz", ".json"])
@pytest.mark.parametrize(
    "kind, path, value, said",
    [
        next(bad for bad in BAD if bad[:2] == (kind, path))
        for kind, path in (
            ("multipref", (EXPERT, 1, "overall_pref")),
            ("personalllm", ("response_3_beaver_7b",)),
            ("helpsteer2", ("helpfulness", 0)),
            ("preference", (STRENGTH, 0, "strength")),
            ("helpsteer3", (ANNOTATORS, 1, "score")),
            ("tldr", ("choice",)),
        )
    ],
)
def test_bad_row_of_other_files(tmp_path, ending, kind, path, value, said):
    value = {GONE: None}.get(value, value)
    rows = [*ROWS[kind][:2], changed(ROWS[kind][2], path, value), *ROWS[kind][3:]]
    line = refused(kind, tmp_path, save(tmp_path / f"bad{ending}", rows))
    assert line.startswith(f"bad{ending} row 3: ") and said in line


@pytest.mark.parametrize("kind", ROWS)
def test_renamed_column(tmp_path, kind):
    field = {
        "multipref": "completion_a",
        "personalllm": "response_2_gemma_2b",
        "helpsteer2": "helpfulness",
        "preference": "response_2",
        "helpsteer3": "response2",
        "tldr": "summaries",
    }[kind]
    rows = [
        {"renamed" if name == field else name: value for name, value in row.items()}
        for row in ROWS[kind]
    ]
    for ending, place in ((".jsonl", "line 1"), (".parquet", "row 1")):
        assert f"bad{ending} {place}: {field}: nothing found, " in refused(
            kind, tmp_path, save(tmp_path / f"bad{ending}", rows)
        )


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows, path):
    return save(path / "whole.parquet", rows).read_bytes()


FAULTS = {  # what is wrong: (file name, its bytes from the good rows, what the line must say)
    "truncated gz": (
        "bad.jsonl.gz",
        lambda rows, path: gzip.compress(jsonl(rows))[:-12],
        "bad.jsonl.gz: not a whole gzip file",
    ),
    "gz cut in the middle": (
        "bad.json.gz",
        lambda rows, path: gzip.compress(json.dumps(rows).encode())[:150],
        "bad.json.gz: not a whole gzip file",
    ),
    "gz that is none": (
        "bad.jsonl.gz",
        lambda rows, path: jsonl(rows),
        "bad.jsonl.gz: not a whole gzip file",
    ),
    "truncated parquet": (
        "bad.parquet",
        lambda rows, path: parquet(rows, path)[:-20],
        "bad.parquet: not parquet (",
    ),
    "parquet without its middle": (
        "bad.parquet",
        lambda rows, path: (lambda b: b[:200] + b[400:])(parquet(rows, path)),
        "bad.parquet",
    ),
    "truncated parquet.gz": (
        "bad.parquet.gz",
        lambda rows, path: gzip.compress(parquet(rows, path))[:-12],
        "bad.parquet.gz: not a whole gzip file",
    ),
    "empty parquet": ("bad.parquet", lambda rows, path: b"", "bad.parquet: not parquet ("),
    "json lines for parquet": (
        "bad.parquet",
        lambda rows, path: jsonl(rows),
        "bad.parquet: not parquet (",
    ),
    "no JSON in line 2": (
        "bad.jsonl",
        lambda rows, path: jsonl(rows[:1]) + b"{'prompt': 1}\n" + jsonl(rows[1:]),
        "bad.jsonl line 2: not JSON (",
    ),
    "half of line 2": (
        "bad.jsonl",
        lambda rows, path: jsonl(rows[:2])[:-20],
        "bad.jsonl line 2: not JSON (",
    ),
    "no JSON": (
        "bad.json",
        lambda rows, path: b'[\n{"prompt": }\n]',
        "bad.json line 2: not JSON (",
    ),
    "json lines in .json": (
        "bad.json",
        lambda rows, path: jsonl(rows),
        "bad.json line 2: not JSON (Extra data)",
    ),
    "an object": (
        "bad.json",
        lambda rows, path: b'{"rows": []}',
        "bad.json: the file: {'rows': []} found, a list of rows expected",
    ),
    "a row that is none": (
        "bad.jsonl",
        lambda rows, path: jsonl([rows[0], 7]),
        "bad.jsonl line 2: the row: 7 found, an object expected",
    ),
    "not UTF-8": (
        "bad.jsonl",
        lambda rows, path: jsonl(rows[:1]) + b'{"prompt": "n\xe9"}\n',
        "bad.jsonl line 2: not UTF-8 (byte 0xe9)",
    ),
    **{
        name: (
            name,
            lambda rows, path, content=content: content(rows),
            f"{name}: a file that ends in .parquet, .json or .jsonl, also with .gz, expected",
        )
        for name, content in (
            ("bad.csv", lambda rows: b"prompt\nx\n"),
            ("bad.csv.gz", lambda rows: gzip.compress(b"prompt\nx\n")),
            ("bad.txt", jsonl),
            ("bad", jsonl),
        )
    },
    "another data set": (
        "bad.jsonl",
        lambda rows, path: jsonl([{"instruction": "x", "output": "y"}]),
        "bad.jsonl line 1: ",
    ),
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("fault", FAULTS)
def test_bad_file_is_one_line(tmp_path, kind, fault):
    name, content, said = FAULTS[fault]
    (tmp_path / name).write_bytes(content(ROWS[kind], tmp_path))
    assert said in refused(kind, tmp_path, tmp_path / name)
    (tmp_path / "source").mkdir()  # the same as the second file of a directory
    if "a file that ends in" not in said:  # a directory's other files are left alone
        save(tmp_path / "source" / "train.jsonl", ROWS[kind])
        (tmp_path / name).rename(tmp_path / "source" / name.replace("bad", "validation"))
        assert said.replace("bad.", "validation.") in refused(kind, tmp_path, tmp_path / "source")


@pytest.mark.parametrize("kind", ROWS)
def test_file_without_rows_is_refused(tmp_path, kind):
    for name, content in (
        ("bad.jsonl", b""),
        ("bad.jsonl", b"\n \n"),
        ("bad.json", b"[]"),
        ("bad.json", b""),
        ("bad.jsonl.gz", gzip.compress(b"")),
    ):
        (tmp_path / name).write_bytes(content)
        assert " no " in refused(kind, tmp_path, tmp_path / name)


def test_one_file_in_two_forms_is_refused(tmp_path):
    """Both would count, so every vote twice."""
    source = folder(tmp_path / "source", PERSONALLLM)
    save(source / "train.jsonl.gz", PERSONALLLM["train"])
    assert "train.*: one file expected" in refused("personalllm", tmp_path, source)


def test_prompt_of_two_rows_has_its_ten_annotators_once(tmp_path):
    once, before = convert("personalllm", tmp_path / "once", folder(tmp_path / "a", PERSONALLLM))
    twice = PERSONALLLM | {"train": [*PERSONALLLM["train"], PERSONALLLM["train"][0]]}
    splits, stats = convert("personalllm", tmp_path / "twice", folder(tmp_path / "b", twice))
    assert splits == once and stats["here"] == before["here"]
    assert stats["dropped"]["pair of answers that is there already"] >= 28


def test_file_without_rows_is_named(tmp_path):
    assert "bad.jsonl" in refused("multipref", tmp_path, save(tmp_path / "bad.jsonl", []))


def test_unknown_speaker(tmp_path):
    prompt = "Hi<extra_id_1>System\nx"
    said = refused(
        "helpsteer2",
        tmp_path,
        save(
            tmp_path / "bad.jsonl", [rated(prompt, "apple", [1, 2]), rated(prompt, "pear", [1, 2])]
        ),
    )
    assert (
        said
        == "bad.jsonl line 2: prompt: <extra_id_1>: 'system' found, one of user, assistant expected"
    )


@pytest.mark.parametrize("kind", ROWS)
def test_bad_place_is_one_line(tmp_path, kind):
    assert "nowhere.jsonl: " in refused(kind, tmp_path, tmp_path / "nowhere.jsonl")
    empty = folder(tmp_path / "empty", {})
    nothing = (
        f"{empty}: no file named train*, validation* or test* found, "
        "with an ending .parquet, .json or .jsonl, also .gz"
    )
    assert refused(kind, tmp_path, empty) == nothing
    for name in ("data.jsonl", "train.csv", "train.txt", "README.md", "training"):
        (empty / name).write_text("x")
    assert refused(kind, tmp_path, empty) == nothing
    assert "test files found, but none named train*" in refused(
        kind, tmp_path, folder(tmp_path / "test", {"test": ROWS[kind]})
    )
    said = refused(
        kind, tmp_path, folder(tmp_path / "two", {"validation": ROWS[kind], "test": ROWS[kind]})
    )
    assert "test" in said and "validation" in said and "none named train*" in said


@pytest.mark.parametrize(
    "kind, rows, said",
    [
        (
            "helpsteer2",
            HELPSTEER2[:3],
            "1 prompts found, at least three expected "
            "(1 dropped: answer without a second one beside it)",
        ),
        (
            "helpsteer2",
            HELPSTEER2[:1],
            "no pair with 2 votes or more found (1 dropped: answer without a second one beside it)",
        ),
        (
            "multipref",
            MULTIPREF[3:5],
            "no pair with 2 votes or more found (2 dropped: fewer than two votes)",
        ),
        ("multipref", MULTIPREF[:2], "2 prompts found, at least three expected"),
        (
            "tldr",
            TLDR["train"][5:8],
            "1 prompts found, at least three expected (1 dropped: fewer than two votes)",
        ),
        ("preference", PREFERENCES[:1] + PREFERENCES[3:5], "1 test prompts, at least 2 expected"),
        (
            "preference",
            PREFERENCES[2:4] + PREFERENCES[5:],
            f"0 train prompts, at least 1 expected (1 dropped: train {AGAIN})",
        ),
        (
            "personalllm",
            PERSONALLLM["test"],
            "2 prompts found, at least three expected "
            "(7 dropped: empty response; 1 dropped: fewer than two votes)",
        ),
    ],
)
def test_too_few_rows(tmp_path, kind, rows, said):
    assert said in refused(kind, tmp_path, save(tmp_path / "bad.jsonl", rows))


def test_train_that_is_in_test(tmp_path):
    said = refused(
        "tldr",
        tmp_path,
        folder(
            tmp_path / "source",
            {"train": TLDR["train"][-2:], "validation": [*TLDR["validation"], *TLDR["train"][:5]]},
        ),
    )
    assert (
        "0 train prompts, at least 1 expected "
        f"(3 dropped: label on a CNN/DM article; 1 dropped: train {AGAIN})" in said
    )


def run_script(name, *words):
    """Exit code, stdout, and stderr after the progress bar (which ends in a carriage return)."""
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    ended = subprocess.run(
        [sys.executable, str(REPOSITORY / "data_prep" / f"{name}.py"), *map(str, words)],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": path},
        cwd="/",
    )
    return ended.returncode, ended.stdout.decode(), ended.stderr.decode().rpartition("\r")[2]


def test_script_ends_with_one_line_and_exit_code_2(tmp_path):
    code, out, line = run_script(
        "tldr",
        "--run",
        tmp_path / "run",
        "--source",
        save(
            tmp_path / "bad.jsonl", [*TLDR["train"][:9], changed(TLDR["train"][9], ("choice",), 2)]
        ),
    )
    assert (
        code == 2
        and out == ""
        and line == "tldr.py: error: bad.jsonl line 10: choice: 2 found, one of 0, 1 expected\n"
    )
    assert not (tmp_path / "run").exists()


def test_script_without_a_fault(tmp_path):
    code, out, error = run_script(
        "multipref", "--run", tmp_path / "run", "--source", save(tmp_path / "m.parquet", MULTIPREF)
    )
    assert code == 0 and error == "" and "multipref beside tables 1 and 2 of the paper" in out
    assert {path.name for path in (tmp_path / "run" / "data").iterdir()} == {
        "train.parquet",
        "test.parquet",
        "stats.json",
    }


@pytest.mark.parametrize(
    "name, flags, said",
    [
        ("multipref", ["--ties", "keep"], "--ties"),
        ("personalllm", ["--beaver", "yes"], "--beaver"),
        ("helpsteer2", ["--annotators", "all"], "--annotators"),
        ("tldr", ["--cnndm", "no"], "--cnndm"),
        ("tldr", ["--beaver", "negated"], "--beaver"),
        ("prism", ["--count", "0"], "--count"),
        ("prism", ["--ties", "half"], "--ties"),
        ("multipref", ["--test-share", "1"], "--test-share"),
        ("export_pairs", ["--out", "pairs.csv"], "--out"),
        ("export_pairs", ["--out", "pairs"], "--out"),
        ("export_pairs", ["--out", "p.jsonl", "--split", "all"], "--split"),
        ("export_pairs", [], "--out"),
        ("tldr", ["--source"], "--source"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(capsys, name, flags, said):
    with pytest.raises(SystemExit) as ended:
        SCRIPTS[name].parse_args(["--run", "nowhere", *flags])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and said in error


# ---- the same run again


@pytest.mark.parametrize(
    "kind, flags, said",
    [
        ("multipref", ("--ties", "half"), "ties was drop, is half"),
        ("personalllm", ("--beaver", "negated"), "beaver was published, is negated"),
        ("helpsteer2", ("--annotators", "cross"), "annotators was zip, is cross"),
        ("preference", ("--min-votes", "1"), "min-votes was 2, is 1"),
        ("tldr", ("--cnndm", "keep"), "cnndm was drop, is keep"),
        ("tldr", ("--seed", "3"), "seed was 0, is 3"),
        ("multipref", ("--test-share", "0.2"), "test-share was 0.1, is 0.2"),
        ("helpsteer2", PREFERENCE, "annotators was zip, is preference"),
    ],
)
def test_again_is_skipped_and_otherwise_refused(tmp_path, capsys, kind, flags, said):
    run, source = tmp_path / "run", save(tmp_path / "rows.jsonl", ROWS[kind])
    of(kind, run, source)
    capsys.readouterr()
    before = snapshot(run)
    of(kind, run, source)
    assert capsys.readouterr().out == f"data: {run / 'data'} is there, skipped\n"
    moved = save(tmp_path / "moved.jsonl", ROWS[kind])  # the bytes count, not the name
    of(kind, run, moved)
    with pytest.raises(InputError, match=f"{said}; to have both, run: .* --run {run}-2$"):
        of(kind, run, source, *flags)
    bad = [*ROWS[kind][:2], {"x": 1}]
    for other in (
        save(tmp_path / "other.jsonl", ROWS[kind][:-1]),
        save(tmp_path / "rows.parquet", ROWS[kind]),
        save(tmp_path / "bad.jsonl", bad),
        save(tmp_path / "bad.json", "["),
        folder(tmp_path / "source", {"train": ROWS[kind]}),
    ):
        with pytest.raises(
            InputError,
            match="made from another source than it is given now .*; to have both, run: ",
        ):
            of(kind, run, other)
    save(source, bad)
    with pytest.raises(InputError, match="another source"):
        of(kind, run, source)
    assert snapshot(run) == before and not list(run.rglob(".partial-*"))


def test_a_changed_file_of_a_directory_is_another_source(tmp_path):
    source = folder(tmp_path / "source", TLDR)
    convert("tldr", tmp_path / "run", source)
    (source / "notes.txt").write_text("x")
    convert("tldr", tmp_path / "run", source)
    save(source / "validation.jsonl", TLDR["validation"][:-1])
    with pytest.raises(InputError, match="another source"):
        convert("tldr", tmp_path / "run", source)


def test_broken_off_run_with_a_bad_source_keeps_what_is_there(tmp_path):
    run = tmp_path / "run"
    convert("multipref", run, save(tmp_path / "m.jsonl", MULTIPREF))
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["stages"]["data"]["done"] = False  # begun again and killed
    (run / "manifest.json").write_text(json.dumps(manifest))
    before = snapshot(run)
    with pytest.raises(InputError, match="bad.jsonl line 1: "):
        convert("multipref", run, save(tmp_path / "bad.jsonl", [{}]))
    assert snapshot(run) == before and not list(run.rglob(".partial-*"))
    assert convert("multipref", run, tmp_path / "m.jsonl")[1]["here"]["pairs"] == 6


def test_data_that_no_run_made_is_left_alone(tmp_path):
    (tmp_path / "run" / "data").mkdir(parents=True)
    (tmp_path / "run" / "data" / "mine.txt").write_text("x")
    with pytest.raises(
        InputError, match="data exists but was not made by this stage .data.; choose another --run"
    ):
        convert("multipref", tmp_path / "run", save(tmp_path / "m.jsonl", MULTIPREF))
    assert [path.name for path in (tmp_path / "run").rglob("*")] == ["data", "mine.txt"]


def test_number_of_rows_that_is_not_the_published_one_is_a_warning(tmp_path, capsys, monkeypatch):
    convert("multipref", tmp_path / "file", save(tmp_path / "m.jsonl", MULTIPREF))
    assert (
        capsys.readouterr().out.count("data: warning: 12 rows found, 10,461 published\n") == 1
    )  # once, though the rows are read three times
    convert("multipref", tmp_path / "one", folder(tmp_path / "multipref", SPLIT["multipref"]))
    assert "data: warning: 12 rows found in train, 10,461 published\n" in capsys.readouterr().out
    convert("tldr", tmp_path / "tldr_file", save(tmp_path / "t.jsonl", ROWS["tldr"]))
    assert (
        "data: warning: 42 rows found, 178,944 published\n" in capsys.readouterr().out
    )  # 92,858 and 86,086
    convert("personalllm", tmp_path / "two", save(tmp_path / "source.jsonl", ROWS["personalllm"]))
    assert "data: warning: 5 rows found, 10,402 published\n" in capsys.readouterr().out
    rows = [row | {"prompt": f"{row['prompt']} {i}"} for i, row in enumerate(ROWS["personalllm"])]
    convert("personalllm", tmp_path / "three", folder(tmp_path / "personalllm", {"train": rows}))
    out = capsys.readouterr().out
    assert (
        "data: warning: 5 rows found in train, 9,402 published\n" in out
        and "data: warning: 0 rows found in test, 1,000 published\n" in out
    )
    monkeypatch.setattr(
        SCRIPTS["tldr"], "DATA", SCRIPTS["tldr"].DATA._replace(rows={"train": 34, "validation": 8})
    )
    convert("tldr", tmp_path / "right", folder(tmp_path / "tldr", TLDR))
    assert "rows found" not in capsys.readouterr().out


# ---- PRISM

ENGLISH = [
    "What is love?",
    "Is it wrong to lie?",
    "Should abortion be legal?",
    "What do you think about immigration?",
    "Tell me about God, and why people believe in him.",
    "hi, can you help me?",
    "how can i be happy",
    "WHY IS THE EARTH ROUND?",
    "What are your views on gun control in the USA?",
    "I believe that healthcare is a right. Do you agree?",
    "Who should own the land of Israel and Palestine?",
    "Is the monarchy in the UK still relevant, and should it be kept with public money?",
    "Do you have feelings?",
    "Give me the best arguments against the death penalty.",
    "Women should have the same rights as men. What is your opinion?",
    "I feel that politicians don’t care about us",
    "How do I make a good risotto for my family?",
    "Does the naïve café owner have a right to know what people think of him?",
    "Explain why it is important to be kind to other people",
]
FOREIGN = [
    "¿Qué piensas sobre el aborto?",
    "¿Es justo que los ricos paguen más impuestos que los pobres?",
    "Hola, quiero saber si me puedes ayudar con un problema de familia",
    "Que pensez-vous de la peine de mort ?",
    "Est-ce que tu crois en Dieu ?",
    "Pourquoi les gens sont si tristes en hiver et que peut-on faire pour eux ?",
    "Was denkst du über die Ehe für alle?",
    "Ist es richtig, dass man in der Stadt so viel Miete zahlt?",
    "Warum will man in Berlin was anderes?",
    "Qual é a sua opinião sobre o governo?",
    "Como posso ser uma pessoa melhor para os meus amigos?",
    "Cosa pensi del cambiamento climatico e della politica?",
    "È giusto che i ricchi paghino più tasse dei poveri?",
    "Perché i giovani e i vecchi non si capiscono?",
    "Wat vind je van de monarchie in Nederland?",
    "Moet iedereen in het land om werk vragen?",
    "Is dit goed of slecht?",
    "Wat is beter: hond of kat?",
]


@pytest.mark.parametrize("prompt", ENGLISH)
def test_english_is_told(prompt):
    assert SCRIPTS["prism"].is_english(prompt)


@pytest.mark.parametrize(
    "prompt",
    [*FOREIGN, "", "?!", "42", "这是什么 what is it 这是什么这是什么这是什么", "привет what is it"],
)
def test_other_languages_are_told(prompt):
    assert not SCRIPTS["prism"].is_english(prompt)


def conversation(i, kind, prompt):
    turn = {"turn": 0, "role": "user", "content": prompt, "model_name": None, "score": None}
    return {
        "conversation_id": f"c{i}",
        "user_id": "user1",
        "conversation_type": kind,
        "opening_prompt": prompt,
        "conversation_turns": 1,
        "conversation_history": [turn],
        "performance_attributes": {"values": 1},
        "choice_attributes": {"values": 1},
        "open_feedback": "",
        "generated_datetime": "2023-12-22",
        "timing_duration_s": 1.5,
        "included_in_balanced_subset": True,
    }


GUIDED = [
    f"What do you think about topic number {word}?"
    for word in ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
]
PRISM = [
    *(
        conversation(i, ("values guided", "controversy guided")[i % 2], prompt)
        for i, prompt in enumerate(GUIDED)
    ),
    conversation(10, "unguided", "What is the best film?"),
    conversation(11, "values guided", "¿Qué piensas sobre el aborto?"),
    conversation(12, "controversy guided", f" {GUIDED[3]}\n"),
    conversation(13, "unguided", "How are you?"),
]


@pytest.fixture
def prepared(tmp_path):
    """A run of six prompts, GUIDED[4:10]; two of them are for test."""
    run = tmp_path / "run"
    convert(
        "multipref",
        run,
        save(
            tmp_path / "m.jsonl",
            [multipref(f"p{i}", GUIDED[i], "apple", "pear", "AAAA") for i in range(4, 10)],
        ),
    )
    return run


def drawn(run):
    rows = pq.read_table(run / "prompts.parquet").to_pylist()
    assert all(
        len(row["messages"]) == 1
        and row["messages"][0]["role"] == "user"
        and set(row) == {"prompt_id", "messages"}
        for row in rows
    )
    return {row["prompt_id"]: row["messages"][0]["content"] for row in rows}


def test_prism_takes_guided_english_prompts_that_are_no_train_prompts(tmp_path, prepared, capsys):
    source = save(tmp_path / "conversations.jsonl", PRISM)
    call("prism", prepared, "--source", source)
    test = prompts(splits_of(prepared))["test"]
    assert (
        drawn(prepared)
        == {f"c{i}": prompt for i, prompt in enumerate(GUIDED) if i < 4 or prompt in test}
        and len(test) == 2
    )
    out = capsys.readouterr().out
    assert (
        "prompts: only 6 of the kind, all of them taken\n" in out
        and "data: warning: 14 rows found, 8,011 published\n" in out
    )
    entry = json.loads((prepared / "manifest.json").read_text())["stages"]["prompts"]
    content = (prepared / "prompts.parquet").read_bytes()
    (prepared / "prompts.parquet").write_bytes(content + b" ")
    with pytest.raises(InputError, match="prompts.parquet: edited or damaged"):
        script("continuations").held_out_prompts(prepared)
    assert (
        entry["settings"] == {"count": 50, "seed": 0}
        and entry["source"]["hub"] == "HannahRoseKirk/prism-alignment"
    )
    assert entry["source"]["rows"] == {"all": 14}
    call("prism", prepared, "--source", source)
    assert "prompts.parquet is there, skipped" in capsys.readouterr().out
    with pytest.raises(InputError, match="count was 50, is 3"):
        call("prism", prepared, "--source", source, "--count", "3")
    with pytest.raises(InputError, match="another source"):
        call("prism", prepared, "--source", save(tmp_path / "other.jsonl", PRISM[1:]))


def test_prism_leaves_out_train_prompts_whatever_their_white_space(tmp_path):
    rows = [multipref(f"p{i}", f" {GUIDED[i]}\n", "apple", "pear", "AAAA") for i in range(10)]
    convert("multipref", tmp_path / "run", save(tmp_path / "m.jsonl", rows))
    call("prism", tmp_path / "run", "--source", save(tmp_path / "c.jsonl", PRISM))
    test = prompts(splits_of(tmp_path / "run"))["test"]
    assert set(drawn(tmp_path / "run").values()) == {prompt.strip() for prompt in test}


def test_prism_draws_by_the_seed(tmp_path, prepared, capsys):
    source, found = save(tmp_path / "conversations.parquet", PRISM), []
    for seed in ("0", "0", "1", "2"):
        (prepared / "prompts.parquet").unlink(missing_ok=True)
        (prepared / "manifest.json").unlink(missing_ok=True)
        call("prism", prepared, "--source", source, "--count", "3", "--seed", seed)
        found.append(drawn(prepared))
    assert (
        all(len(each) == 3 and len(set(each.values())) == 3 for each in found)
        and found[0] == found[1]
    )
    assert len({tuple(each) for each in found}) > 1
    assert "of the kind" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "rows, said",
    [
        (
            [*PRISM[:2], conversation(3, "guided", "x")],
            "c.jsonl line 3: conversation_type: 'guided' found, "
            "one of unguided, values guided, controversy guided expected",
        ),
        (
            [PRISM[0], changed(PRISM[1], ("conversation_type",), GONE)],
            "c.jsonl line 2: conversation_type: nothing found, one of unguided",
        ),
        (
            [PRISM[0], changed(PRISM[10], ("opening_prompt",), None)],
            "c.jsonl line 2: opening_prompt: nothing found, text expected",
        ),
        (
            [PRISM[0], changed(PRISM[1], ("conversation_id",), GONE)],
            "c.jsonl line 2: conversation_id: nothing found, text that is not empty expected",
        ),
        (
            PRISM[10:12],
            "no English prompt of a values guided or controversy guided conversation found, "
            "50 expected",
        ),
        ("{", "c.jsonl line 1: not JSON"),
    ],
)
def test_bad_prism_is_one_line(tmp_path, prepared, rows, said):
    before = snapshot(prepared)
    with pytest.raises(InputError) as error:
        call("prism", prepared, "--source", save(tmp_path / "c.jsonl", rows))
    assert (
        said in str(error.value)
        and "\n" not in str(error.value)
        and snapshot(prepared) == before
        and not list(prepared.glob(".partial-*"))
    )


def test_prism_needs_prepared_data(tmp_path):
    (tmp_path / "run").mkdir()
    code, _, line = run_script(
        "prism", "--run", tmp_path / "run", "--source", save(tmp_path / "c.jsonl", PRISM)
    )
    assert (
        code == 2
        and line.count("\n") == 1
        and line.startswith("prism.py: error: ")
        and "data" in line
    )
    assert not list((tmp_path / "run").iterdir())


def test_continuations_are_of_prism_prompts_where_there_are_any(tmp_path, prepared, continuations):
    ids, messages, which = continuations.held_out_prompts(prepared)
    assert {m[0]["content"] for m in messages} == prompts(splits_of(prepared))[
        "test"
    ] and which == "test prompts"
    assert set(ids) <= {f"p{i}" for i in range(4, 10)}
    call("prism", prepared, "--source", save(tmp_path / "c.jsonl", PRISM), "--count", "4")
    ids, messages, which = continuations.held_out_prompts(prepared)
    assert (
        {name: m[0]["content"] for name, m in zip(ids, messages)} == drawn(prepared)
        and len(ids) == 4
        and "prompts.parquet" in which
    )


@pytest.mark.parametrize(
    "content, said",
    [
        (b"PAR1", "prompts.parquet: not parquet ("),
        ([{"prompt_id": "a"}], "prompts.parquet row 1: prompt: nothing found"),
        ([{"messages": [{"role": "user", "content": "x"}]}], "row 1: prompt_id: nothing found"),
    ],
)
def test_bad_prompts_file_is_one_line(prepared, continuations, content, said):
    save(prepared / "prompts.parquet", content)
    with pytest.raises(InputError) as error:
        continuations.held_out_prompts(prepared)
    assert said in str(error.value)


@pytest.mark.parametrize("flag", ["--temperature", "--top-p", "--max-tokens", "--count"])
def test_numbers_that_sampling_cannot_take(continuations, capsys, flag):
    for value in ("1e-40", "999999999999", "1_0", "nan", "-1", "1e400", "٣"):
        words = ["--run", "nowhere", "--base", "nowhere", f"{flag}={value}"]
        if (flag, value) in {("--temperature", "999999999999"), ("--top-p", "1e-40")}:
            continuations.parse_args(words)
            continue
        with pytest.raises(SystemExit) as ended:
            continuations.parse_args(words)
        error = capsys.readouterr().err
        assert ended.value.code == 2 and error.count("\n") == 1 and flag in error


@pytest.mark.parametrize(
    "line", [b'{"n": 1', b"\xff\xfe", b"[1]", b'{"n": 1, "n": 2}', b"[" * 100_000, b""]
)
def test_kept_rows_from_the_first_broken_line_on_are_made_anew(tmp_path, continuations, line):
    path, made = tmp_path / "rows.jsonl", []
    kept = b'{"seed": 0}\n{"n": 0}\n' + line + b'\n{"n": 2}\n'
    (tmp_path / ".kept-rows.jsonl").write_bytes(kept)

    def make(number):
        made.append(number)
        return {"n": number}

    rows = continuations.sampling.remembered_rows(path, {"seed": 0}, 4, make, "rows")
    assert rows == [{"n": n} for n in range(4)] and made == [1, 2, 3]


def test_other_columns_of_a_published_data_set_are_not_named(tmp_path, capsys):
    convert("tldr", tmp_path / "run", folder(tmp_path / "t", TLDR))
    assert "not used" not in capsys.readouterr().out


# ---- export


def pair(a, b, votes_a, votes_b, ties=0):
    return {"a": a, "b": b, "votes_a": votes_a, "votes_b": votes_b, "ties": ties}


def said(*contents):
    """Turns of the user and the assistant, in alternation."""
    return [
        {"role": ("user", "assistant")[i % 2], "content": content}
        for i, content in enumerate(contents)
    ]


SYSTEM = [{"role": "system", "content": "Be kind."}, *said("Hi", "Hello", "Why?")]
EXPORTED = [
    {
        "prompt_id": "x",
        "messages": said("Q"),
        "responses": ["apple", "pear", "fig"],
        "pairs": [pair(0, 1, 3, 1), pair(1, 2, 1, 4, 2), pair(2, 0, 2, 2)],
    },
    {
        "prompt_id": "y",
        "messages": SYSTEM,
        "responses": ["Zoë\n", "pear"],
        "pairs": [pair(1, 0, 0, 2)],
    },
    {
        "prompt_id": "z",
        "messages": said("A", "B", "C"),
        "responses": ["apple", "pear"],
        "pairs": [pair(1, 0, 2.5, 0.5, 1)],
    },
    {
        "prompt_id": "w",
        "messages": [*said("A"), *said("B")],
        "responses": ["apple", "pear"],
        "pairs": [pair(0, 1, 0, 3)],
    },
]


@pytest.fixture
def exported(tmp_path):
    (tmp_path / "run" / "data").mkdir(parents=True)
    write_split(tmp_path / "run" / "data" / "test.parquet", EXPORTED)
    return tmp_path / "run"


def test_export(tmp_path, exported, capsys):
    call("export_pairs", exported, "--out", tmp_path / "new" / "pairs.jsonl")
    rows = [
        json.loads(line)
        for line in (tmp_path / "new" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    folded = said("Be kind.\n\nHi", "Hello", "Why?")
    # chosen, rejected, p, n, pair_id: the votes are turned where b has more of them, and the third
    # pair of x is even.
    expected = [
        (said("Q", "apple"), said("Q", "pear"), 3 / 4, 4, "x/0/1"),
        (said("Q", "fig"), said("Q", "pear"), 4 / 5, 5, "x/2/1"),
        ([*folded, *said("", "Zoë\n")[1:]], [*folded, *said("", "pear")[1:]], 1, 2, "y/0/1"),
        (said("A", "B", "C", "pear"), said("A", "B", "C", "apple"), 2.5 / 3, 3, "z/1/0"),
        (said("A\n\nB", "pear"), said("A\n\nB", "apple"), 1, 3, "w/1/0"),
    ]
    found = [(row["chosen"], row["rejected"], row["p"], row["n"], row["pair_id"]) for row in rows]
    assert found == [(*turns, pytest.approx(p), n, name) for *turns, p, n, name in expected]
    assert all(list(row) == ["chosen", "rejected", "p", "n", "pair_id"] for row in rows)
    assert (
        capsys.readouterr().out
        == f"export: 5 pairs in {tmp_path / 'new' / 'pairs.jsonl'}, 1 with p = 1/2 left out\n"
    )
    call("export_pairs", exported, "--out", tmp_path / "pairs.parquet")
    assert pq.read_table(tmp_path / "pairs.parquet").to_pylist() == rows
    assert splits_of(exported)["test"][1]["messages"] == SYSTEM and not list(
        tmp_path.rglob(".partial-*")
    )


@pytest.mark.parametrize("split", ["train", "test"])
def test_export_has_every_pair_with_a_majority_once(tmp_path, split):
    splits, _ = convert(
        "personalllm", tmp_path / "run", folder(tmp_path / "source", PERSONALLLM), "--ties", "half"
    )
    call("export_pairs", tmp_path / "run", "--split", split, "--out", tmp_path / "pairs.jsonl")
    votes = {
        key: (a / (a + b), a + b)
        for key, (a, b, _) in by_texts({split: splits[split]}).items()
        if a > b
    }
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    found = [
        (
            (
                row["chosen"][0]["content"],
                row["chosen"][-1]["content"],
                row["rejected"][-1]["content"],
            ),
            row["p"],
            row["n"],
        )
        for row in rows
    ]
    # one test pair is even
    assert len(found) == len(votes) == {"train": 49, "test": 48}[split] and len(
        {row["pair_id"] for row in rows}
    ) == len(rows)
    assert {key: (p, n) for key, p, n in found} == {
        key: (pytest.approx(p), n) for key, (p, n) in votes.items()
    } and all(p > 0.5 for _, p, _ in found)
    assert all(
        len(row["chosen"]) == len(row["rejected"]) == 2 and row["chosen"][0] == row["rejected"][0]
        for row in rows
    )


def test_export_of_nothing(tmp_path, exported):
    write_split(exported / "data" / "train.parquet", [EXPORTED[0] | {"pairs": [pair(0, 1, 2, 2)]}])
    for split, line in (
        ("train", "every train pair has p = 1/2"),
        ("valid", "valid.parquet: no such file"),
    ):
        with pytest.raises(InputError, match=line):
            call("export_pairs", exported, "--split", split, "--out", tmp_path / "pairs.jsonl")
    assert not list(tmp_path.glob("*pairs*"))


def test_exported_rows_are_as_datasets_of_many(tmp_path):
    """Prompts of random sizes: the answers of a pair are its own prompt's."""
    rng, rows = np.random.default_rng(0), []
    for i in range(12):
        count = int(rng.integers(2, 5))
        pairs = [
            pair(*map(int, rng.permutation([a, b])), *map(int, rng.integers(1, 4, 2)))
            for b in range(count)
            for a in range(b)
        ]
        rows.append(
            {
                "prompt_id": f"p{i}",
                "messages": said(f"Q{i}"),
                "responses": [f"Q{i} answer {j}" for j in range(count)],
                "pairs": pairs,
            }
        )
    (tmp_path / "run" / "data").mkdir(parents=True)
    write_split(tmp_path / "run" / "data" / "valid.parquet", rows)
    call("export_pairs", tmp_path / "run", "--split", "valid", "--out", tmp_path / "pairs.jsonl")
    found = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert all(
        row[side][1]["content"].startswith(row["chosen"][0]["content"] + " ")
        for row in found
        for side in ("chosen", "rejected")
    )
    assert len(found) == sum(p["votes_a"] != p["votes_b"] for row in rows for p in row["pairs"])
