"""Compact masters at ZeRO 1 and 2: DeepSpeed has fp32 masters of the child only.

[Note: ZeRO-2 on child shards]
After the norm, DeepSpeed's step makes a flat gradient of the masters' dtype, unscales and clips it, steps, and copies the masters
into the 16-bit partition that is gathered afterwards. So here a flat shard's `.data` is that 16-bit partition (the copy is then
one onto itself), and one method is overridden on the instance:

    unscale_and_clip_grads     the child's elements of the flat gradient become its fp32 gradient, and are unscaled and clipped

The step itself is as where only moments are compact. The norm is still the whole gradient's, and gradient buffers stay whole, in
16 bits: the reduction is inlined in `average_tensor`, and `copy_grads_in_partition` and `get_flat_partition` keep whole parameters
of its result, so there is no small place to index gradients earlier. What is lost of masters outside the child is as in
[Note: ZeRO-3 on child shards].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from ds_childtune.child.child_shard import ChildShard
from ds_childtune.child.compact import Parts
from ds_childtune.zero.overrides import Overrides


def parameter_partitions(optimizer: Any) -> list[tuple[Tensor, Tensor, list[Any]]]:
    """For each group: its flat shard, this rank's partition of the parameters, and the `_hp_mapping`s into the flat shard."""
    from deepspeed import comm as dist

    result = []
    for i, flat in enumerate(optimizer.single_partition_of_fp32_groups):
        rank = dist.get_rank(group=optimizer.real_dp_process_group[i])
        mappings = [p._hp_mapping for p in optimizer.bit16_groups[i] if p._hp_mapping is not None]
        result.append((flat, optimizer.parallel_partitioned_bit16_groups[i][rank], mappings))
    return result


def mapped_to(flat: Tensor, mappings: Iterable[Any]) -> None:
    """Make `_hp_mapping`s views of what a flat shard holds now."""
    for mapping in mappings:
        address = mapping.hp_fragment_address
        mapping.hp_fragment = flat.detach().narrow(0, address.start, address.numel)


class ZeroTwoPlumbing:
    """See [Note: ZeRO-2 on child shards]. The order of shards is that of `read_flat_shards`."""

    parts: Parts = "moments and masters"
    note: str = ""

    def __init__(self, engine: Any) -> None:
        self._optimizer = engine.optimizer
        self._shards: list[ChildShard] = []
        self._overrides = Overrides()

    def install(self, shards: Sequence[ChildShard]) -> None:
        self._shards = list(shards)
        self._take_flat_shards()
        self._override()

    def _take_flat_shards(self) -> None:
        for flat, lp, mappings in parameter_partitions(self._optimizer):
            flat.data = lp.data
            mapped_to(flat, mappings)

    def _override(self) -> None:
        self._overrides.around(self._optimizer, "unscale_and_clip_grads", self._unscale_and_clip_grads)

    def remove(self) -> None:
        self._overrides.remove()
        self._shards = []

    def restore_dense(self, shards: Sequence[ChildShard]) -> None:
        optimizer = self._optimizer
        for shard, (flat, lp, mappings) in zip(shards, parameter_partitions(optimizer), strict=True):
            flat.data = lp.data.to(optimizer.master_weights_and_grads_dtype)
            mapped_to(flat, mappings)
            shard.scatter()

    def _unscale_and_clip_grads(
        self, original: Callable[..., Any], grad_groups_flat: list[Tensor], total_norm: Any
    ) -> Any:
        """Called with the flat gradient of one group."""
        (gradient,) = grad_groups_flat
        shard = next(s for s in self._shards if s.flat.tensor.grad is gradient)
        shard.flat.tensor.grad = None
        shard.tensor.grad = gradient.index_select(0, shard.index).to(shard.tensor.dtype)
        return original([shard.tensor.grad], total_norm)
