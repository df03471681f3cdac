"""ChildTuning-F: a fresh random mask on the gradients of every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ds_childtune.child.base_optimizer import share_counters
from ds_childtune.child.child_shard import ChildShard
from ds_childtune.child.generator import base_keys, bernoulli_mask, keep_limit, split_blocks, step_keys
from ds_childtune.child.mask_kernels import ShardKernel, shard_kernel
from ds_childtune.child.network import Stepped
from ds_childtune.shards import FlatShard, Fragment


class TaskFreeChild:
    """ChildTuning-F: g <- g * M / p, with a fresh Bernoulli(p) mask M at every applied step."""

    fixed = False
    norm_is_child = False
    flat_gradients = True

    def __init__(
        self, shards: Sequence[FlatShard], optimizer: torch.optim.Optimizer, *, seed: int, reserve_p: float
    ) -> None:
        self.shards: Mapping[Tensor, ChildShard] = {}
        self.optimizer = optimizer
        self._seed = seed
        self._reserve_p = reserve_p
        self._limit = keep_limit(reserve_p)
        self._pieces = {s.tensor: [piece for f in s.eligible for piece in split_blocks(f)] for s in shards}
        self._kernels: dict[tuple[Tensor, torch.device, torch.dtype], tuple[ShardKernel, Tensor]] = {}
        """With the base keys of the shard's pieces."""

    def recover(self) -> None:
        """Nothing is left behind."""

    def before_step(self, optimizer: torch.optim.Optimizer, stepped: Sequence[Stepped], step: int) -> None:
        for shard in (shard for each in stepped for shard in each.shards):
            grad = shard.flat_grad()
            if grad is not None and self._pieces[shard.tensor]:
                kernel, base = self._kernel(shard.tensor, grad)
                kernel(grad, step_keys(base, step), self._limit, 1.0 / self._reserve_p)

    def after_step(self) -> None:
        """Nothing to do."""

    def child_mask(self, shard: FlatShard, fragment: Fragment, step: int) -> Tensor:
        """bool [fragment.numel]: what the `step`-th applied step uses for an eligible fragment."""
        return bernoulli_mask(fragment, self._seed, step, self._reserve_p, device=shard.tensor.device)

    def share_counters(self) -> None:
        share_counters(self.optimizer, [group["params"] for group in self.optimizer.param_groups])

    def release(self) -> None:
        """Nothing was taken."""

    def discard(self) -> None:
        """Nothing was taken."""

    def restore_dense(self) -> None:
        """Nothing was taken."""

    def _kernel(self, tensor: Tensor, grad: Tensor) -> tuple[ShardKernel, Tensor]:
        at = (tensor, grad.device, grad.dtype)
        if at not in self._kernels:
            pieces = self._pieces[tensor]
            base = base_keys(pieces, self._seed, device=grad.device)
            self._kernels[at] = shard_kernel(pieces, grad.device, grad.dtype), base
        return self._kernels[at]
