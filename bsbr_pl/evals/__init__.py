"""Measurements of models: causality, accuracy, costs, and comparisons of several models.

The functions are imported when they are first used: records of runs are read without torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .analysis import analyze_results
    from .comparison import compare_models, scaling_analysis

__all__ = ["analyze_results", "compare_models", "scaling_analysis"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import analysis, comparison

    return getattr(analysis if name == "analyze_results" else comparison, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
