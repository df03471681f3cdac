"""What a micro-batch costs a CPU core to lay gradients out by owner at ZeRO-3, on many ranks. One process, which plays a rank.

    python -m tests.benchmarks.owners

CPU seconds for all of a model's parameters, 90 to a bucket: piece by piece, and by `OwnerOrder`, in turns; the smallest of three. A
piece is what a rank owns of a parameter's child.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from ds_childtune.zero.owner_order import OwnerOrder

PARAMETERS, IN_A_BUCKET, ROUNDS = 720, 90, 3


def seconds(action: Callable[[], object]) -> float:
    started = time.process_time()
    action()
    return time.process_time() - started


def main() -> None:
    torch.set_num_threads(1)
    print(f"{time.strftime('%Y-%m-%d')}, {PARAMETERS} parameters\n")
    print(f"| ranks | elements of a piece | pieces | piece by piece | OwnerOrder | ratio |\n|{'---|' * 6}")
    for ranks, each in ((8, 4), (64, 4), (64, 200), (64, 4000), (512, 4), (512, 200)):
        buckets = []
        for first in range(0, PARAMETERS, IN_A_BUCKET):
            count = min(IN_A_BUCKET, PARAMETERS - first)
            order = OwnerOrder(np.full((count, ranks), each), torch.device("cpu"))
            buckets.append((order, [torch.zeros(each * ranks) for _ in range(count)]))
        found = [
            (
                seconds(lambda: [order._concatenated(values) for order, values in buckets]),  # noqa: B023
                seconds(lambda: [order.rows(values) for order, values in buckets]),  # noqa: B023
            )
            for _ in range(ROUNDS)
        ]
        one, other = (min(of) for of in zip(*found, strict=True))
        print(f"| {ranks} | {each:,} | {ranks * PARAMETERS:,} | {one:.3f} s | {other:.3f} s | {other / one:.2f} |")


if __name__ == "__main__":
    main()
