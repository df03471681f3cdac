"""How the child is sent at ZeRO 1 and 2: in one row, of which each rank has a chunk.

[Note: the child in one row]
At ZeRO 1 and 2 a rank owns one partition of each group's flat buffer, and of that the child's elements. Every rank has whole
gradients and whole weights, so once it knows all ranks' indices, only the child needs to be sent. What is sent is a row of all owners'
children, each in the order of its child shards. Collectives cut it into equal chunks, one a rank. Where owners have about as much
each, their parts are padded to the longest, so that each chunk is what one rank owns:

    | rank 0: group 0's child, group 1's, pad | rank 1: group 0's child, group 1's, pad |

One reduce-scatter then gives each owner its sum, and one all-gather gives all ranks the owners' weights. A child that is dense in some
layers and thin in others would be mostly padding. There the parts follow one another, and an all-to-all takes sums from the ranks
whose chunks they are in to their owners, and weights back:

    | rank 0: group 0's child, group 1's             | rank 1: both | pad |
    | chunk of rank 0             | chunk of rank 1                       |

Gloo's reduce-scatter is an all-reduce inside, which sends twice as much. There ranks exchange chunks and add them up, in fp32. And its
exchanges use one direction of a link at a time, so a row is sent in segments, a few of them side by side.

Each owner's part is made of pieces: see [Note: pieces].
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_childtune.child.child_shard import ChildShard, put_
from ds_childtune.zero.pieces import Piece, shared_pieces


@dataclass(frozen=True)
class Cut:
    """How the row is cut. See [Note: the child in one row]."""

    owned: Sequence[int]
    """Elements that each rank owns."""
    starts: Sequence[int]
    """Where they begin in the row."""
    chunk: int
    """Elements of each rank's chunk."""
    padded: bool
    """Whether each rank's part begins at its chunk, so that chunks need not be taken to owners."""

    @classmethod
    def of(cls, owned: Sequence[int]) -> Cut:
        """The one with the least to send, a few per cent apart."""
        ranks, longest = len(owned), max(owned)
        if longest * ranks <= PADDED * sum(owned):
            return cls(owned, [rank * longest for rank in range(ranks)], longest, padded=True)
        starts = [0, *itertools.accumulate(owned)][:-1]
        return cls(owned, starts, -(-sum(owned) // ranks), padded=False)

    def from_chunk(self, rank: int) -> list[int]:
        """Elements of this rank's chunk that each rank owns."""
        return [self._common(rank, owner) for owner in range(len(self.owned))]

    def to_owner(self, rank: int) -> list[int]:
        """Elements of each rank's chunk that this rank owns."""
        return [self._common(holder, rank) for holder in range(len(self.owned))]

    def _common(self, holder: int, owner: int) -> int:
        first = max(self.starts[owner], holder * self.chunk)
        return max(0, min(self.starts[owner] + self.owned[owner], (holder + 1) * self.chunk) - first)


PADDED = 1.05
"""How much longer than the child a padded row may be."""
_SIDE_BY_SIDE = 4
"""Segments that are sent at a time: twice gloo's threads, which so never wait."""


class ChildLayout:
    """See [Note: the child in one row]. Making one is a collective."""

    def __init__(self, optimizer: Any, shards: Sequence[ChildShard]) -> None:
        """
        Args:
            optimizer: DeepSpeed's, of ZeRO 1 or 2.
            shards: by group.
        """
        from deepspeed import comm as dist

        self._group = optimizer.dp_process_group
        self.ranks = int(dist.get_world_size(group=self._group))
        self.rank = int(dist.get_rank(group=self._group))
        self._on_gloo = torch.distributed.get_backend(self._group) == "gloo"
        self._sizes = [int(size) for size in optimizer.partition_size]
        self.device: torch.device = optimizer.bit16_groups_flat[0].device
        mine = torch.tensor([shard.index.numel() for shard in shards], device=self.device)
        counts = mine.new_empty(self.ranks * len(shards))
        dist.all_gather_into_tensor(counts, mine, group=self._group)
        self._counts: list[list[int]] = counts.view(self.ranks, -1).tolist()
        self._cut = Cut.of([sum(row) for row in self._counts])
        self.index = [shard.index.to(self.device) for shard in shards]
        """The places of this rank's child in its partition, by group: on the device of the parameters."""
        self._of_owner, self.nbytes = shared_pieces(optimizer, self.index, self._cut.starts)
        """Every rank's pieces, and the bytes that their masks take on this rank."""
        self.pieces: dict[int, list[Piece]] = {}
        """By the parameter's id; none where it has no element of the child."""
        for piece in itertools.chain.from_iterable(self._of_owner):
            self.pieces.setdefault(id(piece.span.param), []).append(piece)

    @property
    def mine(self) -> list[int]:
        """Elements of this rank's child, by group."""
        return self._counts[self.rank]

    @property
    def numel(self) -> int:
        """Of the row."""
        return self.ranks * self._cut.chunk

    def reduce(self, row: Tensor) -> Tensor:
        """What this rank owns of the sum of all ranks' rows, 1-D; its size is at least the sum of `mine`. A collective."""
        from deepspeed import comm as dist

        if self.ranks == 1:
            return row
        if self._on_gloo:
            chunk = self._exchanged(row)
        else:
            chunk = row.new_empty(self._cut.chunk)
            dist.reduce_scatter_tensor(chunk, row, group=self._group)
        if self._cut.padded:
            return chunk
        theirs, ours = self._cut.from_chunk(self.rank), self._cut.to_owner(self.rank)
        owned = row.new_empty(sum(ours))
        dist.all_to_all_single(owned, chunk.narrow(0, 0, sum(theirs)), ours, theirs, group=self._group)
        return owned

    def put(self, owned: Tensor, flats: Sequence[Tensor]) -> None:
        """Put what this rank owns into its own flat buffers, by group. Arguments are those of `spread`."""
        parts = zip(flats, self._sizes, self.index, owned.split(self.mine), strict=True)
        for flat, size, index, values in parts:
            put_(flat.narrow(0, self.rank * size, size), index, values)

    def spread(self, owned: Tensor, flats: Sequence[Tensor]) -> None:
        """Put what each rank owns into every other rank's flat buffers, by group. A collective.

        Args:
            owned: 1-D, as many elements as the sum of `mine`.
        """
        if self.ranks == 1:
            return
        row = self._gathered(owned)
        for owner, pieces in enumerate(self._of_owner):
            if owner == self.rank:
                continue
            for piece in pieces:
                size = self._sizes[piece.span.group]
                piece.put(flats[piece.span.group].narrow(0, owner * size, size), row)

    def _gathered(self, owned: Tensor) -> Tensor:
        """The row, of what each rank owns. A collective."""
        from deepspeed import comm as dist

        chunk = owned.new_empty(self._cut.chunk)
        if self._cut.padded:
            chunk.narrow(0, 0, owned.numel()).copy_(owned)
        else:
            theirs, ours = self._cut.from_chunk(self.rank), self._cut.to_owner(self.rank)
            dist.all_to_all_single(chunk.narrow(0, 0, sum(theirs)), owned, theirs, ours, group=self._group)
        row = owned.new_empty(self.numel)
        if not self._on_gloo:
            dist.all_gather_into_tensor(row, chunk, group=self._group)
            return row

        def start(segment: slice) -> tuple[Any, Tensor]:
            part = chunk[segment]
            gathered = part.new_empty(self.ranks * part.numel())
            return dist.all_gather_into_tensor(gathered, part, group=self._group, async_op=True), gathered

        columns = row.view(self.ranks, self._cut.chunk)
        for segment, gathered in self._in_segments(start):
            columns[:, segment].copy_(gathered.view(self.ranks, -1))
        return row

    def _exchanged(self, row: Tensor) -> Tensor:
        """This rank's chunk of the sum of all ranks' rows. A collective."""
        from deepspeed import comm as dist

        columns, chunk = row.view(self.ranks, self._cut.chunk), row.new_empty(self._cut.chunk)

        def start(segment: slice) -> tuple[Any, Tensor]:
            part = columns[:, segment].contiguous()
            received = torch.empty_like(part)
            return dist.all_to_all_single(received, part, group=self._group, async_op=True), received

        for segment, received in self._in_segments(start):
            # Two terms are then added as in their dtype, and more of them better.
            chunk[segment].copy_(received.sum(0, dtype=torch.float32))
        return chunk

    def _in_segments(self, start: Callable[[slice], tuple[Any, Tensor]]) -> Iterator[tuple[slice, Tensor]]:
        """Run collectives on segments of all chunks, a few side by side, so that only those need buffers.

        Args:
            start: starts the one of a segment, and returns its handle and the tensor that it fills.
        """
        numel = self._cut.chunk
        size = max(-(-numel // 32), 1 << 16)
        running: deque[tuple[slice, Any, Tensor]] = deque()
        for first in range(0, numel, size):
            segment = slice(first, min(first + size, numel))
            running.append((segment, *start(segment)))
            if len(running) == _SIDE_BY_SIDE:
                yield _ended(*running.popleft())
        while running:
            yield _ended(*running.popleft())


def _ended(segment: slice, handle: Any, filled: Tensor) -> tuple[slice, Tensor]:
    handle.wait()
    return segment, filled
