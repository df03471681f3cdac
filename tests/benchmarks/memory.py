"""What a process holds: live tensor storages, resident memory, and its peak since the last phase."""

from __future__ import annotations

import ctypes
import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
GIB = 1 << 30


def status(field: str) -> int:
    """Bytes of one of Linux's fields: VmRSS is resident now, VmHWM its highest since the last reset."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def resident() -> int:
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return status("VmRSS")


def live_storages() -> int:
    """Bytes of every tensor storage that Python can reach, each counted once."""
    sizes: dict[int, int] = {}
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for thing in gc.get_objects():
            if isinstance(thing, torch.Tensor) and thing.layout == torch.strided and not thing.is_meta:
                storage = thing.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


class Timeline:
    """Peak and resting memory of each phase, above what the process held when the timeline began. Bytes."""

    def __init__(self) -> None:
        self.base = resident()
        self.base_live = live_storages()
        self.peaks: dict[str, int] = {}
        self.resident: dict[str, int] = {}
        self.live: dict[str, int] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        reset_peak()
        yield
        self.peaks[name] = status("VmHWM") - self.base
        self.resident[name] = resident() - self.base
        self.live[name] = live_storages() - self.base_live


def reset_peak() -> None:
    CLEAR.write_text("5")
