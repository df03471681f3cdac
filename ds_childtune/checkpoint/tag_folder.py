"""The folder of one checkpoint, `save_dir/tag`: there whole, or not there.

[Note: a tag appears whole]
Everything is written into the sibling `.tag.child-partial`. When every rank has put its files on disk, one rename gives the
folder its name, and `latest` is replaced after that, atomically too. So whatever is killed, and whenever: `latest` names a whole
checkpoint, and a folder that lacks its manifest is never taken for one. Where a tag is written again, the old folder steps aside to
`.tag.child-old` for the length of two renames; `recover` undoes the first if the second never came.

What is to be removed is renamed first, to `.*.child-trash`: a network file system keeps a folder whose files another process has open,
and that must not be in the way of a checkpoint. Each save tries again to remove it.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePath

from ds_childtune.child_files.atomic import explained, sync_folder, write_bytes
from ds_childtune.child_files.format import ChildFileError

LATEST = "latest"
_LONGEST = 4096
"""Bytes of a path."""
CHILD = "child"
"""The library's own subfolder of a tag."""
_PARTIAL, _OLD, _TRASH = ".child-partial", ".child-old", ".child-trash"
"""Endings that nobody else gives to a folder: what has one may be removed."""


def check_tag(tag: object) -> str:
    """`tag` as DeepSpeed takes it, a string.

    Raises:
        ValueError: for a tag that is no name of a folder below the checkpoints' folder.
    """
    name = str(tag)
    path = PurePath(name)
    if not path.name or path.is_absolute() or ".." in path.parts or not name.isprintable():
        raise ValueError(
            f"save_checkpoint: expected a tag that names a folder inside save_dir, got {name!r}."
            ' Remedy: pass for example tag="step100", or leave it to DeepSpeed.'
        )
    return name


def partial_tag(tag: str) -> str:
    """The tag under which files are written until they are all there."""
    path = PurePath(tag)
    return str(path.with_name(f".{path.name}{_PARTIAL}"))


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}{_OLD}")


def sync_file(path: Path) -> None:
    """Put a file that another library wrote on disk. Raises RuntimeError, see `atomic.new_file`."""
    with explained(path), path.open("rb+") as file:
        os.fsync(file.fileno())


def prepare(save_dir: Path, tag: str) -> None:
    """Before a save, on one rank: undo a rename that was cut off, and remove what writers that were killed have left."""
    recover(save_dir, tag)
    for place in {save_dir, (save_dir / tag).parent}:
        for left in place.glob(f".*{_PARTIAL}"):
            _throw_away(left)
        for left in place.glob(f".*{_OLD}"):
            if left.with_name(left.name[1 : -len(_OLD)]).exists():
                _throw_away(left)
        for left in place.glob(f".*{_TRASH}"):
            shutil.rmtree(left, ignore_errors=True)


def publish(save_dir: Path, tag: str) -> None:
    """Give a partial folder its name, on one rank, when every rank's files are on disk. `tidy` follows."""
    folder = save_dir / tag
    if folder.exists():
        folder.rename(_aside(folder))
    (save_dir / partial_tag(tag)).rename(folder)
    sync_folder(folder.parent)


def tidy(save_dir: Path, tag: str) -> None:
    """Remove the folder that a tag had before, as far as the file system lets us: the new one is in its place."""
    with suppress(OSError):
        _throw_away(_aside(save_dir / tag))


def _throw_away(folder: Path) -> None:
    trash = folder.with_name(f".{uuid.uuid4().hex}{_TRASH}")
    folder.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def recover(save_dir: Path, tag: str) -> None:
    """Bring a folder back that stepped aside for a new one that never came."""
    folder = save_dir / tag
    if not folder.exists() and _aside(folder).exists():
        _aside(folder).rename(folder)


def discard(save_dir: Path, tag: str) -> None:
    """Remove a partial folder after an error; as far as the file system lets us."""
    shutil.rmtree(save_dir / partial_tag(tag), ignore_errors=True)


def write_latest(save_dir: Path, tag: str) -> None:
    """Point `latest` at a tag, atomically."""
    write_bytes(save_dir / LATEST, tag.encode())


def read_latest(load_dir: Path) -> str | None:
    """The tag that `latest` names, None when there is no such file. Raises ChildFileError for one that names none."""
    path = load_dir / LATEST
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            return check_tag(file.read(_LONGEST).decode().strip())
    except (OSError, ValueError) as error:
        raise ChildFileError(
            f"{path}: expected the name of a tag, got: {str(error)[:200]}. Remedy: write the name of a checkpoint's folder into"
            " it, or pass tag=."
        ) from None


def tags(load_dir: Path) -> Iterator[str]:
    """The tags with a manifest, newest first."""
    manifests = load_dir.glob(f"[!.]*/{CHILD}/child.json")
    for manifest in sorted(manifests, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        yield manifest.parents[1].name
