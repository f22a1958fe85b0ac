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
    full = graph.full if isinstance(graph, CoarseGraph) else graph
    core = _seen_by_all(full) if full.core_frames is None else full.core_frames.sort().values
    if not len(core):
        return None
    if not isinstance(graph, CoarseGraph):
        is_closed = _same(graph, CovisibilityGraph.core(graph.num_frames, core))
        return ClosedCore(core, core[:0], 1) if is_closed else None
    whole = CoarseGraph.core(graph.num_frames, core, graph.frames, stride=graph.stride)
    is_closed = _same(full, whole.full) and _same(graph.coarse, whole.coarse)
    return ClosedCore(core, graph.frames, graph.stride) if is_closed else None


def _seen_by_all(graph: CovisibilityGraph) -> Tensor:
    """Return the frames that every frame sees, `[K]` int64: those of the core, where the graph has one."""
    return (torch.bincount(graph.indices, minlength=graph.num_frames) == graph.num_frames).nonzero()[:, 0]


def _same(one: CovisibilityGraph, other: CovisibilityGraph) -> bool:
    return torch.equal(one.indptr, other.indptr) and torch.equal(one.indices, other.indices)
