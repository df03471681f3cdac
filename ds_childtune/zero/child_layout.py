"""Where every rank's child lies at ZeRO 1 and 2: which elements of each parameter's gradient go to which rank.

[Note: rows of the child]
At ZeRO 1 and 2 a rank owns one partition of each group's flat buffer, and of that the child's elements. Every rank has whole gradients
and whole weights, so once it knows all ranks' indices, only the child needs to be sent. What is sent is a matrix with a row for each
owner, in the order of its child shards, padded to the longest row, so that one reduce-scatter gives each owner its sum, and one
all-gather gives all ranks the owners' weights:

    row 0    | group 0's child on rank 0 | group 1's | pad |
    row 1    | group 0's child on rank 1        | group 1's |

The indices are shared once. They are as large as the matrix, int32, and this rank's row takes the place of its child shards' own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_childtune.child.child_shard import ChildShard, put_


@dataclass(frozen=True)
class Piece:
    """The child's elements in the part of one parameter that one rank owns."""

    index: Tensor
    """In the owner's flat shard."""
    shard_start: int
    """Element of the flat shard where the part begins."""
    param_start: int
    """Element of the parameter where the part begins."""
    numel: int
    """Of the part."""
    start: int
    """In the flattened matrix."""

    def of(self, gradient: Tensor) -> Tensor:
        """The child's elements of a parameter's flattened gradient."""
        part = gradient.narrow(0, self.param_start, self.numel)
        return part if self.index.numel() == self.numel else part.index_select(0, self.index - self.shard_start)


class ChildLayout:
    """See [Note: rows of the child]. Making one is a collective."""

    def __init__(self, optimizer: Any, shards: Sequence[ChildShard]) -> None:
        """
        Args:
            optimizer: DeepSpeed's, of ZeRO 1 or 2.
            shards: by group. Their indices become views of this one's.
        """
        from deepspeed import comm as dist

        self._group = optimizer.dp_process_group
        self.ranks, self.rank = dist.get_world_size(group=self._group), dist.get_rank(group=self._group)
        self._sizes = [int(size) for size in optimizer.partition_size]
        mine = torch.tensor([shard.index.numel() for shard in shards], device=shards[0].index.device)
        counts = mine.new_empty(self.ranks * len(shards))
        dist.all_gather_into_tensor(counts, mine, group=self._group)
        self._counts: list[list[int]] = counts.view(self.ranks, -1).tolist()
        self.columns = max(sum(row) for row in self._counts)
        self._index = self._shared([shard.index for shard in shards])
        for shard, view in zip(shards, self._parts(self._index, self.rank), strict=True):
            shard.index.data = view
        self.pieces: dict[int, list[Piece]] = {}
        """By the parameter's id; none where it has no element of the child."""
        for i in range(len(shards)):
            self._find_pieces(i, optimizer.round_robin_bit16_groups[i], optimizer.round_robin_bit16_offsets[i])

    @property
    def mine(self) -> list[int]:
        """Elements of this rank's child, by group."""
        return self._counts[self.rank]

    def reduce(self, matrix: Tensor) -> Tensor:
        """This rank's row of the sum of all ranks' matrices, both flattened. A collective."""
        from deepspeed import comm as dist

        if self.ranks == 1:
            return matrix
        row = matrix.new_empty(self.columns)
        dist.reduce_scatter_tensor(row, matrix, group=self._group)
        return row

    def spread(self, row: Tensor, flats: Sequence[Tensor]) -> None:
        """Put each rank's row into every rank's flat buffers, by group, except this rank's own. A collective."""
        from deepspeed import comm as dist

        if self.ranks == 1:
            return
        matrix = row.new_empty(self.ranks * self.columns)
        dist.all_gather_into_tensor(matrix, row, group=self._group)
        for owner in range(self.ranks):
            if owner == self.rank:
                continue
            parts = zip(flats, self._sizes, self._parts(self._index, owner), self._parts(matrix, owner), strict=True)
            for flat, size, index, values in parts:
                put_(flat.narrow(0, owner * size, size), index, values)

    def _shared(self, mine: Sequence[Tensor]) -> Tensor:
        """All ranks' indices, as the flattened matrix."""
        from deepspeed import comm as dist

        row = mine[0] if len(mine) == 1 else torch.cat(list(mine))
        if self.ranks == 1:
            return row
        row = torch.nn.functional.pad(row, (0, self.columns - row.numel()))
        matrix = row.new_empty(self.ranks * self.columns)
        dist.all_gather_into_tensor(matrix, row, group=self._group)
        return matrix

    def _parts(self, matrix: Tensor, owner: int) -> Iterator[Tensor]:
        """Views of one rank's row, by group."""
        start = owner * self.columns
        for count in self._counts[owner]:
            yield matrix.narrow(0, start, count)
            start += count

    def _find_pieces(self, group: int, params: Sequence[Any], offsets: Sequence[int]) -> None:
        size = self._sizes[group]
        for owner in range(self.ranks):
            index = list(self._parts(self._index, owner))[group]
            row_start = owner * self.columns + sum(self._counts[owner][:group])
            before = owner * size
            spans = [
                (param, offset, max(offset - before, 0), min(offset + param.numel() - before, size))
                for param, offset in zip(params, offsets, strict=True)
            ]
            spans = [span for span in spans if span[2] < span[3]]
            bounds = torch.tensor([span[2:] for span in spans], dtype=index.dtype, device=index.device)
            found = torch.searchsorted(index, bounds.view(-1)).view(len(spans), 2).tolist()
            for (param, offset, start, end), (first, last) in zip(spans, found, strict=True):
                if first < last:
                    piece = Piece(index[first:last], start, start + before - offset, end - start, row_start + first)
                    self.pieces.setdefault(id(param), []).append(piece)
