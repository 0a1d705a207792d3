"""Real text and recall tasks as LightningDataModules with one interface (see `TokenData`)."""

from .base import TokenData
from .recall import InductionData, MQARData, NeedleData, SelectiveCopyData
from .tasks import associative_recall_hits
from .text import TextData

#: Every data set by the name of its class.
DATA_SETS: dict[str, type[TokenData]] = {
    cls.__name__: cls for cls in (TextData, MQARData, InductionData, SelectiveCopyData, NeedleData)
}

__all__ = [
    "DATA_SETS",
    "InductionData",
    "MQARData",
    "NeedleData",
    "SelectiveCopyData",
    "TextData",
    "TokenData",
    "associative_recall_hits",
]
