"""`engine.save_checkpoint` of an engine with a child. See [Note: what a checkpoint holds] and [Note: a tag appears whole]."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ds_childtune._version import __version__
from ds_childtune.attachment import Attachment
from ds_childtune.checkpoint import tag_folder
from ds_childtune.checkpoint.child import (
    KIND,
    moment_keys,
    parameter_entries,
    pieces,
    stored_fragments,
    without_compact_state,
)
from ds_childtune.checkpoint.hooks import Hooks
from ds_childtune.checkpoint.rank_file import write_rank_file
from ds_childtune.checkpoint.run_record import DeepSpeedFile, RunRecord
from ds_childtune.child.base_optimizer import share_counters
from ds_childtune.child_files.atomic import explained, new_folder, sync_folder
from ds_childtune.child_files.format import FileEntry, Manifest, seal
from ds_childtune.child_files.holders import Holders
from ds_childtune.child_files.rank_holders import gather_holders
from ds_childtune.child_files.writer import write_manifest, write_pieces
from ds_childtune.random_states import read_random_states
from ds_childtune.ranks import check_same, gather_objects, raise_together, raising_together, tell, this_rank, world_size
from ds_childtune.zero.checkpoint_write import (
    dense_masters,
    keeping_save_errors,
    refuse_unsupported_saving,
    saved_shards,
    written_files,
)
from ds_childtune.zero.engine import base_optimizer, inside_accumulation, model_dtype, wrapper_of
from ds_childtune.zero.flat_shards import changed_parameters


@dataclass(frozen=True)
class _Written:
    """What one rank wrote."""

    deepspeed: tuple[DeepSpeedFile, ...]
    rank_file: FileEntry
    pieces: FileEntry | None


class CheckpointSaver:
    """`save`, in the engine's place."""

    def __init__(self, attachment: Attachment, hooks: Hooks, save: Callable[..., Any]) -> None:
        """
        Args:
            save: the engine's own `save_checkpoint`.
        """
        self._attachment = attachment
        self._hooks = hooks
        self._save = save

    def save(
        self,
        save_dir: str,
        tag: object = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """`DeepSpeedEngine.save_checkpoint`, with the child, and whole or not at all. A collective.

        Raises:
            RuntimeError: on every rank, when a rank cannot write. Older checkpoints are as they were, and the engine can train on.
            ValueError, NotImplementedError: on every rank, for a wrong argument or a way of saving that is not supported.
        """
        engine = self._attachment.engine
        with raising_together():
            if not save_dir:
                raise ValueError(
                    f"save_checkpoint: expected a folder as save_dir, got {save_dir!r}. Remedy: name one, or any new path."
                )
            refuse_unsupported_saving(engine)
            name = tag_folder.check_tag(f"global_step{engine.global_steps}" if tag is None else tag)
            self._check_unchanged()
            self._hooks.check_loaded()
        check_same(
            f"{save_dir}/{name}",
            "save_checkpoint's save_dir and tag",
            "pass the same on every rank: a folder that all of them see",
        )
        if inside_accumulation(engine):
            tell(
                "WARNING: save_checkpoint: called between a micro-batch and its optimizer step. Gradients so far are not saved, in"
                " plain DeepSpeed either. Remedy: save right after the step that ends an accumulation."
            )
        folder = Path(save_dir)
        first = this_rank() == 0
        with raising_together():
            if first:
                with explained(folder):
                    new_folder(folder)
                    tag_folder.prepare(folder, name)
        try:
            self._write(folder, name, dict(client_state or {}), exclude_frozen_parameters)
            with raising_together():
                if first:
                    with explained(folder / name):
                        tag_folder.publish(folder, name)
                        if save_latest:
                            tag_folder.write_latest(folder, name)
                        tag_folder.tidy(folder, name)
        except Exception:
            if first:
                tag_folder.discard(folder, name)
            raise
        return True

    def _check_unchanged(self) -> None:
        """Raise RuntimeError when the model or the optimizer is no longer what `attach` saw."""
        changed = changed_parameters(self._attachment.engine, self._attachment.parameters)
        if changed:
            raise RuntimeError(
                f"save_checkpoint: expected the parameters that were there at attach, got changes in {', '.join(changed[:4])}"
                f" ({len(changed)}). Remedy: call detach() and attach(engine) again after changing the model."
            )

    def _write(self, folder: Path, name: str, client_state: dict[str, Any], exclude_frozen: bool) -> None:
        """Everything into the partial folder, on disk."""
        engine, child = self._attachment.engine, self._hooks.child
        partial = tag_folder.partial_tag(name)
        rank = this_rank()
        with ExitStack() as made_ready:
            with raising_together():  # copies of masters may not fit on one of the ranks
                self._share_counters()
                made_ready.enter_context(dense_masters(engine, self._attachment.shards))
                made_ready.enter_context(without_compact_state(child))
            errors = made_ready.enter_context(keeping_save_errors(engine))
            try:
                self._save(str(folder), partial, client_state, False, exclude_frozen)
            except Exception as error:
                errors.append(error)
        raise_together(_explained(errors[0], folder / partial) if errors else None)
        holders = gather_holders(
            {name: shape.numel() for name, shape in self._attachment.parameters.shapes.items()},
            [(f.name, f.param_start, f.numel) for s in self._attachment.shards for f in s.fragments if f.counted],
        )
        keys = {k: v for found in gather_objects(moment_keys(child)) for k, v in found.items()}
        with raising_together():
            own = folder / partial / tag_folder.CHILD
            new_folder(own)
            files = []
            for what, path in written_files(engine, str(folder), partial).items():
                tag_folder.sync_file(path)
                files.append(DeepSpeedFile.of(path, rank, what))
            layout = saved_shards(engine, self._attachment.shards, rank)
            rank_file = write_rank_file(own, rank, read_random_states(), layout)
            entry = None
            if child is not None and child.fixed:
                fragments = [(s, f) for s, f in stored_fragments(child, self._attachment.shards) if f.counted]
                entry = write_pieces(own, rank, pieces(child, fragments, keys))
        everyone = gather_objects(_Written(tuple(files), rank_file, entry))
        with raising_together():
            if rank == 0:
                write_manifest(own, self._manifest(everyone, holders))
                sync_folder(folder / partial)

    def _share_counters(self) -> None:
        """So that the checkpoint can be taken apart: see [Note: one counter for a group]."""
        if self._hooks.child is not None:
            self._hooks.child.share_counters()
        else:
            base = base_optimizer(self._attachment.engine)
            share_counters(base, [group["params"] for group in base.param_groups])

    def _manifest(self, everyone: Sequence[_Written], holders: Holders | None) -> Manifest:
        chosen = self._hooks.child is not None
        record = RunRecord(
            progress=self._hooks.progress,
            chosen=chosen,
            world_size=world_size(),
            optimizer=wrapper_of(self._attachment.engine).value,
            precision=self._attachment.precision,
            ranks=tuple(w.rank_file for w in everyone),
            deepspeed=tuple(file for w in everyone for file in w.deepspeed),
        )
        stored = self._attachment.stored_names(chosen=chosen)
        manifest = Manifest(
            library=__version__,
            kind=KIND,
            config=self._attachment.config.model_dump(mode="json"),
            parameters=parameter_entries(
                self._attachment.parameters.shapes, stored, model_dtype(self._attachment.engine)
            ),
            files=tuple(w.pieces for w in everyone if w.pieces is not None),
            extra=asdict(record),
        )
        return seal(manifest.with_holders(holders))


def _explained(error: Exception, folder: Path) -> RuntimeError:
    """An error of writing DeepSpeed's files, with a remedy."""
    if isinstance(error, OSError):
        try:
            with explained(folder):
                raise error
        except RuntimeError as explained_error:
            return explained_error
    text = str(error).strip().splitlines()[0][:300] if str(error).strip() else ""
    space = os.statvfs(folder if folder.exists() else folder.anchor or ".")
    free = space.f_bavail * space.f_frsize
    return RuntimeError(
        f"save_checkpoint: expected to write DeepSpeed's files into {folder}, got {type(error).__name__}: {text}"
        f" ({free / 2**20:,.0f} MiB are free there). Remedy: see that there is space, that the folder can be written, and that"
        " client_state can be pickled."
    )
