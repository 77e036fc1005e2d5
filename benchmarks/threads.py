"""Seconds of a training step with each way for OpenMP's threads to wait, on free and on busy cores.

    python benchmarks/threads.py [--threads 2] [--rounds 3]          (about ten minutes)

Each cell is the least of all rounds' median seconds a step (forward, backward and AdamW of a random
Llama, 1,024 tokens), in a process of its own; the rounds are interleaved. Busy: beside one process
that never stops. The cores must be free of all other work.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

POLICIES = {
    "libgomp's default": {},
    "GOMP_SPINCOUNT=30000": {"GOMP_SPINCOUNT": "30000"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "GOMP_SPINCOUNT=0": {"GOMP_SPINCOUNT": "0"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": None,
}
SIZES = {"0.3M": (64, 2), "7M": (256, 6), "29M": (512, 8)}  # parameters: hidden size, layers
STEPS = 6


def step_seconds(size, threads):
    """Median seconds of a step after the first, float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(threads)
    width, layers = SIZES[size]
    shape = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads, vocab_size=4096))
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(0, 4096, (8, 128))
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def measure(size, policy, threads):
    """Run step_seconds in a process of its own, as the policy is read when torch is loaded."""
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    threads = 1 if policy is None else threads
    command = [sys.executable, __file__, "--step", size, "--threads", str(threads)]
    done = subprocess.run(
        command, env=environment | (policy or {}), check=True, stdout=subprocess.PIPE
    )
    return float(done.stdout)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    parser.add_argument("--rounds", type=int, default=3, help="of measurements")
    parser.add_argument("--step", choices=SIZES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        print(step_seconds(args.step, args.threads))
        return
    print("| parameters | threads wait | free | busy |\n|---|---|---|---|")
    for size in SIZES:
        least = {name: [float("inf")] * 2 for name in POLICIES}
        for busy in [0, 1] * args.rounds:
            other = busy and subprocess.Popen([sys.executable, "-c", "while True: pass"])
            for name, policy in POLICIES.items():
                least[name][busy] = min(least[name][busy], measure(size, policy, args.threads))
            if other:
                other.kill()
        for name, (free, beside) in least.items():
            print(f"| {size} | {name} | {free:.3f} | {beside:.3f} |", flush=True)


if __name__ == "__main__":
    main()
