"""Training a reward model here and with TRL's RewardTrainer: pairs and tokens a second.

    pip install -r benchmarks/requirements.txt
    python benchmarks/training.py --json benchmarks/training.json            (10 to 15 minutes)

Model, data, pairs a step and optimizer are the same: a 5M-parameter Llama in float32, random
tokens, AdamW. TRL takes the best of its micro-batch sizes, in order or grouped by length, and we
take the best of ours; then everyone trains on the same steps, in turn, again and again; medians
count. Tokens are those of the distinct responses with their prompts, however often they are run.
On a card: card.sh.
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
from pairwise import cli, files, run_dir, training
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
# Responses to a prompt, prompts a step, median tokens of a prompt and their range, of a response
# and their range; these are like MultiPref's and PersonalLLM's.
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


def make_data(kind, steps):
    """Return sequences (R,), a, b (N,) and steps: lists of arrays of pair indices, one a prompt.

    Tokens are random; lengths are spread log-normally.
    """
    responses, prompts, prompt_length, response_length = KINDS[kind]
    rng = np.random.default_rng(0)

    def tokens(median, least, most):
        length = median * np.exp(0.4 * rng.standard_normal())
        return rng.integers(1, VOCABULARY, int(np.clip(length, least, most))).tolist()

    sequences, pairs, step_list = [], [], []
    for _ in range(steps):
        step_list.append([])
        for _ in range(prompts):
            prompt, first = tokens(*prompt_length), len(sequences)
            sequences += [prompt + tokens(*response_length) for _ in range(responses)]
            own = list(combinations(range(first, first + responses), 2))
            step_list[-1].append(np.arange(len(pairs), len(pairs) + len(own)))
            pairs += own
    a, b = np.array(pairs).T
    return SimpleNamespace(
        sequences=sequences,
        a=a,
        b=b,
        steps=step_list,
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
    """Use the first `level` of our ingredients alone."""
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


def wait(device):
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def ours(data, level, micro_batch_tokens, model=None):
    model = model or make_model(SMALL)
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
                    sides = np.concatenate([data.a[micro], data.b[micro]])
                    responses, index = np.unique(sides, return_inverse=True)
                    ids = [data.sequences[i] for i in responses]
                    rewards = rm.rewards_of_batch(model, ids, micro_batch_tokens)[index]
                    difference = rewards[: len(micro)] - rewards[len(micro) :]
                    loss = train_rm.LOSSES["mse"](difference, 1, None).sum()
                    (loss / data.pairs_per_step).backward()
                optimizer.step()
                optimizer.zero_grad()
        return wait(model.model.device.type) - started

    return call


class Clock(TrainerCallback):
    """It times from the first batch to the last step, without what TRL does once."""

    def on_epoch_begin(self, *args, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.seconds = wait("cuda" if torch.cuda.is_available() else "cpu") - self.started


def trl_trainer(model, data, micro_pairs, grouped, directory, **options):
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
    lengths = [max(map(len, pair)) for pair in zip(chosen, rejected)]
    options = {"gradient_checkpointing": False, "bf16": False, "use_cpu": True} | options
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
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        train_sampling_strategy="group_by_length" if grouped else "sequential",
        **options,
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
    """Return the largest difference between TRL's loss of a step and its formula on our rewards.

    Raises AssertionError where it is beyond 1e-5.
    """
    model, largest = make_model(SMALL), 0.0
    with torch.no_grad():
        model.head.weight.mul_(20)  # The loss is then not log 2.
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
        difference = r[: len(pairs)] - r[len(pairs) :]
        loss = -torch.nn.functional.logsigmoid(difference).mean().item()
        largest = max(largest, abs(theirs - loss))
    assert largest < 1e-5 and abs(theirs - np.log(2)) > 1e-4, (largest, theirs)
    return largest


# ---- the comparison


def tried_settings(data, directory):
    """Return ({(pairs at a time, grouped by length): TRL's call}, {the same: seconds of one call}).

    Sequential, it takes the steps' own order. The best two sizes are tried grouped by length, too.
    """
    size = data.pairs_per_step
    calls = {
        (n, False): trl(data, n, False, directory) for n in range(1, size + 1) if size % n == 0
    }
    seconds = {setting: call() for setting, call in calls.items()}
    for n, _ in sorted(seconds, key=seconds.get)[:2]:
        calls[n, True] = trl(data, n, True, directory)
        seconds[n, True] = calls[n, True]()
    return calls, seconds


def compare(kind, args, directory):
    """Race TRL's best two settings and ours, in turn, and print and return a table."""
    steps = args.steps if KINDS[kind][0] == 2 else max(1, args.steps // 2)
    data = make_data(kind, steps)
    largest_difference, size = check_losses(data, directory), data.pairs_per_step
    calls, seconds = tried_settings(data, directory)
    tried = {
        f"{n} x {size // n}{', by length' * grouped}": once
        for (n, grouped), once in seconds.items()
    }
    words = ", ".join(f"{name} {once:.1f} s" for name, once in tried.items())
    print(f"{kind}: TRL, tried once: {words}", file=sys.stderr, flush=True)
    contenders = {
        f"TRL, {n} x {size // n} pairs{', by length' * grouped}": calls[n, grouped]
        for n, grouped in sorted(seconds, key=seconds.get)[:2]
    }
    own_calls = {tokens: ours(data, 3, tokens) for tokens in args.micro_batch_tokens}
    own = min(own_calls, key=lambda tokens: own_calls[tokens]())
    contenders |= {name: ours(data, level, own) for name, level in OURS.items()}
    times = {name: [] for name in contenders}
    for turn in range(args.rounds + 1):
        for name, call in contenders.items():
            once = call()
            if turn:  # The first turn warms up.
                times[name].append(once)
    print(
        f"\n{kind}: {data.tokens / len(data.steps):,.0f} tokens of distinct responses a step; "
        f"losses differ by {largest_difference:.1e} at most; ours runs {own} tokens at once\n"
    )
    return {
        "data": kind,
        "steps": steps,
        "pairs_per_step": size,
        "tokens": data.tokens,
        "micro_batch_tokens": own,
        "largest_loss_difference": largest_difference,
        "tried": tried,
        "rows": table_rows(times, steps * size, data.tokens),
    }


def table_rows(times, pairs, tokens):
    """Print and return the rows of a table; times: {contender: seconds of its calls}."""
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    theirs = min(median for name, median in medians.items() if name.startswith("TRL"))
    print("| | pairs/s | tokens/s | times TRL |\n|---|---|---|---|")
    rows = []
    for name, median in medians.items():
        row = {
            "name": name,
            "pairs_per_second": pairs / median,
            "tokens_per_second": tokens / median,
            "times_trl": theirs / median,
            "seconds": times[name],
        }
        rates = f"{row['pairs_per_second']:.2f} | {row['tokens_per_second']:,.0f}"
        print(f"| {name} | {rates} | {row['times_trl']:.2f} |", flush=True)
        rows.append(row)
    return rows


def main(args):
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    result = {
        "machine": f"{platform.machine()}, {args.threads} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    try:
        import trl
    except ImportError as error:
        words = f"{error.name} is missing; pip install -r benchmarks/requirements.txt"
        raise cli.InputError(words) from None
    result |= {"trl": trl.__version__}
    with tempfile.TemporaryDirectory() as directory:
        result["tables"] = [compare(kind, args, Path(directory)) for kind in KINDS]
    if args.json:
        files.write_json(args.json, result)


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--json", type=run_dir.output, help="write everything measured here")
    add("--rounds", type=cli.natural, default=5, help="turns that count")
    words = "optimizer steps a turn (8 responses: half as many)"
    add("--steps", type=cli.natural, default=2, help=words)
    add("--threads", type=cli.threads, default=os.cpu_count(), help="CPU threads (default: all)")
    words = "of ours, tokens run in one forward pass: the best is taken"
    add("--micro-batch-tokens", type=cli.natural, nargs="+", default=[1024, 4096], help=words)
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
