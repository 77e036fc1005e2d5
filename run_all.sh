#!/usr/bin/env bash
# The method: votes -> data -> K times (train on the residual, refit the weights) -> report.
#     bash run_all.sh [DATASET|FILE] [K] [flags]          (default: demo 4; --help lists the flags)
set -eo pipefail

method() {
    # ---- data: prompts, their responses, pairs with votes; for the demo its base model too
    stage "data_prep/$SCRIPT.py" --seed "$SEED" "${DATA[@]}"

    # ---- continuations: sampled once from the base, ranked by every member (figure 3)
    if [ "$PROMPTS" != 0 ]; then
        [ $FROM = test ] || stage data_prep/prism.py --count "$PROMPTS" --seed "$SEED" "${PRISM[@]}"
        stage data_prep/continuations.py --base "$BASE" --prompts "$PROMPTS" --count "$TEXTS" \
            --seed "$SEED" "${SAMPLING[@]}" "${MODEL[@]}"
    fi

    # ---- forward stagewise additive modelling: member j is trained on what members 1 to j-1 leave
    # over, then the weights of all j are refitted; or --joint trains all members at once
    for ((j = 1; j <= K && !JOINT; j++)); do
        "${TRAINER[@]}" "$ROOT/train_rm.py" --run "$RUN" --iteration $j --base "$BASE" "${TRAIN[@]}"
        stage fit_weights.py $STOP && STATUS=0 || STATUS=$?
        # 3 says that --early-stop wants no member after those that are there. The loop still goes
        # through these, as one of them may have been killed while it scored continuations.
        [[ $STATUS = [03] ]] || exit $STATUS
        [ $STATUS = 0 ] || is_trained $((j + 1)) || break
    done
    if [ $JOINT = 1 ]; then
        stage extras/train_joint.py --k "$K" --base "$BASE" "${TRAIN[@]}"
        [[ " ${TRAIN[*]} " = *" --weights learned "* ]] || stage fit_weights.py
    fi

    # ---- metrics, figures, report
    ! is_trained $((K + 1)) || echo "$RUN holds more than K = $K members from before;" \
        "the report covers them all, and its row k = $K is what was asked for"
    stage evaluate.py
}

# What a data set brings. The paper names no base; for TL;DR it took one that had been through RLHF.
# PersonalLLM's 263,256 pairs are 523 steps of 512; at 64 the optimizer would take most of the time.
# script: base model, prompts x continuations, where the prompts are from, flags of the training
DEFAULTS='
demo        RUN/base                        10 20  test  --lr 3e-3
multipref   OpenRLHF/Llama-3-8b-sft-mixture 50 100 prism
personalllm OpenRLHF/Llama-3-8b-sft-mixture 50 100 prism --pairs-per-step 512 --precondition-frequency 10
helpsteer2  OpenRLHF/Llama-3-8b-sft-mixture 50 100 prism
helpsteer3  OpenRLHF/Llama-3-8b-sft-mixture 50 100 prism
tldr        OpenRLHF/Llama-3-8b-rlhf-100k   50 100 test
ukpconvarg1 --base                          0  100 test
binary      --base                          0  100 test  --loss bt
votes       --base                          0  100 test'

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
stage() { "$PYTHON" "$ROOT/$1" --run "$RUN" "${@:2}"; }
is_trained() { [ -e "$RUN/rewards/$(printf %02d "$1")_test.npy" ]; }
fail() { echo "run_all.sh: error: $*" >&2; exit 2; }
needs() { [[ -n $BASE && " ${DATA[*]} " = *" $1 "* ]] || fail "$DATASET needs $1, $2, and --base, a model"; }
expect() { [[ $1 =~ ^($2)$ ]] || fail "$3 found, $4 expected"; }

# ---- arguments: of the data, the sampling, all that runs a model; any other is the training's
COMMAND='bash run_all.sh' QUOTED="'\\''"
for word in "$@"; do # quoted as any POSIX shell reads it
    case $word in *[!A-Za-z0-9_./=:,@%+-]* | '') word="'${word//\'/$QUOTED}'" ;; esac
    COMMAND+=" $word"
done
WORDS=() DATA=() PRISM=() SAMPLING=() MODEL=() TRAIN=() GPUS=1 JOINT=0 HEAD=0
RUN='' BASE='' PROMPTS='' VALID='' STOP='' SEED=0
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) exec cat "$ROOT/docs/run_all.txt" ;;
        --iteration | --k) fail "$1 is set by run_all.sh, or the scripts are called by hand" ;;
        --joint) JOINT=1; shift; continue ;;
        --accept-edited) fail "$1 is a flag of the stages: evaluate.py --run RUN $1, say" ;;
        --early-stop | --early-stop=*) STOP=$1; shift; continue ;; # the next word can be K
        --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}"; continue ;;
        --*) [[ -n $2 && $2 != --* ]] || fail "$1 needs a value" ;;
        '') fail "an empty word found, a data set, K or a flag expected" ;;
        *) WORDS+=("$1"); shift; continue ;;
    esac
    case $1 in
        --run) RUN=$2 ;;
        --base) BASE=$2 ;;
        --data-seed) SEED=$2 ;;
        --gpus) GPUS=$2 ;;
        --continuations) PROMPTS=$2 ;;
        --prism-source) PRISM=(--source "$2") ;;
        --valid-share) VALID=$2 DATA+=("$1" "$2") ;;
        --source | --revision | --ties | --min-votes | --test | --test-share | --votes | --repeated | \
            --beaver | --annotators | --cnndm | --prompts | --responses | --texts) DATA+=("$1" "$2") ;;
        --temperature | --top-p | --max-tokens) SAMPLING+=("$1" "$2") ;;
        --threads | --device | --chat-template | --date) MODEL+=("$1" "$2") ;;
        *) TRAIN+=("$1" "$2") ;;
    esac
    shift 2
done
[ ${#WORDS[@]} -le 2 ] || fail "'${WORDS[2]}' found, at most a data set and K expected"
DATASET=${WORDS[0]:-demo} K=${WORDS[1]:-4} SCRIPT=$DATASET NAME=$DATASET
[[ " ${TRAIN[*]} " != *" --train head "* ]] || HEAD=1
expect "$K" '[1-9][0-9]?' "K = '$K'" "a number from 1 to 99"
expect "$SEED" '[0-9]+' "--data-seed '$SEED'" "a number of at least 0"
expect "$PROMPTS" '(0|[1-9][0-9]*)?' "--continuations '$PROMPTS'" "a number of at least 0"
expect "$GPUS" '[1-9][0-9]*' "--gpus '$GPUS'" "a number of at least 1"
expect "$STOP" '(--early-stop(=[1-9][0-9]*)?)?' "$STOP" "--early-stop or --early-stop=N, N > 0,"
[[ $GPUS = 1 || $HEAD = 0 ]] || fail "--gpus is for all parameters; --train head runs on one"
[[ $JOINT = 0 || $GPUS$STOP = 1 ]] || fail "--joint runs on one GPU, and without --early-stop"
[[ $DATASET = demo || $DATASET = */* || ! -f $DATASET && $DATASET != -* ]] ||
    DATASET=./$DATASET # whatever its ending and its first letter
case $DATASET in
    demo) # its base is tiny: one thread is enough, and the tail of what it says is noise
        [ -n "$OMP_NUM_THREADS" ] || MODEL=(--threads 1 "${MODEL[@]}")
        VALID=${VALID:-0.1}
        SAMPLING=(--top-p 0.9 "${SAMPLING[@]}") TRAIN=(--dtype float32 "${TRAIN[@]}") ;;
    ukpconvarg1) needs --source "a clone of its repository" ;;
    webgpt | hh | summarize | gptj) needs --test "a file of pairs with several votes"
        SCRIPT=binary DATA=(--set "$DATASET" "${DATA[@]}") K=${WORDS[1]:-1} ;; # bt has no residual
    */* | *.jsonl | *.json | *.csv | *.parquet | *.gz)
        SCRIPT=votes NAME=$(basename -- "$DATASET" .gz) NAME=${NAME%.*}
        [[ $NAME = *[!.]* ]] || fail "'$DATASET' found, a file with a name before its ending expected"
        [[ " ${DATA[*]} " != *" --source "* ]] || fail "--source is for published data, not $DATASET"
        [ -n "$BASE" ] || fail "$DATASET: a file of your own needs --base, the model to start from"
        DATA=(--source "$DATASET" "${DATA[@]}") ;;
    *) [[ $DEFAULTS = *$'\n'"$DATASET "* && $DATASET != binary && $DATASET != votes ]] ||
        fail "unknown data set '$DATASET'; demo, multipref, personalllm, helpsteer2, helpsteer3, tldr, webgpt, hh," \
        "summarize, gptj, ukpconvarg1, or a file ending in .jsonl, .json, .csv or .parquet (also .gz) expected" ;;
esac
read -r _ BASE_HERE PROMPTS_HERE TEXTS FROM FLAGS <<<"$(grep "^$SCRIPT " <<<"$DEFAULTS")"
RUN=${RUN:-runs/$NAME} BASE=${BASE:-${BASE_HERE/#RUN/"$RUN"}} PROMPTS=${PROMPTS:-$PROMPTS_HERE}
# of a data set that you added to DEFAULTS; the others are asked above
[ "$BASE" != --base ] || fail "$DATASET needs --base, the model to start from"
case $SCRIPT$JOINT$HEAD in demo11 | personalllm?1 | binary1?) FLAGS='' ;; esac # not for their --joint or head
TRAIN=("${MODEL[@]}" $FLAGS "${TRAIN[@]}")
[[ ${#PRISM[@]} = 0 || $FROM = prism && $PROMPTS != 0 ]] || fail "--prism-source: no PRISM prompt is needed"
[[ $PROMPTS != 0 || $DATASET = demo || ${#SAMPLING[@]} = 0 ]] ||
    fail "${SAMPLING[0]}: nothing is sampled; --continuations 50, say"
[[ -z $STOP || $VALID = *[1-9]* ]] || fail "$STOP needs validation prompts: --valid-share 0.1, say"

# ---- the environment, then the training's flags: a wrong one fails before anything runs
source "$ROOT/pairwise/environment.sh"
export PAIRWISE_COMMAND=$COMMAND
TRAINER=("$PYTHON") TRAINING=(train_rm.py --iteration "$K")
[ "$GPUS" = 1 ] || TRAINER=(env OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" "$PYTHON"
    -m torch.distributed.run --standalone --local-addr 127.0.0.1 # a name may not resolve
    --nproc-per-node "$GPUS" --) # -- as it has a --run itself
[ $JOINT = 0 ] || TRAINING=(extras/train_joint.py --k "$K")
stage "${TRAINING[@]}" --base "$BASE" "${TRAIN[@]}" --check
method
