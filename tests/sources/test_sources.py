"""Graphs without a descriptor: cameras, and what is known to be true."""

from __future__ import annotations

import pytest
import torch
from graphs import assert_same_graph
from torch import Tensor

from svggt_kernels import CovisibilityGraph
from svggt_kernels.graph import CovisibilityReport
from svggt_kernels.graph.recall import edge_precision
from svggt_kernels.sources import from_poses
from svggt_kernels.sources.poses import frustum_overlap

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
        "shift",
        [(0, 0, 0), (691234.6, 5334321.9, 512.3), (4_177_110.2, 855_811.7, 4_728_009.4)],
        ids=["origin", "UTM", "earth's centre"],
    )
    def test_the_origin_of_the_world_does_not_matter(self, shift: tuple[float, ...]) -> None:
        """A camera looks down, a photo every 25 cm: many samples lie exactly on the border of another frustum."""
        cameras = torch.tensor([[500.0, 0, 320], [0, 500, 240], [0, 0, 1]], dtype=torch.float64)
        poses = torch.eye(4, dtype=torch.float64).repeat(40, 1, 1)
        poses[:, :3, :3] = torch.tensor([[0.0, 1, 0], [1, 0, 0], [0, 0, -1]])
        poses[:, 1, 3] = torch.arange(40) * 0.25
        expected = frustum_overlap(poses, cameras, (0.5, 1.5), (480, 640))
        exact = from_poses(poses.float(), cameras, (0.5, 1.5), (480, 640), min_overlap=0.3)
        poses[:, :3, 3] += torch.tensor(shift, dtype=torch.float64)
        overlap = frustum_overlap(poses, cameras, (0.5, 1.5), (480, 640))
        assert torch.equal(overlap, expected) and torch.equal(overlap.diagonal(), torch.ones(40))
        assert_same_graph(from_poses(poses, cameras, (0.5, 1.5), (480, 640), min_overlap=0.3), exact)

    def test_autocast_does_not_reach_the_cameras(self) -> None:
        poses = turned(*range(0, 60, 3))
        expected = frustum_overlap(poses, INTRINSICS, (1, 10), SIZE)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(frustum_overlap(poses, INTRINSICS, (1, 10), SIZE), expected)

    def test_warns_of_positions_that_are_too_coarse(self) -> None:
        poses = turned(0, 10)
        poses[:, 1, 3] = 5_334_321.9
        with pytest.warns(UserWarning, match=r"float32, which holds the positions to 0\.64 only"):
            from_poses(poses, INTRINSICS, (1, 10), SIZE)

    def test_arrays(self) -> None:
        poses, cameras = turned(0, 10, 180).double().numpy(), INTRINSICS.double().numpy()
        poses.flags.writeable = False
        expected = frustum_overlap(turned(0, 10, 180), INTRINSICS, (1, 10), SIZE)
        assert torch.equal(frustum_overlap(poses, cameras, (1, 10), SIZE), expected)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"camera_to_world": turned(0, 1).bfloat16()},
                "camera_to_world must be float32 or float64, got .*bfloat16",
            ),
            ({"intrinsics": INTRINSICS.half()}, "intrinsics must be float32 or float64, got torch.float16"),
            ({"camera_to_world": turned(0, 1).tolist()}, "camera_to_world must be a tensor or a NumPy array"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_refuses_types(self, change: dict[str, object], message: str) -> None:
        given = {"camera_to_world": turned(0, 1), "intrinsics": INTRINSICS, **change}
        with pytest.raises(TypeError, match=message):
            from_poses(**given, depth_range=(1, 10), image_size=SIZE)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"camera_to_world": 2 * turned(0, 1)}, "rigid motions.* frame 0"),
            ({"camera_to_world": turned(0, 1) * torch.tensor([-1.0, 1, 1, 1])}, "mirror"),
            ({"camera_to_world": turned(0, 1)[:, :2]}, r"\[S, 4, 4\] or \[S, 3, 4\]"),
            ({"camera_to_world": turned(0, 1).fill_(torch.nan)}, "finite"),
            ({"intrinsics": INTRINSICS.repeat(3, 1, 1)}, r"intrinsics must be \[2, 3, 3\]"),
            ({"intrinsics": -INTRINSICS}, "focal lengths above 0"),
            ({"intrinsics": INTRINSICS * torch.tensor([[1.0], [1], [0]])}, r"\[0, 0, 1\]\], got .* for frame 0"),
            ({"intrinsics": INTRINSICS.T}, r"must be \[\[fx, skew, cx\], \[0, fy, cy\], \[0, 0, 1\]\]"),
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


def test_no_graph_goes_to_the_default_device() -> None:
    """What comes from no tensor is on the CPU; "meta" stands for a GPU that the caller made the default."""
    descriptors, poses = torch.rand(9, 4), turned(0, 10)
    with torch.device("meta"):
        graphs = [
            CovisibilityGraph.all_visible(3),
            CovisibilityGraph.sequential(3, 1),
            CovisibilityGraph.from_pairs(3, [(0, 1)]),
            CovisibilityGraph.from_descriptors(descriptors, neighbours=2, window=1),
            CovisibilityGraph.from_descriptors(descriptors.numpy()),
            from_poses(poses, INTRINSICS, (1, 10), SIZE),
            from_poses(poses.numpy(), INTRINSICS.numpy(), (1, 10), SIZE),
        ]
        assert {graph.device for graph in graphs} == {torch.device("cpu")}
        assert [graph.summary().frames for graph in graphs] == [3, 3, 3, 9, 9, 2, 2]
        assert CovisibilityReport.of(graphs[0]).summary.edges == 9
