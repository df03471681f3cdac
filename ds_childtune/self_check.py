"""The start-up self-check: on a sample of elements, the complement did not move and the child did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ds_childtune.shards import FlatShard

_SAMPLES = 1024
"""Elements of each kind that are watched in a flat shard."""


class Child(Protocol):
    """What the check asks a ChildTuning-D child, about a flat shard."""

    def frozen(self, tensor: Tensor) -> Tensor | None: ...
    def weights_at(self, shard: FlatShard, index: Tensor) -> Tensor: ...
    def gradient_at(self, shard: FlatShard, index: Tensor) -> Tensor | None: ...


@dataclass(frozen=True)
class _Watch:
    child: Child
    shard: FlatShard
    index: Tensor
    """int64: watched elements of the flat shard."""
    outside: Tensor
    """bool: whether each is outside the child."""
    before: Tensor
    """Their weights before the step."""
    has_gradient: Tensor
    """bool: whether the masked gradient of each is nonzero."""


class SelfCheck:
    """Watches one applied step of ChildTuning-D. `verdict` is then summed over the ranks by the caller."""

    def __init__(self) -> None:
        self._watches: list[_Watch] = []
        self._outside_moved = 0
        self._child_moved = 0
        self._child_could_move = 0

    def before_step(self, shard: FlatShard, child: Child) -> None:
        """Called after the gradient was masked, before the base optimizer steps."""
        if not shard.numel:
            return
        frozen = child.frozen(shard.tensor)
        index = self._sample(shard.numel, frozen, shard.tensor.device)
        grad = child.gradient_at(shard, index)
        if grad is None:
            return
        outside = torch.zeros_like(index, dtype=torch.bool) if frozen is None else frozen[index]
        self._watches.append(_Watch(child, shard, index, outside, child.weights_at(shard, index).clone(), grad != 0))

    def after_step(self, learning_rate: float) -> None:
        """Called after the base optimizer's step on the shards seen since the last call."""
        for watch in self._watches:
            moved = watch.child.weights_at(watch.shard, watch.index) != watch.before
            self._outside_moved += int((moved & watch.outside).sum())
            if learning_rate:
                self._child_moved += int((moved & ~watch.outside).sum())
                self._child_could_move += int((watch.has_gradient & ~watch.outside).sum())
        self._watches.clear()

    def verdict(self, device: torch.device) -> Tensor:
        """int64 [3]: outside elements that moved, child elements that moved, child elements with a gradient to move by."""
        return torch.tensor([self._outside_moved, self._child_moved, self._child_could_move], device=device)

    @staticmethod
    def _sample(numel: int, frozen: Tensor | None, device: torch.device) -> Tensor:
        """Evenly spaced elements, and as many of each kind among the first of a few evenly spaced windows."""
        spaced = torch.linspace(0, numel - 1, min(numel, _SAMPLES), dtype=torch.float64, device=device).long()
        if frozen is None:
            return spaced
        window = min(numel, 1 << 16)
        parts: list[Tensor] = [spaced]
        for kind in (frozen[:window], ~frozen[:window], frozen[-window:], ~frozen[-window:]):
            parts.append(torch.nonzero(kind).view(-1)[:_SAMPLES])
        parts[3:] = [part + (numel - window) for part in parts[3:]]
        index: Tensor = torch.cat(parts).unique()
        return index


def judge(verdict: Sequence[int]) -> bool:
    """True when the check has passed, False when it has to be repeated at the next step.

    Raises:
        RuntimeError: when an element outside the child moved, or the child did not.
    """
    outside_moved, child_moved, child_could_move = verdict
    if outside_moved:
        raise RuntimeError(
            f"ChildTuning-D self-check: expected no element outside the child to move, but {outside_moved} of the sampled"
            " ones did. The base optimizer moves weights by something other than its gradient, moments and weight decay."
            " Remedy: use AdamW, SGD or Lion; and check that no other hook or callback edits the weights."
        )
    if child_could_move and not child_moved:
        raise RuntimeError(
            "ChildTuning-D self-check: expected the child to move, but none of its sampled elements did, though"
            f" {child_could_move} have gradients and the learning rate is not 0. Remedy: check that the optimizer given to"
            " deepspeed.initialize is the one that steps, and that nothing restores the weights."
        )
    return bool(child_could_move)
