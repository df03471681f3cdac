"""DeepSpeed engines for the tests, and what is inside them.

These functions are collectives: they run on every rank, inside `tests.support.ranks`.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

import ds_childtune
from tests.support.models import MICRO_BATCH_SIZE, Batch, build

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Optimizer:
    """A base optimizer, by DeepSpeed's name for it."""

    type: str = "AdamW"
    params: dict[str, Any] = field(
        default_factory=lambda: {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1, "torch_adam": True}
    )


@dataclass(frozen=True)
class Setup:
    """Everything that makes an engine."""

    family: str = "gpt2"
    stage: int = 0
    bf16: bool = False
    fp16: bool = False
    """With a static loss scale. Needs an accelerator."""
    fp32_accumulation: bool = False
    """Accumulate 16-bit gradients in fp32; at stage 1 that is another class of DeepSpeed's."""
    bf16_masters: bool = False
    """Keep masters and optimizer state in bf16, too."""
    accumulation: int = 1
    clip: float = 0.0
    offload: bool = False
    sub_group_size: int = 1_000_000_000
    persistence_threshold: int = 0
    bucket: int = 350
    """Elements of a communication bucket. Small, so that every pass fills several."""
    overlap_comm: bool = False
    """Reduce on a separate stream. Without effect on CPUs."""
    round_robin: bool = False
    """At ZeRO 1 and 2, flat shards in another order than param groups."""
    zero_init: bool = False
    """Build the model under `deepspeed.zero.Init`."""
    lean: bool = False
    """Begin with `ds_childtune.lean_start`."""
    dropout: float = 0.0
    schedule: bool = False
    """Warm the learning rate up."""
    no_decay: tuple[str, ...] = ()
    """Parameters whose names contain one of these form a second group, without weight decay."""
    optimizer: Optimizer = Optimizer()
    client: Callable[[list[Any]], torch.optim.Optimizer] | None = None
    """Makes an optimizer that DeepSpeed is given, in place of `optimizer`."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the forward pass."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32

    def config(self) -> dict[str, Any]:
        """The DeepSpeed config."""
        zero: dict[str, Any] = {
            "stage": self.stage,
            "reduce_bucket_size": self.bucket,
            "allgather_bucket_size": self.bucket,
        }
        if self.overlap_comm:
            zero["overlap_comm"] = True
        if self.round_robin:
            zero["round_robin_gradients"] = True
        if self.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        if self.stage == 3:
            zero["sub_group_size"] = self.sub_group_size
            zero["stage3_param_persistence_threshold"] = self.persistence_threshold
        config = {
            "train_micro_batch_size_per_gpu": MICRO_BATCH_SIZE,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.clip,
            "bf16": {"enabled": self.bf16},
            "fp16": {"enabled": self.fp16, "loss_scale": 128},
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "optimizer": {"type": self.optimizer.type, "params": self.optimizer.params},
            "steps_per_print": None,
        }
        if self.client is not None:
            del config["optimizer"]
        if self.bf16_masters:
            config["bf16"] = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
        if self.fp32_accumulation:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
        if self.schedule:
            lr = self.optimizer.params["lr"]
            warmup = {"warmup_min_lr": lr / 2, "warmup_max_lr": lr, "warmup_num_steps": 5, "warmup_type": "linear"}
            config["scheduler"] = {"type": "WarmupLR", "params": warmup}
        return config


@contextlib.contextmanager
def engine_of(setup: Setup, **extra: Any) -> Iterator[Any]:
    """An engine for the length of a `with`; `extra` goes into the DeepSpeed config."""
    config = setup.config() | extra
    model = _build(setup, config)
    parameters = _groups(setup, model) if setup.no_decay else [p for p in model.parameters() if p.requires_grad]
    with ds_childtune.lean_start() if setup.lean else contextlib.nullcontext():
        client = None if setup.client is None else setup.client(parameters)
        engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, config=config, optimizer=client)
    try:
        yield engine
    finally:
        engine.destroy()
        del engine, model, parameters
        gc.collect()


def _build(setup: Setup, config: dict[str, Any]) -> nn.Module:
    whole = build(setup.family, dropout=setup.dropout)
    if not setup.zero_init:
        return whole
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = build(setup.family, dropout=setup.dropout)
    # A partitioned parameter is empty while its module is built, so `build` cannot set all of its weights there.
    named = dict(model.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values()), modifier_rank=0), torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(whole.get_parameter(name))
    return model


def _groups(setup: Setup, model: nn.Module) -> list[dict[str, Any]]:
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    bare = {n: p for n, p in trainable.items() if any(part in n for part in setup.no_decay)}
    decayed = [p for n, p in trainable.items() if n not in bare]
    return [{"params": decayed}, {"params": list(bare.values()), "weight_decay": 0.0}]


def on_device(engine: Any, batch: Batch) -> Batch:
    return {key: value.to(engine.device) for key, value in batch.items()}


def train_step(engine: Any, micro_batches: Sequence[Batch]) -> list[float]:
    """One optimizer step; the losses of its micro-batches."""
    losses = []
    for batch in micro_batches:
        output = engine(**on_device(engine, batch))
        loss = output if isinstance(output, Tensor) else output.loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def model_weights(engine: Any) -> Weights:
    """A copy of every parameter as the forward pass sees it."""
    named = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values()), enabled=engine.zero_optimization_stage() == 3):
        return {name: p.detach().clone() for name, p in named.items()}


def master_weights(engine: Any) -> Weights:
    """A copy of every trainable parameter's fp32 master."""
    if not engine.bfloat16_enabled() and not engine.fp16_enabled():
        return {n: w for n, w in model_weights(engine).items() if engine.module.get_parameter(n).requires_grad}
    trainable = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
    if engine.zero_optimization_stage() == 0:
        masters = _masters_without_zero(engine.optimizer)
        return {n: masters[p].detach().clone().view(p.shape) for n, p in trainable.items()}
    # A compact child answers for DeepSpeed.
    tuner = getattr(engine, "child_tuner", None)
    redirected = tuner is not None and any(
        type(each).__module__.endswith("compact_reads") for each in tuner._hooks._overrides
    )
    if engine.zero_round_robin_gradients() and not redirected:
        return _masters_by_address(engine.optimizer, trainable)
    shapes = {n: torch.Size(getattr(p, "ds_shape", p.shape)) for n, p in trainable.items()}
    return {n: safe_get_full_fp32_param(p).detach().clone().view(shapes[n]) for n, p in trainable.items()}


def _masters_by_address(optimizer: Any, parameters: dict[str, nn.Parameter]) -> Weights:
    """Of ZeRO 1 and 2, where `safe_get_full_fp32_param` reads other parameters' with `round_robin_gradients`.

    A parameter is a view of its group's flat buffer, of which the ranks' masters are copies, one after the other.
    """
    found = {}
    for lp, part, group in zip(
        optimizer.bit16_groups_flat, optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True
    ):
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, part.detach())
        whole = torch.cat(parts)
        for param in group:
            start = (param.data_ptr() - lp.data_ptr()) // lp.element_size()
            found[param] = whole[start : start + param.numel()].view(param.shape)
    return {name: found[param].clone() for name, param in parameters.items()}


def _masters_without_zero(optimizer: Any) -> dict[nn.Parameter, Tensor]:
    """The masters that FP16_Optimizer (one flat tensor per group) or FP16_UnfusedOptimizer (one per parameter) keeps."""
    if hasattr(optimizer, "fp32_groups"):
        groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    else:
        flat = zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True)
        groups = ((group, master.split([p.numel() for p in group])) for group, master in flat)
    return {p: master for group, masters in groups for p, master in zip(group, masters, strict=True)}
