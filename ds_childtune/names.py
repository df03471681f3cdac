"""Names of parameters, taken apart: which repeated block, and which kind of parameter inside it."""

from __future__ import annotations

import re

_BLOCK = re.compile(r"((?:[^.]+\.)*?)(\d+)\.")


def block_of(name: str) -> str | None:
    """The path of the repeated block that a parameter lies in, "model.layers.3"; None outside of all."""
    found = _BLOCK.match(name)
    return f"{found[1]}{found[2]}" if found else None


def number_of(name: str) -> int | None:
    """The number of its block, 3; None outside of all."""
    found = _BLOCK.match(name)
    return int(found[2]) if found else None


def kind_of(name: str) -> str:
    """The name with every number replaced, so that blocks share it: "model.layers.*.mlp.up_proj.weight"."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
