"""How frames hang together: components of a graph, and the hops between the frames farthest apart."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

EXACT_DIAMETER_FRAMES = 2000
SWEEP = 64  # frames from which one walk starts, one bit of a word each


def connected_components(rows: Tensor, columns: Tensor, num_frames: int) -> Tensor:
    """Return the smallest frame of each frame's component, `[S]` int64, edges `[E]` taken both ways.

    Parents are hooked to the smallest grandparent in sight and paths are shortened by pointer jumping, after FastSV
    (Zhang, Azad, Hu: "FastSV: a distributed-memory connected component algorithm with fast convergence", 2020).
    """
    ends = torch.cat([rows, columns]).to(torch.int64)
    other_ends = torch.cat([columns, rows]).to(torch.int64)
    parents = torch.arange(num_frames, device=rows.device)
    while True:
        grandparents = parents[parents]
        seen = grandparents[other_ends]
        hooked = parents.scatter_reduce(0, parents[ends], seen, "amin")
        hooked = torch.minimum(hooked.scatter_reduce(0, ends, seen, "amin"), grandparents)
        if torch.equal(hooked, parents):
            return parents
        parents = hooked


def hop_diameter(
    indptr: Tensor,  # [S + 1]
    indices: Tensor,  # [E]
) -> int:
    """Return the largest hop count within a component of a symmetric graph in compressed rows, on the CPU.

    Above `EXACT_DIAMETER_FRAMES` it is a lower bound, from two sweeps: from 64 frames spread over the graph to the
    frames reached last, and from those as far as it goes.
    """
    offsets, columns, frames = indptr.numpy().astype(np.int64), indices.numpy(), len(indptr) - 1
    if frames <= EXACT_DIAMETER_FRAMES:
        batches = np.split(np.arange(frames), range(SWEEP, frames, SWEEP))
        return max(_spread(offsets, columns, sources)[0] for sources in batches)
    spread_out = np.linspace(0, frames - 1, SWEEP).astype(np.int64)
    hops, reached_last = _spread(offsets, columns, spread_out)
    return max(hops, _spread(offsets, columns, reached_last[:SWEEP])[0])


def _spread(indptr: np.ndarray, indices: np.ndarray, sources: np.ndarray) -> tuple[int, np.ndarray]:
    """Walk breadth first from up to 64 frames at once, one bit each; return hops and the frames reached last."""
    num_frames = len(indptr) - 1
    fresh: np.ndarray = np.zeros(num_frames, dtype=np.uint64)
    fresh[sources] = np.uint64(1) << np.arange(len(sources), dtype=np.uint64)
    reached = fresh.copy()
    everywhere = np.bitwise_or.reduce(fresh)
    frontier, hops = np.sort(sources), 0
    while not (reached == everywhere).all():
        degrees = indptr[frontier + 1] - indptr[frontier]
        ends = degrees.cumsum()
        edges = np.arange(ends[-1]) + np.repeat(indptr[frontier] - ends + degrees, degrees)
        arrived = np.zeros(num_frames, dtype=np.uint64)
        np.bitwise_or.at(arrived, indices[edges], np.repeat(fresh[frontier], degrees))
        fresh = arrived & ~reached
        if not fresh.any():
            break
        reached |= fresh
        frontier, hops = fresh.nonzero()[0], hops + 1
    return hops, frontier
