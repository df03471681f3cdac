"""What others read from DeepSpeed - `safe_get_*`, `refresh_fp32_params`, `offload_states` - while a child is compact.

DeepSpeed answers from dense flat shards and dense optimizer state. With a compact child the state is the child's, zero elsewhere,
and with compact masters there is no dense flat shard. So what is read is put together from child shards here, and what writes is
refused by name where it would be lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from ds_childtune.child.base_optimizer import per_element
from ds_childtune.child.child_shard import ChildShard, put_
from ds_childtune.child.compact import CompactChild
from ds_childtune.zero.compact_stage12 import mapped_to
from ds_childtune.zero.engine import Wrapper, wrapper_of
from ds_childtune.zero.overrides import Overrides

_SETS = "safe_set_full_fp32_param and safe_set_full_optimizer_state"


class Reads(Protocol):
    def remove(self) -> None:
        """DeepSpeed answers by itself again. Call it once the child is released."""


def redirect(engine: Any, child: CompactChild) -> Reads | None:
    """Answer from `child` from here on; None where nobody reads (ZeRO 0)."""
    optimizer = engine.optimizer
    match wrapper_of(engine):
        case Wrapper.ZERO_3:
            return _ZeroThree(optimizer, child)
        case Wrapper.ZERO_1_2:
            linked = _link_in_order(optimizer) if optimizer.round_robin_gradients else []
            flats, groups = optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups
            return _Mapped(optimizer, child, flats, groups, linked)
        case Wrapper.BF16:
            return _Mapped(optimizer, child, optimizer.fp32_groups_flat_partition, optimizer.bf16_groups, [])
    return None


class _Mapped:
    """What the parameters of ZeRO 1 and 2 know about their fragment of the optimizer's state."""

    def __init__(self, optimizer: Any, child: CompactChild, flats: Any, groups: Any, linked: list[_Link]) -> None:
        self._child = child
        self._overrides = put = Overrides()
        pairs = [(flat, param) for flat, group in zip(flats, groups, strict=True) for param in group]
        self._linked = linked
        self._mapped = [(flat, param._hp_mapping) for flat, param in pairs if param._hp_mapping is not None]
        for flat, mapping in self._mapped:
            mapping.optim_fragment = {}  # it has views of dense moments, which would stay in memory
            put.method(mapping, "get_hp_fragment", self._reader(child.shards[flat], mapping))
            if child.norm_is_child:
                put.around(mapping, "get_lp_grad_fragment", self._gradient_reader(child.shards[flat], mapping))
        for _, param in pairs:
            if child.parts == "moments":
                put.around(param, "set_full_hp_param", _set_weights)
            else:
                put.method(param, "set_full_hp_param", _refusing(_SETS))
            if child.norm_is_child:
                put.method(param, "set_full_hp_grad", _refusing("safe_set_full_grad"))
        # It drops every `_hp_mapping` and makes new ones from dense state.
        put.method(optimizer, "offload_states", _refusing("offload_states"))
        if child.parts != "moments":
            put.around(optimizer, "_restore_from_bit16_weights", self._restore_from_bit16_weights)

    def remove(self) -> None:
        self._overrides.remove()
        for flat, mapping in self._mapped:
            mapping.set_optim_state_fragment(flat, self._child.optimizer.state.get(flat, {}))
        for link in self._linked:
            link.put_back(self._child.optimizer.state)

    def _reader(self, shard: ChildShard, mapping: Any) -> Callable[..., Tensor]:
        start, numel = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel

        def get_hp_fragment(optim_state_key: str | None = None) -> Tensor:
            if optim_state_key is not None:
                return _state(self._child, shard, optim_state_key, start, numel)
            # With compact moments only, `safe_set_full_fp32_param` writes into what is returned here.
            return mapping.hp_fragment if self._child.parts == "moments" else _weights(shard, start, numel)

        return get_hp_fragment

    def _gradient_reader(self, shard: ChildShard, mapping: Any) -> Callable[..., Tensor]:
        start, numel = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel

        def get_lp_grad_fragment(original: Callable[..., Tensor], index: int) -> Tensor:
            gradients = mapping.gradient_dict.get(mapping.param_group_index)
            if gradients is None:
                return original(index)  # which says when there are any
            values = gradients.flat_partition
            return _put_together(shard, values, torch.zeros(numel, dtype=values.dtype, device=values.device), start)

        return get_lp_grad_fragment

    def _restore_from_bit16_weights(self, original: Callable[..., Any]) -> None:
        original()  # flat shards: with offload they are copies of the weights
        _restore(self._child.shards.values())


@dataclass(frozen=True)
class _Link:
    """What DeepSpeed had written on a parameter of ZeRO 1 or 2 about its fragment."""

    param: Any
    flat: Tensor
    mapping: Any
    index: int | None

    def put_back(self, state: Any) -> None:
        self.param._hp_mapping, self.param._index_in_param_group = self.mapping, self.index
        if self.mapping is not None:
            mapped_to(self.flat, [self.mapping])
            self.mapping.set_optim_state_fragment(self.flat, state.get(self.flat, {}))


def _link_in_order(optimizer: Any) -> list[_Link]:
    """Map parameters to where they lie; what DeepSpeed had written before.

    With `round_robin_gradients` DeepSpeed links parameters in the order of `bit16_groups`, which is not that of the flat buffer.
    """
    from deepspeed import comm as dist
    from deepspeed.utils.mixed_precision_linkage import link_hp_params

    before = []
    for i, (flat, group) in enumerate(
        zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True)
    ):
        before += [_Link(p, flat, p._hp_mapping, getattr(p, "_index_in_param_group", None)) for p in group]
        ordered = zip(optimizer.round_robin_bit16_groups[i], optimizer.round_robin_bit16_offsets[i], strict=True)
        offsets = {id(param): offset for param, offset in ordered}
        link_hp_params(
            lp_param_list=group,
            flat_hp_partition=flat,
            gradient_dict=optimizer.averaged_gradients,
            offload_gradient_dict=optimizer.offload_gradient_dict,
            use_offload=optimizer.cpu_offload,
            param_group_index=i,
            partition_start=flat.numel() * dist.get_rank(group=optimizer.real_dp_process_group[i]),
            partition_size=flat.numel(),
            dp_group=optimizer.real_dp_process_group[i],
            param_offsets=[offsets[id(param)] for param in group],
        )
    return before


def _set_weights(set_full_hp_param: Callable[..., Any], value: Tensor, optim_state_key: str | None = None) -> None:
    """Weights are set as they are without a child; the optimizer's state is not."""
    if optim_state_key is not None:
        _refusing("safe_set_full_optimizer_state")()
    set_full_hp_param(value)


class _ZeroThree:
    """The methods that ZeRO-3's part of `safe_get_*` and `safe_set_*` ends in, on one optimizer."""

    def __init__(self, optimizer: Any, child: CompactChild) -> None:
        self._optimizer = optimizer
        self._child = child
        self._shards = list(child.shards.values())
        """By sub-group."""
        methods: dict[str, Callable[..., Any]] = {
            "_get_fp32_opt_state_partition": self._state_partition,
            "set_full_hp_param": _refusing(_SETS),
            "set_local_hp_param": _refusing("safe_set_local_fp32_param and safe_set_local_optimizer_state"),
        }
        if child.norm_is_child:
            methods |= {
                "_restore_from_bit16_weights": self._restore_from_bit16_weights,
                "set_fp32_grad_for_param": _refusing("safe_set_full_grad"),
                "set_local_grad_for_param": _refusing("safe_set_local_grad"),
                "update_fp32_grad_for_param_vectorized": _refusing("safe_update_full_grad_vectorized"),
                "offload_states": _refusing("offload_states"),
            }
        self._overrides = Overrides()
        for name, method in methods.items():
            self._overrides.method(optimizer, name, method)
        if child.norm_is_child:
            self._overrides.around(optimizer, "_get_fp32_grad_state_partition", self._grad_partition)

    def remove(self) -> None:
        self._overrides.remove()

    def _state_partition(
        self, param: Any, release_swap_buffers: bool, optim_state_key: str | None = None
    ) -> tuple[Tensor, int]:
        sub_group, start, numel = self._optimizer.grad_position[self._optimizer.get_param_id(param)]
        shard = self._shards[sub_group]
        if optim_state_key is not None:
            return _state(self._child, shard, optim_state_key, start, numel), sub_group
        return _weights(shard, start, numel), sub_group

    def _grad_partition(
        self, original: Callable[..., Any], param: Any, release_swap_buffers: bool
    ) -> tuple[Tensor, int]:
        optimizer = self._optimizer
        sub_group, start, numel = optimizer.grad_position[optimizer.get_param_id(param)]
        values, _ = original(param, release_swap_buffers)
        shard = self._shards[sub_group]
        first, last = shard.span(start, numel)
        dense = torch.zeros(numel, dtype=values.dtype, device=values.device)
        put_(dense, shard.index[first:last] - start, values)
        return dense, sub_group

    def _restore_from_bit16_weights(self) -> None:
        _restore(self._shards)


def _restore(shards: Iterable[ChildShard]) -> None:
    """Masters from the weights that the forward pass uses."""
    for shard in shards:
        shard.tensor.copy_(shard.flat.flat().index_select(0, shard.index))


def _state(child: CompactChild, shard: ChildShard, key: str, start: int, numel: int) -> Tensor:
    """One entry of the optimizer's state in [start, start + numel) of a flat shard, zero outside the child."""
    state = child.optimizer.state.get(shard.tensor, {})
    if not per_element(state.get(key), shard.tensor):
        known = [k for k, v in state.items() if per_element(v, shard.tensor)]
        raise ValueError(
            f"optimizer state {key!r}: expected one of {known}. Remedy: ask for one of them, after the first step."
        )
    dense = torch.zeros(numel, dtype=state[key].dtype, device=state[key].device)
    return _put_together(shard, state[key], dense, start)


def _weights(shard: ChildShard, start: int, numel: int) -> Tensor:
    """fp32: the weights in [start, start + numel) of a flat shard, inside the child its masters."""
    weights = shard.flat.flat().narrow(0, start, numel).to(shard.tensor.dtype, copy=True)
    return _put_together(shard, shard.tensor, weights, start)


def _put_together(shard: ChildShard, values: Tensor, dense: Tensor, start: int) -> Tensor:
    """`values`, one for each element of the child shard, put into `dense`, which lies at `start` of the flat shard."""
    first, last = shard.span(start, dense.numel())
    put_(dense, (shard.index[first:last] - start).to(dense.device), values[first:last])
    return dense


def _refusing(what: str) -> Callable[..., NoReturn]:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise NotImplementedError(
            f'ds_childtune does not support {what} while a child of optimizer_state "compact" trains.'
            ' Remedy: call child.detach() first, or use optimizer_state "dense".'
        )

    return refuse
