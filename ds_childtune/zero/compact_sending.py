"""Compact masters and gradients at ZeRO 1 and 2: ranks send each other only the child.

[Note: ZeRO-2 sends the child]
Every rank knows which elements of each parameter are the child's, and whose (see [Note: the child in one row]). Overridden are:

    process_gradients, reduce_ready_...        take the child's elements of a gradient as soon as it is whole, add them up on this
                                               rank, and free the gradient: from the first micro-batch on nothing else is kept
    overlapping_..._reduce_epilogue            at the accumulation boundary one reduce-scatter; `averaged_gradients` is the child's
    finalize_gradient_accumulation_boundary    likewise, where the caller says when to step
    exit_backward                              notes that a micro-batch waits for its step
    clear_backward_seen_flag                   in the next forward pass: notes that an exception has ended a backward pass before
    step                                       runs on child shards, see below; then one all-gather of the child's 16-bit values
    zero_grad, and the engine's                forget what was added up, too, where DeepSpeed does; see [Note: half a backward pass]

For the length of a step the lists that it reads hold tensors of the child's size. So overflow check, norm, unscaling, clipping and the
step are DeepSpeed's own code. It copies masters into what is sent afterwards, and finds nothing to gather by itself. Between steps the
lists are as in [Note: ZeRO-2 on child shards], and so is what reads and saves them.

The order of additions is ZeRO-1's: micro-batches on each rank first, then ranks. The gradient norm is the child's. Values outside the
child that are not finite are not seen, and do no harm.

[Note: half a backward pass]
An exception in a backward pass, for want of memory for example, leaves what was added up before. DeepSpeed's ZeRO-1 has it in
`param.grad`: there `engine.zero_grad()` drops it, and without that the next backward pass adds to it. So does this. DeepSpeed's ZeRO-2
cannot go on. Here it can after `engine.zero_grad()`, and says so: else part of a micro-batch would be trained without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from ds_childtune.child.child_shard import put_
from ds_childtune.child.compact import Parts
from ds_childtune.zero.child_layout import ChildLayout
from ds_childtune.zero.child_masks import masks_note
from ds_childtune.zero.compact_stage12 import ZeroTwoPlumbing
from ds_childtune.zero.overrides import Overrides


class Gradients(list[Tensor]):
    """`averaged_gradients` of one group: one tensor, which DeepSpeed need not flatten."""

    def __init__(self, flat_partition: Tensor) -> None:
        super().__init__([flat_partition])
        self.flat_partition = flat_partition


class SendingPlumbing(ZeroTwoPlumbing):
    """See [Note: ZeRO-2 sends the child]. The order of shards is that of `read_flat_shards`; `install` is a collective."""

    parts: Parts = "moments, masters and gradients"

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self._engine = engine
        self._layout: ChildLayout | None = None
        self._sum: Tensor | None = None
        """This rank's gradients since the last reduction, as the layout's row."""
        self._stream: Any = None
        """That it was last written on."""
        self._in_backward = False
        """Whether a backward pass has given gradients, and has not ended."""
        self._half = False
        """Whether it never will: another forward pass has begun. See [Note: half a backward pass]."""

    def _override(self) -> None:
        optimizer, put = self._optimizer, self._overrides
        self._layout = ChildLayout(optimizer, self._shards)
        if self._layout.ranks > 1:
            self.note = masks_note(self._layout.nbytes)
        for i, index in enumerate(self._layout.index):
            if (gradients := optimizer.averaged_gradients.get(i)) is not None:
                whole = torch.cat([g.reshape(-1) for g in gradients])
                optimizer.averaged_gradients[i] = Gradients(whole.index_select(0, index))
        put.method(optimizer, "process_gradients", self._take)
        put.method(optimizer, "reduce_ready_partitions_and_remove_grads", self._take)
        put.method(optimizer, "overlapping_partition_gradients_reduce_epilogue", self._epilogue)
        put.method(optimizer, "finalize_gradient_accumulation_boundary", self._finalize)
        put.around(optimizer, "exit_backward", self._exit_backward)
        put.around(optimizer, "clear_backward_seen_flag", self._clear_backward_seen_flag)
        put.around(optimizer, "zero_grad", self._zero_grad)
        put.around(self._engine, "zero_grad", self._zero_grad)
        put.around(optimizer, "step", self._step)

    def remove(self) -> None:
        places = [] if self._layout is None else self._layout.index
        for i, index in enumerate(places):
            if (gradients := self._optimizer.averaged_gradients.get(i)) is not None:
                dense = gradients[0].new_zeros(self._shards[i].flat.numel)
                put_(dense, index, gradients[0])
                self._optimizer.averaged_gradients[i] = [dense]
        super().remove()
        self._layout = self._sum = self._stream = None
        self._in_backward = self._half = False

    # ---------------------------------------------------------------- gradients

    @property
    def _installed(self) -> ChildLayout:
        assert self._layout is not None, "not installed"
        return self._layout

    @torch.no_grad()
    def _take(self, param: Any, group: int) -> None:
        # Not yet where a loop over one computation makes a gradient in parts, which autograd adds up.
        if param.grad is None or not getattr(param, "ds_grad_is_ready", True):
            return
        if self._half and self._optimizer.partition_gradients:
            raise RuntimeError(
                "backward: expected that the backward pass before has ended, got one that an exception has ended half-way, and"
                " gradients of it in what is added up. Remedy: catch that exception, and call engine.zero_grad(), which drops all"
                " micro-batches since the last step."
            )
        self._in_backward = True
        pieces = self._installed.pieces.get(id(param), ())
        if pieces:
            row = self._followed()
            gradient = (param.grad.to_dense() if param.grad.is_sparse else param.grad).reshape(-1)
            for piece in pieces:
                row.narrow(0, piece.start, piece.count).add_(piece.of(gradient))
        param.grad = None

    def _followed(self) -> Tensor:
        """The sum so far, safe to use on the current stream: a backward pass may run on several."""
        stream = get_accelerator().current_stream()
        if self._sum is None:
            layout = self._installed
            self._sum = torch.zeros(layout.numel, dtype=self._optimizer.dtype, device=layout.device)
        elif stream != self._stream and not get_accelerator().resolves_data_dependency():
            stream.wait_stream(self._stream)
            self._sum.record_stream(stream)
        self._stream = stream
        return self._sum

    def _epilogue(self) -> None:
        optimizer = self._optimizer
        if optimizer.is_gradient_accumulation_boundary():
            self._reduce()
        optimizer._release_ipg_buffers()
        optimizer._clear_param_grad_only()
        optimizer._epilogue_ran_this_backward = True

    def _finalize(self) -> None:
        self._optimizer.set_gradient_accumulation_boundary(True)
        self._reduce()

    @torch.no_grad()
    def _reduce(self) -> None:
        optimizer = self._optimizer
        mine, self._sum = self._averaged(self._followed()), None
        start = 0
        for i, count in enumerate(self._installed.mine):
            part = mine.narrow(0, start, count)
            before = optimizer.averaged_gradients.get(i)
            # A backward pass may end in several parts, as with reentrant checkpoints. After another forward pass its backward pass
            # replaces it, as in DeepSpeed. A second backward pass without one adds up: it looks like a part, and loses nothing.
            if before is not None and optimizer._epilogue_ran_this_backward:
                part = part + before.flat_partition
            optimizer.averaged_gradients[i] = Gradients(part)
            start += count

    def _averaged(self, row: Tensor) -> Tensor:
        """What this rank owns of the average over ranks, in the order of operations of `average_tensor`."""
        optimizer, ranks, dtype = self._optimizer, self._installed.ranks, row.dtype
        # Under torch.autocast parameters may differ in it.
        sent = next(iter(optimizer.ipg_buckets)) if len(optimizer.ipg_buckets) == 1 else torch.float32
        if optimizer.reduce_scatter:
            if optimizer.gradient_average:
                row.div_(float(ranks))
            return self._installed.reduce(row.to(sent)).to(dtype)
        row = row.to(sent)
        if not optimizer.gradient_average:
            return self._installed.reduce(row).to(dtype)
        if not optimizer.postscale_gradients:
            return self._installed.reduce(row.div_(float(ranks))).to(dtype)
        before = optimizer.gradient_predivide_factor
        if before != 1.0:
            row.mul_(1.0 / before)
        mine = self._installed.reduce(row)
        return (mine.mul_(before / float(ranks)) if before != ranks else mine).to(dtype)

    def _exit_backward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # As DeepSpeed does in `process_gradients`, but on a rank that had no gradient, too: ranks must agree on it.
        self._optimizer.micro_step_id = max(self._optimizer.micro_step_id, 0)
        self._in_backward = False
        return original(*args, **kwargs)

    def _clear_backward_seen_flag(self, original: Callable[..., Any]) -> Any:
        self._half = self._in_backward
        return original()

    def _zero_grad(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # At ZeRO-2 whole micro-batches stay, as in DeepSpeed.
        if self._in_backward or (self._sum is not None and not self._optimizer.partition_gradients):
            self._forget()
        return original(*args, **kwargs)

    def _forget(self) -> None:
        self._sum, self._optimizer.micro_step_id = None, -1  # none waits
        self._in_backward = self._half = False

    # ---------------------------------------------------------------- the step

    def _step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        optimizer, layout = self._optimizer, self._installed
        flats = optimizer.bit16_groups_flat
        owned = self._new_weights()
        sent: Sequence[Tensor] = owned.split(layout.mine)
        with Overrides() as put:
            put.attribute(optimizer, "single_partition_of_fp32_groups", [s.tensor for s in self._shards])
            put.attribute(optimizer, "partition_size", layout.mine)
            # DeepSpeed copies masters into this rank's, and gathers as many groups as there are flat buffers.
            put.attribute(optimizer, "parallel_partitioned_bit16_groups", [[part] * layout.ranks for part in sent])
            put.attribute(optimizer, "bit16_groups_flat", [])
            put.method(optimizer, "_update_model_bit16_weights", _nothing)
            put.method(optimizer, "_lazy_init_hp_params_optimizer_state", _nothing)
            result = original(*args, **kwargs)
        if not optimizer.overflow:
            with torch.no_grad():
                self._spread(owned, flats)
            # As DeepSpeed ends its own steps: `module.to`, `module.float` and others give parameters storage of their own.
            for group in range(len(flats)):
                optimizer._update_model_bit16_weights(group)
        return result

    def _new_weights(self) -> Tensor:
        """1-D: where DeepSpeed's step leaves the child's new 16-bit values, by group."""
        like: Tensor = self._optimizer.bit16_groups_flat[0]
        return like.new_empty(sum(self._installed.mine))

    def _spread(self, owned: Tensor, flats: Sequence[Tensor]) -> None:
        """Make them all ranks' weights. A collective."""
        self._installed.spread(owned, flats)


def _nothing(*_: object, **__: object) -> None:
    pass
