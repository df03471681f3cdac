"""Weight decay that stays inside the child, for base optimizers that step whole flat shards.

[Note: decay inside the child]
Masked gradients and moments leave an element where it is, but weight decay moves every element of a shard. While a
fixed child is trained with dense optimizer state, the decay is therefore applied here, in the base optimizer's own
order and formula but to the child alone, and the group's `weight_decay` is zero for the length of the call:

    decoupled (AdamW, Lion)       w <- (1 - lr * weight_decay) * w       before the update
    L2 (SGD, Adam, Adagrad, ...)  g <- g + weight_decay * w              before the mask
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

_TILE = 1 << 20

_DECOUPLED = {"AdamW", "NAdamW", "FusedLion", "DeepSpeedCPULion", "Lion"}
_L2 = {"Adam", "SGD", "Adagrad", "RMSprop", "Adamax", "NAdam", "RAdam", "DeepSpeedCPUAdagrad", "Adadelta", "ASGD"}


def decay_style(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> Literal["none", "decoupled", "l2"]:
    """How `optimizer` decays the weights of `group`.

    Raises:
        NotImplementedError: for an optimizer whose formula is not known here.
    """
    if not group.get("weight_decay"):
        return "none"
    if "decoupled_weight_decay" in group:
        return "decoupled" if group["decoupled_weight_decay"] else "l2"
    name = type(optimizer).__name__
    if name in ("FusedAdam", "DeepSpeedCPUAdam"):
        # FusedAdam keeps an int that is 1 for AdamW; DeepSpeedCPUAdam a bool.
        return "decoupled" if getattr(optimizer, "adam_w_mode", True) else "l2"
    for cls in type(optimizer).__mro__:
        if cls.__name__ in _DECOUPLED:
            return "decoupled"
        if cls.__name__ in _L2:
            return "l2"
    raise NotImplementedError(
        f"ds_childtune does not know how {name} applies weight_decay {group['weight_decay']}, and cannot keep it inside the"
        ' child. Remedy: set weight_decay to 0, or child_tuning.compat to "original" to let it act everywhere.'
    )


def moves_without_gradient(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a weight may move though its gradient and moments are zero.

    DeepSpeed's CPU kernel of Lion takes the sign of zero for +1, so that every element moves by the learning rate.
    """
    return type(optimizer).__name__ == "DeepSpeedCPULion"


def decay_weights_(weights: Tensor, frozen: Tensor | None, factor: float) -> None:
    """Decoupled decay: multiply by `factor` = 1 - lr * weight_decay, in place, where `frozen` is False.

    Args:
        weights: 1-D.
        frozen: bool, True = outside the child; None = no element is.
    """
    if frozen is None:
        weights.mul_(factor)
        return
    for tile, outside in zip(weights.split(_TILE), frozen.split(_TILE), strict=True):
        tile.copy_(torch.where(outside, tile, tile * factor))


def decay_gradient_(grad: Tensor, weights: Tensor, group: dict[str, Any]) -> None:
    """L2 decay: add `weight_decay` * weights to the gradient, in place; the caller masks afterwards."""
    sign = -1 if group.get("maximize") else 1
    grad.add_(weights, alpha=sign * group["weight_decay"])
