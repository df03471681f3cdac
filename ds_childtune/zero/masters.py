"""Masters that are views of the parameters."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ds_childtune.zero.compact_stage12 import mapped_to, parameter_partitions
from ds_childtune.zero.engine import Wrapper, is_offloaded, wrapper_of
from ds_childtune.zero.lean_start import restore_dense


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
    """Make every flat shard a separate copy again, and give an engine of `lean_start` what it has left out."""
    restore_dense(engine.optimizer)
    for flat, lp, mappings in _copies(engine):
        if flat.data_ptr() == lp.data_ptr():
            flat.data = lp.data.clone()
            mapped_to(flat, mappings)


def _copies(engine: Any) -> list[tuple[Tensor, Tensor, list[Any]]]:
    """Flat shard, parameter shard, and the `_hp_mapping`s of the former, which there are none of at ZeRO-3."""
    optimizer = engine.optimizer
    wrapper = wrapper_of(engine)
    if wrapper is Wrapper.ZERO_3 and not (is_offloaded(engine) or optimizer.offload_param):
        flats, lps = optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat
        return [(flat, lp, []) for flat, lp in zip(flats, lps, strict=True)]
    if wrapper is Wrapper.ZERO_1_2 and not is_offloaded(engine):
        return parameter_partitions(optimizer)
    return []
