"""Read a child that anyone may have written, damaged or forged. See [Note: child files].

Whatever is wrong is a `ChildFileError`. Nothing is allocated before its size has been compared with that of the file; nothing is
unpickled; and `open_child` returns only when every entry agrees with every other, so that later reads cannot surprise.
"""

from __future__ import annotations

import struct
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
    MAX_NUMEL,
    VERSION,
    ChildFileError,
    FileEntry,
    Manifest,
    ParameterEntry,
    Piece,
    PieceEntry,
    parsed,
)
from ds_childtune.durable import checksum

_MAX_MANIFEST_BYTES = 256 << 20
_MAX_HEADER_BYTES = 100_000_000
"""What safetensors itself allows."""

_DAMAGED = "Remedy: write the child again, or take an undamaged copy."
_SAFETENSORS_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


@dataclass(frozen=True)
class _Place:
    """Where a piece lies."""

    file: Path
    entry: PieceEntry


@dataclass(frozen=True)
class Child:
    """A child's folder. Reading its values takes what is asked for, and no more."""

    folder: Path
    manifest: Manifest
    places: dict[str, tuple[_Place, ...]]
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
                    f"{self.folder / file.name}: expected checksum {file.blake2b}, got {got}: bytes have changed. {_DAMAGED}"
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
    places = [place for file in manifest.files for place in _places(folder, file)]
    child = Child(folder, manifest, _by_parameter(folder, manifest.parameters, places))
    if checksums:
        child.check_contents()
    return child


def joined(name: str, start: int, numel: int, parts: list[Piece]) -> Piece:
    """One piece out of neighbours that cover [start, start + numel)."""
    names = parts[0].tensors.keys() if parts else ()
    tensors = {what: torch.cat([p.tensors[what] for p in parts]) for what in names}
    numbers = parts[0].numbers if parts else {}
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
            raise ChildFileError(f"{path}: expected at most {_MAX_MANIFEST_BYTES} bytes, got {size}. {_DAMAGED}")
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


@dataclass(frozen=True)
class _Header:
    """What the header of a safetensors file says."""

    pieces: str
    """json."""
    tensors: dict[str, tuple[str, int]]
    """dtype and number of entries of every tensor, by key; all have one dimension."""


def _places(folder: Path, file: FileEntry) -> Iterator[_Place]:
    """The pieces of one file, each checked against the file's tensors."""
    path = folder / file.name
    header = _header(path, file)
    for entry in parsed(list[PieceEntry], header.pieces, str(path)):
        expected = {entry.key(name): (dtype, entry.kept) for name, dtype in entry.tensors.items()}
        if entry.mask == "bits":
            expected[entry.key("mask")] = ("uint8", (entry.numel + 7) // 8)
        if entry.mask == "index":
            wide = header.tensors.get(entry.key("index"), ("", 0))[0] == "int64"
            expected[entry.key("index")] = ("int64" if wide else "int32", entry.kept)
        if entry.numel == 0 or entry.kept > entry.numel or (entry.mask == "all" and entry.kept < entry.numel):
            raise ChildFileError(f"{path}: expected a piece of elements, got {str(entry)[:200]}. {_DAMAGED}")
        for key, size in expected.items():
            got = header.tensors.pop(key, None)
            if got != size:
                raise ChildFileError(f"{path}: {key[:80]}: expected {size[1]} of {size[0]}, got {got}. {_DAMAGED}")
        yield _Place(path, entry)
    if header.tensors:
        other = next(iter(header.tensors))
        raise ChildFileError(f"{path}: expected tensors of its pieces alone, got {other[:80]!r} too. {_DAMAGED}")


def _header(path: Path, file: FileEntry) -> _Header:
    """The header, once the file's size is what the manifest says."""
    try:
        size = path.stat().st_size
        if size != file.bytes:
            raise ChildFileError(f"{path}: expected {file.bytes} bytes, got {size}. {_DAMAGED}")
        with path.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8).ljust(8, b"\0"))
        if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
            raise ChildFileError(f"{path}: expected a header inside {size} bytes, got one of {length}. {_DAMAGED}")
        with safe_open(path, framework="pt") as tensors:
            metadata = tensors.metadata() or {}
            slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118 # it is not a mapping
            sizes = {key: (part.get_dtype(), part.get_shape()) for key, part in slices.items()}
    except FileNotFoundError:
        raise ChildFileError(f"{path}: expected a file of {file.bytes} bytes, got none. {_DAMAGED}") from None
    except OSError as error:
        raise ChildFileError(f"{path}: expected a readable file, got: {error}. Remedy: see its permissions.") from None
    except SafetensorError as error:
        raise ChildFileError(f"{path}: expected a safetensors file, got: {str(error)[:200]}. {_DAMAGED}") from None
    for key, (dtype, shape) in sizes.items():
        if len(shape) != 1 or dtype not in _SAFETENSORS_NAMES:
            raise ChildFileError(f"{path}: {key[:80]}: expected one dimension, got {dtype} {shape}. {_DAMAGED}")
    known = {key: (_SAFETENSORS_NAMES[dtype], shape[0]) for key, (dtype, shape) in sizes.items()}
    return _Header(metadata.get("pieces", "[]"), known)


def _by_parameter(
    folder: Path, parameters: Iterable[ParameterEntry], places: list[_Place]
) -> dict[str, tuple[_Place, ...]]:
    """Every stored parameter's pieces in order. They cover it, once."""
    found: dict[str, list[_Place]] = {p.name: [] for p in parameters if p.stored}
    for place in places:
        name = place.entry.parameter
        if name not in found:
            raise ChildFileError(
                f"{place.file}: expected pieces of the manifest's parameters, got {name[:80]!r}. {_DAMAGED}"
            )
        found[name].append(place)
    for parameter in parameters:
        if parameter.numel > MAX_NUMEL:
            raise ChildFileError(
                f"{folder}: {parameter.name[:80]}: expected fewer elements than {parameter.numel}. {_DAMAGED}"
            )
        if not parameter.stored:
            continue
        own = sorted(found[parameter.name], key=lambda place: place.entry.start)
        found[parameter.name] = own
        ends = [0, *(place.entry.end for place in own)]
        starts = [*(place.entry.start for place in own), parameter.numel]
        for end, start in zip(ends, starts, strict=True):
            if end != start:
                raise ChildFileError(
                    f"{folder}: {parameter.name[:80]}: expected pieces that cover {parameter.numel} elements once, got"
                    f" {'no element' if end < start else 'an overlap'} from {min(end, start)} to {max(end, start)}. {_DAMAGED}"
                )
        if len({tuple(sorted(place.entry.tensors.items())) for place in own}) > 1:
            raise ChildFileError(
                f"{folder}: {parameter.name[:80]}: expected the same tensors in every piece. {_DAMAGED}"
            )
    return {name: tuple(own) for name, own in found.items()}


def _unique(names: Iterable[str], where: str) -> None:
    for one, other in pairwise(sorted(names)):
        if one == other:
            raise ChildFileError(f"{where}: expected every name once, got {one[:80]!r} again. {_DAMAGED}")


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


def _read(files: _OpenFiles, place: _Place, start: int, end: int) -> Piece:
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
                f" {index.numel()} that are not. {_DAMAGED}"
            )
        piece = Piece(entry.parameter, entry.start, entry.numel, index, numbers=entry.numbers)
        first, last = piece.bounds(start, end)
        values = {name: tensors.get_slice(entry.key(name))[first:last] for name in entry.tensors}
    except (OSError, SafetensorError) as error:
        raise ChildFileError(
            f"{path}: expected the file that was opened, got: {str(error)[:200]}. {_DAMAGED}"
        ) from None
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
