"""What is measured of a model on scenes: perfect predictions are perfect, and each error shows in its own metric."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from evaluation.measuring import SceneSet, Views, metrics_of, predict, scene_metrics
from svggt_kernels.demo.model import RoomsModel
from svggt_kernels.demo.model.poses import encode_poses
from svggt_kernels.demo.scenes import HELD_OUT, Draws, Scenes

SIZE = (28, 42)
LARGER_IS_BETTER = {"auc3", "auc5", "auc15", "auc30", "rotation_auc30", "delta125"}
UNITS = {"depth_scale", "camera_scale", "scale_ratio"}
OF_MOTION = {"auc3", "auc5", "auc15", "auc30", "ate", "rpe_translation", "translation_median"}


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return SceneSet("walk", 2, 4).draw(2, Draws(0), SIZE)


@pytest.fixture
def true(scenes: Scenes) -> Views:
    return Views.true(scenes)[0]


def in_another_world(views: Views, scale: float = 0.2) -> Views:
    """The same cameras and depth in the axes of frame 0 and another unit, as a model gives them."""
    poses = views.poses.double()
    poses = torch.linalg.inv(poses[0]) @ poses
    poses[:, :3, 3] *= scale
    return Views(poses, views.intrinsics, scale * views.depth)


@pytest.mark.parametrize("family", ["walk", "photos", "rotation"])
def test_perfect_predictions_are_perfect(family: str):
    true = Views.true(SceneSet(family, 2, 4).draw(1, Draws(0), SIZE))[0]
    metrics = scene_metrics(in_another_world(true), true)
    assert OF_MOTION <= set(metrics) or (family == "rotation" and not OF_MOTION & set(metrics))
    assert all(metrics[name] == pytest.approx(5, rel=1e-4) for name in UNITS & set(metrics) - {"scale_ratio"})
    for name in set(metrics) - UNITS:
        assert metrics[name] == 1 if name in LARGER_IS_BETTER else metrics[name] < 1e-3, name


def test_points_are_where_rays_meet_the_depth(scenes: Scenes, true: Views):
    points = true.points(7)
    assert points.shape == (4, 4, 6, 3)
    fx, fy, cx, cy = scenes.intrinsics[0].tolist()
    ray = torch.tensor([(10 - cx) / fx, (17 - cy) / fy, 1.0])  # row 17, column 10: the third row, the second column
    expected = true.poses[2, :3, :3] @ ray * true.depth[2, 17, 10] + true.poses[2, :3, 3]
    torch.testing.assert_close(points[2, 2, 1], expected.double(), atol=1e-5, rtol=1e-5)


def test_each_error_shows_where_it_belongs(true: Views):
    perfect = scene_metrics(true, true)
    depth = scene_metrics(replace(true, depth=true.depth * torch.linspace(0.7, 1.3, SIZE[1])), true)
    assert {name for name in set(perfect) - UNITS if abs(depth[name] - perfect[name]) > 1e-3} == {
        *("absrel", "delta125", "accuracy", "accuracy_median", "completeness", "completeness_median")
    }
    poses = true.poses.clone()
    poses[2, :3, 3] += torch.tensor([0.5, -0.3, 0.2])
    cameras = scene_metrics(replace(true, poses=poses), true)
    assert cameras["ate"] > 0.05 and cameras["rpe_translation"] > 0.05 and cameras["auc3"] < 0.7
    assert cameras["accuracy"] > 0.01 and cameras["absrel"] < 1e-6 and cameras["rotation_median"] < 1e-3


def test_points_do_not_feel_the_unit_nor_the_focal_length_of_the_truth(true: Views):
    wide = replace(true, intrinsics=true.intrinsics * torch.tensor([0.7, 0.7, 1.0, 1.0]))
    assert scene_metrics(wide, true)["accuracy"] > 0.05
    moved = scene_metrics(in_another_world(wide), true)
    assert moved["accuracy"] == pytest.approx(scene_metrics(wide, true)["accuracy"], rel=1e-3)


def test_a_pixel_without_depth_is_no_point(true: Views):
    hole = true.depth.clone()
    hole[:, :14] = 0
    metrics = scene_metrics(replace(true, depth=true.depth.clone()), replace(true, depth=hole))
    assert metrics["accuracy"] < 1e-3 and metrics["absrel"] < 1e-6


class Oracle(torch.nn.Module):
    """Gives the truth in VGGT's outputs."""

    def __init__(self, scenes: Scenes) -> None:
        super().__init__()
        self.scenes = scenes

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        height, width = images.shape[-2:]
        focal = self.scenes.intrinsics[:, None, :2].expand(-1, images.shape[1], -1)
        half_view = torch.stack([height / (2 * focal[..., 1]), width / (2 * focal[..., 0])], -1)
        poses = self.scenes.poses
        encoding = encode_poses(poses[..., :3, :3], poses[..., :3, 3], half_view)
        return {"pose_enc": encoding, "depth": self.scenes.depth[..., None]}


def test_a_prediction_is_decoded_scene_by_scene(scenes: Scenes):
    first, second = metrics_of(predict(Oracle(scenes), scenes.images), scenes)
    for metrics in (first, second):
        assert metrics["auc3"] > 0.99 and metrics["ate"] < 1e-3 and metrics["accuracy"] < 1e-2
    model = RoomsModel.create(dim=32, depth=1, num_heads=2)
    first, second = metrics_of(predict(model, scenes.images), scenes)
    assert first != second and set(first) == set(second)


def test_sets_have_names_and_draw_their_family():
    chosen = SceneSet(HELD_OUT, 5, 3)
    assert chosen.name == f"{HELD_OUT}-5r-3f"
    assert chosen.draw(1, Draws(0), (14, 14)).images.shape == (1, 3, 3, 14, 14)
