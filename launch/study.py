"""Does the child generalise better? Tasks x methods x seeds, each a `deepspeed` job of launch/finetune.py, then a table.

    python launch/study.py run launch/study_glue.yaml --data GLUE_FOLDER --results docs/evidence/glue.jsonl --jobs 2
    python launch/study.py report launch/study_glue.yaml docs/evidence/glue.jsonl --plot docs/evidence/glue.png

Likewise study_ablations.yaml (into the same results file, whose runs it shares), study_low_resource.yaml and study_transfer.yaml;
study_bert_large.yaml is the paper's own table, for those who have GPUs.

`run` may be stopped at any time and started again: every finished job is one JSON line in the results file, and jobs
that have a line are skipped. For every task and method it first tunes the learning rate on the tuning seed; the seeds that
are reported never see that choice being made.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import yaml
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

HERE = Path(__file__).parent
Options = dict[str, Any]

# ---------------------------------------------------------------- the grid


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Binarise(Strict):
    """Classes from a score: 1 from `above` on, 0 up to `below`; what lies between is left out."""

    above: float
    below: float


class Domain(Strict):
    """Another domain to test on, with the task's columns."""

    file: str
    """json lines, inside --data."""
    binarise: Binarise | None = None


class Task(Strict):
    metric: str
    """The score that the study compares, one of launch/finetune.py's metrics."""
    text_columns: str
    folder: str | None = None
    """Folder inside --data; the task's own name when absent."""
    hub: Options = Field(default_factory=dict)
    """Options that name the data set on the hub, for --data hub."""
    binarise: Binarise | None = None
    also_eval: dict[str, Domain] = Field(default_factory=dict)
    """Other domains, by a name for the table."""
    finetune: Options = Field(default_factory=dict)


class Tuning(Strict):
    seed: int
    lr: list[float] = Field(min_length=1)


class Grid(Strict):
    """One YAML file."""

    finetune: Options
    launcher: Options = Field(default_factory=dict)
    tasks: dict[str, Task] = Field(min_length=1)
    methods: dict[str, Options] = Field(min_length=1)
    """Options of each method; a mapping in place of a value is by task. `lr_of` names a method whose tuned lr is used."""
    tuning: Tuning
    seeds: list[int] = Field(min_length=1)
    train_limits: list[int | None] = [None]
    """Low-resource curve: sizes of the training set."""


@dataclass(frozen=True)
class Job:
    task: str
    method: str
    seed: int
    lr: float
    train_limit: int | None = None


def read_grid(path: Path) -> Grid:
    grid = Grid.model_validate(yaml.safe_load(path.read_text()))
    if grid.tuning.seed in grid.seeds:
        raise ValueError(
            f"{path}: expected a tuning seed that is not reported, got {grid.tuning.seed}, one of seeds {grid.seeds}."
            " Remedy: choose another."
        )
    return grid


def tuned_as(grid: Grid, method: str) -> str:
    """The method whose learning rate `method` uses."""
    return str(grid.methods[method].get("lr_of", method))


def tuning_jobs(grid: Grid, task: str, limit: int | None) -> list[Job]:
    methods = dict.fromkeys(tuned_as(grid, m) for m in grid.methods)
    return [Job(task, m, grid.tuning.seed, lr, limit) for m in methods for lr in grid.tuning.lr]


def reported_jobs(grid: Grid, task: str, limit: int | None, results: Sequence[Options]) -> list[Job]:
    """Jobs of the seeds that are reported; those of a method that is not tuned yet are left out."""
    best = best_lr(grid, results)
    pairs = itertools.product(grid.seeds, grid.methods)
    lrs = [(seed, method, best.get((task, limit, tuned_as(grid, method)))) for seed, method in pairs]
    return [Job(task, method, seed, lr, limit) for seed, method, lr in lrs if lr is not None]


def best_lr(grid: Grid, results: Sequence[Options]) -> dict[tuple[str, int | None, str], float]:
    """By task, training set size and method: the learning rate of the best score on the tuning seed; the smaller on a tie."""
    scores: dict[tuple[str, int | None, str], dict[float, float]] = defaultdict(dict)
    for r in results:
        if r["seed"] == grid.tuning.seed and r["task"] in grid.tasks and r["lr"] in grid.tuning.lr:
            scores[r["task"], r["train_limit"], r["method"]][r["lr"]] = r["metrics"][grid.tasks[r["task"]].metric]
    complete = {key: of for key, of in scores.items() if len(of) == len(set(grid.tuning.lr))}
    return {key: max(sorted(of), key=lambda lr, of=of: of[lr]) for key, of in complete.items()}


# ---------------------------------------------------------------- running


def read_results(path: Path) -> list[Options]:
    """Whole lines; a last line that a crash cut short is that job's loss alone."""
    results = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            results.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return results


def job_of(result: Options) -> Job:
    return Job(**{key: result[key] for key in Job.__dataclass_fields__})


def file_of(file: Path, binarise: Binarise | None, scratch: Path) -> Path:
    """`file`, or a copy of it in `scratch` whose label is a class."""
    if binarise is None:
        return file
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    sure = [row for row in rows if not binarise.below < row["label"] < binarise.above]
    copy = scratch / f"{file.parent.name}-{file.name}"
    copy.write_text("".join(json.dumps(row | {"label": int(row["label"] >= binarise.above)}) + "\n" for row in sure))
    return copy


def options_of(grid: Grid, job: Job, data: str, scratch: Path) -> Options:
    """launch/finetune.py's options for a job."""
    task = grid.tasks[job.task]
    method = {
        k: v.get(job.task) if isinstance(v, dict) else v for k, v in grid.methods[job.method].items() if k != "lr_of"
    }
    folder = Path(data) / (task.folder or job.task)
    names = {"train_file": "train.jsonl", "eval_file": "validation.jsonl"}
    if data == "hub":
        where: Options = task.hub
    else:
        where = {key: file_of(folder / name, task.binarise, scratch) for key, name in names.items()}
    own = {"seed": job.seed, "lr": job.lr, "train_limit": job.train_limit, "text_columns": task.text_columns}
    others = {name: file_of(Path(data) / d.file, d.binarise, scratch) for name, d in task.also_eval.items()}
    also = [f"{name}={file}" for name, file in others.items()]
    merged = grid.finetune | task.finetune | where | method | own | {"also_eval": also}
    return {k: v for k, v in merged.items() if v is not None}


# Below the range from which a system gives ports to connections: one of those might take a port before the job listens on it.
PORTS = itertools.cycle(random.sample(range(15_000, 30_000), 15_000))


def free_port() -> int:
    """A port that nobody listens on, and that no other job of this study is given soon."""
    for port in PORTS:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("PORTS never ends")


def command_of(grid: Grid, options: Options, results: Path) -> list[str]:
    launcher = {k: v for k, v in grid.launcher.items() if not k.isupper()}
    # By this interpreter, so that the study's own environment is the jobs' one.
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(free_port())]
    command += [f"--{k}={v}" for k, v in launcher.items()]
    command += [str(HERE / "finetune.py"), "--results", str(results)]
    for key, value in options.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            for one in value if isinstance(value, list) else [value]:
                command += [f"--{flag}", str(one)]
    return command


def run_job(grid: Grid, job: Job, data: str) -> Options:
    """Run one job and return its line of the results file, which names no folder of this machine."""
    environment = os.environ | {k: str(v) for k, v in grid.launcher.items() if k.isupper()}
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "result.jsonl"
        command = command_of(grid, options_of(grid, job, data, Path(folder)), results)
        done = subprocess.run(command, env=environment, cwd=HERE.parent, capture_output=True, text=True, check=False)
        if done.returncode or not results.exists():
            raise RuntimeError(
                f"{shlex.join(command)}\nended with {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}"
            )
        result = json.loads(results.read_text())
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
        | {
            "reserve_p": config.get("child_tuning", {}).get("reserve_p"),
            "zero_stage": config["zero_optimization"]["stage"],
            "bf16": config["bf16"]["enabled"],
            "device": result["device"],
            "versions": result["versions"],
            "date": time.strftime("%Y-%m-%d"),
        }
    )


def run(
    grid_file: Annotated[Path, typer.Argument(help="YAML file of the grid.")],
    data: Annotated[str, typer.Option(help="Folder of the tasks' files, or hub.")],
    results: Annotated[Path, typer.Option(help="JSON lines; added to.")],
    jobs: Annotated[int, typer.Option(help="Jobs side by side.")] = 1,
) -> None:
    """Run what is not in the results file yet."""
    grid = read_grid(grid_file)
    results.parent.mkdir(parents=True, exist_ok=True)
    lock = threading.Lock()
    stop = threading.Event()
    per_cell = len(grid.seeds) * len(grid.methods)
    cells = list(itertools.product(grid.tasks, grid.train_limits))
    total = sum(len(tuning_jobs(grid, *cell)) + per_cell for cell in cells)
    finished = {job_of(r) for r in read_results(results)}
    bar = tqdm(total=total, desc="Study", unit=" jobs", smoothing=0)

    def one(job: Job) -> None:
        if stop.is_set():
            return
        try:
            line = json.dumps(run_job(grid, job, data))
        except BaseException:
            stop.set()
            raise
        with lock:
            # One write, so that a crash leaves whole lines; on a new line, whatever a crash has left before it.
            torn = results.exists() and not results.read_text().endswith("\n") and results.stat().st_size
            with results.open("a") as file:
                file.write(("\n" if torn else "") + line + "\n")
                file.flush()
                os.fsync(file.fileno())
            bar.set_postfix_str(f"{job.task} {job.method} seed {job.seed} lr {job.lr:g}", refresh=False)
            bar.update()

    with ThreadPoolExecutor(jobs) as pool:

        def run_all(wanted: Sequence[Job]) -> None:
            bar.update(sum(job in finished for job in wanted))
            list(pool.map(one, [job for job in wanted if job not in finished]))

        # Seed by seed over all cells: a study that is stopped early has a table, of fewer seeds.
        run_all([job for cell in cells for job in tuning_jobs(grid, *cell)])
        done = read_results(results)
        run_all(sorted((job for cell in cells for job in reported_jobs(grid, *cell, done)), key=lambda job: job.seed))
    bar.close()


# ---------------------------------------------------------------- reporting


def reported(grid: Grid, results: Sequence[Options]) -> Iterator[tuple[Job, str, float]]:
    """Each reported job, what it was tested on, and its score there."""
    by_job = {job_of(r): r for r in results}
    for task, limit in itertools.product(grid.tasks, grid.train_limits):
        metric = grid.tasks[task].metric
        for job in reported_jobs(grid, task, limit, results):
            if job in by_job:
                yield job, task, 100 * float(by_job[job]["metrics"][metric])
                for domain in grid.tasks[task].also_eval:
                    yield job, f"{task} > {domain}", 100 * float(by_job[job]["also"][domain][metric])


def bootstrap(differences: Sequence[float], draws: int = 10_000) -> tuple[float, float]:
    """95 % percentile interval of the mean."""
    values = np.asarray(differences)
    index = np.random.default_rng(0).integers(0, len(values), (draws, len(values)))
    low, high = np.percentile(values[index].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def rows(grid: Grid, results: Sequence[Options]) -> list[list[str]]:
    """task, examples, method, lr, seeds, mean ± standard deviation, difference to the first method on the same seeds."""
    scores: dict[tuple[str, int | None, str], dict[int, float]] = defaultdict(dict)
    lrs = {}
    for job, tested, score in reported(grid, results):
        scores[tested, job.train_limit, job.method][job.seed] = score
        lrs[tested, job.train_limit, job.method] = job.lr
    baseline = next(iter(grid.methods))
    table = []
    # Seeds take turns while a study runs: put what was tested on the same data together, in the order of the grid.
    position = {cell: i for i, cell in enumerate(dict.fromkeys((tested, limit) for tested, limit, _ in scores))}
    for (tested, limit, method), of in sorted(scores.items(), key=lambda item: position[item[0][:2]]):
        base = scores[tested, limit, baseline]
        paired = [of[seed] - base[seed] for seed in of if seed in base]
        difference = "" if method == baseline or not paired else f"{np.mean(paired):+.2f}"
        if difference and len(paired) > 1:
            difference += " [{:+.2f}, {:+.2f}]".format(*bootstrap(paired))
        values = list(of.values())
        spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
        what = f"{tested} ({grid.tasks[tested.partition(' > ')[0]].metric})"
        examples = "all" if limit is None else str(limit)
        lr = f"{lrs[tested, limit, method]:g}"
        table.append([what, examples, method, lr, str(len(values)), f"{np.mean(values):.2f}{spread}", difference])
    return table


HEADER = ["task", "examples", "method", "lr", "seeds", "mean ± s.d.", "paired difference to {} [95 % bootstrap]"]


def draw(grid: Grid, results: Sequence[Options], path: Path) -> None:
    """Score per method and task, seeds as dots."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    scores: dict[tuple[str, int | None], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for job, tested, score in reported(grid, results):
        scores[tested, job.train_limit][job.method].append(score)
    figure, all_axes = plt.subplots(
        1, len(scores), figsize=(3.2 * len(scores), 3.4), squeeze=False, layout="constrained"
    )
    for axes, ((tested, limit), of) in zip(all_axes[0], scores.items(), strict=True):
        for i, values in enumerate(of.values()):
            jitter = np.linspace(-0.12, 0.12, len(values)) if len(values) > 1 else np.zeros(1)
            axes.plot(i + jitter, values, "o", color=f"C{i}", alpha=0.55)
            axes.hlines(np.mean(values), i - 0.25, i + 0.25, color=f"C{i}", linewidth=2)
        axes.set_xticks(range(len(of)), list(of), rotation=25, ha="right")
        axes.set_title(tested if limit is None else f"{tested}, {limit} examples")
        axes.set_ylabel(f"{grid.tasks[tested.partition(' > ')[0]].metric} x 100")
    figure.savefig(path, dpi=110)


def report(
    grid_file: Annotated[Path, typer.Argument(help="YAML file of the grid.")],
    results_file: Annotated[Path, typer.Argument(help="Its results.")],
    plot: Annotated[Path | None, typer.Option(help="PNG to draw.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table in Markdown.")] = False,
) -> None:
    """Print the table, and draw the plot."""
    grid = read_grid(grid_file)
    results = read_results(results_file)
    header = [h.format(next(iter(grid.methods))) for h in HEADER]
    if markdown:
        print("\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows(grid, results)]))
    else:
        table = Table(*header)
        for row in rows(grid, results):
            table.add_row(*row)
        Console().print(table)
    hours = sum(r["seconds"]["total"] for r in results) / 3600
    print(f"\n{len(results)} runs, {hours:.1f} hours of run time")
    if plot is not None:
        draw(grid, results, plot)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, help=__doc__)
    app.command()(run)
    app.command()(report)
    app()
