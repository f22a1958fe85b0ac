"""Pictures are drawn for every kind of graph."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from svggt_kernels import CovisibilityGraph
from svggt_kernels.cli import pictures

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
FOUND = CovisibilityGraph.from_descriptors(torch.eye(6), neighbours=3)


@pytest.mark.parametrize("pairs", [None, torch.tensor([[0, 1], [1, 0]])], ids=["plain", "truth"])
@pytest.mark.parametrize("graph", [FOUND, CovisibilityGraph.sequential(6, 1)], ids=["descriptors", "sequential"])
def test_neighbours(tmp_path: Path, graph: CovisibilityGraph, pairs: torch.Tensor | None):
    names = [f"{i}.jpg" for i in range(6)]
    pictures.draw_neighbours(tmp_path / "n.png", graph, torch.rand(6, 3, 20, 30), names, pairs)
    assert (tmp_path / "n.png").read_bytes().startswith(b"\x89PNG")


def test_neighbours_are_the_most_similar_where_they_are_known():
    descriptors = torch.eye(3).repeat_interleave(4, 0) + 0.1 * torch.rand(12, 3)
    graph = CovisibilityGraph.from_descriptors(descriptors, neighbours=3)
    assert pictures._neighbours(graph, 5) == [4, 6, 7]
    assert pictures._neighbours(CovisibilityGraph.sequential(9, 1), 5) == [4, 6]
