"""The mask of a child that was exported, or saved with a checkpoint, for another run: `select(child=...)`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ds_childtune.checkpoint import tag_folder
from ds_childtune.checkpoint.child import read_masks
from ds_childtune.child_files.format import MANIFEST, ChildFileError
from ds_childtune.child_files.reader import open_child
from ds_childtune.ranks import from_first, this_rank, world_size
from ds_childtune.selection.given import Unnamed
from ds_childtune.shards import FlatShard, mark_eligible


def find_child(path: Path) -> Path:
    """`locate_child`, for all ranks. A collective."""
    return from_first(lambda: locate_child(path, "select: child"))


def locate_child(path: Path, what: str) -> Path:
    """The folder of a child's files: `path`, or the one inside a checkpoint's tag, or inside the latest tag.

    Args:
        what: who asks, for the error.

    Raises:
        ChildFileError: when there is none.
    """
    candidates = [path, path / tag_folder.CHILD]
    if path.is_dir() and (latest := tag_folder.read_latest(path)) is not None:
        candidates.append(path / latest / tag_folder.CHILD)
    for folder in candidates:
        if (folder / MANIFEST).is_file():
            return folder
    raise ChildFileError(
        f"{what}: expected the folder of an export, or of a checkpoint with a child, got {path}, which has no {MANIFEST}."
        " Remedy: pass what child.export was given, or what engine.save_checkpoint was given; of a Trainer's output one checkpoint,"
        " for example checkpoint-500."
    )


def saved_masks(
    folder: Path, shards: Sequence[FlatShard], shapes: Mapping[str, torch.Size], unnamed: Unnamed
) -> Iterator[Tensor]:
    """For each flat shard, bool 1-D: True = inside the child that was saved, or not eligible. Each rank reads only its part.

    Args:
        folder: from `find_child`.
        shapes: of every parameter.
        unnamed: what eligible parameters are that the child's files do not have.

    Raises:
        ChildFileError: for a child that is damaged, or of a model whose parameters have other shapes.
    """
    child = open_child(folder, checksums=False)
    child.check_contents(this_rank(), world_size())
    stored = {p.name: p.shape for p in child.manifest.parameters if p.stored}
    names = {f.name for shard in shards for f in shard.eligible}
    for name in sorted(names & stored.keys()):
        if stored[name] != tuple(shapes[name]):
            raise ChildFileError(
                f"{folder}: {name}: expected shape {tuple(shapes[name])}, as in the model, got {stored[name]}."
                " Remedy: pass a child of the same model."
            )
    if not stored:
        raise ChildFileError(
            f"{folder}: expected a ChildTuning-D child, got one without masks. Remedy: pass one that select has chosen."
        )
    yield from _with_the_others(
        read_masks(child, mark_eligible(shards, frozenset(names & stored.keys()))), shards, stored.keys(), unnamed
    )


def _with_the_others(
    masks: Iterable[Tensor], shards: Sequence[FlatShard], stored: Iterable[str], unnamed: Unnamed
) -> Iterator[Tensor]:
    known = frozenset(stored)
    for shard, mask in zip(shards, masks, strict=True):
        for fragment in shard.eligible:
            if fragment.name not in known and unnamed == "frozen":
                fragment.of(mask).fill_(False)
        yield mask
