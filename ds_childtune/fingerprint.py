"""Which base model a child belongs to: a number for each parameter, over the elements outside the child.

Those never move, so a tuned model has the fingerprint of its base model. It is a sum over elements, modulo 2**64, of

    bits(value) * key(index in the parameter)

with odd keys, so any single other value changes it, and shards add theirs up in any order. It notices mistakes, not forgeries.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TILE = 1 << 16
"""Elements whose int64 temporaries fit into cache."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(values: Tensor) -> Tensor:
    """The same elements as integers, so that NaN equals itself and 0.0 is not -0.0."""
    return values.view(_BITS[values.element_size()])


def fingerprint(values: Tensor, start: int, inside: Tensor | None) -> int:
    """A share of a parameter's fingerprint; add them up with `total`.

    Args:
        values: 1-D, the parameter's elements from `start` on.
        inside: bool like `values`, True = inside the child, left out; None leaves out nothing.
    """
    result = 0
    for first in range(0, values.numel(), _TILE):
        tile = bits(values[first : first + _TILE]).long()
        if inside is not None:
            tile = tile.masked_fill(inside[first : first + _TILE], 0)
        result += int((tile * _keys(start + first, tile)).sum())
    return signed(result)


def signed(number: int) -> int:
    """The same number modulo 2**64, as int64 has it."""
    return (number + 2**63) % 2**64 - 2**63


def text(number: int) -> str:
    """16 hexadecimal digits."""
    return f"{number % 2**64:016x}"


def _keys(start: int, like: Tensor) -> Tensor:
    """int64: an odd number for each index; the multiplications overflow on purpose."""
    key = torch.arange(start, start + like.numel(), device=like.device)
    for factor in (-0x61C8864680B583EB, -0x40A7B892E31B1A47):
        key = (key + 1) * factor
        key ^= key >> 29
    return key | 1
