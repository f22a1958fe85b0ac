"""Which graphs are those of a closed core."""

from __future__ import annotations

import pytest
import torch

from svggt_kernels.graph import AnyGraph, CoarseGraph, CovisibilityGraph, closed_core

CORE = CovisibilityGraph.core(6, [4, 0])
AT_A_STRIDE = CoarseGraph.core(6, [4, 0], [5, 2], stride=2)


def seen_coarsely(pairs: list[tuple[int, int]]) -> CoarseGraph:
    return CoarseGraph.from_graphs(CORE, CovisibilityGraph.from_pairs(6, torch.tensor(pairs)), stride=2)


@pytest.mark.parametrize(("graph", "coarse", "stride"), [(CORE, [], 1), (AT_A_STRIDE, [2, 5], 2)])
def test_frames_of_a_closed_core_in_their_order(graph: AnyGraph, coarse: list[int], stride: int):
    closed = closed_core(graph)
    assert closed is not None
    assert (closed.core.tolist(), closed.coarse.tolist(), closed.stride) == ([0, 4], coarse, stride)
    assert closed.count == 2 + len(coarse)


def test_a_closed_core_is_known_by_its_edges():
    by_edges = CovisibilityGraph.from_dense(CORE.to_dense())
    assert by_edges.core_frames is None
    closed = closed_core(by_edges)
    assert closed is not None
    assert closed.core.tolist() == [0, 4]


@pytest.mark.parametrize(
    "graph",
    [
        CovisibilityGraph.sequential(6, 1),
        CovisibilityGraph.sequential(3, 1),
        CovisibilityGraph.core(6, [4, 0], nearest=[[2]] * 6),
        CoarseGraph.core(6, [4, 0], [5, 2], stride=2, nearest=[[1]] * 6),
        seen_coarsely([(frame, 2) for frame in range(5)]),  # frame 5 does not see it
        seen_coarsely([(1, 2), (3, 5)]),
        CoarseGraph(CovisibilityGraph.sequential(6, 1), AT_A_STRIDE.coarse, AT_A_STRIDE.frames, 2),
    ],
    ids=[
        "none",
        "one frame that all see",
        "nearest",
        "nearest beside a stride",
        "some see",
        "others see",
        "only at a stride",
    ],
)
def test_where_some_see_more_or_less_there_is_none(graph: AnyGraph):
    assert closed_core(graph) is None
