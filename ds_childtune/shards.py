"""Where every gradient element lives: flat shards, and the fragments of parameters inside them.

[Note: flat shards]
DeepSpeed hands its base optimizer 1-D tensors with `.grad` set - *flat shards*. A *fragment* is a piece of one parameter
inside one flat shard. What no fragment covers is *padding*, which is never scored, counted or masked.

    parameter  "h.0.attn.weight", 12 elements            flat shard on rank 1, 10 elements
    [ 0  1  2  3  4  5  6  7  8  9 10 11 ]               [ 6  7  8  9 10 11 | 0  1  2 | pad ]
                      '---- fragment: param_start 6, shard_start 0, numel 6 ----'
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from torch import Tensor


@dataclass(frozen=True)
class Fragment:
    """A contiguous piece of one parameter inside one flat shard."""

    name: str
    """Parameter name, as in `engine.module.named_parameters()`."""

    param_start: int
    """Index of the first element in the flattened parameter."""

    shard_start: int
    """Index of the first element in the flat shard."""

    numel: int

    counted: bool = True
    """False where another rank holds, and counts, the same elements (ZeRO 0)."""

    eligible: bool = True
    """False where the parameter is dense: trained in full."""

    def narrow(self, offset: int, numel: int) -> Fragment:
        """The piece of `numel` elements that begins `offset` elements into this one."""
        return replace(self, param_start=self.param_start + offset, shard_start=self.shard_start + offset, numel=numel)

    def of(self, shard: Tensor) -> Tensor:
        """This fragment's view of a 1-D tensor laid out like its flat shard."""
        return shard.narrow(0, self.shard_start, self.numel)


@dataclass(frozen=True)
class FlatShard:
    """The tensor that the base optimizer steps, and what lies in it."""

    tensor: Tensor
    """1-D at ZeRO 1-3 (fp32, or bf16 with low-precision masters); at ZeRO 0 fp32 the parameter itself."""

    fragments: tuple[Fragment, ...]
    """In the order of `shard_start`; they do not overlap."""

    eligible: tuple[Fragment, ...] = field(init=False)
    """The fragments that may be masked."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "eligible", tuple(f for f in self.fragments if f.eligible))
        end = 0
        for fragment in self.fragments:
            if fragment.shard_start < end or fragment.shard_start + fragment.numel > self.tensor.numel():
                raise RuntimeError(
                    f"flat shard of {self.tensor.numel()} elements: fragment {fragment} overlaps its neighbour or leaves"
                    " the shard. This is a DeepSpeed layout that ds_childtune does not know; please report it."
                )
            end = fragment.shard_start + fragment.numel

    @property
    def numel(self) -> int:
        return self.tensor.numel()

    def padding(self) -> Iterator[tuple[int, int]]:
        """Where padding begins, and its elements."""
        end = 0
        for fragment in self.fragments:
            if fragment.shard_start > end:
                yield end, fragment.shard_start - end
            end = fragment.shard_start + fragment.numel
        if self.numel > end:
            yield end, self.numel - end

    def flat(self) -> Tensor:
        """1-D view of the weights."""
        return self.tensor.detach().view(-1)

    def flat_grad(self) -> Tensor | None:
        """1-D view of the gradient, or None when there is none in this step."""
        grad = self.tensor.grad
        if grad is None:
            return None
        if grad.is_sparse:  # without ZeRO, as of nn.Embedding(sparse=True); a mask is of all elements
            self.tensor.grad = grad = grad.to_dense()
        return grad.detach().view(-1)


def mark_eligible(shards: Iterable[FlatShard], names: frozenset[str]) -> tuple[FlatShard, ...]:
    """The same shards, with exactly the fragments of `names` eligible."""
    return tuple(FlatShard(s.tensor, tuple(replace(f, eligible=f.name in names) for f in s.fragments)) for s in shards)
