"""Backward passes whose gradients stay whole and on their ranks.

[Note: before DeepSpeed reduces]
A calibration pass calls `engine.backward`, in which ZeRO-3 gathers parameters, but DeepSpeed does not take the gradients: the
methods that would are replaced on the instance, by the class of `engine.optimizer`:

    DeepSpeedZeroOptimizer_Stage3    reduce_ready_partitions_and_remove_grads     hands each gradient on as soon as it is whole
    DeepSpeedZeroOptimizer           process_gradients                            likewise at ZeRO-2, which keeps no whole gradients
    BF16_Optimizer                   accumulate_hp_grads_and_remove_lp            nothing
    all but the first                backward_epilogue                            nothing
    every ZeROOptimizer              scale_if_loss                                nothing; the pass has its own loss scale
    the engine                       inside_no_sync_ctxt                          True, as in its `no_sync`

So buckets, masters, gradient buffers, the loss scaler and the base optimizer are not touched, and need not be restored.
At ZeRO 0 and 1, which keep whole gradients in training too, they stay on the parameters until the backward pass has returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ds_childtune.ranks import Unanswered
from ds_childtune.zero.engine import Engine, Wrapper, wrapper_of
from ds_childtune.zero.overrides import Overrides
from ds_childtune.zero.reduction import Split

Backward = Callable[[Tensor], None]
"""`backward(loss)`: one backward pass; gradients are handed on, or stay on the parameters."""

Ready = Callable[[Any], None]
"""`ready(parameter)`: its `.grad` is whole, and is the callee's."""

_BUCKET = 1 << 25
"""Elements of the pass's bucket, at most: 128 MiB in fp32."""


def hands_on(engine: Engine) -> bool:
    """Whether gradients are handed on during the backward pass. See [Note: before DeepSpeed reduces]."""
    if wrapper_of(engine) is Wrapper.ZERO_1_2:
        return bool(engine.optimizer.partition_gradients)
    return splits_parameters(engine)


def splits_parameters(engine: Engine) -> bool:
    """Whether every parameter is split over all ranks, which gather them in forward and backward: ZeRO-3."""
    return wrapper_of(engine) is Wrapper.ZERO_3


def mixes_gradients(engine: Engine) -> bool:
    """Whether ranks whose micro-batches reach different parameters train something else than their mean: ZeRO 1 to 3."""
    return int(engine.zero_optimization_stage()) > 0


def splits(engine: Engine, parameters: Mapping[str, nn.Parameter]) -> dict[str, Split]:
    """How each parameter is split over the ranks."""
    if not splits_parameters(engine):
        return {name: Split(p.numel(), p.numel()) for name, p in parameters.items()}
    named: Mapping[str, Any] = parameters
    return {name: Split(p.ds_numel, p.partition_numel()) for name, p in named.items()}


def bucket_numel(engine: Engine) -> int:
    """Elements of the pass's bucket: as many as training's, up to a limit."""
    return bucket_beside(int(engine._config.zero_config.reduce_bucket_size))


def bucket_beside(reduce_bucket_size: int) -> int:
    """`bucket_numel` for a bucket of training's."""
    return min(reduce_bucket_size, _BUCKET)


def loss_scale(engine: Engine) -> float:
    """What training multiplies an fp16 loss by at the moment."""
    optimizer = engine.optimizer
    without_zero = wrapper_of(engine) in (Wrapper.FP16_FUSED, Wrapper.FP16_UNFUSED)
    scaler = optimizer.loss_scale_config if without_zero else optimizer.loss_scaler
    return float(scaler.cur_scale)


@contextmanager
def calibration(engine: Engine, ready: Ready) -> Iterator[Backward]:
    """Run backward passes without a reduction; afterwards the engine is as before, also after an exception.

    Args:
        ready: called where `hands_on(engine)`.

    Yields:
        `backward(loss)`. The loss is not scaled; no weight moves.
    """
    optimizer: Any = engine.optimizer
    before = _values(engine)
    depth = len(_modules_in_forward(engine))
    engine.zero_grad()
    with Overrides() as overrides:
        for name, method in _replacements(engine, ready).items():
            overrides.method(optimizer, name, method)
        engine.inside_no_sync_ctxt = True
        try:
            yield lambda loss: _backward(engine, loss)
        except BaseException as error:
            del _modules_in_forward(engine)[depth:]
            if isinstance(error, Exception) and not isinstance(error, Unanswered):
                _end_pass(engine)  # else what the ranks do together would never end
            raise
        finally:
            for owner, name, value in before:
                setattr(owner, name, value)
            engine.zero_grad()


def _values(engine: Engine) -> list[tuple[Any, str, Any]]:
    """What a pass touches, as it is: owner, name, value."""
    wrapper = wrapper_of(engine)
    kept = [(engine, name) for name in ("inside_no_sync_ctxt", "_unmanaged_backward_count")]
    if wrapper.is_zero:
        kept.append((engine.optimizer, "_is_gradient_accumulation_boundary"))
    if wrapper in (Wrapper.ZERO_1_2, Wrapper.ZERO_3):
        kept.append((engine.optimizer, "micro_step_id"))
    return [(owner, name, getattr(owner, name)) for owner, name in kept]


def _replacements(engine: Engine, ready: Ready) -> dict[str, Callable[..., Any]]:
    """See [Note: before DeepSpeed reduces]."""

    def nothing(*_: object, **__: object) -> None:
        pass

    def hand_on(param: Any, *_: object) -> None:
        # Not yet where a loop over one computation makes a gradient in parts, which autograd adds up.
        if getattr(param, "ds_grad_is_ready", True):
            ready(param)

    wrapper = wrapper_of(engine)
    replaced: dict[str, Callable[..., Any]] = {}
    if wrapper is Wrapper.ZERO_3:
        replaced["reduce_ready_partitions_and_remove_grads"] = hand_on
    elif wrapper is Wrapper.ZERO_1_2:
        replaced["process_gradients"] = hand_on if hands_on(engine) else nothing
        replaced["backward_epilogue"] = nothing
    elif wrapper is Wrapper.BF16:
        replaced["accumulate_hp_grads_and_remove_lp"] = nothing
        replaced["backward_prologue"] = replaced["backward_epilogue"] = nothing
    if wrapper.is_zero:
        replaced["scale_if_loss"] = lambda loss: loss
    return replaced


def _backward(engine: Engine, loss: Tensor) -> None:
    # Another tensor: DeepSpeed divides by the accumulation steps in a hook on the output, unless a hook on the loss that it
    # is given has fired before; at stage 0 both would be the same tensor, and its own would come second.
    engine.backward(loss * 1.0, scale_wrt_gas=False)
    if splits_parameters(engine):
        _partition_parameters(engine.optimizer)


def _partition_parameters(optimizer: Any) -> None:
    """As ZeRO-3's step does: the next forward pass may read small parameters, which are to be whole between steps, by themselves."""
    optimizer._partition_all_parameters()
    persistent = optimizer.persistent_parameters
    if persistent:
        persistent[0].all_gather(persistent)


def _modules_in_forward(engine: Engine) -> list[Any]:
    """The modules that ZeRO-3 believes to be in their forward, for all engines of the process."""
    if not splits_parameters(engine):
        return []
    from deepspeed.runtime.zero import parameter_offload

    stack: list[Any] = parameter_offload.FWD_MODULE_STACK
    return stack


def _end_pass(engine: Engine) -> None:
    """End a forward or backward pass that an exception has interrupted. A collective."""
    optimizer = engine.optimizer
    if wrapper_of(engine).is_zero:
        while optimizer._backward_active_depth:
            optimizer.exit_backward()
        optimizer.clear_backward_seen_flag()
    if not splits_parameters(engine):
        return
    for module in engine.module.modules():
        if hasattr(module._parameters, "_in_forward"):
            module._parameters._in_forward = False
    coordinator = optimizer.parameter_offload.get_param_coordinator()
    # Half of a trace would be taken for a whole one.
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()
    coordinator.release_backward_leftovers()
    _partition_parameters(optimizer)
