"""Equal to the bit."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.support.engines import Weights


def bits_equal(a: Tensor, b: Tensor) -> bool:
    """Unlike `torch.equal`, 0.0 and -0.0 differ."""
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def equal_bits(a: Weights, b: Weights) -> bool:
    """The same parameters, each with the same bits as fp32."""
    return a.keys() == b.keys() and all(bits_equal(a[n].float(), b[n].float()) for n in a)
