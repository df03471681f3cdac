"""Flat shards hold the weights that `attach` believes them to hold, and a layout that lies is refused.

That round robin trains the right elements is in `test_parity.py`, `test_compact.py`, `test_reads.py` and `test_elastic.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_childtune
from ds_childtune import tuner
from ds_childtune.shards import FlatShard, Fragment
from ds_childtune.zero.flat_shards import _mapped_shards, read_flat_shards
from ds_childtune.zero.layout_check import check_layout
from tests.support.engines import Optimizer, Setup, Weights, engine_of, master_weights, model_weights, train_step
from tests.support.models import batches, deal
from tests.support.ranks import RankPool

F = {"mode": "ChildTuning-F", "reserve_p": 0.5}
SGD = Optimizer("SGD", {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.1})
FUSED = Optimizer("AdamW", {"lr": 1e-2, "eps": 1e-3})
TWO = "gpt2-2-blocks"  # fragments of equal size change places
SETUPS = {
    "zero0": Setup(TWO),
    "zero0-unfused": Setup(TWO, bf16=True, optimizer=SGD),
    "zero0-fused": Setup(TWO, bf16=True, optimizer=FUSED),
    "zero1-fp32-accumulation": Setup(TWO, stage=1, bf16=True, fp32_accumulation=True),
    "zero1-groups": Setup(TWO, stage=1, no_decay=("bias", "ln")),
    "zero2-round-robin": Setup(TWO, stage=2, bf16=True, round_robin=True),
    "zero2-offload": Setup(TWO, stage=2, bf16=True, offload=True),
    "zero2-bf16-masters": Setup(TWO, stage=2, bf16=True, bf16_masters=True),
    "zero3-persistent": Setup(TWO, stage=3, bf16=True, sub_group_size=300, persistence_threshold=50),
    "zero3-zero-init": Setup("odd", stage=3, bf16=True, zero_init=True, sub_group_size=20),
    "zero3-offload": Setup(TWO, stage=3, bf16=True, offload=True),
}


def share(setup: Setup, seed: int) -> list[Any]:
    return deal(batches(setup.family, dist.get_world_size(), seed=seed), dist.get_rank(), dist.get_world_size())


# ---------------------------------------------------------------- layouts that lie

Lie = Callable[[tuple[FlatShard, ...]], tuple[FlatShard, ...]]


def swapped(shards: tuple[FlatShard, ...]) -> tuple[FlatShard, ...]:
    """Fragments of two parameters of equal size change places."""
    names = {"transformer.h.0.attn.c_attn.weight": "transformer.h.1.attn.c_attn.weight"}
    if any(f.name.startswith("blocks.") for s in shards for f in s.fragments):
        names = {"blocks.0.back.weight": "blocks.1.back.weight"}
    names |= {b: a for a, b in names.items()}
    return tuple(
        FlatShard(s.tensor, tuple(replace(f, name=names.get(f.name, f.name)) for f in s.fragments)) for s in shards
    )


def shifted(shards: tuple[FlatShard, ...]) -> tuple[FlatShard, ...]:
    """Every fragment begins one element later than it says."""
    return tuple(
        FlatShard(
            s.tensor,
            tuple(replace(f, param_start=f.param_start + 1, numel=f.numel - 1) for f in s.fragments if f.numel > 1),
        )
        for s in shards
    )


@contextmanager
def lying(lie: Lie) -> Iterator[None]:
    with mock.patch.object(tuner, "read_flat_shards", lambda *arguments: lie(read_flat_shards(*arguments))):
        yield


@dataclass(frozen=True)
class Told:
    """What `attach` says on one rank."""

    lies: list[str]
    """Before training and after, to each lie."""
    more: bool
    """Masters held more than the weights did by the end."""
    moved: bool
    """The engine trained on with a child."""


def attach_to_lies(setup: Setup, lies: list[Lie], ranks: list[int]) -> Told:
    """The truth is taken before training and after, with the same engine."""
    texts = []
    with engine_of(setup) as engine:
        for seed in (1, 2):
            for lie in lies:
                try:
                    with lying(lie if dist.get_rank() in ranks else lambda shards: shards):
                        ds_childtune.attach(engine, F)
                except RuntimeError as error:
                    texts.append(str(error))
            ds_childtune.attach(engine, F).detach()
            train_step(engine, share(setup, seed))
        masters, before = master_weights(engine), model_weights(engine)
        ds_childtune.attach(engine, F)
        train_step(engine, share(setup, 3))
        after = model_weights(engine)
        more = any(not torch.equal(w, before[n].float()) for n, w in masters.items())
        return Told(texts, more, any(not torch.equal(before[n], w) for n, w in after.items()))


@pytest.mark.parametrize("name", SETUPS)
def test_a_layout_that_lies_is_refused(pool: RankPool, name: str) -> None:
    """And none that is right, also when masters hold more than the weights."""
    setup = SETUPS[name]
    for told in pool[2].run(attach_to_lies, setup, [swapped, shifted] if name != "zero0" else [], [0, 1]):
        assert len(told.lies) == (4 if name != "zero0" else 0)
        for word in ("attach: expected the flat shards", "other values", "weight", "Remedy", "refresh_fp32_params()"):
            assert all(word in text for text in told.lies)
        assert told.more == (setup.bf16 and not setup.bf16_masters), "vacuous: nothing was rounded"
        assert told.moved


def test_a_layout_that_lies_on_one_rank_is_refused_on_all(pool: RankPool) -> None:
    for told in pool[2].run(attach_to_lies, SETUPS["zero2-offload"], [shifted], [1]):
        assert ["[rank 1] attach: expected the flat shards" in text for text in told.lies] == [True, True]


def attach_to_another_order(setup: Setup) -> str:
    """DeepSpeed's own tables tell another order than that of the buffer, as `_hp_mapping` does with round robin."""
    with engine_of(setup) as engine:
        optimizer = engine.optimizer
        optimizer.round_robin_bit16_groups[0] = optimizer.bit16_groups[0]
        numels = torch.tensor([0, *(p.numel() for p in optimizer.bit16_groups[0])])
        optimizer.round_robin_bit16_offsets[0] = numels.cumsum(0).tolist()[:-1]
        try:
            ds_childtune.attach(engine, F)
        except RuntimeError as error:
            return str(error)
    return ""


def test_another_order_of_deepspeed_s_is_refused(pool: RankPool) -> None:
    assert all("other values in" in text for text in pool[2].run(attach_to_another_order, SETUPS["zero2-round-robin"]))
    plain = replace(SETUPS["zero2-round-robin"], round_robin=False)
    assert pool[2].run(attach_to_another_order, plain) == ["", ""], "vacuous: the tables were wrong anyhow"


def in_deepspeed_s_own_order(engine: Any, parameters: Any) -> tuple[FlatShard, ...]:
    """As flat shards were read before round robin was known of."""
    names = {id(p): name for name, p in parameters.by_name.items()}
    optimizer = engine.optimizer
    return _mapped_shards(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, names)


def save_as_before(setup: Setup, block: dict[str, Any], folder: str) -> Weights:
    with (
        mock.patch.object(tuner, "read_flat_shards", in_deepspeed_s_own_order),
        mock.patch.object(tuner, "check_layout", return_value=None),
        engine_of(setup) as engine,
    ):
        ds_childtune.attach(engine, block)
        train_step(engine, share(setup, 1))
        engine.save_checkpoint(folder)
        return model_weights(engine)


def load_from_before(setup: Setup, block: dict[str, Any], folder: str, attached: bool) -> tuple[list[str], Weights]:
    said = []
    with engine_of(setup) as engine:
        if attached:
            ds_childtune.attach(engine, block)
            for keys in ({}, {"load_optimizer_states": False}):
                try:
                    engine.load_checkpoint(folder, **keys)
                except ValueError as error:
                    said.append(str(error))
        else:
            engine.load_checkpoint(folder)
            ds_childtune.attach(engine, block)
        weights = model_weights(engine)
        train_step(engine, share(setup, 2))
        return said, weights


def test_a_checkpoint_whose_layout_lies_is_refused(pool: RankPool, tmp_path: Path) -> None:
    setup = SETUPS["zero2-round-robin"]
    saved = pool[2].run(save_as_before, setup, F, str(tmp_path))[0]
    for other in (setup, replace(setup, stage=3, round_robin=False)):
        for said, _ in pool[2].run(load_from_before, other, F, str(tmp_path), True):
            assert len(said) == 2
            for text in said:
                assert "expected masters that round to the weights beside them" in text
                assert "Remedy: call engine.load_checkpoint before attach" in text
    for _, weights in pool[2].run(load_from_before, setup, F, str(tmp_path), False):
        assert all(torch.equal(weights[name], weight) for name, weight in saved.items())


# ---------------------------------------------------------------- edited weights


def edited(setup: Setup) -> tuple[str, bool, bool]:
    """What `attach` says, and whether an edited weight outlives a step: without the remedy, and with it."""
    name = "transformer.h.1.mlp.c_fc.weight"
    texts, lasts = [], []
    for remedy in (False, True):
        with engine_of(setup) as engine:
            param = engine.module.get_parameter(name)
            with deepspeed.zero.GatheredParameters([param], modifier_rank=0, enabled=setup.stage == 3), torch.no_grad():
                param.view(-1)[: param.numel() // 2] = 3.0
            try:
                ds_childtune.attach(engine, F)
            except RuntimeError as error:
                texts.append(str(error))
            if remedy:
                engine.optimizer.refresh_fp32_params()
                ds_childtune.attach(engine, F)
            for group in engine.optimizer.optimizer.param_groups:
                group["lr"] = 0.0
            train_step(engine, share(setup, 1))
            lasts.append(bool((model_weights(engine)[name].flatten()[0] == 3.0).all()))
    assert texts[0] == texts[1]
    return texts[0], lasts[0], lasts[1]


@pytest.mark.parametrize("name", ["zero0-unfused", "zero0-fused", "zero2-round-robin", "zero3-persistent"])
def test_weights_edited_without_their_masters(pool: RankPool, name: str) -> None:
    """The next step of plain DeepSpeed undoes such an edit, so it is refused; the remedy keeps it."""
    for text, without_remedy, with_remedy in pool[2].run(edited, SETUPS[name]):
        assert "transformer.h.1.mlp.c_fc.weight" in text
        assert "call engine.optimizer.refresh_fp32_params()" in text
        assert (without_remedy, with_remedy) == (False, True)


# ---------------------------------------------------------------- what a look sees


def looked_at(weights: Tensor, masters: Tensor) -> str:
    shard = FlatShard(masters, (Fragment("w", 0, 0, weights.numel()),))
    try:
        check_layout(SimpleNamespace(optimizer=SimpleNamespace()), {"w": nn.Parameter(weights)}, [shard])
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("numel", [1, 5, 1 << 17, 1_000_003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_shift_is_seen(numel: int, dtype: torch.dtype) -> None:
    masters = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    masters[::3] = torch.nan
    masters[1::7] = -0.0
    masters[2::5] = 1e30  # inf in fp16
    weights = masters.to(dtype)
    assert looked_at(weights, masters) == ""
    assert looked_at(weights, weights.clone()) == ""
    for shift in (1, 2, 15, 1 << 16, numel // 2):
        if 0 < shift < numel:
            assert "other values" in looked_at(weights, masters.roll(shift)), shift
    part = max(1, numel >> 15)
    for start in (0, numel // 3, numel - part):
        wrong = masters.clone()
        wrong[start : start + part] = 7.0
        assert "other values" in looked_at(weights, wrong), start
