"""Compact masters and gradients at ZeRO-3: DeepSpeed's optimizer steps child shards by itself.

[Note: ZeRO-3 on child shards]
Between backward and step, ZeRO-3 keeps for every parameter a partition of its averaged gradient, and for every sub-group a flat
shard of fp32 masters. Both are only ever used as tensors of one size per sub-group, so they may have the child's size:

    grad_partitions_flat_buffer, and its views by parameter     of the child's size
    fp32_partitioned_groups_flat[i]                             the child shard
    partition_grads                                             takes the child's elements of each reduced partition first
    _prepare_fp32_grad_for_sub_group                            zeros of the child's size for parameters frozen since then
    _reassign_or_swap_out_partitioned_parameters                no copy of a dense master; the step hook has scattered the child

Accumulation, overflow check, norm, unscaling, clipping and the step are DeepSpeed's own code. The gradient norm is the child's,
since nothing else of the gradient is kept. Meanwhile a flat shard's `.data` is the 16-bit (or fp32) parameter shard, so that
reading a flat shard gives what the forward pass uses.

What this loses: the part of an fp32 master outside the child that its 16-bit weight does not hold, if there were steps before. The
weight itself does not change; when the dense shards come back, its master is the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ds_childtune.child.child_shard import ChildShard
from ds_childtune.child.compact import Parts
from ds_childtune.zero.lean_start import make_dense_gradient_buffer, make_gradient_buffer, parameters, take_gradients
from ds_childtune.zero.overrides import Overrides

FEW = 1 << 16
"""Elements of a child in a partition whose places there are kept."""


@dataclass(frozen=True)
class Partition:
    """Where this rank's partition of a parameter lies, in elements."""

    shard: ChildShard
    start: int
    """In the flat shard."""
    numel: int
    """With padding."""
    first: int
    """In the child shard."""
    last: int
    whole: bool
    """Every element is in the child, except padding at the end."""
    places: Tensor | None
    """The child's elements in the partition, where those are few, so that many small parameters cost the host little."""

    @classmethod
    def of(cls, shard: ChildShard, start: int, numel: int, real: int, *, keeps_places: bool) -> Partition:
        """`real`: elements that are no padding, which comes last."""
        first, last = shard.span(start, numel)
        whole = last - first == real
        few = keeps_places and not whole and last - first <= FEW
        return cls(shard, start, numel, first, last, whole, shard.index[first:last] - start if few else None)

    def inside(self, partition: Tensor) -> Tensor:
        """The child's elements of a tensor laid out like the partition."""
        flat = partition.view(-1)
        if self.whole:
            return flat.narrow(0, 0, self.last - self.first)
        return flat.index_select(0, self.index())

    def index(self) -> Tensor:
        """The child's elements in the partition, 1-D, ascending."""
        return self.shard.index[self.first : self.last] - self.start if self.places is None else self.places


class ZeroThreePlumbing:
    """See [Note: ZeRO-3 on child shards]. The order of shards is that of `read_flat_shards`."""

    parts: Parts = "moments, masters and gradients"
    keeps_places: ClassVar = True
    """Whether every partition of a gradient is indexed by itself."""
    note: str = ""

    def __init__(self, engine: Any) -> None:
        self._optimizer = engine.optimizer
        self._partitions: dict[int, Partition] = {}
        """By `ds_id` of the parameter."""
        self._flats: list[Tensor] = []
        """Flat shards, while child shards are in DeepSpeed's list."""
        self._overrides = Overrides()

    def install(self, shards: Sequence[ChildShard]) -> None:
        optimizer = self._optimizer
        self._flats = [shard.flat.tensor for shard in shards]
        for i, shard in enumerate(shards):
            flat = shard.flat.tensor
            shard.tensor.ds_id = flat.ds_id  # type: ignore[attr-defined]
            flat.data = optimizer.fp16_partitioned_groups_flat[i].data
            optimizer.fp32_partitioned_groups_flat[i] = shard.tensor
        at = {p.ds_id: optimizer.grad_position[optimizer.get_param_id(p)] for p in parameters(optimizer)}
        for i, shard in enumerate(shards):
            shard.find_spans([(start, numel) for number, start, numel in at.values() if number == i])
        real = {(i, f.shard_start): f.numel for i, shard in enumerate(shards) for f in shard.flat.fragments}
        self._partitions = {
            key: Partition.of(shards[i], start, numel, real.get((i, start), 0), keeps_places=self.keeps_places)
            for key, (i, start, numel) in at.items()
        }
        make_gradient_buffer(optimizer, {i: p.last - p.first for i, p in self._partitions.items()})
        take_gradients(optimizer)
        put = self._overrides
        put.around(optimizer, "_prepare_fp32_grad_for_sub_group", self._prepare_fp32_grad_for_sub_group)
        unflatten = optimizer._unflatten_partitioned_parameters
        put.method(optimizer, "_reassign_or_swap_out_partitioned_parameters", unflatten)
        self._override()

    def _override(self) -> None:
        self._overrides.around(self._optimizer, "partition_grads", self._partition_grads)

    def remove(self) -> None:
        optimizer = self._optimizer
        self._overrides.remove()
        self._partitions = {}
        optimizer.fp32_partitioned_groups_flat[:] = self._flats
        self._flats = []

    def restore_dense(self, shards: Sequence[ChildShard]) -> None:
        optimizer = self._optimizer
        for i, shard in enumerate(shards):
            lp = optimizer.fp16_partitioned_groups_flat[i]
            shard.flat.tensor.data = lp.data.to(optimizer.master_weights_and_grads_dtype)
            shard.scatter()
        make_dense_gradient_buffer(optimizer)

    def _partition_grads(
        self, original: Callable[..., Any], params_to_release: list[Any], grad_partitions: list[Tensor]
    ) -> Any:
        inside = [self._partitions[p.ds_id].inside(g) for p, g in zip(params_to_release, grad_partitions, strict=True)]
        return original(params_to_release, inside)

    def _prepare_fp32_grad_for_sub_group(self, original: Callable[..., Any], sub_group_id: int) -> Any:
        optimizer = self._optimizer
        of = zip(optimizer.fp16_groups[sub_group_id], optimizer.averaged_gradients[sub_group_id], strict=True)
        # DeepSpeed gives a parameter that does not require grad any more a dense partition of zeros.
        optimizer.averaged_gradients[sub_group_id] = [
            grad if param.requires_grad else grad.new_zeros(part.last - part.first)
            for param, grad in of
            for part in [self._partitions[param.ds_id]]
        ]
        return original(sub_group_id)
