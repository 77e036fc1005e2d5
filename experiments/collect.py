"""The test figures of many finished runs as one table, from which docs/results.md quotes.

    python experiments/collect.py --runs runs/demo_? runs/demo-hard_? --out results/demo.csv

A row of the file is a run and a number of members k, with the settings by which its members were
made. Figures are of test prompts, but those that end in _valid, by which settings may be chosen.
Printed are the mean and the range of the Brier score over the runs whose names differ in the number
at their end alone. The ids of each run's validation and test prompts go into OUT's neighbour
OUT_splits.jsonl, a line for all the runs of one split.
"""

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "extras"))
from pairwise import cli, data, files, manifest, run_dir

import numpy as np
import paper

MADE_BY = ("joint", "harden", "member_02", "member_01")  # The target is nothing to a first member.
SETTINGS = (
    *("train", "target", "loss", "margin_from", "lr", "epochs", "pairs_per_step"),
    *("precondition_frequency", "layout", "sharpen", "weights"),
)
FIGURES = ("brier", "l1", "pearson", "brier_soft", "l1_soft", "pearson_soft", "true_error")
REFERENCES = (
    *("floor_single", "floor_excess", "coin_flip", "soft_single", "soft_scaled", "irreducible"),
    *("floor_true", "coin_true", "soft_true"),
)
SOFT = ("brier_soft_1", "l1_soft_1", "pearson_soft_1")  # of member 1, by agreement of the votes


def rows_of(run):
    """The rows of one run, {column: value}. Raises InputError where it is not evaluated."""
    stages, evaluation = manifest.entries(run), paper.read_evaluation(run)
    test, plurality = evaluation["splits"]["test"], evaluation.get("plurality")
    made_by = next((name for name in MADE_BY if name in stages), None)
    if made_by is None:
        raise cli.InputError(f"{run}: no trained members found, a finished run expected")
    if missing := {*REFERENCES} - {*test}:
        again = f"python evaluate.py --run {run} makes it anew"
        raise cli.InputError(f"{run / 'metrics.json'}: no {min(missing)!r} found; {again}")
    settings = stages[made_by]["settings"]
    if run_dir.kind_of(run) == "pruned":
        made_by = "prune"
    row = {"run": run.name, "made_by": made_by.split("_")[0]}
    stats = data.read_stats(run)
    row |= {"data_seed": stats.get("seed"), "train_share": stats.get("train_share")}
    row |= {"seed": settings.get("seed")}
    row |= {name: settings.get(name) for name in SETTINGS}
    references = {name: test[name] for name in REFERENCES}
    for level in test["agreement"] or []:
        references |= {f"{name} {level['level']}": level[name] for name in SOFT}
    if plurality:
        references["gain"] = plurality["gain"]
        references |= dict(zip(("gain_low", "gain_high"), plurality["ci"]))
    valid = evaluation["splits"].get("valid", {"soft_single": None, "ensemble": []})
    references["soft_single_valid"] = valid["soft_single"]
    brier_valid = {entry["k"]: entry["brier"] for entry in valid["ensemble"]}
    return [
        row
        | {"k": entry["k"], "brier_valid": brier_valid.get(entry["k"])}
        | {name: entry[name] for name in FIGURES}
        | dict(zip(("brier_low", "brier_high"), entry["brier_ci"] or ("", "")))
        | references
        for entry in test["ensemble"]
    ]


def write_csv(path, table, form=".6f"):
    """Write rows {column: value}; a row that lacks a column leaves it empty. form: of floats."""
    with (
        files.replacing(path) as partial,
        open(partial, "w", newline="", encoding="utf-8") as file,
    ):
        rows = csv.DictWriter(file, list(dict.fromkeys(name for row in table for name in row)))
        rows.writeheader()
        for row in table:
            rows.writerow(
                {name: f"{x:{form}}" if isinstance(x, float) else x for name, x in row.items()}
            )


def write_splits(out, splits_of_runs):
    """Write OUT_splits.jsonl, {runs: names, valid: ids, test: ids} of every distinct split;
    splits_of_runs: (name of a run, {split: data.Split}), ..."""
    found = {}
    for run, splits in splits_of_runs:
        ids = (splits[name].prompt_id if name in splits else () for name in ("valid", "test"))
        found.setdefault(tuple(tuple(map(str, each)) for each in ids), []).append(run)
    with files.replacing(out.with_name(f"{out.stem}_splits.jsonl")) as partial:
        files.write_lines(
            partial,
            [{"runs": runs, "valid": ids[0], "test": ids[1]} for ids, runs in found.items()],
        )


def summary(rows):
    """{(name without the number at its end, k): Brier scores, float64 (runs,), the runs in order}
    of rows of rows_of."""
    groups = {}
    for row in rows:
        key = row["run"].rstrip("0123456789"), row["k"]
        groups.setdefault(key, []).append(row["brier"])
    return {key: np.array(values) for key, values in groups.items()}


def main(args):
    rows = []
    for run in args.runs:
        of_run = [row for row in rows_of(run) if args.k is None or row["k"] in args.k]
        if not of_run:
            raise cli.InputError(f"{run}: fewer members found than --k {min(args.k)}")
        rows += of_run
    write_csv(args.out, rows, ".6g")
    write_splits(args.out, ((run.name, data.read_splits(run)[0]) for run in args.runs))
    for (name, k), brier in summary(rows).items():
        print(
            f"{name}, k {k}: {len(brier)} runs, Brier score {brier.mean():.4f}, "
            f"{brier.min():.4f} to {brier.max():.4f}"
        )


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--runs", required=True, nargs="+", type=cli.path, help="evaluated runs")
    add("--out", required=True, type=run_dir.output, help="FILE.csv")
    add("--k", nargs="+", type=cli.member_number, help="numbers of members (default: all)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
