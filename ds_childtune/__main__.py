"""The command line: look at children that `ChildTuner.export` wrote, and put them onto saved models.

ds_childtune inspect tuned/child
ds_childtune merge bert-base-uncased tuned/child --output tuned/model
ds_childtune compose bert-base-uncased tuned/a tuned/b --output tuned/both
ds_childtune compare tuned/a tuned/b
ds_childtune convert tuned/child published --to sglang --base bert-base-uncased
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ImportError:
    sys.exit('ds_childtune: the command line needs typer and rich. Remedy: pip install "ds_childtune[cli]".')

from ds_childtune.child_files.apply import Conflicts
from ds_childtune.child_files.compare import Overlap, by_layer, compare, total
from ds_childtune.child_files.convert import to_sglang, to_vllm
from ds_childtune.child_files.export_info import KIND, ExportInfo
from ds_childtune.child_files.merge import compose, merge
from ds_childtune.child_files.reader import SavedChild, open_child

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

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


@app.command("inspect")
def _inspect(
    child: Folder, parameters: Annotated[bool, typer.Option(help="A line for each parameter.")] = False
) -> None:
    """Check a child's files, and print what is in them."""
    opened = open_child(child)
    manifest = opened.manifest
    numel = sum(p.numel for p in manifest.parameters)
    kept = sum(opened.kept(name) for name in opened.stored)
    size = sum(file.bytes for file in manifest.files)
    facts = {
        "kind": f"{manifest.kind}, format version {manifest.version}, by ds_childtune {manifest.library}",
        "config": ", ".join(f"{k} {v}" for k, v in manifest.config.items() if k in ("mode", "reserve_p", "selector")),
        "elements": f"{kept:,} stored of {numel:,} ({kept / max(numel, 1):.1%}) in {len(opened.stored)} parameters",
        "files": f"{len(manifest.files)}, {size:,} bytes, checksums are right",
    }
    if manifest.kind == KIND:
        info = ExportInfo.of(manifest, child)
        facts |= {"model": info.model_class, "trained": f"{info.step} steps"}
    table = Table("", "", show_header=False)
    for name, value in facts.items():
        table.add_row(name, value)
    _print(table)
    if parameters:
        _print(_parameter_table(opened))


@app.command("merge")
def _merge(base: Base, children: Folders, output: Output, conflicts: OnConflict = "refuse") -> None:
    """Apply children to a saved base model, and write the whole model, as transformers loads it."""
    _quiet()
    merge(base, children, output, conflicts)
    _print(f"{output}: the base model with {', '.join(str(child) for child in children)}")


@app.command("compose")
def _compose(base: Base, children: Folders, output: Output, conflicts: OnConflict = "refuse") -> None:
    """Write one child that does what several of them do."""
    _quiet()
    compose(base, children, output, conflicts)
    _print(f"{output}: one child out of {', '.join(str(child) for child in children)}")


@app.command("compare")
def _compare(
    first: Folder, second: Folder, parameters: Annotated[bool, typer.Option(help="A line for each parameter.")] = False
) -> None:
    """Print what two children have in common, layer by layer."""
    overlaps = compare(open_child(first), open_child(second))
    rows = overlaps if parameters else by_layer(overlaps)
    table = Table("")
    for column in ("elements", "first", "second", "both", "by chance", "jaccard", "same value"):
        table.add_column(column, justify="right")
    for row in (*rows, total("total", overlaps)):
        table.add_row(row.name, *_cells(row))
    _print(table)


@app.command("convert")
def _convert(
    child: Folder,
    output: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    to: Annotated[Literal["vllm", "sglang"], typer.Option(help="The server that reads it.", show_default=False)],
    base: Annotated[Path | None, typer.Option(help="sglang: the base model's folder.", show_default=False)] = None,
    since: Annotated[
        Path | None, typer.Option(help="An earlier export: write only what changed.", show_default=False)
    ] = None,
) -> None:
    """Write an exported child as an inference server takes it: patches for vLLM, the next version's folder for SGLang and slime."""
    if (base is None) == (to == "sglang"):
        need = "its base model's folder" if to == "sglang" else "no base model"
        raise ValueError(
            f"convert: --to {to} expects {need}. Remedy: {'pass' if to == 'sglang' else 'leave out'} --base."
        )
    written = to_vllm(child, output, since=since) if base is None else to_sglang(child, base, output, since=since)
    _print(f"{written}: {child} for {to}, {sum(p.stat().st_size for p in _files(written)):,} bytes")


def _files(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else [path]


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


def _print(what: Table | str) -> None:
    # A pipe has no width: cut nothing.
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(what, soft_wrap=isinstance(what, str), markup=False)


def main() -> None:
    """Errors that have a remedy are printed without a traceback, with exit code 1."""
    try:
        app()
    except (ValueError, NotImplementedError, RuntimeError) as error:
        Console(stderr=True).print(f"ds_childtune: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
