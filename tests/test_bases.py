"""pairwise/bases.py: composite models, of which the text side is trained, adopted and planned, and
checkpoints that have a head already."""

import shutil

from pairwise import chats, existing, members, sampling
from pairwise import reward_model as rm
from pairwise.cli import InputError
from pairwise.data import read_split
from pairwise.files import read_json

import adopt
import from_gguf
import numpy as np
import plan
import pytest
import torch
from conftest import FLAGS, FULL, HEAD, LORA, REPOSITORY, TINY, export, fresh, rewards, train
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ForSequenceClassification,
    Llama4Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

VISION = {"hidden_size": 16, "intermediate_size": 32, "image_size": 16, "patch_size": 8}
VISION |= {"num_hidden_layers": 1, "num_attention_heads": 2}
QWEN = {"hidden_size": 16, "intermediate_size": 32, "depth": 1, "num_heads": 2, "patch_size": 4}
QWEN |= {"out_hidden_size": 32, "num_position_embeddings": 16}
LINEAR = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
LINEAR |= {"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}


def make(tokenizer, directory, kind, **changes):
    """A random model of a kind in a directory; composite ones say nothing of a pad token at their
    top, as those of the hub."""
    text = TINY | {"vocab_size": len(tokenizer), "head_dim": 8, "initializer_range": 0.1}
    text |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    siglip = {"text_config": text, "vision_config": VISION | {"model_type": "siglip_vision_model"}}
    qwen = {"text_config": text | LINEAR, "vision_config": QWEN}
    llava = {"text_config": text | {"model_type": "llama"}, "image_token_index": 5}
    llava |= {"vision_config": VISION | {"model_type": "clip_vision_model"}}
    model_class, config_class, words = {
        "gemma3": (Gemma3ForConditionalGeneration, Gemma3Config, siglip),
        "gemma3 rewards": (Gemma3ForSequenceClassification, Gemma3Config, siglip),
        "qwen3.5": (Qwen3_5ForConditionalGeneration, Qwen3_5Config, qwen),
        "llava": (LlavaForConditionalGeneration, LlavaConfig, llava),
        "llama": (LlamaForCausalLM, LlamaConfig, text),
        "llama rewards": (LlamaForSequenceClassification, LlamaConfig, text),
        "bert rewards": (BertForSequenceClassification, BertConfig, text),
    }[kind]
    torch.manual_seed(0)
    model = model_class(config_class(**words | changes)).eval()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model


def loaded(base):
    return rm.load_base(base, chats.load_tokenizer(base), torch.float32, "cpu")


# ---- composite models


@pytest.mark.parametrize("kind", ["gemma3", "qwen3.5", "llava"])
def test_a_composite_base_is_its_text_side(kind, tokenizer, sequences, tmp_path):
    whole, model = make(tokenizer, tmp_path / "base", kind), loaded(tmp_path / "base")
    assert not [n for n, _ in model.model.named_parameters() if "vision" in n or "visual" in n]
    assert model.model.config.pad_token_id == tokenizer.pad_token_id
    with torch.no_grad():
        found = rm.hidden_of_batch(model, sequences[:3])
        for ids, hidden in zip(sequences, found):
            states = whole.model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state
            torch.testing.assert_close(states[0, -1], hidden, atol=2e-5, rtol=0)
    if kind == "llava":
        return  # transformers has no language model of it that reads text alone.
    language = sampling.load_language_model(tmp_path / "base", "cpu")
    with torch.no_grad():
        logits = [m(input_ids=torch.tensor(sequences[:1])).logits for m in (whole, language)]
    torch.testing.assert_close(*logits)


@pytest.mark.parametrize("flags", [FULL, HEAD, LORA], ids=["full", "head", "lora"])
def test_members_of_a_composite_base(flags, data, tokenizer, sequences, tmp_path):
    base, run = tmp_path / "base", fresh(data, tmp_path)
    make(tokenizer, base, "gemma3")
    train(run, base, *flags)
    member = members.load_member(run, 1, base, tokenizer, torch.float32, "cpu")
    scores = rm.score_sequences(member, sequences, 1024)
    np.testing.assert_allclose(scores, rewards(run, 1, "train"), atol=1e-5)
    if flags != FULL:
        export(run, base, 1)
    plain, info = AutoModelForSequenceClassification.from_pretrained(
        run / "member_01", output_loading_info=True
    )
    assert plain.config.model_type == "gemma3_text" and plain.config.num_labels == 1
    assert not info["missing_keys"] and not info["unexpected_keys"]
    config = read_json(run / "member_01" / "config.json", dict)  # As transformers 4 reads it.
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (1e6, 1e4)
    with torch.no_grad():
        found = plain.eval()(input_ids=torch.tensor(sequences[:1])).logits.item()
    assert abs(found - scores[0]) < 1e-4


def test_a_composite_reward_model_is_adopted(data, tokenizer, tmp_path):
    run, there = fresh(data, tmp_path), tmp_path / "model"
    model = make(tokenizer, there, "gemma3 rewards", num_labels=1)
    words = ["--run", str(run), "--model", str(there), "--iteration", "1", *FLAGS]
    adopt.main(adopt.parse_args(words))
    split, found = read_split(run, "test"), []
    for ids in chats.encode_split(tokenizer, split.messages, split.responses, None):
        with torch.no_grad():
            found.append(model(input_ids=torch.tensor([ids])).logits.item())
    np.testing.assert_allclose(rewards(run), found, atol=1e-5)


def test_a_plan_of_a_composite_base(tokenizer, tmp_path, capsys):
    make(tokenizer, tmp_path / "base", "gemma3")
    plan.main(plan.parse_args(["--base", str(tmp_path / "base")]))  # Its verdicts are of all kinds.
    number = sum(p.numel() for p in loaded(tmp_path / "base").model.parameters())
    assert f"{number:,} parameters as a reward model" in capsys.readouterr().out


@pytest.mark.parametrize("config_class", [Llama4Config, Qwen2_5_VLConfig])
def test_a_text_side_without_a_reward_model(config_class, tokenizer, tmp_path):
    config_class().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    said = f"--base {tmp_path}: {config_class.__name__} found, .* a model of text alone expected"
    with pytest.raises(InputError, match=said):
        loaded(tmp_path)
    with pytest.raises(InputError, match=said):
        plan.main(plan.parse_args(["--base", str(tmp_path)]))


# ---- checkpoints with a head


@pytest.mark.parametrize(
    "kind, outputs, named",
    [
        ("llama rewards", 1, "score.weight"),
        ("llama rewards", 5, "LlamaForSequenceClassification"),
        ("bert rewards", 2, "BertForSequenceClassification"),
        ("gemma3 rewards", 3, "Gemma3ForSequenceClassification"),
    ],
)
def test_a_reward_model_as_a_base(kind, outputs, named, tokenizer, tmp_path, capsys):
    """Its head is told and not used; where its trunk could write, it does not."""
    make(tokenizer, tmp_path, kind, num_labels=outputs, tie_word_embeddings=True)
    told = f"--base {tmp_path}: a reward model found"
    for _ in range(2):
        assert loaded(tmp_path).head.out_features == 1
    said = capsys.readouterr().err
    assert said.count(f"{told} ({named}); its head is not used, a new one is made\n") == 1
    if kind != "bert rewards":
        with pytest.raises(InputError, match="which writes no text; a language model expected"):
            sampling.load_language_model(tmp_path, "cpu")
    if outputs == 1:
        existing.load_reward_model(tmp_path, tokenizer, torch.float32, "cpu", "--model")
        assert "a reward model" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "weight",
    ["v_head.summary.bias", "score_head.weight", "regression_head.weight", "model.score.0.w"],
)
def test_a_head_of_another_library_as_a_base(base, tmp_path, capsys, weight):
    """As TRL, PKU's Beaver, UltraRM and others write it, beside a language model."""
    there = shutil.copytree(base, tmp_path / "value")
    weights = load_file(there / "model.safetensors") | {weight: torch.ones(1, 32)}
    save_file(weights, there / "model.safetensors", {"format": "pt"})
    loaded(there)
    assert f"a reward model found ({weight}); its head" in capsys.readouterr().err
    with pytest.raises(InputError, match="head|score.*a language model expected"):
        sampling.load_language_model(there, "cpu")


def test_a_language_model_has_no_head(base, capsys):
    loaded(base)
    sampling.load_language_model(base, "cpu")
    assert "head" not in capsys.readouterr().err


def test_a_gguf_that_is_not_there_and_a_directory_that_is(tmp_path):
    (tmp_path / "out").mkdir()
    for out, message in (("new", "m.gguf: no such file"), ("out", "out: found, a new directory")):
        words = ["--gguf", str(tmp_path / "m.gguf"), "--out", str(tmp_path / out)]
        with pytest.raises(InputError, match=message):
            from_gguf.main(from_gguf.parse_args(words))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_template_for_gemma(base):
    """Its turns, begun with the bos token; with the answer to come, what a sample continues."""
    tokenizer = chats.load_tokenizer(base, REPOSITORY / "experiments" / "gemma.jinja")
    asked = [{"role": "user", "content": "One\ntwo?"}]
    text = (
        f"{tokenizer.bos_token}<start_of_turn>user\nOne\ntwo?<end_of_turn>\n<start_of_turn>model\n"
    )
    assert tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True) == text
    told = [*asked, {"role": "assistant", "content": "Two."}]
    assert tokenizer.apply_chat_template(told, tokenize=False) == f"{text}Two.<end_of_turn>\n"
