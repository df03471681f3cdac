"""Waits of the host for the device, where what comes next does not run behind the same stream."""

from __future__ import annotations

from deepspeed.accelerator import get_accelerator


def wait_for_this_stream() -> None:
    """Until all that this thread has handed to the device's current stream is done. On a CPU it is done already."""
    if not get_accelerator().resolves_data_dependency():
        get_accelerator().current_stream().synchronize()
