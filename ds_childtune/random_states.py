"""Random states of one rank, as tensors, so that dropout and shuffling continue after a resume where they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

_DEVICE = "device"


def read_random_states() -> dict[str, Tensor]:
    """The global generators of torch (CPU and this rank's device), numpy and python.

    Returns:
        `torch` and, on an accelerator, `device`: uint8, as torch gives them. `numpy`: int64 [624 + 2], the words of a Mersenne
        twister, its position, and whether a Gaussian is cached; `numpy.gauss`: fp64 [1], that Gaussian. `python`: int64
        [version, 625 words, whether a Gaussian is cached]; `python.gauss`: fp64 [1].
    """
    _, words, position, has_gauss, gauss = _numpy_state()
    version, state, next_gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*words.tolist(), position, has_gauss]),
        "numpy.gauss": torch.tensor([gauss], dtype=torch.float64),
        "python": torch.tensor([version, *state, int(next_gauss is not None)]),
        "python.gauss": torch.tensor([next_gauss or 0.0], dtype=torch.float64),
    }
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        states[_DEVICE] = accelerator.get_rng_state().cpu()
    return states


def write_random_states(states: dict[str, Tensor]) -> None:
    """Put back what `read_random_states` gave; a device's state only on a machine that has such a device.

    Raises:
        ValueError: for what no generator gave.
    """
    try:
        _write(states)
    except (KeyError, IndexError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"random states: expected those of torch, numpy and python, got {type(error).__name__}: {str(error)[:200]}."
            " Remedy: use another checkpoint, or an undamaged copy."
        ) from error


@contextmanager
def kept_random_states() -> Iterator[None]:
    """After the `with` the generators are as they were before it."""
    states = read_random_states()
    try:
        yield
    finally:
        write_random_states(states)


def _write(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["torch"])
    *words, position, has_gauss = states["numpy"].tolist()
    np.random.set_state(
        ("MT19937", np.array(words, dtype=np.uint32), position, has_gauss, states["numpy.gauss"].item())
    )
    version, *state, cached = states["python"].tolist()
    random.setstate((version, tuple(state), states["python.gauss"].item() if cached else None))
    accelerator = get_accelerator()
    if _DEVICE in states and accelerator.device_name() != "cpu":
        accelerator.set_rng_state(states[_DEVICE])


def _numpy_state() -> tuple[Any, ...]:
    """numpy's legacy global generator is a Mersenne twister, always: (name, words, position, has_gauss, gauss)."""
    state = np.random.get_state()
    assert isinstance(state, tuple)
    return state
