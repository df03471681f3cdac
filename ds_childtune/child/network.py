"""What every way of training a child network answers: ChildTuning-F, and ChildTuning-D with dense or compact state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ds_childtune.child.child_shard import ChildShard
from ds_childtune.shards import FlatShard, Fragment

Group = dict[str, Any]
"""One of a torch optimizer's `param_groups`."""


@dataclass(frozen=True)
class Stepped:
    """A param group, and the flat shards of it that the base optimizer is about to step."""

    group: Group
    shards: Sequence[FlatShard]


class ChildNetwork(Protocol):
    """A child on this rank's flat shards. Masks are bool, True = trained."""

    @property
    def fixed(self) -> bool:
        """Whether it was chosen once (ChildTuning-D), so that nothing outside it moves and a checkpoint has its mask."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The base optimizer, whose state has an entry for each child shard, or for each flat shard."""

    @property
    def shards(self) -> Mapping[Tensor, ChildShard]:
        """With compact state, the child shard of each flat shard, by the latter's tensor; else empty."""

    @property
    def norm_is_child(self) -> bool:
        """Whether DeepSpeed sees no gradient except the child's."""

    @property
    def flat_gradients(self) -> bool:
        """Whether flat shards have the whole gradient when the base optimizer is about to step."""

    def recover(self) -> None:
        """Undo what a step that an exception ended has left behind. Called before each step."""

    def before_step(self, optimizer: torch.optim.Optimizer, stepped: Sequence[Stepped], step: int) -> None:
        """The base optimizer is about to step. `step`: applied steps so far."""

    def after_step(self) -> None:
        """It has stepped."""

    def child_mask(self, shard: FlatShard, fragment: Fragment, step: int) -> Tensor:
        """bool [fragment.numel] of an eligible fragment; for ChildTuning-F in the applied step `step`."""

    def share_counters(self) -> None:
        """Make the base optimizer's state one that can be taken apart: see [Note: one counter for a group]."""

    def release(self) -> None:
        """Give DeepSpeed back what it had, dense. The child must not be used any more."""

    def discard(self) -> None:
        """Like `release`, where another child is loaded in its place: nothing becomes dense."""

    def restore_dense(self) -> None:
        """After `discard`, where no other child was loaded after all: what `release` would have given back."""


class FixedChild(ChildNetwork, Protocol):
    """ChildTuning-D."""

    def take_over(self) -> None:
        """Train from here on. Until then nothing has changed."""

    def inside_at(self, shard: FlatShard, index: Tensor) -> Tensor:
        """bool: whether each element at `index` (int64 1-D) of the flat shard may move: of the child, or padding."""

    def weights_at(self, shard: FlatShard, index: Tensor) -> Tensor:
        """The weights at `index` of the flat shard, in the dtype that the base optimizer steps."""

    def gradient_at(self, shard: FlatShard, index: Tensor) -> Tensor | None:
        """The gradient that the base optimizer is handed at `index` of the flat shard; None when it has none."""

    def mask_gradient_(self, shard: FlatShard, gradient: Tensor, start: int) -> None:
        """Zero in place what is outside the child; `gradient` is 1-D and lies at `start` of the flat shard."""
