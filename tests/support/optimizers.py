"""Optimizers that break, each in one way, what a child rests on. Otherwise all are gradient descent."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

Params = Iterable[nn.Parameter] | Iterable[dict[str, Any]]


class Descent(torch.optim.Optimizer):
    """w <- w - lr * m, m <- 0.9 m + g + weight_decay * w. The base of the others; breaks nothing."""

    def __init__(self, params: Params, lr: float = 1e-2, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.numel():
                    self.update(p, p.grad, self.state[p], group)

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["m"] = 0.9 * state.get("m", torch.zeros_like(p)) + g + group["weight_decay"] * p
        p.sub_(group["lr"] * state["m"])


class NoZero(Descent):
    """Momentum in 8 bits, by a table without a zero; only for large tensors, as those that people use."""

    def __init__(self, params: Params, lr: float = 1e-2, smallest: int = 4096) -> None:
        super().__init__(params, lr)
        self.smallest = smallest

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if p.numel() < self.smallest:
            super().update(p, g, state, group)
            return
        m = g if "codes" not in state else 0.9 * (state["codes"].float() - 127.5) / 127.5 * state["largest"] + g
        state["largest"] = m.abs().max()
        state["codes"] = (m / state["largest"] * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
        p.sub_(group["lr"] * (state["codes"].float() - 127.5) / 127.5 * state["largest"])


class SignOfZero(Descent):
    """Takes the sign of zero for +1, as DeepSpeed's CPU kernel of Lion does."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        p.sub_(group["lr"] * torch.where(g >= 0, 1.0, -1.0))


class WholeNorm(Descent):
    """Divides by the norm of the whole tensor, as LARS and LAMB do."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        super().update(p, g / (g.norm() + 1e-6), state, group)


class AllTensors(Descent):
    """Divides by the norm over all tensors that it is handed."""

    def step(self, closure: Any = None) -> None:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self._norm = sum(g.square().sum() for g in grads) ** 0.5 + 1e-6
        super().step()

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        super().update(p, g / self._norm, state, group)


class Rows(Descent):
    """Second moments by row where there are rows, as Adafactor's."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        rows = g.square() if g.dim() < 2 else g.square().mean(1, keepdim=True)
        state["rows"] = 0.9 * state.get("rows", torch.zeros_like(rows)) + rows
        p.sub_(group["lr"] * g / (state["rows"].sqrt() + 1e-3))


class Average(Descent):
    """Keeps the point that its steps start from, and steps an average with it, as schedule-free optimizers do."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        z = state.setdefault("z", p.clone())
        z.mul_(1 - group["weight_decay"]).sub_(group["lr"] * g)
        p.lerp_(z, 0.3)


class OwnCount(Descent):
    """Counts its steps where no state dict has it."""

    calls = 0

    def step(self, closure: Any = None) -> None:
        self.calls += 1
        super().step()

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        super().update(p, g / self.calls, state, group)


class NeedsLength(Descent):
    """Cannot be made from hyper-parameters only; and moves what has no gradient."""

    def __init__(self, params: Params, steps: int, lr: float = 1e-2) -> None:
        super().__init__(params, lr)
        self._steps_in_all = steps

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        p.sub_(group["lr"] * (g + 0.01))


class OwnDecay(Descent):
    """Decays weights after the update, and by nothing that depends on the learning rate."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        p.sub_(group["lr"] * g).mul_(1 - group["weight_decay"])


class WaitsOnce(Descent):
    """Only looks at the first gradient, as ADOPT does."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if "second" in state:
            p.sub_(group["lr"] * g / (state["second"].sqrt() + 1e-3))
        state["second"] = 0.9 * state.get("second", torch.zeros_like(p)) + g.square()


class MakesStateAtOnce(Descent):
    """In its constructor, and never later, as torch 2.9's Adagrad does: a sum per element that begins at 0.5, and a count."""

    def __init__(self, params: Params, lr: float = 1e-2) -> None:
        super().__init__(params, lr)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"sum": torch.full_like(p, 0.5), "step": torch.tensor(0.0)}

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["step"] += 1
        state["sum"] += g.square()
        p.sub_(group["lr"] * g / state["sum"].sqrt())


class EveryFifth(Descent):
    """Sums gradients up, and moves only in every fifth step."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["sum"] = state.get("sum", torch.zeros_like(p)) + g
        state["step"] = state.get("step", 0) + 1
        if state["step"] % 5 == 3:
            p.sub_(group["lr"] * state["sum"])
            state["sum"] = torch.zeros_like(p)


class Slow(torch.optim.Optimizer):
    """Wraps another one, and pulls weights back to a slow copy of them after each of its steps."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__([{**group} for group in optimizer.param_groups], {})
        self.optimizer = optimizer
        self.slow = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.optimizer.step()
        for p, slow in self.slow.items():
            slow.lerp_(p, 0.5)
            p.copy_(slow)


class SlowWithoutHooks(Slow):
    """As older ones do, it does not call the constructor that makes torch's step hooks work."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups, self.state, self.defaults = optimizer.param_groups, optimizer.state, {}
        self.slow = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}

    def step(self, closure: Any = None) -> None:
        super().step()
