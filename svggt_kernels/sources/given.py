"""Graphs that were made before the model is called: of poses, of COLMAP, of pairs that are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..graph import AnyGraph, CoarseGraph, CovisibilityGraph
from .base import Scene


@dataclass(frozen=True, eq=False)
class GivenGraphs:
    """One graph for all samples, or one for each.

    Attributes:
        graphs: Over the frames in the order of the images.
    """

    graphs: tuple[AnyGraph, ...]

    needs: ClassVar[Literal["nothing"]] = "nothing"

    @classmethod
    def of(cls, what: str, graphs: object, others: str = "") -> GivenGraphs:
        """Take one graph or a list of them.

        Args:
            what: What messages call them.
            graphs: The graphs.
            others: What it may be besides, for messages.

        Raises:
            TypeError: If they are anything else.
        """
        if isinstance(graphs, CovisibilityGraph | CoarseGraph):
            return cls((graphs,))
        kinds = (CovisibilityGraph, CoarseGraph)
        if isinstance(graphs, Sequence) and graphs and all(isinstance(graph, kinds) for graph in graphs):
            return cls(tuple(graphs))
        raise TypeError(
            f"{what} must be a CovisibilityGraph, a CoarseGraph or a list of one per sample{others}, got "
            f"{type(graphs).__name__}; a boolean matrix becomes a graph with CovisibilityGraph.from_dense, the frames "
            "of a core with CovisibilityGraph.core"
        )

    @property
    def label(self) -> str:
        """How the graph is made, in words."""
        return "a given graph" if len(self.graphs) == 1 else f"{len(self.graphs)} given graphs"

    @property
    def num_frames(self) -> int:
        """Frames of each graph."""
        return self.graphs[0].num_frames

    def coarse_frames(self, num_frames: int) -> tuple[int, int]:
        """Return how many of so many frames are seen at a stride in one graph at most, and the least stride."""
        coarse = [graph for graph in self.graphs if isinstance(graph, CoarseGraph)]
        return max((len(graph.frames) for graph in coarse), default=0), min((g.stride for g in coarse), default=1)

    def graph(self, scene: Scene) -> AnyGraph:
        """Return the graph of a scene.

        Raises:
            ValueError: If there are several graphs, and not one for each sample.
        """
        sample, samples = scene.sample
        if len(self.graphs) not in (1, samples):
            raise ValueError(
                f"covisibility must give one graph, or one for each of {samples} samples, got {len(self.graphs)}"
            )
        return self.graphs[sample % len(self.graphs)]
