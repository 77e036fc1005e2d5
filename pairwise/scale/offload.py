"""SOAP (Vyas et al., arXiv 2409.11321) within a memory budget.

The optimizer is the library's: this moves its tensors, and says how precise a GPU's products are.
What SOAP keeps beside a BF16 parameter of shape (a, b) is a float32 master and two moments (a, b),
and for every dimension d of at most max_precondition_dim a covariance GG and its eigenbasis Q, both
(d, d). What does not fit on the device lies in one block of host memory. In step() it is copied to
the device for its turn, one parameter at a time, while the one before it is computed and the one
before that is copied back.

Of several processes each owns some parameters: it alone has their masters and state, is sent their
gradients, steps them and sends the others the result.
"""

import contextlib
import functools
import json
import math
import os

from pairwise import cli
from pairwise.scale import parallel

import pytorch_optimizer
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

MAX_PRECONDITION_DIM = 4096  # This is the default of full training.
PAGED = {"paged": True}  # This stands for the state of a parameter whose turn it is not.
BUFFERS = 3  # One is filled, one computed on and one copied back: the link goes both ways at once.
ALIGN = 16  # Tensors begin at 64 bytes, as torch's do, so that the same instructions compute them.


def preconditioned_sides(shape, max_precondition_dim):
    """Return the sides of a parameter of that shape for which SOAP has a basis: of vectors none."""
    return [d for d in shape if d <= max_precondition_dim] if len(shape) > 1 else []


def state_shapes(shape, max_precondition_dim):
    """Return the shapes of the library's float32 state of a parameter of that shape.

    They are exp_avg, exp_avg_sq, then every GG, then every Q (SOAP.init_pre_conditioner).
    """
    squares = [(d, d) for d in preconditioned_sides(shape, max_precondition_dim)]
    return [tuple(shape)] * 2 + squares * 2


def aligned(numel):
    """Return the numbers that a tensor of numel numbers takes in memory."""
    return math.ceil(numel / ALIGN) * ALIGN


def choose_resident(sizes, budget):
    """Return the indices of the parameters whose master and state stay on the device, as a set.

    sizes: bytes of each; budget: bytes, None for no limit, of which the buffers, each as large as
    the largest of the others, are taken too. As many bytes stay as can: others move twice a step.
    """
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    if budget is None or sum(sizes) <= budget:
        return set(order)
    best, most = set(), 0
    # The largest that moves is order[k]: all before it stay, and after it those that fit.
    for k, largest in enumerate(order):
        chosen, buffers = set(order[:k]), BUFFERS * sizes[largest]
        used = sum(sizes[i] for i in chosen)
        for i in order[k + 1 :]:
            if buffers + used + sizes[i] <= budget:
                chosen.add(i)
                used += sizes[i]
        if buffers + used <= budget and used > most:
            best, most = chosen, used
    return best


def on_card(sizes, budget):
    """Return the bytes of the device that those take which stay there, with the buffers."""
    stay = choose_resident(sizes, budget)
    moved = [size for i, size in enumerate(sizes) if i not in stay]
    return sum(sizes) - sum(moved) + BUFFERS * max(moved, default=0)


@contextlib.contextmanager
def _tf32(on):
    """Let 11 bits of their factors count in a GPU's float32 products, which is eight times as fast,
    or all 24."""
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


class SOAP(pytorch_optimizer.SOAP):
    """The library's, with new bases from products in float32, whatever the others are in.

    Their estimates of the eigenvalues order the columns, and exp_avg_sq with them. In TF32 those
    below a thousandth of the largest are noise, and some negative."""

    def get_orthogonal_matrix_qr(self, *args, **options):
        with _tf32(False):
            return super().get_orthogonal_matrix_qr(*args, **options)


class TrainedParameter:
    """A parameter p, the float32 master that the optimizer knows, and its place in host memory.

    The master is p itself where p is float32. Resident parameters have no place on the host.
    """

    def __init__(self, p, dim):
        self.p, self.dim, self.master, self.host = p, dim, None, None
        self.has_master = p.dtype != torch.float32
        self.shapes = [tuple(p.shape)] * self.has_master + state_shapes(p.shape, dim)
        # A basis that the library left transposed stays so, for the same bits in products.
        self.strides = [None] * len(self.shapes)
        self.numbers = sum(aligned(math.prod(shape)) for shape in self.shapes)

    def views(self, flat):
        """Return (the master, None if it is p; the state) as views of flat, float32 (numbers,)."""
        tensors, at = [], 0
        for shape, stride in zip(self.shapes, self.strides):
            numbers = flat[at : at + math.prod(shape)]
            tensors.append(numbers.as_strided(shape, stride) if stride else numbers.view(shape))
            at += aligned(len(numbers))
        return (tensors[0], tensors[1:]) if self.has_master else (None, tensors)

    def keep_strides(self, strides):
        """Keep the strides of the library's state, where it has any yet."""
        if strides:
            self.strides[self.has_master :] = strides

    def value(self):
        """Return the master where it lies between steps."""
        paged = self.has_master and self.host is not None
        return self.views(self.host)[0] if paged else self.master.detach()

    def add_gradient(self, p):
        """Add p's gradient to the master's, in float32, and free it."""
        before = self.master.grad
        self.master.grad = p.grad.float() if before is None else before.add_(p.grad)
        p.grad = None


class Offload:
    """The optimizer of `groups` that make(groups) builds, with float32 masters and gradients.

    groups: [{"params", "max_precondition_dim"}, ..]; budget: bytes of the device for masters, state
    and buffers, None to keep all there; no number depends on it. nbytes: of masters and state.
    Raises InputError where host memory does not suffice.
    """

    def __init__(self, groups, make, budget=None):
        self.params = [
            TrainedParameter(p, group["max_precondition_dim"])
            for group in groups
            for p in group["params"]
        ]
        sizes = [param.numbers for param in self.params]
        self.nbytes = 4 * sum(q.numbers + q.p.numel() * (not q.has_master) for q in self.params)
        by_process = parallel.deal(range(len(sizes)), sizes)
        self.owners = {i: process for process, owned in enumerate(by_process) for i in owned}
        self.owned = by_process[parallel.rank()]
        resident = choose_resident([4 * sizes[i] for i in self.owned], budget)
        self.resident = [i for k, i in enumerate(self.owned) if k in resident]
        self.paged = [i for k, i in enumerate(self.owned) if k not in resident]
        self.device, self.calls = self.params[0].p.device, 0
        self.into = self.back = None
        if self.paged:  # Copies to the device and from it have streams of their own.
            self.into, self.back = _side_stream(self.device), _side_stream(self.device)
            self._allocate()
        for i, param in enumerate(self.params):
            param.master = self._make_master(i, param)
        self.hooks = [
            param.p.register_post_accumulate_grad_hook(param.add_gradient)
            for param in self.params
            if param.has_master
        ]
        # Every parameter is a group of its own, with its own count of steps.
        groups = [{"params": [q.master], "max_precondition_dim": q.dim} for q in self.params]
        self.optimizer = make(groups)
        self.groups = list(self.optimizer.param_groups)

    def _make_master(self, i, param):
        """Return parameter i's master; of a paged one, and of other processes', the shape alone."""
        if not param.has_master:
            return param.p
        if self.owners[i] != parallel.rank():
            return torch.zeros((), device=self.device).expand(param.p.shape)
        if param.host is None:
            return param.p.detach().float()
        param.views(param.host)[0].copy_(param.p.detach())
        return param.views(self.buffers[0])[0]

    def _allocate(self):
        """Allocate a block of host memory, and buffers on the device for the largest parameter."""
        paged = [self.params[i] for i in self.paged]
        need = 4 * sum(param.numbers for param in paged)
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // parallel.count_here()
        if need > have:
            raise cli.InputError(
                f"{need / 1e9:.0f} GB of host memory needed for the optimizer, {have / 1e9:.0f} GB "
                "are there; a larger --optimizer-memory-gb or a smaller --max-precondition-dim may "
                "do; extras/plan.py says what fits"
            )
        self.host = torch.empty(need // 4, dtype=torch.float32)
        if self.into:  # Memory that is allocated as pinned is rounded up to a power of two.
            place = (self.host.data_ptr(), self.host.nbytes, 0)
            if code := int(torch.cuda.cudart().cudaHostRegister(*place)):
                raise cli.InputError(
                    f"{self.host.nbytes / 2**30:.0f} GiB of host memory could not be pinned for "
                    f"the optimizer (CUDA error {code}); more memory or a larger "
                    "--optimizer-memory-gb may do"
                )
        for param, flat in zip(paged, self.host.split([param.numbers for param in paged])):
            param.host = flat
        largest = max(param.numbers for param in paged)
        self.buffers = [torch.empty(largest, device=self.device) for _ in range(BUFFERS)]
        # After these events a buffer is filled, and copied back.
        self.loaded, self.stored = [None] * BUFFERS, [None] * BUFFERS

    def gradients(self):
        """Return the float32 gradients of the parameters that this process owns, in their order."""
        masters = [self.params[i].master for i in self.owned]
        return [master.grad for master in masters if master.grad is not None]

    def sum_gradients(self):
        """Send the gradients' sums to the owners; a process without a gradient adds zero."""
        if parallel.count() == 1:
            return
        present = parallel.gathered([param.master.grad is not None for param in self.params])
        for i, anywhere in enumerate(map(any, zip(*present))):
            if anywhere:
                master = self.params[i].master
                total = master.grad
                if total is None:
                    total = torch.zeros(master.shape, device=self.device)
                dist.reduce(total, self.owners[i])
                master.grad = total if self.owners[i] == parallel.rank() else None

    def _broadcast(self):
        """Give all processes the parameters as their owners have them."""
        for i, param in enumerate(self.params if parallel.count() > 1 else []):
            dist.broadcast(param.p.detach(), self.owners[i])

    def step(self, lr):
        """Step all parameters with the gradients so far, and forget these."""
        for group in self.groups:
            group["lr"] = lr
        # The library's first call initialises the preconditioners, the second uses the gradient.
        calls = 1 if self.calls else 2
        self.calls += calls
        turns = len(self.paged)
        if turns:
            self._load(0)
        for turn in range(max(1, turns)):
            if turn + 1 < turns:
                self._load(turn + 1)
            # Every turn steps some of the residents, so that there is work while copies run.
            self._call(self.resident[turn :: turns or 1], calls)
            if turns:
                self._step_paged(turn, calls)
        with torch.no_grad():
            for i in self.resident:
                if self.params[i].has_master:
                    self.params[i].p.copy_(self.params[i].master)
        self._broadcast()
        for param in self.params:
            param.master.grad = None

    def _call(self, indices, calls):
        """Let the library step some parameters."""
        self.optimizer.param_groups = [self.groups[i] for i in indices]
        with _tf32(True):
            for _ in range(calls if indices else 0):
                self.optimizer.step()

    def _load(self, turn):
        """Copy a parameter to its buffer, when what was there (and so it too) is on the host."""
        param, buffer = self.params[self.paged[turn]], turn % BUFFERS
        if self.stored[buffer]:
            self.into.wait_event(self.stored[buffer])
        with torch.cuda.stream(self.into):  # A stream that is None has no effect.
            self.buffers[buffer][: param.numbers].copy_(param.host, non_blocking=True)
            self.loaded[buffer] = self.into.record_event() if self.into else None

    @torch.no_grad()
    def _step_paged(self, turn, calls):
        """Step the parameter that has been copied to its buffer, and copy it back."""
        i, state, buffer = self.paged[turn], self.optimizer.state, turn % BUFFERS
        param = self.params[i]
        flat = self.buffers[buffer][: param.numbers]
        if self.into:
            torch.cuda.current_stream(self.device).wait_event(self.loaded[buffer])
        master, before = param.views(flat)
        if param.has_master:
            param.master.data = master
        if param.master in state:
            state[param.master] = _state_of(self.groups[i], before)
        self._call([i], calls)
        after = _tensors(state.get(param.master))
        param.keep_strides([tensor.stride() for tensor in after])
        # Most state is changed in place; the first call's and new bases are the library's tensors.
        for tensor, old, view in zip(after, before, param.views(flat)[1]):
            if tensor is not old:
                view.copy_(tensor)
        if after:  # The views will be the next parameter's, and the library's tensors are freed.
            state[param.master] = PAGED
        if param.has_master:
            param.p.copy_(param.master)
        if self.back:
            self.back.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.back):
            param.host.copy_(flat, non_blocking=True)
            self.stored[buffer] = self.back.record_event() if self.back else None

    def close(self):
        """Take no more gradients, and pin no more memory."""
        for hook in self.hooks:
            hook.remove()
        if self.back:
            self.back.synchronize()
            torch.cuda.cudart().cudaHostUnregister(self.host.data_ptr())

    def save(self, directory):
        """Write what this process owns, a file a parameter; return facts for load(), in JSON."""
        if self.back:
            self.back.synchronize()
        for i in self.owned:
            param = self.params[i]
            if param.host is None:
                state = _tensors(self.optimizer.state.get(param.master))
            else:
                state = param.views(param.host)[1] if param.strides[-1] else []
            tensors = {"master": param.value().contiguous()}
            for k, tensor in enumerate(state):  # as it lies in memory
                tensors[f"state {k}"] = tensor.as_strided((tensor.numel(),), (1,))
            strides = json.dumps([tensor.stride() for tensor in state])
            save_file(tensors, directory / f"{i:04d}.safetensors", {"strides": strides})
        return {"calls": self.calls}

    @torch.no_grad()
    def load(self, directory, facts):
        """Take up what save() wrote and returned, whatever the budgets and processes were then."""
        self.calls = facts["calls"]
        for i in self.owned:
            param, group = self.params[i], self.groups[i]
            group["step"] = self.calls
            with safe_open(directory / f"{i:04d}.safetensors", "pt") as file:
                strides = [tuple(stride) for stride in json.loads(file.metadata()["strides"])]
                param.keep_strides(strides)
                if param.host is None:
                    layouts = zip(param.shapes[param.has_master :], strides)
                    state = [torch.empty_strided(*layout, device=self.device) for layout in layouts]
                else:
                    state = param.views(param.host)[1]
                param.value().copy_(file.get_tensor("master"))
                param.p.copy_(param.value())
                for k, tensor in enumerate(state if strides else []):
                    tensor.as_strided((tensor.numel(),), (1,)).copy_(file.get_tensor(f"state {k}"))
            if strides:
                paged = param.host is not None
                self.optimizer.state[param.master] = PAGED if paged else _state_of(group, state)
        self._broadcast()


def _side_stream(device):
    """Return a stream for copies beside the computation; None on a CPU, which does all in turn."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def _tensors(state):
    """Return the tensors of the library's state of a parameter, in state_shapes' order."""
    if not state:  # It has none before the first step.
        return []
    matrices = [matrix for name in ("GG", "Q") for matrix in state[name] if len(matrix)]
    return [state["exp_avg"], state["exp_avg_sq"], *matrices]


def _state_of(group, tensors):
    """Return the library's state of a parameter made of `tensors`, in state_shapes' order."""
    tensors, (p,) = iter(tensors), group["params"]
    has_matrix = [d <= group["max_precondition_dim"] for d in p.shape] if p.ndim > 1 else [False]
    beta = group["betas"][1] if group["shampoo_beta"] is None else group["shampoo_beta"]
    state = {
        "exp_avg": next(tensors),
        "exp_avg_sq": next(tensors),
        "precondition_frequency": group["precondition_frequency"],
        "shampoo_beta": beta,
    }
    for name in ("GG", "Q"):  # A side without a preconditioner is an empty list.
        state[name] = [next(tensors) if present else [] for present in has_matrix]
    return state


def names_memory_flags(main):
    """Decorate main(args): where memory runs out, an InputError names the flags to lower."""

    @functools.wraps(main)
    def wrapped(args):
        try:
            return main(args)
        except (MemoryError, RuntimeError) as error:
            if not cli.lacks_memory(error):
                raise
            flags = f"--micro-batch-tokens (now {args.micro_batch_tokens})"
            if hasattr(args, "optimizer_memory_gb"):  # a script that trains
                gb = args.optimizer_memory_gb
                gb = "as much as was free" if gb is None else f"{gb:g}"
                flags += f" or --optimizer-memory-gb (now {gb}); extras/plan.py says what fits"
            line = cli.first_line(error)[:150]
            raise cli.InputError(f"out of memory; lower {flags} ({line})") from None

    return wrapped
