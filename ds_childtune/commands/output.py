"""How commands print: tables and lines for a person, one json object for a program."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

AsJson = Annotated[bool, typer.Option("--json", help="Print one json object.")]


def show(what: Table | str) -> None:
    # A pipe has no width: cut nothing.
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(what, soft_wrap=isinstance(what, str), markup=False)


def show_json(what: Any) -> None:
    print(json.dumps(what, indent=2))


def facts_table(facts: dict[str, str]) -> Table:
    """Two columns, without a header."""
    table = Table("", "", show_header=False)
    for name, value in facts.items():
        table.add_row(name, value)
    return table


def size(count: float) -> str:
    """Bytes for a reader."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"
