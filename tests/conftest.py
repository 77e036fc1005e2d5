"""What the tests of training and scoring share: a tiny base, a tiny data set, one trained run of each kind (all made once a session)."""

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [
    str(REPOSITORY),
    str(REPOSITORY / "extras"),
]  # the scripts, wherever pytest is started
os.environ.pop("PAIRWISE_COMMAND", None)
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
FLAGS = ("--threads", "1", "--device", "cpu")
FULL = ("--lr", "3e-3", "--pairs-per-step", "16")
HEAD = ("--train", "head", "--lr", "1e-2", "--epochs", "5")
LORA = ("--train", "lora", "--lora-rank", "4", "--lr", "1e-2", "--pairs-per-step", "16")


def script(name):
    """A script of data_prep/ or extras/ as a module."""
    path = next(
        path
        for path in REPOSITORY.glob(f"*/{name}.py")
        if path.parent.name in ("data_prep", "extras")
    )
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(run, base, *flags, iteration=1):
    """train_rm.py in this process."""
    import train_rm

    words = ["--run", str(run), "--base", str(base), "--iteration", str(iteration)]
    train_rm.main(train_rm.parse_args([*words, *FLAGS, *flags]))


def export(run, base, member):
    """extras/export_member.py in this process."""
    import export_member

    words = ["--run", str(run), "--base", str(base), "--member", str(member)]
    export_member.main(export_member.parse_args([*words, *FLAGS]))


def squared(reward_a, reward_b, t, done):
    """--loss mse, as the training loop calls it."""
    import train_rm

    return train_rm.LOSSES["mse"](reward_a - reward_b, t, None).sum()


def fit(run):
    import fit_weights

    fit_weights.main(fit_weights.parse_args(["--run", str(run)]))


def rewards(run, j=1, split="test"):
    return np.load(run / "rewards" / f"{j:02d}_{split}.npy")


def manifest(run):
    return json.loads((run / "manifest.json").read_text())["stages"]


def leftovers(run):
    return sorted(run.rglob(".partial-*"))


def fresh(data, directory, name="run"):
    """A run directory of its own that holds the prepared data (and the manifest that says so)."""
    return Path(shutil.copytree(data, directory / name))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo():
    return script("demo")


@pytest.fixture(scope="session")
def data(demo, tmp_path_factory):
    """A run directory with nothing but prepared data: the demo's population, 16 prompts of 4 responses."""
    run = tmp_path_factory.mktemp("data") / "run"
    args = demo.parse_args(["--run", str(run), "--prompts", "16", "--responses", "4"])
    demo.prompts.prepare(args, "demo", lambda: demo.comparisons(16, 4, 0), "sampled", {}, {})
    return run


@pytest.fixture(scope="session")
def tokenizer(demo, data):
    from pairwise.data import read_split

    split = read_split(data, "train")
    texts = [m["content"] for messages in split.messages for m in messages] + [
        text for texts in split.responses for text in texts
    ]
    return demo.train_tokenizer(texts, 400)


@pytest.fixture(scope="session")
def split(data):
    from pairwise.data import read_split

    return read_split(data, "train")


@pytest.fixture(scope="session")
def sequences(split, tokenizer):
    from pairwise import reward_model as rm

    return rm.encode_split(tokenizer, split.messages, split.responses, None)


@pytest.fixture(scope="session")
def base(tokenizer, tmp_path_factory):
    """Directory of a random Llama for token prediction, hidden size 32, two layers, with the demo's tokenizer."""
    return make_base(tokenizer, tmp_path_factory.mktemp("base") / "tiny", seed=0)


def make_base(tokenizer, directory, seed, **changes):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            **TINY
            | {
                "vocab_size": len(tokenizer),
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
                "tie_word_embeddings": True,
                "initializer_range": 0.1,
                "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            }
            | changes
        )
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def continuations():
    return script("continuations")


@pytest.fixture(scope="session")
def full_run(data, base, continuations, tmp_path_factory):
    """Two members, all parameters, float32, weights after each, with continuations. Read only: copy it before you change it."""
    run = fresh(data, tmp_path_factory.mktemp("full"))
    continuations.main(
        continuations.parse_args(
            [
                "--run",
                str(run),
                "--base",
                str(base),
                "--prompts",
                "2",
                "--count",
                "5",
                "--max-tokens",
                "20",
                "--threads",
                "1",
            ]
        )
    )
    for j in (1, 2):
        train(run, base, *FULL, iteration=j)
        fit(run)
    return run


@pytest.fixture(scope="session")
def head_run(data, base, tmp_path_factory):
    """Two heads on the frozen base, and when features/train.npy was written. Read only too."""
    run = fresh(data, tmp_path_factory.mktemp("head"))
    times = []
    for j in (1, 2):
        train(run, base, *HEAD, iteration=j)
        fit(run)
        times.append((run / "features" / "train.npy").stat().st_mtime_ns)
    return SimpleNamespace(run=run, times=times)


@pytest.fixture(scope="session")
def lora_run(data, full_run, base, tmp_path_factory):
    """Two members of adapters and head, float32, with the continuations of the full run. Read only too."""
    run = fresh(data, tmp_path_factory.mktemp("lora"))
    shutil.copy(full_run / "continuations.parquet", run)
    for j in (1, 2):
        train(run, base, *LORA, iteration=j)
        fit(run)
    return run
