"""data_prep/votes.py: rankings, ratings, annotators, and rows without a text."""

import itertools
import random

from pairwise import cli

import numpy as np
import pyarrow as pa
import pytest
from test_votes import by_texts, numbered, prepared, row, save, voted, votes

pytestmark = pytest.mark.usefixtures("no_votes_figure")


@pytest.fixture
def no_votes_figure(monkeypatch):
    monkeypatch.setattr(votes.prompts.figures, "write_votes", lambda share, path: None)


def judged(fields, prompt="Q", responses=("x", "y", "z"), **more):
    return {"prompt": prompt, "responses": list(responses)} | fields | more


def good(fields, count=4):
    """Rows of two annotators on each of several prompts."""
    return [judged(fields, f"Q{i}") for i in range(count) for _ in range(2)]


def files_of(tmp_path, run):
    return {path.name: path.read_bytes() for path in (tmp_path / run / "data").glob("*.parquet")}


def judgments(seed, prompts=6, annotators=4, k=5):
    """[(prompt, responses, levels, annotator)] with ties and responses left out."""
    rng = random.Random(seed)
    return [
        (
            f"Q{q}",
            [f"{q}.{j}" for j in range(k)],
            [rng.choice([None, 1, 2.5, 4]) for _ in range(k)],
            w,
        )
        for q in range(prompts)
        for w in range(annotators)
    ]


def as_choices(made):
    for prompt, responses, levels, annotator in made:
        for i, j in itertools.combinations(range(len(responses)), 2):
            x, y = levels[i], levels[j]
            if x is not None and y is not None:
                choice = "tie" if x == y else "a" if x > y else "b"
                fields = {"choice": choice, "annotator": annotator}
                yield voted(fields, prompt=prompt, a=responses[i], b=responses[j])


def as_rankings(made):
    for prompt, responses, levels, annotator in made:
        places = sorted({level for level in levels if level is not None}, reverse=True)
        groups = [[i for i, x in enumerate(levels) if x == place] for place in places]
        ranking = [group[0] if len(group) == 1 else group[::-1] for group in groups]
        yield judged({"ranking": ranking}, prompt, responses, annotator=annotator)


def as_ratings(made):
    for prompt, responses, levels, annotator in made:
        yield judged({"ratings": levels}, prompt, responses, annotator=annotator)


# ---- votes


@pytest.mark.parametrize("flags", [(), ("--ties", "half"), ("--min-votes", "1")])
def test_lists_are_the_choices_that_they_imply(tmp_path, flags):
    """Byte by byte, in every ending, whatever is tied or left out."""
    made = judgments(1)
    prepared(tmp_path, list(as_choices(made)), *flags, run="choice")
    expected = files_of(tmp_path, "choice")
    for form, rows in (("ranking", list(as_rankings(made))), ("ratings", list(as_ratings(made)))):
        for ending in ("jsonl", "csv", "parquet") if form == "ratings" else ("jsonl", "csv"):
            run = f"{form}-{ending}"
            prepared(tmp_path, rows, *flags, name=f"{form}.{ending}", run=run)
            assert files_of(tmp_path, run) == expected


def test_orders_of_annotators_and_of_responses_do_not_count(tmp_path):
    made, rng = judgments(2), random.Random(3)
    turned = []
    for prompt, responses, levels, annotator in rng.sample(made, len(made)):
        order = rng.sample(range(len(levels)), len(levels))
        mixed = [responses[i] for i in order], [levels[i] for i in order]
        turned.append((prompt, *mixed, annotator))
    found = []
    for name, rows in (("made", as_rankings(made)), ("turned", as_rankings(turned))):
        rows = [r | {"split": "test" if r["prompt"] < "Q2" else "train"} for r in rows]
        found.append(by_texts(prepared(tmp_path, rows, run=name)[0]))
    assert found[0] == found[1] and {key[0] for key in found[0]} == {f"Q{i}" for i in range(6)}


def test_a_ranking_by_hand(tmp_path):
    rows = good({"ranking": [2, [1, 0]]}) + [judged({"ranking": [1, 2]}, "Q0")]
    found = by_texts(prepared(tmp_path, rows, "--ties", "half")[0])
    assert found["Q0", "z", "x"] == (2, 0, 0) and found["Q0", "y", "x"] == (1, 1, 2)
    assert found["Q0", "z", "y"] == (2, 1, 0)


def test_numbers_of_parquet_and_of_csv(tmp_path):
    lists = pa.list_(pa.list_(pa.int8()))
    table = pa.table({"prompt": [f"Q{i // 2}" for i in range(8)], "responses": [["x", "y"]] * 8})
    table = table.append_column("ranking", pa.array([[[1], [0]]] * 8, lists))
    table = table.append_column("annotator", pa.array(np.array([0.0, 1.0] * 4)))
    expected, _ = prepared(tmp_path, table, name="v.parquet")
    assert by_texts(expected)["Q0", "y", "x"] == (2, 0, 0)
    text = "prompt,responses,ratings\n" + "".join(
        f'Q{i // 2},"[""x"", ""y""]","["" 3.5 "", 4]"\n' for i in range(8)
    )
    assert prepared(tmp_path, text, name="v.csv", run="csv")[0] == expected


def test_identical_and_blank_responses_of_a_list(tmp_path, capsys):
    """Of identical ones the first counts; pairs with a blank one are dropped."""
    rows = [
        *good({"ranking": [0, 1, 2]}),
        judged({"ranking": [1, 0, 2]}, "Q0", ["x", "x", "y"]),
        judged({"ranking": [3, 2, 1, 0]}, "Q0", ["y", None, " ", "x"]),
        judged({"ranking": [0]}, "Q0", ["x"]),
        judged({"ranking": []}, "Q0"),
        {"prompt": "Q0", "responses": None, "ranking": [0]},
        judged({"ranking": [0, 1]}, " "),
        judged({"ranking": [0, 1]}, [{"role": "user", "content": ""}]),
    ]
    splits, stats = prepared(tmp_path, rows)
    assert stats["dropped"] == {
        "identical responses": 1,
        "empty response": 5 + 1,
        "fewer than two responses ranked or rated": 2,
        "empty prompt": 2,
    }
    assert by_texts(splits)["Q0", "x", "y"] == (4, 0, 0)
    assert "data: 6 dropped: empty response\n" in capsys.readouterr().out


def test_a_ranking_of_identical_responses_is_dropped_once(tmp_path):
    rows = [*good({"ranking": [0, 1, 2]}), judged({"ranking": [0, 1]}, "Q0", ["x", "x"])]
    _, stats = prepared(tmp_path, rows)
    assert stats["dropped"] == {"identical responses": 1}


# ---- rows without a text; rows that are added up


@pytest.mark.parametrize(
    "form", [{"votes_a": 2, "votes_b": 1}, {"p": 0.5, "n": 2}, {"choice": "b"}]
)
@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_rows_without_a_text_are_dropped_and_counted(tmp_path, form, ending):
    rows = [voted(form, prompt=f"Q{i}", prompt_id=f"{i}") for i in range(3) for _ in range(2)]
    expected, _ = prepared(tmp_path, rows, run="expected")
    nothing = dict.fromkeys(rows[0])
    left_out = [
        rows[0] | {"response_a": ""},
        rows[0] | {"response_b": " \n"},
        nothing | {"prompt": "Q1", "response_b": "y"},
        rows[0] | {"prompt": None},
        rows[0] | {"prompt": "\t"},
        nothing,
    ]
    splits, stats = prepared(tmp_path, rows + left_out, name=f"v.{ending}")
    assert splits == expected
    # A line of a CSV that has no cell is the row of all null.
    assert stats["dropped"] == {"empty response": 3, "empty prompt": 3}


def test_rows_that_are_added_up_are_counted(tmp_path, capsys):
    rows = [*numbered(3), row("Question 0?", "No idea.", "Because."), row("Question 1?", "x", "y")]
    _, stats = prepared(tmp_path, [*rows, rows[0]])
    assert stats["rows_a_pair"] == {
        "pairs": 4,
        "pairs_of_several": 1,
        "mean": 1.5,
        "most": 3,
        "annotators": False,
    }
    said = "data: 1 of 4 pairs add up several rows (1.50 a pair, at most 3)"
    assert f"{said}; an annotator in two of them counts twice\n" in capsys.readouterr().out
    assert "rows_a_pair" not in prepared(tmp_path, numbered(3), run="single")[1]
    assert "several" not in capsys.readouterr().out


# ---- annotators


def test_the_last_of_an_annotators_votes_counts(tmp_path, capsys):
    rows = [
        r | {"annotator": w} for r, w in zip(good({"ranking": [0, 1, 2]}), itertools.cycle("ab"))
    ]
    rows += [judged({"ranking": [[1, 0]]}, "Q0", annotator="a")]
    rows += [judged({"ranking": [1, 0]}, "Q0", ["x", "y"], annotator="a")]
    splits, stats = prepared(tmp_path, rows, "--repeated", "last")
    found = by_texts(splits)
    assert found["Q0", "x", "y"] == (1, 1, 0) and found["Q0", "x", "z"] == (2, 0, 0)
    assert stats["dropped"] == {"earlier vote of the same annotator": 2}
    assert stats["rows_a_pair"]["most"] == 2 and stats["repeated"] == "last"
    assert "twice" not in capsys.readouterr().out
    with pytest.raises(cli.InputError, match="repeated was last, is error"):
        prepared(tmp_path, rows)
    with pytest.raises(cli.InputError, match="v.jsonl: no annotator found; with --repeated last"):
        prepared(tmp_path, numbered(3), "--repeated", "last", name="v.jsonl", run="none")


def test_columns_of_another_form_are_not_read(tmp_path, capsys):
    prepared(tmp_path, [*numbered(3, annotator=1, responses=["x"]), row("Question 0?")])
    assert "not used: 'annotator', 'responses'\n" in capsys.readouterr().out


# ---- bad input

RANKED, RATED = {"ranking": [0, 1, 2]}, {"ratings": [3, 2, None]}
INDEX = "an index into the 3 responses, counted from 0, expected"
NUMBERS = "a list of 3 numbers (in CSV as JSON), as there are 3 responses, expected"
BAD = {  # row 9 after eight good ones of the first: (them, what it is, what the line must say)
    "counted from 1": (RANKED, {"ranking": [1, 2, 3]}, f"ranking: 3 found, {INDEX}"),
    "below 0": (RANKED, {"ranking": [-1]}, f"ranking: -1 found, {INDEX}"),
    "half an index": (RANKED, {"ranking": [0.5]}, f"ranking: 0.5 found, {INDEX}"),
    "NaN for an index": (RANKED, {"ranking": [[float("nan")]]}, f"ranking: nan found, {INDEX}"),
    "boolean index": (RANKED, {"ranking": [True]}, f"ranking: True found, {INDEX}"),
    "null index": (RANKED, {"ranking": [None]}, f"ranking: nothing found, {INDEX}"),
    "text for an index": (RANKED, {"ranking": ["x"]}, f"ranking: 'x' found, {INDEX}"),
    "a tie in a tie": (RANKED, {"ranking": [[[0]]]}, f"ranking: [0] found, {INDEX}"),
    "index twice": (
        RANKED,
        {"ranking": [0, [1, 0]]},
        "ranking: [0, [1, 0]] found, each index once",
    ),
    "no list": (RANKED, {"ranking": "0,1"}, "ranking: '0,1' found, a list (in CSV as JSON) expect"),
    "too few ratings": (RATED, {"ratings": [1, 2]}, f"ratings: [1, 2] found, {NUMBERS}"),
    "too many ratings": (RATED, {"ratings": [1] * 4}, f"ratings: [1, 1, 1, 1] found, {NUMBERS}"),
    "one rating": (RATED, {"ratings": 4}, f"ratings: 4 found, {NUMBERS}"),
    "NaN": (RATED, {"ratings": [1, 2, float("nan")]}, "ratings: nan found, a number or null expe"),
    "infinity": (RATED, {"ratings": [1, 2, float("inf")]}, "ratings: inf found"),
    "boolean": (RATED, {"ratings": [1, True, 2]}, "ratings: True found"),
    "text": (RATED, {"ratings": [1, "4", 2]}, "ratings: '4' found"),
    "a number for a response": (RATED, RATED | {"responses": ["x", 7]}, "responses: 7 found, text"),
    "text for responses": (RATED, RATED | {"responses": "x, y"}, "responses: 'x, y' found, a list"),
    "two forms": (RANKED, RANKED | RATED, "ranking beside ratings found"),
    "another form": (RANKED, RATED, "votes: ratings found, ranking in the first row"),
    "no votes": (RANKED, {}, "no votes found, one of these expected"),
    "p_true": (RANKED, RANKED | {"p_true": 0.5}, "p_true: 0.5 found, none beside ranking expected"),
    "one annotator": (RANKED, RANKED | {"annotator": 1}, "annotator: given found, missing in the"),
    "blank annotator": (RANKED, RANKED | {"annotator": " "}, "annotator: ' ' found"),
    "NaN for an annotator": (RANKED, RANKED | {"annotator": float("nan")}, "annotator: nan found"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_list_is_one_clear_line(tmp_path, name):
    fields, bad, said = BAD[name]
    with pytest.raises(cli.InputError) as error:
        prepared(tmp_path, [*good(fields), judged(bad, "Q0")], name="v.jsonl")
    assert str(error.value).startswith(f"v.jsonl line 9: {said}") and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "rows, said",
    [
        ([{"prompt": "Q", "ranking": [0, 1]}], "all rows: responses: nothing found, text expected"),
        ([judged({"choice": "a"})], "line 1: response_a: nothing found, text expected"),
        ([row(a=" "), row(b=" "), row(None)], "(1 dropped: empty prompt; 2 dropped: empty respo"),
        ([judged({"choice": "a", "response_a": "x"})] * 2, "all rows: response_b: nothing found"),
    ],
)
def test_a_file_without_texts_is_one_clear_line(tmp_path, rows, said):
    with pytest.raises(cli.InputError) as error:
        prepared(tmp_path, rows)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_an_annotators_second_vote_is_one_line(tmp_path, capsys):
    fields = {"choice": "a", "annotator": 7}
    rows = [voted(fields, prompt=f"Q{i}") for i in range(3)]
    source = save(
        tmp_path / "v.jsonl", [*rows, voted(fields, prompt="Q1", a="No idea.", b="Because.")]
    )
    with pytest.raises(SystemExit) as ended:
        args = votes.parse_args(["--run", str(tmp_path / "run"), "--source", str(source)])
        cli.run_main(votes.main, args)
    line = capsys.readouterr().err
    assert ended.value.code == 2 and not (tmp_path / "run").exists()
    assert line.endswith(
        "error: v.jsonl line 4: annotator: '7' found, as in v.jsonl line 2 on the same two "
        "responses; one vote expected, or --repeated last\n"
    )
