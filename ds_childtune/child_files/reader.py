"""Read a child, which may be damaged or forged. See [Note: child files].

Whatever is wrong is a `ChildFileError`. Nothing is allocated before its size has been compared with that of the file; nothing is
unpickled; and no piece is read before the header of its file has been found to agree with the manifest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from ds_childtune.child_files.checksums import blake2b
from ds_childtune.child_files.format import (
    FORMAT,
    MANIFEST,
    MAX_NUMEL,
    READABLE,
    ChildFileError,
    FileEntry,
    Manifest,
    ParameterEntry,
    Piece,
    parse,
)
from ds_childtune.child_files.header import DAMAGED, Header
from ds_childtune.child_files.holders import Run
from ds_childtune.child_files.patches import CheckpointWeightPatch, Only, patch_of
from ds_childtune.child_files.piece_reader import join, opened_file, pieces_within, read_piece, unreadable
from ds_childtune.child_files.places import Found, Headers, Placed

_MAX_MANIFEST_BYTES = 256 << 20


@dataclass(frozen=True)
class SavedChild:
    """A child's folder. Reading some of its values opens only the files that have them; with version 1 also all files' headers."""

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
    def _headers(self) -> Headers:
        return Headers(self.folder)

    @cached_property
    def _places(self) -> Placed | Found:
        if self.manifest.holders is None:
            return Found(self.folder, self.manifest, self._headers)
        return Placed(self.folder, self.manifest, self.manifest.holders)

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
        """The elements [start, start + numel) of a stored parameter, from whichever files have them; by default all.

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
        return [join(r.name, r.start, r.end - r.start, own) for r, own in zip(runs, parts, strict=True)]

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
            with opened_file(self.folder / file.name) as opened:
                for i, start, end in wanted[file]:
                    for stored in pieces_within(header.get(runs[i].name, ()), start, end):
                        parts[i].append(read_piece(opened, stored, start, end, values=values))
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
            with opened_file(self.folder / file.name) as opened:
                pieces = [
                    read_piece(opened, s, start, end)
                    for s in pieces_within(self._header(file).get(name, ()), start, end)
                ]
            yield from pieces

    def patches(self, *, since: SavedChild | None = None, only: Only | None = None) -> Iterator[CheckpointWeightPatch]:
        """The child as an inference server takes it, tensor after tensor. See [Note: patches] in patches.py.

        Args:
            since: an earlier version of the same child: only what has changed is sent.
            only: "whole": dense patches of the tensors that the child has every element of; "partial": sparse ones of the others.
                None: sparse patches of all.

        Raises:
            ChildFileError, ValueError: see `read` and `patch_of`.
        """
        for name in sorted(self.stored):
            before = None if since is None else since.read(name)
            patch = patch_of(self.parameter(name), self.read(name), before, only)
            if patch is not None:
                yield patch

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
                got = blake2b(self.folder / file.name)
            except OSError as error:
                raise unreadable(self.folder / file.name, error) from None
            if got != file.blake2b:
                raise ChildFileError(
                    f"{self.folder / file.name}: expected checksum {file.blake2b}, got {got}: bytes have changed. {DAMAGED}"
                )


def open_child(
    folder: str | Path, *, kind: str | None = None, checksums: bool = True, manifest: bytes | None = None
) -> SavedChild:
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
    child = SavedChild(folder, parsed_manifest)
    child._places  # noqa: B018 # checks them
    if checksums:
        child.check_contents()
    return child


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
            " Of a checkpoint, `ds_childtune export` writes such a folder."
        ) from None


def _manifest(folder: Path, data: bytes) -> Manifest:
    path = folder / MANIFEST
    head: Any = parse(dict[str, Any], data, str(path))
    if head.get("format") != FORMAT or head.get("version") not in READABLE:
        raise ChildFileError(
            f'{path}: expected format "{FORMAT}" version {" or ".join(map(str, READABLE))}, got {str(head.get("format"))[:40]!r}'
            f" version {str(head.get('version'))[:40]}. Remedy: read it with the ds_childtune that wrote it"
            f" ({str(head.get('library'))[:40]}), or write it again."
        )
    return parse(Manifest, data, str(path))


def _unique(names: Iterable[str], where: str) -> None:
    for one, other in pairwise(sorted(names)):
        if one == other:
            raise ChildFileError(f"{where}: expected every name once, got {one[:80]!r} again. {DAMAGED}")
