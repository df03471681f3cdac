"""Where a run trains: a world size and a ZeRO stage; it must come to the same anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.support.engines import Setup, Weights

GLOBAL_BATCH = 4
"""Micro-batches of a step, over all ranks."""


@dataclass(frozen=True)
class Place:
    """Where a leg runs."""

    world_size: int
    stage: int
    sub_group_size: int = 90
    round_robin: bool = False
    offload: bool = False


@dataclass(frozen=True)
class State:
    """What a leg ends with."""

    masters: Weights
    forward: Weights
    masks: Weights
    step: int
    global_steps: int
    lr: list[float]
    note: Any


def setup_of(place: Place, bf16: bool) -> Setup:
    accumulation = GLOBAL_BATCH // place.world_size
    return Setup(
        "integer",
        stage=place.stage,
        bf16=bf16,
        schedule=True,
        accumulation=accumulation,
        sub_group_size=place.sub_group_size,
        round_robin=place.round_robin,
        offload=place.offload,
        no_decay=("bias",),
    )
