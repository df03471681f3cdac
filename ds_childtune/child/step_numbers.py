"""What one step is, in numbers: how much of the gradient the child has, and how far it moves.

[Note: numbers of a step]
Both are ratios of sums of squares over all ranks, so that elements which several ranks hold count as often above as below:

    gradient_share   (sum of g^2 over what trains) / (sum of g^2 over everything that the optimizer holds): before weight decay and
                     before ChildTuning-F's 1 / reserve_p; clipping changes both alike
    update           sqrt((sum of (w - w_before)^2) / (sum of w_before^2)) over what trains, over at most `_SAMPLE` evenly spaced
                     elements of each rank

Everything is computed where the gradients are, in the steps that are asked for and in no others. The sums are copied to the host
behind the step, without waiting for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_childtune.child.network import ChildNetwork, FixedChild
from ds_childtune.child.tiles import tile_of
from ds_childtune.shards import FlatShard

_SAMPLE = 1 << 20
"""Elements of a rank whose weights are looked at before and after a step."""


@dataclass(frozen=True)
class StepNumbers:
    """Of one applied step. See [Note: numbers of a step]."""

    gradient_share: float | None
    """The squared norm of the child's gradient, as a share of the whole one's; None where only the child's gradient is known."""
    update: float | None
    """The norm of the child's update, relative to that of its weights; None where those are all zero."""

    @classmethod
    def of(cls, sums: Sequence[float]) -> StepNumbers:
        """Of `StepMeter.sums`, over all ranks."""
        inside, whole, update, weights = sums
        return cls(inside / whole if whole else None, (update / weights) ** 0.5 if weights else None)


@dataclass(frozen=True)
class _Sample:
    """Some elements that train, or of a flat shard, before a step."""

    shard: FlatShard
    inside: Tensor | None
    """bool: whether each trains; None where all do."""
    before: Tensor
    """Their weights."""


class StepMeter:
    """Measures one applied step, in which the base optimizer may be called several times. See [Note: numbers of a step]."""

    def __init__(
        self,
        child: ChildNetwork,
        fixed: FixedChild | None,
        shards: Sequence[FlatShard],
        *,
        reserve_p: float,
        norm_is_child: bool,
        device: torch.device,
    ) -> None:
        """
        Args:
            child: the one that trains; `fixed` is the same where it is ChildTuning-D's.
            shards: all of this rank.
            norm_is_child: DeepSpeed has no gradient except the child's.
            device: where `sums` are wanted.
        """
        self.sums = torch.zeros(4, device=device)
        """fp32, of this rank: of squares of the child's gradient, of the whole gradient, of updates and of weights."""
        self._child = child
        self._fixed = fixed
        self._gain = reserve_p**2
        self.norm_is_child = norm_is_child
        self._every = max(1, -(-sum(self._trained(shard).numel() for shard in shards) // _SAMPLE))
        self._samples: list[_Sample] = []

    def before(self, shards: Sequence[FlatShard]) -> None:
        """Called before the child does anything with these shards: it masks gradients, and may let weights decay."""
        for shard in shards:
            compact = shard.tensor in self._child.shards
            inside = None
            if self._fixed is not None and not compact:
                places = torch.arange(0, shard.numel, self._every, device=shard.tensor.device)
                inside = self._fixed.inside_at(shard, places)
            self._samples.append(_Sample(shard, inside, self._trained(shard)[:: self._every].clone()))
            if self.norm_is_child or not self._child.flat_gradients:
                continue
            for part, start, _ in _gradient(shard):
                self._add(1, part)
                if self._fixed is not None and not compact:
                    masked = part.clone()
                    self._fixed.mask_gradient_(shard, masked, start)
                    self._add(0, masked)

    def after_mask(self, shards: Sequence[FlatShard]) -> None:
        """Called when gradients are masked, before the base optimizer steps."""
        if self.norm_is_child:
            return
        for shard in shards:
            compact = self._child.shards.get(shard.tensor)
            if compact is not None and compact.tensor.grad is not None:
                self._add(0, compact.tensor.grad)
            elif self._fixed is None:
                for part, _, eligible in _gradient(shard):
                    self._add(0, part, self._gain if eligible else 1.0)

    def add_whole(self, norm: Tensor, world_size: int) -> None:
        """Where flat shards have no gradient: the norm of the whole one, which every rank knows."""
        self.sums[1] += norm.to(self.sums.device).float() ** 2 / world_size

    def after_step(self) -> None:
        """Called after the step on the shards seen since the last call."""
        for sample in self._samples:
            before = sample.before
            moved = self._trained(sample.shard)[:: self._every] - before
            if sample.inside is not None:
                moved, before = moved * sample.inside, before * sample.inside
            self._add(2, moved)
            self._add(3, before)
        self._samples.clear()

    def _trained(self, shard: FlatShard) -> Tensor:
        """1-D: the weights that the base optimizer steps."""
        compact = self._child.shards.get(shard.tensor)
        return shard.flat() if compact is None else compact.tensor

    def _add(self, where: int, values: Tensor, gain: float = 1.0) -> None:
        square = torch.linalg.vector_norm(values, dtype=torch.float32).square() * gain
        self.sums[where] += square.to(self.sums.device, non_blocking=True)


def _gradient(shard: FlatShard) -> Iterator[tuple[Tensor, int, bool]]:
    """Pieces of a flat shard's gradient without its padding, where each begins, and whether it is eligible."""
    gradient = shard.flat_grad()
    if gradient is None:
        return
    size = tile_of(gradient.device)
    for fragment in shard.fragments:
        for start in range(fragment.shard_start, fragment.shard_start + fragment.numel, size):
            end = min(start + size, fragment.shard_start + fragment.numel)
            yield gradient[start:end], start, fragment.eligible
