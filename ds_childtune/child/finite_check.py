"""NaN and inf in gradients, looked for in every nth step: outside a child with compact gradients nobody else sees them.

[Note: what a compact child does not see]
DeepSpeed finds NaN and inf in the gradients that it keeps. Where those are the child's only, NaN outside the child skips no step.
It does no harm to the weights, as nothing outside the child is stepped, but it is a sign that something is wrong with the loss or
the data. So `child_tuning.finite_check_every` looks at whole gradients before anything else is done with them, in one pass over each,
in the steps that are looked at. In those the host waits for the device once; in the others nothing is done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class FiniteCheck:
    """Of one engine's parameters. The caller sums `verdict` over the ranks."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], every: int) -> None:
        self._parameters = parameters
        self._every = every
        self._handles: list[RemovableHandle] = []
        self._bad: dict[str, Tensor] = {}
        """bool scalars, by the parameter's name, where it had a gradient."""

    def looks_at(self, step: int) -> bool:
        """Whether the applied step of this number, from 1, is looked at. The same on every rank."""
        return step % self._every == 0

    def begin(self) -> None:
        """Look at gradients from the next backward pass on. Calling it again changes nothing."""
        if not self._handles:
            self._handles = [p.register_hook(self._looking(n)) for n, p in self._parameters.items() if p.requires_grad]

    def end(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._bad.clear()

    def verdict(self, device: torch.device) -> Tensor:
        """int64, one for each parameter: 1 where this rank has seen NaN or inf since `begin`, which this ends."""
        none = torch.zeros((), dtype=torch.bool, device=device)
        verdict = torch.stack([self._bad.get(name, none) for name in self._parameters]).long()
        self.end()
        return verdict

    def judge(self, verdict: Sequence[int], step: int) -> None:
        """
        Args:
            verdict: every rank's, summed.
            step: the applied step that comes next.

        Raises:
            RuntimeError: naming the parameters.
        """
        bad = [name for name, count in zip(self._parameters, verdict, strict=True) if count]
        if bad:
            raise RuntimeError(
                f"child_tuning.finite_check_every: expected finite gradients in step {step}, got NaN or inf in those of"
                f" {len(bad)} parameters ({', '.join(bad[:4])}{', ...' if len(bad) > 4 else ''}). The step was not taken."
                " Remedy: look for the batch or the loss that gives them, and start again from the last checkpoint; or remove"
                " child_tuning.finite_check_every, to train on without looking outside the child."
            )

    def _looking(self, name: str) -> Callable[[Tensor], None]:
        def look(gradient: Tensor) -> None:
            values = gradient.coalesce().values() if gradient.is_sparse else gradient
            if not values.numel():
                return
            low, high = torch.aminmax(values.detach())
            bad = ~(low.isfinite() & high.isfinite())
            before = self._bad.get(name)
            self._bad[name] = bad if before is None else before | bad

        return look
