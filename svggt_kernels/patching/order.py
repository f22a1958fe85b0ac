"""The order in which a model holds its frames, and graphs in that order."""

from __future__ import annotations

from collections import defaultdict, deque

import torch
from torch import Tensor

from ..graph import AnyGraph, CoarseGraph, CovisibilityGraph

Order = tuple[int, ...] | None
"""Which image lies at each place inside the model; None if it keeps the order of the images."""


def in_order(
    graph: AnyGraph,
    order: Order,
) -> AnyGraph:
    """Return the graph over frames in another order, in which place p holds frame `order[p]`.

    None stands for the order that the graph has, and returns the graph itself.
    """
    if order is None:
        return graph
    place = inverse(order)
    places = torch.tensor(place, device=graph.device)
    if isinstance(graph, CoarseGraph):
        full, coarse = _moved(graph.full, places, places), _moved(graph.coarse, places, None)
        return CoarseGraph(full, coarse, places[graph.frames], graph.stride)
    return _moved(graph, places, places)


def _moved(
    graph: CovisibilityGraph,
    rows: Tensor,  # [S]
    columns: Tensor | None,  # [Sk]
) -> CovisibilityGraph:
    """Return the graph with its rows, and its columns if they move, at other places."""
    indices = graph.indices.long()
    moved = CovisibilityGraph.from_pairs(
        graph.num_frames,
        torch.stack([rows[graph.rows.long()], indices if columns is None else columns[indices]], dim=1),
        num_key_frames=graph.num_key_frames,
    )
    return moved.with_core(None if graph.core_frames is None else rows[graph.core_frames])


def as_images_lie(
    frames: Tensor,  # [S, ...]
    order: Order,
) -> Tensor:
    """Return frames, of which place p holds image `order[p]`, in the order of the images."""
    return frames if order is None else frames[list(inverse(order))]


def inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    """Return the place of each frame in `order`."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def earlier_frames_only(graph: AnyGraph) -> CovisibilityGraph:
    """Return the graph without the edges from a frame to a later one.

    Raises:
        ValueError: If frames are seen coarsely.
    """
    if isinstance(graph, CoarseGraph):
        raise ValueError(
            "frames of a causal model must be seen in full, got a CoarseGraph; use a CovisibilityGraph, such as its "
            "`full`, or a Core without `coarse`"
        )
    keep = graph.indices <= graph.rows
    pairs = torch.stack([graph.rows[keep], graph.indices[keep]], dim=1)
    return CovisibilityGraph.from_pairs(graph.num_frames, pairs, num_key_frames=graph.num_key_frames)


def frame_order(
    before: Tensor,  # [S, K]
    after: Tensor,  # [S, K]
) -> Order:
    """Return the order into which a model put its frames, read off samples of their tokens; None if it kept theirs.

    Where samples are equal bit for bit (one photo given twice), several orders fit. Then one frame was moved to the
    front and the rest stayed in order, if that fits; else equal frames are taken in the order in which they came.

    Args:
        before: Some values of each frame's tokens.
        after: The same values of the same tokens after the frames were reordered.

    Raises:
        RuntimeError: If the frames after are not those before in another order.
    """
    kept, moved = _bits(before), _bits(after)
    try:
        order = _one_to_the_front(kept, moved) or _as_they_came(kept, moved)
    except IndexError:
        raise RuntimeError(
            "the order of the frames inside the model could not be read: the tokens after it reorders its frames are "
            "not the tokens before in another order. This version of the model does more there than is known; "
            'use covisibility="patches", which needs no order'
        ) from None
    return None if order == tuple(range(len(order))) else order


def _one_to_the_front(before: list[bytes], after: list[bytes]) -> tuple[int, ...] | None:
    for front, values in enumerate(before):
        order = (front, *(frame for frame in range(len(before)) if frame != front))
        if values == after[0] and [before[frame] for frame in order] == after:
            return order
    return None


def _as_they_came(before: list[bytes], after: list[bytes]) -> tuple[int, ...]:
    places: defaultdict[bytes, deque[int]] = defaultdict(deque)
    for frame, values in enumerate(before):
        places[values].append(frame)
    return tuple(places[values].popleft() for values in after)


def _bits(samples: Tensor) -> list[bytes]:
    return [row.tobytes() for row in samples.cpu().to(torch.float64).numpy()]
