"""`deepspeed.initialize`, with something around it for a while."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

from ds_childtune.zero.compact_parts import can_start_lean
from ds_childtune.zero.lean_start import lean_engines
from ds_childtune.zero.overrides import Overrides


def around_initialize(take: Callable[[Any], None], block: Callable[[Any, Mapping[str, Any]], object]) -> Overrides:
    """Until `remove`, hand each engine that `deepspeed.initialize` makes to `take`.

    Args:
        block: given the model and the DeepSpeed config, where it is a mapping: the `"child_tuning"` block that the engine will
            train with, or None. Where that lets an engine start lean, it does: see `lean_start`.
    """
    import deepspeed

    def initialize(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("config") or kwargs.get("config_params")
        lean = False
        if isinstance(config, Mapping):
            child_tuning = block(kwargs.get("model"), config)
            lean = child_tuning is not None and can_start_lean({**config, "child_tuning": child_tuning})
        # No error without an optimizer: of a Trainer's other models, such as DPO's reference model, DeepSpeed only makes engines.
        with lean_engines() if lean else nullcontext():
            made = original(*args, **kwargs)
        try:
            take(made[0])
        except Exception:
            # The caller never gets this engine, whose hooks would go on to take the model's gradients.
            made[0].destroy()
            raise
        return made

    overrides = Overrides()
    overrides.around(deepspeed, "initialize", initialize)
    return overrides
