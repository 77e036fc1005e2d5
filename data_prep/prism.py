"""PRISM: prompts on values and controversies, for the diversity measurement (section 5, figure 3).

    python data_prep/prism.py --run runs/multipref            (from the hub: conversations)
    python data_prep/prism.py --run runs/multipref --source conversations.jsonl

Source: HannahRoseKirk/prism-alignment. Writes RUN/prompts.parquet: prompt_id and messages of
--count opening prompts in English, drawn by the seed from the conversations that were to be about
values or about a controversy. data_prep/continuations.py then takes these instead of test prompts.
None of them is a train prompt of RUN/data.

The paper's 50 are not published. The conversations name no language, so English is told by its
commonest words (`is_english`).
"""

import os
import re

from pairwise import cli, data, files, manifest, rows
from pairwise.prepare import published

import numpy as np
import pyarrow as pa

TYPES = ("unguided", "values guided", "controversy guided")
DATA = published.Published(
    name="prism",
    hub="HannahRoseKirk/prism-alignment",
    options={"name": "conversations"},
    files="conversations.jsonl",
    rows={"train": 8011},
    fields=("conversation_id", "conversation_type", "opening_prompt"),
)
# They are common in English, and no words of the other languages that PRISM's prompts are in (so
# a, as, best, by, do, for, has, i, in, is, of, on, was and will are not among them).
WORDS = frozenset(
    """about and any are because believe but can could did does feel find from get give god good
    have help how if into it its know life like make many money more most much my not one other
    people right should some than that the their them there they think this to true want what when
    where which who why with world would wrong you your""".split()
)


def is_english(prompt):
    """Tell whether a quarter of the words or more are in WORDS, and nearly all letters ASCII."""
    words = re.findall(r"[^\W\d_]+", prompt.lower())
    letters = "".join(words)
    ascii_letters = sum(letter.isascii() for letter in letters)
    common_words = sum(word in WORDS for word in words)
    return common_words >= max(1, len(words) / 4) and ascii_letters >= 0.95 * len(letters)


def opening_prompts(source_rows):
    """Return {prompt: conversation_id} of the distinct opening prompts of the kind."""
    ids = {}
    for _, where, row in source_rows:
        kind = rows.one_of(where, "conversation_type", row.get("conversation_type"), TYPES)
        prompt = rows.string(where, "opening_prompt", row.get("opening_prompt")).strip()
        if kind != "unguided" and is_english(prompt):
            conversation_id = rows.text(where, "conversation_id", row.get("conversation_id"))
            ids.setdefault(prompt, conversation_id)
    return ids


def main(args):
    run, train = args.run, data.read_split(args.run, "train")
    # run_all.sh, which sets PAIRWISE_COMMAND, has its own name for the flag.
    flag = "--prism-source" if os.environ.get("PAIRWISE_COMMAND") else "--source"
    source, path = published.Source(args, DATA, flag), run / "prompts.parquet"
    settings, inputs = {"count": args.count, "seed": args.seed}, data.hashes(run) | source.inputs
    if manifest.stage_done(run, "prompts", settings, inputs, [path]):
        print(f"prompts: {path} is there, skipped")
        return
    ids = opening_prompts(source.rows())
    for messages in train.messages:
        if len(messages) == 1:
            ids.pop(messages[0]["content"].strip(), None)
    if not ids:
        kind = "English prompt of a values guided or controversy guided conversation"
        raise cli.InputError(f"{DATA.hub}: no {kind} found, {args.count} expected")
    if len(ids) < args.count:
        print(f"prompts: only {len(ids)} of the kind, all of them taken")
    order = np.random.default_rng([args.seed, 4]).permutation(len(ids))[: args.count]
    candidates = [
        {"prompt_id": conversation_id, "messages": [{"role": "user", "content": prompt}]}
        for prompt, conversation_id in ids.items()
    ]
    prompt_rows = [candidates[i] for i in sorted(order)]
    started = manifest.begin_stage(run, "prompts", settings, inputs)
    with files.replacing(path) as partial:
        files.write_parquet(partial, pa.Table.from_pylist(prompt_rows))
    manifest.end_stage(run, "prompts", settings, inputs, started, source=source.facts)
    counts = f"{len(prompt_rows)} of {len(ids):,}"
    print(f"prompts: {counts} English prompts on values or a controversy")


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--run", required=True, type=cli.path, help="run directory with data/")
    published.add_source_flags(parser)
    parser.add_argument("--count", type=cli.natural, default=50, help="prompts")
    parser.add_argument("--seed", type=cli.seed, default=0, help="of the draw of prompts")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
