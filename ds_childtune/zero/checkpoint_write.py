"""DeepSpeed's own files of a checkpoint, as they are saved and loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_childtune.ranks import tell
from ds_childtune.shards import FlatShard
from ds_childtune.zero.checkpoint_read import What
from ds_childtune.zero.config_reading import ConfigReading
from ds_childtune.zero.engine import Engine, Wrapper, base_optimizer, wrapper_of
from ds_childtune.zero.layout import SavedShard
from ds_childtune.zero.overrides import Overrides
from ds_childtune.zero.supported import Refusal

SAVING_REFUSALS = (
    Refusal(
        "a decoupled checkpoint writer, which is not done when save_checkpoint returns",
        "remove checkpoint.writer.decoupled",
        lambda engine: bool(engine.checkpoint_engine.is_decoupled()),
        lambda config: bool((config.block("checkpoint").get("writer") or {}).get("decoupled")),
    ),
    Refusal(
        "checkpoints on node-local storage",
        "remove checkpoint.use_node_local_storage, and save to a file system that every rank sees",
        lambda engine: bool(engine.use_node_local_storage()),
        lambda config: bool(config.block("checkpoint").get("use_node_local_storage")),
    ),
    Refusal(
        "zero_optimization.elastic_checkpoint",
        "remove it: checkpoints of a child can be loaded at any world size without",
        lambda engine: bool(engine.zero_elastic_checkpoint()),
        lambda config: bool(config.zero.elastic_checkpoint),
    ),
)
"""Ways of writing checkpoints that could not be made whole."""

_UNIVERSAL = (
    "ds_childtune does not load universal checkpoints, which have no child and no count of its steps. Remedy: remove"
    " checkpoint.load_universal, and load the checkpoint that was converted: one with a child loads at any world size and"
    " ZeRO stage as it is. A universal checkpoint of a run without a child can be loaded before attach."
)


def refuse_unsupported_saving(engine: Engine) -> None:
    """Raise NotImplementedError, with a remedy, for a way of writing checkpoints that could not be made whole."""
    for refusal in SAVING_REFUSALS:
        if refusal.on_engine(engine):
            raise NotImplementedError(_not_saved(refusal))


def checkpoints_refused_in(config: ConfigReading) -> list[str]:
    """What `save_checkpoint` and `load_checkpoint` will refuse, as far as a config says it: their messages."""
    found = [_not_saved(r) for r in SAVING_REFUSALS if r.in_config is not None and r.in_config(config)]
    return found + [_UNIVERSAL] * bool(config.block("checkpoint").get("load_universal"))


def _not_saved(refusal: Refusal) -> str:
    return f"ds_childtune does not save checkpoints with {refusal.what}. Remedy: {refusal.remedy}."


def refuse_universal(engine: Engine) -> None:
    """Raise NotImplementedError when DeepSpeed would look for a universal checkpoint, which has no child."""
    if engine.load_universal_checkpoint():
        raise NotImplementedError(_UNIVERSAL)


@contextmanager
def frozen_may_be_missing(engine: Engine) -> Iterator[None]:
    """A strict load takes a checkpoint that was saved without frozen parameters, as PEFT's are: those of the model stay."""

    def load_module(
        load: Callable[..., Any],
        checkpoint: dict[str, Any],
        strict: bool = True,
        custom_load_fn: Any = None,
        **kwargs: Any,
    ) -> Any:
        if strict and custom_load_fn is None:
            expected, got = set(engine.module.state_dict()), set(checkpoint["module"])
            named = engine.module.named_parameters(remove_duplicate=False)
            frozen = {name for name, param in named if not param.requires_grad}
            missing = sorted(expected - got)
            strict = bool(got - expected) or not frozen.issuperset(missing)
            if not strict:
                say_what_is_missing(missing)
        return load(checkpoint=checkpoint, strict=strict, custom_load_fn=custom_load_fn, **kwargs)

    with Overrides() as overrides:
        overrides.around(engine, "load_module_state_dict", load_module)
        yield


def say_what_is_missing(frozen: Sequence[str]) -> None:
    """The names of frozen parameters that a checkpoint does not have."""
    if frozen:
        tell(
            f"load_checkpoint: {len(frozen)} frozen parameters are not in the checkpoint, as it was saved without them"
            f" ({', '.join(frozen[:3])}{', ...' if len(frozen) > 3 else ''}): the model's own stay."
        )


def written_files(engine: Engine, save_dir: str, tag: str) -> dict[What, Path]:
    """The files that `save_checkpoint` writes on this rank: "model", "optim", or both."""
    files: dict[What, Path] = {}
    if engine.save_non_zero_checkpoint:
        files["model"] = Path(engine._get_ckpt_name(save_dir, tag))
    if engine.save_zero_checkpoint:
        files["optim"] = Path(engine._get_zero_ckpt_name(save_dir, tag))
    return files


def keeping_save_errors(engine: Engine) -> AbstractContextManager[list[Exception]]:
    """Keep the errors of writing files."""
    writer = engine.checkpoint_engine
    return _keeping_errors((writer, "save", None), (writer, "makedirs", None), (engine, "_copy_recovery_script", None))


def keeping_load_errors(engine: Engine) -> AbstractContextManager[list[Exception]]:
    """Keep the errors of reading files, and of finding memory for what is in them."""
    # What DeepSpeed then does: nothing more without a path; no masters from 16-bit weights if ZeRO's part is said to be loaded.
    return _keeping_errors((engine, "_load_checkpoint", (None, None)), (engine, "_load_zero_checkpoint", True))


@contextmanager
def _keeping_errors(*places: tuple[Any, str, Any]) -> Iterator[list[Exception]]:
    """Keep errors in a list: raised at once on one rank, they would leave the others waiting in DeepSpeed's next collective.

    Args:
        places: an object, the name of its method, and what that returns when it fails.
    """
    errors: list[Exception] = []

    def keeping(result: Any) -> Callable[..., Any]:
        def call(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            try:
                return original(*args, **kwargs)
            except Exception as error:
                errors.append(error)
                return result

        return call

    with Overrides() as overrides:
        for owner, name, result in places:
            overrides.around(owner, name, keeping(result))
        yield errors


@contextmanager
def without_empty_states(engine: Engine) -> Iterator[None]:
    """State dicts that the base optimizer is given have no entry for a tensor without state.

    DeepSpeed makes such entries when it looks a flat shard up, whose state is a compact child's; Adagrad looks for a counter in them.
    """

    def pruned(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {**state_dict, "state": {key: state for key, state in state_dict["state"].items() if state}}

    handle = base_optimizer(engine).register_load_state_dict_pre_hook(pruned)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def dense_masters(engine: Engine, shards: Sequence[FlatShard]) -> Iterator[None]:
    """Let ZeRO's state dict hold flat shards, also where a compact child's shards have taken their place.

    There the masters outside the child are the 16-bit weights, see [Note: ZeRO-3 on child shards]. They are views of larger buffers,
    which would be saved with them, so copies take their place, in the base optimizer's state, too. The copies are on the host: the
    device may have no room for them.
    """
    optimizer = engine.optimizer
    wrapper = wrapper_of(engine)
    if wrapper not in (Wrapper.ZERO_3, Wrapper.ZERO_1_2):
        yield
        return
    is_three = wrapper is Wrapper.ZERO_3
    name = "fp32_partitioned_groups_flat" if is_three else "single_partition_of_fp32_groups"
    copies = [_with_own_storage(s.tensor) for s in shards]
    state = base_optimizer(engine).state
    # ZeRO-3 fills its param groups from the list for a state dict; at ZeRO 1 and 2 they hold the flat shards themselves.
    pairs = zip((s.tensor for s in shards), copies, strict=True) if is_three else ()
    moved = [(tensor, copy) for tensor, copy in pairs if copy is not tensor and tensor in state]
    with Overrides() as overrides:
        overrides.attribute(optimizer, name, copies)
        for tensor, copy in moved:
            state[copy] = state.pop(tensor)
        try:
            yield
        finally:
            for tensor, copy in moved:
                state[tensor] = state.pop(copy)


def _with_own_storage(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy of it on the host when its storage holds more."""
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor.detach())


def saved_shards(engine: Engine, shards: Sequence[FlatShard], rank: int) -> tuple[SavedShard, ...]:
    """Where this rank's flat shards will lie in DeepSpeed's files, in the order of `shards`."""
    optimizer = engine.optimizer
    if wrapper_of(engine) is Wrapper.ZERO_3:
        # ZeRO-3 leaves its param groups empty between steps, and fills them in the order of sub-groups for a state dict.
        groups = [optimizer.sub_group_to_group_id[i] for i in range(len(shards))]
        order = sorted(range(len(shards)), key=lambda i: (groups[i], i))
    else:
        params = [id(p) for group in base_optimizer(engine).param_groups for p in group["params"]]
        order_of = {key: i for i, key in enumerate(params)}
        return tuple(SavedShard.of(s, rank, i, order_of[id(s.tensor)]) for i, s in enumerate(shards))
    return tuple(SavedShard.of(s, rank, i, order.index(i)) for i, s in enumerate(shards))
