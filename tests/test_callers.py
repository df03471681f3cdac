"""Engines that are used otherwise than by our own scripts: boundaries set by hand, parameters frozen late, steps that fail."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ds_childtune
from ds_childtune import _zero
from tests.distributed import RankPool
from tests.engines import Setup, Weights, engine_of, model_weights, on_device, train_step
from tests.models import batches, build, deal

COMPACT = {"mode": "ChildTuning-D", "reserve_p": 0.3, "optimizer_state": "compact"}


def mine(count: int, seed: int) -> list[Any]:
    return deal(batches("llama", count * dist.get_world_size(), seed=seed), dist.get_rank(), dist.get_world_size())


def accumulate(engine: Any, micro_batches: list[Any], *, ends: bool) -> None:
    """As accelerate does it: the caller says what the boundary is, and steps there alone."""
    for i, batch in enumerate(micro_batches):
        engine.set_gradient_accumulation_boundary(ends and i == len(micro_batches) - 1)
        output = engine(**on_device(engine, batch))
        engine.backward(output if isinstance(output, Tensor) else output.loss)
    if ends:
        engine.step()


def boundaries_of_the_caller(stage: int) -> tuple[str, Any, bool]:
    with engine_of(Setup("llama", stage=stage, accumulation=4)) as engine:
        child = ds_childtune.attach(engine, COMPACT)
        child.select(mine(2, seed=1))
        accumulate(engine, mine(2, seed=2), ends=False)
        try:
            child.select(mine(2, seed=1))
            said = ""
        except RuntimeError as error:
            said = str(error)
        accumulate(engine, mine(2, seed=3), ends=True)
        child.select(mine(2, seed=1))
        kept = engine._is_gradient_accumulation_boundary
        child.detach()
        return said, kept, engine.global_steps == 1


@pytest.mark.parametrize("stage", [2, 3])
def test_boundaries_that_the_caller_sets(pool: RankPool, stage: int) -> None:
    for said, kept, stepped in pool[2].run(boundaries_of_the_caller, stage):
        assert "between a micro-batch and its optimizer step" in said
        assert kept is True
        assert stepped


def frozen_later(stage: int, optimizer_state: str) -> tuple[Weights, Weights]:
    torch.manual_seed(0)
    with engine_of(Setup("llama", stage=stage)) as engine:
        child = ds_childtune.attach(engine, COMPACT | {"optimizer_state": optimizer_state, "selector": "random"})
        child.select()
        train_step(engine, mine(1, seed=2))
        before = model_weights(engine)
        for name, parameter in engine.module.named_parameters():
            if "layers.0" in name:
                parameter.requires_grad_(False)
        for seed in (3, 4):
            train_step(engine, mine(1, seed=seed))
        return before, model_weights(engine)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_parameter_that_is_frozen_later(pool: RankPool, stage: int) -> None:
    dense = pool[2].run(frozen_later, stage, "dense")[0]
    compact = pool[2].run(frozen_later, stage, "compact")[0]
    assert any(not torch.equal(dense[0][name], dense[1][name]) for name in dense[0]), "nothing was trained"
    for before_or_after in (0, 1):
        for name, weight in dense[before_or_after].items():
            torch.testing.assert_close(compact[before_or_after][name], weight, msg=name)


def optimizer_over_all(stage: int, child_config: dict[str, Any]) -> tuple[int, bool, bool]:
    model = build("odd")
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    config = Setup("odd", stage=stage).config()
    del config["optimizer"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    before = model_weights(engine)
    child = ds_childtune.attach(engine, child_config)
    if child_config["mode"] == "ChildTuning-D":
        child.select()
    share = deal(batches("odd", 2 * dist.get_world_size(), seed=2), dist.get_rank(), dist.get_world_size())
    train_step(engine, share)
    moved = {name for name, w in model_weights(engine).items() if not torch.equal(w, before[name])}
    steps = child.step
    engine.destroy()
    return steps, bool(frozen) and not moved & frozen, bool(moved)


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("kind", ["compact", "dense", "F"])
def test_an_optimizer_that_holds_frozen_parameters_too(pool: RankPool, stage: int, kind: str) -> None:
    config = {"mode": "ChildTuning-F"} if kind == "F" else COMPACT | {"optimizer_state": kind, "selector": "random"}
    for outcome in pool[2].run(optimizer_over_all, stage, config | {"reserve_p": 0.3}):
        assert outcome == (2, True, True)


def step_that_fails(stage: int, reselects: bool) -> list[bool]:
    with engine_of(Setup("llama", stage=stage)) as engine:
        child = ds_childtune.attach(engine, COMPACT | {"selector": "random"})
        child.select()
        base = _zero.base_optimizer(engine)
        ours = [t for group in base.param_groups for t in group["params"]]

        def fail(*_: object) -> None:
            raise KeyboardInterrupt

        # After our own hook, which has put child shards in place.
        handle = base.register_step_pre_hook(fail)
        try:
            train_step(engine, mine(1, seed=2))
        except KeyboardInterrupt:
            handle.remove()
        if reselects:
            child.select()
        train_step(engine, mine(1, seed=2))
        back = [t for group in base.param_groups for t in group["params"]]
        child.detach()
        before = model_weights(engine)
        train_step(engine, mine(1, seed=3))
        after = model_weights(engine)
        same = len(ours) == len(back) and all(a is b for a, b in zip(ours, back, strict=True))
        return [same, any(not torch.equal(before[name], after[name]) for name in before)]


@pytest.mark.parametrize("reselects", [False, True])
def test_a_step_that_fails_leaves_no_child_in_the_optimizer(pool: RankPool, reselects: bool) -> None:
    for outcome in pool[2].run(step_that_fails, 0, reselects):
        assert outcome == [True, True]
