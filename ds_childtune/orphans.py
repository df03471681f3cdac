"""End with the launcher: no rank trains on when the `deepspeed` command has ended.

On one node, a SIGTERM to `deepspeed` ends only that process; the one that it started to look after the ranks, and the ranks, would
train on as orphans. In a container, or from a scheduler, it is `deepspeed` that gets the signal.
"""

from __future__ import annotations

import os
import signal
import threading
import time

import psutil

_SECONDS = 1.0
"""Between two looks."""


def end_with_launcher() -> None:
    """Watch over the `deepspeed` launcher from a thread. Does nothing in a process that was not started by it."""
    keeper = psutil.Process(os.getppid())
    try:
        starter = keeper.parent()
        words = " ".join(keeper.cmdline()), " ".join(starter.cmdline() if starter is not None else [])
    except psutil.Error:
        return
    if starter is not None and "deepspeed.launcher.launch" in words[0] and "deepspeed" in words[1]:
        threading.Thread(target=_watch, args=(keeper, starter.pid), daemon=True, name="end_with_launcher").start()


def _watch(keeper: psutil.Process, starter: int) -> None:
    """`keeper` looks after this node's ranks, and ends them when it is asked to; the process `starter` started it."""
    try:
        # A process whose parent has ended belongs to another one.
        while os.getppid() == keeper.pid and keeper.ppid() == starter:
            time.sleep(_SECONDS)
        keeper.terminate()
    except psutil.Error:
        pass
    os.kill(os.getpid(), signal.SIGTERM)
