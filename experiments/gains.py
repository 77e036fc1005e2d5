"""The plurality gains of several runs as one table: results/plurality.csv.

    python experiments/gains.py --runs runs/clusters_? runs/ukp_mse_? --out results/plurality.csv

A row a run, as extras/plurality.py has left it in RUN/plurality.json: the Brier scores of the best
single soft reward and of the mixture, the number of its components, the gain and the limits of its
95 % interval; components 1 and gain 0 where no mixture was two standard errors better on validation
prompts. `several_` are the same of the best mixture of two or more there, chosen or not.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
from pairwise import cli, files, manifest, run_dir

import collect


def row_of(run):
    """{column: value} of a run. Raises InputError where its plurality.json is missing or unfit."""
    path = run / "plurality.json"
    manifest.check(run, path)
    if not path.exists():
        raise cli.InputError(f"{path}: no such file; extras/plurality.py makes it")
    found = files.read_json(path, evaluate.PLURALITY)
    row = {"run": run.name, "single": found["single"]}
    for prefix, gain in (("", found), ("several_", found["several"])):
        row |= {f"{prefix}{name}": gain[name] for name in ("mixture", "components", "gain")}
        row |= dict(zip((f"{prefix}gain_low", f"{prefix}gain_high"), gain["ci"]))
    return row


def main(args):
    collect.write_csv(args.out, [row_of(run) for run in args.runs], ".6g")
    print(f"{args.out}: {len(args.runs)} runs")


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--runs", type=cli.path, nargs="+", required=True, help="runs with plurality.json")
    add("--out", type=run_dir.output, required=True, help="FILE.csv")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
