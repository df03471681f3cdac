"""What checkpoints need of DeepSpeed's insides: its files, where things lie in them, and its own way of loading them.

Like `_zero.py`, and pinned by the same tests. Where things lie, by the class of `engine.optimizer`:

    DeepSpeedZeroOptimizer, BF16_Optimizer     *_optim_states.pt of each rank
    DeepSpeedZeroOptimizer_Stage3              *_optim_states.pt of each rank
    FP16_Optimizer, FP16_UnfusedOptimizer      *_model_states.pt
    the base optimizer itself                  *_model_states.pt, the weights among the module's
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ds_childtune import _zero
from ds_childtune.layout import Layout, SavedShard
from ds_childtune.shards import FlatShard

Engine = Any

What = Literal["model", "optim"]
"""*_model_states.pt or *_optim_states.pt."""

PLAIN = "plain"
"""The kind of an engine whose optimizer is the base optimizer itself: ZeRO 0 in fp32."""


@dataclass(frozen=True)
class _Places:
    """Keys that lead to the flat shards and to the base optimizer's state dict, in DeepSpeed's file and in its own state dict."""

    file: What
    above: tuple[str, ...]
    """From the file's top to the dict that `engine.optimizer.state_dict()` made."""
    weights: str
    base: str


_ZERO = _Places("optim", ("optimizer_state_dict",), "single_partition_of_fp32_groups", "base_optimizer_state")
_PLACES = {
    "DeepSpeedZeroOptimizer": _ZERO,
    "BF16_Optimizer": _ZERO,
    "DeepSpeedZeroOptimizer_Stage3": _Places(
        "optim", ("optimizer_state_dict",), "fp32_flat_groups", "optimizer_state_dict"
    ),
    "FP16_Optimizer": _Places("model", ("optimizer",), "fp32_groups_flat", "optimizer_state_dict"),
    "FP16_UnfusedOptimizer": _Places("model", ("optimizer",), "fp32_groups", "optimizer_state_dict"),
}

_SCALER = ("loss_scaler", "dynamic_loss_scale", "overflow")
"""Entries of a ZeRO optimizer's state dict that say how losses are scaled."""

_NOT_THE_CLIENT_S = frozenset(
    [
        *("module", "optimizer", "lr_scheduler", "global_steps", "skipped_steps"),
        *("dp_world_size", "mp_world_size", "data_sampler", "random_ltd"),
    ]
)
"""Keys of *_model_states.pt that `load_checkpoint` keeps out of the client state that it returns."""


def kind_of(engine: Engine) -> str:
    """How the optimizer lays out its state: a class of DeepSpeed's, or `PLAIN`."""
    if engine.optimizer is _zero.base_optimizer(engine):
        return PLAIN
    return type(engine.optimizer).__name__


def refuse_unsupported(engine: Engine) -> None:
    """Raise NotImplementedError, with a remedy, for a way of writing checkpoints that could not be made whole."""
    refusals = {
        "a decoupled checkpoint writer, which is not done when save_checkpoint returns": (
            engine.checkpoint_engine.is_decoupled(),
            "remove checkpoint.writer.decoupled",
        ),
        "checkpoints on node-local storage": (
            engine.use_node_local_storage(),
            "remove checkpoint.use_node_local_storage, and save to a file system that every rank sees",
        ),
        "zero_optimization.elastic_checkpoint": (
            engine.zero_elastic_checkpoint(),
            "remove it: checkpoints of a child can be loaded at any world size without",
        ),
    }
    for what, (refused, remedy) in refusals.items():
        if refused:
            raise NotImplementedError(f"ds_childtune does not save checkpoints with {what}. Remedy: {remedy}.")


def written_files(engine: Engine, save_dir: str, tag: str) -> dict[What, Path]:
    """The files that `save_checkpoint` writes on this rank: "model", "optim", or both."""
    files: dict[What, Path] = {}
    if engine.save_non_zero_checkpoint:
        files["model"] = Path(engine._get_ckpt_name(save_dir, tag))
    if engine.save_zero_checkpoint:
        files["optim"] = Path(engine._get_zero_ckpt_name(save_dir, tag))
    return files


@contextmanager
def keeping_errors(engine: Engine) -> Iterator[list[Exception]]:
    """Keep the errors of writing files in a list: raised at once, on one rank, they would leave the others waiting in a collective."""
    errors: list[Exception] = []
    writer = engine.checkpoint_engine
    places = ((writer, "save"), (writer, "makedirs"), (engine, "_copy_recovery_script"))

    def kept(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except Exception as error:
                errors.append(error)
                return None

        return call

    for owner, name in places:
        setattr(owner, name, kept(getattr(owner, name)))
    try:
        yield errors
    finally:
        for owner, name in places:
            delattr(owner, name)


@contextmanager
def dense_masters(engine: Engine, shards: Sequence[FlatShard]) -> Iterator[None]:
    """Let ZeRO's state dict hold flat shards, also where a compact child's own shards stand in their place.

    There the masters outside the child are the 16-bit weights, see [Note: ZeRO-3 on child shards]. They are views of larger buffers,
    which would be saved with them.
    """
    optimizer = engine.optimizer
    lists = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups")
    name = next((name for name in lists if hasattr(optimizer, name)), None)
    if name is None:
        yield
        return
    masters = getattr(optimizer, name)
    setattr(optimizer, name, [_alone(s.tensor) for s in shards])
    try:
        yield
    finally:
        setattr(optimizer, name, masters)


def _alone(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy of it when its storage holds more."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.detach().clone()


def saved_shards(engine: Engine, shards: Sequence[FlatShard], rank: int) -> tuple[SavedShard, ...]:
    """Where this rank's flat shards will lie in DeepSpeed's files, in the order of `shards`."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "sub_group_to_group_id"):
        # ZeRO-3 leaves its param groups empty between steps, and fills them in the order of sub-groups for a state dict.
        groups = [optimizer.sub_group_to_group_id[i] for i in range(len(shards))]
        order = sorted(range(len(shards)), key=lambda i: (groups[i], i))
    else:
        params = [id(p) for group in _zero.base_optimizer(engine).param_groups for p in group["params"]]
        order_of = {key: i for i, key in enumerate(params)}
        return tuple(SavedShard.of(s, rank, i, order_of[id(s.tensor)]) for i, s in enumerate(shards))
    return tuple(SavedShard.of(s, rank, i, order.index(i)) for i, s in enumerate(shards))


@dataclass
class SavedRun:
    """DeepSpeed's files of one checkpoint, opened when they are asked for, and mapped rather than read."""

    folder: Path
    kind: str
    files: Mapping[tuple[What, int], str]
    """Names, by ("model" or "optim", rank)."""
    _open: dict[str, Any] = field(default_factory=dict)

    def model_states(self, rank: int = 0) -> dict[str, Any]:
        """*_model_states.pt: the module, counters, and what the client saved."""
        return self._file("model", rank)

    def optimizer_states(self, rank: int) -> dict[str, Any]:
        """What `engine.optimizer.state_dict()` gave on `rank`."""
        if self.kind == PLAIN:
            return self._file("model", 0)["optimizer"]  # type: ignore[no-any-return]
        places = _PLACES[self.kind]
        # Without ZeRO every rank has the same, and the first has written it.
        found = self._file(places.file, rank if places.file == "optim" else 0)
        for key in places.above:
            found = found[key]
        return found

    def base_state(self, rank: int) -> dict[str, Any]:
        """The base optimizer's state dict: `state` by position, and `param_groups`."""
        states = self.optimizer_states(rank)
        return states if self.kind == PLAIN else states[_PLACES[self.kind].base]

    def weights(self, shard: SavedShard) -> Tensor:
        """1-D: a flat shard's weights; padding at its end may be missing."""
        if self.kind == PLAIN:
            weights = self._file("model", 0)["module"][shard.fragments[0].name]
        else:
            groups = self.optimizer_states(shard.rank)[_PLACES[self.kind].weights]
            weights = _flattened(groups)[shard.index]
        return weights.view(-1)  # type: ignore[no-any-return]

    def state(self, shard: SavedShard) -> dict[str, Any]:
        """The base optimizer's state of a flat shard; empty when it was never stepped."""
        return self.base_state(shard.rank)["state"].get(shard.state_index, {})  # type: ignore[no-any-return]

    def frozen(self, name: str, shape: torch.Size) -> Tensor | None:
        """A frozen parameter, whole; None when the checkpoint was saved without."""
        first = self.model_states()
        if self.kind != "DeepSpeedZeroOptimizer_Stage3":
            return first["module"].get(name)  # type: ignore[no-any-return]
        if first["frozen_param_fragments"] is None:
            return None
        ranks = sorted(rank for what, rank in self.files if what == "model")
        parts = [self.model_states(rank)["frozen_param_fragments"][name].view(-1) for rank in ranks]
        return torch.cat(parts)[: shape.numel()].view(shape)

    def _file(self, what: What, rank: int) -> dict[str, Any]:
        name = self.files[what, rank]
        if name not in self._open:
            self._open[name] = _read(self.folder / name, trusted=what == "model")
        return self._open[name]  # type: ignore[no-any-return]


def _flattened(groups: Sequence[Any]) -> list[Tensor]:
    """FP16_UnfusedOptimizer has a list of tensors for each group, the others one tensor."""
    return [t for group in groups for t in (group if isinstance(group, (list, tuple)) else [group])]


def _read(path: Path, *, trusted: bool) -> dict[str, Any]:
    """One of DeepSpeed's files. `trusted`: it may hold objects of the user's, as in a client state; DeepSpeed loads all of them so."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    classes = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    with torch.serialization.safe_globals(classes):
        return torch.load(  # type: ignore[no-any-return]
            path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=not trusted
        )


# ---------------------------------------------------------------- loading into another layout


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
    model = run.model_states()
    _load_buffers_and_frozen(engine, run, parameters)
    _load_optimizer(engine, run, layout, shards, mine)
    if load_lr_scheduler_states and engine.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(model["lr_scheduler"])
    for counter in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, counter, model[counter])
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
    base = template if kind == PLAIN else template[_PLACES[kind].base]
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
    template[_PLACES[kind].base] = base
    old = run.optimizer_states(0)
    template |= {key: old[key] for key in _SCALER if key in old and key in template}
    if kind.startswith("FP16"):
        _copy_masters(shards, weights)
        template[_PLACES[kind].weights] = getattr(optimizer, _PLACES[kind].weights)
        optimizer.load_state_dict(template)
    else:
        template[_PLACES[kind].weights] = weights
        ranks = torch.distributed.get_world_size(optimizer.dp_process_group)
        optimizer.load_state_dict([template] * ranks, load_optimizer_states=True, load_from_fp32_weights=True)
    _update_forward_weights(optimizer)


def _copy_masters(shards: Sequence[FlatShard], weights: Sequence[Tensor]) -> None:
    for shard, values in zip(shards, weights, strict=True):
        shard.flat().copy_(values)


def _update_forward_weights(optimizer: Any) -> None:
    """16-bit weights from their masters; ZeRO-3 has done it by now."""
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
