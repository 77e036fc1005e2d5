# Sourced by run_all.sh, tests/*.sh and .ci/run with ROOT set: leaves in PYTHON an interpreter that
# has everything.
#
# It makes ROOT/.venv, and makes again the one that it made, which .venv/installed tells, when that
# is out of date (other requirements, other C++ source, another place), from any Python >= 3.11 and
# a C++ compiler. A .venv of your own, or a link to one, or PYTHON=/path/to/python, is used as it is,
# where it serves; nothing is installed into it.

recent='import sys; sys.exit(sys.version_info < (3, 11))'
# Says in one line what an environment lacks.
serves='
import re, sys
from importlib import metadata

def numbers(version):
    return [int(number) for number in re.findall("[0-9]+", version)[:2]]

for line in open(sys.argv[1], encoding="utf-8"):
    name, _, pinned = line.split("#")[0].strip().partition("==")
    least = "".join(re.findall(r"\(at least ([0-9.]+)\)", line))
    if name == "pybind11":  # This one and the next build and test.
        break
    try:
        found = name and metadata.version(name)
    except metadata.PackageNotFoundError:
        found = None
    if found is None or numbers(found) < numbers(least):
        wanted = f"at least {least}" if least else "any version"
        has = f"{name} {found}" if found else f"no {name}"
        expected = f"{wanted} expected, best that of requirements.txt, {pinned}"
        sys.exit(f"error: {sys.argv[2]}: {has} found, {expected}{sys.argv[3]}")
'
VENV=$ROOT/.venv PYTHON=${PYTHON:-} remedy=''
sources='requirements.txt setup.py csrc/* pairwise/environment.sh'
version=$(cd "$ROOT" && { pwd; cat $sources; } | cksum)
install() { "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
has_pip() { "$VENV/bin/python" -c "import pip; $recent" 2>/dev/null; }
complete() { [ "$(cat "$VENV/installed" 2>/dev/null)" = "$version" ] && has_pip; }

if [ -z "$PYTHON" ] && ! complete; then
    exec 9>"$VENV.lock"
    flock 9 2>/dev/null || # Of two commands at once the second waits.
        echo "warning: $VENV.lock cannot be locked: start no second command before .venv is made" >&2
    if [ -L "$VENV" ] || { [ -e "$VENV" ] && [ ! -e "$VENV/installed" ]; }; then
        PYTHON=$VENV/bin/python
        remedy="; $VENV was not made here and stays: move it away, or give PYTHON=/path/to/python"
    elif ! complete; then
        for python in python3 python3.14 python3.13 python3.12 python3.11 ''; do
            [ -n "$python" ] || { echo "error: no Python >= 3.11 found" >&2; exit 2; }
            "$python" -c "$recent" 2>/dev/null && break
        done
        echo "environment: installing requirements.txt into .venv (minutes the first time)"
        has_pip || { rm -rf "$VENV" && mkdir "$VENV"; }
        echo unfinished >"$VENV/installed" # It is ours from here on.
        has_pip || "$python" -m venv "$VENV"
        install -r "$ROOT/requirements.txt"
        echo "environment: building the C++ evaluator"
        install --no-build-isolation --no-deps --use-pep517 -e "$ROOT"
        echo "$version" >"$VENV/installed"
    fi
    exec 9>&-
fi
if [ -n "$PYTHON" ]; then
    PYTHON=$(command -v "$PYTHON" || echo "$PYTHON")
    case $PYTHON in '' | /*) ;; *) PYTHON=$PWD/$PYTHON ;; esac
    "$PYTHON" -c "$recent" 2>/dev/null || {
        echo "error: PYTHON is '$PYTHON', which is no Python >= 3.11$remedy" >&2
        exit 2
    }
    "$PYTHON" -c "$serves" "$ROOT/requirements.txt" "$PYTHON" "$remedy" || exit 2
    export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
    "$PYTHON" -c 'from pairwise import evaluator' 2>/dev/null || {
        echo "error: the C++ evaluator is not built for $PYTHON; build it with:" \
            "cd '$ROOT' && '$PYTHON' setup.py build_ext --inplace$remedy" >&2
        exit 2
    }
else
    PYTHON=$VENV/bin/python
fi
