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
    """The contrasts of BBC's NLL at 80 %, with Holm's correction over all four, those without two pairs included."""
    adjusted = adjusted_p(runs)
    rows = [["contrast", "pairs", "difference", "paired t", "p (Holm)"]]
    for (one, other), differences in _paired(runs).items():
        low, high = paired_t(differences)
        pairs, p = str(len(differences)), adjusted[one, other]
        rows.append(
            [f"{one} - {other}", pairs, f"{np.mean(differences):+.3f}", f"{low:+.3f} .. {high:+.3f}", f"{p:.3f}"]
        )
    return rows


def adjusted_p(runs: Runs) -> dict[tuple[str, str], float]:
    """Holm's p of each contrast that has two pairs."""
    paired = _paired(runs)
    missing = [1.0] * (len(CONTRASTS) - len(paired))
    return dict(zip(paired, holm([*map(p_value, paired.values()), *missing]), strict=False))


def secondary(runs: Runs) -> list[Row]:
    """The same contrasts of the protocol's other figures, which decide nothing: difference and uncorrected interval."""
    figures = {"Brown NLL": ("brown", "loss"), "answers' NLL": ("answers", "loss"), "answers' KL": ("answers", "kl")}
    by_figure = [_paired(runs, *figure) for figure in figures.values()]
    rows = [["contrast", "pairs", *figures]]
    for one, other in by_figure[0]:
        differences = [paired[one, other] for paired in by_figure]
        rows.append([f"{one} - {other}", str(len(differences[0])), *map(mean_and_interval, differences)])
    return rows


def mean_and_interval(values: Sequence[float]) -> str:
    low, high = paired_t(values)
    return f"{np.mean(values):+.3f} ({low:+.3f} .. {high:+.3f})"


def _paired(runs: Runs, text: str = "bbc", figure: str = "loss") -> dict[tuple[str, str], list[float]]:
    """Of the contrasts that have two pairs: the differences, by seed."""
    found = {}
    for one, other in CONTRASTS:
        of_one, of_other = (forgetting(runs, method, text, figure) for method in (one, other))
        seeds = sorted(of_one.keys() & of_other.keys())
        if len(seeds) > 1:
            found[one, other] = [of_one[seed] - of_other[seed] for seed in seeds]
    return found


def forgetting(runs: Runs, method: str, text: str = "bbc", figure: str = "loss") -> dict[int, float]:
    """By seed: a text's figure where the task's NLL has fallen by 80 % of full fine-tuning's gain; seeds that do not get there are
    left out."""
    at = {s: at_level(run.curve(text, figure), level_of(runs[FULL][s])) for s, run in runs.get(method, {}).items()}
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
    """The protocol's refutations, one line each, with the numbers; undecided below `FEWEST` seeds. A claim has to hold: what cannot be
    compared, as where a run has diverged, refutes it."""
    lines = []
    large = runs.get(D_LARGE, {})
    gaps = [(run.learnt - runs[FULL][seed].learnt) / runs[FULL][seed].gain for seed, run in large.items()]
    lines.append(
        _verdict("Part 0, gap of D p=.1 to full, of full's gain", gaps, lambda v: float(np.mean(v)) <= 0.1, "> .1")
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
                lambda v: paired_t(v)[0] > 0,
                "interval reaches 0 or below",
            )
        )
    ours, full = forgetting(runs, CONTRAST), forgetting(runs, FULL)
    pairs = [ours[seed] - full[seed] for seed in sorted(ours.keys() & full.keys())]
    rule = "less than .02 below, or not significant after Holm"
    p = adjusted_p(runs).get((CONTRAST, FULL), 1.0)
    lines.append(_verdict("Part A, contrast - full", pairs, lambda v: float(np.mean(v)) <= -0.02 and p < 0.05, rule))
    matched = against_the_control(runs)
    lines.append(
        _verdict("Part A, contrast - low rate", matched, lambda v: paired_t(v)[1] < 0, "interval reaches 0 or above")
    )
    return lines


def _verdict(what: str, values: list[float], holds: Callable[[list[float]], bool], rule: str) -> str:
    shown = ", ".join(f"{value:+.3f}" for value in values) or "no seed"
    if len(values) < FEWEST:
        return f"{what}: {shown}. Undecided: {len(values)} of at least {FEWEST} seeds."
    said = "not refuted" if holds(values) else "REFUTED"
    return f"{what}: {shown}; mean {mean_and_interval(values)}. Refuted if {rule}: {said}."
