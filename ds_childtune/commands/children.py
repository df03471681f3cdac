"""Commands for children that were written."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from ds_childtune.checkpoint.extract import export_checkpoint
from ds_childtune.checkpoint.given import locate_child
from ds_childtune.child_files.apply import Conflicts
from ds_childtune.child_files.compare import Overlap, by_layer, compare, total
from ds_childtune.child_files.convert import to_sglang, to_vllm
from ds_childtune.child_files.export_info import KIND, ExportInfo
from ds_childtune.child_files.merge import compose, merge
from ds_childtune.child_files.reader import SavedChild, open_child
from ds_childtune.commands.output import AsJson, facts_table, show, show_json
from ds_childtune.commands.plots import HeatMap, density_cells, draw, overlap_cells
from ds_childtune.planning.model import build_without_weights

Folder = Annotated[Path, typer.Argument(help="A child's folder.", show_default=False)]
Folders = Annotated[
    list[Path], typer.Argument(help="Children's folders, in the order of application.", show_default=False)
]
Base = Annotated[
    str, typer.Argument(help="The base model: a folder in transformers' format, or a hub name.", show_default=False)
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", show_default=False)]
OnConflict = Annotated[
    Conflicts, typer.Option(help="Where children disagree about an element: refuse, or let the last one win.")
]
Plot = Annotated[
    Path | None, typer.Option(help="Write a heat map over layers and kinds of module: a .png, .pdf or .svg file.")
]
Lines = Annotated[bool, typer.Option(help="A line for each parameter.")]


def inspect_command(
    child: Annotated[Path, typer.Argument(help="Folder of an export, or of a checkpoint.", show_default=False)],
    parameters: Lines = False,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Check a child's files, and print what is in them."""
    opened = open_child(locate_child(child, "inspect"))
    if plot is not None:
        p = opened.manifest.config.get("reserve_p")
        title = "Where the child is" if p is None else f"Where the child is (reserve_p {p:g})"
        draw(HeatMap.of(density_cells(opened)), plot, title, "share of the elements that train")
    if as_json:
        show_json(child_json(opened))
        return
    show(facts_table(_facts(opened)))
    if parameters:
        show(_parameter_table(opened))


def child_json(child: SavedChild) -> dict[str, Any]:
    manifest = child.manifest
    info = ExportInfo.of(manifest, child.folder) if manifest.kind == KIND else None
    return {
        "kind": manifest.kind,
        "version": manifest.version,
        "library": manifest.library,
        "config": manifest.config,
        "files": len(manifest.files),
        "bytes": sum(file.bytes for file in manifest.files),
        "model": None if info is None else info.model_class,
        "steps": None if info is None else info.step,
        "parameters": [
            {
                "name": p.name,
                "shape": list(p.shape),
                "dtype": p.dtype,
                "stored": child.kept(p.name) if p.stored else 0,
            }
            for p in manifest.parameters
        ],
    }


def _facts(child: SavedChild) -> dict[str, str]:
    manifest = child.manifest
    numel = sum(p.numel for p in manifest.parameters)
    kept = sum(child.kept(name) for name in child.stored)
    size = sum(file.bytes for file in manifest.files)
    facts = {
        "kind": f"{manifest.kind}, format version {manifest.version}, by ds_childtune {manifest.library}",
        "config": ", ".join(f"{k} {v}" for k, v in manifest.config.items() if k in ("mode", "reserve_p", "selector")),
        "elements": f"{kept:,} stored of {numel:,} ({kept / max(numel, 1):.1%}) in {len(child.stored)} parameters",
        "files": f"{len(manifest.files)}, {size:,} bytes, checksums are right",
    }
    if manifest.kind == KIND:
        info = ExportInfo.of(manifest, child.folder)
        facts |= {"model": info.model_class, "trained": f"{info.step} steps"}
    return facts


def merge_command(
    base: Base, children: Folders, output: Output, conflicts: OnConflict = "refuse", as_json: AsJson = False
) -> None:
    """Apply children to a saved base model, and write the whole model, as transformers loads it."""
    _quiet()
    merge(base, children, output, conflicts)
    _written(output, children, f"the base model with {', '.join(str(child) for child in children)}", as_json)


def compose_command(
    base: Base, children: Folders, output: Output, conflicts: OnConflict = "refuse", as_json: AsJson = False
) -> None:
    """Write one child that does what several of them do."""
    _quiet()
    compose(base, children, output, conflicts)
    _written(output, children, f"one child out of {', '.join(str(child) for child in children)}", as_json)


def _written(output: Path, children: list[Path], what: str, as_json: bool) -> None:
    if as_json:
        show_json({"output": str(output), "children": [str(child) for child in children]})
    else:
        show(f"{output}: {what}")


def compare_command(
    first: Folder, second: Folder, parameters: Lines = False, plot: Plot = None, as_json: AsJson = False
) -> None:
    """Print what two children have in common, layer by layer."""
    one, other = (open_child(locate_child(path, "compare")) for path in (first, second))
    overlaps = compare(one, other)
    if plot is not None:
        title = f"What {first} and {second} have in common"
        draw(HeatMap.of(overlap_cells(overlaps)), plot, title, "in both, of the elements in either")
    rows = overlaps if parameters else by_layer(overlaps)
    everything = total("total", overlaps)
    if as_json:
        show_json({"rows": [_overlap_json(row) for row in rows], "total": _overlap_json(everything)})
        return
    table = Table("")
    for column in ("elements", "first", "second", "both", "by chance", "jaccard", "same value"):
        table.add_column(column, justify="right")
    for row in (*rows, everything):
        table.add_row(row.name, *_cells(row))
    show(table)


def export_command(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder, or a tag's.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    base: Annotated[str, typer.Option(help="The base model: folder, hub name or config.json.", show_default=False)],
    model_class: Annotated[str | None, typer.Option(help="Class of transformers that was trained.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write the child of a checkpoint, as child.export does. Checkpoints are unpickled: use those that you trust."""
    manifest = export_checkpoint(checkpoint, output, build_without_weights(base, model_class))
    bytes_ = sum(file.bytes for file in manifest.files)
    if as_json:
        show_json({"output": str(output), "bytes": bytes_, "steps": manifest.extra["step"]})
    else:
        show(f"{output}: the child of {checkpoint}, {bytes_:,} bytes")


def convert_command(
    child: Folder,
    output: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    to: Annotated[Literal["vllm", "sglang"], typer.Option(help="The server that reads it.", show_default=False)],
    base: Annotated[Path | None, typer.Option(help="sglang: the base model's folder.", show_default=False)] = None,
    since: Annotated[
        Path | None, typer.Option(help="An earlier export: write only what changed.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write an exported child as an inference server takes it: patches for vLLM, the next version's folder for SGLang and slime."""
    if (base is None) == (to == "sglang"):
        need = "its base model's folder" if to == "sglang" else "no base model"
        raise ValueError(
            f"convert: --to {to} expects {need}. Remedy: {'pass' if to == 'sglang' else 'leave out'} --base."
        )
    written = to_vllm(child, output, since=since) if base is None else to_sglang(child, base, output, since=since)
    bytes_ = sum(p.stat().st_size for p in _files(written))
    if as_json:
        show_json({"output": str(written), "to": to, "bytes": bytes_})
    else:
        show(f"{written}: {child} for {to}, {bytes_:,} bytes")


def _files(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else [path]


def _overlap_json(row: Overlap) -> dict[str, Any]:
    return asdict(row) | {"jaccard": row.jaccard, "by_chance": row.by_chance}


def _quiet() -> None:
    """transformers would warn of parameters that the base model lacks, and that the child brings."""
    import transformers

    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _cells(row: Overlap) -> list[str]:
    counts = [f"{n:,}" for n in (row.numel, row.first, row.second, row.both)]
    return [*counts, f"{row.by_chance:,.0f}", f"{row.jaccard:.3f}", f"{row.equal:,}"]


def _parameter_table(child: SavedChild) -> Table:
    table = Table("parameter", "shape", "dtype", "stored", "share")
    for entry in child.manifest.parameters:
        kept = child.kept(entry.name) if entry.stored else 0
        shape = " x ".join(str(size) for size in entry.shape)
        table.add_row(entry.name, shape, entry.dtype, f"{kept:,}", f"{kept / max(entry.numel, 1):.1%}")
    return table
