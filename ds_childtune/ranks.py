"""Collectives that ds_childtune needs: ranks agree before one of them raises, so that none is left waiting."""

from __future__ import annotations

import hashlib
import math
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils.logging import print_dist
from torch import Tensor

T = TypeVar("T")

_RAISABLE = (ValueError, NotImplementedError, RuntimeError)

_PATIENCE = 60.0
"""Seconds that a rank whose user's code fails waits for the others, which may be slower, but not by much."""

_WHERE_THEY_ARE = {
    True: ": they are probably waiting for it in a collective of the data loader or the model",
    False: "",
}

_agreements: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
"""How often `raise_together` was called in each default process group, alike on every rank: a worker that replaces another one in an
elastic restart has called it less often in its process."""


def limit_waits(seconds: float) -> None:
    """Let a collective that waits longer than this for another rank raise, in every process group that there is now.

    DeepSpeed makes more groups, in which torch's default of 30 minutes (10 with NCCL) holds, whatever `init_distributed` was given. So
    call it after `deepspeed.initialize`, on every rank.
    """
    from torch.distributed import distributed_c10d as c10d

    if not seconds > 0:
        raise ValueError(f"limit_waits: expected seconds above 0, got {seconds!r}. Remedy: pass for example 600.")
    for group in list(c10d._world.pg_map):
        c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def device() -> torch.device:
    """Where tensors for collectives live."""
    return torch.device(get_accelerator().current_device_name())


def this_rank() -> int:
    return int(dist.get_rank())


def world_size() -> int:
    return int(dist.get_world_size())


def sum_over_ranks(tensor: Tensor) -> None:
    """In place."""
    dist.all_reduce(tensor)


def max_over_ranks(tensor: Tensor) -> None:
    """In place."""
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)


def to_host(tensor: Tensor) -> tuple[Tensor, Any]:
    """A copy on the host that nobody has waited for, and the accelerator's event of its arrival; None on a CPU."""
    copy = tensor.to("cpu", non_blocking=True)
    if tensor.device.type == "cpu":
        return copy, None
    event = get_accelerator().Event()
    event.record()
    return copy, event


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
    max_over_ranks(values)
    return values.cpu()


def tell(text: str) -> None:
    """Print a line on rank 0. DeepSpeed's logger would swallow it, as it starts at the level of warnings."""
    print_dist(text, ranks=[0])


@contextmanager
def raising_together(*, users_code: bool = False) -> Iterator[None]:
    """Run the body on every rank; if it raises on any, raise on all. The body must not contain collectives, except in a user's code.

    The error has the type and the text of the lowest failing rank's, and names that rank. See `raise_together`.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    raise_together(error, users_code=users_code)


def raise_together(error: Exception | None, *, users_code: bool = False) -> None:
    """Raise on every rank if `error` is not None on any. A collective; one small all-reduce when nothing is wrong.

    A failing rank prints its error at once, and waits for the others as in any collective: they may be writing a checkpoint.

    Args:
        users_code: what was run is a data loader's or the model's. The others may be inside a collective of it that this rank will
            never join, and do not hear of the error. So this rank waits for a while only, and then raises by itself; they are left to
            the process group's time-out, or to the launcher, which ends a job that has lost a rank.

    Raises:
        Unanswered: on a failing rank, when the others did not come.
    """
    rank, number = dist.get_rank(), _next_agreement()
    failed = torch.zeros(2, (dist.get_world_size() + 31) // 32, dtype=torch.int64, device=device())
    """A bit for each rank: which have failed, and which of them have left their words in the store."""
    words = ""
    if error is None:
        dist.all_reduce(failed)
    else:
        kind, text = _kind_and_text(error)
        words = f"{kind} {text}"
        # On a new line, below a progress bar. The log may be on the full disk that the error is about.
        with suppress(OSError, ValueError):
            print(f"\n[rank {rank}] ds_childtune: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        failed[0, rank // 32] = 1 << rank % 32
        failed[1, rank // 32] = _leave_words(number, rank, words) << rank % 32
        if not _all_reduce_in_time(failed, _PATIENCE if users_code else math.inf):
            where = f" in {_PATIENCE:.0f} s" if users_code else ""
            raise Unanswered(
                f"[rank {rank}] {text} (The other ranks did not answer{where}, so only this rank raises{_WHERE_THEY_ARE[users_code]}.)"
            ) from error
    ranks, with_words = (
        [32 * i + bit for i, word in enumerate(row) for bit in range(32) if word >> bit & 1] for row in failed.tolist()
    )
    if rank not in ranks and error is not None:
        raise Unanswered(
            f"[rank {rank}] {_kind_and_text(error)[1]} (What came back from the other ranks was not their answer, so only this rank"
            f" raises{_WHERE_THEY_ARE[users_code]}.)"
        ) from error
    if not ranks:
        return
    first, others = ranks[0], len(ranks) - 1
    if first in with_words:
        words = _default_store().get(_report_key(number, first)).decode()
    elif first != rank:
        words = f"{_RAISABLE.index(RuntimeError)} an error, which that rank has printed."
    number_of_kind, _, text = words.partition(" ")
    where = f"[rank {first}{f' and {others} more' if others else ''}]"
    raise _RAISABLE[int(number_of_kind)](f"{where} {text}") from error


def _next_agreement() -> int:
    group = torch.distributed.distributed_c10d._get_default_group()
    number = _agreements.get(group, 0)
    _agreements[group] = number + 1
    return number


class Unanswered(RuntimeError):
    """An error of this rank that did not reach the others. What it leaves on them cannot be cleaned up together."""


def _kind_and_text(error: Exception) -> tuple[int, str]:
    kind = next((i for i, k in enumerate(_RAISABLE) if isinstance(error, k)), len(_RAISABLE) - 1)
    return kind, str(error) if isinstance(error, _RAISABLE) else f"{type(error).__name__}: {error}"


def _all_reduce_in_time(tensor: Tensor, patience: float) -> bool:
    """False when the other ranks have not come in so many seconds or the process group's own, or one of them has died."""
    work = dist.all_reduce(tensor, async_op=True)
    deadline = time.monotonic() + patience
    while not work.is_completed():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    try:
        work.wait()
    except RuntimeError:
        return False
    return True


def _leave_words(number: int, rank: int, words: str) -> bool:
    """False where there is no store, or it does not take them: one in a file may be on the full disk that the error is about."""
    store = _default_store()
    if store is None:
        return False
    try:
        store.set(_report_key(number, rank), words)
    except RuntimeError:
        return False
    return True


def _report_key(number: int, rank: int) -> str:
    return f"ds_childtune/error/{number}/{rank}"


def _default_store() -> Any:
    """Where a failing rank leaves its words: reading them needs no collective that it would have to take part in. None with MPI."""
    return torch.distributed.distributed_c10d._get_default_store()


def check_same(text: str, what: str, remedy: str = "give every rank the same config and model") -> None:
    """Raise ValueError on every rank unless `text` is the same on all of them. A collective."""
    digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")
    extremes = torch.tensor([digest, -digest], dtype=torch.int64, device=device())
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    if int(extremes[0]) != -int(extremes[1]):
        texts = gather_objects(text)
        other = next(r for r, t in enumerate(texts) if t != texts[0])
        raise ValueError(
            f"{what}: expected the same on every rank, got {texts[0]} on rank 0 and {texts[other]} on rank {other}."
            f" Remedy: {remedy}."
        )
