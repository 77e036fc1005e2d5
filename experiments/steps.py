"""Steps made of whole prompts beside steps of shuffled pairs: what the fast kind costs in calibration.

    python experiments/steps.py --run runs/demo --out results/steps_demo.csv --lr 3e-3          (an hour on one thread)
    python experiments/steps.py --run runs/mine --out mine.csv --base NAME_OR_DIR --train head

RUN: a finished run directory (of a head run with features/), of which the data and the base are taken, or --base. Everything else is the same in
both: pairs, head, optimizer, at most 64 pairs a step (whole prompts fill it less well: in the demo 90 steps of 60 pairs beside 85). Other flags are train_rm.py's.
"""

import csv
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "extras")]
import evaluate
import fit_weights
import train_rm
from pairwise import cli, data, training

WHOLE, SHUFFLED = training.steps_of_prompts, training.steps_of_pairs


def shuffled(pair_start, keep, pairs_per_step, rng):
    """As steps_of_prompts, with each pair where chance puts it."""
    return [
        [np.array([pair]) for pair in step[0]] for step in SHUFFLED(keep, pairs_per_step, 1, rng)
    ]


def whole(pair_start):
    """As steps_of_pairs, with the pairs of a prompt in one step; pair_start (P+1,)."""
    return lambda keep, pairs_per_step, epochs, rng: [
        [np.concatenate(step)]
        for _ in range(epochs)
        for step in WHOLE(pair_start, keep, pairs_per_step, rng)
    ]


def main(args):
    base, pair_start = args.base or args.run / "base", data.read_split(args.run, "train").pair_start
    with open(args.out, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(
            ["seed", "steps", "k", "brier", "brier_soft", "true_error", "tokens", "seconds"]
        )
        for number in args.seeds:
            for name, of_prompts, of_pairs in (
                ("prompts", WHOLE, whole(pair_start)),
                ("pairs", shuffled, SHUFFLED),
            ):
                training.steps_of_prompts, training.steps_of_pairs = of_prompts, of_pairs
                with tempfile.TemporaryDirectory() as directory:
                    run = Path(directory)
                    for kept in ("data", "features"):
                        (run / kept).symlink_to((args.run / kept).resolve())
                    manifest = json.loads((args.run / "manifest.json").read_text())
                    manifest["stages"] = {
                        stage: entry
                        for stage, entry in manifest["stages"].items()
                        if stage in ("data", "base", "features")
                    }
                    (run / "manifest.json").write_text(json.dumps(manifest))
                    started = time.time()
                    for j in range(1, args.k + 1):
                        flags = [
                            "--run",
                            run,
                            "--base",
                            base,
                            "--iteration",
                            j,
                            "--seed",
                            number,
                            "--threads",
                            args.threads,
                            "--device",
                            "cpu",
                        ]
                        train_rm.main(train_rm.parse_args([*map(str, flags), *args.training]))
                        fit_weights.main(fit_weights.parse_args(["--run", str(run)]))
                    seconds = time.time() - started
                    evaluate.main(evaluate.parse_args(["--run", str(run)]))
                    tokens = sum(
                        json.loads(line)["tokens"]
                        for path in (run / "logs").glob("*.jsonl")
                        for line in path.read_text().splitlines()
                    )
                    for entry in json.loads((run / "metrics.json").read_text())["splits"]["test"][
                        "ensemble"
                    ]:
                        figures = [
                            "" if entry[name] is None else f"{entry[name]:.6f}"
                            for name in ("brier", "brier_soft", "true_error")
                        ]
                        rows.writerow(
                            [number, name, entry["k"], *figures, tokens, f"{seconds:.0f}"]
                        )
                    file.flush()


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--run", required=True, type=Path, help="a finished run directory")
    add("--base", help="base model (default: RUN/base)")
    add("--k", type=cli.natural, default=4, help="members")
    add(
        "--seeds",
        type=cli.seed,
        nargs="+",
        default=[0, 1, 2, 3, 4],
        help="of training; the data stay",
    )
    add("--out", type=Path, required=True, help="FILE.csv")
    add("--threads", type=cli.natural, default=os.cpu_count(), help="CPU threads (default: all)")
    args, args.training = parser.parse_known_args(argv)
    return args


if __name__ == "__main__":
    cli.run_main(main, parse_args())
