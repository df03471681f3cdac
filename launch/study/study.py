"""Does the child generalise better? Tasks x methods x seeds, each a `deepspeed` job of launch/finetune.py, then a table.

    python launch/study/study.py run launch/study/glue.yaml --data GLUE_FOLDER --results docs/evidence/glue.jsonl --jobs 2
    python launch/study/study.py report launch/study/glue.yaml docs/evidence/glue.jsonl --plot docs/evidence/glue.png

Likewise low_resource.yaml and transfer.yaml, each into its own file; ablations.yaml into that of
transfer.yaml, whose runs it shares; bert_large.yaml is the paper's own table, for those who have GPUs.

`run` may be stopped at any time and started again: every finished job is one JSON line in the results file, and jobs
that have a line are skipped, or refused where they were run with other settings. For every task and method it first tunes
the learning rate on the tuning seed; the seeds that are reported never see that choice being made (the development set does).
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated, Any

import curves
import regime
import together as part_c
import typer
import verdicts
from grid import (
    ROOT,
    Grid,
    Job,
    Options,
    data_of,
    job_of,
    line_of,
    read_grid,
    read_results,
    reported_jobs,
    settings_of,
    tuned_as,
    tuning_jobs,
)
from one_job import check_data, command_of, environment_of, options_of
from report import HEADER, TUNING_HEADER, draw, rows, tuning_rows
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

MAX_FAILURES = 3
"""Failed jobs until no further one is started: the next are likely to fail, too."""

# ---------------------------------------------------------------- all jobs


@dataclass
class Runner:
    """Runs jobs side by side and adds their lines to the results file."""

    grid: Grid
    data: str
    results: Path
    jobs: int
    gpus: int = 0
    """GPUs that jobs take turns on; 0: every job's launcher finds its own device."""
    failures: list[str] = field(default_factory=list)
    _lock: Any = field(default_factory=threading.Lock)
    _stop: threading.Event = field(default_factory=threading.Event)
    _groups: set[int] = field(default_factory=set)
    """Process groups of jobs that are running."""
    _free: SimpleQueue[int | None] = field(default_factory=SimpleQueue)
    _warnings: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        for i in range(self.jobs):
            self._free.put(i % self.gpus if self.gpus else None)

    def run(self, jobs: Sequence[Job], bar: Any) -> None:
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                list(pool.map(lambda job: self._one(job, bar), jobs))
            except BaseException:
                # Whatever ends the study ends its jobs: one that went on would be run again beside itself.
                self._stop.set()
                self._kill()
                raise

    def _kill(self) -> None:
        with self._lock:
            for group in self._groups:
                with suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)

    def _one(self, job: Job, bar: Any) -> None:
        if self._stop.is_set():
            return
        gpu = self._free.get()
        try:
            line = self._job(job, gpu, bar)
        except (RuntimeError, OSError, ValueError) as error:
            with self._lock:
                if not self._stop.is_set():
                    self.failures.append(f"{job}: {error}")
                    bar.write(self.failures[-1], file=sys.stderr)
                if len(self.failures) >= MAX_FAILURES:
                    self._stop.set()
            return
        finally:
            self._free.put(gpu)
        with self._lock:
            self._append(json.dumps(line))
            bar.set_postfix_str(f"{job.task} {job.method} seed {job.seed} lr {job.lr:g}", refresh=False)
            bar.update()

    def _job(self, job: Job, gpu: int | None, bar: Any) -> Options:
        environment = environment_of(self.grid)
        with tempfile.TemporaryDirectory() as folder:
            if self.data != "hub":
                # Every job would leave its tokenised rows behind, and none would find those of another.
                environment = environment | {"HF_DATASETS_CACHE": folder}
            result = Path(folder) / "result.jsonl"
            command = command_of(self.grid, options_of(self.grid, job, self.data, Path(folder)), result, gpu)
            with self._lock:
                if self._stop.is_set():
                    raise RuntimeError("the study was stopped")
                process = subprocess.Popen(
                    command,
                    env=environment,
                    cwd=ROOT,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    start_new_session=True,
                )
                self._groups.add(process.pid)
            output = "".join(self._heard(process.stdout, bar))
            process.wait()
            with self._lock:
                self._groups.discard(process.pid)
            if process.returncode or not result.exists():
                raise RuntimeError(f"{shlex.join(command)}\nended with {process.returncode}:\n{output[-4000:]}")
            found = json.loads(result.read_text())
        settings, data = settings_of(self.grid, job), data_of(self.grid, job, self.data)
        return line_of(job, found, settings, data, time.strftime("%Y-%m-%d"))

    def _heard(self, output: Iterable[str], bar: Any) -> Iterator[str]:
        """`output`, with its warnings said as they come, each once: a job takes minutes, and a study hours."""
        for line in output:
            if line.startswith("WARNING:") and line not in self._warnings:
                self._warnings.add(line)
                bar.write(line.rstrip(), file=sys.stderr)
            yield line

    def _append(self, line: str) -> None:
        """In one write, so that a crash leaves whole lines; on a new line, whatever a crash has left before it."""
        torn = self.results.exists() and not self.results.read_text().endswith("\n") and self.results.stat().st_size
        with self.results.open("a") as file:
            file.write(("\n" if torn else "") + line + "\n")
            file.flush()
            os.fsync(file.fileno())


# ---------------------------------------------------------------- the command line


@dataclass(frozen=True)
class Chosen:
    """The part of a grid that is run."""

    methods: frozenset[str]
    seeds: frozenset[int]

    @classmethod
    def of(cls, grid: Grid, methods: str | None, seeds: str | None) -> Chosen:
        """
        Raises:
            ValueError: for a method or seed that the grid does not have.
        """
        named = frozenset(grid.methods if methods is None else (m.strip() for m in methods.split(",")))
        numbers = frozenset(grid.seeds if seeds is None else map(int, seeds.split(",")))
        if unknown := [*named - set(grid.methods), *map(str, numbers - set(grid.seeds))]:
            raise ValueError(
                f"expected methods among {list(grid.methods)} and seeds among {grid.seeds}, got {', '.join(sorted(unknown))}."
                " Remedy: name them as the grid does."
            )
        return cls(named, numbers)

    def __contains__(self, job: Job) -> bool:
        return job.method in self.methods and job.seed in self.seeds

    def tunes(self, grid: Grid, job: Job) -> bool:
        """Whether a tuning job is needed for one of the methods."""
        return job.method in {tuned_as(grid, method) for method in self.methods}


def run(
    grid_file: Annotated[Path, typer.Argument(help="YAML file of the grid.")],
    data: Annotated[str, typer.Option(help="Folder of the tasks' files, or hub.")],
    results: Annotated[Path, typer.Option(help="JSON lines; added to.")],
    jobs: Annotated[int, typer.Option(help="Jobs side by side.")] = 1,
    gpus: Annotated[int, typer.Option(help="GPUs of this machine that jobs of one GPU take turns on.")] = 0,
    methods: Annotated[str | None, typer.Option(help="Only these, with commas between them.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Only these, likewise.")] = None,
) -> None:
    """Run what is not in the results file yet."""
    grid = read_grid(grid_file)
    chosen = Chosen.of(grid, methods, seeds)
    data = check_data(grid, data)
    results.parent.mkdir(parents=True, exist_ok=True)
    cells = list(itertools.product(grid.tasks, grid.train_limits))
    tuning = [job for cell in cells for job in tuning_jobs(grid, *cell) if chosen.tunes(grid, job)]
    finished = read_results(results, grid)
    for result in finished:
        theirs, ours = result["data"], data_of(grid, job_of(result), data)
        if theirs != ours:
            raise ValueError(
                f"{results}: expected results on the data of --data, got {job_of(result)} on {theirs}, here {ours}."
                " Remedy: another --results file, or the data that it belongs to."
            )
    total = len(tuning) + len(cells) * len(chosen.seeds) * len(chosen.methods)
    done = {job_of(r) for r in finished}
    wanted = set(tuning) | {job for cell in cells for job in reported_jobs(grid, *cell, finished) if job in chosen}
    # What was finished before says nothing of how fast this machine is.
    bar = tqdm(total=total, initial=len(done & wanted), desc="Study", unit=" jobs", smoothing=0)
    runner = Runner(grid, data, results, jobs, gpus)
    # As Ctrl-C does: each job has its own session, so that only this ends it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # Seed by seed over all cells: a study that is stopped early has a table, of fewer seeds.
    runner.run([job for job in tuning if job not in done], bar)
    tuned = read_results(results, grid)
    report_jobs = sorted((job for cell in cells for job in reported_jobs(grid, *cell, tuned)), key=lambda job: job.seed)
    runner.run([job for job in report_jobs if job in chosen and job not in done], bar)
    bar.close()
    if runner.failures:
        print(
            f"{len(runner.failures)} jobs failed, see above; the same command runs them again"
            + (", and those that were not started." if len(runner.failures) >= MAX_FAILURES else "."),
            file=sys.stderr,
        )
        raise typer.Exit(1)


def report(
    grid_file: Annotated[Path, typer.Argument(help="YAML file of the grid.")],
    results_file: Annotated[Path, typer.Argument(help="Its results.")],
    plot: Annotated[Path | None, typer.Option(help="PNG to draw.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table in Markdown.")] = False,
) -> None:
    """Print the table, and draw the plot."""
    grid = read_grid(grid_file)
    results = read_results(results_file, grid)
    header = [h.format(grid.compared_with) for h in HEADER]
    if markdown:
        _print_markdown([header, *rows(grid, results)])
    else:
        table = Table(*header)
        for row in rows(grid, results):
            table.add_row(*row)
        console = Console()
        # A pipe has no width: do not squeeze the table into 80 columns.
        console.print(table, width=None if console.is_terminal else 160, crop=False)
    print(f"\n{_hours(results)}")
    if plot is not None:
        draw(grid, results, plot)


RowsOf = Callable[[Grid, Sequence[Options]], list[list[str]]]


def spread(
    grid_file: Annotated[
        Path, typer.Argument(help="YAML file of the grid: regime.yaml, regime_cola.yaml or flipped.yaml.")
    ],
    results_file: Annotated[Path, typer.Argument(help="Its results.")],
) -> None:
    """Print part B's table in Markdown: mean, spread and failed runs beside vanilla fine-tuning."""
    _print_table(grid_file, results_file, lambda *of: [regime.HEADER, *regime.rows(*of)])


def together(
    grid_file: Annotated[Path, typer.Argument(help="YAML file of the grid, together.yaml.")],
    results_file: Annotated[Path, typer.Argument(help="Its results.")],
) -> None:
    """Print part C's table in Markdown: each technique by itself, and with a child."""
    _print_table(grid_file, results_file, lambda *of: [part_c.HEADER, *part_c.rows(*of)])


def learning(
    grid_file: Annotated[Path, typer.Argument(help="YAML file of the grid, lm_instruct.yaml.")],
    results_file: Annotated[Path, typer.Argument(help="Its results.")],
) -> None:
    """Print part 0's table in Markdown: what each arm learnt, and its bytes."""
    _print_table(grid_file, results_file, lambda grid, results: curves.learning(grid, curves.runs_of(grid, results)))


def tuning(
    grid_file: Annotated[Path, typer.Argument(help="YAML file of the grid.")],
    results_file: Annotated[Path, typer.Argument(help="Its results.")],
) -> None:
    """Print in Markdown the scores that learning rates are chosen by."""
    grid = read_grid(grid_file)
    _print_markdown([TUNING_HEADER, *tuning_rows(grid, read_results(results_file, grid))])


def _print_table(grid_file: Path, results_file: Path, rows_: RowsOf) -> None:
    grid = read_grid(grid_file)
    results = read_results(results_file, grid)
    _print_markdown(rows_(grid, results))
    print(f"\n{_hours(results)}")


def _print_markdown(rows_: list[list[str]]) -> None:
    print("\n".join(f"| {' | '.join(row)} |" for row in [rows_[0], ["---"] * len(rows_[0]), *rows_[1:]]))


def _hours(results: Sequence[Options]) -> str:
    hours = sum(r["seconds"]["total"] for r in results) / 3600
    return f"{len(results)} runs, {hours:.1f} hours of run time"


def forgetting(
    grid_file: Annotated[Path, typer.Argument(help="YAML file of the grid, lm.yaml.")],
    results_file: Annotated[Path, typer.Argument(help="Its results.")],
    plot: Annotated[Path | None, typer.Option(help="PNG to draw.")] = None,
) -> None:
    """Print the second study's tables in Markdown, and which of its claims are refuted."""
    grid = read_grid(grid_file)
    results = read_results(results_file, grid)
    runs = curves.runs_of(grid, results)
    for rows_ in (curves.table(grid, runs), verdicts.contrasts(runs), verdicts.secondary(runs)):
        _print_markdown(rows_)
        print()
    print("\n".join(f"- {line}" for line in verdicts.verdicts(runs)))
    print(f"\n{_hours(results)}")
    if plot is not None:
        curves.draw(grid, runs, plot)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, help=__doc__)
    app.command()(run)
    app.command()(report)
    app.command()(forgetting)
    app.command()(learning)
    app.command()(spread)
    app.command()(together)
    app.command()(tuning)
    app()
