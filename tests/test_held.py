"""A child is chosen from what the optimizer holds: a part of the model, and parameters that are frozen and thawed meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
import torch.distributed as dist

import ds_childtune
from ds_childtune import step_hooks
from tests.support import reference
from tests.support.engines import Setup, Weights, engine_of, master_weights, model_weights, train_step
from tests.support.models import batches, build, deal
from tests.support.ranks import RankPool

P = 0.3
D = {"mode": "ChildTuning-D", "reserve_p": P}
COMPACT = D | {"optimizer_state": "compact"}
F = {"mode": "ChildTuning-F", "reserve_p": P}
FAMILY = "gpt2-2-blocks"
BLOCK = "transformer.h.1."
"""The block that is left out of the optimizer, or frozen. Of two equal ones."""


def share(count: int, seed: int) -> list[Any]:
    return deal(batches(FAMILY, count, seed=seed), dist.get_rank(), dist.get_world_size())


def moved(before: Weights, after: Weights) -> set[str]:
    return {name for name, w in after.items() if not torch.equal(w, before[name])}


def in_block(names: Sequence[str] | set[str]) -> set[str]:
    return {name for name in names if name.startswith(BLOCK)}


# ---------------------------------------------------------------- subsets


@contextmanager
def engine_over_a_part(setup: Setup) -> Iterator[Any]:
    """Everything requires a gradient, and one block is not given to the optimizer."""
    model = build(FAMILY)
    config = setup.config()
    held = [p for name, p in model.named_parameters() if not name.startswith(BLOCK)]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=held, config=config)
    try:
        yield engine
    finally:
        engine.destroy()


@dataclass(frozen=True)
class Part:
    report: ds_childtune.Report
    masks: Weights
    moved: set[str]
    outside_moved: int
    told: str


def train_a_part(setup: Setup, block: dict[str, Any], folder: str, came: str | None) -> Part:
    with engine_over_a_part(setup) as engine:
        child = ds_childtune.attach(engine, block)
        if came is not None:
            engine.load_checkpoint(came)
        elif block["mode"] == D["mode"]:
            child.select(share(4, seed=1000))
        names = [name for name, _ in engine.module.named_parameters()]
        masks = {name: child.gather_mask(name) for name in names}
        report, before = child.report(), model_weights(engine)
        train_step(engine, share(2, seed=1))
        after = model_weights(engine)
        engine.save_checkpoint(folder)
        outside = sum(int(((w != before[n]) & ~masks[n]).sum()) for n, w in after.items())
        return Part(report, masks, moved(before, after), outside, str(child.attachment))


@pytest.mark.parametrize("kind", ["D", "D-compact"])
@pytest.mark.parametrize(
    ("stage", "bf16", "then"), [(0, False, 2), (0, True, 0), (1, False, 0), (2, True, 3), (3, False, 1)]
)
def test_a_child_of_what_the_optimizer_holds(
    pool: RankPool, stage: int, bf16: bool, then: int, kind: str, tmp_path: Path
) -> None:
    """Chosen, reported and carried to another stage; the oracle sorts the scores of what is held."""
    setup = Setup(FAMILY, stage=stage, bf16=bf16)
    block = D if kind == "D" else COMPACT
    model = build(FAMILY).to(setup.dtype)
    scores = reference.fisher(model, [[batch] for batch in batches(FAMILY, 4, seed=1000)])
    eligible = {n: s for n, s in scores.items() if n.startswith("transformer.h.") and not n.startswith(BLOCK)}
    numel = sum(s.numel() for s in eligible.values())
    for part in pool[2].run(train_a_part, setup, block, str(tmp_path / "a"), None):
        assert (part.report.eligible, part.report.kept) == (numel, round(P * numel))
        assert {p.name for p in part.report.parameters if p.eligible} == eligible.keys()
        assert not in_block({p.name for p in part.report.parameters})
        assert part.report.numel == sum(p.numel() for n, p in model.named_parameters() if not n.startswith(BLOCK))
        kept = {name for name, mask in part.masks.items() if mask.any()}
        assert part.moved == kept if not bf16 else part.moved <= kept
        assert part.moved & eligible.keys(), "vacuous: nothing moved"
        assert part.outside_moved == 0
        assert not any(part.masks[name].any() for name in in_block(part.masks.keys()))
        assert (
            f"{len(in_block(scores.keys()))} trainable parameters of {numel:,} elements are not in the optimizer"
            in part.told
        )
        assert BLOCK in part.told
        if not bf16:
            expected = reference.top(eligible, round(P * numel))
            assert all(torch.equal(part.masks[name], mask) for name, mask in expected.items())
    resumed = pool[2].run(train_a_part, replace(setup, stage=then), block, str(tmp_path / "b"), str(tmp_path / "a"))[0]
    assert all(torch.equal(resumed.masks[name], mask) for name, mask in part.masks.items())
    assert resumed.outside_moved == 0
    assert resumed.moved == part.moved or bf16


def beside_a_frozen_group(
    setup: Setup, block: dict[str, Any], first: bool, folder: str
) -> tuple[Weights, Weights, Weights]:
    """Weights before and after two steps, one of them after a load: a frozen block has a group of its own, or is not given."""
    model = build(FAMILY)
    for name, p in model.named_parameters():
        p.requires_grad = not name.startswith(BLOCK)
    groups = [{"params": [p for p in model.parameters() if p.requires_grad == trains]} for trains in (False, True)]
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=groups if first else groups[1:], config=setup.config()
    )
    child = ds_childtune.attach(engine, block)
    if block["mode"] == D["mode"]:
        child.select(share(4, seed=1000))
    before = model_weights(engine)
    masks = {name: child.gather_mask(name) for name, p in engine.module.named_parameters() if p.requires_grad}
    train_step(engine, share(2, seed=1))
    engine.save_checkpoint(folder)
    train_step(engine, share(2, seed=2))
    after = model_weights(engine)
    engine.load_checkpoint(folder)
    train_step(engine, share(2, seed=2))
    assert all(torch.equal(w, after[name]) for name, w in model_weights(engine).items()), "the checkpoint goes on"
    engine.destroy()
    return before, after, masks


@pytest.mark.parametrize("block", [D, COMPACT, F], ids=["D", "D-compact", "F"])
def test_a_group_that_is_frozen_as_a_whole(pool: RankPool, block: dict[str, Any], tmp_path: Path) -> None:
    """DeepSpeed's ZeRO-3 passes over it. Training is as without it."""
    setup = Setup(FAMILY, stage=3)
    without = pool[2].run(beside_a_frozen_group, setup, block, False, str(tmp_path / "a"))
    beside = pool[2].run(beside_a_frozen_group, setup, block, True, str(tmp_path / "b"))
    for (_, expected, _), (before, after, masks) in zip(without, beside, strict=True):
        assert all(torch.equal(w, after[name]) for name, w in expected.items())
        assert moved(before, after) - in_block(before.keys()), "vacuous"
        assert not in_block(moved(before, after))
        if block["mode"] == D["mode"]:
            assert not any(((after[n] != before[n]) & ~mask).any() for n, mask in masks.items())


@pytest.mark.parametrize("stage", [0, 3])
def test_free_masks_of_what_the_optimizer_holds(pool: RankPool, stage: int, tmp_path: Path) -> None:
    for part in pool[2].run(train_a_part, Setup(FAMILY, stage=stage), F, str(tmp_path), None):
        numel = sum(p.numel() for n, p in build(FAMILY).named_parameters() if not n.startswith(BLOCK))
        assert part.report.eligible == part.report.numel == numel
        assert abs(part.report.density - P) < 0.05
        assert not in_block(part.moved)


def attach_to_strangers() -> str:
    model, stranger = build(FAMILY), torch.nn.Parameter(torch.ones(3, 5))
    config = Setup(FAMILY, stage=0).config()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=[*model.parameters(), stranger], config=config)
    try:
        ds_childtune.attach(engine, F)
    except NotImplementedError as error:
        return str(error)
    finally:
        engine.destroy()
    return ""


def test_an_optimizer_that_holds_what_the_model_has_not(pool: RankPool) -> None:
    for text in pool[2].run(attach_to_strangers):
        assert "parameters outside the model: it has 1 of shapes (3, 5)" in text
        assert "Remedy: make them parameters of the model" in text


# ---------------------------------------------------------------- frozen and thawed


def freeze(engine: Any, frozen: bool) -> None:
    for name, parameter in engine.module.named_parameters():
        if name.startswith(BLOCK):
            parameter.requires_grad_(not frozen)


@dataclass(frozen=True)
class Chapter:
    """Some steps with one child."""

    kept: int
    kept_in_block: int
    moved: set[str]
    outside_moved: int


def chapter(engine: Any, child: ds_childtune.ChildTuner, seed: int) -> Chapter:
    before, masks = model_weights(engine), {p.name: child.gather_mask(p.name) for p in child.report().parameters}
    train_step(engine, share(2, seed=seed))
    after = model_weights(engine)
    outside = sum(int(((w != before[n]) & ~masks[n]).sum()) for n, w in after.items() if n in masks)
    kept = {p.name: p.kept for p in child.report().parameters}
    return Chapter(sum(kept.values()), sum(kept[n] for n in in_block(kept.keys())), moved(before, after), outside)


def life(setup: Setup, block: dict[str, Any], folder: str) -> tuple[dict[str, Chapter], Weights, Weights]:
    """Freeze a block in training, go through everything, thaw it. Then weights and masks as they were last saved."""
    story = {}
    with engine_of(setup) as engine:
        child = ds_childtune.attach(engine, block)
        child.select(share(4, seed=1000))
        story["whole"] = chapter(engine, child, 1)
        freeze(engine, True)
        story["frozen"] = chapter(engine, child, 2)
        engine.save_checkpoint(f"{folder}/early")
        child.export(f"{folder}/child")
        child.select(share(4, seed=1001))
        story["selected"] = chapter(engine, child, 3)
        child.detach()
        child = ds_childtune.attach(engine, block)
        child.select(share(4, seed=1002))
        story["attached"] = chapter(engine, child, 4)
        engine.save_checkpoint(f"{folder}/late")
        masks = {p.name: child.gather_mask(p.name) for p in child.report().parameters}
        weights = master_weights(engine) if setup.stage else model_weights(engine)
        if setup.stage:
            freeze(engine, False)
            story["thawed"] = chapter(engine, child, 5)
            child.select(share(4, seed=1003))
            story["whole again"] = chapter(engine, child, 6)
            engine.save_checkpoint(f"{folder}/end")
    return story, weights, masks


def resumed(setup: Setup, block: dict[str, Any], folder: str, frozen: bool) -> tuple[Weights, Weights, set[str], int]:
    with engine_of(setup) as engine:
        freeze(engine, frozen)
        child = ds_childtune.attach(engine, block)
        engine.load_checkpoint(f"{folder}/late")
        weights = master_weights(engine) if setup.stage else model_weights(engine)
        masks = {p.name: child.gather_mask(p.name) for p in child.report().parameters}
        went_on = chapter(engine, child, 7)
        engine.save_checkpoint(f"{folder}/again")
        return weights, masks, went_on.moved, went_on.outside_moved


LIVES = {
    "zero0": Setup(FAMILY, stage=0),
    "zero1-fp32-accumulation": Setup(FAMILY, stage=1, bf16=True, fp32_accumulation=True),
    "zero2": Setup(FAMILY, stage=2, no_decay=("bias",)),
    "zero2-offload": Setup(FAMILY, stage=2, offload=True),
    "zero3": Setup(FAMILY, stage=3, sub_group_size=500),
}


@pytest.mark.parametrize("kind", ["dense", "compact"])
@pytest.mark.parametrize("name", LIVES)
def test_a_block_that_is_frozen_and_thawed(pool: RankPool, name: str, kind: str, tmp_path: Path) -> None:
    setup, block = LIVES[name], D if kind == "dense" else COMPACT
    blocks = {n: p.numel() for n, p in build(FAMILY).named_parameters() if n.startswith("transformer.h.")}
    of_all = round(P * sum(blocks.values()))
    of_open = round(P * sum(numel for n, numel in blocks.items() if not n.startswith(BLOCK)))
    lives = pool[2].run(life, setup, block, str(tmp_path))
    _, weights, masks = lives[0]
    for story, *_ in lives:
        assert all(c.outside_moved == 0 for c in story.values())
        assert all(c.moved - in_block(c.moved) for c in story.values()), "vacuous: nothing else moved"
        assert story["whole"].kept == story["frozen"].kept == of_all
        assert in_block(story["whole"].moved)
        for frozen in ("selected", "attached", *(["thawed"] if setup.stage else [])):
            assert (story[frozen].kept, story[frozen].kept_in_block) == (of_open, 0), frozen
            assert not in_block(story[frozen].moved), frozen
        if setup.stage:
            assert story["whole again"].kept == of_all
            assert in_block(story["whole again"].moved)
    others = [replace(setup, stage=3)] if setup.stage == 2 and not setup.offload else []
    for frozen, other in ((True, setup), *(((False, setup), *((False, o) for o in others)) if setup.stage else ())):
        got, same_masks, moved_on, outside = pool[2].run(resumed, other, block, str(tmp_path), frozen)[0]
        assert all(torch.equal(got[n], w) for n, w in weights.items()), (frozen, other)
        assert all(torch.equal(same_masks[n], m) for n, m in masks.items())
        assert outside == 0
        assert moved_on - in_block(moved_on)


def thawed_without_zero() -> tuple[list[str], set[str]]:
    """What is said, of fp32 at ZeRO 0, when a block is thawed that was frozen at attach; and what moves after the remedy."""
    said = []
    with engine_of(Setup(FAMILY, stage=0)) as engine:
        freeze(engine, True)
        child = ds_childtune.attach(engine, COMPACT)
        child.select(share(4, seed=1000))
        train_step(engine, share(2, seed=1))
        freeze(engine, False)
        try:
            train_step(engine, share(2, seed=2))
        except RuntimeError as error:
            said.append(str(error))
        child.detach()
        child = ds_childtune.attach(engine, COMPACT)
        child.select(share(4, seed=1001))
        return said, chapter(engine, child, 3).moved


def test_thawing_what_was_frozen_at_attach_is_refused(pool: RankPool) -> None:
    for said, moved_ in pool[2].run(thawed_without_zero):
        assert len(said) == 1
        assert "expected parameters that were frozen at attach to stay so" in said[0]
        assert "Remedy: call detach() and attach(engine) again" in said[0]
        assert in_block(moved_)


def thawed_after_initialize(setup: Setup, block: dict[str, Any], folder: str) -> tuple[list[str], str, Chapter]:
    """A block that is frozen when DeepSpeed builds its optimizer never trains, which is said; saving and attaching go on."""
    told: list[str] = []
    model = build(FAMILY)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(BLOCK))
    config = setup.config()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    try:
        child = ds_childtune.attach(engine, block)
        child.select(share(4, seed=1000))
        chapter(engine, child, 1)
        with mock.patch.object(step_hooks, "tell", told.append):
            chapter(engine, child, 1)
            freeze(engine, False)
            chapter(engine, child, 2)
        engine.save_checkpoint(folder)
        child.detach()
        child = ds_childtune.attach(engine, block)
        child.select(share(4, seed=1001))
        engine.save_checkpoint(folder, tag="again")
        return told, str(child.attachment), chapter(engine, child, 3)
    finally:
        engine.destroy()


@pytest.mark.parametrize("stage", [2, 3])
def test_thawing_what_was_frozen_at_initialize(pool: RankPool, stage: int, tmp_path: Path) -> None:
    for warned, told, went_on in pool[2].run(
        thawed_after_initialize, Setup(FAMILY, stage=stage), COMPACT, str(tmp_path)
    ):
        assert len(warned) == 1, "it is said once, and not before the block is thawed"
        assert "12 parameters do not train" in warned[0]
        assert "Remedy: call requires_grad_(True) before deepspeed.initialize" in warned[0]
        assert "12 trainable parameters of 728 elements are not in the optimizer, so they do not train" in told
        assert went_on.moved
        assert not in_block(went_on.moved)
        assert went_on.outside_moved == 0


def everything_frozen(stage: int) -> tuple[str, int]:
    with engine_of(Setup(FAMILY, stage=stage)) as engine:
        child = ds_childtune.attach(engine, D)
        blocks = [p for n, p in engine.module.named_parameters() if n.startswith("transformer.h.")]
        for parameter in blocks:
            parameter.requires_grad_(False)
        try:
            child.select(share(4, seed=1000))
        except ValueError as error:
            text = str(error)
        for parameter in blocks:
            parameter.requires_grad_(True)
        return text, child.select(share(4, seed=1000)).kept


def test_selecting_from_frozen_parameters_alone(pool: RankPool) -> None:
    for text, kept in pool[2].run(everything_frozen, 2):
        assert "expected eligible parameters that train, got 24 that are all frozen" in text
        assert "Remedy: call requires_grad_(True)" in text
        assert kept > 0


def unreached(stage: int) -> tuple[str, set[str], int, int]:
    """A parameter that no micro-batch reaches: what `select` says, and what each of its two remedies leads to."""
    model = build(FAMILY)
    name = "transformer.h.1.unused"
    model.transformer.h[1].register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
    config = Setup(FAMILY, stage=stage).config()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    try:
        child = ds_childtune.attach(engine, D)
        try:
            child.select(share(4, seed=1000))
        except ValueError as error:
            text = str(error)
        engine.module.get_parameter(name).requires_grad_(False)
        frozen = child.select(share(4, seed=1000)).kept
        went_on = chapter(engine, child, 1)
        engine.module.get_parameter(name).requires_grad_(True)
        child.detach()
        child = ds_childtune.attach(engine, {**D, "exclude": [name]})
        return text, went_on.moved, frozen, child.select(share(4, seed=1000)).kept
    finally:
        engine.destroy()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_both_remedies_for_a_parameter_that_gets_no_gradient(pool: RankPool, stage: int) -> None:
    numel = sum(p.numel() for n, p in build(FAMILY).named_parameters() if n.startswith("transformer.h."))
    for text, moved_, frozen, excluded in pool[2].run(unreached, stage):
        assert (
            "transformer.h.1.unused. Remedy: freeze them (requires_grad=False) or add them to child_tuning.exclude"
            in text
        )
        assert frozen == excluded == round(P * numel)
        assert moved_
        assert "transformer.h.1.unused" not in moved_
