"""Which parts of the optimizer's state a compact child has to itself.

[Note: what is compact]
Everywhere *moments* exist for the child's elements only. DeepSpeed can also be made to keep nothing but the child's of

    ZeRO 1, 2    masters                   without offload, and with gradients that are accumulated in the model's dtype
                 and gradients             where no norm of the whole gradient is needed, too; then only the child is sent
    ZeRO-3       masters and gradients     without offload, and where no norm of the whole gradient is needed

so that is done where the config allows it. This file decides, for an engine or beforehand for a config; `compact_stage12.py`,
`compact_sending.py` and `compact_stage3.py` do it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ds_childtune.child.compact import Parts, Plumbing
from ds_childtune.zero.compact_sending import SendingPlumbing
from ds_childtune.zero.compact_stage3 import ZeroThreePlumbing
from ds_childtune.zero.compact_stage12 import ZeroTwoPlumbing
from ds_childtune.zero.engine import Engine, Wrapper, wrapper_of
from ds_childtune.zero.lean_start import is_lean
from ds_childtune.zero.settings import Settings

Clip = Literal["dense", "child"] | None
"""`child_tuning.clip`."""


@dataclass(frozen=True)
class CompactParts:
    """What is compact on an engine. See [Note: what is compact]."""

    plumbing: Plumbing | None
    """None: moments only."""
    text: str
    """The same for a reader, and why it is not more."""

    @classmethod
    def of(cls, engine: Engine, clip: Clip) -> CompactParts:
        """As much as there can be without changing what the config says about the gradient norm."""
        parts, text = compact_parts(Settings.of_engine(engine), clip)
        if parts == "moments":
            return cls(None, text)
        if parts == "moments and masters":
            return cls(ZeroTwoPlumbing(engine), text)
        return cls(ZeroThreePlumbing(engine) if wrapper_of(engine) is Wrapper.ZERO_3 else SendingPlumbing(engine), text)


def compact_parts(settings: Settings, clip: Clip) -> tuple[Parts, str]:
    """What a compact child has to itself, and the same for a reader, with why it is not more."""
    against = _reason_against(settings, clip)
    if against is not None:
        return "moments", f"moments of the child only; masters and gradients stay whole: {against}"
    text = "moments, masters and gradients of the child only; the gradient norm is the child's"
    if settings.wrapper is Wrapper.ZERO_3:
        return "moments, masters and gradients", text
    whole = _norm_of_whole(clip, clips=settings.clips)
    if whole is not None:
        return (
            "moments and masters",
            f"moments and masters of the child only; gradients stay and are sent whole: {whole}",
        )
    return "moments, masters and gradients", f"{text}; only the child is sent"


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
    child, zero = config.get("child_tuning") or {}, config.get("zero_optimization") or {}
    devices = [(zero.get(key) or {}).get("device", "none") for key in ("offload_optimizer", "offload_param")]
    return (
        child.get("optimizer_state") == "compact"
        and zero.get("stage") == 3
        and not (config.get("fp16") or {}).get("enabled", False)
        and all(device == "none" for device in devices)
        and _norm_of_whole(child.get("clip"), clips=config.get("gradient_clipping") != 0) is None
    )


def _reason_against(settings: Settings, clip: Clip) -> str | None:
    """Why masters cannot be compact, or None."""
    if settings.wrapper not in (Wrapper.ZERO_1_2, Wrapper.ZERO_3):
        return f"{settings.keeper} keeps them in another way than ZeRO's"
    if settings.offloaded:
        return "with offload the optimizer's state is not on the device"
    if settings.wrapper is Wrapper.ZERO_3:
        return _norm_of_whole(clip, clips=settings.clips)
    if settings.accumulation != settings.dtype:
        return f"gradients are accumulated in {settings.accumulation}, parameters are {settings.dtype}"
    return None


def _norm_of_whole(clip: Clip, *, clips: bool) -> str | None:
    """Why the norm of the whole gradient is needed, or None."""
    if clip == "dense":
        return 'child_tuning.clip "dense" needs the norm of the whole gradient'
    if clip is None and clips:
        return 'gradient_clipping needs the norm of the whole gradient, unless child_tuning.clip is "child"'
    return None
