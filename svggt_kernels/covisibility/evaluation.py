"""How good a graph is when it is known which frames share a view."""

from __future__ import annotations

import torch
from torch import Tensor

from svggt_kernels.covisibility.graph import CovisibilityGraph


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
    if pairs.ndim != 2 or pairs.shape[1] != 2 or len(pairs) == 0:
        raise ValueError(f"pairs must be [E, 2] with at least one pair, got shape {tuple(pairs.shape)}")
    limits = pairs.new_tensor([graph.num_frames, graph.num_key_frames])
    if bool(((pairs < 0) | (pairs >= limits)).any()):
        raise ValueError(
            f"pairs must be of {graph.num_frames} query frames and {graph.num_key_frames} key frames, counted from 0"
        )
    edges = graph.rows.long() * graph.num_key_frames + graph.indices
    wanted = pairs.to(edges.device, torch.int64)
    return float(torch.isin(wanted[:, 0] * graph.num_key_frames + wanted[:, 1], edges).double().mean())


def chance_recall(graph: CovisibilityGraph) -> float:
    """Return the recall of pairs of different frames to expect of a graph with as many edges, drawn at random.

    Args:
        graph: A square graph with its diagonal.
    """
    others = graph.num_frames * (graph.num_frames - 1)
    return (graph.num_edges - graph.num_frames) / others if others else 1.0
