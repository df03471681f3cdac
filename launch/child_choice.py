"""The child of one run of launch/finetune.py: attached, resumed, and chosen before training or some steps into it."""

from __future__ import annotations

from typing import Any

from arguments import Arguments
from text_data import Collate, Data, calibration_batches

import ds_childtune
from ds_childtune import ChildTuner, Report


class ChildChoice:
    """A child from `start` on, or with `--select-at` from that optimizer step on; before it the engine trains in full."""

    def __init__(self, engine: Any, data: Data, collate: Collate, args: Arguments) -> None:
        self.engine = engine
        self.data = data
        self.collate = collate
        self.args = args
        self.child: ChildTuner | None = None
        self.report: Report | None = None
        self.seconds = 0.0
        """Of Fisher pass and selection while training."""

    def start(self) -> bool:
        """Attach before a checkpoint is loaded, so that it brings the child, and choose one unless it did. Whether one was loaded."""
        args, resumed = self.args, None
        if "child_tuning" in self.engine.config:
            self.child = ds_childtune.attach(self.engine)
        if args.checkpoints is not None:
            resumed, _ = self.engine.load_checkpoint(str(args.checkpoints))
        if self.child is None:
            return resumed is not None
        if self.child.chosen:
            self.report = self.child.report()
        elif self.engine.global_steps < args.select_at:
            self.child.detach()
            self.child = None
        elif resumed is None or self.engine.global_steps == args.select_at:
            self._select()
        else:  # a child chosen now would be another than that of the run so far
            raise ValueError(
                f"--checkpoints {args.checkpoints}: expected a checkpoint with a child, or of step {args.select_at} (--select-at), got"
                f" one of step {self.engine.global_steps} without. Remedy: another folder, or --select-at {self.engine.global_steps}."
            )
        return resumed is not None

    def after(self, step: int) -> None:
        """Choose the child if this is the step. A collective."""
        if self.child is None and step == self.args.select_at and "child_tuning" in self.engine.config:
            self.child = ds_childtune.attach(self.engine)
            report = self._select()
            self.seconds += report.fisher_seconds + report.selection_seconds

    def _select(self) -> Report:
        assert self.child is not None
        size = self.args.calibration_batch_size or self.engine.train_micro_batch_size_per_gpu()
        by_length = self.args.group_by_length
        batches = calibration_batches(self.data.train, self.collate, size, group_by_length=by_length)
        general = {}
        if self.data.against is not None:
            general["against"] = calibration_batches(self.data.against, self.collate, size, group_by_length=by_length)
        self.report = self.child.select(batches, **general)
        return self.report
