"""A DeepSpeed config, read before there is an engine of it.

[Note: before there is an engine]
What decides how much is compact, and what is refused, is known of an engine in full, and of a config in part: it does not say which
optimizer a script passes, or which process groups there are. `Settings` and `supported.Refusal` have both readings, so that a rule is
written once. Values "auto", which Hugging Face's Trainer fills in, count as missing; `auto_keys` names them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

AUTO = "auto"
_DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "half": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
}
_CLIPPING = 1.0
"""DeepSpeed's default of gradient_clipping, and that of the Trainer's max_grad_norm."""
_FUSED = ("adam", "adamw", "lamb")
"""Optimizers that DeepSpeed takes from its fused kernels, in lower case."""


@dataclass(frozen=True)
class ConfigReading:
    """What a DeepSpeed config says. Values that are missing have DeepSpeed's defaults."""

    given: Mapping[str, Any]
    """As it was given, "auto" values included."""

    @cached_property
    def auto_keys(self) -> tuple[str, ...]:
        """Dotted names of the keys whose value is "auto"."""
        return tuple(_auto(self.given))

    @cached_property
    def _values(self) -> dict[str, Any]:
        return _without_auto(self.given)

    @property
    def child_tuning(self) -> object:
        """The block; None where there is none."""
        return self.given.get("child_tuning")

    def block(self, key: str) -> dict[str, Any]:
        """A block without its "auto" values; empty where it is missing."""
        found = self._values.get(key)
        return dict(found) if isinstance(found, Mapping) else {}

    def value(self, key: str, default: Any = None) -> Any:
        """Of a key at the top."""
        return self._values.get(key, default)

    def enabled(self, key: str) -> bool:
        """Whether a block like "fp16" is switched on."""
        return bool(self.block(key).get("enabled", False))

    @cached_property
    def zero(self) -> Any:
        """DeepSpeed's own reading of zero_optimization, with its defaults.

        Raises:
            ValueError: for what DeepSpeed refuses.
        """
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        # Newer versions do not know MiCS any more; `supported.REFUSALS` says more of it.
        block = {k: v for k, v in self.block("zero_optimization").items() if v is not None and "mics_" not in k}
        try:
            return DeepSpeedZeroConfig(**block)
        except Exception as error:  # of pydantic, or an assertion
            text = " ".join(str(error).split())[:300]
            raise ValueError(
                f"zero_optimization: DeepSpeed refuses it: {text}. Remedy: correct it; see DeepSpeed's page on its config."
            ) from None

    @property
    def stage(self) -> int:
        return int(self.zero.stage)

    @property
    def dtype(self) -> torch.dtype:
        """Of the forward pass."""
        if self.enabled("fp16"):
            return torch.float16
        return torch.bfloat16 if self.enabled("bf16") else torch.float32

    @property
    def accumulation(self) -> torch.dtype:
        """What gradients are accumulated in."""
        name = self.block("data_types").get("grad_accum_dtype")
        return self.dtype if name is None else _DTYPES.get(str(name), self.dtype)

    @property
    def masters(self) -> torch.dtype:
        """What masters and their gradients are in."""
        return torch.bfloat16 if self.block("bf16").get("bf16_master_weights_and_grads") else torch.float32

    @property
    def gradient_clipping(self) -> float:
        """Zero: no clipping."""
        inner = self.block("optimizer").get("params", {}).get("max_grad_norm")
        return float(self.value("gradient_clipping", _CLIPPING if inner is None else inner))

    @property
    def optimizer(self) -> str | None:
        """The optimizer's name as it is given; None where the script passes one."""
        name = self.block("optimizer").get("type")
        return None if name is None else str(name)

    @property
    def optimizer_is_fused(self) -> bool:
        torch_adam = self.block("optimizer").get("params", {}).get("torch_adam", False)
        return (self.optimizer or "").lower() in _FUSED and not torch_adam

    @property
    def autocasts_to_fp16(self) -> bool:
        block = self.block("torch_autocast")
        name = str(block.get("dtype", "")).removeprefix("torch.")
        return bool(block.get("enabled")) and _DTYPES.get(name) is torch.float16

    def offload(self, what: str) -> str:
        """The device of "offload_optimizer" or "offload_param": "none", "cpu" or "nvme"."""
        found = getattr(self.zero, what)
        return "none" if found is None else str(getattr(found.device, "value", found.device))


def _auto(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if value == AUTO:
            yield prefix + key
        elif isinstance(value, Mapping):
            yield from _auto(value, f"{prefix}{key}.")


def _without_auto(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if not (isinstance(value, str) and value == AUTO)
    }
