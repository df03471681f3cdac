"""Locks that a killed job has left where DeepSpeed compiles its ops: torch waits for such a lock without end and without a word."""

from __future__ import annotations

import os
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root


def abandoned_locks() -> list[Path]:
    """Locks in torch's folder of extensions that no process of this machine has open, as whoever compiles or loads an op has.

    A folder that several machines share may hold the lock of another one: this can't tell. Without /proc, none.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    locks = sorted(
        [*root.glob("*/lock"), *root.glob("*/*/lock")]
    )  # by default there is a folder for Python and device, too
    if not locks or not Path("/proc/self/fd").exists():
        return []
    held = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            held.add(os.readlink(link))
        except OSError:  # closed meanwhile
            continue
    return [lock for lock in locks if str(lock.resolve()) not in held]


def warn_of_abandoned_locks() -> None:
    """Prints a line for each, with what removes it."""
    for lock in abandoned_locks():
        print(
            f"WARNING: expected no lock of a job that has ended, got {lock}, which no process here has open. A job that is killed "
            "while DeepSpeed compiles or loads an op leaves one, and the next job that wants the op waits for it without end. "
            f"Remedy, unless another machine compiles it right now: rm {lock}",
            flush=True,
        )
