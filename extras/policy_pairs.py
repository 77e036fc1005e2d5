"""One member's preferences among the continuations, as TRL's DPOTrainer reads them: what turns member j into policy j.

    python extras/policy_pairs.py --run runs/demo --member 1 --out runs/demo-policy-1/pairs/train.jsonl

A row is a pair: prompt, the conversation; chosen and rejected, each the answer as a turn of the assistant. Of a prompt's distinct continuations the
chosen is drawn from the quarter that the member ranks highest, the rejected from the quarter that it ranks lowest; no pair twice, none of equal rewards.
"""

import itertools
from pathlib import Path

import numpy as np

from pairwise import cli, run_dir
from pairwise.ranking import distinct


def pairs(texts, rewards, count, rng):
    """At most `count` index pairs (chosen, rejected) of a prompt's texts (n,), by rewards (n,)."""
    best = distinct(texts)
    best = best[np.argsort(-rewards[best], kind="stable")]
    quarter = max(1, len(best) // 4)
    found = [
        (a, b)
        for a, b in itertools.product(best[:quarter], best[-quarter:])
        if rewards[a] > rewards[b]
    ]
    return [found[i] for i in rng.permutation(len(found))[:count]]


def main(args):
    texts = run_dir.read_continuations(args.run)
    if texts is None:
        raise cli.InputError(
            f"{args.run / 'continuations.parquet'}: no such file; data_prep/continuations.py makes it"
        )
    shape = len(texts["texts"]), len(texts["texts"][0])
    rewards = run_dir.read_rewards(args.run, "continuations", args.member, shape)[-1]
    rng, rows = np.random.default_rng([args.seed, args.member]), []
    for messages, answers, of_prompt in zip(texts["messages"], texts["texts"], rewards):
        for pair in pairs(answers, of_prompt, args.pairs, rng):
            chosen, rejected = ([{"role": "assistant", "content": answers[i]}] for i in pair)
            rows.append({"prompt": messages, "chosen": chosen, "rejected": rejected})
    if not rows:
        raise cli.InputError(
            f"{args.run}: member {args.member} prefers no continuation to another, no pair can be exported"
        )
    with run_dir.replacing(args.out) as partial:
        run_dir.write_lines(partial, rows)
    print(
        f"policy_pairs: {len(rows):,} pairs of member {args.member} from {shape[0]:,} prompts in {args.out}"
    )


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add(
        "--run",
        required=True,
        type=Path,
        help="run directory with continuations.parquet and the member's rewards of it",
    )
    add("--member", required=True, type=cli.natural, metavar="J")
    add(
        "--out",
        required=True,
        type=Path,
        metavar="FILE",
        help="JSON lines; TRL takes the directory that it is alone in",
    )
    add("--pairs", type=cli.natural, default=8, help="of each prompt, at most")
    add("--seed", type=cli.seed, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
