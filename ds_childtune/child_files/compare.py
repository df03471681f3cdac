"""What two children have in common, parameter by parameter and layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ds_childtune.child_files.fingerprint import bits
from ds_childtune.child_files.format import ChildFileError, ParameterEntry, Piece
from ds_childtune.child_files.reader import SavedChild
from ds_childtune.names import block_of


@dataclass(frozen=True)
class Overlap:
    """Elements of two children in one parameter, or in several of them."""

    name: str
    numel: int
    first: int
    """Inside the first child."""
    second: int
    """Inside the second child."""
    both: int
    equal: int
    """Inside both, with the same value to the bit."""

    @property
    def jaccard(self) -> float:
        """Share of the elements inside either child that are inside both; 1 where there are none."""
        either = self.first + self.second - self.both
        return self.both / either if either else 1.0

    @property
    def by_chance(self) -> float:
        """Elements that two random children of these sizes would have in common."""
        return self.first * self.second / self.numel if self.numel else 0.0


def compare(one: SavedChild, other: SavedChild) -> list[Overlap]:
    """One entry for each parameter that is stored in either, in the first child's order.

    Raises:
        ChildFileError: when the children are not of models with the same parameters, or a file is damaged.
    """
    shapes = [{p.name: p.shape for p in child.manifest.parameters} for child in (one, other)]
    if shapes[0] != shapes[1]:
        names = [n for n in (*shapes[0], *shapes[1]) if shapes[0].get(n) != shapes[1].get(n)]
        raise ChildFileError(
            f"{other.folder}: expected the parameters and shapes of {one.folder}, got others ({', '.join(names[:3])})."
            " Remedy: compare children of one base model."
        )
    entries = []
    for batch in _batches(one.manifest.parameters):
        first, second = (_parts(child, batch) for child in (one, other))
        for parameter in batch:
            pieces = first.get(parameter.name), second.get(parameter.name)
            if pieces != (None, None):
                entries.append(_overlap(parameter.name, parameter.numel, *pieces))
    return entries


_BATCH = 1 << 30
"""Elements whose pieces are in memory at once."""


def _batches(parameters: Iterable[ParameterEntry]) -> Iterator[list[ParameterEntry]]:
    batch: list[ParameterEntry] = []
    for parameter in parameters:
        if batch and sum(p.numel for p in batch) + parameter.numel > _BATCH:
            yield batch
            batch = []
        batch.append(parameter)
    yield batch


def _parts(child: SavedChild, parameters: Iterable[ParameterEntry]) -> dict[str, list[Piece]]:
    """The pieces of those that are stored."""
    names = [p.name for p in parameters if p.name in child.stored]
    return dict(zip(names, child.read_parts([child.whole(name) for name in names]), strict=True))


def by_layer(overlaps: Iterable[Overlap]) -> list[Overlap]:
    """Sums over the parameters of each repeated block, named by its path; others stay by themselves."""
    groups: dict[str, list[Overlap]] = {}
    for overlap in overlaps:
        groups.setdefault(block_of(overlap.name) or overlap.name, []).append(overlap)
    return [total(name, group) for name, group in groups.items()]


def total(name: str, overlaps: Iterable[Overlap]) -> Overlap:
    """The sums."""
    group = list(overlaps)
    counts = [f.name for f in fields(Overlap)][1:]
    return Overlap(name, *(sum(getattr(o, count) for o in group) for count in counts))


def _overlap(name: str, numel: int, one: list[Piece] | None, other: list[Piece] | None) -> Overlap:
    first, second = (sum(piece.kept for piece in pieces or ()) for pieces in (one, other))
    both = equal = 0
    for mine, others in _aligned(one or [], other or []):
        count, same = _common(mine, others)
        both, equal = both + count, equal + same
    return Overlap(name, numel, first, second, both, equal)


def _aligned(one: Sequence[Piece], other: Sequence[Piece]) -> Iterator[tuple[Piece, Piece]]:
    """The same runs of elements out of two lists of pieces, each in the order of elements."""
    i = j = 0
    while i < len(one) and j < len(other):
        start, end = max(one[i].start, other[j].start), min(one[i].end, other[j].end)
        if start < end:
            yield one[i].narrow(start, end), other[j].narrow(start, end)
        if one[i].end <= end:
            i += 1
        if j < len(other) and other[j].end <= end:
            j += 1


def _common(one: Piece, other: Piece) -> tuple[int, int]:
    """Elements inside both, and how many of them have the same value. No mask is made: a forged shape costs nothing."""
    if other.index is None:
        one, other = other, one
    if one.index is None or not one.kept:
        count, at = other.kept if one.index is None else 0, other.index
        theirs: Tensor | slice = slice(None if one.kept else 0)
    else:
        assert other.index is not None
        found = torch.searchsorted(one.index, other.index.to(one.index.dtype)).clamp_(max=one.kept - 1)
        theirs = one.index[found] == other.index
        at, count = found[theirs], int(theirs.sum())
    mine, others = (piece.tensors.get("values") for piece in (one, other))
    if mine is None or others is None or mine.dtype != others.dtype or not count:
        return count, 0
    mine = mine if at is None else mine[at.long()]
    return count, int((bits(mine) == bits(others[theirs])).sum())
