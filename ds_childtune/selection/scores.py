"""The scores of a fragment, in four bytes an element or in two.

[Note: e8m8]
Scores are never negative, so fp32's sign bit says nothing, and the upper 16 of the other 31 bits - eight of exponent, eight of
mantissa - are a format of fp32's whole range whose codes order like the scores. A sum kept in it would stop growing once its
terms are below 2**-9 of it, so every addition is rounded stochastically: up with the probability of what is cut off. The sum is then
right in expectation however many terms it has.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

TILE = 1 << 20
"""Elements that are worked on at a time, so that no temporary grows with the shard."""

_CUT_BITS = 15
"""Bits of fp32 that an e8m8 code lacks."""

_LARGEST = 0x7F7FFFFF
"""Bit pattern of the largest finite fp32 number."""

ScoreDtype = Literal["fp32", "e8m8"]


@dataclass(frozen=True)
class Scores:
    """The scores of one fragment: finite and >= 0."""

    name: str
    param_start: int
    """Index of the first element in the flattened parameter."""

    values: Tensor
    """1-D: fp32, or int16 with e8m8 codes. See [Note: e8m8]."""

    counted: bool = True
    """False where another rank counts the same elements."""

    def float(self) -> Tensor:
        """fp32 1-D."""
        if self.values.dtype == torch.float32:
            return self.values
        return _decode(self.values)

    def bit_tiles(self) -> Iterator[Tensor]:
        """int32 1-D, at most `TILE` elements each: fp32 bit patterns, which order like the scores."""
        for tile in self.values.split(TILE):
            yield tile.view(torch.int32) if tile.dtype == torch.float32 else _bits(tile)

    def float_tiles(self) -> Iterator[Tensor]:
        """fp32 1-D, at most `TILE` elements each."""
        for tile in self.values.split(TILE):
            yield tile if tile.dtype == torch.float32 else _decode(tile)

    def divide_(self, divisor: Scores, unit: builtins.float, eps: builtins.float) -> None:
        """self /= divisor / unit + eps, in place, for the same elements; in e8m8, rounded to the nearest code."""
        for tile, below in zip(self.values.split(TILE), divisor.float_tiles(), strict=True):
            below = below.div(unit).add_(eps)
            if tile.dtype == torch.float32:
                tile.div_(below)
            else:
                bits = _decode(tile).div_(below).view(torch.int32)
                tile.copy_((bits + (1 << (_CUT_BITS - 1))) >> _CUT_BITS)

    def reverse_order(self) -> None:
        """In place: turn finite scores >= 0 into other such scores in the opposite order, exactly."""
        if self.values.dtype == torch.float32:
            self.values.view(torch.int32).neg_().add_(_LARGEST)
        else:
            self.values.neg_().add_((_LARGEST >> _CUT_BITS) - (1 << 16))


def new_scores(numel: int, dtype: ScoreDtype, device: torch.device) -> Tensor:
    """1-D zeros: fp32, or int16 for e8m8 codes."""
    return torch.zeros(numel, dtype=torch.float32 if dtype == "fp32" else torch.int16, device=device)


class Rounding:
    """Random bits for stochastic rounding: one table, read from another place for each sum, so that a term costs no hashing.

    Which bits an element gets depends on its index in the parameter and on the term's number, not on how it is sharded.
    """

    def __init__(self, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        table = torch.randint(0, 1 << _CUT_BITS, (TILE,), dtype=torch.int32, generator=generator)
        self._table = torch.cat([table, table]).to(device)

    def bits(self, start: int, numel: int, term: int) -> Tensor:
        """int32 1-D below 2**15, for `numel` <= TILE elements of a parameter from `start` on."""
        # An odd multiplier that is far from any short cycle, so that successive terms read far from each other.
        return self._table.narrow(0, (start + term * 0x9E3779B1) % TILE, numel)

    def add_(self, scores: Scores, values: Tensor, weight: float, term: int, *, square: bool = False) -> None:
        """scores += weight * values, or weight * values ** 2, in e8m8; `values` is 1-D floating, and what is added >= 0."""
        begin = 0
        for codes, value in zip(scores.values.split(TILE), values.split(TILE), strict=True):
            added = value.float()
            total = _decode(codes).add_(added * added if square else added, alpha=weight).view(torch.int32)
            # NaN and inf stay what they are: adding to their bits could carry into the sign.
            finite = total < _LARGEST - (1 << _CUT_BITS)
            total += self.bits(scores.param_start + begin, codes.numel(), term) * finite
            codes.copy_(total >> _CUT_BITS)
            begin += codes.numel()


def _bits(codes: Tensor) -> Tensor:
    """fp32 bit patterns, int32, of int16 e8m8 codes."""
    return (codes.int() & 0xFFFF) << _CUT_BITS


def _decode(codes: Tensor) -> Tensor:
    return _bits(codes).view(torch.float32)
