"""Covisibility graphs: which frames see which."""

from .graph import CovisibilityGraph, GraphOrigin, GraphSummary
from .recall import CovisibilityReport

__all__ = ["CovisibilityGraph", "CovisibilityReport", "GraphOrigin", "GraphSummary"]
