"""Parameters whose storage is another one than DeepSpeed gave them, and models that `engine.compile` compiles: training is the same.

Storage moves when a module is cast, or taken to the host and back. DeepSpeed puts parameters back into its buffers when a step ends.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ds_childtune
from ds_childtune.zero.engine import base_optimizer
from tests.support.compact_runs import BASE, share
from tests.support.engines import Optimizer, Setup, Weights, engine_of, model_weights, train_step
from tests.support.ranks import RankPool

D: dict[str, Any] = {"mode": "ChildTuning-D", "reserve_p": 0.3, "include": ["*"], "selector": "random"}
COMPACT = D | {"optimizer_state": "compact"}
MASTERS = COMPACT | {"clip": "dense"}
F: dict[str, Any] = {"mode": "ChildTuning-F", "reserve_p": 0.3}


def clone(engine: Any) -> None:
    for parameter in engine.module.parameters():
        parameter.data = parameter.data.clone()


def cast(engine: Any) -> None:
    engine.module.float()
    engine.module.to(torch.bfloat16)


def trained(setup: Setup, block: dict[str, Any], move: Any, when: str) -> tuple[Weights, list[float]]:
    """Weights and losses; `move` comes before `select`, or in the middle of training."""
    losses = []
    torch.manual_seed(0)
    with engine_of(setup) as engine:
        child = ds_childtune.attach(engine, block)
        if move is not None and when == "before":
            move(engine)
        if block["mode"] == "ChildTuning-D":
            child.select()
        for step in range(4):
            if move is not None and step == 2 and when == "while":
                move(engine)
            losses += train_step(engine, share(setup, 0, setup.accumulation * dist.get_world_size()))
        return model_weights(engine), losses


@pytest.mark.parametrize("when", ["before", "while"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_moved_storage_changes_nothing(pool: RankPool, stage: int, when: str) -> None:
    """Losses, too: the forward pass sees the weights that are trained."""
    setup = replace(BASE, stage=stage, accumulation=1, persistence_threshold=100)
    cases = [(setup, D, clone), (setup, COMPACT, clone)]
    if stage in (1, 2):
        cases += [
            (replace(setup, clip=1.0), MASTERS, clone),
            (replace(setup, offload=True), COMPACT, clone),
            (replace(setup, bf16=True), COMPACT, cast),
        ]
    for each, block, move in cases:
        left = pool[2].run(trained, each, block, None, when)
        moved = pool[2].run(trained, each, block, move, when)
        for (expected, before), (got, losses) in zip(left, moved, strict=True):
            assert len(set(before)) == len(before), "vacuous: the loss does not move"
            assert losses == before, (each, block)
            assert all(torch.equal(w, got[n]) for n, w in expected.items()), (each, block)


def compiled(setup: Setup, block: dict[str, Any], *, compiles: bool) -> tuple[Weights, list[Any]]:
    """Weights, and what dynamo may have made of the optimizer's param groups."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    with engine_of(setup) as engine:
        child = ds_childtune.attach(engine, block)
        if block["mode"] == "ChildTuning-D":
            child.select()
        if compiles:
            engine.compile(backend="eager")
        for step in range(3):
            train_step(engine, share(setup, step, setup.accumulation * dist.get_world_size()))
        return model_weights(engine), [group.get("capturable") for group in base_optimizer(engine).param_groups]


@pytest.mark.parametrize(("stage", "block"), [(1, F), (3, COMPACT)], ids=["1-F", "3-compact"])
def test_engine_compile_changes_nothing(pool: RankPool, stage: int, block: dict[str, Any]) -> None:
    setup = Setup("odd", stage=stage, optimizer=Optimizer())
    eager = pool[2].run(compiled, setup, block, compiles=False)
    for (expected, _), (got, capturable) in zip(eager, pool[2].run(compiled, setup, block, compiles=True), strict=True):
        assert capturable == [False]
        for n, w in expected.items():
            torch.testing.assert_close(got[n], w, rtol=1e-5, atol=1e-6)
