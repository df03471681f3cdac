"""Damage and forge folders of json and safetensors files, the same way for the same seed."""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from ds_childtune.child_files.format import ChildFileError, Manifest, parse, seal

Files = dict[str, bytes]
"""A folder's files, by path."""


def manifest_of(files: Files) -> str:
    """The path of the manifest, or where it would be."""
    return next((name for name in files if name.endswith("child.json")), "child.json")


NASTY: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    7,
    2**31,
    2**53 + 1,
    2**62,
    2**63,
    2**64 - 1,
    10**40,
    1.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "child.json",
    "../../etc/passwd",
    "/dev/zero",
    "\x00",
    "\ud800",
    "float32",
    "bits",
    "index",
    "all",
    "x" * 5000,
    [],
    [[]],
    {},
    {"a": 1},
    [2**62] * 70,
)


def mutated(files: Files, seed: int) -> tuple[Files, str]:
    """The files, one to three times damaged, and what was done."""
    rng = random.Random(seed)
    result, done = dict(files), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        mutation = rng.choice(MUTATIONS)
        mutation(result, rng)
        done.append(mutation.__name__)
        if not result:
            break
    return result, ", ".join(done)


# ---------------------------------------------------------------- accidents


def _truncate(files: Files, rng: random.Random) -> None:
    name = rng.choice(sorted(files))
    files[name] = files[name][: rng.randrange(len(files[name]) + 1)]


def _append(files: Files, rng: random.Random) -> None:
    files[rng.choice(sorted(files))] += rng.randbytes(rng.choice((1, 8, 4096)))


def _flip_bits(files: Files, rng: random.Random) -> None:
    name = rng.choice(sorted(files))
    data = bytearray(files[name])
    for _ in range(rng.choice((1, 1, 2, 8)) if data else 0):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    files[name] = bytes(data)


def _remove(files: Files, rng: random.Random) -> None:
    del files[rng.choice(sorted(files))]


def _swap(files: Files, rng: random.Random) -> None:
    one, other = rng.choice(sorted(files)), rng.choice(sorted(files))
    files[one], files[other] = files[other], files[one]


# ---------------------------------------------------------------- forgeries: checksums are made right again


def _bytes_in_a_shard(files: Files, rng: random.Random) -> None:
    if name := _shard(files, rng):
        data = bytearray(files[name])
        where = rng.randrange(len(data) + 1) if rng.random() < 0.7 else 0
        number = rng.choice((0, 1, 2**31, 2**32, 2**40, 2**63, 2**64 - 1, rng.getrandbits(64)))
        data[where : where + 8] = struct.pack("<Q", number)
        files[name] = bytes(data)
        _sign(files)


def _truncate_a_shard(files: Files, rng: random.Random) -> None:
    if name := _shard(files, rng):
        files[name] = files[name][: rng.randrange(len(files[name]) + 1)]
        _sign(files)


def _tensors(files: Files, rng: random.Random) -> None:
    """Indices, masks and values."""
    name = _shard(files, rng)
    if name and (parts := _split(files[name])) and parts[1]:
        body = bytearray(parts[1])
        for _ in range(rng.choice((1, 2, 16))):
            body[rng.randrange(len(body))] = rng.choice((0, 1, 2, 127, 128, 255))
        files[name] = files[name][: -len(body)] + bytes(body)
        _sign(files)


def _header(files: Files, rng: random.Random) -> None:
    """What safetensors says about its tensors."""
    name = _shard(files, rng)
    if name and (parts := _split(files[name])):
        header, body = parts
        _edit(header, rng)
        files[name] = _joined(header, body)
        _sign(files)


def _pieces(files: Files, rng: random.Random) -> None:
    """What the library says about them, in a text of json inside json."""
    name = _shard(files, rng)
    if name and (parts := _split(files[name])):
        header, body = parts
        try:
            key = rng.choice(sorted(header["__metadata__"]))
            pieces = json.loads(header["__metadata__"][key])
            _edit(pieces, rng)
            header["__metadata__"][key] = json.dumps(pieces)
        except (KeyError, IndexError, TypeError, ValueError, RecursionError):
            return
        files[name] = _joined(header, body)
        _sign(files)


def _manifest(files: Files, rng: random.Random) -> None:
    name = manifest_of(files)
    try:
        manifest = json.loads(files[name])
        _edit(manifest, rng)
        files[name] = _sealed(manifest)
    except (KeyError, TypeError, ValueError, RecursionError):
        return


def _manifest_text(files: Files, rng: random.Random) -> None:
    """json that is no json, or too deep, or has a key twice."""
    name = manifest_of(files)
    data = files.get(name, b"")
    where = rng.randrange(len(data) + 1)
    files[name] = (
        data[:where] + rng.choice((b"[" * 100_000, b"9" * 5000, b"\xff\xfe", b'"', b"NaN", b"}")) + data[where:]
    )


MUTATIONS: tuple[Callable[[Files, random.Random], None], ...] = (
    _truncate,
    _append,
    _flip_bits,
    _remove,
    _swap,
    _bytes_in_a_shard,
    _bytes_in_a_shard,
    _tensors,
    _tensors,
    _truncate_a_shard,
    _header,
    _header,
    _pieces,
    _pieces,
    _pieces,
    _manifest,
    _manifest,
    _manifest_text,
)
"""Those of which there are more kinds come more often."""


def _edit(tree: Any, rng: random.Random) -> None:
    """Change one place of a json tree."""
    node: Any = tree
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = rng.choice(keys)
        if not isinstance(node[key], (dict, list)) or rng.random() < 0.15:
            break
        node = node[key]
    kind = rng.randrange(6)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[rng.choice(("", "x", str(key) + "2"))] = node[key]
    elif kind == 1:
        node.append(node[key])
    elif kind == 2 and isinstance(node[key], int):
        node[key] += rng.choice((-2, -1, 1, 2, 8, 1 << 40))
    elif kind == 3:
        other = rng.choice(keys)
        node[key], node[other] = node[other], node[key]
    else:
        node[key] = rng.choice(NASTY)


def _shard(files: Files, rng: random.Random) -> str | None:
    names = sorted(name for name in files if name.endswith(".safetensors"))
    return rng.choice(names) if names else None


def _split(data: bytes) -> tuple[Any, bytes] | None:
    """Header and tensors of a safetensors file, if it still is one."""
    try:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
    except (struct.error, ValueError, OverflowError, RecursionError):
        return None
    return (header, data[8 + length :]) if isinstance(header, dict) else None


def _joined(header: Any, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def _sign(files: Files) -> None:
    """Sizes and checksums as the files have them now, wherever the manifest lists some."""
    name = manifest_of(files)
    by_name = {PurePosixPath(path).name: data for path, data in files.items()}

    def sign(node: Any) -> None:
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            sign(child)
        if (
            isinstance(node, dict)
            and "blake2b" in node
            and isinstance(node.get("name"), str)
            and node["name"] in by_name
        ):
            data = by_name[node["name"]]
            node |= {"bytes": len(data), "blake2b": hashlib.blake2b(data, digest_size=16).hexdigest()}

    try:
        manifest = json.loads(files[name])
        sign(manifest)
        files[name] = _sealed(manifest)
    except (KeyError, ValueError, RecursionError):
        return


def _sealed(manifest: Any) -> bytes:
    """With the manifest's own checksum right again, where it still is one."""
    data = json.dumps(manifest).encode()
    try:
        return seal(parse(Manifest, data, "")).json()
    except (ChildFileError, ValueError):
        return data


def read_files(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_files(folder: Path, files: Files) -> None:
    """Exactly these files. Most of them are there already, and reading is faster than writing."""
    for path in folder.rglob("*"):
        if path.is_file() and str(path.relative_to(folder)) not in files:
            path.unlink()
    for name, data in files.items():
        path = folder / name
        if not path.exists() or path.read_bytes() != data:
            path.write_bytes(data)
