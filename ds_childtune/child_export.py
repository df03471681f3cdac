"""The child alone: the tuned values of the elements that were trained, to be applied to the base model.

[Note: export]
Kind "export". For each trained parameter the pieces hold "values", of the parameter's own dtype, for the elements inside the
child; a dense parameter and a persistent buffer is stored whole. Frozen parameters
are not. Every rank writes its own fragments,
so none of them ever has a whole parameter that it did not have before.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from deepspeed import comm as dist
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from ds_childtune._ranks import device, gather_objects, largest_of_ranks, raising_together, sum_over_ranks
from ds_childtune._version import __version__
from ds_childtune._zero_weights import full_shape, is_partitioned, local_weights
from ds_childtune.child_format import DTYPES, FileEntry, Manifest, ParameterEntry, Piece, check_seal, parsed, sealed
from ds_childtune.child_writer import commit, write_pieces
from ds_childtune.durable import new_folder
from ds_childtune.fingerprint import fingerprint, signed, text
from ds_childtune.gathering import gather_holders
from ds_childtune.shards import Fragment

KIND = "export"


@dataclass(frozen=True)
class ExportInfo:
    """`Manifest.extra` of an export."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    fingerprints: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{16}$")]]
    """Of the base model, for every parameter that is not stored whole. See `fingerprint`."""
    model_class: str
    """For example "BertForSequenceClassification"."""
    model_config: str | None
    """The Hugging Face config as json, where the model has one."""
    step: int
    """Applied steps of training."""
    seal: str
    """See `child_format.sealed`."""

    @classmethod
    def of(cls, manifest: Manifest, where: Path) -> ExportInfo:
        """Raises ChildFileError when the manifest has something else, or has changed."""
        check_seal(manifest, where)
        return parsed(cls, json.dumps(manifest.extra), str(where))


def describe(model: nn.Module, fingerprints: Mapping[str, int], step: int) -> dict[str, Any]:
    """`Manifest.extra` for a model."""
    config: Any = getattr(model, "config", None)
    return {
        "fingerprints": {name: text(number) for name, number in fingerprints.items()},
        "model_class": type(model).__name__,
        "model_config": config.to_json_string(use_diff=False) if hasattr(config, "to_json_string") else None,
        "step": step,
    }


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that a checkpoint has, such as running statistics, by name."""
    saved = set(model.state_dict())
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def parameter_entries(model: nn.Module, stored: Iterable[str]) -> tuple[ParameterEntry, ...]:
    """Every parameter, by its first name, and every persistent buffer.

    Raises:
        NotImplementedError: for a dtype that the format has no name for.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    stored = set(stored)
    entries = []
    for name, tensor in {**dict(model.named_parameters()), **persistent_buffers(model)}.items():
        if tensor.dtype not in names:
            raise NotImplementedError(
                f"{name}: expected one of {', '.join(names.values())}, got {tensor.dtype}. Remedy: convert it."
            )
        entries.append(ParameterEntry(name, tuple(full_shape(tensor)), names[tensor.dtype], name in stored))
    return tuple(entries)


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
        first = dist.get_rank() == 0
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
        file = write_pieces(folder, dist.get_rank(), pieces)
    files: tuple[FileEntry, ...] = tuple(f for f in gather_objects(file) if f is not None)
    extra = describe(model, dict(zip(params, totals.tolist(), strict=True)), step)
    manifest = sealed(Manifest(__version__, KIND, dict(config), entries, files, extra).with_holders(holders))
    with raising_together():
        if first:
            commit(folder, manifest)
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
