"""Questions asked of models: are they causal, how well do they predict, what do they cost, and how do they compare."""

from .analysis import analyze_results
from .comparison import compare_models, scaling_analysis

__all__ = ["analyze_results", "compare_models", "scaling_analysis"]
