"""One base at one commit, wherever it lies, and one date in its chat template."""

import datetime
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import score
from pairwise import chats, cli, files, manifest, pretrained, provenance
from pairwise.cli import InputError

import adopt
import numpy as np
import plan
import prune
import pytest
import respond
from conftest import FLAGS, HEAD, LORA, edited, export, fit, fresh, make_base, rewards, train
from huggingface_hub import HfApi, constants
from transformers import AutoModelForCausalLM

ONE, TWO, NAME = "1" * 40, "2" * 40, "some/llama"
# As Llama-3.2's template, and gpt-oss's, in a macro.
DATED = (
    "{{- bos_token }}{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}"
    "{% else %}{% set day = '26 Jul 2024' %}{% endif %}{% macro say(m) %}{{ m.content }} "
    "{{ strftime_now('%Y-%m-%d') }}{% endmacro %} {{ day }} "
    "{% for m in messages %}{{ say(m) }} {% endfor %}"
)


class Hub:
    """A hub that cannot be reached, and its cache: some/llama at two commits, main at the first."""

    def __init__(self, directory, base, tokenizer, monkeypatch):
        self.cache, self.asked = directory / "models--some--llama", []
        shutil.copytree(base, self.snapshot(ONE))
        make_base(tokenizer, self.snapshot(TWO), seed=9)
        self.move(ONE)

        def refuse(_, identifier, revision, timeout):
            self.asked.append(f"{identifier} {revision}")
            raise ConnectionError("no route")

        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(directory))
        monkeypatch.setattr(HfApi, "model_info", refuse)

    def snapshot(self, commit):
        return self.cache / "snapshots" / commit

    def move(self, commit):
        (self.cache / "refs").mkdir(exist_ok=True)
        (self.cache / "refs" / "main").write_text(commit)


@pytest.fixture
def hub(tmp_path, base, tokenizer, monkeypatch):
    return Hub(tmp_path / "hub", base, tokenizer, monkeypatch)


def scored(run, *flags):
    """The rewards that score.py gives to two short responses, of all members."""
    path = run.parent / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a question", "responses": ["yes", "no , not that"]}))
    score.main(score.parse_args([str(path), "--run", str(run), *FLAGS, *flags]))
    return json.loads((run.parent / "rows-scores.jsonl").read_text())["rewards"]


def refused(call, *words):
    with pytest.raises(cli.InputError) as error:
        call()
    for word in words:
        assert word in str(error.value)


# ---- a base on the hub


@pytest.mark.parametrize("flags", [HEAD, LORA], ids=["head", "lora"])
def test_a_base_that_moves_on_the_hub_stays_what_it_was_for_a_run(hub, data, tmp_path, flags):
    run = fresh(data, tmp_path)
    train(run, NAME, *flags)
    fit(run)
    before, entry = scored(run), manifest.entries(run)["member_01"]
    assert entry["base"] == entry["inputs"]["base model"] == f"{NAME}@{ONE}"
    hub.move(TWO)
    assert scored(run) == scored(run, "--base", NAME) == before
    train(run, NAME, *flags, iteration=2)
    assert manifest.entries(run)["member_02"]["base"] == f"{NAME}@{ONE}"
    fit(run)
    other = "another base model"
    refused(lambda: train(run, f"{NAME}@{TWO}", *flags, iteration=2), other)
    refused(lambda: train(run, NAME, "--revision", TWO, *flags, iteration=2), other)
    refused(lambda: scored(run, "--base", f"{NAME}@{TWO}"), "another base model")
    assert not hub.asked


def test_a_run_on_another_revision_is_that_of_its_snapshot(hub, data, tmp_path):
    one, two = fresh(data, tmp_path, "one"), fresh(data, tmp_path, "two")
    train(one, NAME, *HEAD, "--revision", TWO)
    train(two, hub.snapshot(TWO), *HEAD)
    np.testing.assert_array_equal(rewards(one), rewards(two))
    assert manifest.entries(one)["member_01"]["base"] == f"{NAME}@{TWO}"
    words = ("--revision", TWO)
    refused(lambda: train(two, hub.snapshot(TWO), *HEAD, *words), "--revision", "directory")


@pytest.mark.parametrize("from_hub", [True, False])
def test_a_directory_in_the_place_of_a_hub_base_has_its_weights(hub, data, tmp_path, from_hub):
    run = fresh(data, tmp_path)
    train(run, NAME if from_hub else hub.snapshot(ONE), *HEAD)
    fit(run)
    before, copy = scored(run), shutil.copytree(hub.snapshot(ONE), tmp_path / "copy")
    (copy / "README.md").write_text("copied")
    assert scored(run, "--base", NAME) == scored(run, "--base", str(copy)) == before
    other = str(hub.snapshot(TWO)) if from_hub else f"{NAME}@{TWO}"
    refused(lambda: scored(run, "--base", other), f"{other}: another base model")


def test_a_snapshot_that_is_not_whole_is_completed(hub, base, data, tmp_path, monkeypatch, capsys):
    whole, snapshot = tmp_path / "whole", hub.snapshot(ONE)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(whole, max_shard_size="40KB")
    for path in base.glob("*token*"):
        shutil.copy(path, whole)
    shutil.copy(base / "chat_template.jinja", whole)
    (snapshot / "model.safetensors").unlink()  # The rest is what a tokenizer alone leaves.
    (snapshot / "tokenizer.json").unlink()
    refused(lambda: train(fresh(data, tmp_path), NAME, *HEAD), f"{snapshot} is not complete")

    def download(identifier, revision, allow_patterns, ignore_patterns):
        assert (identifier, revision) == (NAME, ONE)
        for path in {path for pattern in allow_patterns for path in whole.glob(pattern)}:
            if path.name not in ignore_patterns:
                shutil.copy(path, snapshot)
                order.append(path.name)

    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: SimpleNamespace(sha=ONE))
    monkeypatch.setattr(pretrained, "snapshot_download", download)
    order = []
    for names in (["tokenizer.json"], ["model.safetensors.index.json"], []):
        for name in [*names, *(path.name for path in snapshot.glob("model-*"))]:
            (snapshot / name).unlink(missing_ok=True)
        assert pretrained.place(NAME, "--base", weights=True) == snapshot
        assert {path.name for path in whole.iterdir()} <= {p.name for p in snapshot.iterdir()}
    # A download that is broken off must not look whole: what tells comes after all it tells of.
    described = [name for name in order if not name.endswith(".safetensors")]
    assert described.index("tokenizer_config.json") > described.index("tokenizer.json")
    assert "asking the hub" in capsys.readouterr().err


def test_a_plan_is_of_the_revision_that_is_asked_for(hub, capsys):
    plan.main(plan.parse_args(["--base", NAME, "--revision", TWO]))
    assert f"{NAME}@{TWO}: " in capsys.readouterr().out


def test_an_adopted_model_that_moves_on_the_hub(hub, full_run, data, tmp_path):
    for commit, member in ((ONE, "member_01"), (TWO, "member_02")):
        shutil.rmtree(hub.snapshot(commit))
        shutil.copytree(full_run / member, hub.snapshot(commit))
    run = fresh(data, tmp_path)
    words = ["--run", str(run), "--iteration", "1", "--model", NAME, *FLAGS]
    adopt.main(adopt.parse_args(words))
    fit(run)
    np.testing.assert_allclose(rewards(run), rewards(full_run), rtol=0, atol=2e-5)
    before = scored(run)
    hub.move(TWO)
    assert scored(run) == before
    assert files.read_json(run / "member_01" / "source.json", dict)["model"] == f"{NAME}@{ONE}"


def test_a_hub_that_is_not_there_is_named_at_once(hub, data, tmp_path, capsys):
    run = fresh(data, tmp_path)
    refused(lambda: train(run, "none/such", *HEAD), "none/such", "no such directory", "no route")
    assert "none/such: asking the hub" in capsys.readouterr().err
    words = ("--revision", "v2")
    refused(lambda: train(run, NAME, *HEAD, *words), NAME, "no route")
    (hub.snapshot(ONE) / "model.safetensors").unlink()  # A download that was broken off.
    refused(lambda: train(run, NAME, *HEAD), NAME, "no route")
    assert hub.asked == ["none/such main", f"{NAME} v2", f"{NAME} {ONE}"]
    refused(lambda: train(run, tmp_path / "gone", *HEAD), "gone: no such directory")
    assert not (run / "member_01").exists()


# ---- a base in a directory


@pytest.mark.parametrize("flags", [HEAD, LORA], ids=["head", "lora"])
def test_a_relative_base_is_found_from_elsewhere(data, base, tmp_path, monkeypatch, flags):
    (tmp_path / "a").mkdir()
    shutil.copytree(base, tmp_path / "a" / "base")
    fresh(data, tmp_path / "a")
    monkeypatch.chdir(tmp_path / "a")
    train(Path("run"), "base", *flags)
    fit(Path("run"))
    before = scored(tmp_path / "a" / "run")
    monkeypatch.chdir(tmp_path)
    assert scored(Path("a/run")) == before
    os.rename("a", "b")  # Both have moved.
    assert scored(Path("b/run")) == before
    os.rename("b/run", "run")
    refused(lambda: scored(Path("run")), "a/base: no such directory")
    assert scored(Path("run"), "--base", "b/base") == before
    if flags == LORA:
        config = files.read_json(Path("run/member_01/adapter/adapter_config.json"), dict)
        assert config["base_model_name_or_path"] == str(tmp_path / "a" / "base")
        assert config["revision"] is None


def test_a_base_inside_its_run_that_was_edited_is_refused(data, base, tmp_path):
    run = fresh(data, tmp_path)
    started = manifest.begin_stage(run, "base", {}, {})
    with files.replacing(run / "base") as partial:
        shutil.copytree(base, partial)
    manifest.end_stage(run, "base", {}, {}, started)
    with open(run / "base" / "config.json", "a", encoding="utf-8") as config:
        config.write(" ")
    with pytest.raises(InputError, match="base/config.json: edited or damaged"):
        train(run, run / "base", *HEAD)
    train(edited(run), run / "base", *HEAD)


def test_a_base_inside_its_run_moves_with_it(data, base, tmp_path):
    run = fresh(data, tmp_path)
    shutil.copytree(base, run / "models")
    train(run, run / "models", *HEAD)
    fit(run)
    before, pruned = scored(run), tmp_path / "else" / "where" / "pruned"
    assert manifest.entries(run)["member_01"]["base"] == "./models"
    pruned.parent.mkdir(parents=True)
    prune.main(prune.parse_args(["--run", str(run), "--beta", "4", "--out", str(pruned)]))
    assert scored(pruned) == before  # Its members are links to the run's.
    assert scored(run.rename(tmp_path / "moved")) == before


# ---- a date in the chat template


@pytest.fixture
def dated(base, tmp_path):
    directory = Path(shutil.copytree(base, tmp_path / "dated"))
    (directory / "chat_template.jinja").write_text(DATED)
    return directory


def on(day, monkeypatch):
    """Set the clock, and transformers', to a day."""

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromisoformat(f"{day}T23:59:59")

    class Today(datetime.date):
        @classmethod
        def today(cls):
            return cls.fromisoformat(day)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
    monkeypatch.setattr(provenance.datetime, "date", Today)


def test_a_template_that_writes_today_writes_the_day_of_the_run(dated, monkeypatch):
    on("2026-12-03", monkeypatch)
    chat = [{"role": "user", "content": "a question"}]
    plain = chats.load_tokenizer(dated)
    text = plain.apply_chat_template(chat, tokenize=False)
    assert "03 Dec 2026 a question 2026-12-03" in text
    fixed = chats.load_tokenizer(dated, date="2026-12-03")
    on("2027-01-01", monkeypatch)
    assert fixed.apply_chat_template(chat, tokenize=False) == text
    assert plain.apply_chat_template(chat, tokenize=False) != text


def test_every_code_of_strftime_is_written_as_strftime_does(tokenizer):
    codes = " ".join(f"%{code}" for code in chats.DATE_CODES)
    template = "\n{{ strftime_now('" + codes + "') }}{{ messages[0].content }}"
    tokenizer.chat_template, before = chats.dated(template, "2027-01-02"), tokenizer.chat_template
    text = tokenizer.apply_chat_template([{"role": "user", "content": "%d"}], tokenize=False)
    tokenizer.chat_template = before
    assert text == "\n" + datetime.date(2027, 1, 2).strftime(codes) + "%d"


@pytest.mark.parametrize("flags", [HEAD, LORA, ()], ids=["head", "lora", "full"])
def test_a_run_is_rendered_at_one_date(data, dated, tmp_path, monkeypatch, capsys, flags):
    run = fresh(data, tmp_path)
    day = manifest.entries(run)["data"]["date"]
    on("2027-01-01", monkeypatch)  # The data were made on another day than the first member.
    train(run, dated, *flags)
    assert f"its chat template writes {day} as today" in capsys.readouterr().out
    fit(run)
    before = scored(run)
    on("2027-01-02", monkeypatch)
    assert scored(run) == before
    train(run, dated, *flags, iteration=2)
    assert {manifest.entries(run)[f"member_0{j}"]["settings"]["date"] for j in (1, 2)} == {day}
    words = ("--date", "2027-01-02")
    refused(lambda: train(run, dated, *flags, *words, iteration=2), "--date 2027-01-02", day)
    assert day in (run / "member_01" / "chat_template.jinja").read_text(encoding="utf-8")
    if flags:
        export(run, dated, 1)
    member = run / "member_01"
    on("2027-01-03", monkeypatch)
    alone = chats.load_tokenizer(member)
    assert chats.date_in(alone.chat_template) == day
    chat = [{"role": "user", "content": "a question"}]
    assert chats.encode(alone, chat) == chats.encode(chats.load_tokenizer(dated, date=day), chat)


def test_the_date_of_a_run_is_another_one_by_its_flag(data, dated, base, tmp_path, monkeypatch):
    run = fresh(data, tmp_path)
    train(run, dated, *HEAD, "--date", "2024-07-26")
    fit(run)
    before = scored(run)
    on("2027-01-02", monkeypatch)
    assert scored(run) == before
    train(run, dated, *HEAD, iteration=2)
    assert manifest.entries(run)["member_02"]["settings"]["date"] == "2024-07-26"
    words = ["--run", str(run), *FLAGS, "--table", "--n", "2", "--max-tokens", "4", "--json"]
    fit(run)
    respond.main(respond.parse_args([*words, "a question"]))
    plain = fresh(data, tmp_path, "plain")
    refused(lambda: train(plain, base, *HEAD, "--date", "2024-07-26"), "writes no date")
    assert "date" not in manifest.entries(plain)["data"]["settings"]


def test_an_adopted_model_is_rendered_at_one_date(full_run, data, tmp_path, monkeypatch):
    model = Path(shutil.copytree(full_run / "member_01", tmp_path / "model"))
    (model / "chat_template.jinja").write_text(DATED)
    run = fresh(data, tmp_path)
    words = ["--run", str(run), "--iteration", "1", "--model", str(model), *FLAGS]
    adopt.main(adopt.parse_args(words))
    fit(run)
    before = scored(run)
    on("2027-01-02", monkeypatch)
    assert scored(run) == before


# ---- templates by name


def test_named_templates_without_a_default(base, data, tmp_path):
    named = Path(shutil.copytree(base, tmp_path / "named"))
    (named / "chat_template.jinja").rename(tmp_path / "file.jinja")
    (named / "additional_chat_templates").mkdir()
    for name in ("rag", "tool_use"):
        shutil.copy(tmp_path / "file.jinja", named / "additional_chat_templates" / f"{name}.jinja")
    run = fresh(data, tmp_path)
    refused(lambda: train(run, named, *HEAD), "no chat template called default", "--chat-template")
    train(run, named, *HEAD, "--chat-template", str(tmp_path / "file.jinja"))
