"""What the tests of training and scoring share: a tiny base, tiny data, a trained run of each kind.

Each is made once, by the first process that needs it, and read by all: no test may change it.
"""

import csv
import fcntl
import importlib.util
import io
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

from pairwise import chats, manifest

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
# The scripts are found wherever pytest is started.
sys.path[:0] = [str(REPOSITORY / name) for name in ("", "extras", "data_prep", "experiments")]
os.environ.pop("PAIRWISE_COMMAND", None)
os.environ["PAIRWISE_CACHE"] = ""  # off, in what the tests start too
# Ask no name server (glibc): torch asks for the name of each process that connects, a hundred times
# in test_parallel.py, and one that answers late held it for minutes.
os.environ["RES_OPTIONS"] = "attempts:0"
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


def committed(name):
    """The rows of a table of results/."""
    with open(REPOSITORY / "results" / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def script(name):
    """A script of data_prep/ or extras/ as a module."""
    folders = ("data_prep", "extras")
    path = next(path for path in REPOSITORY.glob(f"*/{name}.py") if path.parent.name in folders)
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


def train_on(args, model, split, sequences, log=None):
    """training.train_full on all pairs of the split, with --loss mse and the order of seed 0."""
    from pairwise import training

    every, order = np.ones(len(split.p), bool), np.random.default_rng(0)
    data = (split, sequences, (split.p,), squared, every)
    training.train_full(args, model, *data, order, io.StringIO() if log is None else log)


def fit(run):
    import fit_weights

    fit_weights.main(fit_weights.parse_args(["--run", str(run)]))


def rewards(run, j=1, split="test"):
    return np.load(run / "rewards" / f"{j:02d}_{split}.npy")


def mean_loss(lines):
    """The mean over the pairs of a log's lines."""
    return sum(line["loss"] * line["pairs"] for line in lines) / sum(x["pairs"] for x in lines)


def leftovers(run):
    return sorted(run.rglob(".partial-*"))


def fresh(data, directory, name="run"):
    """A run directory of its own that holds the prepared data (and the manifest that says so)."""
    return Path(shutil.copytree(data, directory / name))


def edited(run):
    """Accept what a test has changed in a run by hand, so that its hashes do not refuse it."""
    manifest.accept_edited(run)
    return run


def of_one_vote(run, directory):
    """Two copies of a run: every second pair of a prompt has one vote, or is not there."""
    single, without = (fresh(run, directory, name) for name in ("single", "without"))
    for path in sorted((run / "data").glob("*.parquet")):
        table = pq.read_table(path)
        rows = table.to_pylist()
        for pair in (pair for row in rows for pair in row["pairs"][1::2]):
            pair["votes_a"], pair["votes_b"] = 1.0, 0.0
        kept = [
            row | {name: row[name][::2] for name in ("pairs", "p_true") if name in row}
            for row in rows
        ]
        for copy, changed in ((single, rows), (without, kept)):
            changed = pa.Table.from_pylist(changed, schema=table.schema)
            pq.write_table(changed, copy / "data" / path.name)
    return edited(single), edited(without)


def without_hashes(run, inputs=False):
    """A run as if its files were brought by hand: no hash of them is known, or with `inputs` those
    alone that stages were made from."""
    entries = manifest.entries(run)
    for entry in entries.values():
        entry.pop("outputs", None)
        entry["inputs"] = entry["inputs"] if inputs else {}
    (run / "manifest.json").write_text(json.dumps({"stages": entries}))
    return run


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    """Tests that share a fixture of their module run in one process, which makes it once.

    pytest-xdist with --dist loadgroup starts with the largest group, and fills the gaps with the
    tests that stand alone.
    """
    for item in items:
        fixtures = item._fixtureinfo.name2fixturedefs.values()
        if any(definitions[-1].scope == "module" for definitions in fixtures):
            item.add_marker(pytest.mark.xdist_group(item.module.__name__))


def with_weights(run, directory, *alpha):
    """A copy of a run, its mixture weights set by hand: those of training depend on the CPU."""
    run = fresh(run, directory)
    entries = json.loads((run / "weights.json").read_text())
    entries[len(alpha) - 1]["alpha"] = list(alpha)
    (run / "weights.json").write_text(json.dumps(entries))
    return edited(run)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """made_once(name, make): a directory that make(directory) fills, once for all processes."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a folder of its own in the session's
        root = root.parent
    root = root / "made_once"

    def directory_of(name, make):
        directory = root / name
        root.mkdir(exist_ok=True)
        with open(root / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (root / f"{name}.done").exists():
                shutil.rmtree(directory, ignore_errors=True)  # of an attempt that failed
                directory.mkdir()
                make(directory)
                (root / f"{name}.done").touch()
        return directory

    return directory_of


@pytest.fixture
def no_figures(monkeypatch):
    """The report is tested elsewhere and takes longer than all numbers."""

    import evaluate

    def write(out, *_):
        (out / "figures").mkdir(exist_ok=True)
        for name in ("calibration", "votes", "reliability", "weights"):
            (out / "figures" / f"{name}.png").write_text("figure")
        (out / "report.html").write_text("report")

    monkeypatch.setattr(evaluate.report, "write", write)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo():
    return script("demo")


@pytest.fixture(scope="session")
def data(demo, made_once):
    """A run directory with data alone: the demo's population, 16 prompts of 4 responses."""

    def make(directory):
        words = ["--run", str(directory / "run"), "--prompts", "16", "--responses", "4"]
        args = demo.parse_args(words)
        demo.prompts.prepare(args, "demo", lambda: demo.comparisons(16, 4, 0), "sampled", {}, {})
        without_hashes(directory / "run")  # Tests change the data by hand.

    return made_once("data", make) / "run"


@pytest.fixture(scope="session")
def tokenizer(demo, split):
    prompts = [message["content"] for messages in split.messages for message in messages]
    return demo.train_tokenizer(prompts + sum(split.responses, []), 400)


@pytest.fixture(scope="session")
def split(data):
    from pairwise.data import read_split

    return read_split(data, "train")


@pytest.fixture(scope="session")
def sequences(split, tokenizer):

    return chats.encode_split(tokenizer, split.messages, split.responses, None)


@pytest.fixture(scope="session")
def base(tokenizer, made_once):
    """A random Llama for token prediction, hidden size 32, two layers, the demo's tokenizer."""
    return made_once("base", lambda there: make_base(tokenizer, there / "tiny", seed=0)) / "tiny"


def make_base(tokenizer, directory, seed, **changes):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    config = {
        **TINY,
        **{name: getattr(tokenizer, name) for name in names},
        "vocab_size": len(tokenizer),
        "tie_word_embeddings": True,
        "initializer_range": 0.1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        **changes,
    }
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def continuations():
    return script("continuations")


@pytest.fixture(scope="session")
def full_run(data, base, continuations, made_once):
    """Two members, all parameters, float32, weights after each, with continuations."""

    def make(directory):
        run = fresh(data, directory)
        words = "--prompts 2 --count 5 --max-tokens 20 --threads 1".split()
        args = continuations.parse_args(["--run", str(run), "--base", str(base), *words])
        continuations.main(args)
        train_two(run, base, FULL)

    return made_once("full", make) / "run"


@pytest.fixture(scope="session")
def head_run(data, base, made_once):
    """Two heads on the frozen base, and the times at which features/train.npy was written."""

    def make(directory):
        run = fresh(data, directory)
        features = run / "features" / "train.npy"
        times = train_two(run, base, HEAD, lambda: features.stat().st_mtime_ns)
        (directory / "times.json").write_text(json.dumps(times))

    directory = made_once("head", make)
    times = json.loads((directory / "times.json").read_text())
    return SimpleNamespace(run=directory / "run", times=times)


@pytest.fixture(scope="session")
def lora_run(data, full_run, base, made_once):
    """Two members of adapters and head, float32, with the continuations of the full run."""

    def make(directory):
        run = fresh(data, directory)
        shutil.copy(full_run / "continuations.parquet", run)
        train_two(run, base, LORA)

    return made_once("lora", make) / "run"


def train_two(run, base, flags, then=lambda: None):
    """Train two members with weights after each; list what then() gives after each."""
    results = []
    for j in (1, 2):
        train(run, base, *flags, iteration=j)
        fit(run)
        results.append(then())
    return results
