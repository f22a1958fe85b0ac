"""Covisibility: which frames see which, and how to find out."""

from .graph import CovisibilityGraph, GraphSummary

__all__ = ["CovisibilityGraph", "GraphSummary"]
