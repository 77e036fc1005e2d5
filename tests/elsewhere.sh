#!/usr/bin/env bash
# A run's members in a second environment: RewardBench 0.1.4, which brings transformers 4.51, finds
# the stored rewards in the exported test pairs.
#     bash tests/elsewhere.sh [RUN]          (default runs/demo; minutes and 3 GB the first time)
# Of head and LoRA runs it takes the exported members. It is not part of tests/run.sh.
# SECOND=/path/to/python uses an environment of yours in place of .venv-rewardbench.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
RUN=$(realpath "${1:-$ROOT/runs/demo}")
source "$ROOT/pairwise/environment.sh"
if [ -z "${SECOND:-}" ]; then
    SECOND=$ROOT/.venv-rewardbench/bin/python
    [ -e "$SECOND" ] || "$PYTHON" -m venv "$ROOT/.venv-rewardbench"
    torch=$(grep -o '^torch==[^ ]*' "$ROOT/requirements.txt")
    # RewardBench imports pkg_resources, which newer setuptools no longer have.
    "$SECOND" -m pip install --quiet --disable-pip-version-check "$torch" rewardbench==0.1.4 \
        'setuptools<81'
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$PYTHON" "$ROOT/extras/export_pairs.py" --run "$RUN" --split test --out "$scratch/pairs.jsonl"
cd "$scratch"
for member in "$RUN"/member_[0-9][0-9]; do
    name=$(basename "$member")
    [ -e "$member/config.json" ] || { echo "$name: not exported, left out"; continue; }
    ln -s "$member" "$name"
    flags=(--dataset pairs.jsonl --load_json --not_quantized --torch_dtype float32 --batch_size 16)
    "$SECOND" - --model "$name" "${flags[@]}" --output_dir out/ >log 2>&1 <<'END' ||
import torch
import transformers
from rewardbench.rewardbench import main

if not torch.cuda.is_available():  # it sends every batch to "cuda"
    transformers.BatchEncoding.to = lambda self, device: self
main()
END
        { tail -n 20 log; exit 1; }
    "$PYTHON" - "$ROOT" "$RUN" "$name" <<'END'
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, sys.argv[1])
from pairwise import data, run_dir

run, name = Path(sys.argv[2]), sys.argv[3]
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
sys.exit(not error < 1e-4)
END
done
