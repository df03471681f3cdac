"""Masks of all ranks at ZeRO-3: what is shared, and what each rank then takes out of a gradient."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import partial
from unittest import mock

import deepspeed
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ds_childtune.child import child_shard
from ds_childtune.zero import child_masks, owner_order
from ds_childtune.zero.child_masks import ChildMasks, OwnPart, ParameterChild
from ds_childtune.zero.owner_order import OwnerOrder
from tests.support.ranks import RankPool

PARAMETERS = ((1, 1.0), (3, 0.5), (17, 0.0), (100, 0.3), (64, 1.0), (1000, 0.1), (1001, 0.02), (5, 0.7), (4097, 0.4))
"""Elements and density of each."""


@dataclass(frozen=True)
class Found:
    kinds: list[str]
    taken: list[Tensor]
    """The child's elements of a gradient of 1, 2, 3, ..."""
    matrix: Tensor
    nbytes: int


def whole_masks() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.rand(numel, generator=generator) < density for numel, density in PARAMETERS]


def partition_of(mask: Tensor, rank: int, ranks: int) -> Tensor:
    size = -(-mask.numel() // ranks)
    return mask[rank * size : (rank + 1) * size]


def own_part(mask: Tensor) -> OwnPart:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    index = partition_of(mask, rank, ranks).nonzero().view(-1).int()
    return OwnPart(mask.numel(), -(-mask.numel() // ranks), index.numel(), lambda: index)


def kind(child: ParameterChild) -> str:
    if child.bits is not None:
        return "bits"
    if child.index is not None:
        return str(child.index.dtype)
    return "whole" if child.kept == child.numel else "nothing"


def found(narrow: bool) -> Found:
    """`narrow`: as if parameters of more than 50 elements had 2**31 of them, all was worked on in several tiles, and there were many
    ranks."""
    deepspeed.init_distributed(verbose=False)
    patches = [
        mock.patch.object(child_masks, "tile_of", return_value=700),
        mock.patch.object(child_shard, "INT32_NUMEL", 50),
        mock.patch.object(owner_order, "_FEW", 0),
        mock.patch.object(owner_order, "_TILE", 300),
    ]
    with contextlib.ExitStack() as narrowed:
        for patch in patches if narrow else ():
            narrowed.enter_context(patch)
        masks = ChildMasks.shared([own_part(mask) for mask in whole_masks()], torch.device("cpu"), None)
        taken = [child.of(torch.arange(1.0, child.numel + 1)) for child in masks.parameters]
        order = OwnerOrder(np.stack([child.counts for child in masks.parameters]), taken[0].device)
        assert (order._tiles is None) != narrow
        return Found([kind(c) for c in masks.parameters], taken, order.rows(taken), masks.nbytes)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_rank_takes_the_child_out_of_a_whole_gradient(pool: RankPool, ranks: int, narrow: bool) -> None:
    masks = whole_masks()
    gradients = [torch.arange(1.0, mask.numel() + 1) for mask in masks]
    owned = [
        torch.cat(
            [partition_of(g, rank, ranks)[partition_of(m, rank, ranks)] for m, g in zip(masks, gradients, strict=True)]
        )
        for rank in range(ranks)
    ]
    columns = max(len(each) for each in owned)
    expected = torch.cat([torch.nn.functional.pad(each, (0, columns - len(each))) for each in owned])
    assert columns > min(len(each) for each in owned), "vacuous: nothing is padded"
    for each in pool[ranks].run(found, narrow):
        assert {*each.kinds} == {"bits", "whole", "nothing", "torch.int64" if narrow else "torch.int32"}, "vacuous"
        for mask, gradient, taken in zip(masks, gradients, each.taken, strict=True):
            assert torch.equal(taken, gradient[mask])
        assert torch.equal(each.matrix, expected)
        assert each.nbytes <= sum(-(-m.numel() // 8) + 2 * ranks for m in masks) * (2 if narrow else 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_many_ranks(dtype: torch.dtype) -> None:
    """Beside a loop over ranks and parameters; some own nothing, and some parameters have nothing."""
    draw = np.random.default_rng(0)
    counts = draw.integers(0, 9, (90, 70)) * (draw.random((90, 70)) < 0.6) * (draw.random((90, 1)) < 0.9)
    values = [
        torch.randn(int(of.sum()), generator=torch.Generator().manual_seed(i)).to(dtype) for i, of in enumerate(counts)
    ]
    columns = int(counts.sum(0).max())
    expected = torch.zeros(70, columns, dtype=dtype)
    for rank in range(70):
        column = 0
        for of, value in zip(counts, values, strict=True):
            start, numel = int(of[:rank].sum()), int(of[rank])
            expected[rank, column : column + numel] = value[start : start + numel]
            column += numel
    for tile in (1000, 1 << 21):
        with mock.patch.object(owner_order, "_TILE", tile):
            order = OwnerOrder(counts, torch.device("cpu"))
        assert order._tiles is not None
        assert (len(order._tiles) > 1) == (tile == 1000)
        assert torch.equal(order.rows(values), expected.view(-1))
        assert torch.equal(order._concatenated(values), expected.view(-1))


def test_the_smaller_of_both_is_kept() -> None:
    smaller = partial(child_masks._is_smaller_as_bits, OwnPart(3200, 1600, 0, torch.Tensor))
    assert [smaller(kept, 2) for kept in (99, 100, 101, 3200)] == [False, True, True, False]
