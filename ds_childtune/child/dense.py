"""ChildTuning-D with moments for every element: the base optimizer steps whole flat shards, with masked gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_childtune.child.base_optimizer import per_element, share_counters
from ds_childtune.child.child_shard import ChildShard
from ds_childtune.child.network import Group, Stepped
from ds_childtune.child.optimizer_trial import Behaviour
from ds_childtune.child.weight_decay import decay_gradient_, decay_weights_
from ds_childtune.shards import FlatShard, Fragment


@dataclass(frozen=True)
class _Decay:
    """A param group's weight decay, which is zero for the length of a step."""

    group: Group
    weight_decay: float


@dataclass(frozen=True)
class _Kept:
    """A flat shard's weights before a step, where the optimizer moves what is outside the child."""

    shard: FlatShard
    mask: Tensor
    weights: Tensor


class DenseChild:
    """ChildTuning-D with moments for every element: g <- 0 outside the child, and weight decay only inside it.

    See [Note: decay inside the child]. Stale moments are cleared when the child is chosen, so that nothing outside it moves.
    Where that is not enough - see [Note: trying an optimizer] - what is outside the child is put back after each step.
    """

    fixed = True
    norm_is_child = False
    flat_gradients = True

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
                " got those of earlier steps, which would still act outside the child. Remedy: attach and select before the"
                " first step, or use AdamW, SGD or Lion."
            )
        self.shards: Mapping[Tensor, ChildShard] = {}
        self.optimizer = optimizer
        self._behaviour = behaviour
        self._decay_outside = decay_outside
        masks = list(masks)
        # The host waits once, not for each parameter, as at ZeRO 0 each has its own shard.
        whole = torch.stack([mask.all().to(masks[0].device) for mask in masks]).tolist() if masks else []
        self._masks = {s.tensor: None if all_ else m for s, m, all_ in zip(shards, masks, whole, strict=True)}
        """By flat shard: bool 1-D, True = trained; None where the whole shard is."""
        self._decays: list[_Decay] = []
        self._decayed: set[Tensor] = set()
        """Flat shards that have decayed for a step that has not ended. If an exception ends it, the next one does not decay again."""
        self._kept: list[_Kept] = []

    def recover(self) -> None:
        """Weight decay as the group has it, and weights outside the child as they were."""
        self._put_back()

    def before_step(self, optimizer: torch.optim.Optimizer, stepped: Sequence[Stepped], step: int) -> None:
        for each in stepped:
            self._before_group(each)

    def _before_group(self, stepped: Stepped) -> None:
        group = stepped.group
        if all(self._masks[s.tensor] is None for s in stepped.shards):
            return
        decays = bool(group.get("weight_decay")) and not self._decay_outside
        style = self._behaviour.decay if decays else "none"
        puts_back = not self._decay_outside and (self._behaviour.moves_outside or style == "other")
        for shard in stepped.shards:
            grad = shard.flat_grad()
            if grad is None:
                continue
            mask = self._masks[shard.tensor]
            if style == "decoupled" and shard.tensor not in self._decayed:
                decay_weights_(shard.flat(), mask, 1 - group["lr"] * group["weight_decay"])
                self._decayed.add(shard.tensor)
            elif style == "l2":
                decay_gradient_(grad, shard.flat(), group)
            if mask is not None:
                keep_(grad, mask)
                if puts_back:
                    self._kept.append(_Kept(shard, mask, shard.flat().clone()))
        if style in ("decoupled", "l2"):
            self._decays.append(_Decay(group, group["weight_decay"]))
            group["weight_decay"] = 0.0

    def after_step(self) -> None:
        self._put_back()
        self._decayed.clear()

    def _put_back(self) -> None:
        for decay in self._decays:
            decay.group["weight_decay"] = decay.weight_decay
        self._decays.clear()
        for kept in self._kept:
            weights = kept.shard.flat()
            weights.copy_(torch.where(kept.mask, weights, kept.weights))
        self._kept.clear()

    def child_mask(self, shard: FlatShard, fragment: Fragment, step: int) -> Tensor:
        """bool [fragment.numel]: True = trained."""
        mask = self._masks[shard.tensor]
        if mask is None:
            return torch.ones(fragment.numel, dtype=torch.bool, device=shard.tensor.device)
        return fragment.of(mask)

    def shard_mask(self, shard: FlatShard) -> Tensor | None:
        """bool [shard.numel]: True = trained; None where the whole flat shard is."""
        return self._masks[shard.tensor]

    def inside_at(self, shard: FlatShard, index: Tensor) -> Tensor:
        """bool: whether each element at `index` of the flat shard is trained."""
        mask = self._masks[shard.tensor]
        return torch.ones_like(index, dtype=torch.bool) if mask is None else mask[index]

    def weights_at(self, shard: FlatShard, index: Tensor) -> Tensor:
        """The weights at `index` of the flat shard."""
        return shard.flat()[index]

    def gradient_at(self, shard: FlatShard, index: Tensor) -> Tensor | None:
        """The gradient that the base optimizer is handed at `index` of the flat shard; None when it has none."""
        grad = shard.flat_grad()
        return None if grad is None else grad[index]

    def mask_gradient_(self, shard: FlatShard, gradient: Tensor, start: int) -> None:
        """Zero in place what is outside the child; `gradient` is 1-D and lies at `start` of the flat shard."""
        mask = self._masks[shard.tensor]
        if mask is not None:
            keep_(gradient, mask.narrow(0, start, gradient.numel()))

    def share_counters(self) -> None:
        share_counters(self.optimizer, [group["params"] for group in self.optimizer.param_groups])

    def take_over(self) -> None:
        """Clear the state that the base optimizer holds outside the child. Until then nothing has changed."""
        values = self._behaviour.rest_values
        if values is None:
            return
        for tensor, mask in self._masks.items():
            for key, value in self.optimizer.state.get(tensor, {}).items():
                if mask is not None and per_element(value, tensor):
                    keep_(value.view(-1), mask.to(value.device), values.get(key, 0.0))

    def release(self) -> None:
        """Nothing to give back: the base optimizer's state is dense."""

    def discard(self) -> None:
        """As `release`."""

    def restore_dense(self) -> None:
        """It is dense."""


def keep_(values: Tensor, mask: Tensor, other: float = 0.0) -> None:
    """values[~mask] = other, in place, without a tensor of the mask's size."""
    torch.where(mask, values, values.new_full((), other), out=values)
