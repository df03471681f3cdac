"""Child-Tuning in one process and on whole parameters, written from the paper (arXiv 2109.05687) and nothing else.

For step t, with the mean g_t of the gradients of all micro-batches:

    g_t  <-  g_t * min(1, clip / |g_t|)            the global norm
    g_t  <-  g_t * M_t                             equation 2; M_t: ChildTuning-F, Bernoulli(p) / p (equation 7);
                                                   ChildTuning-D, the top p of Fisher information (equations 9, 10)
    w_t   =  base optimizer's rule (w_t-1, g_t)
    w_t  <-  w_t-1 outside a ChildTuning-D child   weight decay does not move it either

All of it in float64, except for forward and backward of 16-bit training. No random numbers: ChildTuning-F's masks are given.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
Weights = dict[str, Tensor]
"""By parameter name, whole parameters: gradients, scores and masks too."""


# ---------------------------------------------------------------- gradients and Fisher information


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """A micro-batch's mean loss."""
    output = model(**batch)
    loss: Tensor = output if isinstance(output, Tensor) else output.loss
    return loss


def gradients(model: nn.Module, micro_batches: Sequence[Batch]) -> Weights:
    """Mean of the micro-batches' gradients, float64; zero for a parameter that the loss does not reach."""
    total = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in model.named_parameters() if p.requires_grad}
    for batch in micro_batches:
        model.zero_grad()
        loss_of(model, batch).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                total[name] += parameter.grad.double() / len(micro_batches)
    return total


def fisher(model: nn.Module, terms: Sequence[Sequence[Batch]], *, max_grad_norm: float | None = None) -> Weights:
    """Mean over `terms` of the square of a term's mean gradient; each tensor's gradient is clipped first, if asked."""
    model = copy.deepcopy(model).eval()
    total: Weights = {}
    for micro_batches in terms:
        for name, grad in gradients(model, micro_batches).items():
            if max_grad_norm is not None:
                # The original code calls torch.nn.utils.clip_grad_norm_, which adds 1e-6.
                grad *= min(1.0, max_grad_norm / (float(grad.norm()) + 1e-6))
            total[name] = total.get(name, torch.zeros_like(grad)) + grad**2 / len(terms)
    return total


def top(scores: Mapping[str, Tensor], k: int) -> Weights:
    """Masks of the k largest scores by one full sort; equal ones in the order (name, index)."""
    names = sorted(scores)
    flat = torch.cat([scores[name].flatten() for name in names])
    mask = torch.zeros(flat.numel(), dtype=torch.bool)
    mask[flat.sort(descending=True, stable=True).indices[:k]] = True
    pieces = mask.split([scores[name].numel() for name in names])
    return {name: piece.view(scores[name].shape) for name, piece in zip(names, pieces, strict=True)}


def threshold(scores: Mapping[str, Tensor], k: int) -> float:
    """The k-th largest score."""
    return float(torch.cat([s.flatten() for s in scores.values()]).sort(descending=True).values[k - 1])


# ---------------------------------------------------------------- base optimizers


@dataclass
class Rule(ABC):
    """A base optimizer for one parameter."""

    lr: float
    weight_decay: float = 0.0

    @abstractmethod
    def __call__(self, w: Tensor, g: Tensor) -> Tensor:
        """The weight after one more step."""


@dataclass
class AdamW(Rule):
    """Loshchilov and Hutter, 2019."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    m: Tensor | float = 0.0
    v: Tensor | float = 0.0
    t: int = 0

    def __call__(self, w: Tensor, g: Tensor) -> Tensor:
        return w - self.lr * self._direction(g) - self.lr * self.weight_decay * w

    def _direction(self, g: Tensor) -> Tensor:
        b1, b2 = self.betas
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g**2
        return self.m / (1 - b1**self.t) / ((self.v / (1 - b2**self.t)) ** 0.5 + self.eps)


@dataclass
class Adam(AdamW):
    """Kingma and Ba, 2015; weight decay as an L2 term of the gradient."""

    def __call__(self, w: Tensor, g: Tensor) -> Tensor:
        return w - self.lr * self._direction(g + self.weight_decay * w)


@dataclass
class SGD(Rule):
    """With heavy-ball momentum, as torch writes it."""

    momentum: float = 0.0
    buffer: Tensor | float = 0.0

    def __call__(self, w: Tensor, g: Tensor) -> Tensor:
        self.buffer = self.momentum * self.buffer + g + self.weight_decay * w
        return w - self.lr * self.buffer


@dataclass
class Lion(Rule):
    """Chen et al., 2023."""

    betas: tuple[float, float] = (0.9, 0.99)
    m: Tensor | float = 0.0

    def __call__(self, w: Tensor, g: Tensor) -> Tensor:
        b1, b2 = self.betas
        update = torch.sign(b1 * self.m + (1 - b1) * g)
        self.m = b2 * self.m + (1 - b2) * g
        return w - self.lr * (update + self.weight_decay * w)


@dataclass
class Adagrad(Rule):
    """Duchi et al., 2011."""

    eps: float = 1e-10
    total: Tensor | float = 0.0

    def __call__(self, w: Tensor, g: Tensor) -> Tensor:
        g = g + self.weight_decay * w
        self.total = self.total + g**2
        return w - self.lr * g / (self.total**0.5 + self.eps)


RULES: dict[str, type[Rule]] = {"AdamW": AdamW, "Adam": Adam, "SGD": SGD, "Lion": Lion, "Adagrad": Adagrad}


# ---------------------------------------------------------------- training


@dataclass(frozen=True)
class Child:
    """What the paper does to the gradients."""

    masks: Sequence[Weights]
    """Before each step; parameters without a mask train in full."""

    scale: float = 1.0
    """Of a survivor: ChildTuning-F, 1 / reserve_p."""

    frozen_outside: bool = False
    """Nothing outside the child moves: ChildTuning-D, but not as the original code has it."""

    clip_child: bool = False
    """The norm that is clipped is that of the masked gradients."""


def train(
    model: nn.Module,
    weights: Weights,
    steps: Sequence[Sequence[Batch]],
    rules: Mapping[str, Rule],
    child: Child | None = None,
    *,
    clip: float = 0.0,
) -> Weights:
    """The fp64 master weights after one optimizer step for each list of micro-batches in `steps`.

    `model` sets the dtype of forward and backward; it is left with the new weights, rounded to that dtype.
    """
    weights = {name: w.double() for name, w in weights.items()}
    for t, micro_batches in enumerate(steps):
        load(model, weights)
        grads = gradients(model, micro_batches)
        if child is not None and child.clip_child:
            grads = {name: g * child.masks[t].get(name, 1) for name, g in grads.items()}
        grads = clipped(grads, clip)
        for name, w in weights.items():
            mask = child.masks[t].get(name) if child else None
            if child is None or mask is None:
                weights[name] = rules[name](w, grads[name])
                continue
            moved = rules[name](w, grads[name] * mask * child.scale)
            weights[name] = torch.where(mask, moved, w) if child.frozen_outside else moved
    load(model, weights)
    return weights


def clipped(grads: Weights, clip: float) -> Weights:
    """Gradients of a global norm of at most `clip`; 0 means no clipping."""
    norm = sum(float((g**2).sum()) for g in grads.values()) ** 0.5
    factor = min(1.0, clip / norm) if clip else 1.0
    return {name: g * factor for name, g in grads.items()}


def load(model: nn.Module, weights: Weights) -> None:
    """Set parameters by name, rounded to the model's dtype."""
    with torch.no_grad():
        for name, w in weights.items():
            model.get_parameter(name).copy_(w)


# ---------------------------------------------------------------- comparison


def worst_difference(got: Weights, expected: Weights) -> float:
    """Largest relative difference in norm, over the parameters."""
    return max(float((got[n].double() - expected[n]).norm() / expected[n].norm()) for n in expected)


def distance(a: Weights, b: Weights) -> float:
    """Euclidean distance of two sets of weights."""
    return sum(float((a[n].double() - b[n].double()).square().sum()) for n in b) ** 0.5
