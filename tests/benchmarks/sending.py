"""Time from a gradient's arrival to the new weights, at ZeRO-2: a child that is sent, gradients that are sent whole, and plain.

    python -m tests.benchmarks.sending --ranks 2

All contenders are in the same processes and take turns. Timed is what DeepSpeed and ds_childtune do, not forward and backward: each
call of `process_gradients`, the reduction at the end, and `step`. *whole* is a compact child with `gradient_clipping` and without
`"clip": "child"`: moments and masters are the child's, gradients are reduced and weights gathered whole.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import transformers

import ds_childtune
from tests.benchmarks import llama
from tests.benchmarks.provenance import measured_with
from tests.support.ranks import Ranks

TIMED = ("process_gradients", "overlapping_partition_gradients_reduce_epilogue", "step")


class Contender:
    """On one rank."""

    def __init__(self, name: str, size: str) -> None:
        kind, _, p = name.partition(", p = ")
        torch.manual_seed(0)
        shape = llama.config_of(size)
        model = transformers.LlamaForCausalLM(shape)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            # A norm that is never reached, as clipping by it would change what is compared.
            "gradient_clipping": 0.0 if kind == "sent" else 1e9,
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True, "fused": True}},
            "zero_optimization": {"stage": 2, "reduce_bucket_size": 10_000_000, "allgather_bucket_size": 50_000_000},
            "steps_per_print": None,
        }
        self.engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
        self.batch = llama.batch_of(dist.get_rank(), self.engine.device, 1, 16, shape.vocab_size)
        self._spent = 0.0
        if p:
            block = {"mode": "ChildTuning-D", "reserve_p": float(p), "include": ["*"], "optimizer_state": "compact"}
            ds_childtune.attach(self.engine, block).select([self.batch] * 2)
        for method in TIMED:
            self._time(self.engine.optimizer, method)
        for _ in range(3):
            self.step()

    def _time(self, owner: Any, name: str) -> None:
        plain = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return plain(*args, **kwargs)
            finally:
                self._spent += time.perf_counter() - start

        setattr(owner, name, timed)

    def step(self) -> float:
        """Seconds."""
        loss = self.engine(**self.batch).loss
        dist.barrier()
        self._spent = 0.0
        self.engine.backward(loss)
        self.engine.step()
        return self._spent


_CONTENDERS: dict[str, Contender] = {}
"""Of this process."""


def prepare(name: str, size: str) -> None:
    _CONTENDERS[name] = Contender(name, size)


def turn(name: str) -> float:
    return _CONTENDERS[name].step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="22m", help="as for tests.benchmarks.compact")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--p", default="0.05,0.1,0.3")
    args = parser.parse_args()
    names = ["plain", *(f"{kind}, p = {p}" for p in args.p.split(",") for kind in ("whole", "sent"))]
    times: dict[str, list[float]] = {name: [] for name in names}
    ranks = Ranks(args.ranks)
    try:
        for name in names:
            ranks.run(prepare, name, args.size)
        for i in range(args.rounds):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                times[name].append(max(ranks.run(turn, name)))
    finally:
        ranks.close()
    print(
        f"\nLlama {args.size}, bf16, ZeRO-2, {args.ranks} ranks, {args.rounds} rounds;"
        f" {measured_with('deepspeed', 'torch', 'transformers')}\n"
    )
    print("| | ms | of plain (quartiles) | of whole |\n|---|---|---|---|")
    for name, seconds in times.items():
        whole = times.get(name.replace("sent", "whole"), seconds)
        cells = [f"{1e3 * statistics.median(seconds):.0f}"]
        for base in (times["plain"], whole):
            low, middle, high = statistics.quantiles([s / b for s, b in zip(seconds, base, strict=True)], n=4)
            cells.append(f"{middle:.2f} ({low:.2f} .. {high:.2f})")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
