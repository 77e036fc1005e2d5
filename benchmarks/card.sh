#!/usr/bin/env bash
# What this does on a card, measured in at most 9 minutes, part by part, the most valuable first.
#     bash benchmarks/card.sh [PART ..] [--small]         (default: a b c f e d; l too; card.py says what)
#
# It writes benchmarks/card-NAME.json, NAME from the card's name, "cpu" without one: a part's numbers
# while it runs and when it ends, and of one that failed or ran out of time the reason. Numbers of
# parts that do not run now stay. Variables: PYTHON (default: .venv's, else python3; 3.11 or later,
# torch 2.11, transformers 5.17), OUT (another folder for the JSON file), WORK (a directory for base
# and runs, 50 GB, that is kept; a second call takes the base that is there), MINUTES (default 9),
# COMMIT (of a copy of the tree without git), GIB (of the card that a, b, c and e may take).
#
# A machine without a package index needs, beside torch, transformers, numpy, pyarrow, safetensors,
# tokenizers, jinja2 and tqdm, three wheels in PYTHONPATH, unpacked: pytorch_optimizer, for b peft
# (with accelerate), for d trl (with accelerate and datasets):
#     pip download --no-deps -d wheels pytorch_optimizer==4.1.0 peft==0.21.2 trl==1.16.0
#     for wheel in wheels/*.whl; do unzip -qo $wheel -d packages; done
set -uo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PAIRWISE_COMMAND="bash benchmarks/card.sh${*:+ $*}"
END=$((SECONDS + ${MINUTES:-9} * 60 - 10)) # A part that is stopped takes seconds to go.
if [ -z "${PYTHON:-}" ]; then
    PYTHON=$ROOT/.venv/bin/python
    [ -x "$PYTHON" ] || PYTHON=python3
fi

# Seconds: on an H100 with an 8B base about 35, 160, 160, 90, 60, 40, 60, 80, 100, 200.
declare -A LIMIT=([base]=60 [a1]=200 [a2]=200 [b1]=120 [b2]=110 [c]=60 [f]=90 [e]=130 [l]=120 [d]=300)
parts=() flags=(--out "${OUT:-$ROOT/benchmarks}" ${GIB:+--gib "$GIB"})
for word in "$@"; do
    case $word in
        a) parts+=(a1 a2) ;;
        b) parts+=(b1 b2) ;;
        [cdefl] | [ab][12]) parts+=("$word") ;;
        --small) flags+=(--small) ;;
        *) echo "card.sh: error: $word found, parts (a b c d e f l) or --small expected" >&2; exit 2 ;;
    esac
done
[ ${#parts[@]} -gt 0 ] || parts=(a1 a2 b1 b2 c f e l d)

work=${WORK:-$(mktemp -d)}
[ -n "${WORK:-}" ] || trap 'rm -rf "$work"' EXIT
# card [WORD ..] -- [FLAG ..]: card.py for the part, as an argument of these words
card() {
    local before=()
    while [ "$1" != -- ]; do before+=("$1") && shift; done
    "${before[@]}" "$PYTHON" "$ROOT/benchmarks/card.py" "$part" --work "$work" "${flags[@]}" "${@:2}"
}

# Member 2 needs the C++ evaluator.
(cd "$ROOT" && "$PYTHON" -c 'from pairwise import evaluator' 2>/dev/null) ||
    (cd "$ROOT" && "$PYTHON" setup.py --quiet build_ext --inplace) ||
    echo "card.sh: the C++ evaluator could not be built; a2 will fail" >&2
if [[ " ${parts[*]}" = *\ [abce]* ]] && [ ! -e "$work/data-run/data" ]; then
    parts=(base "${parts[@]}")
fi

status=0
for part in "${parts[@]}"; do
    left=$((END - SECONDS)) limit=${LIMIT[$part]}
    [ "$limit" -le "$left" ] || limit=$left
    if [ "$limit" -lt 20 ]; then
        card -- --ended skipped "no time left of ${MINUTES:-9} minutes"
        continue
    fi
    code=0
    card timeout -k 10 "$limit" -- || code=$? status=1
    case $code in
        0 | 1) ;; # It has said so itself.
        124) card -- --ended failed "out of time: stopped after $limit seconds" ;;
        137) card -- --ended failed "killed, as where memory runs out" ;;
        *) card -- --ended failed "exit code $code" ;;
    esac
done
exit $status
