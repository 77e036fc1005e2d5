"""train_rm.py --plan: bytes against the tensors of a real step, activations against the peak of backward(), and the lines that are printed."""

import json
import weakref

import numpy as np
import pytest
import torch
from conftest import fresh
from pytorch_optimizer import SOAP
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForSequenceClassification, LlamaConfig, Qwen2Config

import train_rm
from pairwise import reward_model as rm
from pairwise import training
from pairwise.cli import InputError
from pairwise.data import read_splits
from pairwise.scale import adapter, budget
from pairwise.scale.offload import Offload, recompute_activations

GIB = 2**30


def arguments(*flags):
    return train_rm.parse_args(["--plan", "--base", "llama-3-8b", *flags])


def config_of(kind, h=48, m=96, layers=2, heads=4, kv=2, vocab=200):
    return kind(
        hidden_size=h,
        intermediate_size=m,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=vocab,
    )


def test_llama_3_8b():
    config, model = budget.describe("llama-3-8b", torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == 7_504_928_768 and {
        p.device.type for p in model.parameters()
    } == {"meta"}
    args = arguments()
    groups = training.parameter_groups(model)
    for dim, gib in (
        (4096, 36.6),
        (14335, 36.6),
        (14336, 184),
        (1024, 0.5),
    ):  # computed by hand from the shapes
        found = (
            sum(
                budget.optimizer_bytes(p, d)["preconditioners"]
                for d, group in zip((dim, 1), groups)
                for p in group
            )
            / GIB
        )
        assert found == pytest.approx(gib, rel=0.01), dim
    rows, fits = budget.memory(model, groups, args, 80e9)
    assert (
        fits
        and 70e9 < sum(card for card, _ in rows.values()) <= 80e9
        and 100e9 < sum(host for _, host in rows.values()) < 130e9
    )
    rows, fits = budget.memory(model, groups, args, 80e9, 0)
    assert (
        fits
        and sum(card for card, _ in rows.values()) < 76e9
        and sum(host for _, host in rows.values()) == pytest.approx(129e9, rel=0.01)
    )
    assert budget.memory(model, groups, args, 250e9)[0]["masters, float32"][1] == 0
    for card, optimizer_memory in ((24e9, None), (48e9, None), (80e9, 60 * GIB)):
        assert not budget.memory(model, groups, args, card, optimizer_memory)[1]


@pytest.mark.parametrize("kind, tied", [(LlamaConfig, False), (Qwen2Config, True)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("dim, rank", [(4096, None), (48, None), (5, 5)])
def test_tensor_bytes_are_those_of_a_real_step(kind, tied, dtype, dim, rank, tmp_path):
    """Of all parameters, or of adapters of a rank."""
    config = config_of(kind)
    config.tie_word_embeddings = tied
    config.save_pretrained(tmp_path)
    config, model = budget.describe(str(tmp_path), getattr(torch, dtype), rank)
    args = arguments(
        "--dtype",
        dtype,
        *(
            ("--train", "lora", "--lora-rank", str(rank))
            if rank
            else ("--max-precondition-dim", str(dim))
        ),
    )
    rows, _ = budget.memory(model, training.parameter_groups(model), args, 80e9)
    real = AutoModelForSequenceClassification.from_config(config, dtype=getattr(torch, dtype))
    real.score.float()
    if rank:
        adapter.add(real, rank, rank)
    groups = [
        {"params": group, "max_precondition_dim": d}
        for group, d in zip(training.parameter_groups(real), (dim, 1))
    ]
    offload = Offload(groups, lambda groups: SOAP(groups, precondition_frequency=1))
    gradients = 0
    for _ in range(3):
        real.score(
            real.model(input_ids=torch.arange(1, 9)[None], use_cache=False)
            .last_hidden_state[:, -1]
            .float()
        ).sum().backward()
        gradients = sum(g.nbytes for g in offload.gradients())
        offload.step(1e-3)
    adapters = sum(p.nbytes for name, p in real.named_parameters() if "lora_" in name)
    found = {
        "weights": sum(p.nbytes for p in real.parameters()) - adapters,
        "gradients": gradients,
        "masters": sum(part.master.nbytes for part in offload.parts if part.twin),
        "moments": sum(
            state[name].nbytes
            for state in offload.optimizer.state.values()
            for name in ("exp_avg", "exp_avg_sq")
        ),
        "preconditioners": sum(
            t.nbytes
            for state in offload.optimizer.state.values()
            for name in ("GG", "Q")
            for t in state[name]
            if len(t)
        ),
    }
    found |= {"adapters of rank 5": adapters} if rank else {}
    assert (
        found
        == {
            name.split(",")[0]: card
            for name, (card, _) in rows.items()
            if name.split(",")[0] in found
        }
        and found["preconditioners"]
    )
    assert sum(host for _, host in rows.values()) == 0


class Peak(TorchDispatchMode):
    """Bytes of the tensors alive at a time that operations have made, but for those of a parameter's shape."""

    def __init__(self, model):
        super().__init__()
        self.apart = {tuple(p.shape) for p in model.parameters()} | {
            tuple(p.shape[::-1]) for p in model.parameters()
        }
        self.alive, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tuple(tensor.shape) not in self.apart:
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.dropped, storage._cdata)
        return out

    def dropped(self, key):
        self.now -= self.alive.pop(key, 0)


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config])
@pytest.mark.parametrize("dtype, width", [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize("shape", [(64, 160, 3, 4, 2), (64, 224, 6, 4, 1), (96, 128, 4, 4, 4)])
@pytest.mark.parametrize("rank", [None, 8])
def test_activations(kind, dtype, width, shape, rank):
    """The estimate is within a tenth of what is alive at the peak of forward and backward."""
    model = AutoModelForSequenceClassification.from_config(
        config_of(kind, *shape), dtype=dtype
    ).eval()
    if rank:
        adapter.add(model, rank, rank)
    recompute_activations(model)
    with Peak(model) as memory:
        model.model(input_ids=torch.randint(1, 200, (4, 200)), use_cache=False).last_hidden_state[
            :, -1
        ].float().sum().backward()
    assert budget.activation_bytes(model.config, 800, width, rank) == pytest.approx(
        memory.peak, rel=0.1
    )


def test_activations_of_llama_3_8b():
    """Against a run on fake tensors."""
    config = LlamaConfig(**budget.LLAMA_3_8B)
    for tokens, gb in ((4096, 2.2), (8192, 4.4), (16384, 8.9)):
        assert budget.activation_bytes(config, tokens, 2) / 1e9 == pytest.approx(gb, rel=0.03)


def test_the_step_s_temporary_tensors_fit():
    """What is set aside for a step of one parameter is not less than what the library takes."""
    for shape, dim in (((96, 160), 4096), ((96, 160), 96), ((128, 128), 4096), ((400, 64), 1)):
        p = torch.nn.Parameter(torch.randn(shape))
        offload = Offload(
            [{"params": [p], "max_precondition_dim": dim}],
            lambda groups: SOAP(groups, precondition_frequency=2),
        )
        for step in range(4):
            p.grad = torch.randn(shape)
            with Peak(torch.nn.Linear(1, 1)) as memory:
                kept = [
                    p,
                    p.grad,
                    *(
                        t
                        for name in ("GG", "Q")
                        for t in offload.optimizer.state.get(p, {}).get(name, ())
                        if len(t)
                    ),
                ]
                kept += [
                    offload.optimizer.state[p][name] for name in ("exp_avg", "exp_avg_sq") if step
                ]
                memory.alive = {t.untyped_storage()._cdata: 0 for t in kept}
                offload.step(1e-3)
            if step:
                assert memory.peak <= budget.step_bytes(p, dim)


def test_tokens_and_pairs_are_the_data_s(data, base, tokenizer, tmp_path, capsys):
    run = fresh(data, tmp_path)
    splits, _ = read_splits(run)
    counts, source = budget.count_tokens(
        train_rm.parse_args(["--plan", "--run", str(run), "--base", str(base)])
    )
    lengths = [
        len(ids)
        for s in splits.values()
        for ids in rm.encode_split(tokenizer, s.messages, s.responses, None)
    ]
    assert (counts["prompts"], counts["pairs"], counts["train"], counts["scored"]) == (
        12,
        72,
        48,
        64,
    )
    assert counts["tokens"] == pytest.approx(np.mean(lengths)) and "its tokenizer" in source
    counts, source = budget.count_tokens(arguments("--run", str(run)))
    assert 5 < counts["tokens"] < 60 and "characters / 4" in source
    counts, source = budget.count_tokens(arguments("--run", "nowhere/personalllm"))
    assert counts["pairs"] == 263_256 and source.startswith("assumed: personalllm")
    assert (
        budget.count_steps(arguments(), counts) == 9402 / 2
    )  # 28 pairs a prompt: two prompts in a step of 64
    assert (
        budget.count_steps(arguments("--pairs-per-step", "20", "--epochs", "2"), counts)
        == 2 * 13163
    )


def test_flops_by_hand():
    """Twice the weights per token forward, four times that in training, and attention; one member's steps."""
    config, model = budget.describe("llama-3-8b", torch.bfloat16)
    counts = {"tokens": 500, "train": 1000, "scored": 1100, "pairs": 500}
    work, slow, products, refresh = budget.flops(
        config, model, training.parameter_groups(model), arguments(), counts
    )
    dense = 7_504_928_768 - 128256 * 4096
    assert (
        work == pytest.approx((2 * dense + 2 * 500 * 4096 * 32) * 500 * (4 * 1000 + 1100))
        and slow == 0
    )
    per_layer = 8 * (2 * 2 * 4096**3 + 2 * 1024 * 4096 * (1024 + 4096) + 3 * 14336 * 4096**2)
    cubes = (2 * 2 * 4096**3 + 2 * (1024**3 + 4096**3) + 3 * 4096**3) / 5
    assert products == pytest.approx(32 * (per_layer + 2 * cubes)) and refresh == pytest.approx(
        32 * 8 / 3 * cubes
    )
    assert (
        budget.flops(
            config, model, training.parameter_groups(model), arguments("--train", "head"), counts
        )[0]
        < work / 4
    )


def test_flops_of_adapters_by_hand():
    """Frozen weights take part forward, in the recomputation and in the gradient of their input; adapters, in float32, in their own too."""
    config, model = budget.describe("llama-3-8b", torch.bfloat16, 16)
    counts = {"tokens": 500, "train": 1000, "scored": 1100, "pairs": 500}
    args, groups = arguments("--train", "lora"), training.parameter_groups(model)
    adapters = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert sum(p.numel() for p in groups[0]) == adapters
    work, slow, products, refresh = budget.flops(config, model, groups, args, counts)
    dense, attention = 7_504_928_768 - 128256 * 4096, 2 * 500 * 4096 * 32
    assert work == pytest.approx(
        500 * (1000 * (6 * dense + 4 * attention) + 1100 * (2 * dense + attention))
    )
    assert slow == pytest.approx(500 * (1000 * 8 + 1100 * 2) * adapters)
    assert products + refresh == pytest.approx(adapters * 8 * 16, rel=0.05)


def test_adapters_of_llama_3_8b_fit_24_gb():
    _, model = budget.describe("llama-3-8b", torch.bfloat16, 16)
    groups = training.parameter_groups(model)
    rows, fits = budget.memory(model, groups, arguments("--train", "lora"), 24e9)
    assert fits and rows["adapters of rank 16, float32"] == (4 * 41_943_040, 0)
    assert not budget.memory(
        model, groups, arguments("--train", "lora", "--micro-batch-tokens", "8192"), 24e9
    )[1]


def test_what_is_printed(capsys):
    train_rm.main(arguments("--gpu-gb", "80", "--members", "4"))
    said = capsys.readouterr().out
    assert (
        "7,504,928,768 parameters" in said and "assumed: multipref" in said and "4 members" in said
    )
    assert (
        "a card of 80 GB: full fits, with " in said
        and "GB of host memory; lora fits; head fits" in said
    )
    train_rm.main(arguments("--gpu-gb", "24"))
    assert (
        "a card of 24 GB: full does not fit; lora fits with --micro-batch-tokens 4096; head fits; a smaller"
        in capsys.readouterr().out
    )
    train_rm.main(arguments("--gpu-gb", "24", "--train", "lora"))
    said = capsys.readouterr().out
    assert (
        "a card of 24 GB: full does not fit; lora fits; head fits\n" in said
        and "8 members: " in said
        and "more in float32 in the adapters" in said
    )
    train_rm.main(arguments("--gpu-gb", "8", "--train", "head"))
    assert "full does not fit; lora does not fit; head does not fit" in capsys.readouterr().out


def test_what_is_refused(tmp_path):
    with pytest.raises(
        InputError, match=f"--base {tmp_path}: no config could be read: llama-3-8b, a directory"
    ):
        train_rm.main(arguments("--base", str(tmp_path)))
    with pytest.raises(SystemExit):  # --run is optional for a plan alone
        train_rm.parse_args(["--iteration", "1", "--base", "b"])


def test_a_base_without_a_head(tmp_path):
    config = {
        "model_type": "bert",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="no linear head called score"):
        budget.describe(str(tmp_path), torch.float32)
