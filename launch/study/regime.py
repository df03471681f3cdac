"""The table of part B of docs/evidence_2.md: mean, spread and failed runs of each method, beside vanilla fine-tuning at the same rate.

A method's name in these grids is its kind and its rate, for example "ChildTuning-D 1e-4".
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from grid import Grid, Options, Seeds, runs_by_method
from report import comparable, paired_t

HEADER = [
    "task",
    "examples",
    "method",
    "seeds",
    "mean ± s.d.",
    "failed",
    "pairs",
    "difference to vanilla",
    "paired t",
    "p of equal spread",
    "flipped labels memorised",
]
VANILLA = "vanilla"
FEWEST_PAIRS = 3
"""For an interval."""
FEWEST_FOR_SPREAD = 5
"""Runs of each method for a p of the Brown-Forsythe test: with three, no data gives one below .116; with five, .004 is possible."""


def rows(grid: Grid, results: Sequence[Options]) -> list[list[str]]:
    """In the order of `HEADER`; scores times 100. The control of a grid with flipped labels is compared with, at whatever rate."""
    table = []
    for task, limit in itertools.product(grid.tasks, grid.train_limits):
        cell = runs_by_method(grid, task, limit, results)
        table += [_row(grid, task, limit, method, cell) for method in grid.methods if method in cell]
    return table


def _row(grid: Grid, task: str, limit: int | None, method: str, cell: dict[str, Seeds]) -> list[str]:
    metric, failed_at = grid.tasks[task].metric, grid.tasks[task].failed_at
    base = cell.get(compared_with(grid, method), {}) if method != compared_with(grid, method) else {}
    of = cell[method]
    scores = {seed: 100 * float(r["metrics"][metric]) for seed, r in of.items()}
    beside = {seed: 100 * float(base[seed]["metrics"][metric]) for seed in base}
    pairs = [scores[s] - beside[s] for s in of if s in base and comparable(of[s], base[s])]
    interval = ""
    if len(pairs) >= FEWEST_PAIRS:
        low, high = paired_t(pairs)
        interval = f"{low:+.2f} .. {high:+.2f}"
    enough = bool(pairs) and min(len(scores), len(beside)) >= FEWEST_FOR_SPREAD
    failed = "" if failed_at is None else str(sum(not score > 100 * failed_at for score in scores.values()))
    memorised = [100 * float(r["also"]["flipped"]["accuracy"]) for r in of.values() if "flipped" in (r["also"] or {})]
    return [
        f"{task} ({metric})",
        "all" if limit is None else str(limit),
        method,
        str(len(scores)),
        _spread(list(scores.values())),
        failed,
        str(len(pairs)) if pairs else "",
        f"{np.mean(pairs):+.2f}" if pairs else "",
        interval,
        f"{equal_spread(list(scores.values()), list(beside.values())):.3f}" if enough else "",
        _spread(memorised) if memorised else "",
    ]


def compared_with(grid: Grid, method: str) -> str:
    """Vanilla at the same rate, or what the grid names."""
    return grid.baseline or f"{VANILLA} {method.rpartition(' ')[2]}"


def equal_spread(one: Sequence[float], other: Sequence[float]) -> float:
    """p of the Brown-Forsythe test: whether the distances from each group's median are alike."""
    from scipy import stats

    return float(stats.levene(one, other, center="median").pvalue)


def _spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else "")
