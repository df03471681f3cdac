"""Part C of docs/evidence_2.md: each technique by itself, and with a child. "X + D" is the method X with ChildTuning-D."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from grid import Grid, Options, job_of, reported_jobs
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

Seeds = dict[int, Options]
"""By seed: a run's line."""


def rows(grid: Grid, results: Sequence[Options]) -> list[list[str]]:
    """In the order of `HEADER`; scores times 100. A technique of which one half has not run yet has empty cells there."""
    by_job = {job_of(r): r for r in results}
    table = []
    for task, limit in itertools.product(grid.tasks, grid.train_limits):
        cell: dict[str, Seeds] = {}
        for job in reported_jobs(grid, task, limit, results):
            if job in by_job:
                cell.setdefault(job.method, {})[job.seed] = by_job[job]
        names = [name for name in grid.methods if f"{name}{CHILD}" in grid.methods]
        metric = grid.tasks[task].metric
        both = [(name, cell.get(name, {}), cell.get(f"{name}{CHILD}", {})) for name in names]
        table += [_row(name, metric, alone, with_child) for name, alone, with_child in both if alone or with_child]
    return table


def _row(name: str, metric: str, alone: Seeds, with_child: Seeds) -> list[str]:
    shared = [seed for seed in alone if seed in with_child and comparable(alone[seed], with_child[seed])]
    differences = [100 * (with_child[s]["metrics"][metric] - alone[s]["metrics"][metric]) for s in shared]
    low, high = paired_t(differences) if len(differences) > 1 else (0.0, 0.0)
    return [
        name,
        *_cells(alone, metric),
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
