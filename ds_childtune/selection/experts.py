"""Experts that no calibration token reached.

[Note: experts that no token reached]
A router sends a token to a few experts, so a short calibration may miss one. That is no fault: the expert's Fisher information is
zero as far as it is known. A parameter that no input can reach is a fault, of the model or of `include`. From outside the two look
alike, so an expert is known by its siblings. It is one of these:

- a member of a list inside a repeated block: an `nn.ModuleList` of modules of one class, or such an `nn.ModuleDict` whose keys differ
  only in a number. Nothing of the member had a gradient, and the same parameters of another member had one;
- a slice of a fused parameter [num_experts, ...] of a module that has `num_experts`. A fused parameter always has a gradient, so a
  slice was not reached where the scores of all the module's parameters are zero in it, and those of another slice are not.

A layer that is skipped is no expert: the list of a model's blocks is not inside a repeated block. A parameter that no expert uses
has no sibling with a gradient. Both are errors that name them.
"""

from __future__ import annotations

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
    unreached = [path for members in lists for path in _unreached_members(members, reached)]
    fused = fused_experts(model, shapes, reached.keys())
    hits = _slices_with_a_score(fused, shapes, scores)
    for path, hit in hits.items():
        if any(hit):
            unreached += [f"{path}[{i}]" for i, scored in enumerate(hit) if not scored]
    total = len({member for members in lists for member in members}) + sum(map(len, hits.values()))
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


def _unreached_members(members: Names, reached: Mapping[str, bool]) -> list[str]:
    """See [Note: experts that no token reached]."""
    had = {name[len(path) :] for path, names in members.items() for name in names if reached[name]}
    return [
        path
        for path, names in members.items()
        if not any(reached[n] for n in names) and all(n[len(path) :] in had for n in names)
    ]


def _slices_with_a_score(
    fused: Names, shapes: Mapping[str, torch.Size], scores: Iterable[Sequence[Scores]]
) -> dict[str, list[bool]]:
    """For each module of fused experts, whether each expert has a score above zero on any rank. A collective."""
    hits = {path: torch.zeros(shapes[names[0]][0], dtype=torch.int64, device=device()) for path, names in fused.items()}
    module_of = {name: path for path, names in fused.items() for name in names}
    for one in (s for of_shard in scores for s in of_shard if s.name in module_of):
        hit, size = hits[module_of[one.name]], shapes[one.name].numel() // shapes[one.name][0]
        end = one.param_start + one.values.numel()
        for expert in range(one.param_start // size, -(-end // size)):
            first, last = max(one.param_start, expert * size), min(end, (expert + 1) * size)
            part = one.values[first - one.param_start : last - one.param_start]
            hit[expert] |= (part != 0).any().to(hit.device).long()
    if not hits:
        return {}
    together = torch.cat(list(hits.values()))
    max_over_ranks(together)
    parts = together.split([len(hit) for hit in hits.values()])
    return {path: [bool(h) for h in part.tolist()] for path, part in zip(hits, parts, strict=True)}
