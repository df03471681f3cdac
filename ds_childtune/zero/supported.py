"""What is not supported, and what is no engine: refused at `attach`, by name, with a remedy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ds_childtune.ranks import raise_together
from ds_childtune.zero.config_reading import ConfigReading
from ds_childtune.zero.engine import Engine, Wrapper, base_optimizer, model_dtype, wrapped_groups, wrapper_of


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
    elif isinstance(given, nn.parallel.DistributedDataParallel):
        remedy = (
            "train with DeepSpeed; accelerate's prepare() returns this where it does not: Accelerator(deepspeed_plugin=...), or"
            " `accelerate launch --use_deepspeed`"
        )
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
    theirs = base_optimizer(engine).param_groups
    if groups is None:
        return None
    if wrapper_of(engine) is Wrapper.ZERO_3:
        # It passes over a group that is frozen as a whole, and empties the others.
        known = set(optimizer.sub_group_to_group_id.values())
        trains = [i in known or any(p.requires_grad for p in group["params"]) for i, group in enumerate(theirs)]
        expected, found = len(known), sum(trains)
    else:
        expected, found = len(groups), len(theirs)
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


@dataclass(frozen=True)
class Refusal:
    """A set-up where masks would not act or not be exact, and how an engine and a config show it."""

    what: str
    """May contain {optimizer}, the base optimizer's name, and {wrapper}, the class around it."""
    remedy: str
    on_engine: Callable[[Engine], bool]
    in_config: Callable[[ConfigReading], bool] | None = None
    """None: a config does not say it."""

    def __call__(self, optimizer: str, wrapper: str = "") -> str:
        """The message."""
        what = self.what.format(optimizer=optimizer, wrapper=wrapper)
        return f"ds_childtune does not support {what}. Remedy: {self.remedy}."


_NOT_BY_ELEMENT = ("onebit", "zerooneadam", "muon")
"""Parts of the names, in lower case, of optimizers that do not step `.grad` of flat shards element by element."""


def _offload(engine: Engine) -> Any:
    return engine._config.zero_config.offload_optimizer


REFUSALS = (
    Refusal(
        "pipeline parallelism",
        "use ZeRO data parallelism",
        lambda engine: bool(engine.pipeline_parallelism),
    ),
    Refusal(
        "tensor parallelism (AutoTP or an mpu)",
        "use ZeRO-3",
        lambda engine: engine.autotp_size() > 1 or engine.mpu is not None,
        lambda config: int(config.block("tensor_parallel").get("autotp_size", 0)) > 1,
    ),
    Refusal(
        "sequence parallelism",
        "use ZeRO data parallelism",
        lambda engine: engine.sequence_parallel_size > 1,
        lambda config: int(config.value("sequence_parallel_size", 1)) > 1,
    ),
    Refusal(
        "mixture of experts with expert parallelism",
        "train the experts data-parallel",
        lambda engine: bool(engine.has_moe_layers),
    ),
    Refusal(
        "MiCS",
        "remove zero_optimization.mics_shard_size",
        lambda engine: getattr(engine._config.zero_config, "mics_shard_size", -1) > 0,
        lambda config: int(config.block("zero_optimization").get("mics_shard_size", -1)) > 0,
    ),
    Refusal(
        "ZenFlow",
        "remove zero_optimization.zenflow",
        lambda engine: bool(engine.zenflow),
        lambda config: bool(config.block("zero_optimization").get("zenflow")),
    ),
    Refusal(
        "SuperOffload",
        "remove offload_optimizer.super_offload",
        lambda engine: bool(engine.super_offload()),
        lambda config: bool(getattr(config.zero.offload_optimizer, "super_offload", False)),
    ),
    Refusal(
        "offloading optimizer state to NVMe",
        'use offload_optimizer.device "cpu"',
        lambda engine: (
            _offload(engine) is not None
            and str(getattr(_offload(engine).device, "value", _offload(engine).device)) == "nvme"
        ),
        lambda config: config.offload("offload_optimizer") == "nvme",
    ),
    Refusal(
        "offload_optimizer.ratio below 1",
        "remove offload_optimizer.ratio",
        lambda engine: _offload(engine) is not None and engine.zero_partial_offload() not in (None, 1, 1.0),
        lambda config: getattr(config.zero.offload_optimizer, "ratio", 1.0) not in (None, 1, 1.0),
    ),
    Refusal(
        "DeepCompile",
        "remove compile.deepcompile",
        lambda engine: bool(engine.is_deepcompile_enabled()),
        lambda config: bool(config.block("compile").get("deepcompile")),
    ),
    Refusal(
        "legacy optimizer fusion in fp16",
        'use the "adamw" optimizer, and remove legacy_fusion',
        lambda engine: (
            getattr(engine.optimizer, "fused_adam_legacy", False)
            or getattr(engine.optimizer, "fused_lamb_legacy", False)
        ),
        lambda config: (
            bool(config.block("optimizer").get("legacy_fusion")) and config.stage == 0 and config.enabled("fp16")
        ),
    ),
    Refusal(
        "torch_autocast in fp16, whose gradient scaler may skip single shards",
        "use bf16",
        lambda engine: (
            bool(engine.torch_autocast_z0_gradscaler)
            or bool(getattr(engine.optimizer, "torch_autocast_gradscaler", None))
        ),
        lambda config: config.autocasts_to_fp16,
    ),
    Refusal(
        "a model that torch.compile has wrapped, as its parameters have other names than the model's",
        "give deepspeed.initialize or the Trainer the model itself, and call engine.compile() afterwards",
        lambda engine: hasattr(engine.module, "_orig_mod"),
    ),
    Refusal(
        "the optimizer {optimizer}, which does not step `.grad` of flat shards element by element",
        "use AdamW, SGD or Lion",
        lambda engine: _steps_otherwise(type(engine.basic_optimizer).__name__),
        lambda config: _steps_otherwise(config.optimizer or ""),
    ),
    Refusal(
        "the optimizer {optimizer}, whose step does not call torch's step hooks",
        "use the optimizer that it wraps, or call torch.optim.Optimizer.__init__ in its constructor",
        lambda engine: not _fires_hooks(base_optimizer(engine)),
    ),
    Refusal(
        "the optimizer wrapper {wrapper}",
        "use ZeRO stage 0, 1, 2 or 3 with a standard optimizer",
        lambda engine: engine.optimizer is not engine.basic_optimizer and wrapper_of(engine) is Wrapper.NONE,
    ),
)
"""What `attach` refuses, in order."""


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
    for refusal in REFUSALS:
        if refusal.on_engine(engine):
            raise NotImplementedError(refusal(type(base).__name__, type(engine.optimizer).__name__))


def refuse_finite_check(engine: Engine) -> None:
    """Raise NotImplementedError, with a remedy, where gradients that are not finite say nothing."""
    if model_dtype(engine) is torch.float16:
        raise NotImplementedError(
            "ds_childtune does not support child_tuning.finite_check_every with fp16, whose loss scale is raised until gradients"
            " overflow. Remedy: use bf16, or remove child_tuning.finite_check_every."
        )


def refused_in(config: ConfigReading) -> list[str]:
    """What `attach` will refuse, as far as a config says it: its messages.

    Raises:
        ValueError: for what DeepSpeed refuses.
    """
    found = [r for r in REFUSALS if r.in_config is not None and r.in_config(config)]
    return [refusal(config.optimizer or "") for refusal in found]


def _steps_otherwise(name: str) -> bool:
    return any(word in name.lower().replace("_", "") for word in _NOT_BY_ELEMENT)


def _fires_hooks(optimizer: Any) -> bool:
    """Whether torch's step hooks can be registered on it, and its `step` calls them."""
    return hasattr(optimizer, "_optimizer_step_pre_hooks") and getattr(type(optimizer).step, "hooked", False)
