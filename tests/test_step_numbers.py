"""`measure_next_step` and `measured`: the child's share of the gradient and its update, against whole weights and gradients."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from torch import Tensor

import ds_childtune
from ds_childtune.child.step_numbers import StepNumbers
from tests.support import reference
from tests.support.engines import Optimizer, Setup, Weights, engine_of, master_weights, train_step
from tests.support.models import batches, build, deal
from tests.support.ranks import RankPool

L2 = Optimizer("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1})
BASE = Setup("llama", stage=2, accumulation=2)
DENSE = {"mode": "ChildTuning-D", "reserve_p": 0.3, "selector": "random"}
COMPACT = DENSE | {"optimizer_state": "compact"}
CHILD = COMPACT | {"clip": "child"}
F = {"mode": "ChildTuning-F", "reserve_p": 0.3, "exclude": ["*lm_head*"]}
CASES: dict[str, tuple[Setup, dict[str, Any]]] = {
    "zero0": (replace(BASE, stage=0), DENSE),
    "zero2, clipped, l2": (replace(BASE, clip=0.05, optimizer=L2), DENSE),
    "zero2, ChildTuning-F": (replace(BASE, clip=0.05), F),
    "zero2, moments": (replace(BASE, stage=1, bf16=True, fp32_accumulation=True), COMPACT),
    "zero2, masters": (replace(BASE, clip=0.05, bf16=True), COMPACT),
    "zero2, offload": (replace(BASE, offload=True), DENSE),
    "zero3": (replace(BASE, stage=3, sub_group_size=300), DENSE),
    "zero3, moments, bf16": (replace(BASE, stage=3, sub_group_size=300, clip=0.05, bf16=True), COMPACT),
    "zero3, everything": (replace(BASE, stage=3, sub_group_size=300, clip=0.05), CHILD),
}


@dataclass(frozen=True)
class Run:
    before: Weights
    after: Weights
    masks: Weights
    found: tuple[StepNumbers | None, StepNumbers | None, StepNumbers | None]
    """Before the step that is measured, after it, and after one more that is not."""


def run(setup: Setup, block: dict[str, Any]) -> Run:
    with engine_of(setup) as engine:
        child = ds_childtune.attach(engine, block)
        if block["mode"] == "ChildTuning-D":
            child.select()
        mine = deal(batches(setup.family, 4), dist.get_rank(), 2)
        train_step(engine, mine)
        child.measure_next_step()
        nothing = child.measured()
        masks = {p.name: child.gather_mask(p.name) for p in child.report().parameters}
        before = master_weights(engine)
        train_step(engine, mine)
        found, after = child.measured(), master_weights(engine)
        train_step(engine, mine)
        run = Run(before, after, masks, (nothing, found, child.measured()))
        child.detach()
    return run


@pytest.mark.parametrize("name", CASES)
def test_numbers_of_a_step(pool: RankPool, name: str) -> None:
    setup, block = CASES[name]
    runs = pool[2].run(run, setup, block)
    model = build(setup.family)
    for result in runs:
        nothing, found, later = result.found
        assert nothing is None
        assert found is not None
        assert later == found, "a step that is not measured changes nothing"
        reference.load(model, result.before)
        gradients = reference.gradients(model, batches(setup.family, 4))
        share = of_squares(gradients, result.masks) / of_squares(gradients, None)
        if block is CHILD:
            assert found.gradient_share is None
        else:
            assert found.gradient_share == pytest.approx(share, rel=2e-2 if setup.bf16 else 1e-4)
            assert share < 0.9, "vacuous"
        trains = None if block is F else result.masks  # by momentum all of ChildTuning-F's elements move
        moved = {n: result.after[n] - result.before[n] for n in result.before}
        update = of_squares(moved, trains) / of_squares(result.before, trains)
        assert found.update == pytest.approx(update**0.5, rel=1e-4)


def of_squares(values: Weights, masks: Weights | None) -> float:
    return sum(float((v.double().square() * (1 if masks is None else masks[n])).sum()) for n, v in values.items())


def sampled(setup: Setup) -> tuple[StepNumbers | None, StepNumbers | None]:
    """The same step with all elements and with every fifth."""
    found = []
    for limit in (1 << 20, sum(p.numel() for p in build(setup.family).parameters()) // 10):
        with engine_of(setup) as engine, mock.patch("ds_childtune.child.step_numbers._SAMPLE", limit):
            child = ds_childtune.attach(engine, DENSE)
            child.select()
            child.measure_next_step()
            train_step(engine, deal(batches(setup.family, 4), dist.get_rank(), 2))
            found.append(child.measured())
            child.detach()
    return found[0], found[1]


def test_a_sample_estimates_the_update(pool: RankPool) -> None:
    for exact, estimate in pool[2].run(sampled, BASE):
        assert exact is not None
        assert estimate is not None
        assert exact.gradient_share == estimate.gradient_share
        assert exact.update != estimate.update, "vacuous: everything was in the sample"
        assert estimate.update == pytest.approx(exact.update, rel=0.2)


def waits(setup: Setup, block: dict[str, Any], *, measured: bool) -> tuple[list[str], list[str]]:
    """Where our lines wait for the device in a step, and in reading its numbers."""
    seen: list[str] = []

    def watch(name: str) -> Any:
        original = getattr(Tensor, name)

        def watched(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if sys._getframe(1).f_globals.get("__name__", "").startswith("ds_childtune"):
                seen.append(name)
            return original(tensor, *args, **kwargs)

        return mock.patch.object(Tensor, name, watched)

    with engine_of(setup) as engine:
        child = ds_childtune.attach(engine, block)
        if block["mode"] == "ChildTuning-D":
            child.select()
        mine = deal(batches(setup.family, 4), dist.get_rank(), 2)
        for _ in range(12):  # the self-check is over
            train_step(engine, mine)
        with contextlib.ExitStack() as stack:
            for name in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu", "numpy", "nonzero"):
                stack.enter_context(watch(name))
            if measured:
                child.measure_next_step()
            train_step(engine, mine)
            in_step = list(seen)
            child.measured()
        child.detach()
    return in_step, seen[len(in_step) :]


@pytest.mark.parametrize("name", ["zero2, clipped, l2", "zero2, ChildTuning-F", "zero3, moments, bf16"])
def test_nothing_waits_for_the_device(pool: RankPool, name: str) -> None:
    """The numbers are read from the host's copy: one `tolist`, when they are asked for."""
    for in_step, at_the_end in pool[2].run(waits, *CASES[name], measured=True):
        assert in_step == []
        assert at_the_end == ["tolist"], "vacuous: no wait is seen"
