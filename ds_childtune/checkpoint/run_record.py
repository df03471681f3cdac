"""The run that wrote a checkpoint: the `extra` of its manifest. See [Note: what a checkpoint holds]."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from ds_childtune.child_files import checksums
from ds_childtune.child_files.format import ChildFileError, FileEntry, check_seal, parse
from ds_childtune.child_files.reader import SavedChild
from ds_childtune.zero.engine import Wrapper

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_Count = Annotated[int, Field(ge=0, le=2**62)]
_FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_\-.]+$", max_length=200)]


@dataclass(frozen=True)
class DeepSpeedFile:
    """One of DeepSpeed's own files in the tag's folder."""

    __pydantic_config__ = _STRICT

    rank: _Count
    what: Literal["model", "optim"]
    name: _FileName
    bytes: _Count
    crc32: Annotated[str, Field(pattern="^[0-9a-f]{8}$")]
    """See `child_files/checksums.py`."""

    @classmethod
    def of(cls, path: Path, rank: int, what: Literal["model", "optim"]) -> DeepSpeedFile:
        return cls(rank, what, path.name, path.stat().st_size, checksums.crc32(path))


@dataclass(frozen=True)
class Progress:
    """How far a child has come, in numbers of ChildTuner's."""

    __pydantic_config__ = _STRICT

    step: _Count = 0
    """Applied steps."""
    selected_at: _Count = 0
    """ChildTuning-D: applied steps when the child was chosen."""
    earlier_children: bool = False
    """ChildTuning-D: whether another child was trained before this one."""
    threshold: float | None = None
    calibration_batches: _Count = 0


@dataclass(frozen=True)
class RunRecord:
    """The manifest's `extra`: the run that wrote the checkpoint."""

    __pydantic_config__ = _STRICT

    progress: Progress
    chosen: bool
    """False: a ChildTuning-D child that `select` had not fixed yet."""
    world_size: Annotated[int, Field(ge=1)]
    optimizer: str
    """A value of `Wrapper`: what laid the optimizer's state out in DeepSpeed's files."""
    precision: str
    """dtype of the forward pass."""
    ranks: tuple[FileEntry, ...]
    """One for each rank, in order."""
    deepspeed: tuple[DeepSpeedFile, ...]
    seal: str = ""
    """See `format.seal`."""

    @classmethod
    def of(cls, child: SavedChild) -> RunRecord:
        """Raises ChildFileError when the manifest is not a checkpoint's, or has changed."""
        check_seal(child.manifest, child.folder)
        record = parse(cls, json.dumps(child.manifest.extra), f"{child.folder}: extra")
        if len(record.ranks) != record.world_size:
            raise ChildFileError(
                f"{child.folder}: expected a file of each of {record.world_size} ranks, got {len(record.ranks)}."
                " Remedy: use another checkpoint, or an undamaged copy."
            )
        return record

    def wrapper(self, folder: Path) -> Wrapper:
        """What laid the optimizer's state out. Raises ChildFileError for what this version does not know."""
        if self.optimizer not in {w.value for w in Wrapper}:
            raise ChildFileError(
                f"{folder}: expected optimizer state in one of {', '.join(w.value for w in Wrapper)}, got {self.optimizer[:80]!r}."
                " Remedy: load it with the ds_childtune that wrote it, or use another checkpoint."
            )
        return Wrapper(self.optimizer)

    def check_files(self, folder: Path, share: int, of: int) -> None:
        """Sizes and checksums of every `of`-th file that is not in the manifest's own list, from the `share`-th on.

        Args:
            folder: the tag's.

        Raises:
            ChildFileError: for one that is missing, truncated or changed.
        """
        files = [(folder / "child" / f.name, f.bytes, f.blake2b, checksums.blake2b) for f in self.ranks]
        files += [(folder / f.name, f.bytes, f.crc32, checksums.crc32) for f in self.deepspeed]
        for path, size, digest, digest_of in files[share::of]:
            try:
                got = path.stat().st_size
            except OSError:
                got = None
            if got != size:
                raise ChildFileError(
                    f"{path}: expected a file of {size} bytes, got {'none' if got is None else got}."
                    " Remedy: use another checkpoint, or an undamaged copy."
                )
            if digest_of(path) != digest:
                raise ChildFileError(
                    f"{path}: expected checksum {digest}, got another: bytes have changed."
                    " Remedy: use another checkpoint, or an undamaged copy."
                )
