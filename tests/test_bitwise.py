"""What must be equal bit for bit: p = 1 after a Fisher pass, detach, and the complement under every base optimizer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ds_childtune
from tests.support.bits import bits_equal, equal_bits
from tests.support.counters import counters, random_states
from tests.support.engines import Setup, Weights, engine_of, master_weights, model_weights, train_step
from tests.support.listed_optimizers import OFFLOADED, OPTIMIZERS
from tests.support.models import batches, deal
from tests.support.ranks import RankPool
from tests.support.reference import distance

P = 0.3
STEPS = 3
D = "ChildTuning-D"


def train(engine: Any, setup: Setup, first: int, last: int) -> None:
    """The same steps in every run: dropout draws from a generator that is seeded by the step."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for step in range(first, last):
        train_step(engine, deal(batches(setup.family, setup.accumulation * world_size, seed=step), rank, world_size))


def calibration(setup: Setup) -> list[Any]:
    return deal(batches(setup.family, 3, seed=1000), dist.get_rank(), dist.get_world_size())


# ---------------------------------------------------------------- plain DeepSpeed


@dataclass(frozen=True)
class Run:
    start: Weights
    end: Weights
    forward: Weights
    """What the forward pass sees at the end."""
    counters: dict[str, Any]


def run_against_plain(setup: Setup, *, reserve_p: float, steps_before: int, detach: bool) -> tuple[Run, Run]:
    """Plain DeepSpeed, and a child that must not differ from it: p = 1, or detached after `select`."""
    runs = []
    for with_child in (False, True):
        torch.manual_seed(1 + dist.get_rank())
        with engine_of(setup) as engine:
            start = master_weights(engine)
            train(engine, setup, 0, steps_before)
            if with_child:
                child = ds_childtune.attach(engine, {"mode": D, "reserve_p": reserve_p})
                before, drawn, weights = counters(engine), random_states(), master_weights(engine)
                child.select(calibration(setup))
                assert counters(engine) == before
                assert random_states() == drawn
                assert equal_bits(weights, master_weights(engine))
                if detach:
                    child.detach()
            train(engine, setup, steps_before, STEPS)
            if with_child and not detach:
                child.detach()
            runs.append(Run(start, master_weights(engine), model_weights(engine), counters(engine)))
    return runs[0], runs[1]


DROPPING = Setup("gpt2", accumulation=2, clip=0.3, dropout=0.2, schedule=True, sub_group_size=350)
PLAIN = {
    **{f"zero{s}": replace(DROPPING, stage=s) for s in range(4)},
    **{f"zero{s}-bf16": replace(DROPPING, stage=s, bf16=True) for s in range(4)},
    **{f"zero{s}-offload": replace(DROPPING, stage=s, offload=True) for s in (1, 2, 3)},
    "zero1-bf16-fp32_accumulation": replace(DROPPING, stage=1, bf16=True, fp32_accumulation=True),
    "zero3-odd-persistent": replace(DROPPING, family="odd", stage=3, persistence_threshold=8, sub_group_size=20),
    "zero2-t5": replace(DROPPING, family="t5", stage=2),
}


@pytest.mark.parametrize("name", PLAIN)
def test_p_1_after_a_fisher_pass_is_plain_deepspeed(pool: RankPool, name: str) -> None:
    check_plain(pool[2].run(run_against_plain, PLAIN[name], reserve_p=1.0, steps_before=0, detach=False))


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3", "zero2-bf16", "zero3-offload"])
def test_detached_is_plain_deepspeed(pool: RankPool, name: str) -> None:
    check_plain(pool[2].run(run_against_plain, PLAIN[name], reserve_p=P, steps_before=0, detach=True))


@pytest.mark.parametrize("name", ["zero0-bf16", "zero2-offload", "zero3"])
def test_p_1_in_the_middle_of_training_is_plain_deepspeed(pool: RankPool, name: str) -> None:
    """Moments and stale gradient buffers of a dense past are as they were, too."""
    check_plain(pool[2].run(run_against_plain, PLAIN[name], reserve_p=1.0, steps_before=2, detach=False))


def check_plain(outcomes: list[tuple[Run, Run]]) -> None:
    for plain, tuned in outcomes:
        assert distance(plain.end, plain.start) > 0.05, "vacuous: nothing moved"
        assert equal_bits(plain.end, tuned.end)
        assert equal_bits(plain.forward, tuned.forward)
        assert plain.counters == tuned.counters


# ---------------------------------------------------------------- the complement


@dataclass(frozen=True)
class Moves:
    """Training before and after the child was chosen."""

    optimizer: str
    before: Weights
    after: Weights
    masks: Weights


def run_complement(setup: Setup, **extra: Any) -> Moves:
    """A dense past, whose moments must not move the complement; then a child."""
    with engine_of(setup, **extra) as engine:
        train(engine, setup, 0, 1)
        child = ds_childtune.attach(engine, {"mode": D, "reserve_p": P})
        child.select(calibration(setup))
        before = master_weights(engine)
        train(engine, setup, 1, 1 + STEPS)
        masks = {p.name: child.gather_mask(p.name) for p in child.report().parameters}
        moves = Moves(
            type(getattr(engine.optimizer, "optimizer", engine.optimizer)).__name__,
            before,
            master_weights(engine),
            masks,
        )
        child.detach()
    return moves


COMPLEMENT = [
    *(
        (name, Setup("gpt2", stage=stage, optimizer=o, sub_group_size=350))
        for name, o in OPTIMIZERS.items()
        for stage in (1, 3)
    ),
    *((name, Setup("gpt2", stage=0, optimizer=OPTIMIZERS[name])) for name in ("AdamW", "FusedAdam", "SGD")),
    *((name, Setup("gpt2", stage=0, bf16=True, optimizer=OPTIMIZERS[name])) for name in ("AdamW", "FusedAdam")),
    ("FusedAdam", Setup("gpt2", stage=2, bf16=True, optimizer=OPTIMIZERS["FusedAdam"])),
    *(
        (name, Setup("gpt2", stage=stage, optimizer=o, offload=True, sub_group_size=350))
        for name, o in OFFLOADED.items()
        for stage in (2, 3)
    ),
    ("DeepSpeedCPUAdam", Setup("gpt2", stage=3, bf16=True, offload=True, optimizer=OFFLOADED["DeepSpeedCPUAdam"])),
]


def complement_id(value: Any) -> str:
    return value if isinstance(value, str) else f"zero{value.stage}{'-bf16' if value.bf16 else ''}"


@pytest.mark.parametrize(("name", "setup"), COMPLEMENT, ids=complement_id)
def test_only_the_child_moves(pool: RankPool, name: str, setup: Setup) -> None:
    extra = {"zero_force_ds_cpu_optimizer": True} if setup.offload else {}
    for moves in pool[2].run(run_complement, setup, **extra):
        assert moves.optimizer == name.partition("-")[0], "another optimizer than the test is about"
        inside = []
        for parameter, mask in moves.masks.items():
            before, after = moves.before[parameter], moves.after[parameter]
            assert bits_equal(before[~mask], after[~mask]), f"{parameter} moved outside the child"
            inside.append((before != after)[mask])
        assert float(torch.cat(inside).float().mean()) > 0.9, "vacuous: the child hardly moved"
        assert sum(int((~mask).sum()) for mask in moves.masks.values()) > 500, "vacuous: hardly any complement"
