"""`engine.load_checkpoint` of an engine with a child. See [Note: what a checkpoint holds] and [Note: elastic resume]."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ds_childtune.attachment import Attachment
from ds_childtune.checkpoint import tag_folder
from ds_childtune.checkpoint.child import (
    SavedMasks,
    check_config,
    check_model,
    check_shapes,
    read_compact,
    read_masks,
)
from ds_childtune.checkpoint.hooks import Hooks
from ds_childtune.checkpoint.opened import OpenedCheckpoint
from ds_childtune.checkpoint.rank_file import restore_random_states
from ds_childtune.checkpoint.run_record import RunRecord
from ds_childtune.child_files.format import ChildFileError
from ds_childtune.ranks import (
    check_same,
    from_first,
    raise_together,
    raising_together,
    tell,
    this_rank,
    world_size,
)
from ds_childtune.zero.checkpoint_write import (
    frozen_may_be_missing,
    keeping_load_errors,
    refuse_universal,
    saved_shards,
    without_empty_states,
)
from ds_childtune.zero.elastic import load_elsewhere, load_weights
from ds_childtune.zero.elastic_check import check_elsewhere
from ds_childtune.zero.engine import Wrapper, wrapper_of
from ds_childtune.zero.layout import SavedShard
from ds_childtune.zero.lean_start import restore_dense


class CheckpointLoader:
    """`load`, in the engine's place."""

    def __init__(self, attachment: Attachment, hooks: Hooks, load: Callable[..., Any]) -> None:
        """
        Args:
            load: the engine's own `load_checkpoint`.
        """
        self._attachment = attachment
        self._hooks = hooks
        self._load = load

    def load(
        self,
        load_dir: str,
        tag: object = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[..., Any] | None = None,
    ) -> tuple[str | None, Any]:
        """`DeepSpeedEngine.load_checkpoint`, with the child: afterwards `select` is not needed. A collective.

        A checkpoint of another world size or ZeRO stage is loaded too. Random states are restored at the same world size. Where it
        was saved with `exclude_frozen_parameters`, frozen parameters stay as they are in this model.

        Raises:
            ChildFileError: on every rank, for a checkpoint that is damaged, or of another model; a ValueError.
            ValueError: on every rank, when the config asks for another child.
            NotImplementedError: on every rank, for a universal checkpoint, or where DeepSpeed would silently load nothing.
        """
        with raising_together():
            refuse_universal(self._attachment.engine)
        folder = Path(load_dir)
        name, carried = self._tag(folder, tag)
        weights_only = load_module_only or not load_optimizer_states

        def load_as_deepspeed_does() -> tuple[str | None, Any]:
            engine = self._attachment.engine
            with (
                keeping_load_errors(engine) as errors,
                without_empty_states(engine),
                frozen_may_be_missing(engine),
            ):
                loaded = self._load(
                    load_dir,
                    name,
                    load_module_strict=load_module_strict,
                    load_optimizer_states=load_optimizer_states,
                    load_lr_scheduler_states=load_lr_scheduler_states,
                    load_module_only=load_module_only,
                    custom_load_fn=custom_load_fn,
                )
            raise_together(errors[0] if errors else None)
            return loaded  # type: ignore[no-any-return]

        if name is None:
            tell(f"ds_childtune: {load_dir} has no file `latest` that names a checkpoint: nothing is loaded")
            return None, None
        if weights_only or not carried:
            self._check_no_fixed_child(load_dir, weights_only)
            if carried and custom_load_fn is None:
                loaded = self._load_weights(
                    folder, name, load_module_strict, load_module_only, load_lr_scheduler_states
                )
            else:
                with raising_together():
                    self._check_that_deepspeed_loads(folder, name, weights_only, load_module_only)
                tell(f"ds_childtune: {load_dir} {name}: loading only DeepSpeed's part, without a child")
                if not weights_only:
                    # The checkpoint's masters and moments need shards of their dtype; a lean engine has views of 16-bit weights.
                    restore_dense(self._attachment.engine.optimizer)
                loaded = load_as_deepspeed_does()
            self._hooks.adopt(self._hooks.progress)
            return loaded

        opened = OpenedCheckpoint.open(folder, name)
        child, record = opened.child, opened.record
        with raising_together():
            check_config(child, self._attachment.config)
            check_model(child, self._attachment.parameters.shapes, self._attachment.stored_names(chosen=record.chosen))
            self._check_precision(record, opened.folder)
        mine = saved_shards(self._attachment.engine, self._attachment.shards, this_rank())
        same_shape = opened.is_same_shape(self._attachment, mine)
        masks: SavedMasks | None = None
        with self._without_child(record):
            if same_shape:
                self._hooks.half_loaded = str(opened.folder)
                path, client_state = load_as_deepspeed_does()
            else:
                path = str(opened.folder)
                client_state = self._load_elsewhere(opened, mine, load_lr_scheduler_states)
            with raising_together():
                if record.chosen and self._attachment.config.mode == "ChildTuning-D":
                    masks = read_masks(child, self._attachment.shards)
            self._hooks.adopt(record.progress)
            if masks is not None:
                self._hooks.fix(masks)
        trained = self._hooks.child
        with raising_together():
            if trained is not None:
                read_compact(child, trained)
            if record.world_size == world_size():
                restore_random_states(child.folder / record.ranks[this_rank()].name)
        self._hooks.half_loaded = None
        return path, client_state

    @contextmanager
    def _without_child(self, record: RunRecord) -> Iterator[None]:
        """The engine has no child for the length of a `with`, so that DeepSpeed finds what it wrote.

        Masters and moments are dense if those of the checkpoint are. If it has a compact child, nothing becomes dense in between.
        """
        compact = record.chosen and self._attachment.config.optimizer_state == "compact"
        before = self._hooks.child
        with raising_together():  # dense masters may not fit on one rank only
            self._hooks.forget(another_follows=compact)
            if not compact:
                restore_dense(self._attachment.engine.optimizer)
        try:
            yield
        except BaseException:
            if compact and before is not None and self._hooks.none_in_place:
                before.restore_dense()
            raise

    def _tag(self, load_dir: Path, tag: object) -> tuple[str | None, bool]:
        """The tag to load: `tag`, or the one that `latest` names; None when there is none. And whether it has a child.

        Only rank 0 looks: on a network file system that is late, others may not see the same files.
        """
        with raising_together():
            asked = None if tag is None else tag_folder.check_tag(tag)
        check_same(
            f"{load_dir}/{asked}",
            "load_checkpoint's load_dir and tag",
            "pass the same on every rank: a folder that all of them see",
        )

        def found() -> tuple[str | None, bool]:
            name = tag_folder.read_latest(load_dir) if asked is None else asked
            if name is None:
                return None, False
            tag_folder.recover(load_dir, name)
            if not (load_dir / name).is_dir():
                raise ChildFileError(
                    f"load_checkpoint: expected a folder {load_dir / name}, got none. Remedy: pass the tag of a checkpoint"
                    f" that is there; the last ones are {', '.join(list(tag_folder.tags(load_dir))[:3]) or 'none'}."
                )
            return name, (load_dir / name / tag_folder.CHILD).is_dir()

        return from_first(found)

    def _check_no_fixed_child(self, load_dir: str, weights_only: bool) -> None:
        with raising_together():
            if self._attachment.config.mode == "ChildTuning-D" and self._hooks.child is not None:
                why = "only weights are loaded" if weights_only else "the checkpoint has no child"
                raise RuntimeError(
                    f"load_checkpoint: expected a checkpoint with a child, as this engine has one, but {why} from {load_dir}."
                    " Remedy: load before child.select(); now, call detach() and attach(engine) first."
                )

    def _load_weights(
        self, folder: Path, name: str, strict: bool, module_only: bool, load_lr_scheduler_states: bool
    ) -> tuple[str | None, Any]:
        """Only the weights of a checkpoint with a child. See `zero.elastic.load_weights`."""
        opened = OpenedCheckpoint.open(folder, name)
        with raising_together():
            check_shapes(opened.child, self._attachment.parameters.shapes, strict=strict)
        tell(f"ds_childtune: {folder} {name}: loading only weights, without the child")
        with raising_together():
            run, layout = opened.saved_run(self._attachment)
        before, self._hooks.half_loaded = self._hooks.half_loaded, str(opened.folder)
        client_state = load_weights(
            self._attachment.engine,
            run,
            layout,
            self._attachment.shards,
            self._attachment.parameters,
            progress=not module_only,
            load_lr_scheduler_states=load_lr_scheduler_states,
        )
        self._hooks.half_loaded = before
        if not module_only and self._attachment.config.mode == "ChildTuning-F":
            # Masks are drawn by step, and DeepSpeed's count is the saved run's.
            self._hooks.progress = replace(self._hooks.progress, step=opened.record.progress.step)
        return str(folder / name), client_state

    def _check_that_deepspeed_loads(self, folder: Path, name: str, weights_only: bool, module_only: bool) -> None:
        """Raise NotImplementedError where plain DeepSpeed would silently load nothing, or something else."""
        if not weights_only or wrapper_of(self._attachment.engine) is not Wrapper.ZERO_3:
            return
        if module_only:
            raise NotImplementedError(
                f"load_checkpoint: {folder / name}: expected a checkpoint with a child, got one without: of those, DeepSpeed's"
                " load_module_only loads nothing at ZeRO-3. Remedy: pass load_optimizer_states=False instead."
            )
        latest = tag_folder.read_latest(folder)
        if latest != name:
            raise NotImplementedError(
                f"load_checkpoint: {folder / name}: expected the tag that `latest` names, {latest!r}: without optimizer states"
                f" DeepSpeed loads that one's weights at ZeRO-3, whatever tag it is asked for. Remedy: write {name} into"
                f" {folder / tag_folder.LATEST}."
            )

    def _check_precision(self, record: RunRecord, here: Path) -> None:
        precision = self._attachment.precision
        if record.precision != precision:
            raise ValueError(
                f"load_checkpoint: {here}: expected a model in {record.precision}, as in the checkpoint, got {precision}."
                " Remedy: set the same bf16 or fp16 in the DeepSpeed config."
            )

    def _load_elsewhere(
        self, opened: OpenedCheckpoint, mine: Sequence[SavedShard], load_lr_scheduler_states: bool
    ) -> dict[str, Any]:
        with raising_together():
            run, layout = opened.saved_run(self._attachment)
            check_elsewhere(self._attachment.engine, run, layout, self._attachment.shards)
        self._hooks.half_loaded = str(opened.folder)
        return load_elsewhere(
            self._attachment.engine,
            run,
            layout,
            self._attachment.shards,
            mine,
            self._attachment.parameters,
            load_lr_scheduler_states=load_lr_scheduler_states,
        )
