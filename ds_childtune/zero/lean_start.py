"""`lean_start`: an engine that holds no masters and no gradient buffer before a child is chosen.

[Note: lean start]
At ZeRO-3 `deepspeed.initialize` allocates an fp32 master and a gradient for every element. The master is a copy of the parameter as
long as nothing has been trained, a calibration pass needs neither (see [Note: before DeepSpeed reduces]), and a child with compact
masters and gradients frees both. So until `select` the flat shards are views of the parameter shards, and the gradient buffer is
empty. `select` makes both, of the child's size; `detach` makes them as DeepSpeed would have.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch

from ds_childtune.zero.overrides import Overrides

_VIEWS = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"
_MARK = "ds_childtune_lean"
"""What a lean optimizer has: the `Overrides` by which it refuses gradients, until it has a buffer for them."""

Optimizer = Any
"""A `DeepSpeedZeroOptimizer_Stage3`."""


@contextmanager
def lean_start() -> Iterator[None]:
    """ZeRO-3 engines that `deepspeed.initialize` makes inside this `with` begin without masters and gradient buffers.

        with ds_childtune.lean_start():
            engine, *_ = deepspeed.initialize(model=model, config=config)
        child = ds_childtune.attach(engine)
        child.select(calibration_batches)

    For `"optimizer_state": "compact"` where masters and gradients are compact; `can_start_lean` says whether they are. With a model
    built under `deepspeed.zero.Init` and scores in two bytes (`"fisher": {"score_dtype": "e8m8"}`) no phase then needs more than a
    few bytes for each parameter of a shard. Training is the same, bit for bit. Until `select`, the engine evaluates but does not
    train. If optimizer states of a plain DeepSpeed checkpoint are loaded before `select`, the engine gets dense masters, moments and
    gradient buffers, like that checkpoint's.

    Raises:
        NotImplementedError: inside `deepspeed.initialize`, with offload, or in fp16.
        RuntimeError: at the end of the `with`, when no ZeRO-3 engine was made in it.
    """
    with lean_engines() as made:
        yield
    if not made:
        raise RuntimeError(
            "lean_start: expected deepspeed.initialize to make a ZeRO-3 engine inside the `with`, got none."
            " Remedy: set zero_optimization.stage to 3, or leave lean_start out."
        )


@contextmanager
def lean_engines() -> Iterator[list[Optimizer]]:
    """As `lean_start`, for callers who do not know whether an optimizer will be made. The list fills with those that were."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3

    made: list[Optimizer] = []

    def lean_create(create: Callable[[Optimizer], None], optimizer: Optimizer) -> None:
        _refuse_unsupported(optimizer)
        _create_views(optimizer, create)

    def lean_setup(setup: Callable[[Optimizer], None], optimizer: Optimizer) -> None:
        setup(optimizer)
        if not hasattr(optimizer, _MARK):  # else a `with` inside this one has made it lean
            make_gradient_buffer(optimizer, {p.ds_id: 0 for p in parameters(optimizer)})
            refusing = Overrides()
            refusing.method(optimizer, "partition_grads", functools.partial(_no_gradients, optimizer))
            setattr(optimizer, _MARK, refusing)
        made.append(optimizer)

    with Overrides() as overrides:
        overrides.around(Stage3, "_create_fp32_partitions", lean_create)
        overrides.around(Stage3, "_setup_for_real_optimizer", lean_setup)
        yield made


def is_lean(engine: Any) -> bool:
    return hasattr(engine.optimizer, _MARK)


def restore_dense(optimizer: Optimizer) -> None:
    """Give a lean optimizer everything that DeepSpeed would have given it. Nothing to do for another one."""
    if not hasattr(optimizer, _MARK):
        return
    pairs = zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat, strict=True)
    for flat, lp in pairs:
        if flat.data_ptr() == lp.data_ptr():
            flat.data = lp.data.to(optimizer.master_weights_and_grads_dtype, copy=True)
    make_dense_gradient_buffer(optimizer)
    take_gradients(optimizer)


def take_gradients(optimizer: Optimizer) -> None:
    """The optimizer has a gradient buffer from here on, so it is not lean any more. Nothing to do for another one."""
    refusing: Overrides | None = getattr(optimizer, _MARK, None)
    if refusing is not None:
        refusing.remove()
        delattr(optimizer, _MARK)


def parameters(optimizer: Optimizer) -> list[Any]:
    return [param for group in optimizer.fp16_groups for param in group]


def make_dense_gradient_buffer(optimizer: Optimizer) -> None:
    make_gradient_buffer(optimizer, {p.ds_id: p.partition_numel() for p in parameters(optimizer)})


def make_gradient_buffer(optimizer: Optimizer, numels: dict[int, int]) -> None:
    """As DeepSpeed's `_setup_for_real_optimizer` does; `numels` by `ds_id`, in the order of its parameters."""
    optimizer.averaged_gradients = {}  # views of the buffer that goes
    optimizer.grad_partitions_flat_buffer = None
    setattr(optimizer, _VIEWS, {})
    buffer = torch.zeros(sum(numels.values()), dtype=optimizer.gradient_accumulation_dtype, device=optimizer.device)
    optimizer.grad_partitions_flat_buffer = buffer
    setattr(optimizer, _VIEWS, dict(zip(numels, buffer.split(list(numels.values())), strict=True)))


def _refuse_unsupported(optimizer: Optimizer) -> None:
    refusals = {
        "offload": (optimizer.offload_optimizer or optimizer.offload_param, "whose masters are not on the device"),
        "fp16": (optimizer.dtype == torch.float16, "whose calibration pass needs gradient buffers; use bf16"),
    }
    for what, (refused, why) in refusals.items():
        if refused:
            raise NotImplementedError(
                f"ds_childtune does not support lean_start with {what}, {why}. Remedy: leave lean_start out."
            )


def _create_views(optimizer: Optimizer, create: Callable[[Optimizer], None]) -> None:
    """`_create_fp32_partitions` takes the parameter shards themselves where dtype and device are those of masters."""
    dtype, where = optimizer.master_weights_and_grads_dtype, optimizer.device
    optimizer.master_weights_and_grads_dtype, optimizer.device = optimizer.dtype, torch.device(where)
    try:
        create(optimizer)
    finally:
        optimizer.master_weights_and_grads_dtype, optimizer.device = dtype, where
    # Separate tensors: each of the two may be pointed somewhere else.
    flats = optimizer.fp32_partitioned_groups_flat
    for i, lp in enumerate(optimizer.fp16_partitioned_groups_flat):
        view: Any = lp.detach()
        view.ds_id, lp.requires_grad = flats[i].ds_id, False
        flats[i] = view.requires_grad_()


def _no_gradients(optimizer: Optimizer, *_: object) -> NoReturn:
    # In the middle of a backward pass, which leaves no trace: the next one would find its gradients, and take itself for a part of it.
    for bucket in optimizer.ipg_buckets.values():
        bucket.params.clear()
        bucket.elements = 0
    for param in parameters(optimizer):
        param.grad = None
    while optimizer._backward_active_depth:
        optimizer.exit_backward()
    raise RuntimeError(
        "lean_start: this engine has no gradient buffer before a child is chosen, so it cannot train yet."
        " Remedy: child = ds_childtune.attach(engine), then child.select(calibration_batches), then train."
    )
