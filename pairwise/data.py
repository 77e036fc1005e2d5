"""Prepared data: the contract of its files, and a split in memory. torch is never imported.

data_prep/ writes DIR/data/train.parquet and test.parquet, and valid.parquet where train prompts
were set aside for choices among variants. A row is a prompt:

    prompt_id  str
    messages   list of {role, content}     the context x, ending with a user turn
    responses  list of str                 distinct, in first-seen order
    pairs      list of {a, b: int, votes_a, votes_b, ties: float}    a, b are indices into responses
    p_true     list of float, optional     the population's true fraction per pair (simulation)
    categories {name: label}, optional     the user's own labels of the prompt
    judgments  list of {a, b}, optional    synthetic judgments per pair, kept apart from the votes
                                           (extras/synthetic_judgments.py)

A vote becomes a probability in `Split.p`: p = votes_a / n with n = votes_a + votes_b. `ties` is the
raw count of tie votes. With --ties half each of them is already in votes_a and votes_b as one half,
otherwise it counts for nothing else. Which response of a pair stands first carries no information.
DIR/data/stats.json holds counts, flags, and how the votes arose: `sampled`, `population` or
`dependent`.
"""

import dataclasses
import itertools
import re

from pairwise import cli, files, manifest

import numpy as np
import pyarrow as pa

SPLITS = ("train", "valid", "test")
P_TRUE = pa.list_(pa.float64())
JUDGMENTS = pa.list_(pa.struct([("a", pa.int32()), ("b", pa.int32())]))
VOTE_COLUMNS = ("votes_a", "votes_b", "ties")  # of a pair, float64
STATS = {"dataset": str, "votes": str, "ties": str, "attributes?": {str: str}}
# How the votes of a pair arose decides what is known of the irreducible error.
VOTE_KINDS = ("sampled", "population", "dependent")


@dataclasses.dataclass(frozen=True)
class Split:
    """One split, flat: P prompts, R distinct responses, N pairs.

    prompt_id (P,) str; messages (P,) lists of {role, content}; responses (P,) lists of str.
    response_start, pair_start: int64 (P+1,); prompt i owns the responses
    response_start[i]:response_start[i+1], and the pairs pair_start[i]:pair_start[i+1].
    a, b: int64 (N,), indices into all R responses; votes_a, votes_b, ties: float64 (N,).
    p_true: float64 (N,) or None; categories: (P,) dicts {name: label or None}, or None;
    judgments: int32 (N, 2), counted for a and for b, or None.
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
    p_true: np.ndarray | None = None
    categories: list | None = None
    judgments: np.ndarray | None = None

    @property
    def n_responses(self):
        """R, the number of distinct responses."""
        return int(self.response_start[-1])

    @property
    def n(self):
        """The number of votes of each pair, float64 (N,)."""
        return self.votes_a + self.votes_b

    @property
    def p(self):
        """The fraction of the votes for a, float64 (N,), in [0, 1]: section 3.3's preference."""
        return self.votes_a / self.n


# ---- files


_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
_PAIR = pa.struct(
    [("a", pa.int32()), ("b", pa.int32()), *((x, pa.float64()) for x in VOTE_COLUMNS)]
)
COLUMNS = {
    "prompt_id": pa.string(),
    "messages": pa.list_(_MESSAGE),
    "responses": pa.list_(pa.string()),
    "pairs": pa.list_(_PAIR),
}


def write_split(path, rows):
    """Write prompt rows, dicts with the contract's columns, as parquet.

    p_true is written where all rows have it, categories where the first one has.
    """
    columns = dict(COLUMNS)
    if all("p_true" in row for row in rows):
        columns["p_true"] = P_TRUE
    if "categories" in rows[0]:
        labels = [(name, pa.string()) for name in rows[0]["categories"]]
        columns["categories"] = pa.struct(labels)
    table = pa.Table.from_pylist(rows, schema=pa.schema(list(columns.items())))
    files.write_parquet(path, table)


def read_split(run, split):
    """Read DIR/data/SPLIT.parquet as a Split.

    Raises InputError where the file is missing or does not keep the contract.
    """
    path = run / "data" / f"{split}.parquet"
    if not path.is_file():
        raise cli.InputError(f"{path}: no such file; data_prep/ makes it")
    manifest.check(run, path)
    try:
        return _flatten(files.read_parquet(path))
    except (pa.ArrowException, KeyError, OSError, ValueError) as error:
        raise cli.InputError(f"{path}: not prepared data ({cli.first_line(error)})") from None


def _flatten(table):
    """Return the Split of a table with one row a prompt.

    Raises ValueError where it does not keep the contract, ArrowException and KeyError where its
    columns are others."""
    kinds = COLUMNS | {"p_true": P_TRUE, "judgments": JUDGMENTS}
    columns = {}
    for name in [*COLUMNS, *(name for name in kinds if name in table.column_names)]:
        columns[name] = table[name].cast(kinds[name]).combine_chunks()
        _refuse_nulls(columns[name], name)
    pair_start, response_start = _starts(columns["pairs"]), _starts(columns["responses"])
    a, b, *votes = _fields(columns["pairs"], ("a", "b", *VOTE_COLUMNS))
    _check_pairs(a, b, votes, pair_start, np.diff(response_start))
    # In the file a and b count a prompt's own responses, in a Split they count all of them.
    shift = np.repeat(response_start[:-1], np.diff(pair_start))
    texts = [columns[name].to_pylist() for name in ("prompt_id", "messages", "responses")]
    optional = {}
    if "p_true" in columns:
        optional["p_true"] = p_true = _numpy(columns["p_true"].flatten())
        _refuse(~((p_true >= 0) & (p_true <= 1)), p_true, "p_true", "[0, 1]")
    if "categories" in table.column_names:
        kind = table.schema.field("categories").type
        if not pa.types.is_struct(kind):
            raise ValueError(f"categories: {kind} found, a struct of labels expected")
        kind = pa.struct([(field.name, pa.string()) for field in kind])
        optional["categories"] = table["categories"].cast(kind).to_pylist()
    if "judgments" in columns:
        optional["judgments"] = np.stack(_fields(columns["judgments"], "ab"), axis=1)
    for name in optional.keys() & {"p_true", "judgments"}:
        if (_starts(columns[name]) != pair_start).any():
            row = (_starts(columns[name]) != pair_start).argmax()
            raise ValueError(f"row {row}: as many {name} as pairs expected")
    return Split(*texts, response_start, pair_start, a + shift, b + shift, *votes, **optional)


def _refuse_nulls(array, name):
    """Raise ValueError where a column has a null, at any depth."""
    if array.null_count:
        raise ValueError(f"row {array.is_null().index(True).as_py() + 1}: {name} is null")
    if pa.types.is_list(array.type):
        _refuse_nulls(array.flatten(), f"an element of {name}")
    if pa.types.is_struct(array.type):
        for number in range(array.type.num_fields):
            field = array.type.field(number).name
            _refuse_nulls(array.field(number), f"{field} of {name}")


def _refuse(wrong, values, name, expected):
    """Raise ValueError with the first value that is wrong, bool (N,)."""
    if wrong.any():
        pair = wrong.argmax()
        raise ValueError(f"pair {pair + 1}: {name} {values[pair]} found, {expected} expected")


def _check_pairs(a, b, votes, pair_start, responses):
    """Raise ValueError where pairs do not keep the contract.

    a, b (N,): indices; votes: arrays (N,) of VOTE_COLUMNS; responses (P,): a prompt's number.
    """
    limit = np.repeat(responses, np.diff(pair_start))
    for name, index in (("a", a), ("b", b)):
        _refuse((index < 0) | (index >= limit), index, name, "a response of the prompt")
    _refuse(a == b, a, "a and b", "two different responses")
    for name, counts in zip(VOTE_COLUMNS, votes):
        valid = np.isfinite(counts) & (counts >= 0)
        _refuse(~valid, counts, name, "a number of at least 0")
    _refuse(votes[0] + votes[1] == 0, votes[0], "votes_a and votes_b", "a vote")


def _fields(array, names):
    """Return one array for each named field of the structs in an array of lists of structs."""
    structs = array.flatten()
    return [_numpy(structs.field(name)) for name in names]


def _starts(array):
    """Return where each list begins in all of them flattened, and where the last one ends."""
    offsets = _numpy(array.offsets).astype(np.int64)
    return offsets - offsets[0]


def _numpy(array):
    """Return an array of numbers without nulls; its own to_numpy imports pandas, for .2 seconds."""
    return np.from_dlpack(array)


def read_splits(run):
    """Read every split that `run` has; return ({split: Split}, the value of stats.json).

    Raises InputError where train or test is missing.
    """
    path = run / "data" / "valid.parquet"
    has_valid = path.exists()
    if not has_valid:  # It is missed where the manifest names it.
        manifest.check(run, path)
    names = SPLITS if has_valid else ("train", "test")
    return {name: read_split(run, name) for name in names}, read_stats(run)


def read_stats(run):
    """Read DIR/data/stats.json. Raises InputError where it has another form."""
    path = run / "data" / "stats.json"
    manifest.check(run, path)
    stats = files.read_json(path, STATS)
    if stats["votes"] not in VOTE_KINDS:
        expected = f"{', '.join(VOTE_KINDS[:-1])} or {VOTE_KINDS[-1]} expected"
        raise cli.InputError(f"{path}: votes: {stats['votes']!r} found, {expected}")
    if stats.get("attributes") == {}:
        raise cli.InputError(f"{path}: attributes: none found, at least 1 expected")
    for name, pattern in stats.get("attributes", {}).items():
        try:
            re.compile(pattern)
        except re.error as error:
            words = f"{pattern!r} found, a regular expression expected ({error})"
            raise cli.InputError(f"{path}: attributes: {name}: {words}") from None
    return stats


def hashes(run):
    """Return {path in the run: SHA-256} of the prepared data's files, and of no others there."""
    names = ["stats.json", *(f"{split}.parquet" for split in SPLITS)]
    paths = {f"data/{name}": run / "data" / name for name in sorted(names)}
    return {name: files.hash_file(path) for name, path in paths.items() if path.exists()}


# ---- what an evaluation looks at


def few_prompts(count, own_split):
    """Return the words for a test split of so few prompts; "" where they are enough.

    own_split: whether the data came with it; None where that is not known."""
    advice = "a larger --test-share of data preparation holds out more"
    if own_split:
        advice = f"they are the data's own split, and without one {advice}"
    words = f"only {count} test prompts, which tell little about others"
    return f"{words}; {advice}" if count < 20 else ""


def fitted_pairs(split):
    """Return the split with the pairs that weights and scales are fitted to: those that count, or
    all where none does."""
    return counted_pairs(split) or split


def counted_pairs(split):
    """Return the split without the pairs of fewer than two votes; None where nothing is left.

    Train has such pairs with --min-votes 1, for hard-label losses alone. Prompts that have no other
    pair go as well, but messages, responses and response_start stay those of all prompts, so that
    stored rewards still fit.
    """
    counted = split.n >= 2
    if not counted.any():
        return None
    # The number of counted pairs before each prompt, (P+1,).
    start = np.concatenate([[0], np.cumsum(counted)])[split.pair_start]
    fields = {"pair_start": np.unique(start)}
    for name in ("a", "b", *VOTE_COLUMNS, "p_true", "judgments"):
        if (values := getattr(split, name)) is not None:
            fields[name] = values[counted]
    for name in ("prompt_id", "categories"):
        if values := getattr(split, name):
            fields[name] = list(itertools.compress(values, np.diff(start)))
    return dataclasses.replace(split, **fields)


def some_counted_pairs(run, name, split):
    """Return `counted_pairs` of a split of `run`. Raises InputError where nothing is left."""
    if (counted := counted_pairs(split)) is None:
        words = "no pair of two votes found, at least 1 expected"
        raise cli.InputError(f"{run / 'data' / name}.parquet: {words}")
    return counted
