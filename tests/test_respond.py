"""respond.py: who answers in each mode, against brute force; steerable on the demo's viewpoints;
one clear line for everything that cannot be asked."""

import io
import itertools
import json
import shutil
from types import SimpleNamespace

import score
from pairwise import members, provenance, sampling
from pairwise.cli import InputError
from pairwise.data import read_split
from pairwise.ranking import favourites, ranks
from pairwise.run_dir import read_rewards, read_weights

import numpy as np
import pytest
import respond
from conftest import FLAGS, REPOSITORY, fresh, make_base, with_weights
from scipy import integrate, stats

FEW = ("--n", "6", "--max-tokens", "8")
PROMPT = "how can i get fit ?"
EXAMPLES = [
    {
        "prompt": PROMPT,
        "response_a": "run twice a week .",
        "response_b": "what a stupid question .",
        "choice": "a",
    },
    {
        "prompt": [{"role": "user", "content": "hey"}],
        "response_a": "no .",
        "response_b": "yes , go to bed at ten .",
        "choice": "b",
    },
    {"prompt": "how ?", "response_a": "so .", "response_b": "or so .", "choice": "tie"},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ask(run, *words, flags=FEW):
    respond.main(respond.parse_args(["--run", str(run), *FLAGS, *flags, *words]))


def rows_of(capsys, run, *words, flags=FEW):
    """The JSON rows that respond.py prints."""
    capsys.readouterr()
    ask(run, *words, "--json", flags=flags)
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.fixture(params=["full", "head", "lora"])
def run(request, full_run, head_run, lora_run):
    return {"full": full_run, "head": head_run.run, "lora": lora_run}[request.param]


# ---- every mode on every kind of run, from score.py's rewards


def test_modes(run, tmp_path, capsys):
    like = write(tmp_path / "like.jsonl", EXAMPLES)
    modes = {
        mode: rows_of(capsys, run, "--mode", mode, PROMPT)[0] for mode in ("overton", "consensus")
    }
    modes |= {
        "distributional": rows_of(capsys, run, "--mode", "distributional", "--draws", "50", PROMPT)[
            0
        ],
        "table": rows_of(capsys, run, "--table", PROMPT)[0],
        "steerable": rows_of(capsys, run, "--mode", "steerable", "--like", str(like), PROMPT)[0],
    }
    candidates = modes["table"]["candidates"]
    texts, alpha = [each["text"] for each in candidates], read_weights(run, 2)
    path = write(
        tmp_path / "mine.jsonl",
        [
            {"prompt": PROMPT, "responses": [text or " " for text in texts]},
            *(
                {name: row[name] for name in ("prompt", "response_a", "response_b")}
                for row in EXAMPLES
            ),
        ],
    )
    score.main(score.parse_args([str(path), "--run", str(run), *FLAGS]))
    first, *examples = [
        np.array(json.loads(line)["rewards"]).T
        for line in (tmp_path / "mine-scores.jsonl").read_text().splitlines()
    ]
    rank = [
        [1 + sum(y > x for y in r) + (sum(y == x for y in r) - 1) / 2 for x in r] for r in first
    ]
    favourite = [int(np.argmax(r)) for r in first]
    assert (
        len(set(texts)) == len(texts) > 2
        and sum(each["count"] for each in candidates) == 6
        and texts == sorted(texts)
    )
    for mode, row in modes.items():
        assert (
            row["prompt"] == PROMPT
            and row["mode"] == mode
            and row["candidates"] == candidates
            and row["weights"] == alpha.tolist()
        )
        assert [each["ranks"] for each in row["candidates"]] == np.transpose(rank).tolist()
        for answer in row["answers"]:
            assert answer["ranks"] == [r[texts.index(answer["text"])] for r in rank]
            if mode != "table":
                assert answer["members"] == [
                    j + 1 for j in (0, 1) if texts[favourite[j]] == answer["text"]
                ]
            assert answer["weight"] == pytest.approx(sum(alpha[j - 1] for j in answer["members"]))
    assert {answer["text"] for answer in modes["overton"]["answers"]} == {
        texts[i] for i in favourite
    }
    assert [(answer["text"], answer["members"]) for answer in modes["table"]["answers"]] == [
        (texts[i], [j]) for j, i in enumerate(favourite, 1)
    ]
    draws = modes["distributional"]["draws"]
    assert {a["text"]: a["draws"] for a in modes["distributional"]["answers"]} == {
        text: sum(texts[favourite[j - 1]] == text for j in draws)
        for text in {texts[favourite[j - 1]] for j in draws}
    }
    steered = modes["steerable"]
    assert steered["agreements"] == [
        int(examples[0][j, 0] > examples[0][j, 1])
        + int(examples[1][j, 1] > examples[1][j, 0])
        + 0.5
        for j in (0, 1)
    ]
    assert steered["examples"] == 3 and steered["posterior"] == pytest.approx(
        by_quadrature(alpha, steered["agreements"], 3), abs=1e-5
    )
    assert (
        steered["member"] == 1 + int(np.argmax(steered["posterior"]))
        and steered["answers"][0]["text"] == texts[favourite[steered["member"] - 1]]
    )


# ---- who answers


def small_cases(count, k=3, n=4):
    """Rewards with many ties, and weights of which some are zero."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        alpha = rng.integers(0, 3, k).astype(float)
        alpha[rng.integers(k)] += 1
        yield rng.integers(0, n, (k, n)).astype(np.float32), alpha / alpha.sum()


def test_ranks_and_favourites():
    for rewards, _ in small_cases(50):
        assert ranks(rewards).tolist() == [
            [1 + sum(y > x for y in r) + (sum(y == x for y in r) - 1) / 2 for x in r]
            for r in rewards
        ]
        assert favourites(rewards).tolist() == [list(r).index(max(r)) for r in rewards]


def test_slate_merges_and_leaves_out_who_has_no_weight():
    for rewards, alpha in small_cases(200):
        favourite = favourites(rewards)
        found = respond.slate(favourite, alpha)
        assert sorted(j for _, members in found for j in members) == [
            j for j in range(3) if alpha[j] > 0
        ]
        assert len({i for i, _ in found}) == len(found) and all(
            favourite[j] == i for i, members in found for j in members
        )
        weights = [sum(alpha[j] for j in members) for _, members in found]
        assert weights == sorted(weights, reverse=True) and sum(weights) == pytest.approx(1)


def test_consensus_by_brute_force():
    ties = 0
    for rewards, alpha in small_cases(300):
        rank = ranks(rewards)
        worst = [max(rank[j, i] for j in range(3) if alpha[j] > 0) for i in range(4)]
        mean = [sum(alpha[j] * rank[j, i] for j in range(3)) for i in range(4)]
        least = [i for i in range(4) if worst[i] == min(worst)]
        best = [i for i in least if mean[i] <= min(mean[i] for i in least) + 1e-12]
        ties += len(least) > 1
        assert (
            respond.consensus(rank, alpha) == best[0]
            or len(best) > 1
            and respond.consensus(rank, alpha) in best
        )
    assert ties > 50


def by_quadrature(alpha, agreed, n):
    likelihood = [
        2 * integrate.quad(lambda e, m=m: (1 - e) ** m * e ** (n - m), 0, 0.5)[0] for m in agreed
    ]
    return np.array(alpha) * likelihood / np.dot(alpha, likelihood)


def test_posterior_by_hand():
    # one comparison: the mean of 1 - e is 3/4, that of e is 1/4
    np.testing.assert_allclose(
        respond.posterior(np.array([0.4, 0.6]), np.array([1.0, 0.0]), 1),
        [0.3 / 0.45, 0.15 / 0.45],
        atol=1e-9,
    )
    np.testing.assert_allclose(
        respond.posterior(np.array([0.4, 0.6]), np.array([0.5, 0.5]), 1), [0.4, 0.6], atol=1e-9
    )
    np.testing.assert_allclose(
        respond.posterior(np.array([0.2, 0.5, 0.3]), np.array([9.0, 7.5, 2.0]), 10),
        by_quadrature([0.2, 0.5, 0.3], [9, 7.5, 2], 10),
        atol=1e-5,
    )
    assert respond.posterior(np.array([1.0, 0.0]), np.array([0.0, 3000.0]), 3000).tolist() == [1, 0]


def test_agreements_by_hand():
    rewards = np.array(
        [[2, 1, 1, 1, 0, 3], [0, 5, 2, 1, 4, 3]], np.float32
    )  # a against b: member 1 prefers a, ties, prefers b; member 2 b, a, a
    assert respond.agreements(rewards, np.array([1.0, 1.0, 0.5])).tolist() == [2.0, 1.5]
    assert respond.agreements(rewards, np.array([0.0, 0.0, 0.0])).tolist() == [1.5, 1.0]


def test_draws_follow_the_weights_and_run_no_model(full_run, tmp_path, capsys, monkeypatch):
    run, calls = with_weights(full_run, tmp_path, 0.3, 0.7), []
    monkeypatch.setattr(
        members,
        "rewards_of_run",
        lambda *args, f=members.rewards_of_run: calls.append(1) or f(*args),
    )
    rows = rows_of(
        capsys, run, "--mode", "distributional", "--draws", "10000", "--seed", "3", PROMPT
    )
    expected = np.array([0.3, 0.7]) * 10000
    assert (
        len(calls) == 1
        and stats.chisquare(np.bincount(rows[0]["draws"], minlength=3)[1:], expected).pvalue > 0.01
    )
    assert sum(answer["draws"] for answer in rows[0]["answers"]) == 10000


def test_one_stream_of_draws_for_all_prompts(full_run, tmp_path, capsys):
    path = tmp_path / "same.txt"
    path.write_text("how ?\n" * 40)
    run = with_weights(full_run, tmp_path, 0.3, 0.7)
    rows = rows_of(capsys, run, "--mode", "distributional", "--file", str(path))
    assert {row["draws"][0] for row in rows} == {1, 2} and all(
        row["candidates"] == rows[0]["candidates"] for row in rows
    )


def test_seed_alone_decides(full_run, tmp_path, capsys):
    words = (
        "--mode",
        "overton",
        "--file",
        str(write(tmp_path / "two.jsonl", [{"prompt": "why ?"}, {"prompt": PROMPT}])),
    )
    rows = rows_of(capsys, full_run, *words, "--seed", "1")
    assert rows == rows_of(capsys, full_run, *words, "--seed", "1")
    alone = rows_of(capsys, full_run, "--mode", "overton", "--seed", "1", PROMPT)[0]
    assert [each["text"] for each in alone["candidates"]] == [
        each["text"] for each in rows[1]["candidates"]
    ]
    assert (
        alone["candidates"]
        != rows_of(capsys, full_run, "--mode", "overton", "--seed", "2", PROMPT)[0]["candidates"]
    )


def test_order_and_copies_of_candidates_do_not_matter(full_run, tmp_path, capsys, monkeypatch):
    texts, like = (
        ["so .", "or so .", "go to bed at ten .", "no ."],
        write(tmp_path / "like.jsonl", EXAMPLES),
    )
    for words in (
        ("--mode", "consensus"),
        ("--mode", "steerable", "--like", str(like)),
        ("--table",),
    ):
        seen = []
        for order in itertools.islice(itertools.permutations([*texts, texts[0]]), 0, 120, 37):
            monkeypatch.setattr(
                sampling, "sample", lambda *args, order=order: (list(order), [0.0] * 5)
            )
            seen.append(rows_of(capsys, full_run, *words, PROMPT))
        assert all(rows == seen[0] for rows in seen) and [
            each["count"] for each in seen[0][0]["candidates"]
        ] == [1, 1, 1, 2]


@pytest.fixture(scope="module")
def steerable():
    import importlib.util

    spec = importlib.util.spec_from_file_location(
        "steerable", REPOSITORY / "experiments" / "steerable.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_viewpoint_of_the_demo_finds_its_member(steerable):
    """100 trials of 10 comparisons: at least as good on unseen pairs as a member drawn by weight is
    on average, in 80 of them."""
    split, alpha = (
        read_split(REPOSITORY / "results/demo", "test"),
        read_weights(REPOSITORY / "results/demo", 4),
    )
    preferences = steerable.viewpoint_preferences(split)
    np.testing.assert_allclose(
        np.dot([weight for weight, _ in steerable.demo.VIEWPOINTS.values()], preferences),
        split.p_true,
        atol=1e-12,
    )
    rewards = read_rewards(REPOSITORY / "results/demo", "test", 4, split.response_start[-1:])
    found = list(
        steerable.trials(
            rewards, alpha, preferences, split.a, split.b, 100, 10, np.random.default_rng(0)
        )
    )
    assert sum(agreement[chosen] >= agreement @ alpha for _, chosen, _, agreement in found) >= 80


# ---- what is asked, and what is shown


def test_prompts_from_lines_rows_and_stdin(full_run, tmp_path, monkeypatch):
    chat = [
        {"role": "user", "content": "hey"},
        {"role": "assistant", "content": "yes ?"},
        {"role": "user", "content": "how ?"},
    ]
    lines = f"why ?\n\n{json.dumps({'prompt': chat})}\n  so ?\n"
    expected = [
        ("why ?", [{"role": "user", "content": "why ?"}]),
        (chat, chat),
        ("so ?", [{"role": "user", "content": "so ?"}]),
    ]
    (tmp_path / "mine.txt").write_text("\ufeff" + lines, encoding="utf-8")
    assert (
        respond.read_prompts(SimpleNamespace(prompt=None, file=tmp_path / "mine.txt")) == expected
    )
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    assert respond.read_prompts(SimpleNamespace(prompt=None, file=None)) == expected
    (tmp_path / "mine.csv").write_text("prompt,note\nwhy ?,1\n")
    assert (
        respond.read_prompts(SimpleNamespace(prompt=None, file=tmp_path / "mine.csv"))
        == expected[:1]
    )


def test_text_is_wrapped_to_the_terminal(full_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    monkeypatch.setattr(
        sampling,
        "sample",
        lambda *args: (["a long answer " * 20, "one\n\ntwo", "red \x1b[31m end"], [0.0] * 3),
    )
    for words in (
        ("--mode", "overton"),
        ("--mode", "consensus"),
        ("--mode", "distributional"),
        ("--table",),
        ("--mode", "steerable", "--like", str(write(tmp_path / "like.jsonl", EXAMPLES))),
    ):
        capsys.readouterr()
        ask(full_run, *words, "why " * 30 + "?")
        lines = capsys.readouterr().out.splitlines()
        assert (
            max(map(len, lines)) <= 70
            and any(line.startswith("3 candidates, 3 of them distinct") for line in lines)
            and "\x1b" not in "".join(lines)
        )
        assert any(all(name in line for name in ("weight", "rank", "answer")) for line in lines)


# ---- bad input


@pytest.mark.parametrize(
    "words, said",
    [
        (["--mode", "overton", "--table", "how ?"], "not allowed with"),
        (["--mode", "loudest", "how ?"], "invalid choice: 'loudest'"),
        (["how ?"], "--mode --table is required"),
        (["--mode", "steerable", "how ?"], "--mode steerable needs --like EXAMPLES"),
        (["--table", "--like", "x.jsonl", "how ?"], "only with --mode steerable"),
        (["--table", "--draws", "5", "how ?"], "--draws: only with"),
        (["--table", "--file", "x", "how ?"], "one of them expected"),
        (["--table", "--top-p", "1.5", "how ?"], "1.5 found"),
    ],
)
def test_flags(words, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        respond.parse_args(["--run", "x", *words])
    assert stopped.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    "rows, said",
    [
        ([], "like.jsonl: no row found"),
        ([EXAMPLES[0] | {"choice": "c"}], "line 1: choice: 'c' found, one of a, tie, b"),
        ([EXAMPLES[0] | {"choice": 1}], "choice: 1 found"),
        ([{"prompt": "how ?", "chosen": "so ."}], "line 1: response_a: nothing found"),
        ([EXAMPLES[0], {**EXAMPLES[0], "choice": None}], "line 2: choice: nothing found"),
    ],
)
def test_bad_examples(full_run, tmp_path, rows, said):
    with pytest.raises(InputError, match=said):
        ask(
            full_run,
            "--mode",
            "steerable",
            "--like",
            str(write(tmp_path / "like.jsonl", rows)),
            PROMPT,
        )


def test_bad_prompts(full_run, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="nothing.txt: no such file"):
        ask(full_run, "--table", "--file", str(tmp_path / "nothing.txt"))
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(InputError, match="empty.txt: no prompt found"):
        ask(full_run, "--table", "--file", str(tmp_path / "empty.txt"))
    with pytest.raises(InputError, match="line 1: prompt: nothing found"):
        ask(full_run, "--table", "--file", str(write(tmp_path / "other.txt", [{"text": "how ?"}])))
    (tmp_path / "lines.json.txt").write_text("\n")  # It ends in .txt, so it has lines.
    with pytest.raises(InputError, match="lines.json.txt: no prompt found"):
        ask(full_run, "--table", "--file", str(tmp_path / "lines.json.txt"))
    (tmp_path / "broken.txt").write_text("{how\n")
    with pytest.raises(InputError, match="broken.txt line 1: not JSON"):
        ask(full_run, "--table", "--file", str(tmp_path / "broken.txt"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(InputError, match="stdin: no prompt found"):
        ask(full_run, "--table")
    with pytest.raises(InputError, match="PROMPT: prompt: '' found"):
        ask(full_run, "--table", "")
    with pytest.raises(InputError, match="prompt 1: .* tokens found, at most 511 expected"):
        ask(full_run, "--table", "how can i get fit ? " * 200)


def test_no_standard_input_and_prompts_with_a_dash(full_run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)  # as `<&-` leaves it
    with pytest.raises(InputError, match="stdin: no prompt found"):
        ask(full_run, "--table")
    with pytest.raises(SystemExit):
        ask(full_run, "--table", "-x")
    assert "unrecognized arguments: -x (--help explains)" in capsys.readouterr().err
    ask(full_run, "--table", "--json", "--", "-x")
    assert json.loads(capsys.readouterr().out)["prompt"] == "-x"


@pytest.mark.parametrize("form", [["--json"], []])
def test_a_terminal_of_ascii(full_run, monkeypatch, form):
    """What it lacks is escaped; JSON stays JSON."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr("sys.stdout", out)
    ask(full_run, "--table", *form, "wie schön \N{GRINNING FACE} ?")
    out.flush()
    said = out.buffer.getvalue().decode("ascii")
    assert (
        json.loads(said)["prompt"] == "wie schön \N{GRINNING FACE} ?" if form else "\\xf6n" in said
    )


@pytest.mark.parametrize("eos", ["x", [1.5, None]])
def test_a_base_that_cannot_sample(full_run, base, tmp_path, eos):
    there, run = shutil.copytree(base, tmp_path / "b"), fresh(full_run, tmp_path)
    (there / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    whole = json.loads((run / "manifest.json").read_text())
    for entry in whole["stages"].values():
        if "base model" in entry["inputs"]:
            entry["inputs"]["base model"] = provenance.fingerprint(there)
    (run / "manifest.json").write_text(json.dumps(whole))
    with pytest.raises(InputError, match=f"--base {there}: no answers could be sampled"):
        ask(run, "--table", "--base", str(there), PROMPT)


def test_a_run_that_cannot_answer(full_run, base, tokenizer, tmp_path):
    with pytest.raises(InputError, match="no rewards"):
        ask(tmp_path / "nowhere", "--table", PROMPT)
    run = fresh(full_run, tmp_path)
    with pytest.raises(InputError, match="no such directory"):
        (tmp_path / "hole").mkdir()
        ask(run, "--table", "--base", str(tmp_path / "hole" / "none"), PROMPT)
    with pytest.raises(InputError, match="another base model than the run was made from"):
        ask(run, "--table", "--base", str(make_base(tokenizer, tmp_path / "other", seed=1)), PROMPT)
    (run / "weights.json").unlink()
    with pytest.raises(InputError, match="weights.json: no such file"):
        ask(run, "--table", PROMPT)
    shutil.copy(full_run / "weights.json", run)
    for j in (2, 1):
        shutil.rmtree(run / f"member_0{j}")
        with pytest.raises(
            InputError,
            match="member_02: no such directory" if j == 2 else "no trained members found",
        ):
            ask(run, "--table", PROMPT)


def test_a_base_without_a_head_for_tokens(tokenizer, tmp_path):
    from transformers import AutoModelForSequenceClassification

    made = make_base(tokenizer, tmp_path / "untied", seed=0, tie_word_embeddings=False)
    AutoModelForSequenceClassification.from_pretrained(made, num_labels=1).save_pretrained(
        tmp_path / "judge"
    )
    sampling.load_language_model(made, "cpu")
    with pytest.raises(
        InputError, match="judge: a reward model found .score.weight., which writes no text"
    ):
        sampling.load_language_model(tmp_path / "judge", "cpu")
