"""Features of a frozen base: the same under any split, and the cache in which runs share them."""

import argparse

from pairwise import features, stages
from pairwise import reward_model as rm
from pairwise.data import read_splits

import numpy as np
import pytest
import torch
from conftest import HEAD, fresh, leftovers, train
from safetensors.torch import load_file, save_file


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache that is on, and empty."""
    monkeypatch.setenv("PAIRWISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


@pytest.fixture(scope="module")
def prompts(data):
    """(messages, responses) of each prompt of the data, 16 of 4 responses."""
    splits = read_splits(data)[0].values()
    return [pair for split in splits for pair in zip(split.messages, split.responses)]


@pytest.fixture
def made(base, tokenizer):
    """made(prompts, deal, **changes): {(prompt, response): feature}, and how many the cache had.

    deal(i): the split of prompt i; changes: other arguments."""

    def make(prompts, deal=lambda i: "train", **changes):
        texts, rows = {}, {}
        for i, prompt in enumerate(prompts):
            for values, value in zip(texts.setdefault(deal(i), ([], [])), prompt):
                values.append(value)
        here = {"base": base, "max_length": None, "dtype": "float32", "micro_batch_tokens": 200}
        args = argparse.Namespace(**here | {"threads": 1, "device": "cpu"} | changes)
        encoded, _ = stages.encode(args, texts, tokenizer)
        found, count = features.of_texts(args, "features", texts, encoded, tokenizer)
        for name, split in texts.items():
            keys = [(str(messages), text) for messages, own in zip(*split) for text in own]
            assert found[name].shape == (len(keys), 32) and found[name].dtype == np.float32
            rows |= zip(keys, map(bytes, found[name]))
        return rows, count

    return make


def test_where_it_is(monkeypatch):
    monkeypatch.delenv("PAIRWISE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(features.where()) == "/home/somebody/.cache/pairwise/features"
    monkeypatch.setenv("XDG_CACHE_HOME", "/fast")
    assert str(features.where()) == "/fast/pairwise/features"
    monkeypatch.setenv("PAIRWISE_CACHE", "~/here")
    assert str(features.where()) == "/home/somebody/here/features"
    monkeypatch.setenv("PAIRWISE_CACHE", "")
    assert features.where() is None


def test_a_run_is_the_same_without_a_cache_with_an_empty_and_with_a_full_one(
    head_run, data, base, tmp_path, cache, capsys, monkeypatch
):
    for count in (0, 64):
        run = fresh(data, tmp_path, f"from_{count}")
        train(run, base, *HEAD)
        said = capsys.readouterr().out.splitlines()
        assert f"features: {count} of 64 responses from the cache {cache}" in said
        folders = "features", "rewards", "member_01"
        written = [path for name in folders for path in (run / name).iterdir()]
        assert len(written) == 8
        for path in written:
            before = head_run.run / path.relative_to(run)
            assert path.read_bytes() == before.read_bytes(), path
        monkeypatch.setattr(rm, "load_base", None)  # The second time it is not needed.


def test_features_do_not_depend_on_the_split(made, prompts, cache, monkeypatch):
    whole, count = made(prompts)
    assert count == 0 and len(whole) == 64
    assert made(prompts, lambda i: "train" if i % 3 else "test") == (whole, 64)
    backwards = [(messages, texts[::-1]) for messages, texts in prompts[::-1]]
    assert made(backwards) == (whole, 64)
    # A prompt that has lost a response, and one that comes twice, in two splits.
    fewer = [(prompts[0][0], prompts[0][1][1:]), prompts[1], prompts[1]]
    rows, count = made(fewer, "train test valid".split().__getitem__)
    assert count == 4 and rows.items() >= dict(list(whole.items())[4:8]).items()
    monkeypatch.setenv("PAIRWISE_CACHE", "")
    assert made(prompts[5:7], str) == (dict(list(whole.items())[20:28]), 0)


def test_a_feature_is_of_one_base_and_machine(made, prompts, base, cache, tmp_path, monkeypatch):
    rows, _ = made(prompts[:1])
    other = tmp_path / "other"
    other.mkdir()
    for path in base.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    assert made(prompts[:1], base=other) == (rows, 4)  # a copy
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][3] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    changed, count = made(prompts[:1], base=other)
    assert count == 0 and changed != rows
    changes = {"dtype": "bfloat16", "micro_batch_tokens": 100, "threads": 2, "max_length": 20}
    for name, value in changes.items():
        assert made(prompts[:1], **{name: value})[1] == 0, name
    with monkeypatch.context() as patch:
        patch.setattr(features, "CODE", features.CODE[1:])
        assert made(prompts[:1])[1] == 0
    monkeypatch.setattr(features, "processor", lambda: ["another"])
    assert made(prompts[:1])[1] == 0
    monkeypatch.undo()


def test_a_kill_costs_a_minute(made, prompts, cache, monkeypatch):
    """What is done by then is found, by the process that comes next or works beside it."""
    calls, features_of = [], rm.features_of

    def killed(*args):
        calls.append(args)
        if len(calls) > 6:
            raise KeyboardInterrupt
        return features_of(*args)

    monkeypatch.setattr(features, "SECONDS", -1)
    monkeypatch.setattr(rm, "features_of", killed)
    with pytest.raises(KeyboardInterrupt):
        made(prompts)
    monkeypatch.setattr(rm, "features_of", features_of)
    rows, count = made(prompts)
    assert count == 24 and not leftovers(cache)
    monkeypatch.setenv("PAIRWISE_CACHE", "")
    assert made(prompts) == (rows, 0)


def shorten(path):
    path.write_bytes(path.read_bytes()[:-9])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [shorten, flip, empty])
def test_a_damaged_file_is_computed_again(made, prompts, cache, capsys, damage):
    rows, _ = made(prompts[:2])
    (path,) = cache.rglob("*.safetensors")
    damage(path)
    assert made(prompts[:2]) == (rows, 0)
    line = f"{path}: damaged; its features are computed again\n"
    assert capsys.readouterr().err.count(line) == 1
    assert made(prompts[:2]) == (rows, 8)
    assert not capsys.readouterr().err


def test_what_another_process_is_writing_is_left_alone(made, prompts, cache, capsys):
    rows, _ = made(prompts[:2])
    path = next(cache.rglob("*.safetensors"))
    others = [path.with_name(f".{kind}-{path.name}") for kind in ("lock", "partial")]
    [other.write_bytes(b"begun") for other in others]
    capsys.readouterr()
    assert made(prompts[:2]) == (rows, 8) and not capsys.readouterr().err
    assert [other.read_bytes() for other in others] == [b"begun"] * 2


def test_a_cache_that_cannot_be_written_costs_a_line(made, prompts, cache, capsys):
    cache.parent.write_text("a file")
    assert made(prompts[:1])[1] == 0
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x and not x.isspace()][1:2]
    assert line.startswith(f"warning: features are not kept: {cache}")


def test_the_kind_of_gpu_counts(base, tokenizer, monkeypatch):
    args = argparse.Namespace(base=base, dtype="float32", micro_batch_tokens=9, threads=1)
    keys = set()
    for args.device, name in (("cpu", "A"), ("cuda:0", "A"), ("cuda:1", "A"), ("cuda", "B")):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        keys.add(features.key(args, tokenizer))
    assert len(keys) == 3
