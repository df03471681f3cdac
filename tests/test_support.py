"""What the tests themselves rest on."""

from __future__ import annotations

import torch

from tests.support.alive import Alive


def test_what_is_alive_is_counted() -> None:
    with Alive() as alive:
        kept = torch.zeros(1000)
        for _ in range(3):
            torch.zeros(500).add_(1)
        kept[:10].add_(1)
    assert alive.peak == 4 * 1500
