"""Read a child that anyone may have written, damaged or forged. See [Note: child files].

Whatever is wrong is a `ChildFileError`. Nothing is allocated before its size has been compared with that of the file; nothing is
unpickled; and `open_child` returns only when every entry agrees with every other, so that later reads cannot surprise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ds_childtune.child_format import (
    FORMAT,
    MANIFEST,
    VERSION,
    ChildFileError,
    Manifest,
    ParameterEntry,
    Piece,
    PieceEntry,
    parsed,
)
from ds_childtune.child_header import DAMAGED, Place, by_parameter, places_in
from ds_childtune.durable import checksum

_MAX_MANIFEST_BYTES = 256 << 20


@dataclass(frozen=True)
class Child:
    """A child's folder. Reading its values takes what is asked for, and no more."""

    folder: Path
    manifest: Manifest
    places: dict[str, tuple[Place, ...]]
    """By the name of each stored parameter: in the order of their elements, without gaps or overlaps."""

    @cached_property
    def parameters(self) -> dict[str, ParameterEntry]:
        """By name."""
        return {entry.name: entry for entry in self.manifest.parameters}

    @cached_property
    def _files(self) -> _OpenFiles:
        return _OpenFiles()

    def parameter(self, name: str) -> ParameterEntry:
        """Raises ChildFileError when the child's model has no such parameter."""
        if name not in self.parameters:
            raise ChildFileError(
                f"{self.folder}: expected a parameter {name!r}, got none. Remedy: use a child of this model."
            )
        return self.parameters[name]

    def read(self, name: str, start: int = 0, numel: int | None = None) -> Piece:
        """The elements [start, start + numel) of a stored parameter, whoever wrote them; by default all.

        Raises:
            ChildFileError: when the parameter is not stored, or a mask is not what its entry says.
        """
        whole = self.parameter(name)
        end = whole.numel if numel is None else start + numel
        if not whole.stored or not 0 <= start <= end <= whole.numel:
            raise ChildFileError(
                f"{self.folder}: expected elements {start} to {end} of {name!r}, got {whole.numel if whole.stored else 0}."
                " Remedy: use a child of this model."
            )
        own = self.places[name]
        # An empty run takes nothing of the first piece, and so has its tensors' names and dtypes.
        wanted = [p for p in own if p.entry.start < end and p.entry.end > start] or own[:1]
        return joined(name, start, end - start, [_read(self._files, place, start, end) for place in wanted])

    def pieces(self, name: str) -> Iterator[Piece]:
        """Every piece of a stored parameter, in order, one at a time. Raises ChildFileError, see `read`."""
        for place in self.places[name]:
            yield _read(self._files, place, place.entry.start, place.entry.end)

    def kept(self, name: str) -> int:
        """Elements of a stored parameter inside the child."""
        return sum(place.entry.kept for place in self.places[name])

    def check_contents(self, share: int = 0, of: int = 1) -> None:
        """Compare the checksums of every `of`-th file, from the `share`-th on. So ranks can divide the work.

        Raises:
            ChildFileError: when contents are not what was written.
        """
        for file in self.manifest.files[share::of]:
            got = checksum(self.folder / file.name)
            if got != file.blake2b:
                raise ChildFileError(
                    f"{self.folder / file.name}: expected checksum {file.blake2b}, got {got}: bytes have changed. {DAMAGED}"
                )


def open_child(folder: str | Path, *, kind: str | None = None, checksums: bool = True) -> Child:
    """Read the manifest and every header, and check all that can be without reading values.

    Args:
        kind: what the manifest has to be for, for example "export".
        checksums: compare every file's contents too; else call `check_contents`.

    Raises:
        ChildFileError: for whatever is not a whole child of this format version.
    """
    folder = Path(folder)
    manifest = _manifest(folder)
    if kind is not None and manifest.kind != kind:
        raise ChildFileError(
            f'{folder}: expected kind "{kind}", got "{manifest.kind}". Remedy: give the folder of another child.'
        )
    _unique((p.name for p in manifest.parameters), f"{folder / MANIFEST}: parameters")
    _unique((f.name for f in manifest.files), f"{folder / MANIFEST}: files")
    places = [place for file in manifest.files for place in places_in(folder, file)]
    child = Child(folder, manifest, by_parameter(folder, manifest.parameters, places))
    if checksums:
        child.check_contents()
    return child


def joined(name: str, start: int, numel: int, parts: list[Piece]) -> Piece:
    """One piece out of neighbours that cover [start, start + numel). Of numbers that differ it has the first."""
    names = parts[0].tensors.keys() if parts else ()
    tensors = {what: torch.cat([p.tensors[what] for p in parts]) for what in names}
    numbers: dict[str, int | float] = {}
    for part in reversed(parts):
        numbers |= part.numbers
    if all(p.index is None for p in parts):
        return Piece(name, start, numel, None, tensors, numbers)
    wide = torch.int64 if numel > torch.iinfo(torch.int32).max else torch.int32
    indices = [torch.arange(p.numel) if p.index is None else p.index for p in parts]
    index = torch.cat([i.to(wide) + (p.start - start) for i, p in zip(indices, parts, strict=True)])
    return Piece(name, start, numel, index, tensors, numbers)


def _manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        size = path.stat().st_size
        if size > _MAX_MANIFEST_BYTES:
            raise ChildFileError(f"{path}: expected at most {_MAX_MANIFEST_BYTES} bytes, got {size}. {DAMAGED}")
        with path.open("rb") as file:
            data = file.read(size)
    except OSError as error:
        raise ChildFileError(
            f"{folder}: expected a child's folder with a readable {MANIFEST}, got: {error.strerror}."
            " Remedy: give the folder that was written; without this file the writing did not end."
        ) from None
    head: Any = parsed(dict[str, Any], data, str(path))
    if head.get("format") != FORMAT or head.get("version") != VERSION:
        raise ChildFileError(
            f'{path}: expected format "{FORMAT}" version {VERSION}, got {str(head.get("format"))[:40]!r} version'
            f" {str(head.get('version'))[:40]}. Remedy: read it with the ds_childtune that wrote it"
            f" ({str(head.get('library'))[:40]}), or write it again."
        )
    return parsed(Manifest, data, str(path))


def _unique(names: Iterable[str], where: str) -> None:
    for one, other in pairwise(sorted(names)):
        if one == other:
            raise ChildFileError(f"{where}: expected every name once, got {one[:80]!r} again. {DAMAGED}")


class _OpenFiles:
    """The last few files, as opening one parses its whole header, and neighbours are read one after the other."""

    LIMIT = 8

    def __init__(self) -> None:
        self._opened: dict[Path, Any] = {}

    def of(self, path: Path) -> Any:
        """Raises OSError or SafetensorError."""
        if path not in self._opened:
            if len(self._opened) == self.LIMIT:
                del self._opened[next(iter(self._opened))]
            self._opened[path] = safe_open(path, framework="pt")
        return self._opened[path]


def _read(files: _OpenFiles, place: Place, start: int, end: int) -> Piece:
    """What a piece has of the parameter's elements [start, end).

    Raises:
        ChildFileError: when the mask is not what its entry says, or the file is no longer the one that was opened.
    """
    entry, path = place.entry, place.file
    index: Tensor | None = None
    try:
        tensors = files.of(path)
        if entry.mask == "bits":
            index = _unpacked(tensors.get_tensor(entry.key("mask")), entry.numel)
        if entry.mask == "index":
            index = tensors.get_tensor(entry.key("index"))
        if index is not None and not _is_good(index, entry):
            raise ChildFileError(
                f"{path}: {entry.parameter[:80]}: expected {entry.kept} ascending elements below {entry.numel}, got"
                f" {index.numel()} that are not. {DAMAGED}"
            )
        piece = Piece(entry.parameter, entry.start, entry.numel, index, numbers=entry.numbers)
        first, last = piece.bounds(start, end)
        values = {name: tensors.get_slice(entry.key(name))[first:last] for name in entry.tensors}
    except (OSError, SafetensorError) as error:
        raise ChildFileError(f"{path}: expected the file that was opened, got: {str(error)[:200]}. {DAMAGED}") from None
    narrow = piece.narrow(start, end)
    return Piece(narrow.parameter, narrow.start, narrow.numel, narrow.index, values, entry.numbers)


def _is_good(index: Tensor, entry: PieceEntry) -> bool:
    ascending = index.numel() == entry.kept and bool((index[1:] > index[:-1]).all())
    return ascending and (not index.numel() or (int(index[0]) >= 0 and int(index[-1]) < entry.numel))


def _unpacked(bits: Tensor, numel: int) -> Tensor:
    """int32 or int64 1-D: the places of the ones. A bit beyond `numel` is one too many, so that it is noticed."""
    mask = np.unpackbits(bits.numpy(), bitorder="little")
    places = torch.from_numpy(np.flatnonzero(mask))
    return places.int() if numel <= torch.iinfo(torch.int32).max else places
