"""Hardened ensembles: what their votes must be for any rewards, what the layouts promise, and a run
that evaluate.py and score.py take."""

import dataclasses
import json
import shutil
import subprocess
import sys
import time

import evaluate
import score
from pairwise import data, files, manifest, soft_model, weights
from pairwise.cli import InputError
from pairwise.data import Split, read_split
from pairwise.levels import formula, hardened, read_members

import harden
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import FLAGS, REPOSITORY, edited, fresh, leftovers, without_hashes
from scipy.integrate import quad
from scipy.optimize import minimize
from scipy.special import expit

LAYOUTS = {"quantile": harden.quantile_layout(4), "equal": harden.equal_layout(4, 2.5)}


def pairs(n, r=500, seed=0):
    a, b = np.random.default_rng(seed).integers(0, r, (2, n))
    return a[a != b], b[a != b]


def p_hat(formulas, alpha, rewards, a, b):
    return alpha @ harden.hardened_votes(formulas, rewards, a, b)


def separated(layout, u, a, b):
    """Share of a layout's levels that part the two responses of each pair, by hand."""
    return np.mean(
        [np.floor((u[a] + o) / w) != np.floor((u[b] + o) / w) for w, o in zip(*layout)], axis=0
    )


def simulated(n=4000, r=800, seed=0, heads=1):
    """A Split of one prompt and the rewards (heads, R) whose equal mixture its votes follow."""
    rng = np.random.default_rng(seed)
    rewards = rng.normal(size=(heads, r)).astype(np.float32)
    a, b = pairs(n, r, seed)
    p = expit(rewards[:, a].astype(float) - rewards[:, b]).mean(0)
    votes = rng.binomial(9, p).astype(float)
    return Split(
        ["x"],
        [[]],
        [[]],
        np.array([0, r]),
        np.array([0, len(a)]),
        a,
        b,
        votes,
        9 - votes,
        np.zeros(len(a)),
        p,
    ), rewards


# ---- the formulas


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("spread", [1e-4, 1, 50, 1e4, 1e30])
def test_share_of_levels_whatever_the_taste(name, spread):
    """Also tastes that saturate, that differ in the last bit only, and levels by the thousand."""
    layout, rng = LAYOUTS[name], np.random.default_rng(1)
    a, b = pairs(3000)
    for scale in (1, 30):
        rewards = np.stack([rng.normal(size=500) * scale, rng.normal(size=500) * spread]).astype(
            np.float32
        )
        u = 1.3 * rewards[0].astype(np.float64)
        formulas = harden.opposed_pairs(1, 1.3, layout, 2, 1.0)
        expected = 0.5 + np.sign(u[a] - u[b]) * separated(layout, u, a, b) / 2
        np.testing.assert_allclose(
            p_hat(formulas, np.full(8, 1 / 8), rewards, a, b), expected, atol=1e-12
        )


def test_a_taste_that_rounding_ties_is_tied_for_its_opposite():
    """Where float32 is coarser after the product with the width, at 8 here, than at the level."""
    rng, width, level = np.random.default_rng(0), 1.3, 6
    taste = 4e-7 * rng.integers(-400, 400, 500)
    rewards = np.stack([np.full(500, width * (level + 0.5)), taste]).astype(np.float32)
    a, b = pairs(3000)
    opposed = [formula(1, 1.0, width, 0.0, 2, t) for t in (1.0, -1.0)]
    found = harden.hardened_votes(opposed, rewards, a, b)
    assert set(found[0]) == {0, 0.5, 1} and (found[0] + found[1] == 1).all()


def test_reversed_inside_a_level():
    """With the order of u itself, and its reverse inside levels, the same holds with k - 1 levels,
    and nothing ties."""
    rewards = np.random.default_rng(2).normal(size=(1, 500)).astype(np.float32)
    a, b = pairs(3000)
    u, (widths, offsets) = 2.0 * rewards[0].astype(np.float64), harden.equal_layout(7, 2.5)
    formulas = [formula(1, 2.0)] + [formula(1, 2.0, w, o) for w, o in zip(widths, offsets)]
    found = harden.hardened_votes(formulas, rewards, a, b)
    assert not (found == 0.5).any()
    alpha = np.array([0.5] + [0.5 / 7] * 7)
    np.testing.assert_allclose(
        alpha @ found,
        0.5 + np.sign(u[a] - u[b]) * separated((widths, offsets), u, a, b) / 2,
        atol=1e-12,
    )


def test_equal_rewards_tie_and_swapped_pairs_mirror():
    rewards = np.random.default_rng(3).normal(size=(2, 40)).astype(np.float32)
    rewards[:, 20:] = rewards[:, :20]
    a, b = np.arange(20), np.arange(20, 40)
    formulas = [
        *harden.opposed_pairs(1, 1.0, LAYOUTS["quantile"], 2, 1.0),
        formula(1, 1.0),
        formula(1, 1.0, 2.0, 0.3),
    ]
    assert (harden.hardened_votes(formulas, rewards, a, b) == 0.5).all()
    b = (a + 7) % 20
    np.testing.assert_array_equal(
        harden.hardened_votes(formulas, rewards, a, b),
        1 - harden.hardened_votes(formulas, rewards, b, a),
    )


def test_random_levels_are_the_logistic_model():
    """A level of random offset and width w parts a distance d with probability min(d / w, 1); with
    F for the widths the mean is 2 sigmoid(d) - 1."""

    def density(w):
        return (harden.width_distribution(w + 1e-5) - harden.width_distribution(w - 1e-5)) / 2e-5

    for d in (0.1, 1.0, 3.0):
        share = (
            quad(lambda w, d=d: min(d / w, 1) * density(w), 1e-3, d)[0]
            + quad(lambda w, d=d: min(d / w, 1) * density(w), d, 80)[0]
        )
        assert abs(0.5 + share / 2 - expit(d)) < 1e-5


def test_quantile_layout_comes_near_the_soft_model():
    u = np.random.default_rng(4).normal(size=(2, 500)).astype(np.float32)
    a, b = pairs(3000)
    errors = []
    for k in (8, 32, 128):
        formulas = harden.opposed_pairs(1, 1.0, harden.quantile_layout(k // 2), 2, 1.0)
        errors.append(
            np.mean(
                (
                    p_hat(formulas, np.full(k, 1 / k), u, a, b)
                    - expit(u[0, a].astype(float) - u[0, b])
                )
                ** 2
            )
        )
    assert errors[0] > 4 * errors[1] > 8 * errors[2] and errors[2] < 2e-4


def test_largest_remainder():
    np.testing.assert_array_equal(harden.largest_remainder([0.5, 0.3, 0.2], 8), [4, 2, 2])
    np.testing.assert_array_equal(harden.largest_remainder([0.96, 0.04], 8), [8, 0])
    for _ in range(20):
        w = np.random.default_rng(_).dirichlet(np.ones(5))
        counts = harden.largest_remainder(w, 20)
        assert counts.sum() == 20 and not (counts % 2).any() and (abs(counts - 20 * w) < 2).all()


def test_pick_beats_chance_and_keeps_to_the_simplex():
    rng = np.random.default_rng(5)
    votes = (rng.random((40, 300)) < 0.5) - rng.random(300)
    q = votes @ votes.T / 300
    chosen, alpha = harden.pick(q, 5)
    assert len(set(chosen)) == 5 and abs(alpha.sum() - 1) < 1e-12 and (alpha >= 0).all()
    error = alpha @ q[np.ix_(chosen, chosen)] @ alpha
    assert error < min(q.diagonal())
    parts = [q[np.ix_(c, c)] for c in (rng.choice(40, 5, replace=False) for _ in range(200))]
    others = [w @ part @ w for part in parts for w in [weights.simplex_weights(part)]]
    assert error <= np.quantile(others, 0.01)


def test_pick_exchanges_after_the_forward_selection():
    """The first alone is the best one; the other two together are exact."""
    errors = np.array([[0.6, 0.6], [1.0, -1.0], [-1.0, 1.0]])
    assert sorted(harden.pick(errors @ errors.T / 2, 2)[0]) == [1, 2]


def test_refitted_weights_are_those_of_simplex_weights():
    """From any weights, where some formulas are copies or opposites of others, and many in time."""
    rng = np.random.default_rng(0)
    for case in range(100):
        n, m = rng.integers(1, 30), rng.integers(1, 60)
        votes = rng.integers(0, 3, (n, m))[rng.integers(0, n, n)] / 2
        votes[rng.random(n) < 0.2] = 1 - votes[0]
        errors = votes - (votes[0] if case % 5 == 0 else rng.random(m))
        q, start = errors @ errors.T / m, np.eye(n)[rng.integers(n)]
        found, best = harden.refitted(q, start), weights.simplex_weights(q)
        assert (found >= 0).all() and abs(found.sum() - 1) < 1e-12
        assert found @ q @ found <= best @ q @ best + 1e-10
    votes = (rng.random((400, 500)) < 0.5) - rng.random(500)
    q, started = votes @ votes.T / 500, time.perf_counter()
    chosen, alpha = harden.pick(q, 99)
    assert time.perf_counter() - started < 20 and len(set(chosen)) == 99
    assert weights.kkt_residual(q[np.ix_(chosen, chosen)], alpha) < 1e-9


def test_what_is_fitted_on_which_prompts():
    """Mixture weights on train pairs; scale, lapses and size on the others, whose votes differ."""
    split, rewards = simulated(n=1500, r=300, heads=2)
    rewards = 4 * rewards
    differences = soft_model.reward_differences(rewards, split.a, split.b)

    def voted(p, seed):
        votes = np.random.default_rng(seed).binomial(9, p).astype(float)
        return dataclasses.replace(split, votes_a=votes, votes_b=9 - votes), rewards

    train = voted([0.75, 0.25] @ expit(differences), 1)
    tuning = voted(0.1 + 0.8 * expit(0.5 * differences[0]), 2)
    one, two, best = (
        harden.harden(train, tuning, 8, "quantile", sizes) for sizes in ([1], [2], None)
    )
    model = two.model
    assert model.w == pytest.approx(soft_model.fit_mixture(differences, train[0].p), abs=1e-12)
    scale = soft_model.fit_scale_and_lapses(differences, model.w, tuning[0].p)
    assert (model.tau, model.a) == pytest.approx(scale)
    of_first = [entry["member"] == 1 for entry in two.formulas]
    assert 0.6 < two.alpha[of_first].sum() < 0.9
    assert two.alpha[of_first].sum() == pytest.approx(model.w[0])
    assert one.brier < two.brier and one.misfit > two.misfit and best.brier == one.brier


def test_the_median_reward_is_in_level_zero():
    split, rewards = simulated(n=1500, r=300, heads=2)
    pairs_and_rewards = split, rewards + np.float32(1000)
    for entry in harden.harden(pairs_and_rewards, pairs_and_rewards, 4, "quantile").formulas:
        median = np.median(pairs_and_rewards[1][entry["member"] - 1])
        assert np.floor((entry["scale"] * median + entry["offset"]) / entry["width"]) == 0


@pytest.mark.parametrize("k", [4, 8, 9])
def test_fitted_layout_follows_the_soft_model_better(k):
    split, rewards = simulated(heads=2)
    model = soft_model.SoftModel([1], np.ones(1), 1.0, 0.0)
    found = harden.fit_layouts(model, rewards, split, k)
    assert set(found) == ({"fitted"} if k % 2 else {"fitted", "equal", "quantile"})
    for formulas, alpha, misfit in found.values():
        assert len(formulas) == len(alpha) == k and abs(alpha.sum() - 1) < 1e-9
        soft = expit((rewards[0, split.a] - rewards[0, split.b]).astype(float))
        assert misfit == pytest.approx(
            np.mean((p_hat(formulas, alpha, rewards, split.a, split.b) - soft) ** 2), rel=1e-9
        )
        assert misfit < 0.02
    assert min(found, key=lambda name: found[name][2]) == "fitted"


def test_many_components():
    """More formulas to pick from than the evaluator takes at once."""
    split, rewards = simulated(n=500, r=100, heads=8)
    model = soft_model.SoftModel(list(range(1, 9)), np.full(8, 1 / 8), 1.0, 0.0)
    found = harden.fit_layouts(model, rewards, split, 16, "fitted")
    assert found["fitted"][2] < 0.01


def test_several_components():
    """Votes that follow two opposed rewards: one component cannot, two can, and validation pairs
    say so."""
    split, rewards = simulated(heads=2)
    rewards = 6 * rewards
    soft = expit(rewards[:, split.a].astype(float) - rewards[:, split.b]).mean(0)
    votes = np.random.default_rng(0).binomial(9, soft).astype(float)
    split = Split(**{**vars(split), "votes_a": votes, "votes_b": 9 - votes, "p_true": soft})
    one, both = (
        harden.harden((split, rewards), (split, rewards), 8, "equal", counts)
        for counts in ([1], None)
    )
    assert both.model.members == [1, 2] and both.brier < 0.7 * one.brier
    assert [f["member"] for f in both.formulas].count(1) == 4 and len(both.alpha) == 8


# ---- the scale and the lapses


def drawn(seed, n=300, m=2):
    """(differences (m, n) of nearly any scale, weights (m,), vote fractions (n,) of 4 votes)."""
    rng = np.random.default_rng(seed)
    differences = rng.normal(size=(m, n)) * rng.choice([0, 0.3, 1, 3], size=(m, n))
    w = rng.dirichlet(np.ones(m))
    truth = 0.08 + 0.84 * (w @ expit(rng.uniform(0.3, 4) * differences))
    return differences * 10.0 ** rng.uniform(-3, 3), w, rng.binomial(4, truth) / 4


def error(differences, w, p, tau, a):
    return np.mean((soft_model.predict(differences, w, tau, a) - p) ** 2)


@pytest.mark.parametrize("seed", range(6))
def test_scale_and_lapses_are_those_of_another_method(seed):
    differences, w, p = drawn(seed, m=1 + seed % 3)
    tau, a = soft_model.fit_scale_and_lapses(differences, w, p)
    unit = np.median(np.abs(differences[differences != 0]))
    grid = [(x, y) for x in np.linspace(-5, 5, 60) for y in np.linspace(0, 0.49, 20)]
    loss = lambda x: error(differences, w, p, np.exp(x[0]) / unit, x[1])  # noqa: E731
    options = {"xatol": 1e-9, "fatol": 1e-15, "maxiter": 5000}
    bounds = [(-5, 5), (0, 0.49)]
    found = minimize(
        loss, min(grid, key=loss), method="Nelder-Mead", bounds=bounds, options=options
    )
    assert error(differences, w, p, tau, a) <= found.fun + 1e-12
    assert tau == pytest.approx(np.exp(found.x[0]) / unit, rel=1e-4)
    assert a == pytest.approx(found.x[1], abs=1e-4)


def test_scale_and_lapses_are_found_whatever_the_rewards_scale_and_the_pairs_order():
    differences, w, _ = drawn(0, 3000)
    unit = np.median(np.abs(differences[differences != 0]))
    p = 0.1 + 0.8 * (w @ expit(1.7 * differences / unit))
    tau, a = soft_model.fit_scale_and_lapses(differences, w, p)
    assert tau * unit == pytest.approx(1.7, rel=1e-6) and a == pytest.approx(0.1, abs=1e-6)
    differences, w, p = drawn(1)
    tau, a = soft_model.fit_scale_and_lapses(differences, w, p)
    swapped = np.random.default_rng(0).random(len(p)) < 0.5
    signs = np.where(swapped, -1, 1)
    for c, d, q in [(1e-9, 1, p), (1e12, 1, p), (1, signs, np.where(swapped, 1 - p, p))]:
        other, b = soft_model.fit_scale_and_lapses(c * d * differences, w, q)
        assert c * other == pytest.approx(tau, rel=1e-9) and b == pytest.approx(a, abs=1e-9)
    shuffled = np.random.default_rng(1).permutation(len(p))
    again = soft_model.fit_scale_and_lapses(differences[:, shuffled], w, p[shuffled])
    assert again == pytest.approx((tau, a), rel=1e-9)


def test_scale_and_lapses_at_their_bounds():
    one = np.ones(1)
    fit = soft_model.fit_scale_and_lapses
    assert fit(np.zeros((1, 3)), one, np.array([0, 1, 0.5])) == (1, 0)  # constant rewards
    d = np.array([[-3.0, -1.0, 1.0, 5.0]])
    separable = (d[0] > 0).astype(float)
    tau, a = fit(d, one, separable)
    assert error(d, one, separable, tau, a) < 1e-10 and a < 1e-9
    for p in (1 - separable, np.full(4, 0.5)):  # against the rewards; nothing to be learned
        tau, a = fit(d, one, p)
        assert np.abs(soft_model.predict(d, one, tau, a) - 0.5).max() < 0.03 and a == 0.49
    for p in (0.0, 0.5, 0.75, 1.0):  # a single pair
        tau, a = fit(d[:, 3:], one, np.array([p]))
        assert error(d[:, 3:], one, p, tau, a) <= 1e-4 + max(0, 0.5 - p) ** 2
    rewards = np.array([[np.inf, np.inf, -np.inf, 1, 2]], np.float32)
    d = soft_model.reward_differences(rewards, np.array([0, 0, 3, 4]), np.array([1, 2, 4, 3]))
    tau, a = fit(d, one, np.array([0.5, 1, 0, 1]))
    assert error(d, one, np.array([0.5, 1, 0, 1]), tau, a) < 1e-6


# ---- the run


def make(run, out, *flags):
    harden.main(harden.parse_args(["--run", str(run), "--out", str(out), *flags]))
    return out


@pytest.mark.parametrize("layout", ["auto", "quantile", "equal"])
def test_run_of_its_own(full_run, tmp_path, layout, capsys):
    out = make(full_run, tmp_path / "hard", "--k", "4", "--layout", layout)
    assert "no validation" not in capsys.readouterr().out
    evaluate.main(evaluate.parse_args(["--run", str(out), "--resamples", "50"]))
    prefixes, metrics = (
        json.loads((out / "weights.json").read_text()),
        json.loads((out / "metrics.json").read_text()),
    )
    assert [(w["k"], w["fit"]) for w in prefixes] == [(4, "fixed")] and metrics["k"] == 4
    test = metrics["splits"]["test"]
    split = read_split(out, "test")
    rewards = np.stack([np.load(full_run / "rewards" / f"0{j}_test.npy") for j in (1, 2)])
    formulas = json.loads((out / "members.json").read_text())["members"]
    by_hand = p_hat(formulas, np.array(prefixes[0]["alpha"]), rewards, split.a, split.b)
    assert test["ensemble"][0]["brier"] == pytest.approx(
        np.mean((by_hand - split.p) ** 2), abs=1e-9
    )
    assert metrics["diversity"] is not None and not leftovers(out)
    np.testing.assert_array_equal(
        np.load(out / "rewards" / "03_test.npy"), hardened(formulas, rewards)[2]
    )


def metrics_of(run, out):
    evaluate.main(evaluate.parse_args(["--run", str(run), "--out", str(out), "--resamples", "50"]))
    return json.loads((out / "metrics.json").read_text())["splits"]


def test_soft_lines_of_the_source(full_run, tmp_path, no_figures, capsys):
    """A hardened run has them without its source, and that of the model it follows beside them."""
    source = shutil.copytree(full_run, tmp_path / "source")
    for split in ("train", "valid", "test"):  # Votes that take both members.
        rewards = np.load(source / "rewards" / f"02_{split}.npy")
        np.save(source / "rewards" / f"02_{split}.npy", -50 * rewards[::-1])
    out = make(edited(source), tmp_path / "hard", "--k", "4", "--layout", "fitted")
    before, facts = metrics_of(source, tmp_path / "1"), manifest.entries(out)["harden"]
    source.rename(tmp_path / "gone")
    after = metrics_of(out, tmp_path / "2")
    model = soft_model.SoftModel(*(facts[x] for x in ("components", "weights", "tau", "a")))
    assert facts["tuned_on"] == "valid"
    for name, entry in after.items():
        assert entry["soft_fit"] == before[name]["soft_fit"]
        for line in ("soft_single", "soft_scaled"):
            for key in (line, f"{line}_ci", soft_model.LINES[line]):
                assert entry[key] == before[name][key] and (entry[key] or "_ci" in key)
        split, kept = read_split(out, name), np.load(out / "rewards" / f"source_{name}.npy")
        soft = soft_model.predict(
            (kept[:, split.a] - kept[:, split.b]).astype(float)[np.array(model.members) - 1],
            np.array(model.w),
            model.tau,
            model.a,
        )
        assert entry["soft_hardened"] == pytest.approx(np.mean((soft - split.p) ** 2), abs=1e-9)
        assert entry["soft_hardened_true"] == pytest.approx(np.mean((soft - split.p_true) ** 2))
        assert before[name]["soft_hardened"] is None
    assert after["valid"]["soft_scaled"] <= after["valid"]["soft_single"]
    said = capsys.readouterr().out
    assert said.count("single soft model scaled on valid prompts") == 2
    assert said.count("soft model that was hardened") == 1
    path = out / "rewards" / "source_test.npy"
    np.save(path, np.load(path)[:, 1:])
    with pytest.raises(InputError, match="edited or damaged"):
        metrics_of(out, tmp_path / "3")
    with pytest.raises(InputError, match=r"source_test.npy: shape \(2, \d+\) found, at least"):
        metrics_of(edited(out), tmp_path / "3")


def test_same_again_and_moved_together(full_run, tmp_path, capsys, monkeypatch):
    both = tmp_path / "both"
    shutil.copytree(full_run, both / "source")
    make(both / "source", both / "hard", "--k", "4")
    first = {path.name: path.read_bytes() for path in (both / "hard").rglob("*.npy")}
    make(both / "source", both / "hard", "--k", "4")
    assert "skipped" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(harden, "CODE", harden.CODE[1:])  # other code
        make(both / "source", both / "hard", "--k", "4")
        assert "skipped" not in capsys.readouterr().out
    make(both / "source", both / "hard", "--k", "2")
    assert len(list((both / "hard" / "rewards").glob("0*_test.npy"))) == 2
    make(both / "source", both / "hard", "--k", "4")
    assert first == {path.name: path.read_bytes() for path in (both / "hard").rglob("*.npy")}
    both.rename(tmp_path / "moved")
    questions = tmp_path / "q.jsonl"
    split = read_split(tmp_path / "moved" / "hard", "test")
    questions.write_text(
        "".join(
            json.dumps({"prompt": m[-1]["content"], "responses": r}) + "\n"
            for m, r in zip(split.messages, split.responses)
        )
    )
    score.main(
        score.parse_args([str(questions), "--run", str(tmp_path / "moved" / "hard"), *FLAGS])
    )
    rows = [json.loads(line) for line in (tmp_path / "q-scores.jsonl").read_text().splitlines()]
    stored = np.stack(
        [np.load(tmp_path / "moved" / "hard" / "rewards" / f"0{j}_test.npy") for j in range(1, 5)],
        axis=1,
    )
    close = np.isclose(np.concatenate([row["rewards"] for row in rows]), stored, atol=1e-4)
    assert close.mean() > 0.98  # a reward at the edge of a level may fall on its other side


def test_a_kill_leaves_nothing_to_evaluate(full_run, tmp_path, monkeypatch, no_figures):
    """Between the new rewards and the new weights the old weights do not serve."""
    run, out = fresh(full_run, tmp_path), tmp_path / "out"
    words = ["--run", str(run), "--out", str(out), "--k", "4", "--layout"]
    harden.main(harden.parse_args([*words, "equal"]))
    write_json = files.write_json

    def killed(path, *rest, **options):
        if path.name == "members.json":
            raise KeyboardInterrupt
        write_json(path, *rest, **options)

    monkeypatch.setattr(files, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        harden.main(harden.parse_args([*words, "fitted"]))
    monkeypatch.setattr(files, "write_json", write_json)
    with pytest.raises(InputError, match="weights.json: no such file"):
        evaluate.main(evaluate.parse_args(["--run", str(out), "--resamples", "9"]))
    harden.main(harden.parse_args([*words, "fitted"]))
    evaluate.main(evaluate.parse_args(["--run", str(out), "--resamples", "9"]))


def test_killed_before_its_first_entry(full_run, tmp_path):
    """What such a call leaves in --out is not something else's."""
    out = tmp_path / "out"
    out.mkdir()
    for name in (".lock", ".lock-manifest.json", ".partial-manifest.json"):
        (out / name).touch()
    make(full_run, out, "--k", "2")
    assert not leftovers(out) and not (out / ".lock-manifest.json").exists()


def test_log_probabilities_of_other_data_do_not_stay(full_run, tmp_path, no_figures):
    """In --out, where the run it is made from has become another. Of the same data they do."""
    run = without_hashes(fresh(full_run, tmp_path))
    out = make(run, tmp_path / "hard", "--k", "4")
    started = manifest.begin_stage(out, "logprob", {}, data.hashes(out))
    split = read_split(out, "test")
    files.write_array(out / "logprob" / "test.npy", np.zeros(split.n_responses, np.float32))
    manifest.end_stage(out, "logprob", {}, data.hashes(out), started)
    make(run, out, "--k", "2")
    assert "logprob" in manifest.entries(out) and (out / "logprob" / "test.npy").exists()
    path = run / "data" / "test.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[0]["pairs"][0]["votes_a"] += 1
    pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(path)), path)
    make(run, out, "--k", "2")
    assert not (out / "logprob").exists() and manifest.entries(out).keys() == {"harden"}
    evaluate.main(evaluate.parse_args(["--run", str(out), "--resamples", "9"]))


def test_one_member_has_no_taste(full_run, tmp_path, capsys):
    run = tmp_path / "one"
    shutil.copytree(full_run, run)
    for path in (run / "rewards").glob("02_*"):
        path.unlink()
    make(run, tmp_path / "hard", "--k", "8")
    assert "no taste" in capsys.readouterr().out
    with pytest.raises(InputError, match="at least two members"):
        make(run, tmp_path / "other", "--layout", "equal")
    assert not (tmp_path / "other").exists()


def test_infinite_rewards_have_no_level(full_run, tmp_path):
    run = fresh(full_run, tmp_path)
    path = run / "rewards" / "02_test.npy"
    rewards = np.load(path)
    rewards[0] = -np.inf
    np.save(path, rewards)
    without_hashes(run)
    with pytest.raises(InputError, match="02_test.npy: infinite rewards found"):
        make(run, tmp_path / "hard")
    assert not (tmp_path / "hard").exists()


def test_refused(full_run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    for out in (full_run, tmp_path / "mine"):
        with pytest.raises(InputError, match="one of its own expected"):
            make(full_run, out)


def test_formulas_that_harden_does_not_make(full_run, tmp_path):
    run = shutil.copytree(full_run, tmp_path / "run")
    out = make(run, tmp_path / "hard", "--k", "2")
    path = out / "members.json"
    text, known = path.read_text(), (out / "manifest.json").read_text()
    whole = json.loads(text)
    assert read_members(out) == (out / "../run", whole["members"])
    levelled = whole["members"][0] | {"width": 1.0}

    def refused(content, words):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(InputError, match="edited or damaged"):
            read_members(out)
        manifest.accept_edited(out)
        with pytest.raises(InputError, match=words) as error:
            read_members(out)
        assert "\n" not in str(error.value) and str(path) in str(error.value)

    for change, words in [
        ({"member": 3}, "member 3 found, a number from 1 to 2"),
        ({"member": 0}, "member 0 found"),
        ({"member": -1}, "member -1 found"),
        ({"taste": 99, "taste_scale": 1.0}, "taste 99 found"),
        ({"taste": 1, "taste_scale": None}, "taste without taste_scale"),
        ({"scale": float("nan")}, "scale nan found, a finite number"),
        ({"offset": float("inf")}, "offset inf found"),
        ({"width": 0}, "width 0 found, a number above 0"),
        ({"scale": 10**400}, "scale 1000.* found, a finite number"),
        ({"more": 1}, "more found, member, scale"),
        ({"member": "1"}, "member: text found"),
    ]:
        refused(whole | {"members": [levelled | change, levelled]}, words)
    refused(whole | {"members": [levelled]}, "1 formulas found, one for each of 2 members")
    for content in ("[]", "3", "{", "", json.dumps({"source": 1, "members": []})):
        refused(content, str(path))
    for source in ("gone", "a\0b", str(path)):
        refused(whole | {"source": source}, "no run directory")
    refused(whole | {"source": "."}, "the run itself found")
    back = shutil.copytree(out, tmp_path / "back")  # Each is made from the other.
    (back / "members.json").write_text(json.dumps(whole | {"source": "../hard"}))
    refused(whole | {"source": "../back"}, "a hardened run found")
    path.write_text(text)
    (out / "manifest.json").write_text(known)
    assert read_members(out)[1] == whole["members"]


def test_without_torch():
    code = "import sys; sys.modules['torch'] = None; import harden, pairwise.levels"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY / "extras")
