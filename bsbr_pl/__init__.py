"""Causal attention architectures, trained and compared on equal terms."""

from .models import (
    BSBRModel,
    DeltaNetTransformer,
    GAUTransformer,
    HopfieldTransformer,
    LinearTransformer,
    SlidingWindowTransformer,
    StandardTransformer,
)

__version__ = "0.1.0"

__all__ = [
    "BSBRModel",
    "DeltaNetTransformer",
    "GAUTransformer",
    "HopfieldTransformer",
    "LinearTransformer",
    "SlidingWindowTransformer",
    "StandardTransformer",
]
