"""Pictures of children: a heat map over layers and kinds of module."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_childtune.child_files.compare import Overlap
from ds_childtune.child_files.reader import SavedChild
from ds_childtune.names import block_of, kind_of, number_of

_MOST_NUMBERS = 26
"""Layers of a picture whose cells have their numbers written in them."""


@dataclass(frozen=True)
class Cell:
    """A share of a parameter's elements: `part` of `whole`."""

    name: str
    part: int
    whole: int


@dataclass(frozen=True)
class HeatMap:
    """Shares over layers and kinds of module."""

    rows: tuple[str, ...]
    """Kinds of module, in the model's order."""
    columns: tuple[int, ...]
    """Numbers of layers."""
    shares: tuple[tuple[float, ...], ...]
    """By row and column; NaN where there is no such module."""
    outside: dict[str, float]
    """Of modules outside all layers."""

    @classmethod
    def of(cls, cells: Iterable[Cell]) -> HeatMap:
        """Weight and bias of a module are added up."""
        sums: dict[tuple[str, int | None], list[int]] = {}
        found = list(cells)
        stacks = {_stack(cell.name) for cell in found if block_of(cell.name)}
        for cell in found:
            key = _module(cell.name, short=len(stacks) == 1), number_of(cell.name)
            own = sums.setdefault(key, [0, 0])
            own[0] += cell.part
            own[1] += cell.whole
        shares = {key: part / whole for key, (part, whole) in sums.items() if whole}
        rows = tuple(dict.fromkeys(row for row, number in shares if number is not None))
        columns = tuple(sorted({number for _, number in shares if number is not None}))
        nan = float("nan")
        return cls(
            rows,
            columns,
            tuple(tuple(shares.get((row, column), nan) for column in columns) for row in rows),
            {row: share for (row, number), share in shares.items() if number is None},
        )


def density_cells(child: SavedChild) -> list[Cell]:
    """Of the parameters that the child's files have, the elements inside the child."""
    stored = [p for p in child.manifest.parameters if p.stored]
    return [Cell(p.name, child.kept(p.name), p.numel) for p in stored]


def overlap_cells(overlaps: Sequence[Overlap]) -> list[Cell]:
    """Of the elements inside either child, those inside both."""
    return [Cell(o.name, o.both, o.first + o.second - o.both) for o in overlaps]


def draw(heat: HeatMap, path: Path, title: str, colour: str) -> None:
    """Write the picture, in the format that the file's ending names.

    Args:
        colour: what a colour means, for the bar beside the picture.

    Raises:
        ValueError: when there are no layers, or for a file that cannot be written.
        RuntimeError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RuntimeError("--plot needs matplotlib. Remedy: pip install matplotlib.") from None
    if not heat.rows:
        raise ValueError(
            "--plot: expected parameters in repeated layers, got none. Remedy: leave it out; --parameters has a line for each."
        )
    width = max(7.0, 2.6 + 0.42 * len(heat.columns))
    title = textwrap.fill(title, int(8.5 * width))  # in one line two long paths would leave no room for the picture
    height = max(2.6, 1.5 + 0.36 * len(heat.rows)) + 0.2 * title.count("\n")
    figure: Any = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot(facecolor="0.93")
    finite = [share for row in heat.shares for share in row if share == share]
    most = max(finite) or 1.0
    image = axes.imshow(heat.shares, aspect="auto", cmap="viridis", vmin=0.0, vmax=most)
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.set_xlabel("layer")
    step = 1 if len(heat.columns) <= 40 else 4
    axes.set_xticks(range(0, len(heat.columns), step), heat.columns[::step])
    axes.set_yticks(range(len(heat.rows)), heat.rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    # Thin lines between cells.
    axes.set_xticks([x - 0.5 for x in range(1, len(heat.columns))], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(heat.rows))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="minor", length=0)
    if len(heat.columns) <= _MOST_NUMBERS:
        _write_numbers(axes, heat, most)
    bar = figure.colorbar(image, ax=axes, format=lambda share, _: f"{100 * share:.3g} %", pad=0.015)
    bar.set_label(colour)
    bar.outline.set_visible(False)
    if heat.outside:
        figure.text(0.01, -0.02, _outside(heat.outside), fontsize=8, color="0.35", va="top")
    try:
        figure.savefig(path, dpi=200, bbox_inches="tight")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--plot {path}: expected a picture's file that can be written, got: {str(error)[:200]}."
            " Remedy: name for example child.png in a folder that exists."
        ) from None


def _write_numbers(axes: Any, heat: HeatMap, most: float) -> None:
    for y, row in enumerate(heat.shares):
        for x, share in enumerate(row):
            if share == share:
                colour = "black" if share > 0.6 * most else "white"
                axes.text(x, y, _percent(share), ha="center", va="center", fontsize=7, color=colour)


def _percent(share: float) -> str:
    """A few characters."""
    percent = 100 * share
    if 0 < percent < 0.05:
        return "<.1"
    return f"{percent:.0f}" if percent >= 9.95 or percent == 0 else f"{percent:.1f}"


def _outside(shares: dict[str, float]) -> str:
    return "outside the layers: " + ", ".join(f"{name} {_percent(share)} %" for name, share in shares.items())


def _module(name: str, *, short: bool) -> str:
    """The kind of module: without weight or bias, and without the path to its layer where all layers are in one stack."""
    module = name.rpartition(".")[0] or name
    block = block_of(name)
    if block is None:
        return module
    inside = kind_of(module[len(block) + 1 :])
    return inside if short else f"{_stack(name)} {inside}".strip()


def _stack(name: str) -> str:
    """The path to the layers: "model.encoder.layers"."""
    return (block_of(name) or "").rpartition(".")[0]
