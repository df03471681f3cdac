#!/usr/bin/env bash
# Set up a virtual environment in .venv and run the main job: MiniLM-L6 on a few BBC news articles, vanilla fine-tuning
# against ChildTuning-D, ZeRO-3. Two CPU ranks with gloo, or every GPU there is. Needs Python >= 3.10 with venv and pip; no
# hub, no compiler. Further arguments go to launch/finetune.py, for example: --seed 1, --method ChildTuning-F.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
[ -x .venv/bin/python ] || "$python" -m venv .venv
# torch first and by itself, so that pip settles on the pinned wheel before anything else asks for it.
echo "Installing into .venv, if anything is missing"
.venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
.venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo]"
echo "Training twice: plain fine-tuning, then the child"
export PATH="$PWD/.venv/bin:$PATH"
ranks=(--num_gpus 2)
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then ranks=(); else export DS_ACCELERATOR=cpu; fi
exec deepspeed --quiet "${ranks[@]}" launch/finetune.py --compare --batch-size 4 --epochs 12 --lr 0.0002 "$@"
