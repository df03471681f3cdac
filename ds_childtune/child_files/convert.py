"""An exported child in the formats of inference servers.

[Note: the folder of versions]
SGLang's /pull_weights and slime read one folder for each version of the weights: `weight_v000001` and so on. Version 0 is the base
model that the server began with. Written from SGLang's revision 81da301c (python/sglang/srt/weight_sync/local_checkpoint.py) and
slime's 624b824a:

    weight_v000001/model-00000-of-00001.safetensors   for each tensor that changed a zstd blob (uint8 1-D); under `__metadata__` the
                                                      checksum of the whole new tensor
    weight_v000001/model.safetensors.index.json       version, base_version, delta_encoding "overwrite", compression_format,
                                                      checksum_format; which file has which tensor

A blob of encoding "overwrite" is, decompressed and little-endian: a count (4 bytes), as many positions of bytes in the tensor (4 bytes
each), and the new bytes there. So a tensor has fewer than 2**32 bytes.

[Note: the folder of patches]
vLLM takes patches in memory, see [Note: patches]. On disk they are one safetensors file, with "name/values" and "name/indices", and
under `__metadata__`, key "patches", a json object: for each name its shape and dtype.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ds_childtune.child.child_shard import put_
from ds_childtune.child_files.atomic import explained, new_file, new_folder, sync_folder, write_bytes
from ds_childtune.child_files.export_info import KIND, ExportInfo
from ds_childtune.child_files.fingerprint import fingerprint, text
from ds_childtune.child_files.format import DTYPES, Piece
from ds_childtune.child_files.reader import SavedChild, open_child

Bytes = NDArray[np.uint8]

_VERSION = re.compile(r"weight_v(\d{6,})")


def to_vllm(child: str | Path, output: str | Path, *, since: str | Path | None = None) -> Path:
    """Write the child's patches as one file of `output`. See [Note: the folder of patches].

    Args:
        since: an earlier export of the same child: only what has changed is written.

    Raises:
        ChildFileError, ValueError: for folders that are not such children, or what cannot be a sparse patch.
        RuntimeError: when the system refuses.
    """
    opened = open_child(child, kind=KIND)
    tensors: dict[str, Tensor] = {}
    about: dict[str, dict[str, object]] = {}
    for patch in opened.patches(since=None if since is None else open_child(since, kind=KIND)):
        assert patch.indices is not None
        tensors[f"{patch.name}/values"], tensors[f"{patch.name}/indices"] = patch.values, patch.indices
        about[patch.name] = {"shape": list(patch.shape), "dtype": str(patch.dtype).removeprefix("torch.")}
    path = Path(output) / "patches.safetensors"
    new_folder(path.parent)
    with new_file(path) as draft:
        save_file(tensors, draft, metadata={"patches": json.dumps(about)})
    return path


def to_sglang(child: str | Path, base: str | Path, output: str | Path, *, since: str | Path | None = None) -> Path:
    """Write the next version's folder into `output`. See [Note: the folder of versions].

    Args:
        base: the base model's folder, in safetensors, of the dtype that the child was trained in: what the server began with.
        since: the export that the version before was made of; None for version 1, which follows the base model.

    Returns:
        The version's folder.

    Raises:
        ChildFileError, ValueError: for folders that are not such children or their base model, or where `since` does not fit the
            versions that there are.
        NotImplementedError: for a tensor of 2**32 bytes or more.
        RuntimeError: without zstandard, or when the system refuses.
    """
    compress = _zstd()
    new, old = open_child(child, kind=KIND), None if since is None else open_child(since, kind=KIND)
    version = _next_version(Path(output), follows=old is not None)
    with _tensors(Path(base)) as read:
        blobs, checksums = {}, {}
        for name in sorted(new.stored | (old.stored if old is not None else frozenset())):
            weights = read(name)
            after, before = (_with_child(weights, name, one, base) for one in (new, old))
            delta = _overwrite(name, _bytes(before), _bytes(after))
            if delta is not None:
                blobs[name] = torch.frombuffer(bytearray(compress(delta)), dtype=torch.uint8)
                checksums[name] = f"{zlib.adler32(_bytes(after).data):08x}"
    folder = Path(output) / f"weight_v{version:06d}"
    draft = folder.with_name(f".{folder.name}.tmp")
    file = "model-00000-of-00001.safetensors"
    index = {
        "metadata": {
            "version": f"{version:06d}",
            "base_version": f"{version - 1:06d}",
            "delta_encoding": "overwrite",
            "compression_format": "zstd",
            "checksum_format": "adler32",
        },
        "weight_map": dict.fromkeys(blobs, file),
    }
    with explained(draft):
        shutil.rmtree(draft, ignore_errors=True)
    new_folder(draft)
    with new_file(draft / file) as path:
        save_file(blobs, path, metadata=checksums)
    write_bytes(draft / "model.safetensors.index.json", json.dumps(index, indent=1).encode())
    with explained(folder):
        draft.rename(folder)
        sync_folder(folder.parent)
    return folder


def _next_version(output: Path, *, follows: bool) -> int:
    found = [
        int(m.group(1)) for p in (output.iterdir() if output.is_dir() else ()) if (m := _VERSION.fullmatch(p.name))
    ]
    version = max(found, default=0) + 1
    if follows != (version > 1):
        got = f"versions up to {version - 1}" if version > 1 else "no version"
        remedy = "pass --since, the export that the last version was made of" if version > 1 else "leave --since out"
        raise ValueError(
            f"{output}: expected {'an earlier version' if follows else 'no version yet'}, got {got}."
            f" Remedy: {remedy}, or write to another folder."
        )
    return version


@contextmanager
def _tensors(base: Path) -> Iterator[Callable[[str], Tensor]]:
    """Read one tensor after another of a saved model. Raises ValueError for what is not there."""
    files = sorted(base.glob("*.safetensors")) if base.is_dir() else []
    if not files:
        raise ValueError(
            f"{base}: expected the folder of a base model in safetensors, got none. Remedy: write one with save_pretrained."
        )
    opened: list[Any] = []
    try:
        opened += [safe_open(path, framework="pt") for path in files]
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{base}: expected readable safetensors files, got: {error}. Remedy: save the model again."
        ) from None
    home = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 # not a dict

    def read(name: str) -> Tensor:
        if name not in home:
            close = next((n for n in home if n.endswith(f".{name}") or name.endswith(f".{n}")), min(home))
            raise ValueError(
                f"{base}: expected a tensor {name!r}, as the model calls it, got only names such as {close!r}. Remedy: save the base"
                " model with save_pretrained. A model that transformers converts while it loads it, to fuse experts, has other names"
                " on disk: merge the child, and publish whole weights."
            )
        return home[name].get_tensor(name)  # type: ignore[no-any-return]

    yield read


def _with_child(weights: Tensor, name: str, child: SavedChild | None, base: str | Path) -> Tensor:
    """One tensor of the base model with the child on it; a copy. Raises ValueError for another base model."""
    if child is None or name not in child.stored:
        return weights
    entry, piece = child.parameter(name), child.read(name)
    if tuple(weights.shape) != entry.shape or weights.dtype != DTYPES[entry.dtype]:
        raise ValueError(
            f"{base}: {name}: expected {list(entry.shape)} {entry.dtype}, as the child was trained, got {list(weights.shape)}"
            f" {str(weights.dtype).removeprefix('torch.')}. Remedy: save the base model in {entry.dtype}."
        )
    flat = weights.reshape(-1).clone()
    _check_base(flat, piece, child, base)
    if piece.index is None:
        flat.copy_(piece.tensors["values"])
    else:
        put_(flat, piece.index, piece.tensors["values"])
    return flat


def _check_base(flat: Tensor, piece: Piece, child: SavedChild, base: str | Path) -> None:
    wanted = ExportInfo.of(child.manifest, child.folder).fingerprints.get(piece.parameter)
    if wanted is not None and text(fingerprint(flat, 0, piece.mask())) != wanted:
        raise ValueError(
            f"{base}: expected the base model of {child.folder}, but outside the child {piece.parameter} has other values."
            " Remedy: give the very weights that training began with."
        )


def _bytes(tensor: Tensor) -> Bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _overwrite(name: str, before: Bytes, after: Bytes) -> bytes | None:
    """See [Note: the folder of versions]. None where nothing has changed."""
    if after.size >= 2**32:
        raise NotImplementedError(
            f"{name}: expected fewer than 2**32 bytes, which the format has positions for, got {after.size}."
            " Remedy: merge the child, and publish whole weights."
        )
    changed = np.flatnonzero(before != after)
    if not changed.size:
        return None
    head = np.array([changed.size], "<u4")
    return head.tobytes() + changed.astype("<u4").tobytes() + after[changed].tobytes()


def _zstd() -> Callable[[bytes], bytes]:
    try:
        import zstandard
    except ImportError:
        raise RuntimeError("expected zstandard, got none. Remedy: pip install zstandard.") from None
    return zstandard.ZstdCompressor(level=3).compress
