"""A checkpoint with a child that is about to be loaded: its files, found whole, and where in them this rank's elements are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_childtune.attachment import Attachment
from ds_childtune.checkpoint import tag_folder
from ds_childtune.checkpoint.child import KIND
from ds_childtune.checkpoint.rank_file import read_layout
from ds_childtune.checkpoint.run_record import RunRecord
from ds_childtune.child_files.format import ChildFileError
from ds_childtune.child_files.holders import Run, ranks_with
from ds_childtune.child_files.reader import SavedChild, open_child, read_manifest
from ds_childtune.ranks import from_first, raising_together, this_rank, true_on_all, world_size
from ds_childtune.zero.checkpoint_read import SavedRun
from ds_childtune.zero.elastic_check import check_values
from ds_childtune.zero.engine import wrapper_of
from ds_childtune.zero.layout import Layout, SavedShard
from ds_childtune.zero.weights import local_weights


@dataclass(frozen=True)
class OpenedCheckpoint:
    folder: Path
    """The tag's."""
    child: SavedChild
    record: RunRecord

    @classmethod
    def open(cls, folder: Path, name: str) -> OpenedCheckpoint:
        """Read the manifest, and check that everything is there and undamaged. A collective.

        Raises:
            ChildFileError: on every rank, where it is not; other tags are named.
        """
        here = folder / name
        try:
            # Every rank uses what one rank has read: the manifest decides which collectives follow.
            manifest = from_first(lambda: read_manifest(here / tag_folder.CHILD))
            with raising_together():
                child = open_child(here / tag_folder.CHILD, kind=KIND, checksums=False, manifest=manifest)
                record = RunRecord.of(child)
                rank, ranks = this_rank(), world_size()
                child.check_contents(rank, ranks)
                record.check_files(here, rank, ranks)
        except ValueError as error:
            others = from_first(lambda: [tag for tag in tag_folder.tags(folder) if tag != name])
            raise ChildFileError(
                f"load_checkpoint: {here} is not whole: {error} Other checkpoints here, newest first:"
                f" {', '.join(others[:3]) or 'none'}; load one with tag=."
            ) from error
        return cls(here, child, record)

    def layout_of(self, rank: int) -> tuple[SavedShard, ...]:
        """The flat shards of a rank of the run that wrote it. Raises ChildFileError."""
        return read_layout(self.child.folder / self.record.ranks[rank].name)

    def is_same_shape(self, attachment: Attachment, mine: Sequence[SavedShard]) -> bool:
        """Whether every rank finds its own flat shards in the files with its rank in their names. A collective."""
        rank = this_rank()
        same = self.record.world_size == world_size()
        same = same and self.record.optimizer == wrapper_of(attachment.engine).value
        with raising_together():
            same = same and self.layout_of(rank) == tuple(mine)
        return true_on_all(same)

    def saved_run(self, attachment: Attachment) -> tuple[SavedRun, Layout]:
        """DeepSpeed's files of the ranks that had this rank's elements, and where in them those are."""
        ranks = self._ranks_with(attachment)
        layout = Layout(s for rank in ranks for s in self.layout_of(rank))
        files = {(file.what, file.rank): file.name for file in self.record.deepspeed}
        run = SavedRun(self.folder, self.record.wrapper(self.folder), files)
        check_values(run, layout, attachment.shards)
        return run, layout

    def _ranks_with(self, attachment: Attachment) -> list[int]:
        holders = self.child.manifest.holders
        if holders is None:
            return list(range(self.record.world_size))
        ranks = ranks_with(holders, {p.name: p.numel for p in self.child.manifest.parameters}, _elements(attachment))
        if max(ranks, default=0) >= self.record.world_size:
            raise ChildFileError(
                f"{self.child.folder}: expected holders below rank {self.record.world_size}, got rank {max(ranks)}."
                " Remedy: use another checkpoint, or an undamaged copy."
            )
        return ranks


def _elements(attachment: Attachment) -> Iterator[Run]:
    """The elements that this rank will load: those of its flat shards, and of frozen parameters, which may have trained before."""
    for shard in attachment.shards:
        for fragment in shard.fragments:
            yield Run(fragment.name, fragment.param_start, fragment.param_start + fragment.numel)
    for name in attachment.parameters.shapes:
        if name not in attachment.parameters.by_name:
            weights = local_weights(name, attachment.engine.module.get_parameter(name))
            yield Run(name, weights.start, weights.end)
