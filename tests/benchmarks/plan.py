"""What `ds_childtune plan` predicts, beside what engines hold: live tensors between steps, and the peak of each phase.

    python -m tests.benchmarks.plan                # six set-ups, a random Llama of 10.5 M parameters, 2 CPU ranks
    python -m tests.benchmarks.plan --offload      # three at ZeRO-2; what the plan has on the host is added

Measured are the storages of tensors that operations make while an engine is built and trains, by phase, of the rank that has
most. Activations are in the measured figures and not in the plan; with 16 tokens they are 0.2 bytes for each parameter.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import deepspeed
import torch
import transformers
from torch import nn

import ds_childtune
from ds_childtune import tuner
from ds_childtune.config import parse_config
from ds_childtune.planning.memory import Phase
from ds_childtune.planning.model import ModelOutline
from ds_childtune.planning.plan import Planned
from tests.support.alive import Alive
from tests.support.ranks import RankPool

RANKS = 2
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "bf16": {"enabled": True},
    "gradient_clipping": 0.0,
    "zero_optimization": {"stage": 3, "reduce_bucket_size": 1_000_000, "allgather_bucket_size": 1_000_000},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.01}},
    "steps_per_print": 1_000_000,
}
BLOCKS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "dense": {"mode": "ChildTuning-D", "reserve_p": 0.1},
    "compact": {"mode": "ChildTuning-D", "reserve_p": 0.1, "optimizer_state": "compact"},
}
"""Which child, by name."""

Measured = dict[str, tuple[int, int]]
"""By phase: the peak, and what was alive at its end. Bytes."""


def llama(hidden: int = 256, layers: int = 8, inner: int = 704, vocabulary: int = 8000) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=inner,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=vocabulary,
        max_position_embeddings=64,
        use_cache=False,
    )


def config_of(stage: int, *, offload: bool = False, **changes: Any) -> dict[str, Any]:
    config = copy.deepcopy(CONFIG) | changes
    config["zero_optimization"]["stage"] = stage
    if offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    return config


def build(shape: transformers.LlamaConfig, config: dict[str, Any]) -> nn.Module:
    """In bf16, at ZeRO-3 under zero.Init."""
    split = config["zero_optimization"]["stage"] == 3
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with deepspeed.zero.Init(config_dict_or_path=config) if split else nullcontext():
            return transformers.LlamaForCausalLM(shape)
    finally:
        torch.set_default_dtype(torch.float32)


def measure(shape: transformers.LlamaConfig, config: dict[str, Any], block: dict[str, Any] | None) -> Measured:
    """Build, choose a child, train three steps. A collective."""
    found: Measured = {}
    alive = Alive(lambda tensor: tensor.device.type != "meta")

    def phase_ends(name: str) -> None:
        found[name] = max(alive.peak, found.get(name, (0, 0))[0]), alive.now()
        alive.peak = alive.now()

    with alive:
        model = build(shape, config)
        engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
        ids = torch.arange(16).view(1, -1)
        batch = {"input_ids": ids, "labels": ids}
        child = None
        if block is not None:
            child = ds_childtune.attach(engine, block)
            phase_ends("start")
            _select(child, [batch] * 3, phase_ends)
        else:
            phase_ends("start")
        for _ in range(3 * engine.gradient_accumulation_steps()):
            engine.backward(engine(**batch).loss)
            engine.step()
            phase_ends("steps")
        if child is not None:
            child.detach()
    engine.destroy()
    del engine, model
    gc.collect()
    return found


def _select(child: ds_childtune.ChildTuner, batches: list[Any], phase_ends: Callable[[str], None]) -> None:
    cut_at = tuner.cut_at

    def cut_in_the_next_phase(*arguments: Any) -> Any:
        phase_ends("Fisher")
        return cut_at(*arguments)

    tuner.cut_at = cut_in_the_next_phase
    try:
        child.select(batches)
    finally:
        tuner.cut_at = cut_at
    phase_ends("selection")


def predict(shape: transformers.LlamaConfig, config: dict[str, Any], block: dict[str, Any] | None) -> dict[str, Phase]:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(shape)
    child = parse_config(block or BLOCKS["dense"])
    plan = Planned(ModelOutline.of(model, child), config, child, RANKS).plan()
    return {phase.name: phase for phase in (plan.plain if block is None else plan.child).phases}


def beside(phase: Phase, host: int) -> int:
    """Of `host` bytes on the host what counts, where host and device are one, and this rank's index is one tensor for both."""
    return host - (phase.kept["child"] // RANKS if phase.host else 0)


def error(predicted: int, measured: int) -> float:
    return predicted / measured - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="kinds of child, with commas between them")
    parser.add_argument("--offload", action="store_true", help="of the optimizer, to the CPU")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    kinds = args.only.split(",") if args.only else list(BLOCKS)
    shape = llama()
    with torch.device("meta"):
        elements = sum(p.numel() for p in transformers.LlamaForCausalLM(shape).parameters())
    print(
        f"{elements / 1e6:.1f} M parameters, {RANKS} CPU ranks, bf16, bytes per parameter; {time.strftime('%Y-%m-%d')}\n"
    )
    print("| set-up | phase | live: plan | measured | error | peak: plan | measured | error | of the peak |")
    print("|" + "---|" * 9)
    pool = RankPool()
    for stage in (2,) if args.offload else (2, 3):
        for kind in kinds:
            config = config_of(stage, offload=args.offload)
            predicted = predict(shape, config, BLOCKS[kind])
            everyone = pool[RANKS].run(measure, shape, config, BLOCKS[kind])
            for name, phase in predicted.items():
                top, live = (max(found[name][i] for found in everyone) for i in (0, 1))
                cells = [f"ZeRO-{stage}, {kind}", name]
                for mine, real in (
                    (phase.live + beside(phase, phase.host), live),
                    (phase.peak + beside(phase, phase.host_peak), top),
                ):
                    cells += [f"{mine / elements:.2f}", f"{real / elements:.2f}", f"{error(mine, real):+.1%}"]
                print(f"| {' | '.join([*cells, phase.peak_is])} |", flush=True)
    pool.close()


if __name__ == "__main__":
    main()
