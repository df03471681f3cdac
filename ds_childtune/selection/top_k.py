"""ChildTuning-D's child: exactly the k elements with the largest scores, over all ranks, without gathering them.

Section 3.2 of Xu et al. (EMNLP 2021, arXiv 2109.05687) keeps the elements whose Fisher information is in the top p. Here the k-th
largest score is found by a radix select: the bit patterns of fp32 scores >= 0 order like integers, and three
histograms (12, 10 and 10 bits), all-reduced, pin the threshold's 32 bits. Elements equal to it are taken in the order
(parameter name, element index) until exactly k are chosen; three more kinds of histogram find where that order is cut.
The outcome is a `Cut`, three integers that every rank agrees on, and each rank marks its own elements from it.

On the wire: 48 KiB of histograms, 8 bytes for each eligible parameter, and at most 40 KiB for the tie, whatever the
number of elements and ranks. In memory: a few tiles of `TILE` elements, whatever the size of the shard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_childtune.selection.scores import TILE, Scores

_FIELDS = ((20, 12), (10, 10), (0, 10))
"""(shift, bits) of the score's fields, from the top; the first holds the sign, so that bad scores show in its counts."""

_INFINITY = 0x7F800000
_FIRST_BAD_BIN = _INFINITY >> 20
"""Bins of the first field from here on hold inf, NaN and negative numbers."""

_INDEX_BITS = 10
_INDEX_SHIFTS = (40, 30, 20, 10, 0)

AllReduce = Callable[[Tensor], None]
"""Sums an int64 tensor over the ranks, in place."""


class BadScores(ValueError):
    """Scores that are NaN, infinite or negative."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(f"expected finite scores >= 0, got others in {names}")
        self.names = names
        """The parameters concerned, of those that this rank counts."""


@dataclass(frozen=True)
class Cut:
    """The border of the child. An element is inside when its (score bits, name, index) is on the near side of it."""

    bits: int
    """Bit pattern of the threshold, the k-th largest score."""

    name: str
    """Among the elements equal to the threshold: parameters whose name sorts before this one are inside, after it outside."""

    index: int
    """... and of this parameter, the elements whose index is below this one are inside."""

    @property
    def threshold(self) -> float:
        """The score of the k-th largest element."""
        return float(torch.tensor(self.bits, dtype=torch.int32).view(torch.float32))


def find_cut(
    scores: Sequence[Scores], names: Sequence[str], k: int, all_reduce: AllReduce, device: torch.device
) -> Cut:
    """The cut that leaves exactly `k` of all the ranks' counted elements inside. A collective.

    Args:
        scores: this rank's fragments; may be empty.
        names: the names of all eligible parameters, the same on every rank.
        k: at least 1, at most the number of counted elements over all ranks.
        device: where histograms are all-reduced.

    Raises:
        BadScores: on every rank, when a score is NaN, infinite or negative.
    """
    counted = [s for s in scores if s.counted]
    prefix, shift_done, remaining = 0, 32, k
    for shift, bits in _FIELDS:
        histogram = torch.zeros(1 << bits, dtype=torch.int64, device=device)
        for s in counted:
            for tile in s.bit_tiles():
                if shift_done < 32:
                    tile = tile[(tile >> shift_done) == prefix]
                histogram += torch.bincount((tile >> shift).bitwise_and_((1 << bits) - 1), minlength=1 << bits).to(
                    device
                )
        all_reduce(histogram)
        if shift_done == 32 and int(histogram[_FIRST_BAD_BIN:].sum()):
            raise BadScores([s.name for s in counted if not _all_finite(s)])
        bin_, above = _bin_from_the_top(histogram, remaining)
        prefix, shift_done, remaining = (prefix << bits) | bin_, shift, remaining - above
    return _cut_ties(counted, sorted(names), prefix, remaining, all_reduce, device)


def _cut_ties(
    scores: Sequence[Scores], names: Sequence[str], bits: int, k: int, all_reduce: AllReduce, device: torch.device
) -> Cut:
    """Where to cut the elements equal to the threshold so that `k` of them are inside."""
    rank_of = {name: i for i, name in enumerate(names)}
    ties = torch.zeros(len(names), dtype=torch.int64, device=device)
    for s in scores:
        ties[rank_of[s.name]] += sum((tile == bits).sum() for tile in s.bit_tiles()).to(device)  # type: ignore[union-attr]
    all_reduce(ties)
    total = ties.cumsum(0)
    parameter = int((total < k).sum())
    k -= int(total[parameter] - ties[parameter])

    fragments = [s for s in scores if s.name == names[parameter]]
    prefix = 0
    for shift in _INDEX_SHIFTS:
        histogram = torch.zeros(1 << _INDEX_BITS, dtype=torch.int64, device=device)
        for s in fragments:
            for begin, tile in enumerate(s.bit_tiles()):
                index = torch.nonzero(tile == bits).view(-1) + (s.param_start + begin * TILE)
                index = index[(index >> (shift + _INDEX_BITS)) == prefix] >> shift
                histogram += torch.bincount(index.bitwise_and_((1 << _INDEX_BITS) - 1), minlength=1 << _INDEX_BITS).to(
                    device
                )
        all_reduce(histogram)
        total = histogram.cumsum(0)
        bin_ = int((total < k).sum())
        k -= int(total[bin_] - histogram[bin_])
        prefix = (prefix << _INDEX_BITS) | bin_
    return Cut(bits=bits, name=names[parameter], index=prefix + 1)


def mark_inside(scores: Scores, cut: Cut, out: Tensor) -> None:
    """Write this fragment's part of the child's mask.

    Args:
        out: bool, of the shape of `scores.values`; True = inside the child.
    """
    for begin, tile in enumerate(scores.bit_tiles()):
        offset = begin * TILE
        inside = out[offset : offset + tile.numel()]
        if scores.name < cut.name:
            torch.ge(tile, cut.bits, out=inside)
        else:
            torch.gt(tile, cut.bits, out=inside)
        if scores.name == cut.name:
            n = min(max(0, cut.index - scores.param_start - offset), tile.numel())
            inside[:n] |= tile[:n] == cut.bits


def _all_finite(scores: Scores) -> bool:
    # As integers, negative numbers are negative, and inf and NaN are the largest.
    return all(bool(((tile >= 0) & (tile < _INFINITY)).all()) for tile in scores.bit_tiles())


def _bin_from_the_top(histogram: Tensor, k: int) -> tuple[int, int]:
    """The bin that holds the k-th element counted from the last bin, and how many elements lie above that bin."""
    from_top = histogram.flip(0).cumsum(0)
    position = int((from_top < k).sum())
    above = int(from_top[position - 1]) if position else 0
    return histogram.numel() - 1 - position, above
