"""Compile the ops of DeepSpeed that the tests use, as `tests/run.sh` does beside the linters.

Each takes most of a minute on first use, within the test that happens to be first. What cannot be compiled is left to that test.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor

from deepspeed.accelerator import get_accelerator

from launch.op_builds import abandoned_locks

BUILDERS = ("CPUAdamBuilder", "FusedAdamBuilder", "CPULionBuilder", "CPUAdagradBuilder")


def remove_abandoned_locks() -> None:
    """A run that was killed while it loaded an op must not stop this one."""
    for lock in abandoned_locks():
        lock.unlink(missing_ok=True)


def build(name: str) -> None:
    with contextlib.suppress(Exception):
        get_accelerator().create_op_builder(name).load(verbose=False)


if __name__ == "__main__":
    remove_abandoned_locks()
    with ThreadPoolExecutor(2) as executor:
        list(executor.map(build, BUILDERS))
