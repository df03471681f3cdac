"""A child that is trained and exported, and the model that it began with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

import ds_childtune
from tests.support.engines import Setup, Weights, engine_of, model_weights, train_step
from tests.support.models import batches, build, deal

P = 0.3


@dataclass(frozen=True)
class Run:
    """What rank 0 saw."""

    full: Weights
    """The tuned model."""
    masks: Weights


def train_and_export(setup: Setup, folder: str, optimizer_state: str, seed: int = 0) -> Run:
    """Train a child, and write it; beside it DeepSpeed's own 16-bit model."""
    torch.manual_seed(0)
    zero = setup.config()["zero_optimization"] | {"stage3_gather_16bit_weights_on_model_save": True}
    with engine_of(setup, zero_optimization=zero) as engine:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        block = {"mode": "ChildTuning-D", "reserve_p": P, "optimizer_state": optimizer_state}
        child = ds_childtune.attach(engine, block)
        report = child.select(deal(batches(setup.family, 4, seed=seed), rank, world_size))
        for step in range(3):
            train_step(engine, deal(batches(setup.family, world_size, seed=seed + step), rank, world_size))
        child.export(f"{folder}/child")
        engine.save_16bit_model(f"{folder}/full", "pytorch_model.bin")
        return Run(model_weights(engine), {p.name: child.gather_mask(p.name) for p in report.parameters})


def base_model(setup: Setup) -> nn.Module:
    """What training began with, in the dtype that it was trained in."""
    return build(setup.family).to(torch.bfloat16 if setup.bf16 else torch.float32)


def copied(model: nn.Module) -> Weights:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(one: Weights, other: Weights) -> bool:
    """To the bit, names included."""
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
