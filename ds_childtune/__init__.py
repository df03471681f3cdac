"""Child-Tuning (Xu et al., EMNLP 2021) on DeepSpeed, exact at every ZeRO stage and world size.

child = ds_childtune.attach(engine)      # after deepspeed.initialize
child.select(calibration_batches)        # ChildTuning-D
"""

from ds_childtune._version import __version__
from ds_childtune._zero_lean import lean_start
from ds_childtune._zero_unattached import watch_steps
from ds_childtune.child_apply import AppliedChild, apply_child
from ds_childtune.child_format import ChildFileError
from ds_childtune.child_merge import compose, merge
from ds_childtune.config import ChildTuningConfig, FisherConfig
from ds_childtune.report import ParameterReport, Report
from ds_childtune.tuner import ChildTuner, attach

__all__ = [
    "AppliedChild",
    "ChildFileError",
    "ChildTuner",
    "ChildTuningConfig",
    "FisherConfig",
    "ParameterReport",
    "Report",
    "__version__",
    "apply_child",
    "attach",
    "compose",
    "lean_start",
    "merge",
]

watch_steps()
