"""Only the child: the tuned values of the elements that were trained, to be applied to the base model.

[Note: export]
Kind "export". For each trained parameter the pieces hold "values", of the parameter's own dtype, for the elements inside the
child. Dense parameters and persistent buffers are stored whole, frozen parameters not at all. Every rank writes its own fragments, so
no rank has to gather a parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ds_childtune._version import __version__
from ds_childtune.child_files.atomic import new_folder
from ds_childtune.child_files.export_info import KIND, describe, parameter_entries, persistent_buffers
from ds_childtune.child_files.fingerprint import fingerprint, signed
from ds_childtune.child_files.format import (
    FileEntry,
    Manifest,
    Piece,
    seal,
)
from ds_childtune.child_files.rank_holders import gather_holders
from ds_childtune.child_files.writer import write_manifest, write_pieces
from ds_childtune.ranks import device, gather_objects, largest_of_ranks, raising_together, sum_over_ranks, this_rank
from ds_childtune.shards import Fragment
from ds_childtune.zero.weights import is_partitioned, local_weights


def export_child(
    folder: Path, model: nn.Module, masks: Iterable[tuple[Fragment, Tensor]], config: Mapping[str, Any], step: int
) -> Manifest:
    """Write the child. A collective; every rank writes what it has.

    Args:
        masks: this rank's fragments, and for each a bool mask of its elements, True = inside the child or not eligible.

    Raises:
        NotImplementedError, RuntimeError: on every rank; a child that `folder` had before is then still there.
    """
    with raising_together():
        params = dict(model.named_parameters())
        buffers = persistent_buffers(model)
        pieces, sums = _trained(params, masks)
    has = largest_of_ranks(torch.tensor([name in sums for name in params], dtype=torch.int64))
    trained = {name for name, held in zip(params, has.tolist(), strict=True) if held}
    with raising_together():
        entries = parameter_entries(model, [*trained, *buffers])
        first = this_rank() == 0
        for name, param in params.items():
            if name not in trained and (first or is_partitioned(param)):
                weights = local_weights(name, param)
                sums[name] = fingerprint(weights.values, weights.start, None)
        if first:
            whole = {name: local_weights(name, buffer).values for name, buffer in buffers.items()}
            pieces += [Piece(name, 0, values.numel(), None, {"values": values}) for name, values in whole.items()]
    totals = torch.tensor([sums.get(name, 0) for name in params], dtype=torch.int64, device=device())
    sum_over_ranks(totals)
    holders = gather_holders({e.name: e.numel for e in entries}, [(p.parameter, p.start, p.numel) for p in pieces])
    with raising_together():
        if first:
            new_folder(folder)
    with raising_together():
        file = write_pieces(folder, this_rank(), pieces)
    files: tuple[FileEntry, ...] = tuple(f for f in gather_objects(file) if f is not None)
    extra = describe(model, dict(zip(params, totals.tolist(), strict=True)), step)
    manifest = seal(Manifest(__version__, KIND, dict(config), entries, files, extra).with_holders(holders))
    with raising_together():
        if first:
            write_manifest(folder, manifest)
    return manifest


def _trained(
    params: Mapping[str, nn.Parameter], masks: Iterable[tuple[Fragment, Tensor]]
) -> tuple[list[Piece], dict[str, int]]:
    """This rank's pieces of trained parameters, and its share of their fingerprints."""
    pieces: list[Piece] = []
    sums: dict[str, int] = {}
    for fragment, mask in masks:
        if fragment.counted:
            values = local_weights(fragment.name, params[fragment.name]).part(fragment.param_start, fragment.numel)
            mask = mask.to(values.device)
            pieces.append(Piece.of(fragment.name, fragment.param_start, mask, values=values))
            share = fingerprint(values, fragment.param_start, mask)
            sums[fragment.name] = signed(sums.get(fragment.name, 0) + share)
    return pieces, sums
