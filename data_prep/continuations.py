"""Continuations for the diversity measurement (section 5, figure 3).

    python data_prep/continuations.py --run runs/demo --base runs/demo/base --prompts 10 --count 20

They are sampled answers of the base model to held-out prompts: those of RUN/prompts.parquet where
data_prep/prism.py made it, else prompts drawn from the test split. (The demo's take seconds.)
Writes RUN/continuations.parquet, a row a prompt, which every member scores:

    prompt_id  str
    messages   list of {role, content}
    texts      list of str, as many in every row; equal ones may be among them, and are counted
    logprob    list of float, optional: log-probability of the text and its end, under the base at
               temperature 1 and over all tokens; appendix A needs it

A file of this form from a faster engine serves as well: put it there before the members are
trained, and give run_all.sh --continuations 0. A killed call goes on with the prompt that it was
at.
"""

from pairwise import (
    chats,
    cli,
    data,
    files,
    manifest,
    pretrained,
    provenance,
    reward_model,
    rows,
    sampling,
)

import numpy as np
import pyarrow as pa
import torch


def held_out_prompts(run):
    """Return (prompt_ids, messages, what they are) of the prompts to choose from."""
    path = run / "prompts.parquet"
    if not path.exists():
        test = data.read_split(run, "test")
        return test.prompt_id, test.messages, "test prompts"
    manifest.check(run, path)
    ids, asked, fields = [], [], {"prompt_id": "text", "messages": "messages"}
    for where, row in rows.read_rows(path, fields):
        ids.append(rows.text(where, "prompt_id", row.get("prompt_id")))
        asked.append(rows.messages(where, row.get("messages")))
    if not ids:
        raise cli.InputError(f"{path}: no prompt found, at least 1 expected")
    return ids, asked, "prompts of prompts.parquet"


def answer(args, model, tokenizer, prompt, number, longest):
    """Return the texts and log-probabilities of the answers to a prompt (token ids).

    Each prompt has a seed of its own, so that it does not matter where a killed call went on.
    """
    torch.manual_seed(int(np.random.SeedSequence([args.seed, number]).generate_state(1)[0]))
    nucleus = (args.temperature, args.top_p, longest)
    with pretrained.readable(f"--base {args.base}: no answer could be sampled"):
        texts, logprob = sampling.sample(model, tokenizer, prompt, args.count, *nucleus)
    return {"texts": texts, "logprob": logprob}


def write_table(path, answered):
    """Write rows, dicts of the columns, as Parquet."""
    files.write_parquet(path, pa.Table.from_pylist(answered))


def main(args):
    """Sample the continuations of every prompt drawn, unless that is done."""
    run, path = args.run, args.run / "continuations.parquet"
    prompt_id, messages, kind = held_out_prompts(run)
    count = min(args.prompts, len(prompt_id))
    if count < args.prompts:
        limit = f"only {count} {kind} for --prompts {args.prompts}"
        print(f"continuations: {limit}, all of them taken")
    flags = ("prompts", "count", "temperature", "top_p", "max_tokens", "seed")
    tokenizer = provenance.open_base(args)
    settings = {flag: getattr(args, flag) for flag in flags}
    settings |= {"date": args.date} if args.date else {}
    inputs = data.hashes(run) | provenance.base_hashes(args.base, args.chat_template)
    if (run / "prompts.parquet").exists():
        inputs["prompts.parquet"] = files.hash_file(run / "prompts.parquet")
    if manifest.stage_done(run, "continuations", settings, inputs, [path]):
        print(f"continuations: {path} is there, skipped")
        return
    reward_model.settle(args)
    model = sampling.load_language_model(args.base, args.device)
    rng = np.random.default_rng([args.seed, 3])
    drawn = sorted(rng.choice(len(prompt_id), count, replace=False).tolist())
    encoded = [chats.encode(tokenizer, messages[number]) for number in drawn]
    # Every prompt must fit before the first is answered.
    longest = [
        sampling.room(model, ids, args.max_tokens, f"prompt {prompt_id[number]}")
        for number, ids in zip(drawn, encoded)
    ]
    reward_model.check_tokens(model, encoded)
    started = manifest.begin_stage(run, "continuations", settings, inputs)

    def row_of(i):
        prompt = {"prompt_id": prompt_id[drawn[i]], "messages": messages[drawn[i]]}
        return prompt | answer(args, model, tokenizer, encoded[i], drawn[i], longest[i])

    key = settings | inputs
    answered = sampling.remembered_rows(path, key, count, row_of, "continuations", write_table)
    manifest.end_stage(run, "continuations", settings, inputs, started, threads=args.threads)
    repeated = sum(args.count - len(set(row["texts"])) for row in answered)
    print(
        f"continuations: {args.count} for each of {count} {kind}; "
        f"{repeated:,} of {args.count * count:,} repeat another of the same prompt"
    )


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--run", required=True, type=cli.path, help="run directory with data/")
    add("--base", required=True, help="base model: hub id or transformers directory")
    reward_model.add_flags(parser)
    provenance.add_flags(parser)
    sampling.add_flags(parser, 1.0, 256)
    prompts_help = "prompts, drawn by the seed; all where there are fewer"
    add("--prompts", type=cli.natural, default=50, help=prompts_help)
    add("--count", type=cli.natural, default=100, help="continuations of each")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
