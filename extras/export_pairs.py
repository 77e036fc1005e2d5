"""A split as preference pairs, in the one format that both TRL and RewardBench read.

    python extras/export_pairs.py --run runs/demo --split test --out pairs.jsonl

FILE ends in .jsonl or .parquet. A row is a pair: chosen and rejected, each the conversation with
the answer as its last turn, without a `prompt` column; p, the fraction of the votes for the chosen
answer, above one half; n, the number of votes; pair_id. Pairs with p = 1/2 have no chosen answer
and are left out, and counted. RewardBench expects turns of the user and the assistant by turns, so
a system text is put in front of the first user turn.
"""

import argparse
import json

from pairwise import cli, data, files, run_dir

import numpy as np
import pyarrow as pa


def alternating_turns(messages):
    """Return messages as turns of user and assistant by turns.

    A system text counts as the user's. Turns of one role in succession become one turn.
    """
    turns = []
    for message in messages:
        role = "assistant" if message["role"] == "assistant" else "user"
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += "\n\n" + message["content"]
        else:
            turns.append({"role": role, "content": message["content"]})
    return turns


def pair_rows(split):
    """Yield the exported row of every pair of a Split that has a majority."""
    answers = [answer for responses in split.responses for answer in responses]
    prompt_of_pair = np.repeat(np.arange(len(split.messages)), np.diff(split.pair_start))
    for prompt, a, b, p, n in zip(prompt_of_pair, split.a, split.b, split.p, split.n):
        if p == 0.5:
            continue
        if p < 0.5:
            a, b, p = b, a, 1 - p
        turns = alternating_turns(split.messages[prompt])
        first = split.response_start[prompt]
        yield {
            "chosen": [*turns, {"role": "assistant", "content": answers[a]}],
            "rejected": [*turns, {"role": "assistant", "content": answers[b]}],
            "p": float(p),
            "n": float(n),
            "pair_id": f"{split.prompt_id[prompt]}/{a - first}/{b - first}",
        }


def main(args):
    split = data.read_split(args.run, args.split)
    rows = list(pair_rows(split))
    if not rows:
        no_majority = f"every {args.split} pair has p = 1/2"
        raise cli.InputError(f"{args.run}: {no_majority}, none can be exported")
    with files.replacing(args.out) as partial:
        if args.out.suffix == ".parquet":
            files.write_parquet(partial, pa.Table.from_pylist(rows))
        else:
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            partial.write_text("".join(lines), encoding="utf-8")
    left_out = f"{len(split.a) - len(rows):,} with p = 1/2 left out"
    print(f"export: {len(rows):,} pairs in {args.out}, {left_out}")


def output(text):
    """argparse type: a file that ends in .jsonl or .parquet."""
    path = run_dir.output(text)
    if path.suffix not in (".jsonl", ".parquet"):
        words = f"{text} found, a name ending in .jsonl or .parquet expected"
        raise argparse.ArgumentTypeError(words)
    return path


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    cli.add_run(parser, "run directory with data/")
    add("--split", choices=data.SPLITS, default="test", help="whose pairs (default: test)")
    add("--out", required=True, type=output, metavar="FILE", help="ends in .jsonl or .parquet")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
