"""What holds on a file of votes with all parameters: bases and seeds side by side on one GPU.

    python experiments/real_votes.py --votes writing.jsonl.gz --base SmolLM2-135M gemma-3-270m \\
        --out runs/writing --test-share 0.4 --valid-share 0.15 --pairs-per-step 16

Of each base first one member at each of --lr, on the split and seed of the first of --seeds. The
rate is then that whose soft predictions have the least Brier score on validation prompts; a base of
which one rate fails waits until that is mended, or not asked for. At this rate, on the split and
seed of each of --seeds: k members (OUT/BASE_RATE_SEED), as many hardened ones that follow their
soft model (OUT/BASE_RATE_hard_SEED), and one member by --loss bce (OUT/BASE_RATE_bce_SEED). All
other flags are run_all.sh's.

After --minutes all is stopped and what there is is evaluated. What is missing is named (exit code
3), and the same command goes on from there: from a checkpoint, of which there is one every third of
the minutes. What a run printed is in OUT/RUN.log; OUT/table.csv is collect.py's, of all evaluated
runs in OUT.
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
from pairwise import cli

import collect
from tqdm import tqdm

# Flags of run_all.sh that are set here.
SET_HERE = "--run --seed --data-seed --loss --train --joint --early-stop --threads".split()
EVALUATION = 1 / 8  # of the minutes are kept for the evaluation of what there is.
NO_TIME = "no time was left"


def python(script, *words):
    """The command line of a script of this repository."""
    return [sys.executable, str(cli.REPOSITORY / script), *map(str, words)]


def run_all(args, run, k, base, seed, lr, *more):
    """The command line that makes OUT/RUN: k members of the base, on the seed's split."""
    words = [args.votes, k, "--run", args.out / run, "--base", base, "--lr", lr, "--seed", seed]
    words += ["--data-seed", seed, "--threads", 1]
    words += ["--checkpoint-minutes", min(30, args.minutes / 3), *args.flags, *more]
    return ["bash", str(cli.REPOSITORY / "run_all.sh"), *map(str, words)]


def members_there(run):
    """How many members have rewards of all prompts, 0 where there is no run."""
    return len([*run.glob("rewards/[0-9][0-9]_test.npy")])


# ---- jobs side by side


def is_running(process):
    """Tell whether a process or one that it has started, in its session, still runs."""
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def stop(processes):
    """End processes and all that they have started: asked first, by force after ten seconds."""
    for word in signal.SIGTERM, signal.SIGKILL:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, word)
        end = time.monotonic() + 10
        while any(map(is_running, processes)) and time.monotonic() < end:
            time.sleep(0.1)


def last_line(path, start):
    """The last line that is not blank of what a log says from byte `start` on."""
    text = path.read_bytes()[start:].decode(errors="replace")
    return next((line for line in reversed(text.splitlines()) if line.strip()), "it said nothing")


def run_jobs(args, jobs, until):
    """Run the jobs, --at-once at a time, until the clock says `until`.

    jobs: {run: (members that it will have, command lines, of which each needs those before it)}.
    What they print is appended to OUT/RUN.log. Returns {run: NO_TIME, or what it failed with}.
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
                        start = log.tell()
                        process = subprocess.Popen(
                            lines[0],
                            stdin=subprocess.DEVNULL,
                            stdout=log,
                            stderr=log,
                            env=environment,
                            start_new_session=True,
                        )
                    running[run] = process, start, lines[1:]
                time.sleep(0.2)
                for run, (process, start, lines) in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[run]
                    if process.returncode:
                        failed[run] = last_line(args.out / f"{run}.log", start)
                    elif lines:
                        waiting = {run: lines} | waiting
                made = sum(min(k, members_there(args.out / run)) for run, (k, _) in jobs.items())
                if made > bar.n:
                    bar.update(made - bar.n)
        finally:
            stop([process for process, _, _ in running.values()])
    return failed | dict.fromkeys([*running, *waiting], NO_TIME)


# ---- what is run


def rate_jobs(args, name, base):
    """One member of the base at each rate, on the first seed."""
    jobs, seed = {}, args.seeds[0]
    for lr in args.lr:
        run = f"{name}_{lr}_{seed}"
        jobs[run] = 1, [run_all(args, run, 1, base, seed, lr)]
    return jobs


def soft_on_validation(run):
    """The Brier score of the soft predictions of a run's first member on validation prompts."""
    path = run / "metrics.json"
    splits = json.loads(path.read_text(encoding="utf-8"))["splits"]
    if "valid" not in splits:
        raise cli.InputError(f"{path}: no validation prompts found, which choose the rate")
    return splits["valid"]["soft_single"]


def best_rate(args, name):
    """The rate of --lr that is best by soft_on_validation on the first seed."""
    if len(args.lr) == 1:
        return args.lr[0]
    runs = {lr: args.out / f"{name}_{lr}_{args.seeds[0]}" for lr in args.lr}
    soft = {lr: soft_on_validation(run) for lr, run in runs.items()}
    best = min(soft, key=soft.get)
    scores = ", ".join(f"{lr} {score:.4f}" for lr, score in soft.items())
    print(f"{name}: --lr {best}; soft Brier score on validation prompts: {scores}")
    return best


def member_jobs(args, bases, rates):
    """At the rates {name: lr}: k members of each base and seed, one seed after another; then one
    member by --loss bce of each."""
    members, bce = {}, {}
    for seed in args.seeds:
        for name, lr in rates.items():
            run = f"{name}_{lr}_{seed}"
            members[run] = args.k, [run_all(args, run, args.k, bases[name], seed, lr)]
            run = f"{name}_{lr}_bce_{seed}"
            bce[run] = 1, [run_all(args, run, 1, bases[name], seed, lr, "--loss", "bce")]
    return members | bce


def evaluation_jobs(args, rates, missing):
    """What the members of unfinished runs give so far; hardened members of the finished ones."""
    jobs = {}
    for run in missing:
        if members_there(args.out / run):
            stages = "fit_weights.py", "evaluate.py"
            jobs[run] = 0, [python(stage, "--run", args.out / run) for stage in stages]
    for seed in args.seeds:
        for name, lr in rates.items():
            if (run := f"{name}_{lr}_{seed}") not in missing:
                hard = args.out / f"{name}_{lr}_hard_{seed}"
                words = "--run", args.out / run, "--out", hard, "--k", args.k
                lines = python("extras/harden.py", *words), python("evaluate.py", "--run", hard)
                jobs[hard.name] = 0, lines
    return jobs


def main(args):
    for word in signal.SIGTERM, signal.SIGHUP:  # Then run_jobs ends what it has begun.
        signal.signal(word, lambda number, _: sys.exit(128 + number))
    end = time.monotonic() + 60 * args.minutes
    until = end - 60 * args.minutes * EVALUATION
    bases = {base.rstrip("/").rsplit("/", 1)[-1]: base for base in args.base}
    if len(bases) < len(args.base) or {"", ".", ".."} & {*bases}:
        raise cli.InputError(
            f"--base {' '.join(args.base)}: directories of different names expected"
        )
    if not args.votes.is_file():
        raise cli.InputError(f"--votes {args.votes}: no such file")
    args.out.mkdir(parents=True, exist_ok=True)

    jobs = {name: rate_jobs(args, name, base) for name, base in bases.items()}
    every = {run: job for of_base in jobs.values() for run, job in of_base.items()}
    missing = run_jobs(args, every, until)
    ready = [name for name in bases if not jobs[name].keys() & missing.keys()]
    rates = {name: best_rate(args, name) for name in ready}
    missing |= run_jobs(args, member_jobs(args, bases, rates), until)
    not_evaluated = run_jobs(args, evaluation_jobs(args, rates, missing), end)

    for run, why in (not_evaluated | missing).items():
        found = members_there(args.out / run)
        print(f"{args.out / run}: {found} members found; {why} ({run}.log)", file=sys.stderr)
    runs = [path.parent for path in sorted(args.out.glob("*/metrics.json"))]
    runs = [str(run) for run in runs if run.name not in not_evaluated]
    if runs:
        words = ["--runs", *runs, "--out", str(args.out / "table.csv")]
        collect.main(collect.parse_args(words))
    if missing or not_evaluated:
        sys.exit(3)


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--votes", required=True, type=cli.path, help="file of votes, run_all.sh's FILE")
    add("--base", required=True, nargs="+", help="base models: directories or hub ids")
    add("--out", required=True, type=cli.path, help="directory of the runs")
    add("--k", type=cli.member_number, default=8, help="members")
    words = "of split and training (default 0 to 4)"
    add("--seeds", nargs="+", type=cli.seed, default=range(5), help=words)
    words = "learning rates, of which one is chosen (default 1e-4 3e-4 1e-3)"
    add("--lr", nargs="+", type=cli.positive, default=(1e-4, 3e-4, 1e-3), help=words)
    add("--at-once", type=cli.natural, default=8, help="runs side by side, on one GPU or the cores")
    add("--minutes", type=cli.positive, default=9, help="after which all is stopped")
    args, args.flags = parser.parse_known_args(argv)
    flags = [word.split("=")[0] for word in args.flags]
    for flag in SET_HERE:
        if flag in flags:
            parser.error(f"{flag} found, which is set here")
    if len(args.lr) > 1 and "--valid-share" not in flags:
        parser.error("no --valid-share found: validation prompts choose among several --lr")
    return args


if __name__ == "__main__":
    cli.run_main(main, parse_args())
