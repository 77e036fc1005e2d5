"""The parts of benchmarks/card.py that run the project's scripts: base, a1, a2, b1, b2, c, e.

The scripts are the real ones, in this process: functions of theirs are wrapped from outside with a
clock and a memory meter (card_meter.py). One that has another name now, or is never called, is an
error.
"""

import functools
import gc
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import train_rm
from pairwise import files, members, run_dir, sampling, training
from pairwise import reward_model as rm
from pairwise.scale import adapter, budget, checkpoint, offload, recompute

import continuations
import demo
import numpy as np
import plan
import torch
import votes
from card_meter import Meter, check_called, clocked, hooked, nothing, product_rate
from transformers import GenerationMixin, LlamaConfig, LlamaForCausalLM

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2000,
}
STEPS = 4  # The last one has new bases.
# Pairs a step, and of a prompt and of a response the median, least and most words, each a token:
# 1,500 tokens a response with its prompt, the longest cut at 2,048.
DATA = 16, (300, 60, 800), (1200, 200, 3000)
SMALL_DATA = 4, (12, 4, 30), (30, 8, 60)
# Prompts, answers to each, their tokens.
ANSWERS, SMALL_ANSWERS = (2, 40, 128), (2, 3, 8)
LORA_BYTES = 24e9


# ---- what is timed


def of_model(meter, args, result):
    """What the FLOPs of a loaded reward model are counted from."""
    model = result.model
    dense = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    attention = budget.query_size(model.config) * model.config.num_hidden_layers
    layers = {"layers": model.config.num_hidden_layers}
    return {"dense_parameters": dense, "attention": attention, "packs": result.packs} | layers


def of_offload(meter, args, result):
    return {"resident": len(args[0].resident), "paged": len(args[0].paged)}


def of_backward(meter, args, result):
    return {"distinct_tokens": result[1]}


def of_scores(meter, args, result):
    return {"tokens": sum(map(len, args[1]))}


def of_generate(meter, args, result):
    rows, longest = result.sequences.shape
    return {"tokens": rows * (longest - args[1].shape[1])}  # with the padding after an end


SAVING = (members, "save_member", "save", nothing)
TRAINING = (  # owner, name, phase, what else is noted of a call
    (rm, "load_base", "load_base", of_model),
    (offload.Offload, "__init__", "offload", of_offload),
    (training, "backward", "forward_backward", of_backward),
    (offload.Offload, "step", "step", nothing),
    (rm, "score_sequences", "score", of_scores),
)
BASES = (
    (offload.SOAP, "get_orthogonal_matrix", "first_bases"),
    (offload.SOAP, "get_orthogonal_matrix_qr", "new_bases"),
)
SAMPLING = (
    (sampling, "load_language_model", "load_base", nothing),
    (GenerationMixin, "generate", "generate", of_generate),
)


# ---- base and data


def make_base(card, directory, **changes):
    """Write a base of random weights, in BF16, with a tokenizer for the words; return facts."""
    if card.small:
        torch.set_num_threads(1)  # As the scripts are told; the process can then be copied.
    started, shape = time.time(), (SMALL if card.small else plan.LLAMA_3_8B) | changes
    tokenizer = demo.train_tokenizer([" ".join(words())] * 3, 1300)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    tokens = {name: getattr(tokenizer, name) for name in names}
    torch.manual_seed(0)
    with torch.device(card.device):
        config = LlamaConfig(**shape, **tokens, max_position_embeddings=8192, rope_theta=5e5)
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    with files.replacing(directory, hashed=False) as partial:
        model.save_pretrained(partial, max_shard_size="5GB")
        tokenizer.save_pretrained(partial)
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "shape": shape, "making_seconds": time.time() - started}


def words():
    """Return 150 words, so few that each becomes a token."""
    rng = np.random.default_rng(0)
    return ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), 5)) for _ in range(150)]


def make_votes(card, run):
    """Write RUN/data: STEPS steps of prompts with one pair each, and four prompts to test."""
    pairs, *lengths = SMALL_DATA if card.small else DATA
    rng, known = np.random.default_rng(1), words()

    def text(median, least, most):
        count = int(np.clip(median * np.exp(0.5 * rng.standard_normal()), least, most))
        return " ".join(rng.choice(known, count))

    rows = []
    for i in range(STEPS * pairs + 4):
        texts = (text(*lengths[0]), text(*lengths[1]), text(*lengths[1]))
        row = dict(zip(("prompt", "response_a", "response_b"), texts))
        a, split = int(rng.integers(5)), "train" if i < STEPS * pairs else "test"
        rows.append(row | {"votes_a": a, "votes_b": 4 - a, "split": split})
    source = card.work / "votes.jsonl"
    files.write_lines(source, rows)
    votes.main(votes.parse_args(["--run", str(run), "--source", str(source)]))


def fresh(card, name):
    """Return a new run directory with the data alone."""
    run = card.work / name
    files.remove(run)
    return Path(shutil.copytree(card.work / "data-run", run))


# ---- training


def flags_of(card, run, base, j, *more):
    """Return train_rm.py's command line."""
    pairs = (SMALL_DATA if card.small else DATA)[0]
    flags = {"run": run, "base": base, "iteration": j, "device": card.device}
    flags |= {"pairs-per-step": pairs, "checkpoint-minutes": 0}
    flags |= {"precondition-frequency": STEPS}
    flags |= {"threads": 1} if card.small else {}
    return [word for name in flags for word in (f"--{name}", str(flags[name]))] + list(more)


def train(card, run, j, *more, base=None, keep=None):
    """Run train_rm.py, and keep what was measured; return its phases."""
    args = train_rm.parse_args(flags_of(card, run, base or card.work / "base", j, *more))
    lora, meter = args.train == "lora", Meter(card.device)
    hooks = *TRAINING, (adapter, "save", "save", nothing) if lora else SAVING
    keep = keep or card.keep
    try:
        with (
            hooked(hooks, clocked(meter)),
            hooked(BASES, lambda function, phase: meter.stamped(phase, function)),
            hooked(((rm, "rewards_of_batch"),), meter.count_rows),
            hooked(((recompute, "checkpoint"),), meter.count_recomputed),
        ):
            train_rm.main(args)
    finally:  # also where memory ran out
        numbers = {"gib": meter.memory(), "phases": meter.phases}
        keep(**numbers)
    gc.collect()
    rate = product_rate(card.device, getattr(torch, args.dtype), 256 if card.small else 8192)
    keep(**numbers, **rates(meter.phases, rate, lora))
    # Training that continues has its first bases.
    continued = len(meter.phases["step"]) < STEPS
    check_called(meter, hooks + BASES[continued:])
    return meter.phases


def rates(phases, rate, lora):
    """Return tokens a second and the parts of the card's rate, FLOP/s, that forward and backward
    reach: the FLOPs of the model, 6 a weight and token (frozen ones: 4), and those that are run,
    with the layers that are run again.

    A forward pass takes 2 a weight and token, and 2 q T^2 a layer for attention over T tokens."""
    (model,), calls = phases["load_base"], phases["forward_backward"]
    names = ("seconds", "distinct_tokens", "run_tokens", "squares", "passes", "recomputed")
    totals = (sum(call.get(name, 0) for call in calls) for name in names)
    seconds, distinct, run, squares, passes, recomputed = totals
    again = recomputed / (passes * model["layers"])
    forward = 2 * model["dense_parameters"] * run + 2 * model["attention"] * squares
    factor = 2 if lora else 3
    return {
        "distinct_tokens_per_second": distinct / seconds,
        "run_tokens_per_second": run / seconds,
        "product_tflops": rate / 1e12,
        "model_flops_utilisation": factor * forward / seconds / rate,
        "layers_recomputed": again,
        "with_recomputation": (factor + again) * forward / seconds / rate,
        "steps_with_new_bases": [call["seconds"] for call in phases["step"] if "new_bases" in call],
        "steps_without": [
            call["seconds"] for call in phases["step"] if not {"new_bases", "first_bases"} & {*call}
        ],
    }


# ---- the parts


def limit(card, gib):
    """Let torch take no more than so many GiB of the card."""
    total = torch.cuda.mem_get_info()[1] / 2**30
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib / total))
    card.keep(limit_gib=gib)


def base(card):
    card.work.mkdir(parents=True, exist_ok=True)
    card.keep(**make_base(card, card.work / "base"))
    files.remove(card.work / "data-run")
    make_votes(card, card.work / "data-run")


def first_member(card):
    train(card, fresh(card, "run-a"), 1)


def second_member(card):
    import fit_weights  # It needs the C++ evaluator, the other parts do not.

    run = card.work / "run-a"
    if not run_dir.reward_path(run, 1, "train").exists():
        raise AssertionError("a1 expected before a2")
    fit_weights.main(fit_weights.parse_args(["--run", str(run)]))
    train(card, run, 2)
    files.remove(run)  # Two members of 8B are 30 GB.


def small_card_lora(card):
    if card.device == "cuda":
        limit(card, LORA_BYTES / 2**30)
    lora(card)


def lora(card):
    run = fresh(card, "run-b")
    train(card, run, 1, "--train", "lora")
    files.remove(run)


def sampled(card):
    prompts, count, tokens = SMALL_ANSWERS if card.small else ANSWERS
    run, meter = fresh(card, "run-c"), Meter(card.device)
    flags = {"run": run, "base": card.work / "base", "device": card.device, "prompts": prompts}
    flags |= {"count": count, "max-tokens": tokens} | ({"threads": 1} if card.small else {})
    words = [word for name in flags for word in (f"--{name}", str(flags[name]))]
    try:
        with hooked(SAMPLING, clocked(meter)):
            continuations.main(continuations.parse_args(words))
    finally:
        facts = {"answers_at_once": min(count, sampling.AT_ONCE), "tokens_each": tokens}
        if calls := meter.calls("generate")[1:]:  # The first warms up.
            seconds = sum(call["seconds"] for call in calls)
            facts["tokens_per_second"] = sum(call["tokens"] for call in calls) / seconds
        card.keep(**facts, gib=meter.memory(), phases=meter.phases)
        files.remove(run)
    check_called(meter, SAMPLING)


def killed_after(steps, words):
    """Run train_rm.py, and kill this process when so many checkpoints are written."""
    written = []

    def wrap(write):
        def wrapped(*args):
            write(*args)
            written.append(args)
            if len(written) == steps:
                os.kill(os.getpid(), signal.SIGKILL)

        return wrapped

    with hooked(((checkpoint.Checkpoints, "write"),), wrap):
        train_rm.main(train_rm.parse_args(words))


def keep_as(card, name, **numbers):
    card.keep(**{name: numbers})


def resumed(card):
    """Two layers and few tokens: the optimizer of all of 8B, twice on a disk, is 280 GB."""
    base, gb = card.work / "base-e", "2e-3" if card.small else "6"
    facts = make_base(card, base, num_hidden_layers=2, vocab_size=2000 if card.small else 32000)
    run, whole = fresh(card, "run-killed"), fresh(card, "run-whole")
    try:
        compared(card, base, run, whole, gb, facts)
    finally:
        for path in (run, whole, base):
            files.remove(path)


def compared(card, base, run, whole, gb, facts):
    """Kill the training of `run` and continue it; that of `whole` is left alone."""
    flags = ("--optimizer-memory-gb", gb)  # Some of it is paged.
    words = flags_of(card, run, base, 1, *flags, "--checkpoint-minutes", "1e-9")
    # On a CPU a copy of this process saves the imports; CUDA wants a new one.
    context = multiprocessing.get_context("spawn" if card.device == "cuda" else "fork")
    process, started = context.Process(target=killed_after, args=(2, words)), time.time()
    process.start()
    process.join()
    if process.exitcode != -signal.SIGKILL:
        raise AssertionError(f"exit code {process.exitcode} found, killed by SIGKILL expected")
    kept = sorted(path.name for path in (run / "checkpoint_01").glob("[0-9]*"))
    nbytes = sum(path.stat().st_size for path in (run / "checkpoint_01").rglob("*.*"))
    facts |= {"killed_after": kept, "checkpoint_gb": nbytes / 1e9}
    card.keep(**facts, seconds_until_killed=time.time() - started)
    steps, phases = [], None
    for name, each in {"continued": run, "in_one_go": whole}.items():
        keep = functools.partial(keep_as, card, name)
        phases = train(card, each, 1, *flags, base=base, keep=keep)
        steps.append(len(phases["step"]))
    outputs = [*whole.glob("member_01/*.safetensors"), *whole.glob("rewards/01_*.npy")]
    equal = {
        path.name: files.hash_file(path) == files.hash_file(run / path.relative_to(whole))
        for path in outputs
    }
    ours, theirs = (np.load(run_dir.reward_path(each, 1, "train")) for each in (run, whole))
    distance = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    card.keep(steps=steps, equal=equal, largest_difference_of_rewards=distance)
    paged = phases["offload"][0]["paged"]
    if steps != [STEPS - 2, STEPS] or not all(equal.values()) or not paged:
        words = f"{STEPS - 2} and {STEPS} steps, equal files and paged parameters"
        raise AssertionError(f"steps {steps}, {equal}, {paged} paged found; {words} expected")


PARTS = {"base": base, "a1": first_member, "a2": second_member}
PARTS |= {"b1": small_card_lora, "b2": lora, "c": sampled, "e": resumed}
