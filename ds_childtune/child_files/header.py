"""What the header of one of a child's files says, checked before anything is read. See [Note: child files]."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_childtune.child_files.format import DTYPES, ChildFileError, FileEntry, PieceEntry, parse

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
_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Stored:
    """A piece, and where its tensors lie."""

    entry: PieceEntry
    offsets: dict[str, tuple[str, int]]
    """Of "mask" or "index", and of each of its tensors: dtype, and the first byte in the file."""

    @property
    def end(self) -> int:
        return self.entry.end


@dataclass(frozen=True)
class _Tensor:
    dtype: str
    numel: int
    start: int
    """Byte in the file."""


Header = dict[str, tuple[Stored, ...]]
"""The pieces of a file by their parameter, in the order of elements."""


def read_header(folder: Path, file: FileEntry) -> Header:
    """The pieces of one file, each checked against the file's tensors, and those against its size.

    Raises:
        ChildFileError: when they do not fit together.
    """
    path = folder / file.name
    found: dict[str, list[Stored]] = {}
    for stored in _pieces(path, file):
        found.setdefault(stored.entry.parameter, []).append(stored)
    return {name: tuple(sorted(own, key=lambda stored: stored.entry.start)) for name, own in found.items()}


def _pieces(path: Path, file: FileEntry) -> Iterator[Stored]:
    metadata, tensors = _tensors(path, file)
    for entry in parse(list[PieceEntry], metadata, str(path)):
        expected = {name: (dtype, entry.kept) for name, dtype in entry.tensors.items()}
        if entry.mask == "bits":
            expected["mask"] = ("uint8", (entry.numel + 7) // 8)
        if entry.mask == "index":
            index = tensors.get(entry.key("index"))
            expected["index"] = ("int64" if index is not None and index.dtype == "int64" else "int32", entry.kept)
        if entry.numel == 0 or entry.kept > entry.numel or (entry.mask == "all" and entry.kept < entry.numel):
            raise ChildFileError(f"{path}: expected a piece of elements, got {str(entry)[:200]}. {DAMAGED}")
        offsets = {}
        for what, (dtype, numel) in expected.items():
            got = tensors.pop(entry.key(what), None)
            if got is None or (got.dtype, got.numel) != (dtype, numel):
                raise ChildFileError(
                    f"{path}: {entry.key(what)[:80]}: expected {numel} of {dtype}, got"
                    f" {None if got is None else (got.dtype, got.numel)}. {DAMAGED}"
                )
            offsets[what] = (dtype, got.start)
        yield Stored(entry, offsets)
    if tensors:
        other = next(iter(tensors))
        raise ChildFileError(f"{path}: expected only tensors of its pieces, got {other[:80]!r} too. {DAMAGED}")


def _tensors(path: Path, file: FileEntry) -> tuple[str, dict[str, _Tensor]]:
    """The json of the pieces, and every tensor by its key, once the file's size is what the manifest says.

    The safetensors format: 8 bytes of the header's length, the header as json, and the tensors, without gaps.
    """
    try:
        size = path.stat().st_size
        if size != file.bytes:
            raise ChildFileError(f"{path}: expected {file.bytes} bytes, got {size}. {DAMAGED}")
        with path.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8).ljust(8, b"\0"))
            if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise ChildFileError(f"{path}: expected a header inside {size} bytes, got one of {length}. {DAMAGED}")
            text = opened.read(length)
    except FileNotFoundError:
        raise ChildFileError(f"{path}: expected a file of {file.bytes} bytes, got none. {DAMAGED}") from None
    except OSError as error:
        raise ChildFileError(f"{path}: expected a readable file, got: {error}. Remedy: see its permissions.") from None
    header = parse(dict[str, Any], text, str(path))
    metadata = header.pop("__metadata__", None) or {}
    pieces = metadata.get("pieces", "[]") if isinstance(metadata, dict) else None
    if not isinstance(pieces, str):
        raise ChildFileError(f"{path}: expected a safetensors file with pieces, got {str(metadata)[:80]!r}. {DAMAGED}")
    tensors = {key: _tensor(path, key, info, 8 + length) for key, info in header.items()}
    end = 8 + length
    for key, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].numel)):
        if tensor.start != end:
            raise ChildFileError(f"{path}: {key[:80]}: expected it at byte {end}, got {tensor.start}. {DAMAGED}")
        end += tensor.numel * _BYTES[tensor.dtype]
    if end != size:
        raise ChildFileError(f"{path}: expected tensors up to its last byte, got {end} of {size}. {DAMAGED}")
    return pieces, tensors


def _tensor(path: Path, key: str, info: Any, data: int) -> _Tensor:
    """What the header says about one tensor; `data`: the byte at which tensors begin."""
    if isinstance(info, dict) and info.keys() == {"dtype", "shape", "data_offsets"}:
        dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
        numbers: list[list[Any]] = [shape, offsets] if isinstance(shape, list) and isinstance(offsets, list) else []
        name = _SAFETENSORS_NAMES.get(dtype) if isinstance(dtype, str) else None
        if name and [len(n) for n in numbers] == [1, 2] and all(type(i) is int and i >= 0 for n in numbers for i in n):
            (numel,), (start, end) = numbers
            if end - start == numel * _BYTES[name]:
                return _Tensor(name, numel, data + start)
    raise ChildFileError(
        f"{path}: {key[:80]}: expected a tensor of one dimension and as many bytes, got {str(info)[:120]}. {DAMAGED}"
    )
