"""Answer prompts with a trained run: the deployment modes of section 2, with the best of N samples of the base in place of fine-tuned policies.

    python extras/respond.py --run runs/demo --mode overton "how can i get fit again ?"
    python extras/respond.py --run runs/demo --mode steerable --like mine.jsonl --json --file prompts.txt

Prompts: PROMPT, or --file FILE, or stdin, one a line; a line that begins with { is a row {"prompt": text or chat messages}. FILE may also be
.jsonl, .json, .csv or .parquet.   The base answers each prompt --n times, every member ranks the distinct answers, and answers with its favourite:
    overton         a slate of the members' favourites, equal ones merged; a favourite's weight is that of the members it belongs to
    consensus       one answer: its lowest rank among the members is highest; of several the one of the highest weighted mean rank, then the first
    distributional  a member drawn by its weight answers; --draws N of them
    steerable       the member answers that --like's comparisons speak for: rows of prompt, response_a, response_b, choice (a, b or tie)
    --table         every member's favourite side by side (appendix G)
overton and consensus ask the members whose weight is not zero. Of equal answers the first in the alphabet is taken. The answers sampled depend on
the prompt, the flags and --seed, not on the other prompts; one stream of draws runs through all prompts.

How sure steerable is: the members' probabilities given the comparisons, if the user is a member drawn by its weight who contradicts it in a share e
of comparisons, with e anywhere between 0 and 1/2. A tie of the user or of a member is half an agreement.

--json: one object a prompt: {prompt, mode, weights: [K], candidates: [{text, count: times sampled, ranks: [K]}], answers: [{text, members: [j..]
whose favourite it is, weight: theirs, ranks: [K]}]}, ranks 1 for the best, equal rewards sharing their mean rank. distributional adds draws to each
answer and, in order, draws: [j..]; steerable adds examples, agreements: [K], posterior: [K] and member.
"""

import json
import shutil
import sys
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from scipy.special import logsumexp, softmax
from tqdm import tqdm

from pairwise import cli, sampling
from pairwise import reward_model as rm
from pairwise.members import add_arguments, open_run, rewards_of_run
from pairwise.ranking import favourites, ranks
from pairwise.rows import READERS, decoded_lines, messages, one_of, parse_json, read_rows, text
from pairwise.sampling import room, sample

FIELDS = {"prompt": "messages", "response_a": "text", "response_b": "text", "choice": "text"}
CHOICES = {"a": 1.0, "tie": 0.5, "b": 0.0}
ERROR_RATES = (np.arange(1000) + 0.5) / 2000  # a uniform prior on (0, 1/2)


# ---- what is asked


def read_prompts(args):
    """[(prompt as given, messages)] of PROMPT, --file or stdin. Raises InputError with the row, field, what was found and expected."""
    if args.prompt is not None:
        name, rows = "PROMPT", [("PROMPT", {"prompt": args.prompt})]
    elif args.file and {suffix.lower() for suffix in args.file.suffixes[-2:]} & set(READERS):
        name, rows = args.file, read_rows(args.file, FIELDS)
    elif args.file and not args.file.exists():
        raise cli.InputError(f"{args.file}: no such file")
    elif args.file:
        name, rows = args.file, rows_of_lines(args.file.read_bytes().splitlines(), args.file.name)
    else:
        name, rows = "stdin", rows_of_lines([] if sys.stdin.isatty() else sys.stdin.buffer, "stdin")
    prompts = [(row.get("prompt"), messages(where, row.get("prompt"))) for where, row in rows]
    if not prompts:
        raise cli.InputError(
            f"{name}: no prompt found, at least one expected (PROMPT, --file FILE, or lines on stdin)"
        )
    return prompts


def rows_of_lines(file, name):
    """(where, row) of every line that is not empty: a row of JSON, or the prompt itself."""
    for line, words in decoded_lines(file, name):
        if words.strip():
            yield (
                f"{name} line {line}",
                parse_json(words, name, line)
                if words.startswith("{")
                else {"prompt": words.strip()},
            )


def read_examples(path):
    """(questions, choices): [(prompt, messages, [a, b])] of the user's comparisons, and float64 (E,), 1 where a was chosen, 1/2 for a tie."""
    questions, choices = [], []
    for where, row in read_rows(path, FIELDS):
        pair = [text(where, field, row.get(field)) for field in ("response_a", "response_b")]
        questions.append((row.get("prompt"), messages(where, row.get("prompt")), pair))
        choices.append(CHOICES[one_of(where, "choice", row.get("choice"), CHOICES)])
    if not questions:
        raise cli.InputError(f"{path}: no row found, at least one expected")
    return questions, np.array(choices)


def sample_candidates(prompts, base, args):
    """[(texts, counts)] of every prompt: the distinct answers of --n in alphabetical order, which fixes who is first among equals."""
    tokenizer = rm.load_tokenizer(base, args.chat_template)
    model = rm.load_language_model(base, args.device)
    encoded = [rm.encode(tokenizer, chat) for _, chat in prompts]
    longest = [
        room(model, ids, args.max_tokens, f"prompt {number}")
        for number, ids in enumerate(encoded, 1)
    ]
    found = []
    for ids, most in tqdm(
        list(zip(encoded, longest)),
        desc="candidates",
        unit="prompt",
        leave=False,
        disable=len(prompts) == 1,
    ):
        torch.manual_seed(args.seed)
        counts = Counter(
            sample(model, tokenizer, ids, args.n, args.temperature, args.top_p, most)[0]
        )
        found.append((sorted(counts), [counts[answer] for answer in sorted(counts)]))
    return found


# ---- who answers. rank: float64 (K, n), 1 is best; favourite: int (K,); alpha: float64 (K,)


def slate(favourite, alpha):
    """[(candidate, members)], heaviest first: the favourites of the members in the support, equal ones merged."""
    merged = {
        i: np.flatnonzero((favourite == i) & (alpha > 0))
        for i in sorted(set(favourite[alpha > 0].tolist()))
    }
    return sorted(merged.items(), key=lambda item: -alpha[item[1]].sum())


def consensus(rank, alpha):
    """The candidate whose worst rank among the members in the support is best; of several the best in weighted mean rank, then the first."""
    worst = rank[alpha > 0].max(0)
    return int(np.lexsort((alpha @ rank, worst))[0])


def agreements(rewards, choices):
    """How many of the user's choices each member agrees with, float64 (K,), ties counting half. rewards: float32 (K, 2E), a and b in turn."""
    votes = (np.sign(rewards[:, 0::2] - rewards[:, 1::2]) + 1) / 2
    return (votes * choices + (1 - votes) * (1 - choices)).sum(1)


def posterior(alpha, agreed, n):
    """P(member | comparisons), float64 (K,): its weight times the mean over error rates e of (1-e)^agreed e^(n-agreed)."""
    log_likelihood = np.outer(agreed, np.log1p(-ERROR_RATES)) + np.outer(
        n - agreed, np.log(ERROR_RATES)
    )
    with np.errstate(divide="ignore"):  # a weight of zero stays zero
        return softmax(np.log(alpha) + logsumexp(log_likelihood, axis=1))


def respond(mode, texts, rank, favourite, alpha, drawn=None, agreed=None, examples=0):
    """What the mode adds to a prompt's row, its answers first. texts: n distinct; drawn: int (draws,); agreed: float64 (K,), of so many examples."""

    def answer(i, members=None, **more):
        members = np.flatnonzero(favourite == i) if members is None else np.array(members)
        return {
            "text": texts[i],
            "members": (members + 1).tolist(),
            "weight": float(alpha[members].sum()),
            "ranks": rank[:, i].tolist(),
        } | more

    if mode == "overton":
        return {"answers": [answer(i, members) for i, members in slate(favourite, alpha)]}
    if mode == "consensus":
        return {"answers": [answer(consensus(rank, alpha))]}
    if mode == "distributional":
        return {
            "answers": [
                answer(i, draws=times)
                for i, times in Counter(favourite[drawn].tolist()).most_common()
            ],
            "draws": (drawn + 1).tolist(),
        }
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


def table(header, rows):
    """Lines of a table whose last column is text, wrapped to the terminal. header: str of each column; rows: cells, the last of any length."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in list(zip(header, *cells))[:-1]]
    left = sum(widths) + 2 * len(widths)
    wrap = max(30, shutil.get_terminal_size().columns - left)
    for row in [header, *cells]:
        lines = [
            line
            for part in printable(row[-1]).splitlines()
            for line in textwrap.wrap(part, wrap) or [""]
        ] or [""]
        yield (
            "".join(f"{cell:>{width}}  " for cell, width in zip(row, widths)) + lines[0]
        ).rstrip()
        yield from (" " * left + line for line in lines[1:])


def printable(text):
    """The text without what would steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


def shown(row):
    """Lines of one prompt's row for the terminal."""
    prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
    yield from textwrap.wrap(printable(prompt), shutil.get_terminal_size().columns)
    sampled, members = (
        sum(candidate["count"] for candidate in row["candidates"]),
        len(row["weights"]),
    )
    yield f"{sampled} candidates, {len(row['candidates'])} of them distinct; rank by member 1{f' to {members}' if members > 1 else ''}"
    yield ""
    if row["mode"] == "steerable":
        best = row["member"] - 1
        yield from table(
            ["member", "weight", "agrees", "probability", "rank", "answer"],
            [
                [
                    j + 1,
                    f"{row['weights'][j]:.2f}",
                    f"{row['agreements'][j]:g} of {row['examples']}",
                    f"{p:.2f}",
                    *(
                        (spaced(row["answers"][0]["ranks"]), row["answers"][0]["text"])
                        if j == best
                        else ("", "")
                    ),
                ]
                for j, p in enumerate(row["posterior"])
            ],
        )
        return
    drawn, who = (
        row["mode"] == "distributional",
        "member" if row["mode"] == "table" else "favourite of",
    )
    yield from table(
        [*(["drawn"] if drawn else []), who, "weight", "rank", "answer"],
        [
            [
                *([each["draws"]] if drawn else []),
                spaced(each["members"]) or "none",
                f"{each['weight']:.2f}",
                spaced(each["ranks"]),
                each["text"],
            ]
            for each in row["answers"]
        ],
    )


def spaced(numbers):
    return " ".join(f"{number:g}" for number in numbers)


# ---- the script


def main(args):
    torch.set_num_threads(args.threads)
    prompts = read_prompts(args)
    examples, choices = read_examples(args.like) if args.like else ([], np.empty(0))
    alpha, settings = open_run(args, samples=True)
    candidates = sample_candidates(prompts, settings["base"], args)
    questions = examples + [(*prompt, texts) for prompt, (texts, _) in zip(prompts, candidates)]
    rewards = rewards_of_run(args.run, len(alpha), settings, questions, args)
    start, rng = 2 * len(examples), np.random.default_rng(args.seed)
    agreed = agreements(rewards[:, :start], choices)
    for number, ((prompt, _), (texts, counts)) in enumerate(zip(prompts, candidates)):
        own = rewards[:, start : start + len(texts)]
        start += len(texts)
        rank = ranks(own)
        listed = [
            {"text": answer, "count": count, "ranks": each}
            for answer, count, each in zip(texts, counts, rank.T.tolist())
        ]
        row = {
            "prompt": prompt,
            "mode": args.mode,
            "weights": alpha.tolist(),
            "candidates": listed,
        } | respond(
            args.mode,
            texts,
            rank,
            favourites(own),
            alpha,
            rng.choice(len(alpha), args.draws, p=alpha),
            agreed,
            len(examples),
        )
        print(
            json.dumps(row, ensure_ascii=False)
            if args.json
            else "\n" * (number > 0) + "\n".join(shown(row))
        )


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help="the prompt (default: --file, else stdin)")
    add("--file", type=Path, help="prompts, one a line, or rows of prompt")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--mode", choices=("overton", "consensus", "distributional", "steerable"))
    which.add_argument(
        "--table",
        dest="mode",
        action="store_const",
        const="table",
        help="every member's favourite side by side",
    )
    add(
        "--like",
        type=Path,
        metavar="EXAMPLES",
        help="steerable: the user's comparisons, .jsonl, .json, .csv or .parquet",
    )
    add(
        "--draws", type=cli.natural, default=1, help="distributional: members drawn for each prompt"
    )
    add("--n", type=cli.natural, default=16, help="candidates sampled for each prompt")
    sampling.add_flags(parser, 0.9, 256)
    add("--json", action="store_true", help="one JSON object a prompt instead of text")
    add_arguments(parser)
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
