"""The flat shards that the base optimizer steps, and the parameters in them.

[Note: the one place]
At every ZeRO stage DeepSpeed hands its *base optimizer* (`engine.basic_optimizer`) flat 1-D shards with `.grad` set - reduced,
unscaled and clipped. Stages 1 and 2 call `step` once per param group, with `param_groups` cut to that group; stage 3 once per
sub-group, with the sub-group's shard put into its param group. So every gradient element passes exactly once per step, and
state is keyed by the flat shard's tensor, never by group index.

Layouts, by the class of `engine.optimizer`:

    DeepSpeedZeroOptimizer         (1, 2)           a slice of the concatenated group, in the order of `round_robin_bit16_groups`
    BF16_Optimizer                 (1, bf16, fp32 accumulation)   likewise; `param._hp_mapping` says of what
    DeepSpeedZeroOptimizer_Stage3  (3)              every parameter split on its own; `grad_position` says where it lies
    FP16_Optimizer                 (0, 16-bit, FusedAdam)         whole groups, concatenated, on every rank
    FP16_UnfusedOptimizer          (0, 16-bit, others)            whole parameters, on every rank
    the base optimizer itself      (0, fp32)        the parameters themselves, on every rank

`_hp_mapping` of DeepSpeedZeroOptimizer is not read: with `round_robin_gradients` it is in another order than the flat buffer. What is
read is compared with the weights, see `layout_check.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ds_childtune.shards import FlatShard, Fragment
from ds_childtune.zero.engine import Engine, Wrapper, data_parallel_rank, wrapped_groups, wrapper_of


@dataclass(frozen=True)
class Parameters:
    """The parameters that DeepSpeed optimises, by name."""

    by_name: dict[str, nn.Parameter]
    """Those that the optimizer steps, whether they were frozen since or not. In the order of `engine.module.named_parameters()`; a
    tied parameter has its first name."""

    not_held: tuple[str, ...]
    """Trainable parameters that the optimizer does not hold, so that they do not train."""

    frozen: dict[str, nn.Parameter]
    """Parameters that were frozen when this was read, and that the optimizer does not hold: thawing them trains nothing."""

    aliases: dict[str, str]
    """Every name of every parameter, frozen and tied ones included, to its first name."""

    shapes: dict[str, torch.Size]
    """Full shape, by first name, frozen parameters included."""


def read_parameters(engine: Engine) -> Parameters:
    """The model's parameters, by name.

    Raises:
        NotImplementedError: when the optimizer holds parameters that are not the model's.
    """
    # Flat shards are stepped when parameters in them are frozen, too.
    flat = wrapper_of(engine) is not Wrapper.NONE
    held = {id(p): p for p in _held(engine) if p.requires_grad or flat}
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    by_name: dict[str, nn.Parameter] = {}
    not_held: list[str] = []
    frozen: dict[str, nn.Parameter] = {}
    for name, param in engine.module.named_parameters(remove_duplicate=False):
        aliases[name] = first.setdefault(id(param), name)
        if aliases[name] == name:
            if id(param) in held:
                by_name[name] = param
            elif param.requires_grad:
                not_held.append(name)
            else:
                frozen[name] = param
    strangers = [tuple(p.shape) for key, p in held.items() if key not in first]
    if strangers:
        raise NotImplementedError(
            f"ds_childtune does not support an optimizer that holds parameters outside the model: it has {len(strangers)} of shapes"
            f" {', '.join(map(str, strangers[:3]))}. Remedy: make them parameters of the model that deepspeed.initialize is given."
        )
    return Parameters(by_name, tuple(not_held), frozen, aliases, _shapes(engine))


def changed_parameters(engine: Engine, parameters: Parameters) -> list[str]:
    """Names of parameters that came, went, have another shape, or left the optimizer. Frozen or not makes no difference."""
    held = held_parameters(engine)
    now = dict(engine.module.named_parameters())
    changed = {name for name, _ in _shapes(engine).items() ^ parameters.shapes.items()}
    changed |= {name for name, p in parameters.by_name.items() if now.get(name) is not p or id(p) not in held}
    return sorted(changed)


def _shapes(engine: Engine) -> dict[str, torch.Size]:
    return {name: torch.Size(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}


def held_parameters(engine: Engine) -> set[int]:
    """`id` of each parameter that the optimizer was given and took."""
    return {id(param) for param in _held(engine)}


def _held(engine: Engine) -> list[Any]:
    """The parameters that the optimizer was given and took."""
    groups = wrapped_groups(engine)
    if groups is None:
        groups = [group["params"] for group in engine.optimizer.param_groups]
    return [param for group in groups for param in group]


def read_flat_shards(engine: Engine, parameters: Parameters) -> tuple[FlatShard, ...]:
    """What the base optimizer steps on this rank. See [Note: the one place] and [Note: flat shards]."""
    names = {id(p): name for name, p in parameters.by_name.items()}
    optimizer = engine.optimizer
    wrapper = wrapper_of(engine)
    if wrapper is Wrapper.ZERO_3:
        return _stage3_shards(optimizer, names)
    if wrapper is Wrapper.ZERO_1_2:
        return _sliced_shards(optimizer, names)
    if wrapper is Wrapper.BF16:
        return _mapped_shards(optimizer.bf16_groups, optimizer.fp32_groups_flat_partition, names)
    counted = data_parallel_rank(engine) == 0
    if wrapper is Wrapper.FP16_FUSED:
        flat = zip(optimizer.fp32_groups_flat, optimizer.fp16_groups, strict=True)
        return tuple(_whole_parameters(tensor, group, names, counted) for tensor, group in flat)
    if wrapper is Wrapper.FP16_UNFUSED:
        pairs = [
            (hp, lp)
            for hps, lps in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True)
            for hp, lp in zip(hps, lps, strict=True)
        ]
    else:
        pairs = [(p, p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    return tuple(_whole_parameters(tensor, [param], names, counted) for tensor, param in pairs)


def _stage3_shards(optimizer: Any, names: dict[int, str]) -> tuple[FlatShard, ...]:
    shards = []
    for sub_group, (tensor, params) in enumerate(
        zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)
    ):
        fragments = []
        for param in params:
            position, shard_start, partition_numel = optimizer.grad_position[optimizer.get_param_id(param)]
            if position != sub_group:
                raise RuntimeError(f"ZeRO-3 puts {names[id(param)]} into sub-group {position}, expected {sub_group}")
            param_start = partition_numel * optimizer._get_param_partition_rank(param)
            numel = min(partition_numel, param.ds_numel - param_start)
            if numel > 0:
                fragments.append(Fragment(names[id(param)], param_start, shard_start, numel))
        shards.append(FlatShard(tensor, tuple(fragments)))
    return tuple(shards)


def _sliced_shards(optimizer: Any, names: dict[int, str]) -> tuple[FlatShard, ...]:
    """A flat shard is this rank's slice of a group's parameters, which lie one after the other, maybe with gaps."""
    from deepspeed import comm as dist

    shards = []
    for i, tensor in enumerate(optimizer.single_partition_of_fp32_groups):
        first = tensor.numel() * dist.get_rank(group=optimizer.real_dp_process_group[i])
        fragments = []
        for param, offset in zip(
            optimizer.round_robin_bit16_groups[i], optimizer.round_robin_bit16_offsets[i], strict=True
        ):
            start, end = max(offset, first), min(offset + param.numel(), first + tensor.numel())
            if start < end:
                fragments.append(Fragment(names[id(param)], start - offset, start - first, end - start))
        shards.append(FlatShard(tensor, tuple(fragments)))
    return tuple(shards)


def _mapped_shards(groups: Any, tensors: Any, names: dict[int, str]) -> tuple[FlatShard, ...]:
    shards = []
    for tensor, params in zip(tensors, groups, strict=True):
        fragments = []
        for param in params:
            mapping = param._hp_mapping
            if mapping is not None:
                lp, hp = mapping.lp_fragment_address, mapping.hp_fragment_address
                fragments.append(Fragment(names[id(param)], lp.start, hp.start, hp.numel))
        shards.append(FlatShard(tensor, tuple(sorted(fragments, key=lambda f: f.shard_start))))
    return tuple(shards)


def _whole_parameters(tensor: Tensor, params: Any, names: dict[int, str], counted: bool) -> FlatShard:
    fragments = []
    start = 0
    for param in params:
        fragments.append(Fragment(names[id(param)], 0, start, param.numel(), counted=counted))
        start += param.numel()
    return FlatShard(tensor, tuple(f for f in fragments if f.numel))
