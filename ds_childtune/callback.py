"""`ChildTuningCallback`: Child-Tuning in a Hugging Face Trainer, or one of TRL's, in one line.

[Note: one line in a Trainer]
In a Trainer's `train()` the order is: `deepspeed.initialize`, the checkpoint's load, `on_train_begin`, the first forward pass. A child
has to be attached between the first two, so that the Trainer's own load brings it, and no event lies there. So as long as it is
there the callback stands around `deepspeed.initialize`, and attaches a child to its Trainer's engine as it is made: at each `train()`,
also after one that was interrupted. Other engines are passed on: the reference model's of preference tuning, and those that another
Trainer or nobody's Trainer makes. `on_train_begin` then selects a child from the training set, unless a checkpoint has brought one.
"""

from __future__ import annotations

import copy
import itertools
import sys
import weakref
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

from ds_childtune.child.step_numbers import StepNumbers
from ds_childtune.config import ChildTuningConfig, parse_config
from ds_childtune.random_states import kept_random_states
from ds_childtune.ranks import largest_of_ranks, raising_together, tell
from ds_childtune.selection.loss import LossFunction
from ds_childtune.tuner import ChildTuner, attach
from ds_childtune.zero.engine import child_tuning_block, takes_steps, write_events
from ds_childtune.zero.initialize import around_initialize


class ChildTuningCallback(TrainerCallback):
    """Train a child network in a Trainer on DeepSpeed.

        Trainer(..., callbacks=[ds_childtune.ChildTuningCallback()])

    See [Note: one line in a Trainer]. The Trainer's own `resume_from_checkpoint` carries the child, at any world size.

    Args:
        config: replaces the `"child_tuning"` block of the DeepSpeed config, for set-ups without such a file.
        batches: calibration micro-batches of this rank, see `ChildTuner.select`; default: the Trainer's training data loader.
        against: general micro-batches of this rank, for selector `contrast`; see `ChildTuner.select`.
        loss_fn: see `ChildTuner.select`; default: the Trainer's `compute_loss`, label smoothing and preference losses included.
        select_at: ChildTuning-D: choose the child after this many optimizer steps. Until then every element trains, as in plain
            DeepSpeed. For adapters whose first gradients are zero, as LoRA's A are.
    """

    child: ChildTuner | None
    """The child that trains; None until `deepspeed.initialize`, and until `select_at`."""

    def __init__(
        self,
        config: ChildTuningConfig | Mapping[str, Any] | None = None,
        *,
        batches: Iterable[Any] | None = None,
        against: Iterable[Any] | None = None,
        loss_fn: LossFunction | None = None,
        select_at: int = 0,
    ) -> None:
        if select_at < 0:
            raise ValueError(
                f"select_at: expected 0 or more optimizer steps, got {select_at}. Remedy: leave it out, or pass 1."
            )
        self._config = None if config is None else parse_config(config)
        self._batches = batches
        self._against = against
        self._loss_fn = loss_fn
        self._select_at = select_at
        self._waiting: Any = None
        """An engine that trains in full until `select_at`."""
        self._has_moved = False
        """Whether an earlier `train()` on the same model has taken steps of a child."""
        self._measures = False
        """Whether the last step was measured, for the next line of logs."""
        self._steps_of_an_epoch = 1
        self._logged: dict[str, float] = {}
        """What goes into the next line of logs."""
        self.child = None
        self._stand_around_initialize()

    # ---------------------------------------------------------------- deepspeed.initialize

    def _stand_around_initialize(self) -> None:
        me = weakref.ref(self)

        def take(engine: Any) -> None:
            callback = me()
            if callback is not None:
                callback._take(engine)

        def block(model: Any, config: Mapping[str, Any]) -> object:
            callback = me()
            if callback is None or callback._select_at or not callback._is_ours(model):
                return None
            given = callback._config
            return config.get("child_tuning") if given is None else given.model_dump(mode="json", exclude_unset=True)

        weakref.finalize(self, around_initialize(take, block).remove)

    def _take(self, engine: Any) -> None:
        """Attach a child to an engine that was just made, if it is the Trainer's."""
        if not takes_steps(engine) or getattr(engine, "child_tuner", None) is not None:
            return
        if not self._is_ours(engine.module):
            return
        if self._config is None and child_tuning_block(engine) is None:
            return
        before = self.child
        if before is None or _bare(before.engine.module) is not _bare(engine.module):
            self._has_moved = False
        elif before.step:
            self._has_moved = True
        self.child = attach(engine, self._config)

    def _is_ours(self, model: Any) -> bool:
        """Whether this callback's own Trainer makes an engine of its model now."""
        trainer = _trainer_of(self)
        return trainer is not None and _bare(model) is _bare(trainer.model)

    # ---------------------------------------------------------------- the Trainer's events

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = _trainer_of(self)
        _refuse_an_earlier_engine(trainer)
        # An earlier train() may have been interrupted.
        self._waiting, self._measures, self._logged = None, False, {}
        if self.child is None or self.child.engine is not getattr(trainer, "model_wrapped", self.child.engine):
            self._attach_late(trainer)
        assert self.child is not None
        self._steps_of_an_epoch = _steps_of_an_epoch(args, kwargs.get("train_dataloader"))
        if trainer is not None:  # first, so that the others log what this one adds
            callbacks = trainer.callback_handler.callbacks
            callbacks.remove(self)
            callbacks.insert(0, self)
        if not self.child.chosen:
            if state.global_step < self._select_at:
                self._waiting = self.child.engine
                self.child.detach()
                self.child = None
            else:
                self._select(trainer, kwargs.get("train_dataloader"), state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        child = self.child
        if child is not None and child.chosen and _logs_after_next_step(args, state, self._steps_of_an_epoch):
            child.measure_next_step()
            self._measures = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._waiting is not None and state.global_step >= self._select_at:
            engine, self._waiting = self._waiting, None
            self.child = attach(engine, self._config)
            trainer, loader = _trainer_of(self), kwargs.get("train_dataloader")
            if self._batches is None and trainer is not None:
                # The Trainer is in the middle of its own one, whose epoch a second use may end: where workers persist, and where
                # accelerate dispatches batches.
                with raising_together(users_code=True), kept_random_states():
                    loader = trainer.get_train_dataloader()
            self._select(trainer, loader, state)
            # Checkpoints from before have no child, so none of them can be loaded at the end as the best one.
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs.get("logs")
        if logs is None:
            return
        more, self._logged = self._logged, {}
        if "loss" in logs and self.child is not None and self.child.chosen:
            # The Trainer has just read the loss, so the step is over: nothing here waits for the device.
            of_step = _of_step(self.child, self.child.measured() if self._measures else None, logs.get("grad_norm"))
            self._measures = False
            write_events(self.child.engine, of_step)
            more = more | of_step
        logs.update(more)
        if state.log_history:
            state.log_history[-1].update(more)

    # ---------------------------------------------------------------- the child

    def _attach_late(self, trainer: Any) -> None:
        """The engine was made before this callback was there."""
        engine = getattr(trainer, "model_wrapped", None)
        if not takes_steps(engine):
            raise RuntimeError(
                'ChildTuningCallback: expected a Trainer on DeepSpeed whose config has a "child_tuning" block, got none.'
                ' Remedy: pass deepspeed="config.json" to TrainingArguments, or use accelerate with DeepSpeed; without the block'
                ' (accelerate drops it from deepspeed_config), pass it here: ChildTuningCallback({"mode": ...}).'
            )
        if trainer.state.global_step:
            raise RuntimeError(
                "ChildTuningCallback: expected to be there before the Trainer makes its engine and loads its checkpoint, got a"
                " Trainer that has loaded already. Remedy: pass callbacks=[ChildTuningCallback()] to the Trainer."
            )
        if self._config is None and child_tuning_block(engine) is None:
            raise RuntimeError(
                'ChildTuningCallback: expected a "child_tuning" block in the DeepSpeed config, got none (accelerate drops it from'
                ' deepspeed_config). Remedy: pass it here: ChildTuningCallback({"mode": ...}).'
            )
        self.child = attach(engine, self._config)

    def _select(self, trainer: Any, train_dataloader: Any, state: Any) -> None:
        assert self.child is not None
        if self._has_moved:
            tell(
                "WARNING: ChildTuningCallback: an earlier train() of this Trainer has moved weights, so an export of this child needs"
                " the weights as they are now for its base model. Remedy: keep them, with trainer.save_model before train(); or"
                " build the model and the Trainer anew, after auto_find_batch_size with the batch size that it has found."
            )
        batches = self._batches if self._batches is not None else _as_trained(trainer, train_dataloader, state)
        loss_fn = self._loss_fn
        if loss_fn is None and trainer is not None:

            def loss_fn(engine: Any, batch: Any) -> Any:
                return trainer.compute_loss(engine, trainer._prepare_inputs(batch))

        metrics = copy.deepcopy(getattr(trainer, "_metrics", None))  # TRL's compute_loss adds to them
        report = self.child.select(_closed(batches), loss_fn, against=_closed(self._against))
        if metrics is not None:
            trainer._metrics = metrics
        self._logged = report.numbers()


def _refuse_an_earlier_engine(trainer: Any) -> None:
    """A Trainer makes an engine once. At the next `train` accelerate destroys it, and the first step fails without a reason."""
    accelerator = getattr(trainer, "accelerator", None)
    if accelerator is not None and getattr(accelerator, "deepspeed_engine_wrapped", accelerator) is None:
        raise RuntimeError(
            "ChildTuningCallback: expected a Trainer that makes its engine in this train(), got one that has made it already, in"
            " an earlier evaluate(), predict() or train(). transformers does not make another. Remedy:"
            " trainer.model_wrapped = trainer.model before this train(); a child is then chosen on the weights as they are."
        )


def _steps_of_an_epoch(args: Any, loader: Any) -> int:
    """As the Trainer counts them; 1 where it cannot, or where ranks count differently: then any step may be an epoch's last one.

    A collective: a step that is measured is one, too, so ranks must agree on which those are.
    """
    try:
        batches = len(loader)
    except TypeError:
        batches = 0
    steps = max(1, -(-batches // int(args.gradient_accumulation_steps)))
    most, least = largest_of_ranks(torch.tensor([steps, -steps])).tolist()
    return steps if most == -least else 1


def _logs_after_next_step(args: Any, state: Any, steps_of_an_epoch: int) -> bool:
    """Whether the Trainer will log after the step that begins."""
    step = state.global_step + 1
    if args.logging_strategy == "steps":
        return bool(step % state.logging_steps == 0 or (step == 1 and args.logging_first_step))
    ends = step % steps_of_an_epoch == 0 or step == state.max_steps
    return bool(args.logging_strategy == "epoch" and ends)


def _of_step(child: ChildTuner, found: StepNumbers | None, grad_norm: float | None) -> dict[str, float]:
    """What is logged of a step. `grad_norm` is DeepSpeed's, before clipping."""
    numbers: dict[str, float] = {}
    share = None if found is None else found.gradient_share
    if grad_norm is not None and (child.norm_is_child or share is not None):
        numbers["child_grad_norm"] = grad_norm if child.norm_is_child or share is None else grad_norm * share**0.5
    if share is not None:
        numbers["child_grad_share"] = share
    if found is not None and found.update is not None:
        numbers["child_update"] = found.update
    return numbers


def _as_trained(trainer: Any, loader: Any, state: Any) -> Any:
    """The training batches that calibrate: all of the set, or of a stream, which may have no end, as many as are trained on.

    Raises:
        ValueError: on every rank, for a stream that can be read only once.
    """
    # On every rank: where rank 0 reads for all, the others may have another data set.
    with raising_together(users_code=True):
        data: Any = getattr(trainer, "train_dataset", None)
        streams = isinstance(data, torch.utils.data.IterableDataset)
        if streams and iter(data) is iter(data):
            raise ValueError(
                "ChildTuningCallback: expected training data that can be read again, as the child is chosen on it before it is"
                f" trained on, got {type(data).__name__}, whose iterator is there once. Remedy:"
                " ChildTuningCallback(batches=[...]), with calibration batches of their own."
            )
    if not streams:
        return loader
    return itertools.islice(_closed(loader), state.max_steps * trainer.args.gradient_accumulation_steps)


def _closed(batches: Any) -> Any:
    """The same batches. An accelerate data loader whose iteration was ended early is closed."""
    if not hasattr(batches, "gradient_state"):
        return batches

    def iterate() -> Iterable[Any]:
        try:
            yield from batches
        finally:
            if batches in batches.gradient_state.dataloader_references:
                batches.end()

    return iterate()


def _bare(module: Any) -> Any:
    """The module inside torch.compile's wrapper."""
    return getattr(module, "_orig_mod", module)


def _trainer_of(callback: ChildTuningCallback) -> Any:
    """The Trainer of this callback that is at work: transformers hands a callback everything but it. None where there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        handler = getattr(owner, "callback_handler", None)
        if handler is not None and callback in getattr(handler, "callbacks", ()):
            return owner
        frame = frame.f_back
    return None
