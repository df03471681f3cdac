"""A step that DeepSpeed skips for inf or NaN gradients does not count, and leaves no trace in the child."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist

import ds_childtune
from tests.support.bits import equal_bits
from tests.support.blocks import BLOCKS
from tests.support.engines import Setup, Weights, engine_of, master_weights, train_step
from tests.support.models import Batch, batches, deal
from tests.support.ranks import RankPool
from tests.support.reference import distance

ODD = Setup("odd", bf16=True, schedule=True)
CHECKED = {"bf16": {"enabled": True, "check_grad_overflow": True}}


def mine(seed: int) -> list[Batch]:
    return deal(batches("odd", dist.get_world_size(), seed=seed), dist.get_rank(), dist.get_world_size())


def spoilt(batch: Batch, value: float) -> Batch:
    return {**batch, "y": batch["y"] * value} if dist.get_rank() == 1 else batch


def train(setup: Setup, block: dict[str, Any], bad: float | None) -> tuple[Weights, Weights, int, int]:
    """Weights before and after three steps; applied and skipped steps. `bad`: a value in rank 1's batch of a fourth, in between."""
    with engine_of(setup, **CHECKED) as engine:
        child = ds_childtune.attach(engine, block)
        if child.config.mode == "ChildTuning-D":
            child.select(mine(1000))
        before = master_weights(engine)
        for step in range(3):
            if step == 1 and bad is not None:
                train_step(engine, [spoilt(batch, bad) for batch in mine(100)])
            train_step(engine, mine(step))
        return before, master_weights(engine), child.step, engine.skipped_steps


@pytest.mark.parametrize(
    ("stage", "mode", "offload"),
    [(2, "D", False), (3, "F", False), (3, "D-compact", False), (2, "D-compact", True)],
)
def test_a_skipped_step_does_not_count(pool: RankPool, stage: int, mode: str, offload: bool) -> None:
    setup = replace(ODD, stage=stage, offload=offload)
    plain = pool[2].run(train, setup, BLOCKS[mode], None)[0]
    assert distance(plain[1], plain[0]) > 1e-3, "vacuous: nothing moved"
    for bad in (math.inf, math.nan):
        for _, after, applied, skipped in pool[2].run(train, setup, BLOCKS[mode], bad):
            assert skipped == 1, "vacuous: DeepSpeed skipped nothing"
            assert applied == plain[2] == 3
            assert equal_bits(after, plain[1])
