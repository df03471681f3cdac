"""After an exception, going on in the same process, as in a notebook: what comes is what would have come without it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import ds_childtune
from ds_childtune import ranks
from ds_childtune.checkpoint import load
from ds_childtune.child.compact import CompactChild
from ds_childtune.zero.engine import base_optimizer
from tests.support.bits import equal_bits
from tests.support.compact_runs import BASE, share
from tests.support.engines import Setup, Weights, engine_of, master_weights, train_step
from tests.support.ranks import RankPool

D: dict[str, Any] = {"mode": "ChildTuning-D", "reserve_p": 0.3, "include": ["*"], "selector": "random"}
COMPACT = D | {"optimizer_state": "compact"}
STAGES = [0, 1, 2, 3]
BLOCKS = [D, COMPACT]


def setup_of(stage: int) -> Setup:
    return replace(BASE, stage=stage, accumulation=1)


def train(engine: Any, *seeds: int) -> None:
    for seed in seeds:
        train_step(engine, share(setup_of(0), seed, dist.get_world_size()))


def interrupted(engine: Any) -> None:
    """A step that ends when the base optimizer is about to step."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = base_optimizer(engine).register_step_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        train(engine, 99)
    handle.remove()
    engine.zero_grad()
    engine.optimizer.zero_grad()


def after_an_interrupted_step(stage: int, block: dict[str, Any], folder: str) -> tuple[Weights, dict[str, Weights]]:
    """Masters of an undisturbed run; and of those that train on, that load in the same engine, and in another one."""
    found: dict[str, Weights] = {}
    for what in ("undisturbed", "train on", "load"):
        with engine_of(setup_of(stage)) as engine:
            child = ds_childtune.attach(engine, block)
            child.select()
            train(engine, 1)
            if what == "undisturbed":
                engine.save_checkpoint(folder, "before")
            else:
                interrupted(engine)
            if what == "train on":
                engine.save_checkpoint(folder, "after")
            if what == "load":
                engine.load_checkpoint(folder, "before")
            train(engine, 2)
            found[what] = master_weights(engine)
    with engine_of(setup_of(stage)) as engine:
        child = ds_childtune.attach(engine, block)
        engine.load_checkpoint(folder, "after")
        train(engine, 2)
        if block is COMPACT:  # dense: what was saved has decayed, and the run that loads it decays again
            found["load what was saved after it"] = master_weights(engine)
    return found.pop("undisturbed"), found


@pytest.mark.parametrize("stage", STAGES)
def test_after_an_interrupted_step(pool: RankPool, stage: int, tmp_path: Path) -> None:
    """Weights decay once, and a checkpoint is whole: at ZeRO-3 DeepSpeed leaves param groups in the middle of a step."""
    for i, block in enumerate(BLOCKS):
        for expected, found in pool[2].run(after_an_interrupted_step, stage, block, str(tmp_path / str(i))):
            for what, got in found.items():
                # Without ZeRO a dense child's weights have decayed already when the next forward pass sees them.
                seen = (stage, i, what) == (0, 0, "train on")
                close = all(torch.allclose(w, got[n], 0, 5e-5) for n, w in expected.items())
                assert close if seen else equal_bits(expected, got), (i, what)


def after_a_refused_step(stage: int, block: dict[str, Any], attached: bool) -> tuple[str, Weights, Weights]:
    """What a step without a child says, and masters after one with it, beside those of a run that was not refused."""
    said, found = "", []
    for refused in (True, False):
        with engine_of(setup_of(stage), child_tuning=block) as engine:
            child = ds_childtune.attach(engine) if attached else None
            if refused:
                with pytest.raises(RuntimeError) as error:
                    train(engine, 9)
                said = str(error.value)
            child = child or ds_childtune.attach(engine)
            child.select()
            train(engine, 1)
            found.append(master_weights(engine))
    return said, found[0], found[1]


@pytest.mark.parametrize("stage", STAGES)
def test_a_refused_step_leaves_no_gradients(pool: RankPool, stage: int) -> None:
    for block in BLOCKS:
        for attached, words in ((True, "has no child yet"), (False, "expected a child on this engine")):
            for said, got, expected in pool[2].run(after_a_refused_step, stage, block, attached):
                assert words in said
                assert equal_bits(expected, got), (block, words)


def after_a_failed_load(
    stage: int, block: dict[str, Any], where: str, folder: str
) -> tuple[list[str], Weights, Weights]:
    """What a step and a checkpoint say after a load that ended in an exception, and masters once it is loaded after all."""

    def short(*_: Any, **__: Any) -> Any:
        raise MemoryError("short of memory")

    said, setup = [], setup_of(stage)
    with engine_of(setup) as engine:
        child = ds_childtune.attach(engine, block)
        child.select()
        train(engine, 1)
        engine.save_checkpoint(folder, "a")
        train(engine, 2)
        expected = master_weights(engine)
        owner: Any = CompactChild if where == "made" else load
        with mock.patch.object(owner, where, short), pytest.raises(RuntimeError, match="short of memory"):
            engine.load_checkpoint(folder, "a")
        for act in (lambda: train(engine, 2), lambda: engine.save_checkpoint(folder, "b")):
            with pytest.raises(RuntimeError) as error:
                act()
            said.append(str(error.value))
        engine.load_checkpoint(folder, "a")
        train(engine, 2)
        return said, expected, master_weights(engine)


@pytest.mark.parametrize("stage", STAGES)
def test_a_half_loaded_checkpoint_does_not_train(pool: RankPool, stage: int, tmp_path: Path) -> None:
    cases = [(D, "read_masks"), (COMPACT, "read_masks"), (COMPACT, "made"), (COMPACT, "read_compact")]
    for block, where in cases:
        folder = str(tmp_path / f"{where}-{len(block)}")
        for said, expected, got in pool[2].run(after_a_failed_load, stage, block, where, folder):
            assert all("load this or another checkpoint" in text for text in said), said
            assert equal_bits(expected, got), (block, where)


def lean(attached: bool) -> tuple[str, Weights, Weights]:
    """What a lean engine says of a step without a child, and masters with and without that step."""
    said, found = "", []
    for refused in (True, False):
        with engine_of(replace(setup_of(3), lean=True, zero_init=True)) as engine:
            child = ds_childtune.attach(engine, COMPACT) if attached else None
            if refused:
                with pytest.raises(RuntimeError) as error:
                    train(engine, 9)
                said = str(error.value)
            child = child or ds_childtune.attach(engine, COMPACT)
            child.select(share(setup_of(3), 5, 4))
            train(engine, 1)
            found.append(master_weights(engine))
    return said, found[0], found[1]


@pytest.mark.parametrize("attached", [True, False])
def test_a_lean_engine_trains_after_its_refusal(pool: RankPool, attached: bool) -> None:
    for said, got, expected in pool[2].run(lean, attached):
        assert "cannot train yet" in said
        assert equal_bits(expected, got)


def select_after_half_a_backward_pass() -> tuple[str, Weights, Weights]:
    """Without ZeRO: what `select` says, and masters after the remedy, beside those of an undisturbed run."""

    def stop(_: torch.Tensor) -> None:
        raise KeyboardInterrupt

    said, found = "", []
    for breaks in (True, False):
        with engine_of(setup_of(0)) as engine:
            child = ds_childtune.attach(engine, D)
            child.select()
            if breaks:
                handle = next(engine.module.parameters()).register_hook(stop)
                with pytest.raises(KeyboardInterrupt):
                    train(engine, 9)
                handle.remove()
                with pytest.raises(RuntimeError) as error:
                    child.select()
                said = str(error.value)
                engine.zero_grad()
                child.select()
            train(engine, 1)
            found.append(master_weights(engine))
    return said, found[0], found[1]


def test_select_after_half_a_backward_pass(pool: RankPool) -> None:
    for said, got, expected in pool[2].run(select_after_half_a_backward_pass):
        assert "call engine.zero_grad() first" in said
        assert equal_bits(expected, got)


def select_after_half_an_accumulation(stage: int) -> tuple[str, bool]:
    """What `select` says after an exception in the second of two micro-batches, and whether training on leads to a child."""

    def stop(_: torch.Tensor) -> None:
        raise KeyboardInterrupt

    with engine_of(replace(setup_of(stage), accumulation=2)) as engine:
        child = ds_childtune.attach(engine, D)
        child.select()
        train(engine, 1)
        handle = next(engine.module.parameters()).register_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            train(engine, 2)
        handle.remove()
        engine.zero_grad()
        with pytest.raises(RuntimeError) as error:
            child.select()
        if stage < 2:
            train(engine, 2)
            child.select()
        else:  # DeepSpeed's own
            with pytest.raises((AssertionError, AttributeError), match=r"already been reduced|NoneType"):
                train(engine, 2)
        return str(error.value), engine.global_steps == 1


@pytest.mark.parametrize("stage", STAGES)
def test_select_after_half_an_accumulation(pool: RankPool, stage: int) -> None:
    for said, stepped in pool[2].run(select_after_half_an_accumulation, stage):
        assert ("inside an accumulation run its other micro-batches and their step" in said) == (stage < 2)
        assert ("make a new engine, and load the last checkpoint" in said) == (stage >= 2)
        assert stepped == (stage < 2)


def test_agreements_are_counted_for_a_process_group() -> None:
    """A worker that takes another one's place in an elastic restart has counted less in its process, and must find the same words."""

    class Group:
        pass

    first, second = Group(), Group()
    with mock.patch.object(torch.distributed.distributed_c10d, "_get_default_group") as current:
        current.return_value = first
        assert [ranks._next_agreement() for _ in range(2)] == [0, 1]
        current.return_value = second
        assert ranks._next_agreement() == 0


def applied_under_a_child(stage: int, folder: str) -> list[str]:
    """What `apply_child` says of an engine that trains a child, and of its module."""
    said = []
    with engine_of(setup_of(stage)) as engine:
        child = ds_childtune.attach(engine, COMPACT)
        child.select()
        child.export(folder)
        for target in (engine, engine.module):
            with pytest.raises(RuntimeError) as error:
                ds_childtune.apply_child(target, folder)
            said.append(str(error.value))
        child.detach()
        ds_childtune.apply_child(engine, folder).revert()
    return said


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_no_child_is_applied_under_one_that_trains(pool: RankPool, stage: int, tmp_path: Path) -> None:
    for said in pool[2].run(applied_under_a_child, stage, str(tmp_path / "child")):
        assert all("trains a child" in text and "detach() first" in text for text in said), said
