"""`lean_start`: the same training from an engine that had no masters and no gradient buffer, and refusals of everything else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ds_childtune
from tests.support.bits import equal_bits
from tests.support.compact_runs import BASE, CASES, check, run
from tests.support.engines import Setup, Weights, engine_of, master_weights, train_step
from tests.support.models import batches, deal
from tests.support.ranks import RankPool
from tests.support.reference import distance

COMPACT = {"mode": "ChildTuning-D", "reserve_p": 0.3, "optimizer_state": "compact"}
LEAN = replace(BASE, stage=3, accumulation=1, bf16=True, zero_init=True, lean=True)

FP32, SGD, BF16 = (CASES[name] for name in ("zero3-odd", "zero3-t5-sgd", "zero3-bf16-zero-init"))


@pytest.mark.parametrize("case", [FP32, SGD, BF16], ids=["fp32", "fp32-sgd-tied", "bf16"])
def test_training_is_the_same(pool: RankPool, case: Any) -> None:
    """Bit for bit as the dense path on an ordinary engine: re-selection and, in fp32, plain DeepSpeed after `detach` included."""
    dense = replace(case, past=False)
    lean = replace(dense, setup=replace(case.setup, lean=True))
    check(lean, pool[2].run(run, dense, "dense"), pool[2].run(run, lean, "compact"))


def share(seed: int, count: int) -> list[Any]:
    return deal(batches(LEAN.family, count, seed=seed), dist.get_rank(), dist.get_world_size())


def sizes(bf16: bool) -> list[tuple[bool, int]]:
    """Before and after `select`: whether flat shards are views of parameter shards, and elements of the gradient buffer."""
    found = []
    with engine_of(replace(LEAN, bf16=bf16)) as engine:
        optimizer = engine.optimizer
        child = ds_childtune.attach(engine, COMPACT)
        for step in range(2):
            flats = [s.tensor for s in child.attachment.shards]
            pairs = zip(flats, optimizer.fp16_partitioned_groups_flat, strict=True)
            found.append(
                (all(a.data_ptr() == b.data_ptr() for a, b in pairs), optimizer.grad_partitions_flat_buffer.numel())
            )
            if step == 0:
                child.select(share(1000, 4))
        found.append((True, sum(s.tensor.numel() for s in child._hooks.child.shards.values())))  # type: ignore[union-attr]
    return found


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_nothing_dense_is_held(pool: RankPool, bf16: bool) -> None:
    for before, after, child in pool[2].run(sizes, bf16):
        assert before == (True, 0)
        assert after == child
        assert child[1] > 100, "vacuous: no child"


def after_detach(setup: Setup, attach: bool) -> tuple[Weights, Weights]:
    """Weights before and after three steps of plain DeepSpeed."""
    with engine_of(setup) as engine:
        if attach:
            ds_childtune.attach(engine, COMPACT).detach()
        start = master_weights(engine)
        for step in range(3):
            train_step(engine, share(step, 2))
        return start, master_weights(engine)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_detached_before_a_child_is_chosen(pool: RankPool, bf16: bool) -> None:
    plain = pool[2].run(after_detach, replace(LEAN, bf16=bf16, lean=False), False)
    for (start, end), (_, expected) in zip(
        pool[2].run(after_detach, replace(LEAN, bf16=bf16), True), plain, strict=True
    ):
        assert distance(end, start) > 0.1, "vacuous: nothing moved"
        assert equal_bits(end, expected)


def without_attach(engine: Any) -> None:
    train_step(engine, share(0, 2))


def without_select(engine: Any) -> None:
    ds_childtune.attach(engine, COMPACT)
    train_step(engine, share(0, 2))


def dense_child(engine: Any) -> None:
    ds_childtune.attach(engine, {"mode": "ChildTuning-D", "reserve_p": 0.3})


def task_free_child(engine: Any) -> None:
    ds_childtune.attach(engine, {"mode": "ChildTuning-F", "reserve_p": 0.3})


def dense_norm(engine: Any) -> None:
    ds_childtune.attach(engine, COMPACT | {"clip": "dense"})


def nothing(engine: Any) -> None:
    pass


def refusal(setup: Setup, act: Callable[[Any], None]) -> tuple[str, str]:
    try:
        with engine_of(setup) as engine:
            act(engine)
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


@pytest.mark.parametrize(
    ("setup", "act", "kind", "word"),
    [
        (LEAN, without_attach, "RuntimeError", "select"),
        (LEAN, without_select, "RuntimeError", "select"),
        (LEAN, dense_child, "NotImplementedError", "optimizer_state"),
        (LEAN, task_free_child, "NotImplementedError", "optimizer_state"),
        (LEAN, dense_norm, "NotImplementedError", '"clip": "child"'),
        (replace(LEAN, stage=2, zero_init=False), nothing, "RuntimeError", "zero_optimization.stage"),
        (replace(LEAN, offload=True), nothing, "NotImplementedError", "offload"),
    ],
    ids=["no attach", "no select", "dense state", "ChildTuning-F", "dense norm", "ZeRO-2", "offload"],
)
def test_refused_by_name(pool: RankPool, setup: Setup, act: Any, kind: str, word: str) -> None:
    for got, message in pool[2].run(refusal, setup, act):
        assert got == kind, message
        assert "lean_start" in message
        assert "Remedy" in message
        assert word in message


CONFIG = LEAN.config() | {"child_tuning": COMPACT}
F = {"mode": "ChildTuning-F", "reserve_p": 0.3}
WHETHER: dict[str, tuple[dict[str, Any], bool]] = {
    "compact": (CONFIG, True),
    "clips the child": (replace(LEAN, clip=1.0).config() | {"child_tuning": COMPACT | {"clip": "child"}}, True),
    "no offload": (CONFIG | {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}}}, True),
    "clips": (replace(LEAN, clip=1.0).config() | {"child_tuning": COMPACT}, False),
    "clips by default": ({k: v for k, v in CONFIG.items() if k != "gradient_clipping"}, False),
    "dense norm": (CONFIG | {"child_tuning": COMPACT | {"clip": "dense"}}, False),
    "dense state": (CONFIG | {"child_tuning": COMPACT | {"optimizer_state": "dense"}}, False),
    "ChildTuning-F": (CONFIG | {"child_tuning": F}, False),
    "no block": (LEAN.config(), False),
    "ZeRO-2": (replace(LEAN, stage=2).config() | {"child_tuning": COMPACT}, False),
    "no ZeRO": ({"child_tuning": COMPACT}, False),
    "offload": (replace(LEAN, offload=True).config() | {"child_tuning": COMPACT}, False),
    "fp16": (replace(LEAN, bf16=False, fp16=True).config() | {"child_tuning": COMPACT}, False),
}


@pytest.mark.parametrize("name", WHETHER)
def test_a_script_can_ask_before_it_makes_an_engine(name: str) -> None:
    """False for everything that `test_refused_by_name` has refused, True for what other tests here train."""
    config, expected = WHETHER[name]
    assert ds_childtune.can_start_lean(config) is expected


def after_loading(setup: Setup, folder: str, write: bool) -> tuple[Weights, Weights]:
    """Masters after a plain checkpoint was loaded and a child chosen, and after three more steps."""
    if write:
        with engine_of(replace(setup, lean=False)) as engine:
            for step in range(3):
                train_step(engine, share(step, 2))
            engine.save_checkpoint(folder)
    with engine_of(setup) as engine:
        child = ds_childtune.attach(engine, COMPACT | {"selector": "random"})
        engine.load_checkpoint(folder)
        child.select()
        start = master_weights(engine)
        for step in range(3, 6):
            train_step(engine, share(step, 2))
        return start, master_weights(engine)


def test_a_plain_checkpoint_before_a_child_is_chosen(pool: RankPool, tmp_path: Path) -> None:
    usual = pool[2].run(after_loading, replace(LEAN, bf16=True, lean=False), str(tmp_path), True)
    lean = pool[2].run(after_loading, replace(LEAN, bf16=True), str(tmp_path), False)
    for (start, end), (usual_start, usual_end) in zip(lean, usual, strict=True):
        assert distance(end, start) > 0.1, "vacuous: nothing moved"
        assert any(not torch.equal(w, w.bfloat16().float()) for w in start.values()), (
            "vacuous: masters hold no more than bf16"
        )
        assert equal_bits(start, usual_start)
        assert equal_bits(end, usual_end)


def back_to_before_a_child(setup: Setup, folder: str, returns: bool) -> tuple[Weights, Weights]:
    """A lean engine saves before `select`, and may train a child before it comes back to that: weights then, and four steps later."""
    with engine_of(setup) as engine:
        child = ds_childtune.attach(engine, COMPACT | {"selector": "random"})
        if returns:
            engine.save_checkpoint(folder)
            child.select()
            train_step(engine, share(9, 2))
            engine.load_checkpoint(folder)
        start = master_weights(engine)
        child.select()
        for step in range(3):
            train_step(engine, share(step, 2))
        child.detach()
        train_step(engine, share(3, 2))
        return start, master_weights(engine)


def test_a_checkpoint_from_before_select_is_loaded_over_a_child(pool: RankPool, tmp_path: Path) -> None:
    setup = replace(LEAN, bf16=True)
    straight = pool[2].run(back_to_before_a_child, setup, str(tmp_path), False)
    returned = pool[2].run(back_to_before_a_child, setup, str(tmp_path), True)
    for (start, end), (same_start, same_end) in zip(straight, returned, strict=True):
        assert distance(end, start) > 0.1, "vacuous: nothing moved"
        assert equal_bits(start, same_start)
        assert equal_bits(end, same_end)
