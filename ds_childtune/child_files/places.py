"""Where the pieces of a child are: in which of its files. See [Note: holders]."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path

from ds_childtune.child_files.format import MANIFEST, ChildFileError, FileEntry, Manifest, ParameterEntry
from ds_childtune.child_files.header import DAMAGED, Header, read_header
from ds_childtune.child_files.holders import Holders, HoldersByRank, Run


class Headers:
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


class Placed:
    """Where pieces lie, as the manifest says. See [Note: holders]."""

    def __init__(self, folder: Path, manifest: Manifest, holders: Holders) -> None:
        """Raises ChildFileError when it cannot be so."""
        where = folder / MANIFEST
        parameters = manifest.parameters
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
        self._folder = folder
        self._holders = holders
        self._position = {p.name: i for i, p in enumerate(parameters)}
        self._parameters = {p.name: p for p in parameters}
        self._file: dict[int, FileEntry] = {}
        for file in manifest.files:
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


class Found:
    """Where pieces lie, as the headers of all files say: for version 1, whose manifest does not."""

    def __init__(self, folder: Path, manifest: Manifest, headers: Headers) -> None:
        """Reads every header. Raises ChildFileError unless pieces cover every stored parameter once."""
        self._folder = folder
        self._runs: dict[str, list[tuple[int, int, FileEntry]]] = {p.name: [] for p in manifest.parameters if p.stored}
        for file in manifest.files:
            for name, own in headers.of(file, self.check).items():
                self._runs[name] += [(stored.entry.start, stored.end, file) for stored in own]
        for parameter in manifest.parameters:
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
