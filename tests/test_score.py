"""score.py: the numbers of training's own scoring for a user's rows, and one clear line for every
bad file."""

import csv
import json
import shutil
import subprocess
import sys

import score
from pairwise import chats, cli, members, weights
from pairwise import reward_model as rm
from pairwise.cli import InputError
from pairwise.data import read_split

import numpy as np
import pytest
from conftest import (
    FLAGS,
    HEAD,
    REPOSITORY,
    edited,
    export,
    fit,
    fresh,
    leftovers,
    rewards,
    train,
    with_weights,
)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def scored(run, path, *flags):
    """The rows that score.py writes for a file."""
    score.main(score.parse_args([str(path), "--run", str(run), *FLAGS, *flags]))
    out = path.with_name(path.name.split(".")[0] + "-scores.jsonl")
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.fixture(scope="module")
def exported(head_run, base, tmp_path_factory):
    """The head run, with member 1 written as a plain directory."""
    run = fresh(head_run.run, tmp_path_factory.mktemp("exported"))
    export(run, base, 1)
    return run


@pytest.fixture(params=["full", "head", "exported", "lora"])
def run(request, full_run, head_run, lora_run):
    return {"full": full_run, "head": head_run.run, "lora": lora_run}.get(
        request.param
    ) or request.getfixturevalue("exported")


@pytest.fixture(scope="module")
def test_split(full_run):
    return read_split(full_run, "test")


def alpha_of(run):
    return json.loads((run / "weights.json").read_text())[1]["alpha"]


def share_by_hand(run, r, a, b):
    """sum_j alpha_j V_j of two responses with rewards r[a], r[b], each of all members."""
    return sum(
        weight * (1 if x > y else 0 if x < y else 0.5)
        for weight, x, y in zip(alpha_of(run), r[a], r[b])
    )


# ---- the numbers


def test_same_numbers_as_training(run, test_split, tmp_path):
    path = write(
        tmp_path / "mine.jsonl",
        [
            {"prompt": m[-1]["content"], "responses": texts}
            for m, texts in zip(test_split.messages, test_split.responses)
        ],
    )
    for flags in ((), ("--micro-batch-tokens", "100")):
        rows = scored(run, path, *flags)
        assert len(rows) == 3 and [row["responses"] for row in rows] == test_split.responses
        found = np.concatenate([row["rewards"] for row in rows])
        np.testing.assert_allclose(
            found, np.stack([rewards(run, 1), rewards(run, 2)], axis=1), atol=1e-6
        )
        for row in rows:
            assert set(row) == {"prompt", "responses", "rewards", "p_hat"}
            assert [pair[:2] for pair in row["p_hat"]] == [
                [0, 1],
                [0, 2],
                [0, 3],
                [1, 2],
                [1, 3],
                [2, 3],
            ]
            for a, b, p in row["p_hat"]:
                assert abs(p - share_by_hand(run, row["rewards"], a, b)) < 1e-12
    assert len({p for row in rows for _, _, p in row["p_hat"]}) > 1


def test_rows_of_two_responses(run, test_split, tmp_path):
    texts = test_split.responses[1]
    rows = scored(
        run,
        write(
            tmp_path / "two.jsonl",
            [
                {
                    "prompt": test_split.messages[1][-1]["content"],
                    "response_a": texts[2],
                    "response_b": texts[0],
                    "note": 1,
                }
            ],
        ),
    )
    first = test_split.response_start[1]
    np.testing.assert_allclose(
        rows[0]["rewards"],
        [[rewards(run, j)[first + i] for j in (1, 2)] for i in (2, 0)],
        atol=1e-6,
    )
    assert rows[0]["responses"] == [texts[2], texts[0]] and rows[0]["p_hat"] == [
        [0, 1, pytest.approx(share_by_hand(run, rows[0]["rewards"], 0, 1))]
    ]


def test_chat_messages(run, tokenizer, base, tmp_path):
    """Earlier turns count, a text is one user turn, and the prompt comes back as it was given."""
    chat = [
        {"role": "user", "content": "hey"},
        {"role": "assistant", "content": "yes ?"},
        {"role": "user", "content": "how can i get fit ?"},
    ]
    rows = scored(
        run,
        write(
            tmp_path / "chat.jsonl",
            [
                {"prompt": p, "responses": ["run twice a week ."]}
                for p in (chat, chat[2:], chat[2]["content"])
            ],
        ),
    )
    assert [row["prompt"] for row in rows] == [chat, chat[2:], chat[2]["content"]]
    assert rows[1]["rewards"] == rows[2]["rewards"] != rows[0]["rewards"]
    model = members.load_member(run, 2, base, tokenizer, rm.torch.float32, "cpu")
    expected = rm.score_sequences(
        model, [chats.encode(tokenizer, chat, "run twice a week .")], 1000
    )[0]
    assert abs(rows[0]["rewards"][0][1] - expected) < 1e-6


def test_ties_count_one_half(full_run, monkeypatch, tmp_path):
    """Rewards given by hand: member 1 ties on the first pair, member 2 on the second, both on the
    third."""
    given = np.array([[1, 1, 0, 5, 5], [0, 2, 0, 3, 3]], np.float32)
    monkeypatch.setattr(score.members, "rewards_of_run", lambda *args: given)
    run = with_weights(full_run, tmp_path, 0.3, 0.7)
    rows = scored(
        run,
        write(
            tmp_path / "ties.jsonl",
            [
                {"prompt": "a ?", "responses": ["x", "y", "z"]},
                {"prompt": "b ?", "responses": ["u", "v"]},
            ],
        ),
    )
    first, second = alpha_of(run)
    assert rows[0]["rewards"] == [[1, 0], [1, 2], [0, 0]] and rows[1]["rewards"] == [[5, 3], [5, 3]]
    expected = [[0, 1, first / 2], [0, 2, first + second / 2], [1, 2, first + second]]
    assert rows[0]["p_hat"] == [[a, b, pytest.approx(p, abs=1e-12)] for a, b, p in expected]
    assert rows[1]["p_hat"] == [[0, 1, 1.0]] if given[0, 3] > given[0, 4] else [[0, 1, 0.5]]


def test_equal_responses_tie(run, tmp_path):
    text = "dear reader , one way is to run twice a week ."
    rows = scored(
        run,
        write(
            tmp_path / "same.jsonl",
            [{"prompt": "how can i get fit ?", "responses": [text, "no .", text]}],
        ),
        "--micro-batch-tokens",
        "40",
    )
    assert rows[0]["rewards"][0] == rows[0]["rewards"][2]
    assert rows[0]["p_hat"][1] == [0, 2, 0.5]


def test_p_hat_is_a_share_and_exact_where_members_agree():
    """Weights that sum to one up to rounding give no share above one, or beside one half."""
    rng, above = np.random.default_rng(0), 0
    for _ in range(300):
        k = int(rng.integers(1, 12))
        alpha = rng.dirichlet(np.ones(k))
        alpha[rng.random(k) < 0.2] = 0
        alpha = alpha / alpha.sum() if alpha.any() else np.full(k, 1 / k)
        votes = rng.choice([0, 0.5, 1], (k, 20))
        votes[:, :3] = [0, 0.5, 1]
        above += (alpha @ votes)[2] > 1
        p_hat = weights.p_hat_of(alpha, votes)
        assert p_hat[:3].tolist() == [0, 0.5, 1] and ((p_hat >= 0) & (p_hat <= 1)).all()
        np.testing.assert_allclose(p_hat, alpha @ votes, atol=1e-15)
    assert above and weights.p_hat_of(np.ones(1), np.empty((1, 0))).shape == (0,)
    alpha, votes = np.array([0.6, 0.4 + 4e-10, 1e-10]), np.array([[1], [1], [0]])
    assert alpha @ votes > 1 == weights.p_hat_of(alpha, votes)


def test_a_single_response(run, tmp_path):
    rows = scored(run, write(tmp_path / "one.jsonl", [{"prompt": "how ?", "responses": ["so ."]}]))
    assert (
        rows[0]["p_hat"] == [] and len(rows[0]["rewards"]) == 1 and len(rows[0]["rewards"][0]) == 2
    )


def test_repeated_rows_are_scored_once_and_written_each_time(run, tmp_path, monkeypatch):
    passed = []
    monkeypatch.setattr(
        rm,
        "hidden_of_batch",
        lambda model, sequences, f=rm.hidden_of_batch: (
            passed.append(len(sequences)) or f(model, sequences)
        ),
    )
    asked = {"prompt": "how ?", "responses": ["so .", "or so ."]}
    rows = scored(
        run,
        write(tmp_path / "twice.jsonl", [asked, {"prompt": "why ?", "responses": ["so ."]}, asked]),
    )
    assert rows[0] == rows[2] != rows[1] and len(rows) == 3
    members = (
        1 if (run / "member_01" / "head.safetensors").exists() else 2
    )  # two heads share one pass over the base
    assert sum(passed) == 3 * members


def test_csv_has_a_row_for_every_pair(run, tmp_path):
    asked = [
        {"prompt": 'how, "then" ?', "responses": ["so .", "or\nso .", "no ."]},
        {"prompt": [{"role": "user", "content": "why ?"}], "responses": ["yes .", "no ."]},
        {"prompt": "alone ?", "responses": ["a"]},
    ]
    path = write(tmp_path / "mine.jsonl", asked)
    rows = scored(run, path)
    score.main(
        score.parse_args([str(path), "--run", str(run), *FLAGS, "--out", str(tmp_path / "out.csv")])
    )
    with open(tmp_path / "out.csv", newline="", encoding="utf-8") as file:
        header, *lines = list(csv.reader(file))
    assert header == [
        "row",
        "prompt",
        "response_a",
        "response_b",
        "reward_a_1",
        "reward_a_2",
        "reward_b_1",
        "reward_b_2",
        "p_hat",
    ]
    expected = [(number, row, pair) for number, row in enumerate(rows, 1) for pair in row["p_hat"]]
    assert len(lines) == len(expected) == 4
    for line, (number, row, (a, b, p)) in zip(lines, expected):
        prompt = row["prompt"] if isinstance(row["prompt"], str) else json.dumps(row["prompt"])
        assert line[:4] == [str(number), prompt, row["responses"][a], row["responses"][b]]
        np.testing.assert_allclose(
            [float(cell) for cell in line[4:]],
            [*row["rewards"][a], *row["rewards"][b], p],
            atol=1e-7,
        )


def test_rows_that_csv_leaves_out_are_counted(full_run, tmp_path, capsys):
    one, two = {"prompt": "how ?", "responses": ["so ."]}, {"prompt": "?", "responses": ["a", "b"]}
    path = write(tmp_path / "mine.jsonl", [one, two, one])
    scored(full_run, path)
    assert (
        capsys.readouterr().out == f"{path.with_name('mine-scores.jsonl')}: 3 prompts, 2 members\n"
    )
    scored_csv(full_run, path)
    said = "out.csv: 3 prompts, 2 members; 2 of one response left out\n"
    assert capsys.readouterr().out.endswith(said)


def scored_csv(run, path):
    """The lines of the CSV that score.py writes for a file, without its header."""
    out = path.with_name("out.csv")
    score.main(score.parse_args([str(path), "--run", str(run), *FLAGS, "--out", str(out)]))
    with open(out, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))[1:]


def test_no_text_becomes_a_formula(full_run, tmp_path):
    texts = ["=1+1", "+1", "-1", "@a", "\ta", "\ra", "a=1", "'=1"]
    lines = scored_csv(
        full_run,
        write(
            tmp_path / "mine.jsonl",
            [{"prompt": text, "response_a": text, "response_b": "so ."} for text in texts],
        ),
    )
    assert [line[1:4] for line in lines] == [
        [f"'{text}" if i < 6 else text] * 2 + ["so ."] for i, text in enumerate(texts)
    ]
    assert any(cell.startswith("-") for line in lines for cell in line[4:])  # a number stays one


def test_other_columns_are_named_once(full_run, tmp_path, capsys):
    row = {"prompt": "how ?", "responses": ["so ."], "respones": 1, "votes_a": 2}
    scored(full_run, write(tmp_path / "mine.jsonl", [row] * 3))
    said = "mine.jsonl: columns that are not used: 'respones', 'votes_a'\n"
    assert capsys.readouterr().out.endswith(said)


def test_rewards_that_are_not_finite(full_run, tmp_path, monkeypatch, capsys):
    given = np.array([[1, np.nan], [0, 1]], np.float32)
    kind = score.members.KINDS["full"]._replace(score=lambda *args: given)
    monkeypatch.setitem(score.members.KINDS, "full", kind)
    path = write(tmp_path / "mine.jsonl", [{"prompt": "how ?", "responses": ["a", "b"]}])
    with pytest.raises(SystemExit):
        cli.run_main(score.main, score.parse_args([str(path), "--run", str(full_run), *FLAGS]))
    assert capsys.readouterr().err.endswith("member 1: its rewards are not finite\n")


def test_csv_in(full_run, test_split, tmp_path):
    texts = test_split.responses[0]
    with open(tmp_path / "in.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [
                ["prompt", "response_a", "response_b"],
                [test_split.messages[0][-1]["content"], texts[0], texts[1]],
            ]
        )
    rows = scored(full_run, tmp_path / "in.csv")
    np.testing.assert_allclose(
        rows[0]["rewards"],
        np.stack([rewards(full_run, 1), rewards(full_run, 2)], axis=1)[:2],
        atol=1e-6,
    )


def test_truncated_as_in_training(data, base, test_split, tmp_path):
    run = fresh(data, tmp_path)
    train(run, base, *HEAD, "--max-length", "12", "--epochs", "1")
    fit(run)
    rows = scored(
        run,
        write(
            tmp_path / "mine.jsonl",
            [
                {"prompt": m[-1]["content"], "responses": t}
                for m, t in zip(test_split.messages, test_split.responses)
            ],
        ),
    )
    np.testing.assert_allclose(
        np.concatenate([row["rewards"] for row in rows])[:, 0], rewards(run), atol=1e-6
    )


def test_bfloat16_run(data, base, test_split, tmp_path):
    """The stored head is not rounded on its way back: what is scored is what was trained, to the
    last bit of a batch's shape."""
    run = fresh(data, tmp_path)
    train(run, base, "--dtype", "bfloat16", "--lr", "3e-3")
    fit(run)
    rows = scored(
        run,
        write(
            tmp_path / "mine.jsonl",
            [
                {"prompt": m[-1]["content"], "responses": t}
                for m, t in zip(test_split.messages, test_split.responses)
            ],
        ),
    )
    np.testing.assert_allclose(
        np.concatenate([row["rewards"] for row in rows])[:, 0], rewards(run), atol=1e-6
    )


def test_chat_template_must_be_the_run_s(data, base, tokenizer, full_run, tmp_path):
    run = fresh(data, tmp_path)
    (tmp_path / "own.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}"
        "{{ eos_token }}"
    )
    flags = ("--chat-template", str(tmp_path / "own.jinja"))
    train(run, base, *HEAD, "--epochs", "1", *flags)
    fit(run)
    test = read_split(run, "test")
    path = write(
        tmp_path / "mine.jsonl",
        [{"prompt": test.messages[0][-1]["content"], "responses": test.responses[0]}],
    )
    np.testing.assert_allclose(
        np.array(scored(run, path, *flags)[0]["rewards"])[:, 0], rewards(run)[:4], atol=1e-6
    )
    with pytest.raises(InputError, match="--chat-template is missing: .* made with another"):
        scored(run, path)
    with pytest.raises(InputError, match="own.jinja: .* made with none"):
        scored(full_run, path, *flags)


# ---- bad input

GOOD = {"prompt": "how ?", "responses": ["so ."]}


@pytest.mark.parametrize(
    "row, said",
    [
        ({"responses": ["so ."]}, r"line 3: prompt: nothing found, text"),
        ({"prompt": "how ?"}, r"line 3: response: nothing found, text"),
        ({"prompt": "how ?", "response_a": "so ."}, r"line 3: response: nothing found, text"),
        (
            {"prompt": "how ?", "responses": []},
            r"line 3: responses: \[\] found, a list of responses",
        ),
        (
            {"prompt": "how ?", "responses": "so ."},
            r"line 3: responses: 'so .' found, a list of responses",
        ),
        ({"prompt": "how ?", "responses": ["so .", 3]}, r"line 3: response: 3 found, text"),
        ({"prompt": "how ?", "responses": ["so .", " "]}, r"line 3: response: ' ' found, text"),
        ({"prompt": 7, "responses": ["so ."]}, r"line 3: prompt: 7 found, text"),
        ({"prompt": "", "responses": ["so ."]}, r"line 3: prompt: '' found, text"),
        (
            {"prompt": [{"role": "assistant", "content": "hm"}], "responses": ["so ."]},
            r"line 3: prompt: 'assistant' found, messages that end with a user turn",
        ),
        ({"prompt": [], "responses": ["so ."]}, r"line 3: prompt: \[\] found"),
        ([1, 2], r"line 3: the row: \[1, 2\] found, an object"),
        (
            {"prompt": "how ?", "responses": ["so ."], "response_b": "no ."},
            r"line 3: responses beside response_b found, one of the two forms expected",
        ),
        (
            {"prompt": [{"role": "user", "content": "x", "name": "A"}], "responses": ["so ."]},
            r"line 3: prompt message: \['name'\] found, no keys besides role and content",
        ),
    ],
)
def test_bad_rows(full_run, tmp_path, row, said):
    path = write(tmp_path / "bad.jsonl", [GOOD])
    path.write_text(path.read_text() + "\n" + json.dumps(row) + "\n")
    with pytest.raises(InputError, match="bad.jsonl " + said):
        scored(full_run, path)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.jsonl"]


def test_no_row_and_no_file(full_run, tmp_path):
    with pytest.raises(InputError, match="no row found"):
        scored(full_run, write(tmp_path / "empty.jsonl", []))
    with pytest.raises(InputError, match="nothing.jsonl: no such file"):
        scored(full_run, tmp_path / "nothing.jsonl")


def test_a_run_that_cannot_score(full_run, tmp_path):
    path = write(tmp_path / "mine.jsonl", [GOOD])
    with pytest.raises(InputError, match="no rewards"):
        scored(tmp_path / "nowhere", path)
    run = fresh(full_run, tmp_path)
    (run / "weights.json").write_text(
        json.dumps(json.loads((run / "weights.json").read_text())[:1])
    )
    edited(run)
    with pytest.raises(InputError, match="k = 2 expected"):
        scored(run, path)
    shutil.copy(full_run / "weights.json", run)
    edited(run)
    shutil.rmtree(run / "member_02")
    with pytest.raises(InputError, match="member_02: no such directory"):
        scored(run, path)
    shutil.rmtree(run / "member_01")
    with pytest.raises(InputError, match="no trained members found"):
        scored(run, path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.jsonl", "run"]


def test_nothing_half_written(full_run, tmp_path, monkeypatch):
    """An older result stays as it was when writing fails in the middle."""
    path = write(tmp_path / "mine.jsonl", [GOOD, GOOD])
    scored(full_run, path)
    before = (tmp_path / "mine-scores.jsonl").read_text()

    def fails(*args):
        yield {"prompt": "how ?", "responses": [], "rewards": [], "p_hat": []}
        raise OSError("disk full")

    monkeypatch.setattr(score, "answers", fails)
    with pytest.raises(InputError, match="mine-scores.jsonl: cannot be written .disk full"):
        score.main(score.parse_args([str(path), "--run", str(full_run), *FLAGS]))
    assert (tmp_path / "mine-scores.jsonl").read_text() == before and not leftovers(tmp_path)


def test_an_out_that_cannot_be_written_is_told_before_anything_is_scored(
    full_run, tmp_path, monkeypatch
):
    path = write(tmp_path / "mine.jsonl", [GOOD])
    (tmp_path / "file").write_text("")
    monkeypatch.delattr(score.members, "rewards_of_run")
    with pytest.raises(InputError, match="out.csv: cannot be written"):
        scored(full_run, path, "--out", str(tmp_path / "file" / "out.csv"))


def test_out_must_be_a_known_form(full_run, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        score.parse_args(
            [
                str(tmp_path / "mine.jsonl"),
                "--run",
                str(full_run),
                "--out",
                str(tmp_path / "out.txt"),
            ]
        )
    assert (
        stopped.value.code == 2
        and "a name ending in .jsonl or .csv expected" in capsys.readouterr().err
    )


def test_the_script_ends_with_one_line_and_code_2(full_run, tmp_path):
    path = write(tmp_path / "bad.jsonl", [GOOD, {"prompt": "how ?", "responses": []}])
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "score.py"), "--run", str(full_run), str(path), *FLAGS],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr
        == "score.py: error: bad.jsonl line 2: responses: [] found, a list of responses expected\n"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["bad.jsonl"]
