"""train_rm.py --loss and --margin-from: each loss against scipy and finite differences, margins by
hand, and the baselines as a user runs them.
"""

import functools
import json
from types import SimpleNamespace

import evaluate
import train_rm
from pairwise import manifest
from pairwise.cli import InputError
from pairwise.data import JUDGMENTS, read_split
from pairwise.metrics import FEWEST

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import FULL, HEAD, edited, fit, fresh, mean_loss, rewards, train, without_hashes
from scipy.special import expit, log_expit

ONE_STEP = ("--pairs-per-step", "1000", "--epochs", "1", "--lr", "1e-9", "--weight-decay", "0")


def by_scipy(name, d, t, m):
    """The loss of each pair, float64, written out for winner and loser."""
    clipped, r = np.clip(t, 0, 1), np.where(t > 0.5, d, -d)
    return {
        "mse": (t - expit(d)) ** 2,
        "bce": -clipped * log_expit(d) - (1 - clipped) * log_expit(-d),
        "bt": -log_expit(r),
        "margin": -log_expit(r - m),
    }[name]


def draw(name, seed):
    """d, t, m of 50 pairs, no vote tied; targets outside [0, 1] where the loss can have them."""
    rng = np.random.default_rng(seed)
    t = (
        rng.uniform(-0.5, 1.5, 50)
        if name in ("mse", "bce")
        else rng.choice([0, 0.2, 0.4, 0.6, 0.75, 1], 50)
    )
    return rng.normal(0, 3, 50), t, rng.random(50)


@pytest.mark.parametrize("name", train_rm.LOSSES)
def test_loss_gradient_and_the_other_order(name):
    d, t, m = map(torch.from_numpy, draw(name, 0))
    loss = train_rm.LOSSES[name]
    d.requires_grad_(True)
    values = loss(d, t, m)
    np.testing.assert_allclose(
        values.detach(), by_scipy(name, d.detach().numpy(), t.numpy(), m.numpy()), atol=1e-12
    )
    np.testing.assert_allclose(loss(-d, 1 - t, m).detach(), values.detach(), atol=1e-12)
    values.sum().backward()
    up, down = (
        by_scipy(name, d.detach().numpy() + step, t.numpy(), m.numpy()) for step in (1e-6, -1e-6)
    )
    np.testing.assert_allclose(d.grad, (up - down) / 2e-6, atol=1e-7)


@pytest.mark.parametrize("name", train_rm.LOSSES)
def test_far_apart_in_float32(name):
    d = torch.tensor([-1e4, -200.0, 200.0, 1e4, -1e4, 1e4], requires_grad=True)
    t, m = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0]), torch.ones(6)
    values = train_rm.LOSSES[name](d, t, m)
    np.testing.assert_allclose(
        values.detach(),
        by_scipy(name, d.detach().double().numpy(), t.numpy(), m.numpy()),
        rtol=1e-6,
        atol=1e-30,
    )
    values.sum().backward()
    assert values.dtype == torch.float32 and torch.isfinite(d.grad).all()


def test_margins_by_hand():
    split = SimpleNamespace(
        votes_a=np.array([3.0, 2, 0, 1, 2.5]),
        n=np.array([4.0, 4, 3, 1, 5]),
        judgments=np.array([[10, 0], [4, 6], [5, 5], [0, 0], [1, 2]], np.int32),
    )
    np.testing.assert_allclose(train_rm.margin_of(split, "votes"), [0.5, 0, 1, 1, 0])
    np.testing.assert_allclose(train_rm.margin_of(split, "judgments"), [1, 0.2, 0, 0, 1 / 3])


def test_a_pair_identical_and_tied_is_counted_once(base, tmp_path):
    words = ["--run", str(tmp_path), "--iteration", "1", "--base", str(base), "--loss", "margin"]
    args = train_rm.parse_args([*words, "--margin-from", "judgments"])
    identical, tied = np.array([[1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0]], bool)
    judgments = np.array([[0, 0], [0, 0], [0, 0], [0, 0], [0, 0], [1, 0]])
    train = SimpleNamespace(judgments=judgments)
    facts, said = train_rm.facts_of(args, train, identical, tied, ({}, ""))
    assert facts["identical_pairs"] == 2 and facts["tied_pairs"] == 1
    assert facts["pairs_without_judgment"] == 2
    assert said == ", 1 dropped, their votes tie, 2 trained on without a judgment, m = 0"


# ---- through the scripts


@pytest.fixture(scope="module")
def judged(data, tmp_path_factory):
    """The data with ties of votes, pairs of one vote, and judgments, some of which say nothing."""
    run = fresh(data, tmp_path_factory.mktemp("judged"))
    path, rng = run / "data" / "train.parquet", np.random.default_rng(0)
    table = pq.read_table(path)
    rows = table.to_pylist()
    for number, pair in enumerate(pair for row in rows for pair in row["pairs"]):
        pair["votes_a"], pair["votes_b"] = ((2.0, 2.0), (1.0, 0.0), (1.0, 3.0), (4.0, 1.0))[
            number % 4
        ]
    judgments = [
        [{"a": int(a), "b": int(b)} for a, b in rng.integers(0, 3, (len(row["pairs"]), 2))]
        for row in rows
    ]
    table = pa.Table.from_pylist(rows, schema=table.schema)
    pq.write_table(table.append_column("judgments", pa.array(judgments, JUDGMENTS)), path)
    return run


@pytest.mark.parametrize("kind", [FULL, HEAD], ids=["full", "head"])
@pytest.mark.parametrize(
    "name, flags",
    [
        ("mse", ()),
        ("bce", ()),
        ("bt", ()),
        ("margin", ()),
        ("margin", ("--margin-from", "judgments")),
    ],
)
def test_the_loss_that_is_logged(judged, base, tmp_path, capsys, kind, name, flags):
    """One step too small to change anything: its loss is the mean over the pairs, of the rewards
    that are stored then.
    """
    run = fresh(judged, tmp_path)
    train(run, base, *kind, *ONE_STEP, "--loss", name, *flags)
    split, r, entry = (
        read_split(run, "train"),
        rewards(run, 1, "train").astype(float),
        manifest.entries(run)["member_01"],
    )
    hard = name in ("bt", "margin")
    kept = split.votes_a != split.votes_b if hard else np.ones(len(split.a), bool)
    source = split.judgments if flags else np.stack([split.votes_a, split.votes_b], 1)
    m = [abs(a - (a + b) / 2) / ((a + b) / 2) if a + b else 0 for a, b in source]
    losses = by_scipy(
        name, r[split.a] - r[split.b], split.votes_a / (split.votes_a + split.votes_b), np.array(m)
    )
    (line,) = map(json.loads, (run / "logs" / "01.jsonl").read_text().splitlines())
    assert (
        line["loss"] == pytest.approx(losses[kept].mean(), abs=1e-5)
        and line["pairs"] == kept.sum()
        and line["grad_norm"] > 0
    )
    assert entry["settings"]["loss"] == name and entry["settings"].get("margin_from") == (
        None if name != "margin" else "judgments" if flags else "votes"
    )
    said = capsys.readouterr().out
    assert (
        entry.get("tied_pairs") == (18 if hard else None)
        and ("18 dropped, their votes tie" in said) == hard
    )
    silent = int((kept & (split.judgments.sum(1) == 0)).sum())
    assert (
        entry.get("pairs_without_judgment") == (silent if flags else None)
        and (f"{silent} trained on without a judgment" in said) == bool(flags)
        and silent
    )


def distance(a, b, c):
    return abs(a - b)


def absolute(d, t, m):
    """|t - sigmoid(d)|: a loss of one's own."""
    return (t - torch.sigmoid(d)).abs()


@pytest.mark.parametrize(
    "name, soft", [("bce", True), ("bt", False), ("margin", False), ("absolute", True)]
)
def test_a_baseline_from_training_to_metrics(judged, base, tmp_path, name, soft, monkeypatch):
    monkeypatch.setitem(train_rm.LOSSES, "absolute", absolute)
    run = fresh(judged, tmp_path)
    train(run, base, *HEAD, "--loss", name)
    fit(run)
    monkeypatch.setattr(evaluate.report, "write", lambda *args: None)
    evaluate.main(evaluate.parse_args(["--run", str(run), "--resamples", "10"]))
    split, r = read_split(run, "train"), rewards(run, 1, "train")
    lines = [json.loads(line) for line in (run / "logs" / "01.jsonl").read_text().splitlines()]
    assert mean_loss(lines[-2:]) < mean_loss(lines[:2])
    votes = (r[split.a] > r[split.b]) + (r[split.a] == r[split.b]) / 2
    counted = split.n >= 2
    assert 0 < counted.sum() < len(counted)  # one vote is trained on, and counts in no error
    (weights,), metrics = (
        json.loads((run / "weights.json").read_text()),
        json.loads((run / "metrics.json").read_text())["splits"],
    )
    assert weights["train_mse"] == pytest.approx(
        ((votes - split.p) ** 2)[counted].mean(), abs=1e-12
    )
    assert metrics["train"]["ensemble"][0]["brier"] == pytest.approx(
        weights["train_mse"], abs=1e-12
    )
    for s in metrics.values():
        assert (
            (s["soft_single"] is not None),
            (s["soft_true"] is not None),
            (s["soft_single_ci"] is not None),
        ) == (soft, soft, soft and s["prompts"] >= FEWEST)
        assert s["soft_scaled"] is not None and s["soft_scaled_true"] is not None
        assert (s["soft_scaled_ci"] is not None) == (s["prompts"] >= FEWEST)
        assert s["soft_fit"]["split"] == ("valid" if "valid" in metrics else "train")


def test_one_vote_a_pair_everywhere(head_run, tmp_path):
    """Then the weights are fitted to those pairs: there are no others."""
    run = without_hashes(fresh(head_run.run, tmp_path))
    table = pq.read_table(run / "data" / "train.parquet")
    rows = table.to_pylist()
    for pair in (pair for row in rows for pair in row["pairs"]):
        pair["votes_a"], pair["votes_b"] = 1.0, 0.0
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), run / "data" / "train.parquet")
    fit(run)
    split, r = read_split(run, "train"), rewards(run, 1, "train")
    wrong = ((r[split.a] < r[split.b]) + (r[split.a] == r[split.b]) / 4).mean()
    assert json.loads((run / "weights.json").read_text())[0]["train_mse"] == pytest.approx(
        wrong, abs=1e-12
    )


def test_majority_labels_have_no_residual(judged, base, tmp_path, capsys):
    for flags in (("--loss", "bt"), ("--loss", "margin", "--target", "mixture")):
        with pytest.raises(SystemExit):
            train(tmp_path, base, *HEAD, *flags, iteration=2)
        assert "no residual: one member, or --target p, expected" in capsys.readouterr().err
    run = fresh(judged, tmp_path)
    for j in (1, 2):
        train(run, base, *HEAD, "--loss", "bt", "--target", "p", iteration=j)
        fit(run)
    assert manifest.entries(run)["member_02"]["tied_pairs"] == 18 and not np.array_equal(
        rewards(run, 1), rewards(run, 2)
    )


def test_a_run_refuses_another_loss(judged, base, tmp_path):
    run = fresh(judged, tmp_path)
    train(run, base, *HEAD, *ONE_STEP, "--loss", "margin")
    for flags, said in (
        (("--loss", "bt"), "loss was margin, is bt"),
        ((), "loss was margin, is mse"),
        (("--loss", "margin", "--margin-from", "judgments"), "margin-from was votes, is judgments"),
    ):
        with pytest.raises(InputError, match=said):
            train(run, base, *HEAD, *ONE_STEP, *flags)


def test_a_run_refuses_an_edit_of_its_loss_or_target(judged, base, tmp_path, monkeypatch):
    """The function is another under the same name; under a new one it is for another run."""
    run, flags = fresh(judged, tmp_path), (*HEAD, *ONE_STEP, "--loss", "absolute")
    monkeypatch.setitem(train_rm.LOSSES, "absolute", absolute)
    train(run, base, *flags)
    before, entry = rewards(run, 1), manifest.entries(run)["member_01"]
    assert {"code of --loss absolute", "code of --target centered"} < entry["inputs"].keys()
    fit(run)
    for table, name in (("LOSSES", "absolute"), ("TARGETS", "centered")):
        with monkeypatch.context() as patch:
            patch.setitem(getattr(train_rm, table), name, distance)
            for j in (1, 2):
                with pytest.raises(InputError, match=f"from another code of --.* {name} than"):
                    train(run, base, *flags, iteration=j)
    monkeypatch.setitem(train_rm.LOSSES, "new", distance)
    train(run, base, *flags)
    assert np.array_equal(rewards(run, 1), before) and manifest.entries(run)["member_01"] == entry


def test_a_run_refuses_other_weights_of_the_members_before(judged, base, tmp_path):
    """Of one member there is only the weight 1; a rounding of weights is none."""
    run = fresh(judged, tmp_path)
    for j in (1, 2, 3):
        train(run, base, *HEAD, "--loss", "bce", iteration=j)
        fit(run)
    path, entries = run / "weights.json", manifest.entries(run)
    prefixes = json.loads(path.read_text(encoding="utf-8"))

    def change(step):
        a, b = prefixes[1]["alpha"]
        other = [prefixes[0], prefixes[1] | {"alpha": [a + step, b - step]}, *prefixes[2:]]
        path.write_text(json.dumps(other), encoding="utf-8")
        edited(run)

    change(1e-12)
    train(run, base, *HEAD, "--loss", "bce", iteration=3)
    change(1e-3)
    train(run, base, *HEAD, "--loss", "bce", iteration=2)
    with pytest.raises(InputError, match="from another mixture weights of members 1 to 2 than"):
        train(run, base, *HEAD, "--loss", "bce", iteration=3)
    assert manifest.entries(run)["member_03"] == entries["member_03"]


def test_what_is_another_code():
    def first(d, t, m):
        """|d|: once."""
        return d.abs()  # a comment

    original = manifest.hash_function(first)

    def first(d, t, m):
        return d.abs()

    assert manifest.hash_function(first) == original

    def first(d, t, m):
        """|d|: once."""
        return 2 * d.abs()

    assert manifest.hash_function(first) != original
    for other in (lambda d, t, m: d, functools.partial(first, m=0), torch.nn.MSELoss()):
        with pytest.raises(InputError, match="a function expected that def gives a name"):
            manifest.hash_function(other)


def test_the_help_and_flags_know_what_was_added(capsys, monkeypatch):
    def hinge(d, t, m):
        """100% of (m - d)+: a hinge."""

    monkeypatch.setitem(train_rm.LOSSES, "hinge", hinge)
    monkeypatch.setattr(train_rm, "ON_MAJORITY", {*train_rm.ON_MAJORITY, "hinge"})
    monkeypatch.setattr(train_rm, "WITH_MARGIN", {*train_rm.WITH_MARGIN, "hinge"})
    with pytest.raises(SystemExit):
        train_rm.parse_args(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "hinge: 100% of (m - d)+. bt and hinge and margin have no residual" in said
    words = ["--run", "r", "--iteration", "1", "--base", "b", "--loss", "hinge"]
    assert train_rm.parse_args(words).margin_from == "votes"
    given = train_rm.parse_args([*words, "--margin-from", "judgments"])
    assert given.margin_from == "judgments"


def test_refused(data, judged, base, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train(tmp_path, base, "--margin-from", "votes")
    assert "--margin-from is for --loss margin" in capsys.readouterr().err
    run = fresh(data, tmp_path)
    with pytest.raises(
        InputError,
        match=r"train.parquet: no column judgments found for --margin-from; "
        r"extras/synthetic_judgments.py makes it",
    ):
        train(run, base, *HEAD, "--loss", "margin", "--margin-from", "judgments")
    assert not (run / "logs").exists() and "member_01" not in manifest.entries(run)
    tied = fresh(judged, tmp_path, "tied")
    table = pq.read_table(tied / "data" / "train.parquet")
    rows = table.to_pylist()
    for pair in (pair for row in rows for pair in row["pairs"]):
        pair["votes_a"] = pair["votes_b"] = 2.0
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), tied / "data" / "train.parquet")
    with pytest.raises(InputError, match="no pair is left to train on: .* or have tied votes"):
        train(tied, base, *HEAD, "--loss", "bt")
