"""Does respond.py --mode steerable find the right member? The demo's viewpoints are known: one
makes a few comparisons, and members are judged on the rest.

    python experiments/steerable.py --run results/demo          (seconds; stored rewards, no model)

A trial draws --comparisons pairs of the test prompts; a viewpoint of data_prep/demo.py, drawn by
its weight, chooses in each with its own noise. What counts is the fraction of that viewpoint's
votes on all other pairs that the chosen member sides with, on average, beside that of a member
drawn by weight.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "extras"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data_prep"))
from pairwise import cli, data, run_dir

import demo
import numpy as np
import respond


def attributes_of(topic, text):
    """The attributes, float64 (attributes,), of a text by demo.write_response."""
    shows = {
        "long": sum(tip in text for tip in demo.TOPICS[topic]) > 2,
        "hedged": demo.HEDGE in text,
        "formal": text.startswith(demo.OPENING[1]),
        "evidence": demo.EVIDENCE in text,
        "warm": demo.WARM in text,
        "direct": "you must" in text,
        "list": " 1 ) " in text,
        "rude": demo.RUDE in text,
    }
    return np.array([shows[name] for name in demo.ATTRIBUTES], float)


def viewpoint_preferences(split):
    """The fraction of each viewpoint's votes that prefer a, float64 (viewpoints, N)."""
    utilities = []
    for messages, texts in zip(split.messages, split.responses):
        question = messages[-1]["content"]
        topics = [topic for topic in demo.TOPICS if f" {topic} " in question]
        contexts = [name for name, words in demo.CONTEXTS.items() if question.startswith(words)]
        if not (topics and contexts):
            raise cli.InputError(f"{question[:60]!r} found, a prompt of the demo expected")
        topic, context = topics[0], contexts[0]
        attributes = np.array([attributes_of(topic, text) for text in texts])
        utilities.append(demo.utilities(context, attributes))
    u = np.concatenate(utilities, axis=1)
    return 1 / (1 + np.exp(-(u[:, split.a] - u[:, split.b]) / demo.NOISE))


def trials(rewards, alpha, preferences, a, b, count, comparisons, rng):
    """Yield (viewpoint, chosen member, its probability, agreement on unseen pairs (K,)).

    rewards float32 (K, R); alpha (K,); preferences float64 (viewpoints, N); a, b (N,).
    """
    k = len(alpha)
    rewards_of_pairs = rewards[:, np.stack([a, b], 1)]
    weights = [weight for weight, _ in demo.VIEWPOINTS.values()]
    for _ in range(count):
        viewpoint = rng.choice(len(preferences), p=weights)
        seen, unseen = np.split(rng.permutation(len(a)), [comparisons])
        choices = (rng.random(comparisons) < preferences[viewpoint, seen]).astype(float)
        agreed = respond.agreements(rewards_of_pairs[:, seen].reshape(k, -1), choices)
        p = respond.posterior(alpha, agreed, comparisons)
        agreed_unseen = respond.agreements(
            rewards_of_pairs[:, unseen].reshape(k, -1), preferences[viewpoint, unseen]
        )
        yield viewpoint, int(p.argmax()), float(p.max()), agreed_unseen / len(unseen)


def main(args):
    split, k = data.read_split(args.run, "test"), run_dir.count_members(args.run)
    alpha = run_dir.read_weights(args.run, k)
    rewards = run_dir.read_rewards(args.run, "test", k, (split.n_responses,))
    if args.comparisons >= len(split.a):
        expected = f"fewer than the {len(split.a)} test pairs expected"
        raise cli.InputError(f"--comparisons {args.comparisons}: {expected}")
    rng, prefers = np.random.default_rng(args.seed), viewpoint_preferences(split)
    results = trials(rewards, alpha, prefers, split.a, split.b, args.trials, args.comparisons, rng)
    viewpoint, chosen, probability, agreement = map(np.array, zip(*results))
    own, drawn = agreement[np.arange(len(chosen)), chosen], agreement @ alpha
    best, is_best = agreement.max(1), chosen == agreement.argmax(1)
    print(
        f"{args.trials} trials of {args.comparisons} comparisons; share of the viewpoint's other "
        f"votes that a member agrees with: the chosen {own.mean():.3f}, "
        f"one drawn by weight {drawn.mean():.3f}, the best {best.mean():.3f}"
    )
    print(
        f"the chosen at least as well as the drawn in {(own >= drawn).mean():.2f} of the trials; "
        f"the best of all in {is_best.mean():.2f}, its own probability {probability.mean():.2f}"
    )
    for v, name in enumerate(demo.VIEWPOINTS):
        at = viewpoint == v
        if at.any():
            print(
                f"  {name:8} {at.sum()} trials: {own[at].mean():.3f}, {drawn[at].mean():.3f}, "
                f"{best[at].mean():.3f}; {(own[at] >= drawn[at]).mean():.2f}"
            )


# So many take minutes.
trials_number = cli.number_type(
    "trials", cli.integer, lambda v: 1 <= v <= 10**5, "an integer from 1 to 10^5"
)


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--run", type=cli.path, default=Path("results/demo"), help="a run of the demo")
    add("--trials", type=trials_number, default=100, help="viewpoints drawn")
    add("--comparisons", type=cli.natural, default=10, help="that a viewpoint makes")
    add("--seed", type=cli.seed, default=0, help="of the trials")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
