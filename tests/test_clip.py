"""`child_tuning.clip`: whose gradient norm is clipped, against the oracle and against DeepSpeed's own report of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import ds_childtune
from ds_childtune.zero import clip
from tests.support import reference
from tests.support.compact_runs import parts_of
from tests.support.engines import Optimizer, Setup, Weights, engine_of, master_weights, train_step
from tests.support.models import batches, build, deal
from tests.support.ranks import RankFailure, RankPool

P, STEPS, CLIP = 0.2, 2, 0.05
SGD = Optimizer("SGD", {"lr": 0.3, "momentum": 0.9})


@dataclass(frozen=True)
class Run:
    start: Weights
    end: Weights
    norms: list[float | None]
    masks: Weights
    parts: str


def step_batches(setup: Setup, step: int) -> list[Any]:
    return batches(setup.family, setup.accumulation * 2, seed=step)


def attached(engine: Any, optimizer_state: str, clip: str | None, selector: str) -> ds_childtune.ChildTuner:
    block = {"mode": "ChildTuning-D", "reserve_p": P, "optimizer_state": optimizer_state, "clip": clip}
    return ds_childtune.attach(engine, {**block, "selector": selector})


def run(setup: Setup, optimizer_state: str, clip: str | None) -> Run:
    """A child of random elements, whose norm is far from the whole gradient's."""
    with engine_of(setup) as engine:
        child = attached(engine, optimizer_state, clip, "random")
        rank = dist.get_rank()
        report = child.select()
        start, norms = master_weights(engine), []
        for step in range(STEPS):
            train_step(engine, deal(step_batches(setup, step), rank, 2))
            norm = engine.get_global_grad_norm()
            norms.append(None if norm is None else float(norm))
        masks = {p.name: child.gather_mask(p.name) for p in report.parameters}
        run = Run(start, master_weights(engine), norms, masks, getattr(child._hooks.child, "parts", "dense"))
        child.detach()
    return run


BASE = Setup("llama", accumulation=2, clip=CLIP, optimizer=SGD)
SETUPS = {
    "zero0": replace(BASE, stage=0),
    "zero0-bf16": replace(BASE, stage=0, bf16=True),
    "zero1": replace(BASE, stage=1),
    "zero2-odd": replace(BASE, stage=2, family="odd"),
    "zero2-bf16-fp32-accumulation": replace(BASE, stage=2, bf16=True, fp32_accumulation=True),
    "zero2-offload": replace(BASE, stage=2, offload=True),
    "zero3": replace(BASE, stage=3, sub_group_size=150),
    "zero3-odd": replace(BASE, stage=3, family="odd", sub_group_size=20),
    "zero3-offload": replace(BASE, stage=3, offload=True, sub_group_size=150),
}


def oracle(setup: Setup, result: Run) -> tuple[Weights, list[float]]:
    """Weights at the end, and the child's norm at each step."""
    model = build(setup.family).to(torch.bfloat16 if setup.bf16 else torch.float32)
    child = reference.Child([result.masks] * STEPS, frozen_outside=True, clip_child=True)
    rules = {n: reference.SGD(lr=0.3, momentum=0.9) for n in result.start}
    steps = [step_batches(setup, step) for step in range(STEPS)]
    norms, weights = [], result.start
    for step in steps:
        reference.load(model, weights)
        grads = reference.gradients(model, step)
        norms.append(sum(float((g * result.masks.get(n, 1)).square().sum()) for n, g in grads.items()) ** 0.5)
        child_now = replace(child, masks=child.masks[:1])
        weights = reference.train(model, weights, [step], rules, child_now, clip=CLIP)
    return weights, norms


@pytest.mark.parametrize("optimizer_state", ["dense", "compact"])
@pytest.mark.parametrize("name", SETUPS)
def test_the_child_s_norm_is_clipped(pool: RankPool, name: str, optimizer_state: str) -> None:
    setup = SETUPS[name]
    results = pool[2].run(run, setup, optimizer_state, "child")
    expected, norms = oracle(setup, results[0])
    tolerance = 2e-2 if setup.bf16 else 1e-4
    masters = bool(setup.stage and not (setup.stage == 3 and setup.offload) and not setup.fp32_accumulation)
    parts = parts_of(setup, masters=masters, clip="child")
    assert min(norms) > 2 * CLIP, "vacuous: nothing is clipped"
    for result in results:
        assert result.parts == ("dense" if optimizer_state == "dense" else parts)
        moved = reference.distance(expected, result.start)
        assert reference.distance(result.end, expected) < tolerance * moved
        if result.norms[0] is not None:  # at ZeRO 0 in fp32 DeepSpeed reports none
            torch.testing.assert_close(result.norms, norms, rtol=tolerance, atol=0)


@pytest.mark.parametrize("clip", [None, "dense"])
def test_the_whole_norm_is_clipped_where_the_config_does_not_say_child(pool: RankPool, clip: str | None) -> None:
    setup = replace(SETUPS["zero3"], optimizer=SGD)
    dense = pool[2].run(run, setup, "dense", clip)
    compact = pool[2].run(run, setup, "compact", clip)
    child = pool[2].run(run, setup, "compact", "child")
    for a, b, c in zip(dense, compact, child, strict=True):
        assert (b.parts, c.parts) == ("moments", "moments, masters and gradients")
        assert a.norms == b.norms
        assert all(torch.equal(a.end[n], b.end[n]) for n in a.end)
        assert c.norms[0] is not None
        assert a.norms[0] is not None
        assert c.norms[0] < 0.95 * a.norms[0], "vacuous: the norms hardly differ"


def selected_twice(setup: Setup, optimizer_state: str) -> list[Weights]:
    """The child of the same weights and batches, chosen again while the first one's mask is in place."""
    with engine_of(setup) as engine:
        child = attached(engine, optimizer_state, "child", "fisher")
        masks = []
        for _ in range(2):
            report = child.select(deal(batches(setup.family, 4, seed=1000), dist.get_rank(), 2))
            masks.append({p.name: child.gather_mask(p.name) for p in report.parameters})
        child.detach()
    return masks


@pytest.mark.parametrize("name", ["zero0", "zero2-offload", "zero2-odd", "zero3"])
def test_a_fisher_pass_sees_whole_gradients(pool: RankPool, name: str) -> None:
    for first, second in pool[2].run(selected_twice, SETUPS[name], "dense"):
        assert all(torch.equal(first[n], second[n]) for n in first)
        assert any((~mask).any() for mask in first.values()), "vacuous"


def waits_and_masks(setup: Setup) -> list[str]:
    """What a step does before its norm: waits for the device, masks a gradient."""
    events: list[str] = []
    with engine_of(setup) as engine:
        child = attached(engine, "dense", "child", "random")
        child.select()
        network = child._hooks.child
        mask = network.mask_gradient_

        def noted(*args: Any) -> None:
            events.append("mask")
            mask(*args)

        with (
            mock.patch.object(clip, "wait_for_this_stream", side_effect=lambda: events.append("wait")),
            mock.patch.object(network, "mask_gradient_", noted),
        ):
            train_step(engine, deal(step_batches(setup, 0), dist.get_rank(), 2))
        child.detach()
    return events


def test_the_host_waits_for_offloaded_gradients_before_it_masks_them(pool: RankPool) -> None:
    """They may still be on their way from a device, which no CPU shows."""
    for events in pool[2].run(waits_and_masks, SETUPS["zero3-offload"]):
        assert events.index("wait") < events.index("mask")


def test_without_clipping_gradients_are_compact_unless_the_config_says_dense(pool: RankPool) -> None:
    setup = replace(SETUPS["zero3"], clip=0.0)
    assert {r.parts for r in pool[2].run(run, setup, "compact", None)} == {"moments, masters and gradients"}
    assert {r.parts for r in pool[2].run(run, setup, "compact", "dense")} == {"moments"}


def test_bf16_optimizer_is_refused_by_name(pool: RankPool) -> None:
    setup = replace(BASE, stage=1, bf16=True, fp32_accumulation=True)
    with pytest.raises(RankFailure, match=r'does not support child_tuning.clip "child" with BF16_Optimizer'):
        pool[2].run(run, setup, "dense", "child")
