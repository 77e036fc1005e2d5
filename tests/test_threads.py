"""How many threads are taken, and how they wait: as the user says, and else what was measured."""

import os
import subprocess
import sys

from pairwise import cli

import pytest
from conftest import REPOSITORY


@pytest.mark.parametrize(
    "threads, processes, expected",
    [
        (None, None, 8),
        ("", None, 8),
        ("3", None, 3),
        ("16", None, 16),
        ("999999", None, 16),  # libgomp cannot make them
        ("4,2", None, 4),  # of nested regions; the outermost counts
        ("many", None, 8),
        ("0", None, 8),
        ("1", None, 1),
        ("1", "2", 4),  # torchrun's own 1
        ("3", "2", 3),
        (None, "3", 2),
        (None, "20", 1),
    ],
)
def test_default_threads(threads, processes, expected, monkeypatch):
    monkeypatch.setattr(cli, "usable_cores", lambda: 8)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    for name, value in (("OMP_NUM_THREADS", threads), ("LOCAL_WORLD_SIZE", processes)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert cli.default_threads() == expected
    unset = threads in (None, "", "many", "0") or (threads, processes) == ("1", "2")
    assert cli.default_threads(6) == (6 if unset else expected)


@pytest.mark.parametrize(
    "setting, expected",
    [
        ({}, "1000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, "None"),
    ],
)
def test_how_threads_wait(setting, expected):
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    code = "import os, pairwise; print(os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | setting,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == expected
