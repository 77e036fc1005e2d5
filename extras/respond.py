"""Answer prompts with a trained run: the deployment modes of section 2, with the best of N samples
of the base in place of fine-tuned policies.

    python extras/respond.py --run runs/demo --mode overton "how can i get fit again ?"
    python extras/respond.py --run runs/demo --mode steerable --like mine.jsonl --json --file FILE

Prompts: PROMPT (after -- where it begins with a dash), or --file FILE, or stdin, one a line; a line
that begins with { is a row {"prompt": text or chat messages}. FILE may also be .jsonl, .json, .csv
or .parquet. The base answers each prompt --n times, every member ranks the distinct answers, and
answers with its favourite:

    overton         a slate of the members' favourites, equal ones merged; the weight of a
                    favourite is that of the members it belongs to
    consensus       one answer, whose lowest rank among the members is highest; of several the one
                    of the highest weighted mean rank, then the first
    distributional  the answer of a member drawn by its weight; --draws N of them
    steerable       the answer of the member that --like's comparisons speak for: rows of prompt,
                    response_a, response_b, choice (a, b or tie)
    --table         every member's favourite side by side (appendix G)

overton and consensus ask the members whose weight is not zero. Of equal answers the first in the
alphabet is taken. The answers sampled depend on the prompt, the flags and --seed, not on the other
prompts; one stream of draws runs through all prompts.

How sure steerable is: it prints the members' probabilities given the comparisons, if the user is a
member drawn by its weight who contradicts it in a share e of comparisons, with e anywhere between
0 and 1/2. A tie of the user or of a member is half an agreement.

--json prints one object a prompt: {prompt, mode, weights: [K], candidates: [{text, count: times
sampled, ranks: [K]}], answers: [{text, members: [j..] whose favourite it is, weight: theirs,
ranks: [K]}]}, with rank 1 for the best, and equal rewards sharing their mean rank. distributional
adds draws to each answer and, in order, draws: [j..]; steerable adds examples, agreements: [K],
posterior: [K] and member.
"""

import json
import shutil
import sys
import textwrap
from collections import Counter
from pathlib import Path

from pairwise import chats, cli, members, pretrained, ranking, rows, sampling
from pairwise import reward_model as rm

import numpy as np
import torch
from scipy.special import logsumexp, softmax
from tqdm import tqdm

FIELDS = {"prompt": "messages", "response_a": "text", "response_b": "text", "choice": "text"}
CHOICES = {"a": 1.0, "tie": 0.5, "b": 0.0}
ERROR_RATES = (np.arange(1000) + 0.5) / 2000  # A uniform prior on (0, 1/2).


# ---- prompts, comparisons and candidates


def read_prompts(args):
    """Return [(prompt as given, messages)] of PROMPT, --file or stdin.

    Raises InputError with the row and field, what was found and what was expected."""
    if args.prompt is not None:
        name, given = "PROMPT", [("PROMPT", {"prompt": args.prompt})]
    elif args.file and Path(args.file.name.lower().removesuffix(".gz")).suffix in rows.READERS:
        name, given = args.file, rows.read_rows(args.file, FIELDS)
    elif args.file and not args.file.exists():
        raise cli.InputError(f"{args.file}: no such file")
    elif args.file:
        name, given = args.file, read_lines(args.file.read_bytes().splitlines(), args.file.name)
    else:
        asked = sys.stdin is None or sys.stdin.isatty()  # It is None where it was closed, by <&-.
        name, given = "stdin", read_lines([] if asked else sys.stdin.buffer, "stdin")
    prompts = [(row.get("prompt"), rows.messages(where, row.get("prompt"))) for where, row in given]
    if not prompts:
        raise cli.InputError(
            f"{name}: no prompt found, at least one expected (PROMPT, --file FILE, or lines on "
            "stdin)"
        )
    return prompts


def read_lines(file, name):
    """Yield (where, row) of every line that is not empty: a row of JSON, or the prompt itself."""
    for number, line in rows.decoded_lines(file, name):
        if line.startswith("{"):
            yield f"{name} line {number}", rows.parse_json(line, name, number)
        elif line.strip():
            yield f"{name} line {number}", {"prompt": line.strip()}


def read_examples(path):
    """Return members.Question of the user's comparisons, each of responses a and b, and the
    choices, float64 (E,): 1 where a was chosen, 0 for b, 1/2 for a tie."""
    questions, choices = [], []
    for where, row in rows.read_rows(path, FIELDS):
        responses = [rows.text(where, name, row.get(name)) for name in ("response_a", "response_b")]
        prompt = row.get("prompt")
        questions.append(members.Question(prompt, rows.messages(where, prompt), responses))
        choices.append(CHOICES[rows.one_of(where, "choice", row.get("choice"), CHOICES)])
    if not questions:
        raise cli.InputError(f"{path}: no row found, at least one expected")
    return questions, np.array(choices)


def sample_candidates(prompts, base, date, args):
    """Return, of every prompt, {answer: times sampled} of --n answers, in alphabetical order.

    The order fixes who is first among equals. prompts: [(prompt as given, messages)]."""
    tokenizer = chats.load_tokenizer(base, args.chat_template, date=date)
    model = sampling.load_language_model(base, args.device)
    encoded = [chats.encode(tokenizer, messages) for _, messages in prompts]
    rm.check_tokens(model, encoded)
    limits = [
        sampling.room(model, ids, args.max_tokens, f"prompt {number}")
        for number, ids in enumerate(encoded, 1)
    ]
    candidates, single = [], len(prompts) == 1
    work = list(zip(encoded, limits))
    for ids, limit in tqdm(work, desc="candidates", unit="prompt", leave=False, disable=single):
        torch.manual_seed(args.seed)
        with pretrained.readable(f"--base {base}: no answers could be sampled"):
            answers, _ = sampling.sample(
                model, tokenizer, ids, args.n, args.temperature, args.top_p, limit
            )
        candidates.append(dict(sorted(Counter(answers).items())))
    return candidates


# ---- who answers. rank: float64 (K, n), 1 is best; favourite: int (K,); alpha: float64 (K,).


def slate(favourite, alpha):
    """Return [(candidate, its members)], heaviest first: the favourites of the members whose
    weight is not zero, equal ones merged."""
    supported = sorted(set(favourite[alpha > 0].tolist()))
    merged = [(i, np.flatnonzero((favourite == i) & (alpha > 0))) for i in supported]
    return sorted(merged, key=lambda item: -alpha[item[1]].sum())


def consensus(rank, alpha):
    """Return the candidate whose worst rank among the members with a weight is best; of several
    the best in weighted mean rank, then the first."""
    worst = rank[alpha > 0].max(0)
    return int(np.lexsort((alpha @ rank, worst))[0])


def agreements(rewards, choices):
    """Return how many of the user's choices each member agrees with, float64 (K,); a tie is half.

    rewards: float32 (K, 2E), of a and b in turn; choices: float64 (E,)."""
    votes = (np.sign(rewards[:, 0::2] - rewards[:, 1::2]) + 1) / 2
    return (votes * choices + (1 - votes) * (1 - choices)).sum(1)


def posterior(alpha, agreed, n):
    """Return P(member | n comparisons), float64 (K,): its weight times the mean over error rates e
    of (1-e)^agreed e^(n-agreed)."""
    right = np.outer(agreed, np.log1p(-ERROR_RATES))
    wrong = np.outer(n - agreed, np.log(ERROR_RATES))
    with np.errstate(divide="ignore"):  # A weight of zero stays zero.
        return softmax(np.log(alpha) + logsumexp(right + wrong, axis=1))


def respond(mode, texts, rank, favourite, alpha, drawn, agreed, examples):
    """Return what the mode adds to a prompt's row, its answers first.

    texts: n distinct candidates; drawn: int (draws,), members; agreed: float64 (K,), agreements
    with so many examples."""

    def answer(i, own=None, **more):
        own = np.flatnonzero(favourite == i) if own is None else np.array(own)
        row = {"text": texts[i], "members": (own + 1).tolist(), "weight": float(alpha[own].sum())}
        return row | {"ranks": rank[:, i].tolist()} | more

    if mode == "overton":
        return {"answers": [answer(i, own) for i, own in slate(favourite, alpha)]}
    if mode == "consensus":
        return {"answers": [answer(consensus(rank, alpha))]}
    if mode == "distributional":
        times = Counter(favourite[drawn].tolist()).most_common()
        answers = [answer(i, draws=count) for i, count in times]
        return {"answers": answers, "draws": (drawn + 1).tolist()}
    if mode == "steerable":
        p = posterior(alpha, agreed, examples)
        return {
            "answers": [answer(favourite[p.argmax()])],
            "examples": examples,
            "agreements": agreed.tolist(),
            "posterior": p.tolist(),
            "member": int(p.argmax()) + 1,
        }
    return {"answers": [answer(i, [j]) for j, i in enumerate(favourite)]}


# ---- on the terminal


def table(header, lines):
    """Yield the lines of a table whose last column is text, wrapped to the terminal.

    header: str of each column; lines: lists of cells, the last of any length."""
    cells = [header, *([str(cell) for cell in line] for line in lines)]
    widths = [max(map(len, column)) for column in list(zip(*cells))[:-1]]
    left = sum(widths) + 2 * len(widths)
    room = max(30, shutil.get_terminal_size().columns - left)
    for *line, text in cells:
        paragraphs = [textwrap.wrap(part, room) or [""] for part in printable(text).splitlines()]
        wrapped = sum(paragraphs, []) or [""]
        before = "".join(f"{cell:>{width}}  " for cell, width in zip(line, widths))
        yield (before + wrapped[0]).rstrip()
        yield from (" " * left + continued for continued in wrapped[1:])


def printable(text):
    """Return the text without what would steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


def spaced(numbers):
    return " ".join(f"{number:g}" for number in numbers)


def shown(row):
    """Yield the lines of one prompt's row for the terminal."""
    prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
    yield from textwrap.wrap(printable(prompt), shutil.get_terminal_size().columns)
    candidates, k = row["candidates"], len(row["weights"])
    sampled, ranked = sum(each["count"] for each in candidates), f" to {k}" if k > 1 else ""
    yield f"{sampled} candidates, {len(candidates)} of them distinct; rank by member 1{ranked}"
    yield ""
    yield from shown_posterior(row) if row["mode"] == "steerable" else shown_answers(row)


def shown_posterior(row):
    """Yield a table of all members, with the answer of the one that is likeliest."""
    lines, (best,) = [], row["answers"]
    facts = zip(row["weights"], row["agreements"], row["posterior"])
    for j, (weight, agreed, p) in enumerate(facts, 1):
        own = [spaced(best["ranks"]), best["text"]] if j == row["member"] else ["", ""]
        lines.append([j, f"{weight:.2f}", f"{agreed:g} of {row['examples']}", f"{p:.2f}", *own])
    yield from table(["member", "weight", "agrees", "probability", "rank", "answer"], lines)


def shown_answers(row):
    """Yield a table of the answers."""
    header = ["member" if row["mode"] == "table" else "favourite of", "weight", "rank", "answer"]
    lines = []
    for each in row["answers"]:
        own, ranks = spaced(each["members"]) or "none", spaced(each["ranks"])
        lines.append([own, f"{each['weight']:.2f}", ranks, each["text"]])
    if row["mode"] == "distributional":
        header.insert(0, "drawn")
        lines = [[each["draws"], *line] for each, line in zip(row["answers"], lines)]
    yield from table(header, lines)


# ---- the script


def main(args):
    rm.settle(args)
    prompts = read_prompts(args)
    examples, choices = read_examples(args.like) if args.like else ([], np.empty(0))
    alpha, settings = members.open_run(args, needs_base=True)
    candidates = sample_candidates(prompts, settings["base"], settings["date"], args)
    questions = [
        members.Question(*prompt, list(counts)) for prompt, counts in zip(prompts, candidates)
    ]
    rewards = members.rewards_of_run(args.run, settings, examples + questions, args)
    start, rng = 2 * len(examples), np.random.default_rng(args.seed)
    agreed = agreements(rewards[:, :start], choices)
    for number, ((prompt, _), counts) in enumerate(zip(prompts, candidates)):
        own, texts = rewards[:, start : start + len(counts)], list(counts)
        start += len(counts)
        rank, favourite = ranking.ranks(own), ranking.favourites(own)
        drawn = rng.choice(len(alpha), args.draws, p=alpha)
        row = {
            "prompt": prompt,
            "mode": args.mode,
            "weights": alpha.tolist(),
            "candidates": [
                {"text": text, "count": count, "ranks": ranks}
                for (text, count), ranks in zip(counts.items(), rank.T.tolist())
            ],
        }
        row |= respond(args.mode, texts, rank, favourite, alpha, drawn, agreed, len(examples))
        if args.json:
            print(json.dumps(row, ensure_ascii="utf" not in str(sys.stdout.encoding).lower()))
        else:
            print("\n" * (number > 0) + "\n".join(shown(row)))


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help="the prompt; one such as -x after --")
    add("--file", type=cli.path, help="prompts, one a line, or rows of prompt")
    which = parser.add_mutually_exclusive_group(required=True)
    modes = "overton", "consensus", "distributional", "steerable"
    which.add_argument("--mode", choices=modes, help="as above")
    which.add_argument(
        "--table",
        dest="mode",
        action="store_const",
        const="table",
        help="every member's favourite side by side",
    )
    add(
        "--like",
        type=cli.path,
        metavar="EXAMPLES",
        help="steerable: the user's comparisons, .jsonl, .json, .csv or .parquet",
    )
    add(
        "--draws", type=cli.natural, default=1, help="distributional: members drawn for each prompt"
    )
    add("--n", type=cli.natural, default=16, help="candidates sampled for each prompt")
    sampling.add_flags(parser, 0.9, 256)
    add("--json", action="store_true", help="one JSON object a prompt instead of text")
    members.add_flags(parser)
    args = parser.parse_args(argv)
    if (args.mode == "steerable") != bool(args.like):
        parser.error(
            "--mode steerable needs --like EXAMPLES"
            if args.mode == "steerable"
            else "--like EXAMPLES: only with --mode steerable"
        )
    if args.draws > 1 and args.mode != "distributional":
        parser.error("--draws: only with --mode distributional")
    if args.prompt is not None and args.file:
        parser.error("PROMPT and --file: one of them expected")
    return args


if __name__ == "__main__":
    cli.run_main(main, parse_args())
