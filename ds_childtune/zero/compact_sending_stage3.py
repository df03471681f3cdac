"""Compact masters and gradients at ZeRO-3: ranks send each other only the child's gradients.

[Note: ZeRO-3 sends the child]
As in [Note: ZeRO-3 on child shards], and every rank knows which elements of each parameter are the child's, and whose (see
[Note: masks of all ranks]). DeepSpeed collects whole gradients in a bucket and reduce-scatters it. Overridden are, instead:

    reduce_independent_p_g_buckets_...      takes the child's elements of a gradient as soon as it is whole, and frees the gradient
    independent_gradient_partition_epilogue reduces what is left in the bucket first
    zero_grad, _pre_step                    drop what is left in it, after an exception for example
    _post_step                              with hpZ: see [Note: secondary copies]

What is in the bucket is laid out by owner (see [Note: rows by owner]), and reduce-scattered at once. `partition_grads`, which
DeepSpeed hands partitions of gradients, is handed the child's elements of them, and adds up micro-batches as ever.
`reduce_bucket_size` counts what is sent. DeepSpeed's own buckets are freed.

The order of additions is that of DeepSpeed's `reduce_scatter_coalesced`. With more than two ranks a sum may still differ in its last
bit: in which order a collective adds ranks depends on where in the bucket an element lies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from ds_childtune.child.child_shard import ChildShard
from ds_childtune.zero.child_masks import ChildMasks, OwnPart, ParameterChild, masks_note
from ds_childtune.zero.compact_stage3 import ZeroThreePlumbing
from ds_childtune.zero.lean_start import parameters
from ds_childtune.zero.owner_order import OwnerOrder
from ds_childtune.zero.secondary_copies import SecondaryCopies, copies_across_nodes

_MOST_ORDERS = 256
"""Of buckets. In each micro-batch they are the same, except where parameters are used or not by turns."""


@dataclass
class _Bucket:
    """Of one dtype on the wire."""

    entries: dict[int, tuple[Any, Tensor | None]] = field(default_factory=dict)
    """By `ds_id`: the parameter, and the child's elements of its gradient; None: they are taken when the bucket is reduced."""
    numel: int = 0


class SendingZeroThreePlumbing(ZeroThreePlumbing):
    """See [Note: ZeRO-3 sends the child]. The order of shards is that of `read_flat_shards`; `install` is a collective."""

    keeps_places: ClassVar = False

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self._most = int(engine._config.zero_config.reduce_bucket_size)
        """Elements of a bucket."""
        self._children: dict[int, ParameterChild] = {}
        """By `ds_id`."""
        self._buckets: dict[torch.dtype, _Bucket] = {}
        self._orders: dict[tuple[int, ...], OwnerOrder] = {}
        """Of the buckets that there have been, by the `ds_id` of what was in them."""

    def install(self, shards: Sequence[ChildShard]) -> None:
        super().install(shards)
        optimizer = self._optimizer
        held = parameters(optimizer)
        of = [self._partitions[p.ds_id] for p in held]
        parts = [OwnPart(p.ds_numel, i.numel, i.last - i.first, i.index) for p, i in zip(held, of, strict=True)]
        masks = ChildMasks.shared(parts, shards[0].index.device, optimizer.dp_process_group)
        self._children = {p.ds_id: child for p, child in zip(held, masks.parameters, strict=True)}
        if copies_across_nodes(held):
            copies = SecondaryCopies(optimizer, shards, held, masks.parameters)
            self._overrides.around(optimizer, "_post_step", copies.after_step)
        self.note = masks_note(masks.nbytes)

    def _override(self) -> None:
        optimizer, put = self._optimizer, self._overrides
        for bucket in optimizer.ipg_buckets.values():
            bucket.buffer = None
        put.method(optimizer, "reduce_independent_p_g_buckets_and_remove_grads", self._take)
        put.around(optimizer, "independent_gradient_partition_epilogue", self._epilogue)
        put.around(optimizer, "zero_grad", self._drop)
        put.around(optimizer, "_pre_step", self._drop)

    def remove(self) -> None:
        super().remove()
        self._children = {}
        self._buckets.clear()
        self._orders.clear()

    def restore_dense(self, shards: Sequence[ChildShard]) -> None:
        super().restore_dense(shards)
        optimizer = self._optimizer
        if optimizer.contiguous_gradients:
            for dtype, bucket in optimizer.ipg_buckets.items():
                bucket.buffer = torch.empty(self._most, dtype=dtype, device=get_accelerator().current_device_name())

    @torch.no_grad()
    def _take(self, param: Any) -> None:
        # Not yet where a loop over one computation makes a gradient in parts, which autograd adds up.
        if param.grad is None or not getattr(param, "ds_grad_is_ready", True):
            return
        optimizer, child = self._optimizer, self._children[param.ds_id]
        # The hook of a leaf module may come before autograd has added all to a gradient.
        waits = hasattr(param, "ds_z3_leaf_module")
        if not child.kept and not waits:
            param.grad = None
            return
        dtype, numel = optimizer.get_param_comm_dtype(param), param.ds_numel if waits else child.kept
        bucket = self._buckets.setdefault(dtype, _Bucket())
        if param.ds_id in bucket.entries:
            param.grad = None  # which DeepSpeed's `zero_grad` cannot drop on a CPU
            raise RuntimeError(
                f"expected one gradient of each parameter in a backward pass, got two of one of shape {tuple(param.ds_shape)}, which"
                " ZeRO-3 does not add up. Remedy: after a backward pass that an exception has ended, call"
                " engine.optimizer.zero_grad(); else checkpoint activations with use_reentrant=False, or use ZeRO-2."
            )
        if bucket.numel and bucket.numel + numel > self._most:
            self._reduce(dtype)
            bucket = self._buckets.setdefault(dtype, _Bucket())
        # On this stream, so that a whole gradient is free as soon as it has been read, however slow the network is.
        bucket.entries[param.ds_id] = param, None if waits else self._taken(param, dtype)
        bucket.numel += numel

    def _taken(self, param: Any, dtype: torch.dtype) -> Tensor:
        """The child's elements of a gradient, which is freed."""
        gradient, param.grad = param.grad, None
        flat = (gradient.to_dense() if gradient.is_sparse else gradient).reshape(-1)
        values = self._children[param.ds_id].of(flat).to(dtype)
        if not get_accelerator().resolves_data_dependency():
            self._optimizer.reduce_and_partition_stream.wait_stream(get_accelerator().current_stream())
        return values

    def _epilogue(self, original: Callable[..., Any]) -> Any:
        for dtype in sorted(self._buckets, key=str):
            self._reduce(dtype)
        return original()

    def _drop(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._buckets.clear()
        return original(*args, **kwargs)

    @torch.no_grad()
    def _reduce(self, dtype: torch.dtype) -> None:
        """Send what is in a bucket, and add this rank's part to its gradients."""
        optimizer, bucket = self._optimizer, self._buckets.pop(dtype)
        # In one order on all ranks, as DeepSpeed does.
        numbers = sorted(bucket.entries)
        params = [bucket.entries[number][0] for number in numbers]
        values = [self._taken(p, dtype) if v is None else v for p, v in (bucket.entries[n] for n in numbers)]
        children = [self._children[number] for number in numbers]
        self._hold_back()
        with get_accelerator().stream(optimizer.reduce_and_partition_stream):
            rank = dist.get_rank(group=optimizer.dp_process_group)
            mine = [child.counts[rank] for child in children]
            row = self._averaged(self._order(tuple(numbers), values[0].device).rows(values))
            optimizer.partition_grads(params, list(row.narrow(0, 0, sum(mine)).split(mine)))
            if not get_accelerator().is_synchronized_device():
                for each in values:
                    each.record_stream(get_accelerator().current_stream())
            if not get_accelerator().handles_memory_backpressure():
                event = get_accelerator().Event()
                event.record()
                optimizer.param_reduce_events.append(event)

    def _order(self, numbers: tuple[int, ...], device: torch.device) -> OwnerOrder:
        if numbers not in self._orders:
            if len(self._orders) >= _MOST_ORDERS:
                self._orders.clear()
            counts = np.stack([self._children[number].counts for number in numbers])
            self._orders[numbers] = OwnerOrder(counts, device)
        return self._orders[numbers]

    def _hold_back(self) -> None:
        """Wait where several buckets are still on their way, as DeepSpeed does: they take memory."""
        events = self._optimizer.param_reduce_events
        while events and events[0].query():
            events.popleft()
        if len(events) > self._optimizer.max_param_reduce_events:
            events.popleft().synchronize()

    def _averaged(self, matrix: Tensor) -> Tensor:
        """This rank's row of the average over ranks, in the order of operations of `__avg_scatter_grads`."""
        optimizer, group = self._optimizer, self._optimizer.dp_process_group
        ranks = dist.get_world_size(group=group)
        before = optimizer.gradient_predivide_factor if optimizer.postscale_gradients else 1.0
        if before != 1.0:
            matrix.div_(before)
        matrix.div_(ranks)
        row = matrix.new_empty(matrix.numel() // ranks)
        dist.reduce_scatter_tensor(row, matrix, group=group)
        return row.mul_(before) if before not in (1.0, ranks) else row
