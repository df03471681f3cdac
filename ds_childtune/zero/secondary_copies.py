"""hpZ with a compact child: copies of the weights inside a node stay, and take the child's new values only.

[Note: secondary copies]
With `zero_hpz_partition_size` S, ZeRO-3 splits each parameter a second time, over the S ranks of a node, so that the backward pass
gathers inside the node. Every step changes weights, so DeepSpeed drops these copies after it, and the next forward pass gathers from
all ranks and fills them again: 2 bytes for each parameter that cross from node to node in bf16.

With a compact child a step changes nothing but the child. So the copies stay, and after a step each owner sends its child's new values
to those ranks, one in each node, whose copies hold them. Forward and backward both gather inside the node. For 8 ranks and S = 4:

    rank                       0  1  2  3  4  5  6  7
    owns partition             0  1  2  3  4  5  6  7
    copies partitions          01 23 45 67 01 23 45 67
    sends its child to ranks   0  0  1  1  2  2  3  3
                               4  4  5  5  6  6  7  7

Whatever else changes weights (a checkpoint that is loaded, `GatheredParameters`) drops or fills the copies, as in DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from deepspeed import comm as dist

from ds_childtune.child.child_shard import ChildShard
from ds_childtune.zero.child_masks import ParameterChild
from ds_childtune.zero.overrides import Overrides
from ds_childtune.zero.streams import wait_for_this_stream


def copies_across_nodes(params: Sequence[Any]) -> bool:
    """Whether a ZeRO-3 optimizer's parameters have secondary copies, and more than one."""
    return int(params[0].ds_secondary_tensor_num_of_groups) > 1


class SecondaryCopies:
    """See [Note: secondary copies]. `send` is a collective."""

    def __init__(
        self, optimizer: Any, shards: Sequence[ChildShard], params: Sequence[Any], children: Sequence[ParameterChild]
    ) -> None:
        """
        Args:
            shards: by sub-group.
            params, children: in the order of the sub-groups.
        """
        self._optimizer = optimizer
        self._shards, self._params, self._children = shards, params, children
        group = optimizer.dp_process_group
        self._ranks, rank = dist.get_world_size(group=group), dist.get_rank(group=group)
        self._owners = int(params[0].ds_secondary_tensor_num_of_groups)
        """Partitions in one rank's part of a copy: as many as there are nodes."""
        node = self._ranks // self._owners
        self._first = rank % node * self._owners
        """The first rank whose partition this rank has a copy of."""
        totals = [sum(child.counts[r] for child in children) for r in range(self._ranks)]
        mine = rank // self._owners
        self._sends = [totals[rank] if r % node == mine else 0 for r in range(self._ranks)]
        self._receives = [n if self._first <= r < self._first + self._owners else 0 for r, n in enumerate(totals)]

    def after_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around `_post_step`, in which DeepSpeed drops the copies."""
        self.send()
        with Overrides() as put:
            put.method(self._optimizer, "invalidate_secondary_tensor", _nothing)
            return original(*args, **kwargs)

    @torch.no_grad()
    def send(self) -> None:
        """Put the child's 16-bit weights of all owners into this rank's copies."""
        row = torch.cat([shard.flat.flat().index_select(0, shard.index) for shard in self._shards])
        sent = row.repeat(sum(count > 0 for count in self._sends))  # empty on a rank that owns nothing of the child
        received = row.new_empty(sum(self._receives))
        dist.all_to_all_single(received, sent, self._receives, self._sends, group=self._optimizer.dp_process_group)
        last = self._first + self._owners
        rows = [
            iter(part.split([child.counts[self._first + i] for child in self._children]))
            for i, part in enumerate(received.split(self._receives[self._first : last]))
        ]
        for param, child in zip(self._params, self._children, strict=True):
            values = [next(own) for own in rows]
            copy = param.ds_secondary_tensor
            # None: not filled since it was dropped. Quantized: of a parameter that does not train.
            if copy is not None and not hasattr(copy, "ds_quant_scale"):
                child.put(copy, self._first, values)
        # The next forward pass gathers the copies on a stream that does not wait for this one. DeepSpeed waits likewise.
        wait_for_this_stream()


def _nothing() -> None:
    pass
