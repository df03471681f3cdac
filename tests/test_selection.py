"""The radix select against a full sort, with the tie rule written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_childtune.selection.scores import Scores
from ds_childtune.selection.top_k import BadScores, find_cut, mark_inside

CPU = torch.device("cpu")


def select(fragments: list[Scores], k: int) -> list[torch.Tensor]:
    names = sorted({f.name for f in fragments})
    cut = find_cut(fragments, names, k, lambda _: None, CPU)
    masks = [torch.zeros(f.values.numel(), dtype=torch.bool) for f in fragments]
    for fragment, mask in zip(fragments, masks, strict=True):
        mark_inside(fragment, cut, mask)
    return masks


def expected(fragments: list[Scores], k: int) -> set[tuple[str, int]]:
    """Sort every element by (score down, name, index) and take the first k."""
    elements = [(-float(v), f.name, f.param_start + i) for f in fragments for i, v in enumerate(f.values.tolist())]
    return {(name, index) for _, name, index in sorted(elements)[:k]}


scores = st.sampled_from([0.0, 1e-45, 1e-30, 0.25, 0.5, 0.75, 2.0**127]) | st.floats(0, 2.0**99, width=32)


@st.composite
def fragments_and_k(draw: st.DrawFn) -> tuple[list[Scores], int]:
    """Fragments of a few parameters, cut at random places, in random order; some are empty."""
    fragments = []
    total = 0
    for name in draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=4, unique=True)):
        start = draw(st.integers(0, 3)) * (1 << 21)
        for _ in range(draw(st.integers(1, 3))):
            values = draw(st.lists(scores, max_size=12))
            fragments.append(Scores(name, start, torch.tensor(values, dtype=torch.float32)))
            start += len(values)
            total += len(values)
    if not total:
        fragments.append(Scores("a", 1 << 30, torch.zeros(1)))
        total = 1
    return draw(st.permutations(fragments)), draw(st.integers(1, total))


@given(fragments_and_k())
@settings(max_examples=300, deadline=None)
def test_exactly_k_largest_with_ties_by_name_and_index(case: tuple[list[Scores], int]) -> None:
    fragments, k = case
    masks = select(fragments, k)
    chosen = {
        (f.name, f.param_start + i)
        for f, mask in zip(fragments, masks, strict=True)
        for i in mask.nonzero().view(-1).tolist()
    }
    assert len(chosen) == k
    assert chosen == expected(fragments, k)


def test_ties_across_tiles_and_uncounted_replicas() -> None:
    """All scores equal and more than a tile long; a replica is marked but not counted."""
    values = torch.zeros((1 << 20) + 7)
    replica = Scores("a", 0, values, counted=False)
    masks = select([Scores("a", 0, values), replica], (1 << 20) + 3)
    assert int(masks[0].sum()) == (1 << 20) + 3
    assert torch.equal(masks[0], masks[1])
    assert not masks[0][-4:].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_bad_scores_are_named(bad: float) -> None:
    with pytest.raises(BadScores) as caught:
        select([Scores("good", 0, torch.ones(3)), Scores("bad", 0, torch.tensor([1.0, bad]))], 1)
    assert caught.value.names == ["bad"]


@given(st.lists(scores, min_size=2, max_size=20))
def test_reverse_order_is_exact(values: list[float]) -> None:
    before = torch.tensor(values, dtype=torch.float32)
    after = before.clone()
    Scores("a", 0, after).reverse_order()
    assert bool(torch.isfinite(after).all())
    assert bool((after >= 0).all())
    assert torch.equal(before[:, None] < before[None, :], after[:, None] > after[None, :])
