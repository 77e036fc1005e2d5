"""PRISM (HannahRoseKirk/prism-alignment): prompts on values and controversies, for the diversity measurement (section 5, figure 3).

    python data_prep/prism.py --run runs/multipref                           (from the hub: conversations)
    python data_prep/prism.py --run runs/multipref --source conversations.jsonl

Writes RUN/prompts.parquet: prompt_id and messages of --count opening prompts in English, drawn by the seed from the conversations that were to be
about values or about a controversy. data_prep/continuations.py then takes these instead of test prompts. None of them is a train prompt of RUN/data.

The paper's 50 are not published. The conversations name no language, so English is told by its commonest words (`is_english`).
"""

import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pairwise import cli, data, run_dir
from pairwise.prepare.published import Published, Source, add_source_arguments
from pairwise.rows import one_of, string, text

TYPES = ("unguided", "values guided", "controversy guided")
DATA = Published(
    "prism",
    "HannahRoseKirk/prism-alignment",
    {"name": "conversations"},
    "conversations.jsonl",
    {"train": 8011},
    ("conversation_id", "conversation_type", "opening_prompt"),
)
# Common in English, and not words of the other languages that PRISM's prompts are in (so not a, as, best, by, do, for, has, i, in, is, of, on, was, will).
WORDS = frozenset(
    """about and any are because believe but can could did does feel find from get give god good have help how if into it its know life like
    make many money more most much my not one other people right should some than that the their them there they think this to true want what when where
    which who why with world would wrong you your""".split()
)


def is_english(prompt):
    """True where at least a quarter of the words are common English ones and nearly all letters are ASCII."""
    words = re.findall(r"[^\W\d_]+", prompt.lower())
    letters = "".join(words)
    return sum(word in WORDS for word in words) >= max(1, len(words) / 4) and sum(
        letter.isascii() for letter in letters
    ) >= 0.95 * len(letters)


def opening_prompts(rows):
    """{prompt: conversation_id} of the distinct opening prompts in English on values or a controversy."""
    found = {}
    for _, where, row in rows:
        guided = (
            one_of(where, "conversation_type", row.get("conversation_type"), TYPES) != "unguided"
        )
        prompt = string(where, "opening_prompt", row.get("opening_prompt")).strip()
        if guided and is_english(prompt):
            found.setdefault(prompt, text(where, "conversation_id", row.get("conversation_id")))
    return found


def main(args):
    run, train = args.run, data.read_split(args.run, "train")
    source = Source(
        args, DATA, "--prism-source" if os.environ.get("PAIRWISE_COMMAND") else "--source"
    )
    settings, inputs = {"count": args.count, "seed": args.seed}, data.hashes(run) | source.inputs
    if run_dir.stage_done(run, "prompts", settings, inputs, [run / "prompts.parquet"]):
        print(f"prompts: {run / 'prompts.parquet'} is there, skipped")
        return
    trained = {messages[0]["content"].strip() for messages in train.messages if len(messages) == 1}
    prompts = {
        prompt: name
        for prompt, name in opening_prompts(source.rows()).items()
        if prompt not in trained
    }
    if not prompts:
        raise cli.InputError(
            f"{DATA.hub}: no English prompt of a values guided or controversy guided conversation found, {args.count} expected"
        )
    if len(prompts) < args.count:
        print(f"prompts: only {len(prompts)} of the kind, all of them taken")
    order = np.random.default_rng([args.seed, 4]).permutation(len(prompts))[: args.count]
    listed = list(prompts.items())
    rows = [
        {"prompt_id": name, "messages": [{"role": "user", "content": prompt}]}
        for prompt, name in (listed[i] for i in sorted(order))
    ]
    started = run_dir.begin_stage(run, "prompts", settings, inputs)
    with run_dir.replacing(run / "prompts.parquet") as partial:
        pq.write_table(pa.Table.from_pylist(rows), partial, compression="zstd")
    run_dir.end_stage(run, "prompts", settings, inputs, started, source=source.facts)
    print(f"prompts: {len(rows)} of {len(prompts):,} English prompts on values or a controversy")


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--run", required=True, type=Path, help="run directory with data/")
    add_source_arguments(parser)
    parser.add_argument("--count", type=cli.natural, default=50, help="prompts")
    parser.add_argument("--seed", type=cli.seed, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
