"""The child in one row at ZeRO 1 and 2: what is taken of gradients, and where new weights go, beside plain boolean indexing."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ds_childtune.zero import pieces as shared
from ds_childtune.zero.child_layout import ChildLayout
from tests.support.ranks import RankPool

GROUPS = [[1, 7, 300, 4096, 50], [1000, 3]]
"""Elements of each parameter."""
DENSITIES = [[1.0, 0.5, 0.01, 0.2, 0.0], [1.0, 0.0]]


def padded(tensors: list[Tensor], ranks: int) -> Tensor:
    flat = torch.cat(tensors)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % ranks))


def there_and_back(
    densities: list[list[float]], tile: int, groups: list[list[int]] = GROUPS
) -> tuple[list[Tensor], list[Tensor], set[str], int]:
    """Each time what came out and what was expected; the forms of other ranks' pieces; bytes of all masks."""
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    draw = torch.Generator().manual_seed(0)
    masks, news, grads = [], [], []
    for sizes, of in zip(groups, densities, strict=True):
        masks.append([torch.rand(n, generator=draw) < p for n, p in zip(sizes, of, strict=True)])
        news.append([torch.randn(n, generator=draw) for n in sizes])
        grads.append([torch.randn(n, generator=draw) for n in sizes])
    flat_masks = [padded(each, ranks) for each in masks]
    parts = [mask.chunk(ranks) for mask in flat_masks]
    optimizer = SimpleNamespace(
        dp_process_group=dist.group.WORLD,
        partition_size=[mask.numel() // ranks for mask in flat_masks],
        bit16_groups_flat=[torch.zeros(mask.numel()) for mask in flat_masks],
        round_robin_bit16_groups=grads,
        round_robin_bit16_offsets=[[sum(sizes[:i]) for i in range(len(sizes))] for sizes in groups],
    )
    shards = [SimpleNamespace(index=part[rank].nonzero().view(-1).int()) for part in parts]
    with mock.patch.object(shared, "tile_of", return_value=tile):
        layout = ChildLayout(optimizer, shards)  # type: ignore[arg-type]

    row = torch.zeros(layout.numel)
    for gradient in (g for group in grads for g in group):
        for piece in layout.pieces.get(id(gradient), ()):
            row.narrow(0, piece.start, piece.count).add_(piece.of(gradient))

    def of_owner(tensors: list[list[Tensor]], owner: int) -> Tensor:
        flats = [padded(each, ranks).chunk(ranks)[owner] for each in tensors]
        return torch.cat([flat[part[owner]] for flat, part in zip(flats, parts, strict=True)])

    found, expected = [], []
    for owner, start in enumerate(layout._cut.starts):
        expected.append(of_owner(grads, owner))
        found.append(row.narrow(0, start, expected[-1].numel()))
    owned, flats = of_owner(news, rank), optimizer.bit16_groups_flat
    layout.put(owned, flats)
    layout.spread(owned, flats)
    found += flats
    expected += [torch.where(m, padded(n, ranks), 0.0) for m, n in zip(flat_masks, news, strict=True)]
    forms = set()
    for owner, pieces in enumerate(layout._of_owner):
        for piece in pieces:
            if owner != rank:
                forms.add("bits" if piece.bits is not None else "index" if piece.index is not None else "whole")
    return found, expected, forms, layout.nbytes


@pytest.mark.parametrize("tile", [64, 1 << 20])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_element_there_and_back(pool: RankPool, world_size: int, tile: int) -> None:
    forms: set[str] = set()
    for found, expected, of, nbytes in pool[world_size].run(there_and_back, DENSITIES, tile):
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert sum(int(one.count_nonzero()) for one in found) > 1000, "vacuous"
        forms |= of
        assert nbytes <= sum(map(sum, GROUPS)) / 8 + 64 * world_size, (
            "a bit for each element; ranks are padded to the longest"
        )
    assert forms == (set() if world_size == 1 else {"bits", "index", "whole"}), "vacuous"


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_nothing_and_everything(pool: RankPool, density: float) -> None:
    """Neither needs a mask. Ranks have no element, or all."""
    of = [[density if n == 1000 else 0.0 for n in sizes] for sizes in GROUPS]
    for found, expected, _, nbytes in pool[4].run(there_and_back, of, 64):
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert nbytes == 0


def test_a_rank_that_owns_only_padding(pool: RankPool) -> None:
    for found, expected, _, _ in pool[4].run(there_and_back, [[1.0, 0.5]], 64, [[1, 2]]):
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert any(one.any() for one in found), "vacuous"
