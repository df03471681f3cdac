"""Bytes of tensors that a rank holds in each phase of a run, without activations.

[Note: where memory goes]
Every term is a number of elements (`Shares`) times the bytes of one (`Run`). For bf16 with AdamW those are 2 for a weight, 4 for a
master, 8 for moments. P is a rank's part of the weights, S its shard, C the child's elements in it, E the eligible ones, G those of
a sub-group: at most sub_group_size. What is kept between steps:

                 plain, ZeRO-3         dense child           compact, ZeRO-3       plain, ZeRO-2     compact, ZeRO-2
    weights      2 P, and 2 for each element of the small parameters that stay whole       2 N               2 N
    masters      4 S                   4 S                   4 C                   4 S               4 C
    moments      8 S                   8 S                   8 C                   8 S               8 C
    gradients    2 S                   2 S                   2 C                   none              none
    child        none                  1 S: a mask           4 C, masks            none              4 C, masks
    buckets      2 reduce_bucket_size, all three             none                  none

An index of a rank's own child, and the masks of all ranks': at most a bit for each element.

With CPU offload masters, moments, scores and the fp32 gradients of a step are the host's (`Phase.host`), and at ZeRO-1 and 2 the
buffer through which weights come back. There a compact child that sends itself has 4 C of index on both sides, and 2 C on the host
for what crosses; buffer and index are all that is left of the size of its shard.

A phase's peak has besides, for a while: gathered weights and what is gathered in advance (ZeRO-3), gradients and buckets of the
backward pass (ZeRO-1 and 2), fp32 gradients of what is stepped, scores and the Fisher pass's bucket, and the index as int64. Only one
of the moments of a phase is its peak: `Phase.moments` has them all. `tests/benchmarks/plan.py` compares all of this with what
engines hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ds_childtune.planning.model import ModelOutline
from ds_childtune.planning.run import Run
from ds_childtune.planning.shares import Shares, shares

Kind = Literal["weights", "gradients", "masters", "moments", "child", "buckets", "scores"]
KINDS: tuple[Kind, ...] = ("weights", "gradients", "masters", "moments", "child", "buckets", "scores")
"""What a rank keeps; "child": masks or indices."""

_TILE = 1 << 20
"""Elements that selection works on at a time."""
_DEVICE_TILE = 1 << 24
"""Elements that weights and gradients are indexed in at a time: `tile_of` of an accelerator."""
_NONZERO_TILE = 1 << 24
"""Elements of a mask that become an int64 index at a time."""
_INDEX, _FP32, _FP64, _INT64 = 4, 4, 8, 8


@dataclass(frozen=True)
class Phase:
    """One phase of a run."""

    name: str
    kept: Mapping[Kind, int]
    """Bytes at its end, on the device."""
    moments: Mapping[str, int] = field(default_factory=dict)
    """Bytes beside `kept`, for a while: by what makes them."""
    host: int = 0
    """Bytes in the host's memory, at its end."""
    host_moment: int = 0
    """Bytes in the host's memory beside what is there at its end, for a while."""

    @property
    def live(self) -> int:
        return sum(self.kept.values())

    @property
    def peak(self) -> int:
        return self.live + max([0, *self.moments.values()])

    @property
    def host_peak(self) -> int:
        return self.host + max(0, self.host_moment)

    @property
    def peak_is(self) -> str:
        """What makes the peak; empty where nothing is added to what is kept."""
        most = max(self.moments, key=lambda name: self.moments[name], default="")
        return most if most and self.moments[most] > 0 else ""


def phases(outline: ModelOutline, run: Run) -> tuple[Phase, ...]:
    """Of the rank that has most: start, Fisher, selection, steps; without a fixed child only the first and the last."""
    own = shares(outline, run)
    start = _start(own, run)
    steps = _steps(own, run)
    if run.child != "ChildTuning-D":
        return start, steps
    selection = _selection(own, run, start)
    return (start, _fisher(own, run, start), selection, steps) if run.passes else (start, selection, steps)


def peak(outline: ModelOutline, run: Run) -> int:
    """The largest of all phases."""
    return max(phase.peak for phase in phases(outline, run))


# ---------------------------------------------------------------- start


def _start(own: Shares, run: Run) -> Phase:
    """After `deepspeed.initialize` and `attach`. The model is in the forward pass's dtype; at ZeRO-3 it was built under zero.Init."""
    kept = _kept(own, run)
    before_attach = sum(kept.values())
    if run.lean:
        kept |= {"masters": 0, "gradients": 0}
    elif run.aliased:
        kept["masters"] = 0
    masters = 0 if run.offload or run.lean else run.master * own.shard
    after = sum(kept.values())
    largest = run.weight * own.largest
    if run.stage == 3:
        copy = run.master * min(own.shard, run.sub_group) if masters else 0
        whole = (after if run.lean else before_attach) + largest
        building = run.weight * own.partition + max(largest, masters + copy)
        return Phase(
            "start", kept, {"building masters": building - after, "reading weights": whole - after}, _host(own, run)
        )
    moments = {"flattening weights": 2 * run.weight * own.model - after}
    if run.stage:
        # DeepSpeed tries its optimizer's gradients once.
        moments["building masters"] = run.weight * own.model + 2 * masters - after
    elif kept["masters"]:
        # Here it takes a step of zeros.
        moments["first step"] = run.master * own.trainable
    return Phase("start", kept, moments, _host(own, run))


def _kept(own: Shares, run: Run) -> dict[Kind, int]:
    """What plain DeepSpeed keeps before the first step."""
    on_device = 0 if run.offload else 1
    without_masters = run.stage == 0 and run.weight == _FP32
    return {
        "weights": run.weight * (own.partition + own.copies),
        "gradients": run.accumulated * own.shard * on_device if run.stage == 3 else 0,
        "masters": 0 if without_masters else run.master * own.shard * on_device,
        "moments": run.moments * own.shard if run.stage == 0 and not without_masters else 0,
        "child": 0,
        "buckets": run.weight * run.bucket if run.stage == 3 else _temporary(own, run),
        "scores": 0,
    }


def _temporary(own: Shares, run: Run) -> int:
    """At ZeRO-1 and 2 with offload, on both sides: what DeepSpeed adds a parameter's gradients up in."""
    return run.weight * own.largest if run.offload and run.stage in (1, 2) else 0


def _host(own: Shares, run: Run) -> int:
    """Masters and their gradients, where they are offloaded, before there is a child; ZeRO-1 and 2 have a buffer for weights, too."""
    if not run.offload:
        return 0
    other = run.accumulated if run.stage == 3 else run.weight
    return (2 * run.master + other) * own.shard + _temporary(own, run)


def _host_with_child(own: Shares, run: Run) -> int:
    """Before its first step."""
    if not run.offload:
        return 0
    if run.parts == "moments, masters and gradients":
        return run.weight * (own.shard + own.child) + (_FP32 + _INDEX) * own.child
    extra = (_FP32 + _INDEX) * own.child if run.parts else (own.shard if run.child == "ChildTuning-D" else 0)
    return _host(own, run) + extra


def _host_in_steps(own: Shares, run: Run) -> int:
    if not run.offload:
        return 0
    kept = _host_with_child(own, run) + run.moments * (own.child if run.parts else own.shard)
    # ZeRO-2 reduces each micro-batch's gradients, and adds them up by way of the host; with 16-bit masters in their gradients.
    adds = run.stage == 2 and run.accumulates and run.master == _FP32 and run.parts != "moments, masters and gradients"
    return kept + (run.weight * own.shard if adds else 0)


# ---------------------------------------------------------------- choosing the child


def _whole(own: Shares, run: Run) -> int:
    """ZeRO-3: small parameters, whole from the first forward pass on."""
    return run.weight * own.persistent


def _gathered(own: Shares, run: Run) -> dict[str, int]:
    """ZeRO-3: weights that are whole during forward and backward; those that come in advance are in a buffer, too."""
    if run.stage != 3:
        return {"forward": 0, "backward": 0}
    large = own.model - own.persistent
    live = run.weight * max(min(large, run.max_live), min(large, own.largest))
    ahead = run.weight * max(min(large, run.prefetch), min(large, own.largest))
    return {"forward": live + ahead, "backward": live + run.weight * own.largest}


def _fisher(own: Shares, run: Run, start: Phase) -> Phase:
    scores = run.score * own.scored
    kept: dict[Kind, int] = dict(start.kept) | {"scores": 0 if run.offload else scores}
    kept["weights"] += _whole(own, run)
    bucket = _FP32 * min(run.fisher_bucket, own.eligible)
    bucket += bucket // run.world_size if run.stage == 3 else 0
    gathered = _gathered(own, run)
    gradients = run.weight * (own.largest if run.stage >= 2 else own.trainable)
    moments = {
        "forward": bucket + gathered["forward"],
        # In fp16 sums wait until a micro-batch is known to be finite.
        "backward": bucket + max(gathered["backward"], gradients) + (_FP32 * own.scored if run.fp16 else 0),
    }
    return Phase("Fisher", kept, moments, start.host + (scores if run.offload else 0))


def _selection(own: Shares, run: Run, start: Phase) -> Phase:
    """The threshold, then masks and, compact, an index and the child's own tensors, before what they replace is freed."""
    scores = 0 if run.offload else run.score * own.scored
    # Where DeepSpeed has taken a step at the start, there are moments already.
    kept = _kept_in_steps(own, run)
    kept["moments"] = kept["moments"] if start.kept["moments"] else 0
    before = sum(start.kept.values()) + _whole(own, run)
    tile = _INT64 * min(_TILE, own.largest)
    mask = 0 if run.offload else own.shard
    moments = {"threshold": before + scores + tile, "masks": before + scores + mask}
    index = max(
        _INDEX * own.child + _INT64 * min(own.child, _NONZERO_TILE),
        2 * _INDEX * own.child,
        (_INDEX + _FP32 + run.weight) * own.child,
    )
    if run.parts is not None and not run.offload:
        moments["index"] = before + mask + index
    live = sum(kept.values())
    if run.sends_child and run.stage < 3:
        # This rank's own places and bits, beside all ranks' that are kept.
        moments["sending masks"] = live + _INDEX * own.child + 2 * own.masks // run.world_size
    moments = {name: most - live for name, most in moments.items()}
    host = _host_with_child(own, run)
    on_host = start.host + own.shard + max(run.score * own.scored, index if run.parts else 0)
    return Phase("selection", kept, moments, host, on_host - host if run.offload else 0)


# ---------------------------------------------------------------- steps


def _kept_in_steps(own: Shares, run: Run) -> dict[Kind, int]:
    kept = _kept(own, run)
    kept["weights"] += _whole(own, run)
    if run.offload:
        if run.parts == "moments, masters and gradients":
            kept["child"] = _INDEX * own.child + own.masks
            kept["buckets"] = 0
        return kept
    kept["moments"] = run.moments * own.shard
    if run.child == "ChildTuning-D" and run.parts is None:
        kept["child"] = own.shard
    if run.parts is not None:
        kept["moments"] = run.moments * own.child
        kept["child"] = _INDEX * own.child
        if run.parts == "moments":
            kept["masters"] = (0 if run.aliased else kept["masters"]) + _FP32 * own.child
        else:
            kept["masters"] = _FP32 * own.child
        if run.parts == "moments, masters and gradients" and run.stage == 3:
            kept["gradients"] = run.accumulated * own.child
            kept["child"] += own.masks if run.sends_child else _INDEX * own.places
            if run.sends_child:
                kept["buckets"] = 0
        elif run.parts == "moments, masters and gradients":
            kept["child"] += own.masks
    return kept


def _steps(own: Shares, run: Run) -> Phase:
    gathered = _gathered(own, run)
    backward = gathered["backward"]
    if run.stage in (1, 2):
        bucket = run.weight * run.bucket * run.buckets
        whole = run.accumulated * own.shard if run.stage == 2 else run.weight * own.trainable
        backward = whole + bucket + run.weight * own.largest
        if run.parts == "moments, masters and gradients":
            # Of all ranks' children, and then this rank's chunk of the sum, and what it owns of that.
            chunk = run.weight * own.sent // run.world_size
            backward = run.weight * own.sent + max(run.weight * own.largest, chunk + run.weight * own.child)
    elif run.stage == 3 and run.sends_child:
        # What is taken of gradients, the same by owner, and the bits of a parameter while they are read.
        backward += 2 * run.weight * min(run.bucket, own.child * run.world_size) + 2 * min(own.largest, _DEVICE_TILE)
    elif run.stage == 0:
        backward = run.weight * own.trainable
    moments = {"forward": gathered["forward"], "backward": backward, "optimizer step": _in_the_step(own, run)}
    return Phase("steps", _kept_in_steps(own, run), moments, _host_in_steps(own, run))


def _in_the_step(own: Shares, run: Run) -> int:
    """Gradients in the masters' dtype of what is stepped at once, beside those that came from the backward pass."""
    if run.offload and run.parts == "moments, masters and gradients":
        # DeepSpeed's norm, then new weights that have arrived, this rank's chunk and all ranks' new weights.
        owned = run.weight * own.child
        return max((run.accumulated + _FP64) * own.child, owned + max(_placing(own, run), _gathering(own, run)))
    if run.offload:
        return run.accumulated * own.shard if run.stage < 3 else 0
    gradients = 0 if run.stage == 0 and run.weight == _FP32 else run.master
    if run.stage == 3:
        part = min(1.0, run.sub_group / max(own.shard, 1))
        deep = run.parts == "moments, masters and gradients"
        stepped = part * (own.child if deep else own.shard)
        fp32 = (_FP32 if deep else gradients) * stepped
        inside = part * own.child * _FP32 if run.parts == "moments" else 0
        optimizer = part * run.temporaries * (own.child if run.parts else own.shard)
        # They are taken out of small parameters, which are not whole in this moment.
        return round(max(run.accumulated * stepped + fp32, fp32 + inside + optimizer)) - _whole(own, run)
    if run.parts == "moments, masters and gradients":
        # Beside new weights that will be sent: DeepSpeed's norm, the step, then this rank's chunk and all ranks' new weights.
        owned = run.weight * own.child
        norm = (run.accumulated + _FP64) * own.child
        stepped = max(run.accumulated * own.child, run.temporaries * own.child, _placing(own, run)) + _FP32 * own.child
        return owned + max(norm, stepped, _gathering(own, run))
    flat = 2 * run.accumulated * own.shard if run.stage else run.weight * own.trainable * (3 if gradients else 1)
    if run.parts == "moments and masters":
        stepped = _FP32 * own.child
        return max(flat + stepped, flat // 2 + stepped + run.temporaries * own.child)
    inside = _FP32 * own.child if run.parts else 0
    optimizer = run.temporaries * (own.child if run.parts else own.shard)
    return max(flat + gradients * own.shard, gradients * own.shard + inside + optimizer)


def _placing(own: Shares, run: Run) -> int:
    """ZeRO-1 and 2: of a tile, its places as int64, values, and bits as bools while they are read."""
    bools = 2 * min(_DEVICE_TILE, own.largest) if own.masks else 0
    return (_INT64 + run.weight) * min(_DEVICE_TILE, own.placed) + bools


def _gathering(own: Shares, run: Run) -> int:
    """ZeRO-1 and 2: all ranks' new weights, and this rank's chunk before or places after."""
    return run.weight * own.sent + max(run.weight * own.sent // run.world_size, _placing(own, run))
