"""The same run with dense and with compact optimizer state, which must be equal bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import ds_childtune
from ds_childtune.zero.engine import base_optimizer
from tests.support.engines import Optimizer, Setup, Weights, engine_of, master_weights, model_weights, train_step
from tests.support.models import batches, deal

P, STEPS = 0.3, 2

SGD = Optimizer("SGD", {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1})

ADAGRAD = Optimizer("Adagrad", {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1})

FUSED = Optimizer("AdamW", {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1})


@dataclass(frozen=True)
class Case:
    setup: Setup
    masters: bool
    """Whether masters are compact, too, and at ZeRO-3 gradients; otherwise moments only."""
    past: bool = True
    """Train dense first, so that there are moments to take over."""
    reselect: bool = True
    """Choose another child in between."""
    after: bool = True
    """Train on as plain DeepSpeed at the end."""


@dataclass(frozen=True)
class Phase:
    """What one rank saw after some steps."""

    masters: Weights
    forward: Weights
    masks: Weights
    """None are left at the end."""


@dataclass(frozen=True)
class Run:
    parts: str
    start: Weights
    phases: list[Phase]
    state_numel: int
    """Elements of all moments on this rank, with the first child."""
    child_numel: int
    """Elements of that child on this rank, dense parameters included."""
    flat_state: int
    """Flat shards for which the base optimizer holds state."""


def share(setup: Setup, seed: int, count: int) -> list[Any]:
    return deal(batches(setup.family, count, seed=seed), dist.get_rank(), dist.get_world_size())


def run(case: Case, optimizer_state: str, clip: str | None = None) -> Run:
    """Train dense, then a child, then another one, then as plain DeepSpeed, as far as the case says so."""
    setup = case.setup
    torch.manual_seed(0)
    with engine_of(setup) as engine:
        steps = iter(range(100))

        def train(count: int = STEPS) -> None:
            for _ in range(count):
                train_step(engine, share(setup, next(steps), setup.accumulation * dist.get_world_size()))

        if case.past:
            train(1)
        block = {"mode": "ChildTuning-D", "reserve_p": P, "optimizer_state": optimizer_state, "clip": clip}
        child = ds_childtune.attach(engine, block)
        start, phases = master_weights(engine), []
        state = base_optimizer(engine).state
        for number in range(1 + case.reselect):
            names = [p.name for p in child.select(share(setup, 1000 + number, 4)).parameters]
            train()
            masks = {n: child.gather_mask(n) for n in names}
            phases.append(Phase(master_weights(engine), model_weights(engine), masks))
            if number == 0:
                tensors = [v for of in state.values() for v in of.values() if isinstance(v, Tensor) and v.dim()]
                state_numel = sum(v.numel() for v in tensors)
                shards, parts = child.attachment.shards, getattr(child._hooks.child, "parts", "dense")
                child_numel = sum(
                    int(child._hooks.child.child_mask(s, f, 0).sum()) for s in shards for f in s.fragments
                )
                flat_state = sum(bool(state.get(s.tensor)) for s in shards)
        child.detach()
        if case.after:
            train(1)
        phases.append(Phase(master_weights(engine), model_weights(engine), {}))
        return Run(parts, start, phases, state_numel, child_numel, flat_state)


def parts_of(setup: Setup, *, masters: bool, clip: str | None = None) -> str:
    """What is compact, where masters are, or are not; `clip` as in the child's config."""
    if not masters:
        return "moments"
    sends = setup.stage == 3 or clip == "child" or not setup.clip
    return "moments, masters and gradients" if sends else "moments and masters"


CLIPPED = Setup(accumulation=2, clip=0.5, schedule=True)

BASE = replace(CLIPPED, clip=0.0)

FROM_START = Case(Setup(), True, past=False, reselect=False)
"""In bf16 compact masters lose what masters outside the child hold beyond their 16-bit weights."""

CASES = {
    "zero0": Case(replace(CLIPPED, stage=0), False),
    "zero0-bf16": Case(replace(CLIPPED, stage=0, bf16=True), False),
    "zero1-sgd": Case(replace(CLIPPED, stage=1, optimizer=SGD), True),
    "zero1-bf16-groups": replace(FROM_START, setup=replace(CLIPPED, stage=1, bf16=True, no_decay=("ln", "bias"))),
    "zero1-bf16-fp32-accumulation": Case(replace(CLIPPED, stage=1, bf16=True, fp32_accumulation=True), False),
    "zero1-round-robin": Case(replace(CLIPPED, stage=1, round_robin=True, no_decay=("ln", "bias")), True),
    "zero2-bf16-round-robin": replace(FROM_START, setup=replace(CLIPPED, stage=2, bf16=True, round_robin=True)),
    "zero2-offload-round-robin": Case(replace(CLIPPED, stage=2, offload=True, round_robin=True), False),
    "zero2-llama": Case(replace(CLIPPED, stage=2, family="llama"), True),
    "zero2-t5-sgd": Case(replace(CLIPPED, stage=2, family="t5", optimizer=SGD), True),
    "zero2-bf16-odd": replace(FROM_START, setup=replace(CLIPPED, stage=2, bf16=True, family="odd")),
    "zero2-offload-cpuadam": Case(replace(CLIPPED, stage=2, offload=True, optimizer=FUSED), False),
    "zero3-clipped-odd": Case(replace(CLIPPED, stage=3, family="odd"), False),
    "zero3-clipped-bf16": Case(
        replace(CLIPPED, stage=3, bf16=True, zero_init=True, persistence_threshold=50, sub_group_size=450), False
    ),
    "zero3-offload-cpuadam": Case(replace(CLIPPED, stage=3, offload=True, optimizer=FUSED), False),
    "zero3-odd": Case(replace(BASE, stage=3, family="odd", persistence_threshold=8, sub_group_size=20), True),
    "zero3-sub-groups": Case(replace(BASE, stage=3, sub_group_size=350, no_decay=("bias",)), True),
    "zero3-t5-sgd": Case(replace(BASE, stage=3, family="t5", optimizer=SGD), True),
    "zero3-llama-adagrad": Case(replace(BASE, stage=3, family="llama", optimizer=ADAGRAD, sub_group_size=150), True),
    "zero3-bf16-odd-fused": replace(
        FROM_START, setup=replace(BASE, stage=3, bf16=True, family="odd", optimizer=FUSED, sub_group_size=20)
    ),
    "zero3-bf16-fp32-accumulation": replace(
        FROM_START, setup=replace(BASE, stage=3, bf16=True, fp32_accumulation=True, sub_group_size=450)
    ),
    "zero3-bf16-zero-init": Case(
        replace(BASE, stage=3, bf16=True, zero_init=True, persistence_threshold=50, sub_group_size=450),
        True,
        past=False,
        after=False,
    ),
}


def check(case: Case, dense: list[Run], compact: list[Run], *, bitwise: bool = True) -> None:
    """`bitwise`: False where sums of more than two ranks are added in another order."""
    about = case.setup.optimizer is FUSED or not bitwise

    def same(expected: Tensor, got: Tensor) -> bool:
        rtol, atol = (1e-2, 1e-4) if got.dtype == torch.bfloat16 else (1e-4, 1e-5)
        return torch.allclose(got, expected, rtol, atol) if about else torch.equal(got, expected)

    for a, b in zip(dense, compact, strict=True):
        assert (a.parts, b.parts) == ("dense", parts_of(case.setup, masters=case.masters))
        for number, (expected, got) in enumerate(zip(a.phases, b.phases, strict=True)):
            differing = [n for n, w in expected.forward.items() if not same(w, got.forward[n])]
            assert differing == [], number
            for n, mask in expected.masks.items():
                assert torch.equal(mask, got.masks[n])
                assert same(expected.masters[n][mask], got.masters[n][mask]), (number, n)
            if not (case.setup.bf16 and case.masters):
                assert all(same(w, got.masters[n]) for n, w in expected.masters.items()), number
        first = b.phases[0]
        moved = {n: w != b.start[n] for n, w in first.masters.items()}
        inside = torch.cat([moved[n][mask] for n, mask in first.masks.items()])
        assert inside.float().mean() > 0.5, "vacuous: the child rests"
        assert not any((moved[n] & ~mask).any() for n, mask in first.masks.items())
        if case.reselect:
            differing = [n for n, mask in first.masks.items() if not torch.equal(mask, b.phases[1].masks[n])]
            assert differing, "vacuous: the same child again"
    moments = 1 if case.setup.optimizer in (SGD, ADAGRAD) else 2
    assert all(b.state_numel == moments * b.child_numel and not b.flat_state for b in compact)
    assert sum(a.state_numel for a in dense) > sum(b.state_numel for b in compact), "vacuous"


def without_elements(optimizer_state: str, first: str) -> tuple[list[Weights], list[int], list[int]]:
    """Weights after each of three phases, elements of the last parameter's child, and sizes of what the optimizer was handed.

    Args:
        first: "empty", a child without an element of the last parameter comes first, or "full".
    """
    torch.manual_seed(0)
    setup = Setup(stage=0, optimizer=FUSED)
    with engine_of(setup) as engine:
        block = {"mode": "ChildTuning-D", "reserve_p": P, "optimizer_state": optimizer_state, "selector": "magnitude"}
        child = ds_childtune.attach(engine, block)
        name = sorted(child.attachment.eligible)[-1]
        last = engine.module.get_parameter(name)
        base = base_optimizer(engine)
        base.param_groups[0]["params"].sort(key=lambda p: p is last)
        numels: list[int] = []
        phases, kept, steps = [], [], iter(range(100))
        for number, scale in enumerate((0.0, 1.0) if first == "empty" else (1.0, 0.0)):
            with torch.no_grad():
                last.copy_(scale * torch.linspace(1, 2, last.numel()).view(last.shape))
            child.select()
            if not number:
                spy = base.register_step_pre_hook(
                    lambda o, *_: numels.extend(p.numel() for g in o.param_groups for p in g["params"])
                )
            kept.append(int(child.gather_mask(name).sum()))
            for _ in range(STEPS):
                train_step(engine, share(setup, next(steps), 2))
            phases.append(model_weights(engine))
        spy.remove()
        child.detach()
        for _ in range(STEPS):
            train_step(engine, share(setup, next(steps), 2))
        return [*phases, model_weights(engine)], kept, numels
