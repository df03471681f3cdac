"""What launch/study/study.py runs: a grid from one YAML file, its jobs, and the results file that they add to."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

ROOT = Path(__file__).parents[2]
Options = dict[str, Any]

METRICS = {
    "classification": {"accuracy", "f1", "matthews"},
    "regression": {"pearson", "spearman", "mse"},
    "causal-lm": {"loss", "perplexity"},
}
LOWER_IS_BETTER = {"mse", "loss", "perplexity"}

# ---------------------------------------------------------------- the grid


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Binarise(Strict):
    """Classes from a score: 1 from `above` on, 0 up to `below`; what lies between is left out."""

    above: float
    below: float


class Domain(Strict):
    """Another domain to test on, with the task's columns. Rows that share a text with the training set are left out."""

    file: str
    """json lines, inside --data."""
    binarise: Binarise | None = None


class Task(Strict):
    metric: str
    """The score that the study compares, one of launch/finetune.py's metrics."""
    text_columns: str
    folder: str | None = None
    """Folder inside --data, with train.jsonl and validation.jsonl; the task's own name when absent."""
    hub: Options = Field(default_factory=dict)
    """Options that name the data set on the hub, for --data hub."""
    binarise: Binarise | None = None
    flip: float | None = Field(default=None, gt=0, lt=1)
    """So large a share of the training labels, 0 or 1, is flipped; `also` of a result has the score on those as `flipped`."""
    also_eval: dict[str, Domain] = Field(default_factory=dict)
    """Other domains, by a name for the table."""
    recorded: list[str] = Field(default_factory=list)
    """Other files inside --data that a score depends on: results keep their digests."""
    failed_at: float | None = None
    """A run whose score is not above it has failed: the share of the largest class, for accuracy."""
    finetune: Options = Field(default_factory=dict)


class Tuning(Strict):
    seed: int
    lr: list[float] = Field(min_length=1)
    finetune: Options = Field(default_factory=dict)
    """Options of the tuning runs only, for example fewer steps."""
    also_eval: bool = True
    """False: tuning runs are not tested on other domains."""


class Grid(Strict):
    """One YAML file."""

    finetune: Options
    launcher: Options = Field(default_factory=dict)
    tasks: dict[str, Task] = Field(min_length=1)
    methods: dict[str, Options] = Field(min_length=1)
    """Options of each method; a mapping in place of a value is by task. A list of `lr` is tuned in place of the grid's, a number is
    not tuned. `lr_of` names a method whose lr is used, times `lr_factor`. {data} in a value is the folder of --data."""
    tuning: Tuning
    seeds: list[int] = Field(min_length=1)
    train_limits: list[int | None] = [None]
    """Low-resource curve: sizes of the training set."""
    baseline: str = ""
    """The method that the others are compared with; the first one when absent."""

    @model_validator(mode="after")
    def _complete(self) -> Grid:
        """A name that is misspelt must not become a default."""
        _expect(
            self.tuning.seed not in self.seeds,
            "a tuning seed that is not reported",
            f"{self.tuning.seed}, one of seeds {self.seeds}",
        )
        _expect(
            not self.baseline or self.baseline in self.methods, f"baseline among {list(self.methods)}", self.baseline
        )
        for name, method in self.methods.items():
            lender = method.get("lr_of", name)
            _expect(
                lender == name or (lender in self.methods and "lr_of" not in self.methods[lender]),
                f"lr_of of {name!r} to be a method that is tuned itself",
                repr(lender),
            )
            for key, value in method.items():
                if isinstance(value, dict):
                    _expect(
                        set(value) == set(self.tasks),
                        f"{key} of {name!r} for each of {list(self.tasks)}",
                        f"{list(value)}",
                    )
        for name, task in self.tasks.items():
            options = self.finetune | task.finetune
            known = METRICS.get(options.get("task", "classification"), set())
            _expect(task.metric in known, f"metric of {name!r} among {sorted(known)}", repr(task.metric))
            own = sorted({"seed", "lr", "train_limit", "text_columns", "also_eval", "results"} & set(options))
            _expect(not own, "no option under finetune that a job sets itself", f"{own}")
        return self

    @property
    def compared_with(self) -> str:
        return self.baseline or next(iter(self.methods))


def _expect(holds: bool, expected: str, got: str) -> None:
    if not holds:
        raise ValueError(f"expected {expected}, got {got}. Remedy: change it in the grid's YAML file.")


def read_grid(path: Path) -> Grid:
    return Grid.model_validate(yaml.safe_load(path.read_text()))


# ---------------------------------------------------------------- its jobs


@dataclass(frozen=True)
class Job:
    task: str
    method: str
    seed: int
    lr: float
    train_limit: int | None = None


def method_options(grid: Grid, job: Job) -> Options:
    own = grid.methods[job.method].items()
    return {k: v[job.task] if isinstance(v, dict) else v for k, v in own if k not in ("lr", "lr_of", "lr_factor")}


def job_options(grid: Grid, job: Job) -> Options:
    """Options of launch/finetune.py that do not depend on where the data is; what a job sets itself is not among them."""
    options = grid.finetune | grid.tasks[job.task].finetune | method_options(grid, job)
    return options | (grid.tuning.finetune if job.seed == grid.tuning.seed else {})


def domains_of(grid: Grid, job: Job) -> dict[str, Domain]:
    """What the job is also tested on."""
    return {} if job.seed == grid.tuning.seed and not grid.tuning.also_eval else grid.tasks[job.task].also_eval


def settings_of(grid: Grid, job: Job) -> Options:
    """Everything that a job's score depends on but the job itself, the data and the versions; as JSON holds it."""
    task = grid.tasks[job.task]
    options = job_options(grid, job)
    settings = options | {
        "ds_config": digest(ROOT / options["ds_config"]),
        "text_columns": task.text_columns,
        "binarise": task.binarise and task.binarise.model_dump(),
        "flip": task.flip,
        "also_eval": {name: domain.model_dump() for name, domain in domains_of(grid, job).items()},
    }
    return {key: value for key, value in sorted(settings.items()) if value not in (None, {})}


def data_of(grid: Grid, job: Job, data: str) -> Options:
    """Names no folder: which files on a disk, by their contents, or which data set on the hub."""
    task = grid.tasks[job.task]
    if data == "hub":
        return task.hub
    folder = Path(data) / (task.folder or job.task)
    own = {name: digest(folder / name) for name in ("train.jsonl", "validation.jsonl")}
    return own | {name: digest(Path(data) / name) for name in task.recorded}


def digest(path: Path) -> str:
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a file of the study, found none. Remedy: check --data, or the grid.")
    found = path.stat()
    return _digest(path, found.st_mtime_ns, found.st_size)


@functools.cache
def _digest(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"


def tuned_as(grid: Grid, method: str) -> str:
    """The method whose learning rate `method` uses."""
    return str(grid.methods[method].get("lr_of", method))


def tuning_jobs(grid: Grid, task: str, limit: int | None) -> list[Job]:
    methods = dict.fromkeys(tuned_as(grid, m) for m in grid.methods)
    return [Job(task, m, grid.tuning.seed, lr, limit) for m in methods for lr in tried(grid, m)]


def tried(grid: Grid, method: str) -> list[float]:
    """The learning rates that are tried for a method; none where it is given."""
    own = grid.methods[method].get("lr", grid.tuning.lr)
    return list(own) if isinstance(own, list) else []


def reported_jobs(grid: Grid, task: str, limit: int | None, results: Sequence[Options]) -> list[Job]:
    """Jobs of the seeds that are reported; those of a method that is not tuned yet are left out."""
    best = best_lr(grid, results)
    pairs = itertools.product(grid.seeds, grid.methods)
    given = {m: of["lr"] for m, of in grid.methods.items() if isinstance(of.get("lr"), float)}
    of = {m: given.get(tuned_as(grid, m), best.get((task, limit, tuned_as(grid, m)))) for m in grid.methods}
    lrs = [(seed, method, of[method]) for seed, method in pairs]
    factor = {method: grid.methods[method].get("lr_factor", 1) for method in grid.methods}
    # Rounded, so that a product in a file is the product here.
    return [Job(task, m, seed, float(f"{lr * factor[m]:.6g}"), limit) for seed, m, lr in lrs if lr is not None]


Seeds = dict[int, Options]
"""By seed: a run's line."""


def runs_by_method(grid: Grid, task: str, limit: int | None, results: Sequence[Options]) -> dict[str, Seeds]:
    """Reported runs of a task and training set size that are there."""
    by_job = {job_of(r): r for r in results}
    runs: dict[str, Seeds] = {}
    for job in reported_jobs(grid, task, limit, results):
        if job in by_job:
            runs.setdefault(job.method, {})[job.seed] = by_job[job]
    return runs


def best_lr(grid: Grid, results: Sequence[Options]) -> dict[tuple[str, int | None, str], float]:
    """By task, training set size and method: the learning rate of the best score on the tuning seed; the smaller on a tie."""
    scores: dict[tuple[str, int | None, str], dict[float, float]] = defaultdict(dict)
    for r in results:
        if r["seed"] == grid.tuning.seed and r["lr"] in tried(grid, r["method"]):
            metric = grid.tasks[r["task"]].metric
            score = r["metrics"][metric] * (-1 if metric in LOWER_IS_BETTER else 1)
            # A run that has diverged is no best one.
            scores[r["task"], r["train_limit"], r["method"]][r["lr"]] = -math.inf if math.isnan(score) else score
    complete = {key: of for key, of in scores.items() if len(of) == len(set(tried(grid, key[2])))}
    return {key: max(sorted(of), key=lambda lr, of=of: of[lr]) for key, of in complete.items()}


# ---------------------------------------------------------------- its results


def read_results(path: Path, grid: Grid) -> list[Options]:
    """The grid's own results, one of each job. A last line that a crash cut short loses only that job.

    Raises:
        ValueError: a result of one of the grid's jobs that was run with other settings.
    """
    results: dict[Job, Options] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            result = json.loads(line)
        except json.JSONDecodeError:
            continue
        if result["task"] not in grid.tasks or result["method"] not in grid.methods:
            continue
        if result["train_limit"] not in grid.train_limits:
            continue
        job = job_of(result)
        theirs, ours = result["settings"], json.loads(json.dumps(settings_of(grid, job)))
        changed = sorted(k for k in theirs.keys() | ours.keys() if theirs.get(k) != ours.get(k))
        if changed:
            raise ValueError(
                f"{path}: expected results of this grid, got {job} run with other"
                f" {', '.join(f'{k} ({theirs.get(k)}, here {ours.get(k)})' for k in changed)}."
                " Remedy: another --results file, or the grid that it belongs to."
            )
        results[job] = result
    return list(results.values())


def job_of(result: Options) -> Job:
    return Job(**{key: result[key] for key in Job.__dataclass_fields__})


def line_of(job: Job, result: Options, settings: Options, data: Options, date: str) -> Options:
    """A job's line of the results file, from launch/finetune.py's own result; names no folder of this machine."""
    keep = (
        "metrics",
        "also",
        "train_loss",
        "density",
        "steps",
        "train_examples",
        "eval_examples",
        "seconds",
        "world_size",
    )
    config = result["ds_config"]
    return (
        asdict(job)
        | {key: result[key] for key in keep}
        | {key: result[key] for key in ("curve", "trainable", "optimizer_bytes") if result.get(key) is not None}
        | {
            "reserve_p": config.get("child_tuning", {}).get("reserve_p"),
            "zero_stage": config["zero_optimization"]["stage"],
            "bf16": config["bf16"]["enabled"],
            "device": result["device"],
            "versions": result["versions"],
            "date": date,
            "settings": settings,
            "data": data,
        }
    )
