"""Part C of docs/evidence_2.md: each technique by itself, and with a child. "X + D" is the method X with ChildTuning-D."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from grid import Grid, Options, Seeds, runs_by_method
from report import comparable, paired_t

HEADER = [
    "technique",
    "lr",
    "seeds",
    "by itself",
    "lr with D",
    "seeds",
    "with ChildTuning-D",
    "pairs",
    "difference",
    "paired t",
]
CHILD = " + D"


def rows(grid: Grid, results: Sequence[Options]) -> list[list[str]]:
    """In the order of `HEADER`; scores times 100. A technique of which one half has not run yet has empty cells there."""
    table = []
    for task, limit in itertools.product(grid.tasks, grid.train_limits):
        cell = runs_by_method(grid, task, limit, results)
        names = [name for name in grid.methods if f"{name}{CHILD}" in grid.methods]
        metric = grid.tasks[task].metric
        both = [(name, cell.get(name, {}), cell.get(f"{name}{CHILD}", {})) for name in names]
        table += [_row(name, metric, single, with_child) for name, single, with_child in both if single or with_child]
    return table


def _row(name: str, metric: str, single: Seeds, with_child: Seeds) -> list[str]:
    shared = [seed for seed in single if seed in with_child and comparable(single[seed], with_child[seed])]
    differences = [100 * (with_child[s]["metrics"][metric] - single[s]["metrics"][metric]) for s in shared]
    low, high = paired_t(differences) if len(differences) > 1 else (0.0, 0.0)
    return [
        name,
        *_cells(single, metric),
        *_cells(with_child, metric),
        str(len(differences)),
        f"{np.mean(differences):+.2f}" if differences else "",
        f"{low:+.2f} .. {high:+.2f}" if len(differences) > 1 else "",
    ]


def _cells(of: Seeds, metric: str) -> list[str]:
    """Rate, seeds, mean and standard deviation."""
    if not of:
        return ["", "0", ""]
    values = [100 * float(r["metrics"][metric]) for r in of.values()]
    deviation = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return [f"{next(iter(of.values()))['lr']:g}", str(len(values)), f"{np.mean(values):.2f}{deviation}"]
