"""What two children have in common, parameter by parameter and layer by layer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch

from ds_childtune.child_format import ChildFileError, Piece
from ds_childtune.child_reader import Child
from ds_childtune.fingerprint import bits


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


def compare(one: Child, other: Child) -> list[Overlap]:
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
    for parameter in one.manifest.parameters:
        pieces = [c.read(parameter.name) if parameter.name in c.places else None for c in (one, other)]
        if any(piece is not None for piece in pieces):
            entries.append(_overlap(parameter.name, parameter.numel, *pieces))
    return entries


def by_layer(overlaps: Iterable[Overlap]) -> list[Overlap]:
    """Sums over the parameters of each repeated block, named by its path; others stay by themselves."""
    groups: dict[str, list[Overlap]] = {}
    for overlap in overlaps:
        block = re.match(r"(?:[^.]+\.)*?\d+(?=\.)", overlap.name)
        groups.setdefault(block.group(0) if block else overlap.name, []).append(overlap)
    return [total(name, group) for name, group in groups.items()]


def total(name: str, overlaps: Iterable[Overlap]) -> Overlap:
    """The sums."""
    group = list(overlaps)
    counts = [f.name for f in fields(Overlap)][1:]
    return Overlap(name, *(sum(getattr(o, count) for o in group) for count in counts))


def _overlap(name: str, numel: int, one: Piece | None, other: Piece | None) -> Overlap:
    if one is None or other is None:
        return Overlap(name, numel, one.kept if one else 0, other.kept if other else 0, 0, 0)
    both = one.mask() & other.mask()
    mine, others = (piece.tensors.get("values", torch.empty(0)) for piece in (one, other))
    equal = 0
    if mine.dtype == others.dtype and mine.numel() == one.kept and others.numel() == other.kept:
        equal = int((bits(mine)[both[one.mask()]] == bits(others)[both[other.mask()]]).sum())
    return Overlap(name, numel, one.kept, other.kept, int(both.sum()), equal)
