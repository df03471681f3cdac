"""What `pip install` gets: every folder of the package, and the mark that it is typed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_wheel_has_every_module(tmp_path: Path) -> None:
    """Built without a network, from a copy, as setuptools leaves folders beside what it builds."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "ds_childtune", source / "ds_childtune", ignore=shutil.ignore_patterns("__pycache__"))
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    found = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("ds_childtune/")}
    folders = {name.split("/")[1] for name in found if name.count("/") == 2}
    assert folders == {"selection", "child", "zero", "checkpoint", "child_files", "planning", "commands"}
    modules = {str(path.relative_to(ROOT)) for path in ROOT.glob("ds_childtune/**/*.py")}
    assert found == modules | {"ds_childtune/py.typed"}
