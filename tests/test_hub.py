"""The data sets from a hub: a server on this machine answers the HTTP API that `datasets` asks."""

import gzip
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow.parquet as pq
import pytest
from conftest import REPOSITORY
from test_published import (
    HELPSTEER2,
    HELPSTEER3,
    MULTIPREF,
    PERSONALLLM,
    PREFERENCES,
    PRISM,
    TLDR,
    folder,
)
from test_votes import save

COMMITS = {
    name: digit * 40
    for name, digit in (
        ("multipref", "a"),
        ("older", "b"),
        ("personalllm", "c"),
        ("helpsteer2", "d"),
        ("prism", "e"),
        ("tldr", "f"),
        ("main", "1"),
        ("plain", "2"),
        ("helpsteer3", "3"),
    )
}
RUNNER = """
import contextlib, io, json, runpy, sys, time, traceback
from pairwise import drawing, figures
figures.majority_shares = drawing.save = lambda *_: None  # the figure takes longer than the rest
time.sleep = lambda seconds: None  # between attempts
ended = []
for words in json.load(sys.stdin):
    sys.argv, code, out, err = words, 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as error:
            code = error.code
        except Exception:
            code = 1
            traceback.print_exc()
    ended.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(ended))
"""


class Hub(BaseHTTPRequestHandler):
    """What datasets asks of the hub for the files of a data set.

    server.repos: {id: {revision: (commit, {path: bytes})}}, or {id: (status, error code)}.
    """

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or the body waits 40 ms for the header's acknowledgement

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code, **headers):
        self.answer(
            status,
            {"error": code},
            X_Error_Code=code,
            X_Error_Message=f"said the hub: {code}",
            **headers,
        )

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        url = urlsplit(self.path)
        self.server.requests.append((self.command, unquote(url.path)))
        words = (
            unquote(url.path).strip("/").split("/")
        )  # datasets/ID/resolve/REV/PATH, or api/datasets/ID[/(revision|tree|..)/REV[/PATH]]
        start = words.index("datasets") + 1 if "datasets" in words else len(words)
        repo, (what, *rest) = (
            "/".join(words[start : start + 2]),
            words[start + 2 :] or ["revision", "main"],
        )
        revisions = self.server.repos.get(repo, (401, "RepoNotFound"))
        if isinstance(revisions, tuple):
            return self.refuse(*revisions)
        rest = "/".join(rest)
        known = {commit: (commit, files) for commit, files in revisions.values()} | revisions
        revision = next(
            (name for name in known if rest == name or rest.startswith(f"{name}/")), None
        )
        if revision is None:
            return self.refuse(404, "RevisionNotFound")
        (commit, files), path = known[revision], rest[len(revision) + 1 :]
        if what == "revision":
            return self.answer(
                200,
                {
                    "id": repo,
                    "sha": commit,
                    "private": False,
                    "gated": False,
                    "siblings": [{"rfilename": name} for name in files],
                },
            )
        if what == "resolve":
            if path not in files:
                return self.refuse(404, "EntryNotFound", X_Repo_Commit=commit)
            return self.answer(
                200,
                files[path],
                X_Repo_Commit=commit,
                ETag=f'"{hashlib.sha1(files[path]).hexdigest()}"',
            )
        folders = {name.rsplit("/", i)[0] for name in files for i in range(1, name.count("/") + 1)}
        entries = {
            name: {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
            for name in folders
        }
        entries |= {
            name: {
                "type": "file",
                "oid": hashlib.sha1(content).hexdigest(),
                "size": len(content),
                "path": name,
            }
            for name, content in files.items()
        }
        if what == "paths-info":
            return self.answer(
                200, [entries[name] for name in parse_qs(body).get("paths", []) if name in entries]
            )
        if path and path not in folders:
            return self.refuse(404, "EntryNotFound")
        under, deep = f"{path}/" if path else "", parse_qs(url.query).get("recursive") == ["true"]
        self.answer(
            200,
            [
                entry
                for name, entry in entries.items()
                if name.startswith(under) and (deep or "/" not in name[len(under) :])
            ],
        )

    do_HEAD = do_POST = do_GET


@contextmanager
def serving(repos):
    """(address, list of the requests it gets) of a hub with these repositories."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repos, server.requests, server.daemon_threads = repos, [], True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.requests
    finally:
        server.shutdown()
        server.server_close()


def environment(address, home):
    """Of a process that knows no other hub than this one, and no token."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGING_FACE", "PAIRWISE_"))
        and not name.lower().endswith("_proxy")
    }
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    return kept | {
        "PYTHONPATH": path,
        "HF_ENDPOINT": address,
        "HF_HOME": str(home),
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def run_all(address, home, jobs):
    """Return [(exit code, stdout, last line of stderr)] of the scripts with these words.

    They run one after the other in one process, as imports take seconds.
    """
    jobs = [
        [str(REPOSITORY / "data_prep" / f"{name}.py"), *map(str, words)] for name, *words in jobs
    ]
    home.mkdir(exist_ok=True)
    ended = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(jobs).encode(),
        capture_output=True,
        env=environment(address, home),
        cwd=home,
    )
    assert ended.returncode == 0, ended.stderr.decode()
    return [(code, out, err.rpartition("\r")[2]) for code, out, err in json.loads(ended.stdout)]


def packed(rows):
    return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0)


def card(*configs):
    """README.md with these configurations: (name, {split: files})."""
    lines = [
        line
        for name, files in configs
        for line in (
            f"- config_name: {name}",
            "  data_files:",
            *(
                line
                for split, path in files.items()
                for line in (f"  - split: {split}", f"    path: {path}")
            ),
        )
    ]
    return "\n".join(
        ["---", "license: cc-by-4.0", "configs:", *lines, "---", "# A data set", ""]
    ).encode()


@pytest.fixture(scope="module")
def from_hub(tmp_path_factory):
    """Make every data set from the hub and from the same files.

    Returns ({name: (exit code, stdout, stderr)}, the directory, the requests).
    """
    tmp = tmp_path_factory.mktemp("hub")

    def parquet(name, rows):
        return save(tmp / name, rows).read_bytes()

    averaged = packed([{"prompt": "Q", "response": "A", "helpfulness": 3}])
    multipref = {
        "README.md": card(
            ("default", {"train": "data/original-*"}), ("binarized", {"train": "binarized/train-*"})
        ),
        "data/original-00000-of-00001.parquet": parquet("multipref.parquet", MULTIPREF),
        "binarized/train-00000-of-00001.parquet": b"none",
    }
    older = {
        "data/train-00000-of-00002.parquet": parquet("older.parquet", MULTIPREF[:9]),
        "data/train-00001-of-00002.parquet": parquet("rest.parquet", MULTIPREF[10:]),
    }
    plain = {
        "README.md": b"no card",
        "data/train.parquet": multipref["data/original-00000-of-00001.parquet"],
    }
    personalllm = {
        f"data/{split}-00000-of-00001.parquet": parquet(f"p_{split}.parquet", rows)
        for split, rows in PERSONALLLM.items()
    }
    helpsteer2 = {
        "README.md": b"---\nlicense: cc-by-4.0\n---\n",
        "train.jsonl.gz": averaged,
        "validation.jsonl.gz": averaged,
        "disagreements/disagreements.jsonl.gz": packed(HELPSTEER2),
        "preference/preference.jsonl.gz": packed(PREFERENCES),
    }
    pages = {
        name: {split: f"{name}/{split}.jsonl.gz" for split in HELPSTEER3}
        for name in ("preference", "feedback")
    }
    helpsteer3 = {"README.md": card(*pages.items())}
    for split, rows in HELPSTEER3.items():
        helpsteer3[pages["preference"][split]] = packed(rows)
        helpsteer3[pages["feedback"][split]] = averaged
    names = ("survey", "conversations", "utterances", "metadata")
    prism = {
        f"{name}.jsonl": save(
            tmp / f"{name}.jsonl", PRISM if name == "conversations" else [{"user_id": "u"}]
        ).read_bytes()
        for name in names
    }
    prism["README.md"] = "\n".join(
        [
            "---",
            "configs:",
            *(f"- config_name: {name}\n  data_files: {name}.jsonl" for name in names),
            "---",
            "",
        ]
    ).encode()
    converted = {
        f"comparisons/{split}/0000.parquet": parquet(f"t_{split}.parquet", rows)
        for split, rows in TLDR.items()
    }
    converted |= {"axis/test/0000.parquet": b"none", "axis/validation/0000.parquet": b"none"}
    trap = f"open({str(tmp / 'executed')!r}, 'w').close()\n".encode()
    repos = {
        "allenai/multipref": {
            "main": (COMMITS["multipref"], multipref),
            "older": (COMMITS["older"], older),
            "plain": (COMMITS["plain"], plain),
        },
        "namkoong-lab/PersonalLLM": {"main": (COMMITS["personalllm"], personalllm)},
        "nvidia/HelpSteer2": {"main": (COMMITS["helpsteer2"], helpsteer2)},
        "nvidia/HelpSteer3": {"main": (COMMITS["helpsteer3"], helpsteer3)},
        "HannahRoseKirk/prism-alignment": {"main": (COMMITS["prism"], prism)},
        "openai/summarize_from_feedback": {
            "refs/convert/parquet": (COMMITS["tldr"], converted),
            "main": (COMMITS["main"], {"summarize_from_feedback.py": trap}),
        },
    }

    (tmp / "two").mkdir()
    (tmp / "helpsteer2.jsonl.gz").write_bytes(packed(HELPSTEER2))
    (tmp / "preference.jsonl.gz").write_bytes(packed(PREFERENCES))
    for split, rows in (*PERSONALLLM.items(), *TLDR.items()):
        kind = "personalllm" if split == "test" or rows is PERSONALLLM["train"] else "tldr"
        (tmp / kind).mkdir(exist_ok=True)
        save(tmp / kind / f"{split}.parquet", rows)
    for i, rows in enumerate((MULTIPREF[:9], MULTIPREF[10:])):
        save(tmp / "two" / f"train-{i}.parquet", rows)
    jobs = {
        "multipref": ("multipref", tmp / "multipref.parquet"),
        "older": ("multipref", tmp / "two", "--revision", "older"),
        "plain": ("multipref", tmp / "multipref.parquet", "--revision", "plain"),
        "commit": ("multipref", tmp / "two", "--revision", COMMITS["older"]),
        "personalllm": ("personalllm", tmp / "personalllm"),
        "helpsteer2": ("helpsteer2", tmp / "helpsteer2.jsonl.gz"),
        "preference": ("helpsteer2", tmp / "preference.jsonl.gz", "--annotators", "preference"),
        "helpsteer3": ("helpsteer3", folder(tmp / "helpsteer3", HELPSTEER3, ".jsonl.gz")),
        "tldr": ("tldr", tmp / "tldr", "--cnndm", "keep"),
        "prism": ("prism", tmp / "conversations.jsonl"),
        "again": ("multipref", None),
        "unknown": ("multipref", None, "--revision", "nope"),
    }
    words, place = [], {"prism": "multipref", "again": "multipref"}
    for name, (kind, source, *flags) in jobs.items():
        words.append([kind, "--run", tmp / "hub" / place.get(name, name), *flags])
        if source:
            words.append(
                [
                    kind,
                    "--run",
                    tmp / "local" / place.get(name, name),
                    "--source",
                    source,
                    *(flag for flag in flags if flags[0] != "--revision"),
                ]
            )
    with serving(repos) as (address, requests):
        ended = run_all(address, tmp / "home", words)
    ended = {
        (word[2].parent.name, name): end
        for word, name, end in zip(
            words, [n for n, job in jobs.items() for _ in range(2 if job[1] else 1)], ended
        )
    }
    return ended, tmp, requests


def stats(run):
    return json.loads((run / "data" / "stats.json").read_text())


@pytest.mark.parametrize(
    "name",
    [
        *("multipref", "older", "plain", "commit", "personalllm"),
        *("helpsteer2", "preference", "helpsteer3", "tldr"),
    ],
)
def test_data_from_the_hub_are_those_of_the_files(from_hub, name):
    ended, tmp, _ = from_hub
    (code, out, error), (local_code, _, _) = ended["hub", name], ended["local", name]
    assert (code, error.strip(), local_code) == (0, "", 0) and out.startswith(
        "data: asking the hub for "
    )
    hub, local = stats(tmp / "hub" / name), stats(tmp / "local" / name)
    commit = COMMITS[
        "older" if name == "commit" else "helpsteer2" if name == "preference" else name
    ]
    assert hub["source"]["commit"] == commit and local["source"]["commit"] is None
    names = {path.name for path in (tmp / "local" / name / "data").iterdir()}
    assert (
        names
        == {path.name for path in (tmp / "hub" / name / "data").iterdir()}
        >= {"train.parquet", "test.parquet"}
    )
    for file in names - {"stats.json"}:
        assert pq.read_table(tmp / "hub" / name / "data" / file).equals(
            pq.read_table(tmp / "local" / name / "data" / file)
        )
    assert hub | {"source": None} == local | {"source": None}
    assert sum(hub["source"]["rows"].values()) == sum(local["source"]["rows"].values()) > 0


def test_prism_from_the_hub(from_hub):
    ended, tmp, requests = from_hub
    assert ended["hub", "prism"][0] == ended["local", "prism"][0] == 0
    hub, local = (
        pq.read_table(tmp / place / "multipref" / "prompts.parquet") for place in ("hub", "local")
    )
    assert hub.equals(local) and len(hub) == 10
    entry = json.loads((tmp / "hub" / "multipref" / "manifest.json").read_text())["stages"][
        "prompts"
    ]
    assert (
        entry["source"]["commit"] == COMMITS["prism"]
        and entry["inputs"]["source"] == "HannahRoseKirk/prism-alignment@newest"
    )
    got = {
        path
        for command, path in requests
        if command == "GET" and "/resolve/" in path and "prism" in path
    }
    assert any(path.endswith("/conversations.jsonl") for path in got) and not any(
        "survey" in path or "utterances" in path for path in got
    )


def test_only_the_files_that_are_wanted_are_fetched_and_no_script_is_run(from_hub):
    _, tmp, requests = from_hub
    assert not (tmp / "executed").exists()
    of_tldr = [path for _, path in requests if "summarize_from_feedback" in path]
    assert of_tldr and not any(
        f"/{revision}/" in f"{path}/" for path in of_tldr for revision in ("main", COMMITS["main"])
    )
    fetched = {path for command, path in requests if command == "GET" and "/resolve/" in path}
    assert not any(
        path.endswith(".py") or "axis" in path or "binarized" in path for path in fetched
    )
    assert {path for path in fetched if "HelpSteer2" in path and path.endswith(".gz")} == {
        f"/datasets/nvidia/HelpSteer2/resolve/{COMMITS['helpsteer2']}/{name}.jsonl.gz"
        for name in ("disagreements/disagreements", "preference/preference")
    }


def test_a_finished_run_asks_the_hub_nothing(from_hub):
    ended, tmp, _ = from_hub
    assert ended["hub", "again"] == (
        0,
        f"data: {tmp / 'hub' / 'multipref' / 'data'} is there, skipped\n",
        "",
    )


def test_unknown_revision(from_hub):
    ended, tmp, _ = from_hub
    code, _, line = ended["hub", "unknown"]
    assert (
        code == 2
        and line.count("\n") == 1
        and "Revision 'nope' doesn't exist" in line
        and not (tmp / "hub" / "unknown").exists()
    )


# ---- a hub that gives nothing


def check(tmp_path, ended, name, hub, reason):
    """One line that says what to do, exit code 2, nothing left."""
    code, out, line = ended
    assert (
        code == 2
        and out == f"data: asking the hub for {hub}\n"
        and line.count("\n") == 1
        and line.endswith("\n")
    )
    assert (
        line.startswith(f"{name}.py: error: {hub} could not be read from the hub (")
        and reason in line
    )
    assert f" from https://huggingface.co/datasets/{hub} and run: python " in line
    assert line.endswith(f"{name}.py --run {tmp_path / name} --source PATH\n")
    assert not (tmp_path / name).exists()


HUBS = {
    "multipref": "allenai/multipref",
    "personalllm": "namkoong-lab/PersonalLLM",
    "helpsteer2": "nvidia/HelpSteer2",
    "tldr": "openai/summarize_from_feedback",
}


def test_hub_that_refuses(tmp_path):
    script = {
        "main": (COMMITS["main"], {"helpsteer2.py": b"", "HelpSteer2.py": b"raise SystemExit(0)"})
    }
    repos = {
        HUBS["multipref"]: (404, "RepoNotFound"),
        HUBS["personalllm"]: (401, "GatedRepo"),
        HUBS["tldr"]: (403, "GatedRepo"),
        HUBS["helpsteer2"]: script,
    }
    with serving(repos) as (address, _):
        ended = run_all(
            address, tmp_path / "home", [[name, "--run", tmp_path / name] for name in HUBS]
        )
    reasons = (
        "'allenai/multipref' doesn't exist on the Hub or cannot be accessed",
        "'namkoong-lab/PersonalLLM' is a gated dataset",
        "Dataset scripts are no longer supported",
        "'openai/summarize_from_feedback' is a gated dataset",
    )
    for (name, hub), end, reason in zip(HUBS.items(), ended, reasons):
        check(tmp_path, end, name, hub, reason)


def test_hub_without_the_files(tmp_path):
    files = {"README.md": b"no card", "notes.txt": b"x"}
    repos = {
        hub: {"main": (COMMITS["main"], files), "refs/convert/parquet": (COMMITS["tldr"], files)}
        for hub in HUBS.values()
    }
    repos[HUBS["multipref"]]["main"] = (COMMITS["main"], {"data/train.parquet": b"PAR1 cut"})
    with serving(repos) as (address, _):
        ended = run_all(
            address, tmp_path / "home", [[name, "--run", tmp_path / name] for name in HUBS]
        )
    assert (
        ended[0][0] == 2
        and ended[0][2].startswith("multipref.py: error: train.parquet: not parquet (")
        and not (tmp_path / "multipref").exists()
    )
    for (name, hub), end in list(zip(HUBS.items(), ended))[2:]:
        check(tmp_path, end, name, hub, "")
    assert (
        ended[1][0] == 2
        and ended[1][2].count("\n") == 1
        and not (tmp_path / "personalllm").exists()
    )  # datasets takes notes.txt


def test_hub_that_is_not_there(tmp_path):
    with socket.socket() as taken:  # bound and not listening: a connection is refused
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        [ended] = run_all(
            address, tmp_path / "home", [["multipref", "--run", tmp_path / "multipref"]]
        )
    check(tmp_path, ended, "multipref", HUBS["multipref"], "Couldn't reach")


def test_script_itself_and_prism_within_run_all(tmp_path):
    """The process has the exit code; a repeated command of run_all.sh has run_all.sh's own flag."""
    run = tmp_path / "run"
    (run / "data").mkdir(parents=True)
    (run / "data" / "stats.json").write_text("{}")
    save(
        run / "data" / "train.parquet",
        [
            {
                "prompt_id": "p",
                "messages": [{"role": "user", "content": "Q"}],
                "responses": ["a", "b"],
                "pairs": [{"a": 0, "b": 1, "votes_a": 2.0, "votes_b": 1.0, "ties": 0.0}],
            }
        ],
    )
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with serving({}) as (address, _):
        env = environment(address, tmp_path / "home") | {
            "PAIRWISE_COMMAND": "bash run_all.sh multipref 4"
        }
        ended = subprocess.run(
            [sys.executable, str(REPOSITORY / "data_prep" / "prism.py"), "--run", str(run)],
            capture_output=True,
            env=env,
            cwd=tmp_path,
        )
    line = ended.stderr.decode().rpartition("\r")[2]
    assert ended.returncode == 2 and line.count("\n") == 1
    assert line.startswith(
        "prism.py: error: HannahRoseKirk/prism-alignment could not be read from the hub ("
    )
    assert line.endswith(
        "datasets/HannahRoseKirk/prism-alignment and run: "
        "bash run_all.sh multipref 4 --prism-source PATH\n"
    )
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
