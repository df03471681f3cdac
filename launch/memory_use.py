"""What a rank of launch/finetune.py holds in memory, in bytes."""

from __future__ import annotations

import gc
import resource
import warnings
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator


def optimizer_bytes(engine: Any) -> int:
    """Of the tensors that this rank's base optimizer has stepped, and of their moments."""
    bytes_ = 0
    for stepped, state in engine.basic_optimizer.state.items():
        moments = [v for v in state.values() if torch.is_tensor(v) and v.dim()]
        # A compact child's flat shard keeps an entry without moments.
        bytes_ += sum(t.numel() * t.element_size() for t in ([stepped, *moments] if moments else []))
    return bytes_


def tensor_bytes() -> int:
    """Of every tensor of this process: each storage counts once."""
    gc.collect()
    sizes: dict[int, int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn when they are looked at
        for thing in gc.get_objects():
            if isinstance(thing, torch.Tensor) and thing.layout == torch.strided:
                storage = thing.untyped_storage()
                # torch.compile leaves tensors without data behind: they say "cpu", but their storage is meta.
                if storage.device.type != "meta":
                    sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def peak_bytes() -> int:
    """The most that this process has held so far: on a GPU in tensors, on a CPU resident, libraries included."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(accelerator.max_memory_allocated())
