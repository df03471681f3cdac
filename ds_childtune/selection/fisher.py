"""Diagonal empirical Fisher information on flat shards.

Section 3.2 of Xu et al. (EMNLP 2021, arXiv 2109.05687): F_i is the mean over the task's samples of
(d log p(y|x) / d w_i)^2, y being the true label.

[Note: squares before the reduction]
A shard that squares its *reduced* gradient gets (mean over W ranks)^2: signal^2 + noise / W, another child for every world
size. So `per_micro_batch` squares first: each rank squares its own micro-batch's whole gradient in fp32, squares are summed
over the ranks in fp32 (see [Note: the pass's own reduction]), and the accumulator adds what this rank's shards hold of the sums.
With M micro-batches over all ranks, F = (1 / M) * sum of (micro-batch gradient)^2, whatever the world size, the ZeRO stage, the
accumulation steps, and the dtype that training reduces in; at micro-batch size 1 it is the paper's formula. `per_global_batch`
squares the mean gradient of all ranks and depends on how many there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ds_childtune.selection.experts import Experts
from ds_childtune.selection.scores import Rounding, ScoreDtype, Scores, new_scores
from ds_childtune.shards import FlatShard


@dataclass(frozen=True)
class Fisher:
    """Diagonal empirical Fisher information of the eligible fragments on this rank's shards, times `terms`."""

    sums: list[list[Scores]]
    """For each flat shard, its eligible fragments' sums over the terms."""

    terms: int
    """Terms of the mean: micro-batches over all ranks, or global batches."""

    names: frozenset[str]
    """The parameters that were eligible and not frozen, on all ranks."""

    experts: Experts = field(default_factory=Experts)
    """Those of a mixture-of-experts model, and which of them have scores of zero because no token reached them."""


class FisherAccumulator:
    """Sums reduced gradients or squares: 4 bytes for each eligible element of a shard, or 2 in e8m8."""

    def __init__(self, shards: Sequence[FlatShard], *, square: bool, dtype: ScoreDtype = "fp32") -> None:
        """
        Args:
            square: True to square here, after the reduction (`per_global_batch`); False when ranks have squared already.
            dtype: see [Note: e8m8] in scores.py.
        """
        self._square = square
        self._terms = 0
        self._rounding: dict[torch.device, Rounding] = {}
        self.sums = [
            [Scores(f.name, f.param_start, new_scores(f.numel, dtype, s.tensor.device), f.counted) for f in s.eligible]
            for s in shards
        ]
        self._of: dict[str, list[Scores]] = {}
        """This rank's fragments of each parameter."""
        for scores in self.sums:
            for total in scores:
                self._of.setdefault(total.name, []).append(total)

    def next_term(self) -> None:
        """Call it before the gradients of another term of the mean are added."""
        self._terms += 1

    def add(self, name: str, start: int, values: Tensor, weight: float = 1.0) -> None:
        """Add gradients or squares of a parameter's elements; those that lie in no fragment of this rank's are ignored.

        Args:
            start: index, in the flattened parameter, of the first element of `values`.
            values: fp32 1-D.
            weight: factor of what is added.
        """
        for total, first, part in self._overlaps(name, start, values):
            at = first - total.param_start
            sums = total.values[at : at + part.numel()]
            self._add(replace(total, param_start=first, values=sums), part.to(sums.device), weight)

    def own_parts(self, name: str, start: int, values: Tensor) -> Iterator[tuple[int, Tensor]]:
        """What `add` would take of its arguments: start and views of `values`."""
        return ((first, part) for _, first, part in self._overlaps(name, start, values))

    def _overlaps(self, name: str, start: int, values: Tensor) -> Iterator[tuple[Scores, int, Tensor]]:
        for total in self._of.get(name, ()):
            first = max(start, total.param_start)
            last = min(start + values.numel(), total.param_start + total.values.numel())
            if first < last:
                yield total, first, values[first - start : last - start]

    def _add(self, total: Scores, values: Tensor, weight: float) -> None:
        if total.values.dtype != torch.float32:
            if values.device not in self._rounding:
                self._rounding[values.device] = Rounding(values.device)
            self._rounding[values.device].add_(total, values, weight, self._terms, square=self._square)
        elif self._square:
            total.values.addcmul_(values, values, value=weight)
        else:
            total.values.add_(values, alpha=weight)
