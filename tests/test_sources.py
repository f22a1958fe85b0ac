"""Graphs without a descriptor: cameras, COLMAP, and what is known to be true."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from graphs import assert_same_graph
from torch import Tensor

from svggt_kernels import CovisibilityGraph
from svggt_kernels.covisibility import CovisibilityReport, from_colmap, from_poses
from svggt_kernels.covisibility.colmap import shared_features
from svggt_kernels.covisibility.evaluation import edge_precision
from svggt_kernels.covisibility.poses import frustum_overlap

INTRINSICS = torch.tensor([[100.0, 0, 50], [0, 100, 40], [0, 0, 1]])
SIZE = (80, 100)


def turned(*degrees: float) -> Tensor:
    """Cameras at the origin, turned about the vertical axis."""
    poses = torch.eye(4).repeat(len(degrees), 1, 1)
    for pose, angle in zip(poses, torch.tensor(degrees).deg2rad(), strict=True):
        pose[0, 0] = pose[2, 2] = angle.cos()
        pose[0, 2], pose[2, 0] = angle.sin(), -angle.sin()
    return poses


class TestPoses:
    def test_cameras_back_to_back_see_nothing_of_each_other(self) -> None:
        overlap = frustum_overlap(turned(0, 10, 180), INTRINSICS, (1, 10), SIZE)
        assert torch.equal(overlap.diagonal(), torch.ones(3))
        assert 0.5 < overlap[0, 1] < 1
        assert overlap[0, 2] == overlap[2, 0] == 0
        graph = from_poses(turned(0, 10, 180), INTRINSICS, (1, 10), SIZE)
        assert_same_graph(graph, CovisibilityGraph.from_pairs(3, [(0, 1), (1, 0)]))

    def test_distance_counts_as_well_as_direction(self) -> None:
        poses = turned(0, 0, 0)
        poses[1, 2, 3], poses[2, 2, 3] = 5, 50
        overlap = frustum_overlap(poses, INTRINSICS, (1, 10), SIZE)
        # What is near to camera 0 lies behind camera 1; all that camera 1 sees within reach, camera 0 sees.
        assert 0 < overlap[0, 1] < 0.5
        assert overlap[0, 2] == overlap[2, 0] == 0

    def test_one_sided_overlap_is_an_edge_both_ways(self) -> None:
        narrow = INTRINSICS.clone()
        narrow[0, 0] = narrow[1, 1] = 2000
        cameras = torch.stack([INTRINSICS, narrow])
        overlap = frustum_overlap(turned(0, 0), cameras, (1, 10), SIZE)
        assert overlap[1, 0] == 1 and overlap[0, 1] < 0.05
        assert from_poses(turned(0, 0), cameras, (1, 10), SIZE).density == 1

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"camera_to_world": 2 * turned(0, 1)}, "rigid motions.* frame 0"),
            ({"camera_to_world": turned(0, 1) * torch.tensor([-1.0, 1, 1, 1])}, "mirror"),
            ({"camera_to_world": turned(0, 1)[:, :2]}, r"\[S, 4, 4\] or \[S, 3, 4\]"),
            ({"camera_to_world": turned(0, 1).fill_(torch.nan)}, "finite"),
            ({"intrinsics": INTRINSICS.repeat(3, 1, 1)}, r"intrinsics must be \[2, 3, 3\]"),
            ({"intrinsics": -INTRINSICS}, "focal lengths above 0"),
            ({"depth_range": (5, 2)}, "0 < near < far"),
            ({"image_size": (0, 5)}, "image_size"),
            ({"min_overlap": 0}, "min_overlap"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_refuses(self, change: dict[str, object], message: str) -> None:
        given = {
            "camera_to_world": turned(0, 1),
            "intrinsics": INTRINSICS,
            "depth_range": (1, 10),
            "image_size": SIZE,
            **change,
        }
        with pytest.raises(ValueError, match=message):
            from_poses(**given)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, set[int]]]:
    """A database and a model of five images, and the points that each image sees."""
    pycolmap = pytest.importorskip("pycolmap", reason="pycolmap is not installed")
    folder = tmp_path_factory.mktemp("colmap")
    options = pycolmap.SyntheticDatasetOptions(num_rigs=1, num_cameras_per_rig=1, num_frames_per_rig=5)
    options.num_points3D = 60
    options.num_points2D_without_point3D = 3
    options.track_length = 3
    with pycolmap.Database.open(folder / "database.db") as database:
        model = pycolmap.synthesize_dataset(options, database)
    (folder / "sparse").mkdir()
    model.write(folder / "sparse")
    seen = {
        image.name: {point.point3D_id for point in image.points2D if point.has_point3D()}
        for image in model.images.values()
    }
    return folder / "database.db", folder / "sparse", seen


class TestColmap:
    def test_model_gives_shared_points(self, scene: tuple[Path, Path, dict[str, set[int]]]) -> None:
        _, model, seen = scene
        order = [3, 0, 4, 1, 2]  # that of the images given, not of the model
        names = [list(seen)[i] for i in order]
        shared = torch.tensor([[len(seen[a] & seen[b]) for b in names] for a in names]).fill_diagonal_(0)
        paths = [Path("photos") / name for name in names]
        assert torch.equal(shared_features(model, paths), shared)
        middle = int(shared[shared > 0].median())
        expected = CovisibilityGraph.from_dense(shared >= middle)
        assert expected.density < 1
        assert_same_graph(from_colmap(model, paths, min_shared=middle), expected)

    def test_database_gives_verified_inliers(self, scene: tuple[Path, Path, dict[str, set[int]]]) -> None:
        database, _, seen = scene
        assert from_colmap(database, list(seen)).density == 1
        assert from_colmap(database, list(seen), min_shared=10**6).num_edges == 5

    def test_unknown_image_sees_itself(self, scene: tuple[Path, Path, dict[str, set[int]]]) -> None:
        database, _, seen = scene
        graph = from_colmap(database, [*seen, "new.jpg"])
        assert graph.to_dense()[5].tolist() == [False] * 5 + [True]

    @pytest.mark.parametrize("kind", [0, 1], ids=["database", "model"])
    def test_another_image_set(self, scene: tuple[Path, Path, dict[str, set[int]]], kind: int) -> None:
        with pytest.raises(ValueError, match=r"knows none of the 2 images \(a\.jpg, b\.jpg.* it is of 5 others"):
            from_colmap(scene[kind], ["a.jpg", "b.jpg"])

    def test_what_is_no_colmap(self, tmp_path: Path) -> None:
        pytest.importorskip("pycolmap", reason="pycolmap is not installed")
        (tmp_path / "database.db").write_text("something else")
        with pytest.raises(ValueError, match="must be a database of COLMAP"):
            from_colmap(tmp_path / "database.db", ["a.jpg"])
        with pytest.raises(ValueError, match="must be a sparse model of COLMAP"):
            from_colmap(tmp_path, ["a.jpg"])
        with pytest.raises(FileNotFoundError, match="does not exist"):
            from_colmap(tmp_path / "none.db", ["a.jpg"])

    def test_no_pycolmap(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pycolmap", None)
        with pytest.raises(ImportError, match=r"svggt-kernels\[colmap\]"):
            from_colmap(tmp_path, ["a.jpg"])


class TestReport:
    def test_truth(self) -> None:
        graph = CovisibilityGraph.from_pairs(4, [(0, 1), (1, 0), (2, 3)])
        report = CovisibilityReport.of(graph, torch.tensor([[0, 1], [2, 3], [3, 2], [0, 3]]))
        assert (report.true_pairs, report.recall, report.precision) == (4, 0.5, 2 / 3)
        assert "recall 0.500 (by chance 0.250), precision 0.667" in str(report)
        assert edge_precision(CovisibilityGraph.from_pairs(4, []), torch.tensor([[0, 1]])) is None

    def test_without_truth_it_is_the_summary(self) -> None:
        graph = CovisibilityGraph.sequential(5, 1)
        assert str(CovisibilityReport.of(graph)) == str(graph.summary())

    def test_warns_of_bridges(self) -> None:
        places = torch.eye(3).repeat_interleave(4, 0) + 0.1 * torch.rand(12, 3)
        summary = CovisibilityGraph.from_descriptors(places, neighbours=3).summary()
        assert summary.bridges == 2
        assert any("leave 3 parts, which 2 added pairs join" in warning for warning in summary.warnings)
        one_place = CovisibilityGraph.from_descriptors(torch.rand(4, 3), neighbours=3).summary()
        assert one_place.bridges == 0 and not any("parts" in warning for warning in one_place.warnings)

    def test_warns_of_frames_with_few_real_neighbours(self) -> None:
        """Seven views of one place, and a frame that is nobody's neighbour although it has neighbours of its own."""
        views = torch.tensor([[1.0, 0, 0]]) + 0.1 * torch.rand(8, 3)
        views[5] = torch.tensor([0.0, 0, 1])
        summary = CovisibilityGraph.from_descriptors(views, neighbours=5).summary()
        assert summary.lonely == (5,)
        assert any("fewer than 2 real neighbours" in warning and "1 (5)" in warning for warning in summary.warnings)

    def test_warns_of_density(self) -> None:
        summary = CovisibilityGraph.from_descriptors(torch.rand(6, 4)).summary()
        assert any("sparse attention saves little" in warning for warning in summary.warnings)
        assert summary.lonely == ()

    def test_graphs_of_other_origin_say_nothing_of_neighbours(self) -> None:
        summary = CovisibilityGraph.sequential(9, 1).summary()
        assert summary.bridges is None and summary.lonely is None
        assert CovisibilityGraph.from_descriptors(torch.rand(9, 4), neighbours=0).summary().lonely == ()

    def test_union_and_device_keep_the_origin(self) -> None:
        graph = CovisibilityGraph.from_descriptors(torch.rand(6, 4), neighbours=2)
        assert (graph | CovisibilityGraph.sequential(6, 1)).origin is graph.origin
        assert (CovisibilityGraph.sequential(6, 1) | graph).to("cpu").origin is not None
