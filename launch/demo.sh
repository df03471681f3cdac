#!/usr/bin/env bash
# Set up a virtual environment in .venv and run the main job: MiniLM-L6 on a few BBC news articles, vanilla fine-tuning
# against ChildTuning-D, ZeRO-3. Two CPU ranks with gloo, or every GPU there is. Needs Python >= 3.10 with venv and pip; no
# hub, no compiler. Further arguments go to launch/finetune.py, for example: --seed 1, --method ChildTuning-F.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/venv.sh
echo "Training twice: plain fine-tuning, then the child"
exec deepspeed --quiet "${ranks[@]}" launch/finetune.py --compare --batch-size 4 --epochs 12 --lr 0.0002 "$@"
