"""Rewards of more sequences than one forward pass can hold, with gradients that take its memory."""

import numpy as np
import torch


def in_several(run, groups, device):
    """Return the rewards of n sequences, float32 (n,) or (n, K), in the order of their indices.

    run(group) -> rewards of the sequences with these indices, in one pass; groups: lists of
    indices, every one once. backward() runs each group again and goes through it at once: a third
    more work, and the graph of one group is there at a time. Gradients are added up group by
    group, in float32 (offload.py)."""
    anchor = torch.empty(0, device=device, requires_grad=torch.is_grad_enabled())
    return InSeveralPasses.apply(anchor, run, groups)


class InSeveralPasses(torch.autograd.Function):
    """Rewards of groups of sequences; anchor is any tensor that wants a gradient, if one does."""

    @staticmethod
    def forward(ctx, anchor, run, groups):
        ctx.run, ctx.groups = run, groups
        return torch.cat([run(group) for group in groups])[np.argsort(np.concatenate(groups))]

    @staticmethod
    def backward(ctx, grad):
        for group in ctx.groups:
            with torch.enable_grad():
                ctx.run(group).backward(grad[group])
        return None, None, None
