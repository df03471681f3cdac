"""Fixtures and the table that ends a run."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from tests.support.ranks import RankPool


def pytest_configure(config: pytest.Config) -> None:
    """The suite runs on CPU with gloo, on any machine; `DS_ACCELERATOR=cuda` runs it on what GPUs there are."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Oracles are tiny, and ranks run beside this process: threads that wait for one another would take their cores.
    torch.set_num_threads(1)
    # How long an example takes says more about the machine than about the code.
    hypothesis.settings.register_profile("suite", deadline=None)
    hypothesis.settings.load_profile("suite")


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Processes by world size: `pool[2].run(function, ...)`."""
    pool = RankPool()
    yield pool
    pool.close()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz-examples", type=int, default=200, help="damaged folders for each reader in tests/test_fuzz.py"
    )
    parser.addoption("--differences", action="store_true", help="end with the worst relative difference of every cell")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The worst relative difference to the oracle, cell by cell."""
    if not config.getoption("--differences"):
        return
    reports = [r for reports in terminalreporter.stats.values() for r in reports if isinstance(r, pytest.TestReport)]
    rows = [
        (r.nodeid.partition("::")[2], *r.user_properties) for r in reports if r.when == "call" and r.user_properties
    ]
    terminalreporter.section("worst relative differences")
    for name, *properties in rows:
        values = "  ".join(f"{key} {value:.1e}" for key, value in properties)
        terminalreporter.write_line(f"{name:<80} {values}")
