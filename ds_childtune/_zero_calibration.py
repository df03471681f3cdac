"""Backward passes whose gradients go elsewhere than into a step. Reads DeepSpeed's attributes, as `_zero.py` does.

[Note: two ways to see gradients]
ZeRO-3 reduces a bucket of parameters at a time and hands this rank's partitions to its `partition_grads`, which keeps them until
the step. A calibration pass takes them right there, so that it needs neither the buffer that they are kept in, nor the fp32
gradient that a step makes of it, nor the norm. Everywhere else - other stages, offload, fp16 with its loss scale - the pass goes
through DeepSpeed's own step with the base optimizer's taken out, which unscales, checks for overflow, and sets `.grad`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ds_childtune import _zero
from ds_childtune._ranks import device, sum_over_ranks
from ds_childtune.shards import FlatShard

Engine = Any

Receive = Callable[[Tensor, int, Tensor], None]
"""`receive(flat_shard, start, gradient)`: this rank's reduced gradient, 1-D, of the elements of the flat shard from `start` on."""

Backward = Callable[[Tensor], bool]
"""`backward(loss)`: one backward pass with its own reduction; False where DeepSpeed would skip the step, for inf or NaN."""


@dataclass
class _Snapshot:
    """What a calibration pass touches, as it was."""

    optimizer: Any
    values: dict[str, Any] = field(default_factory=dict)
    loss_scaler: dict[str, Any] | None = None
    state_keys: set[int] = field(default_factory=set)

    _ATTRIBUTES = ("clip_grad", "micro_step_id", "_global_grad_norm", "overflow", "_hp_optimizer_states_linked")

    @classmethod
    def take(cls, engine: Engine) -> _Snapshot:
        optimizer = engine.optimizer
        snapshot = cls(optimizer)
        snapshot.values = {a: getattr(optimizer, a) for a in cls._ATTRIBUTES if hasattr(optimizer, a)}
        scaler = getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)
        snapshot.loss_scaler = dict(vars(scaler)) if scaler is not None else None
        snapshot.state_keys = {id(p) for p in _zero.base_optimizer(engine).state}
        return snapshot

    def restore(self, engine: Engine) -> None:
        for attribute, value in self.values.items():
            setattr(self.optimizer, attribute, value)
        scaler = getattr(self.optimizer, "loss_scaler", None) or getattr(self.optimizer, "loss_scale_config", None)
        if scaler is not None and self.loss_scaler is not None:
            vars(scaler).update(self.loss_scaler)
        # ZeRO 1 and 2 look up the base optimizer's state after a step, and its defaultdict then makes empty entries.
        state = _zero.base_optimizer(engine).state
        for tensor in [t for t in state if id(t) not in self.state_keys]:
            del state[tensor]
        _clear_gradients(engine)


def _clear_gradients(engine: Engine) -> None:
    """Leave no square where a training step could read it as a gradient."""
    optimizer = engine.optimizer
    optimizer.zero_grad()
    engine.zero_grad()
    # ZeRO-3 keeps its gradient partitions, and CPU offload the flat shards' `.grad`, from step to step; a parameter that
    # the next backward does not reach would be stepped with what they hold.
    partitions = getattr(optimizer, "grad_partitions_flat_buffer", None)
    if partitions is not None:
        partitions.zero_()
    for group in _zero.base_optimizer(engine).param_groups:
        for tensor in group["params"]:
            if tensor.grad is not None:
                tensor.grad.zero_()
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        for tensor in getattr(optimizer, name, ()):
            if tensor.grad is not None:
                tensor.grad.zero_()


@contextmanager
def calibration(engine: Engine, shards: Sequence[FlatShard], receive: Receive) -> Iterator[Backward]:
    """Run backward passes whose gradients go to `receive` instead of into a step; afterwards the engine is as before.

    Args:
        shards: of `_zero.read_flat_shards`.

    Yields:
        `backward(loss)`. The gradients that `receive` is given are unscaled and not clipped; no weight moves.
    """
    if not engine.managed_gradient_accumulation():
        raise NotImplementedError(
            "ds_childtune cannot run a Fisher pass with managed_gradient_accumulation: false."
            " Remedy: leave DeepSpeed in charge of gradient accumulation."
        )
    optimizer: Any = engine.optimizer
    snapshot = _Snapshot.take(engine)
    _clear_gradients(engine)
    if hasattr(optimizer, "clip_grad"):
        optimizer.clip_grad = 0.0
    boundary = engine._is_gradient_accumulation_boundary
    engine.set_gradient_accumulation_boundary(True)
    try:
        if sees_partitions(engine):
            with _from_partitions(engine, [s.tensor for s in shards], receive) as backward:
                yield backward
        else:
            with _from_steps(engine, receive) as backward:
                yield backward
    finally:
        engine.set_gradient_accumulation_boundary(False)
        # The caller's own, which an engine that manages accumulation itself has not.
        engine._is_gradient_accumulation_boundary = boundary
        if hasattr(optimizer, "set_gradient_accumulation_boundary"):
            optimizer.set_gradient_accumulation_boundary(engine.is_gradient_accumulation_boundary())
        snapshot.restore(engine)


def sees_partitions(engine: Engine) -> bool:
    """Whether a pass needs nothing of what a step needs. See [Note: two ways to see gradients]."""
    optimizer = engine.optimizer
    return (
        hasattr(optimizer, "fp32_partitioned_groups_flat")
        and not optimizer.offload_optimizer
        and optimizer.dtype != torch.float16
    )


@contextmanager
def overridden(owner: Any, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """`method` in place of the instance's for the length of a `with`; what the instance had of its own comes back."""
    before = vars(owner).get(name)
    setattr(owner, name, method)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _backward(engine: Engine, loss: Tensor) -> None:
    # A tensor of our own: DeepSpeed divides by the accumulation steps in a hook on the output, unless a hook on the loss that it
    # is given has fired before; at stage 0 both would be the same tensor, and its own would come second.
    engine.backward(loss * 1.0, scale_wrt_gas=False)


@contextmanager
def _from_steps(engine: Engine, receive: Receive) -> Iterator[Backward]:
    optimizer: Any = engine.optimizer
    base: Any = _zero.base_optimizer(engine)
    received = [False]

    def step(*_: object, **__: object) -> None:
        received[0] = True
        for tensor in (p for group in base.param_groups for p in group["params"]):
            if tensor.grad is not None:
                receive(tensor, 0, tensor.grad.detach().view(-1))

    def backward(loss: Tensor) -> bool:
        received[0] = False
        _backward(engine, loss)
        optimizer.step()
        optimizer.zero_grad()
        engine.zero_grad()
        return received[0]

    # An lr scheduler leaves its own wrapper in the instance's `step`.
    with overridden(base, "step", step):
        yield backward


@contextmanager
def _from_partitions(engine: Engine, flats: Sequence[Tensor], receive: Receive) -> Iterator[Backward]:
    optimizer: Any = engine.optimizer
    sums: list[Tensor] = []
    """Of each partition: inf or NaN where it holds any."""

    def partition_grads(params: list[Any], partitions: list[Tensor]) -> None:
        for param, partition in zip(params, partitions, strict=True):
            sub_group, start, _ = optimizer.grad_position[optimizer.get_param_id(param)]
            gradient = partition.view(-1)
            sums.append(gradient.sum(dtype=torch.float32))
            receive(flats[sub_group], start, gradient)
            param.grad = None

    def backward(loss: Tensor) -> bool:
        sums.clear()
        _backward(engine, loss)
        optimizer.averaged_gradients = {}
        optimizer.zero_grad()
        engine.zero_grad()
        bad = (~torch.stack(sums).isfinite()).sum() if sums else torch.zeros((), dtype=torch.int64)
        bad = bad.to(device())
        sum_over_ranks(bad)
        return not bad

    with overridden(optimizer, "partition_grads", partition_grads):
        yield backward
