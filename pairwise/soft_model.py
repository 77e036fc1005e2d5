"""The soft model: what rewards predict as probabilities, before their votes are made hard.

    p_hat = a + (1 - 2a) sum_c w_c sigmoid(tau (r_c(y1) - r_c(y2)))

The weights w are on the simplex, tau is a scale, and a in [0, 1/2) is a rate of lapses: a voter
flips a coin with probability 2a. extras/harden.py follows p_hat with hard votes;
extras/plurality.py asks whether it takes more than one reward; an evaluation shows it beside the
ensemble:

    soft_single     r of member 1 with tau = 1 and a = 0, where it was trained on vote fractions
    soft_scaled     the same r, whatever it was trained on, with tau and a fitted on validation
                    prompts, on train prompts where there are none, and never on test prompts
    soft_hardened   of a hardened run: the model that its members follow. There the other two are
                    those of the run that it was made from, whose rewards it keeps
"""

from typing import NamedTuple

from pairwise import cli, data, files, manifest, run_dir, weights

import numpy as np
import scipy  # Its modules are imported when they are first used, beside evaluate.py's drawing.

# {key in metrics.json: that of the same against the true fractions}
LINES = {
    "soft_single": "soft_true",
    "soft_scaled": "soft_scaled_true",
    "soft_hardened": "soft_hardened_true",
}


def reward_differences(rewards, a, b):
    """r(y1) - r(y2), float64 (K, N); rewards float32 (K, R); a, b (N,): the pairs' responses."""
    with np.errstate(over="ignore", invalid="ignore"):
        margins = np.nan_to_num(rewards[:, a] - rewards[:, b])  # inf - inf: a tie
    return margins.astype(np.float64)


def predict(differences, w, tau=1.0, a=0.0):
    """p_hat float64 (N,); differences float64 (M, N), w float64 (M,)."""
    return a + (1 - 2 * a) * (w @ scipy.special.expit(tau * differences))


class SoftModel(NamedTuple):
    """The parameters; members: the numbers, from 1, of the rewards r_c."""

    members: list
    w: np.ndarray
    tau: float
    a: float

    def predict(self, rewards, a, b):
        """p_hat float64 (N,); rewards float32 (K, R)."""
        differences = reward_differences(rewards[np.array(self.members) - 1], a, b)
        return predict(differences, self.w, self.tau, self.a)


def fit_mixture(differences, p):
    """The weights w (M,) with the least mean (p_hat - p)^2 where tau = 1 and a = 0."""
    soft, pairs = scipy.special.expit(differences), len(p)
    q = weights.error_matrix(soft @ soft.T / pairs, soft @ p / pairs, p @ p / pairs)
    return weights.simplex_weights(q)


def fit_scale_and_lapses(differences, w, p):
    """(tau, a) with the least mean (p_hat - p)^2, where a is at most .49, and tau times the median
    |difference| from e^-5, nearly a coin flip, to e^5, nearly hard votes: rewards of any scale have
    the same predictions. (1, 0) where all rewards are equal."""
    distances = np.abs(differences[differences != 0])
    if not len(distances):
        return 1.0, 0.0
    unit = np.median(distances)

    def fit(x):
        """The error, its slope in x, tau and a: for one tau the error is a square in a."""
        tau = np.exp(x) / unit
        votes = scipy.special.expit(tau * differences)
        soft = w @ votes
        lapse = 1 - 2 * soft
        a = np.clip(lapse @ (p - soft) / (lapse @ lapse or 1), 0, 0.49)
        off = soft + a * lapse - p
        slope = np.mean(off * (w @ (tau * differences * votes * (1 - votes))))
        return np.mean(off**2), slope, float(tau), float(a)

    # There may be several minima: the first of a grid, but for rounding, and that beside it.
    grid = np.linspace(-5, 5, 41)
    errors = np.array([fit(x)[0] for x in grid])
    best = grid[np.argmax(errors <= errors.min() + 1e-12)]
    low, high = max(best - 0.25, -5), min(best + 0.25, 5)
    found = [fit(best)]
    if fit(low)[1] < 0 and fit(high)[1] > 1e-12:
        found.append(fit(scipy.optimize.brentq(lambda x: fit(x)[1], low, high, xtol=1e-14)))
    return min(found)[2:]


# ---- the reference lines of a run


def trained_on_p(run):
    """Tell whether member 1 was trained on the vote fractions, by the manifest: then its sigmoid is
    a soft model of them."""
    if run_dir.kind_of(run, beneath=True) in ("joint", "existing", "imported"):
        return False
    # train_rm.py counts tied pairs for losses on majority labels alone.
    return "tied_pairs" not in manifest.entries(run).get(run_dir.member_name(1), {})


class Models(NamedTuple):
    """The soft models that an evaluation shows."""

    models: dict  # {key of LINES: SoftModel}, of those that exist
    rewards: dict  # {split: float32 (K, R)}: the rewards that they are of
    fit: dict  # of soft_scaled: {split, tau, a}, as in metrics.json

    def predict(self, name, split):
        """{key of LINES: p_hat float64 (N,)} of the pairs of a split, whose name is given."""
        return {
            key: model.predict(self.rewards[name], split.a, split.b)
            for key, model in self.models.items()
        }


def tuning_split(names):
    """The one of a run's splits on which scale and lapses are fitted."""
    return "valid" if "valid" in names else "train"


def source_path(run, split):
    """The path of the rewards, float32 (K, R), of the run that a hardened run was made from."""
    return run / "rewards" / f"source_{split}.npy"


def read_models(run, splits):
    """The Models of a run; splits {name: Split}: those that are shown, and the tuning split.

    Raises InputError where rewards are missing or unfit."""
    rewards, models, facts = {}, {}, manifest.entries(run).get("harden")
    for name, split in splits.items():
        responses = split.n_responses
        if not facts:
            rewards[name] = run_dir.read_rewards(run, name, 1, (responses,))
            continue
        path = source_path(run, name)
        manifest.check(run, path)
        rewards[name] = files.read_array(path)
        found, least = rewards[name].shape, max(facts["components"])
        if len(found) != 2 or found[0] < least or found[1] != responses:
            raise cli.InputError(
                f"{path}: shape {found} found, at least ({least}, {responses}) expected"
            )
    name = tuning_split(splits)
    split = data.fitted_pairs(splits[name])
    one = np.ones(1)
    tau, a = fit_scale_and_lapses(
        reward_differences(rewards[name][:1], split.a, split.b), one, split.p
    )
    if facts["trained_on_p"] if facts else trained_on_p(run):
        models["soft_single"] = SoftModel([1], one, 1.0, 0.0)
    models["soft_scaled"] = SoftModel([1], one, tau, a)
    if facts:
        w = np.array(facts["weights"])
        models["soft_hardened"] = SoftModel(facts["components"], w, facts["tau"], facts["a"])
    return Models(models, rewards, {"split": name, "tau": tau, "a": a})
