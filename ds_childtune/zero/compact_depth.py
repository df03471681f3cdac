"""How deep a compact child goes on an engine, and masters that are copies of the parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ds_childtune.child.compact import DeepPlumbing
from ds_childtune.zero.compact_stage3 import ZeroThreePlumbing
from ds_childtune.zero.compact_stage12 import ZeroTwoPlumbing
from ds_childtune.zero.lean_start import is_lean

Clip = Literal["dense", "child"] | None
"""`child_tuning.clip`."""


@dataclass(frozen=True)
class Depth:
    """How deep a compact child goes on an engine, and why."""

    plumbing: DeepPlumbing | None
    """None at depth wrap."""
    reason: str

    @classmethod
    def of(cls, engine: Any, clip: Clip) -> Depth:
        """Deep where it can be without changing what the config says about the gradient norm."""
        optimizer = engine.optimizer
        against = _reason_against(engine, clip)
        if against is not None:
            return cls(None, f"wrap, around DeepSpeed's flat shards: {against}")
        if _is_zero_three(optimizer):
            return cls(
                ZeroThreePlumbing(engine), "deep, in place of DeepSpeed's flat shards; the gradient norm is the child's"
            )
        return cls(ZeroTwoPlumbing(engine), "deep, in place of DeepSpeed's fp32 masters")


def refuse_lean(engine: Any, *, compact: bool, clip: Clip) -> None:
    """Raise NotImplementedError where an engine of `lean_start` has no way back to what it left out."""
    if not is_lean(engine):
        return
    reason = _reason_against(engine, clip) if compact else 'optimizer_state is "dense"'
    if reason is not None:
        raise NotImplementedError(
            f'attach: after lean_start, expected a child of optimizer_state "compact" at depth deep, but {reason}.'
            ' Remedy: set "optimizer_state": "compact" and "clip": "child", or leave lean_start out.'
        )


def _is_zero_three(optimizer: Any) -> bool:
    return hasattr(optimizer, "fp32_partitioned_groups_flat")


def _is_zero_two(optimizer: Any) -> bool:
    return hasattr(optimizer, "single_partition_of_fp32_groups")


def _reason_against(engine: Any, clip: Clip) -> str | None:
    """Why a child cannot be deep, or None."""
    optimizer = engine.optimizer
    if not _is_zero_three(optimizer) and not _is_zero_two(optimizer):
        return f"{type(optimizer).__name__} keeps no partition of its own"
    if _is_offloaded(optimizer):
        return "with offload the optimizer's state is not on the device"
    if _is_zero_two(optimizer):
        if optimizer.gradient_accumulation_dtype != optimizer.dtype:
            return f"gradients are accumulated in {optimizer.gradient_accumulation_dtype}, parameters are {optimizer.dtype}"
        return None
    if clip == "dense":
        return 'child_tuning.clip "dense" needs the norm of the whole gradient'
    if clip is None and engine.gradient_clipping() > 0:
        return 'gradient_clipping needs the norm of the whole gradient, unless child_tuning.clip is "child"'
    return None


def _is_offloaded(optimizer: Any) -> bool:
    if _is_zero_three(optimizer):
        return bool(optimizer.offload_optimizer or optimizer.offload_param)
    return bool(optimizer.cpu_offload)
