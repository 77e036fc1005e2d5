"""A split as preference pairs, in the one format that both TRL and RewardBench read.

    python extras/export_pairs.py --run runs/demo --split test --out pairs.jsonl            (or .parquet)

A row is a pair: chosen and rejected, each the conversation with the answer as its last turn, without a `prompt` column; p, the share of votes for
the chosen answer, above one half; n, the votes; pair_id. Pairs with p = 1/2 have no chosen answer and are left out, and counted. RewardBench takes
the turns for the user's and the assistant's by turns, so a system text is put in front of the first user turn.
"""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pairwise import cli, data, run_dir


def conversation(messages):
    """Messages as turns of user and assistant by turns; a system text, and turns of one role in succession, become one turn."""
    turns = []
    for message in messages:
        role = "assistant" if message["role"] == "assistant" else "user"
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += "\n\n" + message["content"]
        else:
            turns.append({"role": role, "content": message["content"]})
    return turns


def pairs(split):
    """The exported row of every pair of a Split that has a majority."""
    prompt = 0
    answers = [answer for responses in split.responses for answer in responses]
    for pair, (a, b, p, n) in enumerate(zip(split.a, split.b, split.p, split.n)):
        while pair >= split.pair_start[prompt + 1]:
            prompt += 1
        if p == 0.5:
            continue
        if p < 0.5:
            a, b, p = b, a, 1 - p
        turns = conversation(split.messages[prompt])
        chosen, rejected = ([*turns, {"role": "assistant", "content": answers[i]}] for i in (a, b))
        first = split.response_start[prompt]
        yield {
            "chosen": chosen,
            "rejected": rejected,
            "p": float(p),
            "n": float(n),
            "pair_id": f"{split.prompt_id[prompt]}/{a - first}/{b - first}",
        }


def main(args):
    split = data.read_split(args.run, args.split)
    rows = list(pairs(split))
    if not rows:
        raise cli.InputError(
            f"{args.run}: every {args.split} pair has p = 1/2, none can be exported"
        )
    with run_dir.replacing(args.out) as partial:
        if args.out.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), partial, compression="zstd")
        else:
            partial.write_text(
                "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
                encoding="utf-8",
            )
    print(
        f"export: {len(rows):,} pairs in {args.out}, {len(split.a) - len(rows):,} with p = 1/2 left out"
    )


def output(text):
    """argparse type: a file that ends in .jsonl or .parquet."""
    path = Path(text)
    if path.suffix not in (".jsonl", ".parquet"):
        raise ValueError
    return path


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--run", required=True, type=Path, help="run directory with data/")
    parser.add_argument("--split", choices=data.SPLITS, default="test")
    parser.add_argument(
        "--out", required=True, type=output, metavar="FILE", help="ends in .jsonl or .parquet"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
