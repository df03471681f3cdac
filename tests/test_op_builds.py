"""Locks that a killed job leaves where ops are compiled."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from launch.op_builds import abandoned_locks, warn_of_abandoned_locks
from tests import build_ops

HOLD = """
import sys
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("holds", flush=True)
sys.stdin.read()
"""


def hold(lock: Path) -> subprocess.Popen[str]:
    """A process that has torch's lock, as while it compiles an op."""
    lock.parent.mkdir(parents=True)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "holds\n"
    return process


@pytest.mark.parametrize("by_device", [False, True], ids=["its own folder", "default folder"])
def test_the_lock_of_a_killed_job_is_named_and_its_remedy_frees_the_op(
    by_device: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = tmp_path / "py311_cpu" if by_device else tmp_path
    lock = folder / "cpu_adam" / "lock"
    process = hold(lock)
    assert not FileBaton(str(lock)).try_acquire(), "torch has no lock here"
    assert abandoned_locks() == [], "a job that compiles was said to be dead"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert lock.exists(), "a killed job leaves no lock, so there is nothing to test"
    assert abandoned_locks() == [lock]
    warn_of_abandoned_locks()
    said = capsys.readouterr().out
    assert str(lock) in said
    remedy = said.rpartition(": ")[2].split()
    assert remedy[0] == "rm"
    subprocess.run(remedy, check=True)
    assert FileBaton(str(lock)).try_acquire()


def test_the_tests_remove_what_a_killed_run_left_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    held, left = tmp_path / "cpu_lion" / "lock", tmp_path / "cpu_adam" / "lock"
    process = hold(held)
    left.parent.mkdir()
    os.close(os.open(left, os.O_CREAT | os.O_EXCL))
    build_ops.remove_abandoned_locks()
    assert held.exists()
    assert not left.exists()
    process.communicate()
