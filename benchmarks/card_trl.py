"""Part d of benchmarks/card.py: TRL's RewardTrainer beside this, on a .9B Llama in BF16.

Model, data, pairs a step and optimizer (AdamW, on the BF16 weights) are the same, as in
benchmarks/training.py; every setting trains on the same steps, after one turn to warm up. A model
and its optimizer are emptied before the next is made.
"""

import gc
import statistics
import tempfile
import time

from pairwise import cli
from pairwise.scale.recompute import recompute_activations

import torch
import training as bench
from card_meter import Meter, as_transformers

LLAMA = {
    "hidden_size": 2048,
    "intermediate_size": 7168,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
SMALL = LLAMA | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
# As of bench.KINDS; then pairs at a time of TRL, and tokens at a time of ours, to choose from.
KINDS = {
    "2 responses": ((2, 32, (150, 30, 600), (300, 60, 1200)), (2, 4, 8, 16)),
    "8 responses": ((8, 2, (60, 20, 200), (300, 60, 1000)), (4, 7, 14, 28)),
}
SMALL_KINDS = {"2 responses": ((2, 4, (8, 4, 12), (8, 4, 12)), (2,))}
TOKENS, SMALL_TOKENS = (8192, 16384, 32768), (128,)
STEPS, TURNS = 2, 2


def make_model(card):
    dtype = torch.bfloat16 if card.device == "cuda" else torch.float32
    return bench.make_model(SMALL if card.small else LLAMA, dtype, card.device)


def ours(card, data, tokens, recompute):
    """Return (the call that trains, what empties it)."""
    model = make_model(card)
    recompute_activations(model.model, recompute)
    return bench.ours(data, 3, tokens, model), lambda: empty(model.model)


def trl(card, data, pairs, recompute, directory):
    """Return (the call that trains, what empties it)."""
    model, cuda = as_transformers(make_model(card).model), card.device == "cuda"
    model.config._attn_implementation = "sdpa"
    options = {"gradient_checkpointing": recompute, "bf16": cuda, "use_cpu": not cuda}
    trainer, clock = bench.trl_trainer(model, data, pairs, False, directory, **options)

    def call():
        trainer.train()
        return clock.seconds

    return call, lambda: empty(model, trainer.optimizer)


def empty(model, optimizer=None):
    """Free the tensors of a model and its optimizer, whatever still refers to them."""
    for p in model.parameters():
        p.data, p.grad = p.data.new_empty(0), None
    if optimizer is not None:
        optimizer.state.clear()


def measure(card, make):
    """Return {seconds of each turn, peak_gib} of a setting, or the reason why there are none."""
    meter, release, found = Meter(card.device), None, {}
    if meter.cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        call, release = make()
        call()
        for _ in range(TURNS):
            found.setdefault("seconds", []).append(call())
    except RuntimeError as error:
        if not cli.lacks_memory(error):
            raise
        found = {"reason": "out of memory"}
    if meter.cuda:
        found["peak_allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if release:
        release()
    call = release = None
    gc.collect()
    if meter.cuda:
        torch.cuda.empty_cache()
        found["left_gib"] = torch.cuda.memory_allocated() / 2**30
    return found


def settings(card, data, sizes, directory):
    """Yield (whose, at once, recompute, make) of all settings of one kind of data."""
    for recompute in (True, False):
        for pairs in (n for n in sizes if data.pairs_per_step % n == 0):
            yield (
                "trl",
                pairs,
                recompute,
                lambda n=pairs, on=recompute: trl(card, data, n, on, directory),
            )
        for tokens in SMALL_TOKENS if card.small else TOKENS:
            yield (
                "ours",
                tokens,
                recompute,
                lambda n=tokens, on=recompute: ours(card, data, n, on),
            )


def compare(card, name, kind, sizes, directory, found):
    """Keep the numbers of every setting of one kind of data, and the best of each side."""
    bench.KINDS[name] = kind
    data = bench.make_data(name, 1 if card.small else STEPS)
    rows, best = [], {}
    found[name] = {"tokens": data.tokens, "pairs_per_step": data.pairs_per_step, "rows": rows}
    for whose, at_once, recompute, make in settings(card, data, sizes, directory):
        row = {"whose": whose, "at_once": at_once, "recompute": recompute} | measure(card, make)
        rows.append(row)
        if "seconds" in row:
            row["tokens_per_second"] = data.tokens / statistics.median(row["seconds"])
            key = f"{whose}, {'recomputed' if recompute else 'kept'}"
            best[key] = max(best.get(key, 0), row["tokens_per_second"])
        for how in ("recomputed", "kept"):
            if f"trl, {how}" in best and f"ours, {how}" in best:
                best[f"times TRL, {how}"] = best[f"ours, {how}"] / best[f"trl, {how}"]
        found[name]["tokens_per_second"] = best
        card.keep(data=found)
        if row.get("left_gib", 0) > 0.5:  # Workspaces of kernels stay.
            raise AssertionError(f"{row['left_gib']:.1f} GiB left on the card by {whose}")


def race(card):
    try:
        import datasets  # noqa: F401
        from trl import RewardTrainer  # noqa: F401  # TRL imports what it names only now.
    except ImportError as error:
        return f"{error.name} is missing; pip install -r benchmarks/requirements.txt"
    started, found = time.time(), {}
    with tempfile.TemporaryDirectory() as directory:
        for name, (kind, sizes) in (SMALL_KINDS if card.small else KINDS).items():
            compare(card, name, kind, sizes, directory, found)
    card.keep(racing_seconds=time.time() - started)
    return None


PARTS = {"d": race}
