"""A child that the user gives: masks by name, instead of scores.

[Note: masks that are given]
A mask is given for a parameter's name, or for a glob pattern of names, in one of four ways:

    bool tensor of the parameter's shape     True = trained
    rows                                     indices along the first dimension (a sequence or a 1-D integer tensor), which train whole
    "nonzero"                                the elements whose weight is not zero, as those that pruning has left
    a function of the parameter's shape      returns one of the first two; it is called on ranks that hold elements of the parameter

Each rank reads only the elements that it holds, so no mask of a sharded parameter is made whole, unless it was given so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor

from ds_childtune.shards import FlatShard, Fragment

GivenMask = Tensor | Sequence[int] | Literal["nonzero"] | Callable[[torch.Size], "Tensor | Sequence[int]"]
Unnamed = Literal["frozen", "dense"]
"""What eligible parameters are that no name or pattern is for: outside the child, or inside it."""


def check_arguments(
    batches: object, against: object, masks: object, child: object, unnamed: object, loss_fn: object
) -> None:
    """Raise ValueError unless the arguments of `select` ask for one thing."""
    given = [name for name, value in (("batches", batches), ("masks", masks), ("child", child)) if value is not None]
    if len(given) > 1 or (against is not None and given and given != ["batches"]):
        got = ", ".join(given + (["against"] if against is not None else []))
        raise ValueError(
            f"select: expected calibration batches (and against), or masks, or a child, got {got}. Remedy: pass one of them."
        )
    if loss_fn is not None and (masks is not None or child is not None):
        raise ValueError(
            f"select: expected no loss_fn with {given[0]}, which need no batches, got one. Remedy: leave it out."
        )
    if unnamed == "dense" and masks is None and child is None:
        raise ValueError(
            'select: unnamed: expected masks or a child with it, got "dense" without them. Remedy: leave it out, and exclude what is'
            " to train in full by child_tuning.exclude."
        )
    if unnamed not in ("frozen", "dense"):
        raise ValueError(f'select: unnamed: expected "frozen" or "dense", got {unnamed!r}. Remedy: pass one of them.')
    if masks is not None and not isinstance(masks, Mapping):
        raise ValueError(
            f'select: masks: expected a mapping of names to masks, got {type(masks).__name__}. Remedy: pass for example {{"*": mask}}.'
        )


def must_be_alike(masks: Mapping[str, object] | None, child: object, unnamed: str) -> str:
    """What ranks must have been given alike, as they go different ways by it."""
    if masks is None and child is None:
        return "no masks and no child"
    what = f"child {str(child)!r}" if masks is None else f"masks of {', '.join(map(repr, sorted(masks))) or 'nothing'}"
    return f"{what}, unnamed {unnamed!r}"


def match_names(given: Mapping[str, GivenMask], eligible: Set[str], known: Mapping[str, str]) -> dict[str, GivenMask]:
    """The mask of each eligible parameter that has one. A parameter's own name goes before patterns.

    Args:
        eligible: names of the parameters that the child is chosen from.
        known: names of all parameters of the model, to the first name of each: a tied parameter may be named by any of its names.

    Raises:
        ValueError: for a name or pattern that no eligible parameter has, and for a parameter with two patterns.
    """
    if not given:
        raise ValueError('select: expected masks by name, got none. Remedy: pass for example masks={"*": rows}.')
    found: dict[str, str] = {}
    for pattern in given:
        matching = [pattern] if known.get(pattern) in eligible else [n for n in known if fnmatchcase(n, pattern)]
        names = sorted({known[n] for n in matching} & eligible)
        if not names:
            there = sorted(n for n in known if fnmatchcase(n, pattern))
            why = f"which is not eligible ({there[0]})" if there else "which no parameter has"
            raise ValueError(
                f"select: masks: expected the name or pattern of an eligible parameter, got {pattern!r}, {why}. Remedy: correct it,"
                f' or set child_tuning.include, for example ["*"]; eligible is for example {min(eligible)}.'
            )
        for name in names:
            before = found.get(name)
            if before is None or (pattern in known and before not in known):
                found[name] = pattern
            elif before not in known or pattern in known:
                raise ValueError(
                    f"select: masks: expected one pattern for {name}, got {before!r} and {pattern!r}."
                    f" Remedy: give the mask of {name} under its own name, or make the patterns narrower."
                )
    return {name: given[pattern] for name, pattern in found.items()}


def given_masks(
    shards: Iterable[FlatShard], masks: Mapping[str, GivenMask], shapes: Mapping[str, torch.Size], unnamed: Unnamed
) -> Iterator[Tensor]:
    """For each flat shard, bool 1-D: True = inside the child, or not eligible. See [Note: masks that are given].

    Args:
        masks: by parameter, from `match_names`.
        shapes: of every parameter.

    Raises:
        ValueError: for a mask of another shape or type than expected, and for rows that are not there.
    """
    for shard in shards:
        mask = torch.ones(shard.numel, dtype=torch.bool, device=shard.tensor.device)
        for fragment in shard.eligible:
            inside = fragment.of(mask)
            if fragment.name in masks:
                inside.copy_(_of_fragment(masks[fragment.name], shard, fragment, shapes[fragment.name]))
            elif unnamed == "frozen":
                inside.fill_(False)
        yield mask


def _of_fragment(given: Any, shard: FlatShard, fragment: Fragment, shape: torch.Size) -> Tensor:
    """bool [fragment.numel]."""
    name, start, end = fragment.name, fragment.param_start, fragment.param_start + fragment.numel
    if isinstance(given, str):
        if given != "nonzero":
            raise ValueError(f'select: masks: {name}: expected "nonzero", a tensor or rows, got {given!r}. {_REMEDY}')
        return fragment.of(shard.flat()) != 0
    if callable(given):
        given = given(shape)
    if isinstance(given, Tensor) and given.dtype == torch.bool:
        if given.shape != shape:
            raise ValueError(
                f"select: masks: {name}: expected a bool tensor of shape {tuple(shape)}, got {tuple(given.shape)}. {_REMEDY}"
            )
        return given.reshape(-1)[start:end].to(shard.tensor.device)
    rows = _rows(name, given, shape)
    per_row = max(1, shape[1:].numel())
    first, last = start // per_row, -(-end // per_row)
    whole = rows[first:last].repeat_interleave(per_row)
    return whole[start - first * per_row :][: fragment.numel].to(shard.tensor.device)


def _rows(name: str, given: Any, shape: torch.Size) -> Tensor:
    """bool [rows]: those that are given."""
    index: Tensor | None = None
    with suppress(TypeError, ValueError, RuntimeError):
        index = given.cpu() if isinstance(given, Tensor) else _numbers(list(given))
    # uint8 is how masks were written before torch had bool.
    if index is None or index.dim() != 1 or index.dtype not in _ROW_NUMBERS or not shape:
        what = f"a tensor of {given.dtype}, {tuple(given.shape)}" if isinstance(given, Tensor) else repr(given)[:80]
        raise ValueError(
            f"select: masks: {name}: expected a bool tensor of shape {tuple(shape)}, or row numbers, got {what}. {_REMEDY}"
        )
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < shape[0]:
        raise ValueError(
            f"select: masks: {name}: expected rows from 0 to {shape[0] - 1}, got {int(index.min())} to {int(index.max())}. {_REMEDY}"
        )
    rows = torch.zeros(shape[0], dtype=torch.bool)
    rows[index.long()] = True
    return rows


def _numbers(given: list[Any]) -> Tensor | None:
    """None where True and False are among them, which are no row numbers."""
    if any(isinstance(number, bool) for number in given):
        return None
    return torch.as_tensor(given) if given else torch.empty(0, dtype=torch.int64)


_ROW_NUMBERS = (torch.int64, torch.int32, torch.int16)

_REMEDY = (
    "Remedy: pass a bool tensor of the parameter's shape, such as torch.tensor(mask).bool(), row numbers such as"
    ' range(30000, 30100), "nonzero", or a function of the shape that returns one of the first two.'
)
