"""A base whose weights are quantized: its head and its adapters train where the library that reads
it is installed; what cannot be done is one line, before anything is written."""

import json
import shutil

import score
import train_rm
from pairwise import cli, pretrained
from pairwise import reward_model as rm
from pairwise.cli import InputError
from pairwise.data import read_split

import export_member
import numpy as np
import pytest
import torch
import train_joint
from conftest import FLAGS, HEAD, LORA, fit, fresh, rewards, script, train
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
LACKING = {
    "bitsandbytes": (BNB, "bitsandbytes"),
    "its first configs": ({"load_in_4bit": True}, "bitsandbytes"),
    "gptq": ({"quant_method": "gptq", "bits": 4}, "optimum gptqmodel"),
    "awq": ({"quant_method": "awq", "bits": 4}, "gptqmodel"),
    "compressed-tensors": ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
    "torchao": ({"quant_method": "torchao"}, "torchao"),
}


def quantized(base, directory, config):
    """A base whose config says that its weights are quantized."""
    shutil.copytree(base, directory)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    return directory


def line(capsys, module, *words):
    """The one line with which a script refuses."""
    with pytest.raises(SystemExit) as stopped:
        cli.run_main(module.main, module.parse_args([str(word) for word in words]))
    *before, said = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and not before
    return said


@pytest.mark.parametrize("name", LACKING)
def test_without_what_reads_it(data, base, tmp_path, monkeypatch, capsys, name):
    config, packages = LACKING[name]
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    run, there = fresh(data, tmp_path), quantized(base, tmp_path / "base", config)
    flags = ("--base", there, "--train", "head")
    for module, more in ((train_rm, ("--iteration", 1, *FLAGS)), (script("plan"), ())):
        said = line(capsys, module, "--run", run, *flags, *more)
        assert str(there) in said and said.endswith(f"pip install {packages}")
    assert not (run / "member_01").exists() and not (run / "features").exists()


def test_in_a_way_that_is_not_known(base, tokenizer, tmp_path):
    """transformers would read the weights without their scales."""
    there = quantized(base, tmp_path / "base", {"quant_method": "modelopt"})
    with pytest.raises(InputError, match=r"quantized \(modelopt\) in a way that transformers"):
        rm.load_base(there, tokenizer, torch.float32, "cpu")


def test_all_parameters_are_refused(data, base, tmp_path, capsys):
    run, there = fresh(data, tmp_path), quantized(base, tmp_path / "base", BNB)
    before = sorted(run.rglob("*"))
    words = ("--run", run, "--base", there, *FLAGS)
    for module, more in ((train_rm, ("--iteration", 1)), (train_joint, ("--k", 2))):
        assert "--train lora or head" in line(capsys, module, *words, *more)
    assert sorted(run.rglob("*")) == before
    assert "--train lora or head" in line(capsys, script("plan"), "--base", there)


@pytest.mark.filterwarnings("error:.*an autograd kernel was not registered")
def test_head_and_adapters_of_four_bits(data, base, tokenizer, tmp_path, capsys):
    """They are trained, scored as they were, and not merged into four bits."""
    pytest.importorskip("bitsandbytes")
    there, config = tmp_path / "base", BitsAndBytesConfig(load_in_4bit=True)
    config.bnb_4bit_compute_dtype = torch.float32
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config)
    model.save_pretrained(there)
    tokenizer.save_pretrained(there)
    split = read_split(data, "test")
    asked = tmp_path / "questions.jsonl"
    rows = zip(split.messages, split.responses)
    asked.write_text("".join(json.dumps({"prompt": m, "responses": r}) + "\n" for m, r in rows))
    for name, flags in (("head", HEAD), ("lora", (*LORA, "--dtype", "float32"))):
        run = fresh(data, tmp_path, name)
        train(run, there, *flags)
        fit(run)
        out = tmp_path / f"{name}.jsonl"
        words = ("--run", run, "--base", there, "--out", out, *FLAGS, asked)
        score.main(score.parse_args([str(word) for word in words]))
        found = [json.loads(text)["rewards"] for text in out.read_text().splitlines()]
        found = np.concatenate([np.array(x).reshape(1, -1)[0] for x in found])
        np.testing.assert_allclose(found, rewards(run), rtol=1e-4, atol=1e-5)
        assert np.ptp(found) > 0.01
        words = ("--run", run, "--base", there, "--member", 1, *FLAGS)
        capsys.readouterr()
        assert "cannot be trained or saved" in line(capsys, export_member, *words)
        assert not list(run.rglob(".partial-*"))
