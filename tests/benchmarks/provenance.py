"""What a figure was measured with, in the line above its table."""

from __future__ import annotations

import os
import subprocess
import time
from importlib.metadata import version
from pathlib import Path


def measured_with(*packages: str) -> str:
    """Versions of the packages, cores, commit and date."""
    head = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    versions = [f"{name} {version(name)}" for name in packages]
    return ", ".join([*versions, f"{os.cpu_count()} cores", f"commit {head.stdout.strip()}", time.strftime("%Y-%m-%d")])
