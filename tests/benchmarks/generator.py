"""Statistics of ChildTuning-F's generator, in standard deviations from independent Bernoulli draws; beyond 5 would be a flaw.

python -m tests.benchmarks.generator
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from ds_childtune.child.generator import bernoulli_mask
from ds_childtune.shards import Fragment

N = 1 << 24


def draw(name: str = "w", *, start: int = 0, seed: int = 0, step: int = 0, p: float = 0.5) -> Tensor:
    return bernoulli_mask(Fragment(name, start, 0, N), seed, step, p, device=torch.device("cpu"))


def deviation(count: Tensor, p: float) -> float:
    return (int(count) - N * p) / math.sqrt(N * p * (1 - p))


def main() -> None:
    torch.set_num_threads(1)
    rows = {f"rate, p = {p}": deviation(draw(p=p).sum(), p) for p in (0.001, 0.1, 0.3, 0.5, 0.9)}
    base = draw()
    others = {
        "neighbours": draw(start=1),
        "the element below, rows of 768": draw(start=768),
        "elements 2**20 apart": draw(start=1 << 20),
        "successive steps": draw(step=1),
        "steps 1,000 apart": draw(step=1000),
        "two parameters": draw("v"),
        "successive seeds": draw(seed=1),
    }
    rows |= {f"agreement of {what}": deviation((base == other).sum(), 0.5) for what, other in others.items()}
    counts = torch.bincount(base.view(-1, 16).long() @ (1 << torch.arange(16)), minlength=1 << 16).double()
    expected = N / 16 / counts.numel()
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    rows["patterns of 16 successive elements, chi squared"] = (chi2 - 65535) / math.sqrt(2 * 65535)
    print(f"{N:,} elements each, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    for what, value in rows.items():
        print(f"{what:<50} {value:+.2f}")


if __name__ == "__main__":
    main()
