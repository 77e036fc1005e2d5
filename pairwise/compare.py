"""The table, the figure and the page of `evaluate.py --compare`: several settings side by side on one test split.

As in report.py, everything here only shows numbers: they come in as compare.json's dictionary.
"""

import base64
import html

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pairwise import run_dir
from pairwise.report import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    REFERENCES,
    STYLE,
    VOTES,
    WIDE,
    document,
    html_table,
    interval,
    num,
    pretty,
    save,
)

COLOURS = [
    INK,
    BLUE,
    "#CC79A7",
    "#8a6d00",
    "#56B4E9",
    "#5e3c99",
    GREY,
]  # orange and green are the reference lines
MARKERS, DASHES = "os^Dvp*X", ["-", (0, (5, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (1.5, 1.2))]
LINES = [row for row in REFERENCES if row[1] != "soft_single"]  # that is each setting's own
LINE_STYLES = [
    dict(color=ORANGE, lw=1),
    dict(color=GREEN, lw=1, ls=(0, (6, 2))),
    dict(color=GREY, lw=1, ls=(0, (1, 1.5))),
]
NOTE = """Every setting with all its members (k); several runs of a setting are averaged. Brier: mean (p_hat - p)^2. soft: before the members' votes are
made hard. single soft: the sigmoid of member 1 alone. Intervals: 95 %, over resampled test prompts, the same prompts for all settings, so that a
difference is paired; they do not hold what another training seed would change. Each is for one difference: among many, some exclude zero by chance."""
DRAWN = 15  # differences, at most


def sizes(setting):
    """The k of a setting's runs, once where they agree."""
    return ", ".join(map(str, dict.fromkeys(setting["k"])))


def side(x):
    """What an interval of a difference says."""
    return (
        ""
        if x["brier_ci"][0] <= 0 <= x["brier_ci"][1]
        else "A lower"
        if x["brier"] < 0
        else "B lower"
    )


def clip(name):
    """A name as the figure shows it."""
    return name if len(name) <= 30 else f"{name[:29]}…"


def table(found):
    """The comparison in plain text."""
    width = max(7, *(len(s["name"]) for s in found["settings"]))
    lines = [
        f"{found['dataset']}, test split: {found['prompts']} prompts, {found['pairs']} pairs. All errors: lower is better.",
        "",
        f"{'setting':<{width}}  runs  {'k':>5}  {'Brier':>6}  {'95 % interval':>14}  {'soft':>6}  {'excess':>6}  {'true err.':>9}  single soft",
    ]
    for s in found["settings"]:
        cells = (
            num(s[name], "-") for name in ("brier_soft", "excess", "true_error", "soft_single")
        )
        lines.append(
            f"{s['name']:<{width}}  {len(s['runs']):>4}  {sizes(s):>5}  {num(s['brier']):>6}  {interval(s['brier_ci']):>14}  "
            "{:>6}  {:>6}  {:>9}  {:>11}".format(*cells)
        )
    lines.append("")
    for name, key, _, _ in LINES:
        lines.append(
            f"{name:<42} {num(found['lines'][key], '-'):>6}  {interval(found['lines'][f'{key}_ci'], '-'):>14}"
        )
    names = [f"{d['a']} - {d['b']}" for d in found["differences"]]
    wide = max(26, *map(len, names))
    lines += [
        "",
        f"{'difference in Brier, A - B':<{wide}}  {'':>6}  {'95 % interval':>16}  excludes zero",
    ]
    for name, d in zip(names, found["differences"]):
        lines.append(
            f"{name:<{wide}}  {num(d['brier']):>6}  {interval(d['brier_ci']):>16}  {side(d)}".rstrip()
        )
    return "\n".join(lines)


def shown_differences(found):
    """All of them where there is room, else those from the first setting."""
    every = found["differences"]
    return (
        every
        if len(every) <= DRAWN
        else [d for d in every if d["a"] == found["settings"][0]["name"]][:DRAWN]
    )


def figure(found):
    """Brier score against k, a line a setting, and the differences with their intervals."""
    settings, differences = found["settings"], shown_differences(found)
    rows = len(settings) + len(LINES)
    tall = max(2.6, 0.2 * len(differences) + 0.8) + 0.135 * -(-rows // 2) + 0.2
    fig = Figure(figsize=(WIDE, tall), layout="constrained")
    ax, right = fig.subplots(1, 2, width_ratios=[1.15, 1])
    largest = max(k for s in settings for k in s["k"])
    for i, s in enumerate(settings):
        colour, marker, dash = (of[i % len(of)] for of in (COLOURS, MARKERS, DASHES))
        shift = 0.16 * (i / max(1, len(settings) - 1) - 0.5)
        of_k = s["ensemble"] or [
            s | {"k": max(s["k"])}
        ]  # runs with fixed weights and unequal k have no k in common
        for e in of_k:
            ax.plot([e["k"] + shift] * 2, e["brier_ci"], color=colour, lw=0.7, zorder=3)
        ax.plot(
            [e["k"] + shift for e in of_k],
            [e["brier"] for e in of_k],
            marker=marker,
            ls=dash,
            color=colour,
            ms=3.5,
            lw=1.2,
            zorder=4,
            label=clip(s["name"]),
        )
        if s["soft_single"] is not None:
            ax.plot(
                largest + 1 + shift,
                s["soft_single"],
                marker=marker,
                mfc="white",
                mec=colour,
                ms=4,
                mew=0.9,
                ls="none",
                zorder=4,
            )
    for (name, key, _, _), style in zip(LINES, LINE_STYLES):
        if found["lines"][key] is not None:
            ax.axhline(
                found["lines"][key],
                zorder=2,
                label=f"{pretty(name)} {num(found['lines'][key])}",
                **style,
            )
    step = -(-largest // 10)
    ax.set_xticks(
        [*range(step, largest + 1, step), largest + 1],
        [*range(step, largest + 1, step), "single\nsoft"],
    )
    ax.set(xlabel="ensemble size k", ylabel="calibration error (Brier score)")
    ax.set_ylim(bottom=max(0, ax.get_ylim()[0]))
    y = np.arange(len(differences))
    for at, d in zip(y, differences):
        colour = GREY if not side(d) else INK
        right.plot(d["brier_ci"], [at, at], color=colour, lw=1)
        right.plot(d["brier"], at, "o", color=colour, ms=3.5)
    right.axvline(0, color=GREY, lw=0.8, ls=(0, (4, 2)))
    right.set_yticks(y, [f"{clip(d['a'])} − {clip(d['b'])}" for d in differences])
    right.set(ylim=(len(differences) - 0.5, -0.5), xlabel="difference, 95 % interval")
    right.xaxis.set_major_locator(MaxNLocator(4))
    fig.legend(
        *ax.get_legend_handles_labels(), loc="outside lower left", ncols=2, columnspacing=1.5
    )
    return fig


def write(out, found):
    """Write out/compare.html and out/figures/compare.png, .pdf; found: compare.json. Returns the page's path."""
    (out / "figures").mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        image = base64.b64encode(save(figure(found), out / "figures" / "compare")).decode()
    settings, lines, differences = found["settings"], found["lines"], found["differences"]
    by_k = [{e["k"]: num(e["brier"]) for e in s["ensemble"]} for s in settings]
    note = f"{pretty(' '.join(NOTE.split()))} Votes: {VOTES[found['votes']]}."
    caption = "Calibration error on the same test prompts against the number of reward models, and the differences at each setting's own k: left of zero "
    caption += "the first of the two is better. Open marks: the single soft model of the setting."
    caption += (
        ""
        if len(shown_differences(found)) == len(differences)
        else " Drawn are differences from the first setting; the table has all."
    )
    title = f"Settings compared: {found['dataset']}, {found['prompts']} test prompts, {found['pairs']} pairs"

    def cells(entry, *names):
        return [x for name in names for x in (num(entry[name]), interval(entry[f"{name}_ci"]))]

    parts = [
        f"<h1>{html.escape(title)}</h1>",
        html_table(
            [
                "setting",
                "runs",
                "k",
                "Brier",
                "95 % interval",
                "soft",
                "excess",
                "true error",
                "single soft",
            ],
            [
                (
                    s["name"],
                    len(s["runs"]),
                    sizes(s),
                    *cells(s, "brier"),
                    *(
                        num(s[name])
                        for name in ("brier_soft", "excess", "true_error", "soft_single")
                    ),
                )
                for s in settings
            ],
            "wrrrrrrrr",
        ),
        html_table(
            ["reference line", "Brier", "95 % interval", "true error"],
            [
                (pretty(name), *cells(lines, key), num(lines.get(true)))
                for name, key, true, _ in LINES
            ],
            "lrrr",
        ),
        f'<p class="note">{html.escape(note)}</p>',
        f'<figure><img alt="figure: compare" style="width:860px" src="data:image/svg+xml;base64,{image}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>",
        "<h2>Differences in Brier score</h2>",
        html_table(
            [
                "A",
                "B",
                "A − B",
                "95 % interval",
                "excludes zero",
                "soft",
                "95 % interval",
                "true error",
                "95 % interval",
            ],
            [
                (d["a"], d["b"], *cells(d, "brier"), side(d), *cells(d, "brier_soft", "true_error"))
                for d in differences
            ],
            "wwrrlrrrr",
        ),
        "<h2>Brier score by k</h2>",
        html_table(
            ["k", *(s["name"] for s in settings)],
            [(k, *(of.get(k) for of in by_k)) for k in sorted(set().union(*by_k))],
            "r" * (1 + len(settings)),
        ),
        "<h2>Runs</h2>",
        html_table(
            ["setting", "run", "k", "Brier"],
            [
                (s["name"], run, k, num(x))
                for s in settings
                for run, k, x in zip(s["runs"], s["k"], s["brier_of_runs"])
            ],
            "wwrr",
        ),
    ]
    with run_dir.replacing(out / "compare.html") as partial:
        partial.write_text(document(title, parts), encoding="utf-8")
    return out / "compare.html"
