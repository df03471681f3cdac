"""A small study whose jobs are stubs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "launch" / "study"))

import grid as study_grid  # noqa: E402
import one_job  # noqa: E402
import regime as study_regime  # noqa: E402
import report as study_report  # noqa: E402
import study  # noqa: E402
import together as study_together  # noqa: E402

__all__ = ["one_job", "study", "study_grid", "study_regime", "study_report", "study_together"]

SENTENCES = {"metric": "accuracy", "text_columns": "a,b", "hub": {"data": "somebody/pairs"}}

GRID: dict[str, Any] = {
    "finetune": {"model": "m", "ds_config": "ds_configs/zero1_child_d.json", "epochs": 3},
    "launcher": {"num_gpus": 1, "OMP_NUM_THREADS": 1},
    "tasks": {"t": SENTENCES},
    "methods": {"vanilla": {"method": "plain"}, "D": {"method": "ChildTuning-D", "reserve_p": {"t": 0.3}}},
    "tuning": {"seed": 0, "lr": [1e-4, 2e-4]},
    "seeds": [1, 2, 3],
}


def grid(**changes: Any) -> study_grid.Grid:
    return study_grid.Grid.model_validate(GRID | changes)


def found(score: float) -> dict[str, Any]:
    """As launch/finetune.py writes it, as far as the study reads it."""
    config = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": False}, "child_tuning": {"reserve_p": 0.3}}
    result = dict.fromkeys(("also", "train_loss", "density", "steps", "train_examples", "eval_examples", "world_size"))
    return result | {
        "metrics": {"accuracy": score},
        "seconds": {"total": 1.0},
        "ds_config": config,
        "device": "cpu",
        "versions": {"torch": "2"},
    }


STUB = """
import json, os, sys, time
seed = {seed}
print("WARNING: too slow here")
if seed == 2:
    sys.exit("no luck")
if seed == {endless}:
    open({pid!r}, "w").write(str(os.getpid()))
    time.sleep(600)
open({out!r}, "w").write(json.dumps({result!r}))
"""

STUDY = """
import json, sys
sys.path[:0] = [{tests!r}, {root!r}]
from pathlib import Path
from tests.support import study_jobs as t
t.stub_jobs(endless={endless}, pid={pid!r})
t.study.read_grid = lambda _: t.grid()
t.study.run(Path("g"), {data!r}, Path({results!r}), jobs=2)
"""


def stub_jobs(endless: int, pid: str) -> None:
    """Jobs of seed 2 fail, and those of seed `endless` go on until they are killed."""

    def command_of(_: Any, options: dict[str, Any], out: Path, gpu: int | None = None) -> list[str]:
        text = STUB.format(seed=options["seed"], endless=endless, pid=pid, out=str(out), result=found(options["lr"]))
        return [sys.executable, "-c", text]

    study.command_of = command_of  # type: ignore[assignment]
