"""The ranks of launch/finetune.py: their process group, errors that all of them raise, work that one does for the others."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import datasets
import deepspeed
import torch
import transformers
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from op_builds import warn_of_abandoned_locks

from ds_childtune.orphans import end_with_launcher

T = TypeVar("T")


@contextmanager
def processes() -> Iterator[None]:
    """The process group: NCCL on GPUs, gloo on CPUs. Ranks come from the launcher's environment, or from MPI through mpi4py."""
    end_with_launcher()
    if local_rank() == 0:
        warn_of_abandoned_locks()
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    if on_cpu:
        # DeepSpeed would compile its shared-memory op with g++, for a collective that training does not use.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Spelt out, as a machine with oneCCL would otherwise get its backend, which needs compiling as well.
    deepspeed.init_distributed("gloo" if on_cpu else accelerator.communication_backend_name(), verbose=False)
    accelerator.set_device(local_rank())
    if on_cpu and "OMP_NUM_THREADS" not in os.environ:
        # Otherwise each rank starts a thread for every core, and they wait for one another.
        ranks_here = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size())))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    if dist.get_rank() != 0:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    # DeepSpeed's calls, about which a user can do nothing.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    try:
        yield
    finally:
        # gloo aborts at the interpreter's exit otherwise.
        dist.destroy_process_group()


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def together(work: Callable[[], T]) -> T:
    """`work()` on every rank; if it fails on any, every rank raises, so that none is left waiting in a collective."""
    result, error = None, None
    try:
        result = work()
    except Exception as caught:
        error = caught
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, None if error is None else f"{type(error).__name__}: {error}")
    for rank, text in enumerate(errors):
        if text is not None:
            raise ValueError(f"[rank {rank}] {text}") from error
    return result  # type: ignore[return-value]


def first_local_rank_first(work: Callable[[], T]) -> T:
    """`work()` on one rank of every node, then on the others, which find downloads and tokenised rows in its cache."""
    result = together(lambda: work() if local_rank() == 0 else None)
    return together(lambda: work() if result is None else result)
