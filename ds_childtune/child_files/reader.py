"""Read a child that anyone may have written, damaged or forged. See [Note: child files].

Whatever is wrong is a `ChildFileError`. Nothing is allocated before its size has been compared with that of the file; nothing is
unpickled; and no piece is read before the header of its file has been found to agree with the manifest.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ds_childtune.child_files.atomic import checksum
from ds_childtune.child_files.format import (
    DTYPES,
    FORMAT,
    MANIFEST,
    MAX_NUMEL,
    READABLE,
    ChildFileError,
    FileEntry,
    Manifest,
    ParameterEntry,
    Piece,
    parsed,
)
from ds_childtune.child_files.header import DAMAGED, Header, Stored, read_header
from ds_childtune.child_files.holders import Holders, HoldersByRank, Run

Bytes = NDArray[np.uint8]

_MAX_MANIFEST_BYTES = 256 << 20
_MAX_INT32 = torch.iinfo(torch.int32).max
_ONES = np.array([byte.bit_count() for byte in range(256)], dtype=np.uint8)
_TILE = 1 << 16
"""Bytes of a mask that are unpacked at once."""


@dataclass(frozen=True)
class Child:
    """A child's folder. Reading its values takes what is asked for, and no more: of version 2 only the files that have it."""

    folder: Path
    manifest: Manifest

    @cached_property
    def parameters(self) -> dict[str, ParameterEntry]:
        """By name."""
        return {entry.name: entry for entry in self.manifest.parameters}

    @cached_property
    def stored(self) -> frozenset[str]:
        """Names of the parameters that pieces cover."""
        return frozenset(entry.name for entry in self.manifest.parameters if entry.stored)

    @cached_property
    def _headers(self) -> _Headers:
        return _Headers(self.folder)

    @cached_property
    def _places(self) -> _Placed | _Found:
        return _Found(self) if self.manifest.holders is None else _Placed(self, self.manifest.holders)

    def parameter(self, name: str) -> ParameterEntry:
        """Raises ChildFileError when the child's model has no such parameter."""
        if name not in self.parameters:
            raise ChildFileError(
                f"{self.folder}: expected a parameter {name!r}, got none. Remedy: use a child of this model."
            )
        return self.parameters[name]

    def whole(self, name: str) -> Run:
        """All elements of a parameter."""
        return Run(name, 0, self.parameter(name).numel)

    def read(self, name: str, start: int = 0, numel: int | None = None) -> Piece:
        """The elements [start, start + numel) of a stored parameter, whoever wrote them; by default all.

        Raises:
            ChildFileError: when the parameter is not stored, or a mask is not what its entry says.
        """
        end = self.parameter(name).numel if numel is None else start + numel
        return self.read_runs([Run(name, start, end)])[0]

    def read_runs(self, runs: Sequence[Run], *, values: bool = True) -> list[Piece]:
        """Several of them, file after file, so that each is opened once.

        Args:
            values: False: which elements are inside the child, and no tensors.

        Raises:
            ChildFileError: see `read`.
        """
        parts = self.read_parts(runs, values=values)
        return [joined(r.name, r.start, r.end - r.start, own) for r, own in zip(runs, parts, strict=True)]

    def read_parts(self, runs: Sequence[Run], *, values: bool = True) -> list[list[Piece]]:
        """As they were written, in the order of elements: what they cost is bounded by the files' bytes, whatever shapes are claimed.

        See `read_runs`.
        """
        wanted: dict[FileEntry, list[tuple[int, int, int]]] = {}
        for i, run in enumerate(runs):
            for file, start, end in self._files_with(run):
                wanted.setdefault(file, []).append((i, start, end))
        parts: list[list[Piece]] = [[] for _ in runs]
        for file in sorted(wanted, key=lambda file: file.name):
            header = self._header(file)
            with _opened(self.folder / file.name) as opened:
                for i, start, end in wanted[file]:
                    for stored in _within(header.get(runs[i].name, ()), start, end):
                        parts[i].append(_read(opened, stored, start, end, values=values))
        for own in parts:
            own.sort(key=lambda part: part.start)
            self._check_alike(own)
        return parts

    def _check_alike(self, pieces: Sequence[Piece]) -> None:
        tensors = [{name: tensor.dtype for name, tensor in piece.tensors.items()} for piece in pieces]
        if any(other != tensors[0] for other in tensors[1:]):
            raise ChildFileError(
                f"{self.folder}: {pieces[0].parameter[:80]}: expected the same tensors in every piece. {DAMAGED}"
            )

    def _files_with(self, run: Run) -> Iterator[tuple[FileEntry, int, int]]:
        """The files that have elements of a run, each with the first, and the last + 1, of those. Together they have all of them."""
        whole = self.parameter(run.name)
        if not whole.stored or not 0 <= run.start <= run.end <= whole.numel:
            raise ChildFileError(
                f"{self.folder}: expected elements {run.start} to {run.end} of {run.name!r}, got"
                f" {whole.numel if whole.stored else 0}. Remedy: use a child of this model."
            )
        at = run.start
        # An empty run takes nothing of the first piece, and so has its tensors' names and dtypes.
        for file, start, end in self._places.of(run if run.start < run.end else Run(run.name, 0, min(1, whole.numel))):
            yield (file, start, end) if run.start < run.end else (file, 0, 0)
            at = end
        if run.start < run.end and at != run.end:
            raise ChildFileError(
                f"{self.folder}: {run.name[:80]}: expected pieces up to element {run.end}, got none from {at} on. {DAMAGED}"
            )

    def _header(self, file: FileEntry) -> Header:
        return self._headers.of(file, self._places.check)

    def pieces(self, name: str) -> Iterator[Piece]:
        """Every piece of a stored parameter, in order, one at a time. Raises ChildFileError, see `read`."""
        for file, start, end in self._files_with(self.whole(name)):
            with _opened(self.folder / file.name) as opened:
                pieces = [_read(opened, s, start, end) for s in _within(self._header(file).get(name, ()), start, end)]
            yield from pieces

    @cached_property
    def _kept(self) -> dict[str, int]:
        kept = dict.fromkeys(sorted(self.stored), 0)
        for file in self.manifest.files:
            for name, own in self._header(file).items():
                kept[name] += sum(stored.entry.kept for stored in own)
        return kept

    def kept(self, name: str) -> int:
        """Elements of a stored parameter inside the child. The first call looks into every file."""
        return self._kept[name]

    def check_contents(self, share: int = 0, of: int = 1) -> None:
        """Compare the checksums of every `of`-th file, from the `share`-th on, and the headers. So ranks can divide the work.

        Raises:
            ChildFileError: when contents are not what was written.
        """
        for file in self.manifest.files[share::of]:
            self._header(file)
            try:
                got = checksum(self.folder / file.name)
            except OSError as error:
                raise _unreadable(self.folder / file.name, error) from None
            if got != file.blake2b:
                raise ChildFileError(
                    f"{self.folder / file.name}: expected checksum {file.blake2b}, got {got}: bytes have changed. {DAMAGED}"
                )


def open_child(
    folder: str | Path, *, kind: str | None = None, checksums: bool = True, manifest: bytes | None = None
) -> Child:
    """Read the manifest, and check all that can be without reading values.

    Args:
        kind: what the manifest has to be for, for example "export".
        checksums: look into every file, too, and compare its contents and header; else call `check_contents`. A version without
            holders has its headers read in any case.
        manifest: the manifest, if `read_manifest` has read it already.

    Raises:
        ChildFileError: for whatever is not a whole child of a known format version.
    """
    folder = Path(folder)
    parsed_manifest = _manifest(folder, read_manifest(folder) if manifest is None else manifest)
    if kind is not None and parsed_manifest.kind != kind:
        raise ChildFileError(
            f'{folder}: expected kind "{kind}", got "{parsed_manifest.kind}". Remedy: give the folder of another child.'
        )
    _unique((p.name for p in parsed_manifest.parameters), f"{folder / MANIFEST}: parameters")
    _unique((f.name for f in parsed_manifest.files), f"{folder / MANIFEST}: files")
    for parameter in parsed_manifest.parameters:
        if parameter.numel > MAX_NUMEL:
            raise ChildFileError(
                f"{folder}: {parameter.name[:80]}: expected fewer elements than {parameter.numel}. {DAMAGED}"
            )
    child = Child(folder, parsed_manifest)
    child._places  # noqa: B018 # checks them
    if checksums:
        child.check_contents()
    return child


class _Placed:
    """Where pieces lie, as the manifest says. See [Note: holders]."""

    def __init__(self, child: Child, holders: Holders) -> None:
        """Raises ChildFileError when it cannot be so."""
        where = child.folder / MANIFEST
        parameters = child.manifest.parameters
        numels = [p.numel for p in parameters]
        fault = holders.fault(numels)
        if fault is None:
            lost = (i for i, p in enumerate(parameters) if p.stored and p.numel and not holders.head[i])
            fault = next(lost, None)
        if fault is not None:
            what = (
                f"{parameters[fault].name[:80]}: holders of its elements"
                if fault >= 0
                else "holders of every parameter"
            )
            raise ChildFileError(f"{where}: expected {what}, got others. {DAMAGED}")
        self._folder = child.folder
        self._holders = holders
        self._position = {p.name: i for i, p in enumerate(parameters)}
        self._parameters = child.parameters
        self._file: dict[int, FileEntry] = {}
        for file in child.manifest.files:
            writer = file.writer
            if writer is None or writer in self._file:
                raise ChildFileError(f"{where}: expected one file of each rank, got {file.name[:80]!r}. {DAMAGED}")
            self._file[writer] = file
        self._by_rank = HoldersByRank(holders, numels, [p.stored for p in parameters])

    def of(self, run: Run) -> Iterator[tuple[FileEntry, int, int]]:
        """The files that have elements of a run, each with the first, and the last + 1, of those."""
        held, numel = self._holders[self._position[run.name]], self._parameters[run.name].numel
        for rank, start, end in held.ranks(run.start, run.end, numel):
            if rank not in self._file:
                raise ChildFileError(
                    f"{self._folder}: {run.name[:80]}: expected a file of rank {rank} with its elements from {start} on, got"
                    f" none. {DAMAGED}"
                )
            yield self._file[rank], start, end

    def check(self, file: FileEntry, header: Header) -> None:
        """Raise ChildFileError unless a file has the pieces that the manifest says, all of them, and no others."""
        rank = file.writer
        assert rank is not None
        path = self._folder / file.name
        for name, own in header.items():
            parameter = self._parameters.get(name)
            if parameter is None or not parameter.stored:
                raise ChildFileError(
                    f"{path}: expected pieces of the manifest's parameters, got {name[:80]!r}. {DAMAGED}"
                )
            expected = self._holders[self._position[name]].run_of(rank, parameter.numel)
            if len(own) != 1 or (own[0].entry.start, own[0].end) != expected:
                raise ChildFileError(
                    f"{path}: {name[:80]}: expected the elements {expected[0]} to {expected[1]} in one piece, got"
                    f" {[(stored.entry.start, stored.end) for stored in own][:4]}. {DAMAGED}"
                )
        if len(header) != self._by_rank.count(rank):
            raise ChildFileError(
                f"{path}: expected pieces of {self._by_rank.count(rank)} parameters, got {len(header)}. {DAMAGED}"
            )


class _Found:
    """Where pieces lie, as the headers of all files say: for version 1, whose manifest does not."""

    def __init__(self, child: Child) -> None:
        """Reads every header. Raises ChildFileError unless pieces cover every stored parameter once."""
        self._folder = child.folder
        self._runs: dict[str, list[tuple[int, int, FileEntry]]] = {name: [] for name in child.stored}
        for file in child.manifest.files:
            for name, own in child._headers.of(file, self.check).items():
                self._runs[name] += [(stored.entry.start, stored.end, file) for stored in own]
        for parameter in child.manifest.parameters:
            if parameter.stored:
                self._check_cover(parameter)

    def _check_cover(self, parameter: ParameterEntry) -> None:
        own = self._runs[parameter.name]
        own.sort(key=lambda run: run[:2])
        ends = [0, *(end for _, end, _ in own)]
        starts = [*(start for start, _, _ in own), parameter.numel]
        for end, start in zip(ends, starts, strict=True):
            if end != start:
                raise ChildFileError(
                    f"{self._folder}: {parameter.name[:80]}: expected pieces that cover {parameter.numel} elements once, got"
                    f" {'no element' if end < start else 'an overlap'} from {min(end, start)} to {max(end, start)}. {DAMAGED}"
                )

    def of(self, run: Run) -> Iterator[tuple[FileEntry, int, int]]:
        """The files that have elements of a run, each with the first, and the last + 1, of those."""
        own = self._runs[run.name]
        at = bisect_right(own, run.start, key=lambda piece: piece[0]) - 1
        while 0 <= at < len(own) and own[at][0] < run.end:
            start, end, file = own[at]
            yield file, max(start, run.start), min(end, run.end)
            at += 1

    def check(self, file: FileEntry, header: Header) -> None:
        """Raise ChildFileError unless the pieces are of stored parameters."""
        path = self._folder / file.name
        for name in header:
            if name not in self._runs:
                raise ChildFileError(
                    f"{path}: expected pieces of the manifest's parameters, got {name[:80]!r}. {DAMAGED}"
                )


class _Headers:
    """The last headers that were parsed, as neighbours are read one after the other."""

    PIECES = 1 << 22
    """Of all headers together."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._parsed: dict[str, Header] = {}
        self._pieces = 0

    def of(self, file: FileEntry, check: Callable[[FileEntry, Header], None]) -> Header:
        """Raises ChildFileError."""
        if file.name not in self._parsed:
            header = read_header(self._folder, file)
            check(file, header)
            self._pieces += _size(header)
            while self._parsed and self._pieces > self.PIECES:
                self._pieces -= _size(self._parsed.pop(next(iter(self._parsed))))
            self._parsed[file.name] = header
        return self._parsed[file.name]


def _size(header: Header) -> int:
    return sum(len(own) for own in header.values())


def _within(pieces: Sequence[Stored], start: int, end: int) -> Iterator[Stored]:
    """Those that have elements of [start, end); the first of all where that is empty."""
    if start == end:
        yield from pieces[:1]
        return
    at = max(bisect_right(pieces, start, key=lambda stored: stored.entry.start) - 1, 0)
    for stored in pieces[at:]:
        if stored.entry.start >= end:
            return
        if stored.end > start:
            yield stored


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


def read_manifest(folder: Path) -> bytes:
    """The manifest's text. Raises ChildFileError when there is none, or one that is too long."""
    path = folder / MANIFEST
    try:
        size = path.stat().st_size
        if size > _MAX_MANIFEST_BYTES:
            raise ChildFileError(f"{path}: expected at most {_MAX_MANIFEST_BYTES} bytes, got {size}. {DAMAGED}")
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:
        raise ChildFileError(
            f"{folder}: expected a child's folder with a readable {MANIFEST}, got: {error.strerror}."
            " Remedy: give the folder that was written; without this file the writing did not end."
        ) from None


def _manifest(folder: Path, data: bytes) -> Manifest:
    path = folder / MANIFEST
    head: Any = parsed(dict[str, Any], data, str(path))
    if head.get("format") != FORMAT or head.get("version") not in READABLE:
        raise ChildFileError(
            f'{path}: expected format "{FORMAT}" version {" or ".join(map(str, READABLE))}, got {str(head.get("format"))[:40]!r}'
            f" version {str(head.get('version'))[:40]}. Remedy: read it with the ds_childtune that wrote it"
            f" ({str(head.get('library'))[:40]}), or write it again."
        )
    return parsed(Manifest, data, str(path))


def _unique(names: Iterable[str], where: str) -> None:
    for one, other in pairwise(sorted(names)):
        if one == other:
            raise ChildFileError(f"{where}: expected every name once, got {one[:80]!r} again. {DAMAGED}")


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A file whose header has been read, for the length of a `with`. Raises ChildFileError when it is another one by now."""
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> ChildFileError:
    return ChildFileError(f"{path}: expected the file that was opened, got: {str(error)[:200]}. {DAMAGED}")


def _read(file: BinaryIO, stored: Stored, start: int, end: int, *, values: bool = True) -> Piece:
    """What a piece has of the parameter's elements [start, end).

    Raises:
        ChildFileError: when the mask is not what its entry says.
        OSError: when the file has become shorter.
    """
    entry = stored.entry
    start, end = (min(max(at, entry.start), entry.end) for at in (start, end))
    index, first, last = _inside(file, stored, start - entry.start, end - entry.start)
    tensors = {}
    for name in entry.tensors if values else ():
        dtype, at = stored.offsets[name]
        tensors[name] = _tensor(file, at + first * DTYPES[dtype].itemsize, last - first, dtype)
    return Piece(entry.parameter, start, end - start, index, tensors, entry.numbers)


def _tensor(file: BinaryIO, start: int, numel: int, dtype: str) -> Tensor:
    """1-D: `numel` entries from a byte on. Raises OSError, see `_read`."""
    if not numel:
        return torch.empty(0, dtype=DTYPES[dtype])
    data = bytearray(numel * DTYPES[dtype].itemsize)
    file.seek(start)
    if (got := file.readinto(data)) != len(data):  # type: ignore[attr-defined] # every file that `open` gives has it
        raise OSError(f"it ends {len(data) - got} bytes too early")
    return torch.frombuffer(data, dtype=DTYPES[dtype])


def _inside(file: BinaryIO, stored: Stored, start: int, end: int) -> tuple[Tensor | None, int, int]:
    """The child's elements among [start, end) of a piece, counted from `start`, and which entries of its tensors belong to them.

    Nothing is made of a mask before its ones have been counted.
    """
    entry = stored.entry
    if entry.mask == "all":
        return None, start, end
    dtype, at = stored.offsets["mask" if entry.mask == "bits" else "index"]
    if entry.mask == "bits":
        bits = _tensor(file, at, (entry.numel + 7) // 8, dtype).numpy()
        # A bit beyond the last element is one too many, so that it is noticed.
        kept = ones(bits, 0, 8 * bits.size)
        if kept == entry.kept:
            first = ones(bits, 0, start)
            count = kept if end - start == entry.numel else ones(bits, start, end)
            return places_of_ones(bits, start, end, count, wide=entry.numel > _MAX_INT32), first, first + count
    else:
        # In numpy, as there may be hundreds of thousands of small pieces.
        places = _tensor(file, at, entry.kept, dtype).numpy()
        kept = places.size
        if not kept or (places[0] >= 0 and places[-1] < entry.numel and bool((places[1:] > places[:-1]).all())):
            first, last = np.searchsorted(places, np.array([start, end], dtype=places.dtype)).tolist()
            return torch.from_numpy(places[first:last] - places.dtype.type(start)), first, last
    raise ChildFileError(
        f"{getattr(file, 'name', '')}: {entry.parameter[:80]}: expected {entry.kept} ascending elements below {entry.numel},"
        f" got {kept} that are not. {DAMAGED}"
    )


def ones(bits: Bytes, start: int, end: int) -> int:
    """How many of the bits [start, end) are set; lowest bit of a byte first."""
    total = 0
    for tile, first, last in _tiles(bits, start, end):
        inner = tile.copy()
        if len(inner):
            inner[0] &= 0xFF << first & 0xFF
            inner[-1] &= 0xFF >> last
        total += int(_ONES[inner].sum(dtype=np.int64))
    return total


def places_of_ones(bits: Bytes, start: int, end: int, count: int, *, wide: bool) -> Tensor:
    """int32, or int64 if `wide`, [count]: which of the bits [start, end) are set, counted from `start`."""
    places = torch.empty(count, dtype=torch.int64 if wide else torch.int32)
    filled, at = 0, start
    for tile, first, last in _tiles(bits, start, end):
        unpacked = np.unpackbits(tile, bitorder="little")[first : 8 * tile.size - last]
        found = torch.from_numpy(np.flatnonzero(unpacked)) + (at - start)
        places[filled : filled + found.numel()] = found
        filled, at = filled + found.numel(), at + unpacked.size
    return places


def _tiles(bits: Bytes, start: int, end: int) -> Iterator[tuple[Bytes, int, int]]:
    """The bytes of the bits [start, end) in tiles, each with the number of bits to leave out at its beginning and at its end."""
    first, last = start // 8, -(-end // 8)
    for at in range(first, last if end > start else first, _TILE):
        stop = min(at + _TILE, last)
        yield bits[at:stop], max(start - 8 * at, 0), max(8 * stop - end, 0)
