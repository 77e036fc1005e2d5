"""--train lora: adapters and head are trained, kept in PEFT's format, loaded with the same rewards
by us and by PEFT, and merged on export."""

import functools
import gc
import io
import json
import weakref

import score
import train_rm
from pairwise import chats, manifest, members, training
from pairwise import reward_model as rm
from pairwise.cli import InputError
from pairwise.data import read_split
from pairwise.scale import adapter
from pairwise.scale.recompute import recompute_activations

import numpy as np
import pytest
import torch
from conftest import (
    FLAGS,
    FULL,
    LORA,
    export,
    fit,
    fresh,
    leftovers,
    rewards,
    squared,
    train,
    train_on,
)
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_offload import killed_after, outputs
from test_training import Record
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DebertaV2Config


def arguments(*flags):
    return train_rm.parse_args(
        ["--run", "run", "--base", "base", "--iteration", "1", *FLAGS, *LORA, *flags]
    )


def plain_peft(base, directory):
    """As a user of PEFT would load a member."""
    return PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=1), directory
    ).eval()


def plain_rewards(model, sequences):
    with torch.no_grad():
        return np.array([model(input_ids=torch.tensor([ids])).logits.item() for ids in sequences])


@pytest.fixture(scope="module")
def test_sequences(data, tokenizer):
    test = read_split(data, "test")
    return chats.encode_split(tokenizer, test.messages, test.responses, None)


@pytest.fixture
def model(base, tokenizer):
    return adapted(base, tokenizer)


def adapted(base, tokenizer, dtype=torch.float32, seed=1):
    model = rm.load_base(base, tokenizer, dtype, "cpu")
    rm.draw_head(model.head.weight, model.model.config, 1)
    adapter.add(model.model, 4, 8)
    adapter.draw(model.model, seed)
    return model


# ---- adapters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_trained(base, tokenizer, sequences, dtype):
    """Adapters on every linear layer, in its dtype, and the head, in float32; a run begins with the
    base's own rewards, packed."""
    model = adapted(base, tokenizer, dtype)
    names = {name.removeprefix("base_model.model.") for name in adapter.trained(model.model)}
    parts = (
        "self_attn.q",
        "self_attn.k",
        "self_attn.v",
        "self_attn.o",
        "mlp.gate",
        "mlp.up",
        "mlp.down",
    )
    linear = [f"model.layers.{i}.{part}_proj" for i in range(2) for part in parts]
    assert names == {
        "score.weight",
        *(f"{name}.lora_{side}.weight" for name in linear for side in "AB"),
    }
    assert model.packs == "segments" and not model.model.training
    head = model.head.weight
    assert {p.dtype for p in model.model.parameters() if p is not head} == {dtype}
    assert head.dtype == torch.float32
    for name, p in adapter.trained(model.model).items():
        if ".lora_A." in name:
            assert 0.8 < p.abs().max() * p.shape[1] ** 0.5 <= 1 and p.shape[0] == 4
        assert ".lora_B." not in name or not p.any() and p.shape[1] == 4
    plain = rm.load_base(base, tokenizer, dtype, "cpu")
    rm.draw_head(plain.head.weight, plain.model.config, 1)
    np.testing.assert_array_equal(
        rm.score_sequences(model, sequences[:8], 1000),
        rm.score_sequences(plain, sequences[:8], 1000),
    )


def test_one_rounding_in_bfloat16(base, tokenizer):
    """A layer's output and gradients, against float64: no further off than PEFT's own."""
    layer = adapted(base, tokenizer, torch.bfloat16).model.model.layers[1].mlp.down_proj
    draw = torch.Generator().manual_seed(0)
    layer.lora_B["default"].weight.data.normal_(generator=draw)
    x, out = (torch.randn(2, 30, n, generator=draw).bfloat16() for n in (64, 32))
    parts = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]

    def computed(forward, of=lambda t: t):
        inputs = [of(t.detach()).requires_grad_() for t in (x, *parts)]
        y = forward(*inputs)
        return [y.detach(), *torch.autograd.grad(y, inputs, of(out))]

    def with_parts(forward):
        def run(x, a, b):
            swapped = {"lora_A.default.weight": a, "lora_B.default.weight": b}
            layer.forward = forward
            return torch.func.functional_call(layer, swapped, (x,))

        return run

    def by_hand(x, a, b):
        return x @ layer.base_layer.weight.double().T + 2 * x @ a.T @ b.T

    exact = computed(by_hand, torch.Tensor.double)
    own, peft = (
        computed(with_parts(forward))
        for forward in (layer.forward, functools.partial(type(layer).forward, layer))
    )
    for t, ours, theirs in zip(exact, own, peft):
        assert ours.dtype == torch.bfloat16 and ours.shape == t.shape
        assert (ours - t).norm() <= 1.02 * (theirs - t).norm() < 0.02 * t.norm()
    assert (own[0] - exact[0]).norm() < 0.9 * (peft[0] - exact[0]).norm()


def test_masters_keep_what_bfloat16_would_lose(base, tokenizer, split, sequences, monkeypatch):
    model, kept = adapted(base, tokenizer, torch.bfloat16), []
    monkeypatch.setattr(
        training,
        "make_optimizer",
        lambda *args, make=training.make_optimizer: kept.append(make(*args)) or kept[-1],
    )
    before = {name: p.detach().clone() for name, p in adapter.trained(model.model).items()}
    args = arguments("--dtype", "bfloat16", "--lr", "1e-5", "--micro-batch-tokens", "200")
    train_on(args, model, split, sequences)
    (optimizer,) = kept
    names = {id(p): name for name, p in adapter.trained(model.model).items()}
    assert len(names) == len(optimizer.params)
    for param in optimizer.params:
        name, master = names[id(param.p)], param.master.detach()
        assert master.dtype == torch.float32 and torch.equal(master.to(param.p.dtype), param.p)
        assert param.has_master == ("score" not in name)
        assert (master - before[name]).abs().max() > 1e-6
        if ".lora_A." in name:  # It has moved, and by less than BF16 can say.
            assert torch.equal(param.p, before[name]) or (master != param.p).float().mean() > 0.5


def test_only_adapters_and_head_change(model, split, sequences):
    before = {name: p.detach().clone() for name, p in model.model.named_parameters()}
    train_on(arguments(), model, split, sequences)
    for name, p in model.model.named_parameters():
        assert torch.equal(p, before[name]) == (not p.requires_grad), name
    assert sum(p.requires_grad for p in model.model.parameters()) == 2 * 14 + 1


def test_gradient_is_that_of_peft_s_own_padded_forward(
    model, base, tokenizer, split, sequences, tmp_path, monkeypatch
):
    """Packed, in several micro-batches, with and without recomputation, against PEFT's model run
    pair by pair."""
    with torch.no_grad():
        for name, p in adapter.trained(
            model.model
        ).items():  # B = 0 would leave A without a gradient
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    adapter.save(model.model, base, tmp_path / "adapter")
    monkeypatch.setattr(training, "SOAP", Record)
    monkeypatch.setattr(training, "recompute_activations", lambda model, on: None)
    found, runs, args = [], [], arguments("--pairs-per-step", "1000", "--micro-batch-tokens", "200")
    model.model.model.layers[0].self_attn.register_forward_hook(
        lambda *call: runs.append(len(found))
    )
    for recompute in (False, True):
        recompute_activations(model.model, recompute)
        training.train_full(
            args,
            model,
            split,
            sequences,
            (split.p,),
            squared,
            np.arange(72) < 18,
            np.random.default_rng(0),
            io.StringIO(),
        )
        found.append(Record.last.grads)
    assert runs.count(1) > runs.count(0) > 2
    plain = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=1, pad_token_id=tokenizer.pad_token_id
        ),
        tmp_path / "adapter",
        is_trainable=True,
    ).eval()
    for a, b, t in zip(split.a[:18], split.b[:18], split.p):
        ids, mask = rm.pad([sequences[a], sequences[b]], tokenizer.pad_token_id, "cpu")
        first, second = plain(input_ids=ids, attention_mask=mask).logits[:, 0]
        ((t - torch.sigmoid(first - second)) ** 2 / 18).backward()
    expected = {
        name.replace(".default.", ".").replace("modules_to_save.", ""): p.grad
        for name, p in plain.named_parameters()
        if p.requires_grad
    }
    expected["base_model.model.score.weight"] = next(
        grad for name, grad in expected.items() if "score" in name
    )
    for name, p in adapter.trained(model.model).items():
        assert expected[name].abs().max() > 1e-6, name
        for grads in found:
            torch.testing.assert_close(
                grads[id(p)],
                expected[name],
                atol=2e-6,
                rtol=0,
                msg=lambda said, name=name: f"{name}: {said}",
            )


def test_preconditioners_are_bounded_by_the_rank(model, split, sequences, monkeypatch):
    kept = []
    monkeypatch.setattr(
        training,
        "SOAP",
        lambda *args, f=training.SOAP, **settings: kept.append(f(*args, **settings)) or kept[-1],
    )
    train_on(arguments(), model, split, sequences)
    shapes = {
        tuple(p.shape): {tuple(m.shape) for name in ("GG", "Q") for m in state[name] if len(m)}
        for p, state in kept[0].state.items()
    }
    assert shapes.pop((1, 32)) == {(1, 1)} and set(map(frozenset, shapes.values())) == {
        frozenset({(4, 4)})
    }


def test_an_encoder_is_refused():
    config = DebertaV2Config(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=1,
    )
    with pytest.raises(
        InputError, match="--train lora: DebertaV2.*--train full, or a decoder, expected"
    ):
        adapter.add(AutoModelForSequenceClassification.from_config(config), 4, 8)


# ---- a run


def test_a_member_is_a_small_adapter_with_its_head(lora_run):
    for j in (1, 2):
        directory = lora_run / f"member_{j:02d}"
        names = sorted(path.name for path in directory.iterdir())
        assert names == ["adapter", "chat_template.jinja"]
        assert sorted(path.name for path in (directory / "adapter").iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
    config = json.loads((lora_run / "member_01" / "adapter" / "adapter_config.json").read_text())
    assert (
        config["r"],
        config["lora_alpha"],
        config["task_type"],
        config["modules_to_save"],
        config["lora_dropout"],
    ) == (4, 8, "SEQ_CLS", ["score"], 0)
    first, second = (
        load_file(lora_run / f"member_{j:02d}" / "adapter" / "adapter_model.safetensors")
        for j in (1, 2)
    )
    assert {tensor.dtype for tensor in first.values()} == {
        torch.float32
    } and first.keys() == second.keys()
    assert all(
        tensor.any() and not torch.equal(tensor, second[name]) for name, tensor in first.items()
    )


def test_peft_and_load_member_give_the_stored_rewards(lora_run, base, tokenizer, test_sequences):
    for j in (1, 2):
        directory = lora_run / f"member_{j:02d}" / "adapter"
        plain, stored = (
            plain_peft(base, directory),
            load_file(directory / "adapter_model.safetensors"),
        )
        np.testing.assert_allclose(
            plain_rewards(plain, test_sequences), rewards(lora_run, j), atol=1e-5
        )
        theirs = get_peft_model_state_dict(plain)
        assert theirs.keys() == stored.keys() and all(
            torch.equal(theirs[name], stored[name]) for name in stored
        )
        ours = members.load_member(lora_run, j, base, tokenizer, torch.float32, "cpu")
        np.testing.assert_array_equal(
            rm.score_sequences(ours, test_sequences, 1000), rewards(lora_run, j)
        )
        assert torch.equal(ours.head.weight, stored["base_model.model.score.weight"])
    assert abs(rewards(lora_run, 1) - rewards(lora_run, 2)).max() > 0.1 and rewards(
        lora_run, 1, "continuations"
    ).shape == (2, 5)


def test_in_bfloat16(data, base, tokenizer, test_sequences, tmp_path):
    """The adapters that scored are kept, and give the stored rewards to the bit; PEFT, which has
    them in float32, gives them within .05. With all masters paged they are the same."""
    run, paged = (fresh(data, tmp_path, name) for name in ("run", "paged"))
    flags = [*LORA, "--dtype", "bfloat16"]
    train(run, base, *flags)
    train(paged, base, *flags, "--optimizer-memory-gb", "0")
    assert outputs(paged) == outputs(run)
    path = run / "member_01" / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    head = tensors.pop("base_model.model.score.weight")
    assert head.dtype == torch.float32 and {t.dtype for t in tensors.values()} == {torch.bfloat16}
    ours = members.load_member(run, 1, base, tokenizer, torch.bfloat16, "cpu")
    found = rm.score_sequences(ours, test_sequences, 1000)
    np.testing.assert_array_equal(found, rewards(run))
    plain = plain_rewards(plain_peft(base, path.parent), test_sequences)
    np.testing.assert_allclose(plain, found, atol=0.05)
    assert np.ptp(found) > 0.5
    # A card has no room for the next member beside this one, and does not wait for gc.
    gc.disable()
    weight = weakref.ref(ours.model.model.layers[0].self_attn.q_proj.base_layer.weight)
    del ours
    gc.enable()
    assert weight() is None
    larger = {name: tensor.float() for name, tensor in tensors.items()}
    # As a run of before has it: float32 beside the base in BF16, which is what scored.
    (tmp_path / "old").mkdir()
    old = damaged(run, tmp_path / "old", lambda found: found.update(larger))
    model = members.load_member(old, 1, base, tokenizer, torch.bfloat16, "cpu")
    assert {p.dtype for p in adapter.trained(model.model).values()} == {torch.float32}
    np.testing.assert_allclose(rm.score_sequences(model, test_sequences, 1000), found, atol=0.05)


def test_continuations_that_come_later_are_scored_by_the_stored_adapter(lora_run, base, tmp_path):
    run = fresh(lora_run, tmp_path)
    whole = json.loads((run / "manifest.json").read_text())
    del whole["stages"]["member_02_continuations"]
    (run / "manifest.json").write_text(json.dumps(whole))
    (run / "rewards" / "02_continuations.npy").unlink()
    train(run, base, *LORA, iteration=2)
    np.testing.assert_array_equal(
        rewards(run, 2, "continuations"), rewards(lora_run, 2, "continuations")
    )


def test_the_same_bits_again_and_other_adapters_for_another_seed_or_member(
    lora_run, data, base, tmp_path, monkeypatch
):
    drawn = []
    monkeypatch.setattr(
        adapter, "draw", lambda model, seed, f=adapter.draw: drawn.append(seed) or f(model, seed)
    )
    again, other = fresh(data, tmp_path), fresh(data, tmp_path, "other")
    torch.manual_seed(9)
    train(again, base, *LORA)
    train(other, base, *LORA, "--seed", "1")
    fit(again)
    train(again, base, *LORA, iteration=2)
    assert len(set(drawn)) == 3
    for j in (1, 2):
        np.testing.assert_array_equal(rewards(again, j), rewards(lora_run, j))
    assert abs(rewards(other) - rewards(again)).max() > 0.01


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_killed_and_continued(data, base, tmp_path, monkeypatch, capsys, dtype):
    flags = [*LORA, "--dtype", dtype, "--precondition-frequency", "2"]
    whole, killed = fresh(data, tmp_path, "whole"), fresh(data, tmp_path, "killed")
    train(whole, base, *flags)
    killed_after(killed, base, monkeypatch, 4, *flags)
    train(killed, base, *flags)
    assert "checkpoint_01/000004: continued after step 4" in capsys.readouterr().out
    expected, found = outputs(whole), outputs(killed)
    assert (
        found == expected
        and "member_01/adapter/adapter_model.safetensors" in found
        and not leftovers(killed)
    )


# ---- export


def test_export(lora_run, base, tmp_path, test_sequences, capsys):
    run = fresh(lora_run, tmp_path)
    before = outputs(run)
    export(run, base, 1)
    directory = run / "member_01"
    merged, info = AutoModelForSequenceClassification.from_pretrained(
        directory, output_loading_info=True
    )
    assert (
        not info["missing_keys"]
        and not info["unexpected_keys"]
        and not hasattr(merged, "peft_config")
    )
    np.testing.assert_allclose(
        plain_rewards(merged.eval(), test_sequences), rewards(run, 1), atol=1e-5
    )
    assert AutoTokenizer.from_pretrained(directory).chat_template
    after = outputs(run)
    assert {name: after[name] for name in before} == before and not leftovers(run)
    with pytest.raises(InputError, match="member_01: already a plain directory"):
        export(run, base, 1)
    with pytest.raises(InputError, match="member_03: no such member"):
        export(run, base, 3)
    capsys.readouterr()
    train(run, base, *LORA)
    assert "skipped" in capsys.readouterr().out


def test_a_merged_weight_is_the_sum_rounded_once(base, tokenizer, sequences):
    """In BF16, against float64; rewards of the merged model are as near to the float32 ones as
    those of the adapters on the BF16 base, about."""
    models = {dtype: adapted(base, tokenizer, dtype) for dtype in (torch.float32, torch.bfloat16)}
    for model in models.values():
        for name, p in adapter.trained(model.model).items():
            if ".lora_B." in name:
                p.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))
    model = models[torch.bfloat16]
    layer = model.model.model.layers[1].mlp.down_proj
    expected = (
        layer.base_layer.weight.double()
        + 2 * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    ).bfloat16()
    exact, apart = (rm.score_sequences(models[dtype], sequences, 1000) for dtype in models)
    adapter.merge(model.model)
    assert (
        torch.equal(model.model.model.layers[1].mlp.down_proj.weight, expected)
        and type(model.model.model.layers[1].mlp.down_proj) is torch.nn.Linear
    )
    merged = rm.score_sequences(model, sequences, 1000)
    assert 0 < np.std(merged - exact) < 2 * np.std(apart - exact) < 2 * np.std(exact)


# ---- what is refused


def damaged(lora_run, tmp_path, change):
    """member_01 of a copy of the run, its tensors changed."""
    run = fresh(lora_run, tmp_path)
    path = run / "member_01" / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    manifest.accept_edited(run)
    return run


@pytest.mark.parametrize(
    "change, said",
    [
        (
            lambda tensors: tensors.pop("base_model.model.score.weight"),
            r"score.weight \(and 0 more\): no tensor found, \(1, 32\) expected",
        ),
        (
            lambda tensors: tensors.pop(
                "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
            ),
            r"up_proj.lora_B.weight \(and 0 more\): no tensor found",
        ),
        (
            lambda tensors: tensors.update(more=torch.ones(2)),
            r"more \(and 0 more\): \(2,\) found, no tensor expected",
        ),
        (
            lambda tensors: tensors.update({"base_model.model.score.weight": torch.ones(2, 32)}),
            r"\(2, 32\) found, \(1, 32\) expected",
        ),
    ],
)
def test_a_tensor_that_is_missing_or_wrong(lora_run, base, tokenizer, tmp_path, change, said):
    with pytest.raises(InputError, match=f"member_01/adapter/adapter_model.safetensors: .*{said}"):
        members.load_member(
            damaged(lora_run, tmp_path, change), 1, base, tokenizer, torch.float32, "cpu"
        )


def test_files_that_are_missing_or_broken(lora_run, base, tmp_path):
    run = fresh(lora_run, tmp_path)
    directory = run / "member_02" / "adapter"
    (tmp_path / "asked.jsonl").write_text(
        json.dumps({"prompt": "how ?", "responses": ["so ."]}) + "\n"
    )
    asked = score.parse_args([str(tmp_path / "asked.jsonl"), "--run", str(run), *FLAGS])
    for name, content in (
        ("adapter_model.safetensors", "broken"),
        ("adapter_model.safetensors", None),
        ("adapter_config.json", "{}"),
        ("adapter_config.json", None),
    ):
        (directory / name).write_text(content) if content else (directory / name).unlink()
        manifest.accept_edited(run)
        with pytest.raises(
            InputError,
            match=r"member_02/adapter/adapter_(model.safetensors: no adapter could be read|"
            r"model.safetensors: no such file|config.json: no such file|config.json: no r found)",
        ) as error:
            score.main(asked)
        assert "\n" not in str(error.value) and not (tmp_path / "asked-scores.jsonl").exists()


@pytest.mark.parametrize(
    "change", [{"r": 10**9}, {"r": 0}, {"lora_alpha": 0}, {"lora_alpha": float("inf")}, {"r": "4"}]
)
def test_an_adapter_s_config_with_other_numbers(lora_run, base, tokenizer, tmp_path, change):
    run = fresh(lora_run, tmp_path)
    path = run / "member_01" / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    manifest.accept_edited(run)
    with pytest.raises(InputError, match="member_01/adapter/adapter_config.json: .*expected"):
        members.load_member(run, 1, base, tokenizer, torch.float32, "cpu")


def test_flags(lora_run, full_run, base, capsys):
    assert (
        arguments().max_precondition_dim,
        arguments().lora_alpha,
        arguments("--lora-alpha", "3").lora_alpha,
    ) == (4, 8, 3)
    args = train_rm.parse_args(["--run", "r", "--base", "b", "--iteration", "1", "--train", "lora"])
    assert (args.lora_rank, args.lora_alpha, args.lr, args.max_precondition_dim) == (
        16,
        32,
        2e-4,
        16,
    )
    with pytest.raises(SystemExit):
        train_rm.parse_args(["--run", "r", "--base", "b", "--iteration", "1", "--lora-rank", "4"])
    assert "--lora-rank and --lora-alpha are for --train lora" in capsys.readouterr().err
    assert (
        not {"lora_rank", "lora_alpha"} & manifest.entries(full_run)["member_01"]["settings"].keys()
    )  # so runs of before are continued
    for flags, said in (
        (("--lora-rank", "5"), "lora-alpha was 8.0, is 10.0"),
        (("--lora-alpha", "9"), "lora-alpha was 8.0, is 9.0"),
        (FULL[:2], "lr was"),
    ):
        with pytest.raises(InputError, match=said):
            train(lora_run, base, *LORA, *flags)
