"""How many bytes of tensors that are new are alive at once, for the length of a `with`."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """Counts what operations on tensors allocate. What is mapped from a file is not allocated."""

    def __init__(self, counts: Callable[[Tensor], bool] = lambda _: True) -> None:
        """`counts`: which tensors matter."""
        super().__init__()
        self._counts = counts
        self.peak = 0
        """Bytes."""
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and "set_" not in str(func) and self._counts(tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given:
                    self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self._bytes())
        return result

    def now(self) -> int:
        """Bytes that are alive in this moment."""
        gc.collect()
        return self._bytes()

    def _bytes(self) -> int:
        self._storages = {key: found for key, found in self._storages.items() if not found[0].expired()}
        return sum(size for _, size in self._storages.values())
