"""Child-Tuning in one process, written from the paper (arXiv 2109.05687) and not from the library.

g_t = mean gradient of the global batch, clipped to a global norm
g_t <- g_t * M_t                (ChildTuning-F: M_t = Bernoulli(p) / p, given by the caller; ChildTuning-D: fixed)
AdamW's moments, step and decoupled decay, for the elements that may move
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
Masks = dict[str, Tensor]


def gradients(model: nn.Module, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Mean over the micro-batches of the gradient of the mean loss."""
    model.zero_grad()
    for batch in batches:
        (model(**batch).loss / len(batches)).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def fisher(model: nn.Module, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Mean of squared micro-batch gradients."""
    total: dict[str, Tensor] = {}
    model.eval()
    for batch in batches:
        for name, grad in gradients(model, [batch]).items():
            total[name] = total.get(name, torch.zeros_like(grad)) + grad**2 / len(batches)
    return total


def task_driven_masks(scores: dict[str, Tensor], p: float) -> Masks:
    """The top p by a full sort; ties in the order (name, index)."""
    names = sorted(scores)
    flat = torch.cat([scores[n].view(-1) for n in names])
    order = torch.sort(flat, descending=True, stable=True).indices[: round(p * flat.numel())]
    keep = torch.zeros(flat.numel(), dtype=torch.bool)
    keep[order] = True
    return {
        n: m.view(scores[n].shape) for n, m in zip(names, keep.split([scores[n].numel() for n in names]), strict=True)
    }


class AdamW:
    """Masked AdamW. A parameter without a mask trains in full."""

    def __init__(self, model: nn.Module, *, lr: float, weight_decay: float, eps: float, clip: float) -> None:
        self.parameters = dict(model.named_parameters())
        self.lr, self.weight_decay, self.eps, self.clip = lr, weight_decay, eps, clip
        self.moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in self.parameters.items()}
        self.t = 0

    @torch.no_grad()
    def step(self, grads: dict[str, Tensor], masks: Masks, *, scale: float, decay_everywhere: bool) -> None:
        self.t += 1
        norm = torch.stack([g.norm() for g in grads.values()]).norm()
        factor = min(1.0, self.clip / (float(norm) + 1e-6)) if self.clip else 1.0
        for name, grad in grads.items():
            weight = self.parameters[name]
            mask = masks.get(name, torch.ones_like(grad, dtype=torch.bool))
            grad = torch.where(mask, grad * factor * (scale if name in masks else 1.0), torch.zeros_like(grad))
            m, v = self.moments[name]
            m.mul_(0.9).add_(grad, alpha=0.1)
            v.mul_(0.999).addcmul_(grad, grad, value=0.001)
            update = (m / (1 - 0.9**self.t)) / ((v / (1 - 0.999**self.t)).sqrt() + self.eps)
            decayed = weight * (1 - self.lr * self.weight_decay)
            weight.copy_((decayed if decay_everywhere else torch.where(mask, decayed, weight)) - self.lr * update)


def train(
    model: nn.Module,
    steps: Sequence[Sequence[Batch]],
    optimizer: AdamW,
    masks_of: Callable[[int], Masks],
    *,
    scale: float,
    decay_everywhere: bool,
) -> None:
    """One optimizer step for each list of micro-batches in `steps`."""
    for t, batches in enumerate(steps):
        optimizer.step(gradients(model, batches), masks_of(t), scale=scale, decay_everywhere=decay_everywhere)
