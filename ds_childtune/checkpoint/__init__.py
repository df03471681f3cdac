"""`engine.save_checkpoint` and `engine.load_checkpoint` of an engine with a child: they carry it.

Both are replaced on the instance while a ChildTuner is attached, so that a script, Hugging Face's Trainer and accelerate, which call
them, need not know.
"""

from __future__ import annotations

from ds_childtune.attachment import Attachment
from ds_childtune.checkpoint.hooks import Hooks
from ds_childtune.checkpoint.load import CheckpointLoader
from ds_childtune.checkpoint.save import CheckpointSaver
from ds_childtune.zero.overrides import Overrides


class Checkpoints:
    """The two methods, on one engine, until `remove`."""

    def __init__(self, attachment: Attachment, hooks: Hooks) -> None:
        engine = attachment.engine
        self._overrides = Overrides()
        saver = CheckpointSaver(attachment, hooks, engine.save_checkpoint)
        loader = CheckpointLoader(attachment, hooks, engine.load_checkpoint)
        self._overrides.method(engine, "save_checkpoint", saver.save)
        self._overrides.method(engine, "load_checkpoint", loader.load)

    def remove(self) -> None:
        """Give the engine its own methods back, or those that it was given before."""
        self._overrides.remove()
