"""What holds on a file of votes with all parameters: bases and seeds side by side on one GPU.

    python experiments/real_votes.py --votes writing.jsonl.gz --base SmolLM2-135M gemma-3-270m \\
        --out runs/writing --test-share 0.4 --valid-share 0.15 --pairs-per-step 16

Of each base first one member at each of --lr, on the split and seed of the first of --seeds. The
rate is then that whose soft predictions have the least Brier score on validation prompts. At this
rate, on the split and seed of each of --seeds: k members (OUT/BASE_RATE_SEED), as many hardened
ones that follow their soft model (OUT/BASE_hard_SEED), and one member by --loss bce
(OUT/BASE_bce_SEED). All other flags are run_all.sh's.

After --minutes all is stopped, what there is is evaluated, and what is missing is named (exit code
3); the same command goes on from there. What a run printed is in OUT/NAME.log; OUT/table.csv is
collect.py's, of all runs that have a member.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "extras"))
from pairwise import cli, run_dir

import collect
from tqdm import tqdm

# Flags of run_all.sh that are set here.
SET = "--run --base --lr --seed --data-seed --loss --train --joint --early-stop --threads".split()
EVALUATION = 1 / 8  # of the minutes are kept for the evaluation of what there is.


def python(script, *words):
    """The command line of a script of this repository."""
    return [sys.executable, str(cli.REPOSITORY / script), *map(str, words)]


def run_all(args, name, k, base, lr, seed, *more):
    """The command line that makes the run `name`: k members of the base, on the seed's split."""
    words = [args.votes, k, "--run", args.out / name, "--base", base, "--lr", lr, "--seed", seed]
    words += ["--data-seed", seed, "--threads", 1, *args.flags, *more]
    return ["bash", str(cli.REPOSITORY / "run_all.sh"), *map(str, words)]


def count_members(run):
    return sum(run_dir.reward_path(run, j, "test").exists() for j in range(1, 100))


def stop(processes):
    """End processes and all that they have started: asked first, by force after ten seconds."""
    for word, seconds in (signal.SIGTERM, 10), (signal.SIGKILL, 10):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, word)
        end = time.monotonic() + seconds
        with contextlib.suppress(subprocess.TimeoutExpired):
            for process in processes:
                process.wait(max(0, end - time.monotonic()))


def do(args, jobs, until):
    """Do the jobs, --at-once at a time, until the clock says `until`.

    jobs: {run: (members that it will have, command lines, of which each needs those before it)}.
    What they print is appended to OUT/RUN.log. Returns {run: why it is not done}.
    """
    waiting, running, failed = {run: list(lines) for run, (_, lines) in jobs.items()}, {}, {}
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    paths = str(cli.REPOSITORY), os.environ.get("PYTHONPATH", "")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    total = sum(members for members, _ in jobs.values())
    with tqdm(total=total, unit="member", disable=not total) as bar:
        try:
            while (waiting or running) and time.monotonic() < until:
                for run in list(waiting)[: args.at_once - len(running)]:
                    lines = waiting.pop(run)
                    with open(args.out / f"{run}.log", "ab") as log:
                        process = subprocess.Popen(
                            lines[0],
                            stdin=subprocess.DEVNULL,
                            stdout=log,
                            stderr=log,
                            env=environment,
                            start_new_session=True,
                        )
                    running[run] = process, lines[1:]
                time.sleep(0.2)
                for run, (process, lines) in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[run]
                    if process.returncode:
                        log = (args.out / f"{run}.log").read_text(
                            encoding="utf-8", errors="replace"
                        )
                        failed[run] = log.splitlines()[-1] if log else "it ended"
                    elif lines:
                        waiting = {run: lines} | waiting
                there = {run: count_members(args.out / run) for run in jobs}
                there = sum(min(jobs[run][0], count) for run, count in there.items())
                if there > bar.n:
                    bar.update(there - bar.n)
        finally:
            stop([process for process, _ in running.values()])
    return failed | dict.fromkeys([*running, *waiting], "no time was left")


def soft_on_validation(run):
    """The Brier score of the soft predictions of a run's first member on validation prompts."""
    path = run / "metrics.json"
    splits = json.loads(path.read_text(encoding="utf-8"))["splits"]
    if "valid" not in splits:
        raise cli.InputError(f"{path}: no validation prompts found; --valid-share 0.15 makes some")
    return splits["valid"]["soft_single"]


def best_rate(args, name, seed):
    """The rate of --lr whose run is best by soft_on_validation."""
    soft = {lr: soft_on_validation(args.out / f"{name}_{lr:g}_{seed}") for lr in args.lr}
    best = min(soft, key=soft.get)
    scores = ", ".join(f"{lr:g} {score:.4f}" for lr, score in soft.items())
    print(f"{name}: --lr {best:g}; soft Brier score on validation prompts: {scores}")
    return best


def main(args):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `do` ends what it has begun
    end = time.monotonic() + 60 * args.minutes
    until = end - 60 * args.minutes * EVALUATION
    bases = {base.rstrip("/").rsplit("/", 1)[-1]: base for base in args.base}
    if len(bases) < len(args.base):
        raise cli.InputError(f"--base {' '.join(args.base)}: two of one name found")
    args.out.mkdir(parents=True, exist_ok=True)

    jobs, first = {}, args.seeds[0]
    for name, base in bases.items():
        for lr in args.lr:
            run = f"{name}_{lr:g}_{first}"
            jobs[run] = 1, [run_all(args, run, 1, base, lr, first)]
    missing, hardened = do(args, jobs, until), {}
    if not missing:
        rates = {name: best_rate(args, name, first) for name in bases}
        by_seed = [(seed, name) for seed in args.seeds for name in bases]
        members, bce = {}, {}
        for seed, name in by_seed:
            run, lr, base = f"{name}_{rates[name]:g}_{seed}", rates[name], bases[name]
            members[run] = args.k, [run_all(args, run, args.k, base, lr, seed)]
            hardened[run] = f"{name}_hard_{seed}"
            run = f"{name}_bce_{seed}"
            bce[run] = 1, [run_all(args, run, 1, base, lr, seed, "--loss", "bce")]
        missing = do(args, members | bce, until)
        jobs |= members | bce

    rest = {}
    for run in missing:
        if count_members(args.out / run):
            stages = "fit_weights.py", "evaluate.py"
            rest[run] = 0, [python(stage, "--run", args.out / run) for stage in stages]
    for run, hard in hardened.items():
        if run not in missing:
            words = "--run", args.out / run, "--out", args.out / hard, "--k", args.k
            line = python("extras/harden.py", *words)
            rest[hard] = 0, [line, python("evaluate.py", "--run", args.out / hard)]
    failed = do(args, rest, end) if rest else {}
    evaluated = [run for run in jobs | rest if run in rest or run not in missing]
    runs = [args.out / run for run in evaluated if run not in failed]
    if runs:
        words = ["--runs", *map(str, runs), "--out", str(args.out / "table.csv")]
        collect.main(collect.parse_args(words))
    for run, why in (missing | failed).items():
        found = f"{count_members(args.out / run)} members found"
        print(f"{args.out / run}: {found}: {why} ({args.out / run}.log)", file=sys.stderr)
    if missing or failed:
        sys.exit(3)


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--votes", required=True, type=cli.path, help="file of votes, of run_all.sh's FILE")
    add("--base", required=True, nargs="+", help="base models: directories or hub ids")
    add("--out", required=True, type=cli.path, help="directory of the runs")
    add("--k", type=cli.member_number, default=8, help="members")
    add(
        "--seeds",
        nargs="+",
        type=cli.seed,
        default=range(5),
        help="of split and training (default 0 to 4)",
    )
    add(
        "--lr",
        nargs="+",
        type=cli.positive,
        default=(1e-4, 3e-4, 1e-3),
        help="(default 1e-4 3e-4 1e-3)",
    )
    add("--at-once", type=cli.natural, default=8, help="runs side by side, on one GPU or the cores")
    add("--minutes", type=cli.positive, default=9, help="after which all is stopped")
    args, args.flags = parser.parse_known_args(argv)
    for word in args.flags:
        if word.split("=")[0] in SET:
            parser.error(f"{word} found, which is set here")
    return args


if __name__ == "__main__":
    cli.run_main(main, parse_args())
