"""`clip: "child"`: gradients are masked before DeepSpeed takes their norm.

DeepSpeed takes the norm before it hands gradients to the base optimizer, so a step hook comes too late. Where it does, by ZeRO stage:

    0, fp32     engine.clip_fp32_gradients          over the parameters' gradients
    0, 16-bit   optimizer.step                      over the parameters' gradients, first of all
    1, 2        optimizer.scaled_global_norm        over averaged_gradients; with offload, over norms taken in the backward pass
    3           optimizer._get_norm_groups          over averaged_gradients, as at 1 and 2

Each is overridden on its instance by one that masks first. Where gradients are compact nothing is needed: only the child's are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_childtune.child.network import FixedChild
from ds_childtune.child.tiles import tile_of
from ds_childtune.shards import FlatShard
from ds_childtune.zero.engine import Wrapper, is_offloaded, wrapper_of
from ds_childtune.zero.overrides import Overrides
from ds_childtune.zero.streams import wait_for_this_stream


def refuse_unsupported_clip(engine: Any) -> None:
    """Raise NotImplementedError, with a remedy, where the child's norm cannot be taken."""
    if wrapper_of(engine) is Wrapper.BF16:
        raise NotImplementedError(
            'ds_childtune does not support child_tuning.clip "child" with BF16_Optimizer, which takes the norm of whole'
            " gradients on every rank, where a rank knows its own shard's mask. Remedy: use ZeRO stage 2 or 3, or remove"
            " data_types.grad_accum_dtype or child_tuning.clip."
        )


def handed_norm(engine: Any) -> Tensor | None:
    """The norm of the whole gradient after clipping, in a step of ZeRO 1 or 2; None where DeepSpeed takes none."""
    optimizer = engine.optimizer
    if optimizer._global_grad_norm is None:
        return None
    norm, most = torch.as_tensor(optimizer._global_grad_norm), optimizer.clip_grad
    return norm * (most / (norm + 1e-6)).clamp(max=1.0) if most > 0 else norm


class NormOfChild:
    """Mask gradients before the norm, on one engine and for one child, until `remove`."""

    def __init__(
        self, engine: Any, shards: Sequence[FlatShard], parameters: Mapping[str, nn.Parameter], child: FixedChild
    ) -> None:
        self._optimizer = optimizer = engine.optimizer
        self._shards = shards
        self._parameters = parameters
        self._child = child
        mask_partitions = self._mask_offloaded if is_offloaded(engine) else self._mask_partitions
        wrapper = wrapper_of(engine)
        if wrapper is Wrapper.ZERO_3:
            where, name, mask = optimizer, "_get_norm_groups", mask_partitions
        elif wrapper is Wrapper.ZERO_1_2:
            where, name, mask = optimizer, "scaled_global_norm", mask_partitions
        elif wrapper is Wrapper.NONE:
            where, name, mask = engine, "clip_fp32_gradients", self._mask_parameters
        else:
            where, name, mask = optimizer, "step", self._mask_parameters

        def masking(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            mask()
            return original(*args, **kwargs)

        self._overrides = Overrides()
        self._overrides.around(where, name, masking)

    def remove(self) -> None:
        self._overrides.remove()

    def _mask_partitions(self) -> None:
        optimizer = self._optimizer
        for i, shard in enumerate(self._shards):
            for start, gradients in _batches(optimizer.averaged_gradients[i], tile_of(shard.tensor.device)):
                if len(gradients) == 1:
                    self._child.mask_gradient_(shard, gradients[0], start)
                    continue
                together = torch.cat(gradients)
                self._child.mask_gradient_(shard, together, start)
                torch._foreach_copy_(gradients, together.split([g.numel() for g in gradients]))

    def _mask_offloaded(self) -> None:
        optimizer = self._optimizer
        # The host reads pinned gradients that may still be on their way: without managed gradient accumulation `engine.step` begins
        # these copies, and only DeepSpeed's norm, which this one replaces, waits for them.
        wait_for_this_stream()
        for shard in self._shards:
            gradient = shard.flat_grad()
            if gradient is not None:
                self._child.mask_gradient_(shard, gradient, 0)
        for param in self._parameters.values():
            number = optimizer.get_param_id(param)
            if number in optimizer.norm_for_param_grads:
                group, *_, start, numel = optimizer.grad_position[number]
                gradient = self._shards[group].flat_grad()
                optimizer.norm_for_param_grads[number] = gradient.narrow(0, start, numel).float().norm(2)

    def _mask_parameters(self) -> None:
        for shard in self._shards:
            for fragment in shard.fragments:
                gradient = self._parameters[fragment.name].grad
                if gradient is not None:
                    self._child.mask_gradient_(shard, gradient.view(-1), fragment.shard_start)


def _batches(gradients: Iterable[Tensor], size: int) -> Iterator[tuple[int, list[Tensor]]]:
    """Where each begins in the flat shard, and neighbours of `size` elements at most: a few kernels for thousands of parameters."""
    start = end = 0
    batch: list[Tensor] = []
    for gradient in gradients:
        if batch and end - start + gradient.numel() > size:
            yield start, batch
            start, batch = end, []
        batch.append(gradient if gradient.dim() == 1 else gradient.view(-1))
        end += gradient.numel()
    if batch:
        yield start, batch
