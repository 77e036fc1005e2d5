"""Recomputed activations: a layer keeps its input alone, and backward() computes the rest again."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


@dataclass
class Room:
    """Bytes for the activations of a micro-batch; which layers fit is measured as they run."""

    nbytes: int  # for all
    layer: int  # that a layer keeps: first an estimate, then the most that one has taken
    allocated: Callable  # () -> bytes in use
    start: int = 0  # in use when the micro-batch began, and
    before: int = 0  # when the layer before began

    def begin(self):
        """Let a micro-batch begin, which may be more than one pass through the layers."""
        self.start = self.allocated()

    def has(self, inputs, is_first):
        """Return whether the next layer fits whole: beside the inputs (bytes) of all layers from it
        on, and one layer that is recomputed with as many bytes of gradients, so three layers'."""
        now = self.allocated()
        if not is_first:
            self.layer = max(self.layer, now - self.before)
        self.before = now
        return now - self.start + inputs + 3 * self.layer <= self.nbytes


def recompute_activations(model, on=True):
    """Keep of every layer its input alone, or, where on is a Room, of those that do not fit it.

    The gradients are the same, to the bit. A model without transformers' layers is left as it is.
    Their own switch is not used: it is for layers in training mode, where some have dropout."""
    layers = [x for x in model.modules() if isinstance(x, GradientCheckpointingLayer)]
    for number, layer in enumerate(layers):
        vars(layer).pop("forward", None)
        if on:
            room, rest = on if isinstance(on, Room) else None, len(layers) - number
            layer.forward = functools.partial(_forward, layer.forward, room, rest, number == 0)


def _forward(forward, room, rest, is_first, *args, **kwargs):
    """Run a layer; rest: the number of layers from this one on."""
    hidden = next(iter((*args, *kwargs.values())))
    if not torch.is_grad_enabled() or (room and room.has(rest * hidden.nbytes, is_first)):
        return forward(*args, **kwargs)
    # Without dropout there is nothing random to draw again.
    options = {"use_reentrant": False, "preserve_rng_state": False, "determinism_check": "none"}
    return checkpoint(forward, *args, **options, **kwargs)
