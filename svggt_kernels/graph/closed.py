"""Which graphs are those of a closed core: what is computed in chunks, core first, needs one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .coarse import AnyGraph, CoarseGraph
from .graph import CovisibilityGraph


@dataclass(frozen=True, eq=False)
class ClosedCore:
    """The frames that every frame of a graph sees beside itself, and that see one another alone.

    Attributes:
        core: Those that are seen in full, in the order of the images, `[K]` int64.
        coarse: Those that are seen at a stride, `[n]` int64.
        stride: That stride; 1 where there are none.
    """

    core: Tensor
    coarse: Tensor
    stride: int

    @property
    def count(self) -> int:
        """All of them."""
        return len(self.core) + len(self.coarse)


def closed_core(graph: AnyGraph) -> ClosedCore | None:
    """Return the closed core of a graph; None if it has none, or some frame sees more than that and itself.

    Reads a graph from its device.
    """
    frames = graph.num_frames
    if not isinstance(graph, CoarseGraph):
        core = graph.core_frames
        if core is None or not _same(graph, CovisibilityGraph.core(frames, core)):
            return None
        return ClosedCore(core.sort().values, core[:0], 1)
    core = graph.full.core_frames
    if core is None:
        return None
    whole = CoarseGraph.core(frames, core, graph.frames, stride=graph.stride)
    if not (_same(graph.full, whole.full) and _same(graph.coarse, whole.coarse)):
        return None
    return ClosedCore(core.sort().values, graph.frames, graph.stride)


def _same(one: CovisibilityGraph, other: CovisibilityGraph) -> bool:
    return torch.equal(one.indptr, other.indptr) and torch.equal(one.indices, other.indices)
