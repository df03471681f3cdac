"""`engine.save_checkpoint` and `engine.load_checkpoint` of an engine with a child: they carry it.

Both are replaced on the instance while a ChildTuner is attached, so that a script, Hugging Face's Trainer and accelerate, which call
them, need not know. See [Note: what a checkpoint holds], [Note: a tag appears whole] and [Note: elastic resume].
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deepspeed import comm as dist
from torch import Tensor

from ds_childtune import _zero, _zero_checkpoint, _zero_elastic, tag_folder
from ds_childtune._ranks import check_same, gather_objects, raise_together, raising_together, tell
from ds_childtune._version import __version__
from ds_childtune._zero_files import SavedRun
from ds_childtune.child_checkpoint import (
    KIND,
    check_config,
    check_model,
    hidden_state,
    moment_keys,
    parameter_entries,
    pieces,
    read_compact,
    read_masks,
    stored_fragments,
)
from ds_childtune.child_format import ChildFileError, FileEntry, Manifest, sealed
from ds_childtune.child_reader import Child, open_child
from ds_childtune.child_shards import CompactChild
from ds_childtune.child_writer import commit, write_pieces
from ds_childtune.config import ChildTuningConfig
from ds_childtune.durable import explained, new_folder, sync_folder
from ds_childtune.layout import Layout
from ds_childtune.policies import DenseChild, TaskFreeChild
from ds_childtune.random_states import read_random_states, write_random_states
from ds_childtune.rank_file import read_layout, read_states, write_rank_file
from ds_childtune.run_record import DeepSpeedFile, Progress, RunRecord
from ds_childtune.shards import FlatShard

Policy = TaskFreeChild | DenseChild | CompactChild


@dataclass(frozen=True)
class ChildState:
    """What a ChildTuner is at the moment."""

    progress: Progress
    policy: Policy | None
    """None: a ChildTuning-D child that is not chosen yet."""


@dataclass(frozen=True)
class Resumed:
    """What a ChildTuner is to become."""

    progress: Progress
    masks: list[Tensor] | None
    """bool 1-D, one for each flat shard, True = inside the child or not eligible; None: nothing was chosen, or ChildTuning-F."""


@dataclass(frozen=True)
class _Written:
    """What one rank wrote."""

    deepspeed: tuple[DeepSpeedFile, ...]
    rank_file: FileEntry
    pieces: FileEntry | None


class Checkpoints:
    """The two methods, on one engine, until `remove`."""

    def __init__(
        self,
        engine: Any,
        config: ChildTuningConfig,
        parameters: _zero.Parameters,
        eligible: frozenset[str],
        shards: Sequence[FlatShard],
        read: Callable[[], ChildState],
        resume: Callable[[Resumed], Policy | None],
    ) -> None:
        """
        Args:
            read: the ChildTuner's state.
            resume: give the ChildTuner another state; returns its policy, a compact one with the flat shards' weights and no moments.
        """
        self._engine = engine
        self._config = config
        self._parameters = parameters
        self._eligible = eligible
        self._shards = shards
        self._read = read
        self._resume = resume
        self._save = engine.save_checkpoint
        self._load = engine.load_checkpoint
        engine.save_checkpoint = self.save
        engine.load_checkpoint = self.load

    def remove(self) -> None:
        """Give the engine its own methods back."""
        for name in ("save_checkpoint", "load_checkpoint"):
            delattr(self._engine, name)

    # ---------------------------------------------------------------- save

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
            RuntimeError: on every rank, when a rank cannot write. Training can go on, and older checkpoints are as they were.
            ValueError, NotImplementedError: on every rank, for a wrong argument or a way of saving that is not supported.
        """
        engine = self._engine
        with raising_together():
            if not save_dir:
                raise ValueError(
                    f"save_checkpoint: expected a folder as save_dir, got {save_dir!r}. Remedy: name one, or any new path."
                )
            _zero_checkpoint.refuse_unsupported(engine)
            name = tag_folder.checked_tag(f"global_step{engine.global_steps}" if tag is None else tag)
            self._check_unchanged()
        check_same(f"{save_dir}/{name}", "save_checkpoint's save_dir and tag")
        folder = Path(save_dir)
        first = dist.get_rank() == 0
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
                        tag_folder.commit(folder, name)
                        if save_latest:
                            tag_folder.write_latest(folder, name)
        except Exception:
            if first:
                tag_folder.discard(folder, name)
            raise
        return True

    def _check_unchanged(self) -> None:
        """Raise RuntimeError when the model or the optimizer is no longer what `attach` saw."""
        now = _zero.read_parameters(self._engine)
        if now.shapes != self._parameters.shapes or now.by_name.keys() != self._parameters.by_name.keys():
            changed = sorted(
                {n for n, _ in now.shapes.items() ^ self._parameters.shapes.items()}
                | (now.by_name.keys() ^ self._parameters.by_name.keys())
            )
            raise RuntimeError(
                f"save_checkpoint: expected the parameters that were there at attach, got changes in {', '.join(changed[:4])}"
                f" ({len(changed)}). Remedy: call detach() and attach(engine) again after changing the model."
            )

    def _write(self, folder: Path, name: str, client_state: dict[str, Any], exclude_frozen: bool) -> None:
        """Everything into the partial folder, on disk."""
        engine, state = self._engine, self._read()
        partial = tag_folder.partial_tag(name)
        rank = dist.get_rank()
        with (
            _zero_checkpoint.keeping_errors(engine) as errors,
            _zero_checkpoint.dense_masters(engine, self._shards),
            hidden_state(state.policy),
        ):
            try:
                self._save(str(folder), partial, client_state, False, exclude_frozen)
            except Exception as error:
                errors.append(error)
        raise_together(_explained(errors[0], folder / partial) if errors else None)
        keys = {k: v for found in gather_objects(moment_keys(state.policy)) for k, v in found.items()}
        with raising_together():
            own = folder / partial / tag_folder.CHILD
            new_folder(own)
            files = []
            for what, path in _zero_checkpoint.written_files(engine, str(folder), partial).items():
                tag_folder.sync_file(path)
                files.append(DeepSpeedFile.of(path, rank, what))
            layout = _zero_checkpoint.saved_shards(engine, self._shards, rank)
            rank_file = write_rank_file(own, rank, read_random_states(), layout)
            entry = None
            if isinstance(state.policy, (DenseChild, CompactChild)):
                fragments = [(s, f) for s, f in stored_fragments(state.policy, self._shards) if f.counted]
                entry = write_pieces(own, rank, pieces(state.policy, fragments, keys))
        everyone = gather_objects(_Written(tuple(files), rank_file, entry))
        with raising_together():
            if rank == 0:
                commit(own, self._manifest(state, everyone))
                sync_folder(folder / partial)

    def _manifest(self, state: ChildState, everyone: Sequence[_Written]) -> Manifest:
        record = RunRecord(
            progress=state.progress,
            chosen=state.policy is not None,
            world_size=dist.get_world_size(),
            optimizer=_zero_checkpoint.kind_of(self._engine),
            precision=str(_zero.model_dtype(self._engine)).removeprefix("torch."),
            ranks=tuple(w.rank_file for w in everyone),
            deepspeed=tuple(file for w in everyone for file in w.deepspeed),
        )
        stored = self._stored_names(chosen=state.policy is not None)
        manifest = Manifest(
            library=__version__,
            kind=KIND,
            config=self._config.model_dump(mode="json"),
            parameters=parameter_entries(self._parameters.shapes, stored, _zero.model_dtype(self._engine)),
            files=tuple(w.pieces for w in everyone if w.pieces is not None),
            extra=asdict(record),
        )
        return sealed(manifest)

    def _stored_names(self, *, chosen: bool) -> frozenset[str]:
        """Parameters that a checkpoint of this child has pieces of."""
        if self._config.mode == "ChildTuning-F" or not chosen:
            return frozenset()
        if self._config.optimizer_state == "compact":
            return frozenset(self._parameters.by_name)
        return self._eligible

    # ---------------------------------------------------------------- load

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

        A checkpoint of another world size or ZeRO stage is loaded too. Random states are restored at the same world size.

        Raises:
            ChildFileError: on every rank, for a checkpoint that is damaged, or of another model; a ValueError.
            ValueError: on every rank, when the config asks for another child.
        """
        folder, name = Path(load_dir), self._tag(Path(load_dir), tag)
        weights_alone = load_module_only or not load_optimizer_states

        def load_as_deepspeed_does() -> tuple[str | None, Any]:
            return self._load(  # type: ignore[no-any-return]
                load_dir,
                name,
                load_module_strict=load_module_strict,
                load_optimizer_states=load_optimizer_states,
                load_lr_scheduler_states=load_lr_scheduler_states,
                load_module_only=load_module_only,
                custom_load_fn=custom_load_fn,
            )

        carried = name is not None and (folder / name / tag_folder.CHILD).is_dir()
        if weights_alone or not carried:
            self._check_no_fixed_child(load_dir, weights_alone)
            tell(f"ds_childtune: {load_dir} {name}: loading DeepSpeed's part alone, without a child")
            loaded = load_as_deepspeed_does()
            self._resume(Resumed(self._read().progress, None))
            return loaded

        assert name is not None
        child, record = self._opened(folder, name)
        mine = _zero_checkpoint.saved_shards(self._engine, self._shards, dist.get_rank())
        here = folder / name
        same_shape = self._is_same_shape(child, record, mine)
        # Dense again, so that DeepSpeed finds what it wrote.
        self._resume(Resumed(Progress(), None))
        if same_shape:
            path, client_state = load_as_deepspeed_does()
        else:
            path, client_state = str(here), self._load_elsewhere(here, child, record, mine, load_lr_scheduler_states)
        masks: list[Tensor] | None = None
        with raising_together():
            if record.chosen and self._config.mode == "ChildTuning-D":
                masks = read_masks(child, self._shards)
        policy = self._resume(Resumed(record.progress, masks))
        with raising_together():
            if isinstance(policy, CompactChild):
                read_compact(child, policy)
            if record.world_size == dist.get_world_size():
                write_random_states(read_states(child.folder / record.ranks[dist.get_rank()].name))
        return path, client_state

    def _tag(self, load_dir: Path, tag: object) -> str | None:
        """The tag to load: `tag`, or the one that `latest` names; None when there is none."""
        with raising_together():
            name = tag_folder.read_latest(load_dir) if tag is None else tag_folder.checked_tag(tag)
            if name is not None and dist.get_rank() == 0:
                tag_folder.recover(load_dir, name)
            whole = list(tag_folder.tags(load_dir))
        check_same(f"{load_dir}/{name}", "load_checkpoint's load_dir and tag")
        with raising_together():
            if name is not None and not (load_dir / name).is_dir():
                raise ChildFileError(
                    f"load_checkpoint: expected a folder {load_dir / name}, got none. Remedy: pass the tag of a checkpoint"
                    f" that is there; the last ones are {', '.join(whole[:3]) or 'none'}."
                )
        return name

    def _check_no_fixed_child(self, load_dir: str, weights_alone: bool) -> None:
        with raising_together():
            if self._config.mode == "ChildTuning-D" and self._read().policy is not None:
                why = "weights alone are loaded" if weights_alone else "the checkpoint has no child"
                raise RuntimeError(
                    f"load_checkpoint: expected a checkpoint with a child, as this engine has one, but {why} from {load_dir}."
                    " Remedy: load before child.select(), or detach() first."
                )

    def _opened(self, folder: Path, name: str) -> tuple[Child, RunRecord]:
        """The child's files and the record, once they are known to be whole and of this run's kind."""
        here = folder / name
        with raising_together():
            try:
                child = open_child(here / tag_folder.CHILD, kind=KIND, checksums=False)
                record = RunRecord.of(child)
                rank, ranks = dist.get_rank(), dist.get_world_size()
                child.check_contents(rank, ranks)
                record.check_files(here, rank, ranks)
            except ChildFileError as error:
                others = [tag for tag in tag_folder.tags(folder) if tag != name]
                raise ChildFileError(
                    f"load_checkpoint: {here} is not whole: {error} Other checkpoints here, newest first:"
                    f" {', '.join(others[:3]) or 'none'}; load one with tag=."
                ) from error
            check_config(child, self._config)
            check_model(child, self._parameters.shapes, self._stored_names(chosen=record.chosen))
            self._check_precision(record, here)
        return child, record

    def _check_precision(self, record: RunRecord, here: Path) -> None:
        precision = str(_zero.model_dtype(self._engine)).removeprefix("torch.")
        if record.precision != precision:
            raise ValueError(
                f"load_checkpoint: {here}: expected a model in {record.precision}, as in the checkpoint, got {precision}."
                " Remedy: set the same bf16 or fp16 in the DeepSpeed config."
            )

    def _is_same_shape(self, child: Child, record: RunRecord, mine: Sequence[Any]) -> bool:
        """Whether every rank finds its own flat shards in the files of its own name. A collective."""
        rank = dist.get_rank()
        same = record.world_size == dist.get_world_size()
        same = same and record.optimizer == _zero_checkpoint.kind_of(self._engine)
        with raising_together():
            same = same and read_layout(child.folder / record.ranks[rank].name) == tuple(mine)
        return all(gather_objects(same))

    def _load_elsewhere(
        self, here: Path, child: Child, record: RunRecord, mine: Sequence[Any], load_lr_scheduler_states: bool
    ) -> dict[str, Any]:
        with raising_together():
            layout = Layout(shard for file in record.ranks for shard in read_layout(child.folder / file.name))
            files = {(file.what, file.rank): file.name for file in record.deepspeed}
            run = SavedRun(here, record.optimizer, files)
            _zero_elastic.check_elsewhere(self._engine, run, layout, self._shards)
        return _zero_elastic.load_elsewhere(
            self._engine,
            run,
            layout,
            self._shards,
            mine,
            self._parameters,
            load_lr_scheduler_states=load_lr_scheduler_states,
        )


def _explained(error: Exception, folder: Path) -> RuntimeError:
    """An error of writing DeepSpeed's files, with a remedy."""
    if isinstance(error, OSError):
        try:
            with explained(folder):
                raise error
        except RuntimeError as told:
            return told
    text = str(error).strip().splitlines()[0][:300] if str(error).strip() else ""
    space = os.statvfs(folder if folder.exists() else folder.anchor or ".")
    free = space.f_bavail * space.f_frsize
    return RuntimeError(
        f"save_checkpoint: expected to write DeepSpeed's files into {folder}, got {type(error).__name__}: {text}"
        f" ({free / 2**20:,.0f} MiB are free there). Remedy: see that there is space, that the folder can be written, and that"
        " client_state can be pickled."
    )
