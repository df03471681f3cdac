"""A few processes that run test functions together, for as many tests as there are.

One spawn, many cases: `Ranks` starts its processes once and then runs one function at a time on all of them. A test
calls `ranks.run(function, ...)` and gets what the function returned on each rank; what is proven is asserted by the test
itself, in pytest's process. World size 1 takes the same path.

A rank that raises, dies or hangs fails only the running test: its traceback (for a hang, its stack) is in the failure, the
processes are killed, and the next test starts fresh ones.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import io
import logging
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from tests.support.hosts import INTERFACE, Hosts

T = TypeVar("T")

CASE_SECONDS = 300.0
"""A case that is not done by then hangs. Far above what any of them takes, the first use of a compiled op included."""

GRACE_SECONDS = 20.0
"""How long the other ranks may go on once one has failed; they often wait for it in a collective."""


class RankFailure(Exception):
    """A test function failed, died or hung on some rank."""


class Ranks:
    """`world_size` processes in one process group, each of them ready to run a function."""

    def __init__(self, world_size: int, hosts: Hosts | None = None) -> None:
        """`hosts`: each rank runs on one of these, and the store on the first."""
        self.world_size = world_size
        self._hosts = hosts
        self._processes: list[Any] = []
        self._pipes: list[connection.Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._store: dist.TCPStore | None = None

    def run(self, function: Callable[..., T], /, *args: Any, seconds: float = CASE_SECONDS, **kwargs: Any) -> list[T]:
        """Call a module-level function on every rank at once, and return what each of them returned.

        Raises:
            RankFailure: with every rank's traceback, exit code or stack, when one of them did not return in time.
        """
        if not self._processes:
            self._start()
        job = pickle.dumps((function, args, kwargs))
        for pipe in self._pipes:
            pipe.send_bytes(job)
        answers, troubles = self._answers(seconds)
        if troubles:
            self._kill()
            lines = [f"rank {rank} of {self.world_size}: {trouble}" for rank, trouble in sorted(troubles.items())]
            raise RankFailure("\n".join([f"{function.__module__}.{function.__qualname__} failed", *lines]))
        return [answers[rank] for rank in range(self.world_size)]

    def _answers(self, seconds: float) -> tuple[dict[int, T], dict[int, str]]:
        """What the ranks returned, and what went wrong on those that returned nothing."""
        answers: dict[int, Any] = {}
        troubles: dict[int, str] = {}
        pending = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        deadline = time.monotonic() + seconds
        while pending:
            ready = connection.wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                assert isinstance(pipe, connection.Connection)
                rank = pending.pop(pipe)
                try:
                    failed, answer = torch.load(io.BytesIO(pipe.recv_bytes()), map_location="cpu", weights_only=False)
                except EOFError:
                    failed, answer = True, f"died\n{self._stderr(rank)}"
                if failed:
                    troubles[rank] = answer
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
                else:
                    answers[rank] = answer
        for rank in pending.values():
            troubles[rank] = f"did not return; its stack:\n{self._stack(rank)}"
        return answers, troubles

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        # In this process, so that it outlives a rank; in no file, as tests forbid ranks to write.
        with self._hosts.inside(0) if self._hosts else contextlib.nullcontext():
            self._store = dist.TCPStore(self._address, 0, is_master=True, wait_for_workers=False)
        context = forked() if get_accelerator().device_name() == "cpu" else multiprocessing.get_context("spawn")
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            group = _Group(self.world_size, self._address, self._store.port, self._hosts)
            arguments = (rank, group, self._folder.name, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    @property
    def _address(self) -> str:
        """Of the store."""
        return "127.0.0.1" if self._hosts is None else self._hosts.address(0)

    def close(self) -> None:
        """End the processes, in order: each destroys its process group."""
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps(None))
        for process in self._processes:
            process.join(timeout=GRACE_SECONDS)
        codes = [process.exitcode for process in self._processes]
        self._kill()
        if any(codes):
            raise RankFailure(f"exit codes of {self.world_size} ranks after the last case: {codes}")

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes.clear()
        self._pipes.clear()
        self._store = None
        if self._folder is not None:
            self._folder.cleanup()

    def _stack(self, rank: int) -> str:
        """Where a rank that hangs is. Its faulthandler writes that when asked to, and then ends it."""
        process = self._processes[rank]
        os.kill(process.pid, signal.SIGABRT)
        process.join(timeout=GRACE_SECONDS)
        return self._stderr(rank)

    def _stderr(self, rank: int) -> str:
        assert self._folder is not None
        path = _stderr_path(self._folder.name, rank)
        return path.read_text()[-6000:] if path.exists() else "(it had not started)"


def forked() -> BaseContext:
    """Processes that begin with `tests.support.preloaded`. Not for GPUs, whose driver does not outlive a fork."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.preloaded"])
    return context


def _stderr_path(folder: str, rank: int) -> Path:
    return Path(folder) / f"stderr-{rank}"


@dataclass(frozen=True)
class _Group:
    """What a process needs to know in order to join."""

    world_size: int
    address: str
    """Of the store."""
    port: int
    hosts: Hosts | None


def _serve(rank: int, group: _Group, folder: str, pipe: connection.Connection) -> None:
    """The life of one process: join the group, run what comes, leave the group."""
    world_size = group.world_size
    if group.hosts is not None:
        group.hosts.enter(rank)
        os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE
    with _stderr_path(folder, rank).open("w", buffering=1) as stderr:
        os.dup2(stderr.fileno(), 2)
        faulthandler.enable()
        gc.freeze()  # what the server has imported stays
        _set_environment(rank, world_size)
        # DeepSpeed would compile its shared-memory op, for a collective that training does not use.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        store = dist.TCPStore(group.address, group.port, world_size, is_master=False)
        # Longer than any case: it is the parent who notices a hang, and says where.
        limit = timedelta(seconds=10 * CASE_SECONDS)
        dist.init_process_group(_backend(world_size), store=store, rank=rank, world_size=world_size, timeout=limit)
        while (job := pickle.loads(pipe.recv_bytes())) is not None:
            pipe.send_bytes(_outcome(*job))
        dist.destroy_process_group()


def _outcome(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    """(failed, result or traceback) of one call, as `torch.save` writes it: the parent wants tensors on the CPU."""
    try:
        return _saved((False, function(*args, **kwargs)))
    except BaseException:
        return _saved((True, traceback.format_exc()))
    finally:
        gc.collect()
        # What is left are modules, above all. Engines are collected more than once in every case, by DeepSpeed too: half a second
        # each if they had to walk through those.
        gc.freeze()


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _devices(world_size: int) -> int:
    """Devices that the ranks have: each its own, or all of them too few, which they share."""
    return world_size if get_accelerator().device_name() == "cpu" else min(world_size, get_accelerator().device_count())


def _backend(world_size: int) -> str:
    """The accelerator's, except for ranks that share a device, which nccl refuses."""
    own = get_accelerator().device_name() != "cpu" and _devices(world_size) == world_size
    return str(get_accelerator().communication_backend_name()) if own else "gloo"


def _set_environment(rank: int, world_size: int) -> None:
    """What a launcher would set, and silence."""
    local_rank = rank % _devices(world_size)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"LOCAL_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "TQDM_DISABLE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # for those who look; nobody connects
    if get_accelerator().device_name() != "cpu":
        get_accelerator().set_device(local_rank)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    # Others' warnings would bury a traceback; those that our own lines cause are errors, as in pytest's process.
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", module=r"(ds_childtune|tests)\b")


class RankPool:
    """The `Ranks` of every world size that tests have asked for."""

    def __init__(self) -> None:
        self._ranks: dict[int, Ranks] = {}

    def __getitem__(self, world_size: int) -> Ranks:
        return self._ranks.setdefault(world_size, Ranks(world_size))

    def close(self) -> None:
        """End all of them."""
        with contextlib.ExitStack() as stack:
            for ranks in self._ranks.values():
                stack.callback(ranks.close)
