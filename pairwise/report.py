"""The result table and the HTML report of one run (evaluate.py calls `table` and `write`).

Everything here only shows numbers: they come in as metrics.json's dictionary. The words of the page
are in report.html.jinja. Its figures are embedded, so the page can be moved or mailed alone.
"""

import base64
import textwrap
from pathlib import Path

from pairwise import figures, run_dir, theory

import jinja2
import matplotlib

# What the ensemble is compared with: name, key in metrics["splits"]["test"], key of the same
# against the true fractions, how it is computed.
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
ERRORS = ("brier", "brier_ci", "brier_soft", "excess", "true_error", "l1", "pearson")
LEGEND = (
    "Brier: mean (p_hat - p)^2, the pairwise calibration error; p: share of annotators, p_hat: "
    "weighted share of members that prefer the first response. soft: the same before the members' "
    "votes are made hard. excess: Brier - C_hat. true err.: mean (p_hat - p_true)^2, where the "
    "truth is known. L1: mean |p_hat - p|. r: Pearson's correlation of p_hat and p over both "
    "orders of every pair (higher is better). Phi: mean share of annotators that the member votes "
    "against. regret: Phi beyond that of always siding with the majority. -: does not exist."
)


def interval(limits, none="–"):
    """Write the two limits of an interval, [.0945, .1012]; `none` where they do not exist."""
    missing = limits is None or None in limits
    return none if missing else f"[{figures.num(limits[0])}, {figures.num(limits[1])}]"


def pretty(text):
    """Write plain-text mathematics as a page shows it."""
    return text.replace("p_hat", "p̂").replace("C_hat", "Ĉ").replace("^2", "²").replace(" - ", " − ")


def cells(entry, *keys, none="–"):
    """Write entry[key] for every key: an interval where the key ends in _ci, else a number.

    Text and whole numbers stay as they are.
    """
    texts = []
    for key in keys:
        x = entry[key]
        if key.endswith("_ci"):
            texts.append(interval(x, none))
        else:
            texts.append(x if isinstance(x, int | str) else figures.num(x, none))
    return texts


def references(split):
    """(name, Brier score, its interval, error against the truth, how) of each reference line.

    split: metrics["splits"]["test"]. Where the true fractions are known, the last is theorem 2.
    """
    rows = [
        (name, split[key], split[f"{key}_ci"], split.get(true_key), how)
        for name, key, true_key, how in REFERENCES
    ]
    whole, c = split["ensemble"][-1], split["irreducible"]
    if whole["true_error"] is not None:
        k = whole["k"]
        bound = None if c is None else theory.theorem2(k, c)
        how = "some k-ensemble reaches 1/(4k) + C_hat"
        rows.append((f"Theorem 2 at k = {k}", bound, None, theory.theorem2(k), how))
    return rows


def chosen_size(metrics):
    """The k that validation prompts choose, or None; weights from elsewhere leave no choice."""
    several = len(metrics["splits"]["test"]["ensemble"]) > 1
    return metrics["k_valid"] if several else None


def table(metrics):
    """The result table in plain text, at most 100 columns."""
    split = metrics["splits"]["test"]
    title = (
        f"{metrics['dataset']}, test split: {split['prompts']} prompts, {split['pairs']} pairs, "
        f"{split['annotators_mean']:.1f} votes a pair. All errors: lower is better."
    )
    head = ("k", "Brier", "95 % interval", "soft", "excess", "true err.", "L1", "r")
    form = "{:>3}  {:>6}  {:>14}  {:>6}  {:>6}  {:>9}  {:>5}  {:>6}  "
    lines = [*textwrap.wrap(title, 100), "", form.format(*head) + "mixture weights"]
    for entry in split["ensemble"]:
        row = form.format(entry["k"], *cells(entry, *ERRORS, none="-"))
        alpha = " ".join(figures.short(a).ljust(3) for a in entry["alpha"])
        indent = {"initial_indent": row, "subsequent_indent": " " * len(row)}
        lines += textwrap.wrap(alpha, 100, **indent)
    if chosen_size(metrics):
        k = metrics["k_valid"]
        lines.append(f"on validation prompts the Brier score is least with k = {k}")

    form = "{:<42}{:>6}  {:>14}  {:>9}"
    lines += ["", form.format("reference lines", "Brier", "95 % interval", "true err.")]
    for name, brier, limits, true_error, _ in references(split):
        lines.append(
            form.format(
                name, figures.num(brier, "-"), interval(limits, "-"), figures.num(true_error, "-")
            )
        )

    form = "{:>6}  {:>6}  {:>6}  {:>14}  {:>6}  {:>8}"
    head = ("member", "Brier", "Phi", "95 % interval", "regret", "accuracy")
    warning = "  (accuracy: unsuitable, for comparison with other work)"
    lines += ["", form.format(*head) + warning]
    keys = ("brier", "disagreement", "disagreement_ci", "regret", "accuracy")
    lines += [form.format(m["j"], *cells(m, *keys, none="-")) for m in split["members"]]
    return "\n".join([*lines, "", *textwrap.wrap(LEGEND, 100)])


# ---- what report.html.jinja shows


def distinct(stages, key):
    """The different values of a key of dicts, in order; of an absolute path the last two parts."""
    values = dict.fromkeys(str(stage[key]) for stage in stages if stage.get(key) is not None)
    return ["/".join(Path(v).parts[-2:]) if Path(v).is_absolute() else v for v in values]


def origin(stages):
    """How the run came about, as lists of texts; what the manifest does not say is an empty list.

    stages: the manifest's, by name, whose keys may be missing.
    """
    names = sorted(stages)
    settings = [stages[x].get("settings") or {} for x in names if x.startswith("member_")]
    formulas = dict.fromkeys(
        (stages[x]["settings"].get("target"), stages[x]["target_formula"])
        for x in names
        if "target_formula" in stages[x]
    )
    shown_alone = ("target", "train", "base", "seed")
    keys = dict.fromkeys(key for entry in settings for key in entry if key not in shown_alone)
    others = {key: ", ".join(distinct(settings, key)) for key in keys}
    commits = distinct(stages.values(), "git_commit")  # "+" at the end: changed since
    versions = {k: v for stage in stages.values() for k, v in (stage.get("versions") or {}).items()}
    return {
        "base": distinct([*settings, *stages.values()], "base"),
        "train": distinct(settings, "train"),
        "targets": [pretty(f"{name}: {formula}") for name, formula in formulas],
        "seeds": distinct(settings, "seed"),
        "data_seeds": distinct([stages.get("data", {}).get("settings") or {}], "seed"),
        "settings": [f"{key} {text}" for key, text in others.items() if text],
        "dates": sorted(distinct(stages.values(), "date")),
        "commits": [x[:12] + "+" * x.endswith("+") for x in commits],
        "versions": [f"{name} {version}" for name, version in sorted(versions.items())],
        "commands": list(dict.fromkeys(x["command"] for x in stages.values() if x.get("command"))),
    }


def comparisons(split):
    """The reference lines that the ensemble's score is compared with, as dicts.

    certain: whether the whole interval lies on the same side; None where the two are equal.
    """
    whole, lines = split["ensemble"][-1], []
    brier, (low, high) = whole["brier"], whole["brier_ci"]
    for name, value, *_ in references(split)[:3]:
        if value is not None:
            side = "below" if brier < value else "above" if brier > value else "equal to"
            certain = None if brier == value else high < value or low > value
            lines.append({"name": name, "value": value, "side": side, "certain": certain})
    return lines


def favourites(cases):
    """(prompt, rows) of each case; members with the same favourite share a row."""
    shown = []
    for case in cases:
        members = {}
        for j, text in enumerate(case["texts"], 1):
            members.setdefault(text, []).append(str(j))
        shown.append((case["prompt"], [(", ".join(js), text) for text, js in members.items()]))
    return shown


def values(metrics, weights, stages):
    """All that report.html.jinja shows, but the figures."""
    split, diversity = metrics["splits"]["test"], metrics["diversity"] or {}
    outlier_limits = [member["outlier_below"] or [None] for member in split["members"]]
    return {
        "title": f"Pairwise calibrated rewards: {metrics['dataset']}, K = {metrics['k']}",
        "metrics": metrics,
        "chosen": chosen_size(metrics),
        "comparisons": comparisons(split),
        "references": [
            (pretty(name), figures.num(x), interval(limits), figures.num(true), pretty(how))
            for name, x, limits, true, how in references(split)
        ],
        "member_names": [f"member {member['j']}" for member in split["members"]],
        "outliers_known": all(None not in limits for limits in outlier_limits),
        "favourites": favourites(diversity.get("favourites") or ()),
        "weights": weights,
        "stages": stages,
        "origin": origin(stages),
    }


# ---- pages


def embed(fig, svg):
    """What the macro `figure` of a template shows; svg: what figures.save returned for fig."""
    width = round(fig.get_size_inches()[0] / figures.WIDE * 860)
    return {"width": width, "svg": base64.b64encode(svg).decode()}


def render(template, **values):
    """The page that a template makes of values, as text. All values are escaped.

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
    filters = (figures.num, figures.short, interval, pretty, cells)
    environment.filters |= {function.__name__: function for function in filters}
    return environment.get_template(Path(template).name).render(values)


def write(out, metrics, weights, manifest, logs, p, p_hat):
    """Write out/figures/*.png, *.pdf and out/report.html; returns the report's path.

    metrics, weights, manifest: what the files of these names hold; keys of the manifest may be
    missing. logs: {title: list of steps}; p, p_hat (pairs,): the test split's vote fractions and
    the full ensemble's predictions.
    """
    out = Path(out)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    diversity = metrics["diversity"]
    images = {}
    with matplotlib.rc_context(figures.STYLE):
        drawn = {
            "calibration": figures.calibration(metrics["splits"]["test"], chosen_size(metrics)),
            "votes": figures.majority_shares(p),
            "reliability": figures.reliability(p, p_hat),
            "kendall": figures.kendall(diversity),
            "wins": figures.wins(diversity),
            "policies": figures.policies(diversity),
            "weights": figures.mixture_weights(weights),
            "training": figures.training(logs),
        }
        for name, fig in drawn.items():
            if fig is not None:
                images[name] = embed(fig, figures.save(fig, out / "figures" / name))
    for name in drawn.keys() - images.keys():  # An earlier evaluation may have drawn them.
        for kind in ("png", "pdf"):
            (out / "figures" / f"{name}.{kind}").unlink(missing_ok=True)
    shown = values(metrics, weights, manifest.get("stages") or {})
    page = render(Path(__file__).with_name("report.html.jinja"), images=images, **shown)
    with run_dir.replacing(out / "report.html") as partial:
        partial.write_text(page, encoding="utf-8")
    return out / "report.html"
