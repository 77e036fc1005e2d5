"""Hardened members: formulas over the rewards of a trained run, and what they give for any responses. Without torch.

RUN/members.json: {"source": the trained run, relative to RUN, "members": [formula, ..]}, a formula of u = scale r_member being

    width null                 u itself
    taste null                 width (level + 1 - rest), level = floor((u + offset) / width) and rest what that leaves, in [0, 1): levels as in u,
                               inside a level the order of u reversed
    taste i, taste_scale t     width (level + sigmoid(t r_i)): inside a level the order of member i (t < 0: reversed)
"""

import os

import numpy as np
from scipy.special import expit

from pairwise import cli, run_dir

FIELDS = {"member", "scale", "width", "offset", "taste", "taste_scale"}


def formula(member, scale, width=None, offset=0.0, taste=None, taste_scale=None):
    """One entry of members.json; member and taste count from 1."""
    return {
        "member": member,
        "scale": scale,
        "width": width,
        "offset": offset,
        "taste": taste,
        "taste_scale": taste_scale,
    }


def hardened(formulas, rewards):
    """float32 (k, *shape): the formulas' rewards; rewards float32 (K, *shape): the trained members'."""
    return np.stack([_apply(f, rewards.astype(np.float64)) for f in formulas])


def _apply(f, rewards):
    u = f["scale"] * rewards[f["member"] - 1]
    if f["width"] is None:
        return u.astype(np.float32)
    level = np.floor((u + f["offset"]) / f["width"])
    inside = (
        level + 1 - (u + f["offset"]) / f["width"]
        if f["taste"] is None
        else expit(f["taste_scale"] * rewards[f["taste"] - 1])
    )
    # In (0, 1), so that no taste leaves its level, and on a grid that float32 holds at this level even after the product: where rounding makes two
    # responses tie for a taste, they tie for its opposite too, and the votes still cancel.
    grid = 4 * np.spacing((np.abs(level) + 1).astype(np.float32)).astype(np.float64)
    return (f["width"] * (level + np.clip(np.round(inside / grid) * grid, grid, 1 - grid))).astype(
        np.float32
    )


def read_members(run):
    """(source run, formulas) of a hardened run, or None for a trained one. Raises InputError where members.json is not what harden.py writes."""
    path = run / "members.json"
    if not path.exists():
        return None
    found = run_dir.read_json(path)
    try:
        source, formulas = run / found["source"], found["members"]
        whole = len(formulas) > 0 and all(set(f) == FIELDS for f in formulas)
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise cli.InputError(
            f"{path}: {{source, members: [formula, ..]}} expected; harden.py makes it"
        )
    if not (source / "rewards").is_dir():
        raise cli.InputError(
            f"{path}: source {os.path.normpath(source)}: no run directory; the run whose rewards were hardened expected"
        )
    return source, formulas
