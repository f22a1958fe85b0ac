"""Covisibility graphs: which frames see which."""

from .coarse import CoarseGraph
from .descriptors import GraphOrigin
from .graph import CovisibilityGraph
from .recall import CovisibilityReport
from .summary import GraphSummary

__all__ = ["CoarseGraph", "CovisibilityGraph", "CovisibilityReport", "GraphOrigin", "GraphSummary"]
