"""The result table and the HTML report of one run (evaluate.py calls `table` and `write`).

Everything here only shows numbers: they come in as metrics.json's dictionary. The words of the page
are in report.html.jinja. Its figures are embedded, so the page can be moved or mailed alone.
"""

import base64
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

from pairwise import data, drawing, figures, files, theory, weights
from pairwise.metrics import FEWEST

import jinja2

ERRORS = ("brier", "brier_ci", "brier_soft", "excess", "true_error", "l1", "pearson")
LEGEND = (
    "Brier: mean (p_hat - p)^2, the pairwise calibration error; p: share of annotators, p_hat: "
    "weighted share of members that prefer the first response. soft: the same before the members' "
    "votes are made hard. excess: Brier - C_hat. true err.: mean (p_hat - p_true)^2, where the "
    "truth is known. L1: mean |p_hat - p|. r: Pearson's correlation of p_hat and p over both "
    "orders of every pair (higher is better). Phi: mean share of annotators that the member votes "
    "against. regret: Phi beyond that of always siding with the majority. accuracy: unsuitable, "
    f"for comparison with other work. -: does not exist; an interval takes {FEWEST} prompts."
)
THEOREM_2 = (
    " Theorem 2: some k-ensemble has a true err. of at most 1/(4k), and an expected Brier score of "
    "at most C_hat above that."
)

# The first two are proved in docs/method.md.
NO_ROOM = (
    "Floor - C_hat is 0 exactly, since on every pair all annotators, or all but one, agree: "
    "nothing can be expected below the floor, not even the true fractions, and a score below it is "
    "chance. docs/method.md proves it, and says what it means for the paper's figure 2."
)
ROOM = (
    "Floor - C_hat is {}{}: a forecast that knows the true fractions can be expected so far below "
    "the floor, and none farther."
)
WORSE = "The ensemble is worse than a coin flip, which says 1/2 for every pair{}."
CONTRARY = "Sides with fewer than half of the annotators of test pairs: member {}. "
LATER_CONTRARY = (
    "FSAM makes such members after the first: trained on what those before it got wrong, one is "
    "right there and often wrong elsewhere. It serves in the mixture, not alone. --target mixture "
    "has member 2 contradict member 1 only where more than a quarter of the annotators do, "
    "extras/train_joint.py trains all on the error of their mixture, and extras/prune.py removes "
    "those far from it, at a cost. "
)
ALONE_CONTRARY = (
    "One that should be right alone, as a first or an imported one, has learned nothing that holds "
    "for these votes, or has the wrong sign."
)
HARDENED_CONTRARY = (
    "extras/harden.py makes such members: inside a level of the soft model's reward the order of "
    "one is the reverse of another's. They serve in the mixture, not alone."
)


def interval(limits, none="–"):
    """Write the two limits of an interval, [.0945, .1012]; `none` where they do not exist."""
    if limits is None or None in limits:
        return none
    return f"[{figures.num(limits[0])}, {figures.num(limits[1])}]"


def cells(entry, *keys, none="–"):
    """Write entry[key] of every key, an interval or a number; text and whole numbers stay."""

    def text(x):
        if isinstance(x, list):
            return interval(x, none)
        return x if isinstance(x, int | str) else figures.num(x, none)

    return [text(entry[key]) for key in keys]


class Line(NamedTuple):
    """A reference line: Brier score, error against the truth, how it is computed; and less, the
    whole ensemble's Brier score less its own. Intervals are of resampled prompts."""

    name: str
    brier: float | None
    limits: list | None
    true_error: float | None
    how: str
    less: float | None = None
    less_limits: list | None = None


def references(split):
    """The Lines of metrics["splits"]["test"].

    Where the true fractions are known, the last is theorem 2.
    """
    rows, less = [], split["ensemble"][-1]["less"]
    for name, key, true_key, how in figures.REFERENCES:
        if key == "soft_scaled":
            fit = split["soft_fit"]
            name = f"{name} on {fit['split']} prompts"
            how += f": tau {fit['tau']:.3g}, a {fit['a']:.2g}"
        if key != "soft_hardened" or split.get(key) is not None:
            known = split.get(key), split.get(f"{key}_ci"), split.get(true_key)
            rows.append(Line(name, *known, how, less.get(key), less.get(f"{key}_ci")))
    k, c = split["ensemble"][-1]["k"], split["irreducible"]
    if split["floor_true"] is not None:
        bound, true_bound = None if c is None else theory.theorem2(k, c), theory.theorem2(k)
        how = "some k-ensemble reaches 1/(4k) + C_hat"
        rows.append(Line(f"Theorem 2 at k = {k}", bound, None, true_bound, how))
    return rows


def both_losses(metrics):
    """(forecast, squared error, its interval, cross-entropy, its interval, |p_bar - p_hat|, the
    same of continuations) of test pairs, of every soft forecast (appendix E) and of the policies
    that the members stand for (appendix A)."""
    split, policy = metrics["splits"]["test"], metrics["policy"]
    losses, whole = split["cross_entropy"], split["ensemble"][-1]
    rows = [
        (name, split[key], split[f"{key}_ci"], losses[key], losses[f"{key}_ci"], None, None)
        for name, key, *_ in figures.REFERENCES
        if losses.get(key) is not None
    ]
    names = [f"{name}{ci}" for name in ("brier", "cross_entropy") for ci in ("", "_ci")]
    soft = [whole[name.replace("_ci", "") + "_soft" + "_ci" * ("_ci" in name)] for name in names]
    rows.append((f"soft votes of the {whole['k']} members", *soft, None, None))
    if policy:
        names.append("distance")
        base = [policy["base"][name] for name in names]
        rows.append(("the base, no member (β = ∞)", *base, None))
        sampled = (metrics["diversity"] or {}).get("policy") or {}
        for i, beta in enumerate(policy["beta"]):
            own = [policy[name][i] for name in names]
            rows.append(
                (f"policies, β = {beta:.2g}", *own, sampled["distance"][i] if sampled else None)
            )
    return rows


def chosen_size(metrics):
    """The k that validation prompts choose, or None; weights from elsewhere leave no choice."""
    return metrics["k_valid"] if len(metrics["splits"]["test"]["ensemble"]) > 1 else None


def table(metrics):
    """The result table in plain text, at most 100 columns."""
    split = metrics["splits"]["test"]
    counts = f"{split['prompts']} prompts, {split['pairs']} pairs"
    votes = f"{split['annotators_mean']:.1f} votes a pair"
    title = f"{metrics['dataset']}, test split: {counts}, {votes}. All errors: lower is better."
    head = ("k", "Brier", "95 % interval", "soft", "excess", "true err.", "L1", "r")
    columns = "{:>3}  {:>6}  {:>14}  {:>6}  {:>6}  {:>9}  {:>5}  {:>6}  "
    lines = [*textwrap.wrap(title, 100), "", columns.format(*head) + "mixture weights"]
    for entry in split["ensemble"]:
        row = columns.format(*cells(entry, "k", *ERRORS, none="-"))
        alpha = " ".join(figures.short(a).ljust(3) for a in entry["alpha"])
        indent = {"initial_indent": row, "subsequent_indent": " " * len(row)}
        lines += textwrap.wrap(alpha, 100, **indent)
    if k := chosen_size(metrics):
        lines.append(f"on validation prompts the Brier score is least with k = {k}")

    columns = "{:<42}{:>6}  {:>14}  {:>9}  {:>22}"
    k = split["ensemble"][-1]["k"]
    head = ("reference lines", "Brier", "95 % interval", "true err.", f"k = {k} less it")
    lines += ["", columns.format(*head)]
    for x in references(split):
        errors = figures.num(x.brier, "-"), interval(x.limits, "-"), figures.num(x.true_error, "-")
        less = figures.num(x.less, "-"), interval(x.less_limits, "")
        lines.append(columns.format(x.name, *errors, " ".join(less).strip()))

    columns = "{:>6}  {:>6}  {:>6}  {:>14}  {:>6}  {:>8}"
    head = ("member", "Brier", "Phi", "95 % interval", "regret", "accuracy")
    lines += ["", columns.format(*head)]
    keys = ("j", "brier", "disagreement", "disagreement_ci", "regret", "accuracy")
    lines += [columns.format(*cells(member, *keys, none="-")) for member in split["members"]]
    legend = LEGEND + THEOREM_2 * (split["floor_true"] is not None)
    for words in filter(None, (notes(metrics), tied(split), contrary(split), legend)):
        lines += ["", *textwrap.wrap(words, 100)]
    return "\n".join(lines)


def sentence(words):
    """Words as a sentence; "" stays."""
    return words and f"{words[0].upper()}{words[1:]}."


def tied(split):
    """The sentence that names members whose test pairs mostly tie; "" where there are none."""
    rates = [x["tie_rate"] or 0 for x in split["members"]]
    return sentence(weights.tied_words(rates, "test pairs"))


def contrary(split):
    """What names members that are mostly against the annotators, and says why there may be such;
    "" where there are none."""
    phis = enumerate((member["disagreement"] for member in split["members"]), 1)
    phis = {j: phi for j, phi in phis if phi > 0.5 + 1e-9}  # One above by rounding is a coin's.
    if not phis:
        return ""
    named = CONTRARY.format(", ".join(f"{j} (Phi {figures.num(phis[j])})" for j in phis))
    if split.get("soft_hardened") is not None:
        return named + HARDENED_CONTRARY
    return named + LATER_CONTRARY * (max(phis) > 1) + ALONE_CONTRARY


def notes(metrics):
    """What the figures of the test split mean, as sentences: whether anything can be below the
    floor, a score worse than a coin flip, few prompts."""
    split = metrics["splits"]["test"]
    excess, limits, sentences = split["floor_excess"], split["floor_excess_ci"], []
    if excess == 0:
        sentences.append(NO_ROOM)
    elif excess is not None:
        between = f", 95 % interval {interval(limits)}" if limits else ""
        sentences.append(ROOM.format(figures.num(excess), between))
    last = split["ensemble"][-1]
    if last["brier"] > split["coin_flip"]:
        limits = last["less"]["coin_flip_ci"]
        doubt = ", on too few prompts to tell"
        if limits:
            doubt = "" if limits[0] > 0 else ", by a difference whose interval contains 0"
        sentences.append(WORSE.format(doubt))
    sentences.append(sentence(data.few_prompts(split["prompts"], metrics["own_split"])))
    return " ".join(filter(None, sentences))


# ---- what report.html.jinja shows


def distinct(dicts, key):
    """The different values of a key, in order, as texts; of an absolute path the last two parts."""
    texts = dict.fromkeys(str(entry[key]) for entry in dicts if entry.get(key) is not None)
    return ["/".join(Path(x).parts[-2:]) if Path(x).is_absolute() else x for x in texts]


def origin(stages):
    """How the run came about, as lists of texts; what the manifest does not say is an empty list.

    stages: the manifest's, by name, whose keys may be missing.
    """
    made = [name for name in sorted(stages) if re.fullmatch(r"member_\d\d|joint|harden", name)]
    members = [stages[name] for name in made]
    settings = [member.get("settings") or {} for member in members]
    targets = dict.fromkeys(
        figures.pretty(f"{member['settings'].get('target')}: {member['target_formula']}")
        for member in members
        if "target_formula" in member
    )
    shown_alone = ("target", "train", "base", "seed")
    keys = dict.fromkeys(key for entry in settings for key in entry if key not in shown_alone)
    others = {key: ", ".join(distinct(settings, key)) for key in keys}
    # A commit ends in + where files had been changed since.
    commits = distinct(stages.values(), "git_commit")
    versions = {k: v for stage in stages.values() for k, v in (stage.get("versions") or {}).items()}
    return {
        "base": distinct([*settings, *stages.values()], "base"),
        "train": distinct(settings, "train"),
        "targets": list(targets),
        "seeds": distinct(settings, "seed"),
        "data_seeds": distinct([stages.get("data", {}).get("settings") or {}], "seed"),
        "settings": [f"{key} {text}" for key, text in others.items() if text],
        "edited": sorted({path for stage in stages.values() for path in stage.get("edited", ())}),
        "dates": sorted(distinct(stages.values(), "date")),
        "commits": [x[:12] + "+" * x.endswith("+") for x in commits],
        "versions": [f"{name} {version}" for name, version in sorted(versions.items())],
        "commands": list(dict.fromkeys(x["command"] for x in stages.values() if x.get("command"))),
    }


def comparisons(split):
    """The reference lines that the ensemble's score is compared with, as dicts.

    less: the ensemble's score less theirs, on the same resampled prompts; certain: whether its
    whole interval is on one side of 0, None where it is 0 or there is no interval.
    """
    lines = []
    for x in references(split):
        if x.less is not None:
            side = "below" if x.less < 0 else "above" if x.less > 0 else "equal to"
            certain = None
            if x.less_limits and x.less:
                certain = x.less_limits[0] > 0 or x.less_limits[1] < 0
            line = {"name": x.name, "value": x.brier, "side": side, "certain": certain}
            lines.append(line | {"less": x.less, "less_ci": x.less_limits})
    return lines


def favourites(cases):
    """(prompt, rows) of each case; members with the same favourite share a row."""
    prompts = []
    for case in cases:
        members = {}
        for j, text in enumerate(case["texts"], 1):
            members.setdefault(text, []).append(str(j))
        rows = [(", ".join(numbers), text) for text, numbers in members.items()]
        prompts.append((case["prompt"], rows))
    return prompts


def page_values(metrics, prefixes, stages):
    """All that report.html.jinja shows, but the figures."""
    split, diversity = metrics["splits"]["test"], metrics["diversity"] or {}
    outlier_limits = [member["outlier_below"] or [None] for member in split["members"]]
    return {
        "title": f"Pairwise calibrated rewards: {metrics['dataset']}, K = {metrics['k']}",
        "metrics": metrics,
        "chosen": chosen_size(metrics),
        "comparisons": comparisons(split),
        "references": references(split),
        "losses": both_losses(metrics),
        "member_names": [f"member {member['j']}" for member in split["members"]],
        "outliers_known": all(None not in limits for limits in outlier_limits),
        "favourites": favourites(diversity.get("favourites") or ()),
        "weights": prefixes,
        "notes": notes(metrics),
        "tied": tied(split),
        "contrary": contrary(split),
        "fewest": FEWEST,
        "stages": stages,
        "origin": origin(stages),
    }


# ---- pages


def embed(fig, svg):
    """What the macro `figure` of a template shows; svg: what drawing.save returned for fig."""
    width = round(fig.get_size_inches()[0] / figures.WIDE * 860)
    return {"width": width, "svg": base64.b64encode(svg).decode()}


def render(template, **values):
    """The page that a template makes of values, as text. All values are escaped, for HTML and where
    UTF-8 cannot hold them: what was typed on a command line may be any bytes.

    template: its path. It may extend "report.html.jinja", which lies beside this file: then it
    fills the block `body` with the macros defined there, and values must hold `title` and `images`,
    {name: embed(fig, svg)}. The functions num, short, interval, pretty and cells are its filters. A
    value that is missing is an error.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([Path(template).parent, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "num": lambda *args: figures.pretty(figures.num(*args)),
        "interval": lambda *args: figures.pretty(interval(*args)),
        "short": figures.short,
        "pretty": figures.pretty,
        "cells": cells,
    }
    page = environment.get_template(Path(template).name).render(values)
    return page.encode("utf-8", "backslashreplace").decode()


def draw(calls):
    """Return {name: (drawing.formats, embed) of a figure} of {name: (function, *its arguments)};
    None instead where there is nothing to draw."""
    pictures = dict.fromkeys(calls)
    with drawing.style():
        for name, (function, *args) in calls.items():
            if fig := function(*args):
                formats = drawing.formats(fig)
                pictures[name] = formats, embed(fig, formats["svg"])
    return pictures


def draw_inputs(prefixes, logs, p, p_hat, diversity):
    """`draw` the figures that need no metrics of pairs. prefixes: what weights.json holds; logs:
    {title: list of steps}; p, p_hat (pairs,): the test split's vote fractions and what all members
    say; diversity: metrics["diversity"]."""
    calls = {
        "reliability": (figures.reliability, p, p_hat),
        "votes": (figures.majority_shares, p),
        "weights": (figures.mixture_weights, prefixes),
        "training": (figures.training, logs),
        "kendall": (figures.kendall, diversity),
        "wins": (figures.wins, diversity),
        "policies": (figures.policies, diversity),
    }
    return draw(calls)


def write(out, metrics, prefixes, stages, drawn):
    """Write out/figures/*.png, *.pdf and out/report.html.

    metrics, prefixes, stages: what metrics.json, weights.json and the manifest hold; drawn: called
    for the value of `draw_inputs`, once the other figure is drawn.
    """
    out, images = Path(out), {}
    (out / "figures").mkdir(parents=True, exist_ok=True)
    curve = figures.calibration, metrics["splits"]["test"], chosen_size(metrics)
    pictures = draw({"calibration": curve}) | drawn()
    for name, picture in pictures.items():
        if picture:
            formats, images[name] = picture
            drawing.keep(formats, out / "figures" / name)
        else:  # An earlier evaluation may have drawn it.
            for kind in ("png", "pdf"):
                (out / "figures" / f"{name}.{kind}").unlink(missing_ok=True)
    shown = page_values(metrics, prefixes, stages)
    page = render(Path(__file__).with_name("report.html.jinja"), images=images, **shown)
    with files.replacing(out / "report.html") as partial:
        partial.write_text(page, encoding="utf-8")
