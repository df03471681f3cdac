"""A new instance of an optimizer, of the same class and with the same hyper-parameters, on other tensors."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Optimizer = torch.optim.Optimizer
Group = dict[str, Any]


LEARNING_RATE = 1e-2
"""Of the trial: the optimizer's own may be 0 in a warm-up."""


def hyper_parameters(group: Group) -> Group:
    """A param group's entries, except its tensors and its learning rate, which may be 0 in a warm-up."""
    kept = {k: v for k, v in group.items() if k not in ("params", "param_names", "initial_lr")}
    if isinstance(kept.get("lr"), Tensor):
        kept["lr"] = torch.full_like(kept["lr"], LEARNING_RATE)
    elif kept.get("lr") is not None:
        kept["lr"] = LEARNING_RATE
    return kept


def _arguments(optimizer: Optimizer) -> dict[str, Any]:
    """Arguments of its constructor that the optimizer knows: defaults, and plain attributes of the same name, underscores aside."""
    defaults: dict[str, Any] = getattr(optimizer, "defaults", {})
    known = {name.replace("_", ""): value for name, value in vars(optimizer).items() if _is_plain(value)}
    arguments = {}
    parameters = list(inspect.signature(type(optimizer)).parameters.values())[1:]
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.name in defaults:
            arguments[parameter.name] = defaults[parameter.name]
        elif parameter.name.replace("_", "") in known:
            arguments[parameter.name] = known[parameter.name.replace("_", "")]
    if arguments.get("lr") is not None:
        arguments["lr"] = LEARNING_RATE
    return arguments


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))


@dataclass
class Twin:
    """An instance that steps one set of tensors after another."""

    optimizer: Optimizer
    begins: Group
    """What its param group holds before the first step, except the tensors."""
    state: dict[str, Any]
    """What the constructor made for a parameter of one element, as torch 2.9's Adagrad does; most make it in the first step."""
    params: list[nn.Parameter] = field(default_factory=list)

    @classmethod
    def new(cls, optimizer: Optimizer, hyper: Group, like: Tensor) -> Twin:
        params = [nn.Parameter(torch.zeros(1, dtype=like.dtype, device=like.device))]
        made = type(optimizer)([{**copy.deepcopy(hyper), "params": params}], **_arguments(optimizer))
        begins = {k: v for k, v in made.param_groups[0].items() if k != "params"}
        return cls(made, copy.deepcopy(begins), dict(made.state.get(params[0], {})))

    def begin(self, weights: Iterable[Tensor], *, weight_decay: float = 0.0) -> None:
        """Step copies of `weights` from here on, as if nothing had been stepped before."""
        self.params = [nn.Parameter(w.clone()) for w in weights]
        self.optimizer.state.clear()
        if self.state:
            self.optimizer.state.update({param: self._state_of(param) for param in self.params})
        (group,) = self.optimizer.param_groups
        group.clear()  # of counters, too
        group |= copy.deepcopy(self.begins) | {"params": self.params}
        if "weight_decay" in self.begins:
            group["weight_decay"] = weight_decay

    def _state_of(self, param: nn.Parameter) -> dict[str, Any]:
        """As the constructor would have made it."""

        def of(value: Any) -> Any:
            per_element = isinstance(value, Tensor) and value.shape == (1,)
            return value.expand(param.shape).clone() if per_element else copy.deepcopy(value)

        return {key: of(value) for key, value in self.state.items()}

    @property
    def group(self) -> Group:
        group: Group = self.optimizer.param_groups[0]
        return group

    def step(self, gradients: Iterable[Tensor]) -> None:
        for param, gradient in zip(self.params, gradients, strict=True):
            param.grad = gradient.clone().view_as(param)
        self.optimizer.step()

    def weights(self) -> list[Tensor]:
        return [p.detach().clone().view(-1) for p in self.params]
