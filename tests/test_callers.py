"""Engines that are not used as our own scripts use them: boundaries set by hand, parameters frozen late, steps that fail, copies of
the module, param groups that come later.
"""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn

import ds_childtune
from ds_childtune.checkpoint.run_record import Progress
from ds_childtune.zero.engine import base_optimizer
from tests.support.engines import Setup, Weights, engine_of, model_weights, on_device, train_step
from tests.support.models import batches, build, deal
from tests.support.ranks import RankPool

COMPACT = {"mode": "ChildTuning-D", "reserve_p": 0.3, "optimizer_state": "compact"}


def mine(count: int, seed: int) -> list[Any]:
    return deal(batches("llama", count * dist.get_world_size(), seed=seed), dist.get_rank(), dist.get_world_size())


def accumulate(engine: Any, micro_batches: list[Any], *, ends: bool) -> None:
    """As accelerate does it: the caller says what the boundary is, and steps only there."""
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
        base = base_optimizer(engine)
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


def copied(engine: Any) -> nn.Module:
    """A copy of the engine's module; below ZeRO-3, where plain DeepSpeed's copies train, it takes its own step."""
    twin: nn.Module = copy.deepcopy(engine.module)
    assert torch.optim.swa_utils.AveragedModel(engine.module) is not None
    if engine.zero_optimization_stage() < 3:
        own = torch.optim.SGD(twin.parameters(), lr=0.1)
        before = [p.detach().clone() for p in twin.parameters()]
        twin(**on_device(engine, batches("llama", 1)[0])).loss.backward()
        own.step()
        assert any(not torch.equal(a, b) for a, b in zip(before, twin.parameters(), strict=True))
    return twin


def copies(stage: int, config: dict[str, Any]) -> tuple[str, bool]:
    """Copy the module in every phase. What the engine's hook says when it has to raise, and whether a step is as without copies."""
    ends = []
    for with_copies in (False, True):
        with engine_of(Setup("llama", stage=stage)) as engine:
            child = ds_childtune.attach(engine, config)
            twins = [copied(engine)] if with_copies else []

            def calibration(twins: list[nn.Module] = twins, engine: Any = engine) -> Iterator[Any]:
                for batch in mine(2, seed=1):
                    twins += [copied(engine)] if twins else []
                    yield batch

            if config["mode"] == "ChildTuning-D":
                child.select(calibration())
            twins += [copied(engine)] if twins else []
            train_step(engine, mine(1, seed=2))
            twins += [copied(engine)] if twins else []
            ends.append(model_weights(engine))
            # As if a step had not come by.
            child._hooks.adopt(Progress())
            child._hooks._steps_at_start = -1
            twins += [copied(engine)] if twins else []
            try:
                train_step(engine, mine(1, seed=2))
                said = ""
            except RuntimeError as error:
                said = str(error)
            child.detach()
            # A forward pass that ends in an error leaves ZeRO-3's module with handles that cannot be copied.
            twins += [copied(engine)] if twins and stage < 3 else []
            assert len(twins) >= 5 * with_copies
    return said, all(torch.equal(ends[0][name], weight) for name, weight in ends[1].items())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_copies_of_the_module_are_free_of_the_child(pool: RankPool, stage: int) -> None:
    config = COMPACT if stage else {"mode": "ChildTuning-F", "reserve_p": 0.3}
    for said, same in pool[2].run(copies, stage, config):
        assert "did not fire" in said, "vacuous: the hook is without effect on the engine, too"
        assert same


def group_that_comes_later(stage: int, *, before: bool) -> tuple[str, bool]:
    """What a param group that is added to an engine leads to, and whether it trains in the end, as the error says it can."""
    model = build("llama")
    head = [p for name, p in model.named_parameters() if "lm_head" in name]
    rest = [p for name, p in model.named_parameters() if "lm_head" not in name]
    config = Setup("llama", stage=stage).config()
    del config["optimizer"]
    groups: list[dict[str, Any]] = [{"params": rest}]
    if before:
        groups.append({"params": head, "lr": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    child = ds_childtune.attach(engine, COMPACT)
    child.select(mine(2, seed=1))
    train_step(engine, mine(1, seed=2))
    said = ""
    if before:
        engine.optimizer.param_groups[1]["lr"] = 1e-2
    else:
        optimizer.add_param_group({"params": head, "lr": 1e-2})
        try:
            train_step(engine, mine(1, seed=3))
        except RuntimeError as error:
            said = str(error)
        child.detach()
        if stage:
            try:
                ds_childtune.attach(engine, COMPACT)
            except ValueError as error:
                said += str(error)
        else:
            child = ds_childtune.attach(engine, COMPACT)
            child.select(mine(2, seed=1))
    moved = False
    if before or not stage:
        start = model_weights(engine)["lm_head.weight"]
        train_step(engine, mine(1, seed=3))
        moved = not torch.equal(model_weights(engine)["lm_head.weight"], start)
    if stage and not before:
        del optimizer.param_groups[1:]  # DeepSpeed's own destroy trips over it
    engine.destroy()
    return said, moved


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_param_group_that_is_added_later(pool: RankPool, stage: int) -> None:
    for said, moved in pool[2].run(group_that_comes_later, stage, before=False):
        if stage:
            assert said.count("expected the 1 param groups that deepspeed.initialize was given, got 2") == 2
            assert said.count("Remedy: give deepspeed.initialize an optimizer with all groups") == 2
        else:
            assert "was not there at attach. Remedy: call detach() and attach(engine) again" in said
            assert moved
    if stage:
        for said, moved in pool[2].run(group_that_comes_later, stage, before=True):
            assert said == ""
            assert moved


def adagrad_of_groups(stage: int, count: int) -> str:
    model = build("llama")
    params = list(model.parameters())
    config = Setup("llama", stage=stage).config()
    del config["optimizer"]
    groups = [{"params": params[i::count]} for i in range(count)]
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.Adagrad(groups, lr=1e-2), config=config)
    try:
        ds_childtune.attach(engine, COMPACT).select(mine(2, seed=1))
        train_step(engine, mine(1, seed=2))
    except ValueError as error:
        return str(error)
    finally:
        engine.destroy()
    return ""


@pytest.mark.parametrize("stage", [1, 3])
def test_adagrad_of_two_groups(pool: RankPool, stage: int) -> None:
    """Plain DeepSpeed ends in an IndexError at its first step."""
    for text in pool[2].run(adagrad_of_groups, stage, 2):
        assert "expected the 2 param groups that deepspeed.initialize was given, got 1 in Adagrad" in text
        assert "Remedy: use one param group" in text
    assert pool[2].run(adagrad_of_groups, stage, 1) == ["", ""]


# ---------------------------------------------------------------- a block without a child

BLOCK = {"mode": "ChildTuning-D", "reserve_p": 0.3, "selector": "random"}


def stepping(engine: Any) -> str:
    try:
        train_step(engine, mine(1, seed=2))
    except RuntimeError as error:
        return str(error)
    return ""


def without_a_child(stage: int, folder: str) -> tuple[list[str], dict[str, bool]]:
    """What steps say before `attach`, with the config as a mapping and as a file; and what moves after each remedy."""
    said, moved = [], {}
    for remedy in ("attach", "attach by file", "remove"):
        config: Any = Setup("llama", stage=stage).config() | {"child_tuning": dict(BLOCK)}
        if remedy == "attach by file":
            path = Path(folder) / f"{dist.get_rank()}.json"
            path.write_text(json.dumps(config))
            config = str(path)
        model = build("llama")
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
        before = model_weights(engine)
        said += [stepping(engine), stepping(engine)]
        assert all(torch.equal(w, before[name]) for name, w in model_weights(engine).items())
        if remedy == "remove":
            engine.config.pop("child_tuning")
        else:
            child = ds_childtune.attach(engine)
            child.select()
        assert stepping(engine) == ""
        after = model_weights(engine)
        if remedy != "remove":
            for name, weight in after.items():
                assert not ((weight != before[name]) & ~child.gather_mask(name)).any()
            child.detach()
            assert stepping(engine) == "", "detached on purpose"
        moved[remedy] = any(not torch.equal(w, before[name]) for name, w in after.items())
        engine.destroy()
    return said, moved


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_block_without_a_child_is_an_error_at_the_first_step(pool: RankPool, stage: int, tmp_path: Path) -> None:
    for said, moved in pool[2].run(without_a_child, stage, str(tmp_path)):
        assert len(said) == 6
        for text in said:
            assert 'has a "child_tuning" block, got none' in text
            assert "Remedy: child = ds_childtune.attach(engine)" in text
            assert "or remove the block" in text
        assert moved == {"attach": True, "attach by file": True, "remove": True}


def load_before_attach(folder: str) -> tuple[list[str], dict[str, bool]]:
    """What an engine with a block and no child says to a checkpoint that has one, and what then works."""
    setup = Setup("llama", stage=2)
    with engine_of(setup, child_tuning=BLOCK) as engine:
        child = ds_childtune.attach(engine)
        child.select(mine(4, seed=1000))
        train_step(engine, mine(1, seed=1))
        engine.save_checkpoint(folder, tag="a")
        saved = model_weights(engine)

    def is_saved(engine: Any) -> bool:
        return all(torch.equal(w, saved[n]) for n, w in model_weights(engine).items())

    said, works = [], {}
    with engine_of(setup, child_tuning=BLOCK) as engine:
        for tag in (None, "a"):
            with pytest.raises(RuntimeError, match="has a child, and this engine") as error:
                engine.load_checkpoint(folder, tag)
            said.append(str(error.value))
        engine.load_checkpoint(folder, load_module_only=True)
        works["weights"] = is_saved(engine)
        child = ds_childtune.attach(engine)
        engine.load_checkpoint(folder)
        works["attached"] = is_saved(engine) and child.chosen
        child.detach()
        engine.load_checkpoint(folder)
        works["detached"] = is_saved(engine)
    with engine_of(setup) as engine:
        engine.load_checkpoint(folder)
        works["no block"] = is_saved(engine)
    return said, works


def test_a_checkpoint_with_a_child_is_not_loaded_without_one(pool: RankPool, tmp_path: Path) -> None:
    for said, works in pool[2].run(load_before_attach, str(tmp_path)):
        assert all("Remedy: child = ds_childtune.attach(engine) before load_checkpoint" in text for text in said)
        assert works == {"weights": True, "attached": True, "detached": True, "no block": True}


def reference_model() -> bool:
    """An engine without an optimizer, whose config is that of the trained one, block and all."""
    config = Setup("llama", stage=3).config() | {"child_tuning": dict(BLOCK)}
    del config["optimizer"]
    engine, *_ = deepspeed.initialize(model=build("llama"), config=config)
    with torch.no_grad():
        loss = engine(**on_device(engine, mine(1, seed=2)[0])).loss
    engine.destroy()
    return bool(loss.isfinite())


def test_an_engine_without_an_optimizer_needs_no_child(pool: RankPool) -> None:
    assert pool[2].run(reference_model) == [True, True]


def test_steps_are_watched_once() -> None:
    step = DeepSpeedEngine._take_model_step
    importlib.reload(ds_childtune)
    assert DeepSpeedEngine._take_model_step is step
    assert not hasattr(step.__wrapped__, "__wrapped__")
