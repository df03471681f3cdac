"""Triton's mask kernel beside the eager one."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from ds_childtune.child.generator import MULTIPLIERS, base_keys, keep_limit, step_keys
from ds_childtune.child.mask_kernels import mask_kernel
from ds_childtune.shards import Fragment


def triton_and_eager(dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """One gradient, masked by each: fragments of a few elements, of a block and of several, and padding between them."""
    from ds_childtune.child import mask_triton

    block = mask_triton.BLOCK
    fragments, at = [], 3
    for numel in (1, 7, block, block + 1, 5 * block + 11, 384, 2):
        fragments.append(Fragment(f"w{numel}", 5, at, numel))
        at += numel + numel % 3
    got = torch.randn(at + 4, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    expected = got.clone()
    keys = step_keys(base_keys(fragments, 3, device=device), 7)
    mask_triton.TritonKernel(fragments, device, MULTIPLIERS)(got, keys, KEPT, 1 / 0.4)
    for fragment, key in zip(fragments, keys, strict=True):
        mask_kernel(device.type, dtype, allow_compile=False)(fragment.of(expected), key, KEPT, 1 / 0.4)
    return got, expected


KEPT = keep_limit(0.4)


def check_triton_s_kernel(dtype: str) -> None:
    """On a GPU, or by Triton's interpreter, which must be asked for before Triton is imported."""
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    program = (
        "import torch; from tests.support.triton_masks import triton_and_eager;"
        f"got, expected = triton_and_eager(torch.{dtype}, torch.device('{device}')); assert torch.equal(got, expected)"
    )
    environment = os.environ | ({} if on_gpu else {"TRITON_INTERPRET": "1"})
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
