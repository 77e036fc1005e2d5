# Sourced by run_all.sh and tests/run.sh with ROOT set: leaves in PYTHON an interpreter that has everything.
#
# Makes ROOT/.venv when it is missing or out of date (other requirements, other C++ source, another place), from any Python >= 3.11 and a
# C++ compiler. PYTHON=/path/to/python uses an environment of your own instead; nothing is installed into it.

current='import sys; sys.exit(sys.version_info < (3, 11))'
if [ -n "${PYTHON:-}" ]; then
    PYTHON=$(command -v "$PYTHON" || echo "$PYTHON")
    case $PYTHON in '' | /*) ;; *) PYTHON=$PWD/$PYTHON ;; esac
    "$PYTHON" -c "$current" 2>/dev/null || { echo "error: PYTHON is '$PYTHON', which is no Python >= 3.11" >&2; exit 2; }
    export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
    "$PYTHON" -c 'from pairwise import evaluator' 2>/dev/null || {
        echo "error: the C++ evaluator is not built for $PYTHON; build it with: cd '$ROOT' && '$PYTHON' setup.py build_ext --inplace" >&2
        exit 2
    }
else
    PYTHON=$ROOT/.venv/bin/python
    wanted=$(cd "$ROOT" && { pwd; cat requirements.txt setup.py csrc/* pairwise/environment.sh; } | cksum)
    if command -v flock >/dev/null; then exec 9>"$ROOT/.venv.lock" && flock 9; fi # two commands at once: the second waits
    if [ "$(cat "$ROOT/.venv/installed" 2>/dev/null)" != "$wanted" ] || ! "$PYTHON" -c "import pip; $current" 2>/dev/null; then
        for found in python3 python3.14 python3.13 python3.12 python3.11 ''; do
            [ -n "$found" ] || { echo "error: no Python >= 3.11 found" >&2; exit 2; }
            "$found" -c "$current" 2>/dev/null && break
        done
        echo "environment: installing requirements.txt into .venv (minutes the first time)"
        "$PYTHON" -c "import pip; $current" 2>/dev/null || "$found" -m venv --clear "$ROOT/.venv"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$ROOT/requirements.txt"
        echo "environment: building the C++ evaluator"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --use-pep517 -e "$ROOT"
        echo "$wanted" >"$ROOT/.venv/installed"
    fi
    if command -v flock >/dev/null; then exec 9>&-; fi
fi
