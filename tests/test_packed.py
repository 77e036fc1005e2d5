"""pairwise/scale/packed.py: one row of tokens gives the rewards and gradients of one sequence at a
time; bases that it cannot serve are padded."""

import copy
import io
import json

import train_rm
from pairwise import chats, manifest, members, sampling
from pairwise import reward_model as rm
from pairwise.cli import InputError
from pairwise.data import read_split
from pairwise.scale import norms, packed
from pairwise.scale.recompute import recompute_activations

import numpy as np
import pytest
import torch
from conftest import FLAGS, fit, fresh, rewards, train, train_on
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    JambaConfig,
    LlamaConfig,
    MiniMaxConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3NextConfig,
)

SHAPE = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "num_labels": 1,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "mistral, window": MistralConfig(**SHAPE, sliding_window=11),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen2, window in some layers": Qwen2Config(**SHAPE | SLIDING),
    "qwen3": Qwen3Config(**SHAPE, head_dim=8),
    "gemma2": Gemma2Config(
        **SHAPE, head_dim=8, sliding_window=11, attn_logit_softcapping=2.0
    ),  # low enough to be seen
    "gemma3": Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=11),
    "gpt2": GPT2Config(
        vocab_size=400,
        n_embd=32,
        n_layer=2,
        n_head=4,
        pad_token_id=0,
        num_labels=1,
        initializer_range=0.1,
    ),  # whole last layer
}


def build(config):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(copy.deepcopy(config))
    with torch.no_grad():
        model.score.weight.normal_(0, 0.1)
    return rm.ready(model, "cpu")


def padded_rewards(model, ids, mask):
    """Rewards of padded rows, float32 (n,)."""
    return model.head(rm.last_hidden(model.model, ids, mask)).squeeze(-1)


def alone(model, sequences):
    """Rewards by transformers' plain path, one sequence at a time: what everything else is compared
    with."""
    out = [
        model.model.base_model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[
            0, -1
        ]
        for ids in sequences
    ]
    return model.head(torch.stack(out)).squeeze(-1)


def gradient(model, values, weights):
    model.model.zero_grad()
    (values * weights).sum().backward()
    return {
        name: p.grad.clone() for name, p in model.model.named_parameters() if p.grad is not None
    }


@pytest.fixture(scope="module")
def mixed():
    """Three prompts of several answers, some alone, some very short, two equal; in no order."""
    rng = np.random.default_rng(0)

    def token(n):
        return rng.integers(1, 400, n).tolist()

    prompts = [token(n) for n in (40, 25, 17)]
    found = [
        prompt + token(n)
        for prompt, counts in zip(prompts, ((1, 7, 30), (12, 3, 3, 25), (2, 60)))
        for n in counts
    ]
    found += [
        token(1),
        token(2),
        token(33),
        prompts[0],
        prompts[0] + [5],
        found[4][:],
    ]  # a prompt alone is the beginning of the others
    return [found[i] for i in rng.permutation(len(found))]


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return build(CONFIGS[request.param])


# ---- what shares what


def test_lay_out_by_hand():
    prompt, other = list(range(100, 130)), list(range(200, 220))
    sequences = [
        other + [1, 2],
        prompt + [1],
        [5, 6],
        prompt + [2, 3],
        other + [1, 3],
        prompt + [4],
    ]
    assert packed.lay_out(sequences) == [(0, [2]), (30, [1, 3, 5]), (21, [0, 4])]
    assert packed.count_tokens(sequences) == 2 + (30 + 1 + 2 + 1) + (21 + 1 + 1)


def test_a_system_prompt_in_common_does_not_hide_the_prompts():
    """All begin with the same 20 tokens, and each prompt adds 50: the groups are the prompts."""
    sequences = [
        [*range(20), *range(100 * p, 100 * p + 50), 7, answer]
        for p in (3, 1, 2)
        for answer in (1, 2)
    ]
    assert packed.lay_out(sequences) == [(71, [2, 3]), (71, [4, 5]), (71, [0, 1])]
    assert packed.lay_out(sequences[::2]) == [(20, [1, 2, 0])], "what is left to share is shared"


def test_lay_out_leaves_each_sequence_a_token_of_its_own(mixed):
    groups = packed.lay_out(mixed)
    assert sorted(i for _, group in groups for i in group) == list(range(len(mixed)))
    for shared, group in groups:
        assert all(
            mixed[i][:shared] == mixed[group[0]][:shared] and len(mixed[i]) > shared for i in group
        )
        assert (shared >= packed.LEAST_SHARED) == (len(group) > 1)
    assert packed.count_tokens(mixed) < 0.7 * sum(map(len, mixed))
    assert packed.lay_out([[1] * 30] * 3) == [(29, [0, 1, 2])] and packed.lay_out([]) == []


def test_lay_out_runs_the_fewest_tokens():
    """Against all cuts of the sorted sequences into runs."""
    rng = np.random.default_rng(1)
    for _ in range(30):
        sequences = sorted(
            [0] * 16 + rng.integers(0, 2, rng.integers(1, 9)).tolist() for _ in range(7)
        )
        best = 10**9
        for cuts in range(2**6):
            ends = [i + 1 for i in range(6) if cuts >> i & 1] + [7]
            total = 0
            for begin, end in zip([0, *ends], ends):
                run = sequences[begin:end]
                shared = min(packed._common(x, y) for x in run for y in run)
                total += sum(map(len, run)) - (len(run) - 1) * min(shared, min(map(len, run)) - 1)
            best = min(best, total)
        assert packed.count_tokens(sequences) == best


@pytest.mark.parametrize("tokens", [1, 50, 100, 10**6])
def test_batches_run_at_most_so_many_tokens(mixed, tokens):
    found = list(packed.batches(mixed, tokens))
    assert sorted(i for batch in found for i in batch) == list(range(len(mixed)))
    for batch in found:
        assert len(batch) == 1 or packed.count_tokens([mixed[i] for i in batch]) <= tokens
    assert len(found) == {1: len(mixed), 10**6: 1}.get(tokens, len(found))
    if tokens == 1:  # The largest shows at once whether memory suffices.
        lengths = [len(mixed[i]) for batch in found for i in batch]
        assert lengths == sorted(lengths, reverse=True)


def test_many_sequences_with_one_beginning_are_laid_out_in_groups():
    groups = packed.lay_out([[*range(50), i] for i in range(1000)])
    assert max(len(group) for _, group in groups) == packed.MOST_SHARING and len(groups) == -(
        -1000 // packed.MOST_SHARING
    )


# ---- equal rewards and gradients


def test_alone_is_packed_in_any_company(model, mixed):
    assert model.packs == "segments" and model.model.config._attn_implementation == "packed"
    with torch.no_grad():
        expected = alone(model, mixed)
        assert expected.std() > 0.02
        n = len(mixed)
        for chosen in [
            list(range(n)),
            *([i] for i in range(n)),
            *([i, (i + 5) % n, (i + 3) % n] for i in range(n)),
        ]:
            found = rm.rewards_of_batch(model, [mixed[i] for i in chosen])
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, expected[chosen], atol=2e-6, rtol=0)
    for tokens in (1, 60, 10**6):
        np.testing.assert_allclose(rm.score_sequences(model, mixed, tokens), expected, atol=2e-6)


def test_gradients_are_those_of_one_at_a_time(model, mixed):
    weights = torch.linspace(-1, 2, len(mixed))
    expected = gradient(model, alone(model, mixed), weights)
    found = gradient(model, rm.rewards_of_batch(model, mixed), weights)
    assert (
        found.keys() == expected.keys() and len(expected) >= len(list(model.model.parameters())) - 1
    )
    size = sum(grad.square().sum() for grad in expected.values()).sqrt()
    assert (
        sum((found[name] - expected[name]).square().sum() for name in expected).sqrt() / size < 1e-6
    )
    for name in expected:
        assert expected[name].abs().max() > 0, name
        assert (found[name] - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max(), name
    model.model.zero_grad()


def test_the_padded_path_still_works_beside_it(model, mixed):
    """transformers' own calls, with a mask, on the model that packs."""
    ids, mask = rm.pad(mixed, 0, "cpu")
    with torch.no_grad():
        torch.testing.assert_close(
            padded_rewards(model, ids, mask), alone(model, mixed), atol=2e-6, rtol=0
        )


@pytest.mark.parametrize("name", ["mistral, window", "gemma2"])
def test_sequences_as_long_as_the_window(name):
    """The first token falls out of it one token later."""
    model, rng = build(CONFIGS[name]), np.random.default_rng(0)
    sequences = [rng.integers(1, 400, n).tolist() for n in (10, 11, 12, 13)]
    with torch.no_grad():
        found = rm.rewards_of_batch(model, sequences)
        torch.testing.assert_close(found, alone(model, sequences), atol=2e-6, rtol=0)


def test_sharing_and_the_short_last_layer_change_nothing(mixed, monkeypatch):
    """Each of them apart, in loss and gradient, 1e-6 of its size."""
    model, weights = build(CONFIGS["llama"]), torch.linspace(-1, 2, len(mixed))
    both = rm.rewards_of_batch(model, mixed)
    found = gradient(model, both, weights)
    seen = []
    model.model.base_model.norm.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].shape[1])
    )
    for share, cut in ((False, True), (True, False), (False, False)):
        with monkeypatch.context() as patch:
            if not share:
                patch.setattr(packed, "LEAST_SHARED", 10**9)
            if not cut:
                patch.setattr(model.model.base_model.layers[-1], "_forward_pre_hooks", {})
            values = rm.rewards_of_batch(model, mixed)
            expected = gradient(model, values, weights)
            tokens = packed.count_tokens(mixed)
        assert (tokens == sum(map(len, mixed))) == (not share) and seen.pop() == (
            len(mixed) if cut else tokens
        )
        torch.testing.assert_close(both, values, atol=1e-6, rtol=0)
        for name in found:
            assert (found[name] - expected[name]).norm() <= 1e-6 * expected[name].norm() + 1e-9, (
                name
            )


@pytest.mark.parametrize("name", ["llama", "mistral, window", "qwen2, window in some layers"])
def test_one_call_of_a_variable_length_kernel(name, mixed, monkeypatch):
    """The path of a GPU, with torch's kernel written out as its documentation has it: queries at
    the end of their keys, a window of (left, 0)."""
    seen = []

    def written_out(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=False
    ):
        assert (
            cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
            and cu_seq_q[-1] == len(query)
            and cu_seq_k[-1] == len(key) == len(value)
        )
        assert max_q == cu_seq_q.diff().max() and max_k == cu_seq_k.diff().max()
        grouped = query.shape[1] != key.shape[1] and "enable_gqa" in packed.VARLEN  # torch 2.13
        assert enable_gqa == grouped and window_size[1] == 0
        seen.append(len(query))
        out = []
        for q, k, v in zip(
            query.split(cu_seq_q.diff().tolist()),
            key.split(cu_seq_k.diff().tolist()),
            value.split(cu_seq_k.diff().tolist()),
        ):
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
            ahead = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
            scores = torch.einsum("qhd,khd->hqk", q, k) * scale
            blind = (ahead < 0) | (ahead > window_size[0]) & (window_size[0] >= 0)
            out.append(
                torch.einsum(
                    "hqk,khd->qhd", scores.masked_fill(blind, float("-inf")).softmax(-1), v
                )
            )
        return torch.cat(out)

    monkeypatch.setattr(packed, "varlen_attn", written_out)
    model, weights = build(CONFIGS[name]), torch.linspace(-1, 2, len(mixed))
    expected = gradient(model, alone(model, mixed), weights)
    model.packs = "varlen"
    values = rm.rewards_of_batch(model, mixed)
    torch.testing.assert_close(values, alone(model, mixed), atol=2e-6, rtol=0)
    assert seen == [packed.count_tokens(mixed)] * 2 + [len(mixed)]
    found = gradient(model, values, weights)
    for name in expected:
        assert (found[name] - expected[name]).norm() <= 2e-6 * expected[name].norm(), name


def test_continuations_share_their_prompt(tokenizer):
    """What a member runs to score the continuations of two prompts: each prompt once, and of the
    answers the rest."""
    model, seen = build(CONFIGS["llama"]), []
    model.model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0].numel())
    )
    asked = [
        [{"role": "user", "content": text * 8}]
        for text in ("one way is to run twice a week . ", "how can i get fit ? ")
    ]
    texts = [[f"{word} {i}" for i in range(30)] for word in ("drink no coffee", "dear reader")]
    sequences, prompts = (
        chats.encode_split(tokenizer, asked, texts, None),
        [chats.encode(tokenizer, chat) for chat in asked],
    )
    rm.score_sequences(model, sequences, 10**6)
    answers = sum(len(ids) for ids in sequences) - 30 * sum(map(len, prompts))
    assert sum(seen) <= sum(map(len, prompts)) + answers < sum(map(len, sequences)) / 3


def test_truncated_differently(tokenizer):
    """max_length leaves each response another piece of the prompt: little or nothing is shared, and
    it is right."""
    model = build(CONFIGS["llama"])
    ask = [{"role": "user", "content": "one way is to run twice a week . " * 6}]
    texts = [
        "no .",
        "drink no coffee , sleep and " * 3,
        "drink no coffee , sleep or " * 3,
        "dear reader , " * 30,
    ]
    for limit in (None, 90, 60, 20):
        sequences = chats.encode_split(tokenizer, [ask], [texts], limit)
        with torch.no_grad():
            torch.testing.assert_close(
                rm.rewards_of_batch(model, sequences), alone(model, sequences), atol=2e-6, rtol=0
            )


@pytest.mark.parametrize("tokens", [1, 60, 200])
@pytest.mark.parametrize("packs", [True, False])
def test_in_several_passes(mixed, tokens, packs):
    """What is too much for one pass is run in several, each again in the backward pass: the same
    rewards and gradients."""
    model, weights = build(CONFIGS["llama"]), torch.linspace(-1, 2, len(mixed))
    expected = gradient(model, rm.rewards_of_batch(model, mixed), weights)
    model.packs = model.packs if packs else None
    assert rm.count_tokens(model, mixed) > tokens
    values = rm.rewards_of_batch(model, mixed, tokens)
    torch.testing.assert_close(values, alone(model, mixed), atol=2e-6, rtol=0)
    added = []  # the gradient comes part by part, not as one sum in the parameters' own precision
    model.head.weight.register_post_accumulate_grad_hook(added.append)
    found = gradient(model, values, weights)
    assert len(added) == len(list(rm.batches_of(model, mixed, tokens))) > 1
    for name in expected:
        assert (found[name] - expected[name]).norm() <= 2e-6 * expected[name].norm(), name


def test_checkpointing_of_activations_gives_the_same_gradient(mixed):
    model, weights = build(CONFIGS["llama"]), torch.linspace(-1, 2, len(mixed))
    expected = gradient(model, rm.rewards_of_batch(model, mixed), weights)
    recompute_activations(model.model)
    found = gradient(model, rm.rewards_of_batch(model, mixed), weights)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_bfloat16(mixed):
    """As far from float32 packed as padded."""
    exact = alone(build(CONFIGS["llama"]), mixed).detach()
    model = rm.ready(build(CONFIGS["llama"]).model.bfloat16(), "cpu")
    assert model.packs == "segments"
    with torch.no_grad():
        found, padded = (
            rm.rewards_of_batch(model, mixed),
            padded_rewards(model, *rm.pad(mixed, 0, "cpu")),
        )
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 1.5 * (padded - exact).abs().max() + 0.005


def test_the_same_bits_every_time(mixed):
    model, weights = build(CONFIGS["qwen3"]), torch.linspace(-1, 2, len(mixed))
    first, second = (gradient(model, rm.rewards_of_batch(model, mixed), weights) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---- training


def test_steps_and_losses_are_those_of_padded_batches(data, base, tokenizer, monkeypatch):
    """Whole training, packed against padded: the same steps and, to rounding, the same losses."""
    split, logs = read_split(data, "train"), []
    sequences = chats.encode_split(tokenizer, split.messages, split.responses, 40)
    for packs in (True, False):
        model = rm.load_base(base, tokenizer, torch.float32, "cpu")
        rm.draw_head(model.head.weight, model.model.config, 1)
        model.packs = model.packs if packs else None
        flags = [*FLAGS, "--pairs-per-step", "12", "--micro-batch-tokens", "200", "--lr", "1e-6"]
        args = train_rm.parse_args(["--run", "r", "--base", "b", "--iteration", "1", *flags])
        log = io.StringIO()
        train_on(args, model, split, sequences, log)
        logs.append([json.loads(line) for line in log.getvalue().splitlines()])
    assert len(logs[0]) == len(logs[1]) >= 5
    for ours, padded in zip(*logs):
        assert (ours["pairs"], ours["tokens"], ours["lr"]) == (
            padded["pairs"],
            padded["tokens"],
            padded["lr"],
        )
        assert abs(ours["loss"] - padded["loss"]) < 2e-5
    assert abs(logs[0][0]["loss"] - logs[1][0]["loss"]) < 1e-7


# ---- bases that cannot be packed


EXPERTS = {
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
LINEAR = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 8,
    "num_hidden_layers": 4,
}
MAMBA = {"mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False, "num_experts": 2}
HYBRIDS = {
    "qwen3 next": Qwen3NextConfig(**SHAPE | EXPERTS | LINEAR),
    "qwen3.5": Qwen3_5TextConfig(**SHAPE | LINEAR),
    "jamba": JambaConfig(**SHAPE | MAMBA, attn_layer_offset=1, attn_layer_period=2),
    "minimax": MiniMaxConfig(**SHAPE, num_local_experts=2, block_size=8),  # a cache of its own
}


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_base_with_other_layers_is_padded(name, capsys, mixed):
    model = build(HYBRIDS[name])
    said = capsys.readouterr().err
    assert model.packs is None and "padded, not packed" in said and said.count("\n") == 1
    assert (
        model.model.config._attn_implementation != "packed"
        and not model.model.base_model.layers[-1]._forward_pre_hooks
    )
    with torch.no_grad():
        torch.testing.assert_close(
            rm.rewards_of_batch(model, mixed), alone(model, mixed), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("name", HYBRIDS)
def test_norms_of_a_base_with_other_layers(name, mixed):
    """As on a GPU: those that take a gate stay as they are."""
    model = build(HYBRIDS[name])
    with torch.no_grad():
        before = rm.rewards_of_batch(model, mixed)
        norms.use_kernels(model.model)
        torch.testing.assert_close(rm.rewards_of_batch(model, mixed), before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_base_with_other_layers_is_sampled(name, tokenizer):
    """Log-probabilities are those of a plain pass over prompt and answer, also where a prompt is
    shorter than a convolution."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(HYBRIDS[name])).eval()
    model.generation_config.eos_token_id = None
    made, generate = [], model.generate
    model.generate = lambda *args, **kwargs: made.append(generate(*args, **kwargs)) or made[-1]
    for prompt in ([5, 6], list(range(5, 30))):
        texts, logprob = sampling.sample(model, tokenizer, prompt, 4, 1.0, 1.0, 6)
        rows, start = made[-1].sequences, len(prompt)
        assert len(set(map(tuple, rows.tolist()))) == len(texts) == 4
        with torch.no_grad():
            each = model(input_ids=rows, use_cache=False).logits[:, start - 1 : -1].log_softmax(-1)
        expected = each.gather(2, rows[:, start:, None]).sum((1, 2))
        torch.testing.assert_close(torch.tensor(logprob), expected, atol=1e-4, rtol=0)


LONG = {"rope_type": "longrope", "rope_theta": 10000.0}
LONG |= {"short_factor": [1.0] * 4, "long_factor": [2.0, 4.0, 8.0, 16.0]}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
SMALL = SHAPE | {"max_position_embeddings": 40, "num_hidden_layers": 2}
ROPES = {
    "longrope": Phi3Config(**SHAPE, rope_parameters=LONG, original_max_position_embeddings=40),
    "dynamic in some layers": Gemma3TextConfig(
        **SMALL,
        head_dim=8,
        layer_types=["full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": DYNAMIC,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
}


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("name", ROPES)
def test_rotary_factors_are_those_of_a_sequence_alone(name, packs, mixed):
    """In any company, after any other, in one pass and in several: rewards and gradients are those
    of models that run one sequence and nothing else."""
    mixed = [ids for ids in mixed if len(ids) not in range(3, 40)]
    assert sum(len(ids) < 40 for ids in mixed) > 1 and 40 in map(len, mixed), "and on the border"
    model, weights = build(ROPES[name]), torch.linspace(-1, 2, len(mixed))
    assert model.packs == "segments"
    model.packs = "segments" if packs else None
    singles = [copy.deepcopy(model) for _ in mixed]
    each = [alone(one, [ids]) for one, ids in zip(singles, mixed)]
    grads = [gradient(*one) for one in zip(singles, each, weights)]
    expected = torch.cat(each).detach()
    total = {key: sum(grad[key] for grad in grads) for key in grads[0]}
    for tokens in (None, 100):
        values = rm.rewards_of_batch(model, mixed, tokens)
        torch.testing.assert_close(values.detach(), expected, atol=2e-6, rtol=0)
        found = gradient(model, values, weights)
        for key in total:
            assert (found[key] - total[key]).norm() <= 5e-6 * total[key].norm() + 1e-9, key
        scores = rm.score_sequences(model, mixed, tokens or 10**6)
        np.testing.assert_allclose(scores, expected, atol=2e-6)
    for batch in rm.batches_of(model, mixed, 100):
        assert len(batch) == 1 or rm.count_tokens(model, [mixed[i] for i in batch]) <= 100


def test_longer_than_the_base_has_positions_for(mixed):
    model = build(LlamaConfig(**SHAPE, max_position_embeddings=max(map(len, mixed))))
    rm.score_sequences(model, mixed, 1000)
    model.model.config.max_position_embeddings -= 1
    with pytest.raises(InputError, match="has positions for .* or less expected"):
        rm.score_sequences(model, mixed, 1000)


@pytest.mark.parametrize("fault", ["leak", "imprecise", "window"])
def test_a_base_that_comes_out_different_is_padded(fault, monkeypatch, capsys):
    """Attention that forgets the segments, or is wrong in its third digit, and a window that the
    configuration has and the layers do not pass on."""
    attention = packed.attention

    def leak(*args, segments=None, **kwargs):
        return attention(*args, segments=None, **kwargs)

    def imprecise(*args, **kwargs):
        output, weights = attention(*args, **kwargs)
        return 1.005 * output, weights

    if fault == "window":
        monkeypatch.setattr(packed, "windows", lambda config: [4096] * 3)
    else:
        wrong = {"leak": leak, "imprecise": imprecise}[fault]
        monkeypatch.setitem(packed.ALL_ATTENTION_FUNCTIONS._global_mapping, "packed", wrong)
    model = build(CONFIGS["llama"])
    assert model.packs is None and model.model.config._attn_implementation == "sdpa"
    assert "LlamaForSequenceClassification: sequences are padded" in capsys.readouterr().err


def test_an_encoder_is_trained_scored_and_saved_padded(data, tokenizer, tmp_path):
    """DeBERTa-v3: attention in both directions, a pooler, a head called classifier."""
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        relative_attention=True,
        position_buckets=32,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type="p2c|c2p",
        position_biased_input=False,
        type_vocab_size=0,
    )  # the switches of microsoft/deberta-v3-base
    DebertaV2ForMaskedLM(config).save_pretrained(tmp_path / "deberta")
    tokenizer.save_pretrained(tmp_path / "deberta")
    run = fresh(data, tmp_path)
    for j in (1, 2):
        train(
            run,
            tmp_path / "deberta",
            "--lr",
            "1e-3",
            "--pairs-per-step",
            "16",
            "--micro-batch-tokens",
            "500",
            iteration=j,
        )
        fit(run)
    model, info = AutoModelForSequenceClassification.from_pretrained(
        run / "member_02", output_loading_info=True
    )
    assert (
        not info["missing_keys"]
        and not info["unexpected_keys"]
        and manifest.entries(run)["member_02"]["settings"]["train"] == "full"
    )
    assert model.classifier.bias.item() == 0
    split = read_split(run, "test")
    sequences = chats.encode_split(tokenizer, split.messages, split.responses, 2048)
    with torch.no_grad():
        plain = [model.eval()(input_ids=torch.tensor([ids])).logits.item() for ids in sequences]
    np.testing.assert_allclose(rewards(run, 2), plain, atol=1e-5)
    again = members.load_member(run, 2, None, tokenizer, torch.float32, "cpu")
    np.testing.assert_array_equal(rm.score_sequences(again, sequences, 500), rewards(run, 2))
    with pytest.raises(InputError, match="--train head.*a decoder, expected"):
        rm.features_of(again, sequences, 500)
