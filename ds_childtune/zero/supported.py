"""What is not supported, and what is no engine: refused at `attach`, by name, with a remedy."""

from __future__ import annotations

from typing import Any

from torch import nn

from ds_childtune.ranks import raise_together
from ds_childtune.zero.engine import Engine, Wrapper, base_optimizer, wrapped_groups, wrapper_of


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
        remedy = "pass callbacks=[ds_childtune.ChildTuningCallback()] to it; or attach to its .model_wrapped, once training has begun"
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
    optimizer, groups = engine.optimizer, wrapped_groups(engine)
    found = len(base_optimizer(engine).param_groups)
    if groups is None:
        return None
    sub_groups = optimizer.sub_group_to_group_id if wrapper_of(engine) is Wrapper.ZERO_3 else None
    expected = len(groups) if sub_groups is None else len(set(sub_groups.values()))
    if expected == found:
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


def refuse_unsupported_engine(engine: Engine) -> None:
    """Raise NotImplementedError, with a remedy, for a set-up where masks would not act or not be exact."""
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
            wrapper is not base and wrapper_of(engine) is Wrapper.NONE,
            "use ZeRO stage 0, 1, 2 or 3 with a standard optimizer",
        ),
    }
    for what, (refused, remedy) in refusals.items():
        if refused:
            raise NotImplementedError(f"ds_childtune does not support {what}. Remedy: {remedy}.")


def _fires_hooks(optimizer: Any) -> bool:
    """Whether torch's step hooks can be registered on it, and its `step` calls them."""
    return hasattr(optimizer, "_optimizer_step_pre_hooks") and getattr(type(optimizer).step, "hooked", False)
