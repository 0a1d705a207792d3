"""Real text and recall tasks as LightningDataModules with one interface (see `TokenData`)."""

from .base import TokenData
from .mad import MADData
from .recall import InductionData, MQARData, NeedleData, SelectiveCopyData
from .state_tracking import StateTrackingData
from .tasks import associative_recall_hits
from .text import TextData

#: Every data set by the name of its class.
DATA_SETS: dict[str, type[TokenData]] = {
    cls.__name__: cls
    for cls in (TextData, MQARData, InductionData, SelectiveCopyData, NeedleData, MADData, StateTrackingData)
}

__all__ = [
    "DATA_SETS",
    "InductionData",
    "MADData",
    "MQARData",
    "NeedleData",
    "SelectiveCopyData",
    "StateTrackingData",
    "TextData",
    "TokenData",
    "associative_recall_hits",
]
