"""From votes to prompts: what every script of data_prep/ does with its rows.

A script yields a Comparison for each row of its source. `group` collects them by prompt, and
`add_votes` adds up the votes on the same two responses: p = votes_a / (votes_a + votes_b), as
pairwise/data.py computes it from the sums. `divide` draws train, valid and test by prompt, so that
no prompt is in two splits. `oriented_row` draws which response of a pair stands first. `prepare`
does all of this and writes RUN/data.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections import Counter
from typing import NamedTuple

from pairwise import cli, data, figures, files, manifest
from pairwise.prepare import tables

import numpy as np

# A reading of the paper beside --ties drop and half: a tie is no vote, but its annotator is in n.
IN_N = "in n"


class Comparison(NamedTuple):
    """Votes on two responses to one prompt. Several comparisons of the same two are added up."""

    prompt_id: str | None  # None: the prompt itself is the key
    messages: list  # [{role, content}, ..], ending with a user turn
    response_a: str
    response_b: str
    votes_a: float
    votes_b: float
    ties: float
    p_true: float | None = None
    categories: dict | None = None
    split: str | None = None
    where: str = ""  # file and row, for error messages
    annotator: str | None = None  # None: unknown, or several
    replaces: bool = False  # an earlier vote of this annotator on the pair, which else is an error


@dataclasses.dataclass(slots=True)
class Pair:
    """All votes on two responses a and b of a prompt, a being the one that was seen first."""

    votes_a: float
    votes_b: float
    ties: float
    p_true: float | None  # the population's fraction for a
    rows: int = 1  # of the source

    def n(self, ties="drop"):
        """Return the number of votes; with ties IN_N, 0 where there are only ties."""
        votes = self.votes_a + self.votes_b
        return votes + self.ties if ties == IN_N and votes else votes

    def reversed(self):
        """Return the votes on b and a."""
        p_true = None if self.p_true is None else 1 - self.p_true
        return Pair(self.votes_b, self.votes_a, self.ties, p_true)

    def add(self, other, sign=1):
        """Add the votes of a row on the same a and b, or take them back with sign -1."""
        self.votes_a += sign * other.votes_a
        self.votes_b += sign * other.votes_b
        self.ties += sign * other.ties
        self.rows += sign


@dataclasses.dataclass
class Prompt:
    """A prompt with all its responses and pairs."""

    prompt_id: str
    messages: list
    context: str  # the messages as text, by which equal prompts are known
    categories: dict | None
    split: str | None  # the source's own split, where it has one
    responses: dict = dataclasses.field(default_factory=dict)  # {text: index}, first-seen order
    pairs: dict = dataclasses.field(default_factory=dict)  # {(a, b): Pair}, indices a < b
    given: dict = dataclasses.field(default_factory=dict)  # {(a, b, annotator): (Pair, where)}


def add_flags(parser, test_share=0.1, valid_share=0.0):
    """Add the flags that every script of data_prep/ has which writes RUN/data."""
    add = parser.add_argument
    add("--run", required=True, type=cli.path, help="run directory; the result is RUN/data")
    seed_help = "decides the split and which response stands first"
    add("--seed", type=cli.seed, default=0, help=seed_help)
    ties_help = "a tie vote counts for nothing, or half for each side"
    add("--ties", choices=("drop", "half"), default="drop", help=ties_help)
    votes_help = "1 keeps train pairs with one vote, for hard-label losses"
    add("--min-votes", type=cli.integer, choices=(1, 2), default=2, help=votes_help)
    test_help = "share of the prompts held out, at least two, where the data has no own split"
    add("--test-share", type=cli.fraction, default=test_share, help=test_help)
    valid_help = "share of the train prompts set aside for choices, where the data has none itself"
    add("--valid-share", type=cli.fraction, default=valid_share, help=valid_help)


# ---- from comparisons to prompts


def group(comparisons, ties):
    """Group comparisons by prompt: each response once, each pair once with its votes added up.

    comparisons: an iterable of Comparison, or of texts that say why a row became none. ties: "half"
    gives half of every tie vote to each side, otherwise ties are only counted. Returns the Prompts
    in first-seen order, and a Counter of what was dropped, by reason. Raises InputError where rows
    of one prompt contradict each other.
    """
    prompts, dropped, messages = {}, Counter(), None
    for comparison in comparisons:
        reason = comparison if isinstance(comparison, str) else unusable(comparison)
        if reason:
            dropped[reason] += 1
            continue
        if comparison.messages is not messages:  # The comparisons of one row share theirs.
            messages = comparison.messages
            context = json.dumps(messages, ensure_ascii=False, sort_keys=True)
        key = comparison.split, comparison.prompt_id or context
        if key not in prompts:
            name = comparison.prompt_id or hashlib.sha256(context.encode()).hexdigest()[:16]
            source = (comparison.messages, context, comparison.categories, comparison.split)
            prompts[key] = Prompt(name, *source)
        prompt, where = prompts[key], comparison.where
        if prompt.context != context:
            contradiction = f"prompt_id {prompt.prompt_id!r} has another prompt than before"
            raise cli.InputError(f"{where}: {contradiction}")
        if prompt.categories != comparison.categories:
            before = f"{prompt.categories} before for the same prompt"
            raise cli.InputError(f"{where}: categories {comparison.categories} found, {before}")
        if add_votes(prompt, comparison, ties):
            dropped["earlier vote of the same annotator"] += 1
    return list(prompts.values()), dropped


def unusable(comparison):
    """Return why a comparison is left out, or None."""
    if not all(message["content"].strip() for message in comparison.messages):
        return "empty prompt"
    if not comparison.response_a.strip() or not comparison.response_b.strip():
        return "empty response"
    if comparison.response_a == comparison.response_b:
        return "identical responses"
    return None


def add_votes(prompt, comparison, ties):
    """Add the votes of a comparison to the prompt's pair of the same two responses.

    Returns whether they replace earlier ones. Raises InputError where p_true is not that of an
    earlier row of the pair, and for an annotator's second vote that is not to replace the first.
    """
    index, where = prompt.responses, comparison.where
    a = index.setdefault(comparison.response_a, len(index))
    b = index.setdefault(comparison.response_b, len(index))
    half = comparison.ties / 2 if ties == "half" else 0.0
    votes_a, votes_b = comparison.votes_a + half, comparison.votes_b + half
    new = Pair(votes_a, votes_b, comparison.ties, comparison.p_true)
    if a > b:
        a, b, new = b, a, new.reversed()
    pair = prompt.pairs.setdefault((a, b), Pair(0.0, 0.0, 0.0, new.p_true, 0))
    pair.add(new)
    if abs((pair.p_true or 0) - (new.p_true or 0)) > 1e-6:  # float32 files give p, and 1 - p.
        message = "p_true differs from an earlier row for the same two responses"
        raise cli.InputError(f"{where}: {message}")
    if comparison.annotator is None:
        return False
    key = a, b, comparison.annotator
    before, then = prompt.given.get(key, (None, None))
    prompt.given[key] = new, where
    if before and not comparison.replaces:
        twice = f"annotator: {comparison.annotator!r} found, as in {then} on the same two responses"
        raise cli.InputError(f"{where}: {twice}; one vote expected, or --repeated last")
    if before:
        pair.add(before, -1)
    return before is not None


def drop_pairs(prompts, least, dropped, ties="drop"):
    """Remove the pairs of fewer than `least` votes, and return the prompts that have one left.

    The pairs are counted in `dropped`.
    """
    reason = "fewer than two votes" if least == 2 else "no vote"
    for prompt in prompts:
        enough = {key: pair for key, pair in prompt.pairs.items() if pair.n(ties) >= least}
        if removed := len(prompt.pairs) - len(enough):
            dropped[reason] += removed
        prompt.pairs = enough
    return [prompt for prompt in prompts if prompt.pairs]


# ---- splits


def divide(args, name, comparisons, rng, ties):
    """Return {split: Prompts with enough votes}, and a Counter of what was dropped, by reason.

    comparisons, ties: as for group. Raises InputError as group does, and where fewer than three
    prompts, or an empty split, would remain.
    """
    prompts, dropped = group(comparisons, ties)
    prompts = drop_pairs(prompts, args.min_votes, dropped, ties)
    if not prompts:
        raise too_few(name, f"no pair with {args.min_votes} votes or more found", dropped)
    if len(prompts) < 3:
        raise too_few(name, f"{len(prompts)} prompts found, at least three expected", dropped)
    splits = split_prompts(prompts, args.test_share, args.valid_share, rng, dropped, ties)
    if args.valid_share and not splits.get("valid"):
        raise too_few(name, "no prompt for validation found, whose pairs need two votes", dropped)
    for split in splits:
        if split != "train":  # Evaluation counts pairs with two votes or more only.
            splits[split] = drop_pairs(splits[split], 2, dropped, ties)
        count, least = len(splits[split]), 2 if split == "test" else 1
        if count < least:
            raise too_few(name, f"{count} {split} prompts, at least {least} expected", dropped)
    return {split: splits[split] for split in data.SPLITS if split in splits}, dropped


def too_few(name, shortage, dropped):
    """Return the InputError of a data set with too little in it, which says what was dropped."""
    reasons = "; ".join(f"{count} dropped: {reason}" for reason, count in sorted(dropped.items()))
    return cli.InputError(f"{name}: {shortage}{f' ({reasons})' if reasons else ''}")


def split_prompts(prompts, test_share, valid_share, rng, dropped, ties):
    """Return {split: prompts}: the source's own splits, or else at least two prompts for test.

    valid_share of the train prompts, at least one unless it is zero, become the validation split.
    Prompts with equal messages stay together whatever their ids, so that no text is in two splits.
    Where the source's splits part them, train loses its pairs, and `dropped` counts them.
    """
    splits, own_splits = {}, {prompt.split for prompt in prompts}
    if own_splits == {None}:
        splits["test"], splits["train"] = draw_prompts(prompts, test_share, 2, rng, ties)
    elif None in own_splits:
        raise cli.InputError("rows with and without a split found, all alike expected")
    else:
        held_out = set()
        for name in ("test", "valid", "train"):
            named = [prompt for prompt in prompts if prompt.split == name]
            splits[name] = [prompt for prompt in named if prompt.context not in held_out]
            if repeated := [prompt for prompt in named if prompt.context in held_out]:
                reason = f"{name} pair of a prompt that is in a held-out split too"
                dropped[reason] += sum(len(prompt.pairs) for prompt in repeated)
            held_out |= {prompt.context for prompt in named}
    if valid_share and not splits.get("valid"):
        splits["valid"], splits["train"] = draw_prompts(splits["train"], valid_share, 1, rng, ties)
    return {name: members for name, members in splits.items() if members or name != "valid"}


def draw_prompts(prompts, fraction, least, rng, ties):
    """Draw a fraction of the distinct prompts that have a pair of two votes, at least `least`, and
    return (drawn, rest). The others cannot be evaluated, and are in the rest."""
    counted = (prompt for prompt in prompts if any(x.n(ties) >= 2 for x in prompt.pairs.values()))
    contexts = list(dict.fromkeys(prompt.context for prompt in counted))
    order = rng.permutation(len(contexts))
    chosen = {contexts[i] for i in order[: max(least, round(fraction * len(contexts)))]}
    drawn = [prompt for prompt in prompts if prompt.context in chosen]
    return drawn, [prompt for prompt in prompts if prompt.context not in chosen]


def oriented_row(prompt, rng):
    """Return a prompt as a row of the contract, responses without a pair left out.

    Which response of a pair stands first is drawn from rng: it carries no information.
    """
    texts = list(prompt.responses)
    used = sorted({index for key in prompt.pairs for index in key})
    new_index = {old: new for new, old in enumerate(used)}
    pairs, truths = [], []
    for (a, b), pair in prompt.pairs.items():
        if rng.random() < 0.5:
            a, b, pair = b, a, pair.reversed()
        votes = {name: getattr(pair, name) for name in data.VOTE_COLUMNS}
        pairs.append({"a": new_index[a], "b": new_index[b], **votes})
        truths.append(pair.p_true)
    row = {"prompt_id": prompt.prompt_id, "messages": prompt.messages}
    row |= {"responses": [texts[old] for old in used], "pairs": pairs}
    if truths[0] is not None:
        row["p_true"] = truths
    if prompt.categories:
        row["categories"] = prompt.categories
    return row


# ---- the stage


def prepare(
    args, name, comparisons, votes, inputs, settings, paper=None, readings=None, facts=None
):
    """Turn comparisons into RUN/data, and print and store the counts.

    comparisons: called to get them, only where the stage is not done; votes: of data.VOTE_KINDS;
    inputs: {name: hash}. paper: {column of tables.paper_columns: figure}, which are put beside ours
    and beside those under other readings of the paper, {what differs: (comparisons, ties)}. facts:
    a dict for stats.json, which comparisons() may still fill. Raises InputError as group does, and
    as divide does.
    """
    run = args.run
    flags = ("seed", "ties", "min_votes", "test_share", "valid_share")
    own_settings = {flag: getattr(args, flag) for flag in flags}
    settings = {"dataset": name, "votes": votes} | own_settings | settings
    if manifest.stage_done(run, "data", settings, inputs, [run / "data"]):
        print(f"data: {run / 'data'} is there, skipped")
        return
    rng = np.random.default_rng([args.seed, 1])
    splits, dropped = divide(args, name, comparisons(), rng, args.ties)
    stats = settings | {"dropped": dict(sorted(dropped.items()))}
    stats["own_split"] = splits["test"][0].split is not None
    stats["splits"] = {split: tables.describe(splits[split]) for split in splits}
    distinct = {split: len({prompt.context for prompt in splits[split]}) for split in splits}
    if fewer := {split: n for split, n in distinct.items() if n < len(splits[split])}:
        stats["distinct_texts"] = fewer
    stats |= tables.added_up(tables.in_all(splits))
    majority = tables.majority_share(tables.in_all(splits))
    counts, edges = figures.majority_bins(majority)
    bins = edges[:-1].round(2).tolist()
    stats["histogram"] = {"majority_share_from": bins, "pairs": counts.tolist()}  # figure 4
    if paper:
        stats |= beside_paper(args, name, paper, splits, readings)
    stats |= facts or {}
    rows = {split: [oriented_row(prompt, rng) for prompt in splits[split]] for split in splits}
    started = manifest.begin_stage(run, "data", settings, inputs)
    with files.replacing(run / "data") as partial:
        partial.mkdir()
        for split, prompt_rows in rows.items():
            data.write_split(partial / f"{split}.parquet", prompt_rows)
        files.write_json(partial / "stats.json", stats)
    figures.write_votes(majority, run / "figures" / "data_votes")
    manifest.end_stage(run, "data", settings, inputs, started)
    tables.print_counts(stats)


def beside_paper(args, name, paper, splits, readings):
    """Return the paper's figures, ours, their difference, and ours under other readings."""
    here, other = tables.paper_columns(splits, args.ties), {}
    for reading, (comparisons, ties) in readings.items():
        # A reading that leaves too little, or that alone reads broken rows, has no column.
        with contextlib.suppress(cli.InputError):
            rng = np.random.default_rng([args.seed, 1])
            splits_then, _ = divide(args, name, comparisons(), rng, ties)
            other[reading] = tables.paper_columns(splits_then, ties)
    difference = {column: here[column] - figure for column, figure in paper.items()}
    return {"paper": paper, "here": here, "difference": difference, "other_readings": other}
