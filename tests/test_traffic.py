"""What a training step sends, counted at torch's collectives."""

from __future__ import annotations

import torch
import torch.distributed as dist

from tests.support.ranks import RankPool
from tests.support.traffic import Traffic


def known_collectives() -> dict[str, int]:
    ten, world = torch.ones(10, dtype=torch.bfloat16), dist.get_world_size()
    with Traffic() as traffic:
        dist.all_reduce(ten)
        dist.all_gather_into_tensor(torch.empty(10 * world), torch.ones(10))
        dist.all_gather([torch.empty(10) for _ in range(world)], torch.ones(10))
        dist.reduce_scatter_tensor(torch.empty(5), torch.ones(5 * world))
        dist.broadcast(ten, 0)
        dist.barrier()
    dist.all_reduce(ten)
    return dict(traffic.bytes)


def test_the_counter_counts_what_is_sent(pool: RankPool) -> None:
    """Times W / (W - 1): an all-reduce sends each byte twice, the others once."""
    expected = {"all-reduce": 2 * 20, "all-gather": 2 * 80, "reduce-scatter": 40, "broadcast": 20}
    assert pool[2].run(known_collectives) == [expected] * 2
