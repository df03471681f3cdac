"""Read pieces out of one opened file of a child, with no more memory than its bytes allow. See [Note: child files]."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ds_childtune.child.child_shard import index_dtype
from ds_childtune.child_files.format import DTYPES, ChildFileError, Piece
from ds_childtune.child_files.header import DAMAGED, Stored

Bytes = NDArray[np.uint8]

_MAX_INT32 = torch.iinfo(torch.int32).max
_ONES = np.array([byte.bit_count() for byte in range(256)], dtype=np.uint8)
_TILE = 1 << 16
"""Bytes of a mask that are unpacked at once."""


@contextmanager
def opened_file(path: Path) -> Iterator[BinaryIO]:
    """A file whose header has been read, for the length of a `with`. Raises ChildFileError when it is another one by now."""
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: OSError) -> ChildFileError:
    return ChildFileError(f"{path}: expected the file that was opened, got: {str(error)[:200]}. {DAMAGED}")


def pieces_within(pieces: Sequence[Stored], start: int, end: int) -> Iterator[Stored]:
    """Those that have elements of [start, end); the first of all where that is empty."""
    if start == end:
        yield from pieces[:1]
        return
    at = max(bisect_right(pieces, start, key=lambda stored: stored.entry.start) - 1, 0)
    for stored in pieces[at:]:
        if stored.entry.start >= end:
            return
        if stored.end > start:
            yield stored


def read_piece(file: BinaryIO, stored: Stored, start: int, end: int, *, values: bool = True) -> Piece:
    """What a piece has of the parameter's elements [start, end).

    Raises:
        ChildFileError: when the mask is not what its entry says.
        OSError: when the file has become shorter.
    """
    entry = stored.entry
    start, end = (min(max(at, entry.start), entry.end) for at in (start, end))
    index, first, last = _inside(file, stored, start - entry.start, end - entry.start)
    tensors = {}
    for name in entry.tensors if values else ():
        dtype, at = stored.offsets[name]
        tensors[name] = _tensor(file, at + first * DTYPES[dtype].itemsize, last - first, dtype)
    return Piece(entry.parameter, start, end - start, index, tensors, entry.numbers)


def join(name: str, start: int, numel: int, parts: list[Piece]) -> Piece:
    """One piece out of neighbours that cover [start, start + numel). Of numbers that differ it has the first."""
    names = parts[0].tensors.keys() if parts else ()
    tensors = {what: torch.cat([p.tensors[what] for p in parts]) for what in names}
    numbers: dict[str, int | float] = {}
    for part in reversed(parts):
        numbers |= part.numbers
    if all(p.index is None for p in parts):
        return Piece(name, start, numel, None, tensors, numbers)
    indices = [torch.arange(p.numel) if p.index is None else p.index for p in parts]
    index = torch.cat([i.to(index_dtype(numel)) + (p.start - start) for i, p in zip(indices, parts, strict=True)])
    return Piece(name, start, numel, index, tensors, numbers)


def _tensor(file: BinaryIO, start: int, numel: int, dtype: str) -> Tensor:
    """1-D: `numel` entries from a byte on. Raises OSError, see `_read`."""
    if not numel:
        return torch.empty(0, dtype=DTYPES[dtype])
    data = bytearray(numel * DTYPES[dtype].itemsize)
    file.seek(start)
    if (got := file.readinto(data)) != len(data):  # type: ignore[attr-defined] # every file that `open` gives has it
        raise OSError(f"it ends {len(data) - got} bytes too early")
    return torch.frombuffer(data, dtype=DTYPES[dtype])


def _inside(file: BinaryIO, stored: Stored, start: int, end: int) -> tuple[Tensor | None, int, int]:
    """The child's elements among [start, end) of a piece, counted from `start`, and which entries of its tensors belong to them.

    Nothing is made of a mask before its ones have been counted.
    """
    entry = stored.entry
    if entry.mask == "all":
        return None, start, end
    dtype, at = stored.offsets["mask" if entry.mask == "bits" else "index"]
    if entry.mask == "bits":
        bits = _tensor(file, at, (entry.numel + 7) // 8, dtype).numpy()
        # A bit beyond the last element is one too many, so that it is noticed.
        kept = ones(bits, 0, 8 * bits.size)
        if kept == entry.kept:
            first = ones(bits, 0, start)
            count = kept if end - start == entry.numel else ones(bits, start, end)
            return places_of_ones(bits, start, end, count, wide=entry.numel > _MAX_INT32), first, first + count
    else:
        # In numpy, as there may be hundreds of thousands of small pieces.
        places = _tensor(file, at, entry.kept, dtype).numpy()
        kept = places.size
        if not kept or (places[0] >= 0 and places[-1] < entry.numel and bool((places[1:] > places[:-1]).all())):
            first, last = np.searchsorted(places, np.array([start, end], dtype=places.dtype)).tolist()
            return torch.from_numpy(places[first:last] - places.dtype.type(start)), first, last
    raise ChildFileError(
        f"{getattr(file, 'name', '')}: {entry.parameter[:80]}: expected {entry.kept} ascending elements below {entry.numel},"
        f" got {kept} that are not. {DAMAGED}"
    )


def ones(bits: Bytes, start: int, end: int) -> int:
    """How many of the bits [start, end) are set; lowest bit of a byte first."""
    total = 0
    for tile, first, last in _tiles(bits, start, end):
        inner = tile.copy()
        if len(inner):
            inner[0] &= 0xFF << first & 0xFF
            inner[-1] &= 0xFF >> last
        total += int(_ONES[inner].sum(dtype=np.int64))
    return total


def places_of_ones(bits: Bytes, start: int, end: int, count: int, *, wide: bool) -> Tensor:
    """int32, or int64 if `wide`, [count]: which of the bits [start, end) are set, counted from `start`."""
    places = torch.empty(count, dtype=torch.int64 if wide else torch.int32)
    filled, at = 0, start
    for tile, first, last in _tiles(bits, start, end):
        unpacked = np.unpackbits(tile, bitorder="little")[first : 8 * tile.size - last]
        found = torch.from_numpy(np.flatnonzero(unpacked)) + (at - start)
        places[filled : filled + found.numel()] = found
        filled, at = filled + found.numel(), at + unpacked.size
    return places


def _tiles(bits: Bytes, start: int, end: int) -> Iterator[tuple[Bytes, int, int]]:
    """The bytes of the bits [start, end) in tiles, each with the number of bits to leave out at its beginning and at its end."""
    first, last = start // 8, -(-end // 8)
    for at in range(first, last if end > start else first, _TILE):
        stop = min(at + _TILE, last)
        yield bits[at:stop], max(start - 8 * at, 0), max(8 * stop - end, 0)
