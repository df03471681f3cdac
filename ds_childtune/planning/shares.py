"""How many elements of each sort the rank has that has most of them.

[Note: who has most]
ZeRO-1 and 2 cut the concatenated parameters into slices, so that one rank may have an embedding that trains in full, and another one
only blocks. ZeRO-3 splits every parameter over all ranks, so that all have alike. The child is taken to be spread evenly over eligible
elements; in truth Fisher information prefers some layers, and ranks at ZeRO-1 and 2 differ by that.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from ds_childtune.planning.model import ModelOutline
from ds_childtune.planning.run import Run
from ds_childtune.zero.child_layout import PADDED
from ds_childtune.zero.compact_stage3 import FEW


@dataclass(frozen=True)
class Shares:
    """Elements. Those of a rank are of the one that has most."""

    model: int
    """Of all parameters."""
    trainable: int
    """Of those that the optimizer has."""
    eligible: int
    shard: int
    """Trainable elements of a rank, padding included: what it has masters of in plain DeepSpeed."""
    partition: int
    """ZeRO-3: elements of a rank's partitions, frozen parameters included. Else `model`: weights are whole."""
    copies: int
    """hpZ: elements of a rank's secondary copies, frozen parameters included."""
    child: int
    """Of a rank's shard, inside the child; dense parameters count in full."""
    scored: int
    """Of a rank's shard, eligible."""
    places: int
    """ZeRO-3 with compact gradients: child elements in partitions where they are few."""
    masks: int
    """Bytes of the masks of all ranks, see [Note: masks of all ranks] and [Note: pieces]."""
    placed: int
    """ZeRO-1 and 2: of a rank's shard, inside the child, in parameters that are not inside as a whole."""
    sent: int
    """ZeRO-1 and 2: of all ranks' children, as the row that is sent, see [Note: the child in one row]."""
    persistent: int
    """ZeRO-3: elements of the small parameters that every rank has whole."""
    largest: int
    """Of the largest parameter."""


def shares(outline: ModelOutline, run: Run) -> Shares:
    """See [Note: who has most]."""
    sizes = [w.numel for w in outline.weights]
    held = [w for w in outline.weights if w.trains]
    numels = [w.numel for w in held]
    densities = [outline.density(w) for w in held]
    eligible = [float(w.name in outline.eligible) for w in held]
    ranks = run.world_size
    trainable = sum(numels)
    places = masks = placed = sent = 0.0
    if run.stage == 3:
        parts = [-(-n // ranks) for n in numels]
        shard = sum(parts)
        child = sum(d * n for d, n in zip(densities, parts, strict=True))
        scored = sum(e * n for e, n in zip(eligible, parts, strict=True))
        inside = [d * n for d, n in zip(densities, parts, strict=True) if d < 1]
        places = sum(n for n in inside if n <= FEW)
        split = [(n, d) for n, d in zip(parts, densities, strict=True) if 0 < d < 1]
        masks = sum(ranks * min(-(-n // 8), 4 * d * n) for n, d in split)
    else:
        shard = trainable if run.stage == 0 else -(-trainable // ranks)
        owned = _slices(numels, densities, shard)
        child, scored = max(owned, default=0.0), max(_slices(numels, eligible, shard), default=0.0)
        # A rank's are as many bytes as the longest has, and none for what is inside as a whole.
        as_bytes = [min(1 / 8, 4 * d) * (d < 1) for d in densities]
        masks = ranks * max(_slices(numels, as_bytes, shard), default=0.0) if ranks > 1 else 0.0
        placed = max(_slices(numels, [d * (d < 1) for d in densities], shard), default=0.0)
        padded = child * ranks
        sent = padded if padded <= PADDED * sum(owned) else sum(owned)
    small = [n for n in sizes if n <= run.persistence]
    return Shares(
        model=sum(sizes),
        trainable=trainable,
        eligible=outline.eligible_numel,
        shard=shard,
        partition=sum(-(-n // ranks) for n in sizes) if run.stage == 3 else sum(sizes),
        copies=sum(-(-n // ranks) for n in sizes) * ranks // run.node if run.node > 1 else 0,
        child=round(child),
        scored=round(scored),
        places=round(places),
        masks=round(masks),
        placed=round(placed),
        sent=round(sent),
        persistent=sum(small) if run.stage == 3 else 0,
        largest=max(sizes, default=0),
    )


def _slices(numels: Sequence[int], weights: Sequence[float], width: int) -> list[float]:
    """The sums of weights over the slices of `width` elements that tile the concatenated parameters."""
    ends = list(accumulate(numels))
    sums = [0.0, *accumulate(n * w for n, w in zip(numels, weights, strict=True))]

    def up_to(element: int) -> float:
        i = bisect_right(ends, element)
        before = ends[i - 1] if i else 0
        return sums[i] + (weights[i] * (element - before) if i < len(ends) else 0.0)

    total = ends[-1] if ends else 0
    starts = range(0, total, max(1, width))
    return [up_to(min(start + width, total)) - up_to(start) for start in starts]
