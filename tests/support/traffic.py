"""Bytes that collectives move, counted where torch hands them to its backend: those of DeepSpeed, of this package and of tests."""

from __future__ import annotations

import collections
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

KINDS: dict[str, tuple[str, int, int]] = {
    # operator of torch's c10d: kind, which argument is as large as the whole, how often each of its bytes is sent
    "allreduce_": ("all-reduce", 0, 2),
    "allreduce_coalesced_": ("all-reduce", 0, 2),
    "_reduce_scatter_base_": ("reduce-scatter", 1, 1),
    "reduce_scatter_": ("reduce-scatter", 1, 1),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1, 1),
    "_allgather_base_": ("all-gather", 0, 1),
    "allgather_": ("all-gather", 0, 1),
    "allgather_coalesced_": ("all-gather", 0, 1),
    "allgather_into_tensor_coalesced_": ("all-gather", 0, 1),
    "alltoall_base_": ("all-to-all", 1, 1),
    "alltoall_": ("all-to-all", 1, 1),
    "broadcast_": ("broadcast", 0, 1),
    "reduce_": ("reduce", 0, 1),
    "gather_": ("gather", 0, 1),
    "scatter_": ("scatter", 1, 1),
    "send": ("send", 0, 1),
}
"""A ring sends each byte of the whole once, except its share of one in W; an all-reduce is a reduce-scatter and an all-gather."""

SILENT = {"barrier", "monitored_barrier_", "recv_", "recv_any_source_"}


class Traffic(TorchDispatchMode):
    """For the length of a `with`, bytes that this rank sends, times W / (W - 1) at world size W: see `KINDS`."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: collections.Counter[str] = collections.Counter()
        """By kind of collective."""
        self.calls: collections.Counter[str] = collections.Counter()

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = str(function._schema.name).partition("::")
        if namespace == "c10d" and name not in SILENT:
            kind, whole, times = KINDS[name]  # a KeyError is a collective that nobody has counted yet
            self.bytes[kind] += times * nbytes(args[whole])
            self.calls[kind] += 1
        return function(*args, **(kwargs or {}))


def nbytes(tensors: Any) -> int:
    """Of a tensor, or of lists of them."""
    return tensors.nbytes if isinstance(tensors, Tensor) else sum(nbytes(each) for each in tensors)
