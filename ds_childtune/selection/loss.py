"""The loss of a calibration micro-batch, for whatever a batch and a model look like."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

LossFunction = Callable[[Any, Any], Tensor]
"""`loss_fn(engine, batch)`: the scalar mean loss of one micro-batch."""


_OWN_LOSS = (
    "Remedy for a loss that is computed outside the model, as DPO's is: pass loss_fn(engine, batch) -> loss;"
    " with a Trainer, loss_fn=lambda engine, batch: trainer.compute_loss(engine, trainer._prepare_inputs(batch))."
)


def default_loss(engine: Any, batch: Any) -> Tensor:
    """Hugging Face's convention: a mapping is spread into keywords, a sequence into arguments.

    The output has `.loss`, or `["loss"]`, or is the loss, or is a tuple that begins with it.
    """
    try:
        output = _called_with(engine, to_device(batch, engine.device))
    except Exception as error:
        if not _holds_tensor(batch):
            raise ValueError(
                f"select: expected micro-batches of tensors, got {outline(batch)}, which looks like a row of a dataset; the model"
                f" says {type(error).__name__}: {error}. Remedy: pass a DataLoader over the dataset, for example"
                " trainer.get_train_dataloader()."
            ) from error
        if isinstance(error, TypeError):
            raise ValueError(
                f"select: expected a batch that the model can be called with, got {outline(batch)}: {error}. {_OWN_LOSS}"
            ) from error
        raise
    if isinstance(output, Mapping):
        output = output.get("loss")
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    loss = getattr(output, "loss", output)
    if not _is_scalar(loss):
        raise ValueError(
            f"select: expected the model to return a scalar loss, got {outline(loss)}. Remedy: put labels into the"
            f" calibration batches, if the model makes its loss of them. {_OWN_LOSS}"
        )
    return loss  # type: ignore[no-any-return]


def _called_with(engine: Any, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return engine(**batch)
    if isinstance(batch, (tuple, list)):
        return engine(*batch)
    return engine(batch)


def _is_scalar(loss: Any) -> bool:
    return isinstance(loss, Tensor) and loss.numel() == 1


def _holds_tensor(value: Any) -> bool:
    """Whether there is a tensor, or an object that may hold one, anywhere in it."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return any(_holds_tensor(v) for v in value)
    return value is not None and not isinstance(value, (str, bytes, int, float))


def outline(value: Any) -> str:
    """What something is, in a few words."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        some = ", ".join(f"{k}: {type(v).__name__}" for k, v in list(value.items())[:4])
        return f"{type(value).__name__} of {some}{', ...' if len(value) > 4 else ''}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of {', '.join(type(v).__name__ for v in value[:4])}"
    return type(value).__name__


def to_device(value: Any, to: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(to, non_blocking=True)
    if isinstance(value, Mapping):
        return {k: to_device(v, to) for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(v, to) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(to_device(v, to) for v in value)
    return value
