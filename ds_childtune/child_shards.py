"""The child's elements of one flat shard, as a tensor of their own: see [Note: child shards]."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_childtune.shards import FlatShard
from ds_childtune.tiles import tile_of


@dataclass(frozen=True)
class ChildShard:
    """What the base optimizer steps in place of one flat shard."""

    flat: FlatShard

    index: Tensor
    """1-D, ascending: the child's elements of the flat shard. int32, or int64 where a flat shard has 2**31 elements or more."""

    tensor: Tensor
    """fp32 1-D, of the index's size."""

    @classmethod
    def of(cls, flat: FlatShard, mask: Tensor) -> ChildShard:
        """`mask`: bool 1-D of the flat shard, True = inside the child, or not eligible."""
        dtype = index_dtype(flat.numel)
        parts = [part for f in flat.fragments for part in _places(f.of(mask), f.shard_start, dtype)]
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
        bounds = torch.tensor([start, start + numel], dtype=self.index.dtype, device=self.index.device)
        first, last = torch.searchsorted(self.index, bounds).tolist()
        return first, last

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
    """flat[index] = values, in tiles, as `index_copy_` wants an int64 index twice the size of ours."""
    size = tile_of(flat.device)
    for places, value in zip(index.split(size), values.split(size), strict=True):
        flat.index_copy_(0, places.long(), value.to(flat.dtype))


def index_dtype(numel: int) -> torch.dtype:
    """The smallest of int32 and int64 that holds every index of `numel` elements, and `numel` itself."""
    return torch.int32 if numel <= INT32_NUMEL else torch.int64


INT32_NUMEL: int = torch.iinfo(torch.int32).max
"""Elements of the longest tensor whose indices are int32."""

_NONZERO_TILE = 1 << 28
"""Elements: torch's nonzero takes less than 2**31 on GPUs, and makes an int64 index."""


def _places(mask: Tensor, start: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """The indices at which a fragment's mask is True, of `dtype`, in tiles; the fragment begins at `start` of the flat shard."""
    for i, tile in enumerate(mask.split(_NONZERO_TILE)):
        yield torch.nonzero(tile).view(-1).add_(start + i * _NONZERO_TILE).to(dtype)
