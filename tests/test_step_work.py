"""What the library asks of the host in a training step: it never waits for the device, and does not do more for more parameters."""

from __future__ import annotations

import collections
import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ds_childtune
from ds_childtune.child.generator import base_keys, bernoulli_mask, keep_limit, split_blocks, step_keys
from ds_childtune.child.mask_kernels import shard_kernel
from ds_childtune.shards import Fragment
from tests.support import models
from tests.support.engines import Setup, engine_of, train_step
from tests.support.ranks import RankPool

WAITS = {"_local_scalar_dense", "nonzero", "equal", "_unique2", "unique_dim", "masked_select", "bincount", "is_nonzero"}
"""Operators that copy from the device to the host, where there is a device; `tolist` is no operator."""


def caller() -> str:
    """Whose line runs: of the library, of DeepSpeed or of the tests, whichever is the innermost."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        name = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if name in ("ds_childtune", "deepspeed", "tests") and frame.f_globals["__name__"] != __name__:
            return name
        frame = frame.f_back
    return "others"


class Count(TorchDispatchMode):
    """Operators except views, by their caller, and those that wait."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter[str] = collections.Counter()
        self.waits: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        who, name = caller(), str(function._schema.name).removeprefix("aten::")
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
        self.calls[who] += not views
        by_mask = name == "index" and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        self.waits[who] += name in WAITS or by_mask
        return function(*args, **(kwargs or {}))


@contextmanager
def counting() -> Iterator[Count]:
    count, tolist = Count(), Tensor.tolist

    def counted(tensor: Tensor) -> Any:
        count.waits[caller()] += 1
        return tolist(tensor)

    with mock.patch.object(Tensor, "tolist", counted), count:
        yield count


class Many(nn.Module):
    """As many small parameters as one likes."""

    def __init__(self, count: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 6) for _ in range(count)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x.to(block.weight.dtype)))
        return x.float().square().mean()


def batch(generator: torch.Generator) -> dict[str, Tensor]:
    return {"x": torch.randn(2, 6, generator=generator)}


F = {"mode": "ChildTuning-F", "reserve_p": 0.3}
D = {"mode": "ChildTuning-D", "reserve_p": 0.3}
COMPACT = {**D, "optimizer_state": "compact"}
CELLS: dict[str, tuple[int, dict[str, Any]]] = {
    "F": (2, F),
    "D": (1, D),
    "D, clip child, zero2": (2, {**D, "clip": "child"}),
    "D, clip child, zero3": (3, {**D, "clip": "child"}),
    "moments": (3, {**COMPACT, "clip": "dense"}),
    "masters, zero1": (1, COMPACT),
    "masters, zero2": (2, COMPACT),
}
EACH: dict[str, tuple[int, dict[str, Any]]] = {
    "gradients, clip child, zero1": (1, {**COMPACT, "clip": "child"}),
    "gradients, clip child, zero2": (2, {**COMPACT, "clip": "child"}),
    "gradients, clip child, zero3": (3, {**COMPACT, "clip": "child"}),
    "D, clip child, zero0": (0, {**D, "clip": "child"}),
    "moments, zero0": (0, COMPACT),
}
"""Where parameters come one by one: as gradients that become whole, and without ZeRO, where each is a shard."""


Done = tuple[int, int]
"""Operators that the library has called, and those that waited."""


def work(name: str, parameters: int) -> tuple[Done, Done, Done]:
    """What is done in one step after a few, in the first one, and in `select`."""
    stage, block = (CELLS | EACH)[name]
    models.FAMILIES["many"] = models.Family(functools.partial(Many, parameters // 2), ("blocks.",), batch)
    setup = Setup("many", stage=stage, bf16=stage > 0, clip=0.01)
    try:
        with engine_of(setup) as engine:
            child = ds_childtune.attach(engine, block)
            mine = models.deal(models.batches("many", 12), dist.get_rank(), dist.get_world_size())
            with counting() as chosen:
                if block is not F:
                    child.select(mine[:2])
            # Where nothing is counted, ChildTuning-F finds its kernel.
            with counting() if block is not F else nullcontext(Count()) as first:
                train_step(engine, mine[:1])
            for each in mine[1:4]:
                train_step(engine, [each])
            with counting() as later:
                train_step(engine, mine[4:5])
            assert child.step == 5
    finally:
        del models.FAMILIES["many"]
    later_done, first_done, chosen_done = (
        (c.calls["ds_childtune"], c.waits["ds_childtune"]) for c in (later, first, chosen)
    )
    return later_done, first_done, chosen_done


def all_work(parameters: int, names: list[str]) -> dict[str, tuple[Done, Done, Done]]:
    return {name: work(name, parameters) for name in names}


def test_a_step_never_waits_for_the_device_and_does_no_more_for_more_parameters(pool: RankPool) -> None:
    few = pool[2].run(all_work, 8, [*CELLS, *EACH])[0]
    many = pool[2].run(all_work, 24, list(CELLS))[0]
    for name, ((calls, waits), (_, at_first), (_, selecting)) in few.items():
        assert waits == 0, name
        assert calls > 0, f"{name}, vacuous: the counter sees nothing of the library"
        assert name == "F" or min(at_first, selecting) > 0, f"{name}, vacuous: the counter sees no wait"
    for name, ((calls, waits), *_) in many.items():
        assert waits == 0, name
        assert calls <= few[name][0][0] + 2, name


def test_small_neighbours_are_masked_together() -> None:
    """Bit for bit as one by one, in a few calls; larger ones and those after a gap begin anew."""
    numels = [3] * 40 + [5000] + [7, 1, 9] * 10
    pieces, start = [], 0
    for i, numel in enumerate(numels):
        start += 11 * (i == 20)
        pieces += split_blocks(Fragment(f"p{i}", 13 * i, start, numel))
        start += numel
    device = torch.device("cpu")
    grad = torch.linspace(-1, 1, start + 5)
    expected = grad.clone()
    for piece in pieces:
        part = piece.of(expected)
        part.copy_(torch.where(bernoulli_mask(piece, 3, 17, 0.3, device=device), part / 0.3, 0.0))
    kernel = shard_kernel(pieces, device, torch.float32)
    keys = step_keys(base_keys(pieces, 3, device=device), 17)
    kernel(grad, keys, keep_limit(0.3), 1 / 0.3)
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=0)
    assert torch.equal(grad == 0, expected == 0)
    assert 0.2 < float((grad[: 3 * 40] != 0).float().mean()) < 0.4, "vacuous"
    with counting() as count:
        kernel(grad, keys, keep_limit(0.3), 1 / 0.3)
    assert sum(count.calls.values()) < 3 * len(pieces)
