"""train_rm.py: the targets by hand, steps and batches, and what a run directory holds after
training, or after being killed.
"""

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import train_rm
from pairwise import chats, manifest, members, training
from pairwise import reward_model as rm
from pairwise.cli import InputError
from pairwise.data import read_split, write_split
from pairwise.scale import budget
from pairwise.scale.recompute import Room

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import (
    FLAGS,
    FULL,
    HEAD,
    REPOSITORY,
    edited,
    export,
    fresh,
    leftovers,
    make_base,
    mean_loss,
    rewards,
    squared,
    train,
    train_on,
)
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


def arguments(*flags):
    return train_rm.parse_args(
        ["--run", "run", "--base", "base", "--iteration", "1", *FLAGS, *flags]
    )


def log_of(run, j=1):
    return [json.loads(line) for line in (run / "logs" / f"{j:02d}.jsonl").read_text().splitlines()]


def contents(run):
    """Every byte that a run has made, apart from times and the manifest."""
    found = {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }
    for name in [name for name in found if name.startswith("logs/")]:
        found[name] = [{**json.loads(line), "seconds": None} for line in found[name].splitlines()]
    return found


@pytest.fixture
def model(base, tokenizer):
    model = rm.load_base(base, tokenizer, torch.float32, "cpu")
    rm.draw_head(model.head.weight, model.model.config, 1)
    return model


@pytest.fixture
def lenient():
    """As reward_model.settle sets it; what it was before comes back."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


# ---- targets


def test_targets_by_hand():
    p = np.array([0.75, 0.5, 1.0])
    r = np.array(
        [[1.0, 2.0, 2.0], [3.0, 1.0, 3.0]], np.float32
    )  # member 1: y2 = y3 > y1; member 2: y1 = y3 > y2
    a, b, alpha = np.array([0, 1, 2]), np.array([1, 2, 0]), np.array([0.75, 0.25])
    # V_1 = 0, 1/2, 1; V_2 = 1, 0, 1/2
    p_hat = np.array([0.25, 0.375, 0.875])
    expected = {
        "p": p,
        "residual": [0.5, 0.125, 0.125],
        "centered": [1.0, 0.625, 0.625],
        "mixture": p_hat + 3 * np.array([0.5, 0.125, 0.125]),  # j = 3
    }
    assert set(expected) == set(train_rm.TARGETS)
    for name, value in expected.items():
        np.testing.assert_allclose(train_rm.target_of(name, p, r, alpha, a, b), value, atol=1e-15)
        np.testing.assert_array_equal(
            train_rm.target_of(name, p, np.zeros((0, 3), np.float32), np.zeros(0), a, b), p
        )


def test_centered_is_the_printed_objective_over_both_orders():
    """(eps - s)^2 of the pair, plus the same of the pair turned round, is 2 (t - s)^2 up to a
    constant.
    """
    s = np.linspace(0, 1, 101)
    for p, p_hat in ((0.75, 0.2), (0.0, 0.9), (0.5, 0.5)):
        t = train_rm.TARGETS["centered"](p, p_hat, 2)
        assert (
            np.ptp((p - p_hat - s) ** 2 + ((1 - p) - (1 - p_hat) - (1 - s)) ** 2 - 2 * (t - s) ** 2)
            < 1e-12
        )


def test_mixture_is_the_stagewise_objective():
    """(p - (1 - 1/j) p_hat - s/j)^2, of the mixture that gives the new member the share 1/j, is (t
    - s)^2 / j^2.
    """
    s = np.linspace(0, 1, 101)
    for j, p, p_hat in ((2, 0.75, 0.2), (3, 0.0, 0.9), (8, 1.0, 0.125)):
        t = train_rm.TARGETS["mixture"](p, p_hat, j)
        np.testing.assert_allclose(
            (p - (1 - 1 / j) * p_hat - s / j) ** 2, (t - s) ** 2 / j**2, atol=1e-12
        )


# ---- steps


@pytest.mark.parametrize("budget", [1, 4, 7, 30, 1000])
def test_steps_of_prompts(budget):
    sizes = np.array([6, 1, 3, 0, 12, 6, 2, 9])
    start = np.concatenate([[0], np.cumsum(sizes)])
    keep = np.random.default_rng(3).random(start[-1]) < 0.8
    steps = training.steps_of_prompts(start, keep, budget, np.random.default_rng(0))
    assert sorted(np.concatenate([part for step in steps for part in step])) == list(
        np.flatnonzero(keep)
    )  # each kept pair once
    places = {}
    for number, step in enumerate(steps):
        assert 0 < sum(len(part) for part in step) <= budget
        for part in step:
            prompts = {int(np.searchsorted(start, pair, side="right")) - 1 for pair in part}
            assert len(prompts) == 1
            places.setdefault(prompts.pop(), []).append(number)
    for prompt, where in places.items():
        kept = keep[start[prompt] : start[prompt + 1]].sum()
        assert len(where) == -(-kept // budget), "a prompt within the budget is split"
    again = training.steps_of_prompts(start, keep, budget, np.random.default_rng(0))
    other = training.steps_of_prompts(start, keep, budget, np.random.default_rng(1))
    flat = [[[part.tolist() for part in step] for step in found] for found in (steps, again, other)]
    assert flat[0] == flat[1] != flat[2]


def test_a_prompt_that_is_split_is_shuffled_first():
    steps = training.steps_of_prompts(
        np.array([0, 40]), np.ones(40, bool), 20, np.random.default_rng(0)
    )
    assert len(steps) == 2 and not any(np.array_equal(step[0], np.sort(step[0])) for step in steps)


def test_steps_are_filled():
    """Prompts of 3 pairs, a budget of 7: two prompts a step, the last has one."""
    steps = training.steps_of_prompts(
        np.arange(0, 31, 3)[:10], np.ones(27, bool), 7, np.random.default_rng(0)
    )
    assert sorted(len(step) for step in steps) == [1, 2, 2, 2, 2]


def test_a_step_is_filled_to_the_last_pair():
    rng = np.random.default_rng(0)
    steps = training.steps_of_prompts(np.arange(0, 25, 6), np.ones(24, bool), 12, rng)
    assert [list(map(len, step)) for step in steps] == [[6, 6], [6, 6]]


def test_steps_of_pairs():
    keep = np.arange(50) % 7 != 0
    steps = training.steps_of_pairs(keep, 8, 3, np.random.default_rng(0))
    per_epoch = -(-keep.sum() // 8)
    assert len(steps) == 3 * per_epoch
    epochs = [
        np.concatenate([step[0] for step in steps[i * per_epoch : (i + 1) * per_epoch]])
        for i in range(3)
    ]
    for order in epochs:
        assert sorted(order) == list(np.flatnonzero(keep))
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(
        epochs[0], np.flatnonzero(keep)
    )
    assert all(len(step) == 1 and len(step[0]) <= 8 for step in steps)


@pytest.mark.parametrize("tokens", [1, 60, 150, 400, 10**6])
def test_micro_batches_are_a_partition_within_the_budget(tokens):
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 60, 40)
    pairs = [
        (i, j) for p in range(10) for i in range(4 * p, 4 * p + 4) for j in range(i + 1, 4 * p + 4)
    ]
    a, b = np.array(pairs).T
    step = [np.arange(6 * p, 6 * p + 6) for p in range(10)]
    found = training.micro_batches(
        step, a, b, lengths, lambda responses: len(responses) * lengths[responses].max(), tokens
    )
    assert sorted(np.concatenate(found)) == list(range(60))
    for micro in found:
        responses = np.union1d(a[micro], b[micro])
        assert len(micro) == 6 or len(responses) * lengths[responses].max() <= tokens
        assert all(np.isin(part, micro).all() or not np.isin(part, micro).any() for part in step), (
            "a prompt stays whole"
        )
    if tokens == 1:
        assert len(found) == 10
    if tokens == 10**6:
        assert len(found) == 1
    if tokens == 400:
        assert len(found) < 10, "prompts that fit together go together"


@pytest.mark.parametrize(
    "steps, warmup, rise",
    [(1, 0.03, 1), (2, 0.0, 1), (10, 0.03, 1), (100, 0.03, 3), (1000, 0.1, 100)],
)
def test_schedule(steps, warmup, rise):
    rates = [training.schedule(step, steps, warmup) for step in range(steps)]
    assert rates[0] == 1 / rise and rates[rise - 1] == max(rates) == 1 and min(rates) > 0
    np.testing.assert_allclose(np.diff(rates[:rise]), 1 / rise)
    assert all(x >= y for x, y in zip(rates[rise - 1 :], rates[rise:]))
    if steps >= 100:
        assert rates[-1] < 0.001


def test_schedule_by_hand():
    """Two of ten steps of warm-up, then half a cosine over eight; one step of warm-up at least."""
    quarter = math.sqrt(0.5)
    np.testing.assert_allclose(
        [training.schedule(i, 10, 0.2) for i in (0, 1, 2, 4, 6, 8)],
        [0.5, 1, 1, (1 + quarter) / 2, 0.5, (1 - quarter) / 2],
    )
    np.testing.assert_allclose([training.schedule(i, 5, 0.0) for i in (0, 1, 3)], [1, 1, 0.5])


# ---- one step


class Record:
    """In the optimizer's place: keeps the gradients that it is given, and changes nothing."""

    def __init__(self, groups, lr, **settings):
        self.param_groups = [dict(group, lr=lr) for group in groups]
        self.grads = None
        Record.last = self

    def step(self):
        self.grads = {
            id(p): None if p.grad is None else p.grad.clone()
            for group in self.param_groups
            for p in group["params"]
        }

    def zero_grad(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None


@pytest.mark.parametrize("tokens, micro_batches", [(1, 12), (300, None), (10**6, 1)])
def test_gradient_is_the_plain_sum_over_pairs(
    model, tokenizer, split, sequences, monkeypatch, tokens, micro_batches
):
    """Each response encoded once, accumulated over micro-batches (of one prompt, several or all),
    against every pair encoded by itself.
    """
    monkeypatch.setattr(training, "SOAP", Record)
    seen = []
    monkeypatch.setattr(
        rm,
        "rewards_of_batch",
        lambda model, sequences, *tokens, f=rm.rewards_of_batch: (
            seen.append(len(sequences)) or f(model, sequences, *tokens)
        ),
    )
    log = io.StringIO()
    args = arguments("--pairs-per-step", "1000", "--micro-batch-tokens", str(tokens))
    train_on(args, model, split, sequences, log)
    found = Record.last.grads
    monkeypatch.undo()
    total = 0.0
    for a, b, t in zip(split.a, split.b, split.p):
        ids, mask = rm.pad([sequences[a], sequences[b]], tokenizer.pad_token_id, "cpu")
        reward = model.head(rm.last_hidden(model.model, ids, mask))[:, 0]
        error = (t - torch.sigmoid(reward[0] - reward[1])) ** 2 / len(split.a)
        error.backward()
        total += error.item()
    assert sum(p.numel() for p in model.model.parameters()) == sum(
        grad.numel() for grad in found.values()
    )
    for name, p in model.model.named_parameters():
        assert p.grad.abs().max() > 1e-6, name
        torch.testing.assert_close(found[id(p)], p.grad, atol=1e-6, rtol=0)
    line = json.loads(log.getvalue())
    assert abs(line["loss"] - total) < 1e-6 and line["pairs"] == 72
    norm = torch.sqrt(sum(p.grad.square().sum() for p in model.model.parameters())).item()
    assert abs(line["grad_norm"] - norm) < 1e-5
    whole = [
        count for count in seen if count >= 4
    ]  # passes of a prompt that does not fit are in there too, of a response each
    assert len(whole) > 1 if micro_batches is None else len(whole) == micro_batches
    assert tokens > 1 or seen.count(1) == 2 * 48, (
        "each response forward, and again in the backward pass"
    )
    if micro_batches == 1:
        assert seen == [48] and line["tokens"] == sum(map(len, sequences))


class Waits(TorchFunctionMode):
    """The calls for which the host would wait for a card, or copy from memory that it waits for."""

    NAMES = "item tolist numpy cpu nonzero __bool__ __float__ __int__ __index__".split()

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, options = function.__name__, kwargs or {}
        if name in self.NAMES or (name == "tensor" and "device" in options):
            self.found.append(name)
        return function(*args, **options)


@pytest.mark.parametrize("tokens", ["300", "1000000"])
def test_a_step_waits_for_its_losses_and_its_norm(model, split, sequences, monkeypatch, tokens):
    """...however many micro-batches it has."""
    monkeypatch.setattr(training, "SOAP", Record)
    args = arguments("--pairs-per-step", "1000", "--micro-batch-tokens", tokens)
    with Waits() as waits:
        train_on(args, model, split, sequences)
    assert waits.found == ["tolist", "item"]


@pytest.mark.parametrize("nbytes, times", [(0, 2), (10**9, 1)])
def test_on_a_card_what_fits_is_not_recomputed(
    base, tokenizer, split, sequences, monkeypatch, lenient, nbytes, times
):
    """The same bits as on a CPU; of the layers, the last's keys and values are run apart. There
    alone attention's kernels are told to add up gradients in one order."""
    found, begun, runs, strict = [], [], [], {True: set(), False: set()}

    def note(on_card):
        strict[on_card].add(not torch.is_deterministic_algorithms_warn_only_enabled())

    args = arguments("--pairs-per-step", "36", "--micro-batch-tokens", "500")
    for on_card in (False, True):
        model, log = rm.load_base(base, tokenizer, torch.float32, "cpu"), io.StringIO()
        rm.draw_head(model.head.weight, model.model.config, 1)
        model.head.weight.register_hook(lambda _, on_card=on_card: note(on_card))
        if on_card:
            room = Room(nbytes, 1, lambda: begun.append(1) or 0)
            kind = type(model.model)
            monkeypatch.setattr(kind, "device", property(lambda model: torch.device("cuda:0")))
            # What runs before it is a trial.
            monkeypatch.setattr(
                budget, "of_card", lambda *_, room=room: runs.clear() or (None, room)
            )
            monkeypatch.setattr(room, "begin", lambda: begun.append("begin"))
            model.model.model.layers[0].self_attn.register_forward_hook(lambda *a: runs.append(1))
        train_on(args, model, split, sequences, log)
        lines = [json.loads(line) | {"seconds": 0} for line in log.getvalue().splitlines()]
        found.append((lines, [*model.model.parameters()]))
    assert found[0][0] == found[1][0] and len(lines) == 2
    assert all(torch.equal(*pair) for pair in zip(found[0][1], found[1][1]))
    assert begun.count("begin") > 2 and len(runs) == times * begun.count("begin")
    assert strict == {True: {True}, False: {False}}


def test_a_trial_of_one_order(model, sequences, lenient):
    """It is strict forward and backward, and leaves nothing."""
    strict = []

    def note(*_):
        strict.append(not torch.is_deterministic_algorithms_warn_only_enabled())

    model.head.register_forward_hook(note)
    model.head.weight.register_hook(note)
    assert training.has_one_order(model, sequences)
    note()
    assert strict == [True, True, False]
    assert all(p.grad is None for p in model.model.parameters())


def test_a_base_without_one_order_is_trained_with_a_warning(model, sequences, lenient, capsys):
    def unpool(module, inputs, output):
        """An operation for which torch has no deterministic algorithm, on a CPU either."""
        pairs = torch.zeros(1, 1, 1, 2)
        torch.nn.functional.max_unpool2d(pairs, torch.arange(2)[None, None, None], (1, 2))

    hook = model.head.register_forward_hook(unpool)
    assert not training.has_one_order(model, sequences)
    said = capsys.readouterr().err
    assert said.startswith("training: warning: gradients may differ in their last bits from run")
    assert "deterministic" in said and said.count("\n") == 1
    hook.remove()
    model.head.register_forward_hook(lambda *_: torch.zeros(1) @ torch.zeros(2))
    with pytest.raises(RuntimeError, match="inconsistent tensor size|size mismatch|shape"):
        training.has_one_order(model, sequences)


def test_bfloat16_gradients_are_accumulated_in_float32(
    base, tokenizer, split, sequences, monkeypatch
):
    """Pair by pair or all at once: the same gradient, up to BF16's rounding of each."""
    monkeypatch.setattr(training, "SOAP", Record)
    found = []
    for tokens in ("1", "1000000"):
        model = rm.load_base(base, tokenizer, torch.bfloat16, "cpu")
        rm.draw_head(model.head.weight, model.model.config, 1)
        args = arguments("--pairs-per-step", "1000", "--micro-batch-tokens", tokens)
        train_on(args, model, split, sequences)
        assert {grad.dtype for grad in Record.last.grads.values()} == {torch.float32}
        found.append(torch.cat([grad.flatten() for grad in Record.last.grads.values()]))
    assert (found[0] - found[1]).norm() < 0.1 * found[1].norm()


def test_partial_last_step_is_divided_by_its_own_pairs(model, split, sequences, monkeypatch):
    """72 pairs in steps of 30: the last holds 12, and its loss is their mean."""
    monkeypatch.setattr(training, "SOAP", Record)
    log = io.StringIO()
    train_on(arguments("--pairs-per-step", "30"), model, split, sequences, log)
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    assert sorted(line["pairs"] for line in lines) == [12, 30, 30]
    r = rm.score_sequences(model, sequences, 10**6)
    whole = np.mean((split.p - 1 / (1 + np.exp(r[split.b] - r[split.a]))) ** 2)
    assert abs(sum(line["loss"] * line["pairs"] for line in lines) / 72 - whole) < 1e-6


def test_the_first_step_counts(model, split, sequences):
    """SOAP's first call only initialises; one step changes every parameter that has a gradient."""
    before = {name: p.detach().clone() for name, p in model.model.named_parameters()}
    args = arguments("--pairs-per-step", "1000", "--lr", "1e-3", "--weight-decay", "0")
    train_on(args, model, split, sequences)
    for name, p in model.model.named_parameters():
        assert 1e-5 < (p - before[name]).abs().mean() < 1e-2, name


def test_weight_decay_is_decoupled_and_applied(base, tokenizer, split, sequences):
    """A difference of decays is a difference of the parameters, about lr x decay in size."""
    after = []
    for decay in ("0", "100"):
        model = rm.load_base(base, tokenizer, torch.float32, "cpu")
        rm.draw_head(model.head.weight, model.model.config, 1)
        args = arguments("--pairs-per-step", "1000", "--lr", "1e-3", "--weight-decay", decay)
        train_on(args, model, split, sequences)
        after.append(model.model.model.layers[0].mlp.up_proj.weight.norm().item())
    assert 0.75 < after[1] / after[0] < 0.95


def test_bfloat16_trains_float32_masters(base, tokenizer, split, sequences, monkeypatch):
    """At lr 1e-5 most of the float32 update is in the masters; the model stays BF16 and follows
    them.
    """
    seen = {}

    class Spy(training.SOAP):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            seen["now"] = [p for group in self.param_groups for p in group["params"]]
            seen["before"] = [p.detach().clone().float() for p in seen["now"]]

    monkeypatch.setattr(training, "SOAP", Spy)
    moves = {}
    for dtype in ("float32", "bfloat16"):
        model = rm.load_base(base, tokenizer, torch.bfloat16, "cpu")
        model.model.to(getattr(torch, dtype)).score.float()
        rm.draw_head(model.head.weight, model.model.config, 1)
        args = arguments(
            "--dtype",
            dtype,
            "--lr",
            "1e-5",
            "--weight-decay",
            "0",
            "--pairs-per-step",
            "12",
            "--warmup",
            "0",
        )
        train_on(args, model, split, sequences)
        moves[dtype] = torch.cat(
            [(now - before).flatten() for now, before in zip(seen["now"], seen["before"])]
        )
        assert {p.dtype for p in model.model.base_model.parameters()} == {
            getattr(torch, dtype)
        } and model.head.weight.dtype == torch.float32
        masters = {tuple(p.shape): [] for p in seen["now"]}
        for p in seen["now"]:
            masters[tuple(p.shape)].append(p)
        for p in model.model.parameters():
            assert any(torch.equal(p, master.to(p.dtype)) for master in masters[tuple(p.shape)])
    survived = (moves["float32"] @ moves["bfloat16"] / moves["float32"].square().sum()).item()
    assert survived > 0.7, survived


def test_loss_falls_when_a_few_pairs_are_learnt_by_heart(model, split, sequences):
    log = io.StringIO()
    keep = np.arange(72) < 6
    target = 1 / (
        1 + np.exp((split.b % 4) ** 2 - (split.a % 4) ** 2)
    )  # of the first prompt's four responses, the last is the best
    training.train_full(
        arguments("--lr", "3e-3", "--epochs", "40"),
        model,
        split,
        sequences,
        (target,),
        squared,
        keep,
        np.random.default_rng(0),
        log,
    )
    losses = [json.loads(line)["loss"] for line in log.getvalue().splitlines()]
    assert len(losses) == 40 and losses[-1] < 0.3 * losses[0]


def test_which_parameters_are_preconditioned(model):
    groups = training.parameter_groups(model.model)
    names = {id(p): name for name, p in model.model.named_parameters()}
    matrices, plain = ([names[id(p)] for p in group] for group in groups)
    assert sorted(matrices + plain) == sorted(names.values())
    assert {"score.weight", "model.embed_tokens.weight", "model.norm.weight"} <= set(plain)
    assert (
        all(".mlp." in name or ".self_attn." in name for name in matrices) and len(matrices) == 14
    )
    words = "--run r --iteration 1 --base b --device cpu --max-precondition-dim 64".split()
    optimizer = training.make_optimizer(groups, train_rm.parse_args(words), None)
    dims = {names[id(parameter.p)]: parameter.dim for parameter in optimizer.params}
    assert dims == dict.fromkeys(matrices, 64) | dict.fromkeys(plain, 1)


# ---- a full run


def test_log_has_the_contract_s_fields(full_run, split, sequences):
    lines = log_of(full_run)
    assert all(
        set(line) == {"step", "loss", "lr", "tokens", "pairs", "seconds", "grad_norm"}
        for line in lines
    )
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert sum(line["pairs"] for line in lines) == 72 and sum(
        line["tokens"] for line in lines
    ) == sum(map(len, sequences))
    np.testing.assert_allclose(
        [line["lr"] for line in lines],
        [3e-3 * training.schedule(i, len(lines), 0.03) for i in range(len(lines))],
    )
    assert all(x["seconds"] <= y["seconds"] for x, y in zip(lines, lines[1:]))


def test_a_run_holds_what_the_contract_says(full_run):
    for j in (1, 2):
        for name in ("train", "valid", "test"):
            r = rewards(full_run, j, name)
            assert (
                r.dtype == np.float32
                and r.shape == (read_split(full_run, name).response_start[-1],)
                and r.std() > 0
            )
        r = rewards(full_run, j, "continuations")
        assert r.dtype == np.float32 and r.shape == (2, 5)
        assert (full_run / f"member_{j:02d}" / "model.safetensors").exists()
    entry = manifest.entries(full_run)["member_01"]
    assert (
        entry["done"]
        and entry["identical_pairs"] == 0
        and entry["target_formula"] == "t = 1/2 + (p - p_hat)"
        and entry["threads"] == 1
    )
    assert not leftovers(full_run)


def test_a_full_member_loads_in_transformers_and_gives_the_stored_rewards(full_run):
    check_plain_directory(full_run, 2)


def check_plain_directory(run, j):
    """Loaded as a user would: all keys, the stored rewards, alone and in a batch."""
    directory = run / f"member_{j:02d}"
    model, info = AutoModelForSequenceClassification.from_pretrained(
        directory, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    test = read_split(run, "test")
    stored = rewards(run, j)
    conversations = [
        [*messages, {"role": "assistant", "content": text}]
        for messages, texts in zip(test.messages, test.responses)
        for text in texts
    ]
    assert len(conversations) == len(stored) == 12
    with torch.no_grad():
        for chat, value in zip(conversations[::5], stored[::5]):
            ids = tokenizer.apply_chat_template(chat, return_dict=True, return_tensors="pt")
            assert abs(model(**ids).logits.item() - value) < 1e-5
        batch = tokenizer.apply_chat_template(
            conversations, return_dict=True, return_tensors="pt", padding=True
        )
        np.testing.assert_allclose(model(**batch).logits[:, 0], stored, atol=1e-5)


def test_member_two_is_trained_on_the_residual(full_run, data, base, monkeypatch):
    """What reaches training is t_2 = 1/2 + p - V_1, from member 1's stored rewards."""
    seen = capture(monkeypatch)
    run = fresh(full_run, data.parent, "target")
    forget(run, 2)
    with pytest.raises(Stop):
        train(run, base, *FULL, iteration=2)
    split, r = read_split(run, "train"), rewards(run, 1, "train")
    np.testing.assert_allclose(
        seen[0]["target"], 0.5 + split.p - (r[split.a] > r[split.b]), atol=1e-12
    )


class Stop(Exception):
    pass


def capture(monkeypatch):
    """Stop where training would begin, and keep what it is given."""
    seen = []

    def stop(groups, rewards_at, steps, split, targets, *more):
        order = [
            sorted(int(pair) for micro in step for pair in micro) for (step,) in steps
        ]  # of one process
        (head,) = [p for p in groups[1] if p.shape == (1, 32)]
        seen.append({"head": head.detach().clone(), "order": order, "target": targets[0]})
        raise Stop

    monkeypatch.setattr(training, "train", stop)
    return seen


def forget(run, j):
    """As if member j had never been made."""
    whole = json.loads((run / "manifest.json").read_text())
    for stage in [stage for stage in whole["stages"] if stage.startswith(f"member_{j:02d}")]:
        del whole["stages"][stage]
    (run / "manifest.json").write_text(json.dumps(whole))
    shutil.rmtree(run / f"member_{j:02d}", ignore_errors=True)
    for path in [run / "logs" / f"{j:02d}.jsonl", *(run / "rewards").glob(f"{j:02d}_*.npy")]:
        path.unlink(missing_ok=True)


def test_head_and_order_come_from_seed_and_member(full_run, base, tmp_path, monkeypatch):
    seen = capture(monkeypatch)
    run = fresh(full_run, tmp_path)
    for j in (1, 2):
        forget(run, j)
    for state, (seed, j) in enumerate(((0, 1), (0, 1), (1, 1), (0, 2))):
        torch.manual_seed(state)
        np.random.seed(state)
        if j == 2:
            shutil.copy(full_run / "rewards" / "01_train.npy", run / "rewards")
        with pytest.raises(Stop):
            train(run, base, *FULL, "--seed", str(seed), iteration=j)
        forget(run, j)
    first, again, other_seed, other_member = seen
    assert torch.equal(first["head"], again["head"]) and first["order"] == again["order"]
    for other in (other_seed, other_member):
        assert not torch.equal(first["head"], other["head"]) and first["order"] != other["order"]
    assert sorted(pair for step in first["order"] for pair in step) == list(range(72))


def test_same_seed_same_bits_and_other_seed_other_rewards(full_run, data, base, tmp_path):
    run = fresh(data, tmp_path)
    torch.manual_seed(77)
    train(run, base, *FULL)
    for name in ("train", "test"):
        np.testing.assert_array_equal(rewards(run, 1, name), rewards(full_run, 1, name))
    other = fresh(data, tmp_path, "other")
    train(other, base, *FULL, "--seed", "1")
    assert abs(rewards(other) - rewards(full_run)).max() > 0.01


def test_member_two_depends_on_member_one_s_rewards_and_weight_alone(
    full_run, data, base, tmp_path
):
    """Not on K, nor on how member 1 came about: here it never was in this directory, and
    weights.json goes further than k = 1.
    """
    run = fresh(data, tmp_path)
    (run / "rewards").mkdir()
    shutil.copy(full_run / "rewards" / "01_train.npy", run / "rewards")
    shutil.copy(full_run / "weights.json", run)
    assert len(json.loads((run / "weights.json").read_text())) == 2
    train(run, base, *FULL, iteration=2)
    for name in ("train", "valid", "test"):
        np.testing.assert_array_equal(rewards(run, 2, name), rewards(full_run, 2, name))


def test_continuations_that_come_later_are_scored_by_the_stored_member(
    full_run, data, base, tmp_path, capsys
):
    run = fresh(full_run, tmp_path)
    kept = rewards(run, 1, "continuations")
    whole = json.loads((run / "manifest.json").read_text())
    del whole["stages"]["member_01_continuations"]
    (run / "manifest.json").write_text(json.dumps(whole))
    (run / "rewards" / "01_continuations.npy").unlink()
    table = pq.read_table(run / "continuations.parquet")
    pq.write_table(
        table.drop_columns("logprob"), run / "continuations.parquet"
    )  # as a faster engine may have made it
    edited(run)
    train(run, base, *FULL)
    assert "skipped" in capsys.readouterr().out
    np.testing.assert_array_equal(rewards(run, 1, "continuations"), kept)
    rows = table.to_pylist()
    pq.write_table(
        pa.Table.from_pylist([rows[0], rows[1] | {"texts": ["one"]}]), run / "continuations.parquet"
    )
    edited(run)
    with pytest.raises(InputError, match="prompt 2: 1 texts found, 5 expected"):
        train(run, base, *FULL)


# ---- what is refused


@pytest.mark.parametrize(
    "flags",
    [("--lr", "1e30"), ("--lr", "1e30", "--pairs-per-step", "1000"), ("--lr", "1e30", *HEAD[:2])],
)
def test_a_loss_that_is_not_finite(data, base, tmp_path, flags):
    run = fresh(data, tmp_path)
    before = contents(run)
    with pytest.raises(InputError, match="member 1.*lower --lr") as error:
        train(run, base, "--pairs-per-step", "16", *flags)
    assert "1000" in flags or "step 2: loss nan" in str(error.value)
    after = {name for name in contents(run) if not name.startswith("features/")}
    assert after == set(before) and not leftovers(run)
    assert not manifest.entries(run)["member_01"]["done"]


def test_a_finished_member_is_skipped_whatever_the_speed(full_run, base, tmp_path, capsys):
    run = fresh(full_run, tmp_path)
    before = contents(run)
    times = {path: path.stat().st_mtime_ns for path in run.rglob("*.npy")}
    train(run, base, *FULL, "--micro-batch-tokens", "100", "--threads", "2")
    torch.set_num_threads(1)
    assert "member 1" in (said := capsys.readouterr().out) and "skipped" in said
    assert contents(run) == before and {path: path.stat().st_mtime_ns for path in times} == times


@pytest.mark.parametrize(
    "flags, was",
    [
        (("--lr", "1e-4"), "lr was 0.003, is 0.0001"),
        (("--seed", "7"), "seed was 0, is 7"),
        (("--target", "p"), "target was centered, is p"),
        (("--epochs", "2"), "epochs was 1, is 2"),
        (("--max-length", "99"), "max-length was 2048, is 99"),
        (("--train", "head"), "train was full, is head"),
        (("--pairs-per-step", "17"), "pairs-per-step was 16, is 17"),
        (("--weight-decay", "0"), "weight-decay was 0.1, is 0.0"),
        (("--dtype", "bfloat16"), "dtype was float32, is bfloat16"),
        (("--warmup", "0.5"), "warmup was 0.03, is 0.5"),
    ],
)
def test_other_arguments_are_refused(full_run, base, flags, was):
    """...with what was and is."""
    given = (
        [*FULL, *flags]
        if "--train" not in flags
        else [
            "--lr",
            "3e-3",
            "--epochs",
            "1",
            "--weight-decay",
            "0.1",
            "--pairs-per-step",
            "16",
            *flags,
        ]
    )
    before = contents(full_run)
    with pytest.raises(InputError) as error:
        train(full_run, base, *given)
    advice = f"to have both, start another run from the data on, say {full_run}-2"
    assert f"{was}; {advice}" in str(error.value)
    assert contents(full_run) == before


def test_another_base_is_refused(full_run, tokenizer, tmp_path):
    other = make_base(tokenizer, tmp_path / "other", 1)
    with pytest.raises(InputError, match=f"from another base model.*, say {full_run}-2"):
        train(full_run, other, *FULL)


def test_another_chat_template_is_refused(full_run, base, tokenizer, tmp_path):
    (tmp_path / "own.jinja").write_text(tokenizer.chat_template.replace("<|", "<||"))
    with pytest.raises(InputError, match=f"from another chat template.*, say {full_run}-2"):
        train(full_run, base, *FULL, "--chat-template", str(tmp_path / "own.jinja"))


def test_other_data_is_refused(full_run, base, tmp_path):
    run = fresh(full_run, tmp_path)
    rows = pq.read_table(run / "data" / "train.parquet").to_pylist()
    rows[0]["pairs"][0]["votes_a"] += 1
    write_split(run / "data" / "train.parquet", rows)
    with pytest.raises(InputError, match=f"from another data/train.parquet.*, say {run}-2"):
        train(run, base, *FULL)


def test_other_rewards_of_the_members_before_are_refused(full_run, base, tmp_path):
    run = fresh(full_run, tmp_path)
    np.save(run / "rewards" / "01_train.npy", rewards(run, 1, "train") + 1)
    edited(run)
    with pytest.raises(InputError, match="from another rewards of member 1"):
        train(run, base, *FULL, iteration=2)


def test_weights_for_another_k(full_run, base, tmp_path):
    run = fresh(full_run, tmp_path)
    (run / "weights.json").write_text(
        json.dumps(json.loads((run / "weights.json").read_text())[:1])
    )
    edited(run)
    with pytest.raises(InputError, match="weights for k = 1 found, k = 2 expected"):
        train(run, base, *FULL, iteration=3)


def test_data_errors_come_before_the_base_is_looked_for(full_run, tmp_path):
    run = fresh(full_run, tmp_path)
    damaged = rewards(run, 1, "train")
    damaged[5] = np.nan
    np.save(run / "rewards" / "01_train.npy", damaged)
    edited(run)
    with pytest.raises(
        InputError, match="member 1, split train: 1 rewards are NaN, the first at index 5"
    ):
        train(run, tmp_path / "no-base", iteration=2)
    (run / "rewards" / "01_train.npy").unlink()
    with pytest.raises(InputError, match="01_train.npy: no such file"):
        train(run, tmp_path / "no-base", iteration=2)
    (run / "weights.json").unlink()
    with pytest.raises(InputError, match="weights.json: no such file"):
        train(run, tmp_path / "no-base", iteration=2)
    (run / "data" / "test.parquet").write_text("no parquet")
    with pytest.raises(InputError, match="test.parquet: not prepared data"):
        train(run, tmp_path / "no-base")
    with pytest.raises(InputError, match="train.parquet: no such file"):
        train(tmp_path / "nowhere", tmp_path / "no-base")


def test_the_base_is_looked_for_before_anything_is_written(data, tmp_path):
    run = fresh(data, tmp_path)
    with pytest.raises(InputError, match="--base .*no-base"):
        train(run, tmp_path / "no-base")
    assert contents(run) == contents(data) and "member_01" not in manifest.entries(run)


def test_flags_are_checked_and_nothing_else(tmp_path, capsys):
    words = ["--run", str(tmp_path / "none"), "--base", "none", "--iteration", "2", "--check"]
    train_rm.main(train_rm.parse_args(words))
    assert not any(capsys.readouterr()) and not (tmp_path / "none").exists()
    for flags, said in (
        ("--loss bt", "no residual"),
        ("--loss margin --target centered", "no residual"),
        ("--lr fast", "--lr"),
        ("--target nothing", "--target"),
    ):
        with pytest.raises(SystemExit) as ended:
            train_rm.parse_args([*words, *flags.split()])
        line = capsys.readouterr().err
        assert ended.value.code == 2 and said in line and line.count("\n") == 1


def test_at_most_29_flags(capsys):
    with pytest.raises(SystemExit):
        train_rm.parse_args(["--help"])
    flags = re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.M)
    assert 20 < len(flags) <= 29


def test_the_script_ends_with_one_line_and_code_2(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            str(REPOSITORY / "train_rm.py"),
            "--run",
            str(tmp_path / "none"),
            "--base",
            "b",
            "--iteration",
            "1",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith("train_rm.py: error: ")
        and "train.parquet: no such file" in done.stderr
        and done.stderr.count("\n") == 1
    )


# ---- identical after truncation


def test_joint_and_adopted_members_count_them_too(full_run, data, base, tmp_path, capsys):
    """So do continuations, in the stage of their own."""
    import adopt
    import train_joint

    joint, run, short = fresh(data, tmp_path, "joint"), fresh(data, tmp_path), ("--max-length", "8")
    for place in (joint, run):
        shutil.copy(full_run / "continuations.parquet", place)
    words = ["--run", str(joint), "--base", str(base), "--k", "2", "--train", "head"]
    train_joint.main(train_joint.parse_args([*words, "--epochs", "1", *FLAGS, *short]))
    model = str(full_run / "member_01")
    words = ["--run", str(run), "--iteration", "1", "--model", model, *FLAGS, *short]
    adopt.main(adopt.parse_args(words))
    printed = capsys.readouterr().out
    assert "member 1, continuations; texts cut to --max-length: continuations 10\n" in printed
    entries = manifest.entries(joint)["joint"], manifest.entries(run)["member_01"]
    assert entries[0]["texts_cut"] == entries[1]["texts_cut"] | {"continuations": 10}
    assert entries[0]["identical_pairs_by_split"] == entries[1]["identical_pairs_by_split"]
    assert min(entries[1]["texts_cut"].values()) > 0
    assert printed.count("encoding, which tie: train") == 2


@pytest.mark.parametrize("flags", [FULL, HEAD])
def test_pairs_identical_after_truncation(data, base, tokenizer, split, tmp_path, flags, capsys):
    """Left out of training and counted, as are the texts cut; in evaluation a tie, in whatever
    batch the two came."""
    run = fresh(data, tmp_path)
    train(run, base, *flags, "--max-length", "8", "--micro-batch-tokens", "30")
    lists = {
        name: chats.encode_split(tokenizer, s.messages, s.responses, 8)
        for name, s in (("train", split), ("test", read_split(data, "test")))
    }
    identical = sum(lists["train"][a] == lists["train"][b] for a, b in zip(split.a, split.b))
    assert 5 < identical < 60
    entry, counts = manifest.entries(run)["member_01"], {"identical": {}, "cut": {}}
    for name in ("train", "valid", "test"):
        x = read_split(data, name)
        whole = chats.encode_split(tokenizer, x.messages, x.responses, None)
        counts["cut"][name] = sum(len(ids) > 8 for ids in whole)
        same = [whole[a][-7:] == whole[b][-7:] for a, b in zip(x.a, x.b)]  # BOS, and seven more
        counts["identical"][name] = sum(same)
    assert entry["identical_pairs"] == identical == counts["identical"]["train"]
    assert entry["identical_pairs_by_split"] == counts["identical"]
    assert entry["texts_cut"] == counts["cut"]
    said = [", ".join(f"{k} {n}" for k, n in of.items() if n) for of in counts.values()]
    words = (
        f"identical after encoding, which tie: {said[0]}; texts cut to --max-length: {said[1]}\n"
    )
    assert words in capsys.readouterr().out and counts["identical"]["test"] > 0
    lines = log_of(run)
    assert sum(line["pairs"] for line in lines) == (72 - identical) * (5 if flags is HEAD else 1)
    for name, found in lists.items():
        stored, s = rewards(run, 1, name), read_split(run, name)
        for a, b in zip(s.a, s.b):
            assert (stored[a] == stored[b]) == (found[a] == found[b])
    assert (
        sum(
            lists["test"][a] == lists["test"][b]
            for a, b in zip(read_split(data, "test").a, read_split(data, "test").b)
        )
        > 0
    )


# ---- killed

HARNESS = """
import json, os, signal, sys, threading, time
from pathlib import Path
import torch, tqdm, train_rm
from pairwise import run_dir, training

def main(run):
    sys.stdout = open(os.devnull, "w"); sys.stderr = open(os.devnull, "w")
    train_rm.main(train_rm.parse_args(["--run", run, "--iteration", "1", *json.loads(sys.argv[3])]))

def forked(function, *args, after=None):
    '''Run in a child; kill it after so many seconds. Returns the signal that ended it.'''
    child = os.fork()
    if not child:
        # Forked processes share tqdm's own lock, and one that is killed may hold it.
        tqdm.tqdm.set_lock(threading.RLock())
        try:
            function(*args)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.__stderr__, flush=True)
            os._exit(1)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0

def die_at_rename(run, number, after):
    count, replace = [0], os.replace
    def counted(*args):
        count[0] += 1
        if after: replace(*args)
        if count[0] == number: os.kill(os.getpid(), signal.SIGKILL)
        if not after: replace(*args)
    os.replace = counted
    main(run)

def die_at_step(run, number):
    count, step = [0], training.SOAP.step
    def counted(self, *args, **kwargs):
        count[0] += 1
        if count[0] == number: os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args, **kwargs)
    training.SOAP.step = counted
    main(run)

torch.set_num_threads(1)
runs, found = json.loads(sys.argv[1]), {}
main(runs["whole"])  # here, so that all is imported before the forks
started = time.time()
assert forked(main, runs["again"]) == 0
took = time.time() - started
for name, run in runs.items():
    kind, _, moment = name.partition(" ")
    if kind == "after":
        found[name] = forked(main, run, after=float(moment) * took)
    elif kind == "rename":
        found[name] = forked(die_at_rename, run, abs(int(moment)), int(moment) < 0)
    elif kind == "step":
        found[name] = forked(die_at_step, run, int(moment))
    if kind not in ("whole", "again"):
        assert forked(main, run) == 0, name
Path(sys.argv[2]).write_text(json.dumps(found))
"""


@pytest.mark.parametrize(
    "flags, moments",
    [
        (
            FULL,
            (
                "after 0.02",
                "after 0.3",
                "after 0.7",
                "step 1",
                "step 4",
                "rename 1",
                "rename 2",
                "rename 4",
                "rename 6",
                "rename 7",
                "rename -7",
                "rename 9",
            ),
        ),
        (HEAD, ("after 0.4", "step 4", "rename 4", "rename 6", "rename 9", "rename 11")),
    ],
)
def test_killed_and_run_again(full_run, data, base, tmp_path, flags, moments):
    """SIGKILL, at any moment: the same command ends in the same bits as if nothing had happened,
    and leaves nothing behind.

    Moments: after a share of the time, before the n-th rename (negative: right after it), in the
    n-th call of the optimizer.
    """
    runs = {
        name: fresh(data, tmp_path, name.replace(" ", "_")) for name in ("whole", "again", *moments)
    }
    for run in runs.values():
        shutil.copy(full_run / "continuations.parquet", run)
    result = tmp_path / "killed.json"
    subprocess.run(
        [
            sys.executable,
            "-c",
            HARNESS,
            json.dumps({name: str(run) for name, run in runs.items()}),
            str(result),
            json.dumps(["--base", str(base), *FLAGS, *flags]),
        ],
        check=True,
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""},
    )
    killed = json.loads(result.read_text())
    assert all(signal == 9 for name, signal in killed.items() if not name.startswith("after")), (
        killed
    )
    expected = contents(runs["whole"])
    assert "rewards/01_test.npy" in expected and "rewards/01_continuations.npy" in expected
    for name, run in runs.items():
        assert not leftovers(run), name
        found = contents(run)
        assert found.keys() == expected.keys(), name
        for file in expected:
            assert found[file] == expected[file], (name, file)
        assert all(entry["done"] for entry in manifest.entries(run).values()), name


# ---- head training


def test_features_are_computed_once(head_run):
    assert head_run.times[0] == head_run.times[1]
    assert manifest.entries(head_run.run)["features"]["done"]


def test_head_rewards_are_the_head_on_the_base_s_features(head_run, base, tokenizer):
    run, test = head_run.run, read_split(head_run.run, "test")
    model = AutoModelForCausalLM.from_pretrained(base)
    expected = np.load(run / "features" / "test.npy")
    assert expected.dtype == np.float32 and expected.shape == (12, 32)
    lists = chats.encode_split(tokenizer, test.messages, test.responses, None)
    with torch.no_grad():
        features = torch.stack(
            [model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1] for ids in lists]
        ).numpy()
    np.testing.assert_allclose(expected, features, atol=1e-5)
    for j in (1, 2):
        names = sorted(path.name for path in (run / f"member_{j:02d}").iterdir())
        assert names == ["chat_template.jinja", "head.safetensors"]
        np.testing.assert_allclose(
            rewards(run, j),
            features @ members.load_head(run / f"member_{j:02d}").numpy()[0],
            atol=1e-5,
        )


def test_unit_scale_is_folded_into_the_head(head_run, model, split):
    """Trained on features divided by their deviation: with a vanishing learning rate the stored
    head is the drawn one, divided alike.
    """
    features = np.load(head_run.run / "features" / "train.npy")
    drawn = model.head.weight.detach().clone().numpy()
    log = io.StringIO()
    args = arguments(
        *HEAD[:2],
        "--lr",
        "1e-12",
        "--epochs",
        "1",
        "--pairs-per-step",
        "1000",
        "--weight-decay",
        "0",
    )
    training.train_head(
        args,
        model.head.weight,
        split,
        features,
        (split.p,),
        squared,
        np.ones(72, bool),
        np.random.default_rng(0),
        log,
    )
    np.testing.assert_allclose(
        model.head.weight.detach().numpy(), drawn / (features.std(0) + 1e-6), rtol=1e-5
    )
    r = rm.score_features(torch.from_numpy(features), model.head.weight.detach())
    expected = np.mean((split.p - 1 / (1 + np.exp(r[split.b] - r[split.a]))) ** 2)
    assert abs(json.loads(log.getvalue())["loss"] - expected) < 1e-5


def test_a_feature_that_training_does_not_see_vary_decides_nothing():
    features = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    features[:, 1] = 0.1  # Its deviation in float32 is not exactly 0.
    spread = training.spread(features)
    assert spread.dtype == np.float32 and np.isposinf(spread[1])
    np.testing.assert_allclose(spread[[0, 2, 3]], features.std(0)[[0, 2, 3]] + 1e-6)
    weight = torch.nn.Parameter(torch.ones(1, 4))
    votes = [np.array(x, dtype) for x, dtype in (([0, 2], int), ([1, 3], int), ([0.2, 0.9], float))]
    split = SimpleNamespace(a=votes[0], b=votes[1], p=votes[2])
    args = arguments(*HEAD[:2], "--lr", "1e-2", "--epochs", "1", "--pairs-per-step", "2")
    parts = (split, features, (split.p,), squared, np.ones(2, bool), np.random.default_rng(0))
    training.train_head(args, weight, *parts, io.StringIO())
    assert weight[0, 1] == 0 and (weight[0, [0, 2, 3]] != 0).all()


def test_head_log(head_run):
    lines = log_of(head_run.run)
    assert (
        sum(line["pairs"] for line in lines) == 5 * 72
        and max(line["pairs"] for line in lines) == 64
    )
    assert mean_loss(lines[-2:]) < mean_loss(lines[:2]), "the last epoch, the first"


def test_export(head_run, base, tmp_path, capsys):
    run = fresh(head_run.run, tmp_path)
    head, before = members.load_head(run / "member_01"), contents(run)
    export(run, base, 1)
    assert torch.equal(members.load_head(run / "member_01"), head)
    check_plain_directory(run, 1)
    kept = {
        name: content
        for name, content in contents(run).items()
        if not name.startswith("member_01/")
    }
    assert kept == {
        name: content for name, content in before.items() if not name.startswith("member_01/")
    } and not leftovers(run)
    export(run, base, 2)
    check_plain_directory(run, 2)
    capsys.readouterr()
    for again, said in (("1", "already a plain directory"), ("3", "no such member")):
        with pytest.raises(InputError, match=rf"member_0{again}: {said}"):
            export(run, base, again)
    train(run, base, *HEAD, iteration=2)
    assert "skipped" in capsys.readouterr().out


def test_a_full_member_needs_no_export(full_run, base):
    with pytest.raises(InputError, match="member_01: already a plain directory"):
        export(full_run, base, 1)


# ---- continuations


def sampled(continuations, data, base, directory, *flags):
    run = fresh(data, directory, f"run{len(list(directory.iterdir()))}")
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
                "4",
                "--max-tokens",
                "12",
                "--threads",
                "1",
                *flags,
            ]
        )
    )
    return pq.read_table(run / "continuations.parquet").to_pylist()


def test_continuations_are_seeded(continuations, data, base, tmp_path):
    rows = sampled(continuations, data, base, tmp_path)
    test = read_split(data, "test")
    assert [set(row) for row in rows] == [{"prompt_id", "messages", "texts", "logprob"}] * 2
    for row in rows:
        assert row["messages"] == test.messages[test.prompt_id.index(row["prompt_id"])]
        assert (
            len(row["texts"]) == len(row["logprob"]) == 4
            and len(set(row["texts"])) > 1
            and all(value < 0 for value in row["logprob"])
        )
    assert len({row["prompt_id"] for row in rows}) == 2
    assert sampled(continuations, data, base, tmp_path) == rows
    assert [
        row["texts"] for row in sampled(continuations, data, base, tmp_path, "--seed", "1")
    ] != [row["texts"] for row in rows]


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (3.0, 1.0), (3.0, 0.9)])
def test_logprob_is_that_of_the_sampled_tokens_and_their_end(
    continuations, base, tokenizer, temperature, top_p
):
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    outs, lengths = [], []
    generate, forward = model.generate, model.base_model.forward
    model.generate = lambda *args, **kwargs: outs.append(generate(*args, **kwargs)) or outs[-1]
    model.base_model.forward = lambda *args, **kwargs: (
        lengths.append(kwargs["input_ids"].numel()) or forward(*args, **kwargs)
    )
    prompt = chats.encode(tokenizer, [{"role": "user", "content": "how can i get fit ?"}])
    start = len(prompt)
    torch.manual_seed(1)
    texts, logprob = continuations.sampling.sample(
        model, tokenizer, prompt, 45, temperature, top_p, 60
    )
    assert [len(out.sequences) for out in outs] == [20, 20, 5] and len(texts) == len(logprob) == 45
    assert lengths[0] == start - 1 and set(lengths[1:]) == {
        20,
        5,
    }  # the prompt once, then a token for each answer
    ended = padded = 0
    for row, text, value in zip(
        [row for out in outs for row in out.sequences.tolist()], texts, logprob
    ):
        assert row[:start] == prompt
        answer = row[start:]
        if tokenizer.eos_token_id in answer:
            answer = answer[: answer.index(tokenizer.eos_token_id) + 1]
            ended += 1
        padded += tokenizer.pad_token_id in answer
        with torch.no_grad():
            each = (
                model(input_ids=torch.tensor([row[:start] + answer]))
                .logits[0, start - 1 : -1]
                .double()
                .log_softmax(-1)
            )
        assert abs(sum(each[i, token].item() for i, token in enumerate(answer)) - value) < 1e-3
        assert text == tokenizer.decode(answer, skip_special_tokens=True)
        for i, token in enumerate(
            answer
        ):  # the nucleus: less than top_p is more probable than a token that was drawn
            p = (each[i] / temperature).softmax(-1)
            assert p[p > p[token]].sum() <= top_p + 1e-4
    assert ended and (padded or top_p < 1), "no case of both kinds: choose another seed"


def test_sampled_frequencies_are_the_models(continuations, base, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    prompt = chats.encode(tokenizer, [{"role": "user", "content": "how can i get fit ?"}])
    torch.manual_seed(0)
    with torch.no_grad():
        p = (model(input_ids=torch.tensor([prompt])).logits[0, -1].double() / 0.5).softmax(-1)
    texts, logprob = continuations.sampling.sample(model, tokenizer, prompt, 1000, 0.5, 1.0, 1)
    expected = {}  # several tokens can be the same text
    for token, value in enumerate(p.tolist()):
        text = tokenizer.decode([token], skip_special_tokens=True)
        expected[text] = expected.get(text, 0) + value
    for text in sorted(expected, key=expected.get)[-5:]:
        assert abs(texts.count(text) / 1000 - expected[text]) < 5 * np.sqrt(
            expected[text] * (1 - expected[text]) / 1000
        )


def test_a_kill_while_sampling_loses_at_most_one_prompt(
    continuations, data, base, tmp_path, monkeypatch, capsys
):
    whole, broken = fresh(data, tmp_path, "whole"), fresh(data, tmp_path, "broken")
    flags = [
        "--base",
        str(base),
        "--prompts",
        "3",
        "--count",
        "6",
        "--max-tokens",
        "5",
        "--temperature",
        "0.2",
        "--threads",
        "1",
    ]
    continuations.main(continuations.parse_args(["--run", str(whole), *flags]))
    rows = pq.read_table(whole / "continuations.parquet").to_pylist()
    assert (
        f"; {sum(6 - len(set(row['texts'])) for row in rows)} of 18 repeat another"
        in capsys.readouterr().out
    )
    sample, calls = continuations.sampling.sample, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample(*args)

    monkeypatch.setattr(continuations.sampling, "sample", killed)
    with pytest.raises(KeyboardInterrupt):
        continuations.main(continuations.parse_args(["--run", str(broken), *flags]))
    assert not (broken / "continuations.parquet").exists()
    continuations.main(continuations.parse_args(["--run", str(broken), *flags]))
    assert len(calls) == 4
    assert (broken / "continuations.parquet").read_bytes() == (
        whole / "continuations.parquet"
    ).read_bytes()
    assert not leftovers(broken) and not list(broken.glob(".kept-*"))


def test_prompts_that_cannot_be_continued(continuations, data, base, tmp_path):
    run, column = (
        fresh(data, tmp_path),
        {"prompt_id": "p", "messages": [{"role": "user", "content": "how can i get fit ? " * 200}]},
    )
    args = continuations.parse_args(["--run", str(run), "--base", str(base), "--threads", "1"])
    pq.write_table(pa.Table.from_pylist([column]), run / "prompts.parquet")
    with pytest.raises(InputError, match=r"prompt p: \d+ tokens found, at most 511 expected"):
        continuations.main(args)
    pq.write_table(pa.Table.from_pylist([column]).slice(0, 0), run / "prompts.parquet")
    with pytest.raises(InputError, match="prompts.parquet: no prompt found"):
        continuations.main(args)
    assert not (run / "continuations.parquet").exists()
    with pytest.raises(SystemExit):
        continuations.parse_args(["--run", str(run), "--base", str(base), "--top-p", "1.5"])


def test_continuations_of_too_few_prompts_and_a_second_run(
    continuations, full_run, data, base, tmp_path, capsys
):
    flags = [
        "--run",
        str(full_run),
        "--base",
        str(base),
        "--count",
        "5",
        "--max-tokens",
        "20",
        "--threads",
        "1",
    ]
    continuations.main(continuations.parse_args([*flags, "--prompts", "2"]))
    assert "skipped" in capsys.readouterr().out
    run = fresh(data, tmp_path)
    continuations.main(
        continuations.parse_args(
            [
                "--run",
                str(run),
                "--base",
                str(base),
                "--prompts",
                "4",
                "--count",
                "2",
                "--max-tokens",
                "3",
            ]
        )
    )
    assert "only 3 test prompts for --prompts 4, all of them taken" in capsys.readouterr().out
    assert pq.read_table(run / "continuations.parquet").num_rows == 3
    with pytest.raises(InputError, match="count was 5, is 6"):
        continuations.main(continuations.parse_args([*flags, "--prompts", "2", "--count", "6"]))
