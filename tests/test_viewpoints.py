"""experiments/viewpoints.py and mean_variance.py, and that the tables of experiments/README.md are
those of committed files."""

import csv
import dataclasses
import json

from pairwise import cli
from pairwise.weights import member_votes

import mean_variance
import numpy as np
import plurality
import populations
import pytest
import viewpoints
from conftest import REPOSITORY, committed
from scipy.special import expit
from scipy.stats import norm

RESULTS = {  # as docs/results.md names them
    "fsam_residual": "FSAM, `residual`",
    "fsam_centered": "FSAM, `centered`",
    "joint": "joint",
    "recommended": "the best of these and of other ways on validation prompts",
    "soft_single": "best single soft reward",
}
README = (REPOSITORY / "experiments/README.md").read_text(encoding="utf-8")
COLUMNS = {"clusters": "true_error", "continuum": "true_error", "camps": "true_error"}
COLUMNS |= {"single": "true_error", "demo": "brier", "ukpconvarg1": "brier", "writing": "brier"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two populations of clusters and one of one viewpoint, of 8 dimensions."""
    made = []
    for name, seed in (("clusters", 0), ("clusters", 1), ("single", 0)):
        made.append(tmp_path_factory.mktemp("population") / "run")
        words = ["--run", made[-1], "--population", name, "--seed", seed, "--dimension", 8]
        populations.main(populations.parse_args([str(word) for word in words]))
    return made


# ---- the tables


def short(number, digits):
    return f"{float(number):.{digits}f}".removeprefix("0")


def test_table_of_variants_is_the_committed_files():
    tables = {
        name: {row["variant"]: row for row in committed(f"variants_{name}.csv") if row["k"] == "8"}
        for name in COLUMNS
    }
    for variant in tables["clusters"]:
        cells = []
        for name, column in COLUMNS.items():
            row = tables[name].get(variant)
            cells.append(short(row[column], 4) if row else "")
        assert f"| {variant} | {' | '.join(cells)} |" in README, (variant, cells)
        if variant in RESULTS:  # without single, demo and writing
            row = f"| {RESULTS[variant]} | {' | '.join(cells[:3])} | {cells[5]} |"
            assert row in (REPOSITORY / "docs/results.md").read_text(encoding="utf-8"), row


def test_sentence_on_hardened_ukpconvarg1():
    """What the hard votes lose to the soft model, at two K."""
    text, shares = " ".join(README.split()), []
    for name, k in (("ukpconvarg1", "8"), ("ukpconvarg1_32", "32")):
        rows = {x["variant"]: x for x in committed(f"variants_{name}.csv") if x["k"] == k}
        over, (low, high) = (json.loads(rows["hardened"][x]) for x in ("over_soft", "over_soft_ci"))
        numbers = [f"{x:+.4f}".replace("0.", ".") for x in (over, low, high)]
        assert f"{numbers[0]} [{numbers[1]}, {numbers[2]}]" in text
        share = float(rows["hardened_taste"]["over_soft"]) / float(rows["soft_single"]["brier"])
        shares.append(f"a taste {100 * share:.1f} %")
    assert all(share in text for share in shares), shares


def gains(name, seeds):
    """(gain, lower limit) of the runs of some seeds of a population."""
    rows = {row["run"]: row for row in committed("plurality.csv")}
    runs = [rows[f"{name}_{seed}"] for seed in seeds]
    return [(float(row["gain"]), float(row["gain_low"])) for row in runs]


def test_sentences_on_populations_are_the_committed_files():
    text = " ".join(README.split())
    for table in ("variants_{}.csv", "variants_late_{}.csv"):
        shares = []
        for name in ("clusters", "continuum", "camps"):
            error = {x["variant"]: float(x["true_error"]) for x in committed(table.format(name))}
            assert error["recommended"] < min(error["floor_single"], error["coin_flip"])
            shares.append(short(error["recommended"] / error["fsam_residual"], 2))
        assert f"has {', '.join(shares)} of" in text
    for seeds, words in ((range(5), "seeds 0 to 4"), (range(20, 23), "seeds 20 to 22")):
        assert words in text
        for name in ("clusters", "camps"):
            found = gains(name, seeds)
            low, high = (short(f(gain for gain, _ in found), 3) for f in (min, max))
            assert f"+{low} to +{high}" in text and all(limit > 0 for _, limit in found)
        for name in ("continuum", "single"):
            assert all(gain == 0 for gain, _ in gains(name, seeds))


def test_table_of_viewpoints_is_the_committed_file():
    table = viewpoints.summary(committed("viewpoints.csv"))
    for variant in dict.fromkeys(variant for _, variant in table):
        cells = []
        for name in ("clusters", "camps"):
            x = table[name, variant]
            cells += [short(x["nearest"], 3), short(x["found"], 3)]
            limits = f"[{short(x['low'], 3)}, {short(x['high'], 3)}]"
            cells.append(f"{short(x['variation'], 3)} {limits}")
        if variant != "viewpoints":
            assert f"| {variant} | {' | '.join(cells)} |" in README, (variant, cells)


# ---- viewpoints


def test_agreement_and_variation_by_hand():
    own = np.array([[1.0, 1, 0, 0], [0, 0, 1, 0]])
    agrees = viewpoints.agreement(np.array([[1, 1, 0, 1], [0, 0.5, 1, 0], [0, 0, 1, 0]]), own)
    np.testing.assert_array_equal(agrees, [[0.75, 0], [0.375, 0.875], [0.25, 1]])
    found = viewpoints.measures(np.array([0.5, 0.5, 0]), agrees, np.array([0.6, 0.4]))
    # The last member has no weight, so nobody finds the second viewpoint by more than .875.
    assert found == pytest.approx((0.8125, 0.8125, 0.1))


def test_voters_are_around_their_viewpoints():
    for name in ("clusters", "camps", "continuum", "single"):
        centres, shares, distance = populations.viewpoints(name, 8, populations.random_of(name, 3))
        voters = populations.directions(name, 8, 200, populations.random_of(name, 3))
        far = np.linalg.norm(voters[:, None] - centres, axis=-1)
        nearest = np.bincount(np.abs(far - distance).argmin(1), minlength=len(shares)) / 200
        np.testing.assert_allclose(nearest, shares)


def test_rows_and_summary(runs, tmp_path, capsys):
    out, k = tmp_path / "viewpoints.csv", 4
    words = ["--runs", *map(str, runs[:2]), "--k", str(k), "--out", str(out)]
    viewpoints.main(viewpoints.parse_args([*words, "--variants", "fsam_p", "hardened"]))
    with open(out, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (3 + 3 * k)
    table = viewpoints.summary(rows)
    for x in table.values():
        assert x["runs"] == 2 and x["low"] <= x["variation"] <= x["high"]
    # All members of --target p are one reward: its nearest viewpoint has all the weight.
    literal = table["clusters", "fsam_p"]
    assert literal["found"] < 0.9 and 0.6 <= literal["variation"] <= 0.7
    exact = table["clusters", "viewpoints"]
    assert exact["nearest"] == exact["found"] == 1 and exact["variation"] == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_runs_without_viewpoints_are_one_line(runs, data):
    for run, words in ((runs[2], "population single found"), (data, "no population")):
        with pytest.raises(cli.InputError, match=words) as error:
            viewpoints.read_viewpoints(run)
        assert "\n" not in str(error.value)


# ---- mean and variance


def of_known_deviations(runs):
    """The first run with vote fractions that are those of known weights, and these (2, d)."""
    splits = plurality.read_run(runs[0], 0)
    weights = np.random.default_rng(5).normal(size=(2, 8)) * [[1], [0.5]]
    for name, x in splits.items():
        odds = mean_variance.log_odds(
            plurality.rewards_of(weights, splits)[name], x.split.a, x.split.b
        )
        p = expit(odds[0])
        split = dataclasses.replace(x.split, votes_a=p, votes_b=1 - p, p_true=p)
        splits[name] = plurality.Featured(split, x.features)
    return splits, weights


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_known_deviations_are_found(runs, loss):
    splits, weights = of_known_deviations(runs)
    test, x = splits["test"].split, splits["test"].features
    mu, s = (x @ weights.T).T
    s = np.exp(s)
    expected = norm.cdf((mu[test.a] - mu[test.b]) / np.hypot(s[test.a], s[test.b]))
    np.testing.assert_allclose(test.p, expected, atol=1e-6)
    found = mean_variance.fit(splits["train"], 1e-7, 1.0, loss, 0)
    np.testing.assert_allclose(found, weights, atol=0.02)
    fit = mean_variance.soft_fit("", found, splits)
    assert plurality.brier(fit.p_hat["test"], test) < 1e-5
    assert plurality.brier(plurality.soft_single(splits, 0).p_hat["test"], test) > 1e-3


def test_layouts_follow_what_the_docstring_says(runs):
    splits, weights = of_known_deviations(runs)
    split, x = splits["test"].split, splits["test"].features
    a, b = split.a, split.b
    mu, s = (x @ weights.T).T
    s, unit = np.exp(s)[:, None], x / np.linalg.norm(x, axis=1, keepdims=True)
    votes = {
        layout: member_votes(mean_variance.candidates(weights, x, layout), a, b)
        for layout in mean_variance.LAYOUTS
    }
    z, distance = mean_variance.QUANTILES, mu[a] - mu[b]
    density = norm.pdf(z) / norm.pdf(z).sum()
    comonotone = norm.cdf(distance / np.abs(s[a] - s[b])[:, 0])
    assert np.abs(density @ votes["quantile"] - comonotone).mean() < 0.02
    assert (np.abs(comonotone - 0.5) >= np.abs(split.p - 0.5) - 1e-6).all()
    apart = np.linalg.norm(s[a] * unit[a] - s[b] * unit[b], axis=1)
    assert np.abs(votes["moods"][1:].mean(0) - norm.cdf(distance / apart)).max() < 0.1


def test_ensembles_read_no_vote(runs):
    splits, weights = of_known_deviations(runs)
    fit = mean_variance.soft_fit("", weights, splits)
    silent = {
        name: x._replace(split=dataclasses.replace(x.split, votes_a=x.split.votes_b))
        for name, x in splits.items()
    }
    for layout in mean_variance.LAYOUTS:
        votes, alpha = mean_variance.ensemble(fit, splits, 6, layout)
        again, same = mean_variance.ensemble(fit, silent, 6, layout)
        np.testing.assert_array_equal(votes["test"], again["test"])
        np.testing.assert_array_equal(alpha, same)
        assert votes["test"].shape[0] == 6 and alpha.min() >= 0 and abs(alpha.sum() - 1) < 1e-12
        off = np.mean((alpha @ votes["test"] - fit.p_hat["test"]) ** 2)
        assert off < fit.p_hat["test"].var() / 5, layout
