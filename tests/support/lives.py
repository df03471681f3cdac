"""A training job that is killed and started again, until it is done.

Each *life* of the job is a set of ranks that resume from the last checkpoint and train on, saving as they go. Ranks are forked from a
server that has imported everything, so that a life takes a second. A `Trip` kills a rank with SIGKILL, deterministically: just before
its n-th step, calibration batch, or change of a file in the checkpoints' folder.
"""

from __future__ import annotations

import faulthandler
import gc
import io
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any, Literal

import deepspeed
import torch
import torch.distributed as dist

import ds_childtune
from ds_childtune.zero.engine import base_optimizer
from tests.support.engines import engine_of, master_weights, model_weights, train_step
from tests.support.models import Batch, batches, deal
from tests.support.places import GLOBAL_BATCH, Place, State, setup_of
from tests.support.ranks import _set_environment, forked

LIFE_SECONDS = 120.0
"""A life that is not over by then hangs."""
GRACE_SECONDS = 3.0
"""How long ranks may go on when one of them has ended badly: they often wait for it in a collective."""


@dataclass(frozen=True)
class Job:
    """What is trained, however many lives it takes."""

    folder: str
    block: dict[str, Any]
    steps: int
    """In all."""
    save_every: int
    bf16: bool = False


@dataclass(frozen=True)
class Trip:
    """Where ranks kill themselves."""

    kind: Literal["file", "torch.save", "step", "calibration"]
    """`file`: a file is opened for writing, renamed or removed, or a folder made, below the job's folder. `torch.save`: one of
    DeepSpeed's files is half written. `step`: a call of the base optimizer. `calibration`: a micro-batch of the Fisher pass."""
    count: int
    """Before which of these, counted from 1 in this life."""
    rank: int = 0
    everyone: bool = False
    """Kill the other ranks at once, instead of leaving them to notice."""


@dataclass(frozen=True)
class Life:
    """How a life ended."""

    codes: list[int]
    """Exit code of each rank; -9 for SIGKILL."""
    state: State | None
    """What the job came to, if this life was its last."""
    events: list[dict[str, int]]
    """How often each rank passed each kind of tripwire, if this life was its last."""
    resident: list[int] = field(default_factory=list)
    """Bytes resident on rank 0 after each save, if this life was its last."""


def live(job: Job, place: Place, trip: Trip | None = None, seconds: float = LIFE_SECONDS) -> Life:
    """Run one life of the job to its end, whichever that is.

    Raises:
        AssertionError: when ranks hang, or end badly though nothing killed them.
    """
    Path(job.folder).mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        context = forked()
        ranks = [
            context.Process(target=_live, args=(rank, job, place, trip, scratch), daemon=True)
            for rank in range(place.world_size)
        ]
        for rank in ranks:
            rank.start()
        try:
            hung = _wait(ranks, seconds, everyone=trip is not None and trip.everyone)
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()
        codes = [rank.exitcode for rank in ranks]
        told = "\n".join(path.read_text()[-3000:] for path in sorted(Path(scratch).glob("stderr-*")))
        assert not hung, f"ranks {hung} of {place} hang, exit codes {codes}:\n{told}"
        result = Path(scratch) / "result"
        if trip is None:
            assert codes == [0] * place.world_size, f"exit codes {codes} of {place}:\n{told}"
        if result.exists() and not any(codes):
            return Life(codes, *pickle.loads(result.read_bytes()))
        return Life(codes, None, [])


def _wait(ranks: list[Any], seconds: float, *, everyone: bool) -> list[int]:
    """Wait for all ranks; those that hang."""
    running = {rank.sentinel: i for i, rank in enumerate(ranks)}
    deadline = time.monotonic() + seconds
    failed = False
    while running:
        ready = connection.wait(list(running), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            # Killed by us after another one ended badly: no news, as gloo leaves a rank that waits for a dead one waiting.
            return [] if failed else sorted(running.values())
        for sentinel in ready:
            code = ranks[running.pop(sentinel)].exitcode  # type: ignore[index]
            if code and not failed:
                failed = True
                deadline = time.monotonic() + (0 if everyone else GRACE_SECONDS)
    return []


# ---------------------------------------------------------------- inside a rank


class _Wires:
    """Counts what a Trip may be about, and kills when its time has come."""

    def __init__(self, trip: Trip | None) -> None:
        self._trip = trip
        self.passed = {"file": 0, "torch.save": 0, "step": 0, "calibration": 0}

    def due(self, kind: str) -> bool:
        self.passed[kind] += 1
        return self._trip is not None and self._trip.kind == kind and self._trip.count == self.passed[kind]

    def touch(self, kind: str) -> None:
        if self.due(kind):
            os.kill(os.getpid(), signal.SIGKILL)

    def watch_files(self, folder: str) -> None:
        """By the interpreter's audit events; writing inside C++ is seen only by `watch_saves`."""
        changes = {"os.rename": 2, "os.remove": 1, "os.mkdir": 1, "os.rmdir": 1}

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "open":
                writes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
                paths = arguments[:1] if writes else ()
            else:
                paths = arguments[: changes.get(event, 0)]
            if any(isinstance(path, (str, Path)) and str(path).startswith(folder) for path in paths):
                self.touch("file")

        sys.addaudithook(audit)

    def watch_saves(self) -> None:
        save = torch.save

        def half(obj: Any, f: Any, **options: Any) -> None:
            # Pickling a tensor saves it too, into a buffer.
            if isinstance(f, str) and self.due("torch.save"):
                whole = io.BytesIO()
                save(obj, whole, **options)
                Path(f).write_bytes(whole.getvalue()[: whole.tell() // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            save(obj, f, **options)

        torch.save = half

    def watch_steps(self, engine: Any) -> None:
        base_optimizer(engine).register_step_pre_hook(lambda *_: self.touch("step"))

    def calibration(self, items: list[Batch]) -> Iterator[Batch]:
        for item in items:
            self.touch("calibration")
            yield item


def _live(rank: int, job: Job, place: Place, trip: Trip | None, scratch: str) -> None:
    with Path(f"{scratch}/stderr-{rank}").open("w", buffering=1) as stderr:
        os.dup2(stderr.fileno(), 1)
        os.dup2(stderr.fileno(), 2)
        faulthandler.enable()
        gc.freeze()  # what the server has imported stays
        _set_environment(rank, place.world_size)
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        store = dist.FileStore(f"{scratch}/store", place.world_size)
        limit = timedelta(seconds=LIFE_SECONDS)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=place.world_size, timeout=limit)
        wires = _Wires(trip if trip is not None and trip.rank == rank else None)
        wires.watch_files(job.folder)
        wires.watch_saves()
        resident: list[int] = []
        state = _train(job, place, wires, resident)
        events = [wires.passed] * place.world_size
        dist.all_gather_object(events, wires.passed)
        if rank == 0:
            Path(f"{scratch}/result").write_bytes(pickle.dumps((state, events, resident)))
        dist.destroy_process_group()


def _train(job: Job, place: Place, wires: _Wires, resident: list[int]) -> State:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with engine_of(setup_of(place, job.bf16)) as engine:
        child = ds_childtune.attach(engine, job.block)
        wires.watch_steps(engine)
        path, _ = engine.load_checkpoint(job.folder)
        if path is None and child.config.mode == "ChildTuning-D":
            child.select(wires.calibration(deal(batches("integer", 4, seed=1000), rank, world_size)))
        while engine.global_steps < job.steps:
            train_step(engine, deal(batches("integer", GLOBAL_BATCH, seed=engine.global_steps), rank, world_size))
            if engine.global_steps % job.save_every == 0:
                engine.save_checkpoint(job.folder)
                resident.append(_resident_bytes())
        masks = {p.name: child.gather_mask(p.name) for p in child.report().parameters}
        return State(
            master_weights(engine), model_weights(engine), masks, child.step, engine.global_steps, engine.get_lr(), None
        )


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
