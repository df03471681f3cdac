"""Hugging Face Trainers for the tests, as their users write them: stock scripts with one line more. On the ranks of the pool."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import transformers
from accelerate.state import AcceleratorState
from torch import Tensor, nn

import ds_childtune
from tests.support.engines import Weights

VOCABULARY, LENGTH = 40, 8


@dataclass(frozen=True)
class Run:
    """One `train()`."""

    before: Weights
    end: Weights
    masks: Weights
    step: int
    report: ds_childtune.Report
    logs: list[dict[str, Any]] = field(default_factory=list)

    def _moved(self) -> Weights:
        """A bf16 engine has rounded the weights that it was given."""
        return {n: self.end[n] != self.before[n].to(self.end[n].dtype) for n in self.masks}

    def outside_moved(self) -> int:
        return sum(int((moved & ~self.masks[n]).sum()) for n, moved in self._moved().items())

    def inside_moved(self) -> float:
        """As a share."""
        moved = sum(int((moved & self.masks[n]).sum()) for n, moved in self._moved().items())
        return moved / sum(int(mask.sum()) for mask in self.masks.values())


def whole_weights(model: nn.Module) -> Weights:
    named = dict(model.named_parameters())
    partitioned = any(hasattr(p, "ds_id") for p in named.values())
    with deepspeed.zero.GatheredParameters(list(named.values()), enabled=partitioned):
        return {name: p.detach().clone() for name, p in named.items()}


def config(stage: int, block: dict[str, Any] | None, **extra: Any) -> dict[str, Any]:
    """A DeepSpeed config as transformers' documentation has it."""
    found: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 1000},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}},
    } | extra
    return found if block is None else found | {"child_tuning": block}


@contextmanager
def fresh_accelerate() -> Iterator[None]:
    """accelerate allows for one DeepSpeed run in a process; and transformers builds models partitioned once it has seen ZeRO-3."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29555")
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        transformers.integrations.deepspeed.unset_hf_deepspeed_config()
        AcceleratorState._reset_state(reset_partial_state=True)


def arguments(
    folder: str, ds_config: dict[str, Any], make: Any = transformers.TrainingArguments, **options: Any
) -> Any:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 4 // dist.get_world_size(),
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return make(output_dir=folder, deepspeed=ds_config, **(defaults | options))


def tiny_gpt2() -> nn.Module:
    transformers.set_seed(0)
    shape = transformers.GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(shape)


def rows(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randint(0, VOCABULARY, (LENGTH,), generator=generator) for _ in range(count)]
    return [{"input_ids": text, "labels": text} for text in texts]


def run_of(trainer: Any, callback: ds_childtune.ChildTuningCallback, before: Weights, *, detach: bool = True) -> Run:
    """What a trained Trainer has come to."""
    child = callback.child
    assert child is not None
    report = child.report()
    masks = {p.name: child.gather_mask(p.name) for p in report.parameters}
    run = Run(before, whole_weights(trainer.model), masks, child.step, report, trainer.state.log_history)
    if detach:
        child.detach()
    return run
