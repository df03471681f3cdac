"""The `"child_tuning"` blocks of most tests."""

from __future__ import annotations

from typing import Any

P = 0.3

F = {"mode": "ChildTuning-F", "reserve_p": P, "seed": 5}

D = {"mode": "ChildTuning-D", "reserve_p": P}

COMPACT = {**D, "optimizer_state": "compact"}

BLOCKS: dict[str, dict[str, Any]] = {"F": F, "D": D, "D-compact": COMPACT}
