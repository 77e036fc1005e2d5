"""Steps of other kinds beside each other: what the fast ones cost in calibration.

    python experiments/steps.py --run runs/demo --out results/steps_demo.csv --lr 3e-3
    python experiments/steps.py --run runs/mine --out mine.csv --base NAME_OR_DIR --train head
    python experiments/steps.py --run runs/demo --out results/optimizer_demo.csv --lr 3e-3 --k 2 \\
        --kinds prompts frequency_10 tf32

The first takes an hour on one thread. RUN is a finished run directory (of a head run with
features/), of which the data and the base are taken, or --base. All else is the same for all kinds
of steps: pairs, head, optimizer, at most 64 pairs a step (whole prompts fill it less well: in the
demo 90 steps of 60 pairs beside 85). Other flags are train_rm.py's.

    prompts         whole prompts, as train_rm.py makes them
    pairs           shuffled pairs
    frequency_10    whole prompts, new bases every 10 steps instead of 5
    tf32            whole prompts, the optimizer's products as a GPU's: 11 bits of every factor
"""

import contextlib
import csv
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
import fit_weights
import train_rm
from pairwise import cli, data, files, manifest, run_dir, training

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

WHOLE, SHUFFLED = training.steps_of_prompts, training.steps_of_pairs
KINDS = "prompts", "pairs", "frequency_10", "tf32"
COLUMNS = ("seed", "steps", "k", "brier", "brier_soft", "true_error", "tokens", "seconds")


def shuffled(pair_start, keep, pairs_per_step, rng):
    """Steps as of steps_of_prompts, with each pair where chance puts it."""
    steps = SHUFFLED(keep, pairs_per_step, 1, rng)
    return [[np.array([pair]) for pair in step[0]] for step in steps]


def whole(pair_start):
    """A function like steps_of_pairs, with all pairs of a prompt in one step; pair_start (P+1,)."""

    def steps(keep, pairs_per_step, epochs, rng):
        epochs = [WHOLE(pair_start, keep, pairs_per_step, rng) for _ in range(epochs)]
        return [[np.concatenate(step)] for epoch in epochs for step in epoch]

    return steps


class TensorCores(TorchDispatchMode):
    """A GPU's products, on a CPU: where TF32 is allowed, 11 bits of every factor count."""

    rounded = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function == torch.ops.aten.mm.default and torch.backends.cuda.matmul.allow_tf32:
            self.rounded += 1
            bits = ((x.view(torch.int32) + 0x1000) & ~0x1FFF for x in args)
            args = [x.view(torch.float32) for x in bits]
        return function(*args, **(kwargs or {}))


def begin_run(source, run):
    """Make `run` of the data, and the features where there are any, of `source`."""
    for name in ("data", "features"):
        if (source / name).exists():
            (run / name).symlink_to((source / name).resolve())
    stages = manifest.entries(source)
    stages = {name: stages[name] for name in ("data", "base", "features") if name in stages}
    files.write_json(run / "manifest.json", {"stages": stages})


def train_and_evaluate(args, run, base, seed, more):
    """Train and weigh --k members in `run`, with more flags, and evaluate them; return (tokens,
    seconds)."""
    started = time.time()
    flags = ["--run", run, "--base", base, "--seed", seed, "--threads", args.threads]
    for j in range(1, args.k + 1):
        words = [*map(str, flags), "--device", "cpu", "--iteration", str(j), *args.training, *more]
        train_rm.main(train_rm.parse_args(words))
        fit_weights.main(fit_weights.parse_args(["--run", str(run)]))
    seconds = time.time() - started
    evaluate.main(evaluate.parse_args(["--run", str(run)]))
    logs = [files.read_lines(path) for path in (run / "logs").glob("*.jsonl")]
    return sum(step["tokens"] for log in logs for step in log), seconds


def main(args):
    base, pair_start = args.base or args.run / "base", data.read_split(args.run, "train").pair_start
    functions = {False: (WHOLE, whole(pair_start)), True: (shuffled, SHUFFLED)}
    with files.replacing(args.out) as out, open(out, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        for seed in args.seeds:
            for name in args.kinds:
                training.steps_of_prompts, training.steps_of_pairs = functions[name == "pairs"]
                more = ["--precondition-frequency", "10"] * (name == "frequency_10")
                cores = TensorCores() if name == "tf32" else contextlib.nullcontext()
                with tempfile.TemporaryDirectory() as directory, cores:
                    run = Path(directory)
                    begin_run(args.run, run)
                    tokens, seconds = train_and_evaluate(args, run, base, seed, more)
                    test = run_dir.read_metrics(run)["splits"]["test"]
                for entry in test["ensemble"]:
                    errors = [entry[name] for name in ("brier", "brier_soft", "true_error")]
                    errors = ["" if error is None else f"{error:.6f}" for error in errors]
                    rows.writerow([seed, name, entry["k"], *errors, tokens, f"{seconds:.0f}"])


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--run", required=True, type=cli.path, help="a finished run directory")
    add("--base", help="base model (default: RUN/base)")
    add("--k", type=cli.member_number, default=4, help="members")
    add("--out", type=run_dir.output, required=True, help="FILE.csv")
    add("--kinds", nargs="+", choices=KINDS, default=KINDS[:2], help="of steps (prompts pairs)")
    add("--threads", type=cli.threads, default=os.cpu_count(), help="CPU threads (default: all)")
    add(
        "--seeds",
        type=cli.seed,
        nargs="+",
        default=[0, 1, 2, 3, 4],
        help="of training; the data stay",
    )
    args, args.training = parser.parse_known_args(argv)
    return args


if __name__ == "__main__":
    cli.run_main(main, parse_args())
