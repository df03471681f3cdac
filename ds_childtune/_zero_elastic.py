"""Load DeepSpeed's files of one layout into an engine of another. Reads DeepSpeed's attributes, as `_zero.py` does.

The old run's elements are put into a state dict of this run's layout, which DeepSpeed itself then loads: see [Note: elastic resume].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_childtune import _zero
from ds_childtune._ranks import raising_together
from ds_childtune._zero_checkpoint import kind_of
from ds_childtune._zero_files import PLACES, PLAIN, SavedRun
from ds_childtune.layout import Layout, SavedShard
from ds_childtune.shards import FlatShard

Engine = Any

_SCALER = ("loss_scaler", "dynamic_loss_scale", "overflow")
"""Entries of a ZeRO optimizer's state dict that say how losses are scaled."""

_NOT_THE_CLIENT_S = frozenset(
    [
        *("module", "optimizer", "lr_scheduler", "global_steps", "skipped_steps"),
        *("dp_world_size", "mp_world_size", "data_sampler", "random_ltd"),
    ]
)
"""Keys of *_model_states.pt that `load_checkpoint` keeps out of the client state that it returns."""


def check_elsewhere(engine: Engine, run: SavedRun, layout: Layout, shards: Sequence[FlatShard]) -> None:
    """Raise ValueError when a checkpoint lacks what `load_elsewhere` will look for. Changes nothing, and has no collectives."""
    for shard in shards:
        for fragment in shard.fragments:
            for piece in layout.find(fragment):
                run.weights(piece.source)
    run.model_states()
    saved, here = len(run.base_state(0)["param_groups"]), len(_zero.base_optimizer(engine).param_groups)
    if saved != here:
        raise ValueError(
            f"load_checkpoint: expected {saved} param groups, as in the checkpoint {run.folder}, got {here}."
            " Remedy: give the optimizer the same groups."
        )


def load_elsewhere(
    engine: Engine,
    run: SavedRun,
    layout: Layout,
    shards: Sequence[FlatShard],
    mine: Sequence[SavedShard],
    parameters: _zero.Parameters,
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
    optimizer = engine.optimizer
    if hasattr(optimizer, "checkpoint_event_prologue"):
        optimizer.checkpoint_event_prologue()
    with raising_together():  # one rank's disk or memory may fail it alone
        model = run.model_states()
        _load_buffers_and_frozen(engine, run, parameters)
        _load_optimizer(engine, run, layout, shards, mine)
        if load_lr_scheduler_states and engine.lr_scheduler is not None:
            engine.lr_scheduler.load_state_dict(model["lr_scheduler"])
        for counter in ("global_steps", "global_samples", "skipped_steps"):
            setattr(engine, counter, model[counter])
    _update_forward_weights(optimizer)
    if hasattr(optimizer, "checkpoint_event_epilogue"):
        optimizer.checkpoint_event_epilogue()
    return {key: value for key, value in model.items() if key not in _NOT_THE_CLIENT_S}


def _load_buffers_and_frozen(engine: Engine, run: SavedRun, parameters: _zero.Parameters) -> None:
    model = run.model_states()
    buffers = dict(engine.module.named_buffers())
    for name in model["buffer_names"]:
        buffers[name].copy_(model["module"][name])
    named = dict(engine.module.named_parameters())
    for name in parameters.shapes.keys() - parameters.by_name.keys():
        param = named[name]
        whole = run.frozen(name, parameters.shapes[name])
        if whole is None:
            continue
        if hasattr(param, "ds_tensor"):
            share = param.ds_tensor.numel()
            start = share * torch.distributed.get_rank(param.ds_process_group)
            part = whole.view(-1)[start : start + share]
            param.ds_tensor.data[: part.numel()].copy_(part)
        else:
            param.data.copy_(whole)


def _load_optimizer(
    engine: Engine, run: SavedRun, layout: Layout, shards: Sequence[FlatShard], mine: Sequence[SavedShard]
) -> None:
    """Put the old run's elements into a state dict of this run's layout, and let DeepSpeed load that."""
    optimizer = engine.optimizer
    kind = kind_of(engine)
    weights = [_gathered(shard, layout, run.weights, shard.flat().dtype) for shard in shards]
    states = {place.state_index: _state(shard, layout, run) for shard, place in zip(shards, mine, strict=True)}
    template = optimizer.state_dict()
    base = template if kind == PLAIN else template[PLACES[kind].base]
    groups = run.base_state(0)["param_groups"]
    base = {
        "state": {i: state for i, state in sorted(states.items()) if state},
        "param_groups": [
            {**old, "params": new["params"]} for old, new in zip(groups, base["param_groups"], strict=True)
        ],
    }
    if kind == PLAIN:
        optimizer.load_state_dict(base)
        for shard, values in zip(shards, weights, strict=True):
            shard.flat().copy_(values)
        return
    template[PLACES[kind].base] = base
    old = run.optimizer_states(0)
    template |= {key: old[key] for key in _SCALER if key in old and key in template}
    if kind.startswith("FP16"):
        _copy_masters(shards, weights)
        template[PLACES[kind].weights] = getattr(optimizer, PLACES[kind].weights)
        optimizer.load_state_dict(template)
    else:
        template[PLACES[kind].weights] = weights
        ranks = torch.distributed.get_world_size(optimizer.dp_process_group)
        optimizer.load_state_dict([template] * ranks, load_optimizer_states=True, load_from_fp32_weights=True)


def _copy_masters(shards: Sequence[FlatShard], weights: Sequence[Tensor]) -> None:
    for shard, values in zip(shards, weights, strict=True):
        shard.flat().copy_(values)


def _update_forward_weights(optimizer: Any) -> None:
    """16-bit weights from their masters; ZeRO-3 has done it by now, and an optimizer in fp32 has no others. A collective."""
    if hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp16_groups_flat"):
        for lp, hp in zip(optimizer.fp16_groups_flat, optimizer.fp32_groups_flat, strict=True):
            lp.data.copy_(hp)
    elif hasattr(optimizer, "fp32_groups"):
        for lps, hps in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for lp, hp in zip(lps, hps, strict=True):
                lp.data.copy_(hp)


def _gathered(
    shard: FlatShard, layout: Layout, values_of: Callable[[SavedShard], Tensor | None], dtype: torch.dtype
) -> Tensor:
    """1-D of the shard's size, on its device: old values where they belong, zero in padding and where there was none."""
    whole = torch.zeros(shard.numel, dtype=dtype, device=shard.tensor.device)
    for fragment in shard.fragments:
        for piece in layout.find(fragment):
            values = values_of(piece.source)
            if values is not None:
                part = values[piece.source_start : piece.source_start + piece.numel]
                whole[piece.target_start : piece.target_start + piece.numel].copy_(part)
    return whole


def _state(shard: FlatShard, layout: Layout, run: SavedRun) -> dict[str, Any]:
    """The base optimizer's state of one new flat shard: moments put together, counters as in the first old shard that has any."""
    sources = {piece.source.key: piece.source for f in shard.fragments for piece in layout.find(f)}
    known = [(source, run.state(source)) for source in sources.values()]
    source, first = next(((s, state) for s, state in known if state), (None, {}))
    if source is None:
        # A shard of padding alone is stepped like its neighbours.
        return {}

    state: dict[str, Any] = {}
    for key, value in first.items():
        if isinstance(value, Tensor) and value.dim() and value.numel() == source.numel:

            def moments(old: SavedShard, key: str = key) -> Tensor | None:
                found = run.state(old).get(key)
                return None if found is None else found.view(-1)

            state[key] = _gathered(shard, layout, moments, value.dtype).view(shard.tensor.shape)
        else:
            state[key] = value.clone() if isinstance(value, Tensor) else value
    return state
