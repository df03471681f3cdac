"""What happens to a flat shard around the base optimizer's step. One class for each way of training a child."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_childtune.child.base_optimizer import per_element
from ds_childtune.child.optimizer_trial import Behaviour
from ds_childtune.child.weight_decay import decay_gradient_, decay_weights_
from ds_childtune.shards import FlatShard, Fragment

Group = dict[str, Any]
"""One of a torch optimizer's `param_groups`."""


@dataclass
class _Restore:
    group: Group
    weight_decay: float


class DenseChild:
    """ChildTuning-D with moments for every element: g <- 0 outside the child, and decay inside it alone.

    See [Note: decay inside the child]. Stale moments are cleared when the child is chosen, so that nothing outside it moves.
    Where that is not enough - see [Note: trying an optimizer] - what is outside the child is put back after each step.
    """

    def __init__(
        self,
        shards: Sequence[FlatShard],
        masks: Iterable[Tensor],
        optimizer: torch.optim.Optimizer,
        behaviour: Behaviour,
        *,
        decay_outside: bool,
    ) -> None:
        """
        Args:
            masks: bool 1-D, one for each shard; True = inside the child, or not eligible.
            behaviour: the optimizer's.
            decay_outside: leave weight decay to the base optimizer, which moves every element (`compat: "original"`).

        Raises:
            NotImplementedError: for an optimizer that keeps copies of weights in its state, once it has any.
        """
        if behaviour.keeps_weights and any(optimizer.state.get(s.tensor) for s in shards):
            raise NotImplementedError(
                f"select: {behaviour.name} keeps copies of weights in its state. Expected none of them before a child is chosen,"
                " got those of earlier steps, which outside the child would go on acting. Remedy: attach and select before the"
                " first step, or use AdamW, SGD or Lion."
            )
        self._behaviour = behaviour
        self._decay_outside = decay_outside
        self._frozen: dict[Tensor, Tensor | None] = {}
        """By flat shard: bool 1-D, True = outside the child; None where the whole shard is inside."""
        outside = [~mask for mask in masks]
        # The host waits once, not for each parameter, which at ZeRO 0 has a shard of its own.
        found = torch.stack([o.any().to(outside[0].device) for o in outside]).tolist() if outside else []
        for shard, frozen, some in zip(shards, outside, found, strict=True):
            self._frozen[shard.tensor] = frozen if some else None
        self._optimizer = optimizer
        self._restore: list[_Restore] = []
        self._still: list[tuple[FlatShard, Tensor, Tensor]] = []
        """Flat shard, what is frozen, its weights before the step: where the optimizer moves those."""

    def before_step(
        self, optimizer: torch.optim.Optimizer, group: Group, shards: Sequence[FlatShard], step: int
    ) -> None:
        if all(self._frozen[s.tensor] is None for s in shards):
            return
        decays = bool(group.get("weight_decay")) and not self._decay_outside
        style = self._behaviour.decay if decays else "none"
        puts_back = not self._decay_outside and (self._behaviour.moves_outside or style == "other")
        for shard in shards:
            grad = shard.flat_grad()
            if grad is None:
                continue
            frozen = self._frozen[shard.tensor]
            if style == "decoupled":
                decay_weights_(shard.flat(), frozen, 1 - group["lr"] * group["weight_decay"])
            elif style == "l2":
                decay_gradient_(grad, shard.flat(), group)
            if frozen is not None:
                grad.masked_fill_(frozen, 0.0)
                if puts_back:
                    self._still.append((shard, frozen, shard.flat().clone()))
        if style in ("decoupled", "l2"):
            self._restore.append(_Restore(group, group["weight_decay"]))
            group["weight_decay"] = 0.0

    def after_step(self) -> None:
        for restore in self._restore:
            restore.group["weight_decay"] = restore.weight_decay
        self._restore.clear()
        for shard, frozen, before in self._still:
            shard.flat().copy_(torch.where(frozen, before, shard.flat()))
        self._still.clear()

    def frozen(self, tensor: Tensor) -> Tensor | None:
        """bool 1-D: True = outside the child; None where the whole flat shard is inside."""
        return self._frozen[tensor]

    def weights_at(self, shard: FlatShard, index: Tensor) -> Tensor:
        """The weights at `index` of the flat shard."""
        return shard.flat()[index]

    def gradient_at(self, shard: FlatShard, index: Tensor) -> Tensor | None:
        """The gradient that the base optimizer is handed at `index` of the flat shard; None when it has none."""
        grad = shard.flat_grad()
        return None if grad is None else grad[index]

    def mask_gradient_(self, shard: FlatShard, gradient: Tensor, start: int) -> None:
        """Zero in place what is outside the child; `gradient` is 1-D and lies at `start` of the flat shard."""
        frozen = self._frozen[shard.tensor]
        if frozen is not None:
            gradient.masked_fill_(frozen.narrow(0, start, gradient.numel()), 0.0)

    def mask(self, tensor: Tensor, fragment: Fragment) -> Tensor:
        """bool [fragment.numel]: True = trained."""
        frozen = self._frozen[tensor]
        if frozen is None:
            return torch.ones(fragment.numel, dtype=torch.bool, device=tensor.device)
        return ~fragment.of(frozen)

    def take_over(self) -> None:
        """Clear the state that the base optimizer holds outside the child. Until then nothing has changed."""
        values = self._behaviour.rest_values
        if values is None:
            return
        for tensor, frozen in self._frozen.items():
            for key, value in self._optimizer.state.get(tensor, {}).items():
                if frozen is not None and per_element(value, tensor):
                    value.view(-1).masked_fill_(frozen.to(value.device), values.get(key, 0.0))

    def release(self) -> None:
        """Nothing to give back: the base optimizer's state is dense."""
