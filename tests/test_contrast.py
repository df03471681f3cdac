"""Selector contrast: the child of the largest F_task / (F_general + eps), against a dense oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import ds_childtune
from ds_childtune.selection.scores import Scores
from tests.support import reference
from tests.support.engines import Setup, Weights, engine_of, train_step
from tests.support.models import batches, block_parameters, build, deal
from tests.support.ranks import RankPool

P = 0.3
BLOCK = {"mode": "ChildTuning-D", "reserve_p": P, "selector": "contrast"}
TASK, GENERAL = (batches("integer", 4, seed=seed) for seed in (7, 8))


def masks_by_selecting(setup: Setup, score_dtype: str) -> tuple[Weights, float, int]:
    """Every eligible parameter's mask, the reported threshold, and the micro-batches that were counted; the child trains a step."""
    with engine_of(setup) as engine:
        block = BLOCK | {
            "fisher": {"score_dtype": score_dtype},
            "optimizer_state": "compact" if setup.stage else "dense",
        }
        child = ds_childtune.attach(engine, block)
        rank, world_size = dist.get_rank(), dist.get_world_size()
        report = child.select(deal(TASK, rank, world_size), against=deal(GENERAL, rank, world_size))
        names = block_parameters("integer", build("integer"))
        masks = {name: child.gather_mask(name) for name in names}
        train_step(engine, deal(TASK, rank, world_size)[:1])
        assert report.threshold is not None
        child.detach()
    return masks, report.threshold, report.calibration_batches


def oracle() -> Weights:
    """Dense, in one process and in fp64."""
    model = build("integer")
    task, general = (reference.fisher(model, [[batch] for batch in of]) for of in (TASK, GENERAL))
    names = block_parameters("integer", model)
    mean = torch.cat([general[name].double().flatten() for name in names]).mean()
    return {name: task[name].double() / (general[name].double() / mean + 0.1) for name in names}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_same_child_as_the_oracle_at_every_stage(pool: RankPool, world_size: int) -> None:
    """Integer gradients, so that Fisher sums are exact in e8m8, too; shards are uneven, and cut inside of parameters."""
    scores = oracle()
    k = round(P * sum(s.numel() for s in scores.values()))
    expected, threshold = reference.top(scores, k), reference.threshold(scores, k)
    by_fisher = reference.top(reference.fisher(build("integer"), [[b] for b in TASK]), k)
    changed = sum(int((expected[n] & ~by_fisher[n]).sum()) for n in expected)
    assert changed > k // 10, "vacuous: the task's Fisher information by itself picks the same child"
    for stage in (0, 1, 2, 3):
        for masks, found, terms in pool[world_size].run(
            masks_by_selecting, Setup("integer", stage=stage, sub_group_size=100), "fp32"
        ):
            assert all(torch.equal(masks[name], expected[name]) for name in expected), f"stage {stage}"
            assert found == pytest.approx(threshold, rel=1e-6)
            assert terms == len(TASK)


def test_two_bytes_for_each_pass(pool: RankPool) -> None:
    """With scores in e8m8 the ratio is rounded to 9 bits: every element inside scores at least what the threshold says, less that."""
    scores = oracle()
    k = round(P * sum(s.numel() for s in scores.values()))
    for masks, _, _ in pool[2].run(masks_by_selecting, Setup("integer", stage=3, sub_group_size=100), "e8m8"):
        assert sum(int(mask.sum()) for mask in masks.values()) == k
        border = reference.threshold(scores, k)
        for name, mask in masks.items():
            assert bool((scores[name][mask] >= border * (1 - 2**-8)).all())
            assert bool((scores[name][~mask] <= border * (1 + 2**-8)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16])
def test_division_is_right_over_tiles(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    task, general = (torch.rand((1 << 20) + 7, generator=generator).pow(3) * 1e3 for _ in range(2))

    def scores(values: torch.Tensor) -> Scores:
        # Codes are the upper 16 of 31 bits.
        return Scores("a", 0, values.clone() if dtype == torch.float32 else (values.view(torch.int32) >> 15).short())

    numerator, divisor = scores(task), scores(general)
    expected = numerator.float().double() / (divisor.float().double() / 3.0 + 0.1)
    numerator.divide_(divisor, 3.0, 0.1)
    error = (numerator.float().double() / expected - 1).abs().nan_to_num().max()
    assert error < (1e-6 if dtype == torch.float32 else 2**-9 * 1.01)
    assert numerator.values.dtype == dtype


def refusals(setup: Setup) -> list[str]:
    silent = [{key: value * 0 for key, value in batch.items()} for batch in GENERAL]
    cases: list[tuple[str, dict[str, Any]]] = [
        ("contrast", {}),
        ("fisher", {"against": GENERAL}),
        ("magnitude", {"against": GENERAL}),
        ("contrast", {"against": GENERAL[0]}),
        ("contrast", {"against": silent}),
    ]
    told = []
    with engine_of(setup) as engine:
        for selector, arguments in cases:
            child = ds_childtune.attach(engine, BLOCK | {"selector": selector})
            try:
                child.select(TASK, **arguments)
                told.append("nothing")
            except ValueError as error:
                told.append(str(error))
            child.detach()
    return told


def test_refusals(pool: RankPool) -> None:
    expected = [
        "Remedy: pass select(task_batches, against=general_batches)",
        'Remedy: set "selector": "contrast"',
        'Remedy: set "selector": "contrast"',
        "expected an iterable of micro-batches",
        "a mean Fisher information of 0.0. Remedy: look at the batches of `against`",
    ]
    for told in pool[2].run(refusals, Setup("integer", stage=2)):
        assert all(part in text for part, text in zip(expected, told, strict=True)), told
