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
    frozen: bool = False
    """Not eligible, and with `others: "frozen"` outside the child."""

    @property
    def trained(self) -> int:
        """Elements that train: those kept, or all of a dense parameter."""
        if self.eligible:
            return self.kept
        return 0 if self.frozen else self.numel

    @property
    def density(self) -> float:
        """Share of the elements that train: of eligible ones those kept; 1 for a dense parameter."""
        return self.trained / self.numel if self.numel else 1.0


@dataclass(frozen=True)
class Report:
    """The child, per parameter and in total. `str()` gives a few readable lines."""

    mode: str
    reserve_p: float
    parameters: tuple[ParameterReport, ...]
    model_numel: int = 0
    """Elements of the whole model, those that the optimizer does not step included."""
    fisher_seconds: float = 0.0
    """Wall time of the calibration pass."""
    selection_seconds: float = 0.0
    """Wall time of the threshold and the masks."""
    calibration_batches: int = 0
    """Micro-batches, or global batches, that Fisher information was averaged over."""
    threshold: float | None = None
    """ChildTuning-D: the k-th largest score; None with selector `lowest_fisher`, and for a child of `masks` or `child`."""
    zero_parameters: tuple[str, ...] = ()
    """Eligible parameters that had no score but zero when the child was chosen, so that nothing is known of their elements."""
    zero_kept: int = 0
    """Elements of the child whose score was zero: fewer had a positive one than `reserve_p` asks for. Which of all elements of
    score zero are kept is a matter of the parameters' names and of their order."""
    experts: int = 0
    """Experts whose parameters are eligible, when the child was chosen by Fisher information."""
    unreached_experts: tuple[str, ...] = ()
    """Paths of those that no calibration token reached; `path[i]` is expert `i` of fused parameters."""

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

    @property
    def trained(self) -> int:
        """Elements of the model that train."""
        return sum(p.trained for p in self.parameters)

    @property
    def trained_share(self) -> float:
        """Share of the whole model that trains."""
        return self.trained / self.model_numel if self.model_numel else 1.0

    def numbers(self) -> dict[str, float]:
        """What is logged of a child that was just chosen."""
        return {
            "child_density": self.density,
            "child_trained_share": self.trained_share,
            "child_fisher_seconds": round(self.fisher_seconds, 3),
            "child_selection_seconds": round(self.selection_seconds, 3),
        }

    def __str__(self) -> str:
        masked = [p for p in self.parameters if p.eligible]
        lines = [
            f"{self.mode}: kept {self.kept:,} of {self.eligible:,} eligible elements (density {self.density:.4f},"
            f" reserve_p {self.reserve_p}) in {len(masked)} parameters; {self.numel - self.eligible:,} elements in"
            f" {len(self.parameters) - len(masked)} parameters {'are frozen' if self._others_are_frozen else 'train dense'}"
        ]
        lines += self._shares()
        if masked:
            low, high = min(masked, key=lambda p: p.density), max(masked, key=lambda p: p.density)
            lines.append(f"  density from {low.density:.4f} ({low.name}) to {high.density:.4f} ({high.name})")
        if self.calibration_batches:
            lines.append(
                f"  Fisher over {self.calibration_batches} batches in {self.fisher_seconds:.1f} s;"
                f" selection in {self.selection_seconds:.2f} s"
                + (f", threshold {self.threshold:.3e}" if self.threshold is not None else "")
            )
        lines += self._warnings()
        return "\n".join(lines)

    @property
    def _others_are_frozen(self) -> bool:
        return any(p.frozen for p in self.parameters)

    def _shares(self) -> list[str]:
        """What trains of the whole model, and what takes most of it: dense embeddings may be far more than the child."""
        if not self.model_numel:
            return []
        largest = sorted((p for p in self.parameters if p.trained), key=lambda p: p.trained, reverse=True)[:3]
        most = ", ".join(f"{p.name} {p.trained:,}{'' if p.eligible else ' dense'}" for p in largest)
        return [
            f"  {self.trained:,} of the model's {self.model_numel:,} elements train ({100 * self.trained_share:.2f} %); most in {most}"
        ]

    def _warnings(self) -> list[str]:
        lines = []
        missed = self.unreached_experts
        if missed:
            lines.append(
                f"  WARNING: no calibration token reached {len(missed)} of {self.experts} experts ({', '.join(missed[:3])}"
                f"{', ...' if len(missed) > 3 else ''}): their scores are zero. Remedy: calibrate with more batches; to refuse such a"
                ' selection, set child_tuning.fisher.unreached "error".'
            )
        of_missed = tuple(f"{path}." for path in missed)
        names = [n for n in self.zero_parameters if not n.startswith(of_missed)]
        if names:
            lines.append(
                f"  WARNING: every score is zero in {len(names)} eligible parameters ({', '.join(names[:3])}"
                f"{', ...' if len(names) > 3 else ''}), as for LoRA's A while B is zero: nothing is known of their elements."
                " Remedy: attach and select after a few training steps, with a Trainer ChildTuningCallback(select_at=10), or add them"
                " to child_tuning.exclude."
            )
        if self.zero_kept:
            most = (self.kept - self.zero_kept) / self.eligible
            lines.append(
                f"  WARNING: {self.zero_kept:,} of the child's {self.kept:,} elements have score zero, and were taken in the order of"
                " their names and indices. Remedy: attach and select after a few training steps, add parameters without a score"
                f" to child_tuning.exclude, or lower child_tuning.reserve_p to at most {most:.4f}."
            )
        return lines
