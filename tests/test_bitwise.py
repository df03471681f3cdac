"""What must be equal bit for bit: p = 1 after a Fisher pass, detach, and the complement under every base optimizer."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ranks import Case, run_cases, value
from tests.test_parity import CALIBRATION, STEPS, config, full_weights, step_batches, tiny_gpt2

WORLD_SIZE = 2


def model_with_dropout() -> Any:
    model = tiny_gpt2()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    return model


def engine_for(block: dict[str, Any], *, model: Any = None) -> Any:
    import deepspeed

    scheduler = {"type": "WarmupLR", "params": {"warmup_min_lr": 1e-3, "warmup_max_lr": 1e-2, "warmup_num_steps": 3}}
    engine, *_ = deepspeed.initialize(model=model or model_with_dropout(), config={**block, "scheduler": scheduler})
    return engine


def run_steps(engine: Any, first: int, last: int) -> None:
    import torch.distributed as dist

    for step in range(first, last):
        for micro_batch in step_batches(step)[dist.get_rank() :: WORLD_SIZE]:
            engine.backward(engine(**micro_batch).loss)
            engine.step()


def counters(engine: Any) -> list[Any]:
    return [engine.global_steps, engine.global_samples, engine.micro_steps, engine.skipped_steps, engine.get_lr()]


def against_plain(stage: int, *, bf16: bool, detach: bool) -> float:
    """Train plain DeepSpeed and a child that must not differ from it; returns how far training moved."""
    import torch.distributed as dist

    import ds_childtune

    block = config("ChildTuning-D", stage, WORLD_SIZE, offload=False)
    block["bf16"] = {"enabled": bf16}
    weights = []
    for with_child in (False, True):
        torch.manual_seed(1)
        engine = engine_for(block)
        engine.train()
        if with_child:
            settings = {"mode": "ChildTuning-D", "reserve_p": P_PART if detach else 1.0}
            child = ds_childtune.attach(engine, settings)
            before = counters(engine), torch.get_rng_state()
            child.select(CALIBRATION[dist.get_rank() :: WORLD_SIZE])
            assert counters(engine) == before[0]
            assert torch.equal(torch.get_rng_state(), before[1])
            if detach:
                child.detach()
        run_steps(engine, 0, STEPS)
        weights.append((full_weights(engine), counters(engine)))
    (plain, plain_counters), (tuned, tuned_counters) = weights
    assert plain_counters == tuned_counters
    for name in plain:
        assert torch.equal(plain[name], tuned[name]), name
    start = dict(tiny_gpt2().named_parameters())
    return max(float((plain[n] - start[n].detach()).norm()) for n in plain)


P_PART = 0.3
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"torch_adam": True, "eps": 1e-3},
    "Adam": {"torch_adam": True, "eps": 1e-3, "adam_w_mode": False},
    "SGD": {"momentum": 0.9},
    "Adagrad": {"eps": 1e-3},
    "RMSprop": {"eps": 1e-3, "momentum": 0.5},
}


def complement(optimizer: str, stage: int) -> dict[str, Any]:
    """Weights before and after, and masks, with weight decay on."""
    import torch.distributed as dist

    import ds_childtune

    block = config("ChildTuning-D", stage, WORLD_SIZE, offload=False)
    block["optimizer"] = {"type": optimizer, "params": {"lr": 1e-2, "weight_decay": 0.1, **OPTIMIZERS[optimizer]}}
    engine = engine_for(block, model=tiny_gpt2())
    child = ds_childtune.attach(engine)
    # A dense past: stale moments must not move the complement either.
    child.detach()
    run_steps(engine, 0, 2)
    child = ds_childtune.attach(engine)
    child.select(CALIBRATION[dist.get_rank() :: WORLD_SIZE])
    before = full_weights(engine)
    run_steps(engine, 2, STEPS)
    after = full_weights(engine)
    masks = {p.name: child.gather_mask(p.name) for p in child.report().parameters}
    return {"before": before, "after": after, "masks": masks}


def make_cases() -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for stage in (0, 1, 2, 3):
        for bf16 in (False, True):
            cases[f"p1-{stage}-{bf16}"] = functools.partial(against_plain, stage, bf16=bf16, detach=False)
        cases[f"detach-{stage}"] = functools.partial(against_plain, stage, bf16=False, detach=True)
    for optimizer in OPTIMIZERS:
        for stage in (1, 3):
            cases[f"{optimizer}-{stage}"] = functools.partial(complement, optimizer, stage)
    return cases


@functools.cache
def outcomes() -> dict[str, list[Any]]:
    return run_cases(WORLD_SIZE, make_cases)


@pytest.mark.parametrize("name", [n for n in make_cases() if n.startswith(("p1", "detach"))])
def test_bitwise_plain_deepspeed(name: str) -> None:
    for moved in value(outcomes(), name):
        assert moved > 1e-2, "vacuous: nothing moved"


@pytest.mark.parametrize("name", [n for n in make_cases() if not n.startswith(("p1", "detach"))])
def test_only_the_child_moves(name: str) -> None:
    for result in value(outcomes(), name):
        moved_inside: list[Tensor] = []
        for parameter, mask in result["masks"].items():
            moved = result["before"][parameter] != result["after"][parameter]
            assert not bool((moved & ~mask).any()), parameter
            moved_inside.append(moved[mask])
        assert float(torch.cat(moved_inside).float().mean()) > 0.9
