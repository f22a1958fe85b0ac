"""How good a graph is: what its own structure says, and what it keeps where it is known which frames share a view."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .graph import CovisibilityGraph
from .summary import GraphSummary


@dataclass(frozen=True)
class CovisibilityReport:
    """Whether a graph is any good; `str` gives it in a few lines, warnings last.

    Attributes:
        summary: Size, density, components, degrees, and warnings: too dense to gain, parts that had to be bridged,
            frames with few real neighbours.
        true_pairs: Pairs known to share a view; None if none are known, and then so are the next three.
        recall: Share of the true pairs that the graph keeps: what it lacks costs accuracy.
        precision: Share of the graph's pairs of different frames that are true: what it has in vain costs time.
        chance: Recall to expect of as many edges drawn at random.
    """

    summary: GraphSummary
    true_pairs: int | None = None
    recall: float | None = None
    precision: float | None = None
    chance: float | None = None

    @classmethod
    def of(
        cls,
        graph: CovisibilityGraph,
        pairs: Tensor | None = None,  # [E, 2]
    ) -> CovisibilityReport:
        """Judge a graph.

        Args:
            graph: A square graph.
            pairs: Pairs (query frame, key frame) that share a view, as `edge_recall` takes them.

        Raises:
            ValueError: If there is no pair, or a pair is out of range.
        """
        if pairs is None:
            return cls(graph.summary())
        return cls(
            graph.summary(), len(pairs), edge_recall(graph, pairs), edge_precision(graph, pairs), chance_recall(graph)
        )

    def __str__(self) -> str:
        if self.true_pairs is None:
            return str(self.summary)
        precision = "no pair of different frames" if self.precision is None else f"{self.precision:.3f}"
        return (
            f"{self.summary}\nof {self.true_pairs} true pairs: recall {self.recall:.3f} (by chance {self.chance:.3f}), "
            f"precision {precision}"
        )


def edge_recall(
    graph: CovisibilityGraph,
    pairs: Tensor,  # [E, 2]
) -> float:
    """Return the share of the given pairs that the graph keeps.

    Read it together with `graph.density`: a pair that the graph lacks costs accuracy, one that it has in vain costs
    time, and the full graph has a recall of 1.

    Args:
        graph: Who sees whom.
        pairs: Pairs (query frame, key frame) that do share a view, `[E, 2]` integers; list both directions if both
            count.

    Raises:
        ValueError: If there is no pair, or a pair is out of range.
    """
    edges, wanted = _codes(graph, pairs)
    return float(torch.isin(wanted, edges).double().mean())


def edge_precision(
    graph: CovisibilityGraph,
    pairs: Tensor,  # [E, 2]
) -> float | None:
    """Return the share of the graph's pairs of different frames that are among the given pairs; None if it has none.

    Args:
        graph: Who sees whom.
        pairs: All pairs that share a view, as `edge_recall` takes them.

    Raises:
        ValueError: If there is no pair, or a pair is out of range.
    """
    edges, wanted = _codes(graph, pairs)
    edges = edges[graph.rows != graph.indices]
    return float(torch.isin(edges, wanted).double().mean()) if len(edges) else None


def chance_recall(graph: CovisibilityGraph) -> float:
    """Return the recall of pairs of different frames to expect of a graph with as many edges, drawn at random.

    Args:
        graph: A square graph with its diagonal.
    """
    others = graph.num_frames * (graph.num_frames - 1)
    return (graph.num_edges - graph.num_frames) / others if others else 1.0


def _codes(graph: CovisibilityGraph, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """The graph's edges and the pairs, each as one number per pair."""
    if pairs.ndim != 2 or pairs.shape[1] != 2 or len(pairs) == 0:
        raise ValueError(f"pairs must be [E, 2] with at least one pair, got shape {tuple(pairs.shape)}")
    limits = pairs.new_tensor([graph.num_frames, graph.num_key_frames])
    if bool(((pairs < 0) | (pairs >= limits)).any()):
        raise ValueError(
            f"pairs must be of {graph.num_frames} query frames and {graph.num_key_frames} key frames, counted from 0"
        )
    edges = graph.rows.long() * graph.num_key_frames + graph.indices
    wanted = pairs.to(edges.device, torch.int64)
    return edges, wanted[:, 0] * graph.num_key_frames + wanted[:, 1]
