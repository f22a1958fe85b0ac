"""Covisibility: which frames see which, and how to find out."""

from .graph import CovisibilityGraph, GraphOrigin, GraphSummary
from .megaloc import MegaLoc, MegaLocConfig

__all__ = ["CovisibilityGraph", "GraphOrigin", "GraphSummary", "MegaLoc", "MegaLocConfig"]
