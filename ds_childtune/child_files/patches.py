"""A child as patches of whole tensors, as inference servers take them.

[Note: patches]
A patch has a tensor's name, its full shape and dtype, flat indices into the whole tensor, and the new values there. They are values,
not differences, so a patch may be applied twice. Indices are ascending and unique, int32 where they fit.

Fields, their order and their meaning are those of vLLM's `CheckpointWeightPatch`, written from its revision 3db6ef6b
(vllm/model_executor/model_loader/checkpoint_weight_patch.py). One call there takes sparse patches or dense ones, not both. Sparse
ones mark with NaN what stays, so their values are floating and not NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ds_childtune.child.child_shard import index_dtype
from ds_childtune.child_files.export_info import parameter_entries, persistent_buffers
from ds_childtune.child_files.fingerprint import bits
from ds_childtune.child_files.format import DTYPES, ParameterEntry, Piece
from ds_childtune.gathering import gather
from ds_childtune.ranks import raising_together
from ds_childtune.shards import Fragment
from ds_childtune.zero.weights import local_weights

Only = Literal["whole", "partial"]
"""Which tensors become patches: those that the child has every element of, as dense patches, or the others, as sparse ones."""


class CheckpointWeightPatch(NamedTuple):
    """New values of some elements of one tensor, or of all. See [Note: patches]."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: Tensor
    """1-D of `dtype`: at `indices`, or the whole flattened tensor."""
    indices: Tensor | None = None
    """int32 or int64 1-D: flat indices into the whole tensor. None: `values` is the whole tensor."""


def patch_of(
    entry: ParameterEntry, piece: Piece, before: Piece | None = None, only: Only | None = None
) -> CheckpointWeightPatch | None:
    """The patch of one tensor.

    Args:
        piece: all of the tensor, with "values".
        before: as `piece`, of an earlier version of the same child: what is alike is left out.
        only: see `Only`. None makes a sparse patch of whichever tensor.

    Returns:
        None where there is nothing to send.

    Raises:
        ValueError: for NaN, a tensor that is not floating, or another child's piece as `before`.
    """
    values, whole = piece.tensors["values"], piece.index is None
    if (only is not None and whole != (only == "whole")) or not values.numel():
        return None
    changed = None if before is None else _changed(piece, before)
    if changed is not None and not bool(changed.any()):
        return None
    if only == "whole":
        return CheckpointWeightPatch(entry.name, entry.shape, values.dtype, values)
    _check_sparse(entry, values)
    index = _indices(entry.numel) if piece.index is None else piece.index
    if changed is not None:
        values, index = values[changed], index[changed]
    return CheckpointWeightPatch(entry.name, entry.shape, values.dtype, values, index)


def pieces_of(patches: Iterable[CheckpointWeightPatch]) -> Callable[[str], Piece]:
    """Earlier patches of a whole child, as what `live_patches` compares with. A tensor without a patch had nothing in the child."""
    by_name = {patch.name: patch for patch in patches}

    def piece(name: str) -> Piece:
        patch = by_name.get(name)
        if patch is None:
            return Piece(name, 0, 0, _indices(0), {"values": torch.empty(0)})
        numel = torch.Size(patch.shape).numel()
        whole = patch.values.numel() == numel
        return Piece(name, 0, numel, None if whole else patch.indices, {"values": patch.values})

    return piece


def live_patches(
    model: nn.Module,
    names: Sequence[str],
    masks_of: Callable[[str], Iterable[tuple[Fragment, Tensor]]],
    before: Callable[[str], Piece] | None,
    only: Only | None,
) -> Iterator[CheckpointWeightPatch]:
    """The patches of a model that ranks have fragments of, on every rank, tensor after tensor. Each `next` is a collective.

    Args:
        names: parameters that have trained, in the same order on all ranks.
        masks_of: this rank's counted fragments of a parameter, each with its bool mask, True = inside the child.
        before: an earlier version's piece of a parameter or buffer.

    Raises:
        ValueError, NotImplementedError: on every rank; see `patch_of`.
    """
    params, buffers = dict(model.named_parameters()), persistent_buffers(model)
    entries = {entry.name: entry for entry in parameter_entries(model, [*names, *buffers])}
    for name in [*names, *buffers]:
        if name in buffers:
            piece = Piece(name, 0, entries[name].numel, None, {"values": local_weights(name, buffers[name]).values})
        else:
            piece = _gathered(entries[name], params[name], list(masks_of(name)))
        # Ranks may see different earlier versions, or fail to read one. What is gathered is the same on all.
        with nullcontext() if before is None else raising_together():
            patch = patch_of(entries[name], piece, None if before is None else before(name), only)
        if patch is not None:
            yield patch


def _gathered(entry: ParameterEntry, param: nn.Parameter, masks: Sequence[tuple[Fragment, Tensor]]) -> Piece:
    """The child's elements of one parameter, from all ranks. A collective."""
    weights = local_weights(entry.name, param)
    shape, dtype = torch.Size([entry.numel]), DTYPES[entry.dtype]
    inside = gather(entry.name, shape, masks, torch.uint8).bool()
    # As integers, of which a sum with zeros is exact for whatever bits; gloo does not sum int16.
    wide = torch.int64 if dtype.itemsize == 8 else torch.int32
    parts = [(f, bits(weights.part(f.param_start, f.numel)).to(wide)) for f, _ in masks]
    found = gather(entry.name, shape, parts, wide).to(bits(torch.empty(0, dtype=dtype)).dtype).view(dtype)
    return Piece.of(entry.name, 0, inside, values=found)


def _changed(piece: Piece, before: Piece) -> Tensor:
    """bool 1-D like the values: True = other bits than before."""
    old, new = before.tensors["values"], piece.tensors["values"]
    one, other = (torch.zeros(0) if p.index is None else p.index.cpu().long() for p in (piece, before))
    if (piece.index is None) != (before.index is None) or not torch.equal(one, other) or old.dtype != new.dtype:
        raise ValueError(
            f"{piece.parameter}: expected `since` to be an earlier version of the same child, got one with other elements"
            " or of another dtype. Remedy: leave `since` out, which sends all of the child."
        )
    return bits(new) != bits(old.to(new.device))


def _check_sparse(entry: ParameterEntry, values: Tensor) -> None:
    if not values.is_floating_point():
        raise ValueError(
            f"{entry.name}: expected a floating tensor for a sparse patch, got {entry.dtype}."
            ' Remedy: make patches(only="whole") and patches(only="partial"), and apply them in two calls.'
        )
    if bool(values.isnan().any()):
        raise ValueError(
            f"{entry.name}: expected values that are not NaN, which stands for an element that stays, got"
            f" {int(values.isnan().sum())} NaN. Remedy: train again from weights that are finite."
        )


def _indices(numel: int) -> Tensor:
    return torch.arange(numel, dtype=index_dtype(numel))
