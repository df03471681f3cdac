"""Calibration batches of all ranks, paired up: ranks may have different numbers of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ds_childtune.ranks import device, raise_together, sum_over_ranks, this_rank, world_size
from ds_childtune.selection.loss import outline


def check_batches(batches: Any) -> None:
    """Raise ValueError for one micro-batch in place of an iterable of them, and for what cannot be iterated."""
    if isinstance(batches, (Mapping, Tensor, str)) or not isinstance(batches, Iterable):
        if hasattr(batches, "__getitem__") and not isinstance(batches, (Mapping, Tensor, str)):
            return  # a torch Dataset, which python iterates by index
        raise ValueError(
            f"select: expected an iterable of micro-batches, got {outline(batches)}."
            " Remedy: pass a DataLoader or a list of micro-batches; for a single one, select([batch])."
        )


@dataclass(frozen=True)
class Round:
    """One micro-batch on every rank."""

    number: int
    batch: Any
    own: bool
    """False where this rank has no batch left and runs an old one at weight zero, to keep the others company."""
    active: int
    """Ranks that have a batch to run."""


def rounds(batches: Iterable[Any], max_batches: int | None) -> Iterator[Round]:
    """Pair up the ranks' iterables, which may differ in length; the ranks agree before each batch."""
    rank, ranks = this_rank(), world_size()
    source = _catching(batches)
    batch, used, number = None, 0, 0
    exhausted = False
    with tqdm(desc="Fisher", unit=" batches", total=max_batches, disable=rank != 0, leave=False) as bar:
        while max_batches is None or used < max_batches:
            fresh, error = (None, None) if exhausted else next(source)
            exhausted |= fresh is None
            raise_together(error, users_code=True)
            has_batch = torch.zeros(ranks, dtype=torch.int64, device=device())
            has_batch[rank] = int(not exhausted)
            sum_over_ranks(has_batch)
            if number == 0 and not bool(has_batch.all()):
                raise ValueError(_no_batches(has_batch))
            if max_batches is not None:
                has_batch[has_batch.cumsum(0) > max_batches - used] = 0
            active = int(has_batch.sum())
            if active == 0:
                return
            batch = batch if fresh is None else fresh[0]
            yield Round(number, batch, bool(has_batch[rank]), active)
            used += active
            number += 1
            bar.update(active)


def _catching(batches: Iterable[Any]) -> Iterator[tuple[tuple[Any] | None, Exception | None]]:
    """Yields `((batch,), None)`, and at the end `(None, None)`, or `(None, error)` where the iterable raises."""
    try:
        for batch in batches:
            yield (batch,), None
    except Exception as error:
        yield None, error
    while True:
        yield None, None


def _no_batches(has_batch: Tensor) -> str:
    empty = [r for r, has in enumerate(has_batch.tolist()) if not has]
    who = "every rank" if len(empty) == has_batch.numel() else f"rank {', '.join(map(str, empty[:8]))}"
    return (
        f"select: expected at least one calibration batch on each of {has_batch.numel()} ranks, got none on {who}."
        " Remedy: pass an iterable that is not empty or exhausted; with few samples, let ranks share batches."
    )
