"""Several processes on one machine, one a GPU, as torchrun starts them.

Each runs the whole script, and work that can be divided is dealt to them; only the first prints
and writes. Without torchrun there is one process, the first, which does all and sends nothing.
"""

import datetime
import functools
import os
import sys

from pairwise import cli

import torch
import torch.distributed as dist


def count():
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """Return the number of this process, 0 for the first."""
    return dist.get_rank() if dist.is_initialized() else 0


def deal(items, sizes):
    """Return the items of each process, in order, with about equal sums of sizes, on all alike."""
    indices, loads = [[] for _ in range(count())], [0] * count()
    for i in sorted(range(len(items)), key=lambda i: -sizes[i]):
        process = loads.index(min(loads))
        indices[process].append(i)
        loads[process] += sizes[i]
    return [[items[i] for i in sorted(own)] for own in indices]


def gathered(value):
    """Return the values that the processes call this with, in order; all wait for the last."""
    values = [value]
    if count() > 1:
        values = [None] * count()
        dist.all_gather_object(values, value)
    return values


def of_first(function):
    """Return what function() returns in the first process, which alone calls it."""
    return gathered(function() if rank() == 0 else None)[0]


def take_gpu(args, processes):
    """Make args.device the GPU of this process; raise InputError where there are too few."""
    place, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if place >= gpus:
        words = f"at most one for each of the {gpus} GPUs expected"
        raise cli.InputError(f"{processes} processes found, {words}")
    args.device = f"cuda:{place}"
    torch.cuda.set_device(place)


def together(main):
    """Decorate main(args): under torchrun each process takes its own GPU, or they share the CPU.

    When one fails, the others do too, and only the first to fail says why.
    """

    @functools.wraps(main)
    def joined(args):
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return main(args)
        store, number, size = next(dist.rendezvous("env://"))  # torchrun's store outlives them all.
        cuda = args.device.startswith("cuda")
        try:
            if cuda:
                take_gpu(args, size)
            # The first may write for long, and torchrun sees those that have died.
            group = {"rank": number, "world_size": size, "timeout": datetime.timedelta(hours=6)}
            group["store"] = dist.PrefixStore("group", store)
            dist.init_process_group("nccl" if cuda else "gloo", **group)
            if number:
                sys.stdout = open(os.devnull, "w", encoding="utf-8")
            main(args)
            gathered(None)
        except BaseException:
            if store.add("failed", 1) > 1:
                sys.exit(2)
            raise
        dist.destroy_process_group()

    return joined
