"""What a "child_tuning" block and a DeepSpeed config do together, before there is an engine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ds_childtune.config import ChildTuningConfig, parse_config
from ds_childtune.planning.model import ModelOutline, build_without_weights
from ds_childtune.zero.calibration import bucket_beside
from ds_childtune.zero.checkpoint_write import checkpoints_refused_in
from ds_childtune.zero.compact_parts import compact_parts, reason_against_lean
from ds_childtune.zero.config_reading import ConfigReading
from ds_childtune.zero.settings import Settings
from ds_childtune.zero.supported import refused_in


@dataclass(frozen=True)
class Key:
    """A key of the DeepSpeed config that matters for the child."""

    name: str
    value: str
    effect: str


@dataclass(frozen=True)
class Checked:
    """What `check` found."""

    config: ChildTuningConfig
    refused: tuple[str, ...]
    """Messages of what `attach` will raise."""
    checkpoints: tuple[str, ...]
    """Messages of what `save_checkpoint` and `load_checkpoint` will raise."""
    compact: str
    """What is compact, and why it is not more."""
    not_lean: str | None
    """Why the engine cannot begin inside `lean_start`; None: it can."""
    keys: tuple[Key, ...]
    auto: tuple[str, ...]
    """Keys that Hugging Face's Trainer fills in; DeepSpeed's default was taken."""
    model: ModelOutline | None

    @property
    def works(self) -> bool:
        return not self.refused


def read_config(path: Path) -> dict[str, Any]:
    """A DeepSpeed config.

    Raises:
        ValueError: when it cannot be read, or is no json object.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        got = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{path}: expected a DeepSpeed config in json, got {got}. Remedy: correct the path or the file."
        ) from None
    if not isinstance(found, dict):
        raise ValueError(
            f"{path}: expected a json object, got {type(found).__name__}. Remedy: give a DeepSpeed config."
        )
    return found


def check(config: Mapping[str, Any], model: str | None = None, model_class: str | None = None) -> Checked:
    """Read both together.

    Args:
        config: the DeepSpeed config, with its "child_tuning" block.
        model: a hub name, a folder or a config.json; None: nothing is said of the model.

    Raises:
        ValueError: for a block or a config that is wrong, naming key, value and remedy.
    """
    reading = ConfigReading(config)
    child = parse_config(reading.child_tuning)
    settings = Settings.of_config(reading)
    outline = None if model is None else ModelOutline.of(build_without_weights(model, model_class), child)
    return Checked(
        child,
        refused=tuple(refused_in(reading)),
        checkpoints=tuple(checkpoints_refused_in(reading)),
        compact=_compact(child, settings),
        not_lean=reason_against_lean(config),
        keys=tuple(_keys(reading, child)),
        auto=reading.auto_keys,
        model=outline,
    )


def _compact(child: ChildTuningConfig, settings: Settings) -> str:
    if child.mode == "ChildTuning-F":
        return "nothing: ChildTuning-F draws a child at every step, so every element has its moments"
    if child.optimizer_state == "dense":
        text = compact_parts(settings, child.clip).text
        return f'nothing, because child_tuning.optimizer_state is "dense"; with "compact": {text}'
    return compact_parts(settings, child.clip, child.sends).text


def _keys(reading: ConfigReading, child: ChildTuningConfig) -> Iterator[Key]:
    """The keys that change what the child does or what it costs, with what they are here."""
    fixed = child.mode == "ChildTuning-D"
    yield Key("zero_optimization.stage", str(reading.stage), _stage_effect(reading.stage))
    dtype = str(reading.dtype).removeprefix("torch.")
    yield Key("bf16, fp16", dtype, "the forward pass; masters of the child are fp32")
    yield Key("gradient_clipping", f"{reading.gradient_clipping:g}", _clip_effect(reading, child))
    yield Key("optimizer.type", reading.optimizer or "none", _optimizer_effect(reading))
    for what in ("offload_optimizer", "offload_param"):
        if (device := reading.offload(what)) != "none":
            yield Key(f"zero_optimization.{what}", device, _offload_effect(what, reading.stage))
    if reading.accumulation is not reading.dtype:
        name = str(reading.accumulation).removeprefix("torch.")
        yield Key("data_types.grad_accum_dtype", name, "at ZeRO 1 and 2, compact moments only")
    if reading.masters is not torch.float32:
        yield Key("bf16.bf16_master_weights_and_grads", "true", "masters are bf16; a compact child's are fp32")
    if fixed and child.selector in ("fisher", "lowest_fisher", "contrast"):
        bucket = bucket_beside(int(reading.zero.reduce_bucket_size))
        yield Key(
            "zero_optimization.reduce_bucket_size",
            f"{int(reading.zero.reduce_bucket_size):,}",
            f"the Fisher pass has a bucket of {bucket:,} fp32 elements beside training's",
        )
    if reading.stage == 3 and fixed:
        threshold = int(reading.zero.param_persistence_threshold)
        yield Key(
            "zero_optimization.stage3_param_persistence_threshold",
            f"{threshold:,}",
            "parameters up to this size are whole on every rank, in 16 bits",
        )
    if reading.block("communication_data_type") or reading.value("communication_data_type"):
        yield Key(
            "communication_data_type",
            str(reading.value("communication_data_type")),
            "training only: the Fisher pass sums in fp32",
        )


def _stage_effect(stage: int) -> str:
    return {
        0: "every rank has everything; moments can be compact",
        1: "moments, masters and gradients can be compact; then only the child is sent",
        2: "moments, masters and gradients can be compact; then only the child is sent",
        3: "moments, masters and gradients can be compact; then only the child's gradients are sent",
    }[stage]


def _offload_effect(what: str, stage: int) -> str:
    if stage == 0 or (what == "offload_param" and stage < 3):
        return "nothing is offloaded at this stage"
    if stage == 3:
        return "compact moments only, and no lean_start"
    return "masters and moments are on the host; where only the child is sent, only the child moves there and back"


def _clip_effect(reading: ConfigReading, child: ChildTuningConfig) -> str:
    if child.mode == "ChildTuning-F":
        return (
            "clips by the norm of the whole gradient, before the mask" if reading.gradient_clipping else "no clipping"
        )
    if not reading.gradient_clipping:
        return "no clipping, so no norm of the whole gradient is needed"
    whole = "the whole gradient" if child.clip != "child" else "the child's gradient"
    missing = "" if "gradient_clipping" in reading.given else "DeepSpeed's default; "
    return f"{missing}clips by the norm of {whole} (child_tuning.clip)"


def _optimizer_effect(reading: ConfigReading) -> str:
    if reading.optimizer is None:
        return "the script gives one; attach tries it, and refuses what it cannot mask"
    return "attach tries it on a few elements, and refuses what it cannot mask"
