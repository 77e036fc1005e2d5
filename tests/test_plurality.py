"""extras/plurality.py: which prompts each choice is made on, the rule, and the gain's interval."""

from pairwise import metrics, soft_model
from pairwise.data import Split

import numpy as np
import plurality
import pytest


def featured(seed, prompts, d=3):
    """A Featured of three responses a prompt and one to three of their pairs, with four votes."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 4, prompts)
    first = 3 * np.repeat(np.arange(prompts), sizes)
    a, b = np.array([rng.permutation(3)[:2] for _ in first]).T + first
    votes = rng.integers(0, 5, len(first)).astype(float)
    starts = 3 * np.arange(prompts + 1), np.concatenate([[0], np.cumsum(sizes)])
    names, texts = [f"p{i}" for i in range(prompts)], [["a", "b", "c"]] * prompts
    split = Split(names, [[]] * prompts, texts, *starts, a, b, votes, 4 - votes, 0 * votes)
    return plurality.Featured(split, seed + (1 + seed) * rng.normal(size=(3 * prompts, d)))


@pytest.fixture
def splits():
    return {"train": featured(0, 30), "valid": featured(1, 35), "test": featured(2, 40)}


def test_features_are_standardised_by_train(splits):
    made, x = plurality.standardised(splits), splits["train"].features
    for name in splits:
        wanted = (splits[name].features - x.mean(0)) / x.std(0)
        np.testing.assert_allclose(made[name].features, wanted, rtol=1e-5)


def test_validation_prompts_are_drawn_by_the_seed(splits, monkeypatch, tmp_path):
    monkeypatch.setattr(plurality, "read_features", lambda run: {"train": splits["train"]})
    once, again, other = (plurality.read_run(tmp_path, seed) for seed in (0, 0, 1))
    names = [set(x["valid"].split.prompt_id) for x in (once, again, other)]
    assert names[0] == names[1] != names[2] and len(names[0]) == len(names[2]) == 6
    assert names[0].isdisjoint(once["train"].split.prompt_id)


def test_weights_are_fitted_on_train_and_the_scale_on_validation_prompts(splits):
    heads = np.random.default_rng(5).normal(size=(2, 3))
    found = plurality.soft_fit("", heads, splits)
    differences = {
        name: heads @ (x.features[x.split.a] - x.features[x.split.b]).T
        for name, x in splits.items()
    }
    w = soft_model.fit_mixture(differences["train"], splits["train"].split.p)
    fitted = soft_model.fit_scale_and_lapses(differences["valid"], w, splits["valid"].split.p)
    for name in splits:
        wanted = soft_model.predict(differences[name], w, *fitted)
        np.testing.assert_allclose(found.p_hat[name], wanted, atol=1e-5)


def test_the_best_is_chosen_on_validation_prompts(splits):
    def right_on(best):
        p = {name: x.split.p for name, x in splits.items()}
        p_hat = {name: p[name] if name == best else 1 - p[name] for name in p}
        return plurality.SoftFit(best, np.zeros((1, 3)), p_hat)

    fits = [right_on(name) for name in ("train", "test", "valid")]
    assert plurality.best_on_valid(fits, splits).chosen == "valid"


def chosen_of(splits, errors, monkeypatch):
    """plurality.plurality of a single reward and a mixture of two with errors[i], {name: squared
    errors of the pairs}, and the two."""
    fits = [
        plurality.SoftFit(
            "", np.zeros((m, 3)), {name: splits[name].split.p + e**0.5 for name, e in each.items()}
        )
        for m, each in enumerate(errors, 1)
    ]
    monkeypatch.setattr(plurality, "soft_single", lambda *_: fits[0])
    monkeypatch.setattr(plurality, "soft_mixtures", lambda *_: {2: fits[1]})
    return plurality.plurality(splits, 0)


@pytest.mark.parametrize("standard_errors, components", [(1.5, 1), (2.5, 2)])
def test_a_mixture_is_chosen_by_two_standard_errors(
    standard_errors, components, splits, monkeypatch
):
    """On validation prompts, whatever it is on test prompts, where its interval is over prompts."""
    valid, test = splits["valid"].split, splits["test"].split
    rng = np.random.default_rng(1)
    gains = rng.normal(size=len(valid.prompt_id))
    gains = (gains - gains.mean()) / gains.std(ddof=1) + standard_errors / np.sqrt(len(gains))
    single = {"valid": np.full(len(valid.p), 0.2), "test": rng.random(len(test.p))}
    mixture = {"valid": single["valid"].copy(), "test": single["test"] + rng.random(len(test.p))}
    mixture["valid"][valid.pair_start[:-1]] -= 0.01 * gains  # a prompt's first pair has its gain
    found = chosen_of(splits, (single, mixture), monkeypatch)
    assert found["components"] == components
    several, gain = found["several"], single["test"] - mixture["test"]
    assert several["components"] == 2 and several["gain"] == pytest.approx(gain.mean())
    ratio = metrics.Ratio(metrics.by_prompt(test, gain), np.diff(test.pair_start).astype(float))
    assert several["ci"] == pytest.approx(metrics.estimate({"x": ratio}, 10000, 0)["x_ci"])


def test_a_gain_that_is_a_penalty_s_is_none(splits, monkeypatch):
    for gain, components in ((5e-5, 1), (2e-4, 2)):
        errors = [
            {name: np.full(len(x.split.p), error) for name, x in splits.items()}
            for error in (0.1, 0.1 - gain)
        ]
        assert chosen_of(splits, errors, monkeypatch)["components"] == components
