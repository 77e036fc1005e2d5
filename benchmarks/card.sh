#!/usr/bin/env bash
# What this does on a card, measured in at most 9 minutes, part by part, the most valuable first.
#     bash benchmarks/card.sh [PART ..] [--small]     (default: a1 c b2 e f d a2 b1 l; see card.py)
#
# It writes benchmarks/card-NAME.json, NAME from the card's name, "cpu" without one: a part's numbers
# while it runs and when it ends, and of one that failed or ran out of time the reason. Numbers of
# parts that do not run now stay. For all parts 9 minutes are too few: what no longer fits is
# skipped, for a second call with the same WORK. Variables: PYTHON (default: .venv's, else python3;
# 3.11 or later, torch 2.11, transformers 5.17), OUT (another folder for the JSON file), WORK (a
# directory for base and runs, 50 GB, that is kept; a second call takes the base that is there),
# MINUTES (default 9), COMMIT (of a copy of the tree without git), GIB (of the card that a, b, c and
# e may take).
#
# A machine without a package index needs, beside torch, transformers, accelerate, numpy, scipy,
# pyarrow, safetensors, tokenizers, jinja2, matplotlib, pybind11 and tqdm, wheels in PYTHONPATH,
# unpacked: pytorch_optimizer, for b peft, for d trl and what it imports of datasets:
#     pip download --no-deps --python-version 3.12 --only-binary :all: -d wheels \
#         pytorch_optimizer==4.1.0 peft==0.21.2 trl==1.16.0 datasets==5.2.0 dill==0.4.1 \
#         multiprocess==0.70.19
#     for wheel in wheels/*.whl; do unzip -qo $wheel -d packages; done
set -uo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PAIRWISE_COMMAND="bash benchmarks/card.sh${*:+ $*}"
END=$((SECONDS + ${MINUTES:-9} * 60 - 10)) # A part that is stopped takes seconds to go.
if [ -z "${PYTHON:-}" ]; then
    PYTHON=$ROOT/.venv/bin/python
    [ -x "$PYTHON" ] || PYTHON=python3
fi

# Seconds that a part is expected to take on an H100 with an 8B base (base, a1 and f have been
# measured), and those after which it is stopped.
declare -A TAKES=([base]=35 [a1]=160 [a2]=160 [b1]=90 [b2]=60 [c]=60 [f]=60 [e]=90 [l]=140 [d]=200)
declare -A LIMIT=([base]=120 [a1]=200 [a2]=200 [b1]=120 [b2]=110 [c]=120 [f]=90 [e]=180 [l]=180)
LIMIT[d]=300
parts=() flags=(--out "${OUT:-$ROOT/benchmarks}" ${GIB:+--gib "$GIB"})
for word in "$@"; do
    case $word in
        a) parts+=(a1 a2) ;;
        b) parts+=(b1 b2) ;;
        [cdefl] | [ab][12]) parts+=("$word") ;;
        --small) flags+=(--small) && for part in "${!TAKES[@]}"; do TAKES[$part]=20; done ;;
        *) echo "card.sh: error: $word found, parts (a b c d e f l) or --small expected" >&2; exit 2 ;;
    esac
done
[ ${#parts[@]} -gt 0 ] || parts=(a1 c b2 e f d a2 b1 l)

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
    if [ "$left" -lt "${TAKES[$part]}" ]; then
        words="about ${TAKES[$part]} seconds needed, $left left of ${MINUTES:-9} minutes"
        card -- --ended skipped "$words"
        continue
    fi
    code=0 begun=$SECONDS
    card timeout -k 10 "$limit" -- || code=$? status=1
    case $code in
        0 | 1) ;; # It has said so itself.
        124) card -- --ended failed "out of time: stopped after $limit seconds" ;;
        137) # Also what is inside a call of the driver when time is up, and does not stop.
            words="killed, as where memory runs out"
            [ $((SECONDS - begun)) -lt "$limit" ] ||
                words="out of time: killed after $limit seconds"
            card -- --ended failed "$words" ;;
        *) card -- --ended failed "exit code $code" ;;
    esac
done
exit $status
