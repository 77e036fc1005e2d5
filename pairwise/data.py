"""Prepared data."""

import dataclasses
import itertools

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pairwise import cli, run_dir

SPLITS = ("train", "valid", "test")


JUDGMENTS = pa.list_(pa.struct([("a", pa.int32()), ("b", pa.int32())]))


@dataclasses.dataclass(frozen=True)
class Split:
    """One split, flat: P prompts, R distinct responses, N pairs.

    prompt_id (P,) str; messages (P,) lists of {role, content}; responses (P,) lists of str;
    response_start, pair_start int64 (P+1,): prompt i owns responses response_start[i]:response_start[i+1], and pairs alike;
    a, b int64 (N,) indices into all R responses; votes_a, votes_b, ties float64 (N,); p_true float64 (N,) or None;
    categories (P,) dicts {name: label or None}, or None.
    """

    prompt_id: list
    messages: list
    responses: list
    response_start: np.ndarray
    pair_start: np.ndarray
    a: np.ndarray
    b: np.ndarray
    votes_a: np.ndarray
    votes_b: np.ndarray
    ties: np.ndarray
    p_true: np.ndarray | None
    categories: list | None = None
    judgments: np.ndarray | None = None

    @property
    def n(self):
        """Votes per pair, float64 (N,)."""
        return self.votes_a + self.votes_b

    @property
    def p(self):
        """Share of the votes for a, float64 (N,), in [0, 1]: the empirical preference of section 3.3."""
        return self.votes_a / self.n


def write_split(path, prompts):
    """Write prompt rows (dicts with the contract's columns) as parquet; p_true and categories only where the first row has them."""
    pair = pa.struct(
        [
            ("a", pa.int32()),
            ("b", pa.int32()),
            ("votes_a", pa.float64()),
            ("votes_b", pa.float64()),
            ("ties", pa.float64()),
        ]
    )
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    columns = {
        "prompt_id": pa.string(),
        "messages": pa.list_(message),
        "responses": pa.list_(pa.string()),
        "pairs": pa.list_(pair),
    }
    if "p_true" in prompts[0]:
        columns["p_true"] = pa.list_(pa.float64())
    if "categories" in prompts[0]:
        columns["categories"] = pa.struct(
            [(name, pa.string()) for name in prompts[0]["categories"]]
        )
    pq.write_table(
        pa.Table.from_pylist(prompts, schema=pa.schema(list(columns.items()))),
        path,
        compression="zstd",
    )


def read_split(run, split):
    """Read DIR/data/SPLIT.parquet. Raises InputError where it is missing or is not prepared data."""
    path = run / "data" / f"{split}.parquet"
    if not path.is_file():
        raise cli.InputError(f"{path}: no such file; data_prep/ makes it")
    try:
        table = pq.read_table(path).combine_chunks()
        pairs, responses = _list(table, "pairs"), _list(table, "responses")
        response_start, pair_start = _starts(responses), _starts(pairs)
        field = {
            name: pairs.flatten().field(name).to_numpy(zero_copy_only=False)
            for name in ("a", "b", "votes_a", "votes_b", "ties")
        }
        shift = np.repeat(response_start[:-1], np.diff(pair_start))
        return Split(
            prompt_id=table["prompt_id"].to_pylist(),
            messages=table["messages"].to_pylist(),
            responses=responses.to_pylist(),
            response_start=response_start,
            pair_start=pair_start,
            a=field["a"] + shift,
            b=field["b"] + shift,
            votes_a=field["votes_a"],
            votes_b=field["votes_b"],
            ties=field["ties"],
            p_true=_list(table, "p_true").flatten().to_numpy()
            if "p_true" in table.column_names
            else None,
            categories=table["categories"].to_pylist()
            if "categories" in table.column_names
            else None,
            judgments=np.stack(
                [_list(table, "judgments").flatten().field(side).to_numpy() for side in "ab"], 1
            )
            if "judgments" in table.column_names
            else None,
        )
    except (pa.ArrowException, KeyError) as error:
        raise cli.InputError(f"{path}: not prepared data ({str(error).splitlines()[0]})") from None


def _list(table, name):
    return table[name].combine_chunks() if table[name].num_chunks != 1 else table[name].chunk(0)


def _starts(lists):
    return np.concatenate(
        [[0], np.cumsum(lists.value_lengths().to_numpy(zero_copy_only=False))]
    ).astype(np.int64)


def counted_pairs(split):
    """The split without its pairs of fewer than two votes, which train has with --min-votes 1, and without prompts that have no other.

    None where nothing is left.
    Responses keep their places, so that rewards still fit.
    """
    keep = split.n >= 2
    start = np.concatenate([[0], np.cumsum(keep)])[split.pair_start]
    pairs = {
        name: getattr(split, name)[keep]
        for name in ("a", "b", "votes_a", "votes_b", "ties", "p_true", "judgments")
        if getattr(split, name) is not None
    }
    prompts = {
        name: list(itertools.compress(getattr(split, name), np.diff(start)))
        for name in ("prompt_id", "categories")
        if getattr(split, name)
    }
    return (
        dataclasses.replace(split, pair_start=np.unique(start), **prompts, **pairs)
        if keep.any()
        else None
    )


def read_splits(run):
    """{split: Split} of every split that `run` has, and stats.json. train and test must be there."""
    names = [
        name for name in SPLITS if name != "valid" or (run / "data" / "valid.parquet").exists()
    ]
    return {name: read_split(run, name) for name in names}, run_dir.read_json(
        run / "data" / "stats.json"
    )


def must_share_test_data(first, run):
    """Raise InputError where two runs have other test prompts, responses, pairs or votes, or other kinds of votes."""
    refused = f"{run}: not to be compared with {first}, its test data are others"
    paths = [directory / "data" / "test.parquet" for directory in (first, run)]
    if run_dir.hash_file(paths[0]) != run_dir.hash_file(paths[1]):  # other bytes can hold the same
        one, other = (pq.read_table(path).to_pylist() for path in paths)
        for number, (x, y) in enumerate(zip(one, other), 1):
            names = [
                name for name in (x | y) if name != "categories" and x.get(name) != y.get(name)
            ]
            if names:
                raise cli.InputError(f"{refused}: of prompt {number} the {', '.join(names)}")
        if len(one) != len(other):
            raise cli.InputError(f"{refused}: {len(other)} prompts found, {len(one)} expected")
    one, other = (
        run_dir.read_json(directory / "data" / "stats.json") for directory in (first, run)
    )
    for name in ("votes", "ties"):
        if one[name] != other[name]:
            raise cli.InputError(f"{refused}: {name} {other[name]!r} found, {one[name]!r} expected")


def hashes(run):
    """{file name: SHA-256} of the prepared data."""
    return {
        f"data/{path.name}": run_dir.hash_file(path) for path in sorted((run / "data").iterdir())
    }
