"""The second study's figures (docs/evidence_2.md): learning for its bytes, and forgetting at equal learning.

All of it is computed from the results' curves, so that a table can be made of any part of the runs. NLL in nats a token.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from grid import Grid, Job, Options, job_of, reported_jobs, tried, tuned_as
from report import comparable, paired_t

SHARE = 0.8
"""Of what full fine-tuning gains: where arms are compared."""
FULL, CONTROL, CONTRAST = "full", "full x 0.2", "contrast p=.05"
D, D_LARGE = "ChildTuning-D p=.05", "ChildTuning-D p=.1"
LORA, LORA_LARGE = "LoRA r=16", "LoRA r=64"
CONTRASTS = ((CONTRAST, FULL), (D, FULL), (CONTRAST, D), (D, LORA))
"""One - other, fixed before the runs."""
FEWEST = 3
"""Seeds without which nothing is decided."""

Point = tuple[float, float]
"""NLL of the task, figure of general text."""
Row = list[str]


@dataclass(frozen=True)
class Run:
    """One reported run."""

    job: Job
    result: Options
    before: Options
    """The same seed's evaluation before training, which is the same for every arm."""

    def curve(self, text: str, figure: str = "loss") -> list[Point]:
        """By steps, from the untrained model on: the task's NLL, and `figure` of one of the other texts."""
        points = [self.before, *(p for p in self.result["curve"] if p["step"])]
        return [(p["metrics"]["loss"], p["also"][text][figure]) for p in points]

    @property
    def learnt(self) -> float:
        """The task's NLL at the end."""
        return float(self.result["metrics"]["loss"])

    @property
    def gain(self) -> float:
        return float(self.before["metrics"]["loss"]) - self.learnt


Runs = dict[str, dict[int, Run]]
"""By method and seed."""


def runs_of(grid: Grid, results: Sequence[Options]) -> Runs:
    """The reported runs of the grid's only task. Seeds whose full fine-tuning is not there yet are left out: it is their measure."""
    (task,) = grid.tasks
    by_job = {job_of(r): r for r in results}
    jobs = [job for job in reported_jobs(grid, task, None, results) if job in by_job]
    full = {job.seed: by_job[job] for job in jobs if job.method == FULL}
    found: Runs = {}
    for job in jobs:
        if job.seed in full and comparable(by_job[job], full[job.seed]):
            found.setdefault(job.method, {})[job.seed] = Run(job, by_job[job], full[job.seed]["curve"][0])
    return found


# ---------------------------------------------------------------- arithmetic


def at_level(points: Sequence[Point], level: float) -> float | None:
    """The general figure where the task's NLL first falls to `level`, on straight lines between evaluations; None if it does not."""
    for (above, one), (below, other) in itertools.pairwise(points):
        if above >= level >= below:
            share = 0.0 if above == below else (above - level) / (above - below)
            return one + share * (other - one)
    return None


def level_of(full: Run, share: float = SHARE) -> float:
    """The task's NLL at which `share` of full fine-tuning's gain is reached."""
    return float(full.before["metrics"]["loss"]) - share * full.gain


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


def state_bytes(result: Options, peft: bool) -> float:
    """Of trainable state: 12 for an element's fp32 master and two moments, 2 more for a 16-bit adapter, 4 more for a child's index."""
    child = result["settings"].get("method") == "ChildTuning-D"
    elements = result["trainable"] * (result["density"] if child else 1)
    return float(elements * (12 + 2 * peft + 4 * child))


def sent_bytes(result: Options) -> float:
    """What a rank of many sends in a step at ZeRO-2: 4 for each trainable element's 16-bit gradient (all-reduced), 2 for its gathered
    weight. A child's gradients and weights are sent whole."""
    return float(result["trainable"] * 6)


def bytes_of(run: Run) -> float:
    return state_bytes(run.result, "peft" in run.result["settings"])


def lora_at(bytes_: float, small: Run, large: Run) -> float:
    """LoRA's NLL of the task at so many bytes, on a straight line over their logarithm."""
    low, high = np.log(bytes_of(small)), np.log(bytes_of(large))
    share = (np.log(bytes_) - low) / (high - low)
    return float(small.learnt + share * (large.learnt - small.learnt))


# ---------------------------------------------------------------- tables


def table(grid: Grid, runs: Runs) -> list[Row]:
    """A row for each arm: rate, seeds, bytes, what it learnt, and what it forgot where it had learnt as much as the others."""
    header = [
        "arm",
        "lr",
        "seeds",
        "state, bytes a parameter",
        "masters and moments, measured",
        "sent a step, bytes a parameter",
        "R8 NLL at the end",
        "share of full's gain",
        "BBC NLL at 80 %",
        "Brown NLL",
        "answers' NLL",
        "answers' KL",
    ]
    rows = [header]
    for method in (m for m in grid.methods if m in runs):
        of = runs[method]
        one = next(iter(of.values()))
        whole = runs[FULL][one.job.seed].result["trainable"]
        rows.append(
            [
                method,
                f"{one.job.lr:g}{at_the_edge(grid, method, one.job.lr)}",
                str(len(of)),
                f"{bytes_of(one) / whole:.2f}",
                f"{one.result['optimizer_bytes'] / whole:.2f}" if "optimizer_bytes" in one.result else "",
                f"{sent_bytes(one.result) / whole:.2f}",
                spread([run.learnt for run in of.values()]),
                spread([run.gain / runs[FULL][seed].gain for seed, run in of.items()]),
                *(
                    reached([at_level(run.curve(*figure), level_of(runs[FULL][seed])) for seed, run in of.items()])
                    for figure in (("bbc", "loss"), ("brown", "loss"), ("answers", "loss"), ("answers", "kl"))
                ),
            ]
        )
    return rows


def at_the_edge(grid: Grid, method: str, lr: float) -> str:
    """A mark for a rate that is the lowest or highest of those tried."""
    if tuned_as(grid, method) != method:
        return ""
    rates = tried(grid, method)
    return " (lowest tried)" if lr == min(rates) else " (highest tried)" if lr == max(rates) else ""


def spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def reached(values: Sequence[float | None]) -> str:
    there = [value for value in values if value is not None]
    if not there:
        return "not reached"
    return spread(there) + (f" ({len(there)} of {len(values)})" if len(there) < len(values) else "")


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


# ---------------------------------------------------------------- plots


def draw(grid: Grid, runs: Runs, path: Path) -> None:
    """Left: general against task NLL, one line an arm (mean of seeds). Right: what is learnt, against bytes of trainable state."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    if FULL not in runs:
        raise ValueError("expected results of reported seeds to draw, found none. Remedy: run the grid on.")
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.2), layout="constrained")
    colours = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    for i, method in enumerate(m for m in grid.methods if m in runs):
        of = runs[method]
        mean = np.mean([run.curve("bbc") for run in of.values()], axis=0)
        left.plot(mean[:, 0], mean[:, 1], ".-", color=colours[i], label=f"{method} ({len(of)})")
        whole = runs[FULL][next(iter(of))].result["trainable"]
        x = bytes_of(next(iter(of.values()))) / whole
        right.plot([x] * len(of), [run.learnt for run in of.values()], "o", color=colours[i], alpha=0.6)
        right.annotate(method, (x, np.mean([run.learnt for run in of.values()])), fontsize=7)
    left.axvline(np.mean([level_of(run) for run in runs[FULL].values()]), color="grey", linewidth=0.7, linestyle=":")
    left.invert_xaxis()
    left.set(xlabel="R8 NLL (learning goes to the right)", ylabel="BBC NLL")
    left.legend(fontsize=7)
    right.set(xscale="log", xlabel="trainable state, bytes a parameter of the model", ylabel="R8 NLL at the end")
    figure.savefig(path, dpi=110)
    plt.close(figure)
