"""Collectives that ds_childtune needs: ranks agree before one of them raises, so that none is left waiting."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils.logging import print_dist
from torch import Tensor

T = TypeVar("T")

_RAISABLE = (ValueError, NotImplementedError, RuntimeError)


def device() -> torch.device:
    """Where tensors for collectives live."""
    return torch.device(get_accelerator().current_device_name())


def sum_over_ranks(tensor: Tensor) -> None:
    """In place."""
    dist.all_reduce(tensor)


def gather_objects(value: T) -> list[T]:
    """`value` of every rank, on every rank. For small things."""
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_first(find: Callable[[], T]) -> T:
    """What rank 0 finds, on every rank: for whatever is decided by looking at a file system, which may show ranks different things.

    A collective; raises on every rank what `find` raises on rank 0.
    """
    values: list[Any] = [None]
    with raising_together():
        if dist.get_rank() == 0:
            values = [find()]
    dist.broadcast_object_list(values, src=0)
    return values[0]  # type: ignore[no-any-return]


def true_on_all(flag: bool) -> bool:
    """Whether `flag` is True on every rank. A collective."""
    wrong = torch.tensor([not flag], dtype=torch.int64, device=device())
    dist.all_reduce(wrong)
    return int(wrong) == 0


def largest_of_ranks(tensor: Tensor) -> Tensor:
    """int64 on the CPU: the largest value of any rank, element by element. A collective."""
    values = tensor.to(device())
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values.cpu()


def tell(text: str) -> None:
    """Print a line on rank 0. DeepSpeed's logger would swallow it, as it starts at the level of warnings."""
    print_dist(text, ranks=[0])


@contextmanager
def raising_together() -> Iterator[None]:
    """Run the body on every rank; if it raises on any, raise on all. The body must not contain collectives.

    The error has the type and the text of the lowest failing rank's, and names that rank.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    raise_together(error)


def raise_together(error: Exception | None) -> None:
    """Raise on every rank if `error` is not None on any. A collective; one small all-reduce when nothing is wrong."""
    failed = torch.tensor([error is not None], dtype=torch.int64, device=device())
    dist.all_reduce(failed)
    if int(failed) == 0:
        return
    kind = next((i for i, k in enumerate(_RAISABLE) if isinstance(error, k)), len(_RAISABLE) - 1)
    text = None
    if error is not None:
        text = str(error) if isinstance(error, _RAISABLE) else f"{type(error).__name__}: {error}"
    reports = gather_objects((kind, text))
    rank, (kind, text) = next((r, report) for r, report in enumerate(reports) if report[1] is not None)
    others = sum(report[1] is not None for report in reports) - 1
    where = f"[rank {rank}{f' and {others} more' if others else ''}]"
    raise _RAISABLE[kind](f"{where} {text}") from error


def check_same(text: str, what: str) -> None:
    """Raise ValueError on every rank unless `text` is the same on all of them. A collective."""
    digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")
    extremes = torch.tensor([digest, -digest], dtype=torch.int64, device=device())
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    if int(extremes[0]) != -int(extremes[1]):
        texts = gather_objects(text)
        other = next(r for r, t in enumerate(texts) if t != texts[0])
        raise ValueError(
            f"{what}: expected the same on every rank, got {texts[0]} on rank 0 and {texts[other]} on rank {other}."
            " Remedy: give every rank the same config and model."
        )
