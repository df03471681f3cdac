"""Fixtures, the choice of tests, and the table that ends a run."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from tests.build_ops import remove_abandoned_locks
from tests.support.choice import MORE, QUICK
from tests.support.ranks import RankPool

SLOW = {"test_launch.py", "test_gpu_script.py", "test_crashes.py"}
"""Files whose tests start processes of their own."""


def pytest_configure(config: pytest.Config) -> None:
    """The suite runs on CPU with gloo, on any machine; `DS_ACCELERATOR=cuda` runs it on what GPUs there are."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    _stay_on_own_cores()
    if "PYTEST_XDIST_WORKER" not in os.environ:
        remove_abandoned_locks()
    # Oracles are tiny, and ranks run beside this process: threads that wait for one another would take their cores.
    torch.set_num_threads(1)
    # How long an example takes says more about the machine than about the code.
    hypothesis.settings.register_profile("suite", deadline=None)
    hypothesis.settings.load_profile("suite")


def _stay_on_own_cores() -> None:
    """With `-n`, a worker and its ranks share some cores, and no other worker uses those.

    Ranks take turns more than they run side by side: on one core two of them are as fast as on two, as no core has to wake another.
    """
    worker, workers = os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if worker is None or not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[int(worker.removeprefix("gw")) % len(cores) :: workers])


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
    parser.addoption("--quick", action="store_true", help="a minute's part of the suite, for work between commits")
    parser.addoption("--all", action="store_true", help="also the cells that combine what others have (choice.MORE)")
    parser.addoption("--differences", action="store_true", help="end with the worst relative difference of every cell")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`--quick`: what needs no ranks and no other process, and the first cell of each test in `QUICK`. Without `--all`: not `MORE`.

    Raises:
        pytest.UsageError: when a test of `QUICK` or `MORE` is not there, as after a rename.
    """
    names = {item: item.nodeid.removeprefix("tests/") for item in items}
    everything = len(config.args) == 1 and config.args[0] == "tests"
    missing: set[str] = set()
    if config.getoption("--quick"):
        kept, missing = _quick(names)
    else:
        named = any("::" in argument for argument in config.args)
        kept = [item for item in items if config.getoption("--all") or named or names[item] not in MORE]
        missing = set(MORE) - set(names.values())
    if missing and everything:
        raise pytest.UsageError(f"tests/support/choice.py: no test is called {', '.join(sorted(missing))}")
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _quick(names: dict[pytest.Item, str]) -> tuple[list[pytest.Item], set[str]]:
    """The tests of `--quick`, and those of `QUICK` that are not there."""
    kept, left = [], set(QUICK)
    for item, name in names.items():
        wanted = {q for q in left if name == q or name.startswith((f"{q}-", f"{q}[", f"{q}]"))}
        left -= wanted
        pure = "pool" not in getattr(item, "fixturenames", ()) and item.path.name not in SLOW
        if wanted or pure:
            kept.append(item)
    return kept, left


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
