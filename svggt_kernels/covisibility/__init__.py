"""Covisibility: which frames see which, and how to find out."""

from svggt_kernels.covisibility.graph import CovisibilityGraph, GraphSummary

__all__ = ["CovisibilityGraph", "GraphSummary"]
