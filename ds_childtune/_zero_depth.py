"""How deep a compact child goes on an engine, and masters that are copies of the parameters. Reads DeepSpeed's attributes, as
`_zero.py` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ds_childtune._zero_deep import ZeroThreePlumbing
from ds_childtune._zero_deep_two import ZeroTwoPlumbing, mapped_to, parameter_partitions
from ds_childtune._zero_lean import is_lean, settle
from ds_childtune.compact_child import DeepPlumbing

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


def share_masters(engine: Any) -> None:
    """Point each flat shard at the parameter shard that it is a copy of, where both have one dtype and one device.

    At ZeRO-3 DeepSpeed means to (`_create_fp32_partitions`), but compares a `torch.device` with a string. Training is unchanged:
    the copy back after a step is one onto itself.
    """
    for flat, lp, mappings in _copies(engine):
        if flat.dtype == lp.dtype and flat.device == lp.device:
            flat.data = lp.data
            mapped_to(flat, mappings)


def separate_masters(engine: Any) -> None:
    """Give every flat shard a copy of its own again, and an engine of `lean_start` what it has left out."""
    settle(engine.optimizer)
    for flat, lp, mappings in _copies(engine):
        if flat.data_ptr() == lp.data_ptr():
            flat.data = lp.data.clone()
            mapped_to(flat, mappings)


def _copies(engine: Any) -> list[tuple[Tensor, Tensor, list[Any]]]:
    """Flat shard, parameter shard, and the `_hp_mapping`s of the former, which ZeRO-3 has not."""
    optimizer = engine.optimizer
    if _is_zero_three(optimizer) and not _is_offloaded(optimizer):
        flats, lps = optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat
        return [(flat, lp, []) for flat, lp in zip(flats, lps, strict=True)]
    if _is_zero_two(optimizer) and not _is_offloaded(optimizer):
        return parameter_partitions(optimizer)
    return []
