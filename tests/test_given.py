"""A child of the user's own: masks, rows of an embedding, what pruning has left, and the mask of a child that was saved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ds_childtune
from ds_childtune.selection.loss import default_loss
from tests.support.engines import Setup, Weights, engine_of, model_weights, train_step
from tests.support.models import batches, build, deal
from tests.support.ranks import RankPool

D = {"mode": "ChildTuning-D", "reserve_p": 1.0, "include": ["*"]}
COMPACT = D | {"optimizer_state": "compact", "clip": "child"}
EMBEDDING = "transformer.wte.weight"
MLP = "transformer.h.0.mlp.c_fc.bias"
ROWS = [3, 4, 11]


def share(count: int, seed: int) -> list[Any]:
    return deal(batches("gpt2", count, seed=seed), dist.get_rank(), dist.get_world_size())


def every_third(shape: torch.Size) -> Tensor:
    return torch.arange(shape.numel()).view(shape) % 3 == 0


def shapes() -> dict[str, torch.Size]:
    return {name: p.shape for name, p in build("gpt2").named_parameters()}


def expected(rows: list[int] | None = None, of: Callable[[str, torch.Size], Tensor] | None = None) -> Weights:
    """Whole masks, written plainly."""
    masks = {}
    for name, shape in shapes().items():
        mask = torch.zeros(shape, dtype=torch.bool)
        if of is not None:
            mask = of(name, shape)
        elif rows is not None and name == EMBEDDING:
            mask[rows] = True
        masks[name] = mask
    return masks


def mlp_third(name: str, shape: torch.Size) -> Tensor:
    return every_third(shape) if ".mlp." in name else torch.zeros(shape, dtype=torch.bool)


def mlp_third_others_whole(name: str, shape: torch.Size) -> Tensor:
    return every_third(shape) if ".mlp." in name else torch.ones(shape, dtype=torch.bool)


CASES: dict[str, tuple[dict[str, Any], Callable[[], Weights]]] = {
    "rows": ({"masks": {EMBEDDING: ROWS}}, lambda: expected(ROWS)),
    "rows as a tensor": ({"masks": {EMBEDDING: torch.tensor(ROWS)}}, lambda: expected(ROWS)),
    "a range of rows": ({"masks": {EMBEDDING: range(2, 9)}}, lambda: expected(list(range(2, 9)))),
    "a function, by pattern": ({"masks": {"*.mlp.*": every_third}}, lambda: expected(of=mlp_third)),
    "others in full": (
        {"masks": {"*.mlp.*": every_third}, "unnamed": "dense"},
        lambda: expected(of=mlp_third_others_whole),
    ),
    "a tensor": ({"masks": {EMBEDDING: every_third(shapes()[EMBEDDING])}}, lambda: expected(of=embedding_third)),
    "a tied parameter's other name": ({"masks": {"lm_head.weight": ROWS}}, lambda: expected(ROWS)),
    "or a pattern for it": ({"masks": {"lm_head*": ROWS}}, lambda: expected(ROWS)),
    "a name goes before a pattern": (
        {"masks": {"*": every_third, EMBEDDING: ROWS}},
        lambda: expected(of=lambda n, s: expected(ROWS)[n] if n == EMBEDDING else every_third(s)),
    ),
}


def embedding_third(name: str, shape: torch.Size) -> Tensor:
    return every_third(shape) if name == EMBEDDING else torch.zeros(shape, dtype=torch.bool)


def trained(setup: Setup, block: dict[str, Any], **arguments: Any) -> tuple[Weights, Weights, ds_childtune.Report]:
    """Masks, which elements moved in two steps, and the report."""
    with engine_of(setup) as engine:
        child = ds_childtune.attach(engine, block)
        answer = selected_and_trained(engine, child, arguments)
        child.detach()
    return answer


def selected_and_trained(
    engine: Any, child: ds_childtune.ChildTuner, arguments: dict[str, Any]
) -> tuple[Weights, Weights, ds_childtune.Report]:
    report = child.select(**arguments)
    before = model_weights(engine)
    for step in range(2):
        train_step(engine, share(4, seed=step))
    masks = {name: child.gather_mask(name) for name in before}
    return masks, {name: w != before[name] for name, w in model_weights(engine).items()}, report


def all_cases(setup: Setup, block: dict[str, Any]) -> dict[str, tuple[Weights, Weights, ds_childtune.Report]]:
    """One child after another, on one engine."""
    with engine_of(setup) as engine:
        child = ds_childtune.attach(engine, block)
        answers = {name: selected_and_trained(engine, child, arguments) for name, (arguments, _) in CASES.items()}
        child.detach()
    return answers


SETUPS = {
    "zero0": (Setup(stage=0), D),
    "zero2": (Setup(stage=2), COMPACT),
    "zero3": (Setup(stage=3, sub_group_size=150), D),
    "zero3-compact": (Setup(stage=3), COMPACT),
}


@pytest.mark.parametrize("name", SETUPS)
def test_the_child_is_what_was_given(pool: RankPool, name: str) -> None:
    setup, block = SETUPS[name]
    for found in pool[2].run(all_cases, setup, block):
        for case, (masks, moved, report) in found.items():
            whole = CASES[case][1]()
            for parameter, mask in whole.items():
                assert torch.equal(masks[parameter], mask), (case, parameter)
                assert not (moved[parameter] & ~mask).any(), (case, parameter)
            inside = sum(int(mask.sum()) for mask in whole.values())
            assert report.kept == inside > 0
            assert report.trained_share == inside / sum(m.numel() for m in whole.values())
            moved_inside = sum(int((moved[n] & m).sum()) for n, m in whole.items())
            assert moved_inside > 0.3 * inside, (
                case,
                "vacuous: rows of tokens that no batch has do not move under Adam",
            )


def pruned(setup: Setup) -> tuple[int, int, int]:
    """Zeros before, zeros among the same elements afterwards, and others that moved."""
    model = build("gpt2")
    for parameter in model.parameters():
        parameter.data.masked_fill_(parameter.data.abs() < parameter.data.abs().median(), 0.0)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=setup.config())
    child = ds_childtune.attach(engine, COMPACT)
    child.select(masks={"*": "nonzero"})
    before = model_weights(engine)
    for step in range(3):
        train_step(engine, share(4, seed=step))
    after = model_weights(engine)
    child.detach()
    engine.destroy()
    zero = {name: w == 0 for name, w in before.items()}
    still = sum(int((after[n][z] == 0).sum()) for n, z in zero.items())
    others = sum(int(((after[n] != before[n]) & ~z).sum()) for n, z in zero.items())
    return sum(int(z.sum()) for z in zero.values()), still, others


@pytest.mark.parametrize("stage", [2, 3])
def test_a_pruned_model_s_zeros_stay_zero(pool: RankPool, stage: int) -> None:
    for zeros, still, others in pool[2].run(pruned, Setup(stage=stage)):
        assert zeros == still > 100, "vacuous: nothing was pruned"
        assert others > 100


def saved_child(setup: Setup, folder: str, as_: str) -> Weights:
    """Choose a child by Fisher information, and save it."""
    with engine_of(setup) as engine:
        child = ds_childtune.attach(engine, COMPACT | {"reserve_p": 0.3})
        child.select(share(4, seed=9))
        masks = {name: child.gather_mask(name) for name, _ in engine.module.named_parameters()}
        if as_ == "export":
            child.export(folder)
        else:
            engine.save_checkpoint(folder, tag="a")
    return masks


@pytest.mark.parametrize("as_", ["export", "checkpoint"])
def test_the_mask_of_a_saved_child(pool: RankPool, tmp_path: Path, as_: str) -> None:
    """At another stage and world size; from a checkpoint's folder, the tag's and the child's."""
    folder = tmp_path / "child"
    masks = pool[2].run(saved_child, Setup(stage=3), str(folder), as_)[0]
    places = [folder] if as_ == "export" else [folder, folder / "a", folder / "a" / "child"]
    for place in places:
        for got, moved, report in pool[4].run(trained, Setup(stage=2), D, child=str(place)):
            for name, mask in masks.items():
                assert torch.equal(got[name], mask), (place, name)
                assert not (moved[name] & ~mask).any()
            assert report.kept == sum(int(m.sum()) for m in masks.values())


def others_frozen(
    setup: Setup, block: dict[str, Any], folder: str
) -> tuple[Weights, Weights, ds_childtune.Report, bool]:
    block = block | {"others": "frozen", "include": ["*.mlp.*"], "reserve_p": 0.3}
    with engine_of(setup) as engine:
        child = ds_childtune.attach(engine, block)
        report = child.select(share(4, seed=9))
        before = model_weights(engine)
        train_step(engine, share(4, seed=1))
        masks = {name: child.gather_mask(name) for name in before}
        moved = {name: w != before[name] for name, w in model_weights(engine).items()}
        engine.save_checkpoint(folder)
        train_step(engine, share(4, seed=2))
        end = model_weights(engine)
    with engine_of(setup) as engine:
        ds_childtune.attach(engine, block)
        engine.load_checkpoint(folder)
        train_step(engine, share(4, seed=2))
        again = model_weights(engine)
    return masks, moved, report, all(torch.equal(end[n], again[n]) for n in end)


@pytest.mark.parametrize("name", SETUPS)
def test_what_is_not_eligible_may_be_frozen(pool: RankPool, tmp_path: Path, name: str) -> None:
    setup, block = SETUPS[name]
    setup = replace(setup, no_decay=("bias",))
    for masks, moved, report, same in pool[2].run(others_frozen, setup, block, str(tmp_path)):
        for parameter, mask in masks.items():
            assert mask.any() == (".mlp." in parameter) or report.kept == 0 or ".mlp." in parameter, parameter
            assert not (moved[parameter] & ~mask).any(), parameter
        eligible = sum(s.numel() for n, s in shapes().items() if ".mlp." in n)
        assert report.eligible == eligible
        assert report.kept == round(0.3 * eligible) == report.trained
        assert any(m.any() for m in moved.values())
        assert "are frozen" in str(report)
        assert same, "a resumed run goes on bit for bit"


def refusals(setup: Setup, folder: str) -> list[tuple[str, str]]:
    """Arguments that are wrong, and what is said; afterwards the remedies."""
    said = []
    with engine_of(setup) as engine:
        child = ds_childtune.attach(engine, D | {"include": ["*.mlp.*"]})
        wrong: dict[str, dict[str, Any]] = {
            "two things": {"masks": {"*": "nonzero"}, "child": folder},
            "batches too": {"batches": [1], "masks": {"*": "nonzero"}},
            "no masks": {"masks": {}},
            "no mapping": {"masks": [1]},
            "unnamed": {"masks": {"*": "nonzero"}, "unnamed": "free"},
            "not eligible": {"masks": {EMBEDDING: ROWS}},
            "no such name": {"masks": {"nothing.*": ROWS}},
            "two patterns": {"masks": {"*.mlp.*": every_third, "*.weight": every_third}},
            "shape": {"masks": {"*.mlp.*": torch.ones(3, dtype=torch.bool)}},
            "rows": {"masks": {"*.c_fc.weight": [10**6]}},
            "floats": {"masks": {"*.c_fc.weight": torch.ones(3)}},
            "a list of bools": {"masks": {"*.c_fc.bias": [True, False]}},
            "bytes": {"masks": {"*.c_fc.bias": torch.ones(3, dtype=torch.uint8)}},
            "a loss": {"masks": {"*": "nonzero"}, "loss_fn": default_loss},
            "unnamed without masks": {"batches": [1], "unnamed": "dense"},
            "word": {"masks": {"*": "zero"}},
            "no folder": {"child": folder + "/none"},
        }
        for name, arguments in wrong.items():
            with pytest.raises(ValueError, match="Remedy: ") as error:
                child.select(**arguments)
            said.append((name, str(error.value)))
            assert not child.chosen
        bias = child.attachment.parameters.shapes["transformer.h.0.mlp.c_fc.bias"].numel()
        third = [i % 3 == 0 for i in range(bias)]
        child.select(masks={"*.c_fc.bias": torch.tensor(third).bool()})
        assert child.gather_mask("transformer.h.0.mlp.c_fc.bias").tolist() == third
        child.select(masks={"*": "nonzero"})
        train_step(engine, share(4, seed=0))
    return said


def test_wrong_masks_are_refused(pool: RankPool, tmp_path: Path) -> None:
    words = {
        "two things": "masks, child",
        "batches too": "batches, masks",
        "not eligible": "include",
        "no such name": "which no parameter has",
        "two patterns": "under its own name",
        "shape": "(3,)",
        "rows": "expected rows from 0 to",
        "floats": "row numbers",
        "a list of bools": "torch.tensor(mask).bool()",
        "bytes": "torch.tensor(mask).bool()",
        "a loss": "no loss_fn with masks",
        "unnamed without masks": "child_tuning.exclude",
        "word": '"nonzero"',
        "no folder": "child.export was given",
    }
    for said in pool[2].run(refusals, Setup(stage=3), str(tmp_path)):
        for name, text in said:
            assert words.get(name, "select") in text, (name, text)


def drawn(seed: int) -> Callable[[torch.Size], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.rand(shape, generator=generator) < 0.5


def drawn_by_each_rank(setup: Setup, block: dict[str, Any]) -> tuple[str, bool, bool]:
    """What is said of masks that only the ranks' generators tell apart; whether the child is still the one before, and what the
    remedy gives."""
    with engine_of(setup) as engine:
        child = ds_childtune.attach(engine, block)
        child.select(masks={EMBEDDING: ROWS})
        with pytest.raises(ValueError, match="same masks") as error:
            child.select(masks={EMBEDDING: ROWS, "*.mlp.*": drawn(dist.get_rank())})
        stays = bool(child.gather_mask(EMBEDDING)[ROWS].all()) and not child.gather_mask(MLP).any()
        child.select(masks={EMBEDDING: ROWS, "*.mlp.*": drawn(0)})
        train_step(engine, share(2, seed=0))
        alike = True
        for weights in model_weights(engine).values():
            first = weights.clone()
            dist.broadcast(first, 0)
            alike = alike and torch.equal(first, weights)
    return str(error.value), stays, alike


def drawn_where_elements_have_one_owner(setup: Setup, block: dict[str, Any]) -> Weights:
    """The weights, with masks that each rank draws by itself."""
    with engine_of(setup) as engine:
        child = ds_childtune.attach(engine, block)
        child.select(masks={EMBEDDING: ROWS, "*.mlp.*": drawn(dist.get_rank())})
        train_step(engine, share(2, seed=0))
        return model_weights(engine)


@pytest.mark.parametrize("block", [D, COMPACT], ids=["dense", "compact"])
def test_with_zero_each_element_has_one_owner(pool: RankPool, block: dict[str, Any]) -> None:
    """The other remedy of what the next test refuses."""
    first, second = pool[2].run(drawn_where_elements_have_one_owner, Setup(stage=1), block)
    assert all(torch.equal(second[name], weights) for name, weights in first.items())


@pytest.mark.parametrize("block", [D, COMPACT], ids=["dense", "compact"])
def test_without_zero_ranks_must_give_the_same_masks(pool: RankPool, block: dict[str, Any]) -> None:
    for said, stays, alike in pool[2].run(drawn_by_each_rank, Setup(stage=0), block):
        for words in ("same masks on every rank", "of 4 parameters", MLP, "Remedy: draw"):
            assert words in said, said
        assert stays, "the child before is gone"
        assert alike, "the ranks' weights differ"


def test_a_function_that_fails_on_one_rank_fails_on_all(pool: RankPool) -> None:
    assert all("broken on rank 1" in text for text in pool[2].run(one_rank_fails))


def one_rank_fails() -> str:
    def broken(shape: torch.Size) -> Tensor:
        if dist.get_rank() == 1:
            raise ValueError("broken on rank 1")
        return torch.ones(shape, dtype=torch.bool)

    with engine_of(Setup(stage=3)) as engine:
        child = ds_childtune.attach(engine, D)
        with pytest.raises(ValueError, match="broken") as error:
            child.select(masks={"*": broken})
        return str(error.value)
