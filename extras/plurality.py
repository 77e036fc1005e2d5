"""Plurality gain: by how much a mixture of rewards predicts held-out votes better than the best single reward, on frozen features.

    python extras/plurality.py --run runs/mine          (RUN/plurality.json; seconds to minutes on one thread)

single     Brier score of a + (1 - 2a) sigmoid(tau (r(y1) - r(y2))), r trained on p to convergence, so that seeds have nothing left to average
mixture    that of the soft mixture of M rewards trained jointly, with lapses and scale alike; M, L2 penalties, tau and a are chosen on validation
           prompts; M = 1, the single reward itself, unless the mixture is better there by two standard errors
gain       single - mixture on test prompts, with its 95 % interval over prompts. Above zero: no single reward with this link explains the vote
           fractions. An interval that holds zero: one reward predicts them as well, which does not mean that people agree.
"""

import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "extras"), str(ROOT / "experiments")]
from variants import brier, read_run, soft_mixtures, soft_single

from evaluate import by_prompt, resampled
from pairwise import cli, run_dir


def plurality(data, number):
    """{single, mixture, components, gain, ci} of data {split: (Split, features)}; number: the seed."""
    single = soft_single(data, number)[2]
    m, (_, _, mixed) = min(
        soft_mixtures(data, number).items(),
        key=lambda item: brier(item[1][2]["valid"], data["valid"][0]),
    )

    def errors_on(name):
        """Squared errors of single and mixture, and pairs, summed over each prompt, (P, 3)."""
        split = data[name][0]
        return by_prompt(
            split,
            np.stack(
                [(single[name] - split.p) ** 2, (mixed[name] - split.p) ** 2, np.ones(len(split.p))]
            ),
        )

    better = errors_on("valid") @ [1, -1, 0]
    if (
        better.sum() < 2 * np.sqrt(len(better)) * better.std()
    ):  # by less than two standard errors: it may be noise
        m, mixed = 1, single
    errors = errors_on("test")
    drawn = resampled(errors, 10000, number)
    limits = np.percentile((drawn[:, 0] - drawn[:, 1]) / drawn[:, 2], [2.5, 97.5])
    one, several, pairs = errors.sum(0)
    return {
        "single": one / pairs,
        "mixture": several / pairs,
        "components": m,
        "gain": (one - several) / pairs,
        "ci": limits.tolist(),
    }


def main(args):
    torch.set_num_threads(args.threads)
    (data,) = read_run(args.run, args.seed)
    found = plurality(data, args.seed)
    run_dir.write_json(args.run / "plurality.json", found)
    print(
        f"plurality: single {found['single']:.4f}, mixture of {found['components']} {found['mixture']:.4f}, gain {found['gain']:+.4f} "
        f"[{found['ci'][0]:+.4f}, {found['ci'][1]:+.4f}]"
    )


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--run",
        required=True,
        type=Path,
        help="run directory with data/ and features/ (train_rm.py --train head makes them)",
    )
    parser.add_argument("--seed", type=cli.seed, default=0, help="of the fits and the bootstrap")
    parser.add_argument("--threads", type=cli.natural, default=1, help="CPU threads")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
