"""Fixtures, the choice of `--quick`, and the table that ends a run."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from tests.support.ranks import RankPool

SLOW = {"test_launch.py", "test_gpu_script.py", "test_crashes.py"}
"""Files whose tests start processes of their own."""

QUICK = (
    "test_bad_checkpoints.py::test_of_something_else",
    "test_before_folders.py::test_a_checkpoint_written_before_the_folders_loads",
    "test_bitwise.py::test_p_1_after_a_fisher_pass_is_plain_deepspeed[zero2-bf16",
    "test_bitwise.py::test_detached_is_plain_deepspeed[zero3",
    "test_bitwise.py::test_only_the_child_moves",
    "test_calibration.py::test_ranks_that_use_different_parameters",
    "test_calibration.py::test_squares_are_reduced_in_fp32",
    "test_calibration.py::test_an_exception_in_the_pass_s_backward",
    "test_callback.py::test_loggers_see_the_child",
    "test_callers.py::test_a_parameter_that_is_frozen_later",
    "test_checkpoint.py::test_a_resumed_run_is_the_uninterrupted_one[zero3-all-compact-bf16",
    "test_clip.py::test_the_child_s_norm_is_clipped",
    "test_compact.py::test_compact_is_bitwise_the_dense_hook_path[zero3-odd",
    "test_compact.py::test_compact_is_bitwise_the_dense_hook_path[zero2-llama",
    "test_compact.py::test_other_world_sizes",
    "test_elastic.py::test_frozen_weights_and_buffers_move_too",
    "test_elastic.py::test_weights_alone_are_really_loaded",
    "test_errors.py::test_wrong_order",
    "test_errors.py::test_what_select_is_given",
    "test_export.py::test_base_plus_child_is_the_tuned_model",
    "test_fisher.py::test_per_micro_batch",
    "test_fisher.py::test_per_global_batch",
    "test_held.py::test_a_child_of_what_the_optimizer_holds",
    "test_launch.py::test_shipped_configs_train",
    "test_layouts.py::test_a_layout_that_lies_is_refused",
    "test_lean.py::test_nothing_dense_is_held",
    "test_listed_optimizers.py::test_a_life_with_each_optimizer",
    "test_overflow.py::test_a_skipped_step_does_not_count",
    "test_parity.py::test_weights_equal_the_oracle[D-gpt2-zero2",
    "test_parity.py::test_weights_equal_the_oracle[F-llama-zero3",
    "test_parity.py::test_ties_are_cut_at_exactly_the_same_elements",
    "test_remedies.py::test_saving",
    "test_reselect.py::test_a_selection_that_fails_half_way_changes_nothing",
    "test_seams.py::test_engines_have_what_is_read",
)
"""Of `--quick`: tests on ranks, at least one of each area. What follows `[` begins a cell's name; the first cell that fits runs."""


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
    parser.addoption("--quick", action="store_true", help="a minute's part of the suite, for work between commits")
    parser.addoption("--differences", action="store_true", help="end with the worst relative difference of every cell")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`--quick`: what needs no ranks and no other process, and the first cell of each test in `QUICK`.

    Raises:
        pytest.UsageError: when a test of `QUICK` is not there, as after a rename.
    """
    if not config.getoption("--quick"):
        return
    kept, left = [], set(QUICK)
    for item in items:
        wanted = {
            name for name in left if item.nodeid.startswith((f"tests/{name}-", f"tests/{name}[", f"tests/{name}]"))
        }
        wanted |= {name for name in left if item.nodeid == f"tests/{name}"}
        left -= wanted
        pure = "pool" not in getattr(item, "fixturenames", ()) and item.path.name not in SLOW
        if wanted or pure:
            kept.append(item)
    if left and len(config.args) == 1 and config.args[0] == "tests":
        raise pytest.UsageError(f"conftest.QUICK: no test is called {', '.join(sorted(left))}")
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


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
