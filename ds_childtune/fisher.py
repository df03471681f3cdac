"""Diagonal empirical Fisher information on flat shards.

Section 3.2 of Xu et al. (EMNLP 2021, arXiv 2109.05687): F_i is the mean over the task's samples of
(d log p(y|x) / d w_i)^2, y being the true label.

[Note: squares before the reduction]
A shard that squares its *reduced* gradient gets (mean over W ranks)^2: signal^2 + noise / W, another child for every world
size. So `per_micro_batch` squares first: a tensor hook replaces each eligible parameter's micro-batch gradient by its
square, DeepSpeed reduces squares, and the accumulator adds the shard that it is handed. With M micro-batches over all
ranks, F = (1 / M) * sum of (micro-batch gradient)^2, whatever the world size, the ZeRO stage and the accumulation steps;
at micro-batch size 1 it is the paper's formula. `per_global_batch` squares the reduced gradient and depends on all of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_childtune.scores import Rounding, ScoreDtype, Scores, new_scores
from ds_childtune.shards import FlatShard


def squared(grad: Tensor, max_grad_norm: float | None) -> Tensor:
    """The square of one parameter's gradient, clipped to `max_grad_norm` first, in the dtype of `grad`."""
    if max_grad_norm is not None:
        # torch.nn.utils.clip_grad_norm_'s formula, which the original code applies to each tensor alone.
        scale = (max_grad_norm / (grad.float().norm() + 1e-6)).clamp(max=1.0)
        grad = grad * scale.to(grad.dtype)
    return grad * grad


@dataclass(frozen=True)
class Fisher:
    """Diagonal empirical Fisher information of the eligible fragments on this rank's shards, times `terms`."""

    sums: list[list[Scores]]
    """For each flat shard, its eligible fragments' sums over the terms."""

    terms: int
    """Terms of the mean: micro-batches over all ranks, or global batches."""


class FisherAccumulator:
    """Sums reduced gradients or squares: 4 bytes for each eligible element of a shard, or 2 in e8m8."""

    def __init__(self, shards: Sequence[FlatShard], *, square: bool, dtype: ScoreDtype = "fp32") -> None:
        """
        Args:
            square: True to square here, after the reduction (`per_global_batch`); False when hooks have squared already.
            dtype: see [Note: e8m8] in scores.py.
        """
        self._square = square
        self._terms = 0
        self._rounding: dict[torch.device, Rounding] = {}
        self.sums = [
            [Scores(f.name, f.param_start, new_scores(f.numel, dtype, s.tensor.device), f.counted) for f in s.eligible]
            for s in shards
        ]
        self._shards = {s.tensor: (s, sums) for s, sums in zip(shards, self.sums, strict=True)}
        self._starts = {s.tensor: [f.shard_start for f in s.eligible] for s in shards}

    def next_term(self) -> None:
        """Call it before the gradients of another term of the mean are added."""
        self._terms += 1

    def add(self, tensor: Tensor, start: int, grad: Tensor, weight: float, absent: Collection[str] = ()) -> None:
        """Add a gradient of the flat shard `tensor`.

        Args:
            start: of `grad` in the flat shard. Every fragment lies inside `grad`, or outside.
            grad: 1-D.
            weight: factor of what is added.
            absent: parameters that the backward pass did not reach: what `grad` holds of them is stale.
        """
        shard, sums = self._shards[tensor]
        starts = self._starts[tensor]
        inside = slice(bisect_left(starts, start), bisect_left(starts, start + grad.numel()))
        for fragment, total in zip(shard.eligible[inside], sums[inside], strict=True):
            if fragment.name not in absent:
                self._add(total, grad.narrow(0, fragment.shard_start - start, fragment.numel), weight)

    def _add(self, total: Scores, grad: Tensor, weight: float) -> None:
        if total.values.dtype != torch.float32:
            if grad.device not in self._rounding:
                self._rounding[grad.device] = Rounding(grad.device)
            self._rounding[grad.device].add_(total, grad, weight, self._terms, square=self._square)
        elif self._square:
            total.values.addcmul_(grad, grad, value=weight)
        else:
            total.values.add_(grad, alpha=weight)
