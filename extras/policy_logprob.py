"""Log-probabilities of the test responses under the base: with them evaluate.py measures appendix
A's own condition, by the members' optimal policies in the place of their votes.

    python extras/policy_logprob.py --run runs/demo --base runs/demo/base      (seconds)
    python evaluate.py --run runs/demo

Writes RUN/logprob/test.npy, float32 (R,), one number per distinct response in data order: the sum
of log pi_0 over its tokens and the end of its turn, at temperature 1 and over all tokens, as the
chat template writes them after the prompt. Nothing is cut: a response that does not fit the base is
an error. The base is the one that the members were made from, which is their reference policy.
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
    sampling,
)
from pairwise.scale import rope

import numpy as np
import torch


def parts(tokenizer, messages, response):
    """Return the token ids of a prompt that is made ready to be answered, and of its answer.

    The answer ends with the last special token of the chat, after which templates write blanks, or
    with the eos token where the template ends no turn. Where a token of the whole chat reaches
    across the border, the answer's text is encoded alone: what the base continues is the prompt.
    Raises InputError where the template writes another prompt once it is answered."""
    prompt, whole = (chats.encode(tokenizer, messages, text) for text in (None, response))
    answer = whole[len(prompt) :]
    if whole[: len(prompt)] != prompt:
        answered = [*messages, {"role": "assistant", "content": response}]
        before = chats.rendered(tokenizer, messages, True)
        text = chats.rendered(tokenizer, answered, False)
        if not text.startswith(before):
            words = "writes another prompt where it is answered than where it is to be"
            raise cli.InputError(f"the chat template {words}, so the answer has no place")
        answer = tokenizer(text[len(before) :], add_special_tokens=False).input_ids
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    end = max((i for i, token in enumerate(answer, 1) if token in special), default=0)
    if end and not tokenizer.decode(answer[end:]).strip():
        return prompt, answer[:end]
    return prompt, answer + [tokenizer.eos_token_id] * (tokenizer.eos_token_id is not None)


def log_probabilities(model, pad_id, encoded, tokens, label=None):
    """Return sum log pi_0 of each answer, float32 (n,), in batches of at most `tokens` tokens.

    model: a causal language model of transformers; encoded: n pairs of `parts`."""
    sequences = [prompt + answer for prompt, answer in encoded]
    begins = {tuple(ids): len(prompt) for ids, (prompt, _) in zip(sequences, encoded)}

    def of_batch(wrapped, batch):
        rope.reset(model)
        ids, mask = reward_model.pad(batch, pad_id, model.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        sums = []
        for row, own in zip(logits, batch):
            first = begins[tuple(own)]
            answer = torch.tensor(own[first:], device=model.device)
            # The logits of a token are those of the place before it.
            steps = row[first - 1 : len(own) - 1].float().log_softmax(-1)
            sums.append(steps.gather(1, answer[:, None]).double().sum())
        return torch.stack(sums).float()

    wrapped = reward_model.RewardModel(model)  # not packed: packed rows read a last token alone
    return reward_model.over_sequences(wrapped, of_batch, sequences, tokens, label)


def encode(tokenizer, test):
    """Return `parts` of every distinct response of a split, R of them."""
    encoded = []
    for name, messages, responses in zip(test.prompt_id, test.messages, test.responses):
        for response in responses:
            try:
                encoded.append(parts(tokenizer, messages, response))
            except cli.InputError as error:
                raise cli.InputError(f"prompt {name}: {error}") from None
    return encoded


def main(args):
    run, path = args.run, args.run / "logprob" / "test.npy"
    test = data.read_split(run, "test")
    tokenizer = provenance.open_base(args)
    settings = {"date": args.date} if args.date else {}
    inputs = data.hashes(run) | provenance.base_hashes(args.base, args.chat_template)
    if manifest.stage_done(run, "logprob", settings, inputs, [path]):
        print(f"policy_logprob: {path} is there, skipped")
        return
    reward_model.settle(args)
    model = sampling.load_language_model(args.base, args.device)
    encoded = encode(tokenizer, test)
    started = manifest.begin_stage(run, "logprob", settings, inputs)
    with pretrained.readable(f"--base {args.base}: no log-probability could be computed"):
        values = log_probabilities(
            model, tokenizer.pad_token_id, encoded, args.micro_batch_tokens, "logprob"
        )
    if not np.isfinite(values).all():
        raise cli.InputError(f"--base {args.base}: log-probabilities that are not finite found")
    files.write_array(path, values)
    manifest.end_stage(run, "logprob", settings, inputs, started, threads=args.threads)
    lengths = np.array([len(answer) for _, answer in encoded])
    per_token = values.sum() / lengths.sum()
    words = f"{lengths.mean():.0f} tokens and {per_token:.2f} a token on average"
    print(f"policy_logprob: {len(values):,} test responses, {words}, in {path}")


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    cli.add_run(parser, "run directory with data/")
    parser.add_argument("--base", required=True, help="base model: hub id or directory")
    reward_model.add_flags(parser)
    provenance.add_flags(parser)
    tokens = {"type": cli.natural, "default": 4096, "help": "tokens of a forward pass"}
    parser.add_argument("--micro-batch-tokens", **tokens)
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
