"""Pictures are drawn for every kind of graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from svggt_kernels import CovisibilityGraph
from svggt_kernels.measure import pictures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
PNG = b"\x89PNG"
FOUND = CovisibilityGraph.from_descriptors(torch.eye(6), neighbours=3)


@pytest.mark.parametrize("pairs", [None, torch.tensor([[0, 1], [1, 0]])], ids=["plain", "truth"])
@pytest.mark.parametrize("graph", [FOUND, CovisibilityGraph.sequential(6, 1)], ids=["descriptors", "sequential"])
def test_neighbours(graph: CovisibilityGraph, pairs: torch.Tensor | None):
    names = [f"{i}.jpg" for i in range(6)]
    assert pictures.draw_neighbours(graph, torch.rand(6, 3, 20, 30), names, pairs).startswith(PNG)


def test_the_most_similar_neighbours_come_first():
    angles = torch.deg2rad(torch.tensor([0.0, 40.0, 10.0, 30.0, 90.0]))
    graph = CovisibilityGraph.from_descriptors(torch.stack([angles.cos(), angles.sin()], dim=1), neighbours=3)
    assert pictures._neighbours(graph, 0) == [2, 3, 1]
    assert pictures._neighbours(graph, 3) == [1, 2, 0]


def test_without_similarity_the_nearest_in_order_come_first():
    graph = CovisibilityGraph.sequential(30, 12)
    assert pictures._neighbours(graph, 29) == list(range(28, 16, -1))
    assert pictures._neighbours(graph, 5)[:4] == [4, 6, 3, 7]


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text of the pictures that are drawn."""
    from matplotlib.text import Text

    drawn: list[str] = []
    png = pictures._png

    def noted(figure: Figure, dpi: int) -> bytes:
        content = png(figure, dpi)
        drawn.extend(text.get_text() for text in figure.findobj(Text))
        return content

    monkeypatch.setattr(pictures, "_png", noted)
    return drawn


def test_what_does_not_fit_into_a_row_is_counted(texts: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pictures, "MOSAIC_ROWS", 2)
    monkeypatch.setattr(pictures, "MOSAIC_COLUMNS", 3)
    graph = CovisibilityGraph.sequential(14, 11)
    pictures.draw_neighbours(graph, torch.rand(14, 3, 20, 30), [f"{i}.jpg" for i in range(14)])
    assert texts.count("+8 more") == 2
    assert [name for name in texts if name.endswith(".jpg")] == [f"{i}.jpg" for i in (0, 1, 2, 3, 13, 12, 11, 10)]


@pytest.mark.parametrize("usetex", [False, True])
def test_names_are_drawn_as_they_are(texts: list[str], usetex: bool):
    import matplotlib

    names = ["a$b^$.png", "$5 to $10.png", "caf\udce9.png", "写真.png", "50%_a.png", r"\frac{1}.png"]
    with matplotlib.rc_context({"text.usetex": usetex}):
        pictures.draw_neighbours(CovisibilityGraph.sequential(6, 0), torch.rand(6, 3, 20, 30), names)
        depth = torch.rand(6, 28, 28) + 1
        pictures.draw_comparison(torch.rand(6, 3, 28, 28), depth, depth, frames=names, title="t")
    for name in ("a$b^$.png", "$5 to $10.png", r"caf\udce9.png", "写真.png", "50%_a.png", r"\frac{1}.png"):
        assert texts.count(name) == 2


def test_the_error_that_is_drawn_is_named(texts: list[str]):
    dense = torch.ones(1, 28, 28)
    pictures.draw_comparison(torch.rand(1, 3, 28, 28), dense, 1.01 * dense, frames=["a"], title="t")
    assert "sparse - dense" in texts
    assert "% of dense; relative L2 here 1 %" in texts


@pytest.mark.parametrize("value", [1.0, torch.nan], ids=["constant", "nan"])
def test_depth_without_a_range_is_drawn(value: float):
    depth = torch.full((1, 28, 28), value)
    content = pictures.draw_comparison(torch.rand(1, 3, 28, 28), depth, depth, frames=["a"], title="t")
    assert content.startswith(PNG)


def test_photos_of_any_shape_are_drawn():
    graph = CovisibilityGraph.sequential(2, 0)
    assert pictures.draw_neighbours(graph, torch.rand(2, 3, 2, 600), ["a", "b"]).startswith(PNG)


def test_a_graph_states_what_its_density_is_over(texts: list[str]):
    pictures.draw_graph(CovisibilityGraph.sequential(4, 0), "4 frames")
    assert "4 frames: density 25 % over frames" in texts
