"""Put children onto the base model, and take them off again, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ds_childtune.child.child_shard import put_
from ds_childtune.child_files.export_info import KIND, ExportInfo, persistent_buffers
from ds_childtune.child_files.fingerprint import bits, fingerprint, signed, text
from ds_childtune.child_files.format import DTYPES, ChildFileError, Piece
from ds_childtune.child_files.holders import Run
from ds_childtune.child_files.reader import SavedChild, open_child
from ds_childtune.ranks import device, raising_together, sum_over_ranks, this_rank, world_size
from ds_childtune.zero.flat_shards import read_flat_shards, read_parameters
from ds_childtune.zero.other_engines import trains_a_child
from ds_childtune.zero.weights import full_shape, is_partitioned, local_weights, refresh_copies

Conflicts = Literal["refuse", "last"]


def apply_child(target: Any, *paths: str | Path, conflicts: Conflicts = "refuse") -> AppliedChild:
    """Overwrite the base model's elements with the children's. With sharded weights a collective.

    Args:
        target: the base model, an `nn.Module`, whole or partitioned by ZeRO-3; or an engine around it, without a ChildTuner.
        paths: folders that `ChildTuner.export` wrote, for this model.
        conflicts: what to do where two children have other values for the same element. "refuse", or "last": later paths win.
            A classifier head that trains in full is such a place for any two children.

    Returns:
        A handle whose `revert` gives the base model back.

    Raises:
        ChildFileError, ValueError: for folders that are not whole children of this base model; nothing has changed then.
        NotImplementedError, RuntimeError: for weights that cannot be replaced where they are; nothing has changed then either.
    """
    site = _Site.of(target)
    with site.together():
        if conflicts not in ("refuse", "last"):
            raise ValueError(
                f'conflicts: expected "refuse" or "last", got {conflicts!r}. Remedy: pass one of "refuse" and "last".'
            )
        if site.trains:
            raise RuntimeError(
                "apply_child: this engine, or the one around this model, trains a child, which would overwrite a part of what is"
                " applied. Remedy: call its detach() first; apply children before attach."
            )
        if not paths:
            raise ValueError("apply_child: expected at least one child's folder, got none. Remedy: pass its path.")
        children = [open_child(path, kind=KIND, checksums=False) for path in paths]
        for child in children:
            child.check_contents(site.rank, site.world_size)
            _check_parameters(child, site)
        own = [site.read(child) for child in children]
    sums = torch.tensor([[site.fingerprint(name, pieces.get(name)) for name in site.params] for pieces in own])
    if site.is_sharded:
        sums = sums.to(device())
        sum_over_ranks(sums)
    with site.together():
        for child, row in zip(children, sums.tolist(), strict=True):
            _check_fingerprints(child, dict(zip(site.params, row, strict=True)))
        if conflicts == "refuse":
            _refuse_conflicts(children, own)
    applied = AppliedChild(site)
    for pieces in own:
        for name, piece in pieces.items():
            applied.write(name, piece)
    site.refresh()
    return applied


@dataclass(repr=False)
class AppliedChild:
    """A model with children on it."""

    _site: _Site
    _replaced: list[tuple[Tensor, Tensor | None, Tensor]] = field(default_factory=list)
    """1-D view of weights; which elements, int32 where that is enough, or None for all; and their values before."""

    def write(self, name: str, piece: Piece) -> None:
        """Put a piece of this rank's elements into every place where this rank keeps them."""
        for start, weights in self._site.homes(name):
            part = piece.narrow(start, start + weights.numel())
            where = None if part.index is None else part.index.to(weights.device)
            before = weights.clone() if where is None else weights.index_select(0, where)
            self._replaced.append((weights, where, before))
            _put(weights, where, part.tensors["values"].to(weights.device, weights.dtype))

    def revert(self) -> None:
        """Give the base model back, bit for bit. A collective where `apply_child` was one. Not after training."""
        for weights, where, before in reversed(self._replaced):
            _put(weights, where, before)
        self._replaced.clear()
        self._site.refresh()


def _put(weights: Tensor, where: Tensor | None, values: Tensor) -> None:
    if where is None:
        weights.copy_(values)
    else:
        put_(weights, where, values)


@dataclass
class _Site:
    """The model on this rank."""

    model: nn.Module
    engine: Any
    """None for a bare model."""
    params: dict[str, nn.Parameter]
    tensors: dict[str, Tensor]
    """Parameters and persistent buffers, by name."""
    is_sharded: bool
    """Whether the ranks act together: around an engine, or a partitioned model."""
    rank: int = 0
    world_size: int = 1
    trains: bool = False
    """Whether an engine around the model trains a child."""
    masters: dict[str, list[tuple[int, Tensor]]] = field(default_factory=dict)
    """What the optimizer steps: first element in the parameter, and a 1-D view."""

    @classmethod
    def of(cls, target: Any) -> _Site:
        engine = target if hasattr(target, "basic_optimizer") else None
        model = target.module if engine is not None else target
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"apply_child: expected an nn.Module or a DeepSpeed engine, got {type(model).__name__}."
                " Remedy: pass the base model."
            )
        params = dict(model.named_parameters())
        is_sharded = engine is not None or any(is_partitioned(p) for p in params.values())
        site = cls(model, engine, params, params | persistent_buffers(model), is_sharded)
        if is_sharded:
            site.rank, site.world_size = this_rank(), world_size()
        site.trains = getattr(engine, "child_tuner", None) is not None or trains_a_child(model)
        # DeepSpeed's flat shards may be the child's own.
        if engine is not None and engine.optimizer is not None and not site.trains:
            for shard in read_flat_shards(engine, read_parameters(engine)):
                for fragment in shard.fragments:
                    view = (fragment.param_start, fragment.of(shard.flat()))
                    site.masters.setdefault(fragment.name, []).append(view)
        return site

    def together(self) -> Any:
        return raising_together() if self.is_sharded else nullcontext()

    def read(self, child: SavedChild) -> dict[str, Piece]:
        """This rank's elements of the stored parameters of which it has any."""
        runs = []
        for entry in child.manifest.parameters:
            if entry.stored:
                weights = local_weights(entry.name, self.tensors[entry.name])
                runs.append(Run(entry.name, weights.start, weights.end))
        pieces = {piece.parameter: piece for piece in child.read_runs([run for run in runs if run.start < run.end])}
        for name, piece in pieces.items():
            dtype = DTYPES[child.parameters[name].dtype]
            if {what: tensor.dtype for what, tensor in piece.tensors.items()} != {"values": dtype}:
                raise ChildFileError(
                    f"{child.folder}: {name}: expected values in {dtype} only, got {sorted(piece.tensors)}."
                    " Remedy: export it again."
                )
        return pieces

    def homes(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Every place where this rank keeps elements of a parameter, whole copies of partitioned ones left to `refresh`."""
        weights = local_weights(name, self.tensors[name])
        yield weights.start, weights.values
        yield from self.masters.get(name, ())

    def fingerprint(self, name: str, piece: Piece | None) -> int:
        """This rank's share of a parameter's fingerprint outside the child."""
        if self.rank != 0 and not is_partitioned(self.params[name]):
            return 0
        weights = local_weights(name, self.params[name])
        inside = None if piece is None else piece.mask().to(weights.values.device)
        return signed(fingerprint(weights.values, weights.start, inside))

    def refresh(self) -> None:
        if self.is_sharded:
            refresh_copies(self.params.values())


def _check_parameters(child: SavedChild, site: _Site) -> None:
    """Raise ValueError unless the model has the child's parameters, in their shapes and dtypes, and no other."""
    remedy = "Remedy: apply the child to the model that it was trained on, in the same dtype."
    theirs = {p.name: p for p in child.manifest.parameters}
    for name in [*theirs, *site.tensors]:
        if name not in theirs or name not in site.tensors:
            who = "model" if name in theirs else "child"
            raise ValueError(
                f"{child.folder}: expected the same parameters, but the {who} has no {name[:80]!r}. {remedy}"
            )
        tensor, entry = site.tensors[name], theirs[name]
        if tuple(full_shape(tensor)) != entry.shape or tensor.dtype != DTYPES[entry.dtype]:
            raise ValueError(
                f"{child.folder}: {name}: expected {list(entry.shape)} {entry.dtype}, but the model has"
                f" {list(full_shape(tensor))} {str(tensor.dtype).removeprefix('torch.')}. {remedy}"
            )


def _check_fingerprints(child: SavedChild, found: dict[str, int]) -> None:
    """Raise ValueError unless the model, outside the child, is the base model."""
    info = ExportInfo.of(child.manifest, child.folder)
    others = [name for name, number in found.items() if info.fingerprints.get(name) != text(number)]
    if others:
        raise ValueError(
            f"{child.folder}: expected its base model, but outside the child {len(others)} of {len(found)} parameters have other"
            f" values ({', '.join(others[:3])}{', ...' if len(others) > 3 else ''})."
            " Remedy: load the very weights that training began with; revert other children first, or apply all in one call."
        )


def _refuse_conflicts(children: Sequence[SavedChild], own: Sequence[dict[str, Piece]]) -> None:
    """Raise ValueError when two children have other values for the same element of this rank's."""
    for j, late in enumerate(own):
        for i, early in enumerate(own[:j]):
            counts = {name: differing(early[name], late[name]) for name in early.keys() & late.keys()}
            worst = sorted((n for n in counts if counts[n]), key=lambda n: (-counts[n], n))
            if worst:
                raise ValueError(
                    f"{children[j].folder}: expected no element that {children[i].folder} sets to another value, got"
                    f" {sum(counts.values())}, most of them in {', '.join(worst[:3])}."
                    ' Remedy: pass conflicts="last", so that the later child wins.'
                )


def differing(one: Piece, other: Piece) -> int:
    """Elements inside both children, with other values. The pieces are of the same run of elements."""
    both = one.mask() & other.mask()
    mine, others = (bits(piece.tensors["values"])[both[piece.mask()]] for piece in (one, other))
    return int((mine != others).sum())
