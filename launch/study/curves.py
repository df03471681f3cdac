"""The second study's figures (docs/evidence_2.md): learning for its bytes, and forgetting at equal learning.

All of it is computed from the results' curves, so that a table can be made of any part of the runs. NLL in nats a token.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from grid import Grid, Job, Options, job_of, reported_jobs, tried, tuned_as
from report import comparable

SHARE = 0.8
"""Of what full fine-tuning gains: where arms are compared."""
FULL = "full"

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


def state_bytes(result: Options, peft: bool) -> float:
    """Of trainable state: 12 for an element's fp32 master and two moments, its own 2 or 4 more for an adapter, 4 more for a child's
    index."""
    child = result["settings"].get("method") == "ChildTuning-D"
    elements = result["trainable"] * (result["density"] if child else 1)
    return float(elements * (12 + width_of(result) * peft + 4 * child))


def sent_bytes(result: Options) -> float:
    """What a rank of many sends in a step at ZeRO-2: a trainable element's gradient twice (all-reduced), and its gathered weight once.
    A child's gradients and weights are sent whole."""
    return float(result["trainable"] * 3 * width_of(result))


def width_of(result: Options) -> int:
    """Bytes of a weight."""
    return 2 if result["bf16"] else 4


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
    figures = (("bbc", "loss"), ("brown", "loss"), ("answers", "loss"), ("answers", "kl"))
    header, *rows = learning(grid, runs)
    made = [[*header, "BBC NLL at 80 %", "Brown NLL", "answers' NLL", "answers' KL"]]
    for row in rows:
        of = runs[row[0]].items()
        forgot = [[at_level(run.curve(*f), level_of(runs[FULL][seed])) for seed, run in of] for f in figures]
        made.append([*row, *map(reached, forgot)])
    return made


def learning(grid: Grid, runs: Runs) -> list[Row]:
    """A row for each arm: rate, seeds, bytes, and what it learnt."""
    (task,) = grid.tasks
    header = [
        "arm",
        "lr",
        "seeds",
        "state, bytes a parameter",
        "masters and moments, measured",
        "sent a step, bytes a parameter",
        f"{task.upper()} NLL at the end",
        "share of full's gain",
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
            ]
        )
    return rows


def at_the_edge(grid: Grid, method: str, lr: float) -> str:
    """A mark for a rate that is the lowest or highest of those tried."""
    rates = tried(grid, method)
    if tuned_as(grid, method) != method or not rates:
        return ""
    return " (lowest tried)" if lr == min(rates) else " (highest tried)" if lr == max(rates) else ""


def spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def reached(values: Sequence[float | None]) -> str:
    there = [value for value in values if value is not None]
    if not there:
        return "not reached"
    return spread(there) + (f" ({len(there)} of {len(values)})" if len(there) < len(values) else "")


# ---------------------------------------------------------------- plots


def draw(grid: Grid, runs: Runs, path: Path) -> None:
    """Left: general against task NLL, one line an arm (mean of seeds). Right: what is learnt, against bytes of trainable state, and
    against bytes that a rank sends in a step."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    if FULL not in runs:
        raise ValueError("expected results of reported seeds to draw, found none. Remedy: run the grid on.")
    figure, axes = plt.subplot_mosaic([["left", "state"], ["left", "sent"]], figsize=(14, 7), layout="constrained")
    left = axes["left"]
    colours = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    for i, method in enumerate(m for m in grid.methods if m in runs):
        of = runs[method]
        mean = np.mean([run.curve("bbc") for run in of.values()], axis=0)
        left.plot(mean[:, 0], mean[:, 1], ".-", color=colours[i], label=f"{method} ({len(of)})")
        one = next(iter(of.values()))
        whole = runs[FULL][one.job.seed].result["trainable"]
        learnt = [run.learnt for run in of.values()]
        for name, bytes_ in (("state", bytes_of(one)), ("sent", sent_bytes(one.result))):
            axes[name].plot([bytes_ / whole] * len(of), learnt, "o", color=colours[i], alpha=0.6)
            axes[name].annotate(method, (bytes_ / whole, np.mean(learnt)), fontsize=6)
    left.axvline(np.mean([level_of(run) for run in runs[FULL].values()]), color="grey", linewidth=0.7, linestyle=":")
    left.invert_xaxis()
    left.set(xlabel="R8 NLL (learning goes to the right)", ylabel="BBC NLL")
    left.legend(fontsize=7)
    for name, what in (("state", "trainable state"), ("sent", "sent by a rank in a step")):
        axes[name].set(xscale="log", xlabel=f"{what}, bytes a parameter of the model", ylabel="R8 NLL at the end")
        axes[name].set_xticks(ticks := [0.125, 0.25, 0.5, 1, 2, 4, 8, 16], [f"{tick:g}" for tick in ticks])
        axes[name].set(xlim=(0.08, 32))
        axes[name].minorticks_off()
    figure.savefig(path, dpi=110)
    plt.close(figure)
