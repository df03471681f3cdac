"""The Fisher pass: forward and backward over the calibration batches, on an engine that is as before afterwards."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from tqdm import tqdm

from ds_childtune import _zero
from ds_childtune._ranks import device, raise_together, sum_over_ranks
from ds_childtune._zero_calibration import calibration
from ds_childtune.config import FisherConfig
from ds_childtune.fisher import Fisher, FisherAccumulator, squared
from ds_childtune.shards import FlatShard

LossFunction = Callable[[Any, Any], Tensor]
"""`loss_fn(engine, batch)`: the scalar mean loss of one micro-batch."""


def default_loss(engine: Any, batch: Any) -> Tensor:
    """Hugging Face's convention: a mapping is spread into keywords, a sequence into arguments; the output has `.loss` or is it."""
    batch = _to_device(batch, engine.device)
    if isinstance(batch, Mapping):
        output = engine(**batch)
    elif isinstance(batch, (tuple, list)):
        output = engine(*batch)
    else:
        output = engine(batch)
    if isinstance(output, Mapping):
        output = output.get("loss")
    loss = getattr(output, "loss", output)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"select: expected the model to return a scalar loss, got {got}."
            " Remedy: put labels into the calibration batches, or pass loss_fn(engine, batch) -> loss."
        )
    return loss


def estimate_fisher(
    engine: Any,
    parameters: _zero.Parameters,
    shards: Sequence[FlatShard],
    eligible: frozenset[str],
    batches: Iterable[Any],
    config: FisherConfig,
    loss_fn: LossFunction,
) -> Fisher:
    """Empirical Fisher information of the eligible fragments on this rank's shards. A collective.

    Raises:
        ValueError: on every rank, for no batches, a loss that is not finite, or an eligible parameter without a gradient.
        RuntimeError: on every rank, when a rank's iterable or loss function raises anything else.
    """
    if _zero.inside_accumulation(engine):
        raise RuntimeError(
            "select: called between a micro-batch and its optimizer step, whose gradients would be lost."
            " Remedy: call it before training, or right after the step that ends an accumulation."
        )
    if _zero.model_dtype(engine) is torch.float16 and config.estimator == "per_micro_batch":
        raise NotImplementedError(
            'ds_childtune does not support fisher.estimator "per_micro_batch" in fp16, where squares underflow.'
            ' Remedy: use bf16, or fisher.estimator "per_global_batch".'
        )
    fisher_pass = _FisherPass(engine, shards, config)
    with fisher_pass.hooks(parameters, eligible), _same_afterwards(engine, config.model_mode):
        fisher_pass.run(batches, loss_fn)
    return fisher_pass.finish(eligible)


class _FisherPass:
    """One pass: hooks see each parameter's gradient, `_receive` gets what is reduced. See [Note: squares before the reduction]."""

    def __init__(self, engine: Any, shards: Sequence[FlatShard], config: FisherConfig) -> None:
        self.engine = engine
        self._shards = shards
        self._config = config
        self._squares_here = config.estimator == "per_micro_batch"
        self.accumulator = FisherAccumulator(shards, square=not self._squares_here, dtype=config.score_dtype)
        self._reached: set[str] = set()
        """Parameters that had a gradient in this batch."""
        self._ever_reached: set[str] = set()
        self._weight = 1.0
        self._terms = 0
        """Terms of the mean: micro-batches, or global batches."""

    @contextmanager
    def hooks(self, parameters: _zero.Parameters, eligible: frozenset[str]) -> Iterator[None]:
        handles = [parameters.by_name[name].register_hook(self._hook(name)) for name in sorted(eligible)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[[Tensor], Tensor | None]:
        def on_gradient(grad: Tensor) -> Tensor | None:
            self._reached.add(name)
            return squared(grad, self._config.max_grad_norm) if self._squares_here else None

        return on_gradient

    def _receive(self, tensor: Tensor, start: int, grad: Tensor) -> None:
        self.accumulator.add(tensor, start, grad, self._weight, absent=self._ever_reached - self._reached)

    def run(self, batches: Iterable[Any], loss_fn: LossFunction) -> None:
        world_size = dist.get_world_size()
        with calibration(self.engine, self._shards, self._receive) as backward:
            for round_ in _rounds(batches, self._config.max_batches):
                loss = _finite_loss(self.engine, round_, loss_fn)
                self._reached = set()
                self.accumulator.next_term()
                # DeepSpeed averages over all ranks, and ranks that only keep the others company add zeros.
                self._weight = float(world_size) if self._squares_here else (world_size / round_.active) ** 2
                finite = backward(loss if round_.own else loss * 0.0)
                self._ever_reached |= self._reached
                if finite:
                    self._terms += round_.active if self._squares_here else 1
                elif _zero.model_dtype(self.engine) is not torch.float16:
                    # DeepSpeed skips a step on every rank alike. In fp16 that is how the loss scale is found.
                    raise ValueError(_not_finite("gradients", round_.number))

    def finish(self, eligible: frozenset[str]) -> Fisher:
        """Check that every eligible parameter had a gradient, and count the terms. A collective."""
        names = sorted(eligible)
        reached = torch.tensor([n in self._ever_reached for n in names], dtype=torch.int64, device=device())
        sum_over_ranks(reached)
        missing = [n for n, count in zip(names, reached.tolist(), strict=True) if not count]
        if missing:
            raise ValueError(
                f"select: {len(missing)} eligible parameters never got a gradient in the calibration batches:"
                f" {', '.join(missing[:5])}. Remedy: freeze them (requires_grad=False) or add them to child_tuning.exclude."
            )
        if not self._terms:
            raise ValueError(_not_finite("gradients", 0))
        return Fisher(self.accumulator.sums, self._terms)


@dataclass(frozen=True)
class _Round:
    """One micro-batch on every rank."""

    number: int
    batch: Any
    own: bool
    """False where this rank has no batch left and runs an old one at weight zero, to keep the others company."""
    active: int
    """Ranks that run a batch of their own."""


def _rounds(batches: Iterable[Any], max_batches: int | None) -> Iterator[_Round]:
    """Pair up the ranks' iterables, which may differ in length; the ranks agree before each batch."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    source = _catching(batches)
    batch, used, number = None, 0, 0
    exhausted = False
    with tqdm(desc="Fisher", unit=" batches", total=max_batches, disable=rank != 0, leave=False) as bar:
        while max_batches is None or used < max_batches:
            fresh, error = (None, None) if exhausted else next(source)
            exhausted |= fresh is None
            raise_together(error)
            has_batch = torch.zeros(world_size, dtype=torch.int64, device=device())
            has_batch[rank] = int(not exhausted)
            sum_over_ranks(has_batch)
            if number == 0 and not bool(has_batch.all()):
                raise ValueError(_no_batches(has_batch))
            if max_batches is not None:
                has_batch[has_batch.cumsum(0) > max_batches - used] = 0
            active = int(has_batch.sum())
            if active == 0:
                return
            batch = batch if fresh is None else fresh[0]
            yield _Round(number, batch, bool(has_batch[rank]), active)
            used += active
            number += 1
            bar.update(active)


def _catching(batches: Iterable[Any]) -> Iterator[tuple[tuple[Any] | None, Exception | None]]:
    """Yields `((batch,), None)`, and at the end `(None, None)`, or `(None, error)` where the iterable raises."""
    try:
        for batch in batches:
            yield (batch,), None
    except Exception as error:
        yield None, error
    while True:
        yield None, None


def _finite_loss(engine: Any, round_: _Round, loss_fn: LossFunction) -> Tensor:
    """This rank's loss; the ranks agree that each of them has one before any goes into the backward pass."""
    loss, error = None, None
    try:
        loss = loss_fn(engine, round_.batch)
        if not bool(torch.isfinite(loss.detach()).all()):
            error = ValueError(_not_finite("loss", round_.number))
    except Exception as caught:
        error = caught  # type: ignore[assignment]
    raise_together(error)
    assert loss is not None
    return loss


def _not_finite(what: str, number: int) -> str:
    return (
        f"select: expected a finite loss and gradients, got NaN or inf {what} in calibration batch {number}."
        " Remedy: look at this batch's inputs and labels, and at the model's weights."
    )


def _no_batches(has_batch: Tensor) -> str:
    empty = [r for r, has in enumerate(has_batch.tolist()) if not has]
    who = "every rank" if len(empty) == has_batch.numel() else f"rank {', '.join(map(str, empty[:8]))}"
    return (
        f"select: expected at least one calibration batch on each of {has_batch.numel()} ranks, got none on {who}."
        " Remedy: pass an iterable that is not empty or exhausted; with few samples, let ranks share batches."
    )


@contextmanager
def _same_afterwards(engine: Any, model_mode: str) -> Iterator[None]:
    """Put back the random number generators and every module's training flag; run in `model_mode` meanwhile."""
    accelerator = get_accelerator()
    on_device = accelerator.device_name() != "cpu"
    training = {module: module.training for module in engine.module.modules()}
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    device_state = accelerator.get_rng_state() if on_device else None
    engine.module.train(model_mode == "train")
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if device_state is not None:
            accelerator.set_rng_state(device_state)


def _to_device(value: Any, to: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(to, non_blocking=True)
    if isinstance(value, Mapping):
        return {k: _to_device(v, to) for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_to_device(v, to) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_to_device(v, to) for v in value)
    return value
