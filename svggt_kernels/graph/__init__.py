"""Covisibility graphs: which frames see which."""

from .descriptors import GraphOrigin
from .graph import CovisibilityGraph
from .recall import CovisibilityReport
from .summary import GraphSummary

__all__ = ["CovisibilityGraph", "CovisibilityReport", "GraphOrigin", "GraphSummary"]
