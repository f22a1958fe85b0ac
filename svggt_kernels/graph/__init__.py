"""Covisibility graphs: which frames see which."""

from .coarse import AnyGraph, CoarseGraph, united
from .descriptors import GraphOrigin
from .graph import CovisibilityGraph
from .recall import CovisibilityReport
from .summary import GraphSummary

__all__ = [
    "AnyGraph",
    "CoarseGraph",
    "CovisibilityGraph",
    "CovisibilityReport",
    "GraphOrigin",
    "GraphSummary",
    "united",
]
