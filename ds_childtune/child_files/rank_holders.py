"""Which rank writes which elements: found by the ranks together, see [Note: holders]."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from ds_childtune.child_files.holders import Holders
from ds_childtune.ranks import largest_of_ranks, this_rank, true_on_all


def gather_holders(numels: Mapping[str, int], own: Iterable[tuple[str, int, int]]) -> Holders | None:
    """Which ranks hold which elements, or None where it is not as [Note: holders] says. The same on every rank.

    Tensors of a fixed number of integers for each parameter are reduced, whatever the number of ranks.

    Args:
        numels: elements of every parameter; the same names in the same order on every rank.
        own: what this rank holds: name, first element, number of elements.
    """
    rank, position = this_rank(), {name: i for i, name in enumerate(numels)}
    start = torch.zeros(len(numels), dtype=torch.int64)
    end, pieces = torch.zeros_like(start), torch.zeros_like(start)
    for name, first_element, count in own:
        if count:
            i = position[name]
            start[i], end[i] = first_element, first_element + count
            pieces[i] += 1
    holds, nobody = pieces > 0, torch.iinfo(torch.int64).min
    first = -largest_of_ranks(torch.where(holds, -rank, nobody))
    held = first >= 0
    first.masked_fill_(~held, 0)
    here, none = end - start, torch.zeros_like(start)
    is_first = holds & (first == rank)
    mine = torch.stack([torch.where(is_first, here, none), torch.where(holds & ~is_first, here, none)])
    head, each = largest_of_ranks(mine)
    whole = torch.tensor(list(numels.values()), dtype=torch.int64)
    expected_start = torch.minimum(head + (rank - first - 1) * each, whole)
    expected_start = torch.where(first < rank, expected_start, none)
    expected_end = torch.where(
        first < rank, torch.minimum(expected_start + each, whole), torch.where(is_first, head, none)
    )
    right = torch.where(holds, (start == expected_start) & (end == expected_end), expected_start == expected_end)
    right &= pieces <= 1
    lost = held & (head < whole) & (each == 0)
    if not true_on_all(bool((right & ~lost | ~held & ~holds).all())):
        return None
    return Holders(tuple(first.tolist()), tuple(head.tolist()), tuple(each.tolist()))
