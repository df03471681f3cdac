"""Load DeepSpeed's files of one layout into an engine of another.

The checkpoint's values are written over the engine's, a few elements at a time, from files that are mapped, not read: see
[Note: elastic resume].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ds_childtune.ranks import raise_together
from ds_childtune.shards import FlatShard, Fragment
from ds_childtune.zero.checkpoint_read import PLACES, SavedRun
from ds_childtune.zero.checkpoint_write import say_what_is_missing
from ds_childtune.zero.engine import Engine, Wrapper, base_optimizer, wrapper_of
from ds_childtune.zero.flat_shards import Parameters
from ds_childtune.zero.layout import Layout, SavedShard
from ds_childtune.zero.weights import local_weights, update_forward_weights

_SCALERS = (
    ("loss_scaler", "dynamic_loss_scale", "overflow"),
    ("cur_scale", "dynamic_loss_scale", "cur_iter", "last_overflow_iter", "scale_factor", "scale_window"),
)
"""Entries of an optimizer's state dict that say how losses are scaled: with ZeRO, and without. They go together."""

_NOT_CLIENT_STATE = frozenset(
    [
        *("module", "optimizer", "lr_scheduler", "global_steps", "skipped_steps"),
        *("dp_world_size", "mp_world_size", "data_sampler", "random_ltd"),
    ]
)
"""Keys of *_model_states.pt that `load_checkpoint` keeps out of the client state that it returns."""


def load_elsewhere(
    engine: Engine,
    run: SavedRun,
    layout: Layout,
    shards: Sequence[FlatShard],
    mine: Sequence[SavedShard],
    parameters: Parameters,
    *,
    load_lr_scheduler_states: bool,
) -> dict[str, Any]:
    """What `load_checkpoint` does, for a checkpoint of another world size or ZeRO stage. See [Note: elastic resume].

    Args:
        layout: of the run that wrote the checkpoint.
        mine: this rank's flat shards, as `saved_shards` gives them.

    Returns:
        the client state.
    """
    with _partitioned(engine):
        with _halfway(run):
            _load_buffers_and_frozen(engine, run, layout, parameters)
            _load_optimizer(engine, run, layout, shards, mine)
            _load_progress(engine, run, load_lr_scheduler_states)
        update_forward_weights(engine)
    return _client_state(run)


def load_weights(
    engine: Engine,
    run: SavedRun,
    layout: Layout,
    shards: Sequence[FlatShard],
    parameters: Parameters,
    *,
    progress: bool,
    load_lr_scheduler_states: bool,
) -> dict[str, Any]:
    """Load only the weights of a checkpoint, of any world size and ZeRO stage.

    DeepSpeed's own `load_module_only` does nothing at ZeRO-3, and fails where a frozen parameter has trained before. Here what was
    frozen may train now, and the other way round. What the checkpoint lacks stays as it is.

    Args:
        progress: load DeepSpeed's counters of steps, too, and with `load_lr_scheduler_states` the schedule.

    Returns:
        the client state.
    """
    with _partitioned(engine):
        with _halfway(run):
            _load_buffers_and_frozen(engine, run, layout, parameters)
            for shard in shards:
                for fragment in shard.fragments:
                    values = weights_of(run, layout, fragment, parameters.shapes[fragment.name])
                    if values is not None:
                        fragment.of(shard.flat()).copy_(values)
            if progress:
                _load_progress(engine, run, load_lr_scheduler_states)
        update_forward_weights(engine)
    return _client_state(run)


@contextmanager
def _partitioned(engine: Engine) -> Iterator[None]:
    """ZeRO-3 keeps whole copies of small parameters; for the length of a `with` it has none. Collectives."""
    if wrapper_of(engine) is not Wrapper.ZERO_3:
        yield
        return
    engine.optimizer.checkpoint_event_prologue()
    yield
    engine.optimizer.checkpoint_event_epilogue()


@contextmanager
def _halfway(run: SavedRun) -> Iterator[None]:
    """One rank's disk or memory may fail, and no other's: an error on every rank, which says that what was loaded is not whole."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = RuntimeError(
            f"load_checkpoint: {run.folder}: expected to read all of it, got {type(caught).__name__}: {str(caught)[:300]}"
            " Weights and optimizer are half loaded now. Remedy: load this or another checkpoint before you train on."
        )
        error.__cause__ = caught
    raise_together(error)


def weights_of(run: SavedRun, layout: Layout, fragment: Fragment, shape: torch.Size) -> Tensor | None:
    """1-D on the CPU: a fragment's weights, whether they were trained or frozen; None where the checkpoint has none."""
    if fragment.name not in layout:
        return run.frozen(fragment.name, shape, fragment.param_start, fragment.numel)
    values = torch.empty(fragment.numel, dtype=torch.float32)
    for transfer in layout.find(replace(fragment, shard_start=0)):
        old = run.weights(transfer.source)[transfer.source_start : transfer.source_start + transfer.numel]
        values[transfer.target_start : transfer.target_start + transfer.numel].copy_(old)
    return values


def _load_buffers_and_frozen(engine: Engine, run: SavedRun, layout: Layout, parameters: Parameters) -> None:
    model = run.model_states()
    buffers = dict(engine.module.named_buffers())
    for name in model["buffer_names"]:
        if name in buffers:
            buffers[name].copy_(model["module"][name])
    named = dict(engine.module.named_parameters())
    missing = []
    for name in parameters.shapes.keys() - parameters.by_name.keys():
        param, shape = named[name], parameters.shapes[name]
        mine = local_weights(name, param)
        values = weights_of(run, layout, Fragment(name, mine.start, 0, mine.values.numel()), shape)
        if values is not None:
            mine.values.copy_(values)
        elif mine.values.numel():
            missing.append(name)
    say_what_is_missing(sorted(missing))


def _load_optimizer(
    engine: Engine, run: SavedRun, layout: Layout, shards: Sequence[FlatShard], mine: Sequence[SavedShard]
) -> None:
    """Masters and moments, in place; then DeepSpeed loads what lies there already, for all that it does besides.

    See [Note: elastic resume]: what the device holds does not grow, unless there were no moments yet.
    """
    optimizer = engine.optimizer
    wrapper = wrapper_of(engine)
    base = base_optimizer(engine)
    for shard in shards:
        _fill(shard.flat(), shard, layout, run.weights)
    states = {
        place.state_index: _state(shard, layout, run, base.state.pop(shard.tensor, {}))
        for shard, place in zip(shards, mine, strict=True)
    }
    template = optimizer.state_dict()
    new = template if wrapper is Wrapper.NONE else template[PLACES[wrapper].base]
    groups = run.base_state(0)["param_groups"]
    loaded = {
        "state": {i: state for i, state in sorted(states.items()) if state},
        "param_groups": [
            {**old, "params": new["params"]} for old, new in zip(groups, new["param_groups"], strict=True)
        ],
    }
    if wrapper is Wrapper.NONE:
        optimizer.load_state_dict(loaded)
        return
    template[PLACES[wrapper].base] = loaded
    old = run.optimizer_states(0)
    scaler = next((keys for keys in _SCALERS if keys[0] in old and keys[0] in template), ())
    template |= {key: old[key] for key in scaler if key in old}
    if not wrapper.is_zero:
        template[PLACES[wrapper].weights] = getattr(optimizer, PLACES[wrapper].weights)
        optimizer.load_state_dict(template)
    else:
        template[PLACES[wrapper].weights] = [shard.flat() for shard in shards]
        ranks = torch.distributed.get_world_size(optimizer.dp_process_group)
        optimizer.load_state_dict([template] * ranks, load_optimizer_states=True, load_from_fp32_weights=True)


def _load_progress(engine: Engine, run: SavedRun, load_lr_scheduler_states: bool) -> None:
    model = run.model_states()
    if load_lr_scheduler_states and engine.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(model["lr_scheduler"])
    for counter in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, counter, model[counter])


def _client_state(run: SavedRun) -> dict[str, Any]:
    return {key: value for key, value in run.model_states().items() if key not in _NOT_CLIENT_STATE}


def _fill(flat: Tensor, shard: FlatShard, layout: Layout, values_of: Callable[[SavedShard], Tensor | None]) -> None:
    """Put old values where they belong, zero into padding and where there was none; `flat` is laid out like the shard."""
    flat.zero_()
    for fragment in shard.fragments:
        for transfer in layout.find(fragment):
            values = values_of(transfer.source)
            if values is not None:
                part = values[transfer.source_start : transfer.source_start + transfer.numel]
                flat[transfer.target_start : transfer.target_start + transfer.numel].copy_(part)


def _state(shard: FlatShard, layout: Layout, run: SavedRun, present: dict[str, Any]) -> dict[str, Any]:
    """The base optimizer's state of one new flat shard: moments put together, counters as in the first old shard that has any.

    Args:
        present: its state so far, whose moments are written over.
    """
    sources = {transfer.source.key: transfer.source for f in shard.fragments for transfer in layout.find(f)}
    known = [(source, run.state(source)) for source in sources.values()]
    source, first = next(((s, state) for s, state in known if state), (None, {}))
    if source is None:
        # A shard of nothing but padding is stepped like its neighbours.
        return {}

    state: dict[str, Any] = {}
    for key, value in first.items():
        if isinstance(value, Tensor) and value.dim() and value.numel() == source.numel:

            def moments(old: SavedShard, key: str = key) -> Tensor | None:
                found = run.state(old).get(key)
                return None if found is None else found.view(-1)

            place = present.pop(key, None)
            if not (isinstance(place, Tensor) and place.shape == shard.tensor.shape and place.dtype == value.dtype):
                place = torch.empty(shard.tensor.shape, dtype=value.dtype, device=shard.tensor.device)
            state[key] = place
            _fill(place.view(-1), shard, layout, moments)
        else:
            state[key] = value.clone() if isinstance(value, Tensor) else value
    return state
