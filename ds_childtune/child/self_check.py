"""The start-up self-check: on a sample of elements, the complement did not move and the child did.

[Note: what must have moved]
An element outside the child must not move in any step. One inside it moves in most steps, but none has to: an optimizer may take
nothing but statistics in its first step (ADOPT) or move in every tenth, and a small update of a 16-bit weight rounds to nothing (a
warm-up). So several steps are looked at, and the child is only expected to have moved in one of twenty, if updates are then far larger
than the spacing of the weights' dtype. The size of an update is not known before it is seen; the learning rate times the gradient, or
times one where the gradient is larger, stands for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_childtune.child.network import FixedChild
from ds_childtune.shards import FlatShard

_SAMPLES = 1024
"""Elements of each kind that are watched in a flat shard."""

_LOOKS = (1, 2, 10)
"""Applied steps of a child that are looked at. If it has not moved by then, each of the next, too, as far as `_PATIENCE`."""

_PATIENCE = 20
"""The step in one of which it must have moved. If updates are too small then, it is looked at again at twice as many, and so on."""

_FAR = 16
"""How many times the spacing of a dtype is far larger than it."""


@dataclass(frozen=True)
class _Sample:
    """Elements of a flat shard, the same ones at each look."""

    index: Tensor
    """int64 1-D."""
    inside: Tensor
    """bool: whether each is inside the child."""


@dataclass(frozen=True)
class _Watch:
    """One shard in one step."""

    child: FixedChild
    shard: FlatShard
    sample: _Sample
    before: Tensor
    """Weights before the step."""
    gradient: Tensor
    """The masked gradient."""


class SelfCheck:
    """Watches some of a child's applied steps; see [Note: what must have moved]. The caller sums `verdict` over the ranks."""

    def __init__(self) -> None:
        self.step = 1
        """The child's applied step that comes next, or is being taken."""
        self._next_look = _LOOKS[0]
        self._samples: dict[Tensor, _Sample] = {}
        self._watches: list[_Watch] = []
        self._counts: list[Tensor] = []
        self._child_moved = False

    @property
    def looks(self) -> bool:
        """Whether this step is looked at. In others there is nothing to do, but `count_step`."""
        return self.step == self._next_look

    def before_step(self, shard: FlatShard, child: FixedChild) -> None:
        """Called after the gradient was masked, before the base optimizer steps."""
        if not shard.numel:
            return
        if shard.tensor not in self._samples:
            index = _places(shard, child)
            self._samples[shard.tensor] = _Sample(index, child.inside_at(shard, index))
        sample = self._samples[shard.tensor]
        grad = child.gradient_at(shard, sample.index)
        if grad is None:
            return
        before = child.weights_at(shard, sample.index).clone()
        self._watches.append(_Watch(child, shard, sample, before, grad))

    def after_step(self, learning_rate: float) -> None:
        """Called after the base optimizer's step on the shards seen since the last call."""
        for watch in self._watches:
            sample, before = watch.sample, watch.before
            after = watch.child.weights_at(watch.shard, sample.index)
            spacing = torch.finfo(before.dtype).eps * before.abs() + torch.finfo(before.dtype).tiny
            update = learning_rate * watch.gradient.abs().clamp(max=1.0)
            inside, has_gradient = sample.inside, watch.gradient != 0
            of_each = (
                (after != before) & ~inside,
                (after != before) & inside,
                has_gradient & inside,
                has_gradient & inside & (update >= _FAR * spacing),
            )
            self._counts.append(torch.stack([each.sum() for each in of_each]))
        self._watches.clear()

    def verdict(self, device: torch.device) -> Tensor:
        """int64 [4]: outside elements that moved; of the child, those that moved, had a gradient, and had to move by it."""
        counts = [count.to(device) for count in self._counts]
        self._counts.clear()
        return torch.stack(counts).sum(0) if counts else torch.zeros(4, dtype=torch.int64, device=device)

    def judge(self, verdict: Sequence[int]) -> bool:
        """Whether the check has passed for good. Call it after a step that was looked at, with every rank's `verdict` summed.

        Raises:
            RuntimeError: when an element outside the child moved, or the child has not, though it had to.
        """
        outside_moved, moved, has_gradient, had_to = verdict
        if outside_moved:
            raise RuntimeError(
                f"ChildTuning-D self-check: expected no element outside the child to move, but {outside_moved} of the sampled"
                f" ones did in step {self.step} of this child. The base optimizer moves weights by something other than its"
                " gradient, moments and weight decay. Remedy: use AdamW, SGD or Lion; and check that no other hook or callback"
                " edits the weights."
            )
        self._child_moved |= moved > 0
        if self.step >= _PATIENCE and not self._child_moved and 2 * had_to > has_gradient:
            raise RuntimeError(
                f"ChildTuning-D self-check: expected the child to move, but in {self.step} steps none of its sampled elements did,"
                f" though {had_to} of them have gradients and a learning rate that are large enough. Remedy: check that the"
                " optimizer given to deepspeed.initialize is the one that steps, and that nothing restores the weights."
            )
        later = [look for look in _LOOKS if look > self.step]
        if later:
            self._next_look = later[0]
        else:
            self._next_look = self.step + 1 if self.step < _PATIENCE else 2 * self.step
        return not later and self._child_moved

    def count_step(self) -> None:
        self.step += 1


def _places(shard: FlatShard, child: FixedChild) -> Tensor:
    """int64 1-D: evenly spaced elements, and some inside and outside the child in the first and the last window."""
    numel, device = shard.numel, shard.tensor.device
    parts = [torch.linspace(0, numel - 1, min(numel, _SAMPLES), dtype=torch.float64, device=device).long()]
    window = min(numel, 1 << 16)
    for places in (torch.arange(window, device=device), torch.arange(numel - window, numel, device=device)):
        inside = child.inside_at(shard, places)
        parts += [places[kind][:_SAMPLES] for kind in (inside, ~inside)]
    index: Tensor = torch.cat(parts).unique()
    return index
