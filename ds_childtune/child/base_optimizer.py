"""The base optimizer's state: what is a moment and what a counter, and counters that stand for a whole param group.

[Note: one counter for a group]
DeepSpeed's FusedAdam and FusedLion hand all tensors of a param group to one kernel, with the step counter of the last tensor that has
a gradient, and count only in that one's state. So the counters of the others stay behind, and taking a tensor out of its
group - another ZeRO stage, another world size, another child - would find one that says it was never stepped. Before that, every
tensor of a group is given the group's counter. It changes no step: the optimizer reads the last one, which has it already.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

_STEP = "step"


def per_element(value: Any, tensor: Tensor) -> bool:
    """Whether an entry of the optimizer's state has a value for each element of `tensor`, as moments have and counters have not."""
    return isinstance(value, Tensor) and value.shape == tensor.shape and value.dim() > 0


def counts_by_group(optimizer: torch.optim.Optimizer) -> bool:
    """Whether one kernel steps a whole param group with one counter."""
    return type(optimizer).__name__ in ("FusedAdam", "FusedLion")


def share_counters(optimizer: torch.optim.Optimizer, groups: Iterable[Sequence[Tensor]]) -> None:
    """Give every tensor of a group the group's step counter. Nothing to do for an optimizer that counts by tensor.

    A tensor without elements is not handed to the kernel (see `CompactChild.before_step`); it gets a state like its neighbours'.
    """
    if not counts_by_group(optimizer):
        return
    for group in groups:
        states = [(t, optimizer.state[t]) for t in group if _STEP in optimizer.state.get(t, {})]
        if not states:
            continue
        steps = max(state[_STEP] for _, state in states)
        like, first = states[0]
        for tensor in group:
            if tensor.numel() == 0 and not optimizer.state.get(tensor):
                optimizer.state[tensor] = {
                    key: value.new_empty(tensor.shape) if per_element(value, like) else value
                    for key, value in first.items()
                }
            if _STEP in optimizer.state.get(tensor, {}):
                optimizer.state[tensor][_STEP] = steps


def counter_device(optimizer: torch.optim.Optimizer, tensor: Tensor) -> torch.device:
    """Where torch's own optimizers keep a step counter that is a tensor."""
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    return tensor.device if on_device else torch.device("cpu")
