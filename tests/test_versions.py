"""The versions that are supported: one range, in pyproject.toml, in the package and on the page; and what another one says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from ds_childtune import _versions
from ds_childtune._versions import SUPPORTED, allows, check_versions
from tests.versions import SETS

ROOT = Path(__file__).parents[1]


def test_one_range() -> None:
    required = re.findall(r'^    "([\w-]+)([<>=][^"]*)",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert SUPPORTED.items() <= dict(required).items()
    page = (ROOT / "docs" / "support.md").read_text()
    for package, wanted in SUPPORTED.items():
        assert f"| {package} | `{wanted}` |" in page
    for name in SETS:
        assert f"| {name} |" in page, "what the set printed is not on the page"


@pytest.mark.parametrize(
    ("wanted", "found", "allowed"),
    [
        (">=0.19.8,<0.20", "0.19.8", True),
        (">=0.19.8,<0.20", "0.19.8+cpu", True),
        (">=0.19.8,<0.20", "0.19.7", False),
        (">=0.19.8,<0.20", "0.20.0", False),
        (">=0.19.8,<0.20", "0.9.5", False),
        (">=2.9", "2.13.0+cpu", True),
        (">=2.9", "2.8.0", False),
        (">=2.9", "2.9.0a0+git1", True),
    ],
)
def test_ranges(wanted: str, found: str, allowed: bool) -> None:
    assert allows(wanted, found) == allowed


def test_another_version_is_an_error_that_names_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_versions, "version", {"deepspeed": "0.18.9", "torch": "2.13.0"}.__getitem__)
    with pytest.raises(ImportError, match=r"expected deepspeed>=0.19.8,<0.20, got 0.18.9. Remedy: pip install"):
        check_versions()
    monkeypatch.setattr(_versions, "version", metadata.version)
    check_versions()


def test_it_is_said_before_deepspeed_is_imported(tmp_path: Path) -> None:
    """Of a package that only says that it is an old DeepSpeed."""
    info = tmp_path / "deepspeed-0.18.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.18.9\n")
    (tmp_path / "deepspeed.py").write_text("raise SystemExit('imported')")
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    ended = subprocess.run(
        [sys.executable, "-c", "import ds_childtune"], env=env, text=True, capture_output=True, check=False
    )
    assert "ImportError: ds_childtune: expected deepspeed>=0.19.8,<0.20, got 0.18.9" in ended.stderr
