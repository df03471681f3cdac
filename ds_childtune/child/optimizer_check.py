"""Whether a child can be trained by an engine's base optimizer, as far as trying it shows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ds_childtune.child.optimizer_trial import Behaviour, behaviour_of
from ds_childtune.config import ChildTuningConfig
from ds_childtune.shards import FlatShard

_OTHERS = "use AdamW, SGD or Lion"


def tried(optimizer: torch.optim.Optimizer, shards: Sequence[FlatShard], config: ChildTuningConfig) -> Behaviour:
    """What `optimizer` does to small tensors. Only random states change, which the caller puts back.

    ChildTuning-F hands it gradients, and asks no more.

    Raises:
        NotImplementedError: where the child that the config asks for would not be exact.
    """
    if config.mode == "ChildTuning-F" or not shards:
        return Behaviour(type(optimizer).__name__)
    compact = config.optimizer_state == "compact"
    behaviour = behaviour_of(optimizer, [s.tensor for s in shards], compact=compact)
    if compact and behaviour.against_compact:
        raise NotImplementedError(
            'attach: optimizer_state "compact" expects an optimizer that treats every element by itself, with moments and'
            f" counters as its state, but {behaviour.against_compact}."
            f' Remedy: set child_tuning.optimizer_state to "dense", or {_OTHERS}.'
        )
    decays = any(group.get("weight_decay") for group in optimizer.param_groups) and config.compat is None
    if not compact and decays and behaviour.keeps_weights and behaviour.decay == "other":
        raise NotImplementedError(
            f"attach: {behaviour.name} keeps copies of weights in its state, and decays them in a way that ds_childtune cannot keep"
            f" inside the child. Remedy: set weight_decay to 0, or {_OTHERS}."
        )
    return behaviour


def put_back(behaviour: Behaviour, config: ChildTuningConfig, weight_decay: bool) -> str | None:
    """What to say of an optimizer that moves elements outside a child, or None."""
    if config.mode == "ChildTuning-F" or config.optimizer_state == "compact" or config.compat is not None:
        return None
    if behaviour.untried is not None:
        why = behaviour.untried
    elif behaviour.moves_outside:
        why = f"{behaviour.name} may move elements that have no gradient"
    elif weight_decay and behaviour.decay == "other":
        why = f"{behaviour.name} decays weights in an unknown way"
    else:
        return None
    return f"{why}: what is outside the child is put back after each step"
