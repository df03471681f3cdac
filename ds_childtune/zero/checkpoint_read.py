"""Where things lie in DeepSpeed's files of a checkpoint. Reads DeepSpeed's state dicts; pinned by the tests of elastic resume.

By the wrapper around the base optimizer:

    ZERO_1_2, BF16, ZERO_3       *_optim_states.pt of each rank
    FP16_FUSED, FP16_UNFUSED     *_model_states.pt
    NONE                         *_model_states.pt, the weights among the module's
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ds_childtune.zero.engine import Wrapper
from ds_childtune.zero.layout import SavedShard

What = Literal["model", "optim"]
"""*_model_states.pt or *_optim_states.pt."""


@dataclass(frozen=True)
class Places:
    """Keys that lead to the flat shards and to the base optimizer's state dict, in DeepSpeed's file and in its own state dict."""

    file: What
    above: tuple[str, ...]
    """From the file's top to the dict that `engine.optimizer.state_dict()` made."""
    weights: str
    base: str


_ZERO = Places("optim", ("optimizer_state_dict",), "single_partition_of_fp32_groups", "base_optimizer_state")
PLACES = {
    Wrapper.ZERO_1_2: _ZERO,
    Wrapper.BF16: _ZERO,
    Wrapper.ZERO_3: Places("optim", ("optimizer_state_dict",), "fp32_flat_groups", "optimizer_state_dict"),
    Wrapper.FP16_FUSED: Places("model", ("optimizer",), "fp32_groups_flat", "optimizer_state_dict"),
    Wrapper.FP16_UNFUSED: Places("model", ("optimizer",), "fp32_groups", "optimizer_state_dict"),
}
"""For all wrappers except `NONE`."""


@dataclass
class SavedRun:
    """DeepSpeed's files of one checkpoint, opened when they are asked for, and mapped rather than read."""

    folder: Path
    wrapper: Wrapper
    files: Mapping[tuple[What, int], str]
    """Names, by ("model" or "optim", rank)."""
    _open: dict[str, Any] = field(default_factory=dict)

    def model_states(self, rank: int = 0) -> dict[str, Any]:
        """*_model_states.pt: the module, counters, and what the client saved."""
        return self._file("model", rank)

    def optimizer_states(self, rank: int) -> dict[str, Any]:
        """What `engine.optimizer.state_dict()` gave on `rank`."""
        if self.wrapper is Wrapper.NONE:
            return self._file("model", 0)["optimizer"]  # type: ignore[no-any-return]
        places = PLACES[self.wrapper]
        # Without ZeRO every rank has the same, and the first has written it.
        found = self._file(places.file, rank if places.file == "optim" else 0)
        for key in places.above:
            found = found[key]
        return found

    def base_state(self, rank: int) -> dict[str, Any]:
        """The base optimizer's state dict: `state` by position, and `param_groups`."""
        states = self.optimizer_states(rank)
        return states if self.wrapper is Wrapper.NONE else states[PLACES[self.wrapper].base]

    def weights(self, shard: SavedShard) -> Tensor:
        """1-D: a flat shard's weights; padding at its end may be missing."""
        if self.wrapper is Wrapper.NONE:
            weights = self._file("model", 0)["module"][shard.fragments[0].name]
        else:
            groups = self.optimizer_states(shard.rank)[PLACES[self.wrapper].weights]
            weights = _flattened(groups)[shard.index]
        return weights.view(-1)  # type: ignore[no-any-return]

    def state(self, shard: SavedShard) -> dict[str, Any]:
        """The base optimizer's state of a flat shard; empty when it was never stepped."""
        return self.base_state(shard.rank)["state"].get(shard.state_index, {})  # type: ignore[no-any-return]

    def frozen(self, name: str, shape: torch.Size, start: int, numel: int) -> Tensor | None:
        """1-D: the elements [start, start + numel) of a frozen parameter; None when the checkpoint was saved without."""
        first = self.model_states()
        if self.wrapper is not Wrapper.ZERO_3:
            whole = first["module"].get(name)
            return None if whole is None else whole.view(-1)[start : start + numel]
        fragments = first["frozen_param_fragments"]
        if fragments is None or name not in fragments:
            return None
        # ZeRO-3 pads the last partition, not the others.
        share = fragments[name].numel()
        ranks = range(start // share, -(-(start + numel) // share)) if share and numel else range(0)
        parts = [self.model_states(rank)["frozen_param_fragments"][name].view(-1) for rank in ranks]
        first_element = ranks.start * share
        return torch.cat(parts)[start - first_element : start - first_element + numel] if parts else torch.empty(0)

    def _file(self, what: What, rank: int) -> dict[str, Any]:
        name = self.files[what, rank]
        if name not in self._open:
            self._open[name] = _read(self.folder / name)
        return self._open[name]  # type: ignore[no-any-return]


def _flattened(groups: Sequence[Any]) -> list[Tensor]:
    """FP16_UnfusedOptimizer has a list of tensors for each group, the others one tensor."""
    return [t for group in groups for t in (group if isinstance(group, (list, tuple)) else [group])]


def _read(path: Path) -> dict[str, Any]:
    """One of DeepSpeed's files, unpickled in full, as DeepSpeed does: a client state may hold any object."""
    return torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=False)  # type: ignore[no-any-return]
