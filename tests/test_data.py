"""Prepared data: what does not keep the contract is refused, in one line that names the place."""

import math

from pairwise.cli import InputError
from pairwise.data import hashes, read_split

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import fresh


def pair(**changes):
    def change(rows):
        rows[1]["pairs"][2].update(changes)

    return change


def row(**changes):
    return lambda rows: rows[1].update(changes)


def turn(**changes):
    return lambda rows: rows[1]["messages"][0].update(changes)


BAD = {
    "an index into the next prompt": (pair(b=4), "pair 9: b 4 found, a response of the prompt"),
    "a negative index": (pair(a=-1), "pair 9: a -1 found"),
    "a pair of one response": (pair(a=1, b=1), "pair 9: a and b 1 found, two different responses"),
    "an index that is null": (pair(a=None), "a of an element of pairs is null"),
    "votes that are null": (pair(votes_a=None), "votes_a of an element of pairs is null"),
    "votes that are NaN": (pair(votes_b=math.nan), "pair 9: votes_b nan found, a number"),
    "infinite votes": (pair(ties=math.inf), "pair 9: ties inf found"),
    "negative votes": (pair(votes_a=-1.0), "pair 9: votes_a -1.0 found"),
    "no vote": (pair(votes_a=0.0, votes_b=0.0), "pair 9: votes_a and votes_b 0.0 found, a vote"),
    "an index as text": (lambda rows: [p.update(a="x") for r in rows for p in r["pairs"]], "x"),
    "no pairs": (row(pairs=None), "row 2: pairs is null"),
    "no prompt_id": (row(prompt_id=None), "row 2: prompt_id is null"),
    "a response that is null": (row(responses=["a", None, "c", "d"]), "element of responses"),
    "no text in a message": (turn(content=None), "content of an element of messages is null"),
    "p_true too short": (row(p_true=[0.5]), "row 2: as many p_true as pairs expected"),
    "p_true above 1": (row(p_true=[1.5] * 6), "pair 7: p_true 1.5 found"),
    "p_true below 0": (row(p_true=[-0.5] * 6), "pair 7: p_true -0.5 found"),
    "p_true that is NaN": (row(p_true=[math.nan] * 6), "pair 7: p_true nan found"),
    "columns missing": (lambda rows: [r.pop("pairs") for r in rows], "pairs"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_breaks_the_contract_is_refused(kind, data, tmp_path):
    run, (change, message) = fresh(data, tmp_path), BAD[kind]
    path = run / "data" / "train.parquet"
    rows = pq.read_table(path).to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(InputError) as error:
        read_split(run, "train")
    assert message in str(error.value) and str(path) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def check_contract(split):
    counts = list(map(len, split.responses))
    assert len(split.prompt_id) == len(split.messages) == len(counts) == len(split.pair_start) - 1
    assert np.diff(split.response_start).tolist() == counts
    prompt = np.repeat(np.arange(len(counts)), np.diff(split.pair_start))
    for index in (split.a, split.b):
        assert (np.searchsorted(split.response_start, index, side="right") - 1 == prompt).all()
    votes = np.stack([split.votes_a, split.votes_b, split.ties])
    assert np.isfinite(votes).all() and (votes >= 0).all()
    assert (split.a != split.b).all() and (split.n > 0).all()
    if split.p_true is not None:  # Its name may be what has rotted.
        assert ((split.p_true >= 0) & (split.p_true <= 1)).all()


def test_bit_rot_is_one_line(data, tmp_path):
    run = fresh(data, tmp_path)
    path = run / "data" / "train.parquet"
    whole = path.read_bytes()
    for place in range(4, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        try:
            split = read_split(run, "train")
        except InputError as error:
            assert len(str(error).splitlines()) == 1
        else:
            check_contract(split)


def test_a_stray_file_is_no_data(data, tmp_path):
    run = fresh(data, tmp_path)
    before = hashes(run)
    (run / "data" / ".DS_Store").write_text("of a file manager")
    assert hashes(run) == before
    names = ("stats.json", "test.parquet", "train.parquet", "valid.parquet")
    assert list(before) == [f"data/{name}" for name in names]
