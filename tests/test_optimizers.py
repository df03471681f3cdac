"""Any optimizer: what it does is found out by trying it, and a child is exact with it or refused by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_childtune
from ds_childtune.child.optimizer_trial import Behaviour, behaviour_of
from ds_childtune.zero.flat_shards import read_flat_shards, read_parameters
from tests.support import optimizers
from tests.support.bits import equal_bits
from tests.support.engines import Setup, Weights, engine_of, master_weights, model_weights, train_step
from tests.support.models import batches, deal
from tests.support.ranks import RankPool
from tests.support.reference import distance

Make = Callable[[Any], torch.optim.Optimizer]
SOAKED = {"lr": 0.0, "weight_decay": 0.01}
"""As at the first step of a warm-up."""

# ---------------------------------------------------------------- what is found out


def behaviour(make: Make, *, matrix: bool = False, compact: bool = True) -> Behaviour:
    parameter = nn.Parameter(torch.ones(3, 4) if matrix else torch.ones(12))
    return behaviour_of(make([parameter]), [parameter], compact=compact)


LISTED: dict[str, tuple[Make, str]] = {
    "AdamW": (lambda p: torch.optim.AdamW(p, **SOAKED), "decoupled"),
    "AdamW-amsgrad": (lambda p: torch.optim.AdamW(p, amsgrad=True, **SOAKED), "decoupled"),
    "AdamW-maximize": (lambda p: torch.optim.AdamW(p, maximize=True, **SOAKED), "decoupled"),
    "AdamW-tensor": (lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.0), weight_decay=0.01), "decoupled"),
    "Adam": (lambda p: torch.optim.Adam(p, **SOAKED), "l2"),
    "Adam-decoupled": (lambda p: torch.optim.Adam(p, decoupled_weight_decay=True, **SOAKED), "decoupled"),
    "SGD": (lambda p: torch.optim.SGD(p, **SOAKED), "l2"),
    "SGD-momentum": (lambda p: torch.optim.SGD(p, momentum=0.9, nesterov=True, **SOAKED), "l2"),
    "SGD-maximize": (lambda p: torch.optim.SGD(p, momentum=0.9, maximize=True, **SOAKED), "l2"),
    "RMSprop": (lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True, **SOAKED), "l2"),
    "Adagrad": (lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.5, **SOAKED), "l2"),
    "NAdam": (lambda p: torch.optim.NAdam(p, **SOAKED), "l2"),
    "Rprop": (lambda p: torch.optim.Rprop(p), "none"),
    "WaitsOnce": (optimizers.WaitsOnce, "none"),
    "OwnDecay": (optimizers.OwnDecay, "other"),
    "MakesStateAtOnce": (optimizers.MakesStateAtOnce, "none"),
}
RESTS_AT = {"Adagrad": {"sum": 0.5}, "MakesStateAtOnce": {"sum": 0.5}}


@pytest.mark.parametrize("name", LISTED)
def test_an_element_wise_optimizer_is_known_as_one(name: str) -> None:
    make, decay = LISTED[name]
    for matrix in (False, True):
        found = behaviour(make, matrix=matrix)
        assert (found.untried, found.against_compact) == (None, None)
        assert found.rests
        assert not found.moves_outside
        assert found.decay == decay
        rest = RESTS_AT.get(name, dict.fromkeys(found.rest_values or (), 0.0))
        assert name == "Rprop" or found.rest_values == rest


@dataclass(frozen=True)
class Fault:
    """One way in which a child would not be exact."""

    make: Make
    rests: bool
    against_compact: str
    """What is said about it; empty where a compact child is exact."""


FAULTS = {
    "NoZero": Fault(optimizers.NoZero, False, r"keeps 'codes', a Tensor of dtype torch.uint8"),
    "SignOfZero": Fault(optimizers.SignOfZero, False, ""),
    "WholeNorm": Fault(optimizers.WholeNorm, True, "does not step element by element"),
    "AllTensors": Fault(optimizers.AllTensors, True, "does not step element by element"),
    "Average": Fault(optimizers.Average, True, "neither a moment nor a counter"),
    "OwnCount": Fault(optimizers.OwnCount, True, "keeps more than its state dict"),
    "NeedsLength": Fault(functools.partial(optimizers.NeedsLength, steps=5), False, "missing 1 required positional"),
    "Slow": Fault(lambda p: optimizers.Slow(torch.optim.SGD(p, lr=0.1)), False, "could not be tried"),
    "Adafactor": Fault(torch.optim.Adafactor, True, "does not step element by element"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_an_optimizer_that_is_not_is_found_out(name: str) -> None:
    fault = FAULTS[name]
    found = behaviour(fault.make)
    assert found.rests == fault.rests
    assert (found.against_compact is None) == (not fault.against_compact)
    assert fault.against_compact in (found.against_compact or "")


def test_a_matrix_may_be_another_matter() -> None:
    assert behaviour(optimizers.Rows).against_compact is None
    assert "keeps 'rows'" in (behaviour(optimizers.Rows, matrix=True).against_compact or "")


def test_one_odd_group_is_enough() -> None:
    parameters = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "decoupled_weight_decay": True}]
    assert behaviour_of(torch.optim.Adam(groups), parameters, compact=True).decay == "other"


def test_nothing_of_the_optimizer_is_touched() -> None:
    parameter = nn.Parameter(torch.linspace(-1, 1, 12))
    optimizer = optimizers.OwnCount([parameter])
    for _ in range(2):
        parameter.grad = torch.ones(12)
        optimizer.step()
    weights, momentum, random = (
        parameter.detach().clone(),
        optimizer.state[parameter]["m"].clone(),
        torch.get_rng_state(),
    )
    ours = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    hooked: list[None] = []
    optimizer.register_step_pre_hook(lambda *_: hooked.append(None))
    assert behaviour_of(optimizer, [parameter], compact=True).untried is None
    assert torch.equal(parameter, weights)
    assert torch.equal(optimizer.state[parameter]["m"], momentum)
    assert torch.equal(random, torch.get_rng_state())
    assert {key: value for key, value in optimizer.param_groups[0].items() if key != "params"} == ours
    assert optimizer.param_groups[0]["params"] == [parameter]
    assert (optimizer.calls, len(optimizer.state), hooked) == (2, 1, [])


# ---------------------------------------------------------------- on engines

D = {"mode": "ChildTuning-D", "reserve_p": 0.3}
COMPACT = {**D, "optimizer_state": "compact"}
BASE = Setup("odd", sub_group_size=20)


def client(name: str, **arguments: Any) -> Make:
    return functools.partial(getattr(optimizers, name), **arguments)


def slow(parameters: list[Any], *, hooks: bool = True) -> torch.optim.Optimizer:
    inner = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    return (optimizers.Slow if hooks else optimizers.SlowWithoutHooks)(inner)


def share(seed: int, count: int = 2) -> list[Any]:
    return deal(batches("odd", count, seed=seed), dist.get_rank(), dist.get_world_size())


@dataclass(frozen=True)
class Moves:
    before: Weights
    after: Weights
    masks: Weights


def trained(setup: Setup, past: int, steps: int = 3) -> Moves:
    """A child after `past` dense steps, whose state must not move what is outside it."""
    with engine_of(setup) as engine:
        for step in range(past):
            train_step(engine, share(step))
        child = ds_childtune.attach(engine, D)
        before = master_weights(engine)
        child.select(share(1000, 4))
        for step in range(past, past + steps):
            train_step(engine, share(step))
        after = master_weights(engine)
        return Moves(
            before, after, {p.name: child.gather_mask(p.name) for p in child.report().parameters if p.eligible}
        )


def all_trained(past: int) -> dict[tuple[str, int], Moves]:
    makes = {
        "NoZero": client("NoZero", smallest=8),
        "SignOfZero": client("SignOfZero"),
        "Average": client("Average"),
        "NeedsLength": client("NeedsLength", steps=9),
        "OwnDecay": client("OwnDecay", weight_decay=0.01),
        "WholeNorm": client("WholeNorm", weight_decay=0.01),
    }
    if past:
        del makes["Average"]
    cells = {
        (name, stage): replace(BASE, stage=stage, client=make) for name, make in makes.items() for stage in (0, 2, 3)
    }
    if not past:
        cells["Slow", 0] = replace(BASE, stage=0, client=slow)
    return {key: trained(setup, past) for key, setup in cells.items()}


@pytest.mark.parametrize("past", [0, 2])
def test_outside_a_dense_child_nothing_moves_whatever_the_optimizer(pool: RankPool, past: int) -> None:
    for cells in pool[2].run(all_trained, past):
        for key, moves in cells.items():
            inside = []
            for name, mask in moves.masks.items():
                assert torch.equal(moves.before[name][~mask], moves.after[name][~mask]), (key, name)
                inside.append((moves.before[name] != moves.after[name])[mask])
            assert float(torch.cat(inside).float().mean()) > 0.9, (key, "vacuous: the child hardly moved")
            assert any(bool((~mask).any()) for mask in moves.masks.values()), "vacuous: no complement"


def attempts(block: dict[str, Any], makes: dict[str, Make], stage: int, past: int = 0) -> dict[str, str]:
    """What attach and select say to each optimizer."""
    said = {}
    for name, make in makes.items():
        with engine_of(replace(BASE, stage=stage, client=make)) as engine:
            for step in range(past):
                train_step(engine, share(step))
            try:
                ds_childtune.attach(engine, block).select(share(1000, 4))
            except NotImplementedError as error:
                said[name] = str(error)
            else:
                train_step(engine, share(0))
                said[name] = ""
    return said


NOT_COMPACT = {name: client(name) for name in ("WholeNorm", "AllTensors", "Average", "OwnCount")} | {
    "NoZero": client("NoZero", smallest=8),
    "NeedsLength": client("NeedsLength", steps=9),
}


def test_a_compact_child_is_refused_where_it_would_not_be_exact(pool: RankPool) -> None:
    for said in pool[2].run(attempts, COMPACT, NOT_COMPACT | {"Descent": client("Descent")}, 2):
        assert said.pop("Descent") == "", "vacuous: every optimizer is refused"
        for name, text in said.items():
            assert '[rank 0 and 1 more] attach: optimizer_state "compact" expects an optimizer that' in text, name
            assert name in text
            assert 'Remedy: set child_tuning.optimizer_state to "dense"' in text
    # What the remedy says.
    assert set(pool[2].run(attempts, D, NOT_COMPACT, 2)[0].values()) == {""}


def test_copies_of_weights_in_the_state_come_after_the_child(pool: RankPool) -> None:
    makes = {"Average": client("Average")}
    (late,) = pool[2].run(attempts, D, makes, 2, 2)[0].values()
    assert "select: Average keeps copies of weights in its state" in late
    assert "Remedy: attach and select before the first step" in late
    decaying = {"Average": client("Average", weight_decay=0.1)}
    (text,) = pool[2].run(attempts, D, decaying, 2)[0].values()
    assert "Remedy: set weight_decay to 0" in text
    assert pool[2].run(attempts, D, makes, 2)[0] == {"Average": ""}


def wrapped() -> tuple[bool, bool, str]:
    """With an optimizer around another: whether `select` changed no weights, whether the whole as a child trains as plain."""
    setup = replace(BASE, stage=0, client=slow)
    ends, still = [], True
    for attached in (False, True):
        with engine_of(setup) as engine:
            for step in range(2):
                train_step(engine, share(step))
            if attached:
                child = ds_childtune.attach(engine, {**D, "reserve_p": 1.0})
                before = model_weights(engine)
                child.select(share(1000, 4))
                still = equal_bits(before, model_weights(engine))
            for step in range(2, 6):
                train_step(engine, share(step))
            ends.append(model_weights(engine))
    with engine_of(replace(setup, client=functools.partial(slow, hooks=False))) as engine:
        try:
            ds_childtune.attach(engine, D)
        except NotImplementedError as error:
            return still, equal_bits(*ends), str(error)
    return still, equal_bits(*ends), ""


def test_a_wrapper_is_the_optimizer_that_steps(pool: RankPool) -> None:
    for still, plain, refused in pool[2].run(wrapped):
        assert still, "a Fisher pass moved weights"
        assert plain
        assert "does not support the optimizer SlowWithoutHooks, whose step does not call torch's step hooks" in refused
        assert "Remedy: use the optimizer that it wraps" in refused


def padded(block: dict[str, Any], garbage: float) -> tuple[Weights, int]:
    """Weights after steps of an optimizer that takes norms of whole flat shards, and elements of padding on all ranks."""
    with engine_of(replace(BASE, stage=3, client=torch.optim.Adafactor)) as engine:
        numel = torch.zeros((), dtype=torch.int64)
        for shard in read_flat_shards(engine, read_parameters(engine)):
            covered = torch.zeros(shard.numel, dtype=torch.bool)
            for fragment in shard.fragments:
                fragment.of(covered).fill_(True)
            shard.flat()[~covered.to(shard.tensor.device)] = garbage
            numel += int((~covered).sum())
        dist.all_reduce(numel)
        child = ds_childtune.attach(engine, block)
        if child.config.mode == "ChildTuning-D":
            child.select(share(1000, 4))
        for step in range(3):
            train_step(engine, share(step))
        return model_weights(engine), int(numel)


@pytest.mark.parametrize("block", [D, {"mode": "ChildTuning-F", "reserve_p": 0.3}], ids=lambda b: b["mode"][-1])
def test_what_is_in_padding_does_not_matter(pool: RankPool, block: dict[str, Any]) -> None:
    """ZeRO-3 leaves in it what was in memory."""
    (expected, numel), _ = pool[2].run(padded, block, 0.0)
    assert numel > 0, "vacuous: nothing is padded"
    for got, _ in pool[2].run(padded, block, 1e30):
        assert equal_bits(got, expected)
        assert all(bool(w.isfinite().all()) for w in got.values())


# ---------------------------------------------------------------- the self-check


def checked(setup: Setup, block: dict[str, Any], steps: int, spoil: str | None) -> tuple[int, str, float]:
    """Applied steps until the self-check ended the run, what it said, and how far weights came."""
    with engine_of(setup) as engine:
        child = ds_childtune.attach(engine, block)
        child.select(share(1000, 4))
        before = model_weights(engine)
        base = getattr(engine.optimizer, "optimizer", engine.optimizer)
        shards = [s.tensor for s in child.attachment.shards]
        kept: dict[int, Tensor] = {}

        def keep(*_: Any) -> None:
            kept.update({i: t.detach().clone() for i, t in enumerate(shards)})

        def restore(*_: Any) -> None:
            for i, t in enumerate(shards):
                t.data.copy_(kept[i])

        def drift(*_: Any) -> None:
            if child.step + 1 == int(str(spoil).rpartition("-")[2]):
                for t in shards:
                    t.data.add_(1e-3)

        # Torch calls hooks in order; the child's own come first.
        if spoil == "restored":
            base.register_step_pre_hook(keep)
            child._hooks._handles.insert(0, hook_before_ours(base, restore))
        elif spoil is not None:
            child._hooks._handles.insert(0, hook_before_ours(base, drift))
        said = ""
        try:
            for step in range(steps):
                train_step(engine, share(step))
        except RuntimeError as error:
            said = str(error)
        return child.step, said, distance(model_weights(engine), before)


def hook_before_ours(base: torch.optim.Optimizer, hook: Callable[..., None]) -> Any:
    """A post-hook of somebody else's that acts on weights before the self-check looks at them."""
    handle = base.register_step_post_hook(hook)
    base._optimizer_step_post_hooks.move_to_end(handle.id, last=False)
    return handle


TINY = {"lr": 1e-9, "torch_adam": True, "weight_decay": 0.0}


def sound() -> list[tuple[int, str, float]]:
    """Runs whose child rests for a good reason."""
    waits = replace(BASE, stage=2, client=client("WaitsOnce"))
    masters = replace(BASE, stage=2, bf16=True, bf16_masters=True)
    tiny = replace(masters, optimizer=replace(masters.optimizer, params=TINY))
    fifth = replace(waits, client=client("EveryFifth"))
    return [checked(setup, block, 22, None) for setup, block in ((waits, D), (fifth, D), (tiny, D), (tiny, COMPACT))]


def test_the_self_check_lets_a_sound_run_be(pool: RankPool) -> None:
    for runs in pool[2].run(sound):
        assert {run[:2] for run in runs} == {(22, "")}
        waits, fifth, tiny, _ = (run[2] for run in runs)
        assert min(waits, fifth) > 1e-3
        assert tiny == 0, "vacuous: updates do not round to nothing"


@pytest.mark.parametrize(
    ("spoil", "ends", "text"),
    [
        ("drift-1", 1, "expected no element outside the child to move"),
        ("drift-2", 2, "expected no element outside the child to move"),
        ("drift-10", 10, "expected no element outside the child to move"),
        ("restored", 20, "expected the child to move, but in 20 steps none of its sampled elements did"),
    ],
)
def test_the_self_check_looks_again(pool: RankPool, spoil: str, ends: int, text: str) -> None:
    for step, said, _ in pool[2].run(checked, replace(BASE, stage=2), D, 21, spoil):
        assert (step, text in said) == (ends, True), said
