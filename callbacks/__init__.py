"""Lightning callbacks. Each reads an instrument of `bsbr_pl.utils` and logs its values."""

from .attention_maps import AttentionMaps
from .dashboard import Dashboard
from .fail_together import FailTogether
from .finite_loss import FiniteLoss
from .flop_counter import FlopCounter
from .last_checkpoint import LastCheckpoint, Stopped
from .peak_memory import PeakMemory
from .progress_line import ProgressLine
from .run_recorder import RunRecorder
from .run_summary import RunSummary
from .step_timer import StepTimer

__all__ = [
    "AttentionMaps",
    "Dashboard",
    "FailTogether",
    "FiniteLoss",
    "FlopCounter",
    "LastCheckpoint",
    "PeakMemory",
    "ProgressLine",
    "RunRecorder",
    "RunSummary",
    "StepTimer",
    "Stopped",
]
