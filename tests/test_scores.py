"""Scores in two bytes: order, range, and sums that are right in expectation."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_childtune.selection.fisher import FisherAccumulator
from ds_childtune.selection.scores import TILE, Scores, new_scores
from ds_childtune.shards import FlatShard, Fragment

CPU = torch.device("cpu")

finite = st.floats(0, allow_nan=False, allow_infinity=False, width=32)


def code_of(value: float) -> int:
    """The upper 16 of fp32's lower 31 bits, as a signed integer: written with `struct`, not torch."""
    bits = struct.unpack("<I", struct.pack("<f", value))[0] >> 15
    return bits - (1 << 16) if bits >= 1 << 15 else bits


def scores_of(values: list[float]) -> Scores:
    return Scores("a", 0, torch.tensor([code_of(v) for v in values], dtype=torch.int16))


@given(st.lists(finite, min_size=1, max_size=30))
def test_a_code_is_within_one_part_in_256_below_its_number(values: list[float]) -> None:
    decoded = scores_of(values).float()
    exact = torch.tensor(values)
    assert bool((decoded <= exact).all())
    normal = exact >= 2.0**-126
    assert bool((decoded >= exact * (1 - 2.0**-8))[normal].all())


@given(st.lists(finite, min_size=2, max_size=30))
def test_codes_order_like_their_numbers_and_reverse(values: list[float]) -> None:
    scores = scores_of(values)
    before = torch.cat(list(scores.bit_tiles()))
    assert torch.equal(before, scores.float().view(torch.int32))
    scores.reverse_order()
    after = torch.cat(list(scores.bit_tiles()))
    assert bool((after >= 0).all())
    assert torch.equal(before[:, None] < before[None, :], after[:, None] > after[None, :])


def accumulated(dtype: str, terms: int, start: int = 0, numel: int = 4000, *, square: bool = False) -> torch.Tensor:
    """The sum of `terms` gradients, each element's being constant: its index plus one."""
    gradient = torch.arange(start + 1, start + numel + 1, dtype=torch.float32)
    shard = FlatShard(torch.zeros(numel), (Fragment("a", start, 0, numel),))
    accumulator = FisherAccumulator([shard], square=square, dtype=dtype)  # type: ignore[arg-type]
    for _ in range(terms):
        accumulator.next_term()
        accumulator.add("a", start, gradient)
    return accumulator.sums[0][0].float()


@pytest.mark.parametrize("square", [False, True])
def test_a_long_sum_is_right_in_expectation(square: bool) -> None:
    """2,000 terms, of which none but the first few hundred would move a sum that is rounded to nearest."""
    terms = 2000
    ratio = accumulated("e8m8", terms, square=square).double() / accumulated("fp32", terms, square=square).double()
    assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / ratio.numel() ** 0.5
    assert 0 < float(ratio.std()) < 0.06
    nearest = torch.tensor(0.0)
    for _ in range(terms):
        nearest = torch.round(torch.ldexp(nearest + 1, torch.tensor(8) - torch.frexp(nearest + 1)[1])) * torch.ldexp(
            torch.tensor(1.0), torch.frexp(nearest + 1)[1] - 8
        )
    assert float(nearest) < 0.5 * terms, "vacuous: rounding to nearest does as well"


def test_rounding_does_not_depend_on_how_a_parameter_is_cut() -> None:
    whole = accumulated("e8m8", 50, 0, 1000)
    parts = torch.cat([accumulated("e8m8", 50, 0, 301), accumulated("e8m8", 50, 301, 699)])
    assert torch.equal(whole, parts)


def test_tiles_infinity_and_nan() -> None:
    numel = TILE + 3
    gradient = torch.full((numel,), 3.0)
    gradient[:3] = torch.tensor([float("inf"), float("nan"), 0.0])
    shard = FlatShard(torch.zeros(numel), (Fragment("a", 7, 0, numel),))
    accumulator = FisherAccumulator([shard], square=False, dtype="e8m8")
    for _ in range(3):
        accumulator.next_term()
        accumulator.add("a", 7, gradient)
    found = accumulator.sums[0][0].float()
    assert float(found[0]) == float("inf")
    assert bool(torch.isnan(found[1]))
    assert float(found[2]) == 0
    assert bool(((found[3:] - 9).abs() < 0.1).all())
    assert new_scores(5, "e8m8", CPU).element_size() == 2
