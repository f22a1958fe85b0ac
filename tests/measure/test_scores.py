"""The scores of one scene are the metrics of `accuracy`, and say what cannot be said."""

from __future__ import annotations

import math

import pytest
import torch

from svggt_kernels.measure.accuracy import align
from svggt_kernels.measure.scores import depth_scores, pose_scores, scene_scores


def poses(frames: int = 5) -> torch.Tensor:
    """Cameras along a curve that turn about their y axes."""
    angle = 0.2 * torch.arange(frames, dtype=torch.float64)
    motion = torch.eye(4, dtype=torch.float64).repeat(frames, 1, 1)
    motion[:, 0, 0] = motion[:, 2, 2] = angle.cos()
    motion[:, 0, 2], motion[:, 2, 0] = angle.sin(), -angle.sin()
    motion[:, :3, 3] = torch.stack([angle, angle**2, angle.sin()], 1)
    return motion


def test_another_coordinate_system_costs_nothing():
    turn = align(torch.randn(9, 3).double(), torch.randn(9, 3).double())
    scores = pose_scores(turn.poses(poses()), poses())
    assert scores["camera_scale"] == pytest.approx(1 / turn.scale)
    assert [scores[f"auc{k}"] for k in (3, 5, 15, 30)] == [1, 1, 1, 1] and scores["rotation_auc30"] == 1
    for name in ("ate", "rpe_translation", "rpe_rotation", "rotation_median", "translation_median"):
        assert scores[name] == pytest.approx(0, abs=2e-6)


def test_where_no_camera_moves_only_rotations_are_scored():
    still = poses()
    still[:, :3, 3] = 7
    scores = pose_scores(poses(), still)
    assert scores.pop("rotation_auc30") == 1
    assert scores == pytest.approx({"rotation_median": 0, "rpe_rotation": 0}, abs=2e-6)


def test_a_pose_that_is_not_finite_counts_as_wrong():
    predicted = poses()
    predicted[2] = math.nan
    scores = pose_scores(predicted, poses())
    assert scores["auc30"] == pytest.approx(6 / 10)
    assert all(math.isnan(scores[name]) for name in ("ate", "rpe_translation", "rpe_rotation", "camera_scale"))


def test_depth_is_scored_where_it_is_known():
    true = torch.tensor([[[1.0, 2, 0, 4]]])
    scores = depth_scores(3 * true + torch.tensor([0.0, 0, 5, 12]), true)
    assert scores == {
        "absrel": pytest.approx(1 / 3),
        "delta125": pytest.approx(2 / 3),
        "depth_scale": pytest.approx(1 / 3),
    }
    assert depth_scores(true, torch.zeros_like(true)) == {}


def test_depth_in_the_unit_of_the_cameras_has_the_ratio_one():
    predicted, true_depth = poses(), torch.rand(5, 4, 6) + 1
    predicted[:, :3, 3] /= 4
    scores = scene_scores(predicted, poses(), true_depth / 4, true_depth)
    assert (scores["camera_scale"], scores["depth_scale"]) == (pytest.approx(4), pytest.approx(4))
    assert scores["scale_ratio"] == pytest.approx(1)
    assert scene_scores(predicted, poses()) == pose_scores(predicted, poses())
