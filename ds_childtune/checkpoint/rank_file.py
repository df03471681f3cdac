"""What only this rank knows, in one file for each rank: `child/rank-00003.safetensors`.

Its tensors are the rank's random states; its header holds the layout of the rank's flat shards in DeepSpeed's files, as json under
the key "shards". See [Note: elastic resume].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ds_childtune.child_files.atomic import new_file
from ds_childtune.child_files.checksums import blake2b
from ds_childtune.child_files.format import MAX_NUMEL, ChildFileError, FileEntry, parse
from ds_childtune.random_states import write_random_states
from ds_childtune.zero.layout import SavedShard

_SHARDS = "shards"


def write_rank_file(folder: Path, rank: int, states: Mapping[str, Tensor], shards: Sequence[SavedShard]) -> FileEntry:
    """Raises RuntimeError when the system refuses."""
    path = folder / f"rank-{rank:05d}.safetensors"
    layout = TypeAdapter(tuple[SavedShard, ...]).dump_json(tuple(shards)).decode()
    with new_file(path) as temporary:
        try:
            save_file(dict(states), temporary, {_SHARDS: layout})
        except SafetensorError as error:
            raise OSError(str(error)) from error
    return FileEntry(path.name, path.stat().st_size, blake2b(path))


def read_layout(path: Path) -> tuple[SavedShard, ...]:
    """The flat shards of the rank that wrote the file. Raises ChildFileError."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from None
    shards = parse(tuple[SavedShard, ...], metadata.get(_SHARDS, ""), str(path))
    for shard in shards:
        # Later reads slice DeepSpeed's tensors by these numbers.
        inside = all(
            min(f.param_start, f.shard_start, f.numel) >= 0 and f.shard_start + f.numel <= shard.numel
            for f in shard.fragments
        )
        if min(shard.rank, shard.index, shard.state_index, shard.numel) < 0 or shard.numel > MAX_NUMEL or not inside:
            raise ChildFileError(
                f"{path}: expected fragments inside flat shards, got {str(shard)[:200]}."
                " Remedy: use another checkpoint, or an undamaged copy."
            )
    return shards


def read_states(path: Path) -> dict[str, Tensor]:
    """The random states of the rank that wrote the file. Raises ChildFileError."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 # it is not a mapping
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from None


def restore_random_states(path: Path) -> None:
    """Put back the random states of the rank that wrote the file. Raises ChildFileError."""
    try:
        write_random_states(read_states(path))
    except ChildFileError:
        raise
    except ValueError as error:
        raise ChildFileError(f"{path}: {error}") from error


def _unreadable(path: Path, error: Exception) -> ChildFileError:
    return ChildFileError(
        f"{path}: expected a rank's file, got: {str(error)[:200]}. Remedy: use another checkpoint, or an undamaged copy."
    )
