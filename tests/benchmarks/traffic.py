"""Bytes that a rank sends in a training step, plain DeepSpeed against a compact child.

    python -m tests.benchmarks.traffic

Counted, not timed: see `tests.support.traffic`. A small random Llama in bf16; every parameter is eligible.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

import ds_childtune
from tests.benchmarks import llama, memory
from tests.support.ranks import Ranks
from tests.support.traffic import Traffic

STEPS = 2
"""Before the one that is counted: the first steps have the self-check, and ZeRO-3 finds out in which order to gather."""


def config_of(stage: int, accumulation: int, p: float | None) -> dict[str, Any]:
    zero = {"stage": stage, "reduce_bucket_size": 1_000_000, "stage3_param_persistence_threshold": 0}
    # As if the model were too large to stay whole from forward to backward: weights are gathered twice.
    zero |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": zero,
        "steps_per_print": None,
    }
    if p is not None:
        block = {"mode": "ChildTuning-D", "reserve_p": p, "include": ["*"], "optimizer_state": "compact"}
        config["child_tuning"] = {**block, "selector": "random"}
    return config


def step_of(size: str, stage: int, accumulation: int, p: float | None) -> dict[str, float]:
    """Bytes per parameter by kind of collective, in one step after a few; "live": of tensors that stay after it. A collective."""
    config = config_of(stage, accumulation, p)
    before = memory.live_storages()
    torch.manual_seed(0)
    shape = llama.config_of(size)
    import transformers

    model = llama.build(size, config) if stage == 3 else transformers.LlamaForCausalLM(shape)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    numel = sum(getattr(q, "ds_numel", q.numel()) for q in engine.module.parameters())
    try:
        if p is not None:
            ds_childtune.attach(engine).select()

        def step(number: int) -> None:
            for micro in range(accumulation):
                seed = 1000 * number + 10 * micro + dist.get_rank()
                engine.backward(engine(**llama.batch_of(seed, engine.device, 1, 8, shape.vocab_size)).loss)
                engine.step()

        for number in range(STEPS):
            step(number)
        with Traffic() as traffic:
            step(STEPS)
        result = {kind: count / numel for kind, count in traffic.bytes.items()}
        result["live"] = (memory.live_storages() - before) / numel
        return result
    finally:
        engine.destroy()


def table(rows: dict[tuple[int, str], dict[str, float]]) -> str:
    lines = ["| ZeRO | | all-reduce | reduce-scatter | all-gather | all | of plain | live tensors |", "|" + "---|" * 8]
    for (stage, name), found in rows.items():
        kinds = [found.get(kind, 0.0) for kind in ("all-reduce", "reduce-scatter", "all-gather")]
        total = sum(value for kind, value in found.items() if kind != "live")
        plain = sum(value for kind, value in rows[stage, "plain"].items() if kind != "live")
        cells = [*(f"{value:.3f}" for value in kinds), f"{total:.3f}", f"{total / plain:.3f}x", f"{found['live']:.2f}"]
        lines.append(f"| {stage} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="64x4", help="as for tests.benchmarks.compact")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--stages", default="0,1,2,3")
    parser.add_argument("--p", default="0.05,0.1,0.3")
    args = parser.parse_args()
    rows: dict[tuple[int, str], dict[str, float]] = {}
    ranks = Ranks(args.ranks)
    try:
        for stage in map(int, args.stages.split(",")):
            for p in [None, *map(float, args.p.split(","))]:
                found = ranks.run(step_of, args.size, stage, args.accumulation, p)
                # Of the rank that sends most.
                name = "plain" if p is None else f"compact, p = {p}"
                rows[stage, name] = {k: max(f.get(k, 0.0) for f in found) for f in found for k in f}
    finally:
        ranks.close()
    root = Path(__file__).parents[2]
    head = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False
    )
    versions = ", ".join(f"{name} {version(name)}" for name in ("deepspeed", "torch", "transformers"))
    print(
        f"\nLlama {args.size}, bf16, {args.ranks} ranks, {args.accumulation} micro-batches; bytes per parameter; {versions},"
        f" {os.cpu_count()} cores, commit {head.stdout.strip()}, {time.strftime('%Y-%m-%d')}\n"
    )
    print(table(rows))


if __name__ == "__main__":
    main()
