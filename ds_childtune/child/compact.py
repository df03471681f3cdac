"""The child as the base optimizer's whole parameter space: `optimizer_state: "compact"`.

[Note: child shards]
A *child shard* holds the child's elements of one flat shard: 1-D fp32, with an index into the flat shard, which is int32 up to
2**31 - 1 elements. The base optimizer steps child shards with its own code, and the result is scattered back. So moments exist for
the child only, and nothing outside it can move, weight decay included, whatever the optimizer. Dense parameters are in the child
in full; padding is not. `Parts` says what is compact:

    moments                           any stage   DeepSpeed's flat shards stay. Around the base optimizer's step the gradient is
                                                  gathered at the index, and child shards are in `param_groups`.
    moments and masters               ZeRO 1, 2   DeepSpeed's fp32 flat shards go: child shards are the masters.
    moments, masters and gradients    ZeRO 1-3    gradients are kept for the child only, too; at ZeRO 1 and 2 nothing else is sent.

Where masters are compact DeepSpeed itself runs on child shards: see `Plumbing`, `zero/compact_stage3.py`, `zero/compact_stage12.py`,
`zero/compact_sending.py`, and for CPU offload `zero/compact_sending_offload.py`.

With compact moments only, weights are edited in the flat shard (a checkpoint is loaded into it), and the next step begins with those;
where it is 16-bit, the child shard is the fp32 master of every element that was not edited. With compact masters the child shard is
the master: the next step overwrites an edited parameter inside the child, as DeepSpeed does everywhere, and leaves the edit outside
it, where the weight is all there is. After `refresh_fp32_params` the whole edit stays.

In each case, `CompactChild.shards` maps each flat shard's tensor to its `ChildShard`, and the base optimizer's state
is keyed by `ChildShard.tensor`: that is all of a child's state.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from ds_childtune.child.base_optimizer import counts_by_group, per_element, share_counters
from ds_childtune.child.child_shard import ChildShard, put_
from ds_childtune.child.network import Group, Stepped
from ds_childtune.shards import FlatShard, Fragment

Parts = Literal["moments", "moments and masters", "moments, masters and gradients"]
"""What exists for the child's elements only."""


class Plumbing(Protocol):
    """Makes DeepSpeed step child shards by itself, and takes that back."""

    parts: Parts

    note: str
    """What ranks keep of one another, for a reader, once installed; empty: nothing that is worth a word."""

    def install(self, shards: Sequence[ChildShard]) -> None:
        """DeepSpeed runs on child shards; flat shards become views of the parameters that the forward pass uses, or 16-bit copies."""

    def remove(self) -> None:
        """DeepSpeed's lists hold flat shards again, still as views or copies: for another child that follows at once."""

    def restore_dense(self, shards: Sequence[ChildShard]) -> None:
        """After `remove`, for good: flat shards of the masters' dtype, which hold the child's values."""


@dataclass
class CompactChild:
    """ChildTuning-D with moments for the child only. See [Note: child shards]."""

    fixed: ClassVar = True

    optimizer: torch.optim.Optimizer
    shards: Mapping[Tensor, ChildShard]
    """By flat shard's tensor."""
    plumbing: Plumbing | None = None
    """None where only moments are compact."""
    rest_values: Mapping[str, float] = field(default_factory=dict)
    """What entries of the state are for an element that never had a gradient; 0 for those that are not named."""
    _previous: CompactChild | None = None
    _carried: dict[Tensor, dict[str, Any]] = field(default_factory=dict)
    """By flat shard: the state that its child shard begins with, until `take_over`."""
    _stepping: list[tuple[Group, list[Tensor], list[ChildShard], list[Tensor]]] = field(default_factory=list)
    """For the length of a step: what was in the param groups, and what is there now, by shard and as the list itself."""

    @classmethod
    def of(
        cls,
        shards: Sequence[FlatShard],
        masks: Iterable[Tensor],
        optimizer: torch.optim.Optimizer,
        plumbing: Plumbing | None = None,
        previous: CompactChild | None = None,
        rest_values: Mapping[str, float] | None = None,
    ) -> CompactChild:
        """A child that has taken over: see `made` and `take_over`."""
        child = cls.made(shards, masks, optimizer, plumbing, previous, rest_values)
        child.take_over()
        return child

    @classmethod
    def made(
        cls,
        shards: Sequence[FlatShard],
        masks: Iterable[Tensor],
        optimizer: torch.optim.Optimizer,
        plumbing: Plumbing | None = None,
        previous: CompactChild | None = None,
        rest_values: Mapping[str, float] | None = None,
    ) -> CompactChild:
        """Child shards and their state, beside what there is: whatever fails here, memory above all, leaves that as it was.

        Args:
            masks: bool 1-D, one for each shard; True = inside the child, or not eligible.
            plumbing: where masters are compact.
            previous: the child so far. Elements that stay keep their state and their master; the state of those that enter begins
                at `rest_values`.
            rest_values: as the field.
        """
        child_shards: dict[Tensor, ChildShard] = {}
        child = cls(optimizer, child_shards, plumbing, rest_values or {})
        child._previous = previous
        if previous is None:
            share_counters(optimizer, [group["params"] for group in optimizer.param_groups])
        else:
            previous.share_counters()
        for flat, mask in zip(shards, masks, strict=True):
            child_shards[flat.tensor] = shard = ChildShard.of(flat, mask)
            before = None if previous is None else previous.shards[flat.tensor]
            child._carried[flat.tensor] = _carried(optimizer, shard, before, child.rest_values)
        return child

    def take_over(self) -> None:
        """Stand in place of the flat shards, or of the previous child, which must not be used any more.

        What the optimizer holds outside the child is freed.
        """
        previous, self._previous = self._previous, None
        if previous is not None and previous.plumbing is not None:
            previous.plumbing.remove()
        for flat, shard in self.shards.items():
            self.optimizer.state.pop(flat if previous is None else previous.shards[flat].tensor, None)
            if state := self._carried.pop(flat):
                self.optimizer.state[shard.tensor] = state
        if self.plumbing is not None:
            self.plumbing.install(list(self.shards.values()))

    @property
    def parts(self) -> Parts:
        return "moments" if self.plumbing is None else self.plumbing.parts

    @property
    def norm_is_child(self) -> bool:
        """Whether DeepSpeed sees no other gradient than the child's."""
        return self.parts == "moments, masters and gradients"

    @property
    def flat_gradients(self) -> bool:
        """Whether flat shards have the whole gradient when the base optimizer is about to step."""
        return self.plumbing is None

    def before_step(self, optimizer: torch.optim.Optimizer, stepped: Sequence[Stepped], step: int) -> None:
        for each in stepped:
            self._before_group(optimizer, each.group, [self.shards[s.tensor] for s in each.shards])

    def _before_group(self, optimizer: torch.optim.Optimizer, group: Group, children: list[ChildShard]) -> None:
        if self.plumbing is None:
            # Those without elements too, whose step counters go on as in the dense path; but DeepSpeed's kernel for many tensors
            # loses its place at an empty one on GPUs, and counts for the whole group anyway.
            by_group = counts_by_group(optimizer)
            children = [c for c in children if (c.index.numel() or not by_group) and c.gather()]
        tensors = [c.tensor for c in children]
        self._stepping.append((group, group["params"], children, tensors))
        group["params"] = tensors

    def after_step(self) -> None:
        for _, _, children, _ in self._stepping:
            for shard in children:
                shard.scatter()
                shard.tensor.grad = None
        self.recover()

    def recover(self) -> None:
        """Param groups hold what they held before a step."""
        for group, params, _, tensors in self._stepping:
            # DeepSpeed may have put something else there since.
            if group["params"] is tensors:
                group["params"] = params
        self._stepping.clear()

    def inside_at(self, shard: FlatShard, index: Tensor) -> Tensor:
        """bool: whether each element at `index` of the flat shard may move: of the child, or padding."""
        child = self.shards[shard.tensor]
        ones = torch.ones(child.index.shape, dtype=torch.bool, device=index.device)
        inside = child.at(index, ones, torch.zeros_like(index, dtype=torch.bool))
        gaps = torch.tensor([(start, start + numel) for start, numel in shard.padding()], device=index.device)
        if not gaps.numel():
            return inside
        last_before = torch.searchsorted(gaps[:, 0].contiguous(), index, right=True) - 1
        return inside | (last_before >= 0) & (index < gaps[last_before.clamp(min=0), 1])

    def weights_at(self, shard: FlatShard, index: Tensor) -> Tensor:
        """fp32: the weights at `index` of the flat shard; inside the child those of the child shard."""
        child = self.shards[shard.tensor]
        return child.at(index, child.tensor, shard.flat()[index].float())

    def gradient_at(self, shard: FlatShard, index: Tensor) -> Tensor | None:
        """fp32: the gradient that the base optimizer is handed at `index` of the flat shard, zero outside the child."""
        child = self.shards[shard.tensor]
        if child.tensor.grad is None:
            return None
        return child.at(index, child.tensor.grad, torch.zeros(index.shape, device=index.device))

    def mask_gradient_(self, shard: FlatShard, gradient: Tensor, start: int) -> None:
        """Zero in place what is outside the child; `gradient` is 1-D and lies at `start` of the flat shard."""
        child = self.shards[shard.tensor]
        first, last = child.span(start, gradient.numel())
        places = child.index[first:last] - start
        inside = gradient.index_select(0, places)
        put_(gradient.zero_(), places, inside)

    def child_mask(self, shard: FlatShard, fragment: Fragment, step: int) -> Tensor:
        """bool [fragment.numel]: True = trained."""
        child = self.shards[shard.tensor]
        first, last = child.span(fragment.shard_start, fragment.numel)
        mask = torch.zeros(fragment.numel, dtype=torch.bool, device=shard.tensor.device)
        mask[child.index[first:last].long() - fragment.shard_start] = True
        return mask

    def share_counters(self) -> None:
        """See [Note: one counter for a group]. Without effect where DeepSpeed leaves param groups empty between steps."""
        self.recover()
        groups = [group["params"] for group in self.optimizer.param_groups]
        share_counters(self.optimizer, [[self.shards[t].tensor for t in group if t in self.shards] for group in groups])

    def restore_dense(self) -> None:
        """After `discard`, where no other child follows after all: DeepSpeed's flat shards, with the weights of the forward pass."""
        if self.plumbing is not None:
            self.plumbing.restore_dense(list(self.shards.values()))

    def release(self) -> None:
        """Give the engine its dense flat shards back, and the optimizer its dense state, at `rest_values` outside the child."""
        self.share_counters()
        if self.plumbing is not None:
            self.plumbing.remove()
        self.restore_dense()
        for flat, shard in self.shards.items():
            state = self.optimizer.state.pop(shard.tensor, None)
            if state:
                self.optimizer.state[flat] = {
                    key: _dense(shard, value, self.rest_values.get(key, 0.0)) for key, value in state.items()
                }

    def discard(self) -> None:
        """Drop the child's masters and state, for a child that is loaded in its place; nothing becomes dense.

        The forward pass sees the same weights. Where no other child follows after all, call `restore_dense`.
        """
        self.recover()
        if self.plumbing is not None:
            self.plumbing.remove()
        for shard in self.shards.values():
            self.optimizer.state.pop(shard.tensor, None)


def _carried(
    optimizer: torch.optim.Optimizer, shard: ChildShard, before: ChildShard | None, rest_values: Mapping[str, float]
) -> dict[str, Any]:
    """The optimizer's state of the flat shard, or of the child shard `before`, for this one, which is given the latter's masters."""
    source = shard.flat.tensor if before is None else before.tensor
    state = optimizer.state.get(source, {})

    def taken(key: str, value: Any) -> Any:
        if not per_element(value, source):
            return value
        index = shard.index.to(value.device)
        if before is None:
            inside = value.view(-1).index_select(0, index)
            # Moments of 16-bit masters are 16-bit; those of the child, whose masters are fp32, are not.
            return inside.to(shard.tensor.dtype) if value.dtype == source.dtype else inside
        rest = torch.full(index.shape, rest_values.get(key, 0.0), dtype=value.dtype, device=value.device)
        return before.moved(value, index, rest)

    if before is not None and shard.flat.tensor.dtype != shard.tensor.dtype:
        shard.tensor.copy_(before.moved(before.tensor, shard.index, shard.tensor))
    return {key: taken(key, value) for key, value in state.items()}


def _dense(shard: ChildShard, value: Any, rest_value: float) -> Any:
    """An entry of a child shard's state as the flat shard's, `rest_value` outside the child."""
    if not per_element(value, shard.tensor):
        return value
    dtype = shard.flat.tensor.dtype if value.dtype == shard.tensor.dtype else value.dtype
    whole = torch.full((shard.flat.numel,), rest_value, dtype=dtype, device=value.device)
    put_(whole, shard.index.to(value.device), value)
    return whole.view(shard.flat.tensor.shape)
