"""What is known of an engine once a child is attached to it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ds_childtune.child.optimizer_trial import Behaviour
from ds_childtune.config import ChildTuningConfig
from ds_childtune.ranks import check_same, raising_together
from ds_childtune.shards import FlatShard, mark_eligible
from ds_childtune.zero.engine import model_dtype
from ds_childtune.zero.flat_shards import Parameters


@dataclass(frozen=True)
class Attachment:
    """An engine, and what its child is made of. Nothing of it changes until `detach`."""

    engine: Any
    config: ChildTuningConfig
    parameters: Parameters
    candidates: frozenset[str]
    """Names of the parameters that the child is chosen from."""
    eligible: frozenset[str]
    """Names of the parameters that have a mask: `candidates`, and with `others: "frozen"` all, of which the rest is outside."""
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

    # ---------------------------------------------------------------- frozen parameters

    def trainable(self) -> frozenset[str]:
        """Candidates that are not frozen at the moment. A child is chosen from these; the others are outside it."""
        return frozenset(name for name in self.candidates if self.parameters.by_name[name].requires_grad)

    def trainable_shards(self) -> tuple[FlatShard, ...]:
        """`shards`, in which only `trainable` parameters are eligible."""
        return mark_eligible(self.shards, self.trainable())

    def without_frozen(self, masks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Masks of `shards` (bool 1-D, one for each), with frozen eligible parameters outside. Changes them in place."""
        frozen = self.eligible - self.trainable()
        for shard, mask in zip(self.shards, masks, strict=True):
            for fragment in shard.eligible:
                if fragment.name in frozen:
                    fragment.of(mask).fill_(False)
            yield mask

    # ---------------------------------------------------------------- names

    def first_name(self, name: str) -> str:
        """The name that a tied parameter is known by. A collective: one rank's slip must not leave the others in a sum.

        Raises:
            ValueError: on every rank, for a name that the model does not have.
        """
        aliases = self.parameters.aliases
        with raising_together():
            if name not in aliases:
                close = difflib.get_close_matches(name, aliases, n=3, cutoff=0)
                raise ValueError(
                    f"expected the name of a parameter, got {name!r}. Remedy: use for example {', '.join(close)}."
                )
            first = aliases[name]
        check_same(first, "the parameter's name")
        return first

    def eligible_name(self, name: str) -> str:
        """`first_name` of an eligible parameter. A collective. Raises ValueError for another one."""
        first = self.first_name(name)
        if first not in self.candidates:
            raise ValueError(
                f"expected an eligible parameter, got {name!r}, which trains in full or not at all. Remedy: use for example"
                f" {min(self.candidates)}."
            )
        return first

    def __str__(self) -> str:
        """What is eligible, in one line."""
        others = [name for name in self.parameters.by_name if name not in self.candidates]
        train = "are frozen" if self.config.others == "frozen" else "train dense"
        names = sorted(self.candidates)
        return (
            f"{self.config.mode} attached, reserve_p {self.config.reserve_p}: {self._numel(names):,} elements in"
            f" {len(names)} parameters are eligible ({names[0]} .. {names[-1]}); {len(others)} parameters {train}"
            f"{_some(others)}{self._outside_the_optimizer()}"
        )

    def _outside_the_optimizer(self) -> str:
        names = self.parameters.not_held
        if not names:
            return ""
        return (
            f"; {len(names)} trainable parameters of {self._numel(names):,} elements are not in the optimizer, so they do not"
            f" train{_some(names)}"
        )

    def _numel(self, names: Iterable[str]) -> int:
        return sum(self.parameters.shapes[name].numel() for name in names)


def _some(names: Iterable[str]) -> str:
    """(a, b, ...), or nothing."""
    first = list(names)
    return f" ({', '.join(first[:4])}{', ...' if len(first) > 4 else ''})" if first else ""
