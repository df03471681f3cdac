"""The versions that this package works with, checked as it is imported: pip does so only when it installs.

`ds_childtune/__init__.py` imports this file before any that imports DeepSpeed, so that this error is the first one.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

SUPPORTED = {"deepspeed": ">=0.19.8,<0.20", "torch": ">=2.9"}
"""As pyproject.toml has them. See docs/support.md for what was run."""


def check_versions() -> None:
    """Raise ImportError for another version of one of `SUPPORTED`. What is not installed fails where it is imported."""
    for package, wanted in SUPPORTED.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            continue
        if not allows(wanted, found):
            raise ImportError(
                f'ds_childtune: expected {package}{wanted}, got {found}. Remedy: pip install "{package}{wanted}".'
            )


def allows(wanted: str, found: str) -> bool:
    """Whether a version is in a range of the form ">=A,<B"."""
    for bound in wanted.split(","):
        least = bound.startswith(">=")
        limit = _release(bound.lstrip("<>="))
        if (_release(found) >= limit) != least:
            return False
    return True


def _release(text: str) -> tuple[int, int, int]:
    """ "2.13.0+cpu" and "0.19.8rc1" without what follows the numbers."""
    numbers = [int(n) for n in re.findall(r"\d+", re.match(r"[\d.]*", text)[0])]  # type: ignore[index]
    first, second, third = (*numbers, 0, 0, 0)[:3]
    return first, second, third


check_versions()
