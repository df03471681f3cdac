"""What a checkpoint carries of a child, and what a ChildTuner becomes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from ds_childtune.attachment import Policy
from ds_childtune.checkpoint.run_record import Progress


@dataclass(frozen=True)
class ChildState:
    """What a ChildTuner is at the moment."""

    progress: Progress
    policy: Policy | None
    """None: a ChildTuning-D child that is not chosen yet."""


@dataclass(frozen=True)
class Resumed:
    """What a ChildTuner is to become."""

    progress: Progress
    masks: Iterable[Tensor] | None
    """bool 1-D, one for each flat shard, True = inside the child or not eligible; None: nothing was chosen, or ChildTuning-F."""

    another_follows: bool = False
    """Without masks: those of a compact child come next, so that nothing needs to become dense in between."""


ReadState = Callable[[], ChildState]


Resume = Callable[[Resumed], Policy | None]
"""Give the ChildTuner another state; returns its policy, a compact one with the flat shards' weights and no moments."""
