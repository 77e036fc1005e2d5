"""A file of votes of three professional writers on paragraphs: writing.jsonl.gz of docs/results.md.

    git clone https://github.com/salesforce/creativity_eval
    python experiments/writing.py --source creativity_eval --out writing.jsonl.gz

Source: salesforce/creativity_eval, BSD-3-Clause, Writing_Alignment/preference_ranking: batches of
prompts with three paragraphs each (a model's, a writer's edit of it and a model's edit), which
three writers ranked. In batchN/, WRITER.json has what a writer saw, a list of {instruction_id,
instruction, responses [text, ..]}, and WRITER_rankings.json what was ranked how, a list of
{instruction_id, rank_1, rank_2, rank_3}, each "Response n", n from 1. Who ranked is not kept.

Of every two paragraphs of a prompt a row {prompt, response_a, response_b, votes_a, votes_b} says
how many writers ranked which higher; response_a is the one that the first of them did. White space
around a paragraph does not count. Where writers saw texts that differ, so do the rows.
"""

import gzip
import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pairwise import cli, files, rows

FOLDER = Path("Writing_Alignment", "preference_ranking")
SEEN = [{"instruction_id": int, "instruction": str, "responses": [str]}]
RANKED = [{"instruction_id": int, "rank_1": str, "rank_2": str, "rank_3": str}]


def batches(source):
    """The folders of the batches, in order, of a clone or its preference_ranking."""
    for folder in (source / FOLDER, source):
        if found := [path for path in folder.glob("batch*") if path.name[5:].isdecimal()]:
            return sorted(found, key=lambda path: int(path.name[5:]))
    raise cli.InputError(f"{source}: no {FOLDER}/batch1 found, a clone of creativity_eval expected")


def read_rankings(batch):
    """Yield (prompt, its paragraphs from the best to the worst) of every ranking of a batch, one
    writer after another. Raises InputError where a file or an entry is not as above."""
    paths = sorted(batch.glob("*_rankings.json"))
    if not paths:
        raise cli.InputError(f"{batch}: no WRITER_rankings.json found")
    for path in paths:
        of_writer = path.with_name(path.name.replace("_rankings", ""))
        seen = {entry["instruction_id"]: entry for entry in files.read_json(of_writer, SEEN)}
        for i, entry in enumerate(files.read_json(path, RANKED)):
            where, number = f"{path}: [{i}]", entry["instruction_id"]
            if number not in seen:
                raise rows.wrong(where, "instruction_id", number, f"one of {of_writer.name}")
            of_prompt = f"{of_writer}: instruction_id {number}"
            responses = seen[number]["responses"]
            texts = [rows.text(of_prompt, "responses", text).strip() for text in responses]
            names = {f"Response {n}": text for n, text in enumerate(texts, 1)}
            ranks = [entry[f"rank_{n}"] for n in (1, 2, 3)]
            if sorted(ranks) != sorted(names):
                raise rows.wrong(where, "rank_1 to 3", ranks, f"each of {', '.join(names)} once")
            prompt = rows.text(of_prompt, "instruction", seen[number]["instruction"])
            yield prompt, [names[rank] for rank in ranks]


def pairs(rankings):
    """Rows of votes (see above), of (prompt, paragraphs from the best to the worst), ..; of equal
    paragraphs the better place counts."""
    found = {}
    for prompt, ranking in rankings:
        for better, worse in itertools.combinations(dict.fromkeys(ranking), 2):
            row = {"prompt": prompt, "response_a": better, "response_b": worse}
            row |= {"votes_a": 0, "votes_b": 0}
            row = found.setdefault((prompt, *sorted((better, worse))), row)
            row["votes_a" if row["response_a"] == better else "votes_b"] += 1
    return list(found.values())


def main(args):
    table = pairs(ranking for batch in batches(args.source) for ranking in read_rankings(batch))
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table)
    with files.replacing(args.out) as partial:
        partial.write_bytes(gzip.compress(lines.encode(), mtime=0))
    prompts = len({row["prompt"] for row in table})
    print(f"{args.out}: {len(table)} pairs of {prompts} prompts")


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--source", required=True, type=cli.path, help="the clone, or its preference_ranking")
    add("--out", required=True, type=cli.path, help="FILE.jsonl.gz")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
