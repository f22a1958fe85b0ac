"""Graphs as named arrays of NumPy, for files."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from .graph import CovisibilityGraph


def as_arrays(graph: CovisibilityGraph) -> dict[str, np.ndarray]:
    """Return indptr `[S + 1]` and indices `[E]`, int32, of a square graph, and core `[K]`, int64, empty if none."""
    core = graph.core_frames
    return {
        "indptr": graph.indptr.cpu().numpy(),
        "indices": graph.indices.cpu().numpy(),
        "core": np.zeros(0, np.int64) if core is None else core.cpu().numpy(),
    }


def from_arrays(arrays: Mapping[str, np.ndarray]) -> CovisibilityGraph:
    """Return the graph that `as_arrays` made arrays of.

    Raises:
        KeyError: An array is missing.
        ValueError: They are not those of a graph, or the edges are not those of the core.
        TypeError: They are of another type.
    """
    indptr, indices, core = (torch.from_numpy(np.array(arrays[name])) for name in ("indptr", "indices", "core"))
    graph = CovisibilityGraph(indptr, indices, len(indptr) - 1)
    if not len(core):
        return graph
    least = CovisibilityGraph.core(graph.num_frames, core)
    edges, needed = (one.rows.long() * graph.num_frames + one.indices for one in (graph, least))
    if not torch.isin(needed, edges).all() or (graph.indptr.diff()[core] != len(core)).any():
        raise ValueError(
            f"every frame must see itself and the core {core.tolist()}, and its frames the core alone, and some do not"
        )
    return graph.with_core(core)
