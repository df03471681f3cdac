"""Which parameters may be masked. Every other trainable parameter is dense: trained in full."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from ds_childtune.config import ChildTuningConfig


def eligible_names(model: nn.Module, trainable: Sequence[str], config: ChildTuningConfig) -> frozenset[str]:
    """The names, among `trainable`, of the parameters that `config` makes eligible.

    Args:
        trainable: what the optimizer steps.

    Raises:
        ValueError: when a pattern matches nothing, or nothing is left.
    """
    if config.include is not None:
        names = _matching(trainable, config.include, key="include")
    elif config.mode == "ChildTuning-F":
        names = set(trainable)
    else:
        names = set(trainable) & _names_in_repeated_blocks(model)
        if not names:
            raise ValueError(
                f"child_tuning.include: {type(model).__name__} has no repeated blocks (an nn.ModuleList of modules of one"
                f" class) with trainable parameters that the optimizer holds, so ChildTuning-D needs patterns."
                f' Remedy: set "include", for example ["*"]; the model has {_some(trainable)}.'
            )
    names -= _matching(trainable, config.exclude, key="exclude")
    if not names:
        raise ValueError(
            f"child_tuning.exclude: {list(config.exclude)} takes out every eligible parameter, so nothing would be masked."
            " Remedy: narrow it."
        )
    return frozenset(names)


def _matching(trainable: Sequence[str], patterns: Iterable[str], *, key: str) -> set[str]:
    matched: set[str] = set()
    for pattern in patterns:
        names = {name for name in trainable if fnmatchcase(name, pattern)}
        if not names:
            raise ValueError(
                f"child_tuning.{key}: the pattern {pattern!r} matches none of the {len(trainable)} trainable parameters that the"
                f" optimizer holds. Remedy: correct it; the model has {_some(trainable)}."
            )
        matched |= names
    return matched


def _names_in_repeated_blocks(model: nn.Module) -> set[str]:
    """Parameters inside an nn.ModuleList whose members are of one class: a model's layers, whatever they are called."""
    names: set[str] = set()
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and len({type(m) for m in module}) == 1:
            prefix = f"{path}." if path else ""
            names |= {prefix + name for name, _ in module.named_parameters()}
    return names


def _some(names: Sequence[str]) -> str:
    head = ", ".join(names[:4])
    return f"{head}, ... ({len(names)} parameters)" if len(names) > 4 else head
