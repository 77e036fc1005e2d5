"""Continuations for the diversity measurement: sampled answers of the base model to held-out prompts (section 5, figure 3).

The prompts are those of RUN/prompts.parquet where data_prep/prism.py made it, else drawn from the test split.

    python data_prep/continuations.py --run runs/demo --base runs/demo/base --prompts 10 --count 20          (seconds)

Writes RUN/continuations.parquet: prompt_id, messages, texts (list of count), logprob (list of count: of the text and its end, under
the base model at temperature 1). Every member scores them; their rankings are compared by Kendall's tau.
"""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm
from transformers import GenerationConfig

from pairwise.reward_model import base_hashes, device, encode, load_language_model, load_tokenizer
from pairwise.run_dir import (
    Parser, begin_stage, data_hashes, end_stage, hash_file, natural, positive, read_split, replacing, run_main, seed, stage_done)

AT_ONCE = 20  # answers sampled together: bounds the memory that keys, values and logits take


@torch.no_grad()
def sample(model, tokenizer, messages, count, temperature, max_tokens):
    """`count` answers to one prompt, sampled from the whole vocabulary: (texts, log-probabilities at temperature 1)."""
    prompt = torch.tensor([encode(tokenizer, messages)], device=model.device)
    eos = model.generation_config.eos_token_id  # one, several or none
    config = GenerationConfig(  # not the base's own, which may bend the distribution
        do_sample=True, temperature=temperature, top_k=0, top_p=1.0, num_return_sequences=count, max_new_tokens=max_tokens,
        eos_token_id=eos, pad_token_id=tokenizer.pad_token_id)
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
    answer = out[:, prompt.shape[1] :]
    ends = torch.isin(answer, torch.tensor(-1 if eos is None else eos, device=answer.device)).long()
    real = ends.cumsum(1) - ends == 0  # up to the first end; a pad token before it was sampled like any other
    mask = torch.cat([torch.ones_like(out[:, : prompt.shape[1]]), real.long()], dim=1)
    logits = model(input_ids=out, attention_mask=mask, logits_to_keep=answer.shape[1] + 1).logits[:, :-1].float()
    each = logits.log_softmax(-1).gather(-1, answer[..., None]).squeeze(-1)
    return tokenizer.batch_decode(answer, skip_special_tokens=True), (each * real).sum(1).tolist()


def held_out_prompts(run):
    """(prompt_ids, messages, what they are) of the prompts to choose from."""
    path = run / "prompts.parquet"
    if not path.exists():
        test = read_split(run, "test")
        return test.prompt_id, test.messages, "test prompts"
    table = pq.read_table(path)
    return table["prompt_id"].to_pylist(), table["messages"].to_pylist(), "prompts of prompts.parquet"


def main(args):
    run = args.run
    prompt_id, messages, which = held_out_prompts(run)
    prompts = min(args.prompts, len(prompt_id))
    if prompts < args.prompts:
        print(f"continuations: only {prompts} {which} for --prompts {args.prompts}, all of them taken")
    settings = {name: getattr(args, name) for name in ("prompts", "count", "temperature", "max_tokens", "seed")}
    tokenizer = load_tokenizer(args.base, args.chat_template)
    inputs = data_hashes(run) | base_hashes(args.base, args.chat_template)
    if (run / "prompts.parquet").exists():
        inputs["prompts.parquet"] = hash_file(run / "prompts.parquet")
    if stage_done(run, "continuations", settings, inputs, [run / "continuations.parquet"]):
        print(f"continuations: {run / 'continuations.parquet'} is there, skipped")
        return
    started = begin_stage(run, "continuations", settings, inputs)
    torch.set_num_threads(args.threads)
    model = load_language_model(args.base, args.device)
    chosen = sorted(np.random.default_rng([args.seed, 3]).choice(len(prompt_id), prompts, replace=False))
    rows = []
    for number in tqdm(chosen, desc="continuations", unit="prompt", leave=False):
        torch.manual_seed(int(np.random.SeedSequence([args.seed, int(number)]).generate_state(1)[0]))
        texts, logprob = [], []
        while len(texts) < args.count:
            more = min(AT_ONCE, args.count - len(texts))
            for whole, part in zip((texts, logprob), sample(model, tokenizer, messages[number], more, args.temperature, args.max_tokens)):
                whole += part
        rows.append({"prompt_id": prompt_id[number], "messages": messages[number], "texts": texts, "logprob": logprob})
    with replacing(run / "continuations.parquet") as partial:
        pq.write_table(pa.Table.from_pylist(rows), partial, compression="zstd")
    end_stage(run, "continuations", settings, inputs, started, threads=args.threads)
    print(f"continuations: {args.count} for each of {prompts} {which}")


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--run", required=True, type=Path, help="run directory with data/")
    add("--base", required=True, help="base model: hub id or transformers directory")
    add("--chat-template", metavar="FILE", help="Jinja chat template, for a base without one")
    add("--prompts", type=natural, default=50, help="prompts, drawn by the seed; all where there are fewer")
    add("--count", type=natural, default=100, help="continuations of each")
    add("--temperature", type=positive, default=1.0)
    add("--max-tokens", type=natural, default=256, help="longest continuation")
    add("--seed", type=seed, default=0)
    add("--threads", type=natural, default=os.cpu_count(), help="CPU threads (default: all)")
    add("--device", type=device, default=device(), help="cpu or cuda (default: cuda where there is one)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_main(main, parse_args())
