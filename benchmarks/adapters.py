"""Products in float32 and copies between dtypes in a step of low-rank adapters, before and now.

    python benchmarks/adapters.py --json benchmarks/adapters.json            (10 seconds)

One forward and backward pass, recomputed, through adapters on a random BF16 Llama on the CPU, as
torch's profiler counts it: adapters in float32, in BF16 as PEFT runs them, and as they are run. The
rest are norms, rotary positions and the base's products: they are the same in all three.
"""

import argparse
import collections
import datetime
import json
import math
import pathlib
import platform
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from pairwise.scale import adapter, recompute

import peft
import torch
import transformers
from torch.profiler import ProfilerActivity, profile

SHAPE = {"hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 2, "vocab_size": 512}
SHAPE |= {"num_attention_heads": 8, "num_key_value_heads": 2}
RANK, TOKENS = 16, 512
SIZES = {"float": 4, "c10::BFloat16": 2}  # as the profiler calls them
KINDS = {"float32": torch.float32, "bfloat16, PEFT's forward": None, "bfloat16": None}


def counts(kind):
    """Return {what: FLOPs or bytes written} of one step."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE, num_labels=1, pad_token_id=0)
    of = transformers.AutoModelForSequenceClassification
    model = of.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    model.score.float()
    adapter.add(model, RANK, 2 * RANK, KINDS[kind])
    adapter.draw(model, 0)
    if "PEFT" in kind:
        for layer in model.modules():
            vars(layer).pop("forward", None)
    recompute.recompute_activations(model)
    ids = torch.randint(1, SHAPE["vocab_size"], (1, TOKENS))
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
        model.score(hidden.float()).sum().backward()
    found = collections.Counter()
    for event in profiler.events():
        name, dtypes = event.name.removeprefix("aten::"), event.input_dtypes
        written = max(map(math.prod, event.input_shapes), default=0) * SIZES.get(
            (dtypes or [""])[0], 0
        )
        if name in ("mm", "addmm", "addmm_"):
            (a, b), bits = event.input_shapes[name != "mm" :][:2], 8 * SIZES[dtypes[0]]
            found[f"FLOPs of products in {bits} bits"] += 2 * math.prod(a) * b[1]
        elif name == "copy_" and dtypes[0] != dtypes[1]:
            found["bytes copied to another dtype"] += written
        elif name in ("add", "add_", "mul"):
            found["bytes written by additions and multiplications"] += written
    return dict(sorted(found.items()))


def main(args):
    torch.set_num_threads(1)
    table = {kind: counts(kind) for kind in KINDS}
    result = {
        "what": f"one step of {TOKENS} tokens with adapters of rank {RANK} on a Llama of {SHAPE}",
        "command": "python benchmarks/adapters.py --json benchmarks/adapters.json",
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version()}
        | {library.__name__: library.__version__ for library in (torch, transformers, peft)},
        "adapters": table,
    }
    text = json.dumps(result, indent=1) + "\n"
    print(text, end="")
    if args.json:
        args.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the result there")
    main(parser.parse_args())
