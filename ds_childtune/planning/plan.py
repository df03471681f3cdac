"""A plan: plain DeepSpeed beside a child, and what would fit into a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ds_childtune.config import ChildTuningConfig
from ds_childtune.planning.memory import Phase, peak, phases
from ds_childtune.planning.model import ModelOutline
from ds_childtune.planning.run import Run, run_of
from ds_childtune.planning.traffic import checkpoint_bytes, export_bytes, sent_in_fisher, sent_per_step

MOST_RANKS = 1 << 16
_STEPS_OF_P = 1000
"""reserve_p is looked for in steps of 0.001."""


@dataclass(frozen=True)
class Side:
    """Plain DeepSpeed, or the child. Everything in bytes; memory and traffic of the rank that has most."""

    run: Run
    phases: tuple[Phase, ...]
    checkpoint: int
    export: int
    per_step: Mapping[str, int]
    in_fisher: int

    @property
    def peak(self) -> int:
        return max(phase.peak for phase in self.phases)


@dataclass(frozen=True)
class Plan:
    model: ModelOutline
    plain: Side
    child: Side


@dataclass(frozen=True)
class Fit:
    """What fits; None where nothing does."""

    fits: bool
    """What was asked for."""
    largest_p: float | None
    """At this stage and world size."""
    smallest_world_size: int | None
    """Of 1, 2, 4, 8 ..., at this stage and reserve_p."""
    best_stage: int | None
    """The lowest, which sends least, at this world size and reserve_p."""
    plain_smallest_world_size: int | None
    """The same for plain DeepSpeed."""


@dataclass(frozen=True)
class Planned:
    """What is asked: a model, how DeepSpeed is set up, and a child."""

    model: ModelOutline
    config: Mapping[str, Any]
    """The DeepSpeed config."""
    child: ChildTuningConfig
    world_size: int
    lean: bool = False

    def plan(self) -> Plan:
        """Raises ValueError, see `run_of`."""
        return Plan(self.model, _side(self.model, self._plain()), _side(self.model, self._run()))

    def fit(self, budget: int) -> Fit:
        """
        Args:
            budget: bytes of a device, without what activations take.
        """

        def fits(planned: Planned) -> bool:
            return peak(planned.model, planned._run()) <= budget

        def plain_fits(planned: Planned) -> bool:
            return peak(planned.model, planned._plain()) <= budget

        stages = [stage for stage in range(4) if fits(self._at(stage=stage))]
        return Fit(
            fits(self),
            self._largest_p(fits),
            self._smallest_world_size(fits),
            stages[0] if stages else None,
            self._smallest_world_size(plain_fits),
        )

    def _run(self) -> Run:
        return run_of(self.config, self.child, self.world_size, lean=self.lean)

    def _plain(self) -> Run:
        return run_of(self.config, None, self.world_size)

    def _at(self, *, stage: int | None = None, p: float | None = None, world_size: int | None = None) -> Planned:
        config = self.config
        if stage is not None:
            config = {**config, "zero_optimization": {**config.get("zero_optimization", {}), "stage": stage}}
        child = self.child if p is None else self.child.model_copy(update={"reserve_p": p})
        model = replace(self.model, config=child)
        return Planned(model, config, child, world_size or self.world_size, self.lean)

    def _largest_p(self, fits: Callable[[Planned], bool]) -> float | None:
        """Memory grows with p, so the interval is halved until it is one step."""
        low, high = 0, _STEPS_OF_P
        if fits(self._at(p=1.0)):
            return 1.0
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(self._at(p=middle / _STEPS_OF_P)) else (low, middle)
        return low / _STEPS_OF_P if low else None

    def _smallest_world_size(self, fits: Callable[[Planned], bool]) -> int | None:
        ranks = 1
        while ranks <= MOST_RANKS:
            if fits(self._at(world_size=ranks)):
                return ranks
            ranks *= 2
        return None


def _side(model: ModelOutline, run: Run) -> Side:
    return Side(
        run,
        phases(model, run),
        checkpoint_bytes(model, run),
        export_bytes(model, run),
        sent_per_step(model, run),
        sent_in_fisher(model, run),
    )
