"""A model of transformers without weights: its parameters' names and shapes, from its config."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ds_childtune.config import ChildTuningConfig
from ds_childtune.names import kind_of
from ds_childtune.selection.eligible import eligible_names

_FALLBACKS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForSequenceClassification", "AutoModel")
"""What a config without a known class in "architectures" is built as: the first that takes it."""


@dataclass(frozen=True)
class Weight:
    """A parameter that trains or is frozen."""

    name: str
    """First name, as in `model.named_parameters()`."""
    shape: tuple[int, ...]
    trains: bool = True
    """False: `requires_grad` is off."""

    @property
    def numel(self) -> int:
        numel = 1
        for size in self.shape:
            numel *= size
        return numel


@dataclass(frozen=True)
class Group:
    """Parameters of one kind, in all layers."""

    kind: str
    parameters: int
    numel: int
    role: str
    """"eligible", "dense" or "frozen"."""
    trained: int
    """Elements that train."""

    @property
    def share(self) -> float:
        """Of the group's elements, those that train."""
        return self.trained / self.numel if self.numel else 0.0


@dataclass(frozen=True)
class ModelOutline:
    """Which parameters a model has, and which of them a child is chosen from."""

    model_class: str
    weights: tuple[Weight, ...]
    eligible: frozenset[str]
    """Names."""
    config: ChildTuningConfig | None
    """None: plain DeepSpeed."""

    @classmethod
    def of(cls, model: nn.Module, config: ChildTuningConfig | None) -> ModelOutline:
        """
        Args:
            model: on any device, "meta" too.

        Raises:
            ValueError: for patterns that match nothing, see `eligible_names`.
        """
        weights = tuple(Weight(name, tuple(p.shape), p.requires_grad) for name, p in model.named_parameters())
        trainable = [w.name for w in weights if w.trains]
        eligible = frozenset() if config is None else eligible_names(model, trainable, config)
        return cls(type(model).__name__, weights, eligible, config)

    @cached_property
    def numel(self) -> int:
        """Elements of the whole model; tied parameters count once."""
        return sum(w.numel for w in self.weights)

    @cached_property
    def eligible_numel(self) -> int:
        return sum(w.numel for w in self.weights if w.name in self.eligible)

    @property
    def reserve_p(self) -> float:
        return 1.0 if self.config is None else self.config.reserve_p

    @cached_property
    def kept(self) -> int:
        """Eligible elements inside the child: exactly that many."""
        return round(self.reserve_p * self.eligible_numel)

    def role(self, weight: Weight) -> str:
        """Whether a parameter is "eligible", "dense" or "frozen"."""
        if not weight.trains:
            return "frozen"
        if weight.name in self.eligible:
            return "eligible"
        return "frozen" if self.config is not None and self.config.others == "frozen" else "dense"

    def density(self, weight: Weight) -> float:
        """Share of a parameter that trains; of an eligible one, as if the child were spread evenly."""
        role = self.role(weight)
        if role == "eligible":
            return self.kept / self.eligible_numel
        return 1.0 if role == "dense" else 0.0

    @cached_property
    def trained(self) -> int:
        """Elements that train."""
        return self.kept + sum(w.numel for w in self.weights if self.role(w) == "dense")

    @property
    def trained_share(self) -> float:
        return self.trained / self.numel if self.numel else 0.0

    def groups(self) -> tuple[Group, ...]:
        """By kind, those with most trained elements first."""
        members: dict[tuple[str, str], list[Weight]] = {}
        for weight in self.weights:
            members.setdefault((kind_of(weight.name), self.role(weight)), []).append(weight)
        groups = [
            Group(kind, len(own), numel := sum(w.numel for w in own), role, round(numel * self.density(own[0])))
            for (kind, role), own in members.items()
        ]
        return tuple(sorted(groups, key=lambda group: -group.trained))


def build_without_weights(model: str, model_class: str | None = None) -> nn.Module:
    """The model on the meta device, in its config's class.

    Args:
        model: a hub name, a folder of a saved model, or a config.json.
        model_class: a class of transformers, for example "AutoModelForSequenceClassification". By default what the config names.

    Raises:
        ValueError: when there is no such config, or transformers cannot build it.
        RuntimeError: without transformers.
    """
    try:
        import transformers
    except ImportError:
        raise RuntimeError("expected transformers, got none. Remedy: pip install transformers.") from None
    try:
        config: Any = transformers.AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{model}: expected a hub name, a folder with a config.json, or a config.json, got {_first_line(error)}."
            " Remedy: give the path of the model's config.json."
        ) from None
    named = [model_class] if model_class else [*(getattr(config, "architectures", None) or ())[:1], *_FALLBACKS]
    reasons = []
    for name in named:
        cls: Any = getattr(transformers, name, None)
        if cls is None:
            reasons.append(f"transformers has no {name}")
            continue
        try:
            with torch.device("meta"):
                made: nn.Module = cls.from_config(config) if name.startswith("AutoModel") else cls(config)
            return made
        except Exception as error:  # whatever a model's constructor raises
            reasons.append(f"{name}: {_first_line(error)}")
    raise ValueError(
        f"{model}: expected a config that transformers builds a model from, got: {'; '.join(reasons)[:400]}."
        " Remedy: name its class with --model-class."
    )


def most_trained(outline: ModelOutline, count: int = 3) -> Iterable[Group]:
    """The kinds of parameters that take most of what trains."""
    return [group for group in outline.groups()[:count] if group.trained]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200].rstrip('.')}" if lines else type(error).__name__
