"""`select` again in the middle of training, against an oracle written by hand: elements that stay keep their state."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_optimizer_state

import ds_childtune
from ds_childtune import tuner
from ds_childtune.child.child_shard import ChildShard
from ds_childtune.selection import selectors as choosing
from ds_childtune.zero import compact_sending, compact_stage3
from ds_childtune.zero.engine import base_optimizer
from tests.support import reference
from tests.support.engines import (
    Optimizer,
    Setup,
    Weights,
    engine_of,
    master_weights,
    model_weights,
    on_device,
    train_step,
)
from tests.support.models import batches, build, deal
from tests.support.ranks import RankPool

P, STEPS = 0.3, 2
ADAM = {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1}
BASE = Setup("llama", accumulation=2, optimizer=Optimizer("AdamW", {**ADAM, "torch_adam": True}))
SETUPS = {
    "masters-zero1": replace(BASE, stage=1, clip=100.0),
    "gradients-zero1": replace(BASE, stage=1),
    "moments-zero2-offload": replace(BASE, stage=2, offload=True, clip=100.0),
    "gradients-zero2-offload-bf16": replace(BASE, stage=2, offload=True, bf16=True),
    "moments-zero3": replace(BASE, stage=3, clip=100.0, sub_group_size=150),  # it clips nothing
    "masters-zero2-bf16": replace(BASE, stage=2, bf16=True, clip=100.0),
    "gradients-zero2-bf16": replace(BASE, stage=2, bf16=True),
    "gradients-zero3": replace(BASE, stage=3, sub_group_size=150),
    "gradients-zero3-bf16": replace(BASE, stage=3, bf16=True, sub_group_size=150),
}


@dataclass(frozen=True)
class Run:
    parts: str
    weights: list[Weights]
    """At the start, after each child's steps."""
    masks: list[Weights]
    moments: list[Weights]
    """`exp_avg` after the first child's steps, and right after the second was chosen."""


def run(setup: Setup) -> Run:
    with engine_of(setup) as engine:
        child = ds_childtune.attach(engine, {"mode": "ChildTuning-D", "reserve_p": P, "optimizer_state": "compact"})
        weights, masks, moments = [master_weights(engine)], [], []
        trainable = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}

        def exp_avg() -> Weights:
            shapes = weights[0]
            return {n: safe_get_full_optimizer_state(p, "exp_avg").view(shapes[n].shape) for n, p in trainable.items()}

        for number in range(3):
            if number:
                moments.append(exp_avg())
            report = child.select(share(batches(setup.family, 4, seed=1000 + number)))
            if number:
                moments.append(exp_avg())
            masks.append({p.name: child.gather_mask(p.name) for p in report.parameters})
            for batches_of_step in steps(setup, number):
                train_step(engine, share(batches_of_step))
            weights.append(master_weights(engine))
        parts = child._hooks.child.parts  # type: ignore[union-attr]
        child.detach()
    return Run(parts, weights, masks, moments)


def share(items: list[Any]) -> list[Any]:
    return deal(items, dist.get_rank(), dist.get_world_size())


def steps(setup: Setup, number: int) -> list[list[Any]]:
    return [batches(setup.family, setup.accumulation * 2, seed=10 * number + step) for step in range(STEPS)]


def keep(value: Any, inside: torch.Tensor) -> Any:
    return value * inside


def forget(value: Any, inside: torch.Tensor) -> Any:
    return value * 0.0


def oracle(setup: Setup, run: Run, change: Callable[[Any, torch.Tensor], Any]) -> list[Weights]:
    """Weights after each child's steps, in one process; `change` is what a new child does to moments, given its mask."""
    dtype = torch.bfloat16 if setup.bf16 else torch.float32
    model = build(setup.family).to(dtype)
    rules = {n: reference.AdamW(**ADAM) for n in run.weights[0]}
    weights, result = run.weights[0], []
    for number, masks in enumerate(run.masks):
        for name, rule in rules.items():
            if number and name in masks:
                rule.m, rule.v = change(rule.m, masks[name]), change(rule.v, masks[name])
        if setup.bf16:  # where masters are compact, there are none outside the child
            weights = {n: torch.where(masks[n], w, w.to(dtype).double()) for n, w in weights.items()}
        child = reference.Child([masks] * STEPS, frozen_outside=True)
        weights = reference.train(model, weights, steps(setup, number), rules, child)
        result.append(weights)
    return result


@pytest.mark.parametrize("name", SETUPS)
def test_elements_that_stay_keep_their_state(pool: RankPool, name: str) -> None:
    setup = SETUPS[name]
    results = pool[2].run(run, setup)
    expected = oracle(setup, results[0], keep)
    tolerance = 4e-2 if setup.bf16 else 1e-4
    for result in results:
        assert result.parts.endswith(name.partition("-")[0])
        for number, weights in enumerate(expected):
            moved = reference.distance(weights, result.weights[number])
            assert reference.distance(result.weights[number + 1], weights) < tolerance * moved, number
        for number in (0, 1):
            before, after = result.moments[2 * number : 2 * number + 2]
            old, new = result.masks[number : number + 2]
            for n, moment in before.items():
                assert torch.equal(after[n], moment * new[n]), "moments stay, or are zero"
            stay = torch.cat([(old[n] & new[n]).flatten() for n in old])
            enter = torch.cat([(~old[n] & new[n]).flatten() for n in old])
            leave = torch.cat([(old[n] & ~new[n]).flatten() for n in old])
            assert min(int(stay.sum()), int(enter.sum()), int(leave.sum())) > 20, "vacuous"
    forgotten = oracle(setup, results[0], forget)
    assert reference.distance(forgotten[1], expected[1]) > 2 * tolerance * reference.distance(
        expected[1], results[0].weights[1]
    ), "vacuous: the state hardly matters"


def failing(setup: Setup) -> tuple[Weights, Weights]:
    """Weights of training with a selection in its middle that fails, and without."""
    ends = []
    for fails in (True, False):
        with engine_of(setup) as engine:
            child = ds_childtune.attach(engine, {"mode": "ChildTuning-D", "reserve_p": P, "optimizer_state": "compact"})
            child.select(share(batches(setup.family, 4, seed=1000)))
            for number in range(2):
                for batches_of_step in steps(setup, number):
                    train_step(engine, share(batches_of_step))
                if fails and not number:
                    with pytest.raises(ValueError, match="at least one calibration batch"):
                        child.select([])
            ends.append(master_weights(engine))
    return ends[0], ends[1]


@pytest.mark.parametrize("name", ["moments-zero3", "gradients-zero3-bf16"])
def test_after_a_selection_that_fails_the_old_child_trains_on(pool: RankPool, name: str) -> None:
    for failed, undisturbed in pool[2].run(failing, SETUPS[name]):
        assert all(torch.equal(failed[n], w) for n, w in undisturbed.items())


HALF = {
    **{name: setup for name, setup in SETUPS.items() if name != "moments-zero3"},
    "moments-zero0": replace(BASE, stage=0),
    "dense-zero2": replace(BASE, stage=2),
    "dense-zero3": replace(BASE, stage=3, sub_group_size=150),
}
HALF = {
    name: replace(setup, no_decay=("norm",)) for name, setup in HALF.items()
}  # two groups, hence two shards at ZeRO 1 and 2


@contextlib.contextmanager
def out_of_memory_at_the_second_shard() -> Iterator[None]:
    """On rank 1, when the second shard's mask has been made, and with a compact child when its state is carried over."""
    real, calls = choosing.masks_inside, []

    def masks_inside(*args: Any) -> Iterator[torch.Tensor]:
        for i, mask in enumerate(real(*args)):
            calls.append(i)
            if i == 1 and dist.get_rank() == 1:
                raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")
            yield mask

    with mock.patch.object(tuner, "masks_inside", masks_inside):
        yield
    assert calls[:2] == [0, 1] or dist.get_rank() == 0, "vacuous: there is one shard only"


def half_way(setup: Setup, optimizer_state: str) -> list[Weights]:
    """Weights after training with selections that fail half-way, first and again, and without; each ends detached."""
    ends = []
    for fails in (True, False):
        with engine_of(setup) as engine:
            block = {"mode": "ChildTuning-D", "reserve_p": P, "optimizer_state": optimizer_state}
            child = ds_childtune.attach(engine, block)
            for number in range(2):
                if fails:
                    with out_of_memory_at_the_second_shard(), pytest.raises(RuntimeError, match="tried to allocate"):
                        child.select(share(batches(setup.family, 4, seed=500)))
                    if number:
                        train_step(engine, share(batches(setup.family, setup.accumulation * 2, seed=7)))
                elif number:
                    train_step(engine, share(batches(setup.family, setup.accumulation * 2, seed=7)))
                child.select(share(batches(setup.family, 4, seed=1000 + number)))
                for batches_of_step in steps(setup, number):
                    train_step(engine, share(batches_of_step))
            child.detach()
            train_step(engine, share(batches(setup.family, setup.accumulation * 2, seed=8)))
            ends.append(master_weights(engine))
    return ends


@pytest.mark.parametrize("name", HALF)
def test_a_selection_that_fails_half_way_changes_nothing(pool: RankPool, name: str) -> None:
    """The engine selects, goes on training the child that it had, selects another, and is detached."""
    state = "dense" if name.startswith("dense") else "compact"
    for failed, undisturbed in pool[2].run(half_way, HALF[name], state):
        assert all(torch.equal(failed[n], w) for n, w in undisturbed.items())


def between_micro_batches(setup: Setup) -> list[str]:
    """What `select`, `estimate_fisher` and `detach` say in the middle of an accumulation, before the engine counts its first
    micro-batch, in `step`, and after; and they work right after its step."""
    with engine_of(setup) as engine:
        block = {"mode": "ChildTuning-D", "reserve_p": P, "optimizer_state": "compact", "selector": "magnitude"}
        child = ds_childtune.attach(engine, block)
        child.select()
        first, second = share(batches(setup.family, 4, seed=0))
        said = []
        for number in range(setup.accumulation):
            if number == 0:
                engine.backward(engine(**on_device(engine, first)).loss)
            else:
                engine.step()
            scores = partial(child.estimate_fisher, [second])
            for call in (child.select, scores, child.detach) if setup.stage else (child.select, scores):
                with pytest.raises(RuntimeError) as error:
                    call()
                said.append(str(error.value).rpartition("] ")[-1])
        if setup.accumulation == 1:
            engine.step()
        else:
            train_step(engine, [second])
        child.select()
        child.detach()
    return said


MIDDLES = {
    "zero0": replace(BASE, stage=0),
    "zero0-1": replace(BASE, stage=0, accumulation=1),
    "zero1": replace(BASE, stage=1, clip=100.0),
    "zero1-sent": replace(BASE, stage=1),
    "zero3": SETUPS["gradients-zero3"],
    "zero3-1": replace(SETUPS["gradients-zero3"], accumulation=1),
}


@pytest.mark.parametrize("name", MIDDLES)
def test_not_in_the_middle_of_an_accumulation(pool: RankPool, name: str) -> None:
    """At ZeRO 0 and 3 not right before a step either: `select` clears `param.grad`, and ZeRO-3's buffer goes."""
    setup = replace(MIDDLES[name], accumulation=1 if name.endswith("-1") else 2)
    names = ["select", "estimate_fisher", "detach"] if setup.stage else ["select", "estimate_fisher"]
    for said in pool[2].run(between_micro_batches, setup):
        assert [message.partition(":")[0] for message in said] == setup.accumulation * names
        assert all("between a micro-batch and its optimizer step" in message for message in said)


def chosen_again_and_again(setup: Setup) -> list[Weights]:
    """Weights after a step and `detach`: of a child chosen once, and of one chosen again with nothing but Fisher passes between."""
    ends = []
    for calls in (["select"], ["select", "select", "estimate_fisher", "select"]):
        with engine_of(setup) as engine:
            child = ds_childtune.attach(engine, {"mode": "ChildTuning-D", "reserve_p": P, "optimizer_state": "compact"})
            data = share(batches(setup.family, 8, seed=0))
            for call in calls:
                getattr(child, call)(data[:2])
            train_step(engine, data[2 : 2 + setup.accumulation])
            child.detach()
            ends.append(master_weights(engine))
    return ends


@pytest.mark.parametrize("name", ["gradients-zero1", "gradients-zero2-bf16", "gradients-zero3"])
def test_a_fisher_pass_leaves_nothing_that_waits_for_a_step(pool: RankPool, name: str) -> None:
    for once, again in pool[2].run(chosen_again_and_again, SETUPS[name]):
        assert all(torch.equal(again[n], w) for n, w in once.items())


def one_rank_reaches_nothing(setup: Setup) -> list[str]:
    """What `select` and `detach` say after a backward pass that reached no parameter on rank 1; then it trains on, and they work."""
    with engine_of(setup) as engine:
        block = {"mode": "ChildTuning-D", "reserve_p": P, "optimizer_state": "compact", "selector": "magnitude"}
        child = ds_childtune.attach(engine, block)
        child.select()
        first, second = share(batches(setup.family, 4, seed=0))
        loss = engine(**on_device(engine, first)).loss
        reaches = dist.get_rank() == 0
        engine.backward(loss if reaches else torch.ones((), device=loss.device, requires_grad=True) * 1.0)
        said = []
        for call in (child.select, child.detach):
            with pytest.raises(RuntimeError) as error:
                call()
            said.append(str(error.value).rpartition("] ")[-1])
        engine.step()
        before = model_weights(engine)
        train_step(engine, [second])
        after = model_weights(engine)
        assert any(not torch.equal(before[n], w) for n, w in after.items()), "no step was taken"
        child.select()
        child.detach()
    return said


@pytest.mark.parametrize("stage", [1, 2])
def test_all_ranks_refuse_where_one_has_no_gradient(pool: RankPool, stage: int) -> None:
    for said in pool[2].run(one_rank_reaches_nothing, replace(BASE, stage=stage, accumulation=2)):
        assert [message.partition(":")[0] for message in said] == ["select", "detach"]
        assert all("between a micro-batch and its optimizer step" in message for message in said)


def dtypes_of_flat_shards(setup: Setup) -> list[torch.dtype]:
    """As the second child's shards are made."""
    with engine_of(setup) as engine:
        block = {"mode": "ChildTuning-D", "reserve_p": P, "optimizer_state": "compact", "selector": "magnitude"}
        child = ds_childtune.attach(engine, block)
        child.select()
        train_step(engine, share(batches(setup.family, 4, seed=0)))
        seen = []

        def look(flat: Any, mask: torch.Tensor) -> ChildShard:
            seen.append(flat.tensor.dtype)
            return make(flat, mask)

        make = ChildShard.of
        with mock.patch.object(ChildShard, "of", look):
            child.select()
        return seen


@pytest.mark.parametrize("name", ["masters-zero2-bf16", "gradients-zero3-bf16"])
def test_no_dense_masters_between_two_children(pool: RankPool, name: str) -> None:
    for seen in pool[2].run(dtypes_of_flat_shards, SETUPS[name]):
        assert seen, "vacuous: no shard was made"
        assert set(seen) == {torch.bfloat16}


def a_step_that_fails(engine: Any) -> list[float]:
    """The weight decay of the param groups when it did."""
    during: list[float] = []

    def fail(optimizer: Any, *_: Any) -> None:
        during.extend(group["weight_decay"] for group in optimizer.param_groups)
        raise RuntimeError("short of memory")

    handle = base_optimizer(engine).register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="short of memory"):
        train_step(engine, share(batches(BASE.family, 2, seed=0)))
    handle.remove()
    return during


def decay_after_a_step_that_failed(stage: int, folder: str) -> dict[str, list[float]]:
    """The weight decay of the param groups after a step that failed, by what follows. One engine after another."""
    found = {}
    for then in ("select", "checkpoint", "detach"):
        with engine_of(replace(BASE, stage=stage, accumulation=1)) as engine:
            child = ds_childtune.attach(engine, {"mode": "ChildTuning-D", "reserve_p": P, "selector": "magnitude"})
            child.select()
            base, during = base_optimizer(engine), a_step_that_fails(engine)
            assert during == [0.0], "vacuous: a child decays by itself"
            if then == "select":
                child.select()
            elif then == "checkpoint":
                engine.save_checkpoint(folder)
                engine.load_checkpoint(folder)
            else:
                child.detach()
            engine.zero_grad()
            train_step(engine, share(batches(BASE.family, 2, seed=1)))
            found[then] = [group["weight_decay"] for group in base.param_groups]
    return found


@pytest.mark.parametrize("stage", [0, 1])
def test_a_step_that_failed_leaves_the_weight_decay(pool: RankPool, tmp_path: Path, stage: int) -> None:
    for found in pool[2].run(decay_after_a_step_that_failed, stage, str(tmp_path)):
        assert found == {then: [ADAM["weight_decay"]] for then in ("select", "checkpoint", "detach")}


def gradients_after_a_step_that_failed() -> tuple[bool, bool]:
    """Whether there are any before the optimizer's `zero_grad`, and after."""
    with engine_of(replace(BASE, accumulation=1)) as engine:
        block = {"mode": "ChildTuning-D", "reserve_p": P, "selector": "magnitude", "optimizer_state": "compact"}
        ds_childtune.attach(engine, block).select()
        a_step_that_fails(engine)
        before = any(p.grad is not None for p in engine.module.parameters())
        engine.optimizer.zero_grad()
        return before, any(p.grad is not None for p in engine.module.parameters())


def test_a_step_that_failed_leaves_the_parameters_to_the_optimizer(pool: RankPool) -> None:
    assert pool[2].run(gradients_after_a_step_that_failed) == [(True, False)] * 2


def again_beside_an_outsider(stage: int) -> bool:
    """Two selections with a step between, where a trainable parameter is not in the optimizer, which never clears its gradient."""
    setup = replace(BASE, stage=stage, bf16=True, accumulation=1)
    model = build(setup.family)
    *held, outsider = model.parameters()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=held, config=setup.config())
    child = ds_childtune.attach(engine, {"mode": "ChildTuning-D", "reserve_p": P, "selector": "random"})
    child.select()
    train_step(engine, share(batches(setup.family, 2, seed=1)))
    waits = outsider.grad is not None
    child.select()
    engine.destroy()
    return waits


def test_a_gradient_outside_the_optimizer_does_not_wait_for_a_step(pool: RankPool) -> None:
    assert pool[2].run(again_beside_an_outsider, 0) == [True, True], "vacuous: there is no such gradient"


def put_in_place_half_way(stage: int, folder: str) -> tuple[list[str], list[Weights]]:
    """What is said after an exception at which a child was half in place. Before, it would have trained something else.

    And the weights after the remedy and a step, on another model and on this one, beside those of the same step on an engine that had
    no exception.
    """
    setup = replace(BASE, stage=stage, accumulation=1)
    block = {"mode": "ChildTuning-D", "reserve_p": P, "selector": "magnitude", "optimizer_state": "compact"}
    batch = share(batches(BASE.family, 2, seed=0))
    with engine_of(setup) as engine:
        child = ds_childtune.attach(engine, block)
        child.select()
        engine.save_checkpoint(folder)
        train_step(engine, batch)
        weights = [model_weights(engine)]
    with engine_of(setup) as engine:
        child = ds_childtune.attach(engine, block)
        child.select()
        module, name = (compact_sending, "ChildLayout") if stage < 3 else (compact_stage3, "make_gradient_buffer")
        said = []
        short = mock.patch.object(module, name, side_effect=torch.OutOfMemoryError("short of memory"))
        with short, pytest.raises(RuntimeError, match="short of memory"):
            child.select()
        for act in (
            lambda: train_step(engine, batch),
            child.select,
            child.report,
            lambda: engine.load_checkpoint(folder),
            lambda: engine.save_checkpoint(folder, "next"),
            child.detach,
        ):
            with pytest.raises(RuntimeError) as error:
                act()
            said.append(str(error.value))
        model = engine.module
    with engine_of(setup) as engine:
        ds_childtune.attach(engine, block)
        engine.load_checkpoint(folder)
        train_step(engine, batch)
        weights.append(model_weights(engine))
    # `child` is there still, as in a notebook.
    parameters = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, config=setup.config())
    ds_childtune.attach(engine, block)
    engine.load_checkpoint(folder)
    train_step(engine, batch)
    weights.append(model_weights(engine))
    engine.destroy()
    return said, weights


@pytest.mark.parametrize("stage", [1, 3])
def test_a_child_that_is_half_in_place_does_not_train(pool: RankPool, tmp_path: Path, stage: int) -> None:
    for said, (undisturbed, *remedied) in pool[2].run(put_in_place_half_way, stage, str(tmp_path)):
        assert all("Remedy: make a new engine, and load the last checkpoint" in text for text in said), said
        for weights in remedied:
            assert all(torch.equal(weights[name], weight) for name, weight in undisturbed.items())
