"""Write a child. See [Note: child files]."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ds_childtune.child_files.atomic import explained, new_file, sync_folder, write_bytes
from ds_childtune.child_files.checksums import blake2b
from ds_childtune.child_files.format import DTYPES, MANIFEST, FileEntry, Manifest, Piece, PieceEntry, adapter

_OURS = re.compile(r"child-\d{5,}(-[0-9a-f]{16})?\.safetensors")
_LEFT = re.compile(r"\.child-\d{5,}\.safetensors\.tmp")
"""What `atomic.new_file` of a killed writer left."""


def write_pieces(folder: Path, writer: int, pieces: Iterable[Piece]) -> FileEntry | None:
    """One writer's file, whole and on disk when this returns. None when there are no pieces, and then no file.

    Args:
        folder: exists already.
        writer: the rank.

    Raises:
        RuntimeError: when the system refuses, for example with a full disk.
    """
    entries: list[PieceEntry] = []
    tensors: dict[str, Tensor] = {}
    for piece in (p for p in pieces if p.numel):
        entry, stored = _encode(piece)
        entries.append(entry)
        tensors |= stored
    if not entries:
        return None
    metadata = {"pieces": adapter(list[PieceEntry]).dump_json(entries).decode()}
    draft = folder / f"child-{writer:05d}.safetensors"
    with new_file(draft) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            raise _as_os_error(error) from error
    with explained(draft):
        digest = blake2b(draft)
        # Named after its contents, so that writing into a folder that holds a child already leaves that one whole.
        path = folder / f"child-{writer:05d}-{digest[:16]}.safetensors"
        draft.replace(path)
        sync_folder(folder)
        return FileEntry(path.name, path.stat().st_size, digest)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Make the folder a child: called once, by one rank, when every rank has written its pieces.

    A child that was there before is replaced in one instant; its files, and what killed writers left, are then removed.

    Raises:
        RuntimeError: when the system refuses; a child that was there before is then still there.
    """
    for file in manifest.files:
        if not (folder / file.name).is_file():
            raise RuntimeError(
                f"expected {file.name} of another rank in {folder}, got no such file."
                " Remedy: write to a folder that every rank sees, on a shared file system."
            )
    write_bytes(folder / MANIFEST, manifest.json())
    listed = {file.name for file in manifest.files}
    with explained(folder):
        for path in folder.iterdir():
            if path.is_dir() and _LEFT.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)
            elif _OURS.fullmatch(path.name) and path.name not in listed:
                path.unlink(missing_ok=True)


def _encode(piece: Piece) -> tuple[PieceEntry, dict[str, Tensor]]:
    """A piece as it is stored: its entry, and its tensors by their keys."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    index = None if piece.index is None else piece.index.cpu()
    if index is None:
        mask, places = "all", {}
    elif index.numel() * index.element_size() <= (piece.numel + 7) // 8:
        mask, places = "index", {"index": index.contiguous()}
    else:
        mask, places = "bits", {"mask": pack(piece.mask())}
    entry = PieceEntry(
        piece.parameter,
        piece.start,
        piece.numel,
        piece.kept,
        mask,  # type: ignore[arg-type] # mypy widens the tuples' literals
        {name: names[tensor.dtype] for name, tensor in piece.tensors.items()},
        dict(piece.numbers),
    )
    places |= {name: tensor.detach().cpu().contiguous() for name, tensor in piece.tensors.items()}
    return entry, {entry.key(name): tensor for name, tensor in places.items()}


def pack(mask: Tensor) -> Tensor:
    """uint8 [ceil(n / 8)] from bool [n], lowest bit first."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy(), bitorder="little"))


def _as_os_error(error: SafetensorError) -> OSError:
    """safetensors gives the system's error only as text."""
    code = re.search(r"os error (\d+)", str(error))
    return OSError(int(code.group(1)), str(error)) if code else OSError(str(error))
