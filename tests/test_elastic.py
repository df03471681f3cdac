"""A checkpoint goes on at another world size and ZeRO stage, with the same child, masks and optimizer state: bit for bit.

The model's gradients are small integers over powers of two, hence the same however they are summed; what remains is elementwise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist

import ds_childtune
from tests.support.alive import Alive
from tests.support.bits import equal_bits
from tests.support.blocks import BLOCKS
from tests.support.engines import Optimizer, Setup, Weights, engine_of, master_weights, model_weights, train_step
from tests.support.models import batches, deal
from tests.support.places import GLOBAL_BATCH, Place, State, setup_of
from tests.support.ranks import RankPool

STEPS = 1
"""Of each leg."""


def leg(setup: Setup, block: dict[str, Any], first: int, last: int, came: str | None, goes: str | None) -> State:
    """Train the steps `first` .. `last`, from the checkpoint in `came` or from the start, and leave one in `goes`."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with engine_of(setup) as engine:
        child = ds_childtune.attach(engine, block)
        client_state: dict[str, Any] = {}
        if came is not None:
            _, client_state = engine.load_checkpoint(came)
        elif child.config.mode == "ChildTuning-D":
            child.select(deal(batches("integer", 4, seed=1000), rank, world_size))
        for step in range(first, last):
            train_step(engine, deal(batches("integer", GLOBAL_BATCH, seed=step), rank, world_size))
        if goes is not None:
            engine.save_checkpoint(goes, client_state={"note": last})
        masks = {p.name: child.gather_mask(p.name) for p in child.report().parameters}
        return State(
            master_weights(engine),
            model_weights(engine),
            masks,
            child.step,
            engine.global_steps,
            engine.get_lr(),
            client_state.get("note"),
        )


PLAIN = Place(2, 2)
CHAINS = {
    "1-2-4-1": (Place(1, 3), Place(2, 2), Place(4, 1), Place(1, 3, 500)),
    "zero0": (Place(2, 0), Place(1, 3), Place(2, 0)),
    # In bf16, plain DeepSpeed's ZeRO 0 trains to other bits than its other stages.
    "zero0-alone": (Place(2, 0), Place(1, 0), Place(2, 0)),
    "round-robin": (
        Place(2, 2, round_robin=True),
        Place(4, 1, round_robin=True),
        Place(2, 3),
        Place(2, 2, round_robin=True),
    ),
    "offload": (Place(2, 2, offload=True), Place(1, 1, offload=True), Place(2, 3), Place(4, 2, offload=True)),
    "sub-groups": (Place(2, 3, 40), Place(2, 3, 10**9), Place(2, 1)),
}
CELLS = [
    ("1-2-4-1", "F", False),
    ("1-2-4-1", "F", True),
    ("1-2-4-1", "D", False),
    ("1-2-4-1", "D-compact", False),
    ("1-2-4-1", "D-compact", True),
    ("zero0", "D-compact", False),
    ("zero0-alone", "D", True),
    ("round-robin", "F", True),
    ("round-robin", "D", False),
    ("round-robin", "D-compact", True),
    ("offload", "D-compact", True),
    ("sub-groups", "F", False),
    ("sub-groups", "D-compact", True),
]


_UNMOVED: dict[tuple[Place, str, bool, int], State] = {}


def unmoved(pool: RankPool, place: Place, mode: str, bf16: bool, steps: int) -> State:
    """What a run that stays in one place comes to; each is trained once."""
    if (place, mode, bf16, steps) not in _UNMOVED:
        arguments = setup_of(place, bf16), BLOCKS[mode], 0, steps, None, None
        _UNMOVED[place, mode, bf16, steps] = pool[2].run(leg, *arguments)[0]
    return _UNMOVED[place, mode, bf16, steps]


@pytest.mark.parametrize(("chain", "mode", "bf16"), CELLS)
def test_a_run_moves_between_world_sizes_and_stages(
    pool: RankPool, chain: str, mode: str, bf16: bool, tmp_path: Path
) -> None:
    places = CHAINS[chain]
    ends = [STEPS * (i + 1) for i in range(len(places))]
    expected = unmoved(pool, places[0] if chain == "zero0-alone" else PLAIN, mode, bf16, ends[-1])
    state = None
    for i, (place, end) in enumerate(zip(places, ends, strict=True)):
        came = str(tmp_path / str(i - 1)) if i else None
        setup = setup_of(place, bf16)
        states = pool[place.world_size].run(leg, setup, BLOCKS[mode], end - STEPS, end, came, str(tmp_path / str(i)))
        assert all(equal_bits(states[0].forward, s.forward) for s in states)
        state = states[0]
    assert state is not None
    assert any(expected.masters[n].abs().max() > 0 for n in expected.masters), "vacuous: nothing moved"
    assert equal_bits(state.masks, expected.masks)
    assert equal_bits(state.masters, expected.masters)
    assert equal_bits(state.forward, expected.forward)
    assert (state.step, state.global_steps, state.lr) == (expected.step, expected.global_steps, expected.lr)
    assert state.note == ends[-2]


_WITHOUT_ZERO: dict[str, State] = {}
"""By mode: six steps in one engine. Each is trained once."""

FUSED = Optimizer("AdamW", {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1})


@pytest.mark.parametrize("mode", BLOCKS)
@pytest.mark.parametrize("stage", [2, 3])
def test_one_step_counter_for_a_group(pool: RankPool, mode: str, stage: int, tmp_path: Path) -> None:
    """DeepSpeed's FusedAdam without ZeRO counts steps only on a group's last parameter; elsewhere each flat shard counts."""
    places = (Place(2, 0), Place(2, stage), Place(2, 0))

    def setup(place: Place) -> Setup:
        return replace(setup_of(place, bf16=False), optimizer=FUSED)

    if mode not in _WITHOUT_ZERO:
        _WITHOUT_ZERO[mode] = pool[2].run(leg, setup(places[0]), BLOCKS[mode], 0, 3 * STEPS, None, None)[0]
    expected = _WITHOUT_ZERO[mode]
    states = []
    for i, place in enumerate(places):
        came = str(tmp_path / str(i - 1)) if i else None
        first = STEPS * i
        states.append(
            pool[2].run(leg, setup(place), BLOCKS[mode], first, first + STEPS, came, str(tmp_path / str(i)))[0]
        )
    middle, got = states[0], states[-1]
    for name, weight in expected.masters.items():
        moved = (weight - middle.masters[name]).abs().max()
        # The kernel rounds the tail of a vector in another way than its body.
        assert torch.allclose(got.masters[name], weight, rtol=0, atol=float(1e-4 * moved) + 1e-7), name
    assert any((w - middle.masters[n]).abs().max() > 1e-3 for n, w in expected.masters.items()), (
        "vacuous: nothing moved"
    )


def with_other_frozen_weights(setup: Setup, folder: str, changed: bool) -> tuple[Weights, float]:
    """Save with frozen weights and a buffer that no new model has, or load them. What the forward pass then sees."""
    with engine_of(setup) as engine:
        engine.module.register_buffer("seen", torch.tensor([0.0]))
        ds_childtune.attach(engine, BLOCKS["F"])
        if changed:
            engine.module.seen.fill_(7)
            frozen = [p for p in engine.module.parameters() if not p.requires_grad]
            with deepspeed.zero.GatheredParameters(frozen, modifier_rank=0, enabled=setup.stage == 3), torch.no_grad():
                for parameter in frozen:
                    parameter.add_(torch.arange(parameter.numel()).view(parameter.shape))
            train_step(engine, deal(batches("odd", 2), dist.get_rank(), dist.get_world_size()))
            engine.save_checkpoint(folder)
        else:
            engine.load_checkpoint(folder)
        return model_weights(engine), engine.module.seen.item()


@pytest.mark.parametrize(("came", "goes"), [((2, 3), (1, 2)), ((1, 1), (2, 3))])
def test_frozen_weights_and_buffers_move_too(
    pool: RankPool, came: tuple[int, int], goes: tuple[int, int], tmp_path: Path
) -> None:
    expected = pool[came[0]].run(with_other_frozen_weights, Setup("odd", stage=came[1]), str(tmp_path), True)[0]
    for got in pool[goes[0]].run(with_other_frozen_weights, Setup("odd", stage=goes[1]), str(tmp_path), False):
        assert equal_bits(got[0], expected[0])
        assert got[1] == expected[1] == 7


# ---------------------------------------------------------------- only weights


def save_trained(setup: Setup, block: dict[str, Any], folder: str) -> Weights:
    with engine_of(setup) as engine:
        child = ds_childtune.attach(engine, block)
        if child.config.mode == "ChildTuning-D":
            child.select(deal(batches("odd", 4, seed=1000), dist.get_rank(), dist.get_world_size()))
        for step in range(2):
            train_step(engine, deal(batches("odd", 2, seed=step), dist.get_rank(), dist.get_world_size()))
        engine.save_checkpoint(folder, "trained", client_state={"note": 7})
        at = model_weights(engine)
        train_step(engine, deal(batches("odd", 2, seed=9), dist.get_rank(), dist.get_world_size()))
        engine.save_checkpoint(folder, "later")
        return at


@dataclass(frozen=True)
class WeightsAlone:
    """What is there after a load of only the weights, and whether a child that is chosen then trains."""

    start: Weights
    forward: Weights
    masters: Weights
    note: Any
    global_steps: int
    trains: bool


def load_weights_alone(setup: Setup, folder: str, options: list[dict[str, bool]]) -> list[WeightsAlone]:
    """As the error for another child on these weights says: before select, with load_module_only."""
    ends = []
    for option in options:
        with engine_of(setup) as engine:
            child = ds_childtune.attach(engine, BLOCKS["D-compact"] | {"reserve_p": 0.5})
            start = model_weights(engine)
            with pytest.raises(ValueError, match=r"load them before select\(\) with load_module_only=True"):
                engine.load_checkpoint(folder, "trained")
            assert equal_bits(model_weights(engine), start), "the refusal has changed something"
            _, client_state = engine.load_checkpoint(folder, "trained", **option)
            forward, masters, steps = model_weights(engine), master_weights(engine), engine.global_steps
            child.select(deal(batches("odd", 4, seed=1), dist.get_rank(), dist.get_world_size()))
            assert equal_bits(model_weights(engine), forward)
            train_step(engine, deal(batches("odd", 2, seed=2), dist.get_rank(), dist.get_world_size()))
            trains = not equal_bits(model_weights(engine), forward)
            ends.append(WeightsAlone(start, forward, masters, client_state.get("note"), steps, trains))
    return ends


MODULE_ONLY, NO_STATES = {"load_module_only": True}, {"load_optimizer_states": False}


@pytest.mark.parametrize(
    ("mode", "bf16", "came", "goes"),
    [
        ("D", False, (2, 3), [(2, 3), (1, 2), (2, 0)]),
        ("D-compact", True, (2, 3), [(2, 3), (1, 3)]),
        ("F", True, (2, 2), [(2, 2), (2, 3)]),
        ("D-compact", False, (2, 1), [(1, 1), (2, 3)]),
    ],
)
def test_weights_alone_are_really_loaded(
    pool: RankPool, mode: str, bf16: bool, came: tuple[int, int], goes: list[tuple[int, int]], tmp_path: Path
) -> None:
    """Whatever the stages: what the forward pass sees is what it saw when the checkpoint was written, frozen weights included."""

    def setup(place: tuple[int, int]) -> Setup:
        return Setup("odd", stage=place[1], bf16=bf16, sub_group_size=20, persistence_threshold=5)

    saved = pool[came[0]].run(save_trained, setup(came), BLOCKS[mode], str(tmp_path))[0]
    for place in goes:
        for rank in pool[place[0]].run(load_weights_alone, setup(place), str(tmp_path), [MODULE_ONLY, NO_STATES]):
            for end, steps in zip(rank, (0, 2), strict=True):
                assert not equal_bits(end.start, saved), "vacuous: training changed nothing"
                assert equal_bits(end.forward, saved)
                rounded = {n: w.to(saved[n].dtype) for n, w in end.masters.items()}
                assert equal_bits(rounded, {n: saved[n] for n in rounded}), "the next step would undo the load"
                assert (end.note, end.global_steps, end.trains) == (7, steps, True)


# ---------------------------------------------------------------- what the device holds meanwhile


def peak_of_a_load(setup: Setup, folder: str) -> tuple[int, int, bool]:
    """Over a run that has trained: the bytes of new tensors at their peak, of the masters, and whether it is another run now."""
    with engine_of(setup) as engine:
        child = ds_childtune.attach(engine, BLOCKS["F"])
        for step in range(5, 7):
            train_step(engine, deal(batches("gpt2", 2, seed=step), dist.get_rank(), dist.get_world_size()))
        before = master_weights(engine)
        with Alive(torch.is_floating_point) as alive:  # random states are larger than the model
            engine.load_checkpoint(folder)
        masters = sum(shard.tensor.nbytes for shard in child.attachment.shards)
        return alive.peak, masters, not equal_bits(before, master_weights(engine))


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_that_trains_has_room_to_load(pool: RankPool, stage: int, tmp_path: Path) -> None:
    """From another stage: nothing dense is built beside the masters and moments that are there."""
    came = Setup("gpt2", stage=5 - stage, bf16=True)
    pool[2].run(save_few, came, str(tmp_path))
    for peak, masters, loaded in pool[2].run(peak_of_a_load, replace(came, stage=stage), str(tmp_path)):
        assert loaded, "vacuous: nothing was loaded"
        assert 0 < peak < masters / 2


def save_few(setup: Setup, folder: str) -> None:
    with engine_of(setup) as engine:
        ds_childtune.attach(engine, BLOCKS["F"])
        train_step(engine, deal(batches("gpt2", 2), dist.get_rank(), dist.get_world_size()))
        engine.save_checkpoint(folder)
