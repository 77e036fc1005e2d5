"""Clock and memory meter of benchmarks/card.py: functions of the project, wrapped from outside."""

import collections
import contextlib
import functools
import inspect
import re
import resource
import time
from unittest import mock

from pairwise import reward_model as rm

import numpy as np
import torch
from torch.autograd import DeviceType

# What a kernel's name has in it; all others are norms, rotary positions, SwiGLU, sums and casts.
KERNELS = {
    "attention": r"flash|fmha",
    "products": r"gemm|nvjet|cutlass|xmma",
    "copies": r"memcpy|memset",
}


class Meter:
    """Seconds of phases, and the card's memory at the peak of each: {phase: [{..} of a call]}."""

    def __init__(self, device):
        self.cuda, self.phases, self.events, self.counts = device == "cuda", {}, {}, {}
        self.reserved = self.in_use = 0

    def now(self):
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, phase, function, note):
        """Return the function with a clock; note(meter, args, result) -> more of the call."""

        @functools.wraps(function)
        def wrapped(*args, **options):
            started = self.now()
            result = function(*args, **options)
            call = {"seconds": self.now() - started} | self.inside() | note(self, args, result)
            if self.cuda:
                free, total = torch.cuda.mem_get_info()
                self.in_use = max(self.in_use, total - free)
                self.reserved = max(self.reserved, torch.cuda.max_memory_reserved())
                call["peak_allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
                torch.cuda.reset_peak_memory_stats()
            self.phases.setdefault(phase, []).append(call)
            return result

        return wrapped

    def stamp(self):
        """Return a moment of the card's own stream, without waiting for it, or for copies."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stamped(self, phase, function):
        """Return the function, timed within another phase, whose call has its seconds."""

        @functools.wraps(function)
        def wrapped(*args, **options):
            started = self.stamp()
            result = function(*args, **options)
            self.events.setdefault(phase, []).append((started, self.stamp()))
            return result

        return wrapped

    def inside(self):
        """Return {phase: seconds} of what was stamped, and {name: count}, since the last call."""
        seconds = {
            phase: sum(a.elapsed_time(b) / 1e3 if self.cuda else b - a for a, b in spans)
            for phase, spans in self.events.items()
        }
        found = seconds | self.counts
        self.events, self.counts = {}, {}
        return found

    def count_rows(self, function):
        """Return rm.rewards_of_batch, with what is run by it in training counted."""

        @functools.wraps(function)
        def wrapped(reward_model, sequences, tokens=None):
            if tokens is not None:  # Scoring gives no limit.
                lengths, run = [len(ids) for ids in sequences], self.counts
                count = rm.count_tokens(reward_model, sequences)
                run["run_tokens"] = run.get("run_tokens", 0) + count
                run["squares"] = run.get("squares", 0) + sum(n * n for n in lengths)
                run["passes"] = run.get("passes", 0) + 1
            return function(reward_model, sequences, tokens)

        return wrapped

    def count_recomputed(self, function):
        """Return what runs a layer that is recomputed in the backward pass, counted."""

        @functools.wraps(function)
        def wrapped(*args, **options):
            self.counts["recomputed"] = self.counts.get("recomputed", 0) + 1
            return function(*args, **options)

        return wrapped

    def calls(self, phase):
        """Return the calls of a phase, or those that it was within."""
        within = [call for calls in self.phases.values() for call in calls if phase in call]
        return self.phases.get(phase, within)

    def memory(self):
        """Return GiB of the whole process: reserved, the card in use by all, the host's peak; what
        was allocated since the last call, as of one in which memory ran out; and how often torch
        gave memory back to the card because it found no free block."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if not self.cuda:
            return {"host": peak}
        return {
            "reserved": max(self.reserved, torch.cuda.max_memory_reserved()) / 2**30,
            "allocated_since": torch.cuda.max_memory_allocated() / 2**30,
            "card_in_use": self.in_use / 2**30,
            "card": torch.cuda.mem_get_info()[1] / 2**30,
            "host": peak,
            "allocations_tried_again": torch.cuda.memory_stats()["num_alloc_retries"],
        }


def as_transformers(model):
    """Return a model that is ready, with transformers' own forward passes in place of ours."""
    for module in model.modules():
        vars(module).pop("forward", None)
    return model


def nothing(meter, args, result):
    return {}


@contextlib.contextmanager
def hooked(hooks, wrap):
    """Put wrap(function, *rest) in place of every function (owner, name, *rest).

    Raises AttributeError where an owner has no such name."""
    with contextlib.ExitStack() as stack:
        for owner, name, *rest in hooks:
            function = wrap(getattr(owner, name), *rest)
            if isinstance(inspect.getattr_static(owner, name), staticmethod):
                function = staticmethod(function)
            stack.enter_context(mock.patch.object(owner, name, function))
        yield


def clocked(meter):
    """Return `wrap` of hooked() for owner, name, phase, note."""
    return lambda function, phase, note: meter.timed(phase, function, note)


def check_called(meter, hooks):
    """Raise AssertionError where a function of hooks was never called."""
    if missing := [f"{hook[1]} ({hook[2]})" for hook in hooks if not meter.calls(hook[2])]:
        raise AssertionError(f"never called: {', '.join(missing)}")


# ---- rates


def kernel_seconds(profiler):
    """Return {kind: seconds, "longest": [[seconds, calls, kernel]]} of a profiler's kernels."""
    kinds, each = collections.Counter(), {}
    for event in profiler.events():
        if event.device_type != DeviceType.CUDA:
            continue
        seconds, name = event.time_range.elapsed_us() / 1e6, event.name
        found = (kind for kind, word in KERNELS.items() if re.search(word, name, re.IGNORECASE))
        kinds[next(found, "rest")] += seconds
        before = each.get(name, (0, 0))
        each[name] = before[0] + seconds, before[1] + 1
    longest = sorted(((*numbers, name[:120]) for name, numbers in each.items()), reverse=True)
    return dict(kinds) | {"longest": longest[:16]}


def product_rate(device, dtype, n):
    """Return the FLOP/s of products of two matrices (n, n), the median of 20."""
    x = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / seconds_of(device, lambda: x @ x, 20)


def seconds_of(device, call, times=3):
    """Return the median seconds of a call, after one to warm up."""
    meter, seconds = Meter(device), []
    for _ in range(times + 1):
        started = meter.now()
        call()
        seconds.append(meter.now() - started)
    return float(np.median(seconds[1:]))
