"""`optimizer_state: "compact"` against the dense hook path, bit for bit, and what it stores.

DeepSpeed's own Adam kernels round elements in a vector's tail otherwise than those in its body, and decay in another order than the
dense path's separate decay, so there the two paths agree to the last bits only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ds_childtune
from ds_childtune import _zero
from tests.distributed import RankPool
from tests.engines import Optimizer, Setup, Weights, engine_of, master_weights, model_weights, train_step
from tests.models import batches, deal

P, STEPS = 0.3, 4
SGD = Optimizer("SGD", {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1})
ADAGRAD = Optimizer("Adagrad", {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1})
FUSED = Optimizer("AdamW", {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1})


@dataclass(frozen=True)
class Run:
    """What one rank saw."""

    depth: str
    start: Weights
    middle: Weights
    end: Weights
    forward: list[Weights]
    """What the forward pass saw in the middle and at the end."""
    masks: list[Weights]
    second_masks: list[Weights]
    state_numel: int
    """Elements of all moments on this rank."""
    child_numel: int
    """Elements of the child on this rank, dense parameters included."""
    flat_state: int
    """Flat shards for which the base optimizer holds state."""


def share(setup: Setup, seed: int, count: int) -> list[Any]:
    return deal(batches(setup.family, count, seed=seed), dist.get_rank(), dist.get_world_size())


def run(setup: Setup, optimizer_state: str, end: str, past: bool = True, clip: str | None = None) -> Run:
    """Train dense (where there is a past), then a child, then `end`: another child ("reselect"), or plain DeepSpeed ("detach")."""
    torch.manual_seed(0)
    with engine_of(setup) as engine:
        micro_batches = setup.accumulation * dist.get_world_size()
        steps = iter(range(100))

        def train() -> None:
            for _ in range(STEPS):
                train_step(engine, share(setup, next(steps), micro_batches))

        if past:
            train()  # moments that the child takes over
        block = {"mode": "ChildTuning-D", "reserve_p": P, "optimizer_state": optimizer_state, "clip": clip}
        child = ds_childtune.attach(engine, block)
        start = master_weights(engine)
        report = child.select(share(setup, 1000, 4))
        names = [p.name for p in report.parameters]
        masks = [{n: child.gather_mask(n) for n in names}]
        train()
        middle, forward = master_weights(engine), [model_weights(engine)]
        state = _zero.base_optimizer(engine).state
        tensors = [v for of in state.values() for v in of.values() if isinstance(v, Tensor) and v.dim() and v.numel()]
        state_numel = sum(v.numel() for v in tensors)
        shards = child._shards
        depth = getattr(child._policy, "depth", "dense")
        child_numel = sum(int(child._policy.mask(s.tensor, f).sum()) for s in shards for f in s.fragments)
        flat_state = sum(bool(state.get(s.tensor)) for s in shards)
        second: list[Weights] = []
        if end == "reselect":
            child.select(share(setup, 2000, 4))
            second = [{n: child.gather_mask(n) for n in names}]
        else:
            child.detach()
        train()
        forward.append(model_weights(engine))
        return Run(
            depth, start, middle, master_weights(engine), forward, masks, second, state_numel, child_numel, flat_state
        )


BASE = Setup(accumulation=2, clip=0.5, schedule=True)
CASES = {
    "zero0": replace(BASE, stage=0),
    "zero0-bf16": replace(BASE, stage=0, bf16=True),
    "zero1-sgd": replace(BASE, stage=1, optimizer=SGD),
    "zero1-bf16-fp32-accumulation": replace(BASE, stage=1, bf16=True, fp32_accumulation=True, no_decay=("ln", "bias")),
    "zero2-llama": replace(BASE, stage=2, family="llama"),
    "zero2-offload-cpuadam": replace(BASE, stage=2, offload=True, optimizer=FUSED),
    "zero3-odd": replace(BASE, stage=3, family="odd"),
    "zero3-sub-groups": replace(BASE, stage=3, sub_group_size=700, no_decay=("bias",)),
    "zero3-bf16-fused": replace(BASE, stage=3, bf16=True, optimizer=FUSED),
    "zero3-bf16-zero-init": replace(
        BASE, stage=3, bf16=True, zero_init=True, persistence_threshold=50, sub_group_size=900
    ),
    "zero3-offload-cpuadam": replace(BASE, stage=3, offload=True, optimizer=FUSED),
    "zero3-t5-sgd": replace(BASE, stage=3, family="t5", optimizer=SGD),
}


DEEP = {
    "fp32": replace(BASE, stage=3, clip=0.0),
    "odd": replace(BASE, stage=3, clip=0.0, family="odd", persistence_threshold=8, sub_group_size=20),
    "sub-groups": replace(BASE, stage=3, clip=0.0, sub_group_size=700, no_decay=("bias",)),
    "t5-sgd": replace(BASE, stage=3, clip=0.0, family="t5", optimizer=SGD),
    "llama-adagrad": replace(BASE, stage=3, clip=0.0, family="llama", optimizer=ADAGRAD, sub_group_size=300),
    "bf16-fused": replace(BASE, stage=3, clip=0.0, bf16=True, optimizer=FUSED),
    "bf16-odd-fused": replace(BASE, stage=3, clip=0.0, bf16=True, family="odd", optimizer=FUSED, sub_group_size=20),
    "bf16-zero-init": replace(
        BASE, stage=3, clip=0.0, bf16=True, zero_init=True, persistence_threshold=50, sub_group_size=900
    ),
    "zero1-bf16-groups": replace(BASE, stage=1, bf16=True, no_decay=("ln", "bias")),
    "zero2-bf16-odd": replace(BASE, stage=2, bf16=True, family="odd"),
    "zero2-t5-sgd": replace(BASE, stage=2, family="t5", optimizer=SGD),
    "bf16-fp32-accumulation": replace(BASE, stage=3, clip=0.0, bf16=True, fp32_accumulation=True, sub_group_size=900),
}


@pytest.mark.parametrize("end", ["reselect", "detach"])
@pytest.mark.parametrize("name", DEEP)
def test_deep_is_bitwise_the_dense_hook_path(pool: RankPool, name: str, end: str) -> None:
    """In bf16 from the start of training, as masters outside a deep child are let go."""
    setup = DEEP[name]
    dense = pool[2].run(run, setup, "dense", end, past=not setup.bf16)
    deep = pool[2].run(run, setup, "compact", end, past=not setup.bf16)
    for a, b in zip(dense, deep, strict=True):
        assert (a.depth, b.depth) == ("dense", "deep")
        for after, (expected, got) in enumerate(zip(a.forward, b.forward, strict=True)):
            for n in expected:
                if setup.optimizer is FUSED:
                    torch.testing.assert_close(got[n].float(), expected[n].float(), rtol=1e-2, atol=1e-4)
                else:
                    assert torch.equal(got[n], expected[n]), (after, n)
        moved = torch.cat([(b.middle[n] != b.start[n])[m] for n, m in b.masks[0].items()])
        assert moved.float().mean() > 0.5, "vacuous: the child rests"
        for n, mask in b.masks[0].items():
            assert torch.equal(mask, a.masks[0][n])
            assert not ((b.middle[n] != b.start[n]) & ~mask).any()
            if setup.optimizer is not FUSED:
                assert torch.equal(a.middle[n][mask], b.middle[n][mask])
        moments = 1 if setup.optimizer in (SGD, ADAGRAD) else 2
        assert b.state_numel == moments * b.child_numel < a.state_numel
        assert b.flat_state == 0


@pytest.mark.parametrize("end", ["reselect", "detach"])
@pytest.mark.parametrize("name", CASES)
def test_compact_is_bitwise_the_dense_hook_path(pool: RankPool, name: str, end: str) -> None:
    dense = pool[2].run(run, CASES[name], "dense", end)
    compact = pool[2].run(run, CASES[name], "compact", end)
    for a, b in zip(dense, compact, strict=True):
        for n, mask in a.masks[0].items():
            assert torch.equal(mask, b.masks[0][n])
            for after in ("middle", "end"):
                expected, got = getattr(a, after)[n], getattr(b, after)[n]
                if CASES[name].optimizer is FUSED:
                    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
                else:
                    assert torch.equal(got, expected), (after, n)
        moved = torch.cat([(b.middle[n] != b.start[n])[m] for n, m in b.masks[0].items()])
        assert moved.float().mean() > 0.5, "vacuous: the child rests"
        assert not any(((b.middle[n] != b.start[n]) & ~m).any() for n, m in b.masks[0].items())
        if end == "reselect":
            differing = sum(int((m != b.masks[0][n]).sum()) for n, m in b.second_masks[0].items())
            assert differing, "vacuous: the same child again"


@pytest.mark.parametrize("name", CASES)
def test_moments_exist_for_the_child_alone(pool: RankPool, name: str) -> None:
    moments = 1 if CASES[name].optimizer is SGD else 2
    for result in pool[2].run(run, CASES[name], "compact", "reselect"):
        assert result.state_numel == moments * result.child_numel
        assert result.flat_state == 0
    for result in pool[2].run(run, CASES[name], "dense", "reselect"):
        assert result.state_numel > moments * result.child_numel, "vacuous"


@pytest.mark.parametrize(("depth", "clip"), [("deep", None), ("wrap", "dense")])
def test_low_precision_masters_lose_nothing(pool: RankPool, depth: str, clip: str | None) -> None:
    """The child keeps fp32 masters of its own, across selections too, and outside it a 16-bit weight is all there is."""
    setup = DEEP["bf16-zero-init"]
    fp32 = pool[2].run(run, setup, "compact", "reselect", past=False, clip=clip)
    bf16 = pool[2].run(run, replace(setup, bf16_masters=True), "compact", "reselect", past=False, clip=clip)
    for a, b in zip(fp32, bf16, strict=True):
        assert (a.depth, b.depth) == (depth, depth)
        for expected, got in zip(a.forward, b.forward, strict=True):
            assert all(torch.equal(expected[n], got[n]) for n in expected)
        assert any((a.middle[n] != b.middle[n]).any() for n in a.middle), "vacuous: nothing was rounded"
        assert b.state_numel == a.state_numel


def aliases(setup: Setup) -> list[list[bool]]:
    """Whether each flat shard lies where its parameters do: plain, attached, with a child, training, detached, training."""
    with engine_of(setup) as engine:
        seen: list[list[bool]] = []

        def note() -> None:
            optimizer = engine.optimizer
            pairs = zip(flats, optimizer.fp16_partitioned_groups_flat, strict=True)
            seen.append([flat.data_ptr() == lp.data_ptr() and flat.dtype == lp.dtype for flat, lp in pairs])

        flats = list(engine.optimizer.fp32_partitioned_groups_flat)
        train_step(engine, share(setup, 2, 4))
        note()
        child = ds_childtune.attach(engine, {"mode": "ChildTuning-D", "reserve_p": P, "optimizer_state": "compact"})
        note()
        child.select(share(setup, 1000, 4))
        note()
        train_step(engine, share(setup, 0, 4))
        note()
        child.detach()
        note()
        assert all(a is b for a, b in zip(flats, engine.optimizer.fp32_partitioned_groups_flat, strict=True))
        train_step(engine, share(setup, 1, 4))
        note()
    return seen


@pytest.mark.parametrize("name", ["fp32", "bf16", "bf16-masters"])
def test_a_deep_child_keeps_no_second_copy_of_the_parameters(pool: RankPool, name: str) -> None:
    setup = replace(DEEP["sub-groups"], bf16=name != "fp32", bf16_masters=name == "bf16-masters")
    for plain, attached, chosen, trained, detached, after in pool[2].run(aliases, setup):
        assert len(plain) > 2
        assert all(chosen)
        assert all(trained)
        assert all(attached) == (name != "bf16")
        assert not any([*plain, *detached, *after])
