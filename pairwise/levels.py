"""Hardened members: formulas over the rewards of a trained run, applied to any responses, no torch.

RUN/members.json is {"source": the trained run, relative to RUN, "members": [formula, ..]}. With
u = scale r_member, level = floor((u + offset) / width) and rest in [0, 1) what that division
leaves, the reward of a formula is

    u                                        where width is null
    width (level + 1 - rest)                 where taste is null: levels are ordered as in u, and
                                             inside a level the order of u is reversed
    width (level + sigmoid(t r_taste))       t = taste_scale: inside a level the order is that of
                                             the member `taste` (t < 0: reversed)
"""

import os

from pairwise import cli, files, manifest, run_dir

import numpy as np
from scipy.special import expit

OPTIONAL = (*files.NUMBER, type(None))
FORMULA = {"member": int, "scale": files.NUMBER, "width": OPTIONAL, "offset": files.NUMBER}
FORMULA |= {"taste": (int, type(None)), "taste_scale": OPTIONAL}
MEMBERS = {"source": str, "members": [FORMULA]}


def formula(member, scale, width=None, offset=0.0, taste=None, taste_scale=None):
    """Return one entry of members.json; member and taste count from 1."""
    levels = {"width": width, "offset": offset, "taste": taste, "taste_scale": taste_scale}
    return {"member": member, "scale": scale} | levels


def hardened(formulas, rewards):
    """Return the rewards of k formulas, float32 (k, *shape); rewards: the members', (K, *shape)."""
    return np.stack([_apply(entry, rewards.astype(np.float64)) for entry in formulas])


def _apply(entry, rewards):
    u = entry["scale"] * rewards[entry["member"] - 1]
    if entry["width"] is None:
        return u.astype(np.float32)
    quotient = (u + entry["offset"]) / entry["width"]
    level = np.floor(quotient)
    if entry["taste"] is None:
        inside = level + 1 - quotient
    else:
        inside = expit(entry["taste_scale"] * rewards[entry["taste"] - 1])
    # Clipping to (0, 1) keeps a taste in its level. The grid is one that float32 holds at this
    # level even after the product: where rounding makes two responses tie for a taste, they tie for
    # its opposite too, and the two votes still cancel.
    grid = 4 * np.spacing((np.abs(level) + 1).astype(np.float32)).astype(np.float64)
    inside = np.clip(np.round(inside / grid) * grid, grid, 1 - grid)
    return (entry["width"] * (level + inside)).astype(np.float32)


def read_members(run):
    """Return (source run, formulas) of a hardened run.

    Raises InputError where members.json is not what harden.py writes, or its source is missing, or
    hardened itself."""
    path = run / "members.json"
    manifest.check(run, path)
    content = files.read_json(path, MEMBERS)
    source, formulas = run / content["source"], content["members"]
    if not (source / "rewards").is_dir():
        words = "no run directory; the run whose rewards were hardened expected"
        raise cli.InputError(f"{path}: source {os.path.normpath(source)}: {words}")
    if source.resolve() == run.resolve():
        raise cli.InputError(f"{path}: source: the run itself found, another run expected")
    if (kind := run_dir.kind_of(source)) in ("hardened", "pruned"):
        words = f"a {kind} run found; the one that it was made from expected"
        raise cli.InputError(f"{path}: source {os.path.normpath(source)}: {words}")
    k, trained = run_dir.count_members(run), run_dir.count_members(source)
    if len(formulas) != k:
        raise cli.InputError(f"{path}: {len(formulas)} formulas found, one for each of {k} members")
    for number, entry in enumerate(formulas):
        if wrong := _wrong(entry, trained):
            raise cli.InputError(f"{path}: members[{number}]: {wrong}; harden.py makes them")
    return source, formulas


def _wrong(entry, trained):
    """Return what is wrong with a formula over the rewards of `trained` members, else ""."""
    if entry.keys() != FORMULA.keys():
        return f"{', '.join(entry)} found, {', '.join(FORMULA)} expected"
    for name in ("member", "taste"):
        if entry[name] is not None and not 1 <= entry[name] <= trained:
            return f"{name} {entry[name]} found, a number from 1 to {trained} expected"
    for name in ("scale", "width", "offset", "taste_scale"):
        if entry[name] is not None and not abs(entry[name]) <= 1e30:  # NaN is not.
            return f"{name} {entry[name]} found, a finite number expected"
    if entry["width"] is not None and entry["width"] <= 0:
        return f"width {entry['width']} found, a number above 0 expected"
    if entry["taste"] is not None and entry["taste_scale"] is None:
        return "taste without taste_scale found"
    return ""
