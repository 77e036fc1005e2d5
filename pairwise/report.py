"""The figures, the result table and the HTML report of one run (evaluate.py calls `table` and `write`).

Everything here only shows numbers: they are computed in evaluate.py and come in as metrics.json's dictionary. No torch,
no network, no JavaScript; the figures are embedded, so report.html can be moved or mailed alone.
"""

import base64
import html
import io
import textwrap
from pathlib import Path

import jinja2
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pairwise import run_dir
from pairwise.theory import theorem2

NARROW, WIDE = 3.4, 7.0  # inches: one and two columns of a paper
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.titlelocation": "left",
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-3, 7),
    "legend.frameon": False,
    "legend.handlelength": 2.8,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "pdf.fonttype": 42,
    "svg.hashsalt": "pairwise",  # stable ids in the SVG
}
INK, BLUE, ORANGE, GREEN, GREY = (
    "black",
    "#0072B2",
    "#D55E00",
    "#00795a",
    "#777777",
)  # colour-blind safe; line styles differ too

# name, key in metrics, key against p_true, how it is computed
REFERENCES = [
    (
        "floor of any single deterministic reward",
        "floor_single",
        "floor_true",
        "mean min(p, 1-p)^2",
    ),
    ("coin flip", "coin_flip", "coin_true", "p_hat = 1/2 for every pair"),
    ("single soft model", "soft_single", "soft_true", "sigmoid(r1(y1) - r1(y2)) of member 1"),
    ("irreducible error C_hat", "irreducible", None, "the true fractions' own score"),
]
VOTES = {
    "sampled": "each pair's annotators are drawn from a population",
    "population": "the voters are the whole population",
    "dependent": "not independent draws, so the irreducible error is unknown",
}

COLUMNS = """Brier: mean (p_hat - p)^2, the pairwise calibration error; p: share of annotators, p_hat: weighted share of members that prefer the first
response. soft: the same before the members' votes are made hard. excess: Brier - C_hat. true err.: mean (p_hat - p_true)^2, where the truth is
known. L1: mean |p_hat - p|. r: Pearson's correlation of p_hat and p over both orders of every pair (higher is better). Phi: mean share of
annotators that the member votes against. regret: Phi beyond that of always siding with the majority. -: does not exist."""


def num(x, none="–"):
    """Four decimals, no zero before the point: .0945. None, where a number does not exist, gives `none`."""
    if x is None:
        return none
    text = f"{x:.4f}"
    text = text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text
    return ".0000" if text == "-.0000" else text


def interval(ci, none="–"):
    return none if ci is None or None in ci else f"[{num(ci[0])}, {num(ci[1])}]"


def short(x):
    """Two decimals, .25; 0 where it is exactly zero, and no minus before .00 (-0.0 + 0.0 is 0.0)."""
    return "0" if x == 0 else f"{round(x, 2) + 0.0:.2f}".replace("0.", ".", 1).replace("-", "−")


def pretty(text):
    """Plain-text mathematics as the report shows it."""
    return text.replace("p_hat", "p̂").replace("C_hat", "Ĉ").replace("^2", "²").replace(" - ", " − ")


def references(split):
    """Rows (name, Brier, its interval, error against p_true, how it is computed) of the reference lines; split is one of metrics["splits"]."""
    rows = [
        (name, split.get(key), split.get(f"{key}_ci"), split.get(true_key), how)
        for name, key, true_key, how in REFERENCES
    ]
    last = split["ensemble"][-1]
    if last.get("true_error") is not None:
        k, c = last["k"], split.get("irreducible")
        rows.append(
            (
                f"Theorem 2 at k = {k}",
                None if c is None else theorem2(k, c),
                None,
                theorem2(k),
                "some k-ensemble reaches 1/(4k) + C_hat",
            )
        )
    return rows


def several_sizes(split):
    """Whether there is a choice of k: weights from elsewhere have one."""
    return len(split["ensemble"]) > 1


def table(metrics, split="test"):
    """The result table in plain text, at most 100 columns."""
    s = metrics["splits"][split]
    n = lambda x: num(x, "-")
    title = (
        f"{metrics['dataset']}, {split} split: {s['prompts']} prompts, {s['pairs']} pairs, {s['annotators_mean']:.1f} votes a pair. "
        "All errors: lower is better."
    )
    lines = [
        *textwrap.wrap(title, 100),
        "",
        f"{'k':>3}  {'Brier':>6}  {'95 % interval':>14}  {'soft':>6}  {'excess':>6}  {'true err.':>9}  {'L1':>5}  "
        f"{'r':>6}  mixture weights",
    ]
    for e in s["ensemble"]:
        row = (
            f"{e['k']:>3}  {n(e['brier']):>6}  {interval(e.get('brier_ci'), '-'):>14}  {n(e.get('brier_soft')):>6}  "
            f"{n(e.get('excess')):>6}  {n(e.get('true_error')):>9}  {n(e.get('l1')):>5}  {n(e.get('pearson')):>6}  "
        )
        lines += textwrap.wrap(
            " ".join(short(a).ljust(3) for a in e["alpha"]),
            100,
            initial_indent=row,
            subsequent_indent=" " * len(row),
        )
    if several_sizes(s) and metrics.get("k_valid"):
        lines.append(
            f"on validation prompts the Brier score is least with k = {metrics['k_valid']}"
        )
    lines += ["", f"{'reference lines':<42}{'Brier':>6}  {'95 % interval':>14}  {'true err.':>9}"]
    lines += [
        f"{name:<42}{n(x):>6}  {interval(ci, '-'):>14}  {n(true):>9}"
        for name, x, ci, true, _ in references(s)
    ]
    lines += [
        "",
        f"{'member':>6}  {'Brier':>6}  {'Phi':>6}  {'95 % interval':>14}  {'regret':>6}  {'accuracy':>8}  (accuracy: unsuitable, for comparison with other work)",
    ]
    lines += [
        f"{m['j']:>6}  {n(m['brier']):>6}  {n(m['disagreement']):>6}  {interval(m.get('disagreement_ci'), '-'):>14}  {n(m['regret']):>6}  {n(m['accuracy']):>8}"
        for m in s["members"]
    ]
    return "\n".join(lines + ["", *textwrap.wrap(COLUMNS, 100)])


# Figures. Each returns a matplotlib Figure, or None where there is nothing to draw.


def subplots(width, height, *shape, **options):
    fig = Figure(figsize=(width, height), layout="constrained")
    return fig, fig.subplots(*shape, **options)


def error_panel(fig, left, e, soft, lines, bound, chosen, ylabel, title, rows):
    """Error against k, its reference lines, and below it a legend with their values, where nearly equal lines cannot collide.

    left: inches; e: list of (k, error, interval or None); soft: list of errors or None; lines: (label, value or None, style);
    bound: (label, function of k) or None; chosen: the k to mark, or None; rows: legend rows to leave room for. Placed by hand: every label has its own space.
    """
    height, bottom = fig.get_figheight(), 0.13 * rows + 0.48
    ax = fig.add_axes(
        [
            (left + 0.66) / fig.get_figwidth(),
            bottom / height,
            2.64 / fig.get_figwidth(),
            1 - (bottom + 0.25) / height,
        ]
    )
    ks, error = np.array([row[0] for row in e]), np.array([row[1] for row in e])
    bars = [(k, *ci) for k, _, ci in e if ci is not None and None not in ci]
    lines = [line for line in lines if line[1] is not None]
    shown = [
        *error,
        *(soft or []),
        *(x for bar in bars for x in bar[1:]),
        *(line[1] for line in lines),
    ]
    pad = 0.06 * np.ptp(shown) or 0.1 * max(shown) or 0.01
    ax.set(
        xlim=(ks[0] - 0.5, ks[-1] + 0.5),
        ylim=(max(min(shown) - pad, -0.3 * pad), max(shown) + pad),
        xlabel="ensemble size k",
        ylabel=ylabel,
    )
    ax.set_title(
        title, loc="center", y=1.03, pad=0
    )  # the corner is for the exponent of tiny values
    ax.set_xticks(ks if len(ks) <= 10 else [k for k in ks if k % -(-len(ks) // 10) == 0])
    ax.set_yticks(
        [
            y
            for y in MaxNLocator(6).tick_values(*ax.get_ylim())
            if max(0, ax.get_ylim()[0]) <= y <= ax.get_ylim()[1]
        ]
    )
    for bar in bars:
        ax.plot([bar[0]] * 2, bar[1:], color=INK, lw=0.7, marker="_", ms=4, zorder=4)
    ax.plot(
        ks,
        error,
        "o-",
        color=INK,
        ms=3.5,
        lw=1.4,
        zorder=5,
        label="ensemble" + (", 95 % interval" if bars else ""),
    )
    if chosen is not None:
        ax.plot(
            chosen,
            error[ks == chosen],
            "o",
            mfc="none",
            mec=INK,
            mew=0.8,
            ms=8,
            ls="none",
            zorder=6,
            label=f"k = {chosen}: best on validation prompts",
        )
    if soft:
        ax.plot(
            ks,
            soft,
            "s-",
            color=BLUE,
            ms=2.2,
            lw=0.7,
            zorder=4,
            label="the same mixture with soft votes",
        )
    for label, value, style in lines:
        ax.axhline(value, label=f"{label} {num(value)}", zorder=3, **style)
    ax.axhspan(ax.get_ylim()[0], lines[0][1], color="#f0e9d2", lw=0, zorder=0)
    if (
        bound and bound[1](ks[-1]) < ax.get_ylim()[1]
    ):  # its value at k=1 would flatten everything else: drawn where it fits
        fine = np.linspace(ks[0], ks[-1] + 0.5, 200)
        ax.plot(
            fine,
            bound[1](fine),
            ls=(0, (5, 1.5, 1, 1.5, 1, 1.5)),
            color=GREY,
            lw=1,
            label=bound[0],
            zorder=3,
        )
    fig.legend(
        *ax.get_legend_handles_labels(),
        loc="upper left",
        bbox_to_anchor=((left + 0.3) / fig.get_figwidth(), (bottom - 0.42) / height),
        borderaxespad=0,
        borderpad=0,
        labelspacing=0.3,
    )


def calibration(s, k_valid):
    """s: the test entry of metrics["splits"]; k_valid: the k to mark, or None; a second panel where the true fractions are known."""
    e, c, chosen = s["ensemble"], s.get("irreducible"), k_valid if several_sizes(s) else None
    simulated = e[-1].get("true_error") is not None
    soft = [x.get("brier_soft") for x in e]
    styles = [
        dict(color=ORANGE, lw=1.1),
        dict(color=GREEN, lw=1.1, ls=(0, (6, 2))),
        dict(color=BLUE, lw=1.1, ls=(0, (4, 1.5, 1, 1.5))),
        dict(color=INK, lw=1, ls=(0, (1, 1.5))),
    ]
    names = [
        "single deterministic reward (shaded): at least",
        "coin flip",
        "single soft model",
        "irreducible error Ĉ",
    ]
    rows = 3 + (chosen is not None) + sum(s.get(key) is not None for _, key, _, _ in REFERENCES)
    fig = Figure(figsize=(WIDE if simulated else NARROW, 2.65 + 0.13 * rows))
    error_panel(
        fig,
        0,
        [(x["k"], x["brier"], x.get("brier_ci")) for x in e],
        None if None in soft else soft,
        [(name, s.get(r[1]), style) for name, r, style in zip(names, REFERENCES, styles)],
        None if c is None else ("Theorem 2: 1/(4k) + Ĉ", lambda k: theorem2(k, c)),
        chosen,
        "calibration error (Brier score)",
        "against the annotators' votes",
        rows,
    )
    if simulated:
        error_panel(
            fig,
            NARROW + 0.15,
            [(x["k"], x["true_error"], None) for x in e],
            None,
            [(name, s.get(r[2]), style) for name, r, style in zip(names[:3], REFERENCES, styles)],
            ("Theorem 2: 1/(4k)", theorem2),
            chosen,
            "true error",
            "against the true fractions",
            rows,
        )
    return fig


def matrix(values, low, high, title, ylabel, rows):
    """values (n, m), None or NaN where there is no number; rows: labels of the n rows. Columns are members 1..m."""
    values = np.array(values, dtype=float)
    n, m = values.shape
    wide = NARROW if m <= 10 else WIDE
    width = min((wide - 1.15) / m, 0.5)
    height = min(width, 0.24 if m > 10 else 0.32)
    tall, left = n * height + 0.75, 0.5 + (wide - 1.15 - m * width) / 2
    fig = Figure(figsize=(wide, tall))
    ax = fig.add_axes([left / wide, 0.45 / tall, m * width / wide, n * height / tall])
    mesh = ax.pcolormesh(
        np.arange(m + 1) + 0.5,
        np.arange(n + 1) + 0.5,
        np.ma.masked_invalid(values),
        cmap="Blues",
        vmin=low,
        vmax=high,
        edgecolors="white",
        lw=0.8,
    )
    ax.set(ylim=(n + 0.5, 0.5), xlabel="member", ylabel=ylabel)
    fig.text(0.5, 1 - 0.08 / tall, title, va="top", ha="center")
    step = -(-max(m, n) // 24)
    ax.set_xticks(range(1, m + 1, step))
    ax.set_yticks(range(1, n + 1, step), list(rows)[::step])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    for (i, j), x in np.ndenumerate(values):
        if step == 1 and not np.isnan(
            x
        ):  # beyond 24 members the numbers would be too small to read
            ax.text(
                j + 1,
                i + 1,
                short(x),
                ha="center",
                va="center_baseline",
                fontsize=6 if width < 0.35 else 7,
                color="white" if x - low > 0.55 * (high - low) else INK,
            )
    side = fig.add_axes(
        [(left + m * width + 0.08) / wide, 0.45 / tall, 0.09 / wide, n * height / tall]
    )
    bar = fig.colorbar(
        mesh,
        cax=side,
        ticks=[low, high] if n < 3 else [low, (low + high) / 2, high],
        format=lambda x, _: short(x),
    )
    bar.outline.set_linewidth(0.4)
    return fig


def kendall(diversity):
    if not diversity:
        return None
    tau = np.array(diversity["kendall_tau"], dtype=float)
    low = min(0.0, np.floor(10 * np.min(tau, where=np.isfinite(tau), initial=0)) / 10)
    return matrix(
        tau,
        low,
        1.0,
        f"Kendall τ, colours from {low:g} to 1".replace("-", "−"),
        "member",
        range(1, len(tau) + 1),
    )


def wins(diversity):
    if not diversity or diversity["win"][0][0] is None:
        return None
    return matrix(
        diversity["win"],
        0.0,
        1.0,
        "share of the others ranked below",
        "favourite of member",
        range(1, len(diversity["win"]) + 1),
    )


def policies(diversity):
    """Distance of the mixture of policies from the votes of the rewards against beta, which falls from left to right."""
    if not diversity or not diversity["policy"]:
        return None
    beta, distance, limits = (
        np.array(diversity["policy"][name]) for name in ("beta", "distance", "distance_ci")
    )
    fig, ax = subplots(NARROW, 2.3)
    ax.fill_between(beta, *limits.T, color=BLUE, alpha=0.2, lw=0, label="95 % interval")
    ax.plot(beta, distance, "o-", color=INK, ms=3, lw=1.2, label=r"mean $|\bar{p} - \hat{p}|$")
    ax.set(xscale="log", xlim=(beta.max() * 1.5, beta.min() / 1.5), ylim=(0, None))
    ax.set(xlabel=r"$\beta$, from soft to hard", ylabel="distance from the votes")
    ax.legend(loc="lower left")
    return fig


def mixture_weights(weights):
    size = max(len(w["alpha"]) for w in weights)
    alpha = [w["alpha"] + [None] * (size - len(w["alpha"])) for w in weights]
    several = [a for w in weights for a in w["alpha"] if len(w["alpha"]) > 1 and a > 0] or [1.0]
    high = float(
        np.ceil(20 * np.quantile(several, 0.9)) / 20
    )  # the first rows' large weights would leave the others pale
    return matrix(
        alpha,
        0.0,
        high,
        f"weights in the ensemble of size k, colours from 0 to {short(high)}",
        "k",
        [w["k"] for w in weights],
    )


def majority_bins(share):
    """(counts, edges) of ten bins from .5 to 1 for majority shares (pairs,). Each is closed on the left, so that .55, .6, .. open one."""
    return np.histogram(
        np.round(share, 9), np.linspace(0.5, 1, 11) - 1e-6 * (np.arange(11) < 10)
    )  # the shift keeps rounding from moving them


def votes(p):
    """Share of pairs by majority share max(p, 1-p); p (pairs,). With few annotators its values are a few fractions: a bar each."""
    share = np.round(np.maximum(p, 1 - p), 9)
    values, counts = np.unique(share, return_counts=True)
    fig, ax = subplots(NARROW, 2.2)
    gap = np.diff(values).min() if len(values) > 1 else 0.5
    if len(values) <= 12:
        width = min(0.8 * gap, 0.04)
    else:
        counts, edges = majority_bins(share)
        values, width = edges[:-1] + 0.025, 0.05
    height = 100 * counts / len(p)
    ax.bar(values, height, width, color="#6f8fae", edgecolor=INK, lw=0.5)
    if len(values) == 1 or np.diff(values).min() > 0.045:  # room for a number over each bar
        for x, y in zip(values, height):
            ax.text(
                x,
                y + 0.015 * height.max(),
                f"{y:.0f}" if y >= 1 else "<1" if y else "",
                ha="center",
                va="bottom",
                fontsize=7,
            )
    ax.set(
        xlim=(0.465, 1.035),
        ylim=(0, 1.12 * height.max()),
        xticks=np.arange(5, 11) / 10,
        xlabel="majority share max(p, 1 − p)",
        ylabel="pairs (%)",
    )
    ax.set_title(f"{len(p)} pairs, mean {num(float(np.maximum(p, 1 - p).mean()))}")
    return fig


def write_votes(p, stem):
    """The figure `votes` as stem.png and stem.pdf, for data preparation."""
    with matplotlib.rc_context(STYLE):
        save(votes(p), stem)


def reliability(p, p_hat):
    """Mean p where the ensemble says p_hat; p, p_hat (pairs,). Each pair counts in both orders: which response stands first means nothing."""
    x, y = np.round(np.concatenate([p_hat, 1 - p_hat]), 9), np.concatenate([p, 1 - p])
    values, group = np.unique(x, return_inverse=True)
    binned = len(values) > 12
    if binned:
        group = np.minimum(
            (x * 11).astype(int), 10
        )  # an odd number of bins: 1/2 is the middle of one, not an edge
    count = np.bincount(group)
    keep, count = count > 0, np.maximum(count, 1)
    mean_x, mean_y = np.bincount(group, x) / count, np.bincount(group, y) / count
    spread = np.sqrt(np.maximum(np.bincount(group, y * y) / count - mean_y**2, 0))
    mean_x, mean_y, spread, count = mean_x[keep], mean_y[keep], spread[keep], count[keep]
    fig, (ax, below) = subplots(NARROW, 3.7, 2, 1, sharex=True, height_ratios=[4, 1])
    ax.plot([0, 1], [0, 1], color=GREY, lw=0.8, ls=(0, (4, 2)), label=r"$p = \hat{p}$")
    ax.vlines(
        mean_x,
        np.maximum(mean_y - spread, 0),
        np.minimum(mean_y + spread, 1),
        color="#999999",
        lw=1,
        label="± one s.d. of p",
    )
    ax.plot(
        mean_x,
        mean_y,
        "o-" if len(mean_x) > 1 else "o",
        color=BLUE,
        mec=INK,
        mew=0.5,
        ms=4,
        lw=1,
        label="mean p" + (" (11 bins)" if binned else ""),
    )
    ax.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), ylabel="annotators' share p")
    width = (
        1 / 11 if binned else min(0.04, 0.8 * np.diff(values).min() if len(values) > 1 else 0.04)
    )
    centre = (np.floor(mean_x * 11).clip(0, 10) + 0.5) / 11 if binned else mean_x
    below.bar(
        centre, 100 * count / len(x), max(width, 0.006), color="#6f8fae", edgecolor=INK, lw=0.4
    )
    below.set(xlabel=r"ensemble's share $\hat{p}$", ylabel="pairs (%)")
    below.yaxis.set_major_locator(MaxNLocator(3))
    fig.legend(
        *ax.get_legend_handles_labels(), loc="outside lower center", ncols=3, columnspacing=1.2
    )
    return fig


def training(logs):
    """A small panel per member: running mean of the loss over pairs seen, the raw loss faint behind it. logs: {title: lines of a log}."""
    logs = {title: lines for title, lines in logs.items() if lines}
    if not logs:
        return None
    columns = min(4, len(logs))
    rows = -(-len(logs) // columns)
    fig, axes = subplots(
        NARROW if columns < 3 else WIDE,
        0.5 + 1.25 * rows,
        rows,
        columns,
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for ax, (title, lines) in zip(axes.flat, logs.items()):
        loss = np.array([line["loss"] for line in lines])
        pairs = np.cumsum([line["pairs"] for line in lines])
        some = np.unique(
            np.linspace(0, len(loss) - 1, 400).astype(int)
        )  # a long run would make the embedded figure heavy
        window = np.ones(max(len(loss) // 8, 1))
        smooth = np.convolve(loss, window, "same") / np.convolve(
            np.ones(len(loss)), window, "same"
        )  # a running mean, cut at the ends
        ax.plot(pairs[some], loss[some], color="#b0b0b0", lw=0.5)
        ax.plot(pairs[some], smooth[some], color=INK, lw=1.2)
        ax.set_title(title)
        ax.xaxis.set_major_locator(MaxNLocator(3))
    for ax in axes.flat[len(logs) :]:
        ax.set_visible(False)
    axes[0, 0].set_ylim(bottom=0)
    fig.supxlabel("pairs seen", fontsize=8)
    fig.supylabel("training loss", fontsize=8)
    return fig


# The report


def save(fig, stem):
    """Write stem.png and stem.pdf; returns the figure as SVG bytes."""
    fig.draw_without_rendering()  # one layout for the three formats
    fig.set_layout_engine("none")
    for kind, metadata in (
        ("png", {"Software": None}),
        ("pdf", {"CreationDate": None}),
        ("svg", {"Date": None}),
    ):
        buffer = io.BytesIO()
        fig.savefig(buffer, format=kind, dpi=300, metadata=metadata)
        if kind != "svg":
            with run_dir.replacing(stem.with_name(f"{stem.name}.{kind}")) as partial:
                partial.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def embed(fig, svg):
    """What the macro `figure` of report.html.jinja shows; svg: what `save` returned for fig."""
    width = round(fig.get_size_inches()[0] / WIDE * 860)
    return {"width": width, "svg": base64.b64encode(svg).decode()}


def render(template, **values):
    """The page that a template makes of values, as text. All values are escaped.

    template: its path. It may extend "report.html.jinja", which lies beside this file: then it fills
    the block `body`, has the macros `table` and `figure` and the filters num, interval, short and
    pretty, and values must hold `title` and `images`, {name: embed(fig, svg)}. A value that is
    missing is an error.
    """
    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([Path(template).parent, here]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"num": num, "interval": interval, "short": short, "pretty": pretty}
    return environment.get_template(Path(template).name).render(values)


def verdict(metrics):
    """The result in sentences, each comparison with the interval of the ensemble's score."""
    s = metrics["splits"]["test"]
    last, first = s["ensemble"][-1], s["ensemble"][0]
    b, ci = last["brier"], last.get("brier_ci")
    ci = None if ci is None or None in ci else ci
    size = f"{last['k']} reward models" if last["k"] > 1 else "one reward model"
    text = f"On {s['prompts']} test prompts ({s['pairs']} pairs) the ensemble of {size} has a pairwise calibration error of {num(b)}"
    text += f", 95 % interval {interval(ci)}" if ci else ", without an interval"
    text += f"; with k = 1 it is {num(first['brier'])}. " if first["k"] == 1 < last["k"] else ". "
    parts = []
    for name, key in (
        ("the floor of any single deterministic reward", "floor_single"),
        ("the coin flip", "coin_flip"),
        ("the single soft model", "soft_single"),
    ):
        x = s.get(key)
        if x is None:
            continue
        side = "below" if b < x else "above" if b > x else "equal to"
        doubt = (
            ""
            if ci is None or side == "equal to"
            else ", the whole interval too"
            if (ci[1] < x or ci[0] > x)
            else ", but the interval contains it"
        )
        parts.append(f"{side} {name} ({num(x)}{doubt})")
    text += (
        "The ensemble is "
        + (", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0])
        + ". "
    )
    if s.get("soft_single") is None:
        text += "There is no single soft model to compare with: member 1 was not trained on the vote fractions. "
    if s.get("irreducible") is None:
        text += "The irreducible part of the error is not known for these votes. "
    elif s["irreducible"]:
        text += f"Of the error, {num(s['irreducible'])} is irreducible: no prediction can foresee which annotators were drawn. "
    if last.get("true_error") is not None:
        known = [
            f"{name} {num(s[key])}"
            for name, key in (
                ("single-reward floor", "floor_true"),
                ("coin flip", "coin_true"),
                ("single soft model", "soft_true"),
            )
            if s.get(key) is not None
        ]
        text += f"Against the population's true fractions the ensemble errs by {num(last['true_error'])} ({', '.join(known)}). "
    if ci:
        text += "The interval is that of the ensemble's score over resampled prompts; "
        text += "the lines it is compared with have their own below, from the same pairs."
        text += (
            " With fewer than 20 test prompts it is wide and rough." if s["prompts"] < 20 else ""
        )
    return text


CAPTIONS = {
    "calibration": "Calibration error on held-out prompts against the number of reward models, lower is better. A single deterministic "
    "reward always says 0 or 1, so it cannot enter the shaded area; several, weighted, can express that annotators "
    "disagree.",
    "votes": "How much the annotators of a test pair agree: the share that chose the majority's response. Mass near .5 means that no"
    " single answer is right for everybody.",
    "reliability": "When the ensemble says that a share p̂ of people prefers a response, how many annotators did? Every pair counts in "
    "both orders. Points on the diagonal are right on average; the grey bars show how far single pairs lie from it.",
    "kendall": "How similarly two members rank the same sampled continuations: 1 is the same ranking, 0 is no relation, below 0 is "
    "reversed. Lower numbers off the diagonal mean more diverse rewards. Empty: not defined.",
    "wins": "How high the favourite of one member (row) stands with another (column): the share of the other continuations that the "
    "column's member ranks below it, best of N in place of a policy. 1: its favourite too; .5: one like any other.",
    "policies": "If each member were the reward of a policy of its own, fine-tuned from the base with penalty β (appendix A), how far "
    "would the mixture of the policies be from the members' votes? The mean of |p̄ − p̂| over all pairs of a prompt's distinct "
    "continuations: small β follows the rewards, large β what the base finds more probable.",
    "weights": "Weight of each member (column) in the ensemble of the first k members (row), fitted on the training pairs after each "
    "new member. A zero means that the member is not used.",
    "training": "Training loss of each member: running mean (black) and single steps (grey). Members are trained on different targets, "
    "so the heights of two curves do not compare.",
}
NOTES = {
    "ensemble": "Test split, lower is better. Brier: mean (p̂ − p)², the pairwise calibration error, where p is the share of annotators and p̂ the "
    "weighted share of members that prefer the first response. Soft votes: the same mixture before each member's vote is made 0 or 1. Excess: "
    "Brier minus the irreducible error Ĉ. True error: mean (p̂ − p*)² against the population's true fraction, where it is known. L1: mean |p̂ − p|. "
    "r: Pearson's correlation of p̂ and p over both orders of every pair, so that it does not depend on which response stands first; higher is "
    "better. –: does not exist for this run. ",
    "chosen": "●: the size with the least Brier score on the validation prompts, which is how to choose one; never by the scores of this table.",
    "plurality": "The least error of any single soft reward less that of a mixture of several, on test prompts. Above zero: no single reward with this link "
    "explains the shares of the annotators. Zero, or an interval that holds it: one reward predicts them as well, which does not mean that people agree.",
    "groups": "The whole ensemble on parts of the test split. Agreement: the share of a pair's annotators that chose the majority's response; r does "
    "not exist where all are evenly split. A prompt can have pairs on several levels. Intervals are wide where a part has few prompts.",
    "categories": "Labels of the prompts as they were given with the data, the most frequent first.",
    "outliers": "A member is a (β, (β+1)√ε)-outlier (section 2 and Theorem 3) if Φ > β Φ_min + (β+1)√ε, which is so for every β below the number of the table. ε is the "
    "excess, or 0 where that is negative; Φ_min, the least Φ of any reward, is not known: it is at most the best member's Φ, and at least mean min(p, "
    "1 − p). Theorem 3 is about β ≥ 2: the weight of outliers is at most 1/(β − 1), and fit_weights.py --prune β removes them.",
    "members": "Each member alone, test split. Φ: mean share of annotators that it votes against. Regret: Φ beyond that of always siding with the "
    "majority. Lower is better for the first three. Accuracy (siding with the majority, higher is better) is unsuitable where people disagree, and "
    "here for comparison with other work only.",
    "character": "What each member's ranking follows: Kendall's τ of its rewards with how often an attribute shows in a continuation, averaged over "
    "prompts, with the 95 % interval; above 0 more of it is ranked higher. Each attribute alone: those that come together share their τ. Where an "
    "attribute is there or not, |τ| stays below 1 even in a ranking by nothing else (about .7 where half of the texts have it).",
    "favourites": "The continuation that each member ranks first, unaltered, for prompts on which the members rank each other's favourites lowest.",
    "weights": "Fit qp: the exact minimum of the training error over weights that are not negative and sum to one; the KKT residual says how exact. "
    "Fit fixed: weights given from elsewhere.",
}
CSS = """
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 900px; margin: 0 auto; padding: 24px 16px 48px; }
h1 { font-size: 1.5em; line-height: 1.25; margin: 0 0 .6em; }
h2 { font-size: 1.12em; margin: 2em 0 .5em; padding-bottom: .2em; border-bottom: 1px solid #ccc; }
.scroll { overflow-x: auto; } .scroll + .scroll { margin-top: 1em; } table { border-collapse: collapse; font-size: .9em; font-variant-numeric: tabular-nums; }
th, td { padding: .22em .8em; text-align: right; vertical-align: top; white-space: nowrap; } th { border-bottom: 1px solid #444; font-weight: 600; }
td { border-bottom: 1px solid #eee; } .l { text-align: left; } .w { text-align: left; white-space: normal; }
.texts td.w { white-space: pre-wrap; overflow-wrap: anywhere; }
.facts td.w { overflow-wrap: anywhere; } .facts td:first-child { color: #555; white-space: nowrap; }
.note, figcaption { color: #444; font-size: .87em; } .result { background: #f5f5f0; border-left: 3px solid #555; padding: .7em 1em; }
figure { margin: 1.6em 0; break-inside: avoid; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto .4em; }
figcaption { max-width: 44em; margin: 0 auto; }
pre { background: #f5f5f0; padding: .7em 1em; overflow-x: auto; font-size: .85em; white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 560px) { .facts td:first-child { white-space: normal; } th, td { padding: .22em .45em; } }
@media print { body { max-width: none; padding: 0; font-size: 11px; } tr, .result { break-inside: avoid; } h2 { break-after: avoid; } }
"""


def document(title, parts):
    """A page without anything from elsewhere; parts: HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{CSS}</style></head>\n<body>\n{''.join(parts)}</body></html>\n"
    )


def html_table(head, rows, kinds, cls=""):
    """kinds: a letter per column: r right, l left, w left and wrapped. All text is escaped here."""
    cell = lambda tag, x, kind: (
        f"<{tag}{'' if kind == 'r' else f' class={kind}'}>{html.escape('–' if x is None else str(x))}</{tag}>"
    )
    head = (
        "<thead><tr>" + "".join(cell("th", x, k) for x, k in zip(head, kinds)) + "</tr></thead>"
        if head
        else ""
    )
    body = "".join(
        "<tr>" + "".join(cell("td", x, k) for x, k in zip(row, kinds)) + "</tr>\n" for row in rows
    )
    return f'<div class="scroll"><table class="{cls}">{head}<tbody>\n{body}</tbody></table></div>\n'


def note(*names):
    return f'<p class="note">{html.escape("".join(NOTES[name] for name in names))}</p>\n'


def plurality(found):
    """What extras/plurality.py has found, as a paragraph; nothing where there is nothing."""
    if not found:
        return ""
    several = (
        f"a mixture of {found['components']} rewards {num(found['mixture'])}"
        if found["components"] > 1
        else "no mixture was better on validation prompts"
    )
    return (
        f"<h2>Plurality gain</h2><p>On frozen features the best single soft reward has a Brier score of {num(found['single'])}, {several}: a gain of "
        f"{num(found['gain'])}, 95 % interval {interval(found['ci'])}.</p>" + note("plurality")
    )


def group_table(title, key, parts):
    """parts: rows of metrics["splits"]["test"]["agreement"], or of one of its categories; key: the name of their first column."""

    def named(part):
        if part[key] is not None:
            return part[key]
        return "no label" if part["labels"] == 1 else f"{part['labels']} other labels"

    head = [
        title,
        "prompts",
        "pairs",
        *(x for name in ("Brier", "L1", "r") for x in (name, "95 % interval")),
    ]
    rows = [
        (
            named(part),
            part["prompts"],
            part["pairs"],
            *(
                x
                for name in ("brier", "l1", "pearson")
                for x in (num(part[name]), interval(part[f"{name}_ci"]))
            ),
        )
        for part in parts
    ]
    return html_table(head, rows, "w" + "r" * 8)


def outliers(s):
    """The table of theorem 3; nothing where the excess is not known."""
    rows = []
    for m, weight in zip(s["members"], s["ensemble"][-1]["alpha"]):
        if m["outlier_below"] is None or None in m["outlier_below"]:
            return ""
        sure, possible = m["outlier_below"]
        status = (
            f"for β < {short(sure)}"
            if sure > 2
            else f"unknown for β < {short(possible)}, no for others"
            if possible > 2
            else "no, for any β ≥ 2"
        )
        rows.append(
            (
                m["j"],
                num(weight),
                num(m["disagreement"]),
                *(short(max(x, 0)) for x in (sure, possible)),
                status,
            )
        )
    return html_table(
        [
            "member",
            "weight",
            "Φ",
            "β, if Φ_min is the best Φ",
            "β, if it is mean min(p, 1 − p)",
            "outlier",
        ],
        rows,
        "rrrrrl",
    ) + note("outliers")


def sampled(diversity):
    """What the members ranked, and what the mixture of policies comes to, in sentences."""
    text = f"Every member ranks {diversity['continuations']} continuations of each of {diversity['prompts']} prompts, sampled from the base model"
    text += (
        "."
        if diversity["repeated"] is None
        else f"; {diversity['repeated']} of them repeat another of the same prompt."
    )
    if diversity["policy"]:
        beta, distance, limits = (
            diversity["policy"][name] for name in ("beta", "distance", "distance_ci")
        )
        text += (
            f" The mixture of the policies that the members stand for differs from their votes by {num(distance[0])} {interval(limits[0])} with "
            f"β = {beta[0]:g} and by {num(distance[-1])} {interval(limits[-1])} with β = {beta[-1]:g}. What is calibrated are the votes: the policies "
            "are only as far as that is small."
        )
    return text


def taus(diversity):
    """Figure 3 once more as a table, with intervals, above the diagonal."""
    tau, limits = diversity["kendall_tau"], diversity["kendall_tau_ci"]

    def cell(i, j):
        return (
            ""
            if j <= i
            else "–"
            if tau[i][j] is None
            else f"{short(tau[i][j])} [{short(limits[i][j][0])}, {short(limits[i][j][1])}]"
        )

    rows = [(i + 1, *(cell(i, j) for j in range(1, len(tau)))) for i in range(len(tau) - 1)]
    return (
        html_table(["τ, 95 % interval", *range(2, len(tau) + 1)], rows, "r" * len(tau))
        if rows
        else ""
    )


def character(diversity):
    """The table of the members' characters; nothing without texts."""
    if not diversity["character"]:
        return ""
    table = diversity["character"]
    rows = [
        (
            name,
            *(
                "–" if x is None else f"{short(x)} [{short(ci[0])}, {short(ci[1])}]"
                for x, ci in zip(row, limits)
            ),
        )
        for name, row, limits in zip(table["attributes"], table["tau"], table["tau_ci"])
    ]
    return html_table(
        ["attribute", *(f"member {j + 1}" for j in range(len(rows[0]) - 1))],
        rows,
        "l" + "r" * (len(rows[0]) - 1),
    ) + note("character")


def side_by_side(diversity):
    """Every member's favourite, of a few prompts; members with the same one share a row."""
    parts = []
    for case in diversity["favourites"] or ():
        members = {
            text: [str(j) for j, other in enumerate(case["texts"], 1) if other == text]
            for text in case["texts"]
        }
        parts.append(
            html_table(
                ["member", case["prompt"]],
                [(", ".join(j), text) for text, j in members.items()],
                "lw",
                "texts",
            )
        )
    return "".join(parts) + (note("favourites") if parts else "")


def facts(metrics, manifest):
    """Rows (name, text) of the header: what was run. Whatever the manifest does not say is left out."""
    stages = manifest.get("stages") or {}
    members = [
        stage.get("settings") or {}
        for name, stage in sorted(stages.items())
        if name.startswith("member_")
    ]

    def said(
        dicts, key
    ):  # distinct values in order; of an absolute path only its end, which means something elsewhere
        values = dict.fromkeys(str(d[key]) for d in dicts if d.get(key) is not None)
        return ", ".join(
            "/".join(Path(v).parts[-2:]) if Path(v).is_absolute() else v for v in values
        )

    target = ", ".join(
        f"{name}: {formula}"
        for name, formula in dict.fromkeys(
            (stage["settings"].get("target"), stage.get("target_formula"))
            for name, stage in sorted(stages.items())
            if "target_formula" in stage
        )
    )
    if "p_hat" in target:
        target += ", where p_hat is the ensemble before member j (member 1: t = p)"
    train = {
        "full": "all parameters",
        "head": "reward head only, on frozen features",
        "lora": "low-rank adapters and reward head",
        "from": "nothing: existing reward models",
    }
    splits = metrics["splits"]
    pruned = stages.get("weights", {}).get("pruned")
    if pruned:
        removed = ", ".join(map(str, pruned["removed"])) or "none"
        pruned = f"β = {pruned['beta']:g}, removed: {removed}, of weight {short(pruned['weight_removed'])}; on train prompts {pruned['guarantee']}"
    versions = dict(
        item for stage in stages.values() for item in (stage.get("versions") or {}).items()
    )
    dates = sorted(str(stage["date"]) for stage in stages.values() if stage.get("date"))
    data_seed = said([stages.get("data", {}).get("settings") or {}], "seed")
    shown = {"target", "train", "base", "seed"}
    other = {k: said(members, k) for d in members for k in d if k not in shown}
    sizes = [
        f"{name} {x['prompts']} prompts, {x['pairs']} pairs, {x['annotators_mean']:.2f} votes a pair"
        for name, x in splits.items()
    ]
    commits = dict.fromkeys(
        c[:12] + "+" * c.endswith("+")
        for c in (stage.get("git_commit") or "" for stage in stages.values())
        if c
    )
    return [
        (name, text)
        for name, text in [
            ("Data set", metrics["dataset"]),
            ("Votes", f"{metrics['votes']}: {VOTES[metrics['votes']]}"),
            ("Ensemble", f"K = {metrics['k']}"),
            ("Pruned", pruned),
            ("Splits", "; ".join(sizes)),
            (
                "Exact ties",
                f"{100 * splits['test']['tie_rate']:.2f} % of the members' votes on test pairs",
            ),
            ("Base model", said([*members, *stages.values()], "base")),
            ("Trained", ", ".join(train.get(x, x) for x in said(members, "train").split(", "))),
            ("Target", pretty(target)),
            (
                "Seeds",
                "; ".join(
                    f"{name} {x}"
                    for name, x in (("training", said(members, "seed")), ("data", data_seed))
                    if x
                ),
            ),
            ("Settings", "; ".join(f"{k} {v}" for k, v in other.items() if v)),
            ("Date", dates[-1] if dates else ""),
            ("Git commit", ", ".join(commits)),
            ("Versions", ", ".join(f"{k} {v}" for k, v in sorted(versions.items()))),
        ]
        if text
    ]


def write(out, metrics, weights, manifest, logs, p, p_hat):
    """Write out/figures/*.png, *.pdf and out/report.html; returns the report's path.

    metrics: metrics.json; weights: weights.json; manifest: manifest.json, whose keys may be missing; logs: {title: list of steps};
    p, p_hat (pairs,): the test split's vote fractions and the full ensemble's predictions.
    """
    out = Path(out)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figures = {
            "calibration": calibration(metrics["splits"]["test"], metrics["k_valid"]),
            "votes": votes(p),
            "reliability": reliability(p, p_hat),
            **{
                name: draw(metrics["diversity"])
                for name, draw in (("kendall", kendall), ("wins", wins), ("policies", policies))
            },
            "weights": mixture_weights(weights),
            "training": training(logs),
        }
        images = {name: save(fig, out / "figures" / name) for name, fig in figures.items() if fig}
    for name in figures.keys() - images.keys():  # of an earlier evaluation
        for kind in ("png", "pdf"):
            (out / "figures" / f"{name}.{kind}").unlink(missing_ok=True)
    widths = {name: round(figures[name].get_size_inches()[0] / WIDE * 860) for name in images}
    with run_dir.replacing(out / "report.html") as partial:
        partial.write_text(page(metrics, weights, manifest, images, widths), encoding="utf-8")
    return out / "report.html"


def page(metrics, weights, manifest, images, widths):
    """The report as HTML text. images: {name: SVG bytes}; widths: {name: pixels}."""

    def figure(name):
        if name not in images:
            return ""
        data = base64.b64encode(images[name]).decode()
        return (
            f'<figure><img alt="figure: {name}" style="width:{widths[name]}px" src="data:image/svg+xml;base64,{data}">'
            f"<figcaption>{html.escape(CAPTIONS[name])}</figcaption></figure>\n"
        )

    def rows(dicts, *keys):
        return [
            tuple(x[key] if key in ("k", "j", "fit") else num(x.get(key)) for key in keys)
            for x in dicts
        ]

    s, diversity, stages = (
        metrics["splits"]["test"],
        metrics["diversity"],
        manifest.get("stages") or {},
    )
    title = f"Pairwise calibrated rewards: {metrics['dataset']}, K = {metrics['k']}"
    chosen = metrics["k_valid"] if several_sizes(s) else None
    by_k = [
        (f"● {k}" if k == chosen else k, brier, interval(e["brier_ci"]), *row)
        for (k, brier, *row), e in zip(
            rows(
                s["ensemble"], "k", "brier", "brier_soft", "excess", "true_error", "l1", "pearson"
            ),
            s["ensemble"],
        )
    ]
    fitted = [
        (
            *row,
            f"{w['kkt']:.0e}" if w.get("kkt") is not None else None,
            "  ".join("0" if a == 0 else num(a) for a in w["alpha"]),
        )
        for row, w in zip(rows(weights, "k", "fit", "train_mse"), weights)
    ]
    commands = "\n".join(
        dict.fromkeys(stage["command"] for stage in stages.values() if stage.get("command"))
    )
    timed = [
        (name, x.get("seconds"), x.get("peak_memory_mb"), x.get("threads"), x.get("date"))
        for name, x in stages.items()
    ]
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        html_table([], facts(metrics, manifest), "lw", "facts"),
        f'<h2>Result</h2><p class="result">{html.escape(verdict(metrics))}</p>',
        html_table(
            ["k", "Brier", "95 % interval", "soft votes", "excess", "true error", "L1", "r"],
            by_k,
            "rrrrrrrr",
        ),
        note("ensemble", "chosen") if chosen else note("ensemble"),
        html_table(
            ["reference line", "Brier", "95 % interval", "true error", "how"],
            [
                (pretty(name), num(x), interval(ci), num(true), pretty(how))
                for name, x, ci, true, how in references(s)
            ],
            "lrrrl",
        ),
        figure("calibration"),
        plurality(metrics["plurality"]),
        "<h2>Votes and predictions</h2>",
        figure("votes"),
        figure("reliability"),
        "<h2>By agreement</h2>",
        group_table("agreement", "level", s["agreement"]),
        note("groups"),
        *(
            (
                "<h2>By category</h2>",
                *(group_table(name, "label", parts) for name, parts in s["categories"].items()),
                note("categories"),
            )
            if s["categories"]
            else ()
        ),
        "<h2>Members</h2>",
        html_table(
            [
                "member",
                *(
                    "Brier",
                    "95 % interval",
                    "Φ",
                    "95 % interval",
                    "regret",
                    "95 % interval",
                    "accuracy",
                    "95 % interval",
                ),
            ],
            [
                (
                    m["j"],
                    *(
                        x
                        for key in ("brier", "disagreement", "regret", "accuracy")
                        for x in (num(m[key]), interval(m.get(f"{key}_ci")))
                    ),
                )
                for m in s["members"]
            ],
            "r" * 9,
        ),
        note("members"),
        outliers(s),
        *(
            (
                "<h2>Diversity</h2>",
                f"<p>{html.escape(sampled(diversity))}</p>",
                figure("kendall"),
                taus(diversity),
                figure("wins"),
                character(diversity),
                side_by_side(diversity),
                figure("policies"),
            )
            if diversity
            else ()
        ),
        "<h2>Mixture weights</h2>",
        figure("weights"),
        html_table(
            ["k", "fit", "train error", "KKT residual", "weights of members 1..k"], fitted, "rlrrw"
        ),
        note("weights"),
        "<h2>Training</h2>" + figure("training") if "training" in images else "",
        "<h2>Stages</h2>"
        + html_table(["stage", "seconds", "peak memory, MB", "threads", "date"], timed, "lrrrl")
        if stages
        else "",
        f"<h2>Reproduce</h2><pre>{html.escape(commands)}</pre>" if commands else "",
    ]
    return document(title, parts)
