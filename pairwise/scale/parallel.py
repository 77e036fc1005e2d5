"""Several processes on one machine or several, one a GPU, as torchrun starts them.

Each runs the whole script, and work that can be divided is dealt to them; only the first prints
and writes. Without torchrun there is one process, the first, which does all and sends nothing.
"""

import contextlib
import datetime
import functools
import os
import secrets
import socket
import sys
import threading
import time
from multiprocessing import connection

from pairwise import cli

import torch
import torch.distributed as dist


def count():
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def count_here():
    """Return the number of processes on this machine, which share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


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


def check_alike(values):
    """Raise InputError where a process has another value than the first. values: {name: value}."""
    first, *others = gathered(values)
    for number, own in enumerate(others, 1):
        for name in sorted(first.keys() | own.keys()):
            expected, found = first.get(name), own.get(name)
            if expected != found:
                words = f"{name.replace('_', '-')} {found} found, {expected} expected"
                raise cli.InputError(f"process {number}: {words}, as in the first")


def check_same_device(store, number, kind):
    """Raise InputError where the first process runs on another kind of device.

    They would wait for each other in libraries that do not meet."""
    if number == 0:
        store.set("kind", kind)
    elif (expected := store.get("kind").decode()) != kind:
        words = f"{kind} found (--device), {expected} expected, as in the first"
        raise cli.InputError(f"process {number}: {words}")


def take_gpu(args):
    """Make args.device the GPU of this process; raise InputError where there are too few."""
    place, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if place >= gpus:
        words = f"at most one for each of the {gpus} GPUs of this machine expected"
        raise cli.InputError(f"{count_here()} processes found, {words}")
    args.device = f"cuda:{place}"
    torch.cuda.set_device(place)


# ---- a process or a machine that is lost

# Seconds, and questions: a machine that does not answer is lost after 10 + 6 x 5 s. Its kernel
# answers, so that no process that is slow, stopped, or writes for an hour counts as lost.
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 6}
ARRIVAL, UNWINDING = 600, 3  # seconds for all to come, and for a process to clear up when it ends
ENDS_WELL, FAILS = b".", b"!"  # what a process says before it closes its connections


def connect(store, number, size):
    """Return {connection: its machine}, of the first to all others, of these to the first."""
    if number:
        (port, token), host = store.get("watch").decode().split(), os.environ["MASTER_ADDR"]
        peers = {socket.create_connection((host, int(port)), ARRIVAL): host}
        tell(peers, token.encode())
    else:
        both = {"family": socket.AF_INET6, "dualstack_ipv6": True}
        token, peers = secrets.token_hex(8), {}
        options = both if socket.has_dualstack_ipv6() else {}
        with socket.create_server(("", 0), backlog=size, **options) as server:
            server.settimeout(ARRIVAL)
            store.set("watch", f"{server.getsockname()[1]} {token}")
            while len(peers) < size - 1:
                peer, (host, *_) = server.accept()
                peer.settimeout(10)
                with contextlib.suppress(OSError):  # of a stranger, who has no token
                    if peer.recv(len(token), socket.MSG_WAITALL) == token.encode():
                        peers[peer] = host.removeprefix("::ffff:")
    for peer in peers:
        peer.settimeout(None)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):  # Not every system has all.
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return peers


@contextlib.contextmanager
def refused(words):
    """Raise an InputError with these words for an error of the network."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        why = f"{cli.reason(error)[:200]}; docs/training.md, Several GPUs, may help"
        raise cli.InputError(f"{words} ({why})") from None


def tell(peers, word):
    """Send a word on all connections that still are."""
    for peer in peers:
        with contextlib.suppress(OSError):
            peer.sendall(word)


def watch(peers, speaks):
    """End this process when a connection ends and its process did not say that it ends well.

    One that says nothing is lost, which a line tells of where this process is one that speaks."""
    watched, told = list(peers), not speaks
    while watched:
        for peer in connection.wait(watched):
            word, why = b"", "it ended"
            try:
                word = peer.recv(1)
            except OSError as error:
                why = cli.reason(error)
            if word == ENDS_WELL:
                watched.remove(peer)
                continue
            tell([other for other in peers if other is not peer], FAILS)
            if not told and not word:
                with contextlib.suppress(SystemExit):
                    words = f"a process on {peers[peer]} is lost ({why})"
                    cli.exit_with(f"{words}; the same command continues")
            told = True
            if not word:
                time.sleep(UNWINDING)
                os._exit(2)


def together(main):
    """Decorate main(args): under torchrun each process takes its own GPU, or they share the CPU.

    When one fails, the others do too, and only the first to fail says why.
    """

    @functools.wraps(main)
    def joined(args):
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return main(args)
        store, number, size = next(dist.rendezvous("env://"))  # torchrun's store outlives them all.
        cuda, unreachable = args.device.startswith("cuda"), f"{size} processes cannot be connected"
        with refused(unreachable):
            peers = connect(store, number, size)
        # One process of each machine tells that another is lost; rank 1 does, too, of rank 0.
        speaks = number < 2 or os.environ["LOCAL_RANK"] == "0"
        threading.Thread(target=watch, args=(peers, speaks), daemon=True).start()
        try:
            check_same_device(store, number, "a GPU" if cuda else "the CPU")
            if cuda:
                take_gpu(args)
            # The first may write for long: `watch` finds those that are lost.
            group = {"rank": number, "world_size": size, "timeout": datetime.timedelta(hours=6)}
            group["store"] = dist.PrefixStore("group", store)
            with refused(unreachable):
                dist.init_process_group("nccl" if cuda else "gloo", **group)
            if number:
                sys.stdout = open(os.devnull, "w", encoding="utf-8")
            main(args)
            gathered(None)
            tell(peers, ENDS_WELL)
        except BaseException as error:
            if isinstance(error, RuntimeError):  # of a process that is lost, perhaps
                time.sleep(UNWINDING + 2)  # Then this one ends here.
            tell(peers, FAILS)
            if store.add("failed", 1) > 1:
                sys.exit(2)
            raise
        dist.destroy_process_group()

    return joined
