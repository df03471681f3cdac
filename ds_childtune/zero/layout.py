"""Where every element lay when a checkpoint was written, so that a run with other ranks or another ZeRO stage finds it.

[Note: elastic resume]
DeepSpeed's files hold flat shards in the layout of the run that wrote them. A *layout* says what is in them: for every rank its
flat shards, and for each of those its fragments (see [Note: flat shards]). A run with another layout asks, fragment by fragment, which
old shards hold the elements (`find`), and copies only those, over its own masters and moments: what its device holds does not
grow. Nothing is converted, and no rank sees a whole model.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ds_childtune.shards import FlatShard, Fragment


@dataclass(frozen=True)
class SavedShard:
    """One flat shard of the run that wrote the checkpoint."""

    rank: int
    index: int
    """Of the flat shard on its rank, in DeepSpeed's order."""

    state_index: int
    """Of its state in the base optimizer's state dict."""

    numel: int
    fragments: tuple[Fragment, ...]

    @classmethod
    def of(cls, shard: FlatShard, rank: int, index: int, state_index: int) -> SavedShard:
        fragments = tuple(Fragment(f.name, f.param_start, f.shard_start, f.numel) for f in shard.fragments)
        return cls(rank, index, state_index, shard.numel, fragments)

    @property
    def key(self) -> tuple[int, int]:
        return self.rank, self.index


@dataclass(frozen=True)
class Transfer:
    """A run of elements: where they lie in an old flat shard, and where they belong in a new one."""

    source: SavedShard
    source_start: int
    target_start: int
    numel: int


class Layout:
    """All flat shards of a checkpoint, searchable by element."""

    def __init__(self, shards: Iterable[SavedShard]) -> None:
        self.shards = tuple(shards)
        self._runs: dict[str, list[tuple[int, Fragment, SavedShard]]] = {}
        for shard in self.shards:
            for fragment in shard.fragments:
                self._runs.setdefault(fragment.name, []).append((fragment.param_start, fragment, shard))
        for runs in self._runs.values():
            runs.sort(key=lambda run: run[0])

    def __contains__(self, name: object) -> bool:
        """Whether a parameter has elements in a flat shard."""
        return name in self._runs

    def find(self, fragment: Fragment) -> Iterator[Transfer]:
        """What makes up `fragment`, in order; replicas give each element once.

        Raises:
            ValueError: when the checkpoint lacks some of its elements.
        """
        runs = self._runs.get(fragment.name, [])
        starts = [start for start, _, _ in runs]
        position, end = fragment.param_start, fragment.param_start + fragment.numel
        while position < end:
            at = bisect_right(starts, position) - 1
            _, old, shard = runs[at] if at >= 0 else (0, None, None)
            if old is None or shard is None or position >= old.param_start + old.numel:
                raise ValueError(
                    f"checkpoint: expected the elements {position} .. {end - 1} of {fragment.name}, and no file has element"
                    f" {position}. Remedy: load into the model that wrote the checkpoint, or use another checkpoint."
                )
            numel = min(end, old.param_start + old.numel) - position
            yield Transfer(
                source=shard,
                source_start=old.shard_start + position - old.param_start,
                target_start=fragment.shard_start + position - fragment.param_start,
                numel=numel,
            )
            position += numel
