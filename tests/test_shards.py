"""Index arithmetic, on layouts that hypothesis makes up: with gaps, padding, fragments of one element and none at all."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_childtune.child.child_shard import ChildShard
from ds_childtune.child.compact import CompactChild
from ds_childtune.child.dense import DenseChild
from ds_childtune.child.generator import INDEX_BLOCK, split_blocks
from ds_childtune.child.mask_kernels import _FEW_LANES, _LANES, _fold
from ds_childtune.child.optimizer_trial import behaviour_of
from ds_childtune.shards import FlatShard, Fragment, mark_eligible


@st.composite
def layouts(draw: st.DrawFn) -> FlatShard:
    """A flat shard of up to four fragments; its weights are 1, 2, 3, ... ."""
    fragments = []
    end = draw(st.integers(0, 3))
    for i in range(draw(st.integers(0, 4))):
        numel = draw(st.integers(1, 9))
        fragments.append(Fragment(f"p{i}", draw(st.integers(0, 50)), end, numel))
        end += numel + draw(st.integers(0, 3))
    return FlatShard(torch.arange(1.0, end + 1), tuple(fragments))


@st.composite
def masked_layouts(draw: st.DrawFn) -> tuple[FlatShard, torch.Tensor]:
    shard = draw(layouts())
    bits = draw(st.lists(st.booleans(), min_size=shard.numel, max_size=shard.numel))
    return shard, torch.tensor(bits, dtype=torch.bool)


def base_optimizer(shard: FlatShard) -> torch.optim.Optimizer:
    return torch.optim.SGD([shard.tensor], lr=1.0)


def test_a_sparse_gradient_is_seen_whole() -> None:
    """Without ZeRO nn.Embedding(sparse=True) has one; a mask that acts on a copy would act on nothing."""
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1, 3, 3])).sum().backward()
    shard = FlatShard(embedding.weight, (Fragment("p", 0, 0, 10),))
    grad = shard.flat_grad()
    assert grad is not None
    assert grad.tolist() == [0, 0, 1, 1, 0, 0, 2, 2, 0, 0]
    grad.zero_()
    assert embedding.weight.grad is not None
    assert not embedding.weight.grad.any()


@given(masked_layouts())
def test_a_child_shard_holds_the_masked_elements_of_fragments(case: tuple[FlatShard, torch.Tensor]) -> None:
    shard, mask = case
    inside = [f.shard_start + i for f in shard.fragments for i in range(f.numel) if mask[f.shard_start + i]]
    child = ChildShard.of(shard, mask)
    assert child.index.tolist() == inside
    assert child.tensor.tolist() == [i + 1 for i in inside]

    shard.tensor.grad = -torch.arange(1.0, shard.numel + 1)
    assert child.gather()
    assert child.tensor.grad is not None
    assert child.tensor.grad.tolist() == [-i - 1 for i in inside]
    before = shard.tensor.clone()
    child.tensor.mul_(10)
    child.scatter()
    assert shard.tensor.tolist() == [before[i] * (10 if i in inside else 1) for i in range(shard.numel)]


@given(masked_layouts())
def test_both_ways_of_training_a_child_have_its_mask(case: tuple[FlatShard, torch.Tensor]) -> None:
    shard, mask = case
    compact = CompactChild.of([shard], [mask], base_optimizer(shard))
    behaviour = behaviour_of(base_optimizer(shard), [shard.tensor], compact=False)
    dense = DenseChild([shard], [mask], base_optimizer(shard), behaviour, decay_outside=False)
    for fragment in shard.fragments:
        for child in (compact, dense):
            assert torch.equal(child.child_mask(shard, fragment, step=0), fragment.of(mask))


@given(layouts(), st.sets(st.sampled_from(["p0", "p1", "p2", "p3"])))
def test_eligible_fragments_are_those_named(shard: FlatShard, names: set[str]) -> None:
    (marked,) = mark_eligible([shard], frozenset(names))
    assert [f.name for f in marked.eligible] == [f.name for f in shard.fragments if f.name in names]
    assert [(f.name, f.param_start, f.shard_start, f.numel) for f in marked.fragments] == [
        (f.name, f.param_start, f.shard_start, f.numel) for f in shard.fragments
    ]


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 8))
def test_overlapping_fragments_are_an_error(first: int, second: int, start: int) -> None:
    fragments = (Fragment("a", 0, 0, first), Fragment("b", 0, start, second))
    tensor = torch.zeros(max(first, start + second))
    if start >= first:
        FlatShard(tensor, fragments)
    else:
        with pytest.raises(RuntimeError, match="overlaps"):
            FlatShard(tensor, fragments)
    with pytest.raises(RuntimeError, match="leaves"):
        FlatShard(tensor[:-1], (Fragment("a", 0, 0, tensor.numel()),))


@given(st.integers(0, 5 * INDEX_BLOCK), st.integers(0, 3 * INDEX_BLOCK))
def test_pieces_cover_a_fragment_and_cross_no_block(param_start: int, numel: int) -> None:
    pieces = split_blocks(Fragment("w", param_start, 17, numel))
    place = param_start
    for piece in pieces:
        assert piece.param_start == place
        assert piece.shard_start - 17 == place - param_start
        assert piece.param_start // INDEX_BLOCK == (piece.param_start + piece.numel - 1) // INDEX_BLOCK
        place += piece.numel
    assert place == param_start + numel


@given(st.integers(1, 1 << 31))
def test_folds_cover_every_element(numel: int) -> None:
    """But for fewer than two rows' at the end; and never in one row, nor in narrow ones."""
    rows, lanes = _fold(numel)
    assert _FEW_LANES <= lanes <= _LANES
    assert rows != 1
    assert 0 <= numel - rows * lanes < 2 * _LANES
    assert rows * lanes == numel or numel % _FEW_LANES or numel < 2 * _FEW_LANES
