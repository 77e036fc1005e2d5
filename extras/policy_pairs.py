"""One member's preferences among the continuations, as TRL's DPOTrainer reads them.

    python extras/policy_pairs.py --run runs/demo --member 1 --out runs/policy1/pairs/train.jsonl

They turn member j into policy j. A row is a pair: prompt, the conversation; chosen and rejected,
each the answer as a turn of the assistant. Of a prompt's distinct continuations the chosen one is
drawn from the quarter that the member ranks highest, the rejected one from the quarter that it
ranks lowest. No pair occurs twice, and none has equal rewards.
"""

import itertools

from pairwise import cli, files, ranking, run_dir

import numpy as np


def pairs(texts, rewards, count, rng):
    """Draw at most `count` index pairs (chosen, rejected) of a prompt's texts, by rewards (n,)."""
    ranked = ranking.distinct(texts)
    ranked = ranked[np.argsort(-rewards[ranked], kind="stable")]
    quarter = max(1, len(ranked) // 4)
    candidates = [
        (chosen, rejected)
        for chosen, rejected in itertools.product(ranked[:quarter], ranked[-quarter:])
        if rewards[chosen] > rewards[rejected]
    ]
    return [candidates[i] for i in rng.permutation(len(candidates))[:count]]


def main(args):
    continuations = run_dir.read_continuations(args.run)
    if continuations is None:
        path = args.run / "continuations.parquet"
        raise cli.InputError(f"{path}: no such file; data_prep/continuations.py makes it")
    run_dir.check_whole(args.run, args.member, "continuations")
    messages, texts = continuations["messages"], continuations["texts"]
    shape = len(texts), len(texts[0])
    # Imported members before this one have no rewards of continuations.
    [rewards] = run_dir.read_rewards(args.run, "continuations", args.member, shape, args.member)
    rng, rows = np.random.default_rng([args.seed, args.member]), []
    for prompt, answers, prompt_rewards in zip(messages, texts, rewards):
        for pair in pairs(answers, prompt_rewards, args.pairs, rng):
            chosen, rejected = ([{"role": "assistant", "content": answers[i]}] for i in pair)
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    if not rows:
        indifferent = f"member {args.member} prefers no continuation to another"
        raise cli.InputError(f"{args.run}: {indifferent}, no pair can be exported")
    with files.replacing(args.out) as partial:
        files.write_lines(partial, rows)
    source = f"member {args.member} from {len(texts):,} prompts"
    print(f"policy_pairs: {len(rows):,} pairs of {source} in {args.out}")


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    run_help = "run directory with continuations.parquet and the member's rewards of it"
    cli.add_run(parser, run_help)
    add("--member", required=True, type=cli.member_number, metavar="J", help="whose order")
    out_help = "JSON lines; TRL takes the directory that it is alone in"
    add("--out", required=True, type=run_dir.output, metavar="FILE", help=out_help)
    add("--pairs", type=cli.natural, default=8, help="of each prompt, at most")
    add("--seed", type=cli.seed, default=0, help="of the draw of pairs")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
