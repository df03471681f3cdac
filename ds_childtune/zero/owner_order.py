"""The child's gradients of some parameters, laid out by owner, as ZeRO-3 sends them.

[Note: rows by owner]
Values come by parameter, and within it by owner. They are sent by owner, and within that by parameter, each owner's part padded to the
longest:

    row 0    | parameter 7's child in partition 0 | parameter 8's | pad |
    row 1    | parameter 7's child in partition 1        | parameter 8's |

That is a permutation of ranks x parameters pieces. A few thousand of them, or large ones, are concatenated. To go through many
small ones in Python would take a second and longer in each micro-batch (720 parameters, 512 ranks). There the place of each element is
worked out on the device, in tiles, from the sizes of pieces and how far each moves: 16 bytes for a piece, copied there once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_FEW = 1 << 12
"""Pieces that are concatenated, whatever their size."""
_TILE = 1 << 21
"""Elements whose places, as int64, are there at a time."""

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class _Tile:
    """Some consecutive elements of the values."""

    start: int
    end: int
    slices: tuple[tuple[int, int, int], ...]
    """Where they are: number of the parameter, start and elements."""
    sizes: Tensor
    """int64 [pieces]: how many of them each piece has."""
    shifts: Tensor
    """int64 [pieces]: how far they move."""

    def places(self) -> Tensor:
        shifts = torch.repeat_interleave(self.shifts, self.sizes, output_size=self.end - self.start)
        return shifts.add_(torch.arange(self.start, self.end, device=shifts.device))


class OwnerOrder:
    """See [Note: rows by owner]. Made once for a choice of parameters; `rows` then does not make the host wait for the device."""

    def __init__(self, counts: Counts, device: torch.device) -> None:
        """
        Args:
            counts: [parameters, ranks]: elements of the child of a parameter that a rank owns.
            device: of the values.
        """
        self._counts = counts
        self._lengths = counts.sum(axis=0)
        self.columns = int(self._lengths.max())
        """Elements of a row."""
        many_small = counts.size > _FEW and int(self._lengths.sum()) <= counts.size * _small(device)
        self._tiles = list(self._made_tiles(device)) if many_small else None

    def rows(self, values: Sequence[Tensor]) -> Tensor:
        """The rows, one after the other: 1-D [ranks * columns].

        Args:
            values: for each parameter its child's elements, 1-D, of one dtype.
        """
        if self._tiles is None:
            return self._concatenated(values)
        rows = values[0].new_zeros(self._counts.shape[1] * self.columns)
        for tile in self._tiles:
            parts = [values[i].narrow(0, start, numel) for i, start, numel in tile.slices]
            rows.index_copy_(0, tile.places(), parts[0] if len(parts) == 1 else torch.cat(parts))
        return rows

    def _concatenated(self, values: Sequence[Tensor]) -> Tensor:
        pieces = [each.split(sizes) for each, sizes in zip(values, self._counts.tolist(), strict=True)]
        pads = (self.columns - self._lengths).tolist()
        pad = values[0].new_zeros(max(pads))
        return torch.cat(
            [
                piece
                for rank, missing in enumerate(pads)
                for piece in (*(of[rank] for of in pieces), pad.narrow(0, 0, missing))
            ]
        )

    def _made_tiles(self, device: torch.device) -> Iterator[_Tile]:
        ranks = self._counts.shape[1]
        sizes = self._counts.reshape(-1)
        ends = sizes.cumsum()
        starts = ends - sizes
        before = self._counts.cumsum(axis=0) - self._counts
        shifts = (np.arange(ranks) * self.columns + before).reshape(-1) - starts
        of_parameters = ends[ranks - 1 :: ranks]
        total = int(ends[-1])
        for start in range(0, total, _TILE):
            end = min(start + _TILE, total)
            pieces = slice(np.searchsorted(ends, start, "right"), np.searchsorted(starts, end, "left"))
            inside = np.minimum(ends[pieces], end) - np.maximum(starts[pieces], start)
            yield _Tile(
                start,
                end,
                tuple(_slices(of_parameters, start, end)),
                torch.from_numpy(inside).to(device),
                torch.from_numpy(shifts[pieces].copy()).to(device),
            )


def _small(device: torch.device) -> int:
    """Elements of a piece, on average, up to which a place for each costs less than a view in Python for the piece: microseconds."""
    return 1 << 8 if device.type == "cpu" else 1 << 16


def _slices(ends: Counts, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Of parameters that end there in the values: which of their elements lie in [start, end)."""
    for i in range(int(np.searchsorted(ends, start, "right")), len(ends)):
        first = int(ends[i - 1]) if i else 0
        if first >= end:
            return
        low, high = max(start, first), min(end, int(ends[i]))
        if low < high:
            yield i, low - first, high - low
