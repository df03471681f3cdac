"""A mask as bits, the lowest of a byte first, and back: an eighth of a byte for each element, whatever the child is."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from ds_childtune.child.child_shard import put_

INDEX = 4
"""Bytes of an element of the child in an index, which is smaller where the child is thin."""


def byte_count(numel: int) -> int:
    """Of the bits of `numel` elements."""
    return -(-numel // 8)


def bits_of(index: Tensor, numel: int) -> Tensor:
    """uint8 [byte_count(numel)], of the elements at `index`."""
    mask = torch.zeros(8 * byte_count(numel), dtype=torch.uint8, device=index.device)
    put_(mask, index, torch.ones_like(index, dtype=torch.uint8))
    return mask.view(-1, 8).bitwise_left_shift_(_shifts(index.device)).sum(-1, dtype=torch.uint8)


def places_of(bits: Tensor, numel: int, count: int) -> Tensor:
    """int64 [count]: where the bits are 1, ascending; without a wait for the device.

    Args:
        bits: uint8 [rows, byte_count(numel)]. Rows follow one another, `numel` elements each.
        count: of those that are 1.
    """
    # Eight bools for each byte, which is an eighth of the work of shifting bits.
    mask = _bools(bits.device).index_select(0, bits.flatten().int()).view(torch.bool).view(len(bits), -1)
    mask = mask[:, :numel].reshape(-1)
    if mask.device.type == "cpu":  # where nothing waits, and numpy takes a third of the time
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return torch.nonzero_static(mask, size=count).view(-1)


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


@functools.cache
def _bools(device: torch.device) -> Tensor:
    """int64 [256]: each byte's bits as eight bools, the lowest first."""
    bits = torch.arange(256, dtype=torch.uint8, device=device).unsqueeze(1).bitwise_right_shift(_shifts(device))
    return bits.bitwise_and_(1).view(torch.int64).view(-1)
