"""What the manifest of an export says of the model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from torch import Tensor, nn

from ds_childtune.child_files.fingerprint import text
from ds_childtune.child_files.format import DTYPES, Manifest, ParameterEntry, check_seal, parse
from ds_childtune.zero.weights import full_shape

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
    """See `format.seal`."""

    @classmethod
    def of(cls, manifest: Manifest, where: Path) -> ExportInfo:
        """Raises ChildFileError when the manifest has something else, or has changed."""
        check_seal(manifest, where)
        return parse(cls, json.dumps(manifest.extra), str(where))


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


def refuse_moved_outside(what: str, mode: object, compat: object, earlier_children: bool) -> None:
    """Raise NotImplementedError where more than the child's elements have moved since the base model.

    Args:
        what: who asks, for the error.
    """
    reason = ""
    if mode != "ChildTuning-D":
        reason = f"{mode}, which moves every element"
    elif compat is not None:
        reason = f'compat "{compat}", with which weight decay moves every element'
    elif earlier_children:
        reason = "a child that was chosen after another one had been trained, whose elements have moved too"
    if reason:
        raise NotImplementedError(
            f"{what}: expected a fixed child, outside of which nothing has moved since attach, got {reason}."
            " Remedy: save the whole model with engine.save_16bit_model."
        )
