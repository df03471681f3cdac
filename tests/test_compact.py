"""`optimizer_state: "compact"` against the dense hook path, bit for bit, and what it stores.

DeepSpeed's own Adam kernels round elements in a vector's tail in another way than those in its body, and decay in another order than
the dense path's separate decay, so there the two paths agree only to the last bits.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ds_childtune
from ds_childtune.child import child_shard as child_shards
from tests.support.compact_runs import CASES, Case, P, Run, check, parts_of, run, share, without_elements
from tests.support.engines import Setup, Weights, engine_of, master_weights, model_weights, train_step
from tests.support.ranks import RankPool


@pytest.mark.parametrize("name", CASES)
def test_compact_is_bitwise_the_dense_hook_path(pool: RankPool, name: str) -> None:
    case = CASES[name]
    check(case, pool[2].run(run, case, "dense"), pool[2].run(run, case, "compact"))


@pytest.mark.parametrize("world_size", [1, 4])
def test_other_world_sizes(pool: RankPool, world_size: int) -> None:
    """At 4 ranks most of them hold nothing of a parameter, and some nothing of a sub-group's child.

    In which order a collective adds four ranks depends on where an element lies in the bucket: equal to the last bits.
    """
    case = CASES["zero3-odd"]
    dense, compact = (pool[world_size].run(run, case, state) for state in ("dense", "compact"))
    check(case, dense, compact, bitwise=world_size <= 2)


@pytest.mark.parametrize("clip", [None, "dense"], ids=["compact masters", "compact moments"])
def test_low_precision_masters_lose_nothing(pool: RankPool, clip: str | None) -> None:
    """The child keeps its own fp32 masters, across selections too, and outside it a 16-bit weight is all there is."""
    case = CASES["zero3-bf16-zero-init"]
    fp32 = pool[2].run(run, case, "compact", clip)
    bf16 = pool[2].run(run, replace(case, setup=replace(case.setup, bf16_masters=True)), "compact", clip)
    for a, b in zip(fp32, bf16, strict=True):
        assert a.parts == b.parts == parts_of(case.setup, masters=clip is None)
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
            assert {s.index.dtype for s in child._hooks.child.shards.values()} == {torch.int64 if wide else torch.int32}
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
def test_with_compact_masters_there_is_no_second_copy_of_the_parameters(pool: RankPool, name: str, stage: int) -> None:
    setup = replace(
        CASES["zero3-sub-groups"].setup, stage=stage, bf16=name != "fp32", bf16_masters=name == "bf16-masters"
    )
    for plain, attached, chosen, trained, detached, after in pool[2].run(aliases, setup):
        assert len(plain) > (2 if stage == 3 else 1)
        assert all(chosen)
        assert all(trained)
        assert all(attached) == (name != "bf16")
        assert not any([*plain, *detached, *after])


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


def half_a_backward_pass(setup: Setup, clear: str, *, breaks: bool) -> tuple[Weights, str]:
    """Weights of a run in which an exception may end a backward pass half-way, and what the next one says before `clear`."""
    said = ""
    with engine_of(setup) as engine:
        block = {"mode": "ChildTuning-D", "reserve_p": P, "optimizer_state": "compact", "selector": "magnitude"}
        ds_childtune.attach(engine, block).select()
        for step in range(3):
            if breaks and step == 1:
                said = _broken(engine, setup, "short of memory")
                if setup.stage > 1:
                    said = _broken(engine, setup, None)
                (engine if clear == "engine" else engine.optimizer).zero_grad()
            train_step(engine, share(setup, step, 2 * setup.accumulation))
        return model_weights(engine), said


def _broken(engine: Any, setup: Setup, words: str | None) -> str:
    """What a backward pass raises; with `words`, a hook in the middle of it does."""

    def end(_: Tensor) -> None:
        raise RuntimeError(words)

    handles = []
    if words is not None:
        handles.append(engine.module.get_parameter("transformer.h.0.mlp.c_proj.bias").register_hook(end))
    with pytest.raises(RuntimeError) as error:
        train_step(engine, share(setup, 9, 2))
    for handle in handles:
        handle.remove()
    return str(error.value)


@pytest.mark.parametrize(
    ("stage", "clear", "words"),
    [
        (1, "engine", "short of memory"),  # as in DeepSpeed without a child
        (2, "engine", "call engine.zero_grad()"),  # where it cannot go on
        (3, "optimizer", "engine.optimizer.zero_grad()"),
    ],
)
def test_half_a_backward_pass_leaves_nothing(pool: RankPool, stage: int, clear: str, words: str) -> None:
    setup = Setup("gpt2", stage=stage, accumulation=2)
    whole = pool[2].run(half_a_backward_pass, setup, clear, breaks=False)
    for (expected, _), (got, said) in zip(
        whole, pool[2].run(half_a_backward_pass, setup, clear, breaks=True), strict=True
    ):
        assert words in said, said
        assert all(torch.equal(w, got[n]) for n, w in expected.items())
