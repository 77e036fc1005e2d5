#!/usr/bin/env bash
# The method, stage by stage: votes -> data -> K times (train a reward model on the residual, refit the weights) -> metrics and report.
set -eo pipefail

usage() {
    cat <<'END'
bash run_all.sh [DATASET|FILE] [K] [flags]        default: demo 4

  DATASET   demo: a simulated population with known truth and its own tiny Llama; about 3 minutes on 2 cores
            multipref, personalllm, helpsteer2, tldr: the paper's, from the hub or --source PATH, with Llama-3-8B
  FILE      your votes, .jsonl .json .csv .parquet, also .gz; one comparison a row: prompt, response_a, response_b and
            votes_a, votes_b (ties) | p, n | choice; needs --base. See the README and data_prep/votes.py --help
  K         members of the ensemble, 1 to 99

  --run DIR            run directory (default runs/DATASET; for a file, runs/ and its stem)
  --base NAME_OR_DIR   base model: hub id or transformers directory with a chat template, or with --chat-template FILE
  --seed S             of the training (default 0)
  --data-seed S        of the data: population, split, orientation (default 0)
  --gpus N             train on N GPUs of this machine, by torchrun (default 1); without GPUs, N processes on the CPU
  --continuations N    sample continuations for each of N prompts, for the diversity measurement: 100, demo 20
                       (default: a FILE 0; demo 10 test prompts; the paper's 50 of PRISM, tldr test prompts)
                       --temperature X  --top-p X  --max-tokens N: of their sampling
  --joint              train all K members at once, on the error of their mixture (train_joint.py --help)
  --early-stop[=N]     train no further member once the last N (1) did not lower the Brier score on the validation
                       prompts, which --valid-share makes (demo: .1 as it is); K is then the largest size
  data flags           --ties drop|half  --test-share X  --valid-share X  --min-votes 1|2
                       FILE: --votes sampled|population|dependent    demo: --prompts N  --responses N  --texts N
                       the paper's: --source PATH  --prism-source PATH  --revision R  --beaver published|negated
                       --annotators zip|cross|preference  --cnndm drop|keep    (data_prep/NAME.py --help)
  any other flag       of train_rm.py: --train full|lora|head  --target p|residual|centered|mixture  --lr X  --epochs N
                       --loss mse|bce|bt|margin, of which the last two are for K = 1 or --target p  --pairs-per-step N
                       --dtype bfloat16|float32  --threads N ... (train_rm.py --help; --joint: train_joint.py --help)

Finished stages are skipped; a larger K continues the run (not with --joint); other arguments need another --run.
PYTHON=/path/to/python uses an environment of your own. The result is RUN/report.html and RUN/metrics.json.
END
}

fail() {
    echo "run_all.sh: error: $1" >&2
    exit 2
}

# ---- arguments -------------------------------------------------------------------------------------------------------------------
COMMAND='bash run_all.sh' QUOTED="'\\''"
for word in "$@"; do # quoted as any POSIX shell reads it
    case $word in *[!A-Za-z0-9_./=:,@%+-]* | '') word="'${word//\'/$QUOTED}'" ;; esac
    COMMAND+=" $word"
done
EVERYWHERE=() # flags of every stage that runs a model
WORDS=() DATA=() TRAIN=() RUN='' BASE='' CONTINUATIONS='' DATA_SEED=0 PRISM=() SAMPLING=() GPUS=1 STOP=() JOINT=0
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --plan) fail "--plan is train_rm.py's: python train_rm.py --plan --base llama-3-8b" ;;
        --early-stop | --early-stop=*) STOP=("$1"); shift; continue ;; # has a value only with =, so that the next word can be K
        --joint) JOINT=1; shift; continue ;;
        --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}"; continue ;;
        --*) [[ $# -ge 2 && $2 != --* ]] || fail "$1 needs a value" ;;
        *) WORDS+=("$1"); shift; continue ;;
    esac
    case $1 in
        --run) RUN=$2 ;;
        --base) BASE=$2 ;;
        --data-seed) DATA_SEED=$2 ;;
        --gpus) GPUS=$2 ;;
        --continuations) CONTINUATIONS=$2 ;;
        --source | --revision | --ties | --min-votes | --test-share | --valid-share | --votes | --beaver | --annotators | --cnndm) DATA+=("$1" "$2") ;;
        --prompts | --responses | --texts) DATA+=("$1" "$2") ;;
        --temperature | --top-p | --max-tokens) SAMPLING+=("$1" "$2") ;;
        --prism-source) PRISM=(--source "$2") ;;
        --threads | --device | --chat-template) EVERYWHERE+=("$1" "$2") TRAIN+=("$1" "$2") ;;
        --iteration | --export | --k | --from) fail "$1 is the training's own; run_all.sh sets it, or the scripts are called by hand" ;;
        *) TRAIN+=("$1" "$2") ;;
    esac
    shift 2
done
[ ${#WORDS[@]} -le 2 ] || fail "'${WORDS[2]}' found, at most a data set and K expected"
DATASET=${WORDS[0]:-demo} K=${WORDS[1]:-4}
[[ $K =~ ^[1-9][0-9]?$ ]] || fail "K = '$K' found, a number from 1 to 99 expected"
[[ $DATA_SEED =~ ^[0-9]+$ ]] || fail "--data-seed '$DATA_SEED' found, a number of at least 0 expected"
[[ "${STOP[*]}" =~ ^(|--early-stop|--early-stop=[1-9][0-9]*)$ ]] || fail "$STOP found, --early-stop or --early-stop=N with N of at least 1 expected"
[[ $CONTINUATIONS =~ ^(|0|[1-9][0-9]*)$ ]] || fail "--continuations '$CONTINUATIONS' found, a number of at least 0 expected"
[[ $GPUS =~ ^[1-9][0-9]*$ ]] || fail "--gpus '$GPUS' found, a number of at least 1 expected"
[[ $GPUS = 1 || " ${TRAIN[*]} " != *" --train head "* ]] || fail "--gpus is for all parameters; --train head runs on one"

[[ $JOINT = 0 || $GPUS = 1 && ${#STOP[@]} = 0 ]] || fail "--joint trains all members at once, on one GPU: without --gpus and --early-stop"

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[[ $DATASET = demo || ! -f $DATASET || $DATASET = */* ]] || DATASET=./$DATASET # a file that is there is a file, whatever its ending
case $DATASET in
    demo)
        PREPARE=demo NAME=demo
        TRAIN=(--threads 2 --dtype float32 "${TRAIN[@]}")
        [[ $JOINT = 1 && " ${TRAIN[*]} " = *" --train head "* ]] || TRAIN=(--lr 3e-3 "${TRAIN[@]}")
        EVERYWHERE=(--threads 2 "${EVERYWHERE[@]}")
        CONTINUATIONS=${CONTINUATIONS:-10} COUNT=20 SAMPLING=(--top-p 0.9 "${SAMPLING[@]}") ;; # of its tiny base the whole vocabulary is noise
    multipref | personalllm | helpsteer2 | tldr)
        PREPARE=$DATASET NAME=$DATASET
        case $DATASET in # the paper names neither; for TL;DR it took a model that RLHF had been through
            tldr) BASE=${BASE:-OpenRLHF/Llama-3-8b-rlhf-100k} ;;
            *) BASE=${BASE:-OpenRLHF/Llama-3-8b-sft-mixture} ;;
        esac
        # 263,256 pairs: 523 steps of 512; at 64 the optimizer would take most of the time
        [[ $DATASET != personalllm || " ${TRAIN[*]} " = *" --train head "* ]] || TRAIN=(--pairs-per-step 512 --precondition-frequency 10 "${TRAIN[@]}")
        CONTINUATIONS=${CONTINUATIONS:-50} COUNT=100 ;;
    */* | *.jsonl | *.json | *.csv | *.parquet | *.gz)
        PREPARE=votes NAME=$(basename "$DATASET" .gz) NAME=${NAME%.*}
        DATA=(--source "$DATASET" "${DATA[@]}")
        CONTINUATIONS=${CONTINUATIONS:-0} COUNT=100
        [[ " ${DATA[*]:2} " != *" --source "* ]] || fail "$DATASET is the file; --source is for multipref, personalllm, helpsteer2 and tldr"
        [ -n "$BASE" ] || fail "$DATASET: a file of your own needs --base NAME_OR_DIR, the model to start from" ;;
    *) fail "unknown data set '$DATASET'; demo, multipref, personalllm, helpsteer2, tldr, or a file ending in .jsonl, .json, .csv or .parquet (also .gz) expected" ;;
esac
if [ ${#PRISM[@]} -gt 0 ]; then
    [[ $DATASET =~ ^(multipref|personalllm|helpsteer2)$ && $CONTINUATIONS != 0 ]] || fail "--prism-source is given, but no PRISM prompts are needed"
fi
if [ ${#STOP[@]} -gt 0 ]; then
    VALID=$([ "$DATASET" = demo ] && echo .1 || echo 0)
    for ((i = 0; i < ${#DATA[@]}; i += 2)); do [ "${DATA[i]}" != --valid-share ] || VALID=${DATA[i + 1]}; done
    [[ $VALID = *[1-9]* ]] || fail "--early-stop needs validation prompts, which nothing is trained on: --valid-share 0.1, say"
fi
RUN=${RUN:-runs/$NAME}
BASE=${BASE:-$RUN/base}

source "$ROOT/pairwise/environment.sh"
export PAIRWISE_COMMAND=$COMMAND
TRAINER=("$PYTHON") # -- as torchrun would take --run for a flag of its own
[ "$GPUS" = 1 ] || TRAINER=(env OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$GPUS" --)
stage() { "$PYTHON" "$ROOT/$1" --run "$RUN" "${@:2}"; }
# The training flags are tried first: a wrong one fails before anything runs.
SCRIPT=(train_rm --iteration "$K")
[ $JOINT = 0 ] || SCRIPT=(train_joint --k "$K")
"$PYTHON" - "$ROOT" "${SCRIPT[@]}" --run "$RUN" --base "$BASE" "${TRAIN[@]}" <<'END'
import sys
root = sys.argv.pop(1)
sys.path[:0] = [root, f"{root}/extras"]
sys.argv[0] = f"{sys.argv[1]}.py"
__import__(sys.argv.pop(1)).parse_args()
END

# ---- data: prompts, distinct responses, pairs with their votes; the demo's base model too ------------------------------------------
stage "data_prep/$PREPARE.py" --seed "$DATA_SEED" "${DATA[@]}"

# ---- continuations: sampled once from the base, ranked by every member (figure 3) ----------------------------------------------------
if [ "$CONTINUATIONS" != 0 ]; then
    case $DATASET in multipref | personalllm | helpsteer2) stage data_prep/prism.py --count "$CONTINUATIONS" --seed "$DATA_SEED" "${PRISM[@]}" ;; esac
    stage data_prep/continuations.py --base "$BASE" --prompts "$CONTINUATIONS" --count "$COUNT" --seed "$DATA_SEED" "${SAMPLING[@]}" "${EVERYWHERE[@]}"
fi

# ---- forward stagewise additive modelling: member j on what members 1..j-1 leave over, then the weights of all j ----------------------
if [ $JOINT = 1 ]; then # or all members at once, on the error of their mixture
    stage extras/train_joint.py --k "$K" --base "$BASE" "${TRAIN[@]}"
    [[ " ${TRAIN[*]} " = *" --weights learned "* ]] || stage fit_weights.py
fi
for ((j = 1; j <= K && !JOINT; j++)); do
    "${TRAINER[@]}" "$ROOT/train_rm.py" --run "$RUN" --iteration "$j" --base "$BASE" "${TRAIN[@]}"
    stage fit_weights.py "${STOP[@]}" || {
        CODE=$?
        [ $CODE = 3 ] || exit $CODE # 3: --early-stop, and no member was worth training after those that are there
        [ -e "$RUN/rewards/$(printf %02d $((j + 1)))_test.npy" ] || break # those are gone through, as one may have been killed while it scored continuations
    }
done

if [ -e "$RUN/rewards/$(printf %02d $((K + 1)))_test.npy" ]; then
    echo "$RUN holds more than K = $K members from before; the report covers them all, and its row k = $K is what was asked for"
fi

# ---- metrics, figures, report ---------------------------------------------------------------------------------------------------------
stage evaluate.py
