"""Causal attention architectures, trained and compared on equal terms.

The models are imported when they are first used: the rooms that need no torch (rows, reports) start without it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .evals.certificate import certify
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
    "certify",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "certify":
        from .evals.certificate import certify

        return certify
    from . import models

    return getattr(models, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
