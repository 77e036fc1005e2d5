"""What a user, a disk or another program has broken is one line and exit code 2 in every script.

A case spoils a copy of a run, or asks for something that cannot be, and runs one script.
"""

import ast
import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys

import evaluate
import fit_weights
import score
import train_rm
from pairwise import cli

import adopt
import compare
import export_member
import export_pairs
import harden
import numpy as np
import plurality
import policy_pairs
import prune
import pytest
import train_joint
from conftest import FLAGS, FULL, REPOSITORY, fresh, leftovers, script, without_hashes

# ---- commands: words of each script; RUN, OUT and BASE are replaced

COMMANDS = {
    "evaluate": (evaluate, "--run RUN --resamples 9"),
    "evaluate out": (evaluate, "--run RUN --resamples 9 --out OUT"),
    "fit": (fit_weights, "--run RUN"),
    "score": (score, "--run RUN OUT.jsonl " + " ".join(FLAGS)),
    "score csv": (score, "--run RUN OUT.jsonl --out OUT.csv " + " ".join(FLAGS)),
    "train": (train_rm, "--run RUN --base BASE --iteration 3 " + " ".join((*FLAGS, *FULL))),
    "joint": (train_joint, "--run RUN --base BASE --k 2 " + " ".join((*FLAGS, *FULL))),
    "adopt": (adopt, "--run RUN --model BASE --iteration 1 " + " ".join(FLAGS)),
    "export": (export_member, "--run RUN --base BASE --member 1 " + " ".join(FLAGS)),
    "pairs": (export_pairs, "--run RUN --out OUT.jsonl"),
    "pairs parquet": (export_pairs, "--run RUN --out OUT.parquet"),
    "policy": (policy_pairs, "--run RUN --member 1 --out OUT.jsonl"),
    "logprob": (script("policy_logprob"), "--run RUN --base BASE " + " ".join(FLAGS)),
    "prune": (prune, "--run RUN --beta 3 --out OUT"),
    "harden": (harden, "--run RUN --out OUT --k 3"),
    "plurality": (plurality, "--run RUN"),
    "compare": (compare, "RUN RUN --out OUT"),
    "continuations": (
        script("continuations"),
        "--run RUN --base BASE --prompts 2 --count 2 --max-tokens 4 --threads 1",
    ),
    "demo": (script("demo"), "--run OUT --prompts 20 --responses 2 --texts 64 --threads 1"),
    "votes": (script("votes"), "--run OUT --source VOTES"),
}


VOTES = {"response_a": "a", "response_b": "b", "votes_a": 2, "votes_b": 1}


def write_inputs(folder):
    """What score.py and votes.py are given."""
    (folder / "out.jsonl").write_text('{"prompt": "x", "responses": ["a", "b"]}\n')
    rows = [json.dumps({"prompt": f"x{i}"} | VOTES) + "\n" for i in range(20)]
    (folder / "votes.jsonl").write_text("".join(rows))


def call(name, run, base, *more):
    """Run a script in this process, as its command line does."""
    module, words = COMMANDS[name]
    places = {
        "VOTES": run.parent / "votes.jsonl",
        "RUN": run,
        "OUT": run.parent / "out",
        "BASE": base,
    }
    for word, path in places.items():
        words = words.replace(word, str(path))
    cli.run_main(module.main, module.parse_args([*words.split(), *more]))


def refused(capsys, name, run, base, *more):
    """The one line of a script that ends with exit code 2."""
    if not (run.parent / "votes.jsonl").exists():
        write_inputs(run.parent)
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        call(name, run, base, *more)
    error = [x for x in capsys.readouterr().err.replace("\r", "\n").split("\n") if "error: " in x]
    assert exit.value.code == 2 and len(error) == 1, error
    return error[0]


@pytest.fixture
def run(full_run, tmp_path):
    return without_hashes(shutil.copytree(full_run, tmp_path / "run"))


# ---- files of a run in another form

FILES = {
    "manifest.json": ("evaluate", "fit", "score", "train", "prune", "harden"),
    "data/stats.json": ("evaluate", "train", "prune"),
    "weights.json": ("evaluate", "score", "train", "prune"),
    "plurality.json": ("evaluate",),
    "logs/01.jsonl": ("evaluate",),
    "data/test.parquet": ("evaluate", "pairs"),
    "data/train.parquet": ("fit", "train", "prune", "plurality"),
    "continuations.parquet": ("evaluate", "policy", "train"),
    "rewards/01_train.npy": ("fit", "train", "evaluate", "prune"),
    "rewards/01_continuations.npy": ("evaluate", "policy"),
    "member_01/config.json": ("score",),
    "member_01/tokenizer.json": ("score",),
    "member_01/model.safetensors": ("score",),
}
DEEP = "[" * 100_000
JSON = ("", "[]", "{}", "null", "3", '"text"', '{"stages": []}', '{"stages": {"data": 1}}', DEEP)
LINES = ('{"loss": 1', DEEP, "\x00")


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_form(name, run, base, tmp_path, capsys, no_figures):
    path, whole = run / name, (run / name).read_bytes() if (run / name).exists() else b""
    contents = [whole[: len(whole) // 2], b"", b"\xff\xfe\x00garbage"]
    if name.endswith(".json"):
        contents += [text.encode() for text in JSON]
    if name.endswith(".jsonl"):
        contents = [text.encode() for text in LINES]
    if name.endswith(".npy"):
        contents += list(false_arrays(tmp_path))
    fits = {"plurality.json": (b"{}",), "member_01/config.json": (b"{}",)}.get(name, ())
    for content in contents:
        if content in fits:
            continue
        path.write_bytes(content)
        for command in FILES[name]:
            refused(capsys, command, run, base)
            assert not leftovers(run)


def false_arrays(folder):
    """Contents of .npy files: an npz, a broken one, an object array, a shape of terabytes."""
    np.savez(folder / "a.npz", np.zeros(3, np.float32))
    yield (folder / "a.npz").read_bytes()
    yield (folder / "a.npz").read_bytes()[:40]
    for array in (np.array([None]), np.zeros(3), np.zeros(3, "datetime64[s]")):
        np.save(folder / "a.npy", array, allow_pickle=True)
        yield (folder / "a.npy").read_bytes()
    np.save(folder / "a.npy", np.zeros(3, np.float32))
    for shape in (
        b"(3000000000000000000,), }",
        b"(300000000000000000000000,), }",
        b"(-3,), }",
        b"(3.5,), }",
    ):
        yield (folder / "a.npy").read_bytes().replace(b"(3,), }" + b" " * (len(shape) - 7), shape)


# ---- a disk that cannot be written

WRITERS = (
    "evaluate",
    "evaluate out",
    "fit",
    "score",
    "score csv",
    "train",
    "joint",
    "pairs",
    "pairs parquet",
    "policy",
    "prune",
    "harden",
    "compare",
    "continuations",
    "demo",
    "votes",
)


@contextlib.contextmanager
def full_disk(limit):
    """A file that grows beyond the limit, in bytes, fails as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


SMALL = ("score", "score csv", "policy", "continuations")  # write less than the second limit


@pytest.mark.parametrize(
    "name, limit",
    [(name, limit) for name in WRITERS for limit in (0, 3000) if not (limit and name in SMALL)],
)
def test_a_full_disk(name, limit, run, base, capsys):
    """One line; nothing half-written stays, and nothing that was there is lost."""
    if name in ("joint", "continuations"):  # They begin a run.
        for path in [*run.glob("member_*"), run / "rewards", run / "logs"]:
            shutil.rmtree(path)
        for path in (run / "manifest.json", run / "continuations.parquet", run / "weights.json"):
            path.unlink()
    if name == "fit":
        (run / "weights.json").unlink()
    write_inputs(run.parent)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with full_disk(limit):
        refused(capsys, name, run, base)
    assert not leftovers(run.parent)
    for path, content in before.items():
        assert path.read_bytes() == content or path.name == "manifest.json"


def test_a_full_disk_beside_a_head(head_run, base, tmp_path, capsys):
    run = fresh(head_run.run, tmp_path)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with full_disk(3000):
        refused(capsys, "export", run, base)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    (run / "manifest.json").unlink()
    said = refused(capsys, "export", run, base)
    assert "manifest.json: no entry of member_01 found, one expected" in said


# ---- values that no run can have

FLAG_CASES = [
    ("evaluate", "--resamples", "1000000000000"),
    ("evaluate", "--seed", "99999999999999999999"),
    ("train", "--lr", "1e300"),
    ("train", "--lr", "inf"),
    ("train", "--lr", "1_0"),
    ("train", "--lr", "٣"),
    ("train", "--epochs", "99999999999999999999"),
    ("train", "--device", "cpu:x"),
    ("train", "--device", "cuda:99"),
    ("train", "--threads", "100000"),
    ("train", "--threads", "99999999999"),
    ("train", "--base", ""),
    ("train", "--run", ""),
    ("train", "--run", "x" * 300),
    ("continuations", "--temperature", "1e-40"),
    ("continuations", "--max-tokens", "999999999999"),
    ("prune", "--beta", "1e-300"),
    ("harden", "--k", "0"),
    ("pairs", "--out", "x" * 300 + ".jsonl"),
    ("pairs", "--out", "RUN/data/train.parquet"),
    ("policy", "--out", "RUN/weights.json"),
    ("score", "--out", "RUN/logs/01.jsonl"),
    ("demo", "--prompts", "999999999999"),
    ("votes", "--test-share", "nan"),
]


@pytest.mark.parametrize("name, flag, value", FLAG_CASES)
def test_a_value_that_cannot_be(name, flag, value, run, base, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    message = refused(capsys, name, run, base, flag, value.replace("RUN", str(run)))
    assert len(message) < 700
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


# ---- streams and locales, each in a process of its own (fit_weights.py loads no torch)

PRINT = [sys.executable, str(REPOSITORY / "fit_weights.py"), "--run"]


@pytest.mark.parametrize(
    "locale", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}]
)
def test_a_locale_without_the_letters(locale, full_run, tmp_path):
    folder = fresh(full_run, tmp_path, "läuft-日本")
    ended = subprocess.run(
        [*PRINT, str(folder)], env=os.environ | locale, capture_output=True, text=True
    )
    assert ended.returncode == 0 and "weights.json" in ended.stdout, ended.stderr


def test_a_path_that_is_not_utf_8(full_run, tmp_path):
    folder = os.fsencode(tmp_path) + b"/\xff\xfe"
    os.rename(fresh(full_run, tmp_path), folder)
    ended = subprocess.run([*PRINT, folder], capture_output=True, text=True)
    assert ended.returncode == 0 and "weights.json" in ended.stdout, ended.stderr


def test_closed_streams(run):
    command = 'exec "$0" "$@" >&- 2>&-'
    ended = subprocess.run(["sh", "-c", command, *PRINT, str(run)])
    assert ended.returncode == 0


def locales_text(path):
    """The calls of a script that read or write text without naming its encoding."""
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(call, ast.Call) or any(each.arg == "encoding" for each in call.keywords):
            continue
        words, name = ast.unparse(call), ast.unparse(call.func)
        binary = name == "os.open" or re.search(r"(, |=)'[rwax+]*b[rwax+]*'", words)
        opens = re.search(r"(^|\.)(open|fdopen|\w*TemporaryFile)$", name) and not binary
        runs = name.startswith("subprocess.") and re.search(r"(text|universal_newlines)=", words)
        if opens or runs or name.endswith((".read_text", ".write_text")):
            yield f"{path.name} line {call.lineno}: {words}"


def test_every_text_is_utf_8_whatever_the_locale():
    scripts = [path for glob in ("*.py", "[!.tr]*/**/*.py") for path in REPOSITORY.glob(glob)]
    assert len(scripts) > 50 and not [call for path in scripts for call in locales_text(path)]


def test_an_output_that_cannot_be_written(run):
    with open("/dev/full", "w") as full:
        ended = subprocess.run([*PRINT, str(run)], stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert "No space left on device" in ended.stderr
