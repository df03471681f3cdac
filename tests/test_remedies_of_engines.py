"""Every remedy that an error of `attach`, `select` and the rest of a ChildTuner names, taken at its word.

Each case is an error, and then what it says to do, after which the engine trains a child. Those of checkpoints and child files are
in `test_remedies.py`; those of batches in `test_errors.py` and `test_calibration.py`, those of optimizers in `test_optimizers.py`.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist

import ds_childtune
from tests.support.engines import Setup, engine_of, master_weights, train_step
from tests.support.models import Batch, batches, build, deal
from tests.support.ranks import RankPool
from tests.support.reference import distance

ODD = Setup("odd", stage=2)
F: dict[str, Any] = {"mode": "ChildTuning-F", "reserve_p": 0.3}
D: dict[str, Any] = {"mode": "ChildTuning-D", "reserve_p": 0.3}
COMPACT = {**D, "optimizer_state": "compact"}
RANDOM = {**D, "selector": "random"}

Act = Callable[[Any], object]


@dataclass(frozen=True)
class Case:
    """What goes wrong on an engine, the words in which it is said, and the remedy, on the same engine or on another one."""

    wrong: Act
    words: tuple[str, ...]
    remedy: Act
    setup: Setup = ODD
    extra: dict[str, Any] = field(default_factory=dict)
    setup_of_remedy: Setup | None = None
    """None: the same engine."""
    extra_of_remedy: dict[str, Any] = field(default_factory=dict)


def mine(count: int = 4) -> list[Batch]:
    return deal(batches("odd", count, seed=1000), dist.get_rank(), dist.get_world_size())


def attach(block: dict[str, Any] | None) -> Act:
    return lambda engine: ds_childtune.attach(engine, block)


def chosen(block: dict[str, Any]) -> Act:
    return lambda engine: ds_childtune.attach(engine, block).select(mine())


def twice(engine: Any) -> None:
    ds_childtune.attach(engine, F)
    ds_childtune.attach(engine, F)


def again(engine: Any) -> None:
    engine.child_tuner.detach()
    ds_childtune.attach(engine, F)


def step_without_a_child(engine: Any) -> None:
    ds_childtune.attach(engine, D)
    train_step(engine, mine(2))


def after_detach(engine: Any) -> None:
    child = ds_childtune.attach(engine, D)
    child.detach()
    child.select(mine())


def freeze_all(engine: Any) -> None:
    child = ds_childtune.attach(engine, RANDOM)
    for parameter in engine.module.blocks.parameters():
        parameter.requires_grad_(False)
    child.select()


def thaw_some(engine: Any) -> None:
    for parameter in engine.module.blocks[0].back.parameters():
        parameter.requires_grad_(True)
    engine.child_tuner.select()


def wrong_name(engine: Any) -> None:
    ds_childtune.attach(engine, F).gather_mask("blocks.0.gains")


def close_name(engine: Any) -> None:
    assert engine.child_tuner.gather_mask("blocks.0.gain").shape == (1,)


def export_of_a_task_free_child(engine: Any) -> None:
    with shared_folder() as folder:
        ds_childtune.attach(engine, F).export(folder / "child")


def save_the_whole_model(engine: Any) -> None:
    with shared_folder() as folder:
        engine.save_16bit_model(str(folder), "model.bin")
        dist.barrier()
        assert (folder / "model.bin").stat().st_size > 0


@contextlib.contextmanager
def shared_folder() -> Any:
    """One folder for all ranks."""
    with tempfile.TemporaryDirectory() as own:
        names = [own]
        dist.broadcast_object_list(names)
        yield Path(names[0])
        dist.barrier()


def inside_an_accumulation(engine: Any) -> None:
    child = ds_childtune.attach(engine, RANDOM)
    child.select()
    train_step(engine, mine(2))  # the first of two micro-batches
    child.select()


def after_its_end(engine: Any) -> None:
    train_step(engine, mine(2))
    engine.child_tuner.select()


def detach_inside(engine: Any) -> None:
    ds_childtune.attach(engine, COMPACT | {"selector": "random"}).select()
    train_step(engine, mine(2))
    engine.child_tuner.detach()


def detach_after(engine: Any) -> None:
    train_step(engine, mine(2))
    engine.child_tuner.detach()
    ds_childtune.attach(engine, F)


def offload_states(engine: Any) -> None:
    ds_childtune.attach(engine, COMPACT | {"selector": "random"}).select()
    engine.optimizer.offload_states()


def detached_first(engine: Any) -> None:
    engine.child_tuner.detach()
    engine.optimizer.offload_states()
    engine.optimizer.reload_states()
    ds_childtune.attach(engine, F)


def edited(engine: Any) -> None:
    engine.module.embed.weight.data.mul_(2)
    ds_childtune.attach(engine, F)


def refreshed(engine: Any) -> None:
    engine.optimizer.refresh_fp32_params()
    ds_childtune.attach(engine, F)


def export_after_detach(engine: Any) -> None:
    child = ds_childtune.attach(engine, RANDOM)
    child.select()
    train_step(engine, mine(2))
    child.detach()
    with shared_folder() as folder:
        child.export(folder / "child")


def export_before_detach(engine: Any) -> None:
    child = ds_childtune.attach(engine, RANDOM)
    child.select()
    with shared_folder() as folder:
        child.export(folder / "child")


def compiled_before(engine: Any) -> None:
    model = torch.compile(build("odd"), backend="eager")
    parameters = [p for p in model.parameters() if p.requires_grad]
    other, *_ = deepspeed.initialize(model=model, model_parameters=parameters, config=ODD.config())
    try:
        ds_childtune.attach(other, D)
    finally:
        other.destroy()


def compiled_after(engine: Any) -> None:
    engine.compile(backend="eager")
    chosen(D)(engine)


def frozen_later(engine: Any) -> None:
    child = ds_childtune.attach(engine, D)
    engine.module.blocks[0].back.weight.requires_grad_(False)
    fisher = child.estimate_fisher(mine())
    for name in ("blocks.1.back.weight", "blocks.0.back.weight"):
        child.gather_fisher(fisher, name)


def estimated_again(engine: Any) -> None:
    child = engine.child_tuner
    engine.module.blocks[0].back.weight.requires_grad_(True)
    fisher = child.estimate_fisher(mine())
    # What is frozen now makes no difference to what was estimated.
    engine.module.blocks[1].back.weight.requires_grad_(False)
    for name in ("blocks.1.back.weight", "blocks.0.back.weight"):
        assert child.gather_fisher(fisher, name).any()
    child.select(mine())


def lean(**changes: Any) -> Setup:
    return replace(Setup("odd", stage=3, lean=True, zero_init=True), **changes)


BF16_OPTIMIZER = Setup("odd", stage=1, bf16=True, fp32_accumulation=True)
CASES: dict[str, Case] = {
    "attached already": Case(twice, ("already", "detach()"), again),
    "no block": Case(attach(None), ('"child_tuning" block', '"reserve_p": 0.2'), chosen({**D, "reserve_p": 0.2})),
    "block is no mapping": Case(attach("D"), ("expected a mapping",), chosen({**D, "reserve_p": 0.2})),  # type: ignore[arg-type]
    "unknown key": Case(attach({**D, "reserv_p": 0.3}), ("reserv_p", "reserve_p"), chosen(D)),
    "missing key": Case(attach({"mode": D["mode"]}), ("child_tuning.reserve_p", "add it"), chosen(D)),
    "key of the other mode": Case(attach({**F, "clip": "child"}), ("clip", "remove it"), attach(F)),
    "or the other mode": Case(attach({**F, "optimizer_state": "compact"}), ("ChildTuning-D",), chosen(COMPACT)),
    "pattern": Case(
        attach({**D, "include": ["block.*"]}), ("block.*", "correct it"), chosen({**D, "include": ["blocks.*"]})
    ),
    "all excluded": Case(
        attach({**D, "exclude": ["*"]}), ("exclude", "narrow it"), chosen({**D, "exclude": ["*.gain"]})
    ),
    "no element": Case(
        chosen({**D, "reserve_p": 1e-9}),
        ("rounds to none", "raise it"),
        lambda engine: (engine.child_tuner.detach(), chosen(D)(engine)),
    ),
    "ChildTuning-F": Case(chosen(F), ("do not call select",), lambda engine: engine.child_tuner.report()),
    "no batches": Case(
        lambda engine: ds_childtune.attach(engine, D).select(),
        ("pass an iterable of micro-batches",),
        lambda engine: engine.child_tuner.select(mine()),
    ),
    "no child yet": Case(step_without_a_child, ("child.select(",), lambda engine: engine.child_tuner.select(mine())),
    "detached": Case(after_detach, ("call attach(engine) again",), chosen(D)),
    "export after detach": Case(export_after_detach, ("export before detach()",), export_before_detach),
    "compiled before": Case(
        compiled_before, ("torch.compile has wrapped", "engine.compile() afterwards"), compiled_after
    ),
    "Fisher information of a frozen one": Case(frozen_later, ("thaw it", "estimate_fisher again"), estimated_again),
    "all frozen": Case(freeze_all, ("all frozen", "requires_grad_(True)"), thaw_some),
    "a name": Case(wrong_name, ("'blocks.0.gains'", "blocks.0.gain"), close_name),
    "export": Case(export_of_a_task_free_child, ("save_16bit_model",), save_the_whole_model),
    "select in an accumulation": Case(
        inside_an_accumulation, ("right after the step",), after_its_end, setup=replace(ODD, accumulation=2)
    ),
    "detach in an accumulation": Case(
        detach_inside, ("right after the step",), detach_after, setup=replace(ODD, accumulation=2)
    ),
    "offload_states": Case(offload_states, ("child.detach() first",), detached_first),
    "or dense state": Case(
        offload_states,
        ('optimizer_state "dense"',),
        lambda engine: (
            engine.child_tuner.detach(),
            chosen(D)(engine),
            engine.optimizer.offload_states(),
            engine.optimizer.reload_states(),
        ),
    ),
    "weights that were edited": Case(edited, ("refresh_fp32_params()",), refreshed, setup=replace(ODD, bf16=True)),
    "the child's norm": Case(
        attach({**D, "clip": "child"}),
        ("use ZeRO stage 2 or 3",),
        chosen({**D, "clip": "child"}),
        setup=BF16_OPTIMIZER,
        setup_of_remedy=replace(BF16_OPTIMIZER, stage=2, fp32_accumulation=False),
    ),
    "or another clip": Case(attach({**D, "clip": "child"}), ("child_tuning.clip",), chosen(D), setup=BF16_OPTIMIZER),
    "lean at ZeRO-2": Case(
        attach(COMPACT),
        ("zero_optimization.stage to 3",),
        chosen({**COMPACT, "clip": "child"}),
        setup=lean(stage=2, zero_init=False),
        setup_of_remedy=lean(),
    ),
    "lean and dense": Case(
        attach(D),
        ('"optimizer_state": "compact"', '"clip": "child"'),
        chosen({**COMPACT, "clip": "child"}),
        setup=lean(),
    ),
    "lean with offload": Case(
        attach(COMPACT),
        ("leave lean_start out",),
        chosen(COMPACT),
        setup=lean(offload=True),
        setup_of_remedy=lean(offload=True, lean=False),
    ),
}


def said_and_moved(name: str) -> tuple[str, float]:
    """The error's text, and how far the weights move after the remedy."""
    case = CASES[name]
    said, moved = "no error", 0.0
    with contextlib.ExitStack() as stack:
        try:
            engine = stack.enter_context(_engine(case.setup, case.extra))
            case.wrong(engine)
        except (ValueError, RuntimeError) as error:
            said = str(error)
        if case.setup_of_remedy is None:
            moved = _moved(engine, case)
    if case.setup_of_remedy is not None:
        with _engine(case.setup_of_remedy, case.extra_of_remedy) as engine:
            moved = _moved(engine, case)
    return said, moved


def _engine(setup: Setup, keys: dict[str, Any]) -> Any:
    return engine_of(setup, zero_optimization=setup.config()["zero_optimization"] | keys)


def _moved(engine: Any, case: Case) -> float:
    case.remedy(engine)
    before = master_weights(engine)
    for _ in range(case.setup.accumulation):
        train_step(engine, mine(2))
    engine.child_tuner.detach()
    return distance(master_weights(engine), before)


def outcomes() -> dict[str, tuple[str, float]]:
    return {name: said_and_moved(name) for name in CASES}


def test_each_remedy_works(pool: RankPool) -> None:
    for found in pool[2].run(outcomes):
        wordless = {name: said for name, (said, _) in found.items() if not all(w in said for w in CASES[name].words)}
        assert not wordless
        assert not [name for name, (_, moved) in found.items() if moved < 1e-3], "after the remedy nothing trains"


def second_engine(stage: int, block: dict[str, Any]) -> tuple[str, float]:
    """What `attach` says of a second engine on the same model, and how far one moves the weights that comes after `destroy`."""
    said = "no error"
    setup = replace(ODD, stage=stage)
    with engine_of(setup) as first:
        chosen(COMPACT)(first)
        train_step(first, mine(2))
        parameters = [p for p in first.module.parameters() if p.requires_grad]
        second, *_ = deepspeed.initialize(model=first.module, model_parameters=parameters, config=setup.config())
        try:
            ds_childtune.attach(second, block)
        except RuntimeError as error:
            said = str(error)
        second.destroy()
    # `first` is destroyed here.
    third, *_ = deepspeed.initialize(model=first.module, model_parameters=parameters, config=setup.config())
    child = ds_childtune.attach(third, block)
    if block["mode"] == "ChildTuning-D":
        child.select(mine())
    before = master_weights(third)
    train_step(third, mine(2))
    child.detach()
    moved = distance(master_weights(third), before)
    third.destroy()
    return said, moved


@pytest.mark.parametrize(("stage", "block"), [(1, F), (2, COMPACT), (3, COMPACT)])
def test_a_second_engine_on_the_same_model(pool: RankPool, stage: int, block: dict[str, Any]) -> None:
    for said, moved in pool[2].run(second_engine, stage, block):
        assert "of embed.weight" in said
        assert "call destroy() of every engine on the model, this one too" in said
        assert moved > 1e-3, "after the remedy nothing trains"
