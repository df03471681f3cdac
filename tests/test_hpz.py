"""hpZ: copies of the weights inside a node, which a compact child keeps, and which take its new values only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import groups

import ds_childtune
from ds_childtune.zero import secondary_copies
from ds_childtune.zero.child_masks import ParameterChild
from ds_childtune.zero.secondary_copies import SecondaryCopies
from tests.support.compact_runs import BASE, share
from tests.support.engines import Setup, Weights, engine_of, model_weights, on_device, train_step
from tests.support.ranks import RankPool
from tests.support.traffic import KINDS, Traffic, nbytes

SETUP = replace(BASE, stage=3, accumulation=1, sub_group_size=300)
D = {"mode": "ChildTuning-D", "reserve_p": 0.3, "include": ["*"], "selector": "random"}
COMPACT = {**D, "optimizer_state": "compact"}
F = {"mode": "ChildTuning-F", "reserve_p": 0.3}


@contextmanager
def engine_with(setup: Setup, node: int) -> Iterator[Any]:
    """`node`: ranks of a node; 1: without hpZ. As if the model were too large to stay whole from forward to backward."""
    zero = {"zero_hpz_partition_size": node, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # DeepSpeed makes one for each process
    try:
        with engine_of(setup, zero_optimization=setup.config()["zero_optimization"] | zero) as engine:
            yield engine
    finally:
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


def train(engine: Any, setup: Setup, first: int, steps: int = 2) -> None:
    for step in range(first, first + steps):
        train_step(engine, share(setup, step, dist.get_world_size()))


def life(setup: Setup, block: dict[str, Any], node: int, broken: bool = False) -> list[Weights]:
    """Train plain, a child, another child, and plain again; weights after each. `broken`: copies stay as they are."""
    torch.manual_seed(0)
    broken_send = mock.patch.object(SecondaryCopies, "send", return_value=None)
    with engine_with(setup, node) as engine, broken_send if broken else nullcontext():
        phases = []
        train(engine, setup, 0, 1)
        child = ds_childtune.attach(engine, block)
        fixed = block["mode"] == "ChildTuning-D"
        for number in range(2):
            if fixed:
                child.select(share(setup, 100 + number, dist.get_world_size()))
            train(engine, setup, 2 + 2 * number, 2 - number)
            phases.append(model_weights(engine))
        child.detach()
        train(engine, setup, 6, 1)
        return [*phases, model_weights(engine)]


CASES = {
    "F": (SETUP, F),
    "compact": (
        replace(SETUP, family="llama", bf16=True, persistence_threshold=10),
        COMPACT | {"selector": "magnitude"},
    ),
    "compact, uneven": (replace(SETUP, family="odd"), COMPACT | {"selector": "fisher", "reserve_p": 0.05}),
    "compact, of which some ranks own nothing": (
        replace(SETUP, family="odd"),
        COMPACT | {"include": ["*.gain"], "others": "frozen", "reserve_p": 1.0},
    ),
    "compact, whole": (replace(SETUP, bf16=True), COMPACT | {"sends": "whole"}),
}


def same(a: list[Weights], b: list[Weights]) -> list[bool]:
    return [all(torch.equal(w, q[n]) for n, w in p.items()) for p, q in zip(a, b, strict=True)]


@pytest.mark.parametrize("name", CASES)
def test_weights_are_those_without_hpz(pool: RankPool, name: str) -> None:
    """Bit for bit, on two nodes of two ranks."""
    setup, block = CASES[name]
    for a, b in zip(pool[4].run(life, setup, block, 1), pool[4].run(life, setup, block, 2), strict=True):
        assert all(same(a, b))
        assert not any(same(a[:-1], a[1:])), "vacuous: nothing trains"


def test_copies_that_took_nothing_would_be_seen(pool: RankPool) -> None:
    setup, block = CASES["compact"]
    [expected, *_], [got, *_] = (pool[4].run(life, setup, block, 2, broken) for broken in (False, True))
    assert not any(same(expected[:-1], got[:-1]))


def puts_and_waits(setup: Setup, node: int) -> list[str]:
    """What a step does with the copies."""
    events: list[str] = []
    put = ParameterChild.put

    def noted(self: ParameterChild, *args: Any) -> None:
        events.append("put")
        put(self, *args)

    with engine_with(setup, node) as engine:
        child = ds_childtune.attach(engine, COMPACT)
        child.select()
        with (
            mock.patch.object(secondary_copies, "wait_for_this_stream", side_effect=lambda: events.append("wait")),
            mock.patch.object(ParameterChild, "put", noted),
        ):
            train(engine, setup, 0, steps=1)
        child.detach()
    return events


def test_the_host_waits_until_new_weights_are_in_the_copies(pool: RankPool) -> None:
    """The next forward pass gathers them on another stream of a device, which no CPU shows."""
    for events in pool[4].run(puts_and_waits, SETUP, 2):
        assert "put" in events
        assert events[-1] == "wait"


def test_one_node(pool: RankPool) -> None:
    setup, block = CASES["compact"]
    assert all(same(pool[2].run(life, setup, block, 1)[0], pool[2].run(life, setup, block, 2)[0]))


class TrafficByGroup(Traffic):
    """By the number of ranks that take part, too."""

    def __init__(self) -> None:
        super().__init__()
        self.by_group: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind, whole, _ = KINDS.get(str(function._schema.name).removeprefix("c10d::"), ("", 0, 0))
        for arg in args if kind else ():
            if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
                self.by_group[kind, dist.ProcessGroup.unbox(arg).size()] += nbytes(args[whole])
        return super().__torch_dispatch__(function, types, args, kwargs)


def bytes_of_a_step(setup: Setup, block: dict[str, Any] | None) -> tuple[dict[tuple[str, int], int], int, int]:
    """On two nodes; elements of the model with padding, and of this rank's child."""
    torch.manual_seed(0)
    with engine_with(setup, 2) as engine:
        own = 0
        if block is not None:
            child = ds_childtune.attach(engine, block)
            child.select()
            own = sum(s.index.numel() for s in child._hooks.child.shards.values())
        train(engine, setup, 0)
        with TrafficByGroup() as traffic:
            train(engine, setup, 2, 1)
        numel = sum(4 * p.ds_tensor.ds_numel for p in engine.module.parameters())
        return dict(traffic.by_group), numel, own


def test_weights_cross_nodes_as_the_child_only(pool: RankPool) -> None:
    """Plain: gathered once over all ranks, and once inside a node. Compact: twice inside, and the child's new values to each node."""
    setup = replace(SETUP, family="llama", bf16=True)
    for found, numel, _ in pool[4].run(bytes_of_a_step, setup, None):
        assert (found["all-gather", 4], found["all-gather", 2]) == (2 * numel, 2 * numel)
    for found, numel, own in pool[4].run(bytes_of_a_step, setup, COMPACT):
        assert ("all-gather", 4) not in found
        assert found["all-gather", 2] == 2 * 2 * numel
        assert found["all-to-all", 4] == 2 * own * 2, "two bytes, to two nodes"
        assert 0 < found["reduce-scatter", 4] < 0.4 * 2 * numel


def changed_between_steps(node: int, folder: str) -> tuple[Weights, Weights, float, float]:
    """Weights after some steps, and after going back to a checkpoint and taking them again; losses with a child applied."""
    setup = replace(SETUP, bf16=True)
    with engine_with(setup, node) as engine:
        child = ds_childtune.attach(engine, COMPACT)
        child.select()
        train(engine, setup, 0)
        engine.save_checkpoint(folder)
        child.export(f"{folder}/child")
        train(engine, setup, 2)
        first = model_weights(engine)
        engine.load_checkpoint(folder)
        train(engine, setup, 2)
        again = model_weights(engine)
    with engine_with(setup, node) as engine:
        [batch] = share(setup, 5, dist.get_world_size())
        losses = []
        for number in range(2):
            if number:
                ds_childtune.apply_child(engine, f"{folder}/child")
            with torch.no_grad():
                losses.append(float(engine(**on_device(engine, batch)).loss))
    return first, again, losses[0], losses[1]


def test_copies_follow_a_checkpoint_and_a_child_that_is_applied(pool: RankPool, tmp_path: Path) -> None:
    without, with_it = (pool[4].run(changed_between_steps, node, str(tmp_path / str(node))) for node in (1, 2))
    for a, b in zip(without, with_it, strict=True):
        assert all(same([a[0], b[0]], [a[1], b[1]]))
        assert all(same([a[0]], [b[0]]))
        assert a[2:] == b[2:]
        assert b[2] != b[3], "vacuous: the child changes nothing"
