"""experiments/writing.py on files in the form of their source, with texts of our own."""

import gzip
import json

import pytest
import writing
from conftest import script


def seen(*texts, number=1, prompt="a prompt"):
    kinds = {f"Response {n}": kind for n, kind in enumerate(("one", "other"), 1)}
    entry = {"instruction": prompt, "responses": list(texts), "mapping": kinds, "id": "x_1"}
    return entry | {"instruction_id": number}


def ranked(*ranks, number=1):
    return {"instruction_id": number} | {
        f"rank_{place}": f"Response {response}" for place, response in enumerate(ranks, 1)
    }


@pytest.fixture
def clone(tmp_path):
    """Two batches: three writers, of whom one saw other texts; and two in batch 10."""
    folder = tmp_path / "clone" / writing.FOLDER
    same = [seen("a", "b ", "c"), seen("x", "y", "z", number=2, prompt="è")]
    other = [seen("a", "b", "c!"), same[1]]
    for batch, writer, saw, ranks in (
        ("batch2", "ann", same, [ranked(2, 1, 3), ranked(3, 2, 1, number=2)]),
        ("batch2", "bob", same, [ranked(1, 2, 3), ranked(3, 2, 1, number=2)]),
        ("batch2", "eve", other, [ranked(2, 3, 1), ranked(3, 1, 2, number=2)]),
        *(
            ("batch10", writer, [seen("p", "p", "q", prompt="late")], [ranked(3, 1, 2)])
            for writer in ("ann", "bob")
        ),
    ):
        (folder / batch).mkdir(parents=True, exist_ok=True)
        (folder / batch / f"{writer}.json").write_text(json.dumps(saw), encoding="utf-8")
        path = folder / batch / f"{writer}_rankings.json"
        path.write_text(json.dumps(ranks), encoding="utf-8")
        (folder / batch / f"{batch}.json").write_text("[]", encoding="utf-8")
    return tmp_path / "clone"


def convert(source, out):
    writing.main(writing.parse_args(["--source", str(source), "--out", str(out)]))
    with gzip.open(out, "rt", encoding="utf-8") as file:
        return [tuple(json.loads(line).values()) for line in file]


def test_votes_of_rankings(clone, tmp_path, capsys):
    expected = [
        ("a prompt", "b", "a", 2, 1),
        ("a prompt", "b", "c", 2, 0),
        ("a prompt", "a", "c", 2, 0),
        ("è", "z", "y", 3, 0),
        ("è", "z", "x", 3, 0),
        ("è", "y", "x", 2, 1),
        ("a prompt", "b", "c!", 1, 0),
        ("a prompt", "c!", "a", 1, 0),
        ("late", "q", "p", 2, 0),
    ]
    out = tmp_path / "writing.jsonl.gz"
    assert convert(clone, out) == expected
    assert "9 pairs of 3 prompts" in capsys.readouterr().out
    first = out.read_bytes()
    assert convert(clone / writing.FOLDER, out) == expected and out.read_bytes() == first


def test_its_rows_are_votes(clone, tmp_path):
    out, votes = tmp_path / "writing.jsonl.gz", script("votes")
    convert(clone, out)
    words = ["--run", str(tmp_path / "run"), "--source", str(out), "--test-share", "0.5"]
    votes.main(votes.parse_args(words))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("ann.json", None, ("ann.json", "no such file")),
        ("ann.json", "[1", ("ann.json", "not JSON")),
        ("ann.json", [seen("a", "b", "c")], ("[1]", "instruction_id: 2 found")),
        ("ann.json", [seen("a", "b", " "), seen("x", "y", "z", number=2)], ("' '", "not empty")),
        ("ann.json", [{"instruction_id": 1}], ("ann.json", "no instruction found")),
        ("ann_rankings.json", [ranked(1, 2, 2)], ("'Response 2', 'Response 2'", "once")),
        ("ann_rankings.json", [ranked(1, 2, 4)], ("Response 4", "Response 1, Response 2")),
        ("ann_rankings.json", [{}], ("ann_rankings.json", "no instruction_id found")),
    ],
)
def test_what_is_wrong_is_named(clone, tmp_path, name, content, words):
    path = clone / writing.FOLDER / "batch2" / name
    path.unlink()
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_text(text, encoding="utf-8")
    with pytest.raises(writing.cli.InputError) as stop:
        convert(clone, tmp_path / "out.jsonl.gz")
    assert all(word in str(stop.value) for word in words), stop.value
    assert not (tmp_path / "out.jsonl.gz").exists()


def test_another_directory_is_refused(tmp_path):
    for make in (lambda: None, (tmp_path / "batch1").mkdir):
        make()
        with pytest.raises(writing.cli.InputError, match="creativity_eval|rankings.json found"):
            convert(tmp_path, tmp_path / "out.jsonl.gz")
