"""Errors of the config block name the key, the value and the remedy."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from ds_childtune.config import ChildTuningConfig, parse_config
from ds_childtune.selection.eligible import eligible_names

GOOD: dict[str, Any] = {"mode": "ChildTuning-D", "reserve_p": 0.2}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"reserve_p": 1.5}, ["child_tuning.reserve_p", "1.5", "(0, 1]"]),
        ({"reserve_p": 0}, ["child_tuning.reserve_p", "0"]),
        ({"reserve_p": "0.2"}, ["child_tuning.reserve_p", "'0.2'"]),
        ({"mode": "childtuning-d"}, ["child_tuning.mode", "childtuning-d", "ChildTuning-D"]),
        ({"reserv_p": 0.2}, ["child_tuning.reserv_p", "unknown key", "reserve_p"]),
        ({"fisher": {"max_batch": 3}}, ["child_tuning.fisher.max_batch", "unknown key", "max_batches"]),
        ({"fisher": {"max_batches": 0}}, ["child_tuning.fisher.max_batches", "0"]),
        ({"include": []}, ["include", "empty"]),
        ({"mode": "ChildTuning-F", "compat": "original"}, ["compat", "no effect"]),
        ({"mode": "ChildTuning-F", "clip": "child"}, ["clip", "no effect"]),
        ({"mode": "ChildTuning-F", "sends": "whole"}, ["sends", "no effect"]),
        ({"sends": "whole"}, ["sends", "no effect", 'use "compact"']),
        ({"sends": "nothing", "optimizer_state": "compact"}, ["sends", "nothing"]),
        ({"clip": "whole"}, ["child_tuning.clip", "whole", "dense"]),
    ],
)
def test_errors_name_key_value_and_remedy(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match="child_tuning") as caught:
        parse_config({**GOOD, **change})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("block", [None, 3, {"mode": "ChildTuning-D"}])
def test_missing_block_or_key(block: object) -> None:
    with pytest.raises(ValueError, match="Remedy"):
        parse_config(block)


def test_a_good_block() -> None:
    config = parse_config({**GOOD, "include": ["a.*"]})
    assert config.include == ("a.*",)
    assert parse_config(config) is config


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 2)
        self.blocks = nn.ModuleList([nn.Linear(2, 2) for _ in range(2)])
        self.mixed = nn.ModuleList([nn.Linear(2, 2), nn.LayerNorm(2)])


NAMES = tuple(name for name, _ in Model().named_parameters())


def names(**change: Any) -> set[str]:
    return set(eligible_names(Model(), NAMES, ChildTuningConfig(**{**GOOD, **change})))


def test_defaults_and_patterns() -> None:
    blocks = {"blocks.0.weight", "blocks.0.bias", "blocks.1.weight", "blocks.1.bias"}
    assert names() == blocks
    assert names(mode="ChildTuning-F") == set(NAMES)
    assert names(exclude=("*.bias",)) == {"blocks.0.weight", "blocks.1.weight"}
    assert names(include=("embed.*",)) == {"embed.weight"}


@pytest.mark.parametrize("change", [{"include": ("nope.*",)}, {"exclude": ("nope.*",)}, {"exclude": ("*",)}])
def test_patterns_that_leave_nothing(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Remedy"):
        names(**change)
