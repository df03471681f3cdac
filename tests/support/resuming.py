"""A run that is stopped and resumed, and the same run without a stop."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

import ds_childtune
from tests.support.bits import equal_bits
from tests.support.counters import counters, random_states
from tests.support.engines import Setup, Weights, engine_of, master_weights, model_weights, train_step
from tests.support.models import batches, deal
from tests.support.reference import distance

N = 2
"""Steps before the checkpoint, and after it."""

BASE = Setup("gpt2", clip=0.5, dropout=0.2, schedule=True, sub_group_size=350)


@dataclass(frozen=True)
class End:
    """What a run has come to."""

    start: Weights
    masters: Weights
    forward: Weights
    masks: Weights
    counters: dict[str, Any]
    random: Any
    step: int


def share(setup: Setup, seed: int, count: int) -> list[Any]:
    return deal(batches(setup.family, count, seed=seed), dist.get_rank(), dist.get_world_size())


def train(engine: Any, setup: Setup, first: int, last: int) -> None:
    for step in range(first, last):
        train_step(engine, share(setup, step, setup.accumulation * dist.get_world_size()))


def end_of(engine: Any, child: Any, start: Weights) -> End:
    masks = {p.name: child.gather_mask(p.name) for p in child.report().parameters}
    drawn = random_states()
    return End(start, master_weights(engine), model_weights(engine), masks, counters(engine), drawn, child.step)


def whole(setup: Setup, block: dict[str, Any], folder: str) -> tuple[End, End]:
    """2 N steps, with a checkpoint in the middle; and the last N of them again, from that checkpoint in the same engine."""
    torch.manual_seed(dist.get_rank())
    with engine_of(setup) as engine:
        start = master_weights(engine)
        if not setup.lean:
            train(engine, setup, 0, 1)  # moments outside the child, which must not come back
        child = ds_childtune.attach(engine, block)
        if child.config.mode == "ChildTuning-D":
            child.select(share(setup, 1000, 4))
        train(engine, setup, 1, N)
        engine.save_checkpoint(folder, client_state={"note": 7})
        train(engine, setup, N, 2 * N)
        end = end_of(engine, child, start)
        engine.load_checkpoint(folder)
        train(engine, setup, N, 2 * N)
        return end, end_of(engine, child, start)


def resumed(setup: Setup, block: dict[str, Any], folder: str) -> End:
    """The last N of them, in a new engine whose generators are elsewhere."""
    torch.manual_seed(99)
    with engine_of(setup) as engine:
        start = master_weights(engine)
        child = ds_childtune.attach(engine, block)
        path, client_state = engine.load_checkpoint(folder)
        assert path is not None
        assert client_state["note"] == 7
        train(engine, setup, N, 2 * N)
        return end_of(engine, child, start)


ALL_COMPACT = replace(BASE, stage=3, clip=0.0)
"""Where a compact child's own shards replace DeepSpeed's."""

SETUPS = {
    **{f"zero{s}": replace(BASE, stage=s) for s in range(4)},
    **{f"zero{s}-bf16": replace(BASE, stage=s, bf16=True) for s in range(4)},
    "zero3-all-compact": ALL_COMPACT,
    "zero3-all-compact-bf16": replace(ALL_COMPACT, bf16=True),
    "zero2-offload-all-compact-bf16": replace(ALL_COMPACT, stage=2, bf16=True, offload=True),
    "zero3-lean-bf16": replace(ALL_COMPACT, bf16=True, lean=True),
}


def check_equal(a: End, b: End) -> None:
    assert distance(a.masters, a.start) > 0.1, "vacuous: nothing moved"
    assert equal_bits(a.masters, b.masters)
    assert equal_bits(a.forward, b.forward)
    assert equal_bits(a.masks, b.masks)
    # DeepSpeed counts micro-steps from the load on.
    assert a.counters | {"micro_steps": 0} == b.counters | {"micro_steps": 0}
    assert a.step == b.step
    assert a.random == b.random
