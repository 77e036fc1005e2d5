"""Continuations for the diversity measurement: sampled answers of the base model to held-out prompts (section 5, figure 3).

The prompts are those of RUN/prompts.parquet where data_prep/prism.py made it, else drawn from the test split.

    python data_prep/continuations.py --run runs/demo --base runs/demo/base --prompts 10 --count 20          (seconds)

Writes RUN/continuations.parquet, a row a prompt, which every member scores:

    prompt_id  str
    messages   list of {role, content}
    texts      list of str, as many in every row; equal ones may be among them, and are counted
    logprob    list of float, optional: of the text and its end, under the base at temperature 1 and all tokens; appendix A needs it

A file of this form from a faster engine serves as well: put it there before the members are trained, and give run_all.sh --continuations 0.
A killed call goes on with the prompt that it was at.
"""

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


def held_out_prompts(run):
    """(prompt_ids, messages, what they are) of the prompts to choose from."""
    path = run / "prompts.parquet"
    if not path.exists():
        test = data.read_split(run, "test")
        return test.prompt_id, test.messages, "test prompts"
    table = pq.read_table(path)
    if not table.num_rows:
        raise cli.InputError(f"{path}: no prompt found, at least 1 expected")
    return (
        table["prompt_id"].to_pylist(),
        table["messages"].to_pylist(),
        "prompts of prompts.parquet",
    )


def main(args):
    run = args.run
    prompt_id, messages, which = held_out_prompts(run)
    prompts = min(args.prompts, len(prompt_id))
    if prompts < args.prompts:
        print(
            f"continuations: only {prompts} {which} for --prompts {args.prompts}, all of them taken"
        )
    settings = {
        name: getattr(args, name)
        for name in ("prompts", "count", "temperature", "top_p", "max_tokens", "seed")
    }
    tokenizer = load_tokenizer(args.base, args.chat_template)
    inputs = data.hashes(run) | base_hashes(args.base, args.chat_template)
    if (run / "prompts.parquet").exists():
        inputs["prompts.parquet"] = run_dir.hash_file(run / "prompts.parquet")
    path = run / "continuations.parquet"
    if run_dir.stage_done(run, "continuations", settings, inputs, [path]):
        print(f"continuations: {path} is there, skipped")
        return
    torch.set_num_threads(args.threads)
    model = load_language_model(args.base, args.device)
    chosen = sorted(
        np.random.default_rng([args.seed, 3])
        .choice(len(prompt_id), prompts, replace=False)
        .tolist()
    )
    encoded = [encode(tokenizer, messages[number]) for number in chosen]
    longest = [
        room(model, ids, args.max_tokens, f"prompt {prompt_id[number]}")
        for number, ids in zip(chosen, encoded)
    ]
    started = run_dir.begin_stage(run, "continuations", settings, inputs)

    def row(i):
        """A prompt's continuations; its own seed, so that it does not matter where a killed call went on."""
        number = chosen[i]
        torch.manual_seed(int(np.random.SeedSequence([args.seed, number]).generate_state(1)[0]))
        texts, logprob = sample(
            model, tokenizer, encoded[i], args.count, args.temperature, args.top_p, longest[i]
        )
        return {
            "prompt_id": prompt_id[number],
            "messages": messages[number],
            "texts": texts,
            "logprob": logprob,
        }

    def write(partial, rows):
        pq.write_table(pa.Table.from_pylist(rows), partial, compression="zstd")

    rows = sampling.remembered_rows(path, settings | inputs, prompts, row, "continuations", write)
    run_dir.end_stage(run, "continuations", settings, inputs, started, threads=args.threads)
    again = sum(args.count - len(set(row["texts"])) for row in rows)
    print(
        f"continuations: {args.count} for each of {prompts} {which}; {again:,} of {args.count * prompts:,} repeat another of the same prompt"
    )


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--run", required=True, type=Path, help="run directory with data/")
    add("--base", required=True, help="base model: hub id or transformers directory")
    add_flags(parser)
    sampling.add_flags(parser, 1.0, 256)
    add(
        "--prompts",
        type=cli.natural,
        default=50,
        help="prompts, drawn by the seed; all where there are fewer",
    )
    add("--count", type=cli.natural, default=100, help="continuations of each")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
