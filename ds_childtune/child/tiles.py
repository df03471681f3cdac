"""How much of a large tensor is worked on at once."""

from __future__ import annotations

import torch


def tile_of(device: torch.device) -> int:
    """Elements. On a CPU a few buffers of that size fit its caches; a device is faster with few kernels, and has the room."""
    return 1 << 20 if device.type == "cpu" else 1 << 24
