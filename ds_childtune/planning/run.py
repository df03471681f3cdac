"""What is planned: how DeepSpeed is set up, in numbers, from its config and a few choices."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ds_childtune.child.compact import Parts
from ds_childtune.config import ChildTuningConfig
from ds_childtune.zero.calibration import bucket_beside
from ds_childtune.zero.compact_parts import can_start_lean, compact_parts
from ds_childtune.zero.config_reading import ConfigReading
from ds_childtune.zero.settings import Settings

Child = Literal["plain", "ChildTuning-F", "ChildTuning-D"]

_MOMENTS = {"adam": 2, "adamw": 2, "lamb": 2, "lion": 1, "adagrad": 1, "sgd": 0}
"""fp32 numbers that an optimizer keeps for each element; SGD one more with momentum."""
_TORCH_TEMPORARIES = 8
"""Bytes for each element that torch's Adam makes for the length of a step: a square root, and what it is divided by."""


@dataclass(frozen=True)
class Run:
    """How DeepSpeed is set up. Sizes of one element are in bytes; those of buckets in elements."""

    child: Child
    parts: Parts | None
    """What is compact; None: the optimizer's state is dense."""
    sends_child: bool
    """Whether ranks send only the child's gradients, and keep the masks of all ranks."""
    stage: int
    world_size: int
    node: int
    """hpZ: ranks over which weights are split once more; 1: without."""
    weight: int
    """An element of the forward pass's weights, and of local gradients."""
    master: int
    accumulated: int
    """An element of the gradients that are kept until the step."""
    moments: int
    """An element's optimizer state."""
    temporaries: int
    """What the optimizer makes for each element for the length of a step."""
    offload: bool
    """Masters, moments and their gradients are in the host's memory."""
    accumulates: bool
    """Whether a step has several micro-batches."""
    fp16: bool
    lean: bool
    """`lean_start`."""
    score: int
    """An element's score; 0 where there are none."""
    passes: bool
    """Whether there is a Fisher pass."""
    bucket: int
    buckets: int
    """Buckets of gradients: 2 where they are reduced while the next fills."""
    fisher_bucket: int
    sub_group: int
    persistence: int
    prefetch: int
    max_live: int

    @property
    def aliased(self) -> bool:
        """Whether masters are the weights themselves: a compact child in a dtype that both have."""
        return self.parts is not None and self.weight == self.master and self.stage > 0 and not self.offload


def run_of(config: Mapping[str, Any], child: ChildTuningConfig | None, world_size: int, *, lean: bool = False) -> Run:
    """
    Args:
        config: the DeepSpeed config; its block is not read.
        child: None: plain DeepSpeed.
        lean: begin inside `lean_start`, where the child can.

    Raises:
        ValueError: for what the plan does not know: offloaded parameters, or an optimizer whose state it has no number for.
    """
    reading = ConfigReading(config)
    zero = reading.zero
    if reading.offload("offload_param") != "none":
        raise ValueError(
            "plan: expected parameters on the device, got zero_optimization.offload_param."
            " Remedy: leave it out, or measure a run."
        )
    settings = Settings.of_config(reading)
    compact = None
    if child is not None and child.optimizer_state == "compact":
        compact = compact_parts(settings, child.clip, child.sends)
    scored = child is not None and child.mode == "ChildTuning-D"
    block = {} if child is None else child.model_dump(mode="json")
    weight, accumulated = _size(reading.dtype), _size(reading.accumulation)
    overlap = zero.overlap_comm if zero.overlap_comm is not None else reading.stage == 3
    return Run(
        child="plain" if child is None else child.mode,
        parts=None if compact is None else compact.parts,
        sends_child=compact is not None and compact.sends_child and world_size > 1,
        stage=reading.stage,
        world_size=world_size,
        node=min(world_size, max(1, int(zero.zero_hpz_partition_size))) if reading.stage == 3 else 1,
        weight=weight,
        master=_size(reading.masters),
        accumulated=accumulated,
        moments=_moments(reading),
        temporaries=0 if reading.optimizer_is_fused or reading.optimizer is None else _TORCH_TEMPORARIES,
        offload=settings.offloaded,
        accumulates=int(reading.value("gradient_accumulation_steps", 1)) > 1,
        fp16=reading.dtype == torch.float16,
        lean=lean and can_start_lean({**config, "child_tuning": block}),
        score=_score(child) if scored and child is not None else 0,
        passes=scored and child is not None and child.selector in ("fisher", "lowest_fisher", "contrast"),
        bucket=int(zero.reduce_bucket_size),
        buckets=2 if overlap and reading.stage < 3 else 1,
        fisher_bucket=bucket_beside(int(zero.reduce_bucket_size)),
        sub_group=int(zero.sub_group_size),
        persistence=int(zero.param_persistence_threshold),
        prefetch=int(zero.prefetch_bucket_size),
        max_live=int(zero.max_live_parameters),
    )


def bytes_of(text: str) -> int:
    """ "80GiB" or "80GB" as bytes.

    Raises:
        ValueError: for anything else.
    """
    found = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    try:
        if found is None:
            raise ValueError
        base = 1024 if found[3] else 1000
        return int(float(found[1]) * base ** " KMGT".index(found[2].upper() or " "))
    except ValueError:
        raise ValueError(f"expected a size like 80GiB, got {text!r}. Remedy: write for example --fit 80GiB.") from None


def _score(child: ChildTuningConfig) -> int:
    both = 2 if child.selector == "contrast" else 0
    return both + (2 if child.fisher.score_dtype == "e8m8" else 4)


def _size(dtype: torch.dtype) -> int:
    return torch.empty(0, dtype=dtype).element_size()


def _moments(reading: ConfigReading) -> int:
    name = (reading.optimizer or "AdamW").lower()
    params = reading.block("optimizer").get("params", {})
    if name not in _MOMENTS:
        raise ValueError(
            f"plan: expected one of {', '.join(_MOMENTS)}, got the optimizer {reading.optimizer!r}, whose state it does not know."
            " Remedy: plan with the one that keeps as much, for example --optimizer AdamW."
        )
    numbers = _MOMENTS[name] + (1 if name == "sgd" and params.get("momentum") else 0)
    return numbers * (2 if reading.block("bf16").get("bf16_optimizer_states") else 4)
