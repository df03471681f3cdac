"""Bytes that a rank sends in a training step, plain DeepSpeed against a compact child.

    python -m tests.benchmarks.traffic
    python -m tests.benchmarks.traffic --chart docs/traffic.png

Counted, not timed: see `tests.support.traffic`. A small random Llama in bf16; every parameter is eligible.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

import ds_childtune
from tests.benchmarks import llama, memory
from tests.benchmarks.provenance import measured_with
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


Rows = dict[tuple[int, str], dict[str, float]]
"""By stage and contender, as `step_of`."""


def kinds_of(rows: Rows) -> list[str]:
    """Kinds of collective that somebody uses for more than numbers such as the norm."""
    found = [kind for of in rows.values() for kind, count in of.items() if kind != "live" and count >= 0.0005]
    return sorted(set(found))


def total(of: dict[str, float]) -> float:
    return sum(count for kind, count in of.items() if kind != "live")


def table(rows: Rows) -> str:
    kinds = kinds_of(rows)
    head = ["ZeRO", "", *kinds, "all", "of plain", "live tensors"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for (stage, name), found in rows.items():
        plain = total(rows[stage, "plain"])
        ratio = total(found) / plain if plain else 0.0  # one rank sends nothing
        cells = [*(f"{found.get(kind, 0.0):.3f}" for kind in kinds), f"{total(found):.3f}", f"{ratio:.3f}x"]
        cells.append(f"{found['live']:.2f}")
        lines.append(f"| {stage} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: Rows, path: Path, title: str) -> None:
    """Bars of bytes per parameter, by stage and contender, in parts by kind of collective."""
    from matplotlib.figure import Figure

    colours = {"all-reduce": "#4477aa", "reduce-scatter": "#ee9944", "all-gather": "#44aa88", "all-to-all": "#aa4477"}
    figure: Any = Figure(figsize=(8.0, 3.6), layout="constrained")
    axes = figure.add_subplot()
    places = [i + 0.7 * stage for i, (stage, _) in enumerate(rows)]
    below = [0.0] * len(rows)
    for kind in kinds_of(rows):
        heights = [of.get(kind, 0.0) for of in rows.values()]
        axes.bar(places, heights, bottom=below, width=0.8, label=kind, color=colours.get(kind, "0.5"))
        below = [a + b for a, b in zip(below, heights, strict=True)]
    for place, top in zip(places, below, strict=True):
        axes.text(place, top + 0.06, f"{top:.2f}", ha="center", fontsize=8)
    axes.set_xticks(places, [name.removeprefix("compact, ") for _, name in rows], rotation=45, ha="right", fontsize=8)
    stages = sorted({stage for stage, _ in rows})
    for stage in stages:
        of = [place for place, (each, _) in zip(places, rows, strict=True) if each == stage]
        axes.text(
            sum(of) / len(of), 1.02, f"ZeRO-{stage}", transform=axes.get_xaxis_transform(), ha="center", fontsize=9
        )
    axes.set_ylim(top=1.08 * max(below))
    axes.set_ylabel("bytes per parameter and step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="64x4", help="as for tests.benchmarks.compact")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--stages", default="0,1,2,3")
    parser.add_argument("--p", default="0.05,0.1,0.3")
    parser.add_argument("--chart", type=Path, help="write a picture, too; needs matplotlib")
    args = parser.parse_args()
    rows: Rows = {}
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
    print(
        f"\nLlama {args.size}, bf16, {args.ranks} ranks, {args.accumulation} micro-batches; bytes per parameter;"
        f" {measured_with('deepspeed', 'torch', 'transformers')}\n"
    )
    print(table(rows))
    if args.chart is not None:
        title = f"What a rank sends in a training step: bf16, {args.ranks} ranks, every parameter eligible"
        draw(rows, args.chart, title)


if __name__ == "__main__":
    main()
