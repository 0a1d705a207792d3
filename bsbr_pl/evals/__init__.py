"""Measurements of models: causality, accuracy, costs, and comparisons of several models."""

from .analysis import analyze_results
from .comparison import compare_models, scaling_analysis

__all__ = ["analyze_results", "compare_models", "scaling_analysis"]
