"""No run loses what others put there, and no file edited or damaged is read as a result."""

import errno
import json
import os
import shutil
import subprocess
import sys

import evaluate
import score
from pairwise import cli, files, manifest, run_dir, stages
from pairwise.cli import InputError
from pairwise.scale.checkpoint import Checkpoints

import compare
import harden
import numpy as np
import plurality
import policy_pairs
import prune
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import FLAGS, FULL, edited, export, fit, fresh, leftovers, rewards, train

# ---- links


def test_a_link_as_the_checkpoints_place(data, base, full_run, tmp_path):
    """Checkpoints go through it, and nothing else that is there is touched."""
    run, scratch = fresh(data, tmp_path), tmp_path / "scratch"
    (scratch / "000007" / "mine").mkdir(parents=True)
    (scratch / "mine.txt").write_text("kept")
    (run / "checkpoint_01").symlink_to(scratch)
    train(run, base, *FULL, "--checkpoint-minutes", "1e-6")
    assert (run / "checkpoint_01").is_symlink() and (scratch / "mine.txt").read_text() == "kept"
    assert (scratch / "000007" / "mine").is_dir()
    assert sorted(path.name for path in scratch.iterdir()) == ["000007", "mine.txt"]
    np.testing.assert_array_equal(rewards(run), rewards(full_run))


def test_a_checkpoint_directory_keeps_what_it_did_not_write(tmp_path):
    """Files of others, and links with a checkpoint's name."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "state.json").write_text("kept")
    checkpoints = Checkpoints(tmp_path, 1, {}, {}, 0)
    checkpoints.finish()
    (checkpoints.directory / "000003").symlink_to(tmp_path / "precious")
    (checkpoints.directory / "notes.txt").write_text("kept")
    checkpoints.remove()
    assert (tmp_path / "precious" / "state.json").read_text() == "kept"
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["000003", "notes.txt"]


@pytest.mark.parametrize("name", ["member_01", "logs/01.jsonl", "rewards/01_test.npy"])
def test_a_link_in_an_output_s_place_is_told_before_the_work(name, data, base, tmp_path):
    run, elsewhere = fresh(data, tmp_path), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).symlink_to(elsewhere / "nothing")
    before = (run / "manifest.json").read_bytes()
    with pytest.raises(InputError, match=f"{name}: a link found"):
        train(run, base, *FULL)
    assert (run / "manifest.json").read_bytes() == before and not any(elsewhere.iterdir())


def test_a_link_in_the_weights_place(full_run, tmp_path):
    run = fresh(full_run, tmp_path)
    (run / "weights.json").rename(tmp_path / "mine.json")
    (run / "weights.json").symlink_to(tmp_path / "mine.json")
    flip(run / "rewards" / "01_train.npy")
    edited(run)
    with pytest.raises(InputError, match="weights.json: a link found"):
        fit(run)
    assert (run / "weights.json").is_symlink()


def test_a_link_as_the_checkpoints_place_outlives_rewards_that_are_not_finite(
    data, base, tmp_path, monkeypatch
):
    run, scratch = fresh(data, tmp_path), tmp_path / "scratch"
    scratch.mkdir()
    (run / "checkpoint_01").symlink_to(scratch)
    scored = stages.score
    monkeypatch.setattr(
        stages, "score", lambda *args: {x: y + np.inf for x, y in scored(*args).items()}
    )
    with pytest.raises(InputError, match="rewards of train are not finite"):
        train(run, base, *FULL)
    assert (run / "checkpoint_01").is_symlink() and not any(scratch.iterdir())
    assert not (run / "member_01").exists() and not (run / "logs" / "01.jsonl").exists()


def test_a_link_in_the_data_s_place(demo, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "data").symlink_to(tmp_path / "nothing")
    args = demo.parse_args(["--run", str(tmp_path / "run"), "--prompts", "20", "--responses", "2"])
    with pytest.raises(InputError, match="data: a link found"):
        demo.prompts.prepare(args, "demo", lambda: demo.comparisons(20, 2, 0), "sampled", {}, {})


def test_a_link_as_the_lock_is_not_written_through(full_run, tmp_path, capsys):
    run = fresh(full_run, tmp_path)
    (tmp_path / "precious").write_text("kept")
    (run / ".lock").unlink(missing_ok=True)
    (run / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(SystemExit):
        cli.run_main(evaluate.main, evaluate.parse_args(["--run", str(run), "--resamples", "9"]))
    message = capsys.readouterr().err
    assert (tmp_path / "precious").read_text() == "kept"
    assert message.count("\n") == 1 and ".lock" in message


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_link_in_a_temporary_name_s_place(kind, full_run, tmp_path, no_figures):
    run = fresh(full_run, tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo").write_text("kept")
    place = tmp_path / "mine" / ("photo" if kind == "file" else "")
    (run / ".partial-metrics.json").symlink_to(place)
    evaluate.main(evaluate.parse_args(["--run", str(run), "--resamples", "9"]))
    assert (tmp_path / "mine" / "photo").read_text() == "kept" and not leftovers(run)


# ---- hashes


def test_the_manifest_knows_every_output(full_run):
    known = {
        name for entry in manifest.entries(full_run).values() for name in entry.get("outputs", {})
    }
    there = {str(path.relative_to(full_run)) for path in full_run.rglob("*") if path.is_file()}
    data = {name for name in there if "data" in name}  # without hashes, as tests change it
    assert there - data - {"manifest.json", ".lock"} == known


def evaluated(run, *flags):
    words = ["--run", str(run), "--resamples", "9", *flags]
    cli.run_main(evaluate.main, evaluate.parse_args(words))


def scored(run, *flags):
    (run.parent / "mine.jsonl").write_text('{"prompt": "x", "responses": ["a", "b"]}\n')
    words = ["--run", str(run), str(run.parent / "mine.jsonl"), *FLAGS, *flags]
    cli.run_main(score.main, score.parse_args(words))


def flip(path):
    """Damage a file in one byte, at its end, where its values are."""
    content = bytearray(path.read_bytes())
    content[-2] ^= 64
    path.write_bytes(content)


def edit_metrics(path):
    path.write_text(path.read_text().replace('"brier": 0.', '"brier": 0.0'))


def edit_weights(path):
    entries = json.loads(path.read_text())
    entries[-1]["alpha"] = [0.5, 0.5]
    path.write_text(json.dumps(entries))


@pytest.mark.parametrize(
    "name, change, command",
    [
        ("weights.json", edit_weights, evaluated),
        ("weights.json", edit_weights, scored),
        ("weights.json", edit_weights, fit),
        ("rewards/01_test.npy", flip, evaluated),
        ("rewards/02_train.npy", flip, fit),
        ("rewards/01_continuations.npy", flip, evaluated),
        ("metrics.json", edit_metrics, evaluated),
    ],
)
def test_what_was_edited_is_refused_until_it_is_accepted(
    name, change, command, full_run, tmp_path, no_figures
):
    run = fresh(full_run, tmp_path)
    if name.startswith(("metrics", "figures")):
        evaluated(run)
    change(run / name)
    with pytest.raises((InputError, SystemExit)):
        command(run)
    if command is evaluated:
        evaluated(run, "--accept-edited")
        assert name in [
            x for entry in manifest.entries(run).values() for x in entry.get("edited", [])
        ]
        evaluated(run)


def test_the_line_names_the_file_and_the_flag(full_run, tmp_path, capsys):
    run = fresh(full_run, tmp_path)
    edit_weights(run / "weights.json")
    with pytest.raises(SystemExit):
        evaluated(run)
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and str(run / "weights.json") in message
    assert "--accept-edited" in message


def test_a_missing_file_of_the_manifest_is_told(full_run, tmp_path):
    run = fresh(full_run, tmp_path)
    (run / "weights.json").unlink()
    with pytest.raises(InputError, match="weights.json: no such file"):
        run_dir.read_weights(run, 2)


def test_files_without_a_known_hash_are_not_checked(full_run, tmp_path, no_figures):
    run = tmp_path / "run"
    for name in ("data", "rewards"):
        shutil.copytree(full_run / name, run / name)
    shutil.copy(full_run / "weights.json", run)
    flip(run / "rewards" / "01_test.npy")
    evaluated(run)


def test_two_writers_of_one_path(tmp_path):
    """The second has a line, and the first's work is not touched."""
    path = tmp_path / "out"
    with files.replacing(path) as partial:
        partial.write_text("first")
        with pytest.raises(InputError, match="out: another process is writing it"):
            with files.replacing(path):
                raise AssertionError
        assert partial.read_text() == "first"
    assert path.read_text() == "first" and [x.name for x in tmp_path.iterdir()] == ["out"]
    (tmp_path / ".lock-out").touch()  # as a killed one leaves it
    (tmp_path / ".partial-out").mkdir()
    with files.replacing(path) as partial:
        partial.write_text("second")
    assert path.read_text() == "second" and [x.name for x in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("looks", [manifest.stage_done, manifest.unchanged])
def test_two_who_begin_the_same_stage(looks, tmp_path):
    """The second has decided before the first began, and comes when the first has ended."""
    outputs = [tmp_path / "out.json"]
    assert not looks(tmp_path, "stage", {"seed": 1}, {}, outputs)
    other = f"""
from pathlib import Path
from pairwise import files, manifest
run, stage = Path({str(tmp_path)!r}), ("stage", {{"seed": 0}}, {{}})
started = manifest.begin_stage(run, *stage)
files.write_json(run / "out.json", "first")
manifest.end_stage(run, *stage, started)
"""
    subprocess.run([sys.executable, "-c", other], check=True, cwd=cli.REPOSITORY)
    with pytest.raises(InputError, match=r"another process has done this stage \(stage\) mean"):
        manifest.begin_stage(tmp_path, "stage", {"seed": 1}, {})
    assert (
        json.loads(outputs[0].read_text()) == "first"
        and manifest.entries(tmp_path)["stage"]["done"]
    )


def test_a_file_of_the_same_name_is_no_run(tmp_path):
    """Programs of others write a manifest.json too."""
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}')
    assert run_dir.output(str(tmp_path / "data" / "x.jsonl")) == tmp_path / "data" / "x.jsonl"


def test_a_run_or_an_output_that_is_no_directory(full_run, tmp_path):
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("mine", encoding="utf-8")
    link.symlink_to("nowhere")
    for path, found in ((file, "a file"), (link, "a link to nothing")):
        with pytest.raises(InputError, match=f"--run .*{path.name}: {found} found, a directory"):
            manifest.begin_stage(path, "data", {}, {})
        with pytest.raises(InputError, match=f"--out .*{path.name}: {found} found, a directory"):
            evaluate.main(evaluate.parse_args(["--run", str(full_run), "--out", str(path)]))
    assert file.read_text(encoding="utf-8") == "mine" and not link.exists()


def test_a_split_that_is_gone_is_missed(full_run, tmp_path, no_figures):
    run = fresh(full_run, tmp_path)
    entries = manifest.entries(run)
    entries["data"]["outputs"] = {"data/valid.parquet": "0"}
    (run / "manifest.json").write_text(json.dumps({"stages": entries}))
    (run / "data" / "valid.parquet").unlink()
    with pytest.raises(SystemExit):
        evaluated(run)


def test_a_report_that_was_accepted_stays(full_run, tmp_path, no_figures, capsys):
    run = fresh(full_run, tmp_path)
    evaluated(run)
    with open(run / "metrics.json", "a", encoding="utf-8") as file:
        file.write("\n\n")
    noted = (run / "metrics.json").read_text()
    evaluated(run, "--accept-edited")
    capsys.readouterr()
    evaluated(run)
    assert (run / "metrics.json").read_text() == noted
    assert "edited by hand, and shown so: metrics.json\n" in capsys.readouterr().out


def test_a_directory_that_is_not_ours_says_so(tmp_path, monkeypatch):
    def refuses(path, *_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(files.os, "open", refuses)
    with pytest.raises(InputError, match=r"a.json: cannot be written \(Permission denied"):
        files.write_json(tmp_path / "a.json", 1)


def test_a_full_disk_under_a_library_without_an_error_of_its_own(tmp_path):
    """tokenizers raises a bare Exception; an error of our own stays what it is."""
    for error, told in (
        (Exception("No space left on device"), InputError),
        (KeyError("x"), KeyError),
    ):
        with pytest.raises(told, match="No space left|x"):
            with files.replacing(tmp_path / "member") as partial:
                partial.mkdir()
                raise error
    assert not any(tmp_path.iterdir())


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def refuses(code):
        def raises(*_):
            raise OSError(code, os.strerror(code))

        return raises

    monkeypatch.setattr(files, "_unlocked", [])
    for code in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF):
        monkeypatch.setattr(files.fcntl, "flock", refuses(code))
        files.write_json(tmp_path / "a.json", code)
        assert files.read_json(tmp_path / "a.json", int) == code
    manifest.begin_stage(tmp_path / "run", "data", {}, {})
    line = f"warning: {tmp_path / '.lock-a.json'}: cannot be locked on this file system; let no "
    assert capsys.readouterr() == ("", line + "second command write here\n")
    monkeypatch.setattr(files.fcntl, "flock", refuses(errno.EIO))
    with pytest.raises(InputError, match="cannot be written"):
        files.write_json(tmp_path / "b.json", {})
    assert not (tmp_path / "b.json").exists()


# ---- nothing is computed from parts that do not belong together


def rewrite(run, change):
    """The manifest of `run` after change(its stages)."""
    entries = manifest.entries(run)
    change(entries)
    (run / "manifest.json").write_text(json.dumps({"stages": entries}))


def replaced(run, name, stage, change):
    """A file of `run` as if `stage` had made it anew, so that no hash of it refuses it."""
    change(run / name)
    rewrite(run, lambda made: made[stage]["outputs"].update({name: files.hash_file(run / name)}))


def reversed_rewards(path):
    np.save(path, -np.load(path))


def other_texts(path):
    rows = pq.read_table(path).to_pylist()
    for row in rows:
        row["texts"] = row["texts"][::-1]
    pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(path)), path)


def other_votes(path):
    rows = pq.read_table(path).to_pylist()
    for pair in (pair for row in rows for pair in row["pairs"]):
        pair["votes_a"], pair["votes_b"] = pair["votes_b"], pair["votes_a"]
    pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(path)), path)


def export_policy(run):
    words = ["--run", str(run), "--member", "1", "--out", str(run.parent / "pairs.jsonl")]
    policy_pairs.main(policy_pairs.parse_args(words))


def pruned(run):
    words = ["--run", str(run), "--beta", "3", "--out", str(run.parent / "pruned")]
    prune.main(prune.parse_args(words))


def hardened(run):
    harden.main(harden.parse_args(["--run", str(run), "--out", str(run.parent / "hard")]))


def evaluate_anew(run):
    evaluate.main(evaluate.parse_args(["--run", str(run), "--resamples", "20"]))


USERS = {
    "fit_weights": fit,
    "evaluate": evaluate_anew,
    "compare": compare.test_errors,
    "harden": hardened,
    "prune": pruned,
    "policy_pairs": export_policy,
}
OF_WEIGHTS = {"evaluate", "compare", "prune"}
OF_TEXTS = {"evaluate", "harden", "prune", "policy_pairs"}


@pytest.mark.parametrize("name", list(USERS))
def test_a_member_that_was_broken_off_is_not_used(name, full_run, tmp_path, no_figures):
    run = fresh(full_run, tmp_path)
    USERS[name](run)
    run = fresh(full_run, tmp_path, "killed")
    rewrite(run, lambda made: made["member_01"].update(done=False))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="killed: stage member_01 was broken off"):
        USERS[name](run)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_member_that_was_broken_off_is_not_trained_on_nor_put_to_work(
    full_run, head_run, base, tmp_path
):
    run = fresh(full_run, tmp_path)
    rewrite(run, lambda made: made["member_01"].update(done=False))
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"prompt": "How?", "responses": ["So.", "Not so."]}')
    with pytest.raises(InputError, match="stage member_01 was broken off"):
        train(run, base, *FULL, iteration=3)
    with pytest.raises(InputError, match="stage member_01 was broken off"):
        score.main(score.parse_args([str(questions), "--run", str(run), *FLAGS]))
    assert not (tmp_path / "questions-scores.jsonl").exists()
    run = fresh(head_run.run, tmp_path, "heads")
    rewrite(run, lambda made: made["features"].update(done=False))
    with pytest.raises(InputError, match="stage features was broken off"):
        plurality.read_features(run)
    rewrite(run, lambda made: made["member_01"].update(done=False))
    with pytest.raises(InputError, match="stage member_01 was broken off"):
        export(run, base, 1)
    assert not (run / "member_01" / "model.safetensors").exists()


def test_members_that_do_not_belong_together_are_not_put_to_work_by_formulas(full_run, tmp_path):
    run = fresh(full_run, tmp_path)
    hardened(run)
    rewrite(run, lambda made: made["member_02"]["inputs"].update({"rewards of member 1": "other"}))
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"prompt": "How?", "responses": ["So.", "Not so."]}')
    with pytest.raises(InputError, match="rewards of member 1 changed since stage member_02 was"):
        score.main(score.parse_args([str(questions), "--run", str(tmp_path / "hard"), *FLAGS]))


@pytest.mark.parametrize("name", list(USERS))
def test_members_of_other_data_are_not_used(name, full_run, tmp_path, no_figures):
    run = fresh(full_run, tmp_path)
    rewrite(run, lambda made: made["data"].setdefault("outputs", {}))
    replaced(run, "data/test.parquet", "data", other_votes)
    with pytest.raises(InputError, match="data/test.parquet changed since stage member_01 was"):
        USERS[name](run)
    rewrite(run, lambda made: made["data"].update(edited=["data/test.parquet"]))
    USERS[name](run)


def test_data_that_no_stage_has_made_can_be_accepted(full_run, tmp_path, no_figures, capsys):
    run = fresh(full_run, tmp_path)
    rewrite(run, lambda made: made.pop("data"))
    other_votes(run / "data" / "test.parquet")
    words = f"data/test.parquet changed since stage .* evaluate.py --run {run} --accept-edited"
    with pytest.raises(InputError, match=words):
        evaluate_anew(run)
    evaluated(run, "--accept-edited")
    assert f"{run / 'data' / 'test.parquet'}: edited, accepted\n" in capsys.readouterr().out
    evaluated(run, "--accept-edited")
    assert "edited, accepted" not in capsys.readouterr().out
    for use in USERS.values():
        use(run)


@pytest.mark.parametrize("name", list(USERS))
def test_weights_of_other_rewards_are_not_used(name, full_run, tmp_path, no_figures):
    run = fresh(full_run, tmp_path)
    replaced(run, "rewards/01_train.npy", "member_01", reversed_rewards)
    with pytest.raises(InputError, match="rewards of member 1 changed since stage member_02 was m"):
        fit(run)
    # As if the two were trained jointly, or imported.
    rewrite(run, lambda made: made["member_02"]["inputs"].pop("rewards of member 1"))
    rewrite(run, lambda made: made["member_02_continuations"]["inputs"].pop("rewards of member 1"))
    if name not in OF_WEIGHTS:
        USERS[name](run)
        return
    with pytest.raises(InputError, match="rewards of member 1 changed since stage weights was"):
        USERS[name](run)
    fit(run)
    USERS[name](run)


@pytest.mark.parametrize("name", list(USERS))
def test_rewards_of_other_continuations_are_not_used(name, full_run, tmp_path, no_figures):
    run = fresh(full_run, tmp_path)
    replaced(run, "continuations.parquet", "continuations", other_texts)
    if name not in OF_TEXTS:
        USERS[name](run)
        return
    with pytest.raises(InputError, match="continuations.parquet changed since stage member_01_con"):
        USERS[name](run)
