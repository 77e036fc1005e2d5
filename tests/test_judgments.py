"""Synthetic judgments: position bias cancels, votes stay as they are, a kill loses nothing."""

import json

from pairwise.cli import InputError
from pairwise.data import read_split
from pairwise.sampling import remembered_rows

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import fresh, leftovers, script, train

judgments = script("synthetic_judgments")


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("Choice: A", "A"),
        ("choice: b.", "B"),
        ("**Choice: B**", "B"),
        ("Choice: (A)\n", "A"),
        ("Choice:A and again Choice: A", "A"),
        ("Choice: A or Choice: B", None),
        ("Choice: A or B", None),
        ("Choice: A/B", None),
        ("Choice: A and B are equal", None),
        ("Choice: a tie", None),
        ("choice: a.", "A"),
        ("Choice: A. B says less.", "A"),
        ("Choice: A\n\nB lacks detail", "A"),
        ("Choice: B\nB is more", "B"),
        ("A", None),
        ("Choice: Apple", None),
        ("Choice: C", None),
        ("", None),
        ("My choice: both", None),
    ],
)
def test_choice(answer, expected):
    assert judgments.choice(answer) == expected


def test_a_liking_for_the_first_or_for_a_letter_cancels():
    always_a = {"a first": ["Choice: A"] * 5, "b first": ["Choice: A"] * 5}
    assert judgments.count(always_a) == {"a": 5, "b": 5}
    prefers_a = {"a first": ["Choice: A"] * 5, "b first": ["Choice: B"] * 4 + ["?"]}
    assert judgments.count(prefers_a) == {"a": 9, "b": 0}
    swapped = {"a first": prefers_a["b first"], "b first": prefers_a["a first"]}
    assert judgments.count(swapped) == {"a": 0, "b": 9}


def judge(run, base, *flags):
    judgments.main(
        judgments.parse_args(
            ["--run", str(run), "--base", str(base), "--device", "cpu", "--threads", "1"]
            + [str(flag) for flag in flags]
        )
    )


def by_length(asked):
    """Stand in for a language model: prefer the longer answer, every fifth time name no choice."""

    def ask(model, tokenizer, chat, times, args):
        asked.append(chat[0]["content"])
        first, second = chat[0]["content"].split("Answer A:\n")[1].split("\n\nAnswer B:\n")
        return [f"Choice: {'A' if len(first) >= len(second) else 'B'}"] * (times - 1) + ["neither"]

    return ask


def test_counts_are_beside_the_votes(data, base, tmp_path, monkeypatch, capsys):
    run, asked = fresh(data, tmp_path), []
    before = pq.read_table(run / "data" / "train.parquet")
    monkeypatch.setattr(judgments, "ask", by_length(asked))
    judge(run, base)
    after, split = pq.read_table(run / "data" / "train.parquet"), read_split(run, "train")
    assert after.drop_columns("judgments").equals(before) and len(asked) == 2 * len(split.a)
    texts = [text for responses in split.responses for text in responses]
    for a, b, found in zip(split.a, split.b, split.judgments):
        expected = (
            [4, 4]
            if len(texts[a]) == len(texts[b])
            else [8, 0]
            if len(texts[a]) > len(texts[b])
            else [0, 8]
        )
        assert found.tolist() == expected
    said = capsys.readouterr().out
    assert (
        f"10 for each of {len(split.a)} pairs" in said
        and f"{2 * len(split.a)} of {10 * len(split.a)} answers name no choice" in said
    )
    raw = [json.loads(line) for line in (run / "judgments.jsonl").read_text().splitlines()]
    assert sum(
        len(answers) for row in raw for pair in row["pairs"] for answers in pair.values()
    ) == 10 * len(split.a)
    judge(run, base)
    assert "skipped" in capsys.readouterr().out and len(asked) == 2 * len(split.a)
    assert all(message["content"] in asked[0] for message in split.messages[0])


# with braces that are no placeholders, and one twice
PROMPT = (
    'As {"choice": "A"}: {prompt}|{answer_0} {}\nAnswer A:\n{answer_0}\n\nAnswer B:\n{answer_1}'
)


def test_a_prompt_of_ones_own_in_one_order(data, base, tmp_path, monkeypatch):
    run, asked, file = fresh(data, tmp_path), [], tmp_path / "prompt.txt"
    file.write_text(PROMPT, encoding="utf-8")
    monkeypatch.setattr(judgments, "ask", by_length(asked))
    flags = "--prompt", str(file), "--orders", "one"
    judge(run, base, *flags, "--count", "3")
    split = read_split(run, "train")
    texts = [text for responses in split.responses for text in responses]
    prompt = np.repeat(np.arange(len(split.messages)), np.diff(split.pair_start))
    assert len(asked) == len(split.a)
    for question, i, a, b, found in zip(asked, prompt, split.a, split.b, split.judgments):
        turns = split.messages[i]
        said = turns[0]["content"]
        if len(turns) > 1:
            said = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
        expected = PROMPT.replace("{prompt}", said).replace("{answer_0}", texts[a])
        assert question == expected.replace("{answer_1}", texts[b])
        assert found.tolist() == ([2, 0] if len(texts[a]) >= len(texts[b]) else [0, 2])
    raw = json.loads((run / "judgments.jsonl").read_text().splitlines()[0])
    assert [len(pair["a first"]) for pair in raw["pairs"]] == [3] * len(raw["pairs"])
    assert "b first" not in raw["pairs"][0]
    judge(run, base, *flags, "--count", "3")
    assert len(asked) == len(split.a)
    file.write_text(PROMPT + " ", encoding="utf-8")
    with pytest.raises(InputError, match="prompt"):  # another prompt, another run
        judge(run, base, *flags, "--count", "3")


def test_texts_with_placeholders_are_left_alone():
    user = [{"role": "user", "content": "What is {answer_0}?"}]
    [chat] = judgments.question("{prompt} {answer_0} {answer_1}", user, "{answer_1}", "{prompt}")
    assert chat["content"] == "What is {answer_0}? {answer_1} {prompt}"


@pytest.mark.parametrize(
    "content, said",
    [
        (b"{prompt} {answer_0}", "no {answer_1} found, {prompt}, {answer_0}, {answer_1} expected"),
        (b"Answer A: {answer_0}", "no {prompt} and no {answer_1} found, "),
        (b"\xff", "can't decode byte 0xff"),
        (None, "No such file"),
    ],
)
def test_bad_prompt_is_one_line(data, base, content, said, tmp_path):
    file = tmp_path / "prompt.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError) as error:
        judge(data, base, "--prompt", file)
    assert str(error.value).startswith(f"--prompt {file}: ") and said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_kill_loses_at_most_one_prompt(data, base, tmp_path, monkeypatch):
    whole, broken = fresh(data, tmp_path, "whole"), fresh(data, tmp_path, "broken")
    judge(whole, base)
    ask, calls = judgments.ask, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 40:
            raise KeyboardInterrupt
        return ask(*args)

    monkeypatch.setattr(judgments, "ask", killed)
    with pytest.raises(KeyboardInterrupt):
        judge(broken, base)
    judge(broken, base)
    split = read_split(whole, "train")
    assert len(calls) - 1 - 2 * len(split.a) <= 2 * max(np.diff(split.pair_start))
    for name in ("judgments.jsonl", "data/train.parquet"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()
    assert not leftovers(broken) and not list(broken.glob(".kept-*"))
    raw = [json.loads(line) for line in (whole / "judgments.jsonl").read_text().splitlines()]
    assert (
        len(
            {
                answer
                for row in raw
                for pair in row["pairs"]
                for answers in pair.values()
                for answer in answers
            }
        )
        > 100
    )  # drawn, not repeated


def test_not_after_training_and_not_by_odd_counts(data, base, tmp_path, capsys):
    run = fresh(data, tmp_path)
    broken = fresh(data, tmp_path, "broken")
    (broken / "data" / "train.parquet").write_text("x")
    with pytest.raises(InputError, match="train.parquet: "):
        judge(broken, base)
    train(run, base, "--train", "head")
    with pytest.raises(InputError, match="features was made from it already; judgments come first"):
        judge(run, base)
    for flags in (["--count", "5"], ["--top-p", "1.5"]):
        with pytest.raises(SystemExit):
            judge(run, base, *flags)
    assert "an even number expected" in capsys.readouterr().err


def test_remembered_rows(tmp_path):
    path, made = tmp_path / "rows.jsonl", []

    def make(number):
        made.append(number)
        if number == 3 and made.count(3) == 1:
            raise KeyboardInterrupt
        return {"n": number}

    with pytest.raises(KeyboardInterrupt):
        remembered_rows(path, {"seed": 0}, 5, make, "rows")
    with open(tmp_path / ".kept-rows.jsonl", "a") as file:
        file.write('{"n": 3')  # cut off in the middle of a line
    assert remembered_rows(path, {"seed": 0}, 5, make, "rows") == [
        {"n": n} for n in range(5)
    ] and made == [0, 1, 2, 3, 3, 4]
    assert [path.name] == [file.name for file in tmp_path.iterdir()] and path.read_text().count(
        "\n"
    ) == 5
    made[:] = [3]
    (tmp_path / ".kept-rows.jsonl").write_text('{"seed": 1}\n{"n": 7}\n')
    assert remembered_rows(path, {"seed": 0}, 2, make, "rows") == [
        {"n": 0},
        {"n": 1},
    ]  # of another key: made anew
