"""Simulate a population with features and known truth: a run directory that variants.py and
extras/plurality.py read, without a base model; make_members.py gives it members.

    python experiments/populations.py --run runs/camps --population camps --seed 0      (a second)

A response is a feature x ~ N(0, I), a voter a direction w who prefers the response with the larger
w'x; p_true is the fraction of the voters who prefer the first.

    clusters    three directions at random, voters within a tenth of theirs
    continuum   directions spread around a common one, as far as it is long
    camps       two groups, .6 and .4 of the voters, who agree on one direction and are opposed on
                another, half as far around each
    single      one direction for all, who vote as sigmoid(2 w'(x1 - x2)): noise and no second
                viewpoint
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pairwise import cli, data, files, manifest

import numpy as np

PROMPTS = {"train": 300, "valid": 60, "test": 150}


def random_of(name, seed):
    """The generator that a population is drawn from: its viewpoints first."""
    return np.random.default_rng([seed, sum(name.encode())])


def viewpoints(name, d, rng):
    """(directions (V, d), shares of the voters (V,), distance of the voters from them)."""

    def unit(*shape):
        return unit_vectors(rng, *shape, d)

    if name == "clusters":
        return unit(3), np.array([0.4, 0.3, 0.3]), 0.1
    if name == "camps":
        return 0.5 * unit(1) + [[1], [-1]] * unit(1), np.array([0.6, 0.4]), 0.5
    return unit(1), np.ones(1), float(name == "continuum")


def unit_vectors(rng, *shape):
    """Random directions, float64."""
    x = rng.normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def directions(name, d, voters, rng):
    """The voters' directions, float64 (voters, d)."""
    centres, shares, distance = viewpoints(name, d, rng)
    group = np.digitize(np.arange(voters) / voters, np.cumsum(shares)[:-1])
    return centres[group] + (distance * unit_vectors(rng, voters, d) if distance else 0)


def prompt_row(prompt_id, x, p, a, b, votes_a, votes):
    """A prompt as data.write_split takes it; x (responses, d); p, a, b, votes_a: of its pairs."""
    pairs = [
        {"a": int(i), "b": int(j), "votes_a": float(n), "votes_b": float(votes - n), "ties": 0.0}
        for i, j, n in zip(a, b, votes_a)
    ]
    return {
        "prompt_id": prompt_id,
        "messages": [{"role": "user", "content": prompt_id}],
        "responses": [f"response {i}" for i in range(len(x))],
        "pairs": pairs,
        "p_true": p.tolist(),
    }


def population(name, seed, d, responses, votes, voters):
    """{split: (prompt rows, features float32 (R, d))} of one population."""
    rng = random_of(name, seed)
    w, splits = directions(name, d, voters, rng), {}
    first, second = np.triu_indices(responses, 1)
    for split, prompts in PROMPTS.items():
        rows, features = [], rng.normal(size=(prompts, responses, d)).astype(np.float32)
        for i, x in enumerate(features):
            swap = rng.random(len(first)) < 0.5  # Who stands first carries no information.
            a, b = np.where(swap, second, first), np.where(swap, first, second)
            margin = (x[a] - x[b]) @ w.T  # (pairs, voters)
            prefers = (margin > 0).astype(float)
            if name == "single":
                prefers = 1 / (1 + np.exp(-2 * margin))
            p = prefers.mean(1)
            rows.append(prompt_row(f"{split} {i}", x, p, a, b, rng.binomial(votes, p), votes))
        splits[split] = rows, features.reshape(-1, d)
    return splits


def main(args):
    names = ("population", "seed", "dimension", "responses", "votes", "voters")
    settings = {name: getattr(args, name) for name in names}
    if manifest.stage_done(args.run, "data", settings, {}, [args.run / "data" / "test.parquet"]):
        print(f"data: {args.run / 'data'} is there, skipped")
        return
    started = manifest.begin_stage(args.run, "data", settings, {})
    (args.run / "data").mkdir(exist_ok=True)
    for split, (rows, features) in population(*settings.values()).items():
        with files.replacing(args.run / "data" / f"{split}.parquet") as partial:
            data.write_split(partial, rows)
        files.write_array(args.run / "features" / f"{split}.npy", features)
    dataset = f"{args.population} {args.seed}"
    stats = settings | {"dataset": dataset, "votes": "sampled", "ties": "drop"}
    files.write_json(args.run / "data" / "stats.json", stats)
    manifest.end_stage(args.run, "data", settings, {}, started)
    print(f"data: {args.run / 'data'}: {dataset}")


# One response has no pair, one vote no spread; more than the upper ends fits no memory.
responses = cli.number_type("responses", cli.integer, lambda v: 2 <= v <= 100, "from 2 to 100")
votes = cli.number_type("votes", cli.integer, lambda v: 2 <= v <= 10**6, "from 2 to 10^6")
size = cli.number_type("size", cli.integer, lambda v: 1 <= v <= 10**4, "from 1 to 10^4")


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--run", required=True, type=cli.path, help="the run directory to make")
    populations = "clusters", "continuum", "camps", "single"
    add("--population", choices=populations, required=True, help="see above")
    add("--seed", type=cli.seed, default=0, help="of the population, the responses and the votes")
    add("--dimension", type=size, default=16, help="of the features")
    add("--responses", type=responses, default=4, help="a prompt; all their pairs are voted on")
    add("--votes", type=votes, default=5, help="a pair, at least 2")
    add("--voters", type=size, default=200, help="of the population")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
