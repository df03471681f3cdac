"""Whole parameters and totals, put together from the ranks' fragments. Collectives; each element is counted once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ds_childtune.ranks import device, sum_over_ranks
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


def count_kept(names: Sequence[str], masks: Iterable[tuple[Fragment, Tensor]]) -> list[int]:
    """For each of `names`, how many of its eligible elements are True in the masks."""
    position = {name: i for i, name in enumerate(names)}
    kept = torch.zeros(len(position), dtype=torch.int64, device=device())
    for fragment, mask in masks:
        if fragment.counted and fragment.eligible:
            kept[position[fragment.name]] += mask.sum().to(kept.device)
    sum_over_ranks(kept)
    return kept.tolist()
