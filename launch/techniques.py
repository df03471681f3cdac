"""Two techniques of launch/finetune.py, with a child or without one: R-Drop, and learning rates by layer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Groups = list[dict[str, Any]]
"""Param groups, as torch's optimizers take them."""


def r_drop_loss(engine: Any, batch: Mapping[str, Tensor], weight: float) -> Tensor:
    """R-Drop (Wu et al., NeurIPS 2021): every example is twice in the forward pass, and dropout gives it two outputs.

    Returns:
        The mean loss, plus `weight` times the mean of the two directions of KL divergence between both outputs. A scalar.
    """
    output = engine(**{key: torch.cat([value, value]) for key, value in batch.items()})
    one, other = output.logits.float().log_softmax(-1).chunk(2)  # each [examples, classes]
    both_directions = ((one.exp() - other.exp()) * (one - other)).sum(-1)
    loss: Tensor = output.loss + weight * both_directions.mean() / 2
    return loss


def layer_wise(groups: Groups, parameters: Mapping[str, nn.Parameter], lr: float, decay: float) -> Groups:
    """The same groups, split by layer: the head has the rate `lr`, each block below `decay` times the rate of the one above it.

    Raises:
        ValueError: when no names are numbered, as those of repeated blocks are.
    """
    factors = rate_factors(list(parameters), decay)
    factor_of = {id(parameter): factors[name] for name, parameter in parameters.items()}
    split = []
    for group in groups:
        for factor in sorted({factor_of[id(p)] for p in group["params"]}):
            own = [p for p in group["params"] if factor_of[id(p)] == factor]
            split.append({**group, "params": own, "lr": lr * factor})
    return split


def rate_factors(names: Sequence[str], decay: float) -> dict[str, float]:
    """By parameter: `decay` to the power of the levels above it. Levels: the embeddings, each block, what comes after the blocks."""
    numbered = {name: match for name in names if (match := re.match(r"(.*?)\.(\d+)\.", name))}
    if not numbered:
        raise ValueError(
            f"--layer-decay: expected a model with numbered blocks, got parameters such as {', '.join(names[:3])}."
            " Remedy: leave it out."
        )
    # The blocks are what most numbered parameters are in.
    (blocks, _), *_ = Counter(match[1] for match in numbered.values()).most_common(1)
    level_of = {name: int(match[2]) + 1 for name, match in numbered.items() if match[1] == blocks}
    first, top = list(names).index(next(iter(level_of))), max(level_of.values()) + 1
    levels = {name: level_of.get(name, 0 if i < first else top) for i, name in enumerate(names)}
    return {name: decay ** (top - level) for name, level in levels.items()}
