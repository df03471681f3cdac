"""What an engine is made of, and what it is doing: its optimizers, dtypes and counters.

The files of this folder are the only ones that read DeepSpeed's attributes. `tests/test_seams.py` pins each attribute, so that an
upgrade of DeepSpeed fails there first.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ds_childtune.zero.overrides import Overrides

Engine = Any
"""A `deepspeed.DeepSpeedEngine`; DeepSpeed ships no types."""


class Wrapper(str, enum.Enum):
    """What DeepSpeed puts around the base optimizer: one class for each way to hold the optimizer's state.

    The values are the classes' names; files of checkpoints have them.
    """

    NONE = "plain"
    """The base optimizer itself: ZeRO 0 in fp32."""
    FP16_FUSED = "FP16_Optimizer"
    """ZeRO 0 in 16 bits, with a fused optimizer."""
    FP16_UNFUSED = "FP16_UnfusedOptimizer"
    """ZeRO 0 in 16 bits, with another optimizer."""
    BF16 = "BF16_Optimizer"
    """ZeRO 1 in bf16, with gradients that are accumulated in fp32."""
    ZERO_1_2 = "DeepSpeedZeroOptimizer"
    ZERO_3 = "DeepSpeedZeroOptimizer_Stage3"

    @property
    def is_zero(self) -> bool:
        """Whether ranks hold a part of the masters each."""
        return self in (Wrapper.BF16, Wrapper.ZERO_1_2, Wrapper.ZERO_3)


def wrapper_of(engine: Engine) -> Wrapper:
    """What is around the engine's base optimizer; `NONE` for what ds_childtune does not know, which `attach` refuses."""
    of = type(engine.optimizer)
    known = of.__module__.startswith("deepspeed.") and of.__name__ in {w.value for w in Wrapper}
    return Wrapper(of.__name__) if known else Wrapper.NONE


def is_offloaded(engine: Engine) -> bool:
    """Whether the optimizer's state is in the host's memory, and its step is taken there."""
    optimizer = engine.optimizer
    match wrapper_of(engine):
        case Wrapper.ZERO_3:
            return bool(optimizer.offload_optimizer)
        case Wrapper.ZERO_1_2:
            return bool(optimizer.cpu_offload)
    return False


def child_tuning_block(engine: Engine) -> object:
    """What the DeepSpeed config, which may have been a path, has under "child_tuning", or None."""
    return engine._config._param_dict.get("child_tuning")


def takes_steps(given: object) -> bool:
    """Whether it is an engine with an optimizer. Those of reference models have none."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    return isinstance(given, DeepSpeedEngine) and given.optimizer is not None and given.basic_optimizer is not None


def write_events(engine: Engine, numbers: Mapping[str, float]) -> None:
    """Into DeepSpeed's monitor (TensorBoard, csv, wandb), where its config has one."""
    if engine.monitor.enabled:
        engine.monitor.write_events(
            [(f"Train/{name}", value, engine.global_samples) for name, value in numbers.items()]
        )


def base_optimizer(engine: Engine) -> torch.optim.Optimizer:
    """The optimizer that steps flat shards.

    Not always `engine.basic_optimizer`: ZeRO builds a second Adagrad, whose state exists from its construction on. And not what the
    base optimizer itself may wrap: only DeepSpeed's own wrapper is opened.
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
    if wrapper_of(engine) is Wrapper.ZERO_3:
        engine.optimizer._clear_fp32_optimizer_param_groups()


def wrapped_groups(engine: Engine) -> list[list[Any]] | None:
    """The parameters in whose place DeepSpeed steps flat shards, by group, at ZeRO-3 by sub-group; None without a wrapper."""
    optimizer = engine.optimizer
    match wrapper_of(engine):
        case Wrapper.NONE:
            return None
        case Wrapper.ZERO_1_2:
            return optimizer.bit16_groups  # type: ignore[no-any-return]
        case Wrapper.BF16:
            return optimizer.bf16_groups  # type: ignore[no-any-return]
    return optimizer.fp16_groups  # type: ignore[no-any-return]


def data_parallel_rank(engine: Engine) -> int:
    """This rank inside the group over which gradients are averaged."""
    from deepspeed import comm as dist

    return int(dist.get_rank(group=engine.seq_data_parallel_group))


def model_dtype(engine: Engine) -> torch.dtype:
    """dtype of the forward pass and of local gradients."""
    return engine.get_data_types()[0]  # type: ignore[no-any-return]


def inside_accumulation(engine: Engine) -> bool:
    """True between the first micro-batch of an accumulation and its step, once `engine.step` has counted that micro-batch."""
    if not engine.managed_gradient_accumulation():
        return bool(engine._unmanaged_backward_count)
    # accelerate and Trainer set the boundary of every micro-batch themselves and call `step` only at the last one, so
    # `micro_steps` counts something else.
    boundary = engine._is_gradient_accumulation_boundary
    if boundary is not None:
        return not boundary
    return bool(engine.micro_steps % engine.gradient_accumulation_steps())


def gradients_wait(engine: Engine) -> bool:
    """Whether a gradient waits for its step that would be lost if a child came or went, counted by `engine.step` or not yet.

    Let ranks agree where they can: one whose own `loss.backward()` has reached no parameter says no.
    """
    if inside_accumulation(engine):
        return True
    # The gradient of a whole accumulation can be taken over from the buffers of ZeRO 1 and 2, but not from ZeRO-3's. Without ZeRO
    # it is in `param.grad`, which a Fisher pass clears.
    whole = engine.managed_gradient_accumulation() and engine._is_gradient_accumulation_boundary is None
    lost = engine.gradient_accumulation_steps() > 1 or wrapper_of(engine) is not Wrapper.ZERO_1_2
    return whole and lost and _has_gradients(engine)


def _has_gradients(engine: Engine) -> bool:
    """Whether a backward pass has come since the last optimizer step."""
    optimizer = engine.optimizer
    match wrapper_of(engine):
        case Wrapper.ZERO_1_2:
            return bool(optimizer.micro_step_id >= 0)
        case Wrapper.ZERO_3:
            return bool(optimizer.micro_step_id or optimizer._epilogue_ran_this_backward)
        case Wrapper.BF16:
            return False  # it keeps gradients by itself
    # Of those that the optimizer steps: DeepSpeed's 16-bit wrappers never clear others.
    groups = wrapped_groups(engine) or [group["params"] for group in optimizer.param_groups]
    return any(param.grad is not None for group in groups for param in group)


def applied_steps(engine: Engine) -> int:
    """Optimizer steps that DeepSpeed has taken and not skipped."""
    return int(engine.global_steps - engine.skipped_steps)


def drop_gradients(engine: Engine) -> None:
    """Of a step that was refused: they would be added to those of the next one."""
    engine.zero_grad()
    if wrapper_of(engine).is_zero:
        engine.optimizer.zero_grad()


def before_each_step(engine: Engine, act: Callable[[], None]) -> Overrides:
    """Call `act` before DeepSpeed does anything for an optimizer step. An error of it leaves everything as it was, and no gradients.

    In a hook of the base optimizer it would not: DeepSpeed calls that one with a part of its param groups, and puts them back after.
    """

    def take(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            act()
        except BaseException:
            drop_gradients(engine)
            raise
        return original(*args, **kwargs)

    overrides = Overrides()
    overrides.around(engine, "_take_model_step", take)
    return overrides


def after_destroy(engine: Engine, act: Callable[[], None]) -> Overrides:
    """Call `act` once DeepSpeed has taken its own hooks back."""

    def take(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        finally:
            act()

    overrides = Overrides()
    overrides.around(engine, "destroy", take)
    return overrides


def after_a_failed_step(engine: Engine, act: Callable[[], None]) -> Overrides:
    """Call `act` where an optimizer step ends in an exception, which goes on."""

    def take(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except BaseException:
            act()
            raise

    overrides = Overrides()
    overrides.around(engine, "_take_model_step", take)
    return overrides
