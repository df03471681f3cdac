"""Which parts of the optimizer's state a compact child has to itself.

[Note: what is compact]
Everywhere *moments* exist for the child's elements only. DeepSpeed can also be made to keep nothing but the child's of

    ZeRO 1, 2    masters                   with gradients that are accumulated in the model's dtype; with offload only where gradients
                                           are compact, too
                 and gradients             where no norm of the whole gradient is needed, too; then only the child is sent, and with
                                           offload moved between host and device
    ZeRO-3       masters and gradients     without offload, and where no norm of the whole gradient is needed; then only the
                                           child's gradients are sent

so that is done where the config allows it. To send only the child, every rank must know which elements are the child's on all ranks,
and keep their masks. Where there is no memory for these, "sends": "whole" does without.

This file decides, for an engine or beforehand for a config; `compact_stage12.py`, `compact_sending.py`, `compact_sending_offload.py`,
`compact_stage3.py` and `compact_sending_stage3.py` do it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ds_childtune.child.compact import Parts, Plumbing
from ds_childtune.zero.compact_sending import SendingPlumbing
from ds_childtune.zero.compact_sending_offload import OffloadedPlumbing
from ds_childtune.zero.compact_sending_stage3 import SendingZeroThreePlumbing
from ds_childtune.zero.compact_stage3 import ZeroThreePlumbing
from ds_childtune.zero.compact_stage12 import ZeroTwoPlumbing
from ds_childtune.zero.engine import Engine, Wrapper, is_offloaded, wrapper_of
from ds_childtune.zero.lean_start import is_lean
from ds_childtune.zero.settings import Settings

Clip = Literal["dense", "child"] | None
"""`child_tuning.clip`."""


Sends = Literal["child", "whole"]
"""`child_tuning.sends`."""


@dataclass(frozen=True)
class Compactness:
    """What a compact child has to itself. See [Note: what is compact]."""

    parts: Parts
    sends_child: bool
    """Whether ranks send only the child's gradients."""
    text: str
    """The same for a reader, and why it is not more."""


@dataclass(frozen=True)
class CompactParts:
    """What is compact on an engine."""

    plumbing: Plumbing | None
    """None: moments only."""
    text: str
    """The same for a reader, and why it is not more."""

    @classmethod
    def of(cls, engine: Engine, clip: Clip, sends: Sends = "child") -> CompactParts:
        """As much as there can be without changing what the config says about the gradient norm."""
        found = compact_parts(Settings.of_engine(engine), clip, sends)
        if found.parts == "moments":
            return cls(None, found.text)
        if wrapper_of(engine) is Wrapper.ZERO_3:
            # One rank has nothing to send, and no other's mask to keep.
            sending = found.sends_child and engine.optimizer.partition_count > 1
            return cls((SendingZeroThreePlumbing if sending else ZeroThreePlumbing)(engine), found.text)
        if is_offloaded(engine):
            return cls(OffloadedPlumbing(engine), found.text)
        return cls((SendingPlumbing if found.sends_child else ZeroTwoPlumbing)(engine), found.text)

    def __str__(self) -> str:
        """Once the child has taken over."""
        note = "" if self.plumbing is None else self.plumbing.note
        return f"{self.text}; {note}" if note else self.text


def compact_parts(settings: Settings, clip: Clip, sends: Sends = "child") -> Compactness:
    """As much as there can be without changing what the config says about the gradient norm, and about what is sent."""
    against = _reason_against(settings, clip)
    if against is not None:
        return _moments_only(against, settings)
    whole = _reason_to_send_whole(settings, sends)
    text = "moments, masters and gradients of the child only; the gradient norm is the child's"
    if settings.wrapper is Wrapper.ZERO_3:
        sent = f"gradients are sent whole: {whole}" if whole else "only the child's gradients are sent"
        return Compactness("moments, masters and gradients", whole is None, f"{text}; {sent}")
    whole = _norm_of_whole(clip, clips=settings.clips) or whole
    if whole is not None and settings.offloaded:
        return _moments_only(whole, settings)
    if whole is not None:
        return Compactness(
            "moments and masters",
            False,
            f"moments and masters of the child only; gradients stay and are sent whole: {whole}",
        )
    moved = ", and moved between host and device" if settings.offloaded else ""
    return Compactness("moments, masters and gradients", True, f"{text}; only the child is sent{moved}")


def _moments_only(reason: str, settings: Settings) -> Compactness:
    moved = "; between host and device gradients and weights move whole" if settings.offloaded else ""
    return Compactness(
        "moments", False, f"moments of the child only; masters and gradients stay whole: {reason}{moved}"
    )


def refuse_lean(engine: Engine, *, compact: bool, clip: Clip) -> None:
    """Raise NotImplementedError where an engine of `lean_start` would need what it left out."""
    if not is_lean(engine):
        return
    reason = _reason_against(Settings.of_engine(engine), clip) if compact else 'optimizer_state is "dense"'
    if reason is not None:
        raise NotImplementedError(
            f'attach: after lean_start, expected a child of optimizer_state "compact" with compact masters and gradients, but'
            f' {reason}. Remedy: set "optimizer_state": "compact" and "clip": "child", or leave lean_start out.'
        )


def can_start_lean(config: Mapping[str, Any]) -> bool:
    """Whether an engine of this DeepSpeed config can begin inside `lean_start`: ask before `deepspeed.initialize`.

    Args:
        config: the DeepSpeed config, with its "child_tuning" block.
    """
    return reason_against_lean(config) is None


def reason_against_lean(config: Mapping[str, Any]) -> str | None:
    """Why an engine of this DeepSpeed config cannot begin inside `lean_start`, or None."""
    child, zero = config.get("child_tuning") or {}, config.get("zero_optimization") or {}
    if zero.get("stage") != 3:
        return "zero_optimization.stage is not 3"
    if child.get("optimizer_state") != "compact":
        return 'child_tuning.optimizer_state is not "compact"'
    if (config.get("fp16") or {}).get("enabled", False):
        return "fp16 is enabled"
    for key in ("offload_optimizer", "offload_param"):
        if (zero.get(key) or {}).get("device", "none") != "none":
            return f"zero_optimization.{key} is on"
    return _norm_of_whole(child.get("clip"), clips=config.get("gradient_clipping") != 0)


def _reason_against(settings: Settings, clip: Clip) -> str | None:
    """Why masters cannot be compact, or None."""
    if settings.wrapper not in (Wrapper.ZERO_1_2, Wrapper.ZERO_3):
        return f"{settings.keeper} keeps them in another way than ZeRO's"
    if settings.wrapper is Wrapper.ZERO_3 and settings.offloaded:
        return "with offload the optimizer's state is not on the device"
    if settings.wrapper is Wrapper.ZERO_3:
        return _norm_of_whole(clip, clips=settings.clips)
    if settings.accumulation != settings.dtype:
        return f"gradients are accumulated in {settings.accumulation}, parameters are {settings.dtype}"
    return None


def _reason_to_send_whole(settings: Settings, sends: Sends) -> str | None:
    """Why whole gradients are sent, or None."""
    if sends == "whole":
        return 'child_tuning.sends is "whole"'
    if settings.quantized:
        return "zero_quantized_gradients sends them in fewer bits"
    return None


def _norm_of_whole(clip: Clip, *, clips: bool) -> str | None:
    """Why the norm of the whole gradient is needed, or None."""
    if clip == "dense":
        return 'child_tuning.clip "dense" needs the norm of the whole gradient'
    if clip is None and clips:
        return 'gradient_clipping needs the norm of the whole gradient, unless child_tuning.clip is "child"'
    return None
