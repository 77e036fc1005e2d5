"""Make the rewards of a variant the members of the run on whose features they were fitted.

    python experiments/populations.py --run runs/camps --population camps
    python experiments/make_members.py --run runs/camps --variant fsam_centered        (seconds)
    python fit_weights.py --run runs/camps
    python evaluate.py --run runs/camps

The variants are those of variants.py whose members are linear rewards; their penalties are chosen
on validation prompts. What is written is as of extras/import_scores.py: RUN/rewards/0j_SPLIT.npy,
and no model.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "extras"))
from pairwise import cli, data, run_dir

import import_scores
import numpy as np
import plurality
import torch
import variants

LINEAR = [name for name in variants.HARD if name == "joint" or name.startswith("fsam")]


def main(args):
    run, k, seed, name = args.run, args.k, args.seed, args.variant
    torch.set_num_threads(args.threads)
    run_dir.check_own_run(run)
    splits, _ = data.read_splits(run)
    if "valid" not in splits:
        raise cli.InputError(f"{run}: no validation prompts found, on which penalties are chosen")
    featured = plurality.read_run(run, seed)
    made = variants.variants(featured, k, seed, [name])[name]
    rewards = plurality.rewards_of(made.heads, featured)
    source = f"experiments/variants.py, {made.chosen}, seed {seed}"
    for j, of_splits in enumerate(zip(*(rewards[split] for split in splits)), 1):
        import_scores.write_member(run, source, j, name, np.concatenate(of_splits), splits)


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    cli.add_run(parser, "run directory with data/ and features/, without members")
    add("--variant", choices=LINEAR, required=True, help="whose rewards to take")
    add("--k", type=cli.member_number, default=8, help="members")
    add("--seed", type=cli.seed, default=0, help="of the fits")
    add("--threads", type=cli.threads, default=1, help="CPU threads")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
