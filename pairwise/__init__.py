"""What the stages share: data and run directories, reward models, weights, metrics, the report."""

import os

# A thread of OpenMP that waits for the others spins, by default for milliseconds; beside another
# busy process, the one that all wait for may not be running. The bound here, some microseconds, is
# what libgomp itself takes where there are more threads than cores. It is read when torch is
# loaded, so pairwise is imported before torch (pyproject.toml). Measured with two threads on two
# cores, seconds of one member of the demo, idle / beside a busy process: 22 / 27, and without it
# 16 / more than 110.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# Tensors of many sizes come and go on a card. Where its memory is mapped page by page, what they
# leave is not lost to larger ones; in blocks as CUDA gives them, 3.9 GiB were (8B, an H100).
if not any(f"PYTORCH_{kind}ALLOC_CONF" in os.environ for kind in ("", "CUDA_", "HIP_")):
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
