"""Pictures are drawn for every kind of graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from tiers import every

from svggt_kernels import CovisibilityGraph
from svggt_kernels.measure import pictures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
PNG = b"\x89PNG"
FOUND = CovisibilityGraph.from_descriptors(torch.eye(6), neighbours=3)


@pytest.mark.parametrize(
    ("graph", "pairs"),
    [(FOUND, torch.tensor([[0, 1], [1, 0]])), (CovisibilityGraph.sequential(6, 1), None)],
    ids=["descriptors, truth", "sequential, plain"],
)
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
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is drawn."""
    drawn: list[Figure] = []
    png = pictures._png
    monkeypatch.setattr(pictures, "_png", lambda figure, dpi: drawn.append(figure) or png(figure, dpi))
    return drawn


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


@pytest.mark.parametrize("usetex", every(2, [True, False]))
def test_names_are_drawn_as_they_are(texts: list[str], usetex: bool):
    import matplotlib

    names = ["a$b^$.png", "$5 to $10.png", "caf\udce9.png", "写真.png", "50%_a.png", r"\frac{1}.png"]
    with matplotlib.rc_context({"text.usetex": usetex}):
        pictures.draw_neighbours(CovisibilityGraph.sequential(6, 0), torch.rand(6, 3, 20, 30), names)
        depth = torch.rand(6, 28, 28) + 1
        pictures.draw_comparison(torch.rand(6, 3, 28, 28), depth, depth, frames=names, title="t")
    for name in ("a$b^$.png", "$5 to $10.png", r"caf\udce9.png", "写真.png", "50%_a.png", r"\frac{1}.png"):
        assert texts.count(name) == 2


def test_a_picture_has_one_number_that_of_its_title(texts: list[str]):
    """What the frames that are drawn differ by is not said beside what all of them differ by."""
    dense = torch.ones(1, 28, 28)
    pictures.draw_comparison(torch.rand(1, 3, 28, 28), dense, 1.01 * dense, frames=["a"], title="1 % off")
    assert "sparse - dense" in texts
    assert "% of dense" in texts
    assert [text for text in texts if "1 %" in text] == ["1 % off"]


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


def test_depths_are_drawn_pixel_by_pixel_in_one_unit(figures: list[Figure]):
    truth = torch.rand(2, 28, 42) + 1
    truth[0, 0, 0] = 0  # not known
    depths = {"dense": 1.1 * truth, "core": truth + 0.5}
    content = pictures.draw_depths(torch.rand(2, 3, 28, 42), truth, depths, frames=["a", "b"], title="t", note="metres")
    assert content.startswith(PNG)
    rows = [axis for axis in figures[0].axes if axis.images][: 2 * 6]
    images = [[axis.images[0] for axis in rows[row * 6 : row * 6 + 6]] for row in (0, 1)]
    for row in (0, 1):
        known = truth[row] > 0
        shown = [torch.as_tensor(image.get_array().filled(0)) for image in images[row][1:]]
        for array, value in zip(shown, [truth, *depths.values()], strict=False):
            torch.testing.assert_close(array[known], value[row][known])
        torch.testing.assert_close(shown[4][known], torch.full_like(truth[row], 0.5)[known])
        assert {image.get_clim() for image in images[row][1:4]} == {images[0][1].get_clim()}
        assert {image.get_clim() for image in images[row][4:]} == {images[0][4].get_clim()}
    assert bool(images[0][1].get_array().mask[0, 0])


def test_a_floor_plan_shows_cameras_where_they_are_and_look(figures: list[Figure]):
    truth = torch.eye(4).repeat(3, 1, 1)
    truth[:, :3, 3] = torch.tensor([[1.0, 1, 1.5], [2, 1, 1.5], [3, 2, 1.5]])
    truth[:, :3, :3] = torch.tensor([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])  # looks along x
    predicted = truth.clone()
    predicted[2, 1, 3] += 0.5
    walls = torch.tensor([[[0.0, 0], [5, 0], [5, 0.1], [0, 0.1]]])
    plans = [pictures.Cameras("dense", truth), pictures.Cameras("core", predicted, [0, 2])]
    content = pictures.draw_floor_plan(walls, walls[:0], truth, plans, title="t", note="metres")
    assert content.startswith(PNG)
    for axis, plan in zip(figures[0].axes, plans, strict=True):
        true_arrows, arrows = (part for part in axis.collections if type(part).__name__ == "Quiver")
        for shown, poses in ((true_arrows, truth), (arrows, plan.poses)):
            torch.testing.assert_close(torch.as_tensor(shown.XY), poses[:, :2, 3], check_dtype=False)
            assert shown.U.tolist() == [1, 1, 1] and shown.V.tolist() == [0, 0, 0]
    marked = figures[0].axes[1].collections[-1].get_offsets()
    torch.testing.assert_close(torch.as_tensor(marked.data), predicted[[0, 2], :2, 3], check_dtype=False)
