"""What was chosen, in numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ParameterReport:
    """One parameter that the optimizer steps."""

    name: str
    numel: int
    eligible: int
    """Elements that may be masked: `numel` or 0."""
    kept: int
    """Eligible elements inside the child."""

    @property
    def density(self) -> float:
        """Kept share of the eligible elements; 1 for a dense parameter."""
        return self.kept / self.eligible if self.eligible else 1.0


@dataclass(frozen=True)
class Report:
    """The child, per parameter and in total. `str()` gives a few readable lines."""

    mode: str
    reserve_p: float
    parameters: tuple[ParameterReport, ...]
    fisher_seconds: float = 0.0
    """Wall time of the calibration pass."""
    selection_seconds: float = 0.0
    """Wall time of the threshold and the masks."""
    calibration_batches: int = 0
    """Micro-batches, or global batches, that Fisher information was averaged over."""
    threshold: float | None = None
    """ChildTuning-D: the k-th largest score; None with selector `lowest_fisher`."""

    @property
    def numel(self) -> int:
        """Elements that the optimizer steps."""
        return sum(p.numel for p in self.parameters)

    @property
    def eligible(self) -> int:
        """Elements that may be masked."""
        return sum(p.eligible for p in self.parameters)

    @property
    def kept(self) -> int:
        """Eligible elements inside the child."""
        return sum(p.kept for p in self.parameters)

    @property
    def density(self) -> float:
        """Kept share of the eligible elements."""
        return self.kept / self.eligible if self.eligible else 1.0

    def __str__(self) -> str:
        masked = [p for p in self.parameters if p.eligible]
        lines = [
            f"{self.mode}: kept {self.kept:,} of {self.eligible:,} eligible elements (density {self.density:.4f},"
            f" reserve_p {self.reserve_p}) in {len(masked)} parameters; {self.numel - self.eligible:,} elements in"
            f" {len(self.parameters) - len(masked)} parameters train dense"
        ]
        if masked:
            low, high = min(masked, key=lambda p: p.density), max(masked, key=lambda p: p.density)
            lines.append(f"  density from {low.density:.4f} ({low.name}) to {high.density:.4f} ({high.name})")
        if self.calibration_batches:
            lines.append(
                f"  Fisher over {self.calibration_batches} batches in {self.fisher_seconds:.1f} s;"
                f" selection in {self.selection_seconds:.2f} s"
                + (f", threshold {self.threshold:.3e}" if self.threshold is not None else "")
            )
        return "\n".join(lines)
