"""fit_weights.py and extras/prune.py: the quadratic program against independent oracles, and what
it may and may not depend on."""

import itertools
import json
import shutil

import fit_weights
from pairwise import weights
from pairwise.cli import InputError
from pairwise.data import Split, write_split
from pairwise.files import write_json

import numpy as np
import prune
import pytest
from conftest import REPOSITORY, edited, of_one_vote
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

seeds = st.integers(0, 2**32 - 1)


# ---- problems and oracles


def q_of(votes, p):
    """Q through the project's sums; votes (k, N), p (N,)."""
    n = len(p)
    return weights.error_matrix(votes @ votes.T / n, votes @ p / n, p @ p / n)


def draw_votes(rng, k=None):
    """Votes (k, N) and p (N,) with few pairs, and members that are copies, opposites, constant, or
    exactly right."""
    k, n = k or int(rng.integers(1, 17)), int(rng.integers(1, 13))
    p = rng.integers(0, 5, n) / 4 if rng.random() < 0.7 else rng.integers(0, 4, n) / 3
    kind = rng.integers(4)
    if kind == 0:  # a population that members can match alone
        p = rng.integers(0, 3, n) / 2
    votes = rng.choice([0.0, 0.5, 1.0], (k, n), p=[0.45, 0.1, 0.45])
    for j in range(k):
        other = rng.integers(k)
        match rng.integers(7):
            case 0:
                votes[j] = votes[other]
            case 1:
                votes[j] = 1 - votes[other]
            case 2:
                votes[j] = rng.choice([0.0, 0.5, 1.0])
            case 3:
                votes[j] = (
                    np.round(2 * p) / 2
                )  # perfect, where p has only halves: then Q has a row of zeros
            case 4:
                votes[j] = p > rng.random()  # a level of p: such members are calibrated together
    if kind == 1:  # a mixture of the members is perfectly calibrated
        p = np.clip(rng.dirichlet(np.ones(k)) @ votes, 0, 1)
    return votes, p


def supports_minimum(q):
    """min alpha'Q alpha over the simplex: the best feasible closed form over all supports.

    One optimum is a corner of the set of optima; on its support the closed form is unique, whatever
    the rank of Q. Each candidate is made exactly feasible before it counts, so that the result is
    never too small.
    """
    k, best = len(q), np.inf
    for size in range(1, k + 1):
        for support in map(list, itertools.combinations(range(k), size)):
            system = np.ones((size + 1, size + 1))
            system[:size, :size], system[size, size] = 2 * q[np.ix_(support, support)], 0
            found = np.linalg.lstsq(system, np.append(np.zeros(size), 1), rcond=None)[0][:size]
            alpha = np.zeros(k)
            alpha[support] = np.clip(found, 0, None)
            if alpha.sum() > 0.5:
                alpha /= alpha.sum()
                best = min(best, alpha @ q @ alpha)
    return best


def gram(rng, k, kind):
    """A positive semidefinite Q: of full rank, singular, or singular up to a perturbation of
    1e-3 .. 1e-15."""
    rank = k if kind == "full" else int(rng.integers(1, k + 1))
    factor = rng.normal(size=(k, rank)) + rng.choice([0, 1, 3])
    if kind == "near":
        factor = np.column_stack(
            [factor, 10.0 ** rng.uniform(-7.5, -1.5) * rng.normal(size=(k, k))]
        )
    q = factor @ factor.T
    return q / np.abs(q).max()


def feasible(alpha):
    return alpha.dtype == np.float64 and (alpha >= 0).all() and abs(alpha.sum() - 1) < 1e-14


# ---- the optimum


@settings(max_examples=150, deadline=None)
@given(seeds, st.integers(1, 6), st.sampled_from(["full", "singular", "near", "votes"]))
def test_weights_are_as_good_as_the_best_support(seed, k, kind):
    rng = np.random.default_rng(seed)
    q = q_of(*draw_votes(rng, k)) if kind == "votes" else gram(rng, k, kind)
    alpha = weights.simplex_weights(q)
    assert alpha.shape == (k,) and feasible(alpha)
    assert abs(alpha @ q @ alpha - supports_minimum(q)) < 1e-12


@pytest.mark.parametrize("kind", ["full", "singular", "near", "votes"])
def test_weights_are_as_good_as_slsqp(kind):
    rng = np.random.default_rng(0)
    for _ in range(8):
        k = int(rng.integers(2, 17))
        q = q_of(*draw_votes(rng, k)) if kind == "votes" else gram(rng, k, kind)
        alpha = weights.simplex_weights(q)
        found = minimize(
            lambda x, q=q: x @ q @ x,
            np.full(k, 1 / k),
            jac=lambda x, q=q: 2 * q @ x,
            method="SLSQP",
            bounds=[(0, 1)] * k,
            constraints={"type": "eq", "fun": lambda x: x.sum() - 1, "jac": np.ones_like},
            options={"ftol": 1e-14, "maxiter": 1000},
        ).x
        found = np.clip(found, 0, None) / np.clip(found, 0, None).sum()
        assert -1e-14 < found @ q @ found - alpha @ q @ alpha < 1e-7


def test_weights_themselves_where_they_are_unique():
    assert np.allclose(
        weights.simplex_weights(np.diag([1.0, 2, 4])), np.array([4, 2, 1]) / 7, atol=1e-15
    )
    assert np.allclose(
        weights.simplex_weights(np.array([[1, 2], [2, 5.0]])), [1, 0], atol=1e-15
    )  # the unconstrained optimum is (1.5, -.5)
    rng = np.random.default_rng(1)
    for _ in range(20):  # rebuilt from its own support
        q = gram(rng, 6, "full")
        alpha = weights.simplex_weights(q)
        support = alpha > 0
        inside = np.linalg.solve(q[np.ix_(support, support)], np.ones(support.sum()))
        if np.linalg.cond(q) < 1e6:
            np.testing.assert_allclose(alpha[support], inside / inside.sum(), atol=1e-9)


@settings(max_examples=400, deadline=None)
@given(seeds)
def test_kkt_residual_of_every_prefix_is_within_the_promise(seed):
    votes, p = draw_votes(np.random.default_rng(seed))
    q = q_of(votes, p)
    for entry in fit_weights.fit_prefixes(q):
        k, alpha = entry["k"], np.array(entry["alpha"])
        assert entry["kkt"] <= 1e-10 and feasible(alpha) and len(alpha) == k
        slopes = 2 * ((alpha @ votes[:k] - p) * (votes[:k] - p)).mean(
            1
        )  # of the error along each member, from the votes
        assert alpha @ slopes - slopes.min() <= 1e-10
        direct = np.mean((alpha @ votes[:k] - p) ** 2)
        assert abs(entry["train_mse"] - direct) < 1e-14


def test_a_member_that_could_join_but_need_not():
    """Members 1 and 3 are copies, and member 2 is worth as much in the mixture as out of it: scipy
    1.17's nnls gives it a weight of .05."""
    votes = (
        np.array(
            [[1, 1, 0, 0, 0, 1, 1, 1, 0], [1, 2, 1, 2, 2, 2, 2, 0, 2], [1, 1, 0, 0, 0, 1, 1, 1, 0]]
        )
        / 2
    )
    q = q_of(votes, np.array([1, 2, 0, 0, 0, 2, 1, 2, 0]) / 3)
    alpha = weights.simplex_weights(q)
    assert alpha[1] < 1e-12 and weights.kkt_residual(q, alpha) < 1e-14
    for seed in (8, 3203, 5386, 7857, 19463):  # more of the kind
        assert (
            max(
                entry["kkt"]
                for entry in fit_weights.fit_prefixes(
                    q_of(*draw_votes(np.random.default_rng(seed)))
                )
            )
            < 1e-12
        )


@settings(max_examples=200, deadline=None)
@given(seeds)
def test_quadratic_form_is_the_calibration_error(seed):
    rng = np.random.default_rng(seed)
    votes, p = draw_votes(rng)
    alpha = rng.dirichlet(np.ones(len(votes)))
    assert abs(alpha @ q_of(votes, p) @ alpha - np.mean((alpha @ votes - p) ** 2)) < 1e-14


@settings(max_examples=200, deadline=None)
@given(seeds)
def test_residual_is_positive_away_from_the_optimum(seed):
    """Any error above the least shows in the residual; so does a weight moved where the optimum is
    unique, or out of the simplex."""
    rng = np.random.default_rng(seed)
    q = q_of(*draw_votes(rng))
    alpha = weights.simplex_weights(q)
    other = rng.dirichlet(np.ones(len(q)))
    assert weights.kkt_residual(q, other) >= other @ q @ other - alpha @ q @ alpha - 1e-15
    assert weights.kkt_residual(q, alpha * 1.01) >= 0.0099
    k = int(rng.integers(2, 9))
    q = gram(rng, k, "full") + 0.1 * np.eye(k)
    alpha = weights.simplex_weights(q)
    assert weights.kkt_residual(q, alpha) < 1e-14
    step = np.zeros(k)
    step[[alpha.argmax(), (alpha.argmax() + 1) % k]] = -1e-3, 1e-3
    assert weights.kkt_residual(q, alpha + step) > 1e-8
    outside = np.zeros(k)
    outside[:2] = 1.25, -0.25
    assert weights.kkt_residual(q, outside) >= 0.25


def test_residual_by_hand():
    q = np.diag(
        [1.0, 2.0]
    )  # slopes at (1/2, 1/2): 1 and 2, so the gap is 1/2 and so is the slackness of member 2
    assert weights.kkt_residual(q, np.array([0.5, 0.5])) == 0.5
    assert weights.kkt_residual(q, np.array([2 / 3, 1 / 3])) < 1e-15
    assert (
        weights.kkt_residual(np.diag([1.0, 1.0, 0]), np.array([0.5, 0.5, 0])) == 1
    )  # the gap of both, each alone has 1/2


# ---- what it depends on


@pytest.mark.parametrize("k", [1, 2, 5, 16])
def test_members_that_vote_alike_share_the_weight_equally(k):
    rng = np.random.default_rng(k)
    vote, p = rng.choice([0.0, 0.5, 1.0], 50), rng.integers(0, 4, 50) / 3
    q = q_of(np.tile(vote, (k, 1)), p)
    assert np.array_equal(weights.simplex_weights(q), np.full(k, 1 / k))
    assert np.array_equal(
        weights.simplex_weights(np.zeros((k, k))), np.full(k, 1 / k)
    )  # all of them perfect


def test_a_perfect_member_takes_all_and_leaves_nothing():
    rng = np.random.default_rng(0)
    for k in (2, 5, 16):
        p = rng.integers(0, 3, 40) / 2
        votes = rng.choice([0.0, 0.5, 1.0], (k, 40))
        votes[k // 2] = p
        q = q_of(votes, p)
        assert not q[k // 2, k // 2] and np.abs(q[k // 2]).max() < 1e-15
        assert np.array_equal(weights.simplex_weights(q).round(9), np.arange(k) == k // 2)


def test_no_error_is_below_zero_but_for_rounding():
    [entry] = fit_weights.fit_prefixes(np.array([[-1e-18]]))
    assert entry["train_mse"] == 0 and entry["alpha"] == [1]


@settings(max_examples=150, deadline=None)
@given(seeds)
def test_a_duplicate_changes_no_error_and_a_permutation_only_the_order(seed):
    rng = np.random.default_rng(seed)
    votes, p = draw_votes(rng)
    k = len(votes)
    best = fit_weights.fit_prefixes(q_of(votes, p))[-1]["train_mse"]
    copied = np.concatenate([votes, votes[[rng.integers(k)]]])
    assert abs(fit_weights.fit_prefixes(q_of(copied, p))[-1]["train_mse"] - best) < 1e-14
    order = rng.permutation(k)
    assert abs(fit_weights.fit_prefixes(q_of(votes[order], p))[-1]["train_mse"] - best) < 1e-14
    q = gram(rng, k, "full") + 0.1 * np.eye(k)  # a unique optimum moves with its members
    np.testing.assert_allclose(
        weights.simplex_weights(q[np.ix_(order, order)]),
        weights.simplex_weights(q)[order],
        atol=1e-12,
    )
    np.testing.assert_allclose(
        weights.simplex_weights(1e-6 * q), weights.simplex_weights(q), atol=1e-12
    )  # nor does the scale matter


@settings(max_examples=100, deadline=None)
@given(seeds)
def test_prefixes_do_not_depend_on_later_members_and_never_get_worse(seed):
    votes, p = draw_votes(np.random.default_rng(seed))
    q = q_of(votes, p)
    prefixes = fit_weights.fit_prefixes(q)
    assert [entry["k"] for entry in prefixes] == list(range(1, len(q) + 1))
    size = 1 + seed % len(q)
    assert (
        fit_weights.fit_prefixes(np.array(q[:size, :size])) == prefixes[:size]
    )  # so is a second call: the same bits
    errors = [entry["train_mse"] for entry in prefixes]
    assert all(after <= before + 1e-14 for before, after in itertools.pairwise(errors))


# ---- the stage


@pytest.fixture
def run(tmp_path):
    """Data of six train prompts of unequal size and rewards of three members, with exact ties."""
    rng, run = np.random.default_rng(4), tmp_path / "run"
    (run / "data").mkdir(parents=True)
    (run / "rewards").mkdir()
    for split in ("train", "test"):
        rows = []
        for i in range(6):
            pairs = [
                {
                    "a": int(a),
                    "b": int(b),
                    "votes_a": float(x),
                    "votes_b": float(4 - x),
                    "ties": 0.0,
                }
                for (a, b), x in zip(
                    itertools.combinations(range(2 + i % 3), 2), rng.integers(0, 5, 6)
                )
            ]
            rows.append(
                {
                    "prompt_id": f"{split}{i}",
                    "messages": [{"role": "user", "content": f"Question {i}?"}],
                    "responses": [f"Answer {n}." for n in range(2 + i % 3)],
                    "pairs": pairs,
                }
            )
        write_split(run / "data" / f"{split}.parquet", rows)
        for j in (1, 2, 3):
            np.save(
                run / "rewards" / f"{j:02d}_{split}.npy", rng.integers(0, 5, 18).astype(np.float32)
            )
    return run


def fit(run):
    fit_weights.main(fit_weights.parse_args(["--run", str(run)]))
    return json.loads((run / "weights.json").read_text())


def test_weights_file_is_exact_and_says_how_exact(run, capsys):
    from pairwise.data import read_split

    prefixes = fit(run)
    split = read_split(run, "train")
    rewards = np.stack([np.load(run / "rewards" / f"{j:02d}_train.npy") for j in (1, 2, 3)]).astype(
        float
    )
    votes = (np.sign(rewards[:, split.a] - rewards[:, split.b]) + 1) / 2
    assert (votes == 0.5).any() and [entry["k"] for entry in prefixes] == [1, 2, 3]
    for entry in prefixes:
        k = entry["k"]
        assert (
            set(entry) == {"k", "alpha", "fit", "train_mse", "kkt"}
            and entry["fit"] == "qp"
            and len(entry["alpha"]) == k
            and entry["kkt"] <= 1e-10
        )
        d = votes[:k] - split.p
        assert abs(entry["train_mse"] - np.mean((entry["alpha"] @ d) ** 2)) < 1e-14
        assert abs(entry["train_mse"] - supports_minimum(d @ d.T / d.shape[1])) < 1e-12
    assert "k=3" in capsys.readouterr().out


def test_stage_is_skipped_repeatable_and_made_again_for_another_member(run, capsys):
    first, content = fit(run), (run / "weights.json").read_bytes()
    assert "skipped" not in capsys.readouterr().out
    assert fit(run) == first and "up to date, skipped" in capsys.readouterr().out
    (run / "weights.json").unlink()
    fit(run)
    assert (
        run / "weights.json"
    ).read_bytes() == content and "skipped" not in capsys.readouterr().out
    for split in ("train", "test"):
        np.save(run / "rewards" / f"04_{split}.npy", np.arange(18, dtype=np.float32))
    assert fit(run)[:3] == first and "k=4" in capsys.readouterr().out
    np.save(run / "rewards" / "01_train.npy", np.arange(18, dtype=np.float32))
    assert fit(run)[0] != first[0] and "skipped" not in capsys.readouterr().out


def test_stage_is_made_again_for_other_code(run, tmp_path, monkeypatch, capsys):
    """The compiled evaluator is code, too."""
    assert fit_weights.evaluator.__file__ in fit_weights.CODE
    fit(run)
    copies = [shutil.copy(REPOSITORY / path, tmp_path) for path in fit_weights.CODE]
    monkeypatch.setattr(fit_weights, "CODE", copies)
    capsys.readouterr()
    fit(run)
    assert "up to date, skipped" in capsys.readouterr().out
    for copy in copies:
        with open(copy, "ab") as code:
            code.write(b"\n")
        fit(run)
        assert "skipped" not in capsys.readouterr().out, copy
    content = (run / "weights.json").read_text(encoding="utf-8") + " "
    (run / "weights.json").write_text(content, encoding="utf-8")
    edited(run)
    fit(run)
    with open(copies[0], "ab") as code:
        code.write(b"\n")
    with pytest.raises(InputError, match="weights.json: edited and accepted, before"):
        fit(run)
    assert (run / "weights.json").read_text(encoding="utf-8") == content
    (run / "weights.json").unlink()
    fit(run)


def rewards_with(value):
    rewards = np.arange(18, dtype=np.float32)
    rewards[7] = value
    return rewards


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda run: np.save(run / "rewards/02_train.npy", rewards_with(np.nan)),
            r"02_train.npy: member 2, split train: 1 rewards are NaN, the first at index 7",
        ),
        (lambda run: (run / "rewards/02_train.npy").unlink(), r"02_train.npy: no such file"),
        (
            lambda run: [path.unlink() for path in (run / "rewards").glob("02_*")],
            r"members \[1, 3\] found, 1 to 2 expected",
        ),
        (lambda run: shutil.rmtree(run / "rewards"), "no rewards; train_rm.py makes them"),
        (
            lambda run: np.save(run / "rewards/03_train.npy", np.zeros(17, np.float32)),
            r"float32 \(17,\) found, float32 \(18,\) expected",
        ),
        (
            lambda run: np.save(run / "rewards/01_train.npy", np.zeros(18)),
            "float64 .* found, float32 .* expected",
        ),
        (
            lambda run: (run / "rewards/01_train.npy").write_bytes(b"reward"),
            "01_train.npy: not a .npy array",
        ),
        (lambda run: (run / "data/train.parquet").unlink(), "train.parquet: no such file"),
        (
            lambda run: (run / "data/train.parquet").write_bytes(b"data"),
            "train.parquet: not prepared data",
        ),
        (shutil.rmtree, "no such file"),
    ],
)
def test_bad_input_is_one_line_and_leaves_the_weights(run, spoil, message):
    write_json(run / "weights.json", ["before"])
    spoil(run)
    with pytest.raises(InputError, match=message) as error:
        fit(run)
    assert len(str(error.value).splitlines()) == 1
    if run.exists():
        assert (
            json.loads((run / "weights.json").read_text()) == ["before"]
            and not (run / "manifest.json").exists()
        )


# ---- --early-stop


@pytest.mark.parametrize(
    "errors, patience, k",
    [
        ([0.3], 1, None),
        ([0.3, 0.2, 0.1], 1, None),
        ([0.3, 0.3], 1, 2),
        ([0.3, 0.2, 0.25, 0.1], 1, 3),
        ([0.3, 0.2, 0.25, 0.1], 2, None),
        ([0.3, 0.2, 0.25, 0.2, 0.1], 2, 4),
        ([0.3, 0.2, 0.25, 0.19, 0.2, 0.2], 2, 6),
        ([0.3, 0.3 - 1e-12], 1, 2),
        ([0.3, 0.4, 0.2], 3, None),
    ],
)
def test_stops_at_the_first_size_without_a_gain(errors, patience, k):
    assert fit_weights.stops_at(errors, patience) == k
    for size in range(
        1, len(errors) + 1
    ):  # however many members there are already, and however often it is asked: the same answer
        assert fit_weights.stops_at(errors[:size], patience) == (k if k and size >= k else None)


def early_stop(run, *patience):
    fit_weights.main(fit_weights.parse_args(["--run", str(run), "--early-stop", *patience]))


def test_early_stop_is_by_the_validation_prompts(run, capsys):
    from pairwise.data import read_split

    with pytest.raises(
        InputError, match="valid.parquet: no such file; --early-stop needs validation prompts"
    ):
        early_stop(run)
    shutil.copy(run / "data" / "test.parquet", run / "data" / "valid.parquet")
    p, data = read_split(run, "valid").p, read_split(run, "valid")
    for j in (1, 2, 3):
        shutil.copy(run / "rewards" / f"{j:02d}_test.npy", run / "rewards" / f"{j:02d}_valid.npy")
    rewards = np.stack([np.load(run / "rewards" / f"{j:02d}_valid.npy") for j in (1, 2, 3)]).astype(
        float
    )
    votes = (np.sign(rewards[:, data.a] - rewards[:, data.b]) + 1) / 2
    errors = [
        np.mean((np.array(entry["alpha"]) @ votes[: entry["k"]] - p) ** 2) for entry in fit(run)
    ]
    assert errors[1] < errors[0] and errors[2] < errors[1]
    capsys.readouterr()
    early_stop(run)  # Each member is a gain.
    assert "goes on" in capsys.readouterr().out
    early_stop(run, "3")  # no three members after the first
    printed = capsys.readouterr().out
    assert "goes on" in printed and " ".join(f"{error:.4f}" for error in errors) in printed
    for number in (3, 2):  # A copy of the first member gains nothing.
        shutil.copy(run / "rewards" / "01_valid.npy", run / "rewards" / f"{number:02d}_valid.npy")
        with pytest.raises(SystemExit) as status:
            early_stop(run)
        assert status.value.code == 3
        assert f"member {number} is the last" in capsys.readouterr().out


def test_early_stop_does_not_count_pairs_of_one_vote(run, tmp_path, capsys):
    shutil.copy(run / "data" / "test.parquet", run / "data" / "valid.parquet")
    for j in (1, 2, 3):
        shutil.copy(run / "rewards" / f"{j:02d}_test.npy", run / "rewards" / f"{j:02d}_valid.npy")
    printed = []
    for each in of_one_vote(run, tmp_path):
        fit(each)
        capsys.readouterr()
        early_stop(each, "3")
        printed.append(capsys.readouterr().out.splitlines()[-1])
    assert printed[0] == printed[1] and "early stop: Brier score" in printed[0]


# ---- extras/prune.py


def prune_run(run, beta, out):
    prune.main(prune.parse_args(["--run", str(run), "--beta", str(beta), "--out", str(out)]))


@pytest.mark.parametrize("votes", ["sampled", "population", "dependent"])
def test_pruned_run_is_a_run_of_its_own(run, votes, tmp_path, capsys):
    import evaluate
    from pairwise.data import read_split

    write_json(run / "data" / "stats.json", {"dataset": "made", "votes": votes, "ties": "drop"})
    (run / "member_01").mkdir()
    (run / "member_01" / "model.safetensors").write_text("weights")
    alpha = np.array(fit(run)[-1]["alpha"])
    before, out = (
        {path: path.read_bytes() for path in run.rglob("*") if path.is_file()},
        tmp_path / "pruned",
    )
    prune_run(run, 2.5, out)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before

    split = read_split(run, "train")
    rewards = np.stack([np.load(run / "rewards" / f"{j:02d}_train.npy") for j in (1, 2, 3)]).astype(
        float
    )
    v = (np.sign(rewards[:, split.a] - rewards[:, split.b]) + 1) / 2
    p_hat, kept, removed = alpha @ v, {0, 1, 2}, 0.0
    for j in sorted(
        range(3), key=lambda j: (np.mean(np.abs(v[j] - p_hat)), j), reverse=True
    ):  # from the farthest
        if removed + alpha[j] > 1 / 1.5:
            break
        kept, removed = kept - {j}, removed + alpha[j]
    (entry,) = json.loads((out / "weights.json").read_text())
    wanted = np.array([alpha[j] if j in kept else 0 for j in range(3)]) / (1 - removed)
    assert (
        entry["k"] == 3
        and entry["fit"] == "fixed"
        and entry["alpha"] == pytest.approx(wanted)
        and entry["kkt"] is None
    )
    assert (
        entry["train_mse"] == pytest.approx(np.mean((wanted @ v - split.p) ** 2))
        and 0 < removed < 1
    )
    facts = json.loads((out / "manifest.json").read_text())["stages"]["weights"]["pruned"]
    c = {
        "sampled": np.mean(split.p * (1 - split.p) / (split.n - 1)),
        "population": 0,
        "dependent": None,
    }[votes]
    assert facts["removed"] == sorted(j + 1 for j in {0, 1, 2} - kept) and facts[
        "weight_removed"
    ] == pytest.approx(removed)
    if c is None:
        assert facts["epsilon"] is facts["gamma"] is facts["bound"] is None
    else:
        epsilon = max(0, np.mean((p_hat - split.p) ** 2) - c)
        assert [
            facts["epsilon"],
            facts["gamma"],
            facts["bound"],
            facts["bound_of_weight_removed"],
        ] == pytest.approx(
            [
                epsilon,
                3.5 * epsilon**0.5,
                (epsilon**0.5 + 1 / 1.5) ** 2,
                (epsilon**0.5 + removed) ** 2,
            ]
        )
        assert (
            facts["error"] == pytest.approx(entry["train_mse"] - c)
            and facts["error"] <= facts["bound"]
        )

    assert (out / "member_01" / "model.safetensors").read_text() == "weights" and (
        out / "member_01"
    ).is_symlink()
    evaluate.main(evaluate.parse_args(["--run", str(out), "--resamples", "20"]))
    assert [
        e["k"] for e in json.loads((out / "metrics.json").read_text())["splits"]["test"]["ensemble"]
    ] == [3]
    assert ">Pruned<" in (out / "report.html").read_text()
    capsys.readouterr()
    prune_run(run, 2.5, out)
    assert "up to date, skipped" in capsys.readouterr().out
    after = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="found, a new directory expected"):
        prune_run(run, 3, out)
    with pytest.raises(InputError, match="pruned weights found"):  # they are not silently replaced
        fit(out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == after


@pytest.mark.parametrize(
    "script, flags, words",
    [
        (prune, ["--beta", "2", "--out", "x"], "2 found, a number above 2"),
        (prune, ["--beta", "nan", "--out", "x"], "above 2"),
        (prune, ["--beta", "3"], "required: --out"),
        (prune, ["--out", "x"], "required: --beta"),
        (fit_weights, ["--out", "x"], "--out"),
        (fit_weights, ["--early-stop", "0"], "at least 1"),
    ],
)
def test_bad_flags_are_one_line(script, flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        script.parse_args(["--run", "r", *flags])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and words in lines[0]


def test_pruning_does_not_count_pairs_of_one_vote(run, tmp_path, capsys):
    write_json(
        run / "data" / "stats.json", {"dataset": "made", "votes": "population", "ties": "drop"}
    )
    found = []
    for each in of_one_vote(run, tmp_path):
        fit(each)
        capsys.readouterr()
        prune_run(each, 2.5, out := tmp_path / f"{each.name}_pruned")
        *said, _ = capsys.readouterr().out.splitlines()  # The last is the path.
        facts = json.loads((out / "manifest.json").read_text())["stages"]["weights"]["pruned"]
        found.append((said, facts, json.loads((out / "weights.json").read_text())))
    assert found[0] == found[1] and "on test pairs" in found[0][0][-1]


def test_an_error_below_the_irreducible_one_is_epsilon_0():
    """Two opposed members and two votes, one each: p_hat = p, and C is 1/4."""
    votes = {"votes_a": np.ones(2), "votes_b": np.ones(2), "ties": np.zeros(2)}
    start = np.array([0, 4]), np.array([0, 2])
    split = Split(["x"], [[]], [[]], *start, np.array([0, 2]), np.array([1, 3]), **votes)
    rewards = np.array([[1, 0, 1, 0], [0, 1, 0, 1]], np.float32)
    stats = {"votes": "sampled", "ties": "drop"}
    _, error, facts = prune.prune(split, rewards, np.full(2, 0.5), 4, stats)
    assert error == facts["epsilon"] == facts["gamma"] == 0 and facts["error"] == -0.25
    assert facts["bound"] == pytest.approx(1 / 9)


def test_pruning_needs_weights(run, tmp_path):
    with pytest.raises(InputError, match="weights.json: no such file"):
        prune_run(run, 3, tmp_path / "out")
    assert not (tmp_path / "out").exists()
