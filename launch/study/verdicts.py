"""Which claims of the second study (docs/evidence_2.md) its results refute, computed as the protocol says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from curves import FULL, Row, Runs, at_level, bytes_of, level_of, lora_at
from report import paired_t

CONTROL, CONTRAST = "full x 0.2", "contrast p=.05"
D, D_LARGE = "ChildTuning-D p=.05", "ChildTuning-D p=.1"
LORA, LORA_LARGE = "LoRA r=16", "LoRA r=64"
CONTRASTS = ((CONTRAST, FULL), (D, FULL), (CONTRAST, D), (D, LORA))
"""One - other, fixed before the runs."""
FEWEST = 3
"""Seeds without which nothing is decided."""


def p_value(differences: Sequence[float]) -> float:
    """Of a paired t test, two-sided."""
    from scipy import stats

    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p values, in the order given."""
    order = np.argsort(p)
    adjusted, largest = [0.0] * len(p), 0.0
    for i, at in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - i) * p[at]))
        adjusted[at] = largest
    return adjusted


def contrasts(runs: Runs) -> list[Row]:
    """The contrasts of BBC's NLL at 80 %, with Holm's correction over those that there are."""
    found: list[tuple[str, list[float]]] = []
    for one, other in CONTRASTS:
        pairs = [forgetting(runs, method) for method in (one, other)]
        seeds = sorted(pairs[0].keys() & pairs[1].keys())
        if len(seeds) > 1:
            found.append((f"{one} - {other}", [pairs[0][seed] - pairs[1][seed] for seed in seeds]))
    adjusted = holm([p_value(differences) for _, differences in found])
    rows = [["contrast", "pairs", "difference", "paired t", "p (Holm)"]]
    for (name, differences), p in zip(found, adjusted, strict=True):
        low, high = paired_t(differences)
        rows.append(
            [name, str(len(differences)), f"{np.mean(differences):+.3f}", f"{low:+.3f} .. {high:+.3f}", f"{p:.3f}"]
        )
    return rows


def forgetting(runs: Runs, method: str) -> dict[int, float]:
    """By seed: BBC's NLL where the task's has fallen by 80 % of full fine-tuning's gain; seeds that do not get there are left out."""
    at = {s: at_level(run.curve("bbc"), level_of(runs[FULL][s])) for s, run in runs.get(method, {}).items()}
    return {seed: value for seed, value in at.items() if value is not None}


def against_the_control(runs: Runs) -> list[float]:
    """Contrast - control of BBC's NLL, by seed: at 80 %, or where the control has ended if it does not get there."""
    differences = []
    for seed, control in runs.get(CONTROL, {}).items():
        if seed in runs.get(CONTRAST, {}):
            level = max(level_of(runs[FULL][seed]), control.learnt)
            ours, theirs = (at_level(r.curve("bbc"), level) for r in (runs[CONTRAST][seed], control))
            if ours is not None and theirs is not None:
                differences.append(ours - theirs)
    return differences


def verdicts(runs: Runs) -> list[str]:
    """The protocol's refutations, one line each, with the numbers; undecided below `FEWEST` seeds."""
    lines = []
    large = runs.get(D_LARGE, {})
    gaps = [(run.learnt - runs[FULL][seed].learnt) / runs[FULL][seed].gain for seed, run in large.items()]
    lines.append(
        _verdict("Part 0, gap of D p=.1 to full, of full's gain", gaps, lambda v: float(np.mean(v)) > 0.1, "> .1")
    )
    for method in (D, D_LARGE):
        differences = [
            lora_at(bytes_of(run), runs[LORA][seed], runs[LORA_LARGE][seed]) - run.learnt
            for seed, run in runs.get(method, {}).items()
            if seed in runs.get(LORA, {}) and seed in runs.get(LORA_LARGE, {})
        ]
        lines.append(
            _verdict(
                f"Part 0, LoRA of equal bytes - {method}",
                differences,
                lambda v: paired_t(v)[0] <= 0,
                "interval reaches 0 or below",
            )
        )
    ours, full = forgetting(runs, CONTRAST), forgetting(runs, FULL)
    pairs = [ours[seed] - full[seed] for seed in sorted(ours.keys() & full.keys())]
    rule = "less than .02 below, or not significant after Holm"
    lines.append(
        _verdict("Part A, contrast - full", pairs, lambda v: float(np.mean(v)) > -0.02 or _holm_of(runs) >= 0.05, rule)
    )
    matched = against_the_control(runs)
    lines.append(
        _verdict("Part A, contrast - low rate", matched, lambda v: paired_t(v)[1] >= 0, "interval reaches 0 or above")
    )
    return lines


def _holm_of(runs: Runs) -> float:
    """The adjusted p of contrast - full."""
    rows = contrasts(runs)[1:]
    return next((float(row[-1]) for row in rows if row[0] == f"{CONTRAST} - {FULL}"), 1.0)


def _verdict(what: str, values: list[float], refuted: Callable[[list[float]], bool], rule: str) -> str:
    shown = ", ".join(f"{value:+.3f}" for value in values) or "no seed"
    if len(values) < FEWEST:
        return f"{what}: {shown}. Undecided: {len(values)} of at least {FEWEST} seeds."
    said = "REFUTED" if refuted(values) else "not refuted"
    return f"{what}: {shown}. Refuted if {rule}: {said}."
