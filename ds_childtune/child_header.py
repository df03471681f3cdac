"""What the headers of a child's files say: where the pieces of every parameter lie, checked before anything is read.

See [Note: child files].
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ds_childtune.child_format import MAX_NUMEL, ChildFileError, FileEntry, ParameterEntry, PieceEntry, parsed

DAMAGED = "Remedy: write the child again, or take an undamaged copy."

_MAX_HEADER_BYTES = 100_000_000
"""What safetensors itself allows."""

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
class Place:
    """Where a piece lies."""

    file: Path
    entry: PieceEntry


@dataclass(frozen=True)
class _Header:
    """What the header of a safetensors file says."""

    pieces: str
    """json."""
    tensors: dict[str, tuple[str, int]]
    """dtype and number of entries of every tensor, by key; all have one dimension."""


def places_in(folder: Path, file: FileEntry) -> Iterator[Place]:
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
            raise ChildFileError(f"{path}: expected a piece of elements, got {str(entry)[:200]}. {DAMAGED}")
        for key, size in expected.items():
            got = header.tensors.pop(key, None)
            if got != size:
                raise ChildFileError(f"{path}: {key[:80]}: expected {size[1]} of {size[0]}, got {got}. {DAMAGED}")
        yield Place(path, entry)
    if header.tensors:
        other = next(iter(header.tensors))
        raise ChildFileError(f"{path}: expected tensors of its pieces alone, got {other[:80]!r} too. {DAMAGED}")


def _header(path: Path, file: FileEntry) -> _Header:
    """The header, once the file's size is what the manifest says."""
    try:
        size = path.stat().st_size
        if size != file.bytes:
            raise ChildFileError(f"{path}: expected {file.bytes} bytes, got {size}. {DAMAGED}")
        with path.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8).ljust(8, b"\0"))
        if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
            raise ChildFileError(f"{path}: expected a header inside {size} bytes, got one of {length}. {DAMAGED}")
        with safe_open(path, framework="pt") as tensors:
            metadata = tensors.metadata() or {}
            slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118 # it is not a mapping
            sizes = {key: (part.get_dtype(), part.get_shape()) for key, part in slices.items()}
    except FileNotFoundError:
        raise ChildFileError(f"{path}: expected a file of {file.bytes} bytes, got none. {DAMAGED}") from None
    except OSError as error:
        raise ChildFileError(f"{path}: expected a readable file, got: {error}. Remedy: see its permissions.") from None
    except SafetensorError as error:
        raise ChildFileError(f"{path}: expected a safetensors file, got: {str(error)[:200]}. {DAMAGED}") from None
    for key, (dtype, shape) in sizes.items():
        if len(shape) != 1 or dtype not in _SAFETENSORS_NAMES:
            raise ChildFileError(f"{path}: {key[:80]}: expected one dimension, got {dtype} {shape}. {DAMAGED}")
    known = {key: (_SAFETENSORS_NAMES[dtype], shape[0]) for key, (dtype, shape) in sizes.items()}
    return _Header(metadata.get("pieces", "[]"), known)


def by_parameter(
    folder: Path, parameters: Iterable[ParameterEntry], places: list[Place]
) -> dict[str, tuple[Place, ...]]:
    """Every stored parameter's pieces in order. They cover it, once."""
    found: dict[str, list[Place]] = {p.name: [] for p in parameters if p.stored}
    for place in places:
        name = place.entry.parameter
        if name not in found:
            raise ChildFileError(
                f"{place.file}: expected pieces of the manifest's parameters, got {name[:80]!r}. {DAMAGED}"
            )
        found[name].append(place)
    for parameter in parameters:
        if parameter.numel > MAX_NUMEL:
            raise ChildFileError(
                f"{folder}: {parameter.name[:80]}: expected fewer elements than {parameter.numel}. {DAMAGED}"
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
                    f" {'no element' if end < start else 'an overlap'} from {min(end, start)} to {max(end, start)}. {DAMAGED}"
                )
        if len({tuple(sorted(place.entry.tensors.items())) for place in own}) > 1:
            raise ChildFileError(
                f"{folder}: {parameter.name[:80]}: expected the same tensors in every piece. {DAMAGED}"
            )
    return {name: tuple(own) for name, own in found.items()}
