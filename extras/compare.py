"""Compare settings on one test split, with paired intervals of their differences.

    python extras/compare.py runs/a runs/b --out /tmp/ab
    python extras/compare.py runs/a1,runs/a2 runs/b1,runs/b2 --out /tmp/ab     (two seeds each)

A space separates settings; a comma joins the runs of one setting, whose errors are averaged. It
writes compare.json, compare.html and figures/compare.png, .pdf into --out, and refuses runs whose
test data differ. It needs neither a GPU nor torch.
"""

import collections
import itertools
import os
from pathlib import Path

from pairwise import cli, data, drawing, figures, files, metrics, report, run_dir, soft_model

import numpy as np
from matplotlib.ticker import MaxNLocator

# All settings share the other reference lines.
LINES = [line for line in figures.REFERENCES if not line[1].startswith("soft_")]
SOFT = "soft_single", "soft_scaled"
COLOURS = figures.INK, figures.BLUE, "#CC79A7", "#8a6d00", "#56B4E9", "#5e3c99", figures.GREY
MARKERS = "os^Dvp*X"
DASHES = "-", (0, (5, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (1.5, 1.2))
DRAWN = 15  # The figure has at most so many differences.


# ---- the settings and their errors


def named_settings(words):
    """Return [(name, [run directories])] of words RUN or RUN,RUN,..

    The name of a setting is what the names of its directories have in common at the beginning, else
    all of them, with as many of the directories above as make the settings distinct. Raises
    InputError where a run is given twice, or none stands beside a comma.
    """
    settings = []
    for word in words:
        runs = [word] if Path(word).is_dir() else word.split(",")
        if "" in runs:
            joins = "a comma joins the runs of one setting, without spaces: RUN,RUN"
            raise cli.InputError(
                f"{word!r} found, a run expected on both sides of a comma; {joins}"
            )
        settings.append([Path(run) for run in runs])
    paths = [[run.resolve() for run in runs] for runs in settings]
    for run, count in collections.Counter(itertools.chain(*paths)).items():
        if count > 1:
            raise cli.InputError(f"{run} is given twice")
    for depth in itertools.count(1):
        names = [["/".join(run.parts[-depth:]) for run in runs] for runs in paths]
        for short in ([common_start(runs) for runs in names], ["+".join(runs) for runs in names]):
            if len(set(short)) == len(short):
                return list(zip(short, settings))


def common_start(names):
    """Return what names have in common at the beginning; the first name where that is nothing."""
    common = os.path.commonprefix(names).rstrip("/-_.") or names[0]
    return common if len(names) > 1 else names[0]


def must_share_test_data(first, second):
    """Raise InputError where the test data of two runs differ.

    They must have the same prompts, responses, pairs and votes, and votes that arose in one way.
    """
    refusal = f"{second}: not to be compared with {first}, its test data are others"
    paths = [run / "data" / "test.parquet" for run in (first, second)]
    expected, given = (files.read_parquet(path).to_pylist() for path in paths)
    for number, (row, other) in enumerate(zip(expected, given), 1):
        names = [name for name in row | other if name != "categories"]
        if differing := [name for name in names if row.get(name) != other.get(name)]:
            raise cli.InputError(f"{refusal}: of prompt {number} the {', '.join(differing)}")
    if len(expected) != len(given):
        counts = f"{len(given)} prompts found, {len(expected)} expected"
        raise cli.InputError(f"{refusal}: {counts}")
    expected, given = data.read_stats(first), data.read_stats(second)
    for name in ("votes", "ties"):
        was, now = expected[name], given[name]
        if was != now:
            raise cli.InputError(f"{refusal}: {name} {now!r} found, {was!r} expected")


def test_errors(run):
    """Return the sums over each test prompt's pairs: pairs (P,), {k: {name of metrics.ERRORS:
    squared errors (P,)}}, {reference line: (P,) or None}. Raises InputError where none counts."""
    stats = data.read_stats(run)
    tuned = soft_model.tuning_split(x.stem for x in (run / "data").glob("*.parquet"))
    splits = {name: data.read_split(run, name) for name in (tuned, "test")}
    split = data.some_counted_pairs(run, "test", splits["test"])
    prefixes = run_dir.read_all_prefixes(run)
    run_dir.check_whole(run, len(prefixes[-1]["alpha"]), "weights")
    shape = (split.n_responses,)
    rewards = run_dir.read_rewards(run, "test", run_dir.count_members(run), shape)
    predicted = soft_model.read_models(run, splits).predict("test", split)
    sums, _, forms, lines = metrics.measure(split, rewards, stats, predicted)
    errors, pairs = {}, sums["pairs"].astype(np.float64)
    for prefix in prefixes:
        alpha = np.array(prefix["alpha"])
        errors[len(alpha)] = {
            name: metrics.error_of(name, form, alpha, pairs) for name, form in forms.items()
        }
    for name, terms in lines.items():
        lines[name] = None if terms is None else metrics.by_prompt(split, terms)
    return pairs, errors, lines


def setting_errors(measured):
    """Average the errors of one setting's runs: {name: (P,), or None where a run has no such
    figure}, of each run with all its members, and {k: Brier errors (P,)} of k that all have."""

    def mean(arrays):
        return None if any(array is None for array in arrays) else np.mean(arrays, 0)

    _, errors_of_runs, lines_of_runs = zip(*measured)
    whole = [errors[max(errors)] for errors in errors_of_runs]
    by_name = {name: mean([errors.get(name) for errors in whole]) for name in metrics.ERRORS}
    by_name |= {name: mean([lines[name] for lines in lines_of_runs]) for name in SOFT}
    sizes = sorted(set.intersection(*map(set, errors_of_runs)))
    return by_name, {k: mean([errors[k]["brier"] for errors in errors_of_runs]) for k in sizes}


def compare(settings, resamples, seed):
    """Return compare.json as a dictionary; settings: of `named_settings`."""
    measured = [[test_errors(run) for run in runs] for _, runs in settings]
    first = settings[0][1][0]
    for run in itertools.chain(*(runs for _, runs in settings)):
        must_share_test_data(first, run)
    pairs, _, lines = measured[0][0]
    stats = data.read_stats(first)
    names = "floor_single", "coin_flip", "irreducible", "floor_true", "coin_true"
    result = {
        "dataset": stats["dataset"],
        "votes": stats["votes"],
        "prompts": len(pairs),
        "pairs": int(pairs.sum()),
        "resamples": resamples,
        "seed": seed,
        "lines": {name: metrics.Ratio(lines[name], pairs) for name in names},
        "settings": [],
        "differences": [],
    }
    means = [setting_errors(runs) for runs in measured]
    for (name, runs), measured_runs, (by_name, by_k) in zip(settings, measured, means):
        whole = [errors[max(errors)]["brier"] for _, errors, _ in measured_runs]
        entry = {"name": name, "runs": [str(run) for run in runs]}
        entry["k"] = [max(errors) for _, errors, _ in measured_runs]
        entry["brier_of_runs"] = [float(errors.sum() / pairs.sum()) for errors in whole]
        entry |= {name: metrics.Ratio(errors, pairs) for name, errors in by_name.items()}
        entry["ensemble"] = brier_by_k(by_k, pairs)
        result["settings"].append(entry)
    for i, j in itertools.combinations(range(len(settings)), 2):
        (one, one_by_k), (other, other_by_k) = means[i], means[j]
        entry = {"a": settings[i][0], "b": settings[j][0]}
        for name in ("brier", "brier_soft", "true_error"):
            known = one[name] is not None and other[name] is not None
            entry[name] = metrics.Ratio(one[name] - other[name] if known else None, pairs)
        common = sorted(one_by_k.keys() & other_by_k.keys())
        entry["by_k"] = brier_by_k({k: one_by_k[k] - other_by_k[k] for k in common}, pairs)
        result["differences"].append(entry)
    return metrics.estimate(result, resamples, seed)


def brier_by_k(errors, pairs):
    """Return the list of entries {k, brier} of {k: sums of squared errors (P,)}; pairs (P,)."""
    return [{"k": k, "brier": metrics.Ratio(errors[k], pairs)} for k in errors]


# ---- the table, the figure and the page


def sizes(setting):
    """Write the k of a setting's runs, once where they agree."""
    return ", ".join(map(str, dict.fromkeys(setting["k"])))


def verdict(difference):
    """Say which side is lower, where the interval of a difference excludes zero."""
    low, high = difference["brier_ci"] or (0, 0)  # no interval
    if low <= 0 <= high:
        return ""
    return "A lower" if difference["brier"] < 0 else "B lower"


def table(result):
    """Write the comparison as plain text."""
    counts = f"{result['prompts']} prompts, {result['pairs']} pairs"
    lines = [f"{result['dataset']}, test split: {counts}. All errors: lower is better.", ""]
    width = max(7, *(len(setting["name"]) for setting in result["settings"]))
    form = "{:<{}}  {:>4}  {:>5}  {:>6}  {:>14}  {:>6}  {:>6}  {:>9}  {:>11}  {:>6}"
    head = "runs", "k", "Brier", "95 % interval", "soft", "excess", "true err.", "single soft"
    lines.append(form.format("setting", width, *head, "scaled"))
    keys = "brier", "brier_ci", "brier_soft", "excess", "true_error", *SOFT
    for setting in result["settings"]:
        texts = len(setting["runs"]), sizes(setting), *report.cells(setting, *keys, none="-")
        lines.append(form.format(setting["name"], width, *texts))
    lines.append("")
    for name, key, _, _ in LINES:
        value, limits = report.cells(result["lines"], key, f"{key}_ci", none="-")
        lines.append(f"{name:<42} {value:>6}  {limits:>14}")
    names = [f"{entry['a']} - {entry['b']}" for entry in result["differences"]]
    title, width = "difference in Brier, A - B", max(26, *map(len, names))
    lines += ["", f"{title:<{width}}  {'':>6}  {'95 % interval':>16}  excludes zero"]
    for name, entry in zip(names, result["differences"]):
        value, limits = report.cells(entry, "brier", "brier_ci")
        lines.append(f"{name:<{width}}  {value:>6}  {limits:>16}  {verdict(entry)}".rstrip())
    return "\n".join(lines)


def drawn_differences(result):
    """Return all differences where there is room, else those from the first setting."""
    every = result["differences"]
    if len(every) <= DRAWN:
        return every
    return [entry for entry in every if entry["a"] == result["settings"][0]["name"]][:DRAWN]


def draw(result):
    """Draw the Brier score against k, a line a setting, beside the differences."""
    differences = drawn_differences(result)
    legend_rows = -(-(len(result["settings"]) + len(LINES)) // 2)
    height = max(2.6, 0.2 * len(differences) + 0.8) + 0.135 * legend_rows + 0.2
    fig, (left, right) = figures.subplots(figures.WIDE, height, 1, 2, width_ratios=[1.15, 1])
    draw_errors(left, result)
    draw_differences(right, differences)
    handles, labels = left.get_legend_handles_labels()
    legend = fig.legend(handles, labels, loc="outside lower left", ncols=2, columnspacing=1.5)
    # matplotlib leaves out labels that begin with _, so the names are set afterwards.
    for text, setting in zip(legend.get_texts(), result["settings"]):
        text.set(text=figures.drawable(setting["name"]), parse_math=False)
    return fig


def draw_errors(axes, result):
    """Draw the Brier score of every setting against k, and right of it, as open marks, that of
    its single soft model, as trained and with its scale fitted."""
    settings = result["settings"]
    largest = max(k for setting in settings for k in setting["k"])
    for i, setting in enumerate(settings):
        marker, colour = MARKERS[i % len(MARKERS)], COLOURS[i % len(COLOURS)]
        look = {"marker": marker, "color": colour, "zorder": 4}
        shift = 0.16 * (i / max(1, len(settings) - 1) - 0.5)  # Settings stand beside each other.
        # Runs with fixed weights and unequal k have no k in common.
        entries = setting["ensemble"] or [setting | {"k": max(setting["k"])}]
        at = [entry["k"] + shift for entry in entries]
        for x, entry in zip(at, entries):
            limits = entry["brier_ci"] or [None, None]  # nothing
            axes.plot([x, x], limits, color=colour, lw=0.7, zorder=3)
        brier, dash = [entry["brier"] for entry in entries], DASHES[i % len(DASHES)]
        axes.plot(at, brier, ls=dash, lw=1.2, ms=3.5, label="setting", **look)
        open_mark = look | {"mfc": "white", "ms": 4, "mew": 0.9, "ls": "none"}
        for x, name in enumerate(SOFT, largest + 1):  # None is not drawn.
            axes.plot([x + shift], np.array([setting[name]], float), **open_mark)
    for name, key, _, _ in LINES:
        value = result["lines"][key]
        if value is not None:
            label = f"{figures.pretty(name)} {figures.num(value)}"
            style = figures.REFERENCE_STYLES[key] | {"lw": 1}
            if key == "irreducible":  # Black is the first setting's.
                style["color"] = figures.GREY
            axes.axhline(value, zorder=2, label=label, **style)
    step = -(-largest // 10)
    ticks = list(range(step, largest + 1, step))
    soft = "single\nsoft", "\n\nscaled"  # They have little room.
    axes.set_xticks([*ticks, largest + 1, largest + 2], [*ticks, *soft])
    axes.set(xlabel="ensemble size k", ylabel="calibration error (Brier score)")
    axes.set_ylim(bottom=max(0, axes.get_ylim()[0]))


def draw_differences(axes, differences):
    """Draw the differences with their intervals, grey where zero is inside."""
    for y, entry in enumerate(differences):
        colour = figures.INK if verdict(entry) else figures.GREY
        axes.plot(entry["brier_ci"] or [None, None], [y, y], color=colour, lw=1)
        axes.plot(entry["brier"], y, "o", color=colour, ms=3.5)
    axes.axvline(0, color=figures.GREY, lw=0.8, ls=(0, (4, 2)))
    names = [" − ".join(figures.drawable(entry[side]) for side in "ab") for entry in differences]
    axes.set_yticks(range(len(differences)), names, parse_math=False)
    axes.set(ylim=(len(differences) - 0.5, -0.5), xlabel="difference, 95 % interval")
    axes.xaxis.set_major_locator(MaxNLocator(4))


def write(out, result):
    """Write out/compare.html and out/figures/compare.png, .pdf; returns the page's path."""
    (out / "figures").mkdir(parents=True, exist_ok=True)
    with drawing.style():
        fig = draw(result)
        image = report.embed(fig, drawing.save(fig, out / "figures" / "compare"))
    values = {name: result[name] for name in ("votes", "lines", "settings", "differences")}
    by_k = [{e["k"]: e["brier"] for e in setting["ensemble"]} for setting in result["settings"]]
    every_k = sorted(set().union(*by_k))
    counts = f"{result['prompts']} test prompts, {result['pairs']} pairs"
    values |= {
        "title": f"Settings compared: {result['dataset']}, {counts}",
        "images": {"compare": image},
        "reference_lines": LINES,
        "all_drawn": len(drawn_differences(result)) == len(result["differences"]),
        "brier_by_k": {k: [briers.get(k) for briers in by_k] for k in every_k},
        "fewest": metrics.FEWEST,
        "sizes": sizes,
        "verdict": verdict,
    }
    page = report.render(Path(__file__).with_suffix(".html.jinja"), **values)
    with files.replacing(out / "compare.html") as partial:
        partial.write_text(page, encoding="utf-8")
    return out / "compare.html"


def main(args):
    run_dir.check_no_run(args.out)
    settings = named_settings(args.runs)
    if len(settings) < 2:
        hint = "a comma joins the seeds of one setting, a space settings"
        raise cli.InputError(f"{len(settings)} setting found, at least 2 expected; {hint}")
    result = compare(settings, args.resamples, args.seed)
    files.remove(args.out / "compare.html")  # It comes last: where it is, all is of one call.
    files.write_json(args.out / "compare.json", result)
    page = write(args.out, result)
    print(table(result))
    print(f"comparison: {page}")


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN,RUN", help="a setting: its runs, joined by commas")
    add("--out", type=run_dir.output, required=True, help="directory for what is written")
    add("--resamples", type=cli.resamples, default=10000, help="bootstrap resamples over prompts")
    add("--seed", type=cli.seed, default=0, help="seed of the bootstrap")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
