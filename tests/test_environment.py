"""pairwise/environment.sh, in a copy with an interpreter that only notes what it would install."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import REPOSITORY

# -S: it sees no package but those in PYTHONPATH.
PYTHON = f"""#!/bin/sh
case "$1 $2" in
    -c*) exec {sys.executable} -S "$@" ;;
    "-m venv") echo venv >>$LOG; mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip") echo pip >>$LOG; [ ! -e $LOG.kill ] || kill $PPID ;;
esac
"""
PACKAGES = {
    line.split("==")[0]: line.split()[0].split("==")[1]
    for line in (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").splitlines()
    if "==" in line
}


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def clone(tmp_path):
    """A directory with what environment.sh reads, beside packages/ and bin/python3."""
    root = tmp_path / "clone"
    (root / "pairwise").mkdir(parents=True)
    shutil.copytree(REPOSITORY / "csrc", root / "csrc")
    for name in ("requirements.txt", "setup.py", "pairwise/environment.sh"):
        shutil.copy(REPOSITORY / name, root / name)
    (root / "pairwise" / "evaluator.py").touch()
    executable(tmp_path / "bin" / "python3", PYTHON)
    for name, version in PACKAGES.items():
        has(root, name, version)
    (tmp_path / "packages" / "pip.py").touch()
    return root


def has(root, name, version):
    """Make a package installed in this version, None for not at all."""
    folder = root.parent / "packages"
    for path in folder.glob(f"{name}-*.dist-info"):
        shutil.rmtree(path)
    if version:
        (folder / f"{name}-{version}.dist-info").mkdir(parents=True)
        text = f"Name: {name}\nVersion: {version}\n"
        (folder / f"{name}-{version}.dist-info" / "METADATA").write_text(text, encoding="utf-8")


def enter(root, **environment):
    """Source environment.sh; return the exit code, stderr and what was made since the last call."""
    scratch = root.parent
    log = scratch / "log"
    log.write_text("", encoding="utf-8")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", '. "$ROOT/pairwise/environment.sh"; echo "$PYTHON"'],
        env={
            "PATH": f"{scratch / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(scratch / "packages"),
            "ROOT": str(root),
            "LOG": str(log),
            **environment,
        },
        cwd=scratch,
        capture_output=True,
        encoding="utf-8",
    )
    if done.returncode == 0:
        assert done.stdout.splitlines()[-1] == str(root / ".venv" / "bin" / "python")
    return done.returncode, done.stderr, log.read_text(encoding="utf-8").split()


def test_made_once_and_again_where_it_is_out_of_date(clone):
    assert enter(clone) == (0, "", ["venv", "pip", "pip"])
    assert enter(clone) == (0, "", [])
    with open(clone / "requirements.txt", "a", encoding="utf-8") as file:
        file.write("# other\n")
    assert enter(clone) == (0, "", ["pip", "pip"])
    (clone / ".venv" / "bin" / "python").unlink()  # of a Python that was removed since
    assert enter(clone) == (0, "", ["venv", "pip", "pip"])


def test_one_that_was_killed_is_made_again(clone):
    (clone.parent / "log.kill").touch()
    assert enter(clone)[::2] == (-15, ["venv", "pip"])
    (clone.parent / "log.kill").unlink()
    (clone / ".venv" / "bin" / "python").unlink()
    assert enter(clone) == (0, "", ["venv", "pip", "pip"])


@pytest.mark.parametrize("pip", [True, False])  # uv leaves it out
def test_one_of_somebody_else_is_used(clone, pip):
    if not pip:
        (clone.parent / "packages" / "pip.py").unlink()
    executable(clone / ".venv" / "bin" / "python", PYTHON)
    has(clone, "transformers", "5.17.0")  # also with the oldest that serve
    has(clone, "torch", "2.11.0+cu128")
    has(clone, "ruff", None)  # and without what only tests
    assert enter(clone) == (0, "", [])


def test_a_link_is_somebody_elses_too(clone):
    """To what another clone made, say; or to a disk that is not there."""
    (clone / ".venv").symlink_to(other := clone.parent / "other")
    code, line, made = enter(clone)
    assert code == 2 and not made and "stays: move it away" in line
    executable(other / "bin" / "python", PYTHON)
    (other / "installed").write_text("by another clone", encoding="utf-8")
    assert enter(clone) == (0, "", [])
    assert (other / "installed").read_text(encoding="utf-8") == "by another clone"


@pytest.mark.parametrize(
    "where, name, version, said",
    [
        ("PYTHON", "transformers", "4.51.3", "transformers 4.51.3 found, at least 5.17 expected, "),
        (".venv", "torch", None, "no torch found, at least 2.11 expected, best that of requirem"),
        ("PYTHON", "numpy", None, "no numpy found, any version expected"),
        (".venv", "evaluator", None, "the C++ evaluator is not built"),
        (".venv", "python", None, "which is no Python >= 3.11"),
    ],
)
def test_one_that_does_not_serve_is_refused_and_stays(clone, where, name, version, said):
    python = clone / ".venv" / "bin" / "python"
    executable(python, PYTHON)
    has(clone, name, version)
    if name == "evaluator":
        (clone / "pairwise" / "evaluator.py").unlink()
    if name == "python":
        executable(python, "#!/bin/sh\nexit 1\n")
    code, line, made = enter(clone, **({"PYTHON": str(python)} if where == "PYTHON" else {}))
    assert code == 2 and not made and line.count("\n") == 1 and line.startswith("error: ")
    assert said in line and python.exists()
    assert where == "PYTHON" or "stays: move it away, or give PYTHON=/path/to/python" in line


def test_a_file_system_without_locks(clone):
    executable(clone.parent / "bin" / "flock", "#!/bin/sh\necho flock: 9: failed >&2; exit 71\n")
    code, line, made = enter(clone)
    assert code == 0 and len(made) == 3 and line.count("\n") == 1
    assert line.startswith(f"warning: {clone / '.venv.lock'} cannot be locked")
    assert enter(clone) == (0, "", [])
