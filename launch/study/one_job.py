"""One job of launch/study/study.py: its files, its options of launch/finetune.py, and the command that runs it."""

from __future__ import annotations

import itertools
import json
import os
import random
import socket
import sys
from pathlib import Path

from grid import ROOT, Binarise, Grid, Job, Options, domains_of, job_options


def file_of(file: Path, binarise: Binarise | None, scratch: Path, *, without: frozenset[str] = frozenset()) -> Path:
    """`file`, or a copy of it in `scratch` whose label is a class, less the rows that hold one of the texts `without`."""
    if binarise is None and not without:
        return file
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [row for row in rows if without.isdisjoint(v for v in row.values() if isinstance(v, str))]
    if binarise is not None:
        sure = [row for row in rows if not binarise.below < row["label"] < binarise.above]
        rows = [row | {"label": int(row["label"] >= binarise.above)} for row in sure]
    copy = scratch / f"{file.parent.name}-{file.name}"
    copy.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return copy


def flipped(file: Path, share: float, limit: int | None, seed: int, scratch: Path) -> tuple[Path, Path]:
    """Two files in `scratch`: `limit` rows of `file` of which a share has the other label, and those rows by themselves."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    draw = random.Random(seed)
    drawn = draw.sample(rows, min(limit or len(rows), len(rows)))
    wrong = set(draw.sample(range(len(drawn)), round(share * len(drawn))))
    drawn = [row | {"label": 1 - row["label"]} if i in wrong else row for i, row in enumerate(drawn)]
    made = scratch / "flipped-train.jsonl", scratch / "flipped-only.jsonl"
    for path, part in zip(made, (drawn, [drawn[i] for i in sorted(wrong)]), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in part))
    return made


def texts_of(file: Path, columns: str) -> frozenset[str]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return frozenset(row[column] for row in rows for column in columns.split(","))


def options_of(grid: Grid, job: Job, data: str, scratch: Path) -> Options:
    """launch/finetune.py's options for a job."""
    task, domains = grid.tasks[job.task], domains_of(grid, job)
    also: list[str] = []
    if data == "hub":
        where: Options = task.hub
    else:
        folder = Path(data) / (task.folder or job.task)
        names = {"train_file": "train.jsonl", "eval_file": "validation.jsonl"}
        where = {key: file_of(folder / name, task.binarise, scratch) for key, name in names.items()}
        # What was trained on is no test of another domain, wherever it is found again.
        seen = texts_of(folder / "train.jsonl", task.text_columns) if domains else frozenset()
        others = domains.items()
        also = [f"{name}={file_of(Path(data) / d.file, d.binarise, scratch, without=seen)}" for name, d in others]
    if task.flip is not None:
        where["train_file"], only = flipped(where["train_file"], task.flip, job.train_limit, job.seed, scratch)
        also.append(f"flipped={only}")
    own = {"seed": job.seed, "lr": job.lr, "train_limit": job.train_limit, "text_columns": task.text_columns}
    merged = job_options(grid, job) | where | own | {"also_eval": also}
    return {k: v.format(data=data) if isinstance(v, str) else v for k, v in merged.items() if v is not None}


def check_data(grid: Grid, data: str) -> str:
    """`data` as jobs, which run in another folder, can use it."""
    if data != "hub":
        return str(Path(data).resolve())
    for name, task in grid.tasks.items():
        if "data" not in task.hub:
            raise ValueError(
                f"--data hub: expected `hub: {{data: ...}}` for task {name!r}, got {task.hub}. Remedy: add it."
            )
        if task.binarise or task.also_eval or task.flip:
            raise ValueError(
                f"--data hub: expected a task without binarise, flip and also_eval, got {name!r}, which has them."
                " Remedy: save the splits as FOLDER/<task>/train.jsonl and validation.jsonl, and pass --data FOLDER."
            )
    return data


# Below the range from which a system gives ports to connections: one of those might take a port before the job listens on it.
PORTS = itertools.cycle(random.sample(range(15_000, 30_000), 15_000))


def free_port() -> int:
    """A port that nobody listens on, and that no other job of this study is given soon."""
    for port in PORTS:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("PORTS never ends")


# What the launcher would say to the only process of a job.
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


def environment_of(grid: Grid) -> dict[str, str]:
    """This process's, and what `launcher` says in capitals."""
    named = {k: str(v) for k, v in grid.launcher.items() if k.isupper()}
    alone = ALONE | {"MASTER_PORT": str(free_port())} if "none" in grid.launcher else {}
    return os.environ | named | alone


def command_of(grid: Grid, options: Options, results: Path, gpu: int | None = None) -> list[str]:
    """The job's command; with `none: true` under `launcher`, a process without the launcher."""
    launcher = {k: v for k, v in grid.launcher.items() if not k.isupper() and k != "none"}
    if gpu is not None:
        launcher = {k: v for k, v in launcher.items() if k != "num_gpus"} | {"include": f"localhost:{gpu}"}
    # By this interpreter, so that the study's own environment is the jobs' one.
    command = [sys.executable]
    if "none" not in grid.launcher:
        command += ["-m", "deepspeed.launcher.runner", "--master_port", str(free_port())]
    command += [f"--{k}={v}" for k, v in launcher.items()]
    command += [str(ROOT / "launch" / "finetune.py"), "--results", str(results)]
    for key, value in options.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            for one in value if isinstance(value, list) else [value]:
                command += [f"--{flag}", str(one)]
    return command
