"""A training run of a few steps, and what the oracle of `tests.support.reference` makes of the same batches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

import ds_childtune
from tests.support import reference
from tests.support.bits import bits_equal
from tests.support.engines import Setup, Weights, engine_of, master_weights, train_step
from tests.support.models import Batch, batches, block_parameters, build, deal
from tests.support.ranks import RankPool

P = 0.3

STEPS = 2

CALIBRATION = 5
"""Micro-batches over all ranks: at 2 and 4 ranks some have one more than others."""

F, D = "ChildTuning-F", "ChildTuning-D"


@dataclass(frozen=True)
class Cell:
    """One training run that is compared with the oracle."""

    mode: str
    setup: Setup
    world_size: int = 2
    block: dict[str, Any] = field(default_factory=dict)
    """More keys of the `"child_tuning"` block."""

    def __str__(self) -> str:
        s = self.setup
        precision = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[s.dtype]
        parts = [self.mode[-1], s.family, f"zero{s.stage}", precision, f"{self.world_size}ranks"]
        parts += [s.optimizer.type] if s.optimizer.type != "AdamW" else []
        parts += [f"acc{s.accumulation}"] if s.accumulation > 1 else []
        parts += [f"clip{s.clip}"] if s.clip else []
        parts += [f"sub{s.sub_group_size}"] if s.sub_group_size < 10**9 else []
        parts += ["persistent"] if s.persistence_threshold else []
        parts += ["groups"] if s.no_decay else []
        parts += [name for name in ("offload", "round_robin", "zero_init", "fp32_accumulation") if getattr(s, name)]
        return "-".join([*parts, *(v for v in self.block.values() if isinstance(v, str))])


@dataclass(frozen=True)
class Outcome:
    """What one rank saw."""

    masks: list[Weights]
    """Before each step, of the eligible parameters."""
    start: Weights
    end: Weights
    step: int
    eligible: int
    kept: int


def step_batches(setup: Setup, world_size: int) -> list[list[Batch]]:
    """The micro-batches of each step, over all ranks."""
    return [batches(setup.family, setup.accumulation * world_size, seed=step) for step in range(STEPS)]


def calibration(family: str) -> list[Batch]:
    return batches(family, CALIBRATION, seed=1000)


def run_cell(cell: Cell) -> Outcome:
    """On every rank: train, and look at the masks before each step."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    settings = {"mode": cell.mode, "reserve_p": P, **cell.block}
    with engine_of(cell.setup, child_tuning=settings) as engine:
        start = master_weights(engine)
        child = ds_childtune.attach(engine)
        if cell.mode == D:
            child.select(deal(calibration(cell.setup.family), rank, world_size))
        report = child.report()
        eligible = [p.name for p in report.parameters if p.eligible]
        masks = []
        for micro_batches in step_batches(cell.setup, world_size):
            masks.append({name: child.gather_mask(name) for name in eligible})
            train_step(engine, deal(micro_batches, rank, world_size))
        outcome = Outcome(masks, start, master_weights(engine), child.step, report.eligible, report.kept)
        child.detach()
    return outcome


def oracle_model(setup: Setup) -> torch.nn.Module:
    return build(setup.family).to(setup.dtype)


def oracle_rules(setup: Setup, start: Weights) -> dict[str, reference.Rule]:
    params = dict(setup.optimizer.params)
    params.pop("torch_adam", None)
    name = setup.optimizer.type
    if name == "Adam" and not params.pop("adam_w_mode", True):
        rule = reference.Adam
    elif name in ("Adam", "AdamW"):
        rule = reference.AdamW
    else:
        rule = reference.RULES[name]
    bare = params | {"weight_decay": 0.0}
    rules = {n: rule(**(bare if any(part in n for part in setup.no_decay) else params)) for n in start}
    if setup.stage == 0 and setup.dtype != torch.float32:
        # FP16_UnfusedOptimizer allocates moments by a step on zero gradients, which Adam's bias correction counts.
        for name, w in start.items():
            rules[name](w.double(), torch.zeros_like(w, dtype=torch.float64))
    return rules


def oracle_weights(cell: Cell, start: Weights, child: reference.Child | None) -> Weights:
    setup = cell.setup
    steps = step_batches(setup, cell.world_size)
    return reference.train(oracle_model(setup), start, steps, oracle_rules(setup, start), child, clip=setup.clip)


@functools.cache
def oracle_fisher(family: str, dtype: torch.dtype) -> Weights:
    """Of the parameters inside the repeated blocks."""
    model = build(family).to(dtype)
    scores = reference.fisher(model, [[batch] for batch in calibration(family)])
    return {name: scores[name] for name in block_parameters(family, model)}


def check_task_driven_masks(cell: Cell, masks: Weights) -> None:
    """They are those of a full sort of the oracle's scores, except for elements whose score is the threshold up to rounding."""
    scores = oracle_fisher(cell.setup.family, cell.setup.dtype)
    assert masks.keys() == scores.keys()
    k = round(P * sum(s.numel() for s in scores.values()))
    assert sum(int(m.sum()) for m in masks.values()) == k
    expected = reference.top(scores, k)
    threshold = reference.threshold(scores, k)
    # In bf16, squares and their sums over ranks and micro-batches are rounded to 8 bits.
    tolerance = 1e-5 if cell.setup.dtype == torch.float32 else 3 * CALIBRATION * 2**-9
    for name, mask in masks.items():
        doubtful = (scores[name] - threshold).abs() <= tolerance * threshold
        assert not bool(((mask != expected[name]) & ~doubtful).any()), name
        assert float(doubtful.double().mean()) < 0.2 or mask.numel() < 100, f"vacuous: most of {name} is doubtful"


def check_against_the_oracle(pool: RankPool, cell: Cell, record_property: Callable[[str, float], None]) -> None:
    """Masks, weights and what must not move, on every rank; the first assertions show that masks matter in this cell."""
    outcomes = pool[cell.world_size].run(run_cell, cell)
    first = outcomes[0]
    for outcome in outcomes:
        assert outcome.step == STEPS
        assert all(same(a, b) for a, b in zip(outcome.masks, first.masks, strict=True)), "ranks disagree on a mask"
    if cell.mode == D:
        check_task_driven_masks(cell, first.masks[0])
        assert all(same(masks, first.masks[0]) for masks in first.masks), "a fixed child changed"
        assert first.kept == round(P * first.eligible)
    else:
        assert all(same(a, b) for a, b in zip(first.masks, free_masks(pool, cell.setup.family), strict=True))

    frozen_outside = cell.mode == D and "compat" not in cell.block
    child = reference.Child(
        first.masks,
        scale=1 / P if cell.mode == F else 1.0,
        frozen_outside=frozen_outside,
        clip_child=cell.block.get("clip") == "child",
    )
    expected = oracle_weights(cell, first.start, child)
    moved = reference.distance(expected, first.start)
    unmasked = reference.distance(oracle_weights(cell, first.start, None), expected)
    assert moved > 0.05, "vacuous: nothing moved"
    assert unmasked > 0.2 * moved, "vacuous: masks make no difference"
    if cell.setup.clip:
        steps = step_batches(cell.setup, cell.world_size)
        grads = reference.gradients(oracle_model(cell.setup), steps[0])
        norm = reference.distance(grads, {n: torch.zeros_like(g) for n, g in grads.items()})
        assert norm > 1.2 * cell.setup.clip, f"vacuous: a gradient norm of {norm} is not clipped"

    difference = max(reference.worst_difference(outcome.end, expected) for outcome in outcomes)
    of_movement = max(reference.distance(outcome.end, expected) for outcome in outcomes) / moved
    record_property("of the weights", difference)
    record_property("of their movement", of_movement)
    if cell.setup.dtype != torch.float32:
        # The oracle runs the same 16-bit forward and backward, but sums micro-batches and ranks in float64.
        assert of_movement < 0.03
    else:
        assert difference < 1e-5
        assert of_movement < 1e-4
    if frozen_outside:
        for outcome in outcomes:
            for name, mask in first.masks[0].items():
                assert bits_equal(outcome.end[name][~mask], first.start[name][~mask]), f"{name} moved outside the child"


def same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


_FREE_MASKS: dict[str, list[Weights]] = {}


def free_masks(pool: RankPool, family: str) -> list[Weights]:
    """ChildTuning-F's masks of one family, from one rank without ZeRO: every other cell must draw the same."""
    if family not in _FREE_MASKS:
        masks = pool[1].run(run_cell, Cell(F, Setup(family), world_size=1))[0].masks
        assert not same(masks[0], masks[1]), "vacuous: the masks of two steps are equal"
        _FREE_MASKS[family] = masks
    return _FREE_MASKS[family]
