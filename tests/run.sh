#!/usr/bin/env bash
# Run the tests, in an environment made here if need be.    bash tests/run.sh [pytest arguments]
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$ROOT/pairwise/environment.sh"
cd "$ROOT"
exec "$PYTHON" -m pytest -q tests "$@"
