"""With the other `_zero_*.py`, what reads DeepSpeed's attributes. `tests/test_seams.py` pins each: an upgrade fails there first.

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
read is compared with the weights, see `_zero_layout.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ds_childtune._ranks import raise_together
from ds_childtune.shards import FlatShard, Fragment

Engine = Any
"""A `deepspeed.DeepSpeedEngine`; DeepSpeed ships no types."""


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


def check_engine(given: object) -> None:
    """Raise ValueError, on every rank, for what is not a DeepSpeed engine. A collective where DeepSpeed's are there already."""
    from deepspeed import comm as dist

    if isinstance(given, _engine_class()):
        remedy = None
    elif isinstance(inner := getattr(given, "engine", None), _engine_class()):
        remedy = f"attach to the {type(inner).__name__} in its .engine"
    elif isinstance(given, tuple) and any(isinstance(part, _engine_class()) for part in given):
        remedy = "attach to the first of what deepspeed.initialize returned: engine, *_ = deepspeed.initialize(...)"
    elif hasattr(given, "model_wrapped"):
        remedy = "attach to its .model_wrapped, once training has begun: in the on_train_begin of a callback"
    elif hasattr(given, "prepare") and hasattr(given, "state"):
        remedy = "attach to the model that its prepare() returned"
    elif isinstance(given, nn.Module):
        remedy = (
            "attach to the engine around it: what deepspeed.initialize or accelerator.prepare returned, or trainer.model_wrapped"
            " once training has begun"
        )
    else:
        remedy = "attach to the first of what deepspeed.initialize returned"
    error = None
    if remedy is not None:
        error = ValueError(f"attach: expected a DeepSpeedEngine, got {type(given).__name__}. Remedy: {remedy}.")
    if dist.is_initialized():
        raise_together(error)
    elif error is not None:
        raise error


def _engine_class() -> type:
    from deepspeed.runtime.engine import DeepSpeedEngine

    return DeepSpeedEngine  # type: ignore[no-any-return]


def missing_groups(engine: Engine) -> str | None:
    """What is wrong when the base optimizer has not the param groups any more that ZeRO took over, or None."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "sub_group_to_group_id"):
        expected = len(set(optimizer.sub_group_to_group_id.values()))
    else:
        expected = next((len(getattr(optimizer, name)) for name in _GROUPS if hasattr(optimizer, name)), -1)
    found = len(base_optimizer(engine).param_groups)
    if expected in (-1, found):
        return None
    what = f"expected the {expected} param groups that deepspeed.initialize was given, got {found}"
    if found < expected:
        return (
            f"{what} in {type(base_optimizer(engine)).__name__}: DeepSpeed has built another optimizer, of one group, and fails at"
            " its first step. Remedy: use one param group, or another optimizer."
        )
    return (
        f"{what}: with {type(optimizer).__name__}, groups that are added later never train. Remedy: give deepspeed.initialize"
        " an optimizer with all groups; one that is to train later may begin at lr 0."
    )


def refuse_unsupported(engine: Engine) -> None:
    """Raise NotImplementedError, with a remedy, for a set-up where masks would not act or not be exact."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    base = engine.basic_optimizer
    if base is None or engine.optimizer is None:
        raise ValueError(
            "attach: this engine has no optimizer, so there is nothing to mask."
            ' Remedy: give deepspeed.initialize an optimizer, or an "optimizer" block in its config.'
        )
    if (problem := missing_groups(engine)) is not None:
        raise ValueError(f"attach: {problem}")
    zero = engine._config.zero_config
    offload = zero.offload_optimizer
    base_name = type(base).__name__
    wrapper = engine.optimizer
    exact = (
        DeepSpeedZeroOptimizer,
        DeepSpeedZeroOptimizer_Stage3,
        BF16_Optimizer,
        FP16_Optimizer,
        FP16_UnfusedOptimizer,
    )
    refusals = {
        "pipeline parallelism": (engine.pipeline_parallelism, "use ZeRO data parallelism"),
        "tensor parallelism (AutoTP or an mpu)": (engine.autotp_size() > 1 or engine.mpu is not None, "use ZeRO-3"),
        "sequence parallelism": (engine.sequence_parallel_size > 1, "use ZeRO data parallelism"),
        "mixture of experts with expert parallelism": (engine.has_moe_layers, "train the experts data-parallel"),
        "MiCS": (getattr(zero, "mics_shard_size", -1) > 0, "remove zero_optimization.mics_shard_size"),
        "hpZ": (zero.zero_hpz_partition_size > 1, "remove zero_optimization.zero_hpz_partition_size"),
        "ZenFlow": (bool(engine.zenflow), "remove zero_optimization.zenflow"),
        "SuperOffload": (bool(engine.super_offload()), "remove offload_optimizer.super_offload"),
        "offloading optimizer state to NVMe": (
            offload is not None and str(getattr(offload.device, "value", offload.device)) == "nvme",
            'use offload_optimizer.device "cpu"',
        ),
        "offload_optimizer.ratio below 1": (
            offload is not None and engine.zero_partial_offload() not in (None, 1, 1.0),
            "remove offload_optimizer.ratio",
        ),
        "DeepCompile": (engine.is_deepcompile_enabled(), "remove compile.deepcompile"),
        "legacy optimizer fusion in fp16": (
            getattr(wrapper, "fused_adam_legacy", False) or getattr(wrapper, "fused_lamb_legacy", False),
            'use the "adamw" optimizer, and remove legacy_fusion',
        ),
        "torch_autocast in fp16, whose gradient scaler may skip single shards": (
            bool(engine.torch_autocast_z0_gradscaler) or bool(getattr(wrapper, "torch_autocast_gradscaler", None)),
            "use bf16",
        ),
        f"the optimizer {base_name}, which does not step `.grad` of flat shards element by element": (
            any(word in base_name for word in ("Onebit", "OnebitAdam", "ZeroOneAdam", "Muon")),
            "use AdamW, SGD or Lion",
        ),
        f"the optimizer {base_name}, whose step does not call torch's step hooks": (
            not _fires_hooks(base_optimizer(engine)),
            "use the optimizer that it wraps, or call torch.optim.Optimizer.__init__ in its constructor",
        ),
        f"the optimizer wrapper {type(wrapper).__name__}": (
            not (wrapper is base or type(wrapper) in exact),
            "use ZeRO stage 0, 1, 2 or 3 with a standard optimizer",
        ),
    }
    for what, (refused, remedy) in refusals.items():
        if refused:
            raise NotImplementedError(f"ds_childtune does not support {what}. Remedy: {remedy}.")


def child_tuning_block(engine: Engine) -> object:
    """What the DeepSpeed config, which may have been a path, has under "child_tuning", or None."""
    return engine._config._param_dict.get("child_tuning")


def base_optimizer(engine: Engine) -> torch.optim.Optimizer:
    """The optimizer that steps flat shards.

    Not always `engine.basic_optimizer`: ZeRO builds a second Adagrad, whose state exists from its construction on. Nor what that one
    may wrap: only DeepSpeed's own wrapper is looked into.
    """
    base: torch.optim.Optimizer = engine.basic_optimizer
    if engine.optimizer is not base:
        base = getattr(engine.optimizer, "optimizer", base)
    return base


def empty_param_groups(engine: Engine) -> None:
    """Leave the base optimizer's param groups as ZeRO-3 leaves them after each step: empty.

    Those of the Adagrad that it builds are full before the first one. A state dict would then have every flat shard twice, and
    none that is loaded would fit.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer._clear_fp32_optimizer_param_groups()


def _fires_hooks(optimizer: Any) -> bool:
    """Whether torch's step hooks can be registered on it, and its `step` calls them."""
    return hasattr(optimizer, "_optimizer_step_pre_hooks") and getattr(type(optimizer).step, "hooked", False)


def read_parameters(engine: Engine) -> Parameters:
    """The model's parameters, by name.

    Raises:
        NotImplementedError: when the optimizer holds parameters that are not the model's.
    """
    held = {id(p): p for p in _held(engine.optimizer) if p.requires_grad or _is_wrapper(engine.optimizer)}
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
    held = {id(p) for p in _held(engine.optimizer)}
    now = dict(engine.module.named_parameters())
    changed = {name for name, _ in _shapes(engine).items() ^ parameters.shapes.items()}
    changed |= {name for name, p in parameters.by_name.items() if now.get(name) is not p or id(p) not in held}
    return sorted(changed)


def _shapes(engine: Engine) -> dict[str, torch.Size]:
    return {name: torch.Size(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}


def _is_wrapper(optimizer: Any) -> bool:
    """Whether DeepSpeed has put flat shards in the place of parameters. These are stepped when parameters are frozen, too."""
    return any(hasattr(optimizer, name) for name in _GROUPS)


_GROUPS = ("bit16_groups", "bf16_groups", "fp16_groups")
"""Lists of parameters by group, of DeepSpeed's optimizers."""


def _held(optimizer: Any) -> list[Any]:
    """The parameters that the optimizer was given and took."""
    groups = next((getattr(optimizer, name) for name in _GROUPS if hasattr(optimizer, name)), None)
    if groups is None:
        groups = [group["params"] for group in optimizer.param_groups]
    return [param for group in groups for param in group]


def read_flat_shards(engine: Engine, parameters: Parameters) -> tuple[FlatShard, ...]:
    """What the base optimizer steps on this rank. See [Note: the one place] and [Note: flat shards]."""
    names = {id(p): name for name, p in parameters.by_name.items()}
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return _stage3_shards(optimizer, names)
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return _sliced_shards(optimizer, names)
    if hasattr(optimizer, "fp32_groups_flat_partition"):
        return _mapped_shards(optimizer.bf16_groups, optimizer.fp32_groups_flat_partition, names)
    counted = data_parallel_rank(engine) == 0
    if hasattr(optimizer, "fp32_groups_flat"):
        flat = zip(optimizer.fp32_groups_flat, optimizer.fp16_groups, strict=True)
        return tuple(_whole_parameters(tensor, group, names, counted) for tensor, group in flat)
    if hasattr(optimizer, "fp32_groups"):
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


def data_parallel_rank(engine: Engine) -> int:
    """This rank inside the group over which gradients are averaged."""
    from deepspeed import comm as dist

    return int(dist.get_rank(group=engine.seq_data_parallel_group))


def model_dtype(engine: Engine) -> torch.dtype:
    """dtype of the forward pass and of local gradients."""
    return engine.get_data_types()[0]  # type: ignore[no-any-return]


def gradient_dtype(engine: Engine, shards: tuple[FlatShard, ...]) -> torch.dtype:
    """dtype of the flat shards' gradients."""
    return shards[0].tensor.dtype if shards else model_dtype(engine)


def inside_accumulation(engine: Engine) -> bool:
    """True between the first micro-batch of an accumulation and its step."""
    if not engine.managed_gradient_accumulation():
        return bool(engine._unmanaged_backward_count)
    # accelerate and Trainer set the boundary of every micro-batch themselves and call `step` at the last one alone, so that
    # `micro_steps` counts something else.
    boundary = engine._is_gradient_accumulation_boundary
    if boundary is not None:
        return not boundary
    return bool(engine.micro_steps % engine.gradient_accumulation_steps())


def applied_steps(engine: Engine) -> int:
    """Optimizer steps that DeepSpeed has taken and not skipped."""
    return int(engine.global_steps - engine.skipped_steps)
