"""Child-Tuning (Xu et al., EMNLP 2021) on DeepSpeed, exact at every ZeRO stage and world size.

child = ds_childtune.attach(engine)      # after deepspeed.initialize
child.select(calibration_batches)        # ChildTuning-D
"""

from typing import TYPE_CHECKING, Any

from ds_childtune._version import __version__
from ds_childtune._versions import SUPPORTED as _SUPPORTED  # noqa: F401 # checks them, before DeepSpeed is imported
from ds_childtune.child.step_numbers import StepNumbers
from ds_childtune.child_files.apply import AppliedChild, apply_child
from ds_childtune.child_files.format import ChildFileError
from ds_childtune.child_files.merge import compose, merge
from ds_childtune.child_files.patches import CheckpointWeightPatch
from ds_childtune.child_files.reader import SavedChild, open_child
from ds_childtune.config import ChildTuningConfig, FisherConfig
from ds_childtune.ranks import limit_waits
from ds_childtune.report import ParameterReport, Report
from ds_childtune.selection.fisher import Fisher
from ds_childtune.tuner import ChildTuner, attach
from ds_childtune.zero.compact_parts import can_start_lean
from ds_childtune.zero.lean_start import lean_start
from ds_childtune.zero.unattached import watch_steps

if TYPE_CHECKING:
    from ds_childtune.callback import ChildTuningCallback

__all__ = [
    "AppliedChild",
    "CheckpointWeightPatch",
    "ChildFileError",
    "ChildTuner",
    "ChildTuningCallback",
    "ChildTuningConfig",
    "Fisher",
    "FisherConfig",
    "ParameterReport",
    "Report",
    "SavedChild",
    "StepNumbers",
    "__version__",
    "apply_child",
    "attach",
    "can_start_lean",
    "compose",
    "lean_start",
    "limit_waits",
    "merge",
    "open_child",
]


def __getattr__(name: str) -> Any:
    """`ChildTuningCallback` imports transformers, so only who asks for it pays for that."""
    if name == "ChildTuningCallback":
        from ds_childtune.callback import ChildTuningCallback

        return ChildTuningCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


watch_steps()
