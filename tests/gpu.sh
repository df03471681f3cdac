#!/usr/bin/env bash
# What one GPU can show in nine minutes: what is installed, a selected suite, memory and time of a large model, the largest model.
#
#   bash tests/gpu.sh                      # one JSON and one table; both also in gpu-results/
#   bash tests/gpu.sh --seconds 300 --out FOLDER --only suite
#   DS_ACCELERATOR=cpu bash tests/gpu.sh --tiny
#
# It uses the Python that is there (PYTHON=... for another one) and no package index. Wheels of what is missing, such as deepspeed, may lie
# in the folder .whl (WHEELS=... for another one): pip wheel --no-deps -w .whl deepspeed==0.19.8 hjson py-cpuinfo
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
wheels=${WHEELS:-.whl}
if compgen -G "$wheels/*.whl" > /dev/null; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
"$python" -m tests.gpu "$@"
