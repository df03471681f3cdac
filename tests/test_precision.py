"""bf16 on CPUs that have no instructions for it: said, with a remedy, and not chosen by the demo."""

from __future__ import annotations

import importlib
import platform
import sys
from pathlib import Path

import pytest

from tests.support.finetune_jobs import ROOT

sys.path.insert(0, str(ROOT / "launch"))
import demo_lm  # noqa: E402
import finetune  # noqa: E402
import precision  # noqa: E402

CPUINFO = Path("/proc/cpuinfo")


@pytest.mark.skipif(platform.machine() != "x86_64" or not CPUINFO.exists(), reason="reads the flags of an x86 CPU")
def test_it_is_what_the_cpu_says() -> None:
    flags = next(line for line in CPUINFO.read_text().splitlines() if line.startswith("flags")).split()
    wide = {"avx512bw", "avx512vl", "avx512dq"} <= set(flags)
    assert precision.quick_in_bf16() == (wide or "avx_ne_convert" in flags)


@pytest.mark.parametrize(("wanted", "warns"), [("bf16", True), ("fp32", False), ("auto", False)])
def test_a_run_says_so_and_its_remedy_helps(
    wanted: str, warns: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(precision, "quick_in_bf16", lambda: False)
    args = finetune.Arguments(ds_config=ROOT / "ds_configs" / "zero2_child_d.json", precision=wanted)  # type: ignore[arg-type]
    precision.warn_of_slow_bf16(finetune.read_ds_config(args), "--precision fp32.")
    assert ("Remedy: --precision fp32." in capsys.readouterr().out) == warns


@pytest.mark.parametrize("quick", [True, False])
def test_the_demo_takes_what_is_quick(quick: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(precision, "quick_in_bf16", lambda: quick)
    try:
        args = importlib.reload(demo_lm).arguments_of("child", tmp_path, 1)
    finally:
        monkeypatch.undo()
        importlib.reload(demo_lm)
    assert finetune.read_ds_config(args)["bf16"]["enabled"] == quick
