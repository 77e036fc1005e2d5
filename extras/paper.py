"""The paper's tables and figures from finished runs, beside the numbers that it prints.

    python extras/paper.py --runs runs/multipref runs/helpsteer2 --out paper

Any runs that evaluate.py has evaluated, with any names and numbers of members: tables 1 and 2,
figure 2 (error against k), 3 (Kendall's tau) and 4 (majority shares), a panel a run, and appendix
G's table of each. It writes paper.html, figures/*.png and *.pdf, and paper.json, which holds every
number that is shown. What a run lacks is named. It takes seconds, and neither a GPU nor torch.
"""

import itertools
import textwrap
from pathlib import Path

from pairwise import cli, data, drawing, figures, files, manifest, report, run_dir

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

# All that tables 1 and 2 print, by the data set's name in stats.json. The figures print no numbers
# but those of FIGURES, from text and captions; none is read off a plot.
TABLE_1 = {
    "name": "Name",
    "pairs": "Pref. pairs",
    "prompts": "Unique prompts",
    "annotation": "Annotation",
    "annotators": "Avg # annots.",
    "p": "Avg p",
}
TABLE_2 = {
    "name": "Name",
    "pairs": "Pref. pairs",
    "prompts": "Prompts (train/test)",
    "prompt_source": "Prompt source",
    "response_source": "Response source",
    "method": "Annotation method",
    "annotators_2": "Avg # annots.",
}
PRINTED_ROWS = {
    "multipref": """MultiPref | 9,413 | 4,791 / 532 | Human annotators | 4.0 | 63% |
        Anthropic HH, ChatArena, ShareGPT | GPT-4, GPT-3.5, Llama-2/3, Tulu-2 | Human | 4.00""",
    "personalllm": """PersonalLLM | 263,256 | 9,402 / 1,000 | Model-based scores | 10 | 76% |
        RewardBench, Anthropic HH, HelpSteer | GPT-4, Claude-3, Llama-3, Gemini-Pro | AI | 10""",
    "helpsteer2": """HelpSteer2 | 21,000 | 10,000 / 1,000 | Human annotators | 3.5 | 74% |
        WildChat, curated | 10 NVIDIA LLMs | Human | 3.50""",
    "tldr": """Reddit TL;DR | 3,217 | 729 / 845 | Human annotators | 7.56 | 84% |
        Reddit TL;DR | GPT-3 | Human | 7.56""",
}
PRINTED = {
    key: dict(zip(TABLE_1 | TABLE_2, (cell.strip() for cell in row.split("|")), strict=True))
    for key, row in PRINTED_ROWS.items()
}
FIGURES = {
    "k of the curves": "1 to 8",
    "first k below the floor": "2 to 4",
    "gains taper off at k": "around 6",
    "prompts, continuations": "50, 100",
    "most alike members": "Reddit TL;DR",
}
FAVOURITES = 5  # Appendix G shows the first five members.
SHOWN = 600  # So many characters of a response are drawn; the page has all.

# What is read of metrics.json.
LINES = "coin_flip", "soft_single", "soft_scaled", "irreducible", "floor_excess"
NAMES = {key: figures.pretty(name) for name, key, _, _ in figures.REFERENCES}
NAMES["floor_excess"] = "floor − Ĉ, so far below the floor can be expected"
NULL, LIMITS = type(None), (list, type(None))
MAYBE = (*files.NUMBER, NULL)
ENTRY = {"k": int, "brier": files.NUMBER, "brier_ci": LIMITS}
LESS = {"less": {"floor_single_ci": LIMITS}}  # of an entry too: its error less the floor
TEST = {"prompts": int, "pairs": int, "floor_single": files.NUMBER, "floor_single_ci": LIMITS}
TEST |= dict.fromkeys(LINES, MAYBE) | {"ensemble": [ENTRY | LESS]}
DIVERSITY = {"prompts": int, "continuations": int, "kendall_tau": [[MAYBE]]}
DIVERSITY |= {"favourites": [{"prompt": str, "texts": [str]}]}


# ---- what is read of a run


def names_of(runs):
    """Return the names of run directories, with as many of those above as make them distinct.

    Raises InputError where one is given twice."""
    paths = [run.resolve() for run in runs]
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise cli.InputError(f"--runs: {twice[0]} is given twice")
    for depth in itertools.count(1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names


def read_evaluation(run):
    """Return the value of metrics.json. Raises InputError where there is none of what the run has
    now: its data, rewards and weights have the hashes that evaluate.py entered."""
    path, again = run / "metrics.json", f"python evaluate.py --run {run} makes it"
    entry = manifest.entries(run).get("evaluate", {"done": False})
    if not entry["done"] or not path.is_file():
        raise cli.InputError(f"{path}: no finished evaluation found; {again}")
    result, k = run_dir.read_metrics(run), run_dir.count_members(run)
    if result["k"] != k:
        counts = f"an evaluation of {result['k']} members found, {k} expected"
        raise cli.InputError(f"{path}: {counts}; {again} anew")
    for name in dict.fromkeys([*entry["inputs"], *run_dir.BESIDE.values()]):
        if (run / name).is_file() and files.hash_file(run / name) != entry["inputs"].get(name):
            raise cli.InputError(f"{run / name}: changed since {path} was written; {again} anew")
    form, diversity = {"splits": {"test": TEST}}, result.get("diversity")
    if diversity is not None:
        form["diversity"] = DIVERSITY
        diversity["favourites"] = diversity.get("favourites") or []
    if wrong := files.misfit(result, form):
        raise cli.InputError(f"{path}: {wrong}")
    return result


def data_set(run):
    """Return what tables 1 and 2 and figure 4 show of a run's data: counts, and the bars of the
    majority shares of all splits. Pairs of less than two votes do not count."""
    splits, stats = data.read_splits(run)
    counted = {name: x for name, split in splits.items() if (x := data.counted_pairs(split))}
    test = counted["test"]
    p, n = (np.concatenate([getattr(x, name) for x in counted.values()]) for name in ("p", "n"))
    shares, percent, width = figures.majority_bars(p)
    return {
        "dataset": stats["dataset"],
        "votes": stats["votes"],
        "train_pairs": len(p) - len(test.p),
        "test_pairs": len(test.p),
        "train_prompts": sum(len(x.prompt_id) for x in counted.values()) - len(test.prompt_id),
        "test_prompts": len(test.prompt_id),
        "annotators_mean": float(n.mean()),
        "majority_mean": float(np.maximum(p, 1 - p).mean()),
        "figure_4": {"share": shares.tolist(), "percent": percent.tolist(), "width": float(width)},
    }


def read(run, name):
    """Return a run's entry in paper.json, which has every number that is shown of it."""
    result, counts = read_evaluation(run), data_set(run)
    test, diversity = result["splits"]["test"], result.get("diversity")
    entry = {"name": name, "run": str(run), **counts, "figure_3": None, "appendix_g": None}
    curve = [{key: x[key] for key in ENTRY} for x in test["ensemble"]]
    lines = {key: test.get(key) for key in ("floor_single", "floor_single_ci", *LINES)}
    entry["figure_2"] = {"curve": curve, **lines, **first_sizes(test)}
    if diversity:
        tau = diversity["kendall_tau"]
        apart = [x for i, row in enumerate(tau) for x in row[i + 1 :] if x is not None]
        mean = float(np.mean(apart)) if apart else None
        shown = {key: diversity[key] for key in ("prompts", "continuations", "kendall_tau")}
        entry["figure_3"] = shown | {"mean": mean}
        cases = diversity["favourites"]
        cases = [{"prompt": x["prompt"], "texts": x["texts"][:FAVOURITES]} for x in cases]
        entry["appendix_g"] = cases or None  # One continuation a prompt leaves no favourite.
    return entry


def first_sizes(test):
    """Return the first k whose error is below the floor, and the first at which the interval of
    the difference is too, or None; and the k of the least error; test: of metrics.json."""
    curve = test["ensemble"]
    below = [x for x in curve if x["brier"] < test["floor_single"]]
    limits = {x["k"]: x["less"]["floor_single_ci"] for x in below}
    surely = [k for k, ci in limits.items() if ci and ci[1] < 0]
    return {
        "first_below": min((x["k"] for x in below), default=None),
        "first_surely_below": min(surely, default=None),
        "least_at": min((round(x["brier"], 9), x["k"]) for x in curve)[1],
    }


def missing(runs):
    """Return sentences that say what is not shown of which run."""
    places, sentences = {"figure_3": "figure 3", "appendix_g": "appendix G"}, []
    for run in runs:
        lacks = [place for key, place in places.items() if not run[key]]
        why = "its members have no rewards of continuations"
        if run["figure_3"]:
            why = "of a prompt's continuations no two have rewards"
        if lacks:
            sentences.append(f"{run['name']} is not in {' and '.join(lacks)}: {why}.")
    return sentences


# ---- the tables, as rows of texts


def printed_beside(runs, columns):
    """Return the rows of table 1 or 2: a row a run, and of each of the paper's data sets the row
    that it prints, below the runs on it. columns: {key of PRINTED: heading}."""
    rows = []
    for name in [None, *PRINTED]:
        for run in runs:
            if run["dataset"] == name or (name is None and run["dataset"] not in PRINTED):
                shown = {
                    "name": run["name"],
                    "pairs": f"{run['train_pairs']:,} / {run['test_pairs']:,}",
                    "prompts": f"{run['train_prompts']:,} / {run['test_prompts']:,}",
                    "annotation": f"votes: {run['votes']}",
                    "method": f"votes: {run['votes']}",
                    "annotators": f"{run['annotators_mean']:.2f}",
                    "annotators_2": f"{run['annotators_mean']:.2f}",
                    "p": f"{100 * run['majority_mean']:.1f}%",
                }
                rows.append([shown.get(key, "–") for key in columns])
        if name:
            shown = PRINTED[name] | {"name": f"{PRINTED[name]['name']}, in the paper"}
            rows.append([shown[key] for key in columns])
    return rows


def rows_of_figure_2(runs):
    """Return the heading and rows of the numbers that figure 2 draws, a column a run."""
    curves = [{x["k"]: x for x in run["figure_2"]["curve"]} for run in runs]

    def value(entry, key):
        text, limits = report.cells(entry, key, f"{key}_ci") if entry else ("–", "–")
        return text if limits == "–" else f"{text} {limits}"

    rows = [
        [f"k = {k}", *(value(curve.get(k), "brier") for curve in curves)]
        for k in sorted(set().union(*curves))
    ]
    shown = [run["figure_2"] for run in runs]
    rows.append([NAMES["floor_single"], *(value(each, "floor_single") for each in shown)])
    for key in LINES:
        rows.append([NAMES[key], *(figures.num(each[key]) for each in shown)])
    below, least = FIGURES["first k below the floor"], FIGURES["gains taper off at k"]
    sizes = {
        "first_below": f"first k below the floor (the paper: {below})",
        "first_surely_below": "first k below it by more than the interval of the difference",
        "least_at": f"k of the least error (the paper: gains taper off {least})",
    }
    for key, words in sizes.items():
        rows.append([words, *("none" if each[key] is None else each[key] for each in shown)])
    return ["", *(run["name"] for run in runs)], rows


def rows_of_appendix_g(run):
    """Return the rows (prompt, members, response) of a run; members with one favourite share it."""
    return [
        ["" if i else prompt, members, text]
        for prompt, rows in report.favourites(run["appendix_g"])
        for i, (members, text) in enumerate(rows)
    ]


# ---- the figures


def titled(axes, run):
    """Name the run over its panel, shortened to the panel's width."""
    axes.set_title(figures.drawable(run["name"], 22), fontsize=7, parse_math=False)


def draw_figure_2(runs):
    """Draw the error against k with intervals, above the shaded floor, the other lines faint."""
    columns, legend_height = (3, 0.6) if len(runs) > 2 else (1, 1.1)
    fig, panels = figures.grid(len(runs), 1.75, legend_height)
    for axes, run in zip(panels.flat, runs):
        shown = run["figure_2"]
        lines = {key: shown[key] for key in LINES[:4] if shown[key] is not None}
        sizes, error = ([x[key] for x in shown["curve"]] for key in ("k", "brier"))
        limits = {x["k"]: x["brier_ci"] for x in shown["curve"] if x["brier_ci"]}
        floor = shown["floor_single"]
        band = shown["floor_single_ci"] or [floor, floor]
        spread = itertools.chain(band, *limits.values())
        figures.scale(axes, sizes, [*error, *lines.values(), *spread])
        axes.axhspan(axes.get_ylim()[0], floor, color="#f0e9d2", lw=0, zorder=0)
        axes.axhspan(*band, color=figures.ORANGE, alpha=0.18, lw=0, zorder=1)
        for key, value in {"floor_single": floor, **lines}.items():
            look = {"alpha": 1 if key == "floor_single" else 0.45, "zorder": 2}
            axes.axhline(value, label=NAMES[key], **look, **figures.REFERENCE_STYLES[key])
        for k, pair in limits.items():
            axes.plot([k, k], pair, color=figures.INK, lw=0.7, marker="_", ms=3, zorder=4)
        label = "ensemble, 95 % interval"
        axes.plot(sizes, error, "o-", color=figures.INK, ms=3, lw=1.2, zorder=5, label=label)
        titled(axes, run)
    for axes in panels[:, 0]:
        axes.set_ylabel("calibration error")
    handles = {}
    for axes in panels.flat[: len(runs)]:  # A line that one run lacks another may have.
        handles |= dict(zip(*axes.get_legend_handles_labels()[::-1]))
    fig.legend(handles.values(), handles, loc="outside lower left", ncols=columns)
    return fig


def draw_figure_3(runs):
    """Draw Kendall's tau of every two members, all runs in the same colours; None without any."""
    runs = [run for run in runs if run["figure_3"]]
    taus = [np.array(run["figure_3"]["kendall_tau"], float) for run in runs]
    known = [tau[np.isfinite(tau)] for tau in taus]
    if not sum(map(len, known)):
        return None
    low = float(np.floor(10 * min(0, *np.concatenate(known))) / 10)
    fig, panels = figures.grid(len(runs), 1.85, 0.2)
    fig.set_layout_engine("compressed")  # Panels are square, whatever room there is.
    for axes, run, tau in zip(panels.flat, runs, taus):
        size = 6 if len(tau) <= 4 else 4.2 if len(tau) <= 8 else 3
        mesh = figures.cells(axes, tau, low, 1.0, range(1, len(tau) + 1), size)
        axes.set(aspect="equal", xlabel="member")
        titled(axes, run)
    for axes in panels[:, 0]:
        axes.set_ylabel("member")
    form = {"format": lambda x, _: figures.short(x), "shrink": 0.6, "aspect": 15, "pad": 0.02}
    bar = fig.colorbar(mesh, ax=panels, ticks=[low, (1 + low) / 2, 1], **form)
    bar.outline.set_linewidth(0.4)
    return fig


def draw_figure_4(runs):
    """Draw how many pairs have which majority share."""
    fig, panels = figures.grid(len(runs), 1.6, 0.2)
    for axes, run in zip(panels.flat, runs):
        bars = run["figure_4"]
        figures.share_bars(axes, *(np.array(bars[x]) for x in ("share", "percent", "width")))
        axes.set(xlabel="p of the majority", xticks=[0.5, 0.75, 1])
        titled(axes, run)
    for axes in panels[:, 0]:
        axes.set_ylabel("pairs (%)")
    return fig


def draw_table(head, rows, widths):
    """Draw a table of texts between rules; widths: the characters at which a column is wrapped."""

    def wrapped(cell, width):
        cut = cell if len(cell) <= SHOWN else f"{cell[:SHOWN]} […]"
        lines = map(figures.escaped, cut.expandtabs().splitlines())
        return "\n".join(textwrap.fill(line, width) for line in lines)

    fig, size = Figure(), {"fontsize": 7, "va": "top", "parse_math": False}
    inches = fig.dpi_scale_trans
    texts = [
        [fig.text(0, 0, wrapped(*cell), transform=inches, **size) for cell in zip(row, widths)]
        for row in [head, *rows]
    ]
    boxes = [[text.get_window_extent() for text in row] for row in texts]
    width = np.array([[box.width for box in row] for row in boxes]).max(0) / fig.dpi
    height = np.array([[box.height for box in row] for row in boxes]).max(1) / fig.dpi + 0.1
    left = 0.1 + np.concatenate([[0], np.cumsum(width + 0.18)])
    top = 0.1 + height.sum() - np.concatenate([[0], np.cumsum(height)])
    fig.set_size_inches(left[-1], top[0] + 0.1)
    for row, y in zip(texts, top):
        for text, x in zip(row, left):
            text.set_position((x, y - 0.05))
    for y in top[[0, 1, -1]]:
        ends = [0.1, left[-1] - 0.1], [y, y]
        fig.add_artist(Line2D(*ends, color=figures.INK, lw=0.6, transform=inches))
    return fig


# ---- what is written


def drawn(runs):
    """Return {name of a picture: Figure}, of those that there is something to draw for."""
    tables = {"table_1": TABLE_1, "table_2": TABLE_2}
    pictures = {
        name: draw_table(columns.values(), printed_beside(runs, columns), [26] * len(columns))
        for name, columns in tables.items()
    }
    pictures |= {"figure_2": draw_figure_2(runs), "figure_3": draw_figure_3(runs)}
    pictures["figure_4"] = draw_figure_4(runs)
    head, widths = ["Prompt", "Iteration", "Top ranked response"], [26, 10, 80]
    for number, run in enumerate(runs, 1):
        name, rows = f"appendix_g_{number}", run["appendix_g"] and rows_of_appendix_g(run)
        pictures[name] = draw_table(head, rows, widths) if rows else None
    return {name: fig for name, fig in pictures.items() if fig is not None}


def write(out, runs):
    """Write out/figures/*.png, *.pdf and out/paper.html; returns the page's path."""
    with drawing.style():
        pictures = drawn(runs)
        images = {
            name: report.embed(fig, drawing.save(fig, out / "figures" / name))
            for name, fig in pictures.items()
        }
    for path in [*(out / "figures").glob("figure_3.*"), *(out / "figures").glob("appendix_g_*")]:
        if path.stem not in pictures:  # An earlier call may have drawn more.
            path.unlink()
    values = {
        "title": "The paper's tables and figures",
        "images": images,
        "runs": runs,
        "tables": {
            f"Table {number}": (list(columns.values()), printed_beside(runs, columns))
            for number, columns in enumerate((TABLE_1, TABLE_2), 1)
        },
        "figure_2": rows_of_figure_2(runs),
        "appendix_g": [(run["name"], rows_of_appendix_g(run)) for run in runs if run["appendix_g"]],
        "missing": missing(runs),
        "printed": FIGURES,
    }
    page = report.render(Path(__file__).with_suffix(".html.jinja"), **values)
    with files.replacing(out / "paper.html") as partial:
        partial.write_text(page, encoding="utf-8")
    return out / "paper.html"


def main(args):
    run_dir.check_no_run(args.out)
    runs = [read(run, name) for run, name in zip(args.runs, names_of(args.runs))]
    files.remove(args.out / "paper.html")  # It comes last: where it is, all is of one call.
    files.write_json(args.out / "paper.json", {"printed": PRINTED | FIGURES, "runs": runs})
    page = write(args.out, runs)
    for run in runs:
        shown = run["figure_2"]
        last = shown["curve"][-1] | shown
        k, error, floor = report.cells(last, "k", "brier", "floor_single")
        first = shown["first_below"] or "none"
        print(f"{run['name']}: k = {k}: {error}, floor {floor}; first k below the floor: {first}")
    print("\n".join([*missing(runs), f"the paper's tables and figures: {page}"]))


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    words = "runs that evaluate.py has evaluated"
    add("--runs", nargs="+", type=cli.path, required=True, metavar="RUN", help=words)
    add("--out", type=run_dir.output, required=True, help="directory for what is written")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
