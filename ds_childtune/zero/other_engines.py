"""Another engine on the same parameters, which would take their gradients first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ds_childtune.zero.engine import Engine

HOOKS = "ds_childtune_hooks"
"""What our hook of a module's forward pass has: a weak reference to the hooks of the engine around the module."""


def trains_a_child(module: nn.Module) -> bool:
    """Whether a child is attached to an engine around `module`."""
    found: list[Any] = [getattr(hook, HOOKS)() for hook in module._forward_pre_hooks.values() if hasattr(hook, HOOKS)]
    return any(hooks is not None and hooks.module is module for hooks in found)


def refuse_parameters_of_another(engine: Engine, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise RuntimeError, with a remedy, where an earlier engine still takes the gradients of `engine`'s parameters.

    ZeRO takes a gradient in a hook of its parameter, and frees it. The hooks stay when an engine is dropped; only its `destroy`
    removes them. A second engine on the same model would get no gradient, and its child would be chosen of zeros and never move.
    """
    optimizer = engine.optimizer
    own = {handle.id for handle in getattr(optimizer, "_grad_acc_hooks", ())}
    for name, parameter in parameters.items():
        hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
        if any(
            key not in own and getattr(hook, "__module__", "").startswith("deepspeed.") for key, hook in hooks.items()
        ):
            raise RuntimeError(
                f"attach: expected an engine that no other shares its parameters with, got one whose gradients (of {name}, for"
                " example) an earlier engine on the same model takes. Remedy: call destroy() of every engine on the model, this one"
                " too, before deepspeed.initialize makes the next, with a Trainer trainer.model_wrapped.destroy(); or build the"
                " model anew."
            )
