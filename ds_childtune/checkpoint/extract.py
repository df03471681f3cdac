"""Only the child, out of a checkpoint: what `child.export` would have written, without ranks, engine or training script."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ds_childtune._version import __version__
from ds_childtune.checkpoint.child import KIND as CHECKPOINT
from ds_childtune.checkpoint.given import locate_child
from ds_childtune.checkpoint.rank_file import read_layout
from ds_childtune.checkpoint.run_record import RunRecord
from ds_childtune.child_files.atomic import new_folder
from ds_childtune.child_files.export_info import KIND, describe, persistent_buffers, refuse_moved_outside
from ds_childtune.child_files.fingerprint import fingerprint
from ds_childtune.child_files.format import DTYPES, ChildFileError, Manifest, ParameterEntry, Piece, seal
from ds_childtune.child_files.holders import Held, Holders
from ds_childtune.child_files.reader import SavedChild, open_child
from ds_childtune.child_files.writer import write_manifest, write_pieces
from ds_childtune.shards import Fragment
from ds_childtune.zero.checkpoint_read import SavedRun
from ds_childtune.zero.elastic import weights_of
from ds_childtune.zero.layout import Layout


def export_checkpoint(checkpoint: Path, output: Path, model: nn.Module) -> Manifest:
    """Write the child of a checkpoint as `child.export` does. Not a collective: one process reads all ranks' files.

    DeepSpeed's files are unpickled, which runs what is in them: use checkpoints that you trust.

    Args:
        checkpoint: a tag's folder, or a checkpoint folder, whose latest tag is taken.
        output: a folder. A child that it had before is replaced.
        model: of the class and config that was trained; on any device, its weights are not read.

    Raises:
        ChildFileError: for a checkpoint that is damaged, or of another model.
        NotImplementedError: where elements outside the child have moved.
    """
    saved = _Saved.open(locate_child(checkpoint, "export"))
    names = {p.name for p in saved.child.manifest.parameters}
    own = dict(model.named_parameters())
    if names != own.keys():
        raise ChildFileError(
            f"{checkpoint}: expected a checkpoint of {type(model).__name__}, got one with other parameters"
            f" ({', '.join(sorted(names ^ own.keys())[:3])}). Remedy: give the base model, and --model-class where the run had"
            " another class."
        )
    sums: dict[str, int] = {}
    new_folder(output)
    buffers = saved.buffers(persistent_buffers(model))
    pieces = list(saved.pieces(own, sums))
    stored = {piece.parameter for piece in pieces} | buffers.keys()
    pieces += [Piece(name, 0, values.numel(), None, {"values": values}) for name, values in buffers.items()]
    file = write_pieces(output, 0, pieces)
    entries = _entries(own, buffers, persistent_buffers(model), saved.dtype, stored)
    extra = describe(model, sums, saved.record.progress.step)
    files = () if file is None else (file,)
    manifest = Manifest(__version__, KIND, dict(saved.child.manifest.config), entries, files, extra)
    held = Holders.of([Held(0, e.numel if e.stored else 0, 0) for e in entries])
    manifest = seal(manifest.with_holders(held))
    write_manifest(output, manifest)
    return manifest


@dataclass(frozen=True)
class _Saved:
    """A checkpoint's child, and DeepSpeed's files of the run that wrote it."""

    child: SavedChild
    record: RunRecord
    run: SavedRun
    layout: Layout

    @classmethod
    def open(cls, folder: Path) -> _Saved:
        """Check that everything is there, and undamaged. Raises ChildFileError, NotImplementedError."""
        child = open_child(folder, kind=CHECKPOINT)
        record = RunRecord.of(child)
        if not record.chosen:
            raise ChildFileError(
                f"{folder}: expected a child that was chosen, got a checkpoint from before select()."
                " Remedy: use a later checkpoint."
            )
        config = child.manifest.config
        refuse_moved_outside("export", config.get("mode"), config.get("compat"), record.progress.earlier_children)
        record.check_files(folder.parent, 0, 1)
        layout = Layout(shard for file in record.ranks for shard in read_layout(folder / file.name))
        files = {(file.what, file.rank): file.name for file in record.deepspeed}
        return cls(child, record, SavedRun(folder.parent, record.wrapper(folder), files), layout)

    @property
    def dtype(self) -> torch.dtype:
        """Of the forward pass."""
        return DTYPES[self.record.precision]

    def pieces(self, parameters: dict[str, nn.Parameter], sums: dict[str, int]) -> Iterator[Piece]:
        """One for each trained parameter; fingerprints of all go into `sums`, in the model's order."""
        for name, param in parameters.items():
            shape = self._shape(name, param)
            values = weights_of(self.run, self.layout, Fragment(name, 0, 0, shape.numel()), shape)
            if values is None:
                raise ChildFileError(
                    f"{self.child.folder}: expected the weights of {name}, got a checkpoint that was saved without frozen parameters."
                    " Remedy: save it with exclude_frozen_parameters=False, or use child.export in the run."
                )
            values = values.to(self.dtype)
            mask = self._mask(name, shape.numel()) if name in self.layout else None
            sums[name] = fingerprint(values, 0, mask)
            if mask is not None:
                yield Piece.of(name, 0, mask, values=values)

    def _shape(self, name: str, param: Any) -> torch.Size:
        shape = self.child.parameter(name).shape
        if shape != tuple(param.shape):
            raise ChildFileError(
                f"{self.child.folder}: {name}: expected shape {tuple(param.shape)}, as in the model, got {shape}."
                " Remedy: give the base model that was trained."
            )
        return torch.Size(shape)

    def _mask(self, name: str, numel: int) -> Tensor:
        """bool 1-D: True = inside the child, or not eligible."""
        if name not in self.child.stored:
            return torch.ones(numel, dtype=torch.bool)
        return self.child.read_runs([self.child.whole(name)], values=False)[0].mask()

    def buffers(self, persistent: dict[str, Tensor]) -> dict[str, Tensor]:
        """1-D, by name."""
        module = self.run.model_states()["module"]
        return {name: module[name].detach().contiguous().view(-1) for name in persistent}


def _entries(
    parameters: dict[str, nn.Parameter],
    buffers: dict[str, Tensor],
    persistent: dict[str, Tensor],
    dtype: torch.dtype,
    stored: set[str],
) -> tuple[ParameterEntry, ...]:
    """As `parameter_entries` of the trained model."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    of_parameters = (ParameterEntry(n, tuple(p.shape), names[dtype], n in stored) for n, p in parameters.items())
    of_buffers = (
        ParameterEntry(n, tuple(b.shape), names[buffers[n].dtype], n in stored) for n, b in persistent.items()
    )
    return (*of_parameters, *of_buffers)
