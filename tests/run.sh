#!/usr/bin/env bash
# Set up a virtual environment in .venv and pass the tests. Needs Python >= 3.10 with venv and pip; g++ for the fused ops.
# With --quick: a minute's part of the tests, in the environment that is there.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
[ -x .venv/bin/python ] || "$python" -m venv .venv
if [[ " $* " != *" --quick "* ]] || [ ! -x .venv/bin/pytest ]; then
  # torch first, by itself, so that pip settles on the pinned wheel before anything else asks for it.
  .venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
  .venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
fi
export PATH="$PWD/.venv/bin:$PATH" DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
# Ops of this venv only: in the folder that all share, those of another venv would be compiled again, and another job's lock would stop this run.
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$PWD/.venv/torch_extensions}
build=""
if [[ " $* " != *" --quick "* ]]; then
  MAX_JOBS=1 python -m tests.build_ops >/dev/null 2>&1 &
  build=$!
fi
ruff check .
ruff format --check .
mypy
[ -z "$build" ] || wait "$build" || true
# Two workers, as ranks take turns; on a GPU only one, as they would share it.
workers=${WORKERS:-2}
[ "$DS_ACCELERATOR" = cpu ] || workers=0
exec python -m pytest -n "$workers" --dist worksteal "$@"
