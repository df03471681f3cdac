"""Whether flat shards hold the weights that they are said to hold.

[Note: a layout is believed once its values have been seen]
DeepSpeed says where a parameter is in a flat shard. If that is wrong, other elements than the child's are masked, without an error. So
`attach` compares each fragment's masters, rounded to the model's dtype, with the weights that the forward pass uses.

A fragment of at most 2**17 elements is looked at whole, a longer one at 2**16 or more elements, evenly spaced. A fragment is one
run: if it lies elsewhere than it says, by one element or by a whole parameter, nearly every element of it is compared with
another one, so that far fewer would do; evenly spaced, they also find a wrong part of a 2**16th of a fragment. Parameters whose
elements all have one value, such as two new norms, cannot be distinguished.

Nothing of the size of a shard is made, and the host waits for the device once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ds_childtune.shards import FlatShard
from ds_childtune.zero.engine import Wrapper, wrapper_of
from ds_childtune.zero.weights import local_weights

_SAMPLES = 1 << 16
"""Elements of a long fragment that are looked at, at least."""

_TOLERANCE = 0.25
"""Relative. Without ZeRO, DeepSpeed's 16-bit optimizers begin with a step on zero gradients, in which weight decay moves masters."""


@dataclass(frozen=True)
class _Look:
    name: str
    seen: int
    different: Tensor
    """int64 scalar."""


def check_layout(engine: Any, parameters: Mapping[str, nn.Parameter], shards: Sequence[FlatShard]) -> None:
    """Compare flat shards with the weights. See [Note: a layout is believed once its values have been seen].

    Args:
        parameters: by name, all that fragments are of.

    Raises:
        RuntimeError: on this rank, where they differ.
        NotImplementedError: where weights are not in memory as they are.
    """
    exact = wrapper_of(engine) not in (Wrapper.FP16_FUSED, Wrapper.FP16_UNFUSED)
    looks = list(_looks(parameters, shards, exact=exact))
    wrong = [(look, count) for look, count in zip(looks, _counts(looks), strict=True) if count]
    if not wrong:
        return
    names = ", ".join(f"{look.name} ({count:,} of {look.seen:,} elements)" for look, count in wrong[:3])
    raise RuntimeError(
        f"attach: expected the flat shards of {type(engine.optimizer).__name__} to hold the model's weights, got other values"
        f" in {len(wrong)} of {len(looks)} fragments: {names}{', ...' if len(wrong) > 3 else ''}. Either weights were edited"
        " after deepspeed.initialize, which the next step would undo, or DeepSpeed has another layout than it says."
        " Remedy: after editing weights, call engine.optimizer.refresh_fp32_params(); if that does not help, report this set-up."
    )


def _looks(parameters: Mapping[str, nn.Parameter], shards: Sequence[FlatShard], *, exact: bool) -> Iterator[_Look]:
    for shard in shards:
        for fragment in shard.fragments:
            weights = local_weights(fragment.name, parameters[fragment.name])
            stride = max(1, fragment.numel // _SAMPLES)
            masters = fragment.of(shard.flat())[::stride]
            weight = weights.part(fragment.param_start, fragment.numel)[::stride]
            yield _Look(fragment.name, weight.numel(), different(masters, weight, exact=exact).sum())


def different(masters: Tensor, weights: Tensor, *, exact: bool) -> Tensor:
    """bool 1-D: masters that do not round to their weight. NaN is equal to NaN."""
    # To the accelerator, rather than from it: that does not make the host wait.
    device = weights.device if masters.device.type == "cpu" else masters.device
    masters, weights = masters.to(device), weights.to(device)
    rounded = masters.to(weights.dtype)
    same = (rounded == weights) | (rounded.isnan() & weights.isnan())
    if not exact:
        same |= (masters - weights).abs() <= _TOLERANCE * weights.abs()
    return ~same


def _counts(looks: Sequence[_Look]) -> Iterable[int]:
    """On the host, at one synchronisation for each device that weights are on."""
    devices = {look.different.device for look in looks}
    counts = {d: iter(torch.stack([k.different for k in looks if k.different.device == d]).tolist()) for d in devices}
    return [next(counts[look.different.device]) for look in looks]
