"""From scores to masks on this rank's flat shards: what `ChildTuner.select` does once it has calibration batches, or needs none."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_childtune.child.generator import random_scores
from ds_childtune.ranks import device, gather_objects, sum_over_ranks
from ds_childtune.selection.scores import Scores
from ds_childtune.selection.top_k import BadScores, Cut, find_cut, mark_inside
from ds_childtune.shards import FlatShard, Fragment

ShardScores = list[list[Scores]]
"""For each flat shard, the scores of its eligible fragments."""


def magnitudes(shards: Sequence[FlatShard]) -> ShardScores:
    """|w|: the largest pretrained weights."""
    return _each(shards, lambda shard, f: f.of(shard.flat()).abs().float())


def random_numbers(shards: Sequence[FlatShard], seed: int) -> ShardScores:
    return _each(shards, lambda shard, f: random_scores(f, seed, device=shard.tensor.device))


def _each(shards: Sequence[FlatShard], score: Callable[[FlatShard, Fragment], Tensor]) -> ShardScores:
    return [[Scores(f.name, f.param_start, score(s, f), f.counted) for f in s.eligible] for s in shards]


def reverse_order(scores: ShardScores) -> None:
    """In place: the lowest become the largest."""
    for of_fragment in itertools.chain(*scores):
        of_fragment.reverse_order()


def cut_at(scores: ShardScores, names: Sequence[str], eligible: int, reserve_p: float) -> Cut:
    """The cut that leaves exactly round(reserve_p * eligible) elements inside. A collective.

    Args:
        names: of all eligible parameters.
        eligible: their elements.

    Raises:
        ValueError: on every rank, for a share that rounds to none, and for scores that are NaN, infinite or negative.
    """
    k = round(reserve_p * eligible)
    if k == 0:
        raise ValueError(
            f"child_tuning.reserve_p: {reserve_p} of {eligible} eligible elements rounds to none."
            " Remedy: raise it, or make more parameters eligible."
        )
    try:
        return find_cut(list(itertools.chain(*scores)), names, k, sum_over_ranks, device())
    except BadScores as bad:
        found = sorted(set().union(*gather_objects(bad.names)))
        raise ValueError(
            f"child selection: expected finite scores >= 0, got NaN, inf or negative ones in {', '.join(found[:5])}."
            " Remedy: look at these weights, which may be NaN, and for overflowing gradients in the calibration batches."
        ) from None


@dataclass(frozen=True)
class Positive:
    """Eligible elements whose score is not zero: those that a selection knows anything of."""

    counts: dict[str, int]
    """By parameter, over all ranks."""

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @property
    def without(self) -> tuple[str, ...]:
        """Parameters that have none."""
        return tuple(name for name, count in self.counts.items() if not count)


def positive(scores: ShardScores, names: Sequence[str]) -> Positive:
    """A collective.

    Args:
        names: of all eligible parameters.
    """
    position = {name: i for i, name in enumerate(names)}
    counts = torch.zeros(len(names), dtype=torch.int64, device=device())
    for of_fragment in itertools.chain(*scores):
        if of_fragment.counted:
            counts[position[of_fragment.name]] += of_fragment.values.count_nonzero().to(counts.device)
    sum_over_ranks(counts)
    return Positive(dict(zip(names, counts.tolist(), strict=True)))


def masks_inside(shards: Sequence[FlatShard], scores: ShardScores, cut: Cut) -> Iterator[Tensor]:
    """The child's mask for each flat shard: bool 1-D, True outside eligible fragments too.

    One shard at a time. Its scores are freed then: they are what a Fisher pass costs.
    """
    for i, shard in enumerate(shards):
        mask = torch.ones(shard.numel, dtype=torch.bool, device=shard.tensor.device)
        for fragment, of_fragment in zip(shard.eligible, scores[i], strict=True):
            mark_inside(of_fragment, cut, fragment.of(mask))
        scores[i] = []
        yield mask
