"""Files that appear whole or not at all, whatever ends the process or the machine."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary sibling to write into. When the block ends well it is on disk under the name `path`; else it is gone.

    Raises:
        RuntimeError: for a full disk, a folder that cannot be written, and whatever else the system refuses.
    """
    # A folder, as safetensors makes another file next to the one that it is given; and the same name each time, so that what a
    # killed process left behind goes away.
    folder = path.with_name(f".{path.name}.tmp")
    temporary = folder / path.name
    try:
        with explained(path):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)  # only the owner can read what safetensors writes
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_bytes(path: Path, data: bytes) -> None:
    """A whole file, atomically. Raises RuntimeError, see `new_file`."""
    with new_file(path) as temporary:
        temporary.write_bytes(data)


def new_folder(path: Path) -> None:
    """Make `path` and its parents, on disk. Raises RuntimeError, see `new_file`."""
    with explained(path):
        missing = [p for p in (path, *path.parents) if not p.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            sync_folder(folder.parent)


def sync_folder(path: Path) -> None:
    """Put the names in a folder on disk: without that a file may lose its name when the machine fails."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot; they order names and contents themselves.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """What the system refuses, as a RuntimeError with a remedy."""
    try:
        yield
    except OSError as error:
        remedies = {
            errno.ENOSPC: "free some space, or write elsewhere",
            errno.EDQUOT: "free some of your quota, or write elsewhere",
            errno.EACCES: "write to a folder of yours, or change its permissions",
            errno.EPERM: "write to a folder of yours, or change its permissions",
            errno.EROFS: "write to a file system that is not read-only",
            errno.ENOTDIR: "choose a path whose parents are folders",
        }
        remedy = remedies.get(error.errno or 0, "see that the path is right and the file system is well")
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise RuntimeError(f"expected to write {path}, got: {reason}. Remedy: {remedy}.") from error
