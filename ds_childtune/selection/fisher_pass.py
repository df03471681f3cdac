"""The Fisher pass: forward and backward over the calibration batches, on an engine that is as before afterwards."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor
from tqdm import tqdm

from ds_childtune.config import FisherConfig
from ds_childtune.random_states import kept_random_states
from ds_childtune.ranks import device, raise_together, raising_together, sum_over_ranks
from ds_childtune.selection.fisher import Fisher, FisherAccumulator
from ds_childtune.shards import FlatShard
from ds_childtune.zero.calibration import (
    Backward,
    bucket_numel,
    calibration,
    hands_on,
    loss_scale,
    mixes_gradients,
    pieces,
    splits_parameters,
)
from ds_childtune.zero.engine import inside_accumulation, model_dtype
from ds_childtune.zero.flat_shards import Parameters
from ds_childtune.zero.reduction import Reduction, TakenTwice

LossFunction = Callable[[Any, Any], Tensor]
"""`loss_fn(engine, batch)`: the scalar mean loss of one micro-batch."""


def default_loss(engine: Any, batch: Any) -> Tensor:
    """Hugging Face's convention: a mapping is spread into keywords, a sequence into arguments.

    The output has `.loss`, or `["loss"]`, or is the loss, or is a tuple that begins with it.
    """
    try:
        output = _called_with(engine, _to_device(batch, engine.device))
    except Exception as error:
        if not _holds_tensor(batch):
            raise ValueError(
                f"select: expected micro-batches of tensors, got {_outline(batch)}, which looks like a row of a dataset; the model"
                f" says {type(error).__name__}: {error}. Remedy: pass a DataLoader over the dataset, for example"
                " trainer.get_train_dataloader()."
            ) from error
        if isinstance(error, TypeError):
            raise ValueError(
                f"select: expected a batch that the model can be called with, got {_outline(batch)}: {error}. {_OWN_LOSS}"
            ) from error
        raise
    if isinstance(output, Mapping):
        output = output.get("loss")
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    loss = getattr(output, "loss", output)
    if not _is_scalar(loss):
        raise ValueError(
            f"select: expected the model to return a scalar loss, got {_outline(loss)}. Remedy: put labels into the"
            f" calibration batches, if the model makes its loss of them. {_OWN_LOSS}"
        )
    return loss  # type: ignore[no-any-return]


def _called_with(engine: Any, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return engine(**batch)
    if isinstance(batch, (tuple, list)):
        return engine(*batch)
    return engine(batch)


_OWN_LOSS = (
    "Remedy for a loss that is computed outside the model, as DPO's is: pass loss_fn(engine, batch) -> loss;"
    " with a Trainer, loss_fn=lambda engine, batch: trainer.compute_loss(engine, trainer._prepare_inputs(batch))."
)


def _is_scalar(loss: Any) -> bool:
    return isinstance(loss, Tensor) and loss.numel() == 1


def _holds_tensor(value: Any) -> bool:
    """Whether there is a tensor, or an object that may hold one, anywhere in it."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return any(_holds_tensor(v) for v in value)
    return value is not None and not isinstance(value, (str, bytes, int, float))


def _outline(value: Any) -> str:
    """What something is, in a few words."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        some = ", ".join(f"{k}: {type(v).__name__}" for k, v in list(value.items())[:4])
        return f"{type(value).__name__} of {some}{', ...' if len(value) > 4 else ''}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of {', '.join(type(v).__name__ for v in value[:4])}"
    return type(value).__name__


def check_batches(batches: Any) -> None:
    """Raise ValueError for one micro-batch in place of an iterable of them, and for what cannot be iterated."""
    if isinstance(batches, (Mapping, Tensor, str)) or not isinstance(batches, Iterable):
        if hasattr(batches, "__getitem__") and not isinstance(batches, (Mapping, Tensor, str)):
            return  # a torch Dataset, which python iterates by index
        raise ValueError(
            f"select: expected an iterable of micro-batches, got {_outline(batches)}."
            " Remedy: pass a DataLoader or a list of micro-batches; for a single one, select([batch])."
        )


def estimate_fisher(
    engine: Any,
    parameters: Parameters,
    shards: Sequence[FlatShard],
    eligible: frozenset[str],
    batches: Iterable[Any],
    config: FisherConfig,
    loss_fn: LossFunction,
) -> Fisher:
    """Empirical Fisher information of the eligible fragments on this rank's shards. A collective.

    Raises:
        ValueError: on every rank, for no batches, a loss that is not finite, or an eligible parameter without a gradient.
        NotImplementedError: on every rank, for ranks that use different parameters where DeepSpeed mixes their gradients, and for
            gradients that come in parts.
        RuntimeError: on every rank, when a rank's iterable or loss function, or its backward pass, raises anything else.
        Unanswered: on a rank that fails where the others wait for it; see `raise_together`.
    """
    if inside_accumulation(engine):
        raise RuntimeError(
            "select: called between a micro-batch and its optimizer step, whose gradients would be lost."
            " Remedy: call it before training, or right after the step that ends an accumulation."
        )
    fisher_pass = _FisherPass(engine, parameters, shards, sorted(eligible), config)
    with _same_afterwards(engine, config.model_mode):
        fisher_pass.run(batches, loss_fn)
    return fisher_pass.finish()


class _FisherPass:
    """One pass: backward makes gradients, `Reduction` sums them or their squares. See [Note: squares before the reduction]."""

    def __init__(
        self,
        engine: Any,
        parameters: Parameters,
        shards: Sequence[FlatShard],
        names: Sequence[str],
        config: FisherConfig,
    ) -> None:
        self._engine = engine
        self._config = config
        self._parameters = {name: parameters.by_name[name] for name in names}
        self._names = {parameter: name for name, parameter in self._parameters.items()}
        self._squares_here = config.estimator == "per_micro_batch"
        self._accumulator = FisherAccumulator(shards, square=not self._squares_here, dtype=config.score_dtype)
        self._reduction = Reduction(
            pieces(engine, self._parameters),
            dist.get_world_size() if splits_parameters(engine) else 1,
            self._receive,
            squares=self._squares_here,
            clip=config.max_grad_norm,
            most=bucket_numel(engine),
        )
        self._hands_on = hands_on(engine)
        self._reached: set[str] = set()
        """Parameters that had a gradient in any micro-batch of this rank's."""
        self._loss_scale = loss_scale(engine) if model_dtype(engine) is torch.float16 else None
        """In fp16: the pass's own, which is halved when gradients overflow."""
        self._pending: list[tuple[str, int, Tensor]] = []
        """In fp16: what is added once it is known that nothing has overflowed."""
        self._weight = 1.0
        self._terms = 0
        """Terms of the mean: micro-batches, or global batches."""

    def run(self, batches: Iterable[Any], loss_fn: LossFunction) -> None:
        handles = [
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._reached.add(name))
            for name, parameter in self._parameters.items()
        ]
        try:
            with calibration(self._engine, self._ready) as backward:
                for round_ in _rounds(batches, self._config.max_batches):
                    self._micro_batch(round_, loss_fn, backward)
        finally:
            for handle in handles:
                handle.remove()

    def _micro_batch(self, round_: _Round, loss_fn: LossFunction, backward: Backward) -> None:
        self._reduction.begin(silent=not round_.own, loss_scale=self._loss_scale or 1.0)
        loss = _finite_loss(self._engine, round_, loss_fn) * (float(round_.own) * (self._loss_scale or 1.0))
        self._accumulator.next_term()
        self._weight = 1.0 if self._squares_here else 1.0 / round_.active**2
        error: Exception | None = None
        gathering = splits_parameters(self._engine)
        try:
            backward(loss)
            gathering = False
            self._take_what_is_left()
            self._reduction.finish()
        except TakenTwice as twice:
            error = NotImplementedError(_taken_twice(twice.name))
        except Exception as caught:
            error = caught
        if error is not None and not gathering:
            self._reduction.abandon()
        raise_together(error)
        self._end_micro_batch(round_)

    def _ready(self, parameter: Any) -> None:
        """A gradient is whole: at ZeRO 2 and 3, in the backward pass."""
        grad, parameter.grad = parameter.grad, None
        name = self._names.get(parameter)
        if name is not None:
            self._reduction.add(name, grad)

    def _take_what_is_left(self) -> None:
        """Whole gradients, where they have stayed on their parameters."""
        if not self._hands_on:
            for name, parameter in self._parameters.items():
                grad, parameter.grad = parameter.grad, None
                self._reduction.add(name, grad)
        self._engine.zero_grad()

    def _receive(self, name: str, start: int, sums: Tensor) -> None:
        if self._loss_scale is None:
            self._accumulator.add(name, start, sums, self._weight)
        else:
            self._pending.append((name, start, sums.clone()))

    def _end_micro_batch(self, round_: _Round) -> None:
        """Check what the ranks have summed. A collective; the one moment of a micro-batch at which the host waits for the device."""
        compared = mixes_gradients(self._engine) and (round_.own or self._hands_on)
        digest = _digest(self._reduction.taken) if compared else None
        extremes = [digest, -digest] if digest is not None else [-(1 << 62)] * 2
        summary = torch.cat([torch.tensor(extremes, device=device()), self._reduction.not_finite.view(1).long()])
        dist.all_reduce(summary, op=dist.ReduceOp.MAX)
        largest, smallest, not_finite = summary.tolist()
        if largest + smallest > 0:
            raise NotImplementedError(self._mixed(round_, compared=compared))
        if not not_finite:
            for name, start, sums in self._pending:
                self._accumulator.add(name, start, sums, self._weight)
            self._terms += round_.active if self._squares_here else 1
        elif self._loss_scale is None:
            raise ValueError(_not_finite("gradients", round_.number))
        else:
            self._loss_scale /= 2
        self._pending.clear()

    def _mixed(self, round_: _Round, *, compared: bool) -> str:
        """What to say when ranks have used different parameters in a micro-batch, or in another order. A collective."""
        taken = set(self._reduction.taken)
        used = torch.tensor([compared, *(compared and name in taken for name in self._parameters)], device=device())
        used = used.long()
        sum_over_ranks(used)
        ranks, *counts = used.tolist()
        some = [f"{n} on {count}" for n, count in zip(self._parameters, counts, strict=True) if 0 < count < ranks]
        what = f"{len(some)} parameters on some of {ranks} ranks ({', '.join(some[:3])})" if some else "another order"
        stage = self._engine.zero_optimization_stage()
        return (
            f"select: expected every rank to use the same parameters in calibration batch {round_.number}, in one order, got {what}."
            f" At ZeRO stage {int(stage)} DeepSpeed would mix up gradients of different parameters, in training too."
            " Remedy: use ZeRO stage 0, or stage 3 after deepspeed.utils.set_z3_leaf_modules(model, [class of the modules that"
            " branch]), or let every micro-batch use every parameter."
        )

    def finish(self) -> Fisher:
        """Check that every eligible parameter had a gradient, and count the terms. A collective."""
        names = list(self._parameters)
        reached = torch.tensor([n in self._reached for n in names], dtype=torch.int64, device=device())
        sum_over_ranks(reached)
        missing = [n for n, count in zip(names, reached.tolist(), strict=True) if not count]
        if missing:
            raise ValueError(
                f"select: {len(missing)} eligible parameters never got a gradient in the calibration batches:"
                f" {', '.join(missing[:5])}. Remedy: freeze them (requires_grad=False) or add them to child_tuning.exclude."
            )
        if not self._terms:
            raise ValueError(_not_finite("gradients", 0))
        return Fisher(self._accumulator.sums, self._terms)


def _digest(names: Sequence[str]) -> int:
    """Below 2**62, alike for the same names in the same order."""
    text = "\0".join(names).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 2


def _taken_twice(name: str) -> str:
    return (
        f"select: expected one gradient of each parameter in a backward pass, got that of {name} in parts: the module is used"
        " several times under reentrant activation checkpointing, whose nested backward passes DeepSpeed reduces one by one."
        " Remedy: checkpoint with use_reentrant=False, or calibrate without checkpointing."
    )


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
    loss: Any = None
    with raising_together():
        loss = loss_fn(engine, round_.batch)
        if not _is_scalar(loss) or not loss.requires_grad:
            got = _outline(loss) + (" without a graph" if _is_scalar(loss) else "")
            raise ValueError(
                f"select: expected loss_fn(engine, batch) to return a scalar loss with a graph, got {got}. Remedy: return the"
                ' loss itself, for example output["loss"] or output[0], made by calling the engine.'
            )
        if not bool(loss.detach().isfinite()):
            raise ValueError(_not_finite("loss", round_.number))
    return loss  # type: ignore[no-any-return]


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
    """Put back the random number generators, every module's training flag and its buffers; run in `model_mode` meanwhile."""
    training = {module: module.training for module in engine.module.modules()}
    # What a forward pass changes, BatchNorm's statistics above all, it may change without a trace in the tensor's version.
    buffers = [(m, name, b, b.clone()) for m in training for name, b in m._buffers.items() if b is not None]
    engine.module.train(model_mode == "train")
    try:
        with kept_random_states():
            yield
    finally:
        for module, flag in training.items():
            module.training = flag
        for module, name, buffer, values in buffers:
            module._buffers[name] = buffer
            if not buffer.is_inference():
                buffer.copy_(values)


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
