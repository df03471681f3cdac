"""The child inside a checkpoint: the subfolder `child` of a tag, next to DeepSpeed's own files.

[Note: what a checkpoint holds]
DeepSpeed's files hold the weights, and the optimizer's state of a ChildTuning-F or dense ChildTuning-D run. The subfolder holds

    child.json                    the manifest: config, model, applied steps, the run that wrote it, every file with its checksum,
                                  DeepSpeed's included
    child-*.safetensors           ChildTuning-D: the masks; with compact state also the child's fp32 weights and moments
    rank-*.safetensors            each rank's random states, and the layout of its flat shards

See [Note: child files] for the first two.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_childtune.child.base_optimizer import counter_device, per_element
from ds_childtune.child.child_shard import ChildShard, index_dtype, put_
from ds_childtune.child.network import ChildNetwork
from ds_childtune.child_files.format import DTYPES, ChildFileError, ParameterEntry, Piece
from ds_childtune.child_files.holders import Run
from ds_childtune.child_files.reader import SavedChild
from ds_childtune.config import ChildTuningConfig
from ds_childtune.shards import FlatShard, Fragment

KIND = "checkpoint"

_MASTER = "fp32"
_STATE = "state."
_STEPPED = "stepped"
"""A piece without this number was never stepped: its moments mean that there were none."""


# ---------------------------------------------------------------- what is written


def parameter_entries(
    shapes: Mapping[str, torch.Size], stored: Iterable[str], dtype: torch.dtype
) -> tuple[ParameterEntry, ...]:
    names = frozenset(stored)
    dtype_name = str(dtype).removeprefix("torch.")
    return tuple(ParameterEntry(n, tuple(shape), dtype_name, n in names) for n, shape in shapes.items())


def stored_fragments(child: ChildNetwork, shards: Sequence[FlatShard]) -> list[tuple[FlatShard, Fragment]]:
    """The fragments that a fixed child has pieces of: every one with compact state, else those that are eligible."""
    return [(s, f) for s in shards for f in (s.fragments if s.tensor in child.shards else s.eligible)]


def pieces(
    child: ChildNetwork, fragments: Iterable[tuple[FlatShard, Fragment]], keys: Mapping[str, torch.dtype]
) -> Iterator[Piece]:
    """One piece for each of the fragments.

    Args:
        keys: moments of any rank's base optimizer; all pieces have the same tensors, zeros where a shard was never stepped.
    """
    for shard, fragment in fragments:
        if shard.tensor in child.shards:
            yield _compact_piece(child.optimizer, child.shards[shard.tensor], fragment, keys)
        else:
            yield Piece.of(fragment.name, fragment.param_start, child.child_mask(shard, fragment, step=0))


def moment_keys(child: ChildNetwork | None) -> dict[str, torch.dtype]:
    """The per-element entries of a compact child's optimizer state on this rank."""
    if child is None:
        return {}
    return {
        key: value.dtype
        for shard in child.shards.values()
        for key, value in child.optimizer.state.get(shard.tensor, {}).items()
        if per_element(value, shard.tensor)
    }


def _compact_piece(
    optimizer: torch.optim.Optimizer, shard: ChildShard, fragment: Fragment, keys: Mapping[str, torch.dtype]
) -> Piece:
    first, last = shard.span(fragment.shard_start, fragment.numel)
    index = (shard.index[first:last] - fragment.shard_start).to(index_dtype(fragment.numel))
    state = optimizer.state.get(shard.tensor, {})
    moments = {
        _STATE + key: state[key][first:last] if key in state else torch.zeros(last - first, dtype=dtype)
        for key, dtype in keys.items()
    }
    numbers = {name: number for key, value in state.items() for name, number in _number(key, value, shard)}
    numbers |= {_STEPPED: 1} if state else {}
    whole = last - first == fragment.numel
    tensors = {_MASTER: shard.tensor.detach()[first:last], **moments}
    return Piece(fragment.name, fragment.param_start, fragment.numel, None if whole else index, tensors, numbers)


def _number(key: str, value: Any, shard: ChildShard) -> Iterator[tuple[str, int | float]]:
    """A counter of the optimizer's state under a name that says whether it was a tensor, and of which dtype."""
    number = value.item() if isinstance(value, Tensor) and value.dim() == 0 else value
    if isinstance(number, (int, float)) and not math.isfinite(number):
        raise NotImplementedError(
            f"save_checkpoint: expected finite counters in the base optimizer's state, got {key!r} = {number}, which no checkpoint"
            ' of a compact child holds. Remedy: use optimizer_state "dense", or AdamW, SGD or Lion.'
        )
    if isinstance(value, Tensor) and value.dim() == 0:
        yield f"{_STATE}{key}.{str(value.dtype).removeprefix('torch.')}", value.item()
    elif isinstance(value, (int, float)):
        yield f"{_STATE}{key}", value
    elif value is not None and not per_element(value, shard.tensor):
        raise NotImplementedError(
            f"save_checkpoint: expected moments and counters in the base optimizer's state, got {key!r} of type"
            f' {type(value).__name__}. Remedy: use optimizer_state "dense", or AdamW, SGD or Lion.'
        )


@contextmanager
def without_compact_state(child: ChildNetwork | None) -> Iterator[None]:
    """Take a compact child's state out of the base optimizer, whose state dict has names only for what is in a param group."""
    if child is None:
        yield
        return
    state = child.optimizer.state
    kept = {s.tensor: state.pop(s.tensor) for s in child.shards.values() if s.tensor in state}
    try:
        yield
    finally:
        state.update(kept)


# ---------------------------------------------------------------- what is read


def check_shapes(child: SavedChild, shapes: Mapping[str, torch.Size], *, strict: bool = True) -> None:
    """Raise ChildFileError unless the checkpoint's parameters are those of this model.

    Args:
        strict: whether both must have the same names; else those that both have must have the same shapes.
    """
    saved = {p.name: p for p in child.manifest.parameters}
    for name in sorted(saved.keys() ^ shapes.keys()) if strict else ():
        what = "no such parameter" if name in saved else "one that the checkpoint lacks"
        raise ChildFileError(
            f"{child.folder}: expected the model that wrote it, got {what}: {name}. Remedy: build the same model; or load only the"
            " weights that both have, with load_module_only=True and load_module_strict=False: the others then stay as they are."
        )
    for name, shape in shapes.items():
        if name in saved and saved[name].shape != tuple(shape):
            raise ChildFileError(
                f"{child.folder}: {name}: expected shape {saved[name].shape}, as in the checkpoint, got {tuple(shape)}."
                " Remedy: build the same model."
            )


def check_model(child: SavedChild, shapes: Mapping[str, torch.Size], stored: Iterable[str]) -> None:
    """Raise ChildFileError unless the checkpoint is of this model, and of the same trainable and masked parameters."""
    check_shapes(child, shapes)
    wanted = frozenset(stored)
    for entry in child.manifest.parameters:
        name = entry.name
        if entry.stored != (name in wanted):
            had, has = ("", "not ") if entry.stored else ("not ", "")
            raise ChildFileError(
                f"{child.folder}: {name}: expected it {had}to be trainable and masked, as in the checkpoint, got that it is"
                f" {has}so. Remedy: freeze the same parameters, and use the same include and exclude; or, for another child on"
                " these weights, load them before select() with load_module_only=True."
            )


_BINDING = ("mode", "reserve_p", "seed", "include", "exclude", "others", "optimizer_state", "compat", "clip")
"""Keys of the config that say which child it is, and how it trains."""


def check_config(child: SavedChild, config: ChildTuningConfig) -> None:
    """Raise ValueError when the config asks for another child than the checkpoint's."""
    saved, asked = child.manifest.config, json.loads(config.model_dump_json())
    for key in _BINDING:
        # An older checkpoint lacks keys that came later, whose default it was trained with.
        had = saved.get(key, ChildTuningConfig.model_fields[key].default)
        if had != asked[key]:
            raise ValueError(
                f"child_tuning.{key}: expected {repr(had)[:200]}, as in the checkpoint {child.folder.parent}, got"
                f" {asked[key]!r}. Remedy: set it back; or, for another child on these weights, load them before select() with"
                " load_module_only=True."
            )


@dataclass(frozen=True)
class SavedMasks:
    """The masks of a checkpoint for this rank's flat shards. They are made one at a time, as they are asked for."""

    _shards: Sequence[FlatShard]
    _pieces: Sequence[Sequence[Piece]]
    """For each shard, of its eligible fragments."""

    def __iter__(self) -> Iterator[Tensor]:
        """bool 1-D, one for each flat shard, on its device: True = inside the child, or not eligible."""
        for shard, pieces in zip(self._shards, self._pieces, strict=True):
            mask = torch.ones(shard.numel, dtype=torch.bool, device=shard.tensor.device)
            for fragment, piece in zip(shard.eligible, pieces, strict=True):
                if piece.index is not None:
                    index = piece.index.to(mask.device)
                    put_(fragment.of(mask).fill_(False), index, torch.ones_like(index, dtype=torch.bool))
            yield mask


def read_masks(child: SavedChild, shards: Sequence[FlatShard]) -> SavedMasks:
    """What is read stays on the host, as indices. Raises ChildFileError."""
    return SavedMasks(shards, [child.read_runs(_runs(s.eligible), values=False) for s in shards])


def _runs(fragments: Iterable[Fragment]) -> list[Run]:
    return [Run(f.name, f.param_start, f.param_start + f.numel) for f in fragments]


def read_compact(child: SavedChild, compact: ChildNetwork) -> None:
    """The child's fp32 weights and the base optimizer's state, into child shards. Raises ChildFileError."""
    for shard in compact.shards.values():
        state: dict[str, Any] = {}
        fragments = shard.flat.fragments
        for fragment, piece in zip(fragments, child.read_runs(_runs(fragments)), strict=True):
            first, last = shard.span(fragment.shard_start, fragment.numel)
            shard.tensor.detach()[first:last].copy_(_stored(child, piece, _MASTER))
            if _STEPPED not in piece.numbers:
                continue
            for key in (k.removeprefix(_STATE) for k in piece.tensors if k.startswith(_STATE)):
                values = _stored(child, piece, _STATE + key)
                if key not in state:
                    state[key] = torch.zeros(shard.tensor.shape, dtype=values.dtype, device=shard.tensor.device)
                state[key][first:last].copy_(values)
            for name, number in piece.numbers.items():
                if name == _STEPPED:
                    continue
                key, _, dtype = name.removeprefix(_STATE).partition(".")
                if dtype and dtype not in DTYPES:
                    raise ChildFileError(
                        f"{child.folder}: {piece.parameter}: expected a number of a known dtype, got {name[:80]!r}."
                        " Remedy: use another checkpoint, or an undamaged copy."
                    )
                where = counter_device(compact.optimizer, shard.tensor)
                state.setdefault(key, torch.tensor(number, dtype=DTYPES[dtype], device=where) if dtype else number)
        # With compact moments only the next step begins with the flat shard. After a run with compact masters it has 16-bit weights.
        shard.scatter()
        if state:
            compact.optimizer.state[shard.tensor] = state


def _stored(child: SavedChild, piece: Piece, name: str) -> Tensor:
    if name not in piece.tensors:
        raise ChildFileError(
            f"{child.folder}: {piece.parameter}: expected the tensor {name!r}, got {sorted(piece.tensors)}."
            " Remedy: use a checkpoint that was saved with compact state."
        )
    return piece.tensors[name]
