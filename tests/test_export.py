"""Base model + exported child = tuned model, to the bit; and back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ds_childtune
from ds_childtune import apply_child
from ds_childtune.child_reader import open_child
from tests.distributed import RankPool
from tests.engines import Setup, Weights, engine_of, model_weights, train_step
from tests.models import batches, block_parameters, build, deal

P = 0.3


@dataclass(frozen=True)
class Run:
    """What one rank saw."""

    full: Weights
    """The tuned model."""
    masks: Weights


def train_and_export(setup: Setup, path: str, optimizer_state: str, seed: int = 0, steps: int = 3) -> Run:
    """Train a child, and write it."""
    torch.manual_seed(0)
    with engine_of(setup) as engine:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        block = {"mode": "ChildTuning-D", "reserve_p": P, "optimizer_state": optimizer_state}
        child = ds_childtune.attach(engine, block)
        report = child.select(deal(batches(setup.family, 4, seed=seed), rank, world_size))
        for step in range(steps):
            train_step(engine, deal(batches(setup.family, world_size, seed=seed + step), rank, world_size))
        child.export(path)
        return Run(model_weights(engine), {p.name: child.gather_mask(p.name) for p in report.parameters})


def base_model(setup: Setup) -> nn.Module:
    """What training began with, in the dtype that it was trained in."""
    return build(setup.family).to(torch.bfloat16 if setup.bf16 else torch.float32)


def copied(model: nn.Module) -> Weights:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(one: Weights, other: Weights) -> bool:
    """To the bit, names included."""
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


CASES = {
    "stage 0, fp32, 1 rank": (Setup("bert", stage=0), "dense", 1),
    "stage 0, bf16": (Setup("odd", stage=0, bf16=True), "compact", 2),
    "stage 1, bf16, tied": (Setup("gpt2", stage=1, bf16=True), "dense", 2),
    "stage 2, fp32, frozen and tied": (Setup("odd", stage=2), "compact", 2),
    "stage 2, bf16, offload": (Setup("odd", stage=2, bf16=True, offload=True), "dense", 2),
    "stage 3, fp32, sub-groups, 4 ranks": (Setup("odd", stage=3, sub_group_size=20), "dense", 4),
    "stage 3, bf16, persistent": (Setup("odd", stage=3, bf16=True, persistence_threshold=5), "compact", 2),
    "stage 3, bf16, zero.Init, tied": (Setup("t5", stage=3, bf16=True, zero_init=True), "dense", 2),
}


@pytest.mark.parametrize("case", CASES)
def test_base_plus_child_is_the_tuned_model(pool: RankPool, tmp_path: Path, case: str) -> None:
    setup, optimizer_state, world_size = CASES[case]
    run = pool[world_size].run(train_and_export, setup, str(tmp_path), optimizer_state)[0]
    model = base_model(setup)
    base = copied(model)
    assert not same(run.full, base), "vacuous: training changed nothing"
    applied = apply_child(model, tmp_path)
    assert same(copied(model), run.full)
    applied.revert()
    assert same(copied(model), base)

    child = open_child(tmp_path)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(child.places) == trainable
    for name in trainable:
        assert torch.equal(child.read(name).mask(), run.masks[name].view(-1)), name
    blocks = block_parameters(setup.family, model)
    kept = sum(child.kept(name) for name in blocks)
    assert kept == round(P * sum(base[name].numel() for name in blocks)), "vacuous: the child is not a part"
