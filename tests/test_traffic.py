"""What a training step sends, counted at torch's collectives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import set_z3_leaf_modules
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import ds_childtune
from ds_childtune.zero.calibration import _end_pass
from ds_childtune.zero.child_layout import ChildLayout, Cut
from tests.benchmarks.traffic import step_of
from tests.support import models
from tests.support.alive import Alive
from tests.support.compact_runs import BASE, CLIPPED, FROM_START, FUSED, SGD, Case, check, run, share
from tests.support.engines import Setup, Weights, engine_of, model_weights, on_device, train_step
from tests.support.models import OddBlock, OddModel
from tests.support.ranks import RankPool
from tests.support.traffic import Traffic


def known_collectives() -> dict[str, int]:
    ten, world = torch.ones(10, dtype=torch.bfloat16), dist.get_world_size()
    with Traffic() as traffic:
        dist.all_reduce(ten)
        dist.all_gather_into_tensor(torch.empty(10 * world), torch.ones(10))
        dist.all_gather([torch.empty(10) for _ in range(world)], torch.ones(10))
        dist.reduce_scatter_tensor(torch.empty(5), torch.ones(5 * world))
        dist.broadcast(ten, 0)
        dist.barrier()
    dist.all_reduce(ten)
    return dict(traffic.bytes)


def test_the_counter_counts_what_is_sent(pool: RankPool) -> None:
    """Times W / (W - 1): an all-reduce sends each byte twice, the others once."""
    expected = {"all-reduce": 2 * 20, "all-gather": 2 * 80, "reduce-scatter": 40, "broadcast": 20}
    assert pool[2].run(known_collectives) == [expected] * 2


ONE = replace(BASE, accumulation=1)

SENDING = {
    "zero1": Case(replace(BASE, stage=1, schedule=True, no_decay=("ln", "bias")), True),
    "zero1-round-robin-sgd": Case(replace(BASE, stage=1, round_robin=True, optimizer=SGD), True),
    "zero1-bf16-odd": replace(FROM_START, setup=replace(BASE, stage=1, bf16=True, family="odd", overlap_comm=True)),
    "zero2-llama": Case(replace(ONE, stage=2, family="llama"), True),
    "zero2-odd": Case(replace(BASE, stage=2, family="odd"), True, past=False, after=False),
    "zero2-t5-sgd": Case(
        replace(BASE, stage=2, family="t5", optimizer=SGD, overlap_comm=True), True, past=False, after=False
    ),
    "zero2-bf16-round-robin": Case(
        replace(BASE, stage=2, bf16=True, round_robin=True, no_decay=("ln", "bias")),
        True,
        past=False,
        reselect=False,
        after=False,
    ),
    "zero1-offload": Case(replace(BASE, stage=1, offload=True, no_decay=("ln", "bias")), True, past=False, after=False),
    "zero2-offload-llama": Case(replace(ONE, stage=2, family="llama", offload=True), True),
    "zero2-offload-cpuadam": Case(replace(ONE, stage=2, offload=True, optimizer=FUSED), True),
    "zero2-offload-bf16-odd": replace(
        FROM_START, setup=replace(BASE, stage=2, bf16=True, round_robin=True, family="odd", offload=True), after=False
    ),
}


def dense_of(case: Case) -> Case:
    """With additions in the same order, micro-batches on each rank, then ranks: the dense path of ZeRO-2 adds ranks first.

    Without offload, which changes no number.
    """
    setup = replace(case.setup, offload=False)
    return replace(case, setup=replace(setup, stage=1) if setup.accumulation > 1 else setup)


@pytest.mark.parametrize("name", SENDING)
def test_a_child_that_is_sent_by_itself_is_bitwise_the_dense_hook_path(pool: RankPool, name: str) -> None:
    case = SENDING[name]
    check(case, pool[2].run(run, dense_of(case), "dense"), pool[2].run(run, case, "compact"))


@pytest.mark.parametrize("name", ["zero1", "zero2-odd", "zero2-offload-cpuadam"])
def test_one_rank(pool: RankPool, name: str) -> None:
    case = SENDING[name]
    check(case, pool[1].run(run, dense_of(case), "dense"), pool[1].run(run, case, "compact"))


BLOCK = {"mode": "ChildTuning-D", "reserve_p": 0.3, "include": ["*"], "selector": "random"}


@contextmanager
def chosen(
    setup: Setup, optimizer_state: str, include: Sequence[str] = ("*",), **extra: Any
) -> Iterator[tuple[Any, ds_childtune.ChildTuner]]:
    """An engine with a child of random elements, which is the same for every engine."""
    torch.manual_seed(0)
    with engine_of(setup, **extra) as engine:
        block = BLOCK | {"optimizer_state": optimizer_state, "include": list(include), "others": "frozen"}
        child = ds_childtune.attach(engine, block)
        child.select()
        yield engine, child


def backward(engine: Any, batch: Any) -> None:
    output = engine(**on_device(engine, batch))
    engine.backward(output if isinstance(output, Tensor) else output.loss)


def sent(setup: Setup, include: list[str]) -> tuple[dict[str, int], dict[str, int], list[int], int]:
    """Bytes and calls of a step, what each rank owns of the child, and elements of gradients that are kept in the middle."""
    with chosen(setup, "compact", include) as (engine, child):
        mine = share(setup, 0, 3 * setup.accumulation * dist.get_world_size())
        train_step(engine, mine[: 2 * setup.accumulation])
        first, *rest = mine[2 * setup.accumulation :]
        with Traffic() as traffic:
            train_step(engine, [first])
            kept = sum(p.grad.numel() for p in engine.module.parameters() if p.grad is not None)
            train_step(engine, rest)
        numels = [sum(s.index.numel() for s in child._hooks.child.shards.values())]
        counts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(counts, numels[0])
        return dict(traffic.bytes), dict(traffic.calls), counts, kept


@pytest.mark.parametrize(
    ("stage", "world_size", "include", "offload"),
    [(1, 4, "*", False), (2, 2, "*", False), (1, 2, "model.*", False), (2, 4, "model.*", False), (2, 2, "*", True)],
)
def test_a_step_sends_the_child_once(pool: RankPool, stage: int, world_size: int, include: str, offload: bool) -> None:
    """However many micro-batches: 4 bytes for each element in bf16, and a few per cent of padding.

    Where ranks own less than others, as with an output layer that is not eligible, what they have in excess of an equal share of it
    all goes to its owner and back, too.
    """
    setup = replace(BASE, stage=stage, bf16=True, family="llama-2-blocks", accumulation=3, no_decay=("norm",))
    setup = replace(setup, offload=offload)
    for moved, calls, counts, kept in pool[world_size].run(sent, setup, [include]):
        numel, even = sum(counts), max(counts) * world_size <= 1.05 * sum(counts)
        assert even == (include == "*"), "vacuous: of both kinds there is a cell"
        assert calls["all-gather"] == 1
        assert calls["all-to-all"] == (1 if even else 3), "gloo's reduce-scatter is made of one"
        assert 2 * numel <= moved["all-gather"] <= 2 * (1.05 * numel if even else numel + world_size)
        hops = moved["all-to-all"] - moved["all-gather"]
        assert 0 <= hops <= 2 * (numel // world_size + 1 + max(counts))
        assert (hops == 0) == even
        assert moved["all-reduce"] < 100, "numbers, such as the norm"
        assert numel > 100, "vacuous"
        assert kept == 0


class Segments(ChildLayout):
    """With what matters to how a row is sent."""

    def __init__(self, owned: list[int]) -> None:
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
        self._group, self._on_gloo = dist.group.WORLD, True
        self.ranks, self.rank = dist.get_world_size(), dist.get_rank()
        self._counts, self._cut = [[count] for count in owned], Cut.of(owned)


def sent_in_segments(owned: list[int]) -> tuple[Tensor, Tensor, int, list[int]]:
    """What this rank owns of the sum, and the row that it becomes again; collectives of one kind; bytes that each of both made."""
    layout = Segments(owned)
    row = torch.arange(layout.numel, dtype=torch.float32) % 1000 * (layout.rank + 1)
    reducing, gathering = Alive(), Alive()
    with Traffic() as traffic:
        with reducing:
            mine = layout.reduce(row)[: owned[layout.rank]]
        with gathering:
            whole = layout._gathered(mine)
        return mine, whole, traffic.calls["all-gather"], [reducing.peak, gathering.peak]


@pytest.mark.parametrize("owned", [[300_000, 300_001], [1_000_000, 1_000_001], [600_000, 7], [0, 200_000], [0, 0]])
def test_a_long_row_is_sent_in_segments(pool: RankPool, owned: list[int]) -> None:
    cut, found = Cut.of(owned), pool[2].run(sent_in_segments, owned)
    whole = torch.arange(2 * cut.chunk) % 1000 * 3.0
    for rank, (mine, row, calls, peaks) in enumerate(found):
        start, end = cut.starts[rank], cut.starts[rank] + owned[rank]
        assert torch.equal(mine, whole[start:end])
        for first, count in zip(cut.starts, owned, strict=True):
            assert torch.equal(row[first : first + count], whole[first : first + count])
        assert calls > 1 or sum(owned) < 300_000, "vacuous: one segment"
        assert sum(owned) < 2_000_000 or max(peaks) < 2 * 4 * whole.numel(), "one row, a chunk, and a few segments"


owners = st.lists(st.integers(0, 50), min_size=1, max_size=9).filter(any)


@given(owners)
def test_the_row_is_cut_so_that_every_element_has_one_place(owned: list[int]) -> None:
    cut, ranks = Cut.of(owned), range(len(owned))
    whole = len(owned) * cut.chunk
    ends = [start + count for start, count in zip(cut.starts, owned, strict=True)]
    assert all(end <= start for end, start in zip(ends, [*cut.starts[1:], whole], strict=True))
    assert whole < (1.05 * sum(owned) + 1 if cut.padded else sum(owned) + len(owned))
    holder = [[place // cut.chunk for place in range(start, end)] for start, end in zip(cut.starts, ends, strict=True)]
    assert [cut.to_owner(rank) for rank in ranks] == [[holder[rank].count(chunk) for chunk in ranks] for rank in ranks]
    assert [cut.from_chunk(rank) for rank in ranks] == [
        [holder[owner].count(rank) for owner in ranks] for rank in ranks
    ]
    if cut.padded:
        assert all(set(of) <= {rank} for rank, of in enumerate(holder))


WAYS: dict[str, Callable[[Any, list[Any]], None]] = {}
"""To take an optimizer step of two backward passes."""


def way(function: Callable[[Any, list[Any]], None]) -> Callable[[Any, list[Any]], None]:
    WAYS[function.__name__] = function
    return function


@way
def unmanaged(engine: Any, two: list[Any]) -> None:
    for batch in two:
        backward(engine, batch)
    engine.step()


@way
def coalesced(engine: Any, two: list[Any]) -> None:
    with engine.coalesce_grad_reduction():
        for batch in two:
            backward(engine, batch)
    engine.step()


@way
def without_sync(engine: Any, two: list[Any]) -> None:
    with engine.no_sync():
        backward(engine, two[0])
    backward(engine, two[1])
    engine.step()


@way
def replaced(engine: Any, two: list[Any]) -> None:
    """The second of two passes at the boundary takes the place of the first, which is DeepSpeed's rule."""
    unmanaged(engine, two)


@way
def interrupted(engine: Any, two: list[Any]) -> None:
    """An exception in the middle of a backward pass, after which the caller starts anew."""
    output = engine(**on_device(engine, two[0]))
    (output if isinstance(output, Tensor) else output.loss).register_hook(lambda g: g)
    last = next(p for p in engine.module.parameters() if p.requires_grad)

    def fail(_: Any) -> None:
        raise KeyError("in the middle")

    handle = last.register_hook(fail)
    with pytest.raises(KeyError, match="in the middle"):
        engine.backward(output if isinstance(output, Tensor) else output.loss)
    handle.remove()
    engine.optimizer.zero_grad()
    _end_pass(engine)
    assert all(p.grad is None for p in engine.module.parameters())
    backward(engine, two[1])
    engine.step()


def after(setup: Setup, optimizer_state: str, name: str) -> Weights:
    extra = {"managed_gradient_accumulation": False} if name == "unmanaged" else {}
    with chosen(setup, optimizer_state, **extra) as (engine, _):
        for step in range(2):
            mine = share(setup, step, 2 * dist.get_world_size())
            if name == "interrupted" and optimizer_state == "dense":
                train_step(engine, mine[1:])  # as if the other had not been
            else:
                WAYS[name](engine, mine)
        return model_weights(engine)


@pytest.mark.parametrize("name", WAYS)
def test_other_ways_to_a_step(pool: RankPool, name: str) -> None:
    """Bitwise the dense path of ZeRO-1, which adds in the same order."""
    setup = replace(BASE, stage=1, family="gpt2", accumulation=1)
    expected = pool[2].run(after, setup, "dense", name)
    stages = (1,) if name == "without_sync" else (1, 2)
    for each in (*(replace(setup, stage=stage) for stage in stages), replace(setup, stage=stages[-1], offload=True)):
        for a, b in zip(expected, pool[2].run(after, each, "compact", name), strict=True):
            differing = [n for n, w in a.items() if not torch.equal(w, b[n])]
            assert differing == [], (each.stage, each.offload)
    other = pool[2].run(after, setup, "dense", "unmanaged" if name == "replaced" else "replaced")
    if name != "interrupted":
        assert any(not torch.equal(w, other[0][n]) for n, w in expected[0].items()), "vacuous"


def zeroed_between(setup: Setup, optimizer_state: str) -> Weights:
    """A loop that clears gradients before every micro-batch of an accumulation."""
    with chosen(setup, optimizer_state) as (engine, _):
        for batch in share(setup, 0, 2 * dist.get_world_size()):
            engine.optimizer.zero_grad()
            backward(engine, batch)
            engine.step()
        return model_weights(engine)


def test_zero_grad_between_micro_batches_drops_what_it_drops_in_deepspeed(pool: RankPool) -> None:
    """At ZeRO-2 nothing, at ZeRO-1 what came before."""
    ends = {}
    for stage in (1, 2, 3):
        setup = replace(BASE, stage=stage, family="gpt2", accumulation=2)
        dense, compact = (pool[2].run(zeroed_between, setup, state)[0] for state in ("dense", "compact"))
        for n, w in dense.items():  # at ZeRO-2 dense micro-batches are added in another order
            torch.testing.assert_close(compact[n], w, rtol=1e-5, atol=1e-6)
        ends[stage] = dense
    assert any(not torch.allclose(w, ends[2][n], 1e-3, 1e-4) for n, w in ends[1].items()), "vacuous: nothing is dropped"


def four(setup: Setup, optimizer_state: str) -> tuple[Weights, list[int]]:
    with chosen(setup, optimizer_state) as (engine, child):
        for step in range(3):
            train_step(engine, share(setup, step, setup.accumulation * 4))
        shards = getattr(child._hooks.child, "shards", {})
        return model_weights(engine), [s.index.numel() for s in shards.values()]


@pytest.mark.parametrize("offload", [False, True])
def test_four_ranks_of_which_some_own_nothing(pool: RankPool, offload: bool) -> None:
    """Sums of four are added in another order than in DeepSpeed's all-reduce: equal to a few units in the last place."""
    setup = replace(BASE, stage=2, family="odd", accumulation=1, no_decay=("scale",))
    dense, compact = (
        pool[4].run(four, replace(setup, offload=o), s) for s, o in (("dense", False), ("compact", offload))
    )
    assert 0 in [count for _, counts in compact for count in counts], "vacuous: every rank owns something of each group"
    for (expected, _), (got, _) in zip(dense, compact, strict=True):
        for n, w in expected.items():
            torch.testing.assert_close(got[n], w, rtol=1e-5, atol=1e-6, msg=n)


# ---------------------------------------------------------------- offload


class Crossing(TorchDispatchMode):
    """Bytes that are copied to the host and from it. Where all is on a CPU, the host is what holds `tensors`."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.bytes = [0, 0]
        """To the host, to the device."""
        self._host = {tensor.untyped_storage().data_ptr() for tensor in tensors}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.copy_.default:
            to_host, from_host = map(self._is_on_host, args[:2])
            if to_host != from_host:
                self.bytes[from_host] += args[1].nbytes
        return function(*args, **(kwargs or {}))

    def _is_on_host(self, tensor: Tensor) -> bool:
        if get_accelerator().device_name() != "cpu":
            return tensor.device.type == "cpu"
        return tensor.untyped_storage().data_ptr() in self._host


def crossed(setup: Setup, with_child: bool) -> tuple[list[int], int]:
    """Bytes that cross in the third step, and elements that this rank steps."""
    torch.manual_seed(0)
    with engine_of(setup) as engine:
        steps = [share(setup, step, setup.accumulation * dist.get_world_size()) for step in range(3)]
        optimizer = engine.optimizer
        host, stepped = [], sum(flat.numel() for flat in optimizer.single_partition_of_fp32_groups)
        if with_child:
            child = ds_childtune.attach(engine, BLOCK | {"optimizer_state": "compact"})
            child.select()
            compact: Any = child._hooks.child
            host = [compact.plumbing._crossing, *(shard.tensor for shard in compact.shards.values())]
            stepped = sum(shard.tensor.numel() for shard in compact.shards.values())
        for step in steps[:2]:
            train_step(engine, step)
        host += [*optimizer.single_partition_of_fp32_groups, *optimizer.param_buffer_of_bit16_for_cpu_offload_groups]
        host += [flat.grad for flat in optimizer.single_partition_of_fp32_groups if flat.grad is not None]
        with Crossing([*host, *optimizer.accumulated_grads_in_cpu.values()]) as crossing:
            train_step(engine, steps[2])
        return crossing.bytes, stepped


@pytest.mark.parametrize("stage", [1, 2])
def test_with_offload_only_the_child_crosses(pool: RankPool, stage: int) -> None:
    """Twice in 16 bits, once each way, however many micro-batches. Plain DeepSpeed sends gradients of its shard in fp32, and more
    with further micro-batches at ZeRO-2."""
    setup = replace(BASE, stage=stage, bf16=True, offload=True, family="llama", accumulation=2, no_decay=("norm",))
    plain, child = (pool[2].run(crossed, setup, with_child) for with_child in (False, True))
    for (bytes_plain, numel), (bytes_child, owned) in zip(plain, child, strict=True):
        assert 100 < owned < 0.4 * numel, "vacuous"
        assert bytes_child == [2 * owned, 2 * owned]
        assert bytes_plain[0] > 3.5 * numel, "padding does not cross"
        assert bytes_plain[1] >= 2 * numel


def in_between(setup: Setup, where: str) -> Weights:
    """Weights of a run in which a child is chosen, or detached, after a backward pass and before its step."""
    torch.manual_seed(0)
    with engine_of(setup) as engine:
        train = share(setup, 0, 3 * dist.get_world_size())
        if where == "one rank's":
            train_step(engine, train[:1])
        child = ds_childtune.attach(engine, BLOCK | {"optimizer_state": "compact", "clip": "child"})
        if where == "detach":
            child.select()
            for batch in train[:2]:
                train_step(engine, [batch])
        if where == "one rank's":
            first: Any = next(engine.module.parameters())
            assert (first._hp_mapping is None) == (dist.get_rank() == 1)
            engine.backward(first.square().sum() / 10)
        else:
            backward(engine, train[2])
        if where == "detach":
            child.detach()
        else:
            child.select()
        engine.step()
        return model_weights(engine)


@pytest.mark.parametrize("where", ["select", "detach", "one rank's"])
def test_a_gradient_that_waits_for_its_step_crosses_over(pool: RankPool, where: str) -> None:
    """The norm included, which clips: equal to the last bits to the same without offload. Also where it is of a parameter that only
    one rank steps, and the other has no gradient but that of the step before."""
    setup = replace(BASE, stage=2, accumulation=1, clip=0.1, no_decay=("ln", "bias"), optimizer=SGD)
    stayed, crossed_over = (pool[2].run(in_between, replace(setup, offload=o), where) for o in (False, True))
    unclipped = pool[2].run(in_between, replace(setup, clip=0.0), where)
    for expected, got, other in zip(stayed, crossed_over, unclipped, strict=True):
        assert all(torch.allclose(got[n], w, rtol=1e-5, atol=1e-7) for n, w in expected.items())
        assert any(not torch.allclose(other[n], w, rtol=1e-5, atol=1e-7) for n, w in expected.items()), "vacuous"


# ---------------------------------------------------------------- ZeRO-3

ZERO_3 = {
    "small bucket": replace(
        FROM_START,
        setup=replace(BASE, stage=3, bf16=True, family="odd", bucket=5, overlap_comm=True, sub_group_size=20),
    ),
    "persistent": Case(replace(BASE, stage=3, family="llama", persistence_threshold=50, bucket=10_000), True),
    "clip child": Case(replace(CLIPPED, stage=3, family="t5"), True, reselect=False),
}


@pytest.mark.parametrize("name", ZERO_3)
def test_zero3_sends_the_child_bitwise_as_the_dense_hook_path(pool: RankPool, name: str) -> None:
    """With two ranks additions are in the same order. More cells are in test_compact."""
    case, clip = ZERO_3[name], "child" if name == "clip child" else None
    check(case, pool[2].run(run, case, "dense", clip), pool[2].run(run, case, "compact", clip))


def bytes_at_zero3(setup: Setup, sends: str | None) -> tuple[dict[str, int], int, int, Weights]:
    """Of the third step: bytes by kind; elements of the child, and of gradients that are kept in the middle; weights after it."""
    torch.manual_seed(0)
    with engine_of(setup) as engine:
        numel = 0
        if sends is not None:
            child = ds_childtune.attach(engine, BLOCK | {"optimizer_state": "compact", "sends": sends})
            child.select()
            numel = child.report().kept
        for step in range(2):
            train_step(engine, share(setup, step, 2 * setup.accumulation))
        first, *rest = share(setup, 2, 2 * setup.accumulation)
        with Traffic() as traffic:
            train_step(engine, [first])
            kept = sum(p.grad.numel() for p in engine.module.parameters() if p.grad is not None)
            train_step(engine, rest)
        return dict(traffic.bytes), numel, kept, model_weights(engine)


def test_zero3_sends_the_child_once_for_each_micro_batch(pool: RankPool) -> None:
    """And weights, as plain ZeRO-3 does; "whole" is as many bytes as plain, and the same weights."""
    setup = replace(BASE, stage=3, bf16=True, family="llama", accumulation=3)
    plain, whole, child = (pool[2].run(bytes_at_zero3, setup, sends) for sends in (None, "whole", "child"))
    for (sent_plain, *_), (sent_whole, *_, expected), (sent_child, numel, kept, got) in zip(
        plain, whole, child, strict=True
    ):
        assert numel > 300, "vacuous"
        assert sent_whole == sent_plain
        assert {**sent_child, "reduce-scatter": 0} == {**sent_plain, "reduce-scatter": 0}
        assert 3 * 2 * numel <= sent_child["reduce-scatter"] < 3 * 2 * numel * 1.1, "padded to the longest row"
        assert kept == 0
        assert all(torch.equal(got[n], w) for n, w in expected.items())


def test_bytes_at_zero3_against_plain(pool: RankPool) -> None:
    """4 bytes for weights, gathered twice, and 2 p for gradients, of 6."""
    plain, child = (
        max(sum(found.values()) - found["live"] for found in pool[2].run(step_of, "64x4", 3, 1, p)) for p in (None, 0.1)
    )
    assert 5.99 < plain < 6.2
    assert child < 0.72 * plain


def test_zero3_of_four_ranks_of_which_some_own_nothing(pool: RankPool) -> None:
    """A sum of four may be added in another order: equal to a few units in the last place."""
    setup = replace(BASE, stage=3, family="odd", sub_group_size=5)
    dense, compact = (pool[4].run(four, setup, state) for state in ("dense", "compact"))
    assert 0 in [count for _, counts in compact for count in counts], "vacuous: every rank owns something"
    for (expected, _), (got, _) in zip(dense, compact, strict=True):
        for n, w in expected.items():
            torch.testing.assert_close(got[n], w, rtol=1e-5, atol=1e-6, msg=n)


@pytest.mark.parametrize("name", sorted({*WAYS} - {"without_sync"}))
def test_other_ways_to_a_step_at_zero3(pool: RankPool, name: str) -> None:
    # One bucket, so that something is left in it when a backward pass is interrupted.
    setup = replace(BASE, stage=3, family="gpt2", accumulation=1, bucket=10_000)
    for a, b in zip(*(pool[2].run(after, setup, state, name) for state in ("dense", "compact")), strict=True):
        assert [n for n, w in a.items() if not torch.equal(w, b[n])] == []


class Unused(OddModel):
    """Blocks are leaf modules, and a parameter of theirs is not used."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.blocks[1].idle = torch.nn.Linear(7, 3)
        self.idle = torch.nn.Linear(7, 3)
        set_z3_leaf_modules(self, [OddBlock])


class UnusedOnOneRank(Unused):
    """As `Unused`, and rank 1 uses no parameter of a block, which it must enter all the same: leaf modules are gathered together."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        if dist.get_rank() == 1:
            self.blocks[1].forward = lambda x: x


SETUP_3 = replace(BASE, stage=3, family="gpt2", bf16=True)
VARIANTS: dict[str, tuple[Setup, dict[str, Any]]] = {
    "all-reduce": (SETUP_3, {"reduce_scatter": False}),
    "predivide": (SETUP_3, {"reduce_scatter": False, "gradient_predivide_factor": 3.0}),
    "prescale": (SETUP_3, {"reduce_scatter": False, "prescale_gradients": True}),
    "fp32": (replace(SETUP_3, bf16=False), {}),
    "bf16 on the wire": (replace(SETUP_3, bf16=False), {"communication_data_type": "bf16"}),
    "separate gradients": (SETUP_3, {"contiguous_gradients": False}),
    "reentrant": (SETUP_3, {}),
    "not reentrant": (SETUP_3, {}),
    "leaf modules": (replace(SETUP_3, family="unused", bucket=10_000), {}),
    "leaf modules, on one rank": (replace(SETUP_3, family="unused", bucket=10_000), {}),
}
"""At ZeRO-3: an engine, and what goes into its config."""


def trained_variant(name: str, optimizer_state: str) -> tuple[Weights, Weights]:
    setup, keys = VARIANTS[name]
    build = UnusedOnOneRank if "on one rank" in name else Unused
    models.FAMILIES["unused"] = replace(models.FAMILIES["odd"], build=build)
    zero = {k: keys[k] for k in ("reduce_scatter", "contiguous_gradients") if k in keys}
    others = {k: v for k, v in keys.items() if k not in zero}
    zero = {**setup.config()["zero_optimization"], **zero}
    try:
        with chosen(setup, optimizer_state, zero_optimization=zero, **others) as (engine, _):
            before = model_weights(engine)
            if "reentrant" in name:
                engine.module.gradient_checkpointing_enable({"use_reentrant": name == "reentrant"})
            for step in range(3):
                train_step(engine, share(setup, step, setup.accumulation * 2))
            return before, model_weights(engine)
    finally:
        del models.FAMILIES["unused"]


def all_variants(optimizer_state: str) -> dict[str, tuple[Weights, Weights]]:
    return {name: trained_variant(name, optimizer_state) for name in VARIANTS}


def test_variants_of_zero3(pool: RankPool) -> None:
    """Bitwise the dense path: whatever the way in which DeepSpeed averages, and in which gradients arrive."""
    for dense, compact in zip(*(pool[2].run(all_variants, state) for state in ("dense", "compact")), strict=True):
        for name, (before, expected) in dense.items():
            got = compact[name][1]
            assert [n for n, w in expected.items() if not torch.equal(w, got[n])] == [], name
            assert any(not torch.equal(w, before[n]) for n, w in expected.items()), f"{name}, vacuous"
        wire = [dense[name][1] for name in ("fp32", "bf16 on the wire")]
        assert any(not torch.equal(w, wire[1][n]) for n, w in wire[0].items()), "vacuous"


class Shared(OddModel):
    """A layer that is used three times, each under activation checkpointing."""

    reentrant = True

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(7, 7)])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = self.embed(x.to(self.head.weight.dtype))
        for _ in range(3):
            hidden = checkpoint(self.blocks[0], hidden, use_reentrant=self.reentrant)
        return torch.nn.functional.mse_loss(self.head(hidden).squeeze(-1).float(), y.float())


def shared_layer(setup: Setup, optimizer_state: str, reentrant: bool) -> tuple[str, Weights]:
    """What is raised, and weights after some steps."""
    models.FAMILIES["shared"] = replace(models.FAMILIES["odd"], build=Shared)
    try:
        with chosen(replace(setup, family="shared"), optimizer_state) as (engine, _):
            engine.module.reentrant = reentrant
            try:
                for step in range(2):
                    train_step(engine, share(replace(setup, family="odd"), step, 2))
            except RuntimeError as error:
                return str(error), {}
            return "", model_weights(engine)
    finally:
        del models.FAMILIES["shared"]


def test_a_gradient_that_comes_in_parts_at_zero3(pool: RankPool) -> None:
    """Under reentrant checkpointing: refused, as by plain DeepSpeed, with remedies that work."""
    setup = Setup(stage=3, bucket=10_000)
    for said, _ in pool[2].run(shared_layer, setup, "compact", True):
        assert "got two of one of shape (7, 7)" in said
        assert "use_reentrant=False" in said
    dense, compact = (pool[2].run(shared_layer, setup, state, False) for state in ("dense", "compact"))
    below = pool[2].run(shared_layer, replace(setup, stage=2), "compact", True)
    for (_, expected), (said, got), (said_below, got_below) in zip(dense, compact, below, strict=True):
        assert said == said_below == ""
        assert all(torch.equal(w, got[n]) for n, w in expected.items())
        assert all(torch.allclose(w, got_below[n], 1e-4, 1e-5) for n, w in expected.items())


def resumed(folder: str, sends: tuple[str, str]) -> Weights:
    """Three steps, saved after the first and gone on with in another engine."""
    setup = replace(BASE, stage=3, bf16=True, family="odd")
    for number, each in enumerate(sends):
        with engine_of(setup) as engine:
            child = ds_childtune.attach(engine, BLOCK | {"optimizer_state": "compact", "sends": each})
            if number:
                engine.load_checkpoint(folder)
            else:
                child.select()
            for step in (1, 2) if number else (0,):
                train_step(engine, share(setup, step, 2 * setup.accumulation))
            engine.save_checkpoint(folder)
            weights = model_weights(engine)
    return weights


def test_what_is_sent_may_change_at_a_resume(pool: RankPool, tmp_path: Path) -> None:
    runs = [("child", "child"), ("whole", "child"), ("child", "whole")]
    first, *others = (pool[2].run(resumed, str(tmp_path / "-".join(sends)), sends) for sends in runs)
    for other in others:
        for expected, got in zip(first, other, strict=True):
            assert all(torch.equal(w, got[n]) for n, w in expected.items())
