"""Compact masters and gradients at ZeRO 1 and 2 with CPU offload: only the child is sent, and only the child crosses to the host.

[Note: the child crosses]
Gradients are reduced on the device as in [Note: ZeRO-2 sends the child]. The child's masters and moments are on the host, and it is
stepped there. Two things cross in a step, once each, in 16 bits and through one tensor, which is pinned where the config says so:

    to the host      this rank's child of the gradient, when DeepSpeed asks for it, after overflow check and norm
    to the device    the child's new values; from there they are put into the weights, and gathered from all ranks

With offload DeepSpeed copies each parameter's gradient to the host in the backward pass, looks at it there, and steps a flat gradient.
None of that has a place for the child. So for the length of a step `cpu_offload` is False: its branch without offload takes what
ranks have reduced, and steps tensors that it finds on the host. Overridden for that long are, beside what a step overrides anyway:

    device                            the parameters', where the norm is made
    scaled_global_norm                is taken to the host, where it clips
    _get_preflattened_grad_partition  takes the child's gradient to the host

The index is on the device, for gradients and weights, and on the host, for all that looks at child shards. Flat shards are the host's
16-bit buffers, through which DeepSpeed sends whole weights: they are kept equal to this rank's weights, so all that reads flat shards
and the optimizer's state finds both on the host, as with dense state. Dense masters and gradients are freed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from ds_childtune.child.child_shard import ChildShard
from ds_childtune.ranks import true_on_all
from ds_childtune.zero.compact_sending import SendingPlumbing
from ds_childtune.zero.compact_stage12 import mapped_to, parameter_partitions
from ds_childtune.zero.overrides import Overrides


class OffloadedPlumbing(SendingPlumbing):
    """See [Note: the child crosses]. The order of shards is that of `read_flat_shards`; `install` is a collective."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self._crossing: Tensor | None = None
        """1-D, by group, in the parameters' dtype on the host: the child's gradient until its step, then its new values."""

    def _take_flat_shards(self) -> None:
        optimizer = self._optimizer
        # Of what this rank steps, the last backward pass may have reached nothing.
        waiting = not true_on_all(not optimizer.norm_for_param_grads)
        buffers = optimizer.param_buffer_of_bit16_for_cpu_offload_groups
        for i, (flat, lp, mappings) in enumerate(parameter_partitions(optimizer)):
            if waiting:
                optimizer.averaged_gradients[i] = [self._waiting_gradient(i, flat).to(lp.device, lp.dtype)]
            flat.grad = None
            with torch.no_grad():
                buffers[i].copy_(lp)
            flat.data = buffers[i].data
            mapped_to(flat, mappings)
        # What is left of whole gradients.
        optimizer.reset_cpu_buffers()
        optimizer.offload_gradient_dict.clear()
        optimizer.accumulated_grads_in_cpu.clear()
        optimizer._offload_accumulated_param_ids.clear()
        self._make_temporaries(0)

    def _waiting_gradient(self, group: int, flat: Tensor) -> Tensor:
        """What DeepSpeed has noted in the backward pass. Elsewhere is still what was there in an earlier step."""
        optimizer, gradient = self._optimizer, torch.zeros_like(flat, requires_grad=False)
        for param in optimizer.params_in_partition[group]:
            number = optimizer.get_param_id(param)
            if flat.grad is not None and number in optimizer.norm_for_param_grads:
                *_, start, numel = optimizer.grad_position[number]
                gradient.narrow(0, start, numel).copy_(flat.grad.narrow(0, start, numel))
        return gradient

    def _override(self) -> None:
        super()._override()
        layout = self._installed
        like = self._optimizer.param_buffer_of_bit16_for_cpu_offload_groups[0]
        self._crossing = self._pinned(like.new_empty(sum(layout.mine)))

    def remove(self) -> None:
        super().remove()
        self._crossing = None
        for flat, _, _ in parameter_partitions(self._optimizer):
            # Of no size in memory. DeepSpeed looks for one when it loads a checkpoint.
            flat.grad = flat.new_zeros(1).expand(flat.shape)

    def restore_dense(self, shards: Sequence[ChildShard]) -> None:
        optimizer = self._optimizer
        dtype = optimizer.master_weights_and_grads_dtype
        for i, (shard, (flat, lp, mappings)) in enumerate(zip(shards, parameter_partitions(optimizer), strict=True)):
            flat.grad = None
            flat.data = self._pinned(lp.detach().to("cpu", dtype, copy=True))
            flat.grad = self._pinned(torch.zeros_like(flat))
            mapped_to(flat, mappings)
            shard.scatter()
            self._give_back_gradient(i, flat.grad)
        optimizer._get_offload_gradient_dict()
        self._make_temporaries(max(param.numel() for group in optimizer.bit16_groups for param in group))

    def _give_back_gradient(self, group: int, gradient: Tensor) -> None:
        """Where a step is still to come: what DeepSpeed notes in the backward pass."""
        optimizer = self._optimizer
        gradients, optimizer.averaged_gradients[group] = optimizer.averaged_gradients.get(group), None
        if gradients is None:
            return
        gradient.copy_(gradients[0])
        optimizer.update_offload_overflow_tracker(gradient)
        for param in optimizer.params_in_partition[group]:
            number = optimizer.get_param_id(param)
            *_, start, numel = optimizer.grad_position[number]
            optimizer.norm_for_param_grads[number] = gradient.narrow(0, start, numel).float().norm(2)

    def _make_temporaries(self, numel: int) -> None:
        """DeepSpeed's, as large as the largest parameter, where it adds whole gradients up."""
        optimizer = self._optimizer
        here = optimizer.bit16_groups_flat[0].new_zeros(numel, dtype=optimizer.dtype)
        optimizer.temp_grad_buffer_for_cpu_offload = self._pinned(torch.zeros(numel, dtype=optimizer.dtype))
        optimizer.temp_grad_buffer_for_gpu_offload = here

    def _pinned(self, tensor: Tensor) -> Tensor:
        """On the host; pinned where the config says so and the accelerator can."""
        pins = self._optimizer.cpu_offload_pin_memory and tensor.numel()
        pinned: Tensor = get_accelerator().pin_memory(tensor) if pins else tensor
        return pinned

    # ---------------------------------------------------------------- the step

    def _step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        optimizer = self._optimizer
        with Overrides() as put:
            put.attribute(optimizer, "cpu_offload", False)
            put.attribute(optimizer, "device", self._installed.device)
            put.around(optimizer, "scaled_global_norm", _on_host)
            put.method(optimizer, "_get_preflattened_grad_partition", self._to_host)
            return super()._step(original, *args, **kwargs)

    def _to_host(self, group: int) -> Tensor:
        """The child's gradient of one group. The host waits for it."""
        crossing: Tensor = self._new_weights().split(self._installed.mine)[group]
        crossing.copy_(self._optimizer.averaged_gradients[group].flat_partition)
        return crossing

    def _new_weights(self) -> Tensor:
        assert self._crossing is not None, "not installed"
        return self._crossing

    def _spread(self, owned: Tensor, flats: Sequence[Tensor]) -> None:
        layout = self._installed
        # On the stream on which the next gradient crosses, for which the host waits before it writes here again.
        arrived = torch.empty_like(owned, device=layout.device).copy_(owned, non_blocking=True)
        layout.put(arrived, flats)
        layout.spread(arrived, flats)


def _on_host(scaled_global_norm: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    return scaled_global_norm(*args, **kwargs).to("cpu")
