"""Sums over ranks of local gradients, or of their squares: the Fisher pass's own reduction.

[Note: the pass's own reduction]
DeepSpeed reduces gradients in whatever dtype training communicates in, through buckets whose contents depend on which parameters a
rank's micro-batch has reached, on a separate stream. For squares that is not good enough: sums of equal terms saturate in bf16 over
many ranks, squares underflow in fp16, and what the buckets hold of a parameter that was not reached is left over from before. So a
calibration pass takes each rank's whole gradient before DeepSpeed does anything with it, and this module reduces it:

- in fp32, on the stream that the gradient was made on, so that nothing reads it after it is freed;
- every eligible parameter once in every micro-batch, as zeros where it was not reached, so that no value is stale and that ranks issue
  the same collectives whatever their micro-batches reach;
- in a bucket that is filled and emptied, never more than `most` fp32 elements.

A bucket is a matrix with a row for each partition. At ZeRO-3, where every parameter is split on its own, row r holds elements of
partition r and a reduce-scatter hands each rank its own; elsewhere there is one row, and an all-reduce:

    parameter of 5 elements, 2 partitions of 3      bucket, columns 7 to 9
    [ 0  1  2 | 3  4  pad ]                         row 0  .. [ 0  1  2 ] ..     to rank 0
                                                    row 1  .. [ 3  4  0 ] ..     to rank 1
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from ds_childtune.ranks import device

Receive = Callable[[str, int, Tensor], None]
"""`receive(name, start, sums)`: fp32 1-D, of the elements from `start` on of the flattened parameter; valid only during the call."""


@dataclass(frozen=True)
class Split:
    """How one parameter is split."""

    numel: int
    columns: int
    """Elements of a partition, padding included."""


class TakenTwice(Exception):
    """A parameter's gradient came a second time in one micro-batch, after its first part had been reduced."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class Reduction:
    """See [Note: the pass's own reduction]. For each micro-batch: `begin`, `add` gradients in one order on all ranks, `finish`."""

    def __init__(
        self,
        splits: Mapping[str, Split],
        partitions: int,
        receive: Receive,
        *,
        squares: bool,
        clip: float | None = None,
        most: int,
    ) -> None:
        """
        Args:
            splits: of every eligible parameter, in one order on all ranks.
            partitions: 1, or the number of ranks where each of them holds one partition of every parameter.
            squares: reduce squares of gradients, clipped to the norm `clip` first, instead of gradients.
            most: elements of the bucket, about.
        """
        self._splits = splits
        self._receive = receive
        self._squares = squares
        self._clip = clip
        self._columns = sum(split.columns for split in splits.values())
        width = max(1, min(most // partitions, self._columns))
        self._bucket = torch.zeros(partitions, width, device=device())
        self._mine = torch.zeros(width, device=device()) if partitions > 1 else self._bucket[0]
        self._entries: list[tuple[str, int, int, int]] = []
        """What the bucket holds: a parameter's name, the first of its columns, where they begin in the bucket, how many."""
        self._filled = 0
        """Columns of the bucket."""
        self._sent = 0
        """Columns that this micro-batch has filled so far."""
        self._taken: list[str] = []
        self._seen: set[str] = set()
        self._silent = False
        self._unscale = 1.0
        self._stream = None
        self._abandoned = False
        self.not_finite = torch.zeros((), dtype=torch.bool, device=device())
        """Whether a sum of this micro-batch is inf or NaN."""

    @property
    def taken(self) -> list[str]:
        """The parameters whose gradients were added in this micro-batch, in that order."""
        return self._taken

    def begin(self, *, silent: bool, loss_scale: float) -> None:
        """
        Args:
            silent: this rank adds zeros: it has no batch left, and takes part for the other ranks.
            loss_scale: what gradients are divided by.
        """
        self._silent = silent
        self._unscale = 1.0 / loss_scale
        self._taken, self._seen = [], set()
        self._sent = 0
        self.not_finite.zero_()

    @torch.no_grad()
    def add(self, name: str, grad: Tensor | None) -> None:
        """Take this rank's whole gradient of a parameter, which may be freed afterwards; None where it has none.

        Raises:
            TakenTwice: the parameter was added before.
        """
        if name in self._seen:
            raise TakenTwice(name)
        self._seen.add(name)
        if grad is None:
            self._put(name, None, None)
            return
        self._taken.append(name)
        flat = (grad.to_dense() if grad.is_sparse else grad).detach().reshape(-1)
        self._put(name, flat, self._factor(flat))

    @torch.no_grad()
    def finish(self) -> None:
        """Reduce what is left, and zeros for the parameters that were not added."""
        for name in self._splits:
            if name not in self._seen:
                self._put(name, None, None)
        self._flush()

    @torch.no_grad()
    def abandon(self) -> None:
        """After an exception: take part in this micro-batch's remaining collectives, so that no rank waits for this one."""
        self._abandoned = self._silent = True
        while self._sent < self._columns:
            count = min(self._columns - self._sent, self._bucket.shape[1] - self._filled)
            self._advance(count)
        self._flush()

    def _factor(self, flat: Tensor) -> Tensor | None:
        """What clips it: torch.nn.utils.clip_grad_norm_'s formula, which the original code applies to each tensor."""
        if self._clip is None:
            return None
        norm: Tensor = torch.linalg.vector_norm(flat, dtype=torch.float32) * self._unscale
        return (self._clip / (norm + 1e-6)).clamp(max=1.0)

    def _put(self, name: str, flat: Tensor | None, factor: Tensor | None) -> None:
        """Fill columns, as many as fit at a time."""
        self._follow_stream()
        first, columns = 0, self._splits[name].columns
        while first < columns:
            count = min(columns - first, self._bucket.shape[1] - self._filled)
            out = self._bucket[:, self._filled : self._filled + count]
            if flat is None:
                out.zero_()
            else:
                fill(out, flat, first, columns)
                if factor is not None:
                    out.mul_(factor)
            self._entries.append((name, first, self._filled, count))
            first += count
            self._advance(count)

    def _advance(self, count: int) -> None:
        self._filled += count
        self._sent += count
        if self._filled == self._bucket.shape[1]:
            self._flush()

    def _flush(self) -> None:
        """Reduce the bucket and hand out this rank's sums."""
        if not self._filled:
            return
        bucket, mine = self._bucket[:, : self._filled], self._mine[: self._filled]
        if self._silent:
            bucket.zero_()
        elif self._unscale != 1.0:
            bucket.mul_(self._unscale)
        if self._squares:
            bucket.mul_(bucket)
        if len(bucket) > 1:
            dist.reduce_scatter_tensor(mine, bucket.contiguous().view(-1))
        else:
            dist.all_reduce(mine)
        entries, self._entries, self._filled = self._entries, [], 0
        if self._abandoned:
            return
        self.not_finite |= ~mine.sum().isfinite()
        partition = dist.get_rank() if len(bucket) > 1 else 0
        for name, first, place, count in entries:
            split = self._splits[name]
            start = partition * split.columns + first
            count = min(count, split.numel - start)
            if count > 0:
                self._receive(name, start, mine[place : place + count])

    def _follow_stream(self) -> None:
        """The bucket was last written on another stream, if the backward pass runs on several."""
        stream = get_accelerator().current_stream()
        if self._stream is not None and stream != self._stream:
            stream.wait_stream(self._stream)
        self._stream = stream


def fill(out: Tensor, flat: Tensor, first: int, columns: int) -> None:
    """out[r, j] = flat[r * columns + first + j], and zero beyond its end.

    Args:
        out: [partitions, count], count <= columns - first.
        flat: 1-D, contiguous, of at most partitions * columns elements.
    """
    partitions, count = out.shape
    whole = min(partitions, max(0, (flat.numel() - first - count) // columns + 1))
    if whole:
        out[:whole].copy_(flat.as_strided((whole, count), (columns, 1), flat.storage_offset() + first))
    if whole < partitions:
        out[whole:].zero_()
        start = whole * columns + first
        rest = flat[start : start + count]
        out[whole, : rest.numel()].copy_(rest)
