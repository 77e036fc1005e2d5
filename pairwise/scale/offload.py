"""SOAP (Vyas et al., arXiv 2409.11321) within a memory budget. The optimizer is the library's, unmodified: this only moves its tensors.

What it keeps beside a BF16 parameter of shape (a, b) is a float32 master and two moments (a, b), and for every dimension d of at most
max_precondition_dim a covariance GG and its eigenbasis Q, both (d, d). What does not fit on the device lies in one block of host memory and is
copied to the device for its turn in step(), one parameter at a time, while the one before it is computed and the one before that is copied back.
With several processes each owns a share of the parameters: it alone has their masters and state, is sent their gradients, steps them and sends
the others the result.
"""

import functools
import json
import math
import os
import re

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.modeling_layers import GradientCheckpointingLayer

from pairwise import cli
from pairwise.scale import parallel

MAX_PRECONDITION_DIM = 4096  # of full training
PAGED = {"paged": True}  # in place of the state of a parameter whose turn it is not
BUFFERS = 3  # on the device: one is filled, one computed, one copied back, as the link goes both ways at once
ALIGN = 16  # numbers: 64 bytes, as torch's own allocator, so that a copy is computed with the same instructions


def state_shapes(shape, max_precondition_dim):
    """Shapes of the library's float32 state of a parameter: exp_avg, exp_avg_sq, then every GG, then every Q (SOAP.init_pre_conditioner)."""
    sides = [(d, d) for d in shape if d <= max_precondition_dim] if len(shape) > 1 else []
    return [tuple(shape)] * 2 + sides * 2


def choose_resident(sizes, budget):
    """Indices of the parameters whose master and state stay on the device; sizes: bytes of each; budget: bytes, None for no limit.

    BUFFERS for the largest of the others are taken from the budget too. Every byte that moves, moves twice a step: the most bytes stay that can.
    """
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    if budget is None or sum(sizes) <= budget:
        return set(order)
    best, most = set(), 0
    for k, largest in enumerate(
        order
    ):  # the largest that moves; before it all stay, after it those that there is room for
        chosen, used = set(order[:k]), sum(sizes[i] for i in order[:k]) + BUFFERS * sizes[largest]
        for i in order[k + 1 :]:
            if used + sizes[i] <= budget:
                chosen.add(i)
                used += sizes[i]
        if used <= budget and used - BUFFERS * sizes[largest] > most:
            best, most = chosen, used - BUFFERS * sizes[largest]
    return best


class Part:
    """One parameter p, the float32 master that the optimizer knows (p itself where it is float32), its place in host memory or None."""

    def __init__(self, p, dim):
        self.p, self.master, self.host = p, None, None
        self.twin = p.dtype != torch.float32
        self.shapes = [tuple(p.shape)] * self.twin + state_shapes(p.shape, dim)
        self.strides = [None] * len(
            self.shapes
        )  # of each tensor as the library left it: a transposed basis stays one, to the last bit
        self.numbers = sum(
            math.ceil(math.prod(shape) / ALIGN) * ALIGN for shape in self.shapes
        )  # float32 numbers in memory

    def views(self, flat):
        """The master (of a twin) and the state as views of flat, float32 (numbers,)."""
        out, at = [], 0
        for shape, stride in zip(self.shapes, self.strides):
            numel = math.prod(shape)
            out.append(
                flat[at : at + numel].as_strided(shape, stride)
                if stride
                else flat[at : at + numel].view(shape)
            )
            at += math.ceil(numel / ALIGN) * ALIGN
        return out

    def value(self):
        """The master where it lies between steps."""
        return (
            self.views(self.host)[0]
            if self.twin and self.host is not None
            else self.master.detach()
        )


class Offload:
    """The optimizer of `groups` [{"params", "max_precondition_dim"}, ..] that make(groups) builds, with float32 masters and gradients.

    Gradients of BF16 parameters are added up in float32 as backward() yields them, and freed. budget: bytes of the device for masters,
    state and copy buffers; None: everything stays there. Whatever the budget, the numbers are those of everything resident.
    Raises InputError where host memory does not suffice.
    """

    def __init__(self, groups, make, budget=None):
        self.parts = [
            Part(p, group["max_precondition_dim"]) for group in groups for p in group["params"]
        ]
        self.nbytes = 4 * sum(
            part.numbers + part.p.numel() * (not part.twin) for part in self.parts
        )  # of masters and state
        dealt = parallel.deal(range(len(self.parts)), [part.numbers for part in self.parts])
        self.owners, self.mine = (
            {i: process for process, share in enumerate(dealt) for i in share},
            dealt[parallel.rank()],
        )
        resident = choose_resident([4 * self.parts[i].numbers for i in self.mine], budget)
        self.resident = [i for k, i in enumerate(self.mine) if k in resident]
        self.paged = [i for k, i in enumerate(self.mine) if k not in resident]
        self.device, self.calls = self.parts[0].p.device, 0
        self.into, self.back = [
            _side_stream(self.device) if self.paged else None for _ in range(2)
        ]  # streams of copies to the device and from it
        if self.paged:
            self._allocate()
        for i, part in enumerate(self.parts):
            if part.twin and self.owners[i] != parallel.rank():
                part.master = torch.zeros((), device=self.device).expand(
                    part.p.shape
                )  # its shape alone, for the gradient
            elif part.twin and part.host is None:
                part.master = part.p.detach().float()
            elif part.twin:
                part.master = part.views(self.buffers[0])[
                    0
                ]  # not its values, which come with its turn; its shape, for the gradient
                part.views(part.host)[0].copy_(part.p.detach())
            else:
                part.master = part.p
        self.hooks = [
            part.p.register_post_accumulate_grad_hook(functools.partial(_add_gradient, part.master))
            for part in self.parts
            if part.twin
        ]
        dims = [group["max_precondition_dim"] for group in groups for _ in group["params"]]
        self.optimizer = make(
            [
                {"params": [part.master], "max_precondition_dim": dim}
                for part, dim in zip(self.parts, dims)
            ]
        )
        self.groups = list(
            self.optimizer.param_groups
        )  # one of its own per parameter, with its own count of steps

    def _allocate(self):
        """Host memory in one block and BUFFERS on the device, each the size of the largest paged parameter; once."""
        parts = [self.parts[i] for i in self.paged]
        need, have = (
            4 * sum(part.numbers for part in parts),
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // parallel.count(),
        )
        if need > have:
            raise cli.InputError(
                f"{need / 1e9:.0f} GB of host memory needed for the optimizer, {have / 1e9:.0f} GB are there; a larger "
                "--optimizer-memory-gb or a smaller --max-precondition-dim may do; --plan says what fits"
            )
        host = torch.empty(need // 4, dtype=torch.float32)
        if self.into:  # registered rather than allocated as pinned memory: that would be rounded up to a power of two
            code = int(torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.nbytes, 0))
            if code:
                raise cli.InputError(
                    f"{host.nbytes / 2**30:.0f} GiB of host memory could not be pinned for the optimizer (CUDA error {code}); "
                    "more memory or a larger --optimizer-memory-gb may do"
                )
        for part, flat in zip(parts, host.split([part.numbers for part in parts])):
            part.host = flat
        self.host = host
        self.buffers = [
            torch.empty(
                max(part.numbers for part in parts), dtype=torch.float32, device=self.device
            )
            for _ in range(BUFFERS)
        ]
        self.loaded, self.stored = (
            [None] * BUFFERS,
            [None] * BUFFERS,
        )  # of each buffer, the event after which it is filled, and copied back

    def gradients(self):
        """Float32 gradients, in the order of the parameters; those that this process owns."""
        return [
            self.parts[i].master.grad for i in self.mine if self.parts[i].master.grad is not None
        ]

    def sum_gradients(self):
        """Send the gradients to the processes that own their parameters, in sum; a process that had none to add adds zero."""
        if parallel.count() == 1:
            return
        found = zip(*parallel.gathered([part.master.grad is not None for part in self.parts]))
        for i, anywhere in enumerate(map(any, found)):
            if anywhere:
                master = self.parts[i].master
                total = (
                    torch.zeros(master.shape, device=self.device)
                    if master.grad is None
                    else master.grad
                )
                dist.reduce(total, self.owners[i])
                master.grad = total if self.owners[i] == parallel.rank() else None

    def _send(self):
        """Give all processes the parameters as their owners have them."""
        for i, part in enumerate(self.parts if parallel.count() > 1 else []):
            dist.broadcast(part.p.detach(), self.owners[i])

    def step(self, lr):
        """One step of all parameters with the gradients so far, summed over processes, which are then forgotten."""
        for group in self.groups:
            group["lr"] = lr
        calls = (
            1 if self.calls else 2
        )  # the library's first call only initialises the preconditioners; the second uses this gradient
        self.calls += calls
        turns = len(self.paged)
        if turns:
            self._load(0)
        for turn in range(max(1, turns)):
            if turn + 1 < turns:
                self._load(turn + 1)
            self._call(
                self.resident[turn :: turns or 1], calls
            )  # a share of the residents each turn: work for while copies run
            if turns:
                self._step_paged(turn, calls)
        with torch.no_grad():
            for i in self.resident:
                if self.parts[i].twin:
                    self.parts[i].p.copy_(self.parts[i].master)
        self._send()
        for part in self.parts:
            part.master.grad = None

    def _call(self, which, calls):
        self.optimizer.param_groups = [self.groups[i] for i in which]
        torch.backends.cuda.matmul.allow_tf32 = (
            True  # a GPU's float32 products at eight times the rate; of their factors 11 bits count
        )
        for _ in range(calls if which else 0):
            self.optimizer.step()
        torch.backends.cuda.matmul.allow_tf32 = False

    def _load(self, turn):
        """Copy to the device, when what was in the buffer before is back on the host; so is then this parameter, from the step before."""
        part, buffer = self.parts[self.paged[turn]], turn % BUFFERS
        if self.stored[buffer]:
            self.into.wait_event(self.stored[buffer])
        with torch.cuda.stream(self.into):  # no stream, no effect
            self.buffers[buffer][: part.numbers].copy_(part.host, non_blocking=True)
            self.loaded[buffer] = self.into.record_event() if self.into else None

    @torch.no_grad()
    def _step_paged(self, turn, calls):
        """Step the parameter that has been copied to its buffer, and copy it back."""
        i, state, buffer = self.paged[turn], self.optimizer.state, turn % BUFFERS
        part = self.parts[i]
        flat = self.buffers[buffer][: part.numbers]
        if self.into:
            torch.cuda.current_stream(self.device).wait_event(self.loaded[buffer])
        views = part.views(flat)
        if part.twin:
            part.master.data = views[0]
        if part.master in state:
            state[part.master] = _state(self.groups[i], views[part.twin :])
        self._call([i], calls)
        found = _tensors(state.get(part.master))
        # Most state is changed in place; the first call's and every new basis are tensors of the library's own, and are copied in.
        part.strides[part.twin :] = [tensor.stride() for tensor in found] or part.strides[
            part.twin :
        ]
        for tensor, was, view in zip(found, views[part.twin :], part.views(flat)[part.twin :]):
            if tensor is not was:
                view.copy_(tensor)
        if found:  # it has one, but not here: these views are the next parameter's, and the library's own tensors are freed
            state[part.master] = PAGED
        if part.twin:
            part.p.copy_(part.master)
        if self.back:
            self.back.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.back):
            part.host.copy_(flat, non_blocking=True)
            self.stored[buffer] = self.back.record_event() if self.back else None

    def close(self):
        """Let go of the parameters: no more gradients are taken from them, and no memory is held or pinned."""
        for hook in self.hooks:
            hook.remove()
        if self.back:
            self.back.synchronize()
            torch.cuda.cudart().cudaHostUnregister(self.host.data_ptr())

    # ---- checkpoints

    def save(self, directory):
        """Write masters and state to `directory`, a safetensors file per parameter, by its owner; what load() needs besides, for JSON."""
        if self.back:
            self.back.synchronize()
        for i in self.mine:
            part = self.parts[i]
            if part.host is None:
                tensors = _tensors(self.optimizer.state.get(part.master))
            else:
                tensors = part.views(part.host)[part.twin :] if part.strides[-1] else []
            flat = [
                tensor.as_strided((tensor.numel(),), (1,)) for tensor in tensors
            ]  # as it lies in memory
            named = {"master": part.value().contiguous()} | {
                f"state {k}": tensor for k, tensor in enumerate(flat)
            }
            save_file(
                named,
                directory / f"{i:04d}.safetensors",
                {"strides": json.dumps([tensor.stride() for tensor in tensors])},
            )
        return {"calls": self.calls}

    @torch.no_grad()
    def load(self, directory, facts):
        """Take up what save() has written and returned, whatever the budgets and the number of processes then and now."""
        self.calls = facts["calls"]
        for i in self.mine:
            part, group = self.parts[i], self.groups[i]
            group["step"] = self.calls
            with safe_open(directory / f"{i:04d}.safetensors", "pt") as file:
                strides = json.loads(file.metadata()["strides"])
                part.strides[part.twin :] = (
                    map(tuple, strides) if strides else part.strides[part.twin :]
                )
                if part.host is None:
                    views = [
                        torch.empty_strided(shape, stride, device=self.device)
                        for shape, stride in zip(part.shapes[part.twin :], strides)
                    ]
                else:
                    views = part.views(part.host)[part.twin :]
                part.value().copy_(file.get_tensor("master"))
                part.p.copy_(part.value())
                for k, view in enumerate(views if strides else []):
                    view.as_strided((view.numel(),), (1,)).copy_(file.get_tensor(f"state {k}"))
            if strides:
                self.optimizer.state[part.master] = (
                    PAGED if part.host is not None else _state(group, views)
                )
        self._send()


def _side_stream(device):
    """Where copies run beside the computation; None on a CPU, where everything is done in turn."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def _add_gradient(master, p):
    master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
    p.grad = None


def _tensors(state):
    """The tensors of the library's state of a parameter, in state_shapes' order; none before its first step."""
    return (
        [
            state["exp_avg"],
            state["exp_avg_sq"],
            *(m for name in ("GG", "Q") for m in state[name] if len(m)),
        ]
        if state
        else []
    )


def _state(group, tensors):
    """The library's state of a parameter made of `tensors`, in state_shapes' order; a side without preconditioner is an empty list."""
    tensors, (p,) = iter(tensors), group["params"]
    keep = [d <= group["max_precondition_dim"] for d in p.shape] if p.ndim > 1 else [False]
    beta = group["betas"][1] if group["shampoo_beta"] is None else group["shampoo_beta"]
    state = {
        "exp_avg": next(tensors),
        "exp_avg_sq": next(tensors),
        "precondition_frequency": group["precondition_frequency"],
        "shampoo_beta": beta,
    }
    return state | {name: [next(tensors) if kept else [] for kept in keep] for name in ("GG", "Q")}


# ---- activations, and what to say when memory does not suffice


def recompute_activations(model, on=True):
    """Keep of every layer its input alone and compute the rest again in backward(); the gradients are the same.

    transformers does so in layers that are in training mode; only they are put in it, not the dropout inside them. A model without such layers is
    left as it is.
    """
    layers = [
        module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    if layers and on:
        model.activation_checkpointing_enable({"use_reentrant": False})
    elif layers:
        model.activation_checkpointing_disable()
    for layer in layers:
        layer.training = on


def names_memory_flags(main):
    """Decorator of main(args): where memory runs out, an InputError that names the flags to lower."""

    @functools.wraps(main)
    def told(args):
        try:
            return main(args)
        except (
            MemoryError,
            RuntimeError,
        ) as error:  # torch.OutOfMemoryError is a RuntimeError, and so is what the CPU's allocator raises
            said = re.search("not enough memory|can't allocate memory|out of memory", str(error))
            if not said and not isinstance(error, (MemoryError, torch.OutOfMemoryError)):
                raise
            gb = (
                "as much as was free"
                if args.optimizer_memory_gb is None
                else f"{args.optimizer_memory_gb:g}"
            )
            raise cli.InputError(
                f"out of memory; lower --micro-batch-tokens (now {args.micro_batch_tokens}) or --optimizer-memory-gb (now {gb}); "
                f"--plan says what fits ({cli.first_line(error)[:150]})"
            ) from None

    return told
