"""Several processes on one machine, one a GPU, as torchrun starts them: each runs the whole script, and what is worth sharing is dealt to them.

Only the first prints and writes. Without torchrun there is one process, it is the first, everything is dealt to it, and nothing is sent.
"""

import datetime
import functools
import os
import sys

import torch
import torch.distributed as dist

from pairwise import cli


def count():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """The number of this process, 0 for the first."""
    return dist.get_rank() if dist.is_initialized() else 0


def deal(items, sizes):
    """The items of each process, lists in the order of `items`, about equal in the sum of their sizes; the same on all processes."""
    taken, loads = {}, [0] * count()
    for i in sorted(range(len(items)), key=lambda i: -sizes[i]):
        taken[i] = loads.index(min(loads))
        loads[taken[i]] += sizes[i]
    return [
        [item for i, item in enumerate(items) if taken[i] == process] for process in range(count())
    ]


def gathered(value):
    """The values that the processes call this with, in their order; all wait for the last."""
    values = [value]
    if count() > 1:
        values = [None] * count()
        dist.all_gather_object(values, value)
    return values


def of_first(function):
    """What function() returns in the first process, which alone calls it."""
    return gathered(function() if rank() == 0 else None)[0]


def together(main):
    """Decorator of main(args): under torchrun each process takes its own GPU, or all the CPU, and they end together.

    When one fails the others do too, for the same reason or because it has gone: only the first to fail says why.
    """

    @functools.wraps(main)
    def joined(args):
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return main(args)
        store, number, size = next(
            dist.rendezvous("env://")
        )  # torchrun's own, so it outlives each of them
        try:
            cuda = args.device.startswith("cuda")
            if cuda:
                place, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
                if place >= gpus:
                    raise cli.InputError(
                        f"{size} processes found, at most one for each of the {gpus} GPUs expected"
                    )
                args.device = f"cuda:{place}"
                torch.cuda.set_device(place)
            dist.init_process_group(
                "nccl" if cuda else "gloo",
                store=dist.PrefixStore("group", store),
                rank=number,
                world_size=size,
                timeout=datetime.timedelta(hours=6),
            )  # the first may write for long; torchrun sees those that have died
            if number:
                sys.stdout = open(os.devnull, "w")
            main(args)
            gathered(None)
        except BaseException:
            if store.add("failed", 1) > 1:
                sys.exit(2)
            raise
        dist.destroy_process_group()

    return joined
