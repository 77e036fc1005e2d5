"""Norms as one kernel: the model's numbers stay, and norms of another formula are left alone."""

import sys

from pairwise.scale import norms

import pytest
import torch
from conftest import REPOSITORY
from transformers import (
    AutoModelForSequenceClassification,
    Gemma2Config,
    LlamaConfig,
    Qwen3Config,
)

sys.path.append(str(REPOSITORY / "benchmarks"))
from card_meter import as_transformers

SHAPE = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
# Two a layer and one at the end, Qwen 3 has two more a layer; Gemma 2 multiplies by 1 + weight.
COUNTS = {LlamaConfig: 5, Qwen3Config: 9, Gemma2Config: 0}


@pytest.mark.parametrize("kind", COUNTS)
@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_numbers_stay(kind, dtype, allowed):
    torch.manual_seed(0)
    config = kind(**SHAPE, num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config, dtype=dtype).eval()
    for name, p in model.named_parameters():
        if "norm" in name:
            p.data.normal_(1, 0.3)
    ids, found = torch.arange(1, 30)[None], []
    for _ in range(2):
        model.zero_grad()
        hidden = model.model(ids).last_hidden_state.float()
        hidden.square().sum().backward()
        found.append((hidden.detach(), model.model.layers[0].input_layernorm.weight.grad.float()))
        count = norms.use_kernels(model)
    assert count == COUNTS[kind]
    assert sum("forward" in vars(module) for module in model.modules()) == count
    as_transformers(model)  # for the benchmarks on a card
    assert torch.equal(model.model(ids).last_hidden_state.float(), found[0][0])
    for before, after in zip(*found):
        assert (before - after).norm() <= allowed * before.norm()
