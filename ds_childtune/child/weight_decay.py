"""Weight decay that stays inside the child, for base optimizers that step whole flat shards.

[Note: decay inside the child]
Masked gradients and moments leave an element where it is, but weight decay moves every element of a shard. While a
fixed child is trained with dense optimizer state, the decay is therefore applied here, in the base optimizer's own
order and formula but only to the child, and the group's `weight_decay` is zero for the length of the call:

    decoupled (AdamW, Lion)       w <- (1 - lr * weight_decay) * w       before the update
    L2 (SGD, Adam, Adagrad, ...)  g <- g + weight_decay * w              before the mask

Which of them it is, is found out by trying: see [Note: trying an optimizer]. Another optimizer decays everything by itself, and what
is outside the child is put back after the step.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ds_childtune.child.tiles import tile_of

Decay = Literal["none", "decoupled", "l2", "other"]
"""How an optimizer decays weights; "none": not at all, whatever its group says."""


def decay_weights_(weights: Tensor, mask: Tensor | None, factor: float) -> None:
    """Decoupled decay: multiply by `factor` = 1 - lr * weight_decay, in place, where `mask` is True.

    Args:
        weights: 1-D.
        mask: bool, True = trained; None = every element is.
    """
    if mask is None:
        weights.mul_(factor)
        return
    size = tile_of(weights.device)
    if weights.numel() <= size:
        weights.copy_(torch.where(mask, weights * factor, weights))
        return
    for tile, inside in zip(weights.split(size), mask.split(size), strict=True):
        tile.copy_(torch.where(inside, tile * factor, tile))


def decay_gradient_(grad: Tensor, weights: Tensor, group: dict[str, Any]) -> None:
    """L2 decay: add `weight_decay` * weights to the gradient, in place; the caller masks afterwards."""
    sign = -1 if group.get("maximize") else 1
    grad.add_(weights, alpha=sign * group["weight_decay"])
