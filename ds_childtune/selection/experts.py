"""Experts that no calibration token reached.

[Note: experts that no token reached]
A router sends a token to a few experts, so a short calibration may miss one. That is no fault: the expert's Fisher information is
zero as far as it is known. A parameter that no input can reach is a fault, of the model or of `include`. From outside the two look
alike, so an expert is known by its siblings. It is one of these:

- a member of a list inside a repeated block: an `nn.ModuleList` of modules of one class, or such an `nn.ModuleDict` whose keys differ
  only in a number. The same parameters of some member had a gradient;
- a slice of a fused parameter [num_experts, ...] of a module that has `num_experts`. A fused parameter always has a gradient.

It was not reached where all its scores are zero and those of a sibling are not. So a token without a loss, such as the last one of a
text, does not count.

A layer that is skipped is no expert: the list of a model's blocks is not inside a repeated block. A parameter that no expert uses
has no sibling with a gradient. Both are errors that name them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import nn

from ds_childtune.ranks import device, max_over_ranks
from ds_childtune.selection.scores import Scores

Names = Mapping[str, Sequence[str]]
"""The eligible parameters of each expert, by the expert's path."""


@dataclass(frozen=True)
class Experts:
    """The experts among the eligible parameters."""

    total: int = 0
    unreached: tuple[str, ...] = ()
    """Paths of those that no calibration token reached; `path[i]` is expert `i` of fused parameters."""


def unfused_experts(model: nn.Module, eligible: Set[str]) -> list[Names]:
    """The members of each list of experts. See [Note: experts that no token reached]."""
    found: list[Names] = []
    blocks: list[str] = []
    for path, module in model.named_modules():
        members = _members(module)
        if not members:
            continue
        if any(path.startswith(f"{block}.") for block in blocks):
            named = {f"{path}.{key}": [n for n, _ in member.named_parameters()] for key, member in members.items()}
            kept = {m: [f"{m}.{n}" for n in names if f"{m}.{n}" in eligible] for m, names in named.items()}
            if sum(map(bool, kept.values())) > 1:
                found.append({member: names for member, names in kept.items() if names})
        blocks.append(path)
    return found


def fused_experts(model: nn.Module, shapes: Mapping[str, torch.Size], eligible: Set[str]) -> Names:
    """The eligible fused parameters of each module of experts, by the module's path."""
    found: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        count = getattr(module, "num_experts", None)
        own = {n: shapes[n] for k in module._parameters if (n := f"{path}.{k}".lstrip(".")) in shapes}
        fused = [n for n, shape in own.items() if len(shape) > 1 and shape[0] == count]
        if any(len(own[n]) > 2 for n in fused) and (names := [n for n in fused if n in eligible]):
            found[path] = names
    return found


def find_experts(
    model: nn.Module,
    shapes: Mapping[str, torch.Size],
    reached: Mapping[str, bool],
    scores: Iterable[Sequence[Scores]],
) -> tuple[Experts, list[str]]:
    """The experts, and the other parameters that never had a gradient. A collective.

    Args:
        shapes: full shapes, by name.
        reached: whether a parameter had a gradient on any rank; every eligible one, in the same order on all ranks.
        scores: of this rank's fragments.
    """
    lists = unfused_experts(model, reached.keys())
    fused = fused_experts(model, shapes, reached.keys())
    slices = {name: 1 for members in lists for names in members.values() for name in names}
    slices |= {name: shapes[name][0] for names in fused.values() for name in names}
    scored = _slices_with_a_score(slices, shapes, scores)
    unreached = [path for members in lists for path in _unreached_members(members, reached, scored)]
    for path, names in fused.items():
        hits = [any(each) for each in zip(*(scored[name] for name in names), strict=True)]
        unreached += [f"{path}[{i}]" for i, hit in enumerate(hits) if any(hits) and not hit]
    total = sum(map(len, lists)) + sum(shapes[names[0]][0] for names in fused.values())
    inside = tuple(f"{path}." for path in unreached)
    never = [name for name, had in reached.items() if not had and not name.startswith(inside)]
    return Experts(total, tuple(unreached)), never


def _members(module: nn.Module) -> dict[str, nn.Module]:
    """The members of a list of modules of one class; empty for anything else."""
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return {}
    members = dict(module.named_children())
    numbered = len({re.sub(r"\d+", "0", key) for key in members}) == 1
    return members if numbered and len({type(m) for m in members.values()}) == 1 else {}


def _unreached_members(members: Names, reached: Mapping[str, bool], scored: Mapping[str, Sequence[bool]]) -> list[str]:
    """See [Note: experts that no token reached]."""
    had = {name[len(path) :] for path, names in members.items() for name in names if reached[name]}
    hit = {path: any(scored[name][0] for name in names) for path, names in members.items()}
    return [
        path
        for path, names in members.items()
        if not hit[path] and any(hit.values()) and all(n[len(path) :] in had for n in names)
    ]


def _slices_with_a_score(
    slices: Mapping[str, int], shapes: Mapping[str, torch.Size], scores: Iterable[Sequence[Scores]]
) -> dict[str, list[bool]]:
    """For each parameter, whether each of so many slices of it has a score above zero on any rank. A collective."""
    if not slices:
        return {}
    together = torch.zeros(sum(slices.values()), dtype=torch.int64, device=device())
    hits = dict(zip(slices, together.split(list(slices.values())), strict=True))
    for one in (s for of_shard in scores for s in of_shard if s.name in slices and s.values.numel()):
        size = shapes[one.name].numel() // slices[one.name]
        end = one.param_start + one.values.numel()
        for i in range(one.param_start // size, -(-end // size)):
            first, last = max(one.param_start, i * size), min(end, (i + 1) * size)
            part = one.values[first - one.param_start : last - one.param_start]
            hits[one.name][i] |= (part != 0).any().to(together.device).long()
    max_over_ranks(together)
    parts = together.bool().tolist()
    ends = itertools.accumulate(slices.values())
    return {name: parts[end - count : end] for (name, count), end in zip(slices.items(), ends, strict=True)}
