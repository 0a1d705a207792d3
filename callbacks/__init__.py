"""Lightning hooks, thin: each reads an instrument at the right moment and logs it."""

from .attention_maps import AttentionMaps
from .fail_together import FailTogether
from .flop_counter import FlopCounter
from .peak_memory import PeakMemory
from .run_recorder import RunRecorder
from .run_summary import RunSummary
from .step_timer import StepTimer

__all__ = ["AttentionMaps", "FailTogether", "FlopCounter", "PeakMemory", "RunRecorder", "RunSummary", "StepTimer"]
