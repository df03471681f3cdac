"""`optimizer_state: "compact"` against the dense hook path, bit for bit, and what it stores.

DeepSpeed's own Adam kernels round elements in a vector's tail otherwise than those in its body, and decay in another order than the
dense path's separate decay, so there the two paths agree to the last bits only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ds_childtune
from ds_childtune.child import child_shard as child_shards
from ds_childtune.zero.engine import base_optimizer
from tests.support.engines import Optimizer, Setup, Weights, engine_of, master_weights, model_weights, train_step
from tests.support.models import batches, deal
from tests.support.ranks import RankPool

P, STEPS = 0.3, 3
SGD = Optimizer("SGD", {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1})
ADAGRAD = Optimizer("Adagrad", {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1})
FUSED = Optimizer("AdamW", {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1})


@dataclass(frozen=True)
class Case:
    setup: Setup
    depth: str
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
    depth: str
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

        def train() -> None:
            for _ in range(STEPS):
                train_step(engine, share(setup, next(steps), setup.accumulation * dist.get_world_size()))

        if case.past:
            train()
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
                shards, depth = child._shards, getattr(child._policy, "depth", "dense")
                child_numel = sum(int(child._policy.mask(s.tensor, f).sum()) for s in shards for f in s.fragments)
                flat_state = sum(bool(state.get(s.tensor)) for s in shards)
        child.detach()
        if case.after:
            train()
        phases.append(Phase(master_weights(engine), model_weights(engine), {}))
        return Run(depth, start, phases, state_numel, child_numel, flat_state)


CLIPPED = Setup(accumulation=2, clip=0.5, schedule=True)
BASE = replace(CLIPPED, clip=0.0)
FROM_START = Case(Setup(), "deep", past=False, reselect=False)
"""Of a deep child in bf16, which lets go of what masters outside it hold beyond their 16-bit weights."""

CASES = {
    "zero0": Case(replace(CLIPPED, stage=0), "wrap"),
    "zero0-bf16": Case(replace(CLIPPED, stage=0, bf16=True), "wrap"),
    "zero1-sgd": Case(replace(CLIPPED, stage=1, optimizer=SGD), "deep"),
    "zero1-bf16-groups": replace(FROM_START, setup=replace(CLIPPED, stage=1, bf16=True, no_decay=("ln", "bias"))),
    "zero1-bf16-fp32-accumulation": Case(replace(CLIPPED, stage=1, bf16=True, fp32_accumulation=True), "wrap"),
    "zero1-round-robin": Case(replace(CLIPPED, stage=1, round_robin=True, no_decay=("ln", "bias")), "deep"),
    "zero2-bf16-round-robin": replace(FROM_START, setup=replace(CLIPPED, stage=2, bf16=True, round_robin=True)),
    "zero2-offload-round-robin": Case(replace(CLIPPED, stage=2, offload=True, round_robin=True), "wrap"),
    "zero2-llama": Case(replace(CLIPPED, stage=2, family="llama"), "deep"),
    "zero2-t5-sgd": Case(replace(CLIPPED, stage=2, family="t5", optimizer=SGD), "deep"),
    "zero2-bf16-odd": replace(FROM_START, setup=replace(CLIPPED, stage=2, bf16=True, family="odd")),
    "zero2-offload-cpuadam": Case(replace(CLIPPED, stage=2, offload=True, optimizer=FUSED), "wrap"),
    "zero3-clipped-odd": Case(replace(CLIPPED, stage=3, family="odd"), "wrap"),
    "zero3-clipped-bf16": Case(
        replace(CLIPPED, stage=3, bf16=True, zero_init=True, persistence_threshold=50, sub_group_size=900), "wrap"
    ),
    "zero3-offload-cpuadam": Case(replace(CLIPPED, stage=3, offload=True, optimizer=FUSED), "wrap"),
    "zero3-odd": Case(replace(BASE, stage=3, family="odd", persistence_threshold=8, sub_group_size=20), "deep"),
    "zero3-sub-groups": Case(replace(BASE, stage=3, sub_group_size=700, no_decay=("bias",)), "deep"),
    "zero3-t5-sgd": Case(replace(BASE, stage=3, family="t5", optimizer=SGD), "deep"),
    "zero3-llama-adagrad": Case(replace(BASE, stage=3, family="llama", optimizer=ADAGRAD, sub_group_size=300), "deep"),
    "zero3-bf16-odd-fused": replace(
        FROM_START, setup=replace(BASE, stage=3, bf16=True, family="odd", optimizer=FUSED, sub_group_size=20)
    ),
    "zero3-bf16-fp32-accumulation": replace(
        FROM_START, setup=replace(BASE, stage=3, bf16=True, fp32_accumulation=True, sub_group_size=900)
    ),
    "zero3-bf16-zero-init": Case(
        replace(BASE, stage=3, bf16=True, zero_init=True, persistence_threshold=50, sub_group_size=900),
        "deep",
        past=False,
        after=False,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_compact_is_bitwise_the_dense_hook_path(pool: RankPool, name: str) -> None:
    case = CASES[name]
    check(case, pool[2].run(run, case, "dense"), pool[2].run(run, case, "compact"))


@pytest.mark.parametrize("world_size", [1, 4])
def test_other_world_sizes(pool: RankPool, world_size: int) -> None:
    """At 4 ranks most of them hold nothing of a parameter, and some nothing of a sub-group's child."""
    case = CASES["zero3-odd"]
    check(case, pool[world_size].run(run, case, "dense"), pool[world_size].run(run, case, "compact"))


def check(case: Case, dense: list[Run], compact: list[Run]) -> None:
    fused = case.setup.optimizer is FUSED

    def same(expected: Tensor, got: Tensor) -> bool:
        rtol, atol = (1e-2, 1e-4) if got.dtype == torch.bfloat16 else (1e-4, 1e-5)
        return torch.allclose(got, expected, rtol, atol) if fused else torch.equal(got, expected)

    for a, b in zip(dense, compact, strict=True):
        assert (a.depth, b.depth) == ("dense", case.depth)
        for number, (expected, got) in enumerate(zip(a.phases, b.phases, strict=True)):
            differing = [n for n, w in expected.forward.items() if not same(w, got.forward[n])]
            assert differing == [], number
            for n, mask in expected.masks.items():
                assert torch.equal(mask, got.masks[n])
                assert same(expected.masters[n][mask], got.masters[n][mask]), (number, n)
            if not (case.setup.bf16 and case.depth == "deep"):
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


@pytest.mark.parametrize(("depth", "clip"), [("deep", None), ("wrap", "dense")])
def test_low_precision_masters_lose_nothing(pool: RankPool, depth: str, clip: str | None) -> None:
    """The child keeps fp32 masters of its own, across selections too, and outside it a 16-bit weight is all there is."""
    case = CASES["zero3-bf16-zero-init"]
    fp32 = pool[2].run(run, case, "compact", clip)
    bf16 = pool[2].run(run, replace(case, setup=replace(case.setup, bf16_masters=True)), "compact", clip)
    for a, b in zip(fp32, bf16, strict=True):
        assert (a.depth, b.depth) == (depth, depth)
        for expected, got in zip(a.phases, b.phases, strict=True):
            assert all(torch.equal(w, got.forward[n]) for n, w in expected.forward.items())
        rounded = b.phases[0].masters
        assert any((w != rounded[n]).any() for n, w in a.phases[0].masters.items()), "vacuous: nothing was rounded"
        assert b.state_numel == a.state_numel


def run_wide(case: Case, optimizer_state: str) -> Run:
    """As if flat shards of more than 20 elements had 2**31 of them, and were looked through in several tiles."""
    narrow, tile = child_shards.INT32_NUMEL, child_shards._NONZERO_TILE
    child_shards.INT32_NUMEL, child_shards._NONZERO_TILE = 20, 7
    made: set[torch.dtype] = set()
    of = child_shards.ChildShard.of
    child_shards.ChildShard.of = lambda *arguments: [shard := of(*arguments), made.add(shard.index.dtype)][0]
    try:
        result = run(case, optimizer_state)
    finally:
        child_shards.ChildShard.of = of
        child_shards.INT32_NUMEL, child_shards._NONZERO_TILE = narrow, tile
    assert torch.int64 in made, "vacuous"
    return result


@pytest.mark.parametrize("name", ["zero0", "zero2-llama", "zero3-odd"])
def test_flat_shards_of_more_elements_than_int32_counts(pool: RankPool, name: str) -> None:
    case = CASES[name]
    check(case, pool[2].run(run, case, "dense"), pool[2].run(run_wide, case, "compact"))


def saved_wide(setup: Setup, folder: str, wide: bool, loads: bool) -> tuple[Weights, Weights]:
    """Save, or load, with indices of int64 or of int32."""
    narrow = child_shards.INT32_NUMEL
    child_shards.INT32_NUMEL = 50 if wide else narrow
    try:
        with engine_of(setup) as engine:
            child = ds_childtune.attach(
                engine, {"mode": "ChildTuning-D", "reserve_p": P, "optimizer_state": "compact", "selector": "random"}
            )
            if loads:
                engine.load_checkpoint(folder)
            else:
                child.select()
                train_step(engine, share(setup, 0, 2))
                engine.save_checkpoint(folder)
            assert {s.index.dtype for s in child._policy.shards.values()} == {torch.int64 if wide else torch.int32}
            masks = {p.name: child.gather_mask(p.name) for p in child.report().parameters}
            return master_weights(engine), masks
    finally:
        child_shards.INT32_NUMEL = narrow


@pytest.mark.parametrize("wide", [False, True])
def test_a_checkpoint_of_long_flat_shards_is_loaded_into_short_ones(pool: RankPool, wide: bool, tmp_path: Path) -> None:
    saved = pool[2].run(saved_wide, Setup(stage=2), str(tmp_path), wide, False)[0]
    loaded = pool[2].run(saved_wide, Setup(stage=3), str(tmp_path), not wide, True)[0]
    for before, after in zip(saved, loaded, strict=True):
        assert all(torch.equal(after[name], value) for name, value in before.items())


def aliases(setup: Setup) -> list[list[bool]]:
    """Whether each flat shard lies where its parameters do: plain, attached, with a child, training, detached, training."""
    with engine_of(setup) as engine:
        seen: list[list[bool]] = []
        optimizer = engine.optimizer

        def flats() -> list[Tensor]:
            return list(getattr(optimizer, "fp32_partitioned_groups_flat" if setup.stage == 3 else ZERO_TWO))

        def note() -> None:
            if setup.stage == 3:
                lps = optimizer.fp16_partitioned_groups_flat
            else:
                lps = [partitions[dist.get_rank()] for partitions in optimizer.parallel_partitioned_bit16_groups]
                mappings = [p._hp_mapping for p in engine.module.parameters() if getattr(p, "_hp_mapping", None)]
                storages = {flat.untyped_storage().data_ptr() for flat in first}
                assert {m.hp_fragment.untyped_storage().data_ptr() for m in mappings} <= storages, (
                    "it keeps an old one alive"
                )
            seen.append(
                [f.data_ptr() == lp.data_ptr() and f.dtype == lp.dtype for f, lp in zip(first, lps, strict=True)]
            )

        first = flats()
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
        assert all(a is b for a, b in zip(first, flats(), strict=True))
        train_step(engine, share(setup, 1, 4))
        note()
    return seen


ZERO_TWO = "single_partition_of_fp32_groups"


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("name", ["fp32", "bf16", "bf16-masters"])
def test_a_deep_child_keeps_no_second_copy_of_the_parameters(pool: RankPool, name: str, stage: int) -> None:
    setup = replace(
        CASES["zero3-sub-groups"].setup, stage=stage, bf16=name != "fp32", bf16_masters=name == "bf16-masters"
    )
    for plain, attached, chosen, trained, detached, after in pool[2].run(aliases, setup):
        assert len(plain) > (2 if stage == 3 else 1)
        assert all(chosen)
        assert all(trained)
        assert all(attached) == (name != "bf16")
        assert not any([*plain, *detached, *after])


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
        name = sorted(child._eligible)[-1]
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


@pytest.mark.parametrize("first", ["empty", "full"])
def test_no_kernel_for_many_tensors_is_handed_an_empty_one(pool: RankPool, first: str) -> None:
    """And its step counter goes on meanwhile: as in the dense path with another child later, and as plain DeepSpeed."""
    dense = pool[2].run(without_elements, "dense", first)
    compact = pool[2].run(without_elements, "compact", first)
    for (expected, kept, _), (phases, same, numels) in zip(dense, compact, strict=True):
        assert kept == same
        assert (min(kept), max(kept) > 10) == (0, True), "vacuous: the last parameter is never outside, or never inside"
        assert min(numels) > 0
        for number, weights in enumerate(expected):
            assert all(torch.allclose(phases[number][n], w, 1e-4, 1e-5) for n, w in weights.items()), number
