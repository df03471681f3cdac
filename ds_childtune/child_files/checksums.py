"""Checksums of files, by which damage is noticed.

Two kinds, and files on disk have them: blake2b for files that hold only a child, and crc32 for DeepSpeed's own files in a checkpoint,
which are as large as the model: blake2b would take a third of the time of writing them.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from pathlib import Path

_BLOCK = 1 << 20


def blake2b(path: Path) -> str:
    """Of the contents: 16 bytes, in hexadecimal."""
    digest = hashlib.blake2b(digest_size=16)
    for block in _blocks(path):
        digest.update(block)
    return digest.hexdigest()


def crc32(path: Path) -> str:
    """Of the contents: 4 bytes, in hexadecimal."""
    value = 0
    for block in _blocks(path):
        value = zlib.crc32(block, value)
    return f"{value:08x}"


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            yield block
