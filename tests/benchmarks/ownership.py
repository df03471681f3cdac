"""How unevenly DeepSpeed's partition at ZeRO 1 and 2 spreads a child over the ranks, for a child of real Fisher information.

    PYTHONPATH=PACKAGES python launch/study/prepare_lm.py PACKAGES FOLDER --only r8,bbc
    python -m tests.benchmarks.ownership FOLDER/smollm2 FOLDER/r8/train.jsonl

One process. A rank owns an equal slice of the concatenated parameters, and steps the child's elements in it: 12 bytes each with Adam,
a master and two moments.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.benchmarks.provenance import measured_with

RANKS = (2, 8, 64, 512)
BLOCK = 128
"""Tokens of a micro-batch."""
OWNED = 12
"""Bytes of an element in the child, on the rank that owns it."""


@dataclass(frozen=True)
class Spread:
    """Of a child over the ranks."""

    most: int
    """Elements of the rank that owns most."""
    mean: float

    @property
    def ratio(self) -> float:
        return self.most / self.mean


def fisher(model: nn.Module, blocks: Iterable[Tensor]) -> list[Tensor]:
    """Sums of squared gradients, 1-D by parameter: one term for each block."""
    parameters = list(model.parameters())
    sums = [torch.zeros(p.numel()) for p in parameters]
    for block in blocks:
        model(input_ids=block, labels=block).loss.backward()
        for total, parameter in zip(sums, parameters, strict=True):
            assert parameter.grad is not None
            total.add_(parameter.grad.view(-1).square())
            parameter.grad = None
    return sums


def child_of(scores: list[Tensor], eligible: list[bool], p: float) -> Tensor:
    """bool, of all parameters one after the other: the top p of what is eligible, and all that is not."""
    scored = torch.cat([s for s, of in zip(scores, eligible, strict=True) if of])
    threshold = scored.kthvalue(scored.numel() - round(p * scored.numel())).values
    return torch.cat(
        [s > threshold if of else torch.ones_like(s, dtype=torch.bool) for s, of in zip(scores, eligible, strict=True)]
    )


def spread(child: Tensor, ranks: int) -> Spread:
    """Over DeepSpeed's partitions, which are padded at the end to a multiple of two elements a rank."""
    width = -(-child.numel() // (2 * ranks)) * 2
    counts = [int(part.sum()) for part in child.split(width)]
    return Spread(max(counts), sum(counts) / ranks)


def blocks_of(texts: Path, tokenizer: Any, count: int) -> list[Tensor]:
    ids: list[int] = []
    for line in texts.read_text().splitlines():
        ids += tokenizer(json.loads(line)["text"])["input_ids"]
        if len(ids) >= count * BLOCK:
            break
    return list(torch.tensor(ids[: count * BLOCK]).view(-1, 1, BLOCK))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder of transformers, of a causal language model")
    parser.add_argument("texts", type=Path, help="json lines with a column text")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--p", type=float, default=0.1)
    args = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    names = [name for name, _ in model.named_parameters()]
    scores = fisher(model, blocks_of(args.texts, tokenizer, args.blocks))
    numel = sum(s.numel() for s in scores)
    print(
        f"\n{args.model.name}, {numel / 1e6:.1f} M parameters, reserve_p {args.p}, {args.blocks} micro-batches of {BLOCK}"
        f" tokens, {measured_with('torch', 'transformers')}\n"
    )
    print(
        "| eligible | ranks | most, of the mean | bytes of masters and moments: most | mean | more |\n"
        + "|---" * 6
        + "|"
    )
    for kind, eligible in (("all", [True] * len(names)), ("blocks", [".layers." in name for name in names])):
        child = child_of(scores, eligible, args.p)
        for ranks in RANKS:
            of = spread(child, ranks)
            most, mean = (OWNED * count / numel for count in (of.most, of.mean))
            print(f"| {kind} | {ranks} | {of.ratio:.2f} | {most:.3f} | {mean:.3f} | {most - mean:.3f} |")
    print("\nBytes are for each parameter of the model. Weights are 2 on every rank in bf16.")


if __name__ == "__main__":
    main()
