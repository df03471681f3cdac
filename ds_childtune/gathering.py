"""Whole parameters and totals, put together from the ranks' fragments, and compared. Collectives; each element is counted once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ds_childtune.child.tiles import tile_of
from ds_childtune.ranks import device, max_over_ranks, sum_over_ranks
from ds_childtune.shards import Fragment


def gather(name: str, shape: torch.Size, values: Iterable[tuple[Fragment, Tensor]], dtype: torch.dtype) -> Tensor:
    """One parameter's values of `shape` and `dtype`, whole, on every rank; zero where no rank has any.

    Args:
        values: this rank's fragments, of any parameters, each with a 1-D tensor of its size.
    """
    whole = torch.zeros(shape.numel(), dtype=dtype, device=device())
    for fragment, value in values:
        if fragment.name == name and fragment.counted:
            whole[fragment.param_start : fragment.param_start + fragment.numel] = value.to(whole.device, dtype)
    sum_over_ranks(whole)
    return whole.view(shape)


class KeptCounts:
    """For each parameter, how many of its eligible elements are inside a child."""

    def __init__(self, names: Iterable[str]) -> None:
        self._position = {name: i for i, name in enumerate(names)}
        self._kept = torch.zeros(len(self._position), dtype=torch.int64, device=device())

    def add(self, fragment: Fragment, mask: Tensor) -> None:
        """Count a fragment of this rank. `mask`: bool 1-D of its size, True = inside."""
        if fragment.counted and fragment.eligible:
            self._kept[self._position[fragment.name]] += mask.sum().to(self._kept.device)

    def over_ranks(self) -> list[int]:
        """One count for each name, in their order. A collective."""
        sum_over_ranks(self._kept)
        return self._kept.tolist()


def unlike_masks(masks: Iterable[tuple[Fragment, Tensor]]) -> list[str]:
    """Names of the fragments whose masks are not the same on all ranks. Collectives, where every rank has the same fragments.

    Args:
        masks: a bool mask for each, True = inside.
    """
    names, unlike = [], []
    for fragment, mask in masks:
        found = torch.zeros((), dtype=torch.uint8, device=device())
        for tile in mask.to(device()).split(tile_of(device())):
            inside_and_outside = torch.stack([tile, ~tile]).to(torch.uint8)
            max_over_ranks(inside_and_outside)
            found |= inside_and_outside.amin(0).amax()
        names.append(fragment.name)
        unlike.append(found)
    return [name for name, other in zip(names, unlike, strict=True) if other]
