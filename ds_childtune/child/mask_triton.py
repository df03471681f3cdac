"""ChildTuning-F's mask in one launch for a whole flat shard, on accelerators that have Triton.

A shard holds hundreds of fragments, each with its own keys. One launch for each would cost more than the masks, so the shard is cut
into blocks that lie in one fragment, and a table on the device says which. The arithmetic is that of `mask_kernels.py`, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton  # type: ignore[import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,unused-ignore]
from torch import Tensor

from ds_childtune.shards import Fragment

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of gradients. The product with the scale is taken in fp32, as torch takes it for these."""

BLOCK = 2048
"""Elements of a program, at most."""


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _mask_block(  # type: ignore[no-untyped-def]
    grad, places, table, keys, limit, scale, multiplier_1: tl.constexpr, multiplier_2: tl.constexpr, lanes: tl.constexpr
):
    block = tl.program_id(0)
    piece = tl.load(table + 3 * block)
    begin = tl.load(table + 3 * block + 1)
    size = tl.load(table + 3 * block + 2)
    lane = tl.arange(0, lanes)
    at = grad + tl.load(places + block) + lane
    value = tl.load(at, mask=lane < size)
    x = (begin + lane) * tl.load(keys + 2 * piece + 1) + tl.load(keys + 2 * piece)
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * multiplier_1
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * multiplier_2
    masked = tl.where(x <= limit, value.to(tl.float32) * scale, 0.0)
    tl.store(at, masked.to(value.dtype), mask=lane < size)


class TritonKernel:
    """Masks and rescales the gradient of one flat shard in place."""

    def __init__(self, pieces: Sequence[Fragment], device: torch.device, multipliers: tuple[int, int]) -> None:
        """
        Args:
            pieces: of the shard, from `split_blocks`.
            multipliers: of the generator's finaliser, as signed 32-bit integers.
        """
        numels = np.array([p.numel for p in pieces], dtype=np.int64)
        blocks = -(-numels // BLOCK)
        piece = np.repeat(np.arange(len(pieces)), blocks)
        begin = (np.arange(len(piece)) - np.repeat(blocks.cumsum() - blocks, blocks)) * BLOCK
        size = np.minimum(BLOCK, numels[piece] - begin)
        places = np.array([p.shard_start for p in pieces], dtype=np.int64)[piece] + begin
        self._places = torch.from_numpy(places).to(device)
        self._table = torch.from_numpy(np.stack([piece, begin, size], axis=1).astype(np.int32)).to(device)
        self._multipliers = multipliers

    def __call__(self, grad: Tensor, keys: Tensor, limit: int, scale: float) -> None:
        """`grad`: 1-D, laid out like the shard; `keys`: int32 [pieces, 2] from `step_keys`."""
        launch: Any = _mask_block[(len(self._places),)]
        launch(grad, self._places, self._table, keys, limit, scale, *self._multipliers, BLOCK)
