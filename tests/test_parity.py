"""Weights after several steps against the dense oracle of `tests.support.reference`, and masks against a full sort.

Cells of stage x mode x precision x accumulation x clip x offload x world size x architecture, chosen so that every value meets
every other one somewhere. What an oracle cell proves is nothing if masks made no difference or nothing moved, so that is
asserted first.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

import ds_childtune
from tests.support import reference
from tests.support.engines import Optimizer, Setup, Weights, engine_of
from tests.support.models import deal
from tests.support.parity import (
    STEPS,
    Cell,
    D,
    F,
    P,
    calibration,
    check_against_the_oracle,
    oracle_fisher,
    oracle_weights,
    run_cell,
    same,
)
from tests.support.ranks import RankPool

# ---------------------------------------------------------------- the cells

ADAM_L2 = Optimizer("Adam", {**Optimizer().params, "adam_w_mode": False})
SGD = Optimizer("SGD", {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.1})
ADAGRAD = Optimizer("Adagrad", {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1})
NO_DECAY = ("bias", "ln_", "norm", "gain", "scale")


def chosen_cells() -> list[Cell]:
    cells = []
    for mode in (F, D):
        for stage in (0, 1, 2, 3):
            cells.append(Cell(mode, Setup("gpt2", stage=stage, accumulation=2, clip=0.5)))
            cells.append(Cell(mode, Setup("llama", stage=stage, bf16=True, accumulation=2)))
            cells.append(Cell(mode, Setup("odd", stage=stage, sub_group_size=20, no_decay=NO_DECAY)))
        for stage in (1, 2, 3):
            setup = Setup("gpt2", stage=stage, offload=True, accumulation=3 - stage % 2, clip=0.25 * (stage > 1))
            cells.append(Cell(mode, replace(setup, sub_group_size=250)))
        cells.append(Cell(mode, Setup("llama", stage=1, bf16=True, fp32_accumulation=True, accumulation=2)))
        cells.append(Cell(mode, Setup("gpt2", stage=3, sub_group_size=350), world_size=1))
        cells.append(Cell(mode, Setup("odd", stage=3, sub_group_size=20), world_size=4))
    cells += [
        Cell(D, Setup("llama", stage=2, bf16=True, offload=True, clip=0.5)),
        Cell(D, Setup("llama", stage=3, bf16=True, offload=True, sub_group_size=150)),
        Cell(F, Setup("llama", stage=3, bf16=True, zero_init=True, persistence_threshold=50)),
        Cell(D, Setup("odd", stage=1), world_size=4),
        Cell(F, Setup("gpt2", stage=1, round_robin=True, accumulation=2, clip=0.5)),
        Cell(F, Setup("llama", stage=2, round_robin=True, bf16=True)),
        Cell(D, Setup("odd", stage=1, round_robin=True, no_decay=NO_DECAY), world_size=4),
        Cell(D, Setup("gpt2", stage=2, round_robin=True, accumulation=2, clip=0.5), block={"clip": "child"}),
        Cell(D, Setup("llama", stage=2, round_robin=True, bf16=True, offload=True, clip=0.5)),
        Cell(D, Setup("odd", stage=2, offload=True), world_size=4),
        Cell(D, Setup("gpt2", stage=0), world_size=1),
        Cell(F, Setup("bert", stage=2, clip=0.5), world_size=1),
        Cell(D, Setup("bert", stage=1, accumulation=2, no_decay=NO_DECAY)),
        Cell(D, Setup("bert", stage=3, sub_group_size=200, persistence_threshold=50)),
        Cell(D, Setup("t5", stage=2, clip=0.5)),
        Cell(D, Setup("t5", stage=3, zero_init=True, sub_group_size=300)),
        Cell(F, Setup("t5", stage=3, accumulation=2)),
        Cell(D, Setup("gpt2", stage=2), block={"compat": "original"}),
        Cell(D, Setup("gpt2", stage=3, bf16=True), block={"compat": "original"}),
        Cell(D, Setup("gpt2", stage=3, optimizer=ADAM_L2, sub_group_size=350)),
        Cell(D, Setup("gpt2", stage=1, optimizer=SGD, clip=0.5)),
        Cell(D, Setup("gpt2", stage=2, optimizer=ADAGRAD)),
    ]
    if get_accelerator().device_name() != "cpu":
        # Squares of single micro-batches underflow, so they are refused; on one rank, a global batch is a micro-batch.
        fisher = {"fisher": {"estimator": "per_global_batch"}}
        for stage in (0, 1, 2, 3):
            setup = Setup("llama", stage=stage, fp16=True, sub_group_size=150)
            cells += [Cell(F, setup), Cell(D, setup, world_size=1, block=fisher)]
    return cells


@pytest.mark.parametrize("cell", chosen_cells(), ids=str)
def test_weights_equal_the_oracle(pool: RankPool, cell: Cell, record_property: Any) -> None:
    check_against_the_oracle(pool, cell, record_property)


# ---------------------------------------------------------------- ties


def masks_of_every_stage(bf16: bool) -> list[Weights]:
    """ChildTuning-D's masks on the integer model, at stages 0 to 3."""
    found = []
    for stage in (0, 1, 2, 3):
        setup = Setup("integer", stage=stage, bf16=bf16, sub_group_size=100)
        with engine_of(setup, child_tuning={"mode": D, "reserve_p": P}) as engine:
            child = ds_childtune.attach(engine)
            child.select(deal(calibration("integer"), dist.get_rank(), dist.get_world_size()))
            found.append({p.name: child.gather_mask(p.name) for p in child.report().parameters if p.eligible})
            child.detach()
    return found


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ties_are_cut_at_exactly_the_same_elements(pool: RankPool, world_size: int, bf16: bool) -> None:
    """Exact arithmetic: the child is the full sort's to the element, though hundreds of scores equal the threshold."""
    scores = oracle_fisher("integer", torch.bfloat16 if bf16 else torch.float32)
    k = round(P * sum(s.numel() for s in scores.values()))
    expected = reference.top(scores, k)
    tied = torch.cat([(s == reference.threshold(scores, k)).flatten() for s in scores.values()])
    inside = torch.cat([m.flatten() for m in expected.values()])
    assert int(tied.sum()) > 20, "vacuous: hardly any ties"
    assert 0 < int((tied & inside).sum()) < int(tied.sum()), "vacuous: the threshold's ties are not cut"
    for stages in pool[world_size].run(masks_of_every_stage, bf16):
        for stage, masks in enumerate(stages):
            assert same(masks, expected), f"stage {stage}"


def test_the_oracle_notices_one_wrong_element(pool: RankPool) -> None:
    """A single element less in the child is far outside the tolerance of the cells above."""
    cell = Cell(D, Setup("gpt2", stage=0), world_size=1)
    outcome = pool[1].run(run_cell, cell)[0]
    expected = oracle_weights(cell, outcome.start, reference.Child(outcome.masks, frozen_outside=True))
    wrong = copy.deepcopy(outcome.masks[0])
    name = max(wrong, key=lambda n: int(wrong[n].sum()))
    wrong[name].view(-1)[wrong[name].view(-1).nonzero()[0]] = False
    other = oracle_weights(cell, outcome.start, reference.Child([wrong] * STEPS, frozen_outside=True))
    assert reference.worst_difference(other, expected) > 1e-4
