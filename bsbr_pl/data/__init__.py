"""Real text and recall tasks as LightningDataModules with one interface (see `TokenData`)."""

from .base import TokenData
from .hits import associative_recall_hits
from .tasks import InductionData, MQARData, NeedleData, SelectiveCopyData
from .text import TextData

__all__ = [
    "InductionData",
    "MQARData",
    "NeedleData",
    "SelectiveCopyData",
    "TextData",
    "TokenData",
    "associative_recall_hits",
]
