"""Checkpoints carry the child: N steps, stop, load and N more are 2 N steps, bit for bit."""

from __future__ import annotations

import contextlib
import gc
import pickle
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed import comm

import ds_childtune
from ds_childtune.checkpoint import load, save
from ds_childtune.checkpoint.opened import OpenedCheckpoint
from ds_childtune.zero import checkpoint_write, elastic
from ds_childtune.zero.engine import base_optimizer
from tests.support.bits import equal_bits
from tests.support.blocks import BLOCKS, COMPACT
from tests.support.engines import Setup, Weights, engine_of, master_weights, model_weights, train_step
from tests.support.ranks import RankPool
from tests.support.resuming import ALL_COMPACT, SETUPS, N, check_equal, resumed, share, train, whole

OTHERS = {  # each stage and each precision, once
    "F": ("zero0-bf16", "zero1", "zero2-bf16", "zero3"),
    "D": ("zero1-bf16", "zero2", "zero3-bf16"),
}
CELLS = [
    *((name, "D-compact") for name in SETUPS if name != "zero0-bf16"),
    *((name, mode) for mode, names in OTHERS.items() for name in names),
]


@pytest.mark.parametrize(("name", "mode"), CELLS)
def test_a_resumed_run_is_the_uninterrupted_one(pool: RankPool, name: str, mode: str, tmp_path: Any) -> None:
    expected = pool[2].run(whole, SETUPS[name], BLOCKS[mode], str(tmp_path))
    got = pool[2].run(resumed, SETUPS[name], BLOCKS[mode], str(tmp_path))
    for (end, again), other in zip(expected, got, strict=True):
        check_equal(end, other)
        check_equal(end, again)


def loaded_over_a_child(setup: Setup, folder: str, fails: bool) -> tuple[list[bool], bool, bool]:
    """While DeepSpeed loads: whether masters are views of parameters, no moment is held; and whether training goes on afterwards."""
    with engine_of(setup) as engine:
        child = ds_childtune.attach(engine, COMPACT)
        child.select(share(setup, 1000, 4))
        train(engine, setup, 0, 1)
        engine.save_checkpoint(folder)
        optimizer, load = engine.optimizer, engine.optimizer.load_state_dict
        seen: list[bool] = []

        def look(*args: Any, **kwargs: Any) -> Any:
            if setup.stage == 3:
                lps = optimizer.fp16_partitioned_groups_flat
            else:
                lps = [partitions[dist.get_rank()] for partitions in optimizer.parallel_partitioned_bit16_groups]
            seen.extend(
                s.tensor.data_ptr() == lp.data_ptr() for s, lp in zip(child.attachment.shards, lps, strict=True)
            )
            seen.append(not any(base_optimizer(engine).state.values()))
            if fails:
                raise OSError("the disk is gone")
            return load(*args, **kwargs)

        optimizer.load_state_dict = look
        with pytest.raises(RuntimeError, match="the disk is gone") if fails else contextlib.nullcontext():
            engine.load_checkpoint(folder)
        optimizer.load_state_dict = load
        if fails:
            child.detach()
        before = master_weights(engine)
        train(engine, setup, 1, 3)
        after = master_weights(engine)
        dense = all(s.tensor.dtype == torch.float32 for s in child.attachment.shards)
        return seen, dense, any(not torch.equal(w, after[n]) for n, w in before.items())


@pytest.mark.parametrize("fails", [False, True], ids=["", "fails"])
@pytest.mark.parametrize("stage", [2, 3])
def test_nothing_becomes_dense_while_a_child_is_loaded_over_another(
    pool: RankPool, stage: int, fails: bool, tmp_path: Any
) -> None:
    setup = replace(ALL_COMPACT, stage=stage, bf16=True)
    for seen, dense, moved in pool[2].run(loaded_over_a_child, setup, str(tmp_path), fails):
        assert len(seen) > 1
        assert all(seen)
        assert dense == fails, "a load that fails leaves masters that plain DeepSpeed can train"
        assert moved


def before_a_child_is_chosen(setup: Setup, folder: str) -> tuple[Weights, Weights]:
    """Masters of a run that goes on, and of one that is loaded: trained, attached, saved, chosen, trained."""
    ends = []
    for loads in (False, True):
        torch.manual_seed(dist.get_rank())
        with engine_of(setup) as engine:
            if not loads:
                train(engine, setup, 0, N)
            child = ds_childtune.attach(engine, COMPACT | {"selector": "random"})
            if loads:
                engine.load_checkpoint(folder)
            else:
                engine.save_checkpoint(folder)
            child.select()
            train(engine, setup, N, 2 * N)
            ends.append(master_weights(engine))
    return ends[0], ends[1]


@pytest.mark.parametrize("stage", [1, 3])
def test_saved_with_moments_before_a_child_is_chosen(pool: RankPool, stage: int, tmp_path: Any) -> None:
    """In fp32, where attaching makes masters views of the parameters."""
    for went_on, loaded in pool[2].run(before_a_child_is_chosen, replace(ALL_COMPACT, stage=stage), str(tmp_path)):
        assert equal_bits(went_on, loaded)


def child_before_a_load(folder: str, block: dict[str, Any], stage: int) -> list[bool]:
    """Whether masters and masks of the child that trained before a load are still in memory; of one that trained before `detach`, and
    of one whose engine is destroyed, while that engine is there."""
    alive = []
    setup = replace(ALL_COMPACT, stage=stage)
    with engine_of(setup) as engine:
        child = ds_childtune.attach(engine, block | {"selector": "random"})
        child.select()
        train(engine, setup, 0, 1)
        engine.save_checkpoint(folder)
        for end in (lambda: engine.load_checkpoint(folder), child.detach, lambda: engine.destroy()):
            if len(alive) == 2:
                child = ds_childtune.attach(engine, block | {"selector": "random"})
                child.select()
                train(engine, setup, 0, 1)
            before = [weakref.ref(child._hooks.child)]
            if block is COMPACT:
                before += [weakref.ref(t) for s in child._hooks.child.shards.values() for t in (s.tensor, s.index)]
            end()
            gc.collect()
            alive.append(any(of() is not None for of in before))
    return alive


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_child_that_is_gone_takes_no_memory(pool: RankPool, stage: int, tmp_path: Any) -> None:
    """As with load_best_model_at_end: it is as large as the one that takes its place."""
    for block in (BLOCKS["D"], COMPACT):
        folder = str(tmp_path / block.get("optimizer_state", "dense"))
        assert pool[2].run(child_before_a_load, folder, block, stage) == [[False] * 3] * 2


def saved_twice(folder: str, stage: int) -> list[list[str]]:
    """What is said when a checkpoint is saved after the first of two micro-batches, and after the second."""
    setup = Setup("gpt2", stage=stage, accumulation=2)
    said = []
    with engine_of(setup) as engine:
        ds_childtune.attach(engine, BLOCKS["F"])
        for batch in share(setup, 7, 4)[:2]:
            train_step(engine, [batch])
            with mock.patch.object(save, "tell") as told:
                engine.save_checkpoint(folder)
            said.append([call.args[0] for call in told.call_args_list])
    return said


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_save_between_micro_batches_is_warned_of(pool: RankPool, stage: int, tmp_path: Path) -> None:
    for first, second in pool[2].run(saved_twice, str(tmp_path), stage):
        assert "right after the step that ends an accumulation" in "".join(first)
        assert not second


def only_weights(folder: str) -> tuple[int, int, bool]:
    """Steps of a ChildTuning-F run, and of one that loads its weights without moments; whether the next masks are the same."""
    found, masks = [], []
    setup = Setup("gpt2", stage=2)
    for loads in (False, True):
        with engine_of(setup) as engine:
            child = ds_childtune.attach(engine, {"mode": "ChildTuning-F", "reserve_p": 0.3})
            if loads:
                engine.load_checkpoint(folder, load_optimizer_states=False)
            else:
                train(engine, setup, 0, 3)
                engine.save_checkpoint(folder)
            found.append(child.step)
            masks.append(child.gather_mask("transformer.wte.weight"))
    return found[0], found[1], torch.equal(*masks)


def test_task_free_masks_go_on_after_a_load_of_weights_only(pool: RankPool, tmp_path: Any) -> None:
    """DeepSpeed's count of steps goes on, too: the masks of the first steps do not come again."""
    assert pool[2].run(only_weights, str(tmp_path)) == [(3, 3, True)] * 2


def out_of_memory_on_one_rank(setup: Setup, folder: str, where: str) -> tuple[str, bool]:
    """What each rank is told; and whether it trains and saves afterwards."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise MemoryError("no memory for a copy")

    saves = where == "save"
    with engine_of(setup) as engine:
        child = ds_childtune.attach(engine, BLOCKS["D-compact" if saves else "D"])
        child.select(share(setup, 1000, 4))
        train(engine, setup, 0, 1)
        if not saves:
            engine.save_checkpoint(folder)
        owner, name = {
            "save": (checkpoint_write, "_with_own_storage"),
            "load": (load, "restore_dense"),
            "DeepSpeed's load": (engine.optimizer, "load_state_dict"),
            "load elsewhere": (elastic, "_load_optimizer"),
        }[where]
        broken = mock.patch.object(owner, name, refuse) if dist.get_rank() == 1 else contextlib.nullcontext()
        stack = contextlib.ExitStack()
        if where == "load elsewhere":
            stack.enter_context(mock.patch.object(OpenedCheckpoint, "is_same_shape", return_value=False))
        with stack, broken, pytest.raises(RuntimeError) as error:
            engine.save_checkpoint(folder) if saves else engine.load_checkpoint(folder)
        if not saves:
            engine.load_checkpoint(folder)
        train(engine, setup, 1, 2)
        return str(error.value), bool(engine.save_checkpoint(folder))


@pytest.mark.parametrize("where", ["save", "load", "DeepSpeed's load", "load elsewhere"])
def test_no_rank_waits_for_one_without_memory(pool: RankPool, where: str, tmp_path: Any) -> None:
    for said, saved in pool[2].run(
        out_of_memory_on_one_rank, replace(ALL_COMPACT, persistence_threshold=50), str(tmp_path), where
    ):
        assert "rank 1" in said
        assert "no memory for a copy" in said
        assert saved


def without_frozen(setup: Setup, folder: str, others: bool) -> tuple[Weights, Weights]:
    """Two steps and a checkpoint without frozen weights, or its load in another run. What is trained then, and what is frozen.

    Args:
        others: load, strictly, into a model whose frozen weights are others.
    """
    with engine_of(setup) as engine:
        child = ds_childtune.attach(engine, COMPACT)
        frozen = {n: p for n, p in engine.module.named_parameters() if not p.requires_grad}
        if others:
            parts = list(frozen.values())
            with deepspeed.zero.GatheredParameters(parts, modifier_rank=0, enabled=setup.stage == 3), torch.no_grad():
                for parameter in parts:
                    parameter.add_(1)
            with mock.patch.object(checkpoint_write, "tell") as told:
                path, _ = engine.load_checkpoint(folder)
            assert path is not None
            assert f"{len(frozen)} frozen parameters are not in the checkpoint" in told.call_args[0][0]
        else:
            child.select(share(setup, 1000, 4))
            train(engine, setup, 0, 2)
            engine.save_checkpoint(folder, exclude_frozen_parameters=True)
        return master_weights(engine), {n: w for n, w in model_weights(engine).items() if n in frozen}


@pytest.mark.parametrize(("came", "goes"), [(1, 1), (2, 2), (3, 3), (3, 2)])
def test_a_checkpoint_without_frozen_weights_leaves_those_of_the_model(
    pool: RankPool, came: int, goes: int, tmp_path: Path
) -> None:
    """As PEFT's through the Trainer, which are then loaded strictly."""
    setup = Setup("odd", stage=came)
    saved, base = pool[2].run(without_frozen, setup, str(tmp_path), False)[0]
    for masters, frozen in pool[2].run(without_frozen, replace(setup, stage=goes), str(tmp_path), True):
        assert equal_bits(masters, saved)
        assert equal_bits(frozen, {name: weight + 1 for name, weight in base.items()})
        assert frozen


def load_a_universal(setup: Setup, folder: str) -> tuple[str, str, int]:
    """The same refusal with and without a tag; then the remedy."""
    said = []
    with engine_of(setup, checkpoint={"load_universal": True}) as engine:
        ds_childtune.attach(engine, COMPACT)
        for tag in (None, "two_uni"):
            with pytest.raises(NotImplementedError) as error:
                engine.load_checkpoint(folder, tag)
            said.append(str(error.value))
    with engine_of(setup) as engine:
        child = ds_childtune.attach(engine, COMPACT)
        engine.load_checkpoint(folder)
        return said[0], said[1], child.step


def test_universal_checkpoints_are_refused(pool: RankPool, tmp_path: Path) -> None:
    pool[2].run(save_two, ALL_COMPACT, str(tmp_path))
    for with_latest, with_tag, step in pool[1].run(load_a_universal, replace(ALL_COMPACT, stage=2), str(tmp_path)):
        assert "remove checkpoint.load_universal" in with_latest
        assert with_latest == with_tag
        assert step == 2


# ---------------------------------------------------------------- what ranks see, and what they send


def load_with_a_stale_view(setup: Setup, folder: str, tag: str | None) -> tuple[Weights, int, str | None]:
    """Rank 1's file system shows no tag, no child in it and no `latest` yet, as a network file system's metadata may."""
    with engine_of(setup) as engine:
        child = ds_childtune.attach(engine, COMPACT)
        stale = contextlib.ExitStack()
        if dist.get_rank() == 1:
            for name in ("is_dir", "is_file", "exists"):
                stale.enter_context(mock.patch.object(Path, name, return_value=False))
        with stale:
            path, _ = engine.load_checkpoint(folder, tag)
        return master_weights(engine), child.step, path


def save_two(setup: Setup, folder: str) -> Weights:
    with engine_of(setup) as engine:
        child = ds_childtune.attach(engine, COMPACT)
        child.select(share(setup, 1000, 4))
        train(engine, setup, 0, 2)
        engine.save_checkpoint(folder, "two")
        return master_weights(engine)


def test_rank_0_looks_for_all(pool: RankPool, tmp_path: Path) -> None:
    """Whether there is a checkpoint, which, and whether it has a child; else ranks would meet in different collectives."""
    saved = pool[2].run(save_two, ALL_COMPACT, str(tmp_path))[0]
    for tag in ("two", None):
        for masters, step, path in pool[2].run(load_with_a_stale_view, ALL_COMPACT, str(tmp_path), tag):
            assert equal_bits(masters, saved)
            assert (step, path is None) == (2, False)
    (tmp_path / "latest").unlink()
    for _, step, path in pool[2].run(load_with_a_stale_view, ALL_COMPACT, str(tmp_path), None):
        assert (step, path) == (0, None)


def sizes_of_objects(setup: Setup, folder: str) -> list[int]:
    """Bytes of every object that rank 0 sends to others in a save, an export and a load."""
    sizes: list[int] = []
    gather = dist.all_gather_object

    def sent(values: list[Any], value: Any, *args: Any, **kwargs: Any) -> None:
        sizes.append(len(pickle.dumps(value)))
        gather(values, value, *args, **kwargs)

    with engine_of(setup) as engine:
        child = ds_childtune.attach(engine, COMPACT)
        child.select(share(setup, 1000, 4))
        train(engine, setup, 0, 1)
        with mock.patch.object(comm, "all_gather_object", sent):
            engine.save_checkpoint(folder + "/checkpoint")
            child.export(folder + "/export")
            engine.load_checkpoint(folder + "/checkpoint")
    return sizes


def test_objects_that_ranks_send_have_no_part_in_the_number_of_parameters(pool: RankPool, tmp_path: Path) -> None:
    few = pool[2].run(sizes_of_objects, replace(ALL_COMPACT, family="bert"), str(tmp_path / "bert"))[0]
    many = pool[2].run(sizes_of_objects, replace(ALL_COMPACT, family="t5"), str(tmp_path / "t5"))[0]
    assert len(few) >= 3, "vacuous: nothing was seen"
    assert len(few) == len(many)
    assert all(abs(a - b) < 50 for a, b in zip(few, many, strict=True)), (few, many)
    assert max(many) < 1500
