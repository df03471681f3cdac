"""The Fisher pass: forward and backward over the calibration batches, on an engine that is as before afterwards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ds_childtune.config import FisherConfig
from ds_childtune.random_states import kept_random_states
from ds_childtune.ranks import (
    device,
    max_over_ranks,
    raise_together,
    raising_together,
    sum_over_ranks,
    world_size,
)
from ds_childtune.selection.experts import Experts, find_experts
from ds_childtune.selection.fisher import Fisher, FisherAccumulator
from ds_childtune.selection.loss import LossFunction, _is_scalar, outline
from ds_childtune.selection.rounds import Round, rounds
from ds_childtune.shards import FlatShard
from ds_childtune.zero.calibration import (
    Backward,
    bucket_numel,
    calibration,
    hands_on,
    loss_scale,
    mixes_gradients,
    splits,
    splits_parameters,
)
from ds_childtune.zero.engine import model_dtype
from ds_childtune.zero.flat_shards import Parameters
from ds_childtune.zero.reduction import Reduction, TakenTwice


class FisherPass:
    """One pass: backward makes gradients, `Reduction` sums them or their squares. See [Note: squares before the reduction].

    Making it takes the memory for the sums, which may be short on one rank only: let ranks agree. It has no collectives.
    """

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
        self._shapes = parameters.shapes
        self._names = {parameter: name for name, parameter in self._parameters.items()}
        self._squares_here = config.estimator == "per_micro_batch"
        self._accumulator = FisherAccumulator(shards, square=not self._squares_here, dtype=config.score_dtype)
        self._reduction = Reduction(
            splits(engine, self._parameters),
            world_size() if splits_parameters(engine) else 1,
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

    def estimate(self, batches: Iterable[Any], loss_fn: LossFunction) -> Fisher:
        """Empirical Fisher information of the eligible fragments on this rank's shards. A collective.

        Raises:
            ValueError: on every rank, for no batches, a loss that is not finite, an eligible parameter that can have no gradient, or
                with `unreached: "error"` an expert without one.
            NotImplementedError: on every rank, for ranks that use different parameters where DeepSpeed mixes their gradients, and
                for gradients that come in parts.
            RuntimeError: on every rank, when a rank's iterable or loss function, or its backward pass, raises anything else.
            Unanswered: on a rank that fails where the others wait for it; see `raise_together`.
        """
        with _same_afterwards(self._engine, self._config.model_mode):
            self._run(batches, loss_fn)
        return self._finish()

    def _run(self, batches: Iterable[Any], loss_fn: LossFunction) -> None:
        handles = [
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._reached.add(name))
            for name, parameter in self._parameters.items()
        ]
        try:
            with calibration(self._engine, self._ready) as backward:
                for round_ in rounds(batches, self._config.max_batches):
                    self._micro_batch(round_, loss_fn, backward)
        finally:
            for handle in handles:
                handle.remove()

    def _micro_batch(self, round_: Round, loss_fn: LossFunction, backward: Backward) -> None:
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
        raise_together(error, users_code=True)
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
            own = self._accumulator.own_parts(name, start, sums)
            self._pending += [(name, first, part.clone()) for first, part in own]

    def _end_micro_batch(self, round_: Round) -> None:
        """Check what the ranks have summed. A collective, for whose result the host waits."""
        compared = mixes_gradients(self._engine) and (round_.own or self._hands_on)
        digest = _digest(self._reduction.taken) if compared else None
        extremes = [digest, -digest] if digest is not None else [-(1 << 62)] * 2
        summary = torch.cat([torch.tensor(extremes, device=device()), self._reduction.not_finite.view(1).long()])
        max_over_ranks(summary)
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

    def _mixed(self, round_: Round, *, compared: bool) -> str:
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

    def _finish(self) -> Fisher:
        """Check that every eligible parameter had a gradient, and count the terms. A collective."""
        names = list(self._parameters)
        reached = torch.tensor([n in self._reached for n in names], dtype=torch.int64, device=device())
        sum_over_ranks(reached)
        had = {n: bool(count) for n, count in zip(names, reached.tolist(), strict=True)}
        experts, never = find_experts(self._engine.module, self._shapes, had, self._accumulator.sums)
        if never:
            raise ValueError(
                f"select: {len(never)} eligible parameters never got a gradient in the calibration batches:"
                f" {', '.join(never[:5])}. Remedy: freeze them (requires_grad=False) or add them to child_tuning.exclude."
            )
        if experts.unreached and self._config.unreached == "error":
            raise ValueError(_unreached(experts))
        if not self._terms:
            raise ValueError(_not_finite("gradients", 0))
        return Fisher(self._accumulator.sums, self._terms, frozenset(self._parameters), experts)


def _digest(names: Sequence[str]) -> int:
    """Below 2**62, alike for the same names in the same order."""
    text = "\0".join(names).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 2


def _unreached(experts: Experts) -> str:
    return (
        f"select: expected the calibration batches to reach every expert, got none of their tokens in {len(experts.unreached)} of"
        f" {experts.total} experts: {', '.join(experts.unreached[:5])}. Remedy: calibrate with more batches, or set"
        ' child_tuning.fisher.unreached "zero", with which these experts have scores of zero.'
    )


def _taken_twice(name: str) -> str:
    return (
        f"select: expected one gradient of each parameter in a backward pass, got that of {name} in parts: the module is used"
        " several times under reentrant activation checkpointing, whose nested backward passes DeepSpeed reduces one by one."
        " Remedy: checkpoint with use_reentrant=False, or calibrate without checkpointing."
    )


def _finite_loss(engine: Any, round_: Round, loss_fn: LossFunction) -> Tensor:
    """This rank's loss; the ranks agree that each of them has one before any goes into the backward pass."""
    loss: Any = None
    with raising_together(users_code=True):
        loss = loss_fn(engine, round_.batch)
        if not _is_scalar(loss) or not loss.requires_grad:
            got = outline(loss) + (" without a graph" if _is_scalar(loss) else "")
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
