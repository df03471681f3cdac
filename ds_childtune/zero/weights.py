"""Where the weights that the forward pass uses lie on this rank.

[Note: model weights]
At ZeRO 0, 1 and 2 every rank has every parameter whole. A model of ZeRO-3, or built under `zero.Init`, has `param.ds_tensor`: this
rank's partition, padded at the end; `param.data` is empty, or, while the parameter is gathered and for small *persistent* ones always
after the first forward pass, a copy of the whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ds_childtune.zero.engine import Engine, Wrapper, wrapper_of


@dataclass(frozen=True)
class Weights:
    """A run of one parameter's elements on this rank."""

    start: int
    """First element, in the flattened parameter."""
    values: Tensor
    """1-D, a view: writing to it changes the model."""

    @property
    def end(self) -> int:
        return self.start + self.values.numel()

    def part(self, start: int, numel: int) -> Tensor:
        """The view of [start, start + numel) of the parameter."""
        return self.values.narrow(0, start - self.start, numel)


def is_partitioned(tensor: Tensor) -> bool:
    """Whether ranks hold a share of it each."""
    return hasattr(tensor, "ds_tensor")


def full_shape(tensor: Tensor) -> torch.Size:
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


def local_weights(name: str, tensor: Tensor) -> Weights:
    """This rank's elements of a parameter or buffer: its partition, or all.

    Raises:
        NotImplementedError: where weights are not in memory as they are.
    """
    if not is_partitioned(tensor):
        if not tensor.is_contiguous():
            raise NotImplementedError(
                f"{name}: expected a contiguous tensor, got strides {tensor.stride()}. Remedy: call contiguous()."
            )
        return Weights(0, tensor.detach().view(-1))
    param: Any = tensor
    partition = param.ds_tensor
    if partition.dtype != param.dtype or str(getattr(partition.final_location, "value", "")) == "nvme":
        raise NotImplementedError(
            f"{name}: expected weights in memory, in {param.dtype}, got them quantized or on NVMe."
            ' Remedy: remove offload_param.device "nvme" and quantized weights.'
        )
    start = min(partition.ds_numel * _partition_rank(param), param.ds_numel)
    return Weights(start, partition.detach().narrow(0, 0, min(partition.ds_numel, param.ds_numel - start)))


def refresh_copies(params: Iterable[nn.Parameter]) -> None:
    """Bring the whole copies that ranks have of partitioned parameters up to date with the partitions. A collective.

    Copies of hpZ are dropped, and filled again by the next forward pass, as after a step of plain DeepSpeed.
    """
    from deepspeed import comm as dist

    param: Any
    for param in params:
        if is_partitioned(param):
            param.ds_secondary_tensor = None
        if is_partitioned(param) and param.data.numel() == param.ds_numel:
            whole = torch.empty(
                param.ds_tensor.numel() * dist.get_world_size(param.ds_process_group),
                dtype=param.dtype,
                device=param.data.device,
            )
            partition = param.ds_tensor.detach().to(whole.device)
            dist.all_gather_into_tensor(whole, partition, group=param.ds_process_group)
            param.data.view(-1).copy_(whole[: param.ds_numel])


def _partition_rank(param: Any) -> int:
    from deepspeed import comm as dist

    return int(dist.get_rank(group=param.ds_process_group))


def update_forward_weights(engine: Engine) -> None:
    """16-bit weights from their masters; without a wrapper the base optimizer steps the weights themselves. A collective."""
    optimizer, wrapper = engine.optimizer, wrapper_of(engine)
    if wrapper is Wrapper.ZERO_3:
        for sub_group, lp in enumerate(optimizer.fp16_partitioned_groups_flat):
            if lp is None or lp.data_ptr() != optimizer.fp32_partitioned_groups_flat[sub_group].data_ptr():
                optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        optimizer.invalidate_secondary_tensor()
    elif wrapper.is_zero:
        optimizer.update_lp_params()
    elif wrapper is Wrapper.FP16_FUSED:
        for lp, hp in zip(optimizer.fp16_groups_flat, optimizer.fp32_groups_flat, strict=True):
            lp.data.copy_(hp)
    elif wrapper is Wrapper.FP16_UNFUSED:
        for lps, hps in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for lp, hp in zip(lps, hps, strict=True):
                lp.data.copy_(hp)
