"""What a checkpoint reads of the child that trains, and how it puts another one in its place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

from ds_childtune.checkpoint.run_record import Progress
from ds_childtune.child.network import ChildNetwork


class Hooks(Protocol):
    """`StepHooks`, as checkpoints use it."""

    progress: Progress
    child: ChildNetwork | None
    """None: a ChildTuning-D child that is not chosen yet."""

    half_loaded: str | None
    """The checkpoint whose load has begun and not ended: nothing trains with a mixture."""

    @property
    def none_in_place(self) -> bool:
        """Whether no child, and no half of one, is where DeepSpeed looks."""

    def check_loaded(self) -> None:
        """Raise RuntimeError after a load that has not ended."""

    def forget(self, *, another_follows: bool = False) -> None:
        """Be as after `attach`. `another_follows`: a compact child is loaded next, so nothing becomes dense in between."""

    def adopt(self, progress: Progress) -> None:
        """Go on from this count of steps."""

    def fix(self, masks: Iterable[Tensor]) -> None:
        """Train the child of these masks (bool 1-D, one for each flat shard). A collective."""
