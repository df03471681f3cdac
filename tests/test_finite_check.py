"""`finite_check_every`: NaN outside the child, which compact gradients do not have, ends training in the steps that are looked at."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ds_childtune
from ds_childtune.zero.supported import refuse_finite_check
from tests.support.bits import equal_bits
from tests.support.engines import Setup, Weights, engine_of, model_weights, train_step
from tests.support.ranks import RankPool
from tests.support.resuming import share

SETUP = Setup("llama", bf16=True, accumulation=2)
BLOCK = {"mode": "ChildTuning-D", "reserve_p": 0.3, "optimizer_state": "compact", "selector": "random"}
EVERY = 3

NAME = "model.layers.0.self_attn.q_proj.weight"


def spoilt(
    setup: Setup, every: int | None, bad: dict[int, float], last: int = 4, folder: str | None = None
) -> tuple[str, Weights]:
    """The error of some steps, and the weights. `bad`: what rank 1's gradient is at one element outside the child, by step.

    With a folder, training goes on from a checkpoint of step 2 after an error, with sound gradients.
    """
    torch.manual_seed(0)
    with engine_of(setup) as engine:
        child = ds_childtune.attach(engine, BLOCK | {"finite_check_every": every})
        child.select()
        outside = int((~child.gather_mask(NAME)).flatten().nonzero()[0])
        values = dict(bad)

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            if dist.get_rank() == 1 and (value := values.get(child.step + 1)) is not None:
                gradient = gradient.clone()
                gradient.view(-1)[outside] = value
            return gradient

        def train(first: int) -> None:
            for step in range(first, last + 1):
                train_step(engine, share(setup, step, 2 * setup.accumulation))
                if folder is not None and step == 2:
                    engine.save_checkpoint(folder)

        engine.module.get_parameter(NAME).register_hook(spoil)
        said = ""
        try:
            train(1)
        except RuntimeError as error:
            said = str(error)
        if said and folder is not None:
            values.clear()
            engine.load_checkpoint(folder)
            train(3)
        return said, model_weights(engine)


@pytest.mark.parametrize("stage", [2, 3])
def test_nan_outside_the_child(pool: RankPool, stage: int) -> None:
    setup = replace(SETUP, stage=stage)
    end, two_steps = (pool[2].run(spoilt, setup, None, {}, last) for last in (4, 2))
    # The third step is looked at, and not the others.
    for bad, every, found in (
        ({3: float("nan")}, EVERY, True),
        ({3: float("-inf")}, EVERY, True),
        ({1: float("nan"), 2: float("inf"), 4: float("nan")}, EVERY, False),
        ({3: float("nan")}, None, False),
    ):
        expected = two_steps if found else end
        for (_, weights), (error, got) in zip(expected, pool[2].run(spoilt, setup, every, bad), strict=True):
            assert equal_bits(weights, got)
            assert (f"in step 3, got NaN or inf in those of 1 parameters ({NAME})" in error) == found, bad
            assert found or not error


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_going_on_from_the_last_checkpoint(pool: RankPool, stage: int, tmp_path: Path) -> None:
    """In the same engine, which the error left as it was. (With accumulation DeepSpeed has lost count of micro-batches.)"""
    setup = replace(SETUP, stage=stage, accumulation=1)
    end = pool[2].run(spoilt, setup, None, {})
    for (_, expected), (said, got) in zip(
        end, pool[2].run(spoilt, setup, EVERY, {3: float("nan")}, folder=str(tmp_path)), strict=True
    ):
        assert "start again from the last checkpoint" in said
        assert equal_bits(expected, got)


def test_the_remedy_is_to_remove_the_key_with_fp16() -> None:
    engine: Any = SimpleNamespace(get_data_types=lambda: (torch.float16, torch.float32))
    with pytest.raises(NotImplementedError, match="remove child_tuning"):
        refuse_finite_check(engine)
    engine.get_data_types = lambda: (torch.bfloat16, torch.float32)
    refuse_finite_check(engine)
