"""Training a reward model here and with TRL's RewardTrainer: pairs and tokens a second, same model, data, pairs a step and optimizer.

    pip install -r benchmarks/requirements.txt
    python benchmarks/training.py --json benchmarks/training.json       (10 to 15 minutes)
    python benchmarks/training.py --card --device cuda --steps 8 --micro-batch-tokens 8192        (8B parameters, random weights; no TRL)

A 5M-parameter Llama in float32, random tokens, AdamW. TRL takes the best of its micro-batch sizes, in order or grouped by length, and we of
ours; then everyone trains on the same steps, in turn, again and again; medians. Tokens are those of the distinct responses with their prompts,
however often they are run. --card times forward and backward passes of a Llama-3-8B configuration, and SOAP on the matrices of one layer,
times the layers; it has not been run on a card yet.
"""

import contextlib
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from pytorch_optimizer import SOAP
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_rm
from pairwise import cli, run_dir, training
from pairwise import reward_model as rm
from pairwise.scale import packed

VOCABULARY, PAD = 2000, 0
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
LLAMA_3_8B = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
# responses to a prompt, prompts a step, median tokens of a prompt and the range, of a response and the range; like MultiPref and PersonalLLM
KINDS = {
    "2 responses, 8 pairs a step": (2, 8, (110, 60, 200), (180, 100, 300)),
    "8 responses, 28 pairs a step": (8, 1, (50, 20, 100), (220, 100, 350)),
}
OURS = {
    "padded, sorted by length": 0,
    "packed": 1,
    "+ last layer for tokens that are read": 2,
    "+ prompt run once: this repository": 3,
}


# ---- data and models


def make_data(kind, steps, seed=0, vocabulary=VOCABULARY):
    """sequences (R,), a, b (N,) and steps: lists of arrays of pair indices, each of one prompt; random tokens, lengths spread log-normally."""
    responses, prompts, of_prompt, of_response = KINDS[kind]
    rng = np.random.default_rng(seed)

    def tokens(median, least, most):
        return rng.integers(
            1, vocabulary, int(np.clip(median * np.exp(0.4 * rng.standard_normal()), least, most))
        ).tolist()

    sequences, pairs, found = [], [], []
    for _ in range(steps):
        found.append([])
        for _ in range(prompts):
            prompt, first = tokens(*of_prompt), len(sequences)
            sequences += [prompt + tokens(*of_response) for _ in range(responses)]
            own = list(combinations(range(first, first + responses), 2))
            found[-1].append(np.arange(len(pairs), len(pairs) + len(own)))
            pairs += own
    a, b = np.array(pairs).T
    return SimpleNamespace(
        sequences=sequences,
        a=a,
        b=b,
        steps=found,
        tokens=sum(map(len, sequences)),
        pairs_per_step=len(pairs) // steps,
    )


def make_model(shape, dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    with torch.device(device):
        config = LlamaConfig(
            **{"vocab_size": VOCABULARY, "pad_token_id": PAD, "num_labels": 1} | shape,
            max_position_embeddings=8192,
            dtype=dtype,
        )
        model = LlamaForSequenceClassification._from_config(config, dtype=dtype)
    return rm.ready(model, device)


@contextlib.contextmanager
def only(model, level):
    """The first so many of our ingredients."""
    layer, least, packs = model.model.base_model.layers[-1], packed.LEAST_SHARED, model.packs
    hooks = dict(layer._forward_pre_hooks)
    if level < 3:
        packed.LEAST_SHARED = 10**9
    if level < 2:
        layer._forward_pre_hooks.clear()
    if level < 1:
        model.packs = None
    yield
    packed.LEAST_SHARED, model.packs = least, packs
    layer._forward_pre_hooks.update(hooks)


# ---- contenders: each is a function that trains on all steps once and returns its seconds


def ours(data, level, micro_batch_tokens):
    model = make_model(SMALL)
    optimizer = torch.optim.AdamW(model.model.parameters(), lr=1e-5, fused=True)
    lengths = np.array([len(ids) for ids in data.sequences])

    def size(responses):
        return rm.count_tokens(model, [data.sequences[i] for i in responses])

    def call():
        started = time.perf_counter()
        with only(model, level):
            for step in data.steps:
                for micro in training.micro_batches(
                    step, data.a, data.b, lengths, size, micro_batch_tokens
                ):
                    responses, index = np.unique(
                        np.concatenate([data.a[micro], data.b[micro]]), return_inverse=True
                    )
                    rewards = rm.rewards_of_batch(
                        model, [data.sequences[i] for i in responses], micro_batch_tokens
                    )[index]
                    (
                        train_rm.LOSSES["mse"](
                            rewards[: len(micro)] - rewards[len(micro) :], 1, None
                        ).sum()
                        / data.pairs_per_step
                    ).backward()
                optimizer.step()
                optimizer.zero_grad()
        return time.perf_counter() - started

    return call


class Clock(TrainerCallback):
    """From the first batch asked for to the last step taken: nothing that TRL does once."""

    def on_epoch_begin(self, *args, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.seconds = time.perf_counter() - self.started


def trl_trainer(model, data, micro_pairs, grouped, directory):
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    words = {"<pad>": PAD} | {f"t{i}": i for i in range(1, VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="t1")),
        pad_token="<pad>",
        eos_token="t2",
    )
    order = np.concatenate([np.concatenate(step) for step in data.steps])
    chosen, rejected = ([data.sequences[i] for i in side[order]] for side in (data.a, data.b))
    lengths = [max(map(len, both)) for both in zip(chosen, rejected)]
    config = RewardConfig(
        output_dir=str(directory),
        per_device_train_batch_size=micro_pairs,
        gradient_accumulation_steps=data.pairs_per_step // micro_pairs,
        max_length=None,
        num_train_epochs=1,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        max_grad_norm=0.0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        train_sampling_strategy="group_by_length" if grouped else "sequential",
    )
    dataset = Dataset.from_dict({"chosen_ids": chosen, "rejected_ids": rejected, "length": lengths})
    trainer = RewardTrainer(
        model,
        args=config,
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[clock := Clock()],
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    return trainer, clock


def trl(data, micro_pairs, grouped, directory):
    model = make_model(SMALL)
    trainer, clock = trl_trainer(model.model, data, micro_pairs, grouped, directory)

    def call():
        trainer.train()
        return clock.seconds

    return call


def check_losses(data, directory):
    """The largest difference between TRL's loss of a step and TRL's formula on our rewards. Raises AssertionError beyond 1e-5."""
    model, apart = make_model(SMALL), 0.0
    with torch.no_grad():
        model.head.weight.mul_(20)  # a loss that is not log 2
    trainer, _ = trl_trainer(model.model, data, data.pairs_per_step, False, directory)
    for step in data.steps:
        pairs = np.concatenate(step)
        chosen, rejected = ([data.sequences[i] for i in side[pairs]] for side in (data.a, data.b))
        with torch.no_grad():
            inputs = trainer.data_collator(
                [{"chosen_ids": x, "rejected_ids": y} for x, y in zip(chosen, rejected)]
            )
            theirs = trainer.compute_loss(model.model, inputs).item()
            r = rm.rewards_of_batch(model, chosen + rejected)
        apart = max(
            apart,
            abs(
                theirs
                + torch.nn.functional.logsigmoid(r[: len(pairs)] - r[len(pairs) :]).mean().item()
            ),
        )
    assert apart < 1e-5 and abs(theirs - np.log(2)) > 1e-4, (apart, theirs)
    return apart


# ---- the comparison


def compare(kind, args, directory):
    steps, (responses, *_) = (args.steps, KINDS[kind][:2])
    steps = steps if responses == 2 else max(1, steps // 2)
    data = make_data(kind, steps)
    apart = check_losses(data, directory)
    B = data.pairs_per_step
    tried = {
        (n, False): trl(data, n, False, directory) for n in range(1, B + 1) if B % n == 0
    }  # sequential: the steps' own order
    seconds_tried = {setting: call() for setting, call in tried.items()}
    for n, _ in sorted(seconds_tried, key=seconds_tried.get)[:2]:
        tried[n, True] = trl(data, n, True, directory)
        seconds_tried[n, True] = tried[n, True]()
    best = sorted(seconds_tried, key=seconds_tried.get)[:2]  # both compete
    sizes = {size: ours(data, 3, size) for size in args.micro_batch_tokens}
    own = min(sizes, key=lambda size: sizes[size]())
    named = {
        f"{n} x {B // n}{', by length' * grouped}": taken
        for (n, grouped), taken in seconds_tried.items()
    }
    print(
        f"{kind}: TRL, tried once:",
        ", ".join(f"{name} {taken:.1f} s" for name, taken in named.items()),
        file=sys.stderr,
        flush=True,
    )
    contenders = {
        f"TRL, {n} x {B // n} pairs{', by length' * grouped}": tried[n, grouped]
        for n, grouped in best
    }
    contenders |= {name: ours(data, level, own) for name, level in OURS.items()}
    seconds = {name: [] for name in contenders}
    for turn in range(args.rounds + 1):
        for name, call in contenders.items():
            taken = call()
            if turn:  # the first warms up
                seconds[name].append(taken)
    theirs = min(
        statistics.median(times) for name, times in seconds.items() if name.startswith("TRL")
    )
    rows = []
    print(
        f"\n{kind}: {data.tokens / len(data.steps):,.0f} tokens of distinct responses a step; losses differ by {apart:.1e} at most; "
        f"ours runs {own} tokens at once\n\n"
        "| | pairs/s | tokens/s | times TRL |\n|---|---|---|---|"
    )
    for name, times in seconds.items():
        median = statistics.median(times)
        rows.append(
            {
                "name": name,
                "pairs_per_second": steps * B / median,
                "tokens_per_second": data.tokens / median,
                "times_trl": theirs / median,
                "seconds": times,
            }
        )
        print(
            f"| {name} | {rows[-1]['pairs_per_second']:.2f} | {rows[-1]['tokens_per_second']:,.0f} | {theirs / median:.2f} |",
            flush=True,
        )
    return {
        "data": kind,
        "steps": steps,
        "pairs_per_step": B,
        "tokens": data.tokens,
        "micro_batch_tokens": own,
        "largest_loss_difference": apart,
        "tried": named,
        "rows": rows,
    }


# ---- one card, 8B parameters


def wait(device):
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def card(args):
    """Tokens a second, utilisation, peak memory and the optimizer's share, of LLAMA_3_8B with --layers layers, its width divided by --shrink."""
    device, cuda = args.device, args.device.startswith("cuda")
    dtype = torch.bfloat16 if cuda else torch.float32
    shape = LLAMA_3_8B | {"num_hidden_layers": args.layers}
    shape |= {
        name: shape[name] // args.shrink
        for name in ("vocab_size", "hidden_size", "intermediate_size")
    }
    n = 8192 // args.shrink
    x = torch.randn(n, n, device=device, dtype=dtype)
    times = []
    for _ in range(20):
        started = wait(device)
        x @ x
        times.append(wait(device) - started)
    rate = 2 * n**3 / statistics.median(times)
    model = make_model(shape, dtype, device)
    model.model.gradient_checkpointing_enable({"use_reentrant": False})
    model.model.train()  # transformers recomputes in training mode only; this configuration has no dropout
    data = make_data("2 responses, 8 pairs a step", args.steps, vocabulary=shape["vocab_size"])
    matrices = sum(
        p.numel() for p in model.model.base_model.layers[:-1].parameters()
    )  # of the last layer little is run
    batches = list(rm.batches_of(model, data.sequences, args.micro_batch_tokens[-1]))
    run = sum(rm.count_tokens(model, [data.sequences[i] for i in batch]) for batch in batches)
    times = []
    for batch in (batches[0], *batches):  # the first warms up
        started = wait(device)
        rm.rewards_of_batch(model, [data.sequences[i] for i in batch]).square().sum().backward()
        times.append(wait(device) - started)
    seconds = sum(times[1:])
    result = {
        "layers": args.layers,
        "packs": model.packs,
        "tokens_per_second": data.tokens / seconds,
        "tokens_run_per_second": run / seconds,
        "matrix_product_tflops": rate / 1e12,
        "model_flops_utilisation": 6 * matrices * run / seconds / rate,
        "with_recomputation": 8 * matrices * run / seconds / rate,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
    }
    layer = [
        torch.nn.Parameter(p.detach().float().clone())
        for p in model.model.base_model.layers[0].parameters()
        if p.ndim > 1
    ]
    del model
    optimizer = SOAP(
        layer,
        lr=1e-5,
        precondition_frequency=args.precondition_frequency,
        max_precondition_dim=args.max_precondition_dim,
    )
    times = []
    for _ in range(
        2 + args.precondition_frequency
    ):  # the first initialises; a whole cycle of the eigenbases counts
        for p in layer:
            p.grad = torch.randn_like(p)
        started = wait(device)
        optimizer.step()
        times.append(wait(device) - started)
    step = args.layers * statistics.mean(times[2:])
    batch = 2 * 512 * data.tokens / len(data.sequences) / result["tokens_per_second"]
    result |= {
        "optimizer_step_seconds": step,
        "optimizer_share_at_512_pairs": step / (step + batch),
    }
    for name, value in result.items():
        print(
            f"{name.replace('_', ' ')}: {value:,.3f}"
            if isinstance(value, float)
            else f"{name.replace('_', ' ')}: {value}"
        )
    return result


def main(args):
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    gpu = f", {torch.cuda.get_device_name()}" if args.device.startswith("cuda") else ""
    result = {
        "machine": f"{platform.machine()}, {args.threads} threads{gpu}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if args.card:
        result |= card(args)
    else:
        try:
            import trl
        except ImportError as error:
            print(
                f"error: {error.name} is missing; pip install -r benchmarks/requirements.txt",
                file=sys.stderr,
            )
            sys.exit(2)
        result |= {"trl": trl.__version__}
        with tempfile.TemporaryDirectory() as directory:
            result["tables"] = [compare(kind, args, Path(directory)) for kind in KINDS]
    if args.json:
        run_dir.write_json(args.json, result)


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--json", type=Path, help="write everything measured here")
    add("--rounds", type=cli.natural, default=5, help="turns that count")
    add(
        "--steps",
        type=cli.natural,
        default=2,
        help="optimizer steps a turn (8 responses: half as many)",
    )
    add("--threads", type=cli.natural, default=os.cpu_count(), help="CPU threads (default: all)")
    add(
        "--micro-batch-tokens",
        type=cli.natural,
        nargs="+",
        default=[1024, 4096],
        help="of ours, tokens run in one forward pass: the best is taken (--card: the last)",
    )
    add("--card", action="store_true", help="8B parameters on one card instead of the comparison")
    add("--device", type=rm.device, default="cpu", help="of --card")
    add("--layers", type=cli.natural, default=32, help="of --card: fewer for a smaller card")
    add(
        "--shrink",
        type=cli.natural,
        default=1,
        help="of --card: divide the width, to try it without a card",
    )
    add(
        "--precondition-frequency", type=cli.natural, default=5, help="of --card: as in train_rm.py"
    )
    add(
        "--max-precondition-dim",
        type=cli.natural,
        default=4096,
        help="of --card: as in train_rm.py",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
