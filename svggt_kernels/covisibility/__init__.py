"""Covisibility: which frames see which, and how to find out."""

from .colmap import from_colmap
from .evaluation import CovisibilityReport
from .graph import CovisibilityGraph, GraphOrigin, GraphSummary
from .megaloc import MegaLoc, MegaLocConfig
from .poses import from_poses

__all__ = [
    "CovisibilityGraph",
    "CovisibilityReport",
    "GraphOrigin",
    "GraphSummary",
    "MegaLoc",
    "MegaLocConfig",
    "from_colmap",
    "from_poses",
]
