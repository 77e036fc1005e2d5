"""Answers sampled from a causal language model."""

import argparse

import torch
from transformers import GenerationConfig

from pairwise.reward_model import encode
from pairwise.run_dir import InputError

AT_ONCE = 20  # answers sampled together: bounds the memory that keys, values and logits take


def top_p(text):
    """argparse type: a number in (0, 1]."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} found, a number above 0 and at most 1 expected")
    return value


def check_context(model, tokenizer, where, messages, max_tokens):
    """Raise InputError where a prompt with an answer of max_tokens is longer than the model has positions for."""
    length, most = len(encode(tokenizer, messages)), getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most and length + max_tokens > most:
        raise InputError(f"{where}: {length} tokens and --max-tokens {max_tokens} found, at most {most} together expected, the base's positions")


@torch.no_grad()
def sample(model, tokenizer, messages, count, temperature, top_p, max_tokens):
    """`count` answers to one prompt, each token from the likeliest that together have top_p: (texts, log-probabilities at temperature 1, top_p 1)."""
    prompt = torch.tensor([encode(tokenizer, messages)], device=model.device)
    eos = model.generation_config.eos_token_id  # one, several or none
    texts, logprobs = [], []
    while len(texts) < count:
        config = GenerationConfig(  # not the base's own, which may bend the distribution
            do_sample=True, temperature=temperature, top_k=0, top_p=top_p, num_return_sequences=min(AT_ONCE, count - len(texts)),
            max_new_tokens=max_tokens, eos_token_id=eos, pad_token_id=tokenizer.pad_token_id)
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
        answer = out[:, prompt.shape[1] :]
        ends = torch.isin(answer, torch.tensor(-1 if eos is None else eos, device=answer.device)).long()
        real = ends.cumsum(1) - ends == 0  # up to the first end; a pad token before it was sampled like any other
        mask = torch.cat([torch.ones_like(out[:, : prompt.shape[1]]), real.long()], dim=1)
        logits = model(input_ids=out, attention_mask=mask, logits_to_keep=answer.shape[1] + 1).logits[:, :-1].float()
        each = logits.log_softmax(-1).gather(-1, answer[..., None]).squeeze(-1)
        texts += tokenizer.batch_decode(answer, skip_special_tokens=True)
        logprobs += (each * real).sum(1).tolist()
    return texts, logprobs
