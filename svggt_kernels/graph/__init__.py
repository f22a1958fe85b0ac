"""Covisibility graphs: which frames see which."""

from .closed import ClosedCore, closed_core
from .coarse import AnyGraph, CoarseGraph, united
from .descriptors import GraphOrigin
from .graph import CovisibilityGraph
from .recall import CovisibilityReport
from .summary import GraphSummary

__all__ = [
    "AnyGraph",
    "ClosedCore",
    "CoarseGraph",
    "CovisibilityGraph",
    "CovisibilityReport",
    "GraphOrigin",
    "GraphSummary",
    "closed_core",
    "united",
]
