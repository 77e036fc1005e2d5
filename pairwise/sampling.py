"""Answers sampled from a causal language model."""

import copy
import json

from pairwise import bases, cli, files

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, Cache, GenerationConfig

AT_ONCE = 20  # Answers sampled together; this bounds the memory of keys, values and logits.


top_p = cli.number_type(
    "top-p", cli.decimal, lambda v: 0 < v <= 1, "a number above 0 and at most 1"
)


def add_flags(parser, nucleus, longest):
    """Add the flags of sampling, with the defaults of --top-p and --max-tokens."""
    add = parser.add_argument
    add("--temperature", type=cli.positive, default=1.0, help="of the sampling")
    words = "sample each token from the likeliest that together have this probability"
    add("--top-p", type=top_p, default=nucleus, help=words)
    add("--max-tokens", type=cli.natural, default=longest, help="longest answer")
    add("--seed", type=cli.seed, default=0, help="of all that is drawn")


def load_language_model(base, device):
    """Return the base as it is, to sample text from: in BF16 on a GPU, in float32 on a CPU.

    Raises InputError where it cannot be read, or has no head for tokens, as a reward model."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    failure = "no causal language model could be loaded"
    model, missing = bases.read_model(AutoModelForCausalLM, base, "--base", failure, dtype=dtype)
    if missing:
        words = f"no causal language model: weights are missing: {', '.join(missing[:5])}"
        raise cli.InputError(f"--base {base}: {words}")
    return model.eval().to(device)


def room(model, prompt, max_tokens, where):
    """Return the tokens that an answer to a prompt (token ids) may have: max_tokens, or what the
    model's context leaves. Raises InputError where it leaves none."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**63
    if len(prompt) >= context:
        words = f"at most {context - 1} expected, as the model's context is {context}"
        raise cli.InputError(f"{where}: {len(prompt)} tokens found, {words}")
    return min(max_tokens, context - len(prompt))


@torch.no_grad()
def sample(model, tokenizer, prompt, count, temperature, top_p, max_tokens):
    """Return `count` answers to a prompt, token ids as of `encode`, and their log-probabilities.

    Those are at temperature 1 and over the whole vocabulary. All but the prompt's last token is run
    once: each AT_ONCE answers go on from a copy of its keys, values and states. A model that keeps
    them in a way of its own, or none, runs it anew."""
    eos = model.generation_config.eos_token_id  # one, several or none
    options = {"temperature": temperature, "top_k": 0, "top_p": top_p, "max_new_tokens": max_tokens}
    options |= {"eos_token_id": eos, "pad_token_id": tokenizer.pad_token_id, "do_sample": True}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    config = GenerationConfig(**options)  # The base's own may bend the distribution.
    ids = torch.tensor([prompt], device=model.device)
    ends = torch.tensor(-1 if eos is None else eos, device=model.device)
    prefix, texts, logprob = None, [], []
    if len(prompt) > 1:
        out = model.base_model(input_ids=ids[:, :-1], use_cache=True)
        prefix = getattr(out, "past_key_values", None)
        parts = prefix, *getattr(prefix, "layers", ())
        if any(type(part).__module__ != Cache.__module__ for part in parts):
            prefix = None  # It may hold more than reorder_cache() knows of, as MiniMax's does.
    while len(texts) < count:
        copies = ids.repeat(min(AT_ONCE, count - len(texts)), 1)
        past = copy.deepcopy(prefix)
        if past is not None:
            past.reorder_cache(ids.new_zeros(len(copies)))
        cache = {"attention_mask": torch.ones_like(copies), "past_key_values": past}
        out = model.generate(copies, generation_config=config, **cache)
        answers = out.sequences[:, len(prompt) :]
        ended = torch.isin(answers, ends).long()
        # A pad token before the first end was sampled like any other.
        real = ended.cumsum(1) - ended == 0
        # These logits are the model's own, before temperature and top-p.
        token_logprob = [
            logits.float().log_softmax(-1).gather(-1, token[:, None])[:, 0]
            for logits, token in zip(out.logits, answers.T)
        ]
        texts += tokenizer.batch_decode(answers, skip_special_tokens=True)
        logprob += (torch.stack(token_logprob, 1) * real).sum(1).tolist()
    return texts, logprob


def readable_lines(path):
    """Return the objects of a file of JSON lines up to the first line that is cut off or broken."""
    rows = []
    for line in path.read_bytes().split(b"\n")[:-1]:  # A line without its end was cut off.
        try:
            row = files.parse_json(line)
        except ValueError:
            break
        if not isinstance(row, dict):
            break
        rows.append(row)
    return rows


def remembered_rows(path, key, count, make, label, write=files.write_lines):
    """Return [make(i) for i in range(count)], dicts, after write(path, rows) has written them.

    Each row is stored beside `path` at once: after a killed call, one with the same key (a dict for
    JSON) goes on where that one was."""
    memory, rows = path.with_name(f".kept-{path.name}"), []
    if memory.exists():
        first, *rows = readable_lines(memory) or [None]
        rows = rows[:count] if first == key else []
    with files.replacing(memory, hashed=False) as partial:
        files.write_lines(partial, [key, *rows])
    progress = tqdm(initial=len(rows), total=count, desc=label, unit="prompt", leave=False)
    with progress, open(memory, "a", encoding="utf-8") as file:
        while len(rows) < count:
            rows.append(make(len(rows)))
            file.write(json.dumps(rows[-1]) + "\n")
            file.flush()
            progress.update()
    with files.replacing(path) as partial:
        write(partial, rows)
    memory.unlink()
    return rows
