#!/usr/bin/env bash
# A run's members in a second environment: RewardBench 0.1.4, which brings transformers 4.51, finds the stored rewards in the exported test pairs.
#     bash tests/elsewhere.sh [RUN]      (default runs/demo; of head and LoRA runs the exported members; minutes and 3 GB the first time)
# Not part of tests/run.sh. SECOND=/path/to/python uses an environment of yours in place of .venv-rewardbench.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
RUN=$(realpath "${1:-$ROOT/runs/demo}")
source "$ROOT/pairwise/environment.sh"
if [ -z "${SECOND:-}" ]; then
    SECOND=$ROOT/.venv-rewardbench/bin/python
    [ -e "$SECOND" ] || "$PYTHON" -m venv "$ROOT/.venv-rewardbench"
    # it imports pkg_resources, which newer setuptools no longer have
    "$SECOND" -m pip install --quiet --disable-pip-version-check "$(grep -o '^torch==[^ ]*' "$ROOT/requirements.txt")" rewardbench==0.1.4 'setuptools<81'
fi
there=$(mktemp -d)
trap 'rm -rf "$there"' EXIT
"$PYTHON" "$ROOT/extras/export_pairs.py" --run "$RUN" --split test --out "$there/pairs.jsonl"
cd "$there"
for member in "$RUN"/member_[0-9][0-9]; do
    name=$(basename "$member")
    [ -e "$member/config.json" ] || { echo "$name: not exported, left out"; continue; }
    ln -s "$member" "$name"
    "$SECOND" - --model "$name" --dataset pairs.jsonl --load_json --not_quantized --torch_dtype float32 --batch_size 16 --output_dir out/ >log 2>&1 <<'END' || { tail -n 20 log; exit 1; }
import torch
import transformers
from rewardbench.rewardbench import main

if not torch.cuda.is_available():  # it sends every batch to "cuda"
    transformers.BatchEncoding.to = lambda self, device: self
main()
END
    "$PYTHON" - "$ROOT" "$RUN" "$name" <<'END'
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, sys.argv[1])
from pairwise.run_dir import read_split, reward_path

run, name = Path(sys.argv[2]), sys.argv[3]
split, stored = read_split(run, "test"), np.load(reward_path(run, int(name[-2:]), "test"))
starts = dict(zip(split.prompt_id, split.response_start))
rows = [json.loads(line) for line in open(f"out/{name}_outputs.jsonl", encoding="utf-8")]
pairs = [(starts[prompt], int(chosen), int(rejected)) for prompt, chosen, rejected in (row["pair_id"].rsplit("/", 2) for row in rows)]
found = np.array([[row["scores_chosen"], row["scores_rejected"]] for row in rows]).reshape(len(rows), 2)
expected = np.array([[stored[start + chosen], stored[start + rejected]] for start, chosen, rejected in pairs])
error = np.abs(found - expected).max() / np.abs(expected).max()
print(f"{name}: {len(rows):,} pairs, rewards from {expected.min():.2f} to {expected.max():.2f}, largest difference {error:.1e} of the largest")
sys.exit(not error < 1e-4)
END
done
