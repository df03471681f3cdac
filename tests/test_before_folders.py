"""A checkpoint and an export written before the package had folders still load, bit for bit: tests/data/before_folders."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ds_childtune
from tests.support.bits import equal_bits
from tests.support.engines import Setup, Weights, engine_of, master_weights, model_weights, train_step
from tests.support.models import batches, build, deal
from tests.support.ranks import RankPool

BEFORE = Path(__file__).parent / "data" / "before_folders"
D = {"mode": "ChildTuning-D", "reserve_p": 0.3}
RUNS: dict[str, tuple[Setup, dict[str, Any]]] = {
    "zero3_bf16_compact": (
        Setup("odd", stage=3, bf16=True, schedule=True, sub_group_size=40),
        D | {"optimizer_state": "compact"},
    ),
    "zero2_fp32_dense": (Setup("odd", stage=2, clip=0.5, no_decay=("bias",)), D),
}


@dataclass(frozen=True)
class Loaded:
    """What one rank has after the load, and after two more steps."""

    masters: Weights
    forward: Weights
    masks: Weights
    step: int
    note: Any
    later: Weights


def load(setup: Setup, block: dict[str, Any], folder: str) -> Loaded:
    with engine_of(setup) as engine:
        child = ds_childtune.attach(engine, block)
        path, client_state = engine.load_checkpoint(folder)
        assert path is not None
        masks = {p.name: child.gather_mask(p.name) for p in child.report().parameters}
        masters, forward, step = master_weights(engine), model_weights(engine), child.step
        for seed in (3, 4):
            train_step(engine, deal(batches("odd", 2, seed=seed), dist.get_rank(), dist.get_world_size()))
        return Loaded(masters, forward, masks, step, client_state["note"], master_weights(engine))


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_written_before_the_folders_loads(pool: RankPool, name: str, stage: int) -> None:
    """At the stage that wrote it, and at others. The two steps on are as they were if the optimizer's state was read."""
    setup, block = RUNS[name]
    expected = torch.load(BEFORE / name / "expected.pt")
    at, after = expected["at"], expected["after"]
    inside = {n: at["masks"][n] for n in at["masters"]}
    assert not equal_bits(at["masters"], after["masters"]), "vacuous: nothing moves"
    for got in pool[2].run(load, replace(setup, stage=stage), block, str(BEFORE / name / "checkpoint")):
        assert equal_bits(got.masks, at["masks"])
        assert equal_bits(got.forward, at["forward"])
        assert (got.step, got.note) == (at["step"], 7) == (3, 7)
        for n, mask in inside.items():
            assert torch.equal(got.masters[n][mask], at["masters"][n][mask]), n
            # On another machine, or at another stage, sums are rounded otherwise.
            tolerance = {"rtol": 1e-2, "atol": 1e-4} if setup.bf16 else {"rtol": 1e-4, "atol": 1e-6}
            assert torch.allclose(got.later[n], after["masters"][n], **tolerance), n


def test_an_export_written_before_the_folders_makes_the_tuned_model() -> None:
    name = "zero3_bf16_compact"
    expected = torch.load(BEFORE / name / "expected.pt")["at"]["forward"]
    model = build("odd").bfloat16()
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert not equal_bits(base, expected), "vacuous: training changed nothing"
    applied = ds_childtune.apply_child(model, BEFORE / name / "export")
    assert equal_bits(dict(model.named_parameters()), expected)
    applied.revert()
    assert equal_bits(dict(model.named_parameters()), base)
