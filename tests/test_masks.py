"""The counter-based generator: the two kernels agree bit for bit, and the bits pass statistics."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch

from ds_childtune.child.generator import INDEX_BLOCK, base_keys, bernoulli_mask, keep_limit, step_keys
from ds_childtune.child.mask_kernels import mask_kernel
from ds_childtune.shards import Fragment
from tests.support.triton_masks import check_triton_s_kernel

CPU = torch.device("cpu")
N = 1 << 20


def draw(
    name: str = "w", *, start: int = 0, numel: int = N, seed: int = 0, step: int = 0, p: float = 0.3
) -> torch.Tensor:
    return bernoulli_mask(Fragment(name, start, 0, numel), seed, step, p, device=CPU)


@pytest.mark.parametrize("p", [1e-3, 0.1, 0.3, 0.5, 0.9])
def test_rate(p: float) -> None:
    """Within five standard deviations of the binomial."""
    for name in ("a", "h.0.attn.weight"):
        for step in (0, 1, 1000, 2**31):
            kept = int(draw(name, step=step, p=p).sum())
            assert abs(kept - N * p) < 5 * math.sqrt(N * p * (1 - p))


def test_p_one_keeps_everything() -> None:
    assert bool(draw(p=1.0).all())


@pytest.mark.parametrize(
    "other", [{"step": 1}, {"name": "v"}, {"seed": 1}, {"start": 1}, {"start": 768}, {"start": 1 << 16}]
)
def test_no_correlation(other: dict[str, int | str]) -> None:
    """Between neighbours, rows, steps, parameters and seeds: the agreement of two masks is that of independent ones."""
    p = 0.5
    agree = int((draw(p=p) == draw(p=p, **other)).sum())  # type: ignore[arg-type]
    assert abs(agree - N / 2) < 5 * math.sqrt(N / 4)


def test_runs_and_bytes_are_uniform() -> None:
    """Chi-squared of the patterns of 8 successive elements."""
    pattern = draw(p=0.5).view(-1, 8).long() @ (1 << torch.arange(8))
    counts = torch.bincount(pattern, minlength=256).double()
    chi2 = float(((counts - N / 8 / 256) ** 2 / (N / 8 / 256)).sum())
    assert abs(chi2 - 255) < 5 * math.sqrt(2 * 255)


def test_an_element_s_bit_does_not_depend_on_its_fragment() -> None:
    whole = draw(numel=1000)
    assert torch.equal(whole[123:700], draw(start=123, numel=577))


def test_across_an_index_block() -> None:
    start = INDEX_BLOCK - 50
    both = draw(start=start, numel=100)
    assert torch.equal(both[:50], draw(start=start, numel=50))
    assert torch.equal(both[50:], draw(start=INDEX_BLOCK, numel=50))
    assert not torch.equal(both[50:], draw(start=0, numel=50))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numel", [1, 7, 8192, 12_290, 100_003])
def test_kernels_are_bit_identical_and_match_the_mask(dtype: torch.dtype, numel: int) -> None:
    fragment = Fragment("w", 5, 0, numel)
    key = step_keys(base_keys([fragment], 3, device=CPU), 7)[0]
    grad = torch.randn(numel, generator=torch.Generator().manual_seed(0)).to(dtype)
    fused, eager = grad.clone(), grad.clone()
    mask_kernel("cpu", dtype)(fused, key, keep_limit(0.4), 1 / 0.4)
    mask_kernel("cpu", dtype, allow_compile=False)(eager, key, keep_limit(0.4), 1 / 0.4)
    mask = bernoulli_mask(fragment, 3, 7, 0.4, device=CPU)
    assert torch.equal(fused, eager)
    assert torch.equal(fused, torch.where(mask, grad * (1 / 0.4), 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_kernel_serves_every_size(dtype: torch.dtype) -> None:
    """torch.compile gives up after a few recompilations: no size, place in a shard or reserve_p may cost one."""
    kernel, eager = mask_kernel("cpu", dtype), mask_kernel("cpu", dtype, allow_compile=False)
    key = torch.tensor([[9, 9], [1, 3]], dtype=torch.int32)[1]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for numel in (1, 2, 63, 64, 100, 128, 192, 384, 4096, 4097, 64 * 64, 4096 * 64, 3 * 4096 + 64, 100_003):
            for start in (0, 1, 64):
                for p in (0.1, 0.5, 1.0):
                    got, expected = torch.ones(start + numel, dtype=dtype), torch.ones(start + numel, dtype=dtype)
                    kernel(got[start:], key, keep_limit(p), 1 / p)
                    eager(expected[start:], key, keep_limit(p), 1 / p)
                    assert torch.equal(got, expected)


def test_a_compiler_that_gives_up_in_a_run_is_replaced() -> None:
    kernel = mask_kernel("cpu", torch.float64)
    key = torch.tensor([1, 3], dtype=torch.int32)
    got, expected = torch.ones(8192, dtype=torch.float64), torch.ones(8192, dtype=torch.float64)
    mask_kernel("cpu", torch.float64, allow_compile=False)(expected, key, keep_limit(0.3), 1 / 0.3)
    torch._dynamo.reset()
    with (
        torch._dynamo.config.patch(recompile_limit=0),
        pytest.warns(RuntimeWarning, match="eager kernel"),
    ):
        kernel(got, key, keep_limit(0.3), 1 / 0.3)
    assert torch.equal(got, expected)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, which comes with torch for GPUs")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_triton_s_kernel_is_bit_identical(dtype: str) -> None:
    if dtype == "bfloat16" and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter does not round to bfloat16 as GPUs do")
    check_triton_s_kernel(dtype)
