"""Fisher information against the dense oracle: both estimators, the original's clip, and what it does not depend on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch.distributed as dist

import ds_childtune
from tests.support import reference
from tests.support.engines import Setup, Weights, engine_of
from tests.support.models import Batch, batches, block_parameters, build, deal
from tests.support.ranks import RankPool
from tests.support.reference import worst_difference

COUNT = 4
"""Micro-batches over all ranks: the same number on each, at 1, 2 and 4 ranks."""


@dataclass(frozen=True)
class Pass:
    """A Fisher pass."""

    setup: Setup
    world_size: int = 2
    fisher: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        s = self.setup
        parts = [s.family, f"zero{s.stage}", "bf16" if s.bf16 else "fp32", f"{self.world_size}ranks"]
        parts += (
            [f"acc{s.accumulation}"] * (s.accumulation > 1) + ["offload"] * s.offload + [f"clip{s.clip}"] * bool(s.clip)
        )
        return "-".join([*parts, *(f"{k}={v}" for k, v in self.fisher.items())])


def calibration(family: str) -> list[Batch]:
    return batches(family, COUNT, seed=7)


def run_pass(case: Pass) -> tuple[Weights, int]:
    """Each eligible parameter's Fisher information, and the terms of its mean."""
    with engine_of(case.setup) as engine:
        child = ds_childtune.attach(engine, {"mode": "ChildTuning-D", "reserve_p": 0.3, "fisher": case.fisher})
        fisher = child.estimate_fisher(deal(calibration(case.setup.family), dist.get_rank(), dist.get_world_size()))
        model = build(case.setup.family)
        found = {name: child.gather_fisher(fisher, name) for name in block_parameters(case.setup.family, model)}
        child.detach()
    return found, fisher.terms


def oracle(setup: Setup, terms: list[list[Batch]], **options: Any) -> Weights:
    model = build(setup.family)
    if setup.bf16:
        model = model.bfloat16()
    scores = reference.fisher(model, terms, **options)
    return {name: scores[name] for name in block_parameters(setup.family, model)}


def check(pool: RankPool, case: Pass, terms: list[list[Batch]], record_property: Any, **options: Any) -> Weights:
    expected = oracle(case.setup, terms, **options)
    outcomes = pool[case.world_size].run(run_pass, case)
    difference = max(worst_difference(found, expected) for found, _ in outcomes)
    record_property("of the Fisher information", difference)
    # bf16 rounds gradients, squares, and sums over ranks to 8 bits; e8m8 a sum after each of its terms.
    assert difference < (2e-2 if case.setup.bf16 or case.fisher.get("score_dtype") == "e8m8" else 1e-5)
    assert all(count == len(terms) for _, count in outcomes)
    return expected


BASES = [
    *(Setup("gpt2", stage=stage, accumulation=2, clip=0.1, sub_group_size=350) for stage in (0, 1, 2, 3)),
    *(Setup("llama", stage=stage, bf16=True, accumulation=2, clip=0.1) for stage in (0, 1, 2, 3)),
    *(Setup("odd", stage=stage, offload=True, sub_group_size=20) for stage in (1, 2, 3)),
    Setup("llama", stage=1, bf16=True, fp32_accumulation=True),
]
PASSES = [
    *(Pass(setup) for setup in BASES),
    *(Pass(replace(BASES[stage], accumulation=1, clip=0.0), world_size) for stage in (0, 3) for world_size in (1, 4)),
    *(Pass(BASES[stage], fisher={"score_dtype": "e8m8"}) for stage in (2, 3)),
]


@pytest.mark.parametrize("case", PASSES, ids=str)
def test_per_micro_batch(pool: RankPool, case: Pass, record_property: Any) -> None:
    """The mean over micro-batches, whatever the world size, the stage, the accumulation steps and the training's clip."""
    check(pool, case, [[batch] for batch in calibration(case.setup.family)], record_property)


@pytest.mark.parametrize("case", [Pass(s, fisher={"max_grad_norm": 0.05}) for s in BASES[:8]], ids=str)
def test_max_grad_norm(pool: RankPool, case: Pass, record_property: Any) -> None:
    """Each tensor's micro-batch gradient is clipped before it is squared."""
    terms = [[batch] for batch in calibration(case.setup.family)]
    expected = check(pool, case, terms, record_property, max_grad_norm=0.05)
    unclipped = oracle(case.setup, terms)
    changed = [name for name in expected if worst_difference({name: expected[name]}, {name: unclipped[name]}) > 0.1]
    assert 0 < len(changed) < len(expected), "vacuous: all tensors are clipped, or none"


@pytest.mark.parametrize(
    "case",
    [Pass(s, fisher={"estimator": "per_global_batch"}) for s in BASES]
    + [Pass(BASES[3], world_size, {"estimator": "per_global_batch"}) for world_size in (1, 4)],
    ids=str,
)
def test_per_global_batch(pool: RankPool, case: Pass, record_property: Any) -> None:
    """A term is the square of one round's gradient, averaged over the ranks; the training's clip does not act."""
    everything = calibration(case.setup.family)
    rounds = [everything[i : i + case.world_size] for i in range(0, COUNT, case.world_size)]
    expected = check(pool, case, rounds, record_property)
    if case.world_size > 1:
        per_micro_batch = oracle(case.setup, [[batch] for batch in everything])
        assert worst_difference(per_micro_batch, expected) > 0.2, "vacuous: both estimators agree"
