#!/usr/bin/env bash
# The second study's queue, in the order of docs/evidence_2.md: every prefix of it is a result. Stopped at any time, the same command goes on.
#
#     bash launch/study/evidence_2.sh DATA RESULTS
#
# DATA is what prepare_lm.py has written, with GLUE's rte, mrpc, stsb and cola beside it, RESULTS a folder of json lines. One job at a time.
set -u
cd "$(dirname "$0")/../.."
data=$1
results=$2

run() {  # GRID SEEDS [MORE OPTIONS]
    python launch/study/study.py run "launch/study/$1.yaml" --data "$data" --results "$results/$1.jsonl" --seeds "${@:2}"
}

lm() {  # METHODS SEEDS
    run lm "$2" --methods "$1"
}

controls="full,full x 0.5,full x 2,full x 0.2"
core="$controls,LoRA r=16,ChildTuning-D p=.05,contrast p=.05,random p=.05"
others="LoRA r=64,ChildTuning-D p=.1,LoRA r=8,ChildTuning-D p=.01,ChildTuning-D p=.3,ChildTuning-F p=.3,magnitude p=.05"

lm "$core" 1
lm "$others" 1
lm "$core,$others" 2
lm "$core,$others" 3
run regime 1,2,3,4,5
lm "$core,$others" 4
lm "$core,$others" 5
run bytes_glue 1,2,3
run flipped 1,2,3,4,5
run regime_cola 1,2,3,4,5
run regime 6,7,8,9,10
lm "DoRA r=16" 1,2,3
lm "contrast p=.05 x 0.2,ChildTuning-D p=.05 x 0.4" 1,2,3
run lm_instruct 1
