"""Spawn ranks once, run many cases: every case's outcome on every rank comes back by name."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Case = Callable[[], Any]
DEADLINE_SECONDS = 900
"""A hang becomes a failure."""


def _run(rank: int, world_size: int, folder: str, make_cases: Callable[[], dict[str, Case]]) -> None:
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    import deepspeed
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    outcomes: dict[str, Any] = {}
    for name, case in make_cases().items():
        try:
            outcomes[name] = ("ok", case())
        except Exception:
            outcomes[name] = ("error", f"rank {rank}:\n{traceback.format_exc()}")
        torch.save(outcomes, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_cases(world_size: int, make_cases: Callable[[], dict[str, Case]]) -> dict[str, list[Any]]:
    """The value that each case returned on each rank; an ("error", traceback) pair where it raised or never ended."""
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.spawn(_run, (world_size, folder, make_cases), nprocs=world_size, join=False)
        try:
            context.join(timeout=DEADLINE_SECONDS)
        finally:
            for process in context.processes:
                process.kill()
        paths = [Path(folder) / f"{rank}.pt" for rank in range(world_size)]
        per_rank = [torch.load(p, weights_only=False) if p.exists() else {} for p in paths]
    names = sorted({name for outcomes in per_rank for name in outcomes})
    return {n: [outcomes.get(n, ("error", "the rank did not get here")) for outcomes in per_rank] for n in names}


def value(outcomes: dict[str, list[Any]], name: str) -> list[Any]:
    """What case `name` returned on each rank; fails with the traceback where it raised."""
    assert name in outcomes, f"{name} did not run: {list(outcomes)}"
    for kind, result in outcomes[name]:
        assert kind == "ok", result
    return [result for _, result in outcomes[name]]
