"""A member's preference pairs for DPO: what is chosen, and the form that TRL reads; log pi_0 of the
test responses, and appendix A's condition; and that no script writes over the files of a run."""

import argparse
import importlib.util
import itertools
import json
import math
import sys
from decimal import Decimal
from types import SimpleNamespace

from pairwise import chats, manifest, policies, sampling, soft_model
from pairwise import data as prepared
from pairwise.cli import InputError
from pairwise.run_dir import output, read_continuations, read_logprob

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, edited, fresh, rewards, script

export_pairs, policy_pairs = script("export_pairs"), script("policy_pairs")
policy_logprob, prune = script("policy_logprob"), script("prune")


def module_at(path):
    """A script as a module; path: from the repository's root."""
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), REPOSITORY / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def export(run, *flags):
    policy_pairs.main(policy_pairs.parse_args(["--run", str(run), *map(str, flags)]))


def test_chosen_is_of_the_best_quarter_and_rejected_of_the_worst():
    rng = np.random.default_rng(0)
    texts, scores = [f"text {i % 14}" for i in range(16)], rng.normal(size=16).astype(np.float32)
    scores[14:] = scores[:2]
    order = sorted(range(14), key=lambda i: -scores[i])
    allowed = {(a, b) for a in order[:3] for b in order[-3:]}
    assert (
        set(policy_pairs.pairs(texts, scores, 100, rng)) == allowed
    )  # 14 distinct texts: quarters of 3
    some = policy_pairs.pairs(texts, scores, 4, rng)
    assert len(set(some)) == 4 and set(some) < allowed
    assert (
        policy_pairs.pairs(["a", "b", "c"], np.float32([1, 1, 1]), 8, rng)
        == []
        == policy_pairs.pairs(["a", "a"], np.float32([1, 1]), 8, rng)
    )
    assert policy_pairs.pairs(["a", "b"], np.float32([0, 1]), 8, rng) == [(1, 0)]


def test_rows_are_what_trl_reads(full_run, tmp_path, capsys):
    out = tmp_path / "new" / "train.jsonl"
    export(full_run, "--member", 2, "--out", out, "--pairs", 3)
    texts, scores = read_continuations(full_run), rewards(full_run, 2, "continuations")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows and f"{len(rows)} pairs of member 2 from 2 prompts" in capsys.readouterr().out
    for row in rows:
        assert set(row) == {"prompt", "chosen", "rejected"} and row["prompt"][-1]["role"] == "user"
        assert [turn["role"] for name in ("chosen", "rejected") for turn in row[name]] == [
            "assistant"
        ] * 2
        x = texts["messages"].index(row["prompt"])
        chosen, rejected = (
            scores[x, texts["texts"][x].index(row[name][0]["content"])]
            for name in ("chosen", "rejected")
        )
        assert chosen > rejected
    before = out.read_bytes()
    export(full_run, "--member", 2, "--out", out, "--pairs", 3)
    assert out.read_bytes() == before
    run = fresh(full_run, tmp_path)  # An imported member before it has no such rewards.
    (run / "rewards" / "01_continuations.npy").unlink()
    export(run, "--member", 2, "--out", out, "--pairs", 3)
    assert out.read_bytes() == before


def test_bad_input_of_policy_pairs(full_run, data, tmp_path):
    with pytest.raises(InputError, match="03_continuations.npy: no such file"):
        export(full_run, "--member", 3, "--out", tmp_path / "x.jsonl")
    with pytest.raises(InputError, match="continuations.parquet: no such file"):
        export(fresh(data, tmp_path), "--member", 1, "--out", tmp_path / "x.jsonl")
    assert not (tmp_path / "x.jsonl").exists()


# ---- log pi_0 of the test responses, and appendix A's condition


@pytest.fixture(scope="module")
def with_logprob(full_run, base, tmp_path_factory):
    """A copy of the full run with log pi_0 of its test responses; read only."""
    run = fresh(full_run, tmp_path_factory.mktemp("logprob"))
    measure(run, base)
    return run


def measure(run, base):
    words = ["--run", str(run), "--base", str(base), "--threads", "1", "--device", "cpu"]
    policy_logprob.main(policy_logprob.parse_args(words))


@torch.no_grad()
def token_by_token(model, prompt, answer):
    """log pi_0 of an answer, every token by a forward pass of what is before it alone."""
    total, ids = 0.0, list(prompt)
    for token in answer:
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
        total += (logits[token] - logits.logsumexp(0)).item()
        ids.append(token)
    return total


def test_log_probability_is_the_sum_over_tokens(base, tokenizer, data, with_logprob):
    """Alone, in batches and in the run's file: each is the product of one token after another."""
    test = prepared.read_split(data, "test")
    stored = np.load(with_logprob / "logprob" / "test.npy")
    model = sampling.load_language_model(str(base), "cpu")
    encoded = policy_logprob.encode(tokenizer, test)
    assert stored.dtype == np.float32 and stored.shape == (len(encoded),)
    some = list(range(0, len(encoded), 3))
    wanted = [token_by_token(model, *encoded[i]) for i in some]
    np.testing.assert_allclose(stored[some], wanted, rtol=1e-5)
    for tokens in (1, 150):
        found = policy_logprob.log_probabilities(
            model, tokenizer.pad_token_id, [encoded[i] for i in some], tokens
        )
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_the_logprob_of_sampled_answers_is_the_same(base, tokenizer):
    """data_prep/continuations.py's numbers, of answers of one token, which are encoded alike."""
    model = sampling.load_language_model(str(base), "cpu")
    torch.manual_seed(0)
    prompt = chats.encode(tokenizer, [{"role": "user", "content": "how can i get fit again ?"}])
    texts, logprob = sampling.sample(model, tokenizer, prompt, 40, 1.0, 1.0, 1)
    encoded = [(prompt, tokenizer(text).input_ids) for text in texts]
    whole = [i for i, (_, answer) in enumerate(encoded) if len(answer) == 1]
    found = policy_logprob.log_probabilities(
        model, tokenizer.pad_token_id, [encoded[i] for i in whole], 500
    )
    assert len(whole) > 10
    np.testing.assert_allclose(found, [logprob[i] for i in whole], rtol=1e-5)


def test_where_an_answer_begins_and_ends(tokenizer):
    chat = [{"role": "user", "content": "how are you ?"}]
    eos, prompt = tokenizer.eos_token_id, chats.encode(tokenizer, chat)
    written = tokenizer.chat_template

    def parts(template, response="i am well ."):
        tokenizer.chat_template = template
        try:
            return policy_logprob.parts(tokenizer, chat, response)
        finally:
            tokenizer.chat_template = written

    found, answer = parts(written)
    assert found == prompt and answer[-1] == eos and eos not in answer[:-1]
    assert tokenizer.decode(answer[:-1]).strip() == "i am well ."
    blank, none = (written.replace("{{ eos_token }}", x) for x in ("{{ eos_token + '\\n' }}", ""))
    for template in (blank, none):  # It ends with a line; it has no end, and the model ends so.
        assert parts(template) == (prompt, answer)
    # A token that reaches across the border: the base continues its first letter.
    words = filter(str.isalpha, tokenizer.get_vocab())
    word = next(x for x in sorted(words, key=len)[::-1] if len(tokenizer(x).input_ids) == 1)
    begun = written.replace("'<|assistant|>' }}", f"'<|assistant|>{word[0]}' }}}}")
    name, content = "m['role']", "'|>' + m['content']"
    first = f"'|>' + ('{word[0]}' if {name} == 'assistant' else '') + m['content']"
    begun = begun.replace(content, first)
    whole, (found, answer) = chats.encode(tokenizer, chat, word), parts(begun, word[1:])
    assert whole[: len(found)] != found and (
        tokenizer.decode(answer) == word[1:] + tokenizer.eos_token
    )
    with pytest.raises(InputError, match="writes another prompt where it is answered"):
        parts("{{ messages | length }}" + written)


def mixture(scores, logprob, alpha, beta):
    """p_bar of all pairs of n responses, in the order of itertools.combinations; scores (K, n)."""
    a, b = np.triu_indices(len(logprob), 1)
    differences = soft_model.reward_differences(scores, a, b)
    return np.exp(policies.log_mixture(differences, logprob[a] - logprob[b], alpha, beta)[0])


def test_the_mixture_of_policies_by_definition():
    rng = np.random.default_rng(2)
    scores = rng.integers(-2, 3, (3, 6)).astype(float)
    logprob, alpha = rng.normal(-20, 3, 6), np.array([0.5, 0.3, 0.2])

    def preferred(a, b, beta):  # softmax over the pair, as the paper has it before the sigmoid
        total = 0
        for j, weight in enumerate(alpha):
            one, other = (math.exp(logprob[y]) * math.exp(scores[j, y] / beta) for y in (a, b))
            total += weight * one / (one + other)
        return total

    pairs = list(itertools.combinations(range(6), 2))
    for beta in (0.3, 1, 10):
        wanted = [preferred(a, b, beta) for a, b in pairs]
        np.testing.assert_allclose(mixture(scores, logprob, alpha, beta), wanted, rtol=1e-12)
    order = np.array([3, 0, 5, 1, 4, 2])
    moved = dict(zip(pairs, mixture(scores[:, order], logprob[order], alpha, 2)))
    for (a, b), value in zip(pairs, mixture(scores, logprob, alpha, 2)):
        one, other = order.tolist().index(a), order.tolist().index(b)
        found = moved[one, other] if one < other else 1 - moved[other, one]
        assert found == pytest.approx(value, abs=1e-14)


def test_the_mixture_of_policies_at_its_limits():
    rng = np.random.default_rng(3)
    scores = rng.normal(size=(3, 8)).astype(np.float32)
    logprob, alpha = rng.normal(-30, 5, 8), np.array([0.2, 0.3, 0.5])
    pairs = list(itertools.combinations(range(8), 2))
    votes = [alpha @ (scores[:, a] > scores[:, b]) for a, b in pairs]
    np.testing.assert_allclose(mixture(scores, logprob, alpha, 1e-9), votes, atol=1e-12)
    base = [1 / (1 + math.exp(logprob[b] - logprob[a])) for a, b in pairs]
    np.testing.assert_allclose(mixture(scores, logprob, alpha, np.inf), base, rtol=1e-12)
    np.testing.assert_allclose(mixture(scores, logprob, alpha, 1e12), base, rtol=1e-9)
    infinite, logprob = np.float32([[np.inf, np.inf, 0, -np.inf]]), np.log([3, 1, 1, 1.0])
    with np.errstate(over="raise", divide="raise", invalid="raise"):
        for beta in policies.BETAS:
            found = mixture(infinite, logprob, np.ones(1), beta)
            np.testing.assert_allclose(found, [0.75, 1, 1, 1, 1, 1])


def test_distances_of_policies_by_brute_force():
    """Summed over the pairs of a prompt's distinct texts, ties and infinite rewards among them."""
    rng = np.random.default_rng(0)
    scores, alpha = rng.integers(-1, 2, (2, 3, 4)).astype(np.float32), np.array([0.7, 0.3])
    scores[0, 0, 1] = np.inf
    scores[1, 1, :2] = -np.inf
    logprob = rng.normal(-9, 2, (3, 4))
    texts = {"texts": [list("abcd"), list("abca"), list("aaaa")], "logprob": logprob.tolist()}
    found, pairs = policies.distances(scores, texts, alpha)
    assert pairs.tolist() == [6, 3, 0] and found.shape == (3, len(policies.BETAS))
    for x, i in np.ndindex(found.shape):
        kept = [y for y, text in enumerate(texts["texts"][x]) if text not in texts["texts"][x][:y]]
        total = 0.0
        for a, b in itertools.combinations(kept, 2):
            p_bar = p_hat = 0.0
            for weight, own in zip(alpha, scores[:, x].tolist()):
                margin = 0.0 if own[a] == own[b] else (own[a] - own[b]) / policies.BETAS[i]
                margin += logprob[x, a] - logprob[x, b]
                p_bar += weight / (1 + math.exp(-margin)) if margin > -700 else 0.0
                p_hat += weight * ((own[a] > own[b]) + (own[a] == own[b]) / 2)
            total += abs(p_bar - p_hat)
        assert found[x, i] == pytest.approx(total, abs=1e-12)


def test_policies_on_annotated_pairs_by_brute_force(with_logprob, tmp_path, no_figures):
    """p_bar of every pair by the definition: probabilities in proportion to pi_0 exp(r / beta)."""
    import evaluate

    run = fresh(with_logprob, tmp_path)
    evaluate.main(evaluate.parse_args(["--run", str(run), "--resamples", "20"]))
    found = json.loads((run / "metrics.json").read_text())["policy"]
    test = prepared.read_split(run, "test")
    alpha = json.loads((run / "weights.json").read_text())[-1]["alpha"]
    logprob = np.load(run / "logprob" / "test.npy").astype(float).tolist()
    r = [rewards(run, j).astype(float).tolist() for j in (1, 2)]
    assert found["beta"] == policies.BETAS.tolist() and found["brier_ci"][0] == [None, None]
    for beta in (*found["beta"], math.inf):
        terms = []
        for a, b, p in zip(test.a.tolist(), test.b.tolist(), test.p.tolist()):
            first = second = Decimal(0)  # As floats they would be 0 and 1.
            p_hat = 0.0
            for weight, own in zip(alpha, r):
                exponents = [Decimal(logprob[y]) + Decimal(own[y] / beta) for y in (a, b)]
                odds = (exponents[1] - exponents[0]).exp()
                first += Decimal(weight) / (1 + odds)
                second += Decimal(weight) / (1 + 1 / odds)
                p_hat += weight * ((own[a] > own[b]) + (own[a] == own[b]) / 2)
            entropy = -Decimal(p) * first.ln() - Decimal(1 - p) * second.ln()
            terms.append((abs(float(first) - p_hat), (float(first) - p) ** 2, float(entropy)))
        i = found["beta"].index(beta) if beta < math.inf else None
        own = found["base"] if i is None else {name: found[name][i] for name in found["base"]}
        for name, wanted in zip(("distance", "brier", "cross_entropy"), np.mean(terms, 0)):
            assert own[name] == pytest.approx(wanted, rel=1e-5), (beta, name)
    assert max(found["cross_entropy"]) > 40  # where float64 has no 1 - p_bar left


def test_log_probabilities_are_subtracted_in_float64():
    """Those of a run are float32, which has not all digits of their differences."""
    logprob = np.float32([-0.1, -1.3])
    a, b = np.array([[0], [1]])
    split = SimpleNamespace(a=a, b=b, p=np.ones(1), pair_start=np.array([0, 1]))
    rewards = np.zeros((1, 2), np.float32)  # a tie, p_hat = 1/2
    base = policies.calibration(split, rewards, logprob, np.ones(1))["base"]
    first, second = map(math.exp, logprob.tolist())
    p_bar = first / (first + second)
    wanted = {"distance": p_bar - 0.5, "brier": (p_bar - 1) ** 2, "cross_entropy": -math.log(p_bar)}
    for name, value in wanted.items():
        assert base[name].top.item() == pytest.approx(value, rel=1e-12), name


def test_the_page_shows_the_demo_s_policies():
    """Computed from the committed run, as evaluate.py does."""
    run, page = REPOSITORY / "results" / "demo", REPOSITORY / "docs" / "method.md"
    test, count = prepared.read_split(run, "test"), len(rewards(run))
    logprob, scores = read_logprob(run, count), [rewards(run, j) for j in range(1, 5)]
    alpha = np.array(json.loads((run / "weights.json").read_text())[-1]["alpha"])
    found = policies.calibration(test, np.array(scores), logprob, alpha)
    sampled = json.loads((run / "metrics.json").read_text())["diversity"]["policy"]["distance"]
    names = "brier", "cross_entropy", "distance"
    means = {name: found[name].top.sum(0) / found[name].bottom.sum() for name in names}
    for i in range(0, 11, 2):
        cells = [*(means[name][i] for name in names), sampled[i]]
        row = f"| {found['beta'][i]:g} | {' | '.join(f'{x:.4f}'.lstrip('0') for x in cells)} |"
        assert row in page.read_text(encoding="utf-8"), row
    base = [found["base"][name].top.sum() / found["base"][name].bottom.sum() for name in names]
    row = f"| ∞: the base alone | {' | '.join(f'{x:.4f}'.lstrip('0') for x in base)} | |"
    assert row in page.read_text(encoding="utf-8"), row


def test_the_stage_of_log_probabilities(with_logprob, base, tmp_path, capsys):
    run = fresh(with_logprob, tmp_path)
    path = run / "logprob" / "test.npy"
    before = path.read_bytes()
    measure(run, base)
    assert "is there, skipped" in capsys.readouterr().out
    assert manifest.entries(run)["logprob"]["outputs"].keys() == {"logprob/test.npy"}
    words = ["--run", str(run), "--beta", "3", "--out", str(tmp_path / "pruned")]
    prune.main(prune.parse_args(words))
    assert (tmp_path / "pruned" / "logprob" / "test.npy").read_bytes() == before
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("prune: on train pairs no member is left")
    assert lines[2].startswith(
        "prune: on test pairs, for which the theorem guarantees nothing, the B"
    )
    count = len(np.load(path))
    np.save(path, np.full(count, np.nan, np.float32))
    with pytest.raises(InputError, match="edited or damaged since it was written"):
        read_logprob(run, count)
    edited(run)
    for wrong in (count, count + 1):
        with pytest.raises(InputError, match="all of it finite"):
            read_logprob(run, wrong)
    path.unlink()
    with pytest.raises(InputError, match="no such file; .* names it"):
        read_logprob(run, count)


def test_no_output_is_a_file_of_a_run(data, tmp_path, monkeypatch):
    """By its path as it is typed, and by where links lead."""
    run = fresh(data, tmp_path)
    (tmp_path / "link").symlink_to(run)
    (tmp_path / "new.parquet").symlink_to(run / "data" / "valid.parquet")
    (tmp_path / "bare" / "data").mkdir(parents=True)
    (tmp_path / "bare" / "rewards").mkdir()
    monkeypatch.chdir(run / "data")
    for path in (
        *("test.parquet", "../weights.json", "new/deep.jsonl", "../../run/rewards/x.npy"),
        *(run / "manifest.json", run / "base", run / "member_01" / "x", run / "x/../metrics.json"),
        *(tmp_path / "link" / "data" / "x.jsonl", tmp_path / "link" / "report.html"),
        *(tmp_path / "new.parquet", tmp_path / "bare" / "weights.json"),
        *(tmp_path / "link" / ".lock", run / "checkpoint_01", run / "data"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match="is a run directory, whose own"):
            output(str(path))
    for path in (run / "pairs.jsonl", run / "dpo" / "data", tmp_path / "data" / "x.jsonl", "../a"):
        assert str(output(str(path))) == str(path)
    with pytest.raises(argparse.ArgumentTypeError, match="an empty word"):
        output("")


@pytest.mark.parametrize(
    "name, flags",
    [
        ("extras/export_pairs", ["--run", "r", "--out"]),
        ("extras/policy_pairs", ["--run", "r", "--member", "1", "--out"]),
        ("extras/harden", ["--run", "r", "--out"]),
        ("extras/prune", ["--run", "r", "--beta", "3", "--out"]),
        ("extras/compare", ["r", "s", "--out"]),
        ("experiments/variants", ["--runs", "r", "--out"]),
        ("experiments/steps", ["--run", "r", "--out"]),
        ("experiments/policies", ["--run", "r", "--out"]),
        ("benchmarks/training", ["--json"]),
    ],
)
def test_every_script_refuses_a_file_of_a_run(name, flags, data, tmp_path, capsys):
    module = module_at(f"{name}.py")
    path = fresh(data, tmp_path) / "data" / "test.parquet"
    before = path.read_bytes()
    with pytest.raises(SystemExit) as stop:
        module.parse_args([*flags, str(path)])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "whose own data this is" in line
    assert path.read_bytes() == before


def test_what_trl_is_needed_for_says_so(monkeypatch):
    module = module_at("experiments/policies.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="^trl is not installed; benchmarks/requirements.txt has"):
        module.main(module.parse_args(["--run", "r", "--out", "dpo"]))


def test_a_run_that_another_call_has_pruned_meanwhile(full_run, tmp_path, monkeypatch):
    prune, out = script("prune"), tmp_path / "out"
    computed = prune.prune

    def slowly(*arguments):
        out.mkdir()
        (out / "weights.json").write_text("theirs")
        return computed(*arguments)

    monkeypatch.setattr(prune, "prune", slowly)
    with pytest.raises(InputError, match="found, a new directory expected"):
        prune.main(prune.parse_args(["--run", str(full_run), "--beta", "3", "--out", str(out)]))
    assert (out / "weights.json").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_help_without_the_packages_of_the_benchmarks(monkeypatch, capsys):
    for name in ("OPENBLAS", "MKL", "OMP"):  # They are set by it, and here restored.
        monkeypatch.setenv(f"{name}_NUM_THREADS", "1")
    for name in ("hyper_corr", "numba", "pandas"):
        monkeypatch.setitem(sys.modules, name, None)
    benchmark = module_at("benchmarks/evaluator.py")
    with pytest.raises(SystemExit) as stop:
        benchmark.parse_args(["--help"])
    assert stop.value.code == 0 and "--only" in capsys.readouterr().out
    with pytest.raises(InputError, match="is missing; pip install -r"):
        benchmark.main(benchmark.parse_args([]))


def test_the_same_export_again(data, tmp_path):
    run = fresh(data, tmp_path)
    for path in (run / "pairs.jsonl", tmp_path / "pairs.parquet"):
        words = ["--run", str(run), "--out", str(path)]
        export_pairs.main(export_pairs.parse_args(words))
        before = path.read_bytes()
        export_pairs.main(export_pairs.parse_args(words))
        assert before == path.read_bytes()
