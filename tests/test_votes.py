"""data_prep/votes.py: what a user's file becomes, by hand; every bad file has a clear line."""

import argparse
import csv
import gzip
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

from pairwise import cli
from pairwise import rows as rows_module
from pairwise.cli import InputError

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = REPOSITORY / "data_prep" / "votes.py"
spec = importlib.util.spec_from_file_location("votes", SCRIPT)
votes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(votes)


@pytest.fixture(autouse=True)
def no_figure(monkeypatch):
    """The figure of data preparation takes longer than all the rest; test_published looks at it."""
    monkeypatch.setattr(votes.prompts.figures, "write_votes", lambda share, path: None)


def row(prompt="Why?", a="Because.", b="No idea.", **fields):
    """A row; None leaves a field out."""
    fields = {
        "prompt": prompt,
        "response_a": a,
        "response_b": b,
        "votes_a": 3,
        "votes_b": 1,
    } | fields
    return {name: value for name, value in fields.items() if value is not None}


def numbered(count, **fields):
    return [row(f"Question {i}?", **fields) for i in range(count)]


def voted(fields, **more):
    """A row whose votes are `fields` and nothing else."""
    return row(**({"votes_a": None, "votes_b": None} | fields | more))


def save(path, rows):
    """Write rows in the form that the path's ending names; bytes and text as they are."""
    ending = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if isinstance(rows, bytes):
        content = rows
    elif isinstance(rows, str):
        content = rows.encode()
    elif ending == "jsonl":
        content = "".join(json.dumps(r) + "\n" for r in rows).encode()
    elif ending == "json":
        content = json.dumps(rows, indent=1).encode()
    elif ending == "csv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(dict.fromkeys(name for r in rows for name in r)))
        writer.writeheader()
        writer.writerows(
            {
                name: json.dumps(value) if isinstance(value, list | dict) else value
                for name, value in r.items()
            }
            for r in rows
        )
        content = text.getvalue().encode()
    else:
        sink = pa.BufferOutputStream()
        pq.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), sink)
        content = sink.getvalue().to_pybytes()
    path.write_bytes(gzip.compress(content) if path.name.lower().endswith(".gz") else content)
    return path


def prepared(tmp_path, rows, *flags, name="mine.jsonl", run="run"):
    """{split: prompt rows} and stats.json of a run of the script's main."""
    source = save(tmp_path / name, rows)
    votes.main(votes.parse_args(["--run", str(tmp_path / run), "--source", str(source), *flags]))
    data = tmp_path / run / "data"
    return {
        path.stem: pq.read_table(path).to_pylist() for path in data.glob("*.parquet")
    }, json.loads((data / "stats.json").read_text())


def by_texts(splits):
    """Return {(prompt, response, other): (votes for it, for the other, ties)}, in both orders."""
    found = {}
    for members in splits.values():
        for r in members:
            for pair in r["pairs"]:
                prompt, a, b = (
                    r["messages"][-1]["content"],
                    r["responses"][pair["a"]],
                    r["responses"][pair["b"]],
                )
                assert (prompt, a, b) not in found
                found[prompt, a, b] = pair["votes_a"], pair["votes_b"], pair["ties"]
                found[prompt, b, a] = pair["votes_b"], pair["votes_a"], pair["ties"]
    return found


# ---- votes


def test_votes_of_rows_in_both_orders_are_added_up(tmp_path):
    rows = [
        row("Q0", "x", "y", votes_a=3, votes_b=1),
        row("Q1"),
        row("Q0", "y", "x", votes_a=2, votes_b=0.5),
        row("Q0", "y", "z", votes_a=0, votes_b=2),
        row("Q2"),
        row("Q0", "x", "y", votes_a=1, votes_b=0, ties=2),
    ]
    splits, stats = prepared(tmp_path, rows)
    found = by_texts(splits)
    assert found["Q0", "x", "y"] == (3 + 0.5 + 1, 1 + 2, 2)
    assert found["Q0", "y", "z"] == (0, 2, 0)
    assert len(found) == 2 * 4 and stats["dropped"] == {}
    assert (
        sum(s["pairs"] for s in stats["splits"].values()) == 4
        and sum(s["responses"] for s in stats["splits"].values()) == 3 + 2 + 2
    )


def test_three_forms_of_the_same_votes_give_the_same_data(tmp_path):
    pairs = [("Q0", 2, 1, 0.67), ("Q1", 1, 3, 0.25), ("Q2", 3, 0, 1), ("Q3", 1, 2, 0.3333)]
    counted = [row(q, votes_a=a, votes_b=b) for q, a, b, _ in pairs]
    shares = [voted({"p": p, "n": a + b}, prompt=q) for q, a, b, p in pairs]
    choices = [voted({"choice": c}, prompt=q) for q, a, b, _ in pairs for c in "a" * a + "b" * b]
    data = [
        prepared(tmp_path, rows, run=f"run{i}")[0]
        for i, rows in enumerate((counted, shares, choices))
    ]
    assert data[0] == data[1] == data[2]
    assert by_texts(data[0])["Q3", "Because.", "No idea."] == (1, 2, 0)


@pytest.mark.parametrize(
    "p, n, expected",
    [
        (0.33, 3, (1, 2)),
        (0.3333, 3, (1, 2)),
        (0.67, 3, (2, 1)),
        (0.3, 3, (1, 2)),
        (0.5, 3, (1.5, 1.5)),
        (0, 4, (0, 4)),
        (1, 4, (4, 0)),
        (0.375, 4, (1.5, 2.5)),
        (0.1667, 3, (0.5, 2.5)),
        (1 / 3, 3, (1, 2)),
        (0.8571, 7, (6, 1)),
        (0.35, 10, (3.5, 6.5)),
        (0.07, 15, (1, 14)),
        (0.4, 5.0, (2, 3)),
        (0.33, 1000, (330, 670)),
        (0.12, 4, (0.5, 3.5)),
        (0.13, 4, (0.5, 3.5)),
        (0.3, 9, (3, 6)),  # 2.5 of 9 is nearer, but needs a tie
        (0.42, 53, (22, 31)),
        (0.5, 11, (5.5, 5.5)),
    ],
)
def test_p_is_taken_as_the_exact_fraction_it_was_rounded_from(p, n, expected):
    assert votes.fraction("", {"p": p, "n": n})[:2] == expected
    in_float32 = pa.array([p], pa.float32()).to_pylist()[0]
    assert votes.fraction("", {"p": in_float32, "n": n})[:2] == expected


@pytest.mark.parametrize(
    "p, n", [(0.4, 3), (0.1, 3), (0.34, 3), (0.3334, 3), (0.333, 2), (0.26, 4), (0.333333, 100000)]
)
def test_p_that_n_votes_cannot_give_is_refused(p, n):
    with pytest.raises(
        InputError,
        match=f"p: {p} found, a multiple of 1/{2 * n} .n = {n}., up to its rounding, expected",
    ):
        votes.fraction("here", {"p": p, "n": n})


def test_ties_count_for_nothing_or_for_half_a_vote_each(tmp_path):
    rows = [
        voted({"choice": c}, prompt=f"Q{i}")
        for i in range(3)
        for c in ("a", "tie", "b", "a", "tie", "tie")
    ]
    dropped, half = (
        prepared(tmp_path, rows, "--ties", ties, run=ties)[0] for ties in ("drop", "half")
    )
    assert set(by_texts(dropped).values()) == {(2, 1, 3), (1, 2, 3)}
    assert set(by_texts(half).values()) == {(3.5, 2.5, 3), (2.5, 3.5, 3)}


def test_ties_alone_make_a_pair_only_with_half(tmp_path):
    rows = [*numbered(3), row("Tied?", votes_a=0, votes_b=1, ties=2)]
    splits, stats = prepared(tmp_path, rows)
    assert stats["dropped"] == {"fewer than two votes": 1} and "Tied?" not in {
        key[0] for key in by_texts(splits)
    }
    assert by_texts(prepared(tmp_path, rows, "--ties", "half", run="half")[0])[
        "Tied?", "Because.", "No idea."
    ] == (1, 2, 2)


def test_ties_in_n_are_votes_of_every_split():
    rows = [
        votes.prompts.Comparison(str(i), [{"role": "user", "content": f"Q{i}"}], "x", "y", 1, 0, 1)
        for i in range(10)
    ]
    args = argparse.Namespace(min_votes=2, test_share=0.3, valid_share=0.2)
    rng = np.random.default_rng(0)
    splits, dropped = votes.prompts.divide(args, "mine", rows, rng, votes.prompts.IN_N)
    counts = {name: sum(len(prompt.pairs) for prompt in splits[name]) for name in splits}
    assert counts == {"train": 6, "valid": 1, "test": 3} and not dropped
    with pytest.raises(InputError, match="10 dropped: fewer than two votes"):
        votes.prompts.divide(args, "mine", rows, rng, "drop")


def test_pairs_without_two_votes_are_dropped_and_counted(tmp_path, capsys):
    rows = [
        *(row(f"Q{i}", split="test" if i < 3 else "train") for i in range(6)),
        row("Q0", "one", "vote", votes_a=1, votes_b=0, split="test"),
        row("Q5", "one", "vote", votes_a=1, votes_b=0, split="train"),
        row("Q5", "same", "same", split="train"),
    ]
    splits, stats = prepared(tmp_path, rows)
    assert (
        stats["dropped"] == {"fewer than two votes": 2, "identical responses": 1}
        and len(by_texts(splits)) == 2 * 6
    )
    printed = capsys.readouterr().out
    assert "2 dropped: fewer than two votes" in printed
    few = "warning: only 3 test prompts, which tell little about others; they are the data's own "
    assert stats["own_split"] is True and few in printed and "a larger --test-share" in printed
    assert "one" not in {
        text for members in splits.values() for r in members for text in r["responses"]
    }
    for name, members in splits.items():
        assert stats["splits"][name]["responses"] == sum(len(r["responses"]) for r in members)
    splits, stats = prepared(tmp_path, rows, "--min-votes", "1", run="one")
    assert ("Q5", "one", "vote") in by_texts(splits) and ("Q0", "one", "vote") not in by_texts(
        splits
    )  # one vote is for training only
    assert stats["dropped"] == {"fewer than two votes": 1, "identical responses": 1}
    assert "1 dropped: fewer than two votes" in capsys.readouterr().out


# ---- prompts, splits, orientation


def test_rows_group_by_prompt_id_else_by_prompt(tmp_path):
    chat = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Why?"},
    ]
    rows = [
        row("Why?"),
        row([{"role": "user", "content": "Why?", "name": None}], "x", "y"),
        row(chat),
        row("Else?"),
        row("Else?", "x", "y"),
    ]
    splits, _ = prepared(tmp_path, rows)
    assert sorted(len(r["pairs"]) for members in splits.values() for r in members) == [1, 2, 2]
    assert chat in [r["messages"] for members in splits.values() for r in members]
    rows = [row("Why?", prompt_id=i) for i in (0, 1, 2, "2")] + [
        row("Who?", prompt_id=3),
        row("Where?", prompt_id=4),
    ]
    splits, _ = prepared(tmp_path, rows, run="ids")
    assert sorted(
        (r["prompt_id"], r["pairs"][0]["votes_a"] + r["pairs"][0]["votes_b"])
        for members in splits.values()
        for r in members
    ) == [("0", 4), ("1", 4), ("2", 8), ("3", 4), ("4", 4)]
    homes = {
        name
        for name, members in splits.items()
        for r in members
        if r["messages"][0]["content"] == "Why?"
    }
    assert len(homes) == 1  # the same text under three ids: three prompts, on one side of the split


def test_an_id_that_pandas_made_a_float_is_the_integer(tmp_path):
    rows = [row(f"Q{i}", prompt_id=i) for i in range(4)]
    floats = [r | {"prompt_id": float(r["prompt_id"])} for r in rows]
    expected, _ = prepared(tmp_path, rows, name="mine.parquet")
    assert prepared(tmp_path, floats, name="mine.parquet", run="floats")[0] == expected


def test_a_prompt_with_a_blank_turn_is_dropped(tmp_path):
    system = {"role": "system", "content": "Be kind."}
    chats = [[system, {"role": "user", "content": content}] for content in ("Why?", " \n")]
    splits, stats = prepared(tmp_path, [*numbered(3), *(row(chat) for chat in chats)])
    found = [r["messages"] for members in splits.values() for r in members]
    assert chats[0] in found and chats[1] not in found and stats["dropped"] == {"empty prompt": 1}


def test_given_split_is_kept(tmp_path):
    rows = [row(f"Question {i}?", split="test" if i % 3 == 0 else "train") for i in range(9)]
    splits, _ = prepared(tmp_path, rows, "--test-share", "0.9", "--valid-share", "0.34")
    found = {
        name: sorted(int(r["messages"][0]["content"][9]) for r in members)
        for name, members in splits.items()
    }
    assert (
        found["test"] == [0, 3, 6]
        and len(found["valid"]) == 2
        and sorted(found["train"] + found["valid"]) == [1, 2, 4, 5, 7, 8]
    )


@pytest.mark.parametrize(
    "prompts, share, expected", [(3, "0", 2), (5, "0.1", 2), (40, "0.1", 4), (40, "0.25", 10)]
)
def test_share_of_prompts_for_test_at_least_two(tmp_path, capsys, prompts, share, expected):
    rows = [r for r in numbered(prompts) for r in (r, r | {"response_a": "Third."})]
    splits, _ = prepared(tmp_path, rows, "--test-share", share)
    ids = {name: {r["prompt_id"] for r in members} for name, members in splits.items()}
    assert (
        len(ids["test"]) == expected
        and len(ids["train"]) == prompts - expected
        and not ids["train"] & ids["test"]
    )
    assert all(len(r["pairs"]) == 2 for members in splits.values() for r in members)
    assert f"only {expected} test prompts" in capsys.readouterr().out


def test_a_share_of_train_prompts_for_validation_is_at_least_one(tmp_path):
    splits, _ = prepared(tmp_path, numbered(10), "--valid-share", "0.01")
    assert {name: len(members) for name, members in splits.items()} == {
        "train": 7,
        "valid": 1,
        "test": 2,
    }


def test_equal_texts_under_several_ids_are_named(tmp_path, capsys):
    rows = [r | {"prompt_id": f"{r['prompt']}, {i}"} for r in numbered(30) for i in (1, 2)]
    _, stats = prepared(tmp_path, rows, "--test-share", "0.5")
    assert stats["distinct_texts"] == {"train": 15, "test": 15}
    assert "warning: the 30 test prompts have 15 distinct texts" in capsys.readouterr().out


def test_no_warning_with_twenty_test_prompts(tmp_path, capsys):
    prepared(tmp_path, numbered(40), "--test-share", "0.5")
    assert "warning" not in capsys.readouterr().out


def test_seed_turns_votes_and_p_true_with_the_responses(tmp_path):
    rows = [
        row(
            f"Q{i}",
            f"a{i}",
            f"b{i}",
            votes_a=i,
            votes_b=40 - i,
            p_true=i / 64,
            split="test" if i < 20 else "train",
        )
        for i in range(40)
    ]
    turned = []
    for seed in ("0", "1"):
        splits, _ = prepared(tmp_path, rows, "--seed", seed, run=f"seed{seed}")
        for r in (r for name in ("test", "train") for r in splits[name]):
            [pair], [p_true], i = r["pairs"], r["p_true"], int(r["messages"][0]["content"][1:])
            first = r["responses"][pair["a"]]
            assert {first, r["responses"][pair["b"]]} == {f"a{i}", f"b{i}"}
            assert (pair["votes_a"], pair["votes_b"], p_true) == (
                (i, 40 - i, i / 64) if first[0] == "a" else (40 - i, i, 1 - i / 64)
            )
            turned.append(first[0] == "b")
    assert turned[:40] != turned[40:] and 8 <= sum(turned[:40]) <= 32


def test_p_true_of_the_other_order_in_float32(tmp_path):
    rows = [
        r
        for q in range(3)
        for r in (row(f"Q{q}", "x", "y", p_true=0.1), row(f"Q{q}", "y", "x", p_true=0.9))
    ]
    table = pa.Table.from_pylist(rows)
    table = table.set_column(
        table.schema.get_field_index("p_true"), "p_true", table["p_true"].cast(pa.float32())
    )
    splits, _ = prepared(tmp_path, table, name="mine.parquet")
    assert all(len(r["p_true"]) == 1 for members in splits.values() for r in members)


def test_categories_and_votes_are_kept(tmp_path):
    rows = [
        row(f"Q{i}", categories={"topic": "food" if i else "law", "level": i}) for i in range(4)
    ]
    splits, stats = prepared(tmp_path, rows, "--votes", "dependent")
    found = {
        r["messages"][0]["content"]: r["categories"] for members in splits.values() for r in members
    }
    assert found["Q0"] == {"topic": "law", "level": "0"} and found["Q3"] == {
        "topic": "food",
        "level": "3",
    }
    assert (
        stats["votes"] == "dependent"
        and stats["dataset"] == "mine"
        and "p_true" not in splits["train"][0]
    )


def test_other_votes_are_another_run(tmp_path, capsys):
    prepared(tmp_path, numbered(3))
    prepared(tmp_path, numbered(3))
    assert "skipped" in capsys.readouterr().out
    with pytest.raises(InputError, match="votes was sampled, is population"):
        prepared(tmp_path, numbered(3), "--votes", "population")
    with pytest.raises(InputError, match="another source"):
        prepared(tmp_path, numbered(4))


def test_null_is_missing(tmp_path):
    nothing = {
        "ties": None,
        "p": None,
        "n": None,
        "choice": None,
        "prompt_id": None,
        "p_true": None,
        "split": None,
        "categories": None,
    }
    splits, _ = prepared(tmp_path, [r | nothing for r in numbered(3)], run="null")
    assert splits == prepared(tmp_path, numbered(3))[0]


# ---- files


@pytest.mark.parametrize(
    "ending",
    [".json", ".csv", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz", ".parquet.gz", ".JSONL.GZ"],
)
@pytest.mark.parametrize(
    "form", [{"votes_a": 2, "votes_b": 1.5, "ties": 1}, {"p": 0.67, "n": 3}, {"choice": "b"}]
)
def test_every_ending_gives_the_same_data(tmp_path, ending, form):
    chat = [
        {"role": "system", "content": "Be “kind”."},
        {"role": "user", "content": 'Zoë?\nSay, "hi"'},
    ]
    rows = [
        voted(
            form,
            prompt=prompt,
            a="An apple, or\r\ntwo",
            b="x" * 200_000,
            prompt_id=f"id{i}",
            p_true=0.25,
            split="test" if i % 2 else "train",
            categories={"topic": f"t{i}", "ü": "1"},
            extra="ignored",
        )
        for i, prompt in enumerate(
            [chat, "[1, 2]", "[{", "[]", '[{"x": 1}]']
            if ending in (".csv", ".csv.gz")
            else [chat, chat[1:], chat, chat[1:], chat]
        )
        for _ in range(2)
    ]
    expected, _ = prepared(tmp_path, rows, run="jsonl")
    found, stats = prepared(tmp_path, rows, name=f"mine{ending}", run="other")
    assert found == expected and stats["dataset"] == "mine"
    assert (
        found["train"][0]["messages"] == chat
        and found["train"][0]["p_true"][0] in (0.25, 0.75)
        and len(found["train"][0]["pairs"]) == 1
    )


@pytest.mark.parametrize("seed", ["0", "1", "2", "3"])
def test_prompts_of_single_votes_are_for_training(tmp_path, seed):
    """With --min-votes 1 what is held out can be evaluated, whatever the seed."""
    rows = numbered(25)
    for i, each in enumerate(rows):
        each |= {"votes_a": 3 if i < 5 else 1, "votes_b": 1 if i < 5 else 0}
    flags = ["--min-votes", "1", "--test-share", "0.4", "--valid-share", "0.3", "--seed", seed]
    splits, stats = prepared(tmp_path, rows, *flags)
    assert [len(splits[name]) for name in ("train", "valid", "test")] == [22, 1, 2]
    assert not stats["dropped"]


def test_validation_needs_pairs_of_two_votes(tmp_path):
    rows = [r | {"split": "test"} for r in numbered(3)]
    for each in numbered(9)[3:]:
        rows.append(each | {"split": "train", "votes_a": 1, "votes_b": 0})
    with pytest.raises(InputError, match="mine: no prompt for validation found"):
        prepared(tmp_path, rows, "--min-votes", "1", "--valid-share", "0.1")


@pytest.mark.parametrize("key", ["role", "content"])
def test_a_chat_in_pythons_notation_is_no_prompt(tmp_path, key):
    """As pandas writes a column of lists to CSV."""
    turn = {"role": "user", "content": "Q?"}
    chat = [{key: turn[key]} | turn]
    rows = [row(prompt=str(chat)) for _ in range(3)]
    with pytest.raises(InputError, match="line 2: prompt: messages that are not JSON"):
        prepared(tmp_path, rows, name="mine.csv")


def test_rows_across_batches_blank_lines_and_a_byte_order_mark(tmp_path):
    rows = numbered(5000)
    splits, _ = prepared(tmp_path, rows, name="many.parquet")
    assert sum(map(len, splits.values())) == 5000
    text = "\ufeff\n" + "\n\n".join(json.dumps(r) for r in rows[:3])
    assert sum(map(len, prepared(tmp_path, text, run="marked")[0].values())) == 3
    text = (
        "\ufeffprompt,response_a,response_b,votes_a,votes_b,prompt_id\n"
        + "\n".join(f"Q{i},a,b,2,.5," for i in range(3))
        + "\n\n"
    )
    assert by_texts(prepared(tmp_path, text, name="marked.csv", run="csv")[0])["Q2", "a", "b"] == (
        2,
        0.5,
        0,
    )


# ---- bad input


def lines(*changed):
    """Two good rows of JSON lines, then these rows or texts, then a good row."""
    return "".join(
        (r if isinstance(r, str) else json.dumps(r)) + "\n"
        for r in (*numbered(2), *changed, row("Last?"))
    )


def with_column(column, value):
    """A table of three rows and one more column, which may be there already."""
    table = pa.Table.from_pylist(numbered(3))
    return table.append_column(column, pa.array([value] * 3))


def parquet_bytes(table):
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


header = "prompt,response_a,response_b,votes_a,votes_b\n"
many = pa.Table.from_pylist([row(f"Question {i} ?" * 40, f"{i}!", f"{i}.") for i in range(500)])
whole_gz = gzip.compress(lines().encode(), mtime=0)
BAD = {  # what is wrong: (file name, its content, what the line must say)
    "empty jsonl": ("v.jsonl", "", "v.jsonl: no row found"),
    "blank jsonl": ("v.jsonl", "\n \n", "v.jsonl: no row found"),
    "empty json": ("v.json", "", "v.json: no row found"),
    "empty list": ("v.json", "[]", "v.json: no row found"),
    "empty csv": ("v.csv", "", "v.csv: no row found"),
    "csv of a header": ("v.csv", header, "v.csv: no row found"),
    "empty parquet": ("v.parquet", b"", "v.parquet: not parquet"),
    "parquet without rows": (
        "v.parquet",
        pa.Table.from_pylist(numbered(1))[:0],
        "v.parquet: no row found",
    ),
    "empty gz": ("v.jsonl.gz", "", "v.jsonl.gz: no row found"),
    "empty csv.gz": ("v.csv.gz", "", "v.csv.gz: no row found"),
    "unknown ending": (
        "v.txt",
        lines(),
        "ending .txt found, one of .jsonl, .json, .csv, .parquet expected",
    ),
    "gz of unknown ending": ("v.tsv.gz", lines(), "ending .tsv found"),
    "no ending": ("v", lines(), "ending none found"),
    "not UTF-8": (
        "v.jsonl",
        lines(row(a="né")).replace("\\u00e9", "é").encode("latin-1"),
        "v.jsonl line 3: not UTF-8 (byte 0xe9)",
    ),
    "csv not UTF-8": (
        "v.csv",
        header.encode() + b"q,a,b,1,1\nq,\xff,b,1,1\n",
        "v.csv line 3: not UTF-8",
    ),
    "parquet not UTF-8": (
        "v.parquet",
        pa.table(
            {
                "prompt": pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers()),
                "response_a": ["a"],
            }
        ),
        "not UTF-8",
    ),
    "json not UTF-8": ("v.json", b'[\n"\xff"]', "v.json line 2: not UTF-8"),
    "json not UTF-8 after a byte order mark": (
        "v.json",
        b'\xef\xbb\xbf["\xff"]',
        "v.json line 1: not UTF-8 (byte 0xff)",
    ),
    "not parquet": ("v.parquet", "prompt", "v.parquet: not parquet"),
    "broken csv": ("v.csv", header + 'q,a,b,1,1\nq,"a,b,1,1\n', "v.csv line 3: not CSV"),
    "csv with too few cells": (
        "v.csv",
        header + 'q,"a\nb",b,1,1\nq,a,b,1\n',
        "v.csv line 4: 4 cells found, 5 expected",
    ),
    "csv with too many cells": (
        "v.csv",
        header + "q,a,b,1,1\nq,An apple, or two,b,1,1\n",
        "v.csv line 3: 6 cells found, 5 expected, as in the header",
    ),
    "csv with old line ends": ("v.csv", "prompt,response_a\rq,a\r", "v.csv line 1: not CSV"),
    **{
        f"csv with {what}": ("v.csv", text, f"v.csv line {line}: columns: [{columns}")
        for what, text, line, columns in (
            ("semicolons", header.replace(",", ";") + '"q, r";a;b;1;1\n', 1, "'prompt;respo..."),
            ("tabs", "\n" + header.replace(",", "\t") + "q\ta\tb\t1\t1\n", 2, "'prompt\\tr"),
            ("Excel's first line", "sep=,\n" + header + "q,a,b,1,1\n", 1, "'sep=', ''] found"),
            ("no header", "q,a,b,1,1\n", 1, "'q', 'a', 'b', '1', '1'] found"),
            ("half of UTF-16", header.encode("utf-16-le"), 1, "'p\\x00r"),
        )
    },
    "csv with a column twice": (
        "v.csv",
        "prompt,prompt\nq,q\n",
        "v.csv line 1: columns found twice: ['prompt']",
    ),
    "csv with words for numbers": (
        "v.csv",
        header + "q,a,b,1,1\nq,a,b,many,1\n",
        "v.csv line 3: votes_a: 'many' found, a number of votes",
    ),
    "csv with nan": ("v.csv", header + "q,a,b,1,nan\n", "v.csv line 2: votes_b: 'nan' found"),
    "csv with an underscore in a number": (
        "v.csv",
        header + "q,a,b, 1 ,1_0\n",
        "v.csv line 2: votes_b: '1_0' found, a number of votes",
    ),
    "csv with other digits": (
        "v.csv",
        header + "q,a,b,٣,1\n",
        "v.csv line 2: votes_a: '٣' found, a number of votes",
    ),
    "csv with infinity": ("v.csv", header + "q,a,b,inf,1\n", "v.csv line 2: votes_a: 'inf' found"),
    "csv with a key twice in categories": (
        "v.csv",
        header[:-1] + ',categories\nq,a,b,1,1,"{""t"": 1, ""t"": 2}"\n',
        "v.csv line 2: categories: not JSON (the key 't' twice in one object)",
    ),
    "csv with a key twice in a message": (
        "v.csv",
        header + '"[{""role"": ""user"", ""content"": ""x"", ""content"": ""y""}]",a,b,1,1\n',
        "v.csv line 2: prompt: not JSON (the key 'content' twice in one object)",
    ),
    "csv with one message of two without a role": (
        "v.csv",
        header + '"[{""rolle"": ""user""}, {""role"": ""user"", ""content"": ""x""}]",a,b,1,1\n',
        "v.csv line 2: prompt: {'rolle': 'user'} found, a message {role, content}",
    ),
    "a key twice": (
        "v.jsonl",
        lines('{"prompt": "x", "prompt": "y"}'),
        "v.jsonl line 3: not JSON (the key 'prompt' twice in one object)",
    ),
    "a key twice in json": (
        "v.json",
        '[{"prompt": "x",\n"votes_a": 1, "votes_a": 2}]',
        "v.json: not JSON (the key 'votes_a' twice in one object)",
    ),
    "parquet with a column twice": (
        "v.parquet",
        with_column("votes_a", 2),
        "v.parquet: columns found twice: ['votes_a'] found, distinct names expected",
    ),
    "parquet with a date after the year 9999": (
        "v.parquet",
        with_column("split", pa.scalar(2**62, pa.timestamp("ms"))),
        "v.parquet after row 0: a value that cannot be read (",
    ),
    "parquet with rotten pages": (
        "v.parquet",
        parquet_bytes(many)[:100] + bytes(200) + parquet_bytes(many)[300:],
        "v.parquet: not parquet (",
    ),
    "parquet cut off": (
        "v.parquet",
        parquet_bytes(many)[:-100],
        "v.parquet: not parquet (",
    ),
    "a name that is only an ending": (".jsonl", lines(), ".jsonl: ending none found"),
    "a name that is only two endings": (".csv.gz", lines(), ".csv.gz: ending none found"),
    "a name of dots": ("...csv", header, "...csv: no name before the ending found"),
    "csv with a missing cell": (
        "v.csv",
        header + "q,a,,1,1\n",
        "v.csv: all rows: response_b: nothing found, text expected",
    ),
    "no prompt": (
        "v.jsonl",
        [row(prompt=None)] * 3,
        "v.jsonl: all rows: prompt: nothing found",
    ),
    "csv with bad categories": (
        "v.csv",
        header[:-1] + ",categories\nq,a,b,1,1,food\n",
        "v.csv line 2: categories: 'food' found",
    ),
    "csv with a bad role": (
        "v.csv",
        header + '"[{""role"": ""bot"", ""content"": ""x""}]",a,b,1,1\n',
        "v.csv line 2: prompt: {",
    ),
    "not JSON": ("v.jsonl", lines('{"prompt": "x"'), "v.jsonl line 3: not JSON"),
    "not JSON in json": ("v.json", "[\n{},\n{]\n]", "v.json line 3: not JSON"),
    "JSON with deep brackets": ("v.jsonl", lines("[" * 100_000), "v.jsonl line 3: not JSON"),
    "JSON with a number of thousands of digits": (
        "v.jsonl",
        lines("9" * 5000),
        "v.jsonl line 3: not JSON",
    ),
    "a line that is not an object": (
        "v.jsonl",
        lines("[1]"),
        "v.jsonl line 3: the row: [1] found, an object expected",
    ),
    "a row that is not an object": (
        "v.json",
        [row(), "x"],
        "v.json row 2: the row: 'x' found, an object expected",
    ),
    "json that is not a list": (
        "v.json",
        "{}",
        "v.json: the file: {} found, a list of rows expected",
    ),
    "NaN": ("v.jsonl", lines(row(votes_a=float("nan"))), "v.jsonl line 3: votes_a: nan found"),
    "Infinity": ("v.jsonl", lines(row(votes_b=float("inf"))), "v.jsonl line 3: votes_b: inf found"),
    "-Infinity": ("v.json", [row(ties=float("-inf"))], "v.json row 1: ties: -inf found"),
    "NaN for p": (
        "v.jsonl",
        lines().replace('"votes_a": 3, "votes_b": 1', '"p": NaN, "n": 2'),
        "v.jsonl line 1: p: nan found, a number in [0, 1] expected",
    ),
    "NaN for n": (
        "v.jsonl",
        lines().replace('"votes_a": 3, "votes_b": 1', '"p": 1, "n": NaN'),
        "v.jsonl line 1: n: nan found, a positive integer expected",
    ),
    "an infinite number": (
        "v.jsonl",
        lines().replace('"votes_a": 3', '"votes_a": 1e999'),
        "votes_a: inf found",
    ),
    "an enormous integer": (
        "v.jsonl",
        lines(row(votes_a=10**400)),
        "v.jsonl line 3: votes_a: 1000",
    ),
    "parquet with a bad row": (
        "v.parquet",
        [*numbered(4999), row(votes_b=-1)],
        "v.parquet row 5000: votes_b: -1 found",
    ),
    "split outside": (
        "v.jsonl",
        [r | {"split": "valid"} for r in numbered(4)],
        "v.jsonl line 1: split: 'valid' found, train or test expected",
    ),
    "split within a prompt": (
        "v.jsonl",
        [row(f"Q{i % 3}", split="train" if i < 4 else "test") for i in range(5)],
        "v.jsonl line 5: split 'test' found, 'train' before",
    ),
    "split without test": (
        "v.jsonl",
        [r | {"split": "train"} for r in numbered(4)],
        "0 test prompts, at least 2 expected",
    ),
    "split without train": (
        "v.jsonl",
        [r | {"split": "test"} for r in numbered(4)],
        "0 train prompts, at least 1 expected",
    ),
    "two prompts": (
        "v.jsonl",
        [*numbered(2), *numbered(2, a="x")],
        "2 prompts found, at least three expected",
    ),
    "three prompts, one without votes": (
        "v.jsonl",
        [*numbered(2), row(votes_a=1, votes_b=0)],
        "2 prompts found, at least three expected (1 dropped: fewer than two votes)",
    ),
    "no pair with two votes": (
        "v.jsonl",
        numbered(5, votes_a=1, votes_b=0, ties=3),
        "no pair with 2 votes or more found (5 dropped: fewer than two votes)",
    ),
    "identical responses only": (
        "v.jsonl",
        numbered(5, a="x", b="x"),
        "no pair with 2 votes or more found (5 dropped: identical responses)",
    ),
    "one prompt_id with two prompts": (
        "v.jsonl",
        [row("Q0", prompt_id=1), row("Q1", prompt_id=1)],
        "v.jsonl line 2: prompt_id '1' has another prompt",
    ),
    "p_true that differs": (
        "v.jsonl",
        [row("Q", p_true=0.4), row("Q", p_true=0.401)],
        "v.jsonl line 2: p_true differs",
    ),
    "categories that differ": (
        "v.jsonl",
        [row("Q", categories={"t": "x"}), row("Q", categories={"t": "y"})],
        "v.jsonl line 2: categories {'t': 'y'} found",
    ),
    "truncated gz": ("v.jsonl.gz", whole_gz[:-12], "v.jsonl.gz: not a whole gzip file"),
    "gz of other bytes": (
        "v.jsonl.gz",
        whole_gz[:-8] + bytes(4) + whole_gz[-4:],
        "v.jsonl.gz: not a whole gzip file (CRC",
    ),
    "corrupt gz": (
        "v.jsonl.gz",
        whole_gz[:10] + b"\xff" + whole_gz[11:],
        "v.jsonl.gz: not a whole gzip file (Error -3",
    ),
    "gz that is none": ("v.jsonl.gz", lines().encode(), "v.jsonl.gz: not a whole gzip file"),
    "truncated parquet.gz": ("v.parquet.gz", whole_gz[:-12], "v.parquet.gz: not a whole gzip file"),
    "parquet.gz that is none": (
        "v.parquet.gz",
        lines().encode(),
        "v.parquet.gz: not a whole gzip file",
    ),
}
ROWS = {  # line 3 of a file of votes_a, votes_b: (what it is, what the line must say)
    "missing votes": (row(votes_b=None), "votes_b: nothing found"),
    "no votes": (
        row(votes_a=None, votes_b=None),
        "no votes found, one of these expected: votes_a and votes_b; p and n; choice; ranking; rat",
    ),
    "two forms in a row": (row(choice="a"), "votes_a and votes_b beside choice found"),
    "n beside votes": (row(n=4), "votes_a and votes_b beside p and n found"),
    "two forms in a file": (
        voted({"choice": "a"}),
        "votes: choice found, votes_a and votes_b in the first row",
    ),
    "p in a file of votes": (
        voted({"p": 0.5, "n": 2}),
        "votes: p and n found, votes_a and votes_b in the first row",
    ),
    "negative votes": (
        row(votes_a=-1),
        "votes_a: -1 found, a number of votes (at least 0, a multiple of one half) expected",
    ),
    "negative ties": (row(ties=-0.5), "ties: -0.5 found"),
    "a third of a vote": (row(votes_b=0.3), "votes_b: 0.3 found"),
    "boolean votes": (row(votes_a=True), "votes_a: True found"),
    "votes in words": (row(votes_a="3"), "votes_a: '3' found"),
    "p above one": (voted({"p": 1.01, "n": 2}), "p: 1.01 found, a number in [0, 1] expected"),
    "p below zero": (voted({"p": -0.5, "n": 2}), "p: -0.5 found"),
    "boolean p": (voted({"p": True, "n": 2}), "p: True found"),
    "missing n": (voted({"p": 0.5}), "n: nothing found, a positive integer expected"),
    "missing p": (voted({"n": 2}), "p: nothing found"),
    "n of zero": (voted({"p": 0.5, "n": 0}), "n: 0 found"),
    "n not whole": (voted({"p": 0.5, "n": 2.5}), "n: 2.5 found"),
    "boolean n": (voted({"p": 0.5, "n": True}), "n: True found"),
    "p that n cannot give": (
        voted({"p": 0.4, "n": 3}),
        "p: 0.4 found, a multiple of 1/6 (n = 3), up to its rounding, expected",
    ),
    "unknown choice": (voted({"choice": "A"}), "choice: 'A' found, a, b or tie expected"),
    "choice of another type": (voted({"choice": ["a"]}), "choice: ['a'] found"),
    "number for a prompt": (row(7), "prompt: 7 found"),
    "no message": (row([]), "prompt: [] found, messages that end with a user turn expected"),
    "unknown role": (row([{"role": "bot", "content": "x"}]), "prompt: {"),
    "role of another type": (row([{"role": [], "content": "x"}]), "prompt: {"),
    "message that is text": (row(["x"]), "prompt: 'x' found, a message {role, content}"),
    "message without content": (row([{"role": "user"}]), "prompt message: nothing found"),
    "tool calls": (
        row([{"role": "user", "content": "x", "tool_calls": [{"id": "1"}]}]),
        "prompt message: ['tool_calls'] found, no keys besides role and content expected",
    ),
    "named speaker": (
        row([{"role": "user", "content": "x", "name": "Al"}]),
        "prompt message: ['name'] found, no keys besides role and content expected",
    ),
    "last turn not the user's": (
        row([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]),
        "prompt: 'assistant' found, messages that end with a user turn",
    ),
    "list for a response": (row(b=["x"]), "response_b: ['x'] found"),
    "half a character": (row(a="\ud83d"), "response_a: "),
    "prompt_id in one row": (
        row(prompt_id="x"),
        "prompt_id: given found, missing in the first row; all rows alike expected",
    ),
    "boolean prompt_id": (row(prompt_id=True), "prompt_id: True found"),
    "empty prompt_id": (row(prompt_id=""), "prompt_id: '' found"),
    "p_true in one row": (row(p_true=0.5), "p_true: given found, missing"),
    "p_true above one": (row(p_true=2), "p_true: 2 found, a number in [0, 1] expected"),
    "split in one row": (row(split="train"), "split: given found, missing in the first row"),
    "split of another type": (row(split=[1]), "split: [1] found"),
    "categories in one row": (
        row(categories={"t": "x"}),
        "categories: given for ['t'] found, missing in the first row",
    ),
    "categories in words": (
        row(categories="food"),
        "categories: 'food' found, an object {name: label} expected",
    ),
    "no category": (row(categories={}), "categories: {} found"),
    "category without label": (row(categories={"t": None}), "categories: 't': nothing found"),
}
BAD |= {
    name: ("v.jsonl", lines(bad), f"v.jsonl line 3: {said}") for name, (bad, said) in ROWS.items()
}
BAD |= {
    f"{field} left out in one row": (
        "v.jsonl",
        [row("Q", **({field: value} if i != 2 else {})) for i in range(4)],
        f"v.jsonl line 3: {field}: missing found, given",
    )
    for field, value in {
        "prompt_id": 1,
        "p_true": 0.5,
        "split": "train",
        "categories": {"t": "x"},
    }.items()
}
BAD["other category names"] = (
    "v.jsonl",
    [row(f"Q{i}", categories={"t": "x"} if i < 2 else {"t": "x", "u": "y"}) for i in range(4)],
    "v.jsonl line 3: categories: given for ['t', 'u'] found, given for ['t'] in the",
)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(tmp_path, name):
    file, content, said = BAD[name]
    source = tmp_path / file
    if isinstance(content, bytes):
        source.write_bytes(content)
    else:
        save(source, content)
    run = tmp_path / "run"
    with pytest.raises(InputError) as error:
        votes.main(votes.parse_args(["--run", str(run), "--source", str(source)]))
    assert said in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400
    assert not run.exists()


def convert(tmp_path, source):
    votes.main(votes.parse_args(["--run", str(tmp_path / "run"), "--source", str(source)]))


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("v.jsonl", lines(row(a="x" * 5000)), "v.jsonl line 3: more than "),
        ("v.jsonl.gz", " " * 5000, "v.jsonl.gz line 1: more than "),
        ("v.json.gz", "[" + "\n" * 5000 + "]", "v.json.gz: the file: more than "),
        ("v.csv.gz", header + 'q,"' + '\n",",' * 1000 + '"\n', "v.csv.gz line 2: the row: more"),
        ("v.csv", header + "q,a,b,1,1" + "," * 5000, "v.csv line 2: more than "),
        ("v.parquet.gz", numbered(100), "v.parquet.gz: the file: more than "),
    ],
)
def test_what_is_read_at_once_has_a_limit(tmp_path, monkeypatch, name, content, said):
    """The files of .gz are smaller than what they hold, so their sizes say nothing."""
    source = save(tmp_path / name, content)
    monkeypatch.setattr(rows_module, "LONGEST", 2000)
    monkeypatch.setattr(rows_module.files, "hash_file", lambda path: "")
    with pytest.raises(InputError) as error:
        convert(tmp_path, source)
    assert said in str(error.value) and "at most that expected" in str(error.value)


def test_files_longer_than_the_limit_of_a_row_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "LONGEST", 2000)
    content = io.StringIO(newline="")
    csv.writer(content).writerows(
        [header.strip().split(","), *([f"{i}", "a\nb", "c", 1, 1] for i in range(300))]
    )
    for name, rows in (("v.jsonl.gz", numbered(300)), ("v.csv", content.getvalue())):
        assert sum(map(len, prepared(tmp_path, rows, name=name, run=name[:3])[0].values())) == 300


def test_other_columns_are_named_once(tmp_path, capsys):
    odd = {"tie": 1, "Split": "train", "catagories": {"x": "y"}, "new\nline": 0}
    named = "columns that are not used: 'Split', 'catagories', 'new\\nline', 'tie'\n"
    for ending in (".jsonl", ".json", ".csv", ".parquet"):
        prepared(tmp_path, numbered(3, **odd), name=f"mine{ending}", run=ending)
        assert capsys.readouterr().out.endswith(f"mine{ending}: {named}")
    prepared(tmp_path, [r | {f"x{i}{j}": 1 for j in range(9)} for i, r in enumerate(numbered(3))])
    assert "'x08', 'x10' and 17 more\n" in capsys.readouterr().out
    prepared(tmp_path, numbered(3), run="without")
    assert "not used" not in capsys.readouterr().out


def test_names_of_files(tmp_path, capsys, monkeypatch):
    """What is not UTF-8 becomes a question mark in the data set's name, which is written."""
    source = Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xff.jsonl"))
    convert(tmp_path, save(source, numbered(3, note=1)))
    stats = json.loads((tmp_path / "run" / "data" / "stats.json").read_text())
    assert stats["dataset"] == "m?"
    with pytest.raises(InputError, match="jsonl: cannot be read .File name too long.$"):
        convert(tmp_path, tmp_path / f"{'x' * 300}.jsonl")
    monkeypatch.chdir(tmp_path)
    save(Path("-x.jsonl"), numbered(3))
    for words in (["--source=-x.jsonl"], ["--source", "./-x.jsonl"]):
        votes.main(votes.parse_args(["--run", words[-1].strip("-./="), *words]))
    with pytest.raises(SystemExit):
        votes.parse_args(["--run", "run", "--source", "-x.jsonl"])
    assert capsys.readouterr().err.count("\n") == 1


def test_unreadable_source_is_one_line(tmp_path, monkeypatch, capsys):
    """An OSError while the rows are read names the file."""

    def fails(*args):
        raise OSError(5, "Input/output error")
        yield

    monkeypatch.setitem(rows_module.READERS, ".jsonl", fails)
    source = save(tmp_path / "mine.jsonl", numbered(3))
    with pytest.raises(SystemExit) as ended:
        cli.run_main(
            votes.main,
            votes.parse_args(["--run", str(tmp_path / "run"), "--source", str(source)]),
        )
    line = capsys.readouterr().err
    assert ended.value.code == 2
    assert line.endswith(f"error: {source}: cannot be read (Input/output error)\n")


def script(*words):
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        cwd="/",
    )


@pytest.mark.parametrize(
    "name, said",
    [
        ("nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("folder.jsonl", "folder.jsonl: a directory found, a file expected"),
        ("v.jsonl", "v.jsonl line 3: votes_a: -1 found"),
    ],
)
def test_script_ends_with_one_line_and_exit_code_2(tmp_path, name, said):
    (tmp_path / "folder.jsonl").mkdir()
    save(tmp_path / "v.jsonl", lines(row(votes_a=-1)))
    ended = script("--run", tmp_path / "run", "--source", tmp_path / name)
    assert ended.returncode == 2 and ended.stdout == "" and said in ended.stderr
    assert (
        ended.stderr.startswith("votes.py: error: ")
        and ended.stderr.count("\n") == 1
        and not (tmp_path / "run").exists()
    )


@pytest.mark.parametrize(
    "flags",
    [
        ["--votes", "some"],
        ["--seed", "-1"],
        ["--seed", "x"],
        ["--test-share", "1"],
        ["--min-votes", "3"],
        ["--min-votes", "٢"],
        ["--test-share", "1_0e-2"],
        ["--ties", "keep"],
        [],
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(tmp_path, capsys, flags):
    source = ["--source", str(save(tmp_path / "v.jsonl", numbered(3)))] if flags else []
    with pytest.raises(SystemExit) as ended:
        votes.parse_args(["--run", str(tmp_path / "run"), *source, *flags])
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_script_writes_the_run(tmp_path):
    ended = script("--run", tmp_path / "run", "--source", save(tmp_path / "mine.csv", numbered(4)))
    assert ended.returncode == 0 and ended.stderr == ""
    assert sorted(path.name for path in (tmp_path / "run" / "data").iterdir()) == [
        "stats.json",
        "test.parquet",
        "train.parquet",
    ]
