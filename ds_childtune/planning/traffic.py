"""Bytes on the wire and on disk: what a step sends, and what checkpoints and exports take."""

from __future__ import annotations

from ds_childtune.planning.model import ModelOutline
from ds_childtune.planning.run import Run

_FP32 = 4
_INSIDE = "weights, inside a node"
"""With hpZ; "weights" are then those that are sent to all nodes."""


def sent_per_step(outline: ModelOutline, run: Run) -> dict[str, int]:
    """Bytes that each rank sends in one step of one micro-batch, with ring algorithms: (W - 1) / W of what a collective covers.

    A child with compact gradients sends itself only; at ZeRO-3, where weights are gathered for the forward pass, its gradients only.
    Others send as much as plain DeepSpeed: gradients are reduced whole, and weights gathered whole.
    """
    trainable = sum(w.numel for w in outline.weights if w.trains)
    ring = (run.world_size - 1) / run.world_size
    if run.stage == 0:
        return {"gradients": round(2 * ring * run.weight * trainable), "weights": 0}
    if run.stage < 3 and run.sends_child:
        child = round(ring * run.weight * outline.trained)
        return {"gradients": child, "weights": child}
    if run.stage < 3:
        # Buckets are all-reduced, and a rank keeps its part; afterwards weights are gathered.
        return {"gradients": round(2 * ring * run.weight * trainable), "weights": round(ring * run.weight * trainable)}
    small = sum(w.numel for w in outline.weights if w.numel <= run.persistence)
    large = outline.numel - small
    # Weights that stay whole from forward to backward are gathered once.
    times = 1 if large <= run.max_live else 2
    gradients = round(ring * run.weight * (outline.trained if run.sends_child else trainable))
    if not 1 < run.node < run.world_size:
        return {"gradients": gradients, "weights": round(ring * run.weight * (times * large + small))}
    inside = (run.node - 1) / run.node * run.weight * large
    if not run.sends_child:  # in the forward pass from all ranks, in the backward pass inside a node
        weights = ring * run.weight * (large + small)
        return {"gradients": gradients, "weights": round(weights), _INSIDE: round((times - 1) * inside)}
    new = run.weight * outline.trained / run.world_size  # to one rank of each node
    others = run.world_size / run.node - 1
    weights = ring * run.weight * small + others * new
    return {"gradients": gradients, "weights": round(weights), _INSIDE: round(times * inside + new)}


def sent_in_fisher(outline: ModelOutline, run: Run) -> int:
    """Bytes that each rank sends for the sums of one micro-batch of the Fisher pass, beside gathered weights."""
    ring = (run.world_size - 1) / run.world_size
    return round((1 if run.stage == 3 else 2) * ring * _FP32 * outline.eligible_numel) if run.passes else 0


def checkpoint_bytes(outline: ModelOutline, run: Run) -> int:
    """All files of one checkpoint, of all ranks.

    DeepSpeed writes masters of all elements, and below ZeRO-3 the weights; frozen parameters at any stage. Where masters are compact,
    it writes weights in their place.
    """
    trainable = sum(w.numel for w in outline.weights if w.trains)
    frozen = outline.numel - trainable
    weights = run.weight * (frozen if run.stage == 3 else outline.numel)
    masters = 0 if run.stage == 0 and run.weight == _FP32 else run.master * trainable
    if run.parts not in (None, "moments"):
        masters = run.weight * trainable
    if run.parts is not None:
        return weights + masters + (run.moments + _FP32) * outline.trained + _mask_bytes(outline)
    mask = _mask_bytes(outline) if run.child == "ChildTuning-D" else 0
    return weights + masters + run.moments * trainable + mask


def export_bytes(outline: ModelOutline, run: Run) -> int:
    """What `child.export` writes, about: values of what trains, and which elements those are. 0 without a fixed child.

    Less where the child is uneven: what has few elements of it has an index instead of bits.
    """
    return run.weight * outline.trained + _mask_bytes(outline) if run.child == "ChildTuning-D" else 0


def _mask_bytes(outline: ModelOutline) -> int:
    """One bit for each eligible element, or four bytes for each kept one: whichever is smaller."""
    return min(-(-outline.eligible_numel // 8), 4 * outline.kept)
