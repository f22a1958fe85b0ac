"""Graphs that are written are read again as they were, by the names of photos, and graphs of others become ours."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from svggt_kernels import Core, CovisibilityGraph, patch
from svggt_kernels.demo.model import RoomsModel
from svggt_kernels.sources import GraphFile, Scene, from_poses, graph_bytes, hloc_pairs, read_graph

NAMES = [f"{place}.png" for place in range(5)]
PHOTOS = [Path("scene/images") / name for name in NAMES]
GRAPHS = {
    "random": CovisibilityGraph.from_dense(
        torch.rand(5, 5, generator=torch.Generator().manual_seed(0)) > 0.5, square=True
    ),
    "core": CovisibilityGraph.core(5, [3, 1]),
    "nearest": CovisibilityGraph.core(5, [3, 1], nearest=[[2], [2], [0], [0], [2]]),
}


def star(graph: CovisibilityGraph) -> torch.Tensor:
    joined = graph.to_dense()
    joined[0] = joined[:, 0] = True
    return joined


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
class TestArrays:
    def written(self, folder: Path, graph: CovisibilityGraph, names: list[str] | None) -> Path:
        (folder / "graph.npz").write_bytes(graph_bytes(graph, names))
        return folder / "graph.npz"

    def test_a_graph_is_read_as_it_was(self, graph: CovisibilityGraph, tmp_path: Path) -> None:
        again = read_graph(self.written(tmp_path, graph, NAMES), PHOTOS)
        assert torch.equal(again.to_dense(), graph.to_dense())
        assert (again.core_frames is None) == (graph.core_frames is None)
        if graph.core_frames is not None:
            assert torch.equal(again.core_frames, graph.core_frames)

    def test_frames_are_told_by_name(self, graph: CovisibilityGraph, tmp_path: Path) -> None:
        order = torch.tensor([4, 2, 0, 1, 3])
        again = read_graph(self.written(tmp_path, graph, NAMES), [PHOTOS[place] for place in order])
        assert torch.equal(again.to_dense(), graph.to_dense()[order][:, order])
        if graph.core_frames is not None:
            assert torch.equal(order[again.core_frames], graph.core_frames)

    def test_without_names_by_order(self, graph: CovisibilityGraph, tmp_path: Path) -> None:
        file = self.written(tmp_path, graph, None)
        assert torch.equal(read_graph(file, PHOTOS).to_dense(), graph.to_dense())
        assert torch.equal(read_graph(file).to_dense(), graph.to_dense())
        with pytest.raises(ValueError, match="a graph over 5 frames without names, but there are 4 photos"):
            read_graph(file, PHOTOS[:4])

    def test_a_photo_that_is_not_known_sees_itself(self, graph: CovisibilityGraph, tmp_path: Path) -> None:
        file = self.written(tmp_path, graph, NAMES)
        with pytest.warns(UserWarning, match=r"does not know 1 of the 4 images \(scene/images/other.png\)"):
            again = read_graph(file, [*PHOTOS[1:4], Path("scene/images/other.png")])
        expected = torch.eye(4, dtype=torch.bool)
        expected[:3, :3] = graph.to_dense()[1:4, 1:4]
        assert torch.equal(again.to_dense(), expected)
        assert again.core_frames is None

    def test_it_is_taken_as_it_is(self, graph: CovisibilityGraph, tmp_path: Path) -> None:
        source = GraphFile(self.written(tmp_path, graph, NAMES)).of(PHOTOS).opened()
        assert torch.equal(source.graph(Scene(5, reference_frame=0)).to_dense(), graph.to_dense())
        with pytest.raises(ValueError, match="a graph over 5 frames, but there are 6"):
            source.graph(Scene(6, reference_frame=0))


def test_a_core_that_the_edges_are_not_of_is_refused(tmp_path: Path):
    graph = GRAPHS["random"].with_core(torch.tensor([0, 1]))
    (tmp_path / "graph.npz").write_bytes(graph_bytes(graph, NAMES))
    with pytest.raises(ValueError, match=r"must see itself and the core \[0, 1\]"):
        read_graph(tmp_path / "graph.npz", PHOTOS)


@pytest.mark.parametrize("content", [b"no archive", graph_bytes(GRAPHS["core"], NAMES)[:-40]], ids=["text", "cut"])
def test_a_damaged_graph_is_refused(content: bytes, tmp_path: Path):
    (tmp_path / "graph.npz").write_bytes(content)
    with pytest.raises(ValueError, match="must be a graph as `layout` writes it, or a saved reconstruction, and is"):
        read_graph(tmp_path / "graph.npz", PHOTOS)


def test_pairs_of_hloc_go_both_ways(tmp_path: Path):
    graph = GRAPHS["random"].symmetrized()
    (tmp_path / "pairs.txt").write_text(hloc_pairs(graph, NAMES))
    assert len((tmp_path / "pairs.txt").read_text().splitlines()) == (graph.num_edges - 5) / 2
    assert torch.equal(read_graph(tmp_path / "pairs.txt", PHOTOS).to_dense(), graph.to_dense())


def test_pairs_as_hloc_writes_them(tmp_path: Path):
    """Names are relative to the folder of the images, and a pair may stand there both ways."""
    file = tmp_path / "pairs-netvlad.txt"
    file.write_text("images/0.png images/1.png\nimages/1.png images/0.png\nimages/3.png images/1.png\n\n")
    photos = PHOTOS[:2] + PHOTOS[3:4]
    expected = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]], dtype=torch.bool)
    assert torch.equal(read_graph(file, photos).to_dense(), expected)
    source = GraphFile(file).of(photos).opened()
    assert torch.equal(source.graph(Scene(3, reference_frame=0)).to_dense(), star(read_graph(file, photos)))
    assert torch.equal(source.graph(Scene(3)).to_dense(), expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "and holds no line"),
        ("0.png 1.png 0.5\n", "pair 1 is '0.png 1.png 0.5'"),
        ("0.png\n", "pair 1 is '0.png'"),
        ("a.png b.png\n", "knows none of the 5 images"),
        ("0 1 2 3 0 0 0 1\n", "a trajectory, which tells no fields of view"),
    ],
)
def test_other_texts_are_refused(content: str, message: str, tmp_path: Path):
    (tmp_path / "pairs.txt").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_graph(tmp_path / "pairs.txt", PHOTOS)


def test_names_with_spaces_are_no_pairs():
    with pytest.raises(ValueError, match=r"must hold no white space, got 'my photo\.png'; rename the photos"):
        hloc_pairs(CovisibilityGraph.all_visible(2), ["my photo.png", "b.png"])


class TestTransforms:
    POSES = torch.eye(4, dtype=torch.float64).repeat(5, 1, 1)
    for place in range(5):
        POSES[place, 0, 3] = 0.8 * place
    FOCAL, SIZE = 100.0, (80, 60)

    def written(self, folder: Path, **shared: object) -> Path:
        frames = []
        for name, pose in zip(NAMES, self.POSES, strict=True):
            matrix = (pose * torch.tensor([1.0, -1, -1, 1])).tolist()
            frames.append({"file_path": f"images/{name}", "transform_matrix": matrix})
        width, height = self.SIZE
        camera = {"fl_x": self.FOCAL, "fl_y": self.FOCAL, "cx": width / 2, "cy": height / 2, "w": width, "h": height}
        (folder / "transforms.json").write_text(json.dumps({**camera, **shared, "frames": frames}))
        return folder / "transforms.json"

    def test_photos_that_look_at_the_same_see_each_other(self, tmp_path: Path) -> None:
        intrinsics = torch.tensor([[self.FOCAL, 0, 40], [0, self.FOCAL, 30], [0, 0, 1]], dtype=torch.float64)
        expected = from_poses(self.POSES, intrinsics, (1, 4), (60, 80)).to_dense()
        assert 5 < expected.sum() < 25
        file = self.written(tmp_path)
        graph = read_graph(file, PHOTOS[::-1], depth_range=(1, 4))
        assert torch.equal(graph.to_dense(), expected.flip(0, 1))
        source = GraphFile(file, depth_range=(1, 4)).of(PHOTOS).opened()
        assert torch.equal(
            source.graph(Scene(5, reference_frame=0)).to_dense(), star(read_graph(file, PHOTOS, depth_range=(1, 4)))
        )

    def test_poses_without_a_range_or_intrinsics_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"tells where cameras look, but not how far; .*--depth-range NEAR FAR"):
            read_graph(self.written(tmp_path), PHOTOS)
        file = self.written(tmp_path, fl_x=None)
        with pytest.raises(ValueError, match="must have transform_matrix, fl_x"):
            read_graph(file, PHOTOS, depth_range=(1, 4))
        with pytest.raises(ValueError, match="near, far"):
            read_graph(self.written(tmp_path), PHOTOS, depth_range=(4, 1))


def test_a_range_of_depth_is_for_poses(tmp_path: Path):
    (tmp_path / "pairs.txt").write_text("0.png 1.png\n")
    with pytest.raises(ValueError, match=r"goes with the poses of a transforms\.json, not with .*pairs\.txt"):
        read_graph(tmp_path / "pairs.txt", PHOTOS, depth_range=(1, 4))


def test_what_is_no_graph_is_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt does not exist"):
        read_graph(tmp_path / "nothing.txt", PHOTOS)
    (tmp_path / "graph.yaml").touch()
    with pytest.raises(ValueError, match=r"must be an \.npz graph, hloc's pairs\.txt, .*, got .*graph\.yaml"):
        read_graph(tmp_path / "graph.yaml", PHOTOS)
    (tmp_path / "pairs.txt").write_text("0.png 1.png\n")
    with pytest.raises(ValueError, match=r"the frames of a video have none; give an \.npz"):
        read_graph(tmp_path / "pairs.txt")


def test_a_patched_model_sees_what_the_file_says(tmp_path: Path):
    (tmp_path / "graph.npz").write_bytes(graph_bytes(GRAPHS["core"], None))
    model = RoomsModel.create(0, dim=16, depth=1, num_heads=2)
    images = torch.rand(5, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), patch(model, covisibility=GraphFile(tmp_path / "graph.npz")) as handle:
        outputs = model(images)
        assert handle.report().special_tokens == "masked"
    with torch.no_grad(), patch(model, covisibility=GRAPHS["core"]):
        assert torch.equal(model(images)["depth"], outputs["depth"])
    assert Core(2, by=None) != GraphFile(tmp_path / "graph.npz")
    assert GraphFile(str(tmp_path / "graph.npz")) == GraphFile(tmp_path / "graph.npz")


def test_a_saved_reconstruction_is_its_graph(tmp_path: Path):
    words = np.frombuffer(json.dumps({"names": NAMES, "request": {}}).encode(), np.uint8)
    with np.load(Path(_saved(tmp_path)), allow_pickle=False) as held:
        arrays = {name: held[name] for name in held.files if name != "words"}
    np.savez(tmp_path / "reconstruction.npz", **arrays, words=words, poses=np.zeros((5, 4, 4)))
    graph = read_graph(tmp_path / "reconstruction.npz", PHOTOS)
    assert torch.equal(graph.to_dense(), GRAPHS["core"].to_dense())


def _saved(folder: Path) -> Path:
    (folder / "graph.npz").write_bytes(graph_bytes(GRAPHS["core"], NAMES))
    return folder / "graph.npz"
