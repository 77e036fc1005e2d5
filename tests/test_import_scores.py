"""extras/import_scores.py: rewards from elsewhere as members, beside trained ones or alone."""

import csv
import hashlib
import json

import evaluate
import score
import train_rm
from pairwise import cli, manifest, run_dir
from pairwise.cli import InputError
from pairwise.data import read_splits

import adopt
import compare
import export_member
import harden
import import_scores
import numpy as np
import prune
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import respond
from conftest import FLAGS, HEAD, fit, fresh, rewards, script, train


def words(*arguments):
    return [str(argument) for argument in arguments]


def call(module, *arguments):
    module.main(module.parse_args(words(*arguments)))


def load(run, file, *flags, j=1):
    call(import_scores, "--run", run, "--iteration", j, file, *flags)


def noise(text, salt=""):
    """A reward that is a function of the text, exact in float32."""
    return int(hashlib.sha256(f"{salt}{text}".encode()).hexdigest()[:4], 16) / 2**16


def in_order(run, salt=""):
    """{split: rewards float32 (R,)} of `noise`, in data order."""
    return {
        name: np.array([noise(x, salt) for texts in split.responses for x in texts], np.float32)
        for name, split in read_splits(run)[0].items()
    }


def response_rows(run, salt="", **more):
    """A row per response, the last first."""
    return [
        {"prompt": messages, "prompt_id": name, "response": x, "reward": noise(x, salt)} | more
        for split in read_splits(run)[0].values()
        for name, messages, texts in zip(split.prompt_id, split.messages, split.responses)
        for x in texts
    ][::-1]


def pair_rows(run):
    """A row per pair, of prompt_id alone."""
    rows = []
    for split in read_splits(run)[0].values():
        texts = sum(split.responses, [])
        owner = np.repeat(split.prompt_id, np.diff(split.pair_start))
        for name, a, b in zip(owner.tolist(), split.a, split.b):
            sides = {"response_a": texts[a], "response_b": texts[b]}
            sides |= {"r_a": noise(texts[a]), "r_b": noise(texts[b])}
            rows.append({"prompt_id": name} | sides)
    return rows


def written(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with open(path, "w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            cells = [
                {k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()}
                for row in rows
            ]
            table.writerows(cells)
    return path


@pytest.mark.parametrize("form", ["both", "prompt.jsonl", "id.csv", "pairs.parquet", "pairs.csv"])
def test_rewards_are_stored_in_data_order(data, tmp_path, form):
    run, rows = fresh(data, tmp_path), pair_rows(data)
    if "pairs" not in form:
        rows = response_rows(data)
        for row in rows:
            for field in {"prompt.jsonl": ["prompt_id"], "id.csv": ["prompt"]}.get(form, ()):
                del row[field]
    load(run, written(tmp_path / (form if "." in form else "both.jsonl"), rows))
    for split, expected in in_order(run).items():
        stored = rewards(run, 1, split)
        assert stored.dtype == np.float32 and np.array_equal(stored, expected), split


def test_other_responses_are_counted_and_equal_rewards_are_fine(data, tmp_path, capsys):
    run, rows = fresh(data, tmp_path), response_rows(data)
    other = rows[0] | {"response": "another"}
    blank = rows[0] | {"response": " ", "reward": None}
    unknown = {"prompt": "which ?", "response": "a", "reward": 1}
    empty = {"prompt": " ", "response": "a", "reward": 1}  # votes.py drops such a row.
    unscored = unknown | {"reward": None}
    more = [other, blank, unknown, empty, unscored]
    load(run, written(tmp_path / "s.jsonl", [*rows, rows[3], *more]))
    line = "s.jsonl: 4 rewards of responses that the run does not have, left out, the first at"
    assert f"{line} s.jsonl line {len(rows) + 2}\n" in capsys.readouterr().out
    assert np.array_equal(rewards(run), in_order(run)["test"])
    load(run, written(tmp_path / "other.csv", pair_rows(data)))  # The same rewards.
    assert "member 1: its rewards are there, skipped" in capsys.readouterr().out
    with pytest.raises(InputError, match="another set of rewards than it is given now"):
        load(run, written(tmp_path / "s.jsonl", response_rows(data, "x")))
    with pytest.raises(InputError, match="--iteration 3: .* has 1 members, 2 at most expected"):
        load(run, tmp_path / "s.jsonl", j=3)


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"reward": float("nan")}, "line 2: reward: nan found, a finite number"),
        ({"reward": -float("inf")}, "line 2: reward: -inf found"),
        ({"reward": 1e39}, "line 2: reward: 1e.39 found, a finite number that float32 holds"),
        ({"reward": "high"}, "line 2: reward: 'high' found"),
        ({"reward": True}, "line 2: reward: True found"),
        ({"reward": None, "Reward": 1}, "line 2: reward: nothing found, .* columns, of .'Reward'"),
        ({"prompt_id": None, "prompt": None}, "line 2: prompt_id: nothing found, prompt_id or"),
        ({"response": None}, "line 2: response: nothing found, response, or response_a and"),
        ({"prompt": "another ?"}, "line 2: prompt_id .* has another prompt than in the run"),
        ({"response": ["a"]}, "line 2: response: .'a'. found, text"),
    ],
)
def test_a_broken_row_is_one_line(data, tmp_path, change, expected):
    run, rows = fresh(data, tmp_path), response_rows(data)
    rows[1] |= change
    with pytest.raises(InputError, match=expected):
        load(run, written(tmp_path / "s.jsonl", rows))
    assert not (run / "rewards").exists() and "member_01" not in manifest.entries(run)


def test_two_rewards_and_no_reward_of_a_response(data, tmp_path, capsys):
    run, rows = fresh(data, tmp_path), response_rows(data)
    twice = written(tmp_path / "twice.jsonl", [*rows, rows[2] | {"reward": 7}])
    expected = f"line {len(rows) + 1}: reward: 7.0 found, .* at twice.jsonl line 3 for the same"
    with pytest.raises(InputError, match=expected):
        load(run, twice)
    part = written(tmp_path / "part.jsonl", [*rows[:-2], rows[0] | {"response": "else"}])
    expected = f"2 of the run's {len(rows)} responses have no reward, the first: train prompt_id .*"
    with pytest.raises(InputError, match=expected + "; 1 rewards of .* at part.jsonl line"):
        load(run, part)
    (tmp_path / "empty.jsonl").write_text("")
    arguments = words("--run", run, "--iteration", 1, tmp_path / "empty.jsonl")
    with pytest.raises(SystemExit) as stopped:
        cli.run_main(import_scores.main, import_scores.parse_args(arguments))
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    for names in ("a,,b", "a,a"):
        with pytest.raises(SystemExit):
            import_scores.parse_args([*arguments, "--reward", names])
    with pytest.raises(InputError, match="no such file; data_prep/ makes it"):
        load(tmp_path / "new", part)


def test_one_text_under_two_ids_has_its_rewards_twice(data, tmp_path):
    run = fresh(data, tmp_path)
    path = run / "data" / "train.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[1] |= {name: rows[0][name] for name in ("messages", "responses")}
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    given = [{k: v for k, v in row.items() if k != "prompt_id"} for row in response_rows(run)]
    distinct = list({json.dumps(row): row for row in given}.values())
    assert len(distinct) == len(given) - len(rows[0]["responses"])
    load(run, written(tmp_path / "s.jsonl", distinct))
    for split, expected in in_order(run).items():
        assert np.array_equal(rewards(run, 1, split), expected), split


def test_rewards_that_are_equal_in_float32_are_no_two(data, tmp_path):
    run, rows = fresh(data, tmp_path), response_rows(data)
    again = rows[0] | {"reward": rows[0]["reward"] * (1 + 1e-12)}
    assert again["reward"] != rows[0]["reward"]
    load(run, written(tmp_path / "s.jsonl", [*rows, again]))
    assert np.array_equal(rewards(run), in_order(run)["test"])


def test_what_float32_makes_equal_is_counted(data, tmp_path, capsys):
    run, rows = fresh(data, tmp_path), response_rows(data)
    load(run, written(tmp_path / "s.jsonl", [x | {"reward": 1e9 + x["reward"]} for x in rows]))
    pairs = sum(
        int((values[split.a] != values[split.b]).sum())
        for values, split in zip(in_order(run).values(), read_splits(run)[0].values())
    )
    assert f"; {pairs:,} pairs tie in float32 though" in capsys.readouterr().out
    assert manifest.entries(run)["member_01"]["pairs_equal_in_float32"] == pairs > 0


def test_a_killed_import_goes_on(data, tmp_path, monkeypatch):
    run = fresh(data, tmp_path)
    rows = [x | {"second": noise(x["response"], "2")} for x in response_rows(data)]
    arguments = (run, written(tmp_path / "s.csv", rows), "--reward", "reward,second")
    write, calls = import_scores.files.write_array, []

    def killed(path, array):
        calls.append(path)
        if len(calls) == 4:
            raise KeyboardInterrupt
        write(path, array)

    monkeypatch.setattr(import_scores.files, "write_array", killed)
    with pytest.raises(KeyboardInterrupt):
        load(*arguments)
    entries = manifest.entries(run)
    assert entries["member_01"]["done"] and not entries["member_02"]["done"]
    monkeypatch.undo()
    load(*arguments)
    assert manifest.entries(run)["member_02"]["done"]
    assert np.array_equal(rewards(run, 2), in_order(run, "2")["test"])
    (run / "rewards/02_test.npy").write_bytes(b"")
    with pytest.raises(InputError, match="02_test.npy: edited or damaged"):
        run_dir.read_rewards(run, "test", 2, rewards(run).shape)


def judged(path, prompts=14):
    """A file of votes, ids and two columns of scores, and no texts."""
    rows = []
    for i in range(prompts):
        for a, b in ((1, 2), (2, 3), (1, 3)):
            row = {"prompt_id": i, "response_a": a, "response_b": b, "votes_a": 3, "votes_b": i % 4}
            for name in ("gpt4", "llama"):
                row |= {f"{name}_{x}": noise((i, y), name) for x, y in (("a", a), ("b", b))}
            rows.append(row)
    return written(path, rows)


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_run_of_scores_and_ids_alone(tmp_path, capsys, no_figures, ending):
    file, run = judged(tmp_path / f"judged.{ending}"), tmp_path / "run"
    call(script("votes"), "--run", run, "--source", file)
    assert "data: no column prompt, prompt_id takes its place" in capsys.readouterr().out
    load(run, file, "--reward", "gpt4,llama")
    fit(run)
    call(evaluate, "--run", run, "--resamples", 50)
    split = read_splits(run)[0]["test"]
    ids = [(int(name), int(x)) for name, own in zip(split.prompt_id, split.responses) for x in own]
    assert rewards(run, 2).tolist() == [noise(each, "llama") for each in ids]
    test = json.loads((run / "metrics.json").read_text())["splits"]["test"]
    assert test["soft_single"] is None and len(test["members"]) == 2
    if ending == "csv":
        check_tools(run, tmp_path)


def check_tools(run, tmp_path):
    """What needs no model works on a run of imported members; what needs one is one line."""
    call(harden, "--run", run, "--out", tmp_path / "hard", "--k", 2)
    call(prune, "--run", run, "--out", tmp_path / "pruned", "--beta", 2.5)
    for other in ("hard", "pruned"):
        call(evaluate, "--run", tmp_path / other, "--resamples", 50)
    call(compare, run, tmp_path / "hard", "--out", tmp_path / "both", "--resamples", 50)
    questions = written(tmp_path / "q.jsonl", [{"prompt": "p", "responses": ["a", "b"]}])
    for each in (run, tmp_path / "hard", tmp_path / "pruned"):
        with pytest.raises(InputError, match="member 1 has no model: its rewards were imported"):
            call(score, "--run", each, questions)
    with pytest.raises(InputError, match="member 1 has no model"):
        call(respond, "--run", run, "--mode", "consensus", "--base", "no-base", "hello")
    with pytest.raises(InputError, match="member 2 has no model"):
        call(export_member, "--run", run, "--member", 2, "--base", "no-base")
    with pytest.raises(InputError, match="its data have ids in the place of prompts"):
        call(train_rm, "--run", run, "--iteration", 3, "--base", "no-base")


def test_rows_without_a_prompt(tmp_path):
    row = {"prompt_id": 1, "response_a": "x", "response_b": "y", "votes_a": 1, "votes_b": 1}
    rows = [row | {"prompt": f"p {i} ?", "prompt_id": i} for i in range(30)]
    call(
        script("votes"),
        "--run",
        tmp_path / "run",
        "--source",
        written(tmp_path / "v.jsonl", [row, *rows]),
    )
    stats = json.loads((tmp_path / "run/data/stats.json").read_text())
    assert stats["dropped"] == {"empty prompt": 1} and "no_prompts" not in stats
    del row["prompt_id"]
    with pytest.raises(InputError, match="all rows: prompt: nothing found"):
        rows = written(tmp_path / "v.jsonl", [row])
        call(script("votes"), "--run", tmp_path / "other", "--source", rows)


def test_training_goes_on_after_imported_members(
    data, base, full_run, tmp_path, capsys, no_figures
):
    run = fresh(data, tmp_path)
    load(run, written(tmp_path / "1.jsonl", response_rows(data)))
    fit(run)
    train(run, base, *HEAD, iteration=2)
    split = read_splits(run)[0]["train"]
    args = train_rm.parse_args(words("--run", run, "--base", base, "--iteration", 2, *FLAGS, *HEAD))
    r = in_order(run)["train"]
    p_hat = (np.sign(r[split.a] - r[split.b]) + 1) / 2
    assert np.allclose(train_rm.targets_of_stage(args, split)[0], 0.5 + split.p - p_hat)
    load(run, written(tmp_path / "3.jsonl", response_rows(data, "3")), j=3)
    fit(run)
    with pytest.raises(InputError, match="stage member_02.: lr was 0.01, is 0.02"):
        train(run, base, *HEAD, "--lr", "0.02", iteration=4)
    with pytest.raises(InputError, match="member 2 is not an existing model"):
        call(adopt, "--run", run, "--iteration", 4, "--model", "no-model")
    train(run, base, *HEAD, iteration=4)
    fit(run)
    call(evaluate, "--run", run, "--resamples", 50)
    assert "member 4: trained on" in capsys.readouterr().out
    call(export_member, "--run", run, "--member", 4, "--base", base, *FLAGS)
    with pytest.raises(InputError, match="stage member_02.: train was head, is import"):
        load(run, tmp_path / "1.jsonl", j=2)


def test_continuations_have_no_imported_rewards(full_run, tmp_path, capsys, no_figures):
    run = fresh(full_run, tmp_path)
    load(run, written(tmp_path / "3.jsonl", response_rows(run)), j=3)
    assert "imported members have no rewards of them" in capsys.readouterr().out
    fit(run)
    call(harden, "--run", run, "--out", tmp_path / "hard", "--k", 2)
    for each in (run, tmp_path / "hard"):
        call(evaluate, "--run", each, "--resamples", 50)
        metrics = json.loads((each / "metrics.json").read_text())
        assert metrics["diversity"] is None
    soft = json.loads((run / "metrics.json").read_text())["splits"]["test"]["soft_single"]
    assert soft is not None  # Member 1 was trained on p.
