"""`tests/gpu.sh` on a CPU: that it works before somebody pays for a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import gpu

GIB = gpu.GIB


def test_the_script_makes_its_table(tmp_path: Path) -> None:
    """At sizes for a CPU, without the suite, whose cells the suite has."""
    command = ["bash", "tests/gpu.sh", "--tiny", "--only", "table", "--stages", "3", "--out", str(tmp_path)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["environment"]["versions"]["deepspeed"]
    rows = {row["contender"]: row for row in results["table"]}
    assert tuple(rows) == gpu.CONTENDERS
    plain, child = rows["plain"], rows["child p=0.1"]
    assert child["live bytes a parameter"] < plain["live bytes a parameter"]
    for row in (plain, child):
        assert row["losses"][-1] < row["losses"][0]
    for line in (tmp_path / "gpu.md").read_text().splitlines():
        assert line in done.stdout
        assert line.count("|") == 10


class Device:
    """What a contender takes on a card of so many layers."""

    def __init__(self, holds: int) -> None:
        self.holds = holds
        self.tried: list[int] = []

    def run(self, tries: int, first: int) -> int:
        """The largest that fitted."""
        search, best = gpu.Search(first), 0
        for _ in range(tries):
            if search.layers is None:
                break
            self.tried.append(search.layers)
            fits = search.layers <= self.holds
            best = max(best, search.layers * fits)
            search.learn(search.layers / self.holds, failed=not fits)
        return best


@pytest.mark.parametrize(("holds", "first"), [(100, 16), (100, 99), (7, 16), (1, 1), (33, 32)])
def test_the_search_comes_close(holds: int, first: int) -> None:
    device = Device(holds)
    assert device.run(tries=6, first=first) >= 0.8 * holds
    assert len(device.tried) == len(set(device.tried)), "a size was tried twice"


@pytest.mark.parametrize(
    ("results", "stages", "code"),
    [
        ({"suite": {"ended": True, "failed": [], "result": "5 passed"}}, 0, 0),
        ({"suite": {"ended": True, "failed": ["FAILED x"], "result": "1 failed, 4 passed"}}, 0, 1),
        ({"suite": {"ended": False, "failed": [], "result": "5 passed"}}, 0, 1),
        ({"suite": {"ended": True, "failed": [], "result": "no tests ran"}}, 0, 1),
        ({"table": [{"failed": "peft is not installed"}] * len(gpu.CONTENDERS)}, 1, 0),
        ({"table": [{"failed": "RuntimeError: x"}] * len(gpu.CONTENDERS)}, 1, 1),
        ({"table": []}, 1, 1),
    ],
)
def test_the_exit_code_says_whether_all_is_well(results: dict[str, Any], stages: int, code: int) -> None:
    assert gpu.exit_code(results, stages) == code


def test_what_outlasts_its_time_is_ended() -> None:
    text = gpu._bounded(["sh", "-c", "echo begun; exec sleep 600"], 1)
    assert text.startswith("begun")
    assert text.endswith(gpu._CUT)
