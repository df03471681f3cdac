"""Which base model a child belongs to: a number for each parameter, over the elements outside the child.

Those never move, so a tuned model has the fingerprint of its base model. It is a sum over elements, modulo 2**64, of

    bits(value) * key(index in the parameter)

with odd keys, so any single other value changes it, and shards add theirs up in any order. It notices mistakes, not forgeries.
A key is the product of one for the place in a tile and one for the tile, so that a tile costs a multiplication and a sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from ds_childtune.child.tiles import tile_of

_TILE = 1 << 15
"""Elements of a parameter whose int64 temporaries fit into cache. Part of the format."""

_FACTORS = (-0x61C8864680B583EB, -0x40A7B892E31B1A47)
"""Odd; the constants of splitmix64, as int64 has them."""

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
    device = values.device
    result = torch.zeros((), dtype=torch.int64, device=device)
    for first, last in _parts(start, start + values.numel(), tile_of(device)):
        found = bits(values[first - start : last - start])
        if inside is not None:
            found = found.masked_fill(inside[first - start : last - start], 0)
        tile, offset = divmod(first, _TILE)
        tiles = -(-(last - first) // _TILE)
        sums = (found.view(tiles, -1) * _keys(device)[offset : offset + found.numel() // tiles]).sum(1)
        # Other numbers than `_keys` mixes: the product must differ for place 1 of tile 0 and place 0 of tile 1.
        result += (sums * (_mixed(-1 - torch.arange(tile, tile + tiles, device=device)) | 1)).sum()
    return int(result)


def _parts(start: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    """Parts of a tile at both ends, and between them as many whole tiles at once as have `size` elements."""
    while start < end:
        whole = 0 if start % _TILE else (end - start) // _TILE * _TILE
        last = start + min(whole, size) if whole else min(start - start % _TILE + _TILE, end)
        yield start, last
        start = last


def signed(number: int) -> int:
    """The same number modulo 2**64, as int64 has it."""
    return (number + 2**63) % 2**64 - 2**63


def text(number: int) -> str:
    """16 hexadecimal digits."""
    return f"{number % 2**64:016x}"


@cache
def _keys(device: torch.device) -> Tensor:
    """int64 [_TILE]: an odd number for each place in a tile."""
    return (_mixed(torch.arange(_TILE)) | 1).to(device)


def _mixed(numbers: Tensor) -> Tensor:
    """int64: other numbers, without a pattern; the multiplications overflow on purpose."""
    for factor in _FACTORS:
        numbers = (numbers + 1) * factor
        numbers = numbers ^ (numbers >> 29)
    return numbers
