"""Plurality gain: by how much a mixture of rewards predicts held-out votes better than the best
single reward, on frozen features.

    python extras/plurality.py --run runs/mine          (seconds to minutes on one thread)

single     Brier score of a + (1 - 2a) sigmoid(tau (r(y1) - r(y2))), where r is trained on p to
           convergence, so that seeds have nothing left to average
mixture    that of the soft mixture of M rewards trained jointly, with lapses and scale alike. M, L2
           penalties, tau and a are chosen on validation prompts; M is 1, the single reward itself,
           unless the mixture is better there by two standard errors (and by 1e-4)
gain       single - mixture on test prompts, with its 95 % interval over prompts. Above zero: no
           single reward with this link explains the vote fractions. Where M is 1 it is 0 by that
           rule, which is no estimate: few validation prompts miss a gain that is there.
several    the same of the mixture of two or more that is best on validation prompts, chosen or not:
           its interval says how large a gain the test prompts leave possible, and how large a loss

It reads RUN/data and RUN/features (train_rm.py --train head makes them) and writes
RUN/plurality.json, which evaluate.py shows. Where there are no validation prompts, a fifth of the
train prompts serve. Rewards are linear in the standardised features and fitted by L-BFGS.
"""

import dataclasses
from itertools import compress
from typing import NamedTuple

from pairwise import cli, data, files, manifest, metrics, run_dir, soft_model, training

import numpy as np
import torch
from scipy.optimize import minimize

L2_PENALTIES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
COMPONENTS = (1, 2, 3, 4, 6, 8)  # the numbers M of rewards in a mixture that are tried
LEAST = 1e-4  # Two equal rewards, each with its penalty, differ from one by a tenth of this.


class Featured(NamedTuple):
    """A split and the features of its responses, float64 (R, d)."""

    split: data.Split
    features: np.ndarray


def counted(featured):
    """A Featured of the pairs that data.counted_pairs leaves, and of the prompts that have one,
    alone; the same one where it leaves none."""
    if (split := data.counted_pairs(featured.split)) is None:
        return featured
    kept = restricted(featured, np.isin(featured.split.prompt_id, split.prompt_id))
    return kept._replace(split=data.counted_pairs(kept.split))


def restricted(featured, keep):
    """A Featured of the prompts keep, bool (P,), alone."""
    split = featured.split
    pairs = np.repeat(keep, np.diff(split.pair_start))
    responses = np.repeat(keep, np.diff(split.response_start))
    new_index = np.cumsum(responses) - 1
    fields = {"a": new_index[split.a[pairs]], "b": new_index[split.b[pairs]]}
    for name in (*data.VOTE_COLUMNS, "p_true", "judgments"):
        if (values := getattr(split, name)) is not None:
            fields[name] = values[pairs]
    for name in ("response_start", "pair_start"):
        sizes = np.diff(getattr(split, name))[keep]
        fields[name] = np.concatenate([[0], np.cumsum(sizes)])
    for name in ("prompt_id", "messages", "responses", "categories"):
        if (values := getattr(split, name)) is not None:
            fields[name] = list(compress(values, keep))
    return Featured(dataclasses.replace(split, **fields), featured.features[responses])


def standardised(splits):
    """{name: Featured} with features of mean 0 and standard deviation 1 on train."""
    features = splits["train"].features
    mean, scale = features.mean(0), training.spread(features)
    return {name: Featured(x.split, (x.features - mean) / scale) for name, x in splits.items()}


def read_features(run):
    """{name: Featured} of the splits of `run`. Raises InputError where one has no features, and
    where no test pair counts."""
    splits, (stored, _) = {}, data.read_splits(run)
    data.some_counted_pairs(run, "test", stored["test"])  # There must be some to evaluate.
    run_dir.check_stages(run, "data", "features")
    for name, split in stored.items():
        path = run / "features" / f"{name}.npy"
        if not path.exists():
            raise cli.InputError(f"{path}: no such file; train_rm.py --train head makes it")
        manifest.check(run, path)
        features, rows = files.read_array(path), split.n_responses
        if features.ndim != 2 or len(features) != rows or features.dtype.kind != "f":
            found = f"{features.dtype} {features.shape} found"
            raise cli.InputError(f"{path}: {found}, floats ({rows}, d) expected")
        if not np.isfinite(features).all():
            raise cli.InputError(f"{path}: features that are not finite found")
        splits[name] = counted(Featured(split, features.astype(np.float64)))
    if len(widths := {x.features.shape[1] for x in splits.values()}) > 1:
        found = ", ".join(map(str, sorted(widths)))
        raise cli.InputError(
            f"{run / 'features'}: {found} features found, as many in every split expected"
        )
    return splits


def read_run(run, seed):
    """{name: Featured} of train, valid and test, standardised; seed: of the choice of validation
    prompts where `run` has none."""
    splits = read_features(run)
    if "valid" not in splits:
        train = splits["train"]
        if len(train.split.prompt_id) < 2:
            words = "1 train prompt and none for validation found, at least 2 expected"
            raise cli.InputError(f"{run}: {words}")
        fifth = np.arange(len(train.split.prompt_id)) % 5
        held_out = np.random.default_rng(seed).permutation(fifth) == 0
        splits["valid"] = restricted(train, held_out)
        splits["train"] = restricted(train, ~held_out)
        print(f"{run}: no validation prompts; {held_out.sum()} of its train prompts serve")
    return standardised(splits)


def fit(train, loss, heads, l2, seed, start=None, parameters=0):
    """(weights float64 (heads, d), further parameters (parameters,)) that minimise
    loss(rewards_a, rewards_b, further parameters) / N + l2 |weights|^2.

    loss: a sum over the pairs, of tensors (N, heads); start: (weights, further parameters), else
    drawn from the seed so that rewards have unit variance.
    """
    d = train.features.shape[1]
    if start is None:
        drawn = np.random.default_rng(seed).normal(size=(heads, d)) / np.sqrt(d)
        start = drawn, np.zeros(parameters)
    features, a, b = map(torch.from_numpy, (train.features, train.split.a, train.split.b))

    def value_and_gradient(flat):
        x = torch.from_numpy(flat).requires_grad_()
        weight = x[: heads * d].view(heads, d)
        rewards = features @ weight.T
        total = loss(rewards[a], rewards[b], x[heads * d :]) / len(a) + l2 * weight.square().sum()
        total.backward()
        return total.item(), x.grad.numpy()

    flat, options = np.concatenate([start[0].ravel(), start[1]]), {"maxiter": 300}
    flat = minimize(value_and_gradient, flat, jac=True, method="L-BFGS-B", options=options).x
    return flat[: heads * d].reshape(heads, d), flat[heads * d :]


def fit_single(train, target, l2, seed):
    """Weights (1, d) of one reward on target (N,): the least (t - sigmoid(r(y1) - r(y2)))^2."""
    t = torch.from_numpy(target)

    def loss(rewards_a, rewards_b, _):
        return (t - torch.sigmoid(rewards_a[:, 0] - rewards_b[:, 0])).square().sum()

    return fit(train, loss, 1, l2, seed)[0]


def train_mixture(train, m, l2, seed):
    """Weights (m, d) of the rewards whose soft mixture, of learned weights, has the least error."""
    p = torch.from_numpy(train.split.p)

    def loss(rewards_a, rewards_b, logits):
        p_hat = torch.sigmoid(rewards_a - rewards_b) @ torch.softmax(logits, 0)
        return (p_hat - p).square().sum()

    return fit(train, loss, m, l2, seed, parameters=m)[0]


def rewards_of(weights, splits):
    """{name: float32 (K, R)} for weights (K, d): equal rows of features have equal rewards."""
    return {
        name: np.stack([(x.features * row).sum(1) for row in weights]).astype(np.float32)
        for name, x in splits.items()
    }


def brier(p_hat, split):
    """The Brier score mean (p_hat - p)^2."""
    return float(np.mean((p_hat - split.p) ** 2))


class SoftFit(NamedTuple):
    """What was chosen, in words; the rewards' weights (M, d); {split: p_hat (N,)}."""

    chosen: str
    weights: np.ndarray
    p_hat: dict


def soft_fit(chosen, weights, splits):
    """The SoftFit of these rewards: mixed on train prompts, scale and lapses fitted on valid."""
    differences = {
        name: soft_model.reward_differences(rewards, splits[name].split.a, splits[name].split.b)
        for name, rewards in rewards_of(weights, splits).items()
    }
    w = soft_model.fit_mixture(differences["train"], splits["train"].split.p)
    valid = splits["valid"].split
    tau, a = soft_model.fit_scale_and_lapses(differences["valid"], w, valid.p)
    p_hat = {name: soft_model.predict(x, w, tau, a) for name, x in differences.items()}
    return SoftFit(chosen, weights, p_hat)


def best_on_valid(fits, splits):
    """Of the SoftFits the one with the least Brier score on validation prompts."""
    return min(fits, key=lambda fit: brier(fit.p_hat["valid"], splits["valid"].split))


def best_penalty(fit_rewards, splits, label=""):
    """The best SoftFit over the L2 penalties; fit_rewards(l2): the weights (M, d)."""
    fits = [soft_fit(f"{label}l2 {l2:g}", fit_rewards(l2), splits) for l2 in L2_PENALTIES]
    return best_on_valid(fits, splits)


def soft_single(splits, seed):
    """The SoftFit of the best single reward."""
    train = splits["train"]
    return best_penalty(lambda l2: fit_single(train, train.split.p, l2, seed), splits)


def soft_mixtures(splits, seed, components=COMPONENTS):
    """{M: SoftFit} of the best mixtures of M rewards trained jointly."""
    train = splits["train"]
    return {
        m: best_penalty(lambda l2, m=m: train_mixture(train, m, l2, seed), splits, f"M {m}, ")
        for m in components
    }


def plurality(splits, seed):
    """{single, mixture, components, gain, ci, several: the last four} of {name: Featured}:
    plurality.json."""
    single = soft_single(splits, seed)
    several = best_on_valid(soft_mixtures(splits, seed, COMPONENTS[1:]).values(), splits)

    def errors_on(name, mixture):
        """Squared errors of single and mixture, and pairs, summed over each prompt, (P, 3)."""
        split = splits[name].split
        errors = [(fit.p_hat[name] - split.p) ** 2 for fit in (single, mixture)]
        return metrics.by_prompt(split, np.stack([*errors, np.ones(len(split.p))]))

    def gain_of(mixture):
        """{mixture, components, gain, ci} on test prompts."""
        errors = errors_on("test", mixture)
        sums = metrics.resampled(errors, 10000, seed)
        interval = metrics.interval((sums[:, 0] - sums[:, 1]) / sums[:, 2], len(errors))
        single_error, mixture_error, pairs = errors.sum(0)
        return {
            "mixture": mixture_error / pairs,
            "components": len(mixture.weights),
            "gain": (single_error - mixture_error) / pairs,
            "ci": interval or [None, None],
        }

    better = errors_on("valid", several) @ [1, -1, 0]
    count, pairs = len(better), len(splits["valid"].split.p)
    noise = 2 * np.sqrt(count) * better.std(ddof=1) if count > 1 else np.inf
    mixture = several if better.sum() > max(noise, LEAST * pairs) else single
    error = {"single": brier(single.p_hat["test"], splits["test"].split)}
    return error | gain_of(mixture) | {"several": gain_of(several)}


def in_words(gain, ci, **_):
    """A gain and its interval, as printed."""
    if ci[0] is None:
        return f"gain {gain:+.4f} no interval: fewer than {metrics.FEWEST} test prompts"
    return f"gain {gain:+.4f} [{ci[0]:+.4f}, {ci[1]:+.4f}]"


def main(args):
    torch.set_num_threads(args.threads)
    stage = (args.run, "plurality", {"seed": args.seed}, data.hashes(args.run))
    splits = read_run(args.run, args.seed)
    started = manifest.begin_stage(*stage)
    result = plurality(splits, args.seed)
    files.write_json(args.run / "plurality.json", result)
    manifest.end_stage(*stage, started, threads=args.threads)
    several = result["several"]
    print(
        f"plurality: single {result['single']:.4f}, mixture of {result['components']} "
        f"{result['mixture']:.4f}, {in_words(**result)}"
    )
    if result["components"] == 1:
        print(
            "plurality: no mixture was better by two standard errors on validation prompts; the "
            f"best there, of {several['components']}: {several['mixture']:.4f}, "
            f"{in_words(**several)}"
        )


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    cli.add_run(parser, "run directory with data/ and features/")
    add("--seed", type=cli.seed, default=0, help="of the fits and the bootstrap")
    add("--threads", type=cli.threads, default=1, help="CPU threads")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
