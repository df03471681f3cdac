"""What an engine counts, and where the random generators are: what must be as it was before."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def counters(engine: Any) -> dict[str, Any]:
    """What a Fisher pass must not change."""
    names = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
    scheduler = engine.lr_scheduler.state_dict() if engine.lr_scheduler else None
    training = [module.training for module in engine.module.modules()]
    return {n: getattr(engine, n) for n in names} | {
        "lr": engine.get_lr(),
        "lr_scheduler": scheduler,
        "train": training,
    }


def random_states() -> tuple[list[int], int]:
    return torch.get_rng_state().tolist(), int(np.random.get_state()[1].sum())  # type: ignore[index, union-attr]
