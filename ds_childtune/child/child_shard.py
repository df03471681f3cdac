"""The child's elements of one flat shard, as a separate tensor: see [Note: child shards]."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ds_childtune.child.tiles import tile_of
from ds_childtune.shards import FlatShard


@dataclass(frozen=True)
class ChildShard:
    """What the base optimizer steps in place of one flat shard."""

    flat: FlatShard

    index: Tensor
    """1-D, ascending: the child's elements of the flat shard. int32, or int64 where a flat shard has 2**31 elements or more."""

    tensor: Tensor
    """fp32 1-D, of the index's size."""

    _spans: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict, compare=False, repr=False)
    """What `span` has found: the host waits for the device once for all fragments, and in a training step not at all."""

    @classmethod
    def of(cls, flat: FlatShard, mask: Tensor) -> ChildShard:
        """`mask`: bool 1-D of the flat shard, True = inside the child, or not eligible."""
        dtype = index_dtype(flat.numel)
        gaps = list(flat.padding())
        mask = mask.clone() if gaps else mask
        for start, numel in gaps:
            mask.narrow(0, start, numel).fill_(False)
        parts = list(_places(mask, dtype))
        index = torch.cat(parts) if parts else torch.empty(0, dtype=dtype, device=mask.device)
        return cls(flat, index, flat.flat().index_select(0, index).float())

    def gather(self) -> bool:
        """Take gradient and weights from the flat shard. False when it has no gradient in this step."""
        grad = self.flat.flat_grad()
        if grad is None:
            return False
        self.tensor.grad = grad.index_select(0, self.index).to(self.tensor.dtype)
        if self.flat.tensor.dtype == self.tensor.dtype:
            torch.index_select(self.flat.flat(), 0, self.index, out=self.tensor)
        else:
            weights = self.flat.flat().index_select(0, self.index)
            edited = weights != self.tensor.to(weights.dtype)
            self.tensor.copy_(torch.where(edited, weights.float(), self.tensor))
        return True

    def scatter(self) -> None:
        """Put the weights back."""
        put_(self.flat.flat(), self.index, self.tensor)

    def span(self, start: int, numel: int) -> tuple[int, int]:
        """First and last + 1 of the child's elements that lie in [start, start + numel) of the flat shard."""
        if not self._spans:
            self.find_spans([(f.shard_start, f.numel) for f in self.flat.fragments])
        if (start, numel) not in self._spans:
            self.find_spans([(start, numel)])
        return self._spans[start, numel]

    def find_spans(self, places: Sequence[tuple[int, int]]) -> None:
        """Find `span` of many (start, numel) at once."""
        bounds = torch.tensor([(start, start + numel) for start, numel in places], dtype=self.index.dtype)
        found = torch.searchsorted(self.index, bounds.view(-1).to(self.index.device)).view(len(places), 2).tolist()
        self._spans.update((place, (first, last)) for place, (first, last) in zip(places, found, strict=True))

    def at(self, places: Tensor, values: Tensor, default: Tensor) -> Tensor:
        """`values` (1-D, one for each element of the child) at `places` of the flat shard; `default` outside the child."""
        if not self.index.numel():
            return default
        found = torch.searchsorted(self.index, places.to(self.index.dtype)).clamp_(max=self.index.numel() - 1)
        return torch.where(self.index[found] == places, values[found].to(default.dtype), default)

    def moved(self, values: Tensor, index: Tensor, default: Tensor) -> Tensor:
        """`values`, one for each element of this child, as those of another child of the same flat shard.

        Args:
            index: the other child's.
            default: of the other child's size: the values of its elements that are not in this child.
        """
        size = tile_of(index.device)
        tiles = zip(index.split(size), default.split(size), strict=True)
        return torch.cat([self.at(places, values, new) for places, new in tiles]) if index.numel() else default


def put_(flat: Tensor, index: Tensor, values: Tensor) -> None:
    """flat[index] = values, in tiles, because `index_copy_` needs an int64 index, twice the size of ours."""
    size = tile_of(flat.device)
    for places, value in zip(index.split(size), values.split(size), strict=True):
        flat.index_copy_(0, places.long(), value.to(flat.dtype))


def index_dtype(numel: int) -> torch.dtype:
    """The smallest of int32 and int64 that holds every index of `numel` elements, and `numel` itself."""
    return torch.int32 if numel <= INT32_NUMEL else torch.int64


INT32_NUMEL: int = torch.iinfo(torch.int32).max
"""Elements of the longest tensor whose indices are int32."""

_NONZERO_TILE = 1 << 24
"""Elements: torch's nonzero makes an int64 index, and the host waits for each."""


def _places(mask: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The indices at which a flat shard's mask is True, of `dtype`, in tiles: not by fragment, of which there may be thousands."""
    for i, tile in enumerate(mask.split(_NONZERO_TILE)):
        yield torch.nonzero(tile).view(-1).add_(i * _NONZERO_TILE).to(dtype)
