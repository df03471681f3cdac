"""What decides how much of a child is compact: read from an engine, or from a config. See [Note: before there is an engine]."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ds_childtune.zero.config_reading import ConfigReading
from ds_childtune.zero.engine import Engine, Wrapper, is_offloaded, model_dtype, wrapper_of


@dataclass(frozen=True)
class Settings:
    """Of an engine, or of one that a config would make."""

    wrapper: Wrapper
    keeper: str
    """Class of `engine.optimizer`."""
    offloaded: bool
    """Whether the optimizer's state, or at ZeRO-3 the parameters, are not on the device."""
    clips: bool
    """Whether gradients are clipped by their norm."""
    dtype: torch.dtype
    """Of the forward pass."""
    accumulation: torch.dtype
    """What gradients are accumulated in."""
    quantized: bool = False
    """Whether gradients are sent in fewer bits: zero_quantized_gradients, of ZeRO-3."""

    @classmethod
    def of_engine(cls, engine: Engine) -> Settings:
        optimizer = engine.optimizer
        wrapper = wrapper_of(engine)
        split = wrapper in (Wrapper.ZERO_1_2, Wrapper.ZERO_3)
        return cls(
            wrapper,
            type(optimizer).__name__,
            offloaded=is_offloaded(engine) or (wrapper is Wrapper.ZERO_3 and bool(optimizer.offload_param)),
            clips=engine.gradient_clipping() > 0,
            dtype=optimizer.dtype if split else model_dtype(engine),
            accumulation=optimizer.gradient_accumulation_dtype if split else engine.get_data_types()[1],
            quantized=wrapper is Wrapper.ZERO_3 and optimizer.all2all_process_group is not None,
        )

    @classmethod
    def of_config(cls, config: ConfigReading) -> Settings:
        """Raises ValueError for what DeepSpeed refuses."""
        offloaded = config.stage > 0 and config.offload("offload_optimizer") != "none"
        wrapper = _wrapper(config, offloaded)
        return cls(
            wrapper,
            wrapper.value if wrapper is not Wrapper.NONE else config.optimizer or "the base optimizer",
            offloaded=offloaded or (wrapper is Wrapper.ZERO_3 and config.offload("offload_param") != "none"),
            clips=config.gradient_clipping > 0,
            dtype=config.dtype,
            accumulation=config.accumulation,
            quantized=wrapper is Wrapper.ZERO_3 and bool(config.zero.zero_quantized_gradients),
        )


def _wrapper(config: ConfigReading, offloaded: bool) -> Wrapper:
    """As DeepSpeed's `_do_optimizer_sanity_check` decides."""
    if config.stage == 3:
        return Wrapper.ZERO_3
    if config.stage:
        mixed = config.dtype is torch.bfloat16 and config.accumulation is torch.float32
        return Wrapper.BF16 if mixed and config.stage == 1 and not offloaded else Wrapper.ZERO_1_2
    if config.dtype is torch.float32:
        return Wrapper.NONE
    return Wrapper.FP16_FUSED if config.optimizer_is_fused else Wrapper.FP16_UNFUSED
