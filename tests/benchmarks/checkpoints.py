"""What a child costs in checkpoints: time of a save and of a load, and size, against plain DeepSpeed in the same run.

    deepspeed --num_gpus 2 tests/benchmarks/checkpoints.py

Contenders are interleaved; medians of ratios to plain in the same round. Ours put every file on disk and take its checksum,
which plain DeepSpeed does not: "plain, on disk" is plain DeepSpeed with an fsync of its files. The model is the demo's, under ZeRO-2.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

import ds_childtune

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.benchmarks.steps import batch_of, cpu_name, engine_of, interleave

STAGE, P = 2, 0.1
D = {"mode": "ChildTuning-D", "reserve_p": P}
BLOCKS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "plain, on disk": None,
    "ChildTuning-F": {"mode": "ChildTuning-F", "reserve_p": P},
    "ChildTuning-D": D,
    "ChildTuning-D, compact": {**D, "optimizer_state": "compact"},
}


def trained(block: dict[str, Any] | None) -> Any:
    """An engine after one step, so that its optimizer has state."""
    engine = engine_of(STAGE)
    batch = batch_of(dist.get_rank(), engine.device)
    if block is not None:
        child = ds_childtune.attach(engine, block)
        if block["mode"] == "ChildTuning-D":
            child.select([batch])
    engine.backward(engine(**batch).loss)
    engine.step()
    return engine


def save(engine: Any, folder: Path, *, on_disk: bool) -> None:
    engine.save_checkpoint(str(folder), "tag")
    if on_disk and dist.get_rank() == 0:
        for path in (folder / "tag").iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "tag").rglob("*") if path.is_file())


def main(rounds: int) -> None:
    on_cpu = get_accelerator().device_name() == "cpu"
    if on_cpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        torch.set_num_threads(1)
    backend = "gloo" if on_cpu else get_accelerator().communication_backend_name()
    deepspeed.init_distributed(backend, verbose=False)
    scratch = [Path(tempfile.mkdtemp()) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(scratch, 0)
    root = scratch[0]
    assert root is not None
    engines = {name: trained(block) for name, block in BLOCKS.items()}
    saves: dict[str, Callable[[], object]] = {
        name: partial(save, engine, root / name, on_disk="on disk" in name) for name, engine in engines.items()
    }
    loads: dict[str, Callable[[], object]] = {
        name: partial(engine.load_checkpoint, str(root / name), "tag") for name, engine in engines.items()
    }
    saved, loaded = interleave(saves, rounds), interleave(loads, rounds)
    if dist.get_rank() == 0:
        print(
            f"\nZeRO-{STAGE}, {dist.get_world_size()} ranks, MiniLM-L6, reserve_p {P}, {cpu_name()}, {os.cpu_count()} CPUs,"
            f" deepspeed {deepspeed.__version__}, torch {torch.__version__}\n"
        )
        print("| | save / plain | load / plain | MB | size / plain |\n|---|---|---|---|---|")
        whole = size(root / "plain")
        for name in BLOCKS:
            ratios = [
                statistics.median(a / b for a, b in zip(times[name], times["plain"], strict=True))
                for times in (saved, loaded)
            ]
            seconds = [statistics.median(times[name]) for times in (saved, loaded)]
            cells = [f"{ratio:.2f} ({second:.2f} s)" for ratio, second in zip(ratios, seconds, strict=True)]
            own = size(root / name)
            print(f"| {name} | {cells[0]} | {cells[1]} | {own / 1e6:.1f} | {own / whole:.2f} |")
        shutil.rmtree(root)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    parser.add_argument("--rounds", type=int, default=9)
    main(parser.parse_args().rounds)
