"""Beyond the Binary's training sets in their native forms: one vote a pair, a test set beside."""

import json

import evaluate
from pairwise import cli, data, drawing, figures

import pyarrow.parquet as pq
import pytest
from conftest import HEAD, fit, script, train
from test_published import folder, post, tldr
from test_votes import by_texts, save

binary = script("binary")
TEST = [  # the answers of three annotators on 0 to 10 of ten people
    {"prompt": f"Test {i}?", "response_a": "yes", "response_b": "no", "p": tens / 10, "n": 10}
    | {"categories": {"answers": "multiple" if i else "single"}}
    for i in range(3)
    for tens in (10, 7, 5 + i)
]


@pytest.fixture(autouse=True)
def no_figure(monkeypatch):
    monkeypatch.setattr(figures, "majority_shares", lambda share: None)
    monkeypatch.setattr(drawing, "save", lambda figure, path: None)


def webgpt(prompt, first, second, score):
    quotes = {"title": ["A page (example.org)"], "extract": ["..."]}
    tokens = {"prefix": [24361, 25], "completion": [42]}
    row = {"question": {"dataset": "eli5", "id": "x1", "full_text": prompt}}
    for number, answer, value in ((0, first, score), (1, second, -score)):
        row |= {f"quotes_{number}": quotes, f"answer_{number}": answer}
        row |= {f"tokens_{number}": tokens, f"score_{number}": value}
    return row


def hh(start, chosen, rejected):
    return {"chosen": start + chosen, "rejected": start + rejected}


def run_set(tmp_path, name, source, *flags, test=TEST):
    """{split: rows} and stats.json."""
    run, file = tmp_path / "run", save(tmp_path / "test.jsonl", test)
    words = ["--run", run, "--set", *name.split(), "--test", file, *flags]
    words += ["--source", source] if source else []
    binary.main(binary.parse_args([*map(str, words)]))
    splits = {path.stem: pq.read_table(path).to_pylist() for path in run.glob("data/*.parquet")}
    return splits, json.loads((run / "data" / "stats.json").read_text())


def refused(capsys, *args, **more):
    """The one line that a call ends with."""
    with pytest.raises(SystemExit) as stopped:
        cli.run_main(lambda _: run_set(*args, **more), None)
    assert stopped.value.code == 2 and not list(args[0].glob("run/data"))
    return capsys.readouterr().err.strip().splitlines()[-1]


def votes(rows):
    """{(prompt, response, other): (votes, votes for the other)}, in both orders."""
    return {key: value[:2] for key, value in by_texts({"": rows}).items()}


WEBGPT = [
    webgpt("Why?", "Because [1].", "So.", 0.75),
    webgpt("Why?", "Because [1].", "No.", -0.25),
    webgpt("How?", "Well.", "Badly.", 0.0),
    webgpt("Test 1?", "Known.", "Unknown.", 1.0),
]
AGAIN = "train pair of a prompt that is in a held-out split too"


@pytest.mark.parametrize("ties", ["drop", "half"])
def test_webgpt(tmp_path, ties):
    source = save(tmp_path / "webgpt.parquet", WEBGPT)
    splits, stats = run_set(tmp_path, "webgpt", source, "--ties", ties)
    expected = {("Why?", "Because [1].", "So."): (1, 0), ("Why?", "Because [1].", "No."): (0, 1)}
    if ties == "half":
        expected["How?", "Well.", "Badly."] = (0.5, 0.5)
    assert votes(splits["train"]) == expected | {
        (prompt, b, a): found[::-1] for (prompt, a, b), found in expected.items()
    }
    assert stats["dropped"] == {AGAIN: 1} | ({"no vote": 1} if ties == "drop" else {})
    assert stats["votes"] == "dependent" and stats["min_votes"] == 1 and stats["own_split"]
    assert stats["source"]["webgpt"] == {
        "hub": "openai/webgpt_comparisons",
        "commit": None,
        "rows": {"all": 4},
    }
    of_ten = votes(splits["test"])
    assert [of_ten[f"Test {i}?", "yes", "no"] for i in range(3)] == [(22, 8), (23, 7), (24, 6)]
    assert splits["test"][0]["categories"] == {"answers": "single"}


def test_train_rows_of_the_test_file_go_with_the_set_s(tmp_path):
    """Neither labels nor truths part them, which the set's rows lack."""
    own = {"prompt": "Why?", "response_a": "So.", "response_b": "No.", "p": 0.75, "n": 4}
    own |= {"split": "train", "categories": {"answers": "single"}, "p_true": 0.7}
    test = [row | {"split": "test", "p_true": 0.5} for row in TEST]
    source = save(tmp_path / "webgpt.parquet", WEBGPT)
    splits, _ = run_set(tmp_path, "webgpt", source, test=[*test, own])
    [prompt] = [row for row in splits["train"] if len(row["pairs"]) == 3]
    assert votes([prompt])["Why?", "So.", "No."] == (3, 1)
    assert not prompt.get("p_true") and not prompt.get("categories")
    assert splits["test"][0]["p_true"] == [0.5]
    data.read_splits(tmp_path / "run")


def test_hh(tmp_path):
    start = "\n\nHuman: Hi\n\nAssistant: Hello!\nYes?\n\nHuman: Why?\n\nHuman: Tell me."
    rows = [
        hh(start, "\n\nAssistant: I know.", "\n\nAssistant: I do not."),
        hh(start, "\n\nAssistant: I know.", "\n\nAssistant: I know. Or not."),
        hh("\n\nHuman: Test 2?", "\n\nAssistant: a", "\n\nAssistant: b"),
        hh("\n\nHuman: Same?", "\n\nAssistant: a", "\n\nAssistant: a "),
        hh("\n\nHuman: Empty?", "\n\nAssistant: a", "\n\nAssistant:"),
        hh("\n\nHuman: ", "One?\n\nAssistant: a", "Two?\n\nAssistant: a"),
        hh(start, "\n\nAssistant: a", "\n\nAssistant: a\n\nHuman: And?\n\nAssistant: b"),
        hh("\n\nHuman: Hi\n\nAssistant: Oh.", "\n\nAssistant: a", "\n\nAssistant: b"),
        hh("Hi\n\nHuman: Hi", "\n\nAssistant: a", "\n\nAssistant: b"),
    ]
    source = tmp_path / "hh"
    for name, part in (("harmless-base", rows[:4]), ("helpful-base", rows[4:])):
        folder(source / name, {"train": part, "test": rows[:1]}, ".jsonl.gz")
    attempts = source / "red-team-attempts"
    attempts.mkdir()
    save(attempts / "red_team_attempts.jsonl.gz", [{"transcript": "\n\nHuman: Hi"}])
    splits, stats = run_set(tmp_path, "hh", source)
    [prompt] = splits["train"]
    assert [(turn["role"], turn["content"]) for turn in prompt["messages"]] == [
        ("user", "Hi"),
        ("assistant", "Hello!\nYes?"),
        ("user", "Why?\n\nTell me."),
    ]
    found = votes(splits["train"])
    assert found["Why?\n\nTell me.", "I know.", "I do not."] == (1, 0)
    assert found["Why?\n\nTell me.", "I know. Or not.", "I know."] == (0, 1) and len(found) == 4
    assert stats["dropped"] == {
        AGAIN: 1,
        "identical responses": 1,
        "empty response": 1,
        "dialogues that do not share all turns but the last answer": 3,
        "prompt that does not end with a turn of the user's": 1,
        "pair of a split that is not trained on": 2,
    }
    assert stats["source"]["hh"]["rows"] == {"test": 2, "train": 9}


def test_summarize_is_read_as_tldr_is(tmp_path):
    source = folder(
        tmp_path / "source",
        {
            "train": [tldr("t1", "apple", "pear", 1), *[tldr("t2", "apple", "pear", 0)] * 2],
            "validation": [tldr("v1", "apple", "pear", 0, "batch6", "valid1")],
        },
    )
    splits, stats = run_set(tmp_path, "summarize", source)
    found = votes(splits["train"])
    assert found[post("t1"), "apple", "pear"] == (0, 1)
    assert found[post("t2"), "apple", "pear"] == (2, 0) and len(splits["train"]) == 2
    assert stats["dropped"] == {"pair of a split that is not trained on": 1}


def test_neither_validation_nor_test_rows_are_trained_on(tmp_path):
    names = ("train", "validation", "test")
    rows = {x: [{"prompt": f"Of {x}?", "chosen": "So.", "rejected": "Or so."}] for x in names}
    splits, stats = run_set(tmp_path, "gptj", folder(tmp_path / "source", rows))
    assert set(votes(splits["train"])) == {
        ("Of train?", "So.", "Or so."),
        ("Of train?", "Or so.", "So."),
    }
    assert stats["dropped"] == {"pair of a split that is not trained on": 2}


def test_several_sets_and_train_rows_of_the_test_file(tmp_path):
    sources = tmp_path / "source"
    folder(sources / "webgpt", {"train": WEBGPT})
    folder(sources / "gptj", {"train": [{"prompt": "How?", "chosen": "So.", "rejected": "Or so."}]})
    test = [row | {"split": "train" if row["prompt"] == "Test 0?" else "test"} for row in TEST]
    splits, stats = run_set(tmp_path, "webgpt gptj", sources, test=test)
    assert {row["messages"][-1]["content"] for row in splits["train"]} == {
        "Why?",
        "How?",
        "Test 0?",
    }
    assert votes(splits["train"])["How?", "So.", "Or so."] == (1, 0)
    assert stats["dataset"] == "webgpt+gptj" and list(stats["source"]) == ["webgpt", "gptj"]


def test_truth_of_some_train_rows_is_left_out(tmp_path):
    source = folder(tmp_path / "source", {"train": WEBGPT})
    test = [row | {"p_true": 0.5} for row in TEST]
    test = [row | {"split": "train" if row["prompt"] == "Test 0?" else "test"} for row in test]
    run_set(tmp_path, "webgpt", source, test=test)
    splits, _ = data.read_splits(tmp_path / "run")
    assert splits["train"].p_true is None and (splits["test"].p_true == 0.5).all()


def test_of_the_hub_every_commit_is_recorded(tmp_path, monkeypatch):
    gptj = [{"prompt": "How?", "chosen": "So.", "rejected": "Or so."}]
    paths = {
        "webgpt": save(tmp_path / "0000.parquet", WEBGPT),
        "gptj": save(tmp_path / "train-00000-of-00001-1e5d57b93c448e7a.parquet", gptj),
    }
    asked = []

    def hub_files(dataset, revision, flag):
        asked.append((dataset.hub, dataset.options.get("revision"), revision))
        return {"train": [paths[dataset.name]]}, f"commit of {dataset.name}"

    monkeypatch.setattr(binary.published, "hub_files", hub_files)
    _, stats = run_set(tmp_path, "webgpt gptj", None)
    assert [stats["source"][name]["commit"] for name in paths] == [f"commit of {x}" for x in paths]
    assert asked == [
        ("openai/webgpt_comparisons", "refs/convert/parquet", None),
        ("Dahoas/synthetic-instruct-gptj-pairwise", None, None),
    ]
    run_set(tmp_path, "webgpt gptj", None)
    assert len(asked) == 2  # It is there, skipped.
    with pytest.raises(cli.InputError, match="test"):  # another test file, another run
        run_set(tmp_path, "webgpt gptj", None, test=TEST[:6])


@pytest.mark.parametrize(
    "name, row, said",
    [
        ("webgpt", {"question": "Why?"}, "question: 'Why?' found, an object expected"),
        ("webgpt", {"question": {}}, "question: full_text: nothing found, text expected"),
        ("webgpt", {"answer_1": None}, "answer_1: nothing found, text expected"),
        ("webgpt", {"score_1": 2}, "score_1: 2 found, a number from -1 to 1 expected"),
        ("webgpt", {"score_0": "1"}, "score_0: '1' found, a number from -1 to 1 expected"),
        ("hh", {"rejected": None}, "rejected: nothing found, text expected"),
        ("hh", {"chosen": ["Hi"]}, "chosen: ['Hi'] found, text expected"),
        ("gptj", {"prompt": 7}, "prompt: 7 found, text expected"),
    ],
)
def test_bad_row_is_one_line(tmp_path, capsys, name, row, said):
    good = {"prompt": "x"} | WEBGPT[0] | hh("\n\nHuman: Hi", "\n\nAssistant: a", "\n\nAssistant: b")
    source = save(tmp_path / "source.jsonl", [good, good | row])
    assert refused(capsys, tmp_path, name, source).endswith(f"source.jsonl line 2: {said}")


def test_bad_test_file_and_flags_are_one_line(tmp_path, capsys):
    source = save(tmp_path / "source.jsonl", WEBGPT)
    ids = [row | {"prompt_id": row["prompt"]} for row in TEST]
    ids = [{key: value for key, value in row.items() if key != "prompt"} for row in ids]
    line = refused(capsys, tmp_path, "webgpt", source, test=ids)
    assert line.endswith("test.jsonl: no column prompt found, one expected")
    line = refused(capsys, tmp_path, "webgpt", source, test=[TEST[0] | {"n": 1}])
    assert "0 test prompts, at least 2 expected" in line or "at least three expected" in line
    line = refused(capsys, tmp_path, "webgpt gptj", tmp_path, "--revision", "main")
    assert line.endswith("--revision main: one --set expected, 2 found")
    with pytest.raises(SystemExit):
        binary.parse_args(["--run", "x", "--set", "hh"])
    assert "required: --test" in capsys.readouterr().err


def test_the_papers_baseline_and_its_tables(tmp_path, base, no_figures):
    """One Bradley-Terry reward: of all pairs together, its soft figures are the ensemble's."""
    source = [webgpt(f"Number {i}?", "Yes " * (1 + i), "No.", 0.5) for i in range(6)]
    pairs = [(f"Test {i}?", "yes " * (1 + i), "no", i % 4 / 10) for i in range(12)]
    names = "prompt", "response_a", "response_b", "p"
    test = [dict(zip(names, x)) | {"n": 10, "categories": {"set": "all"}} for x in pairs]
    run_set(tmp_path, "webgpt", save(tmp_path / "webgpt.jsonl", source), test=test)
    run = tmp_path / "run"
    train(run, base, *HEAD, "--loss", "bt")
    fit(run)
    evaluate.main(evaluate.parse_args(["--run", str(run), "--resamples", "100"]))
    metrics = json.loads((run / "metrics.json").read_text())["splits"]["test"]
    [whole], [group] = metrics["ensemble"], metrics["categories"]["set"]
    assert metrics["irreducible"] is None and group["pairs"] == 12 and list(whole["alpha"]) == [1]
    for name in ("brier", "l1", "pearson"):
        for ci in ("", "_ci"):
            expected, found = whole[f"{name}_soft{ci}"], group[f"{name}_soft_1{ci}"]
            assert found == pytest.approx(expected, abs=1e-12), name
    assert group["pearson_soft_1"] != group["pearson"]
