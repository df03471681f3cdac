# Sourced by the demos, in the repository's root: .venv with what they need, on PATH, and `ranks`, the launcher's options for this machine.
if ! .venv/bin/python -m pip --version > /dev/null 2>&1; then  # also after a start that was cut short, which leaves a python without pip
  python=${PYTHON:-python3}
  if ! "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2> /dev/null; then
    echo "expected Python 3.10 or newer with venv and pip, got $python: $("$python" --version 2>&1 || true)" \
      "Remedy: install it (on Debian: apt-get install python3-venv), or set PYTHON to another one." >&2
    exit 1
  fi
  "$python" -m venv .venv
fi
# torch first and by itself, so that pip settles on the pinned wheel before anything else asks for it.
echo "Installing into .venv what is missing: minutes without output"
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo]"
export PATH="$PWD/.venv/bin:$PATH"
ranks=(--num_gpus 2)
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then ranks=(); else export DS_ACCELERATOR=cpu; fi
