"""Synthetic judgments for `train_rm.py --loss margin --margin-from judgments`, where a data set has one vote a pair (Beyond the Binary, section 3.3).

    python extras/synthetic_judgments.py --run runs/mine --base NAME_OR_DIR

A causal language model is asked --count times which of the two responses is better: half of the times with each of them first, so that a liking for
the first or for "A" cancels. Writes RUN/judgments.jsonl (a line a train prompt: every raw answer) and adds the column `judgments`, counts {a, b} per pair,
to RUN/data/train.parquet, where they never replace a vote. An answer that names not exactly one choice counts for neither side. To be run right after the data.
"""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pairwise import cli, data, run_dir, sampling
from pairwise.reward_model import (
    add_flags,
    base_hashes,
    encode,
    load_language_model,
    load_tokenizer,
)
from pairwise.sampling import room, sample

QUESTION = """Two answers to the same message follow the conversation below. Say which one most people would rather have got: the one that is \
correct where there is a right answer, and helpful without doing harm where there is none. Reply with "Choice: A" or "Choice: B" and nothing else.

Conversation:
{conversation}

Answer A:
{first}

Answer B:
{second}"""


def question(messages, first, second):
    """The chat that asks for a choice between two answers to a conversation, `first` being called A."""
    conversation = "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
    return [
        {
            "role": "user",
            "content": QUESTION.format(conversation=conversation, first=first, second=second),
        }
    ]


def choice(answer):
    """ "A" or "B", or None where the answer names not exactly one of them."""
    named = {
        letter.upper() for letter in re.findall(r"\bchoice:\W*([ab])\b", answer, re.IGNORECASE)
    }
    return named.pop() if len(named) == 1 else None


def count(asked):
    """{a, b}: the choices for each response of a pair; asked: {"a first": answers, "b first": answers}, raw."""
    choices = [(choice(answer), order) for order, answers in asked.items() for answer in answers]
    for_a = sum(
        (letter, order) in (("A", "a first"), ("B", "b first")) for letter, order in choices
    )
    return {"a": for_a, "b": sum(letter is not None for letter, _ in choices) - for_a}


def ask(model, tokenizer, chat, times, args):
    """`times` raw answers of the model, by nucleus sampling."""
    prompt = encode(tokenizer, chat)
    return sample(
        model,
        tokenizer,
        prompt,
        times,
        args.temperature,
        args.top_p,
        room(model, prompt, args.max_tokens, "a question"),
    )[0]


def main(args):
    run, path = args.run, args.run / "data" / "train.parquet"
    if not path.is_file():
        raise cli.InputError(f"{path}: no such file; data_prep/ makes it")
    table = pq.read_table(path)
    rows = table.to_pylist()
    settings = {
        name: getattr(args, name)
        for name in ("count", "top_p", "temperature", "max_tokens", "seed")
    }
    texts = [
        (
            row["prompt_id"],
            row["messages"],
            row["responses"],
            [(pair["a"], pair["b"]) for pair in row["pairs"]],
        )
        for row in rows
    ]
    inputs = {
        "texts of data/train.parquet": hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    } | base_hashes(args.base, args.chat_template)
    if (
        run_dir.stage_done(run, "judgments", settings, inputs, [run / "judgments.jsonl"])
        and "judgments" in table.column_names
    ):
        print(f"judgments: {run / 'judgments.jsonl'} is there, skipped")
        return
    later = run_dir.read_json(run / "manifest.json", {"stages": {}})["stages"].keys() - {
        "data",
        "judgments",
    }
    if later:
        raise cli.InputError(
            f"{path}: {min(later)} was made from it already; judgments come first, right after the data, in another --run"
        )
    tokenizer = load_tokenizer(args.base, args.chat_template)
    started = run_dir.begin_stage(run, "judgments", settings, inputs)
    torch.set_num_threads(args.threads)
    model = load_language_model(args.base, args.device)

    def answers(number):
        """Every raw answer about the pairs of a prompt; its own seed, so that it does not matter where a killed run went on."""
        torch.manual_seed(int(np.random.SeedSequence([args.seed, number]).generate_state(1)[0]))
        row, out = rows[number], []
        for pair in row["pairs"]:
            a, b = row["responses"][pair["a"]], row["responses"][pair["b"]]
            half = args.count // 2
            out.append(
                {
                    "a first": ask(model, tokenizer, question(row["messages"], a, b), half, args),
                    "b first": ask(model, tokenizer, question(row["messages"], b, a), half, args),
                }
            )
        return {"prompt_id": row["prompt_id"], "pairs": out}

    found = sampling.remembered_rows(
        run / "judgments.jsonl", settings | inputs, len(rows), answers, "judgments"
    )
    counts = [[count(asked) for asked in row["pairs"]] for row in found]
    if "judgments" in table.column_names:
        table = table.drop_columns("judgments")
    with run_dir.replacing(path) as partial:
        pq.write_table(
            table.append_column("judgments", pa.array(counts, data.JUDGMENTS)),
            partial,
            compression="zstd",
        )
    run_dir.end_stage(run, "judgments", settings, inputs, started, threads=args.threads)
    asked = args.count * sum(map(len, counts))
    parsed = sum(pair["a"] + pair["b"] for pairs in counts for pair in pairs)
    print(
        f"judgments: {args.count} for each of {asked // args.count:,} pairs of {path}; {asked - parsed:,} of {asked:,} answers name no choice"
    )


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add(
        "--run",
        required=True,
        type=Path,
        help="run directory with data/, before its first member is trained",
    )
    add(
        "--base",
        required=True,
        help="instruction-tuned causal language model: hub id or transformers directory",
    )
    add_flags(parser)
    sampling.add_flags(parser, 0.9, 8)
    add(
        "--count",
        type=cli.natural,
        default=10,
        help="judgments of each pair, half of them in each order: an even number (the paper: 10)",
    )
    args = parser.parse_args(argv)
    if args.count % 2:
        parser.error(f"--count {args.count}: an even number expected, half of it for each order")
    return args


if __name__ == "__main__":
    cli.run_main(main, parse_args())
