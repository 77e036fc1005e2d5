"""Score new responses with a trained run: the rewards of all members and the share of the ensemble that prefers each response.

    python score.py --run runs/demo FILE                        (FILE-scores.jsonl, a row per input row)
    python score.py --run runs/demo FILE --out scores.csv       (a row per pair)

FILE: .jsonl, .json, .csv or .parquet (also .gz), rows of `prompt` (text or chat messages) and `responses` (a list), or
`response_a` and `response_b`.   JSONL out: {prompt, responses, rewards: [responses x K], p_hat: [[a, b, p], ..]} with p the weighted share
of members that prefer responses[a] to responses[b] (section 2).   CSV out: row, prompt, response_a, response_b, reward_a_1.., reward_b_1.., p_hat.
"""

import csv
import io
import json
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from pairwise import cli, run_dir
from pairwise.members import add_arguments, open_run, rewards_of_run
from pairwise.rows import kind, messages, read_rows, text, wrong

evaluator = cli.import_evaluator()
FIELDS = {"prompt": "messages", "responses": "json", "response_a": "text", "response_b": "text"}


def read_questions(path):
    """[(prompt as given, messages, responses)] of every row. Raises InputError with the row, field, what was found and expected."""
    questions = []
    for where, row in read_rows(path, FIELDS):
        if "responses" in row:
            responses = row["responses"]
            if not isinstance(responses, list) or not responses:
                raise wrong(where, "responses", responses, "a list of responses")
        else:
            responses = [row.get("response_a"), row.get("response_b")]
        questions.append(
            (
                row.get("prompt"),
                messages(where, row.get("prompt")),
                [text(where, "response", response) for response in responses],
            )
        )
    if not questions:
        raise cli.InputError(f"{path}: no row found, at least one expected")
    return questions


def answers(questions, rewards, alpha):
    """Yield {prompt, responses, rewards, p_hat} for every question; rewards float32 (k, R), alpha (k,)."""
    start = 0
    for prompt, _, responses in questions:
        own = np.ascontiguousarray(rewards[:, start : start + len(responses)])
        start += len(responses)
        a, b = (
            np.array(list(combinations(range(len(responses)), 2)), np.int64).reshape(-1, 2).T.copy()
        )
        p_hat = alpha @ evaluator.votes(own, a, b) / 2
        yield {
            "prompt": prompt,
            "responses": responses,
            "rewards": own.T.tolist(),
            "p_hat": [[int(i), int(j), float(p)] for i, j, p in zip(a, b, p_hat)],
        }


def as_csv(rows, k):
    """CSV text with a row for every pair of every question."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(
        [
            "row",
            "prompt",
            "response_a",
            "response_b",
            *(f"reward_{side}_{j}" for side in "ab" for j in range(1, k + 1)),
            "p_hat",
        ]
    )
    for number, row in enumerate(rows, 1):
        prompt = (
            row["prompt"]
            if isinstance(row["prompt"], str)
            else json.dumps(row["prompt"], ensure_ascii=False)
        )
        for a, b, p in row["p_hat"]:
            writer.writerow(
                [
                    number,
                    prompt,
                    row["responses"][a],
                    row["responses"][b],
                    *row["rewards"][a],
                    *row["rewards"][b],
                    p,
                ]
            )
    return out.getvalue()


def main(args):
    torch.set_num_threads(args.threads)
    questions = read_questions(args.file)
    out = args.out or args.file.with_name(kind(args.file)[0] + "-scores.jsonl")
    if out.is_dir() or out.resolve() == args.file.resolve():
        raise cli.InputError(
            f"--out {out}: {'a directory' if out.is_dir() else 'the file of questions itself'} found, another file expected"
        )
    alpha, settings = open_run(args)
    k = len(alpha)
    rows = answers(questions, rewards_of_run(args.run, k, settings, questions, args), alpha)
    with (
        run_dir.replacing(out) as partial,
        open(partial, "w", encoding="utf-8", newline="") as file,
    ):
        file.write(
            as_csv(rows, k)
            if out.suffix == ".csv"
            else "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        )
    print(f"{out}: {len(questions)} prompts, {k} members")


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="rows of prompt and responses")
    add("--out", type=Path, help="FILE.jsonl or FILE.csv (default: beside FILE, -scores.jsonl)")
    add_arguments(parser)
    args = parser.parse_args(argv)
    if args.out and args.out.suffix not in (".jsonl", ".csv"):
        parser.error(f"--out {args.out}: a name ending in .jsonl or .csv expected")
    return args


if __name__ == "__main__":
    cli.run_main(main, parse_args())
