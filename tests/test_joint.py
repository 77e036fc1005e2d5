"""Joint training: the mixture's loss against brute force, the run it makes, one model of K heads
and the members split off it.
"""

import dataclasses
import json
from types import SimpleNamespace

import score
from pairwise import chats, manifest, training
from pairwise import reward_model as rm
from pairwise.cli import InputError
from pairwise.data import Split, read_split

import numpy as np
import pytest
import torch
import train_joint
from conftest import FLAGS, FULL, export, fit, fresh, leftovers, rewards, train
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

KINDS = {"full": FULL, "head": ("--train", "head", "--epochs", "5")}


def train_all(run, base, *flags):
    train_joint.main(
        train_joint.parse_args(["--run", str(run), "--base", str(base), *FLAGS, *flags])
    )
    return run


@pytest.fixture(scope="module")
def runs(data, base, tmp_path_factory):
    made = {}
    for kind, flags in KINDS.items():
        made[kind] = train_all(fresh(data, tmp_path_factory.mktemp(kind)), base, "--k", "3", *flags)
        fit(made[kind])
    return made


@pytest.fixture(params=list(KINDS))
def run(request, runs):
    return runs[request.param]


# ---- the loss


def brute_force(a, b, p, logits, s):
    """The same in plain Python."""
    alpha = [np.exp(x) / sum(np.exp(y) for y in logits) for x in logits]
    return sum(
        (sum(w / (1 + np.exp(-s * (x - y))) for w, x, y in zip(alpha, row, other)) - t) ** 2
        for row, other, t in zip(a, b, p)
    )


def test_loss_and_gradient_against_differences():
    rng = np.random.default_rng(0)
    values = [rng.normal(size=(6, 3)), rng.normal(size=(6, 3)), rng.random(6), rng.normal(size=3)]
    tensors = [torch.tensor(v, requires_grad=True) for v in values]
    loss = train_joint.mixture_error(*tensors, 2.5)
    assert loss.item() == pytest.approx(brute_force(*values, 2.5), rel=1e-12)
    loss.backward()
    for which, tensor in ((0, tensors[0]), (1, tensors[1]), (3, tensors[3])):
        for index in np.ndindex(values[which].shape):
            shifted = [np.array(v) for v in values]
            shifted[which][index] += 1e-6
            assert (brute_force(*shifted, 2.5) - loss.item()) / 1e-6 == pytest.approx(
                tensor.grad[index].item(), abs=1e-4
            )


def test_loss_of_one_head_swap_and_order():
    a, b, p, logits = torch.randn(20, 4), torch.randn(20, 4), torch.rand(20), torch.randn(4)
    loss = train_joint.mixture_error(a, b, p, logits, 3.0)
    torch.testing.assert_close(loss, train_joint.mixture_error(b, a, 1 - p, logits, 3.0))
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(
        loss, train_joint.mixture_error(a[:, order], b[:, order], p, logits[order], 3.0)
    )
    one = train_joint.mixture_error(a[:, :1], b[:, :1], p, logits[:1], 1.0)
    torch.testing.assert_close(one, (torch.sigmoid(a[:, 0] - b[:, 0]) - p).square().sum())


def test_finds_two_opposed_viewpoints():
    """Half of the voters follow a direction, half another: K = 2 heads recover them, which no
    single reward can.
    """
    rng = np.random.default_rng(0)
    x, w = (
        rng.normal(size=(400, 6)).astype(np.float32),
        np.linalg.qr(rng.normal(size=(6, 2)))[0].T.astype(np.float32),
    )
    a, b = rng.integers(0, 400, (2, 3000))
    p = ((x[a] - x[b]) @ w.T > 0).mean(1)
    split = Split(
        ["x"],
        [[]],
        [[]],
        np.array([0, 400]),
        np.array([0, len(a)]),
        a,
        b,
        2 * p,
        2 - 2 * p,
        0 * p,
        None,
    )
    args = train_joint.parse_args(["--run", "x", "--base", "x", "--k", "2", "--train", "head"])
    weight, logits = torch.nn.Parameter(torch.empty(2, 6)), torch.nn.Parameter(torch.zeros(2))
    train_joint.draw_heads(weight, 0)

    def loss(first, second, target, done):
        return train_joint.mixture_error(first, second, target, logits, 4.0**done)

    with open("/dev/null", "w") as log:
        training.train_head(
            args,
            weight,
            split,
            x,
            (split.p,),
            loss,
            a != b,
            np.random.default_rng(0),
            log,
            [logits],
        )
    cosine = abs(torch.nn.functional.normalize(weight.detach(), dim=1) @ torch.from_numpy(w).T)
    assert cosine.max(0).values.min() > 0.98


# ---- the run


def test_writes_what_the_others_read(run, data, base):
    entry = manifest.entries(run)["joint"]
    assert (
        entry["done"]
        and entry["settings"]["k"] == 3
        and "target" not in entry["settings"]
        and not leftovers(run)
    )
    assert (
        entry["learned_weights"] == sorted(entry["learned_weights"], reverse=True)
        and abs(sum(entry["learned_weights"]) - 1) < 1e-5
    )
    for split in ("train", "valid", "test"):
        for j in (1, 2, 3):
            assert rewards(run, j, split).dtype == np.float32 and rewards(run, j, split).shape == (
                read_split(run, split).response_start[-1],
            )
    assert [entry["k"] for entry in json.loads((run / "weights.json").read_text())] == [1, 2, 3]
    lines = [json.loads(line) for line in (run / "logs" / "joint.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))


def test_one_model_gives_all_rewards(runs, base, tokenizer):
    """joint/ of a full run is a plain num_labels=3 model, whose outputs in a padded batch are the
    stored rewards.
    """
    model, info = AutoModelForSequenceClassification.from_pretrained(
        runs["full"] / "joint", dtype=torch.float32, output_loading_info=True
    )
    assert model.config.num_labels == 3 and not info["missing_keys"]
    tokenizer = chats.load_tokenizer(runs["full"] / "joint")
    split = read_split(runs["full"], "test")
    sequences = chats.encode_split(tokenizer, split.messages, split.responses, 2048)
    with torch.no_grad():
        ids, mask = rm.pad(sequences, tokenizer.pad_token_id, "cpu")
        found = model(input_ids=ids, attention_mask=mask).logits.numpy()
    np.testing.assert_allclose(
        found, np.stack([rewards(runs["full"], j) for j in (1, 2, 3)], axis=1), atol=2e-5
    )
    with safe_open(runs["head"] / "joint" / "head.safetensors", "pt") as file:
        weight = file.get_tensor("score.weight")
    features = np.load(runs["head"] / "features" / "test.npy")
    np.testing.assert_allclose(
        features @ weight.numpy().T,
        np.stack([rewards(runs["head"], j) for j in (1, 2, 3)], axis=1),
        atol=1e-4,
    )


def test_export_and_score(runs, base, tmp_path):
    for kind, source in runs.items():
        run = fresh(source, tmp_path, kind)
        export(run, base, 2)
        member, info = AutoModelForSequenceClassification.from_pretrained(
            run / "member_02", dtype=torch.float32, output_loading_info=True
        )
        assert (
            member.config.num_labels == 1
            and member.score.weight.shape[0] == 1
            and not info["missing_keys"]
            and not info["mismatched_keys"]
        )
        split = read_split(run, "test")
        sequences = chats.encode_split(
            chats.load_tokenizer(run / "member_02"), split.messages, split.responses, 2048
        )
        with torch.no_grad():
            found = member(input_ids=torch.tensor([sequences[0]])).logits.item()
        assert found == pytest.approx(float(rewards(run, 2)[0]), abs=2e-5)
        with pytest.raises(InputError, match="already a plain directory"):
            export(run, base, 2)
        questions = tmp_path / f"{kind}.jsonl"
        questions.write_text(
            "".join(
                json.dumps({"prompt": m[-1]["content"], "responses": r}) + "\n"
                for m, r in zip(split.messages, split.responses)
            )
        )
        score.main(
            score.parse_args([str(questions), "--run", str(run), "--base", str(base), *FLAGS])
        )
        rows = [
            json.loads(line)
            for line in (tmp_path / f"{kind}-scores.jsonl").read_text().splitlines()
        ]
        stored = np.stack([rewards(run, j) for j in (1, 2, 3)], axis=1)
        np.testing.assert_allclose(
            np.concatenate([row["rewards"] for row in rows]), stored, atol=1e-5
        )


def test_same_again_skipped_and_refused(runs, data, base, tmp_path, capsys, full_run):
    again = train_all(fresh(data, tmp_path), base, "--k", "3", *KINDS["full"])
    for j in (1, 2, 3):
        np.testing.assert_array_equal(rewards(again, j), rewards(runs["full"], j))
    train_all(again, base, "--k", "3", *KINDS["full"])
    assert "skipped" in capsys.readouterr().out
    with pytest.raises(InputError, match="sharpen was 4096.0, is 2.0"):
        train_all(again, base, "--k", "3", *KINDS["full"], "--sharpen", "2")
    other = train_all(
        fresh(data, tmp_path, "other"), base, "--k", "3", *KINDS["full"], "--seed", "1"
    )
    assert (rewards(other) != rewards(again)).any()
    with pytest.raises(InputError, match="another --run"):
        train_all(fresh(full_run, tmp_path, "members"), base, *KINDS["full"])


def test_steepness_rises_from_one_by_the_steps(data, base, tmp_path, monkeypatch):
    seen, own = [], train_joint.mixture_error

    def error(*values):
        seen.append(values[-1])
        return own(*values)

    monkeypatch.setattr(train_joint, "mixture_error", error)
    run = train_all(fresh(data, tmp_path), base, "--k", "2", *KINDS["head"], "--sharpen", "16")
    steps = len((run / "logs" / "joint.jsonl").read_text().splitlines())
    assert seen == pytest.approx([16 ** (i / steps) for i in range(steps)])


def test_heads_come_from_the_seed(data, base, tmp_path):
    heads = []
    for seed in "01":
        run, flags = fresh(data, tmp_path, seed), ("--lr", "1e-9", "--seed", seed)
        train_all(run, base, "--k", "2", *KINDS["head"], *flags)
        heads.append(load_file(run / "joint" / "head.safetensors")["score.weight"])
    assert (heads[0] - heads[1]).abs().max() > 0.01


def test_heads_stand_in_the_order_of_their_weights(base, monkeypatch):
    def trained(args, weight, *task, more):
        weight.data.copy_(torch.tensor([[0.0], [1.0], [2.0]]))
        more[0].data.copy_(torch.tensor([0.0, 2.0, 1.0]))

    monkeypatch.setattr(training, "train_head", trained)
    words = ["--run", "r", "--base", str(base), "--k", "3", "--train", "head", "--device", "cpu"]
    split, features = SimpleNamespace(p=np.ones(1)), np.ones((2, 1), np.float32)
    task = train_joint.parse_args(words), split, features, None, None, None
    heads, alpha = train_joint.train_members(*task)
    assert heads[:, 0].tolist() == [1, 2, 0]
    torch.testing.assert_close(alpha, torch.softmax(torch.tensor([2.0, 1.0, 0.0]), 0))


def test_a_smaller_k_after_a_kill(data, base, tmp_path, monkeypatch):
    """Nothing is left of the larger ensemble, which was not finished and is not fitted to."""
    run = fresh(data, tmp_path)
    with monkeypatch.context() as patch:
        kinds = train_joint.members.KINDS
        patch.setitem(kinds, "joint", kinds["joint"]._replace(save=None))  # "killed" there
        with pytest.raises(TypeError):
            train_all(run, base, "--k", "3", *KINDS["head"])
    assert len(list((run / "rewards").glob("03_*.npy"))) == 3
    with pytest.raises(InputError, match="stage joint was broken off"):
        fit(run)
    (run / "weights.json").write_text("of the call that was killed")
    train_all(run, base, "--k", "2", *KINDS["head"])
    assert not (run / "weights.json").exists()
    assert {path.name[:2] for path in (run / "rewards").iterdir()} == {"01", "02"}
    fit(run)


def test_an_edit_of_the_objective_is_refused(runs, base, monkeypatch):
    def other(*values):
        return values[0].square().sum()

    monkeypatch.setattr(train_joint, "mixture_error", other)
    with pytest.raises(InputError, match="from another code of mixture_error than it is given now"):
        train_all(runs["head"], base, "--k", "3", *KINDS["head"])


def test_learned_weights(data, base, tmp_path):
    run = train_all(fresh(data, tmp_path), base, "--k", "2", *KINDS["head"], "--weights", "learned")
    (entry,) = json.loads((run / "weights.json").read_text())
    assert entry["k"] == 2 and entry["fit"] == "fixed" and abs(sum(entry["alpha"]) - 1) < 1e-12
    # Of the pairs that metrics.json counts.
    split = read_split(run, "train")
    single = dataclasses.replace(split, votes_a=split.votes_a.copy(), votes_b=split.votes_b.copy())
    single.votes_a[0], single.votes_b[0] = 1, 0
    rewards_of = np.stack([rewards(run, j, "train") for j in (1, 2)])
    alpha = torch.tensor(entry["alpha"], dtype=torch.float64)
    train_joint.write_learned_weights(tmp_path, single, rewards_of.T, alpha)
    (entry,) = json.loads((tmp_path / "weights.json").read_text())
    votes = (np.sign(rewards_of[:, split.a] - rewards_of[:, split.b]) + 1) / 2
    errors = (alpha.numpy() @ votes - split.p)[1:] ** 2
    assert entry["train_mse"] == pytest.approx(errors.mean())


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_identical_after_truncation_are_not_trained_on(
    data, base, tokenizer, split, tmp_path, kind
):
    flags = ("--k", "2", *KINDS[kind], "--max-length", "8")
    run = train_all(fresh(data, tmp_path), base, *flags)
    encoded = chats.encode_split(tokenizer, split.messages, split.responses, 8)
    different = sum(encoded[a] != encoded[b] for a, b in zip(split.a, split.b))
    assert 0 < different < len(split.a)
    lines = map(json.loads, (run / "logs" / "joint.jsonl").read_text().splitlines())
    epochs = 5 if kind == "head" else 1
    assert sum(line["pairs"] for line in lines) == different * epochs


def test_costs_no_more_passes_than_one_member(data, base, tmp_path, monkeypatch):
    """Eight heads on one backbone: training runs the tokens of one member, in as many passes."""
    forward, seen = rm.hidden_of_batch, []
    monkeypatch.setattr(
        rm,
        "hidden_of_batch",
        lambda model, sequences: (
            seen.append(rm.count_tokens(model, sequences)) or forward(model, sequences)
        ),
    )
    monkeypatch.setattr(
        rm,
        "score_sequences",
        lambda model, sequences, *args: np.zeros(
            (len(sequences), model.head.out_features), np.float32
        ).squeeze(),
    )
    train(fresh(data, tmp_path, "one"), base, *FULL, "--seed", "3")
    one, seen[:] = seen[:], []
    train_all(fresh(data, tmp_path, "joint"), base, *FULL, "--seed", "3", "--k", "8")
    assert (len(seen), sum(seen)) == (len(one), pytest.approx(sum(one), rel=0.02))
