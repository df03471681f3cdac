"""The child as the base optimizer's whole parameter space: `optimizer_state: "compact"`.

[Note: child shards]
A *child shard* holds the child's elements of one flat shard: 1-D fp32, with an int32 index into the flat shard. Around the
base optimizer's step the gradient is gathered at the index, child shards stand in `param_groups`, the optimizer steps them
with its own code, and the result is scattered back. So moments exist for the child alone, and nothing outside it can move,
weight decay included, whatever the optimizer. Dense parameters are in the child in full; padding is not.

Between steps the flat shard has the last word: whoever edits weights (a checkpoint that is loaded) edits those. An exception are
16-bit flat shards, of which the child shard is the fp32 master.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ds_childtune.shards import FlatShard, Fragment

Group = dict[str, Any]

_TILE = 1 << 20


@dataclass(frozen=True)
class ChildShard:
    """What the base optimizer steps in place of one flat shard."""

    flat: FlatShard

    index: Tensor
    """int32 1-D, ascending: the child's elements of the flat shard."""

    tensor: Tensor
    """fp32 1-D, of the index's size."""

    @classmethod
    def of(cls, flat: FlatShard, mask: Tensor) -> ChildShard:
        """`mask`: bool 1-D of the flat shard, True = inside the child, or not eligible."""
        if flat.numel > torch.iinfo(torch.int32).max:
            raise NotImplementedError(
                f"child shards: expected flat shards of at most 2**31 - 1 elements, got {flat.numel}."
                " Remedy: lower zero_optimization.sub_group_size, or use more ranks."
            )
        parts = [torch.nonzero(f.of(mask)).view(-1).add_(f.shard_start).int() for f in flat.fragments]
        empty = torch.empty(0, dtype=torch.int32, device=mask.device)
        index = torch.cat(parts) if parts else empty
        return cls(flat, index, flat.flat().index_select(0, index).float())

    def gather(self) -> bool:
        """Take gradient and weights from the flat shard. False when it has no gradient in this step."""
        grad = self.flat.flat_grad()
        if grad is None:
            return False
        self.tensor.grad = grad.index_select(0, self.index).to(self.tensor.dtype)
        if self.flat.tensor.dtype == self.tensor.dtype:
            torch.index_select(self.flat.flat(), 0, self.index, out=self.tensor)
        return True

    def scatter(self) -> None:
        """Put the weights back, and drop the gradient."""
        put_(self.flat.flat(), self.index, self.tensor)
        self.tensor.grad = None


def put_(flat: Tensor, index: Tensor, values: Tensor) -> None:
    """flat[index] = values, in tiles, as `index_copy_` wants an int64 index twice the size of ours."""
    for places, value in zip(index.split(_TILE), values.split(_TILE), strict=True):
        flat.index_copy_(0, places.long(), value.to(flat.dtype))


@dataclass
class CompactChild:
    """ChildTuning-D with moments for the child alone. See [Note: child shards]."""

    optimizer: torch.optim.Optimizer
    shards: dict[Tensor, ChildShard]
    """By flat shard."""
    _params: list[tuple[Group, list[Tensor]]] = field(default_factory=list)
    """What stood in the param groups, for the length of a step."""

    @classmethod
    def of(cls, shards: Sequence[FlatShard], masks: Iterable[Tensor], optimizer: torch.optim.Optimizer) -> CompactChild:
        """Moves the optimizer's state from the flat shards to child shards; what it holds outside the child is let go.

        Args:
            masks: bool 1-D, one for each shard; True = inside the child, or not eligible.
        """
        made = {s.tensor: ChildShard.of(s, mask) for s, mask in zip(shards, masks, strict=True)}
        child = cls(optimizer, made)
        for flat, shard in made.items():
            state = optimizer.state.pop(flat, None)
            if state:
                optimizer.state[shard.tensor] = {
                    key: value.view(-1).index_select(0, shard.index.to(value.device))
                    if _per_element(value, flat)
                    else value
                    for key, value in state.items()
                }
        return child

    def before_step(
        self, optimizer: torch.optim.Optimizer, group: Group, shards: Sequence[FlatShard], step: int
    ) -> None:
        self._params.append((group, group["params"]))
        children = [self.shards[s.tensor] for s in shards]
        # Those without elements too: their step counters go on as in the dense path.
        group["params"] = [c.tensor for c in children if c.gather()]

    def after_step(self) -> None:
        for group, params in self._params:
            for tensor in params:
                shard = self.shards[tensor]
                if shard.tensor.grad is not None:
                    shard.scatter()
            group["params"] = params
        self._params.clear()

    def frozen(self, tensor: Tensor) -> Tensor | None:
        """bool 1-D: True = outside the child; None where the whole flat shard is inside. Padding, which may be NaN, is neither."""
        shard = self.shards[tensor]
        if shard.index.numel() == tensor.numel():
            return None
        outside = torch.zeros(tensor.numel(), dtype=torch.bool, device=tensor.device)
        for fragment in shard.flat.fragments:
            fragment.of(outside).fill_(True)
        put_(outside, shard.index, torch.zeros_like(shard.index, dtype=torch.bool))
        return outside

    def mask(self, tensor: Tensor, fragment: Fragment) -> Tensor:
        """bool [fragment.numel]: True = trained."""
        index = self.shards[tensor].index
        bounds = torch.tensor([fragment.shard_start, fragment.shard_start + fragment.numel], dtype=index.dtype)
        first, last = torch.searchsorted(index, bounds.to(index.device)).tolist()
        mask = torch.zeros(fragment.numel, dtype=torch.bool, device=tensor.device)
        mask[index[first:last].long() - fragment.shard_start] = True
        return mask

    def release(self) -> None:
        """Give the optimizer its dense state back, zero outside the child."""
        for flat, shard in self.shards.items():
            state = self.optimizer.state.pop(shard.tensor, None)
            if state:
                self.optimizer.state[flat] = {key: self._dense(shard, value) for key, value in state.items()}

    @staticmethod
    def _dense(shard: ChildShard, value: Any) -> Any:
        if not _per_element(value, shard.tensor):
            return value
        whole = torch.zeros(shard.flat.numel, dtype=value.dtype, device=value.device)
        put_(whole, shard.index.to(value.device), value)
        return whole.view(shard.flat.tensor.shape)

    def state_tensors(self) -> Iterator[Tensor]:
        """Every tensor that this child costs: indices, values and state."""
        for shard in self.shards.values():
            yield shard.index
            yield shard.tensor
            yield from (v for v in self.optimizer.state.get(shard.tensor, {}).values() if isinstance(v, Tensor))


def _per_element(value: Any, tensor: Tensor) -> bool:
    """Whether an entry of the optimizer's state has a value for each element of `tensor`, as moments have and counters have not."""
    return isinstance(value, Tensor) and value.shape == tensor.shape and value.dim() > 0
