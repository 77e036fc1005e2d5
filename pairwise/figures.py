"""The matplotlib figures of a run, in the style of pairwise/drawing.py.

A function draws one figure and returns it, or None where there is nothing to draw. The numbers come
from metrics.json as evaluate.py wrote it: nothing is computed here but bins and a running mean.
"""

import itertools
import re
import unicodedata

from pairwise import drawing, theory

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

NARROW, WIDE = 3.4, 7.0  # One and two columns of a paper, in inches.
# Colour-blind readers can tell these apart, and line styles differ too.
INK, BLUE, ORANGE, GREEN, GREY = "black", "#0072B2", "#D55E00", "#00795a", "#777777"
BAR = "#6f8fae"

FLOOR = "floor of any single deterministic reward"
SCALED, HARDENED = "single soft model scaled", "soft model that was hardened"
# What the ensemble is compared with: name, key in metrics["splits"]["test"], key of the same
# against the true fractions, how it is computed.
REFERENCES = [
    (FLOOR, "floor_single", "floor_true", "mean min(p, 1-p)^2"),
    ("coin flip", "coin_flip", "coin_true", "p_hat = 1/2 for every pair"),
    ("single soft model", "soft_single", "soft_true", "sigmoid(r1(y1) - r1(y2)) of member 1"),
    (SCALED, "soft_scaled", "soft_scaled_true", "a + (1-2a) sigmoid(tau (r1(y1) - r1(y2)))"),
    (HARDENED, "soft_hardened", "soft_hardened_true", "what the members' steps follow"),
    ("irreducible error C_hat", "irreducible", None, "the true fractions' own score"),
]
REFERENCE_STYLES = {  # by the first key
    "floor_single": {"color": ORANGE, "lw": 1.1},
    "coin_flip": {"color": GREEN, "lw": 1.1, "ls": (0, (6, 2))},
    "soft_single": {"color": BLUE, "lw": 1.1, "ls": (0, (4, 1.5, 1, 1.5))},
    "soft_scaled": {"color": "#CC79A7", "lw": 1.1, "ls": (0, (7, 1.5, 1, 1.5, 1, 1.5))},
    "soft_hardened": {"color": "#8a6d00", "lw": 1.1, "ls": (0, (2.5, 1.2))},
    "irreducible": {"color": INK, "lw": 1, "ls": (0, (1, 1.5))},
}


def num(x, none="–", digits=4):
    """Write x with `digits` decimals and no zero before the point, .0945; None becomes `none`."""
    if x is None:
        return none
    text = f"{round(x, digits) + 0.0:.{digits}f}"  # -0.0 + 0.0 is 0.0, without a minus.
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def short(x):
    """Write x with two decimals, .25; an exact zero as 0, and what rounds to zero as .00."""
    return "0" if x == 0 else pretty(num(x, digits=2))


def pretty(text):
    """Write plain-text mathematics as a page or a figure shows it."""
    text = text.replace("p_hat", "p̂").replace("C_hat", "Ĉ")
    text = text.replace("^2", "²").replace(" - ", " − ")
    return re.sub(r"(?<![\w-])-(?=\.?\d)", "−", text)  # the sign of a number


def escaped(text):
    """Write the control characters and the like of a user's text, which no figure can show, as
    escapes. Where it is drawn, parse_math=False keeps its dollars."""
    unseen = "Cc", "Cs", "Cn"  # control, surrogate, not assigned
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in unseen else c
        for c in text
    )


def drawable(name, most=30):
    """Shorten a name of the user's for a figure, after `escaped`."""
    name = escaped(name)
    return name if len(name) <= most else f"{name[: most - 1]}…"


def subplots(width, height, *shape, **options):
    fig = Figure(figsize=(width, height), layout="constrained")
    return fig, fig.subplots(*shape, **options)


def grid(count, height, rest, **options):
    """Return a figure and its axes, at most four in a row, of which `count` are shown; rows are
    `height` inches tall and leave `rest` for a legend."""
    columns = min(4, count)
    rows = -(-count // columns)
    shape = NARROW if columns < 3 else WIDE, rest + height * rows, rows, columns
    fig, panels = subplots(*shape, squeeze=False, **options)
    for axes in panels.flat[count:]:
        axes.set_visible(False)
    return fig, panels


def axes_at(fig, left, bottom, width, height):
    """Add axes at a place given in inches."""
    wide, tall = fig.get_size_inches()
    return fig.add_axes([left / wide, bottom / tall, width / wide, height / tall])


# ---- calibration error against k


def calibration(split, chosen):
    """Error of the first k members against k; two panels where the true fractions are known.

    split: metrics["splits"]["test"]; chosen: the k to mark, or None. Below a panel stands a legend
    with the values of its reference lines, because labels beside nearly equal lines would collide.
    """
    simulated = split["ensemble"][-1]["true_error"] is not None
    lines = sum(split.get(key) is not None for _, key, _, _ in REFERENCES)
    legend_height = 0.13 * (3 + (chosen is not None) + lines)
    wide, tall = WIDE if simulated else NARROW, 2.65 + legend_height
    fig = Figure(figsize=(wide, tall))
    bottom = legend_height + 0.48
    for left, against_truth in ((0, False), (NARROW + 0.15, True))[: 1 + simulated]:
        axes = axes_at(fig, left + 0.66, bottom, 2.64, tall - bottom - 0.25)
        error_panel(axes, split, chosen, against_truth)
        corner = (left + 0.3) / wide, (bottom - 0.42) / tall
        spacing = {"borderaxespad": 0, "borderpad": 0, "labelspacing": 0.3}
        handles = axes.get_legend_handles_labels()
        fig.legend(*handles, loc="upper left", bbox_to_anchor=corner, **spacing)
    return fig


def error_panel(axes, split, chosen, against_truth):
    """Draw the error against the votes (the Brier score) or against the true fractions."""
    ensemble = split["ensemble"]
    sizes = np.array([entry["k"] for entry in ensemble])
    if against_truth:
        axes.set_ylabel("true error")
        title, bound, c = "against the true fractions", "Theorem 2: 1/(4k)", 0
        error, soft, bars = [entry["true_error"] for entry in ensemble], [], []
    else:
        axes.set_ylabel("calibration error (Brier score)")
        title, bound = "against the annotators' votes", "Theorem 2: 1/(4k) + Ĉ"
        c = split["irreducible"]
        error = [entry["brier"] for entry in ensemble]
        soft = [entry["brier_soft"] for entry in ensemble]
        bars = [entry["brier_ci"] for entry in ensemble if entry["brier_ci"]]  # all, or none
    lines = {
        key: split.get(true_key if against_truth else key) for _, key, true_key, _ in REFERENCES
    }
    lines = {key: value for key, value in lines.items() if value is not None}
    # The left corner above the axes is for the exponent of tiny values.
    axes.set_title(title, loc="center", y=1.03, pad=0)
    scale(axes, sizes, [*error, *soft, *itertools.chain(*bars), *lines.values()])

    for k, limits in zip(sizes, bars):
        axes.plot([k] * 2, limits, color=INK, lw=0.7, marker="_", ms=4, zorder=4)
    label = "ensemble" + (", 95 % interval" if bars else "")
    axes.plot(sizes, error, "o-", color=INK, ms=3.5, lw=1.4, zorder=5, label=label)
    if chosen is not None:
        ring = {"mfc": "none", "mec": INK, "mew": 0.8, "ms": 8, "ls": "none", "zorder": 6}
        label = f"k = {chosen}: best on validation prompts"
        axes.plot(chosen, error[list(sizes).index(chosen)], "o", label=label, **ring)
    if soft:
        label = "the same mixture with soft votes"
        axes.plot(sizes, soft, "s-", color=BLUE, ms=2.2, lw=0.7, zorder=4, label=label)
    labels = {key: pretty(name) for name, key, _, _ in REFERENCES}
    labels["floor_single"] = "single deterministic reward (shaded): at least"
    for key, value in lines.items():
        label = f"{labels[key]} {num(value)}"
        axes.axhline(value, label=label, zorder=3, **REFERENCE_STYLES[key])
    low, high = axes.get_ylim()
    axes.axhspan(low, lines["floor_single"], color="#f0e9d2", lw=0, zorder=0)
    # The bound at k = 1 would flatten everything else, so it is drawn only where it fits.
    if c is not None and theory.theorem2(sizes[-1], c) < high:
        fine = np.linspace(sizes[0], sizes[-1] + 0.5, 200)
        style = {"color": GREY, "lw": 1, "ls": (0, (5, 1.5, 1, 1.5, 1, 1.5)), "zorder": 3}
        axes.plot(fine, theory.theorem2(fine, c), label=bound, **style)


def scale(axes, sizes, shown):
    """Set limits and ticks so that all values in `shown` fit, with at most ten ticks for k."""
    pad = 0.06 * np.ptp(shown) or 0.1 * max(shown) or 0.01
    low, high = max(min(shown) - pad, -0.3 * pad), max(shown) + pad
    axes.set(xlim=(sizes[0] - 0.5, sizes[-1] + 0.5), ylim=(low, high), xlabel="ensemble size k")
    step = -(-len(sizes) // 10)
    axes.set_xticks([k for k in sizes if k % step == 0])
    axes.set_yticks([y for y in MaxNLocator(6).tick_values(low, high) if max(0, low) <= y <= high])


# ---- matrices whose columns are the members


def kendall(diversity):
    """Kendall tau of every two members; diversity: metrics["diversity"], or None."""
    tau = np.array(diversity["kendall_tau"] if diversity else [], dtype=float)
    if not np.isfinite(tau).any():
        return None
    low = np.floor(10 * np.min(tau, where=np.isfinite(tau), initial=0)) / 10
    title = pretty(f"Kendall τ, colours from {low:g} to 1")
    return matrix(tau, low, 1.0, title, "member", range(1, len(tau) + 1))


def wins(diversity):
    """How high the favourite of one member (row) stands with another (column)."""
    if not diversity or diversity["win"][0][0] is None:
        return None
    labels = "share of the others ranked below", "favourite of member"
    return matrix(diversity["win"], 0.0, 1.0, *labels, range(1, len(diversity["win"]) + 1))


def mixture_weights(weights):
    """The weights of the first k members, a row for every k; weights: weights.json."""
    size = max(len(entry["alpha"]) for entry in weights)
    alpha = [entry["alpha"] + [None] * (size - len(entry["alpha"])) for entry in weights]
    # The large weights of the first rows would leave the others pale, so colours end earlier.
    several = [a for entry in weights for a in entry["alpha"] if len(entry["alpha"]) > 1 and a > 0]
    high = float(np.ceil(20 * np.quantile(several or [1.0], 0.9)) / 20)
    title = f"weights in the ensemble of size k, colours from 0 to {short(high)}"
    return matrix(alpha, 0.0, high, title, "k", [entry["k"] for entry in weights])


def matrix(values, low, high, title, ylabel, rows):
    """Draw values (n, m) as colours from low to high, a column for each of m members.

    None or NaN stands where there is no number; rows: the labels of the n rows.
    """
    values = np.array(values, dtype=float)
    n, m = values.shape
    wide = NARROW if m <= 10 else WIDE
    width = min((wide - 1.15) / m, 0.5)  # of a cell, in inches
    height = min(width, 0.24 if m > 10 else 0.32)
    tall, left = n * height + 0.75, 0.5 + (wide - 1.15 - m * width) / 2
    fig = Figure(figsize=(wide, tall))
    axes = axes_at(fig, left, 0.45, m * width, n * height)
    mesh = cells(axes, values, low, high, rows, 6 if width < 0.35 else 7)
    axes.set(xlabel="member", ylabel=ylabel)
    fig.text(0.5, 1 - 0.08 / tall, title, va="top", ha="center")
    side = axes_at(fig, left + m * width + 0.08, 0.45, 0.09, n * height)
    ticks = [low, high] if n < 3 else [low, (low + high) / 2, high]
    bar = fig.colorbar(mesh, cax=side, ticks=ticks, format=lambda x, _: short(x))
    bar.outline.set_linewidth(0.4)
    return fig


def cells(axes, values, low, high, rows, fontsize):
    """Draw the cells of `matrix` on axes; returns what a colour bar is made of."""
    n, m = values.shape
    edges = np.arange(m + 1) + 0.5, np.arange(n + 1) + 0.5
    options = {"cmap": "Blues", "vmin": low, "vmax": high, "edgecolors": "white", "lw": 0.8}
    mesh = axes.pcolormesh(*edges, np.ma.masked_invalid(values), **options)
    axes.set(ylim=(n + 0.5, 0.5))
    step = -(-max(m, n) // 24)
    axes.set_xticks(range(1, m + 1, step))
    axes.set_yticks(range(1, n + 1, step), list(rows)[::step])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if step == 1:  # Beyond 24 members the numbers would be too small to read.
        text = {"ha": "center", "va": "center_baseline", "fontsize": fontsize}
        for (i, j), x in np.ndenumerate(values):
            if not np.isnan(x):
                color = "white" if x - low > 0.55 * (high - low) else INK
                axes.text(j + 1, i + 1, short(x), color=color, **text)
    return mesh


# ---- votes and predictions


def majority_bins(majority):
    """(counts, edges) of ten bins from .5 to 1 for majority shares (pairs,).

    Each bin is closed on the left, so that .55, .6, .. open one: its edge is moved a little to the
    left, and rounding cannot move a share across it.
    """
    edges = np.linspace(0.5, 1, 11) - 1e-6 * (np.arange(11) < 10)
    return np.histogram(np.round(majority, 9), edges)


def majority_shares(p):
    """Percentage of pairs by majority share max(p, 1 - p); p (pairs,): shares of annotators."""
    fig, axes = subplots(NARROW, 2.2)
    share_bars(axes, *majority_bars(p))
    axes.set(xlabel="majority share max(p, 1 − p)", ylabel="pairs (%)")
    axes.set_title(f"{len(p)} pairs, mean {num(float(np.maximum(p, 1 - p).mean()))}")
    return fig


def majority_bars(p):
    """Return places, heights (percent of the pairs) and width of the bars of majority shares, which
    take a few values only where annotators are few: each has its own bar."""
    majority = np.round(np.maximum(p, 1 - p), 9)
    values, counts = np.unique(majority, return_counts=True)
    width = min(0.8 * np.diff(values).min(initial=1), 0.04)
    if len(values) > 12:
        counts, edges = majority_bins(majority)
        values, width = edges[:-1] + 0.025, 0.05
    return values, 100 * counts / len(p), width


def share_bars(axes, values, height, width):
    """Draw the bars of `majority_bars`."""
    axes.bar(values, height, width, color=BAR, edgecolor=INK, lw=0.5)
    if np.diff(values).min(initial=1) > 0.045:  # There is room for numbers over bars.
        for x, y in zip(values, height):
            text = f"{y:.0f}" if y >= 1 else "<1" if y else ""
            above = y + 0.015 * height.max()
            axes.text(x, above, text, ha="center", va="bottom", fontsize=7)
    axes.set(xlim=(0.465, 1.035), ylim=(0, 1.12 * height.max()), xticks=np.arange(5, 11) / 10)


def write_votes(p, stem):
    """Write the figure `majority_shares` as stem.png and stem.pdf, for data preparation."""
    with drawing.style():
        drawing.save(majority_shares(p), stem)


def reliability(p, p_hat):
    """Mean p where the ensemble says p_hat; p, p_hat (pairs,).

    Each pair counts in both orders, because which response stands first means nothing.
    """
    x, y = np.round(np.concatenate([p_hat, 1 - p_hat]), 9), np.concatenate([p, 1 - p])
    centre, group = np.unique(x, return_inverse=True)
    width = min(0.04, 0.8 * np.diff(centre).min(initial=1))
    binned = len(centre) > 12
    if binned:  # The number of bins is odd: 1/2 is the middle of one, not an edge.
        bins, group = np.unique(np.minimum((x * 11).astype(int), 10), return_inverse=True)
        centre, width = (bins + 0.5) / 11, 1 / 11
    count = np.bincount(group)
    mean_x, mean_y = np.bincount(group, x) / count, np.bincount(group, y) / count
    spread = np.sqrt(np.maximum(np.bincount(group, y * y) / count - mean_y**2, 0))

    fig, (axes, below) = subplots(NARROW, 3.7, 2, 1, sharex=True, height_ratios=[4, 1])
    axes.plot([0, 1], [0, 1], color=GREY, lw=0.8, ls=(0, (4, 2)), label=r"$p = \hat{p}$")
    low, high = np.maximum(mean_y - spread, 0), np.minimum(mean_y + spread, 1)
    axes.vlines(mean_x, low, high, color="#999999", lw=1, label="± one s.d. of p")
    label = "mean p" + (" (11 bins)" if binned else "")
    marks = {"color": BLUE, "mec": INK, "mew": 0.5, "ms": 4, "lw": 1}
    axes.plot(mean_x, mean_y, "o-" if len(mean_x) > 1 else "o", label=label, **marks)
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), ylabel="annotators' share p")
    percent = 100 * count / len(x)
    below.bar(centre, percent, max(width, 0.006), color=BAR, edgecolor=INK, lw=0.4)
    below.set(xlabel=r"ensemble's share $\hat{p}$", ylabel="pairs (%)")
    below.yaxis.set_major_locator(MaxNLocator(3))
    handles, look = axes.get_legend_handles_labels(), {"ncols": 3, "columnspacing": 1.2}
    fig.legend(*handles, loc="outside lower center", **look)
    return fig


# ---- policies and training


def policies(diversity):
    """How far the mixture of policies is from the members' votes; beta falls from left to right."""
    policy = diversity and diversity["policy"]
    if not policy or None in policy["distance"]:  # No prompt has two continuations that differ.
        return None
    beta, distance, limits = (np.array(policy[x]) for x in ("beta", "distance", "distance_ci"))
    fig, axes = subplots(NARROW, 2.3)
    if None not in limits:
        axes.fill_between(beta, *limits.T, color=BLUE, alpha=0.2, lw=0, label="95 % interval")
    axes.plot(beta, distance, "o-", color=INK, ms=3, lw=1.2, label=r"mean $|\bar{p} - \hat{p}|$")
    axes.set(xscale="log", xlim=(beta.max() * 1.5, beta.min() / 1.5), ylim=(0, None))
    axes.set(xlabel=r"$\beta$, from soft to hard", ylabel="distance from the votes")
    axes.legend(loc="lower left")
    return fig


def training(logs):
    """A panel per member: running mean of the loss over pairs seen, and single steps behind it.

    logs: {title: the lines of a log}.
    """
    logs = {title: lines for title, lines in logs.items() if lines}
    if not logs:
        return None
    fig, panels = grid(len(logs), 1.25, 0.5, sharex=True, sharey=True)
    for axes, (title, lines) in zip(panels.flat, logs.items()):
        loss = np.array([line["loss"] for line in lines])
        pairs = np.cumsum([line["pairs"] for line in lines])
        # At most 400 points are drawn: a long run would make the embedded figure heavy.
        drawn = np.unique(np.linspace(0, len(loss) - 1, 400).astype(int))
        window = np.ones(max(len(loss) // 8, 1))
        weight = np.convolve(np.ones(len(loss)), window, "same")  # It is less at the two ends.
        smooth = np.convolve(loss, window, "same") / weight
        axes.plot(pairs[drawn], loss[drawn], color="#b0b0b0", lw=0.5)
        axes.plot(pairs[drawn], smooth[drawn], color=INK, lw=1.2)
        axes.set_title(title)
        axes.xaxis.set_major_locator(MaxNLocator(3))
    panels[0, 0].set_ylim(bottom=0)
    fig.supxlabel("pairs seen", fontsize=8)
    fig.supylabel("training loss", fontsize=8)
    return fig
