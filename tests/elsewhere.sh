#!/usr/bin/env bash
# What is written here is read elsewhere, and the oldest versions that are supported work too.
#     bash tests/elsewhere.sh [RUN [OUT]]        (20 minutes and 9 GB the first time)
#     (default: runs/demo, and results/rewardbench.json for what RewardBench finds)
# RewardBench, once with transformers 4.51 and once with 4.57, finds the stored rewards in the
# exported test pairs: of the run's members (of head and LoRA runs the exported ones), and of one
# whose base has special tokens like Qwen's and a template that writes the date. Then training of
# every kind, scoring, sampling, export and packing are tested with transformers 5.17 and torch
# 2.11. It is not part of tests/run.sh.
# The environments are ROOT/.venv-NAME, made where they are not there; links to yours will do.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
RUN=$(realpath "${1:-$ROOT/runs/demo}")
OUT=$(realpath "${2:-$ROOT/results/rewardbench.json}")
source "$ROOT/pairwise/environment.sh"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# environment NAME 'PACKAGES ..' ..: leave in SECOND the Python of an environment into which they
# have been installed, list after list
environment() {
    local packages
    SECOND=$ROOT/.venv-$1/bin/python
    [ ! -e "$ROOT/.venv-$1/installed" ] && [ ! -L "$ROOT/.venv-$1" ] || return 0
    "$PYTHON" -m venv --clear "$ROOT/.venv-$1"
    for packages in "${@:2}"; do
        # shellcheck disable=SC2086
        "$SECOND" -m pip install --quiet --disable-pip-version-check $packages
    done
    touch "$ROOT/.venv-$1/installed"
}

# compare RUN: RewardBench in SECOND finds the stored rewards of all plain members; a row each in
# scratch/found.json
compare() {
    local member name
    cd "$(mktemp -d -p "$scratch")"
    "$PYTHON" "$ROOT/extras/export_pairs.py" --run "$1" --split test --out pairs.jsonl
    for member in "$1"/member_[0-9][0-9]; do
        name=$(basename "$member")
        [ -e "$member/config.json" ] || { echo "$name: not exported, left out"; continue; }
        ln -s "$member" "$name"
        flags=(--dataset pairs.jsonl --load_json --not_quantized --torch_dtype float32)
        env -u PYTHONPATH "$SECOND" - --model "$name" "${flags[@]}" --batch_size 16 \
            --output_dir out/ >log 2>&1 <<'END' || { tail -n 20 log; exit 1; }
import json
from importlib.metadata import version

import torch
import transformers
from transformers.models.llama import modeling_llama

for name in ("_CONFIG_FOR_DOC", "LLAMA_INPUTS_DOCSTRING"):  # a model of its own names them
    vars(modeling_llama).setdefault(name, "")
from rewardbench.rewardbench import main

if not torch.cuda.is_available():  # it sends every batch to "cuda"
    transformers.BatchEncoding.to = lambda self, device: self
main()
versions = {package: version(package) for package in ("rewardbench", "transformers", "torch")}
json.dump(versions, open("versions.json", "w"))
END
        "$PYTHON" - "$ROOT" "$1" "$name" "$scratch/found.json" <<'END'
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, sys.argv[1])
from pairwise import data, run_dir

run, name, found = Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
split = data.read_split(run, "test")
stored = np.load(run_dir.reward_path(run, int(name[-2:]), "test"))
starts = dict(zip(split.prompt_id, split.response_start))
rewards, expected = [], []
for line in open(f"out/{name}_outputs.jsonl", encoding="utf-8"):
    row = json.loads(line)
    prompt, *responses = row["pair_id"].rsplit("/", 2)
    rewards.append([row["scores_chosen"], row["scores_rejected"]])
    expected.append([stored[starts[prompt] + int(response)] for response in responses])
rewards, expected = np.array(rewards).reshape(-1, 2), np.array(expected)
error = np.abs(rewards - expected).max() / np.abs(expected).max()
print(
    f"{name}: {len(expected):,} pairs, rewards from {expected.min():.2f} to {expected.max():.2f}, "
    f"largest difference {error:.1e} of the largest"
)
row = json.load(open("versions.json")) | {"run": run.name, "member": name, "pairs": len(expected)}
row |= {"lowest": float(expected.min()), "highest": float(expected.max())}
row["largest_difference"] = float(error)  # as a share of the largest reward
rows = json.loads(found.read_text()) if found.exists() else []
found.write_text(json.dumps([*rows, row], indent=1) + "\n")
sys.exit(not error < 1e-4)
END
    done
}

"$PYTHON" - "$ROOT/tests" "$scratch" >"$scratch/log" 2>&1 <<'END' ||
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from conftest import FULL, make_base, script, train

there, demo = Path(sys.argv[2]), script("demo")
args = demo.parse_args(["--run", str(there / "qwen"), "--prompts", "16", "--responses", "4"])
comparisons = demo.comparisons(16, 4, 0)
demo.prompts.prepare(args, "demo", lambda: comparisons, "sampled", {}, {})
tokenizer = demo.train_tokenizer(["What is the best of all answers?"], 400)
tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
tokenizer.add_tokens(["<think>", "</think>"])
turns = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
turns = "Today: {{ strftime_now('%d %B %Y') }}\n" + turns + "<think>\n\n</think>"
tokenizer.chat_template = {"default": turns, "tool_use": "{{ tools }}"}
train(there / "qwen", make_base(tokenizer, there / "base", seed=0), *FULL, "--date", "2024-07-26")
END
    { tail -n 20 "$scratch/log"; exit 1; }
for version in 4.51.0 4.57.6; do
    # RewardBench 0.1.4 asks for 4.51, and 0.1.5, which pip does not find, for 4.57; it imports
    # pkg_resources, which newer setuptools no longer have.
    packages="$(grep -o '^torch==[^ ]*' "$ROOT/requirements.txt") rewardbench==0.1.4 setuptools<81"
    environment "rewardbench-$version" "$packages" "transformers==$version"
    echo "RewardBench with transformers $version"
    compare "$RUN"
    compare "$scratch/qwen"
done
cp "$scratch/found.json" "$OUT"

# These bring their own.
newest='/^torch=/d; /^transformers=/d; /^huggingface_hub=/d; /^setuptools=/d'
packages=$(sed "s/ *#.*//; $newest" "$ROOT/requirements.txt")
environment oldest "torch==2.11.0 transformers==5.17.0 bitsandbytes $packages"
cd "$ROOT"
PYTHONPATH=$ROOT "$SECOND" -m pytest -q tests/test_packed.py tests/test_quantized.py \
    tests/test_lora.py tests/test_kinds_of_runs.py tests/test_joint.py tests/test_respond.py \
    tests/test_training.py
