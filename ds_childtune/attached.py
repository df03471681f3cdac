"""What is known once a child is attached, and what of it a checkpoint carries."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ds_childtune import _zero
from ds_childtune.compact_child import CompactChild
from ds_childtune.config import ChildTuningConfig
from ds_childtune.optimizer_trial import Behaviour
from ds_childtune.policies import DenseChild, TaskFreeChild
from ds_childtune.run_record import Progress
from ds_childtune.shards import FlatShard

Policy = TaskFreeChild | DenseChild | CompactChild


@dataclass(frozen=True)
class Attached:
    """An engine, and what its child is made of. Nothing of it changes until `detach`."""

    engine: Any
    config: ChildTuningConfig
    parameters: _zero.Parameters
    eligible: frozenset[str]
    """Names of the parameters that the child is chosen from."""
    shards: tuple[FlatShard, ...]
    """Of this rank, with DeepSpeed's own flat shards as tensors."""
    behaviour: Behaviour
    """Of the base optimizer; with ChildTuning-F it is not tried."""

    @property
    def precision(self) -> str:
        """The forward pass's dtype, as in `torch.<precision>`."""
        return str(_zero.model_dtype(self.engine)).removeprefix("torch.")

    def stored_names(self, *, chosen: bool) -> frozenset[str]:
        """Parameters that a checkpoint of this child has pieces of."""
        if self.config.mode == "ChildTuning-F" or not chosen:
            return frozenset()
        if self.config.optimizer_state == "compact":
            return frozenset(self.parameters.by_name)
        return self.eligible


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
