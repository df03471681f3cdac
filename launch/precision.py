"""Whether a device can do with bf16 what launch/finetune.py asks of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator


def quick_in_bf16() -> bool:
    """Whether this device multiplies bf16 matrices about as fast as fp32 ones.

    A CPU without AVX-512, or ARM's instructions for bf16, does not: torch has plain loops for it there, some forty times as slow
    (pytorch issues 83863 and 146508).
    """
    return get_accelerator().device_name() != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def warn_of_slow_bf16(config: Mapping[str, Any], remedy: str) -> None:
    """Prints a line where a run with this DeepSpeed config would take tens of times as long as it has to."""
    if config["bf16"]["enabled"] and not quick_in_bf16():
        print(
            "WARNING: for bf16 expected a CPU with AVX-512, got one without it, where products of matrices take some forty times as"
            f" long as in fp32. Remedy: {remedy}",
            flush=True,
        )
