"""An engine whose config has a "child_tuning" block takes no step, and loads no checkpoint with a child, without one.

[Note: a block without a child]
The block is read by `attach`. Without that call DeepSpeed ignores it, as it ignores every key that it does not know, and all
elements would silently train. So importing ds_childtune does two things. It makes `DeepSpeedEngine._take_model_step`, which
every step of every kind of engine calls, check the engine first. The step is taken if the engine has no block, has a child, had one
and was detached, or has no optimizer, like the reference models of preference tuning. And it makes `load_checkpoint` refuse a
checkpoint with a child for such an engine, which would lose it.

This is not an `Overrides`: it is never taken back.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from ds_childtune.ranks import from_first
from ds_childtune.zero.engine import child_tuning_block, drop_gradients

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

    load = DeepSpeedEngine.load_checkpoint

    @functools.wraps(load)
    def checked_load(engine: Any, load_dir: str, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        _check_attached_before_load(engine, load_dir, tag, weights_only=_only_weights(args, kwargs))
        return load(engine, load_dir, tag, *args, **kwargs)

    setattr(checked, _MARK, True)
    DeepSpeedEngine._take_model_step = checked
    DeepSpeedEngine.load_checkpoint = checked_load


def _only_weights(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """`load_module_only`, the sixth argument of `load_checkpoint`; `args` begins with the third."""
    return bool(kwargs.get("load_module_only", args[3] if len(args) > 3 else False))


def _waits_for_a_child(engine: Any) -> bool:
    """The same on every rank, as a config is."""
    never = not hasattr(engine, "child_tuner") and engine.basic_optimizer is not None
    return never and child_tuning_block(engine) is not None


def _check_attached(engine: Any) -> None:
    """Raise RuntimeError for a block without a child. No collective."""
    if not _waits_for_a_child(engine):
        return
    drop_gradients(engine)
    raise RuntimeError(
        'ds_childtune: expected a child on this engine, whose DeepSpeed config has a "child_tuning" block, got none: all elements'
        " would train. Remedy: child = ds_childtune.attach(engine) after deepspeed.initialize, with a Trainer"
        " callbacks=[ds_childtune.ChildTuningCallback()]; or remove the block."
    )


def _check_attached_before_load(engine: Any, load_dir: str, tag: object, *, weights_only: bool) -> None:
    """Raise RuntimeError, on every rank, for a checkpoint with a child that would be loaded without it."""
    if weights_only or not _waits_for_a_child(engine):
        return

    def has_child() -> bool:
        latest = Path(load_dir) / "latest"
        name = tag if tag is not None else latest.read_text().strip() if latest.is_file() else ""
        return (Path(load_dir) / str(name) / "child" / "child.json").is_file()

    if from_first(has_child):
        raise RuntimeError(
            f'load_checkpoint: {load_dir} has a child, and this engine, whose config has a "child_tuning" block, has none yet: it'
            " would be loaded without. Remedy: child = ds_childtune.attach(engine) before load_checkpoint or accelerate's load_state,"
            " with a Trainer callbacks=[ChildTuningCallback()]; for the weights only, pass load_module_only=True."
        )
