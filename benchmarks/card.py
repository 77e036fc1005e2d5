"""Measure one part of what a card does, and enter it in a JSON file; benchmarks/card.sh runs all.

    python benchmarks/card.py a1 --work DIR    (a2 needs a1's DIR; all but d and f need base's)

base    a base of Llama-3-8B's shape with random weights, and votes on random texts
a1, a2  train_rm.py on all parameters, members 1 and 2, four steps each
b1, b2  train_rm.py --train lora, the card limited to 24e9 bytes, and the whole card
c       data_prep/continuations.py
d       TRL's RewardTrainer beside this, a .9B Llama
e       training killed after a checkpoint and continued, against training in one go
f       packing, paging, the kernels chosen; rates of linear algebra and of the link
l       a layer of the 8B base, its kernels, and other ways to run parts of it

The entry of a part is written when it begins, whenever it has numbers, and when it ends, with its
state: running, done, failed, skipped, the last two with a reason. On a CPU, or with --small, models
are tiny: that shows that the parts run.
"""

import functools
import importlib
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
import traceback
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pairwise import cli, files, manifest

BENCHMARKS = cli.REPOSITORY / "benchmarks"
sys.path += [str(cli.REPOSITORY / folder) for folder in ("benchmarks", "data_prep", "extras")]
# Modules import torch, which takes seconds, so that only the one that is asked for is imported.
PARTS = dict.fromkeys(("base", "a1", "a2", "b1", "b2", "c", "e"), "card_train")
PARTS |= {"d": "card_trl", "f": "card_checks", "l": "card_layers"}
PACKAGES = "torch", "transformers", "pytorch_optimizer", "peft", "trl"


@functools.cache
def machine():
    """Return {card, driver, memory, cores}, as nvidia-smi has the first card; "cpu" without one."""
    asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        line = subprocess.check_output(asked, encoding="utf-8", stderr=subprocess.DEVNULL)
        found = line.splitlines()[0].split(", ")
    except (OSError, subprocess.CalledProcessError, IndexError):
        found = "cpu", None, None
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    facts = dict(zip(("card", "driver", "memory"), found))
    return facts | {"cores": cli.usable_cores(), "host_gb": tidy(host / 1e9)}


def file_name(card):
    """Return the name in card-NAME.json: h100-80gb of "NVIDIA H100 80GB HBM3"."""
    words = re.sub(r"\bNVIDIA\b|\bHBM\w*", "", card).lower().split()
    return "-".join(re.sub(r"[^a-z0-9]+", "-", word).strip("-") for word in words)


def tidy(value):
    """Return a JSON value with numbers of four digits, null for those that are not finite."""
    if isinstance(value, dict):
        return {str(name): tidy(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [tidy(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


def versions():
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def enter(path, part, entry):
    """Put the entry of one part into the file of all, which appears by rename."""
    whole = files.read_json(path, dict, {}) | machine()
    whole["parts"] = whole.get("parts", {}) | {part: entry}
    files.write_json(path, whole, hashed=False)


class Stopped(BaseException):
    """Time is up: a part still enters what it has measured, and --ended then says why it ended."""


def stop(*_):
    raise Stopped


def run(args, part, keep):
    """Run a part; return its state, as of the entry."""
    try:
        module = importlib.import_module(PARTS[part])
        card = SimpleNamespace(work=args.work, device=args.device, small=args.small, keep=keep)
        if args.gib and args.device == "cuda" and PARTS[part] == "card_train":
            module.limit(card, args.gib)
        reason = module.PARTS[part](card)
        return {"state": "skipped", "reason": reason} if reason else {"state": "done"}
    except (Exception, SystemExit) as error:  # Whatever it is, the other parts go on.
        traceback.print_exc()
        return {"state": "failed", "reason": f"{type(error).__name__}: {cli.first_line(error)}"}


def main(args):
    started, part = time.time(), args.part
    path = args.out / f"card-{args.name}.json"
    if args.ended:  # It could not say so itself.
        before = files.read_json(path, dict, {}).get("parts", {}).get(part, {})
        now = before if before.get("state") == "running" else {}
        enter(path, part, now | {"state": args.ended[0], "reason": args.ended[1]})
        return
    # cuBLAS reads it once; train_rm.py would set it too late where a part has used cuBLAS before.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    entry = {"state": "running", "date": time.strftime("%Y-%m-%d", time.gmtime())}
    entry["command"] = os.environ.get("PAIRWISE_COMMAND", f"python benchmarks/card.py {part}")
    # A copy of the tree has no commit of its own.
    entry["commit"] = os.environ.get("COMMIT") or manifest._git_commit()
    entry |= {"versions": versions(), "device": args.device, "small": args.small}

    def keep(**numbers):
        entry.update(tidy(numbers))
        enter(path, part, entry)

    keep()
    signal.signal(signal.SIGTERM, stop)
    state = run(args, part, keep)
    keep(**state, seconds=time.time() - started)
    print(f"{part}: {': '.join(state.values())}, {time.time() - started:.0f} s; {path}", flush=True)
    if state["state"] == "failed":
        sys.exit(1)


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("part", choices=tuple(PARTS))
    add("--work", type=cli.path, required=True, help="directory of base and runs; 50 GB")
    words = "directory of card-NAME.json (default: benchmarks/)"
    add("--out", type=cli.path, default=BENCHMARKS, help=words)
    add("--device", choices=("cpu", "cuda"), help="default: cuda where nvidia-smi finds a card")
    words = "of the card that torch may take, as on a smaller one"
    add("--gib", type=cli.positive, help=words)
    add("--small", action="store_true", help="tiny models, as on a CPU")
    words = "enter how a part ended that could not say so itself, and do nothing else"
    add("--ended", nargs=2, metavar=("STATE", "REASON"), help=words)
    args = parser.parse_args(argv)
    card = machine()["card"]
    args.device = args.device or ("cpu" if card == "cpu" else "cuda")
    args.name = "cpu" if args.device == "cpu" else file_name(card) + "-small" * args.small
    args.small = args.small or args.device == "cpu"
    return args


if __name__ == "__main__":
    cli.run_main(main, parse_args())
