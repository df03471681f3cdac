"""Which elements of each parameter are the child's on every rank, at ZeRO-3.

[Note: masks of all ranks]
At ZeRO-3 every parameter is split over all ranks, and a rank knows the child of its own partitions. To send nothing but the child, it
must know that of all. So ranks share it once, when the child is chosen. Each parameter has the smaller of two:

    bits     uint8, a row for each rank: one bit for each element of its partition
    index    int32, four bytes for each element of the child: its place in the parameter

That is at most an eighth of a byte for each element of the model, on every rank, however many ranks there are. A parameter that is
inside the child as a whole needs neither. Partitions lie one after the other in the parameter, so the child's elements in ascending
order are also in the order of their owners.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_childtune.child.child_shard import index_dtype, put_
from ds_childtune.child.tiles import tile_of
from ds_childtune.zero.bits import INDEX, bits_of, byte_count, places_of


@dataclass(frozen=True)
class OwnPart:
    """This rank's partition of one parameter."""

    numel: int
    """Of the whole parameter."""
    partition: int
    """Elements of a partition, padding included; the same on all ranks."""
    count: int
    """Of the child's elements in the partition."""
    index: Callable[[], Tensor]
    """They themselves: 1-D, ascending."""


@dataclass(frozen=True)
class ParameterChild:
    """The child's elements of one parameter."""

    numel: int
    """Of the whole parameter."""
    partition: int
    counts: tuple[int, ...]
    """By rank: the child's elements in its partition."""
    bits: Tensor | None = None
    """uint8 [ranks, ceil(partition / 8)], the lowest bit first."""
    index: Tensor | None = None
    """1-D, ascending, int32, or int64 for a parameter of 2**31 elements or more."""

    @functools.cached_property
    def kept(self) -> int:
        return sum(self.counts)

    def of(self, gradient: Tensor) -> Tensor:
        """The child's elements of the flattened gradient, 1-D [kept]; without a wait for the device. May be a view."""
        if self.kept == self.numel:
            return gradient
        if self.index is not None:
            return gradient.index_select(0, self.index)
        if self.bits is None:
            return gradient.new_empty(0)
        rows = max(1, tile_of(gradient.device) // self.partition)
        parts = [
            gradient.narrow(
                0, first * self.partition, min(rows * self.partition, self.numel - first * self.partition)
            ).index_select(0, self._places(first, rows, count))
            for first in range(0, len(self.counts), rows)
            if (count := sum(self.counts[first : first + rows]))
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def put(self, out: Tensor, first: int, values: Sequence[Tensor]) -> None:
        """Put the child's elements of some ranks' partitions in their places; without a wait for the device.

        Args:
            out: 1-D, the partitions of `len(values)` ranks from `first` on, one after the other.
            values: by rank, 1-D [counts].
        """
        ranks = slice(first, first + len(values))
        count, whole = sum(self.counts[ranks]), values[0] if len(values) == 1 else torch.cat(list(values))
        if not count:
            return
        if self.kept == self.numel:
            out.narrow(0, 0, count).copy_(whole)
        elif self.index is not None:
            put_(out, self.index.narrow(0, sum(self.counts[:first]), count) - first * self.partition, whole)
        else:
            out.index_copy_(0, self._places(first, len(values), count), whole)

    def _places(self, first: int, rows: int, count: int) -> Tensor:
        """int64 [count]: the child's elements in the partitions of `rows` ranks from `first` on, from the first of these on."""
        assert self.bits is not None
        return places_of(self.bits[first : first + rows], self.partition, count)


@dataclass(frozen=True)
class ChildMasks:
    """See [Note: masks of all ranks]."""

    parameters: tuple[ParameterChild, ...]
    nbytes: int
    """What the masks take, on this rank."""

    @classmethod
    def shared(cls, parts: Sequence[OwnPart], device: torch.device, group: Any) -> ChildMasks:
        """From each rank's own parts, in one order on all ranks. A collective.

        Args:
            parts: of every parameter.
            device: of their indices.
            group: the process group over which all of them are split.
        """
        from deepspeed import comm as dist

        ranks = dist.get_world_size(group=group)
        own = torch.tensor([part.count for part in parts], device=device)
        counts: list[tuple[int, ...]] = list(zip(*_gathered(own, ranks, group).tolist(), strict=True))
        as_bits = [i for i, part in enumerate(parts) if _is_smaller_as_bits(part, sum(counts[i]), ranks)]
        as_index = [i for i, part in enumerate(parts) if 0 < sum(counts[i]) < part.numel and i not in set(as_bits)]
        bits = _shared_bits([parts[i] for i in as_bits], device, ranks, group)
        indices = _shared_indices([parts[i] for i in as_index], [counts[i] for i in as_index], ranks, group)
        bits_of, index_of = dict(zip(as_bits, bits, strict=True)), dict(zip(as_index, indices, strict=True))
        parameters = tuple(
            ParameterChild(part.numel, part.partition, counts[i], bits_of.get(i), index_of.get(i))
            for i, part in enumerate(parts)
        )
        return cls(parameters, sum(t.nbytes for t in (*bits, *indices)))


def masks_note(nbytes: int) -> str:
    """What `select` says of them."""
    return f"every rank keeps the masks of all: {nbytes / 2**20:.1f} MiB"


def _is_smaller_as_bits(part: OwnPart, kept: int, ranks: int) -> bool:
    return 0 < kept < part.numel and ranks * byte_count(part.partition) <= INDEX * kept


def _gathered(row: Tensor, ranks: int, group: Any) -> Tensor:
    """[ranks, row.numel()]: every rank's row, which are of one size."""
    from deepspeed import comm as dist

    matrix = row.new_empty(ranks * row.numel())
    dist.all_gather_into_tensor(matrix, row, group=group)
    return matrix.view(ranks, -1)


def _shared_bits(parts: Sequence[OwnPart], device: torch.device, ranks: int, group: Any) -> list[Tensor]:
    """[ranks, bytes] for each part: views of one tensor, which one collective fills."""
    if not parts:
        return []
    widths = [byte_count(part.partition) for part in parts]
    row = torch.empty(sum(widths), dtype=torch.uint8, device=device)
    for part, out in zip(parts, row.split(widths), strict=True):
        out.copy_(bits_of(part.index(), part.partition))
    return list(_gathered(row, ranks, group).split(widths, dim=1))


def _shared_indices(parts: Sequence[OwnPart], counts: Sequence[Sequence[int]], ranks: int, group: Any) -> list[Tensor]:
    """1-D for each part: the child's places in the whole parameter."""
    if not parts:
        return []
    lengths = [sum(of) for of in zip(*counts, strict=True)]
    dtype = index_dtype(max(part.partition for part in parts))
    row = torch.cat([part.index().to(dtype) for part in parts])
    matrix = _gathered(torch.nn.functional.pad(row, (0, max(lengths) - row.numel())), ranks, group)
    rows = [iter(matrix[rank, :length].split([of[rank] for of in counts])) for rank, length in enumerate(lengths)]
    return [
        torch.cat([next(own).to(index_dtype(part.numel)).add(rank * part.partition) for rank, own in enumerate(rows)])
        for part in parts
    ]
