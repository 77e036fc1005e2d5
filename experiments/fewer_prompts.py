"""The data of a run with fewer train prompts, as a run of its own: what do more votes bring?

    python experiments/fewer_prompts.py --of runs/ukp --share 0.25 --run runs/ukp_quarter
    python train_rm.py --run runs/ukp_quarter --iteration 1 --base ..      # then fit_weights.py ..

Validation and test prompts are the same. With one seed, the train prompts of a smaller share are
among those of a larger one.
"""

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pairwise import cli, data, files, manifest

import numpy as np

# of stats.json
KEPT = ("dataset", "votes", "seed", "ties", "attributes", "own_split", "no_prompts")


def drawn(count, share, seed):
    """The places of the prompts kept of `count`, ascending, int (round(share count),), 1 or more:
    the first of a random order."""
    order = np.random.default_rng(seed).permutation(count)
    return np.sort(order[: max(1, round(share * count))])


def main(args):
    source, run = args.of, args.run
    splits, stats = data.read_splits(source)
    settings, inputs = {"share": args.share, "seed": args.seed}, data.hashes(source)
    if manifest.stage_done(run, "data", settings, inputs, [run / name for name in inputs]):
        return
    kept = drawn(len(splits["train"].prompt_id), args.share, args.seed)
    started = manifest.begin_stage(run, "data", settings, inputs)
    (run / "data").mkdir(exist_ok=True)
    for name in splits:
        given, made = (directory / "data" / f"{name}.parquet" for directory in (source, run))
        with files.replacing(made) as partial:
            if name == "train":
                files.write_parquet(partial, files.read_parquet(given).take(kept))
            else:
                shutil.copyfile(given, partial)
    stats = {name: stats[name] for name in KEPT if name in stats} | {"train_share": args.share}
    files.write_json(run / "data" / "stats.json", stats)
    manifest.end_stage(run, "data", settings, inputs, started)
    print(f"{run}: {len(kept)} of {len(splits['train'].prompt_id)} train prompts")


share = cli.number_type("share", cli.decimal, lambda v: 0 < v < 1, "a number between 0 and 1")


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--of", required=True, type=cli.path, help="a run directory with data/")
    add("--run", required=True, type=cli.path, help="the run directory to make")
    add("--share", required=True, type=share, help="of the train prompts")
    add("--seed", type=cli.seed, default=0, help="of the prompts drawn")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
