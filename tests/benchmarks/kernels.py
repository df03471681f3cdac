"""Selection and ChildTuning-F's masking on one rank, against numpy and torch on the same data in the same run.

python -m tests.benchmarks.kernels
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ds_childtune.child.generator import base_keys, keep_limit, step_keys
from ds_childtune.child.mask_kernels import mask_kernel
from ds_childtune.selection.scores import Scores
from ds_childtune.selection.top_k import find_cut
from ds_childtune.shards import Fragment


def seconds(work: Callable[[], object], rounds: int) -> list[float]:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return times


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=100_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(args.elements, generator=generator).square_()
    grad = torch.randn(args.elements, generator=generator)
    k = round(0.3 * args.elements)
    wire = [0]

    def all_reduce(histogram: Tensor) -> None:
        wire[0] += histogram.numel() * histogram.element_size()

    def select() -> None:
        wire[0] = 0
        find_cut([Scores("scores", 0, scores, True)], ["scores"], k, all_reduce, torch.device("cpu"))

    before = peak_mib()
    select()
    extra = peak_mib() - before
    fragment = Fragment("grad", 0, 0, args.elements)
    keys = base_keys([fragment], 0, device=grad.device)
    kernel = mask_kernel("cpu", grad.dtype)
    limit = keep_limit(0.3)
    key = step_keys(keys, 0)[0]
    contenders: dict[str, Callable[[], object]] = {
        "torch.sum": scores.sum,
        "selection": select,
        "numpy.percentile": lambda: np.percentile(scores.numpy(), 70),
        "grad.mul_(1.0)": lambda: grad.mul_(1.0),
        "ChildTuning-F mask": lambda: kernel(grad, key, limit, 1.0),
    }
    contenders["ChildTuning-F mask"]()  # compiles
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(args.rounds):
        for name, work in contenders.items():
            times[name] += seconds(work, 1)
    print(f"{args.elements:,} elements, one thread, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    for name, of in times.items():
        median = statistics.median(of)
        print(f"{name:>20} {median:8.3f} s  {1e9 * median / args.elements:6.2f} ns per element")
    ratio = statistics.median(a / b for a, b in zip(times["selection"], times["numpy.percentile"], strict=True))
    print(
        f"selection / numpy.percentile {ratio:.2f}; extra peak memory {extra:.1f} MiB; on the wire {wire[0]:,} bytes a rank"
    )
    ratio = statistics.median(a / b for a, b in zip(times["ChildTuning-F mask"], times["grad.mul_(1.0)"], strict=True))
    print(f"ChildTuning-F mask / grad.mul_ {ratio:.2f}")


if __name__ == "__main__":
    main()
