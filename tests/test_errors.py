"""Whatever goes wrong on any rank is the same readable error on every rank, and the ranks can go on.

Each case runs on the same processes as all others: a rank left waiting in a collective would hang the next case.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
import torch.distributed as dist

import ds_childtune
from ds_childtune import ranks
from ds_childtune.selection import fisher, selectors
from ds_childtune.selection.loss import default_loss
from tests.support import reference
from tests.support.engines import Optimizer, Setup, engine_of, master_weights, on_device, train_step
from tests.support.models import Batch, batches, build, deal
from tests.support.parity import oracle_fisher
from tests.support.ranks import CASE_SECONDS, RankPool
from tests.support.reference import distance, worst_difference

F, D = "ChildTuning-F", "ChildTuning-D"
CHILD_D = {"mode": D, "reserve_p": 0.3}
CHILD_F = {"mode": F, "reserve_p": 0.3}
ODD = Setup("odd", stage=2)
WORLD_SIZE = 2


@dataclass(frozen=True)
class Raised:
    """An exception as a rank saw it."""

    kind: str
    text: str
    moved: float
    """How far a plain training step moved the weights afterwards: the engine still works."""


def outcome_on_this_rank(setup: Setup, act: Callable[[Any], Any], extra: dict[str, Any]) -> Raised | None:
    """What `act(engine)` raises; then the child is detached and plain DeepSpeed goes on.

    But for ZenFlow, which cannot train on a CPU itself.
    """
    with engine_of(setup, **extra) as engine:
        raised: Exception | None = None
        try:
            act(engine)
        except Exception as error:
            raised = error
        if getattr(engine, "child_tuner", None) is not None:
            engine.child_tuner.detach()
        engine.config.pop("child_tuning", None)  # an engine with a block and without a child does not step
        if engine.zenflow:
            return raised and Raised(type(raised).__name__, str(raised), math.inf)
        before = master_weights(engine)
        micro_batches = deal(batches(setup.family, WORLD_SIZE * setup.accumulation), dist.get_rank(), WORLD_SIZE)
        train_step(engine, micro_batches)
        moved = distance(master_weights(engine), before)
    return raised and Raised(type(raised).__name__, str(raised), moved)


def check(
    pool: RankPool,
    act: Callable[[Any], Any],
    kind: type[Exception],
    *words: str,
    setup: Setup = ODD,
    **extra: Any,
) -> None:
    """Every rank raises `kind`, with the same text, in which all of `words` are."""
    outcomes = pool[WORLD_SIZE].run(outcome_on_this_rank, setup, act, extra)
    for outcome in outcomes:
        assert outcome is not None, "no error"
        assert outcome.kind == kind.__name__, outcome.text
        assert outcome.text == outcomes[0].text
        for word in words:
            assert word in outcome.text, outcome.text
        assert outcome.moved > 1e-3, "the engine does not train any more"


def mine(count: int = 4) -> list[Batch]:
    return deal(batches("odd", count, seed=1000), dist.get_rank(), dist.get_world_size())


# ---------------------------------------------------------------- config


def attach_bare(engine: Any) -> None:
    ds_childtune.attach(engine)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"mode": D, "reserve_p": 1.5}, ["child_tuning.reserve_p", "1.5", "(0, 1]"]),
        ({"mode": D, "reserve_p": True}, ["child_tuning.reserve_p", "True"]),
        ({"mode": "D", "reserve_p": 0.3}, ["child_tuning.mode", "'D'", D]),
        ({**CHILD_D, "reserv_p": 0.3}, ["child_tuning.reserv_p", "unknown key"]),
        ({**CHILD_D, "fisher": {"max_batch": 1}}, ["child_tuning.fisher.max_batch", "unknown key"]),
        ({**CHILD_D, "seed": -1}, ["child_tuning.seed", "-1"]),
        ({**CHILD_D, "optimizer_state": "sparse"}, ["child_tuning.optimizer_state", "sparse"]),
        ({**CHILD_F, "selector": "random"}, ["selector", "no effect"]),
        ({**CHILD_D, "include": ["nope.*"]}, ["child_tuning.include", "nope.*"]),
        ({**CHILD_D, "exclude": ["nope.*"]}, ["child_tuning.exclude", "nope.*"]),
        ({**CHILD_D, "exclude": ["*"]}, ["child_tuning.exclude", "every eligible parameter"]),
        ({**CHILD_D, "include": ["frozen_input.*"]}, ["child_tuning.include", "frozen_input.*", "trainable"]),
        ("ChildTuning-D", ["child_tuning", "'ChildTuning-D'"]),
        ({}, ["child_tuning.mode", "child_tuning.reserve_p", "missing"]),
    ],
    ids=lambda value: None if isinstance(value, list) else str(value)[:60],
)
def test_wrong_config(pool: RankPool, block: Any, words: list[str]) -> None:
    check(pool, attach_bare, ValueError, "Remedy" if "no effect" not in words else "remove", *words, child_tuning=block)


def test_no_config(pool: RankPool) -> None:
    check(pool, attach_bare, ValueError, '"child_tuning" block', "neither", "Remedy")


def attach_with_another_p(engine: Any) -> None:
    ds_childtune.attach(engine, {"mode": D, "reserve_p": 0.3 + 0.1 * dist.get_rank()})


def attach_with_a_typo_on_rank_1(engine: Any) -> None:
    ds_childtune.attach(engine, {**CHILD_D, **({"sed": 1} if dist.get_rank() == 1 else {})})


def test_config_differs_between_ranks(pool: RankPool) -> None:
    check(pool, attach_with_another_p, ValueError, "child_tuning", "same on every rank", "0.3", "0.4", "Remedy")


def test_config_is_wrong_on_one_rank(pool: RankPool) -> None:
    check(pool, attach_with_a_typo_on_rank_1, ValueError, "[rank 1]", "child_tuning.sed", "unknown key")


# ---------------------------------------------------------------- the order of calls


def step_before_select(engine: Any) -> None:
    ds_childtune.attach(engine, CHILD_D)
    train_step(engine, mine()[:1])


def select_inside_accumulation(engine: Any) -> None:
    child = ds_childtune.attach(engine, CHILD_D)
    train_step(engine, mine()[:1])  # of two micro-batches
    try:
        child.select(mine())
    finally:
        child.detach()
        train_step(engine, mine()[:1])


def select_with_f(engine: Any) -> None:
    ds_childtune.attach(engine, CHILD_F).select(mine())


def attach_twice(engine: Any) -> None:
    ds_childtune.attach(engine, CHILD_F)
    ds_childtune.attach(engine, CHILD_F)


def select_after_detach(engine: Any) -> None:
    child = ds_childtune.attach(engine, CHILD_D)
    child.detach()
    child.select(mine())


def select_after_a_detach_on_rank_1(engine: Any) -> None:
    child = ds_childtune.attach(engine, CHILD_D)
    if dist.get_rank() == 1:
        child.detach()
    child.select(mine())


def gather_mask_after_a_detach_on_rank_1(engine: Any) -> None:
    child = ds_childtune.attach(engine, CHILD_D)
    if dist.get_rank() == 1:
        child.detach()
    child.gather_mask("blocks.0.gain")


def report_after_a_detach_on_rank_1(engine: Any) -> None:
    child = ds_childtune.attach(engine, CHILD_F)
    if dist.get_rank() == 1:
        child.detach()
    child.report()


def export_after_a_detach_on_rank_1(engine: Any) -> None:
    child = ds_childtune.attach(engine, CHILD_D)
    child.select(mine())
    if dist.get_rank() == 1:
        child.detach()
    child.export("nowhere")


def apply_after_a_detach_on_rank_1(engine: Any) -> None:
    child = ds_childtune.attach(engine, CHILD_D)
    if dist.get_rank() == 1:
        child.detach()
    ds_childtune.apply_child(engine, "nowhere")


def select_with_masks_on_rank_0(engine: Any) -> None:
    masks = {"blocks.*": "nonzero"} if dist.get_rank() == 0 else None
    ds_childtune.attach(engine, CHILD_D).select(None if masks else mine(), masks=masks)


def select_with_other_names_on_rank_1(engine: Any) -> None:
    name = "blocks.*" if dist.get_rank() == 0 else "*"
    ds_childtune.attach(engine, CHILD_D).select(masks={name: "nonzero"})


def select_with_unnamed_dense_on_rank_1(engine: Any) -> None:
    unnamed: Any = "frozen" if dist.get_rank() == 0 else "dense"
    ds_childtune.attach(engine, CHILD_D).select(masks={"blocks.*": "nonzero"}, unnamed=unnamed)


def patches_since_others_on_rank_0(engine: Any) -> None:
    child = ds_childtune.attach(engine, CHILD_D | {"selector": "magnitude"})
    child.select()
    first = list(child.patches())
    list(child.patches(since=first if dist.get_rank() == 0 else None))


def gather_mask_before_select(engine: Any) -> None:
    ds_childtune.attach(engine, CHILD_D).gather_mask("blocks.0.gain")


def report_before_select(engine: Any) -> None:
    ds_childtune.attach(engine, CHILD_D).report()


def gather_mask_of_a_wrong_name(engine: Any) -> None:
    ds_childtune.attach(engine, CHILD_F).gather_mask("blocks.0.gains")


def gather_mask_of_a_wrong_name_on_rank_1(engine: Any) -> None:
    ds_childtune.attach(engine, CHILD_F).gather_mask("blocks.0.gain" + "s" * dist.get_rank())


def gather_masks_of_two_parameters(engine: Any) -> None:
    name = ("blocks.0.gain", "head.weight")[dist.get_rank()]
    ds_childtune.attach(engine, CHILD_F).gather_mask(name)


def select_without_batches(engine: Any) -> None:
    ds_childtune.attach(engine, CHILD_D).select()


@pytest.mark.parametrize(
    ("act", "kind", "words"),
    [
        (step_before_select, RuntimeError, ["no child yet", "child.select("]),
        (select_with_f, RuntimeError, ["select", F]),
        (attach_twice, RuntimeError, ["already", "detach()"]),
        (select_after_detach, RuntimeError, ["detached", "attach(engine)"]),
        (select_after_a_detach_on_rank_1, RuntimeError, ["[rank 1]", "detached", "attach(engine)"]),
        (gather_mask_after_a_detach_on_rank_1, RuntimeError, ["[rank 1]", "detached", "attach(engine)"]),
        (report_after_a_detach_on_rank_1, RuntimeError, ["[rank 1]", "detached", "attach(engine)"]),
        (export_after_a_detach_on_rank_1, RuntimeError, ["[rank 1]", "export before detach()"]),
        (apply_after_a_detach_on_rank_1, RuntimeError, ["[rank 0", "trains a child", "detach() first"]),
        (select_with_masks_on_rank_0, ValueError, ["same on every rank", "masks of 'blocks.*'", "no masks"]),
        (select_with_other_names_on_rank_1, ValueError, ["same on every rank", "masks of '*'"]),
        (select_with_unnamed_dense_on_rank_1, ValueError, ["same on every rank", "unnamed 'dense'"]),
        (patches_since_others_on_rank_0, ValueError, ["same on every rank", "since earlier patches", "since None"]),
        (gather_mask_before_select, RuntimeError, ["no child yet", "child.select("]),
        (report_before_select, RuntimeError, ["no child yet", "child.select("]),
        (gather_mask_of_a_wrong_name, ValueError, ["'blocks.0.gains'", "blocks.0.gain"]),
        (gather_mask_of_a_wrong_name_on_rank_1, ValueError, ["[rank 1]", "'blocks.0.gains'"]),
        (gather_masks_of_two_parameters, ValueError, ["same on every rank", "blocks.0.gain", "head.weight"]),
        (select_without_batches, ValueError, ["calibration batches", "None"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_wrong_order(pool: RankPool, act: Callable[[Any], Any], kind: type[Exception], words: list[str]) -> None:
    check(pool, act, kind, "Remedy", *words)


def test_select_inside_an_accumulation(pool: RankPool) -> None:
    setup = replace(ODD, accumulation=2)
    check(pool, select_inside_accumulation, RuntimeError, "between a micro-batch and its", "Remedy", setup=setup)


# ---------------------------------------------------------------- calibration


def select_nothing(engine: Any) -> None:
    ds_childtune.attach(engine, CHILD_D).select([])


def select_nothing_on_rank_1(engine: Any) -> None:
    ds_childtune.attach(engine, CHILD_D).select(mine() if dist.get_rank() == 0 else iter(()))


def select_nan_on_rank_1(engine: Any) -> None:
    bad = mine()
    if dist.get_rank() == 1:
        bad[1] = {**bad[1], "y": bad[1]["y"] * math.nan}
    ds_childtune.attach(engine, CHILD_D).select(bad)


def _breaking_loader() -> Iterator[Batch]:
    yield mine()[0]
    if dist.get_rank() == 1:
        raise OSError("disk on fire")
    yield mine()[1]


def select_from_a_loader_that_breaks_on_rank_1(engine: Any) -> None:
    ds_childtune.attach(engine, CHILD_D).select(_breaking_loader())


def _breaking_loss(engine: Any, batch: Batch) -> torch.Tensor:
    loss: torch.Tensor = engine(**on_device(engine, batch))
    if dist.get_rank() == 1:
        raise KeyError("labels")
    return loss


def select_with_a_loss_that_breaks_on_rank_1(engine: Any) -> None:
    ds_childtune.attach(engine, CHILD_D).select(mine(), _breaking_loss)


def _short_on_rank_1(function: Callable[..., Any]) -> Callable[..., Any]:
    def allocate(*args: Any, **kwargs: Any) -> Any:
        if dist.get_rank() == 1:
            raise torch.OutOfMemoryError("out of memory")
        return function(*args, **kwargs)

    return allocate


def select_with_little_memory_for_sums(engine: Any) -> None:
    with mock.patch.object(fisher, "new_scores", _short_on_rank_1(fisher.new_scores)):
        ds_childtune.attach(engine, CHILD_D).select(mine())


def select_with_little_memory_for_scores(engine: Any) -> None:
    child = ds_childtune.attach(engine, CHILD_D | {"selector": "magnitude"})
    with mock.patch.object(selectors, "_each", _short_on_rank_1(selectors._each)):
        child.select()


@pytest.mark.parametrize("act", [select_with_little_memory_for_sums, select_with_little_memory_for_scores])
def test_memory_is_short_on_one_rank(pool: RankPool, act: Callable[[Any], Any]) -> None:
    check(pool, act, RuntimeError, "[rank 1] out of memory")


def select_overflowing(engine: Any) -> None:
    """Gradients of about 1e25: finite, with squares that are not."""
    ds_childtune.attach(engine, CHILD_D).select(mine(), lambda e, b: e(**b) * 1e25)


def select_with_a_parameter_that_gets_no_gradient(engine: Any) -> None:
    """The head is used, the blocks are not."""
    ds_childtune.attach(engine, CHILD_D).select(mine(), lambda e, b: e.module.head.weight.sum() + 0 * e(**b).detach())


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize(
    ("act", "kind", "words"),
    [
        (select_nothing, ValueError, ["at least one calibration batch", "every rank"]),
        (select_nothing_on_rank_1, ValueError, ["at least one calibration batch", "none on rank 1"]),
        (select_nan_on_rank_1, ValueError, ["[rank 1]", "finite loss", "calibration batch 1"]),
        (select_from_a_loader_that_breaks_on_rank_1, RuntimeError, ["[rank 1]", "OSError", "disk on fire"]),
        (select_with_a_loss_that_breaks_on_rank_1, RuntimeError, ["[rank 1]", "KeyError", "labels"]),
        (select_overflowing, ValueError, ["finite"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_bad_calibration(
    pool: RankPool, act: Callable[[Any], Any], kind: type[Exception], words: list[str], stage: int
) -> None:
    check(pool, act, kind, *words, setup=replace(ODD, stage=stage))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_parameter_without_a_gradient(pool: RankPool, stage: int) -> None:
    words = ["never got a gradient", "blocks.0.", "requires_grad=False", "child_tuning.exclude"]
    setup = replace(ODD, stage=stage)
    check(pool, select_with_a_parameter_that_gets_no_gradient, ValueError, *words, setup=setup)


def test_a_loss_that_is_no_scalar(pool: RankPool) -> None:
    check(pool, select_without_labels, ValueError, "scalar loss", "labels", setup=Setup("gpt2", stage=1))


def select_without_labels(engine: Any) -> None:
    tokens = batches("gpt2", 1)[0]["input_ids"]
    ds_childtune.attach(engine, CHILD_D).select([{"input_ids": tokens}])


def test_a_child_of_no_element(pool: RankPool) -> None:
    block = {"mode": D, "reserve_p": 0.1, "include": ["blocks.0.gain"]}
    check(pool, select_mine, ValueError, "child_tuning.reserve_p", "rounds to none", "Remedy", child_tuning=block)


def select_mine(engine: Any) -> None:
    ds_childtune.attach(engine).select(mine())


def select_one_batch(engine: Any) -> None:
    child = ds_childtune.attach(engine, CHILD_D)
    child.select([mine()[0]])  # the remedy
    child.select(mine()[0])


def select_a_number(engine: Any) -> None:
    ds_childtune.attach(engine, CHILD_D).select(3)  # type: ignore[arg-type]


def rows() -> list[dict[str, Any]]:
    return [{key: value[0].tolist() for key, value in batch.items()} for batch in mine()]


def select_rows(engine: Any) -> None:
    child = ds_childtune.attach(engine, CHILD_D)
    tensors = [{key: torch.tensor(value) for key, value in row.items()} for row in rows()]
    child.select(torch.utils.data.DataLoader(tensors, batch_size=2))  # type: ignore[arg-type]  # the remedy
    child.select(rows())


def select_with_a_loss_in_a_dict(engine: Any) -> None:
    child = ds_childtune.attach(engine, CHILD_D)
    child.select(mine(), lambda e, b: {"loss": e(**b)}["loss"])  # the remedy
    child.select(mine(), lambda e, b: {"loss": e(**b)})  # type: ignore[arg-type, return-value]


def select_with_a_loss_in_a_tuple(engine: Any) -> None:
    ds_childtune.attach(engine, CHILD_D).select(mine(), lambda e, b: (e(**b), None))  # type: ignore[arg-type, return-value]


def select_with_a_loss_without_a_graph(engine: Any) -> None:
    ds_childtune.attach(engine, CHILD_D).select(mine(), lambda e, b: e(**b).detach())


class Preferences:
    """As TRL's trainers: the loss is made outside the model, of batches that the model cannot be called with."""

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        return inputs

    def compute_loss(self, model: Any, inputs: Batch) -> torch.Tensor:
        chosen: torch.Tensor = model(inputs["chosen"], inputs["y"])
        return chosen - model(inputs["rejected"], inputs["y"])


def select_preferences(engine: Any) -> None:
    child, trainer = ds_childtune.attach(engine, CHILD_D), Preferences()
    pairs = [{"chosen": b["x"], "rejected": b["x"] + 1, "y": b["y"]} for b in mine()]
    child.select(pairs, loss_fn=lambda engine, batch: trainer.compute_loss(engine, trainer._prepare_inputs(batch)))
    child.select(pairs)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (select_one_batch, ["iterable of micro-batches", "dict of x: Tensor", "select([batch])"]),
        (select_a_number, ["iterable of micro-batches", "int"]),
        (select_rows, ["row of a dataset", "x: list", "DataLoader"]),
        (select_with_a_loss_in_a_dict, ["scalar loss", "dict of loss: Tensor", 'output["loss"]']),
        (select_with_a_loss_in_a_tuple, ["scalar loss", "tuple of Tensor, NoneType", "output[0]"]),
        (select_with_a_loss_without_a_graph, ["without a graph"]),
        (select_preferences, ["chosen", "compute_loss", "loss_fn"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_select_is_given(pool: RankPool, act: Callable[[Any], Any], words: list[str]) -> None:
    check(pool, act, ValueError, "select", "Remedy", *words, setup=replace(ODD, stage=1))


def test_a_model_that_returns_a_tuple_with_the_loss_first() -> None:
    class Engine:
        device = torch.device("cpu")

        def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x.sum(), x

    assert float(default_loss(Engine(), {"x": torch.arange(4.0)})) == 6


def select_from_a_loader_that_is_a_collective() -> tuple[str, str, str, bool]:
    """Rank 0's loader fails where rank 1's waits for it. What each rank raises and prints, and whether the engine trains on."""
    group = dist.new_group([0, 1])

    def loader() -> Iterator[Batch]:
        for i, batch in enumerate(mine(8)):
            if i == 2 and dist.get_rank() == 0:
                raise ValueError("rows of different length")
            dist.broadcast(batch["x"], 0, group=group)
            yield batch

    printed = io.StringIO()
    with engine_of(ODD) as engine, mock.patch.object(ranks, "_PATIENCE", 1.0):
        child = ds_childtune.attach(engine, CHILD_D)
        with contextlib.redirect_stderr(printed), pytest.raises((ValueError, RuntimeError)) as error:
            child.select(loader())
        if dist.get_rank() == 0:
            dist.broadcast(mine()[0]["x"], 0, group=group)  # here a launcher would end the job, and rank 1 with it
        child.detach()
        before = master_weights(engine)
        train_step(engine, mine()[:1])
        moved = distance(master_weights(engine), before) > 1e-3
    dist.destroy_process_group(group)
    return error.type.__name__, str(error.value), printed.getvalue(), moved


def test_no_rank_waits_for_ever_for_one_that_waits_for_it(pool: RankPool) -> None:
    first, second = pool[2].run(select_from_a_loader_that_is_a_collective)
    assert first[0] == "Unanswered"
    assert second[0] == "ValueError"
    for _, text, _, moved in (first, second):
        assert "[rank 0] rows of different length" in text
        assert moved
    assert "did not answer in 1 s" in first[1]
    assert "\n[rank 0] ds_childtune: ValueError: rows of different length\n" in first[2]
    assert "ds_childtune" not in second[2]


def raised_beside_a_slow_rank() -> str:
    """Rank 0 fails at once, as on a full disk; rank 1 comes when that one has waited for hours."""
    store, hours = torch.distributed.distributed_c10d._get_default_store(), itertools.count(0, 3600)

    def monotonic() -> float:
        store.set("waited for hours", "")
        return float(next(hours))

    error = RuntimeError("No space left on device") if dist.get_rank() == 0 else None
    if error is None:
        store.wait(["waited for hours"])
    clock = SimpleNamespace(monotonic=monotonic, sleep=time.sleep)
    with (
        mock.patch.object(ranks, "time", clock),
        contextlib.redirect_stderr(io.StringIO()),
        pytest.raises(RuntimeError) as raised,
    ):
        ranks.raise_together(error)
    return str(raised.value)


def test_a_failing_rank_waits_for_one_that_still_writes(pool: RankPool) -> None:
    assert pool[2].run(raised_beside_a_slow_rank) == ["[rank 0] No space left on device"] * 2


def an_answer_that_is_not_the_others() -> tuple[str, str]:
    """NCCL may end two different collectives that meet, with numbers of neither."""

    def garbled(failed: Any, patience: float) -> bool:
        failed.zero_()
        return True

    with mock.patch.object(ranks, "_all_reduce_in_time", garbled), pytest.raises(RuntimeError) as error:
        ranks.raise_together(ValueError("rows of different length"))
    return error.type.__name__, str(error.value)


def test_an_error_is_not_lost_in_another_collective(pool: RankPool) -> None:
    for kind, text in pool[2].run(an_answer_that_is_not_the_others):
        assert kind == "Unanswered"
        assert "rows of different length" in text


class FullStore:
    """torch's store where it takes nothing more, as one in a file on a full disk."""

    def set(self, *_: object) -> None:
        raise RuntimeError("No space left on device")


def raised_without_words(store: FullStore | None) -> list[str]:
    """What each of two agreements raises: rank 1 fails in the first, both in the second."""
    texts = []
    for failing in ([1], [0, 1]):
        rank = dist.get_rank()
        error = ValueError(f"of rank {rank}") if rank in failing else None
        with (
            mock.patch.object(ranks, "_default_store", return_value=store),
            contextlib.redirect_stderr(io.StringIO()),
            pytest.raises((ValueError, RuntimeError)) as raised,
        ):
            ranks.raise_together(error)
        texts.append(str(raised.value))
    return texts


@pytest.mark.parametrize("store", [FullStore(), None], ids=["full", "none, as with MPI"])
def test_ranks_agree_where_no_store_takes_an_error_s_words(pool: RankPool, store: FullStore | None) -> None:
    first, second = pool[2].run(raised_without_words, store)
    assert first == ["[rank 1] an error, which that rank has printed.", "[rank 0 and 1 more] of rank 0"]
    assert second == ["[rank 1] of rank 1", "[rank 0 and 1 more] an error, which that rank has printed."]


# ---------------------------------------------------------------- uneven batches


def fisher_of_uneven_batches(
    setup: Setup, counts: list[int], max_batches: int | None
) -> tuple[dict[str, torch.Tensor], int]:
    """Rank r has `counts[r]` micro-batches of one list that is dealt out in order."""
    rank = dist.get_rank()
    everything = batches(setup.family, sum(counts), seed=1000)
    own = everything[sum(counts[:rank]) : sum(counts[: rank + 1])]
    settings = {**CHILD_D, "fisher": {"max_batches": max_batches}}
    with engine_of(setup) as engine:
        child = ds_childtune.attach(engine, settings)
        fisher = child.estimate_fisher(own)
        names = list(oracle_fisher(setup.family, torch.float32))
        found = {name: child.gather_fisher(fisher, name) for name in names}
        child.detach()
    return found, fisher.terms


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("counts", [[4, 1], [1, 4], [2, 3]], ids=str)
def test_uneven_batches_are_averaged_over_those_that_exist(pool: RankPool, stage: int, counts: list[int]) -> None:
    expected = oracle_fisher("odd", torch.float32)  # of the same five micro-batches
    for found, terms in pool[2].run(fisher_of_uneven_batches, replace(ODD, stage=stage), counts, None):
        assert terms == 5
        assert worst_difference(found, expected) < 1e-5


@pytest.mark.parametrize("stage", [2, 3])
def test_max_batches_counts_all_ranks(pool: RankPool, stage: int) -> None:
    """Three of five: two from rank 0, which is first in every round, and one from rank 1."""
    everything = batches("odd", 5, seed=1000)
    used = [everything[0], everything[3], everything[1]]
    expected = reference.fisher(build("odd"), [[batch] for batch in used])
    for found, terms in pool[2].run(fisher_of_uneven_batches, replace(ODD, stage=stage), [3, 2], 3):
        assert terms == 3
        assert worst_difference(found, {name: expected[name] for name in found}) < 1e-5


# ---------------------------------------------------------------- refused set-ups


FUSED = Optimizer("AdamW", {"lr": 1e-2, "eps": 1e-3})
REFUSED: dict[str, tuple[Setup, dict[str, Any], list[str]]] = {
    "ratio": (
        replace(ODD, stage=3, optimizer=FUSED),
        {"offload_optimizer": {"device": "cpu", "ratio": 0.5}},
        ["offload_optimizer.ratio", "remove"],
    ),
    "zenflow": (
        replace(ODD, stage=2, optimizer=FUSED),
        {
            "offload_optimizer": {"device": "cpu"},
            "zenflow": {"topk_ratio": 0.1, "update_interval": 2, "select_strategy": "auto", "select_interval": "auto"},
        },
        ["ZenFlow", "zenflow"],
    ),
}
"""Set-ups that DeepSpeed starts on a CPU and that step flat shards in a way of their own."""


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(pool: RankPool, name: str) -> None:
    setup, keys, words = REFUSED[name]
    options = {"zero_optimization": setup.config()["zero_optimization"] | keys, "child_tuning": CHILD_F}
    check(pool, attach_bare, NotImplementedError, "does not support", "Remedy", *words, setup=setup, **options)


def attach_to_an_engine_without_an_optimizer() -> str:
    engine, *_ = deepspeed.initialize(model=build("odd"), config={"train_micro_batch_size_per_gpu": 1})
    try:
        ds_childtune.attach(engine, CHILD_F)
    except ValueError as error:
        return str(error)
    finally:
        engine.destroy()
    return "no error"


def test_no_optimizer(pool: RankPool) -> None:
    for text in pool[2].run(attach_to_an_engine_without_an_optimizer):
        assert "no optimizer" in text
        assert "Remedy" in text


class Wrapper:
    """accelerate's engine wrapper, or anything like it."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine


class Preparer:
    """accelerate's Accelerator, to the eye."""

    state = None

    def prepare(self) -> None:
        pass


class Trainer:
    model_wrapped = None


def attach_to_others() -> dict[str, str]:
    """What `attach` says to what is not an engine; then the remedies that name one here."""
    said = {}
    with engine_of(ODD) as engine:
        others: dict[str, Any] = {
            "module": engine.module,
            "ddp": torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2)),
            "wrapper": Wrapper(engine),
            "tuple": (engine, engine.optimizer, None, None),
            "accelerator": Preparer(),
            "trainer": Trainer(),
            "None": None,
        }
        for name, other in others.items():
            try:
                # One rank's slip is everyone's error.
                ds_childtune.attach(other if dist.get_rank() == 1 else engine, CHILD_F)
            except ValueError as error:
                said[name] = str(error)
        ds_childtune.attach(others["wrapper"].engine, CHILD_F).detach()
        first, *_ = others["tuple"]
        ds_childtune.attach(first, CHILD_F)
    return said


def test_what_is_not_an_engine(pool: RankPool) -> None:
    words = {
        "module": "got OddModel. Remedy: attach to the engine around it",
        "ddp": "got DistributedDataParallel. Remedy: train with DeepSpeed; accelerate",
        "wrapper": "got Wrapper. Remedy: attach to the DeepSpeedEngine in its .engine",
        "tuple": "got tuple. Remedy: attach to the first of what deepspeed.initialize returned",
        "accelerator": "got Preparer. Remedy: attach to the model that its prepare() returned",
        "trainer": "got Trainer. Remedy: pass callbacks=[ds_childtune.ChildTuningCallback()] to it",
        "None": "got NoneType. Remedy",
    }
    for said in pool[WORLD_SIZE].run(attach_to_others):
        assert said.keys() == words.keys()
        for name, text in said.items():
            assert "[rank 1] attach: expected a DeepSpeedEngine" in text
            assert words[name] in text


def test_what_is_not_an_engine_before_there_is_a_process_group() -> None:
    with pytest.raises(ValueError, match="expected a DeepSpeedEngine, got OddModel"):
        ds_childtune.attach(build("odd"), CHILD_F)


def wait_for_nobody() -> str:
    """What rank 0 is told in a collective that rank 1 does not join."""
    group = dist.new_group(range(WORLD_SIZE))
    dist.barrier(group)
    try:
        ds_childtune.limit_waits(0.5)
        if dist.get_rank() == 0:
            dist.barrier(group)
    except RuntimeError as error:
        return str(error)
    finally:
        ds_childtune.limit_waits(10 * CASE_SECONDS)
        dist.barrier()
    return ""


def test_waits_are_limited_in_groups_that_were_made_before(pool: RankPool) -> None:
    said, nothing = pool[WORLD_SIZE].run(wait_for_nobody, seconds=60)
    assert "500ms" in said
    assert nothing == ""
    with pytest.raises(ValueError, match="above 0, got 0"):
        ds_childtune.limit_waits(0)
