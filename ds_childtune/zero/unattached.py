"""An engine whose config has a "child_tuning" block takes no step without a child.

[Note: a block without a child]
The block is read by `attach`. Without that call DeepSpeed ignores it, as it ignores every key that it does not know, and all
elements would silently train. So importing ds_childtune does one thing: it makes `DeepSpeedEngine._take_model_step`, which
every step of every kind of engine calls, check the engine first. The step is taken if the engine has no block, has a child, had one
and was detached, or has no optimizer, like the reference models of preference tuning.

This is not an `Overrides`: it is never taken back.
"""

from __future__ import annotations

import functools
from typing import Any

from ds_childtune.zero.engine import child_tuning_block

_MARK = "looks_for_a_child"


def watch_steps() -> None:
    """See [Note: a block without a child]. Calling it again changes nothing."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    step = DeepSpeedEngine._take_model_step
    if hasattr(step, _MARK):
        return

    @functools.wraps(step)
    def checked(engine: Any, *args: Any, **kwargs: Any) -> Any:
        _check_attached(engine)
        return step(engine, *args, **kwargs)

    setattr(checked, _MARK, True)
    DeepSpeedEngine._take_model_step = checked


def _check_attached(engine: Any) -> None:
    """Raise RuntimeError for a block without a child. No collective: a config is the same on every rank."""
    if hasattr(engine, "child_tuner") or engine.basic_optimizer is None or child_tuning_block(engine) is None:
        return
    raise RuntimeError(
        'ds_childtune: expected a child on this engine, whose DeepSpeed config has a "child_tuning" block, got none: all elements'
        " would train. Remedy: child = ds_childtune.attach(engine) after deepspeed.initialize, with a Trainer in the"
        " on_train_begin of a callback, attach(trainer.model_wrapped); or remove the block."
    )
