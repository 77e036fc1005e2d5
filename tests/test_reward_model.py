"""pairwise/reward_model.py: one encoding, rewards that depend on nothing but the response,
checkpoints that load."""

import argparse
import ast
import copy
import json
import pickle
import shutil
import signal
from types import SimpleNamespace

from pairwise import chats, existing, members, pretrained, provenance, sampling
from pairwise import reward_model as rm
from pairwise.cli import InputError

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, make_base
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import AutoModelForSequenceClassification, AutoTokenizer

ASK = [{"role": "user", "content": "how can i sleep better this week ?"}]
ANSWER = "one way is to drink no coffee ."
LOOP = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
OPEN = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"


def padded_rewards(model, ids, mask):
    """Rewards of padded rows, float32 (n,)."""
    return model.head(rm.last_hidden(model.model, ids, mask)).squeeze(-1)


@pytest.fixture
def own(base):
    """A tokenizer of the test's own, to be changed."""
    return AutoTokenizer.from_pretrained(base)


@pytest.fixture(scope="module")
def model(base, tokenizer):
    model = rm.load_base(base, tokenizer, torch.float32, "cpu")
    rm.draw_head(model.head.weight, model.model.config, 1)
    return model


@pytest.fixture(scope="module")
def mixed(tokenizer):
    """Sequences of many lengths."""
    return [
        chats.encode(
            tokenizer,
            [{"role": "user", "content": "please " * i + "help ?"}],
            "go on " * (7 * i % 5 + 1),
        )
        for i in range(12)
    ]


def add_bos(tokenizer):
    """Let the tokenizer itself put a BOS first, as Llama's does."""
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.bos_token_id)]
    )
    assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id


# ---- encode


@pytest.mark.parametrize("tokenizer_adds", [False, True])
@pytest.mark.parametrize(
    "template, expected", [("{{ bos_token }}", 1), ("{{ bos_token }}{{ bos_token }}", 1), ("", 0)]
)
def test_exactly_one_bos_where_the_model_has_one(own, template, expected, tokenizer_adds):
    own.chat_template = template + LOOP + OPEN
    if tokenizer_adds:
        add_bos(own)
        expected = 1
    for response in (None, ANSWER):
        ids = chats.encode(own, ASK, response)
        assert ids.count(own.bos_token_id) == expected
        assert (ids[0] == own.bos_token_id) == bool(expected)


def test_tokenizer_without_bos(own):
    own.bos_token = None
    own.chat_template = LOOP + OPEN
    ids = chats.encode(own, ASK, ANSWER)
    assert (
        own.decode(ids) == f"<|user|>{ASK[0]['content']}<|assistant|>{ANSWER}<|eos|>"
        and None not in ids
    )
    assert chats.encode(own, ASK, ANSWER, 5) == ids[-5:]


def test_text_of_prompt_and_response(tokenizer):
    """Every turn is there in order, the response ends with the model's end, and a prompt alone is
    ready to be answered."""
    chat = [{"role": "user", "content": "hey"}, {"role": "assistant", "content": "yes ?"}, *ASK]
    start = f"<|bos|><|user|>hey<|assistant|>yes ?<|eos|><|user|>{ASK[0]['content']}<|assistant|>"
    assert tokenizer.decode(chats.encode(tokenizer, chat)) == start
    assert tokenizer.decode(chats.encode(tokenizer, chat, ANSWER)) == start + ANSWER + "<|eos|>"
    assert chats.encode(tokenizer, chat, ANSWER)[-1] == tokenizer.eos_token_id
    assert all(type(i) is int for i in chats.encode(tokenizer, chat))


@pytest.mark.parametrize("template_bos", [True, False])
def test_truncation_keeps_bos_and_the_end(own, template_bos):
    own.chat_template = ("{{ bos_token }}" if template_bos else "") + LOOP + OPEN
    bos = [own.bos_token_id] if template_bos else []
    whole = chats.encode(own, ASK, ANSWER)
    answer = len(own(ANSWER).input_ids) + 2  # with its header and end
    assert len(whole) > answer + 3
    for limit in (len(whole) + 1, len(whole), len(whole) - 1, answer, answer - 4, 3, 2):
        ids = chats.encode(own, ASK, ANSWER, limit)
        assert len(ids) == min(limit, len(whole))
        assert ids == bos + whole[len(bos) :][-(min(limit, len(whole)) - len(bos)) :], limit
    assert chats.encode(own, ASK, ANSWER, 1) == (bos or whole[-1:])


def test_encode_split_is_encode_in_data_order(tokenizer):
    prompts = [ASK, [{"role": "user", "content": "and then ?"}]]
    texts = [["a", ANSWER], ["b", "c", "a"]]
    expected = [chats.encode(tokenizer, m, t, 9) for m, group in zip(prompts, texts) for t in group]
    assert chats.encode_split(tokenizer, prompts, texts, 9) == expected and len(expected) == 5


# ---- pad token and chat template


def saved(tokenizer, directory):
    tokenizer.save_pretrained(directory)
    return directory


def test_pad_is_a_spare_token_and_never_eos(own, tmp_path):
    own.pad_token = own.eos_token
    found = chats.load_tokenizer(saved(own, tmp_path / "t"))
    assert found.pad_token == "<|pad|>" != found.eos_token and found.padding_side == "right"
    assert found.pad_token_id < len(own) == len(found)


def test_pad_is_not_bos_either(own, tmp_path):
    own.pad_token = own.bos_token
    assert chats.load_tokenizer(saved(own, tmp_path / "t")).pad_token == "<|pad|>"


def test_own_pad_token_is_kept(own, tmp_path):
    own.pad_token = "<|user|>"
    assert chats.load_tokenizer(saved(own, tmp_path / "t")).pad_token == "<|user|>"


def test_without_a_spare_token(own, tmp_path, monkeypatch):
    own.pad_token = own.eos_token
    monkeypatch.setattr(chats, "PAD_NAMES", ("<|nothing|>", "<|eos|>"))
    with pytest.raises(InputError, match=r"pad token is its eos token.*<\|nothing\|>"):
        chats.load_tokenizer(saved(own, tmp_path / "t"))


def test_pad_token_outside_the_embedding(own, tmp_path, base):
    shutil.copytree(base, tmp_path / "b")
    own.add_special_tokens({"pad_token": "<|new|>"})
    own.save_pretrained(tmp_path / "b")
    tokenizer = chats.load_tokenizer(tmp_path / "b")
    assert tokenizer.pad_token_id == 400
    with pytest.raises(InputError, match="could not be loaded"):
        rm.load_base(tmp_path / "b", tokenizer, torch.float32, "cpu")


def test_base_without_chat_template(own, tmp_path):
    template = own.chat_template
    own.chat_template = None
    directory = saved(own, tmp_path / "t")
    with pytest.raises(InputError, match="no chat template.*--chat-template FILE"):
        chats.load_tokenizer(directory)
    with pytest.raises(InputError, match="--chat-template .*nowhere"):
        chats.load_tokenizer(directory, tmp_path / "nowhere")
    (tmp_path / "own.jinja").write_text(template)
    own.chat_template = template
    assert chats.encode(
        chats.load_tokenizer(directory, tmp_path / "own.jinja"), ASK, ANSWER
    ) == chats.encode(own, ASK, ANSWER)


def test_template_file_wins(base, tmp_path):
    (tmp_path / "own.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    )
    tokenizer = chats.load_tokenizer(base, tmp_path / "own.jinja")
    assert (
        tokenizer.decode(chats.encode(tokenizer, ASK, "yes"))
        == f"<|bos|><{ASK[0]['content']}><yes>"
    )


@pytest.mark.parametrize(
    "function",
    [
        chats.load_tokenizer,
        lambda base: rm.load_base(base, chats.load_tokenizer(base), torch.float32, "cpu"),
    ],
)
def test_no_such_base(tmp_path, function):
    with pytest.raises(InputError, match="--base .*nothing"):
        function(str(tmp_path / "nothing"))


# ---- batches


@pytest.mark.parametrize("tokens", [1, 40, 90, 10**6])
def test_batches_cover_each_sequence_once_within_the_budget(mixed, tokens):
    found = list(rm.batches(mixed, tokens))
    assert sorted(i for batch in found for i in batch) == list(range(len(mixed)))
    for batch in found:
        assert len(batch) == 1 or len(batch) * max(len(mixed[i]) for i in batch) <= tokens
    lengths = [len(mixed[i]) for batch in found for i in batch]
    assert lengths == sorted(lengths, reverse=True)
    if tokens == 90:
        assert 1 < len(found) < len(mixed)


def test_pad_is_on_the_right():
    ids, mask = rm.pad([[5, 6, 7], [8]], 9, "cpu")
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]


# ---- rewards


def test_alone_in_a_batch_and_by_transformers(model, tokenizer, mixed):
    batch = rm.score_sequences(model, mixed, 10**6)
    assert batch.dtype == np.float32 and batch.std() > 0.05
    for tokens in (1, 40, 90):
        np.testing.assert_allclose(rm.score_sequences(model, mixed, tokens), batch, atol=1e-5)
    ids, mask = rm.pad(mixed, tokenizer.pad_token_id, "cpu")
    with torch.no_grad():
        np.testing.assert_allclose(
            model.model(input_ids=ids, attention_mask=mask).logits[:, 0], batch, atol=1e-5
        )
        for one, value in zip(mixed, batch):
            assert abs(model.model(input_ids=torch.tensor([one])).logits.item() - value) < 1e-5


def test_what_stands_in_the_padding_does_not_matter(model, tokenizer, mixed):
    ids, mask = rm.pad(mixed, tokenizer.pad_token_id, "cpu")
    garbage = torch.where(
        mask == 1, ids, torch.randint(5, 400, ids.shape, generator=torch.Generator().manual_seed(0))
    )
    longer = (
        torch.nn.functional.pad(garbage, (0, 9), value=77),
        torch.nn.functional.pad(mask, (0, 9)),
    )
    with torch.no_grad():
        clean = padded_rewards(model, ids, mask)
        torch.testing.assert_close(padded_rewards(model, garbage, mask), clean, atol=1e-5, rtol=0)
        torch.testing.assert_close(padded_rewards(model, *longer), clean, atol=1e-5, rtol=0)


def test_reward_is_read_at_the_end_of_the_response(model, tokenizer):
    """Even where the response itself holds the pad token."""
    ids = chats.encode(tokenizer, ASK, "yes <|pad|><|pad|>")
    assert ids.count(tokenizer.pad_token_id) == 2
    alone = rm.score_sequences(model, [ids], 1000)
    assert abs(alone[0] - rm.score_sequences(model, [ids + [9] * 30, ids], 1000)[1]) < 1e-5
    assert abs(alone[0] - rm.score_sequences(model, [ids[:-3]], 1000)[0]) > 1e-3


@pytest.mark.parametrize("tokens", [1, 60, 120, 10**6])
def test_equal_sequences_tie_exactly(model, tokenizer, mixed, tokens):
    """However many other responses there are, and whichever batch they come in."""
    sequences = [*mixed, *[list(mixed[3]) for _ in range(7)], *mixed[::2]]
    rewards = rm.score_sequences(model, sequences, tokens)
    assert len(set(rewards[12:19].tolist()) | {rewards[3]}) == 1
    np.testing.assert_array_equal(rewards[19:], rewards[:12:2])
    features = torch.from_numpy(rm.features_of(model, sequences, tokens))
    heads = rm.score_features(features, model.head.weight.detach())
    assert len(set(heads[12:19].tolist()) | {heads[3]}) == 1
    np.testing.assert_allclose(heads, rewards, atol=1e-5)


def test_the_first_deals_what_both_score(model, mixed, monkeypatch):
    """A second process that would make other batches scores its share of the first's."""
    groups, shares = list(rm.batches_of(model, mixed, 60)), []
    expected = rm.score_sequences(model, mixed, 60)
    monkeypatch.setattr(rm.parallel, "count", lambda: 2)
    monkeypatch.setattr(rm.parallel, "of_first", lambda _: groups)
    # The last to come finds what the first has said; of the first alone half are missing.
    monkeypatch.setattr(rm.parallel, "gathered", lambda own: shares.append(own) or shares)
    with pytest.raises(IndexError):
        rm.score_sequences(model, mixed, 60)
    monkeypatch.setattr(rm.parallel, "rank", lambda: 1)
    np.testing.assert_array_equal(rm.score_sequences(model, mixed, 10**6), expected)


@pytest.mark.parametrize("count", [3, 5, 7, 61])
def test_equal_features_tie_exactly(count):
    torch.manual_seed(0)
    features, weight = torch.randn(1, 384).repeat(count, 1), torch.randn(1, 384)
    rewards = rm.score_features(features, weight)
    assert rewards.dtype == np.float32 and len(set(rewards.tolist())) == 1
    assert abs(rewards[0] - float((features[0].double() * weight[0].double()).sum())) < 1e-4


# ---- the head


def test_the_head_comes_from_the_seed_alone(base, tokenizer):
    heads = []
    for state, seed in ((1, 5), (2, 5), (2, 6)):
        torch.manual_seed(state)
        np.random.seed(state)
        model = rm.load_base(base, tokenizer, torch.float32, "cpu")
        rm.draw_head(model.head.weight, model.model.config, seed)
        heads.append(model.head.weight.detach().clone())
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert 0.05 < heads[0].std() < 0.2  # the model's initializer_range is 0.1


def test_bfloat16_keeps_head_and_rewards_in_float32(base, tokenizer, mixed, tmp_path):
    model = rm.load_base(base, tokenizer, torch.bfloat16, "cpu")
    rm.draw_head(model.head.weight, model.model.config, 0)
    assert model.head.weight.dtype == torch.float32 and {
        p.dtype for p in model.model.base_model.parameters()
    } == {torch.bfloat16}
    ids, mask = rm.pad(mixed, tokenizer.pad_token_id, "cpu")
    rewards = padded_rewards(model, ids, mask)
    assert rewards.dtype == torch.float32 and not torch.equal(rewards, rewards.bfloat16().float())
    members.save_member(model.model, tokenizer, tmp_path / "member_01")
    loaded = members.KINDS["full"].load(tmp_path, 1, base, tokenizer, torch.bfloat16, "cpu")
    assert loaded.head.weight.dtype == torch.float32
    assert torch.equal(loaded.head.weight, model.head.weight), "rounded on loading"
    assert torch.equal(padded_rewards(loaded, ids, mask), rewards)


def test_rewards_have_a_gradient(model, tokenizer, mixed):
    rewards = padded_rewards(model, *rm.pad(mixed[:2], tokenizer.pad_token_id, "cpu"))
    rewards.sum().backward()
    assert (
        model.model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
        and not model.model.training
    )
    model.model.zero_grad()


# ---- checkpoints


def test_a_base_may_lack_its_head_and_nothing_else(base, tokenizer, tmp_path):
    broken = shutil.copytree(base, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    assert "score.weight" not in weights
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"weights are missing: .*layers\.1\.mlp\.up_proj"):
        rm.load_base(broken, tokenizer, torch.float32, "cpu")
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 32)
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"weights are missing: .*layers\.1\.mlp\.up_proj"):
        rm.load_base(broken, tokenizer, torch.float32, "cpu")


def test_a_base_with_a_head_of_another_shape(base, tokenizer, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=3).save_pretrained(
        tmp_path / "three"
    )
    model = rm.load_base(tmp_path / "three", tokenizer, torch.float32, "cpu")
    rm.draw_head(model.head.weight, model.model.config, 0)
    assert model.head.weight.shape == (1, 32)


def test_a_base_of_another_kind(tokenizer, tmp_path):
    from transformers import BartConfig, BartForSequenceClassification

    small = {
        "d_model": 8,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 1,
        "decoder_attention_heads": 1,
        "encoder_ffn_dim": 8,
        "decoder_ffn_dim": 8,
    }
    BartForSequenceClassification(BartConfig(vocab_size=400, **small)).save_pretrained(
        tmp_path / "bart"
    )
    with pytest.raises(InputError, match="no linear head called score"):
        rm.load_base(tmp_path / "bart", tokenizer, torch.float32, "cpu")


def test_a_saved_member_is_a_plain_directory(model, tokenizer, mixed, tmp_path):
    members.save_member(model.model, tokenizer, tmp_path / "member_01")
    loaded, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "member_01", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert loaded.config.num_labels == 1
    ids, mask = rm.pad(mixed, tokenizer.pad_token_id, "cpu")
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.eval()(input_ids=ids, attention_mask=mask).logits[:, 0],
            padded_rewards(model, ids, mask),
            atol=1e-6,
            rtol=0,
        )
    again = AutoTokenizer.from_pretrained(tmp_path / "member_01")
    assert (
        chats.encode(again, ASK, ANSWER) == chats.encode(tokenizer, ASK, ANSWER)
        and again.pad_token_id == tokenizer.pad_token_id
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_member_says_what_transformers_4_reads(base, tokenizer, tmp_path, dtype):
    members.save_member(
        rm.load_base(base, tokenizer, getattr(torch, dtype), "cpu").model, tokenizer, tmp_path / "m"
    )
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["rope_theta"] == 500000.0 and config["rope_scaling"] is None
    assert (
        config["torch_dtype"] == config["dtype"] == dtype
        and config["pad_token_id"] == tokenizer.pad_token_id
    )
    described = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    assert described["tokenizer_class"] == "PreTrainedTokenizerFast" and described[
        "model_input_names"
    ] == ["input_ids", "attention_mask"]


def test_scaled_rope_survives_for_transformers_4(tokenizer, tmp_path):
    rope = {"rope_type": "linear", "rope_theta": 7000.0, "factor": 2.0}
    base = make_base(tokenizer, tmp_path / "b", 0, rope_parameters=rope)
    members.save_member(
        rm.load_base(base, tokenizer, torch.float32, "cpu").model, tokenizer, tmp_path / "m"
    )
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["rope_theta"] == 7000.0 and config["rope_scaling"] == {
        "rope_type": "linear",
        "factor": 2.0,
    }
    assert (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").config.rope_parameters
        == rope
    )


def test_a_member_that_lacks_its_head_is_refused(model, base, tokenizer, tmp_path):
    members.save_member(model.model, tokenizer, tmp_path / "member_01")
    weights = load_file(tmp_path / "member_01" / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, tmp_path / "member_01" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"member_01: weights missing.*score\.weight"):
        members.KINDS["full"].load(tmp_path, 1, base, tokenizer, torch.float32, "cpu")
    with pytest.raises(InputError, match="member_02: no such directory"):
        members.KINDS["full"].load(tmp_path, 2, base, tokenizer, torch.float32, "cpu")


def test_head_is_saved_and_put_on_the_base_again(model, base, tokenizer, mixed, tmp_path):
    members.save_head(model.head.weight, tmp_path / "member_03", tokenizer, base)
    names = sorted(path.name for path in (tmp_path / "member_03").iterdir())
    assert names == ["chat_template.jinja", "head.safetensors"]
    loaded = members.KINDS["head"].load(tmp_path, 3, base, tokenizer, torch.float32, "cpu")
    np.testing.assert_array_equal(
        rm.score_sequences(loaded, mixed, 500), rm.score_sequences(model, mixed, 500)
    )


def test_fingerprint_follows_the_content(base, tokenizer, tmp_path):
    twin = shutil.copytree(base, tmp_path / "twin")
    assert provenance.fingerprint(twin) == provenance.fingerprint(base)
    (twin / "README.md").write_text("said later")
    assert provenance.fingerprint(twin) == provenance.fingerprint(base)
    other = make_base(tokenizer, tmp_path / "other", 1)
    assert provenance.fingerprint(other) != provenance.fingerprint(base)
    (twin / "chat_template.jinja").write_text("{{ messages }}")
    assert provenance.fingerprint(twin) != provenance.fingerprint(base)
    # Without tokenizer.json the vocabulary is in files of other names.
    (twin / "merges.txt").write_text("a b")
    before = provenance.fingerprint(twin)
    (twin / "merges.txt").write_text("a c")
    assert provenance.fingerprint(twin) == before
    (twin / "tokenizer.json").unlink()
    before = provenance.fingerprint(twin)
    (twin / "merges.txt").write_text("a d")
    assert provenance.fingerprint(twin) != before


def test_a_template_that_refuses_a_role(tokenizer):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}"
        "{{ raise_exception('no system turns') }}{% endif %}{{ m.content }}{% endfor %}"
    )
    chat = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "how ?"}]
    with pytest.raises(InputError, match="no system turns. on turns of system, user, assistant"):
        chats.encode(strict, chat, "so")
    assert chats.encode(strict, chat[1:], "so")


# ---- files that somebody else has made


def changed(base, directory, name, **changes):
    """A copy of the base with other values in one of its JSON files."""
    there = shutil.copytree(base, directory)
    values = json.loads((there / name).read_text()) | changes
    (there / name).write_text(json.dumps(values))
    return there


def told(function, *args):
    """The one line of the InputError that the function raises."""
    with pytest.raises(InputError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def loaded(base):
    """Load a base as training does."""
    return rm.load_base(base, chats.load_tokenizer(base), torch.float32, "cpu")


AUTO_MAP = {
    "AutoConfig": "modeling_x.Config",
    "AutoModelForSequenceClassification": "modeling_x.Model",
    "AutoModelForCausalLM": "modeling_x.Model",
}


def test_code_of_a_base_is_never_run(base, tmp_path, monkeypatch):
    """Not where the user says yes to every question either."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    native = changed(base, tmp_path / "native", "config.json", auto_map=AUTO_MAP)
    other = changed(base, tmp_path / "other", "config.json", auto_map=AUTO_MAP, model_type="x")
    own = {"auto_map": {"AutoTokenizer": [None, "modeling_x.Own"]}, "tokenizer_class": "Own"}
    tokens = changed(base, tmp_path / "tokens", "tokenizer_config.json", **own)
    for directory in (native, other, tokens):
        (directory / "modeling_x.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\n")
    assert type(loaded(native).model).__name__ == "LlamaForSequenceClassification"
    assert provenance.fingerprint(native)
    words = "needs code of its own, which is never run"
    assert words in told(loaded, other) and f"--base {other}: " in told(pretrained.config, other)
    assert words in told(chats.load_tokenizer, tokens)
    with pytest.raises(InputError, match=words):
        sampling.load_language_model(other, "cpu")
    assert not (tmp_path / "run").exists()


def test_every_call_of_from_pretrained_refuses_code():
    calls, willing = 0, []
    for path in REPOSITORY.rglob("*.py"):
        folder = path.relative_to(REPOSITORY).parts[0]
        if folder == "tests" or folder.startswith((".", "build")):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = isinstance(node, ast.Call) and getattr(node.func, "attr", None)
            if name in ("from_pretrained", "from_config"):
                calls += 1
                if "trust_remote_code=False" not in map(ast.unparse, node.keywords):
                    willing.append(f"{path}:{node.lineno}")
    assert calls and willing == []


def weights_changed(base, directory, **tensors):
    there = shutil.copytree(base, directory)
    weights = load_file(there / "model.safetensors")
    weights |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(weights, there / "model.safetensors", {"format": "pt"})
    return there


def test_weights_that_the_config_leaves_out(base, tmp_path, capsys):
    fewer = changed(base, tmp_path / "fewer", "config.json", num_hidden_layers=1)
    said = told(loaded, fewer)
    assert (
        said.startswith(f"--base {fewer}: 9 weights of layers found") and "model.layers.1." in said
    )
    bias = {"model__layers__0__self_attn__q_proj__bias": torch.zeros(32)}
    assert "1 weights of layers" in told(loaded, weights_changed(base, tmp_path / "bias", **bias))
    more = {"lm_head__weight": torch.ones(400, 32), "vision__layers__7__up": torch.ones(2)}
    capsys.readouterr()
    tower = weights_changed(base, tmp_path / "tower", **more)
    loaded(tower)
    assert (
        f"--base {tower}: 1 weights are not used: vision.layers.7.up\n" in capsys.readouterr().err
    )
    buffers = {"model__layers__0__self_attn__rotary_emb__inv_freq": torch.ones(4)}
    loaded(weights_changed(base, tmp_path / "old", **buffers))
    with pytest.raises(InputError, match="weights of layers found"):
        tokenizer = chats.load_tokenizer(base)
        existing.load_reward_model(fewer, tokenizer, torch.float32, "cpu", "--model")


class Pickled:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickles_are_never_read(base, tmp_path):
    directory, marker = shutil.copytree(base, tmp_path / "b"), tmp_path / "run"
    (directory / "model.safetensors").unlink()
    torch.save({"x": Pickled(marker)}, directory / "pytorch_model.bin")
    assert "no file named model.safetensors" in told(loaded, directory)
    index = {"metadata": {}, "weight_map": {"x": "pytorch_model.bin"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "'pytorch_model.bin' found, a file of this directory" in told(loaded, directory)
    (directory / "model.safetensors.index.json").unlink()
    (directory / "model.safetensors").write_bytes(pickle.dumps(Pickled(marker)))
    assert "SafetensorError" in told(loaded, directory) and not marker.exists()


BROKEN = {
    "model.safetensors": [b"", b"garbage", None],
    "config.json": [b"[]", b"{", b"{}", None],
    "tokenizer.json": [b"{}", b"[]", b"", b"garbage"],
    "tokenizer_config.json": [b"[]", b"5", b"{", b'{"model_max_length": "x"}'],
    "model.safetensors.index.json": [
        b"[]",
        b"{}",
        b'{"weight_map": {"x": "gone.safetensors"}}',
        b'{"weight_map": {"x": "../b/model.safetensors"}}',
    ],
    "adapter_config.json": [b"{}", b"["],
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_line(base, tmp_path, name):
    directory = shutil.copytree(base, tmp_path / "b")
    if "index" in name:
        (directory / "model.safetensors").rename(directory / "model-1.safetensors")
    for content in BROKEN[name]:
        (directory / name).unlink(missing_ok=True)
        if content is not None:
            (directory / name).write_bytes(content)
        assert str(directory) in told(loaded, directory), content


def test_half_a_file_of_weights(base, tmp_path):
    directory = shutil.copytree(base, tmp_path / "b")
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert told(loaded, directory).startswith(f"--base {directory}: the model could not be loaded")


def test_what_is_no_fault_of_the_file_keeps_its_kind():
    for error, kind in (
        (MemoryError(), MemoryError),
        (torch.OutOfMemoryError("CUDA out of memory."), MemoryError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (KeyError("r"), InputError),
    ):
        with pytest.raises(kind), pretrained.readable("a file"):
            raise error


@pytest.mark.parametrize(
    "template, said",
    [
        ("{{ 1/0 }}", "division by zero"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{% for i in range(10**12) %}{% endfor %}", "Range too big"),
        ("{% include 'x' %}", "no loader"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{# nothing #}", "it makes an empty text"),
        ("{{ messages[7].content }}", "has no element 7"),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "it has not ended after 0.2 seconds",
        ),
    ],
)
def test_templates_that_fail(base, tmp_path, monkeypatch, template, said):
    monkeypatch.setattr(chats, "TEMPLATE_SECONDS", 0.2)
    (tmp_path / "t.jinja").write_text(template)
    line = told(chats.load_tokenizer, base, tmp_path / "t.jinja")
    assert line.startswith(f"--chat-template {tmp_path / 't.jinja'}: the chat template fails (")
    assert said in line and "on turns of user, assistant" in line
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


def test_a_tokenizer_of_another_model(base, tokenizer, tmp_path):
    small = make_base(tokenizer, tmp_path / "small", 0, vocab_size=20)
    model = loaded(small)
    with pytest.raises(
        InputError, match="the tokenizer makes the token .*, and the model knows 20"
    ):
        rm.score_sequences(model, [chats.encode(tokenizer, ASK, ANSWER)], 1000)


def test_the_flag_is_named_where_there_is_one(model, mixed):
    long = [mixed[0] * 60]
    assert told(rm.check_positions, model, long).endswith("512; --max-length 512 or less expected")
    assert told(rm.score_sequences, model, long, 1000).endswith(
        "positions for 512; 512 or less expected"
    )


@pytest.mark.parametrize(
    "name", ["cpu:1", "cpu:0", "cpu:x", "cuda:99", "cuda:-1", "cudax", "mps", " "]
)
def test_devices_that_are_not_there(name):
    with pytest.raises(argparse.ArgumentTypeError, match=f"{name} found, cpu"):
        rm.device(name)
    assert rm.device("cpu") == "cpu"


def test_what_settles_a_script(monkeypatch):
    """Threads, the GPU that is meant, and nothing that two calls could do differently."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    found = []
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    for device in ("cpu", "cuda", "cuda:1"):
        rm.settle(SimpleNamespace(threads=1, device=device))
    assert found == [0, 1]
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.backends.cuda.matmul.allow_tf32
    torch.set_num_threads(before[0])
    torch.use_deterministic_algorithms(before[1])
