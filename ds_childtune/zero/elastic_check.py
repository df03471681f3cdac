"""Whether DeepSpeed's files hold what a run of another layout will look for. See [Note: elastic resume]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ds_childtune.shards import FlatShard
from ds_childtune.zero.checkpoint_read import SavedRun
from ds_childtune.zero.engine import Engine, Wrapper, base_optimizer
from ds_childtune.zero.layout import Layout
from ds_childtune.zero.layout_check import different

_LOOK = 1024
"""Elements."""


def check_elsewhere(engine: Engine, run: SavedRun, layout: Layout, shards: Sequence[FlatShard]) -> None:
    """Raise ValueError when a checkpoint lacks what `load_elsewhere` will look for. Changes nothing, and has no collectives."""
    for shard in shards:
        for fragment in shard.fragments:
            for transfer in layout.find(fragment):
                run.weights(transfer.source)
    run.model_states()
    saved, here = len(run.base_state(0)["param_groups"]), len(base_optimizer(engine).param_groups)
    if saved != here:
        raise ValueError(
            f"load_checkpoint: expected {saved} param groups, as in the checkpoint {run.folder}, got {here}."
            " Remedy: give the optimizer the same groups."
        )


def check_values(run: SavedRun, layout: Layout, shards: Sequence[FlatShard]) -> None:
    """Raise ValueError where a checkpoint's layout is not that of its values, by comparing both ends of each run.

    At ZeRO 1 and 2 a checkpoint has the weights of the forward pass as well as their masters. Early versions wrote wrong layouts with
    `round_robin_gradients`. See [Note: a layout is believed once its values have been seen].
    """
    if run.wrapper not in (Wrapper.ZERO_1_2, Wrapper.BF16):
        return
    module, wrong = run.model_states()["module"], set()
    for shard in shards:
        for fragment in shard.fragments:
            if fragment.name in module and fragment.name in layout:
                weights = module[fragment.name].view(-1)[fragment.param_start :]
                for transfer in layout.find(replace(fragment, shard_start=0)):
                    masters = run.weights(transfer.source)[
                        transfer.source_start : transfer.source_start + transfer.numel
                    ]
                    beside = weights[transfer.target_start : transfer.target_start + transfer.numel]
                    ends = (slice(_LOOK), slice(max(0, transfer.numel - _LOOK), transfer.numel))
                    if masters.numel() != beside.numel() or any(
                        bool(different(masters[end], beside[end], exact=True).any()) for end in ends
                    ):
                        wrong.add(fragment.name)
    if wrong:
        raise ValueError(
            f"load_checkpoint: {run.folder}: expected masters that round to the weights beside them, got others in {len(wrong)}"
            f" parameters ({', '.join(sorted(wrong)[:3])}): with zero_optimization.round_robin_gradients, earlier versions of"
            " ds_childtune took flat shards for another order, and trained other elements than the child's. Remedy: call"
            " engine.load_checkpoint before attach, at the stage, world size and round_robin_gradients that it was written with."
        )
