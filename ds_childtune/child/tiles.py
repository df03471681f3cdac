"""How much of a large tensor is worked on at once."""

from __future__ import annotations

import torch


def tile_of(device: torch.device) -> int:
    """Elements. On a CPU a few buffers of that size stay in its caches; a device wants few kernels, and has room for such buffers."""
    return 1 << 20 if device.type == "cpu" else 1 << 24
