"""Which elements of each parameter's gradient are the child's, and whose, at ZeRO 1 and 2.

[Note: pieces]
So a rank must know the child of all. A piece is what one rank owns of one parameter, cut into tiles. A piece of this rank has its
child shard's index. Of others' pieces ranks share, once, the smaller of bits and an int32 index, as at ZeRO-3 (see [Note: masks of all
ranks]). A piece that is inside the child as a whole needs neither. That is at most an eighth of a byte for each element of the model,
however many ranks there are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

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


def shared_pieces(optimizer: Any, index: Sequence[Tensor], starts: Sequence[int]) -> tuple[list[list[Piece]], int]:
    """Every rank's pieces that have an element of the child, in the order of the row. A collective.

    Args:
        optimizer: DeepSpeed's, of ZeRO 1 or 2.
        index: by group, 1-D, ascending: this rank's child in its flat shard.
        starts: of each rank, where its child begins in the row.

    Returns:
        pieces by owner, and the bytes that all masks take on this rank.
    """
    from deepspeed import comm as dist

    group, device = optimizer.dp_process_group, index[0].device
    rank, ranks = int(dist.get_rank(group=group)), int(dist.get_world_size(group=group))
    spans = [list(_spans(optimizer, owner, tile_of(device))) for owner in range(ranks)]
    mine = list(_own_places(spans[rank], index))
    found = torch.tensor([places.numel() for places in mine], dtype=torch.int64, device=device)
    counts = [row.tolist() for (row,) in _shared([found], [[len(of)] for of in spans], group)]
    forms = [[_form(*each) for each in zip(*of, strict=True)] for of in zip(spans, counts, strict=True)]
    local = [
        (form, span.numel, places - span.shard_start)
        for form, span, places in zip(forms[rank], spans[rank], mine, strict=True)
    ]
    # A rank without any must have the dtype of the others.
    packed = [bits_of(places, numel) for form, numel, places in local if form == "bits"]
    listed = [places.int() for form, _, places in local if form == "index"]
    widths = _only([[byte_count(span.numel) for span in of] for of in spans], forms, "bits")
    lengths = _only(counts, forms, "index")
    bits = _shared(packed or [found.new_empty(0, dtype=torch.uint8)], widths, group)
    listings = _shared(listed or [found.new_empty(0, dtype=torch.int32)], lengths, group)
    made: list[list[Piece]] = []
    for owner, of in enumerate(spans):
        start, bits_left, listings_left = starts[owner], iter(bits[owner]), iter(listings[owner])
        made.append([])
        for i, (span, count, form) in enumerate(zip(of, counts[owner], forms[owner], strict=True)):
            if owner == rank:
                piece = Piece(span, start, count, index=mine[i], offset=span.shard_start)
            elif form == "index":
                piece = Piece(span, start, count, index=next(listings_left))
            else:
                piece = Piece(span, start, count, bits=next(bits_left) if form == "bits" else None)
            if count:
                made[-1].append(piece)
            start += count
    return made, ranks * (max(map(sum, widths)) + INDEX * max(map(sum, lengths))) if ranks > 1 else 0


def _spans(optimizer: Any, owner: int, tile: int) -> Iterator[Span]:
    """Of one rank, in the order of its child in the row."""
    for group, (size, params, offsets) in enumerate(
        zip(
            map(int, optimizer.partition_size),
            optimizer.round_robin_bit16_groups,
            optimizer.round_robin_bit16_offsets,
            strict=True,
        )
    ):
        before = owner * size
        for param, offset in zip(params, offsets, strict=True):
            end = min(offset + param.numel() - before, size)
            for start in range(max(offset - before, 0), end, tile):
                yield Span(param, group, start + before - offset, start, min(tile, end - start))


def _own_places(spans: Sequence[Span], index: Sequence[Tensor]) -> Iterator[Tensor]:
    """The child's elements in each span of this rank, in its flat shard. The host waits for the device once for each group."""
    for group, of in itertools.groupby(spans, key=lambda span: span.group):
        ends = [(span.shard_start, span.shard_start + span.numel) for span in of]
        bounds = torch.tensor(ends, dtype=index[group].dtype, device=index[group].device)
        for first, last in torch.searchsorted(index[group], bounds.view(-1)).view(-1, 2).tolist():
            yield index[group][first:last]


def _shared(parts: Sequence[Tensor], sizes: Sequence[Sequence[int]], group: Any) -> list[Sequence[Tensor]]:
    """Each rank's parts, of these sizes. A collective."""
    from deepspeed import comm as dist

    row, longest, ranks = torch.cat(list(parts)), max(map(sum, sizes)), len(sizes)
    rows = torch.nn.functional.pad(row, (0, longest - row.numel()))
    if ranks > 1 and longest:
        matrix = row.new_empty(ranks * longest)
        dist.all_gather_into_tensor(matrix, rows, group=group)
        rows = matrix
    return [
        each[: sum(of)].split(list(of)) if of else () for each, of in zip(rows.view(ranks, longest), sizes, strict=True)
    ]


def _form(span: Span, count: int) -> Form:
    """In which ranks share the child's elements in a span."""
    if count in (0, span.numel):
        return "none"
    return "bits" if byte_count(span.numel) <= INDEX * count else "index"


def _only(numbers: Sequence[Sequence[int]], forms: Sequence[Sequence[Form]], form: Form) -> list[list[int]]:
    return [[n for n, f in zip(*of, strict=True) if f == form] for of in zip(numbers, forms, strict=True)]
