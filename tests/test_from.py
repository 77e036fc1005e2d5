"""extras/adopt.py: existing reward models as members, with the rewards that transformers gives,
through weights, report and score.py.
"""

import gc
import json
import os
import shutil
import weakref

import evaluate
import score
from pairwise import existing, manifest
from pairwise.cli import InputError
from pairwise.data import read_split

import adopt
import numpy as np
import pytest
import torch
from conftest import FLAGS, HEAD, TINY, export, fit, fresh, leftovers, rewards, train
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)


def make_model(tokenizer, directory, seed, outputs=1, **changes):
    """A random reward model of its own size, with its tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **TINY
        | {
            "vocab_size": len(tokenizer),
            "num_labels": outputs,
            "pad_token_id": tokenizer.pad_token_id,
            "initializer_range": 0.1,
        }
        | changes
    )
    LlamaForSequenceClassification(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def models(demo, data, tokenizer, tmp_path_factory):
    """Three models of different sizes, tokens and templates; of the second, padding is the token
    that ends its template; the third is an encoder.
    """
    folder, texts = tmp_path_factory.mktemp("models"), sum(read_split(data, "train").responses, [])
    other = demo.train_tokenizer(texts, 300)
    other.chat_template = (
        "{% for m in messages %}{{ m['role'] }} says {{ m['content'] }}{{ eos_token }}{% endfor %}"
    )
    torch.manual_seed(2)
    encoder = DebertaV2ForSequenceClassification(
        DebertaV2Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=256,
            relative_attention=True,
            position_buckets=16,
            pos_att_type=["p2c", "c2p"],
            num_labels=1,
            initializer_range=0.1,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    encoder.classifier.bias.data.fill_(0.5)
    encoder.save_pretrained(folder / "encoder")
    tokenizer.save_pretrained(folder / "encoder")
    return [
        make_model(tokenizer, folder / "one", 0),
        make_model(
            other,
            folder / "two",
            1,
            hidden_size=16,
            intermediate_size=32,
            pad_token_id=other.eos_token_id,
        ),
        folder / "encoder",
    ]


def adopt_model(run, model, j=1, *flags):
    words = ["--run", str(run), "--model", str(model), "--iteration", str(j)]
    adopt.main(adopt.parse_args([*words, *FLAGS, *flags]))


def by_transformers(model, messages, responses):
    """Rewards of every response by itself, with nothing of this project's."""
    tokenizer, plain = (
        AutoTokenizer.from_pretrained(model),
        AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32).eval(),
    )
    found = []
    with torch.no_grad():
        for context, texts in zip(messages, responses):
            for text in texts:
                chat = [*context, {"role": "assistant", "content": text}]
                ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)[
                    "input_ids"
                ]
                found.append(plain(input_ids=ids).logits.item())
    return np.array(found)


@pytest.fixture(scope="module")
def ensemble(data, full_run, models, tmp_path_factory):
    """All three, scored, with continuations and weights. Read only."""
    run = fresh(data, tmp_path_factory.mktemp("ensemble"))
    shutil.copy(full_run / "continuations.parquet", run)
    for j, model in enumerate(models, 1):
        adopt_model(run, model, j, *(("--max-length", "200") if j == 3 else ()))
        fit(run)
    return run


def test_rewards_are_the_models_own(ensemble, models):
    for j, model in enumerate(models, 1):
        for name in ("train", "valid", "test"):
            if (ensemble / "data" / f"{name}.parquet").exists():
                split = read_split(ensemble, name)
                np.testing.assert_allclose(
                    rewards(ensemble, j, name),
                    by_transformers(model, split.messages, split.responses),
                    atol=2e-5,
                )
        entry = manifest.entries(ensemble)[f"member_{j:02d}"]
        assert entry["settings"] == {
            "train": "from",
            "dtype": "float32",
            "max_length": 200 if j == 3 else 2048,
        } and entry["base"] == str(model)
        source = json.loads((ensemble / f"member_{j:02d}" / "source.json").read_text())
        assert (
            source["model"] == str(model) and source["fingerprint"] == entry["inputs"]["base model"]
        )
        assert rewards(ensemble, j, "continuations").shape == (2, 5)
    assert not leftovers(ensemble) and not (ensemble / "logs").exists()


def test_weights_metrics_and_report(ensemble, tmp_path):
    run = fresh(ensemble, tmp_path)
    evaluate.main(evaluate.parse_args(["--run", str(run), "--resamples", "10"]))
    metrics, page = (
        json.loads((run / "metrics.json").read_text()),
        (run / "report.html").read_text(),
    )
    assert (
        metrics["k"] == 3
        and metrics["diversity"]["continuations"] == 5
        and "existing reward models" in page
    )
    test = metrics["splits"]["test"]
    assert test["soft_single"] is None and test["soft_true"] is None
    assert 0 < test["soft_scaled"] < 0.5
    split, alpha = (
        read_split(run, "test"),
        np.array(json.loads((run / "weights.json").read_text())[2]["alpha"]),
    )
    votes = np.stack(
        [(np.sign(r[split.a] - r[split.b]) + 1) / 2 for r in (rewards(run, j) for j in (1, 2, 3))]
    )
    assert test["ensemble"][2]["brier"] == pytest.approx(
        ((alpha @ votes - split.p) ** 2).mean(), abs=1e-9
    )


def questions(run, path):
    split = read_split(run, "test")
    path.write_text(
        "".join(
            json.dumps({"prompt": m, "responses": texts}) + "\n"
            for m, texts in zip(split.messages, split.responses)
        )
    )
    return path


def test_score(ensemble, tmp_path, monkeypatch):
    """One model after the other: a card may have no room for two."""
    seen, load = [], existing.load

    def alone(*args):
        gc.collect()
        assert all(weight() is None for weight in seen)
        model = load(*args)
        seen.append(weakref.ref(next(model.model.parameters())))
        return model

    monkeypatch.setattr(existing, "load", alone)
    path = questions(ensemble, tmp_path / "mine.jsonl")
    score.main(score.parse_args([str(path), "--run", str(ensemble), *FLAGS]))
    rows = [json.loads(line) for line in (tmp_path / "mine-scores.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(
        np.concatenate([row["rewards"] for row in rows]),
        np.stack([rewards(ensemble, j) for j in (1, 2, 3)], 1),
        atol=1e-6,
    )
    assert len(seen) == 3


def test_an_existing_model_is_not_exported(ensemble, base):
    """It is one already, wherever it is."""
    with pytest.raises(InputError, match="member_01: an existing model, .* its source.json says"):
        export(ensemble, base, 1)


def test_score_says_where_a_model_is_not(ensemble, models, tmp_path):
    path, moved = (
        questions(ensemble, tmp_path / "mine.jsonl"),
        shutil.copytree(models[1], tmp_path / "two"),
    )
    run = fresh(ensemble, tmp_path)
    source = run / "member_02" / "source.json"
    facts = json.loads(source.read_text())
    assert facts.pop("model_from_run") == os.path.relpath(models[1], ensemble)
    words = [str(path), "--run", str(run), *FLAGS]

    def told(*flags):
        with pytest.raises(InputError) as error:
            score.main(score.parse_args([*words, *flags]))
        assert "\n" not in str(error.value) and not (tmp_path / "mine-scores.jsonl").exists()
        return str(error.value)

    source.write_text(json.dumps(facts | {"model": str(tmp_path / "gone")}))
    assert f"{source}: {tmp_path / 'gone'} cannot be read any more" in told()
    source.write_text(json.dumps(facts | {"model": str(moved)}))
    make_model(AutoTokenizer.from_pretrained(moved), moved, 9, hidden_size=16, intermediate_size=32)
    assert f"{source}: {moved} is another model than the one that scored the data" in told()
    assert "--base and --chat-template are for trained members" in told("--base", str(moved))
    shutil.rmtree(moved)
    shutil.copytree(models[1], moved)
    score.main(score.parse_args(words))
    assert (tmp_path / "mine-scores.jsonl").exists()


def test_a_template_of_ones_own_is_kept(data, models, tmp_path):
    """A model without a chat template takes one from a file, and score.py needs it no more."""
    bare, template, run = (
        shutil.copytree(models[0], tmp_path / "bare"),
        tmp_path / "mine.jinja",
        fresh(data, tmp_path),
    )
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match=f"--model {bare} has no chat template; name a Jinja file"):
        adopt_model(run, bare)
    template.write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    adopt_model(run, bare, 1, "--chat-template", str(template))
    fit(run)
    template.unlink()
    path = questions(run, tmp_path / "mine.jsonl")
    score.main(score.parse_args([str(path), "--run", str(run), *FLAGS]))
    rows = [json.loads(line) for line in (tmp_path / "mine-scores.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(
        np.concatenate([row["rewards"] for row in rows])[:, 0], rewards(run), atol=1e-6
    )


def test_again_it_is_skipped_and_others_are_refused(
    ensemble, head_run, models, base, tmp_path, capsys
):
    run = fresh(ensemble, tmp_path)
    before = (run / "manifest.json").read_bytes()
    adopt_model(run, models[0])
    assert (
        "is there, skipped" in capsys.readouterr().out
        and (run / "manifest.json").read_bytes() == before
    )
    for words, said in (
        ((models[1], 1), "made from another base model"),
        ((models[0], 1, "--max-length", "64"), "max-length was 2048, is 64"),
    ):
        with pytest.raises(InputError, match=said):
            adopt_model(run, *words)
    for j in (1, 4):
        with pytest.raises(InputError, match="train was from, is head"):
            train(run, base, *HEAD, iteration=j)
    trained = fresh(head_run.run, tmp_path, "trained")
    with pytest.raises(InputError, match="train was head, is from"):
        adopt_model(trained, models[0])
    with pytest.raises(InputError, match="member 1 is not an existing model"):
        adopt_model(trained, models[0], 3)
    assert not (trained / "member_03").exists() and (run / "manifest.json").read_bytes() == before


def test_refused_models(data, tokenizer, base, tmp_path):
    run = fresh(data, tmp_path)
    for model, said in (
        (
            make_model(tokenizer, tmp_path / "three", 0, outputs=3),
            "a head with 3 outputs found, a linear head with one output expected",
        ),
        (base, "weights are missing: score.weight; a trained reward model expected"),
        (tmp_path / "none", "no such directory"),
    ):
        with pytest.raises(InputError, match=said) as error:
            adopt_model(run, model)
        assert str(error.value).startswith(f"--model {model}: ") and "\n" not in str(error.value)
    (run / "rewards").mkdir()
    for split in ("train", "test"):
        (run / "rewards" / f"01_{split}.npy").touch()
    with pytest.raises(InputError, match="--iteration 3: .* has 1 members, 2 at most expected"):
        adopt_model(run, base, 3)
    shutil.rmtree(run / "rewards")
    assert (
        not list(run.glob("member_*"))
        and not (run / "rewards").exists()
        and "member_01" not in manifest.entries(run)
    )


@pytest.mark.parametrize(
    "content, said",
    [
        ("[]", "a list found, an object expected"),
        ("{}", "no model found"),
        ('"x"', "text found, an object expected"),
        ({"model": 5}, "model: a number found, text expected"),
        ({"max_length": "9"}, "max_length: text found, a number or null expected"),
        ({"max_length": 0}, "dtype .*, and max_length at least 1 or null, expected"),
        ({"dtype": "load"}, "dtype bfloat16 or float32"),
    ],
)
def test_a_source_of_another_form(ensemble, tmp_path, content, said):
    run, path = fresh(ensemble, tmp_path), questions(ensemble, tmp_path / "mine.jsonl")
    source = run / "member_02" / "source.json"
    if isinstance(content, dict):
        content = json.dumps(json.loads(source.read_text()) | content)
    source.write_text(content)
    with pytest.raises(InputError, match=f"{source}: {said}"):
        score.main(score.parse_args([str(path), "--run", str(run), *FLAGS]))


def test_an_existing_model_with_code_or_broken_files(data, models, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for name, content, said in (
        ("config.json", b"[]", "no tokenizer could be loaded"),
        ("model.safetensors", b"garbage", "the model could not be loaded .SafetensorError"),
        ("config.json", {"num_hidden_layers": 1}, "weights of layers found"),
        ("config.json", {"model_type": "x", "auto_map": {"AutoConfig": "x.X"}}, "code of its own"),
    ):
        there = shutil.copytree(models[0], tmp_path / "m", dirs_exist_ok=True)
        if isinstance(content, dict):
            content = json.dumps(json.loads((there / name).read_text()) | content).encode()
        (there / "x.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
        (there / name).write_bytes(content)
        run = fresh(data, tmp_path, f"run-{said}")
        with pytest.raises(InputError, match=f"--model {there}: .*{said}"):
            adopt_model(run, there)
        assert not list(run.glob("member_*")) and not (tmp_path / "run").exists()
