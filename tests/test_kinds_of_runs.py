"""Every tool on every kind of run: it works, or says in one line why not, and nothing is
changed."""

import copy
import json
import shutil

import evaluate
import score
from pairwise import chats, files, manifest, members, stages
from pairwise import reward_model as rm
from pairwise.cli import InputError

import adopt
import harden
import numpy as np
import prune
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import respond
import torch
import train_joint
from conftest import FLAGS, FULL, HEAD, LORA, export, fit, fresh, leftovers, train
from safetensors.torch import save_file


def arguments(*words):
    return [str(word) for word in words]


@pytest.fixture(scope="module")
def runs(full_run, head_run, data, base, tmp_path_factory):
    """{kind: run}, each in a directory beside the others; read only."""
    there = tmp_path_factory.mktemp("kinds")
    made = {
        "full": fresh(full_run, there, "full"),
        "head": fresh(head_run.run, there, "head"),
        "joint": fresh(data, there, "joint"),
        "learned": fresh(data, there, "learned"),
    }
    for kind, weights in (("joint", "qp"), ("learned", "learned")):
        flags = (
            "--base",
            base,
            "--train",
            "head",
            "--epochs",
            3,
            "--k",
            3,
            "--weights",
            weights,
            *FLAGS,
        )
        train_joint.main(train_joint.parse_args(arguments("--run", made[kind], *flags)))
    fit(made["joint"])
    for kind, source in (("hardened", "head"), ("hardened joint", "joint")):
        made[kind] = there / kind
        harden.main(
            harden.parse_args(arguments("--run", made[source], "--out", made[kind], "--k", 4))
        )
    for kind, source in (("pruned", "full"), ("pruned hardened", "hardened")):
        made[kind] = there / "deeper" / kind
        words = arguments("--run", made[source], "--beta", 2.5, "--out", made[kind])
        prune.main(prune.parse_args(words))
    return made


KINDS = (
    "full",
    "head",
    "joint",
    "learned",
    "hardened",
    "hardened joint",
    "pruned",
    "pruned hardened",
)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluated_and_scored(runs, base, tmp_path, kind):
    run = runs[kind]
    evaluate.main(
        evaluate.parse_args(arguments("--run", run, "--out", tmp_path / "out", "--resamples", 100))
    )
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    test = metrics["splits"]["test"]
    assert (test["soft_single"] is not None) == (kind not in ("joint", "learned", "hardened joint"))
    assert test["soft_scaled"] is not None and test["soft_scaled_true"] is not None
    assert (test["soft_hardened"] is not None) == ("hardened" in kind)
    (tmp_path / "questions.jsonl").write_text(
        json.dumps(
            {"prompt": "how can i get fit ?", "responses": ["run .", "walk more .", "rest ."]}
        )
        + "\n"
    )
    out = tmp_path / "scores.jsonl"
    score.main(
        score.parse_args(
            arguments(
                "--run",
                run,
                "--base",
                base,
                "--threads",
                1,
                "--device",
                "cpu",
                tmp_path / "questions.jsonl",
                "--out",
                out,
            )
        )
    )
    row = json.loads(out.read_text())
    assert (
        len(row["rewards"]) == 3
        and {len(rewards) for rewards in row["rewards"]} == {metrics["k"]}
        and len(row["p_hat"]) == 3
    )


@pytest.mark.parametrize("kind", KINDS)
def test_answers(runs, base, kind, capsys):
    flags = (
        "--base",
        base,
        "--mode",
        "overton",
        "--n",
        3,
        "--max-tokens",
        6,
        "--json",
        "--threads",
        1,
        "--device",
        "cpu",
    )
    respond.main(respond.parse_args(arguments("--run", runs[kind], *flags, "how can i get fit ?")))
    row = json.loads(capsys.readouterr().out)
    alpha = json.loads((runs[kind] / "weights.json").read_text())[-1]["alpha"]
    assert (
        row["weights"] == alpha and sum(candidate["count"] for candidate in row["candidates"]) == 3
    )
    assert {j for answer in row["answers"] for j in answer["members"]} == {
        j for j, weight in enumerate(alpha, 1) if weight
    }


@pytest.mark.parametrize("kind", ["joint", "learned", "hardened", "pruned"])
def test_takes_no_further_member(runs, base, kind):
    with pytest.raises(InputError, match="run found, whose members are complete"):
        train(runs[kind], base, *HEAD, iteration=4)


@pytest.mark.parametrize(
    "kind, said",
    [
        ("learned", "learned with the rewards, which stay"),
        ("hardened", "hardened weights found"),
        ("pruned", "pruned weights found"),
    ],
)
def test_weights_that_stay(runs, kind, said):
    before = (runs[kind] / "weights.json").read_bytes()
    with pytest.raises(InputError, match=said):
        fit(runs[kind])
    assert (runs[kind] / "weights.json").read_bytes() == before


@pytest.mark.parametrize("kind", ["hardened", "pruned", "pruned hardened"])
def test_not_hardened_twice(runs, tmp_path, kind):
    with pytest.raises(InputError, match="the one that it was made from expected"):
        harden.main(harden.parse_args(arguments("--run", runs[kind], "--out", tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_pruned_run_s_members_are_links(runs, base):
    with pytest.raises(InputError, match="a link to the run that this one was pruned from"):
        export(runs["pruned"], base, 1)


def test_continuations_after_joint_training(runs, full_run, base, tmp_path):
    run = fresh(runs["joint"], tmp_path)
    (run / "continuations.parquet").write_bytes((full_run / "continuations.parquet").read_bytes())
    with pytest.raises(InputError, match="trained before its continuations.parquet was there"):
        flags = "--base", base, "--train", "head", "--epochs", 3, "--k", 3, *FLAGS
        train_joint.main(train_joint.parse_args(arguments("--run", run, *flags)))


@pytest.mark.parametrize("script", [harden, train_joint])
def test_at_most_99_members(script, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(
            arguments(
                "--run",
                tmp_path,
                *(("--out", tmp_path) if script is harden else ("--base", "b")),
                "--k",
                100,
            )
        )
    assert "at most 99 expected" in capsys.readouterr().err


# ---- files of a run that are not what its stages wrote


def flipped(path):
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def put_to_work(run, base, tmp_path, kind):
    """Yield the calls that read the members of a run, with their weights."""
    asked = tmp_path / "asked.jsonl"
    asked.write_text(json.dumps({"prompt": "how ?", "responses": ["so ."]}) + "\n")
    flags = "--base", base, *FLAGS
    scored = arguments(asked, "--run", run, "--out", tmp_path / "out.jsonl", *flags)
    yield lambda: score.main(score.parse_args(scored))
    words = arguments("--run", run, "--table", "--n", 2, "--max-tokens", 4, *flags, "how ?")
    yield lambda: respond.main(respond.parse_args(words))
    if kind in KINDS_TRAINED:
        # Continuations that come later are scored by the member that was written.
        shutil.copy(run.parent / "continuations.parquet", run)
        yield lambda: train(run, base, *KINDS_TRAINED[kind])
    if kind not in ("full", "pruned"):
        yield lambda: export(run, base, 1)


KINDS_TRAINED = {"full": FULL, "head": HEAD, "lora": LORA}
FILE_OF = {
    "full": "member_01/model.safetensors",
    "lora": "member_01/adapter/adapter_model.safetensors",
    "head": "member_01/head.safetensors",
    "joint": "joint/head.safetensors",
    "pruned": "member_01/model.safetensors",
}


@pytest.mark.parametrize("kind", FILE_OF)
def test_a_member_with_a_bit_flipped_is_refused(
    runs, lora_run, full_run, base, tmp_path, kind, capsys
):
    run = fresh({**runs, "lora": lora_run}[kind], tmp_path)
    if kind == "pruned":  # Its members are links.
        (run / "member_01").rename(tmp_path / "own")
        (run / "member_01").symlink_to(tmp_path / "own")
    shutil.copy(full_run / "continuations.parquet", tmp_path)
    for name in ("continuations.parquet", *(f"rewards/0{j}_continuations.npy" for j in (1, 2))):
        (run / name).unlink(missing_ok=True)
    stages = json.loads((run / "manifest.json").read_text())["stages"]
    entries = {name: stages[name] for name in stages if "continuations" not in name}
    (run / "manifest.json").write_text(json.dumps({"stages": entries}))
    flipped(run / FILE_OF[kind])
    for call in put_to_work(run, base, tmp_path, kind):
        with pytest.raises(InputError, match=f"{FILE_OF[kind]}: edited or damaged since"):
            call()
    assert not (tmp_path / "out.jsonl").exists() and not leftovers(run)


def test_features_with_a_bit_flipped_are_refused(head_run, base, tmp_path):
    run = fresh(head_run.run, tmp_path)
    flipped(run / "features" / "train.npy")
    with pytest.raises(InputError, match="features/train.npy: edited or damaged since"):
        train(run, base, *HEAD, iteration=3)
    np.save(run / "features" / "train.npy", np.zeros((3, 32), np.float32))
    manifest.accept_edited(run)
    with pytest.raises(InputError, match=r"train.npy: float32 \(3, 32\) found, float32 \(\d+, d\)"):
        train(run, base, *HEAD, iteration=3)
    (run / "features" / "train.npy").write_bytes(b"")
    manifest.accept_edited(run)
    with pytest.raises(InputError, match="train.npy: not a .npy array"):
        train(run, base, *HEAD, iteration=3)


def test_a_member_is_hashed_once_a_call(runs, base, tmp_path, monkeypatch):
    read, hash_file = [], files.hash_file
    monkeypatch.setattr(files, "hash_file", lambda path: read.append(path) or hash_file(path))
    next(put_to_work(runs["full"], base, tmp_path, "full"))()
    weights = [path for path in read if path.name == "model.safetensors"]
    assert len(weights) == len(set(weights)) == 2


@pytest.mark.parametrize("shape", [(1, 1), (1, 31), (32,), (2, 32)])
def test_a_head_of_another_shape(head_run, base, tmp_path, shape):
    run = fresh(head_run.run, tmp_path)
    save_file({"score.weight": torch.ones(shape)}, run / "member_01" / "head.safetensors")
    manifest.accept_edited(run)
    for call in put_to_work(run, base, tmp_path, None):
        with pytest.raises(
            InputError, match="shape|a head with 2 outputs|3 members found"
        ) as error:
            call()
        assert str(run) in str(error.value) and "expected" in str(error.value)
    assert not (tmp_path / "out.jsonl").exists()


# ---- special tokens in texts


def test_texts_with_the_text_of_a_special_token_are_counted(data, base, tmp_path, capsys):
    run = fresh(data, tmp_path)
    for name in ("train", "test"):
        path = run / "data" / f"{name}.parquet"
        table = pq.read_table(path)
        messages = table["messages"].to_pylist()
        messages[0] = [{"role": "user", "content": f"what is <|eos|> in {name} ?"}]
        column = pa.array(messages, table["messages"].type)
        at = table.column_names.index("messages")
        pq.write_table(table.set_column(at, "messages", column), path)
    manifest.accept_edited(run)
    judge = full_model(base, tmp_path / "judge")
    words = "--run", run, "--model", judge, "--iteration", 1, *FLAGS
    adopt.main(adopt.parse_args(arguments(*words)))
    assert manifest.entries(run)["member_01"]["texts_with_special_tokens"] == 2
    assert "s, 2 texts have the text of a special token in them\n" in capsys.readouterr().out


def full_model(base, directory):
    """A reward model, its head drawn, from the base."""
    tokenizer = chats.load_tokenizer(base)
    model = rm.load_base(base, tokenizer, torch.float32, "cpu")
    rm.draw_head(model.head.weight, model.model.config, 0)
    members.save_member(model.model, tokenizer, directory)
    return directory


def test_special_tokens_by_hand(tokenizer):
    asked = [[{"role": "user", "content": "<|eos|> ?"}], [{"role": "user", "content": "a <| eos"}]]
    texts = {"train": (asked, [["<|pad|><|bos|>", "b"], ["<|eos|> ?", "<|EOS|>"]])}
    assert stages.count_special(texts, tokenizer) == 2
    assert stages.special_words(0) == ""


# ---- JSON of another form


@pytest.mark.parametrize("content", ["[]", "{}", "5", "{", '{"source": 5, "members": [5]}'])
def test_members_json_of_another_form(runs, base, tmp_path, content):
    run = fresh(runs["hardened"], tmp_path)
    (run / "members.json").write_text(content)
    manifest.accept_edited(run)
    for call in list(put_to_work(run, base, tmp_path, None))[:2]:
        with pytest.raises(InputError, match="members.json: "):
            call()


# ---- what others read


@pytest.mark.parametrize("unnamed", [[], ["<|im_start|>", "<|im_end|>"]])
@pytest.mark.parametrize("templates", ["one", "two"])
def test_a_member_s_tokenizer_as_transformers_4_and_5_read_it(
    base, tokenizer, tmp_path, unnamed, templates
):
    """Special tokens without a name, as Qwen has them: 4 wants them under the older key, and under
    5's a dict. tests/elsewhere.sh reads such a member with both."""
    tokenizer, template = copy.deepcopy(tokenizer), tokenizer.chat_template
    tokenizer.add_special_tokens({"extra_special_tokens": unnamed})
    if templates == "two":
        tokenizer.chat_template = {"default": template, "tool_use": "{{ tools }}"}
    model = rm.load_base(base, tokenizer, torch.float32, "cpu").model
    members.save_member(model, tokenizer, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config.get("additional_special_tokens", []) == unnamed
    assert "extra_special_tokens" not in config and "chat_template" not in config
    found = chats.load_tokenizer(tmp_path)
    assert found.extra_special_tokens == unnamed and found.chat_template == template
    assert (tmp_path / "chat_template.jinja").is_file()  # all of 4 that read it prefer it
    chat = [{"role": "user", "content": "what<|im_start|>is <|im_end|> it"}]
    assert chats.encode(found, chat, "a <|im_end|>") == chats.encode(
        tokenizer, chat, "a <|im_end|>"
    )
    assert found.all_special_ids == tokenizer.all_special_ids
