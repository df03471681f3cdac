"""The table and the plot of launch/study/study.py."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from grid import Grid, Job, Options, best_lr, job_of, reported_jobs, tried

HEADER = [
    "task",
    "examples",
    "method",
    "lr",
    "seeds",
    "mean ± s.d.",
    "pairs",
    "difference to {}",
    "bootstrap",
    "paired t",
]
"""The last two are 95 % intervals of the mean difference. A percentile bootstrap of few pairs is too narrow (of five, it covers
about 83 %); a t interval holds its level where differences are near normal."""


def reported(grid: Grid, results: Sequence[Options]) -> Iterator[tuple[Job, str, float, Options]]:
    """Each reported job, what it was tested on, its score there and its line."""
    by_job = {job_of(r): r for r in results}
    for task, limit in itertools.product(grid.tasks, grid.train_limits):
        metric = grid.tasks[task].metric
        for job in reported_jobs(grid, task, limit, results):
            if job in by_job:
                result = by_job[job]
                yield job, task, 100 * float(result["metrics"][metric]), result
                for domain in grid.tasks[task].also_eval:
                    yield job, f"{task} > {domain}", 100 * float(result["also"][domain][metric]), result


def bootstrap(differences: Sequence[float], draws: int = 10_000) -> tuple[float, float]:
    """95 % percentile interval of the mean."""
    values = np.asarray(differences)
    index = np.random.default_rng(0).integers(0, len(values), (draws, len(values)))
    low, high = np.percentile(values[index].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def paired_t(differences: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean, of normal differences."""
    from scipy import stats

    values = np.asarray(differences)
    reach = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean() - reach), float(values.mean() + reach)


def comparable(one: Options, other: Options) -> bool:
    """Random streams differ between devices, and arithmetic between versions: what is paired shares both."""
    return all(one.get(key) == other.get(key) for key in ("device", "versions", "data"))


def rows(grid: Grid, results: Sequence[Options]) -> list[list[str]]:
    """One row for each method of every cell, in the order of `HEADER`; differences are to the baseline on the same seeds."""
    cells: dict[tuple[str, int | None], dict[str, dict[int, tuple[float, Options]]]] = {}
    lrs = {}
    for job, tested, score, result in reported(grid, results):
        cell = cells.setdefault((tested, job.train_limit), defaultdict(dict))
        cell[job.method][job.seed] = score, result
        lrs[tested, job.train_limit, job.method] = job.lr
    table = []
    for (tested, limit), cell in cells.items():
        base = cell.get(grid.compared_with, {})
        for method in (m for m in grid.methods if m in cell):
            of = cell[method]
            shared = [s for s in of if method != grid.compared_with and s in base and comparable(of[s][1], base[s][1])]
            paired = [of[seed][0] - base[seed][0] for seed in shared]
            intervals = [bootstrap(paired), paired_t(paired)] if len(paired) > 1 else []
            values = [score for score, _ in of.values()]
            table.append(
                [
                    f"{tested} ({grid.tasks[tested.partition(' > ')[0]].metric})",
                    "all" if limit is None else str(limit),
                    method,
                    f"{lrs[tested, limit, method]:g}",
                    str(len(values)),
                    f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""),
                    str(len(paired)) if paired else "",
                    f"{np.mean(paired):+.2f}" if paired else "",
                    *(f"{low:+.2f} .. {high:+.2f}" for low, high in intervals),
                    *[""] * (2 - len(intervals)),
                ]
            )
    return table


TUNING_HEADER = ["task", "examples", "method", "score on the tuning seed at each rate", "chosen"]


def tuning_rows(grid: Grid, results: Sequence[Options]) -> list[list[str]]:
    """The scores that rates are chosen by, a row for each method of which a tuning run has ended, as `TUNING_HEADER` says."""
    best, scores = best_lr(grid, results), {job_of(r): r["metrics"] for r in results}
    table = []
    for task, limit, method in itertools.product(grid.tasks, grid.train_limits, grid.methods):
        metric, rates = grid.tasks[task].metric, tried(grid, method)
        at = {lr: scores.get(Job(task, method, grid.tuning.seed, lr, limit)) for lr in rates}
        if any(at.values()):
            shown = ", ".join(f"{lr:g}: {of[metric]:.4f}" if of else f"{lr:g}: not run" for lr, of in at.items())
            chosen = best.get((task, limit, method))
            size = "all" if limit is None else str(limit)
            table.append([f"{task} ({metric})", size, method, shown, "" if chosen is None else f"{chosen:g}"])
    return table


def draw(grid: Grid, results: Sequence[Options], path: Path) -> None:
    """Score per method and task, seeds as dots; over the number of examples where the grid has several."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    scores: dict[str, dict[str, dict[int | None, list[float]]]] = {}
    for job, tested, score, _ in reported(grid, results):
        of = scores.setdefault(tested, defaultdict(lambda: defaultdict(list)))
        of[job.method][job.train_limit].append(score)
    if not scores:
        raise ValueError("expected results of reported seeds to draw, found none. Remedy: run the grid on.")
    curve = len(grid.train_limits) > 1
    figure, all_axes = plt.subplots(
        1, len(scores), figsize=((5 if curve else 3.2) * len(scores), 3.4), squeeze=False, layout="constrained"
    )
    for axes, (tested, of) in zip(all_axes[0], scores.items(), strict=True):
        for i, method in enumerate(grid.methods):
            for j, (limit, values) in enumerate(of[method].items()):
                at = grid.train_limits.index(limit) + (i - 1) * 0.2 if curve else i
                jitter = np.linspace(-1, 1, len(values)) * (0.04 if curve else 0.12) if len(values) > 1 else np.zeros(1)
                axes.plot(at + jitter, values, "o", color=f"C{i}", alpha=0.55, label=None if j else method)
                reach = 0.08 if curve else 0.25
                axes.hlines(np.mean(values), at - reach, at + reach, color=f"C{i}", linewidth=2)
        if curve:
            axes.set_xticks(range(len(grid.train_limits)), [str(n or "all") for n in grid.train_limits])
            axes.set_xlabel("training examples")
            axes.legend()
        else:
            axes.set_xticks(range(len(grid.methods)), list(grid.methods), rotation=25, ha="right")
        axes.set_title(tested)
        axes.set_ylabel(f"{grid.tasks[tested.partition(' > ')[0]].metric} x 100")
    figure.savefig(path, dpi=110)
    plt.close(figure)
