"""What each way of training a child keeps to: see `ds_childtune/child/network.py`. One flat shard, no engine."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ds_childtune.child.compact import CompactChild
from ds_childtune.child.dense import DenseChild
from ds_childtune.child.network import ChildNetwork, FixedChild, Stepped
from ds_childtune.child.optimizer_trial import behaviour_of
from ds_childtune.child.task_free import TaskFreeChild
from ds_childtune.shards import FlatShard, Fragment

NUMEL, PADDING = 41, 3
MASK = torch.arange(NUMEL + PADDING) % 3 == 0
EVERYTHING = torch.ones(NUMEL + PADDING, dtype=torch.bool)


def task_free(shard: FlatShard, optimizer: torch.optim.Optimizer, mask: Tensor) -> TaskFreeChild:
    return TaskFreeChild([shard], optimizer, seed=3, reserve_p=0.4)


def dense(shard: FlatShard, optimizer: torch.optim.Optimizer, mask: Tensor) -> DenseChild:
    behaviour = behaviour_of(optimizer, [shard.tensor], compact=False)
    child = DenseChild([shard], [mask.clone()], optimizer, behaviour, decay_outside=False)
    child.take_over()
    return child


def compact(shard: FlatShard, optimizer: torch.optim.Optimizer, mask: Tensor) -> CompactChild:
    return CompactChild.of([shard], [mask.clone()], optimizer)


Make = Callable[[FlatShard, torch.optim.Optimizer, Tensor], ChildNetwork]
CHILDREN: dict[str, Make] = {"F": task_free, "D": dense, "D-compact": compact}
FIXED = ["D", "D-compact"]


def begin(make: Make, mask: Tensor = MASK) -> tuple[FlatShard, torch.optim.Optimizer, ChildNetwork]:
    tensor = nn.Parameter(torch.randn(NUMEL + PADDING, generator=torch.Generator().manual_seed(1)))
    shard = FlatShard(tensor, (Fragment("a", 0, 0, 20, eligible=True), Fragment("b", 0, 20, 21, eligible=True)))
    optimizer = torch.optim.AdamW([tensor], lr=0.1, weight_decay=0.3)
    return shard, optimizer, make(shard, optimizer, mask)


def set_gradient(shard: FlatShard, seed: int) -> None:
    shard.tensor.grad = torch.randn(shard.numel, generator=torch.Generator().manual_seed(seed))


def step(shard: FlatShard, optimizer: torch.optim.Optimizer, child: ChildNetwork, number: int) -> None:
    set_gradient(shard, seed=number)
    child.recover()
    child.before_step(optimizer, [Stepped(optimizer.param_groups[0], [shard])], number)
    optimizer.step()
    child.after_step()


@pytest.mark.parametrize("kind", CHILDREN)
def test_a_step_that_an_exception_ended_leaves_nothing_behind(kind: str) -> None:
    """Weight decay and param groups are as they were, and outside a fixed child nothing has moved."""
    ends = []
    for interrupted in (False, True):
        shard, optimizer, child = begin(CHILDREN[kind])
        step(shard, optimizer, child, 0)
        if interrupted:
            set_gradient(shard, seed=1)
            child.recover()
            child.before_step(optimizer, [Stepped(optimizer.param_groups[0], [shard])], 1)
        step(shard, optimizer, child, 1)
        step(shard, optimizer, child, 2)
        ends.append((shard.tensor.detach().clone(), optimizer.param_groups[0]["weight_decay"]))
        assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(shard.tensor)]
    # A dense child has decayed its weights, where the optimizer would have, before the exception.
    same = ends[0][0] == ends[1][0]
    assert (same | MASK).all() if kind == "D" else same.all()
    assert ends[0][1] == ends[1][1] == 0.3


@pytest.mark.parametrize("kind", FIXED)
def test_masks_are_true_where_elements_train(kind: str) -> None:
    shard, optimizer, child = begin(CHILDREN[kind])
    before = shard.tensor.detach().clone()
    for number in range(3):
        step(shard, optimizer, child, number)
    moved = shard.tensor.detach() != before
    assert torch.equal(moved[:NUMEL], MASK[:NUMEL])
    assert 0 < MASK.sum() < NUMEL, "vacuous"
    fixed: FixedChild = child  # type: ignore[assignment]
    of_fragments = torch.cat([child.child_mask(shard, f, 3) for f in shard.fragments])
    assert torch.equal(of_fragments, MASK[:NUMEL])
    assert torch.equal(fixed.inside_at(shard, torch.arange(NUMEL)), MASK[:NUMEL])
    if isinstance(fixed, CompactChild):  # a dense child is given masks that say so
        assert fixed.inside_at(shard, torch.arange(NUMEL, shard.numel)).all(), "padding may move"
    gradient = torch.full((21,), float("nan"))
    fixed.mask_gradient_(shard, gradient, 20)
    assert torch.equal(gradient.isnan(), MASK[20:NUMEL])


@pytest.mark.parametrize("kind", FIXED)
def test_a_whole_shard_has_no_mask(kind: str) -> None:
    shard, _, child = begin(CHILDREN[kind], EVERYTHING)
    fixed: FixedChild = child  # type: ignore[assignment]
    assert fixed.inside_at(shard, torch.arange(shard.numel)).all()
    assert all(child.child_mask(shard, f, 0).all() for f in shard.fragments)


@pytest.mark.parametrize("kind", CHILDREN)
def test_a_child_says_what_it_is(kind: str) -> None:
    shard, optimizer, child = begin(CHILDREN[kind])
    assert child.fixed == (kind != "F")
    assert child.optimizer is optimizer
    assert set(child.shards) == ({shard.tensor} if kind == "D-compact" else set())
    step(shard, optimizer, child, 0)
    child.release()
    state = optimizer.state[shard.tensor]
    assert state["exp_avg"].shape == shard.tensor.shape, "dense state after the child is released"
