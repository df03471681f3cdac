"""Where every rank's child lies at ZeRO 1 and 2: which elements of each parameter's gradient go to which rank.

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

[Note: pieces]
So a rank must know the child of all. A piece is what one rank owns of one parameter, cut into tiles. A piece of this rank has its
child shard's index. Of others' pieces ranks share, once, the smaller of bits and an int32 index, as at ZeRO-3 (see [Note: masks of all
ranks]). A piece that is inside the child as a whole needs neither. That is at most an eighth of a byte for each element of the model,
however many ranks there are.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ds_childtune.child.child_shard import ChildShard, put_
from ds_childtune.child.tiles import tile_of
from ds_childtune.zero.bits import INDEX, bits_of, byte_count, places_of

Form = Literal["bits", "index", "none"]


@dataclass(frozen=True)
class Span:
    """What one rank owns of one parameter, or a tile of it: its elements, in the child or not."""

    param: Any
    group: int
    param_start: int
    """Element of the parameter where it begins."""
    shard_start: int
    """Element of the owner's flat shard where it begins."""
    numel: int


@dataclass(frozen=True)
class Piece:
    """The child's elements in a span. See [Note: pieces]."""

    span: Span
    start: int
    """In the row."""
    count: int
    index: Tensor | None = None
    """1-D [count], ascending; from the beginning of the flat shard where it is this rank's, else of the span."""
    offset: int = 0
    """What `index` counts from: an element of the span's flat shard, or 0."""
    bits: Tensor | None = None
    """uint8 [byte_count(span.numel)]"""

    def of(self, gradient: Tensor) -> Tensor:
        """The child's elements of the parameter's flattened gradient. May be a view."""
        part = gradient.narrow(0, self.span.param_start, self.span.numel)
        return part if self.count == self.span.numel else part.index_select(0, self._places())

    def put(self, shard: Tensor, row: Tensor) -> None:
        """From the row into the owner's flat shard, both 1-D."""
        part = shard.narrow(0, self.span.shard_start, self.span.numel)
        values = row.narrow(0, self.start, self.count).to(shard.dtype)
        if self.count == self.span.numel:
            part.copy_(values)
        else:
            part.index_copy_(0, self._places().long(), values)

    def _places(self) -> Tensor:
        """In the span; without a wait for the device."""
        if self.bits is not None:
            return places_of(self.bits.unsqueeze(0), self.span.numel, self.count)
        assert self.index is not None
        return self.index - self.offset if self.offset else self.index


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
        if longest * ranks <= _PADDED * sum(owned):
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


_PADDED = 1.05
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
        self.nbytes = 0
        """What all ranks' masks take, on this rank."""
        self.index = [shard.index.to(self.device) for shard in shards]
        """The places of this rank's child in its partition, by group: on the device of the parameters."""
        spans = [list(_spans(optimizer, self._sizes, owner, tile_of(self.device))) for owner in range(self.ranks)]
        self._of_owner = list(self._shared_pieces(spans))
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

    def _shared_pieces(self, spans: Sequence[Sequence[Span]]) -> Iterator[list[Piece]]:
        """Of each rank. A collective.

        Args:
            spans: of each rank, in the order of its child in the row.
        """
        own = spans[self.rank]
        mine = list(self._own_places(own))
        found = torch.tensor([places.numel() for places in mine], dtype=torch.int64, device=self.device)
        counts = [row.tolist() for (row,) in self._shared([found], [[len(of)] for of in spans])]
        forms = [[_form(*each) for each in zip(*of, strict=True)] for of in zip(spans, counts, strict=True)]
        local = [
            (form, span.numel, places - span.shard_start)
            for form, span, places in zip(forms[self.rank], own, mine, strict=True)
        ]
        packed = [bits_of(places, numel) for form, numel, places in local if form == "bits"]
        listed = [places.int() for form, _, places in local if form == "index"]
        widths = _only([[byte_count(span.numel) for span in of] for of in spans], forms, "bits")
        lengths = _only(counts, forms, "index")
        if self.ranks > 1:
            self.nbytes = self.ranks * (max(map(sum, widths)) + INDEX * max(map(sum, lengths)))
        bits = self._shared(packed or [found.new_empty(0, dtype=torch.uint8)], widths)
        index = self._shared(listed or [found.new_empty(0, dtype=torch.int32)], lengths)
        for owner, of in enumerate(spans):
            start, bits_left, index_left = self._cut.starts[owner], iter(bits[owner]), iter(index[owner])
            pieces = []
            for i, (span, count, form) in enumerate(zip(of, counts[owner], forms[owner], strict=True)):
                if owner == self.rank:
                    piece = Piece(span, start, count, index=mine[i], offset=span.shard_start)
                elif form == "index":
                    piece = Piece(span, start, count, index=next(index_left))
                else:
                    piece = Piece(span, start, count, bits=next(bits_left) if form == "bits" else None)
                if count:
                    pieces.append(piece)
                start += count
            yield pieces

    def _own_places(self, spans: Sequence[Span]) -> Iterator[Tensor]:
        """The child's elements in each span of this rank, in its flat shard. The host waits for the device once for each group."""
        for group, of in itertools.groupby(spans, key=lambda span: span.group):
            index = self.index[group]
            ends = [(span.shard_start, span.shard_start + span.numel) for span in of]
            bounds = torch.tensor(ends, dtype=index.dtype, device=index.device)
            for first, last in torch.searchsorted(index, bounds.view(-1)).view(-1, 2).tolist():
                yield index[first:last]

    def _shared(self, parts: Sequence[Tensor], sizes: Sequence[Sequence[int]]) -> list[Sequence[Tensor]]:
        """Each rank's parts, of these sizes. A collective."""
        from deepspeed import comm as dist

        row, longest = torch.cat(list(parts)), max(map(sum, sizes))
        rows = torch.nn.functional.pad(row, (0, longest - row.numel()))
        if self.ranks > 1 and longest:
            matrix = row.new_empty(self.ranks * longest)
            dist.all_gather_into_tensor(matrix, rows, group=self._group)
            rows = matrix
        return [
            each[: sum(of)].split(list(of)) if of else ()
            for each, of in zip(rows.view(self.ranks, longest), sizes, strict=True)
        ]


def _spans(optimizer: Any, sizes: Sequence[int], owner: int, tile: int) -> Iterator[Span]:
    """Of one rank, in the order of its child in the row."""
    for group, (params, offsets) in enumerate(
        zip(optimizer.round_robin_bit16_groups, optimizer.round_robin_bit16_offsets, strict=True)
    ):
        before = owner * sizes[group]
        for param, offset in zip(params, offsets, strict=True):
            end = min(offset + param.numel() - before, sizes[group])
            for start in range(max(offset - before, 0), end, tile):
                yield Span(param, group, start + before - offset, start, min(tile, end - start))


def _form(span: Span, count: int) -> Form:
    """In which ranks share the child's elements in a span."""
    if count in (0, span.numel):
        return "none"
    return "bits" if byte_count(span.numel) <= INDEX * count else "index"


def _only(numbers: Sequence[Sequence[int]], forms: Sequence[Sequence[Form]], form: Form) -> list[list[int]]:
    return [[n for n, f in zip(*of, strict=True) if f == form] for of in zip(numbers, forms, strict=True)]


def _ended(segment: slice, handle: Any, filled: Tensor) -> tuple[slice, Tensor]:
    handle.wait()
    return segment, filled
