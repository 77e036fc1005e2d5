"""data_prep/ukpconvarg1.py on small files written in the corpus' own form: votes by hand."""

import json
from xml.sax.saxutils import escape

from pairwise import cli, figures

import pyarrow.parquet as pq
import pytest
from conftest import script

UKP = script("ukpconvarg1")
PROMPT = "Debate: Cats & dogs?\nWhich?\n\nSay why.\nWrite a convincing argument for the stance: "


@pytest.fixture(autouse=True)
def no_figure(monkeypatch):
    monkeypatch.setattr(figures, "write_votes", lambda share, path: None)


def argument(name, text, stance):
    return f"""<{name}>
      <author>somebody</author>
      <voteUpCount>1</voteUpCount>
      <stance>{stance}</stance>
      <text>{escape(text)}</text>
      <id>{name}</id>
      <originalHTML>&lt;p&gt;{escape(escape(text))}&amp;quot;&lt;/p&gt;</originalHTML>
    </{name}>"""


def pair(a, b, votes, stance="Cats", description="<description>Which?\n\nSay why.</description>"):
    cast = "".join(
        f"""<mTurkAssignment>
        <turkID>A{i}</turkID>
        <value>{value}</value>
        <reason>a1 &amp; a2</reason>
        <turkRank>{i}</turkRank>
        <turkCompetence>0.5</turkCompetence>
      </mTurkAssignment>"""
        for i, value in enumerate(votes.split())
    )
    return f"""  <annotatedArgumentPair>
    <id>arg1_arg2</id>
    {argument("arg1", a, stance)}
    {argument("arg2", b, stance)}
    <debateMetaData>
      <title>Cats &amp; dogs?</title>
      {description}
      <url>http://example.org</url>
    </debateMetaData>
    <mTurkAssignments>{cast}</mTurkAssignments>
    <goldLabel>a1</goldLabel>
  </annotatedArgumentPair>
"""


def xml(*pairs):
    return f'<?xml version="1.0"?>\n<list>\n{"".join(pairs)}</list>'


CATS = xml(
    pair("They purr & sleep <a lot>.\nAlways.", "Soft.", "a1 a1 equal a2 a1"),
    pair("Soft.", " Naïve. ", "equal a2 a2 a2"),
    pair("Naïve.", "Soft.", "a1 a1"),  # there already, the other way round
    pair("Soft.", "", "a1 a1"),
    pair("Soft.", " Soft.", "a1 a1"),
    pair("Quiet.", "Soft.", "a1 equal equal"),
)
FILES = {
    "cats_cats.xml": CATS,
    "cats_dogs.xml": xml(pair("Loyal.", "Soft.", "a2 a1", stance="Dogs", description="")),
    "cats_none.xml": xml(pair("Allergic.", "Soft.", "a1 a1", stance="None!")),
}


def call(run, source, *flags):
    UKP.main(UKP.parse_args(["--run", str(run), "--source", str(source), *flags]))
    return {path.stem: pq.read_table(path).to_pylist() for path in (run / "data").glob("*.parquet")}


@pytest.fixture
def clone(tmp_path):
    folder = tmp_path / "clone" / "data" / "UKPConvArg1-full-XML"
    folder.mkdir(parents=True)
    for name, content in FILES.items():
        (folder / name).write_text(content, encoding="utf-8")
    for name in ("README.md", "._cats_cats.xml", "data.csv"):
        (folder / name).write_text("<")
    return tmp_path / "clone"


def test_pairs_and_votes(tmp_path, clone, capsys):
    splits = call(tmp_path / "run", clone)
    prompts = {row["prompt_id"]: row for rows in splits.values() for row in rows}
    found = {}
    for name, row in prompts.items():
        for each in row["pairs"]:
            sides = [(row["responses"][each[x]], each[f"votes_{x}"]) for x in "ab"]
            found[name, *sorted(sides)] = each["ties"]
    assert found == {
        ("cats_cats", ("Soft.", 1), ("They purr & sleep <a lot>.\nAlways.", 3)): 1,
        ("cats_cats", ("Naïve.", 3), ("Soft.", 0)): 1,
        ("cats_dogs", ("Loyal.", 1), ("Soft.", 1)): 0,
        ("cats_none", ("Allergic.", 2), ("Soft.", 0)): 0,
    }
    text = {name: row["messages"] for name, row in prompts.items()}
    assert text["cats_cats"] == [{"role": "user", "content": f"{PROMPT}Cats"}]
    assert text["cats_dogs"][0]["content"] == PROMPT.replace("Which?\n\nSay why.", "") + "Dogs"
    stats = json.loads((tmp_path / "run" / "data" / "stats.json").read_text())
    assert stats["dropped"] == {
        "pair of arguments that is there already": 1,
        "empty response": 1,
        "identical responses": 1,
        "fewer than two votes": 1,
    }
    assert stats["source"]["rows"] == {"cats_cats.xml": 6, "cats_dogs.xml": 1, "cats_none.xml": 1}
    assert stats["votes"] == "sampled" and stats["here"]["pairs"] == 4
    out = capsys.readouterr().out
    assert "beside Habernal and Gurevych (2016)" in out and "of the paper" not in out
    assert "data: 8 pairs in 3 files read, 16,081 in 32 published\n" in out
    call(tmp_path / "run", clone / "data")  # the same files
    assert capsys.readouterr().out == f"data: {tmp_path / 'run' / 'data'} is there, skipped\n"
    half = call(tmp_path / "half", clone / "data" / "UKPConvArg1-full-XML", "--ties", "half")
    assert sum(len(row["pairs"]) for rows in half.values() for row in rows) == 5


def test_the_same_texts_in_two_files_are_two_pairs(tmp_path):
    for name in ("cats_cats.xml", "cats_dogs.xml"):
        content = xml(pair("Soft.", "Loyal.", "a1 a1"), pair("Loyal.", "Soft.", "a1 a1"))
        (tmp_path / name).write_text(content, encoding="utf-8")
    first, again, second, _ = UKP.comparisons(UKP.xml_files(tmp_path)[1], {})
    assert (first.prompt_id, second.prompt_id) == ("cats_cats", "cats_dogs")
    assert again == "pair of arguments that is there already"


def test_file_with_a_byte_order_mark(tmp_path):
    (tmp_path / "cats.xml").write_text(CATS, encoding="utf-8-sig")
    folder, paths = UKP.xml_files(tmp_path)
    found = list(UKP.comparisons(paths, {}))
    assert folder == tmp_path and len(found) == 6 and found[0].prompt_id == "cats"
    assert found[1].response_b == "Naïve." and found[0].where == "cats.xml pair 1"
    assert (found[0].votes_a, found[0].votes_b, found[0].ties) == (3, 1, 1)


BOMB = '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]>'
HEAD = '<?xml version="1.0"?>\n'
BAD = {
    CATS.replace(HEAD, HEAD + BOMB): "line 2: '<!DOCTYPE' found, none expected",
    CATS.replace(HEAD, HEAD + BOMB).encode("utf-16"): "line 1: not UTF-8 (byte 0xff)",
    BOMB.encode("utf-16le"): "line 1: '\\x00' found, none expected",
    CATS.replace("Cats &amp;", "Cats &nbsp;"): "line 24: not XML (undefined entity)",
    CATS[:-40]: "not XML (",
    CATS.encode("latin-1"): "line 77: not UTF-8 (byte 0xef)",
    "": "line 1: not XML (no element found)",
    "<list/>": "annotatedArgumentPair: nothing found, pairs of arguments expected",
    CATS.replace("<value>a2<", "<value>b<", 1): "pair 1: mTurkAssignments/mTurkAssignment/value: "
    "'b' found, one of a1, a2, equal expected",
    CATS.replace("value>", "choice>"): "pair 1: mTurkAssignments/mTurkAssignment/value: nothing",
    CATS.replace("mTurkAssignments", "m"): "pair 1: mTurkAssignments/mTurkAssignment: nothing",
    CATS.replace("title>", "name>"): "pair 1: debateMetaData/title: nothing found",
    CATS.replace("<stance>Cats<", "<stance> <"): "pair 1: arg1/stance: '' found, text that is not",
    CATS.replace("text>", "body>"): "pair 1: arg1/text: nothing found, text expected",
    CATS.replace("<stance>Cats<", "<stance>Dogs<", 1): "pair 2: prompt_id 'bad' has another prompt",
}


@pytest.mark.parametrize("content, said", BAD.items(), ids=BAD.values())
def test_bad_file_is_one_line(tmp_path, capsys, content, said):
    (folder := tmp_path / "files").mkdir()
    (folder / "bad.xml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit) as ended:
        words = ["--run", str(tmp_path / "run"), "--source", str(folder)]
        cli.run_main(UKP.main, UKP.parse_args(words))
    line = capsys.readouterr().err
    assert ended.value.code == 2 and line.count("\n") == 1 and said in line and "bad.xml" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["", "missing", "folder/a.xml"])
def test_no_file_is_one_line(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.xml").write_text(CATS)
    with pytest.raises(cli.InputError, match="no .xml file found, UKPConvArg1-full-XML or"):
        call(tmp_path / "run", tmp_path / name)


def test_a_file_too_long_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(UKP.rows, "LONGEST", 2**10)
    (tmp_path / "cats.xml").write_text(CATS, encoding="utf-8")
    with pytest.raises(cli.InputError, match=r"cats.xml: the file: more than .* found"):
        list(UKP.read_pairs(tmp_path / "cats.xml"))
