"""`engine.save_checkpoint` and `engine.load_checkpoint` of an engine with a child: they carry it.

Both are replaced on the instance while a ChildTuner is attached, so that a script, Hugging Face's Trainer and accelerate, which call
them, need not know.
"""

from __future__ import annotations

from ds_childtune.attachment import Attachment
from ds_childtune.checkpoint.hooks import Hooks
from ds_childtune.checkpoint.load import CheckpointLoader
from ds_childtune.checkpoint.save import CheckpointSaver


class Checkpoints:
    """The two methods, on one engine, until `remove`."""

    def __init__(self, attachment: Attachment, hooks: Hooks) -> None:
        self._engine = engine = attachment.engine
        engine.save_checkpoint = CheckpointSaver(attachment, hooks, engine.save_checkpoint).save
        engine.load_checkpoint = CheckpointLoader(attachment, hooks, engine.load_checkpoint).load

    def remove(self) -> None:
        """Give the engine its own methods back."""
        for name in ("save_checkpoint", "load_checkpoint"):
            delattr(self._engine, name)
