# Sourced by run_all.sh, tests/*.sh and .ci/run with ROOT set: leaves in PYTHON an interpreter that
# has everything.
#
# It makes ROOT/.venv when that is missing or out of date (other requirements, other C++ source,
# another place), from any Python >= 3.11 and a C++ compiler. PYTHON=/path/to/python uses an
# environment of your own instead; nothing is installed into it.

recent='import sys; sys.exit(sys.version_info < (3, 11))'
install() { "$PYTHON" -m pip install --quiet --disable-pip-version-check "$@"; }
has_pip() { "$PYTHON" -c "import pip; $recent" 2>/dev/null; }

if [ -n "${PYTHON:-}" ]; then
    PYTHON=$(command -v "$PYTHON" || echo "$PYTHON")
    case $PYTHON in '' | /*) ;; *) PYTHON=$PWD/$PYTHON ;; esac
    "$PYTHON" -c "$recent" 2>/dev/null || {
        echo "error: PYTHON is '$PYTHON', which is no Python >= 3.11" >&2
        exit 2
    }
    export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
    "$PYTHON" -c 'from pairwise import evaluator' 2>/dev/null || {
        echo "error: the C++ evaluator is not built for $PYTHON; build it with:" \
            "cd '$ROOT' && '$PYTHON' setup.py build_ext --inplace" >&2
        exit 2
    }
else
    PYTHON=$ROOT/.venv/bin/python
    sources='requirements.txt setup.py csrc/* pairwise/environment.sh'
    version=$(cd "$ROOT" && { pwd; cat $sources; } | cksum)
    # Of two commands at once the second waits.
    if command -v flock >/dev/null; then exec 9>"$ROOT/.venv.lock" && flock 9; fi
    if [ "$(cat "$ROOT/.venv/installed" 2>/dev/null)" != "$version" ] || ! has_pip; then
        for python in python3 python3.14 python3.13 python3.12 python3.11 ''; do
            [ -n "$python" ] || { echo "error: no Python >= 3.11 found" >&2; exit 2; }
            "$python" -c "$recent" 2>/dev/null && break
        done
        echo "environment: installing requirements.txt into .venv (minutes the first time)"
        has_pip || "$python" -m venv --clear "$ROOT/.venv"
        install -r "$ROOT/requirements.txt"
        echo "environment: building the C++ evaluator"
        install --no-build-isolation --no-deps --use-pep517 -e "$ROOT"
        echo "$version" >"$ROOT/.venv/installed"
    fi
    if command -v flock >/dev/null; then exec 9>&-; fi
fi
