"""One cell of each kind, at one rank, for `tests/gpu.sh`: not collected with the suite, whose cells these are.

On a CPU everything passes too, except what needs an accelerator, which is skipped.
"""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator

import ds_childtune
from tests.support import compact_runs, exporting, resuming
from tests.support.blocks import BLOCKS
from tests.support.engines import Optimizer, Setup, engine_of, train_step
from tests.support.models import batches
from tests.support.parity import Cell, D, F, check_against_the_oracle
from tests.support.ranks import RankPool
from tests.support.triton_masks import check_triton_s_kernel

ON_CPU = get_accelerator().device_name() == "cpu"
needs_accelerator = pytest.mark.skipif(ON_CPU, reason="needs an accelerator")

FUSED = Optimizer("AdamW", {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1})
"""DeepSpeed's own: FusedAdam, and with offload CPUAdam."""
COMPACT = {"optimizer_state": "compact"}
GLOBAL = {"fisher": {"estimator": "per_global_batch"}}


def parity_cells() -> list[Any]:
    """Weights against the dense oracle: stages x modes x precisions, each value at least once with each mode."""
    cells: list[Any] = []
    for stage in (0, 1, 2, 3):
        plain = Setup("gpt2", stage=stage, accumulation=2, clip=0.5, sub_group_size=350, optimizer=FUSED)
        bf16 = Setup("llama", stage=stage, bf16=True, accumulation=2, sub_group_size=150)
        fp16 = Setup("llama", stage=stage, fp16=True, sub_group_size=150)
        cells += [Cell(F, bf16), Cell(D, plain), Cell(D, bf16, block=COMPACT)]
        cells += [
            pytest.param(Cell(F, fp16), marks=needs_accelerator),
            pytest.param(Cell(D, fp16, block=GLOBAL if stage % 2 else {}), marks=needs_accelerator),
        ]
    cells += [
        Cell(D, Setup("gpt2", stage=2, offload=True, optimizer=FUSED)),
        Cell(F, Setup("llama", stage=3, bf16=True, offload=True, sub_group_size=150, optimizer=FUSED)),
        Cell(F, Setup("llama", stage=3, bf16=True, zero_init=True, persistence_threshold=50)),
        Cell(D, Setup("odd", stage=3, sub_group_size=20), block=COMPACT),
    ]
    for stage in (1, 2, 3):
        # Most weights are larger than this bucket, so that they are reduced where they lie, on the other stream.
        streams = Setup("llama", stage=stage, bf16=True, bucket=50, overlap_comm=True, accumulation=2)
        cells += [Cell(D, streams), Cell(D, streams, block=COMPACT)]
    return [c if not isinstance(c, Cell) else replace(c, world_size=1) for c in cells]


def at_one_rank(cell: Cell) -> Cell:
    return replace(cell, world_size=1)


@pytest.mark.parametrize("cell", parity_cells(), ids=str)
def test_parity_with_the_oracle(pool: RankPool, cell: Cell, record_property: Any) -> None:
    check_against_the_oracle(pool, at_one_rank(cell), record_property)


@pytest.mark.parametrize(
    "name", ["zero0", "zero1-sgd", "zero2-bf16-odd", "zero3-odd", "zero3-bf16-odd-fused", "zero3-offload-cpuadam"]
)
def test_compact_is_the_dense_path(pool: RankPool, name: str) -> None:
    case = compact_runs.CASES[name]
    compact = pool[1].run(compact_runs.run, case, "compact")
    compact_runs.check(case, pool[1].run(compact_runs.run, case, "dense"), compact)


def test_fused_adam_and_empty_child_shards(pool: RankPool) -> None:
    dense, compact = (pool[1].run(compact_runs.without_elements, state, "empty") for state in ("dense", "compact"))
    for (expected, kept, _), (phases, same, numels) in zip(dense, compact, strict=True):
        assert kept == same
        assert (min(kept), min(numels) > 0) == (0, True)
        for number, weights in enumerate(expected):
            assert all(torch.allclose(phases[number][n], w, 1e-4, 1e-5) for n, w in weights.items()), number


@pytest.mark.parametrize(
    ("name", "mode"),
    [("zero1-bf16", "F"), ("zero2", "D"), ("zero3-all-compact-bf16", "D-compact"), ("zero0-bf16", "F")],
)
def test_resume(pool: RankPool, name: str, mode: str, tmp_path: Path) -> None:
    """Bit for bit, random states of the device included."""
    arguments = resuming.SETUPS[name], BLOCKS[mode], str(tmp_path)
    expected = pool[1].run(resuming.whole, *arguments)
    got = pool[1].run(resuming.resumed, *arguments)
    for (end, again), other in zip(expected, got, strict=True):
        resuming.check_equal(end, other)
        resuming.check_equal(end, again)


@pytest.mark.parametrize("stage", [1, 3])
def test_base_plus_child_is_the_tuned_model(pool: RankPool, tmp_path: Path, stage: int) -> None:
    setup = Setup("gpt2", stage=stage, bf16=True)
    run = pool[1].run(exporting.train_and_export, setup, str(tmp_path), "compact")[0]
    model = exporting.base_model(setup)
    base = exporting.copied(model)
    assert not exporting.same(run.full, base), "vacuous: training changed nothing"
    applied = ds_childtune.apply_child(model, tmp_path / "child")
    assert exporting.same(exporting.copied(model), run.full)
    applied.revert()
    assert exporting.same(exporting.copied(model), base)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@needs_accelerator
def test_triton_s_kernel_is_bit_identical(dtype: str) -> None:
    check_triton_s_kernel(dtype)


@contextlib.contextmanager
def synchronisations() -> Iterator[Counter[str]]:
    """Where ds_childtune made the host wait for the device. torch warns of each wait; the stack says whose it is."""
    found: Counter[str] = Counter()

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        frames = [f for f in traceback.extract_stack() if "ds_childtune/" in f.filename and "/tests/" not in f.filename]
        if "synchroniz" in str(message) and frames:
            found[f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


def waits_of(setup: Setup, block: dict[str, Any]) -> tuple[Counter[str], Counter[str]]:
    """In `report()`, which has to wait, and in a step long after the self-check's last look."""
    with engine_of(setup) as engine:
        child = ds_childtune.attach(engine, {"reserve_p": 0.3, **block})
        calibration = batches(setup.family, 4, seed=1)
        if block["mode"] == D:
            child.select(calibration)
        for step in range(15):
            train_step(engine, batches(setup.family, setup.accumulation, seed=step))
        with synchronisations() as known:
            child.gather_mask("model.layers.0.mlp.up_proj.weight").sum().item()
            child.report() if block["mode"] == F else child.select(calibration)
        for step in range(15):
            train_step(engine, batches(setup.family, setup.accumulation, seed=step))
        with synchronisations() as found:
            train_step(engine, batches(setup.family, setup.accumulation, seed=99))
        child.detach()
    return known, found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "block", [{"mode": F}, {"mode": D}, {"mode": D, "clip": "child", **COMPACT}], ids=["F", "D", "compact"]
)
@needs_accelerator
def test_a_step_waits_for_nothing(pool: RankPool, stage: int, block: dict[str, Any]) -> None:
    setup = Setup("llama", stage=stage, bf16=True, clip=0.5, accumulation=2, sub_group_size=150)
    known, found = pool[1].run(waits_of, setup, block)[0]
    assert known, "vacuous: torch does not warn of the waits that are there"
    assert not found
