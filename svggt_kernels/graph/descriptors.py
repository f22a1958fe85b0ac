"""The edges of a graph from one descriptor per frame; see `CovisibilityGraph.from_descriptors` for the steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .arguments import moved
from .connectivity import connected_components
from .neighbours import FrameSimilarity

REAL_NEIGHBOURS = 2


@dataclass(frozen=True, eq=False)
class GraphOrigin:
    """Which edges of a graph from descriptors were found, and which were added to hold it together.

    Attributes:
        nearest: The frames most similar to each frame, the most similar first, `[S, k]` int64.
        bridges: Pairs that join parts which neighbours and known pairs leave, `[n, 2]` int64.
    """

    nearest: Tensor  # [S, k] int64
    bridges: Tensor  # [n, 2] int64

    def to(self, device: torch.device | str) -> GraphOrigin:
        """Return the same on another device."""
        return GraphOrigin(moved(self.nearest, device), moved(self.bridges, device))

    def lonely(self) -> tuple[int, ...]:
        """Return the frames with fewer than 2 real neighbours, nearest to each other; none where so few exist."""
        nearest = self.nearest.cpu()
        frames, count = nearest.shape
        everyone = torch.arange(frames, device="cpu")[:, None]
        ahead, back = everyone * frames + nearest, nearest * frames + everyone
        mutual = torch.isin(ahead, back).sum(dim=1)
        return tuple((mutual < min(REAL_NEIGHBOURS, count)).nonzero().flatten().tolist())


def edges_from_descriptors(
    descriptors: Tensor,  # [S, C]
    known: Tensor,  # [n, 2]
    *,
    neighbours: int,
    reference_frame: int | None,
    anchors: int,
    bridge: bool,
    chunk: int,
) -> tuple[Tensor, GraphOrigin]:
    """Return the edges `[E, 2]` int64 in any order, repeats among them, and how they were found.

    Args:
        descriptors: One per frame.
        known: Edges that are there already; what they join needs no bridge.
        neighbours: Most similar frames that each frame sees, at most S - 1.
        reference_frame: A frame dense both ways, or None.
        anchors: Frames that every frame sees, beside the reference frame.
        bridge: Whether to join the components.
        chunk: Frames on each side of a tile of scores.
    """
    similarity = FrameSimilarity.from_descriptors(descriptors, chunk)
    frames, everyone = similarity.num_frames, torch.arange(similarity.num_frames, device=similarity.device)
    nearest = similarity.nearest(neighbours)
    found = torch.stack([everyone.repeat_interleave(neighbours), nearest.flatten()], dim=1)
    edges = torch.cat([known.to(found), found, found.flip(1)])
    bridges = found.new_empty((0, 2))
    if bridge:
        bridges = similarity.bridges(connected_components(edges[:, 0], edges[:, 1], frames))
    if reference_frame is None:
        seen_by_all = similarity.farthest_points(0, anchors)
        seeing_all = seen_by_all[:0]
    else:
        seen_by_all = similarity.farthest_points(reference_frame, min(anchors + 1, frames))
        seeing_all = seen_by_all[:1]
    stars = (torch.cartesian_prod(everyone, seen_by_all), torch.cartesian_prod(seeing_all, everyone))
    return torch.cat([edges, bridges, bridges.flip(1), *stars]), GraphOrigin(nearest, bridges)
