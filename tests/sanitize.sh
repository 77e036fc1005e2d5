#!/usr/bin/env bash
# Build the evaluator with AddressSanitizer and UBSan (g++) in a temporary directory and run its
# tests there.
#     bash tests/sanitize.sh [pytest arguments]
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$ROOT/pairwise/environment.sh"
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
mkdir "$build/pairwise"
cp "$ROOT/pairwise/__init__.py" "$build/pairwise"
cp "$ROOT/tests/test_evaluator.py" "$build" # without conftest.py, which puts the usual build first
suffix=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
g++ -std=c++17 -O1 -g -Wno-psabi -fPIC -shared -pthread -ffp-contract=off -fvisibility=hidden \
    -fsanitize=address,undefined -fno-sanitize-recover=all \
    $("$PYTHON" -m pybind11 --includes) "$ROOT"/csrc/*.cpp -o "$build/pairwise/evaluator$suffix"
cd "$build"
# Python's own allocations at exit would count as leaks. Of the random cases a quarter is run: each
# is several times slower.
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 EVALUATOR_TESTS=0.25
export PYTHONPATH="$build" PYTHONDONTWRITEBYTECODE=1
"$PYTHON" -c 'from pairwise import evaluator
import sys; sys.exit(not evaluator.__file__.startswith(sys.argv[1]))' "$build"
"$PYTHON" -m pytest -q -p no:cacheprovider test_evaluator.py "$@"
