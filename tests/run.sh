#!/usr/bin/env bash
# Run the tests, in an environment made here if need be: a process for each core, of one thread.
#     bash tests/run.sh [pytest arguments]          (-n 0 tests/test_x.py: one file in one process)
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$ROOT/pairwise/environment.sh"
cd "$ROOT"
export OMP_NUM_THREADS=1
CORES=$("$PYTHON" -c 'from pairwise import cli; print(cli.usable_cores())')
exec "$PYTHON" -m pytest -q -n "$CORES" --dist loadgroup "$@"
