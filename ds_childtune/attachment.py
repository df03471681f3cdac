"""What is known once a child is attached, and what of it a checkpoint carries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ds_childtune.child.compact import CompactChild
from ds_childtune.child.dense import DenseChild
from ds_childtune.child.optimizer_trial import Behaviour
from ds_childtune.child.task_free import TaskFreeChild
from ds_childtune.config import ChildTuningConfig
from ds_childtune.shards import FlatShard
from ds_childtune.zero.engine import model_dtype
from ds_childtune.zero.flat_shards import Parameters

Policy = TaskFreeChild | DenseChild | CompactChild


@dataclass(frozen=True)
class Attached:
    """An engine, and what its child is made of. Nothing of it changes until `detach`."""

    engine: Any
    config: ChildTuningConfig
    parameters: Parameters
    eligible: frozenset[str]
    """Names of the parameters that the child is chosen from."""
    shards: tuple[FlatShard, ...]
    """Of this rank, with DeepSpeed's own flat shards as tensors."""
    behaviour: Behaviour
    """Of the base optimizer; with ChildTuning-F it is not tried."""

    @property
    def precision(self) -> str:
        """The forward pass's dtype, as in `torch.<precision>`."""
        return str(model_dtype(self.engine)).removeprefix("torch.")

    def stored_names(self, *, chosen: bool) -> frozenset[str]:
        """Parameters that a checkpoint of this child has pieces of."""
        if self.config.mode == "ChildTuning-F" or not chosen:
            return frozenset()
        if self.config.optimizer_state == "compact":
            return frozenset(self.parameters.by_name)
        return self.eligible
