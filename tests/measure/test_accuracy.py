from __future__ import annotations

import math

import pytest
import torch

from svggt_kernels.measure.accuracy import (
    align,
    depth_errors,
    mean_interval,
    pair_errors,
    point_errors,
    pose_auc,
    ratio_interval,
    relative_pose_errors,
    trajectory_error,
)


def turn(degrees: float, axis: int = 2) -> torch.Tensor:
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    i, j = [k for k in range(3) if k != axis]
    rotation = torch.eye(3, dtype=torch.float64)
    rotation[i, i] = rotation[j, j] = cosine
    rotation[i, j], rotation[j, i] = -sine, sine
    return rotation


def poses(centres: list[list[float]], rotations: list[torch.Tensor] | None = None) -> torch.Tensor:
    result = torch.eye(4, dtype=torch.float64).repeat(len(centres), 1, 1)
    result[:, :3, 3] = torch.tensor(centres, dtype=torch.float64)
    if rotations is not None:
        result[:, :3, :3] = torch.stack(rotations)
    return result


def random_poses(frames: int) -> torch.Tensor:
    result = torch.eye(4, dtype=torch.float64).repeat(frames, 1, 1)
    rotation, _ = torch.linalg.qr(torch.randn(frames, 3, 3, dtype=torch.float64))
    result[:, :3, :3] = rotation * torch.linalg.det(rotation)[:, None, None]
    result[:, :3, 3] = torch.randn(frames, 3, dtype=torch.float64)
    return result


def moved(truth: torch.Tensor, scale: float = 2.5) -> torch.Tensor:
    """The same cameras in another coordinate system, of another scale."""
    world = random_poses(1)[0]
    result = truth.clone()
    result[:, :3, 3] *= scale
    return world @ result


class TestPairs:
    def test_coordinate_system_and_scale_play_no_role(self):
        truth = random_poses(6)
        errors = pair_errors(moved(truth), truth)
        assert errors.pose.shape == (15,) and errors.pose.max() < 1e-5

    def test_one_turned_camera_is_wrong_in_all_its_pairs(self):
        truth = random_poses(4)
        predicted = truth.clone()
        predicted[2, :3, :3] = truth[2, :3, :3] @ turn(7)
        rotation = pair_errors(predicted, truth).rotation
        expected = torch.tensor([0, 7, 0, 7, 0, 7], dtype=torch.float64)  # 01 02 03 12 13 23
        torch.testing.assert_close(rotation, expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("degrees", [1e-7, 1e-3, 90.0, 179.999])
    def test_angles_near_0_and_180_are_exact(self, degrees: float):
        truth = poses([[0, 0, 0], [1, 0, 0]])
        predicted = poses([[0, 0, 0], [1, 0, 0]], [turn(0), turn(degrees)])
        assert float(pair_errors(predicted, truth).rotation) == pytest.approx(degrees, rel=1e-6)

    def test_the_direction_of_a_translation_has_no_sign(self):
        truth, predicted = poses([[0, 0, 0], [1, 0, 0]]), poses([[0, 0, 0], [-2, 0, 0]])
        assert float(pair_errors(predicted, truth).translation) == 0
        assert float(pair_errors(predicted, truth, signed=True).translation) == 180
        aside = poses([[0, 0, 0], [math.cos(math.radians(120)), math.sin(math.radians(120)), 0]])
        assert float(pair_errors(aside, truth).translation) == pytest.approx(60)

    def test_cameras_in_one_place_have_no_direction(self):
        truth, predicted = poses([[0, 0, 0], [1, 0, 0]]), poses([[0, 0, 0], [0, 0, 0]])
        assert float(pair_errors(predicted, truth).translation) == 90

    def test_shapes_are_checked(self):
        with pytest.raises(ValueError, match="two or more"):
            pair_errors(random_poses(1), random_poses(1))
        with pytest.raises(ValueError, match=r"\[S, 4, 4\]"):
            pair_errors(torch.eye(3)[None], random_poses(1))


class TestMedians:
    def test_of_pairs_by_hand(self):
        # Pairs 01 02 03 12 13 23; the last camera is turned by 10 degrees, and moved off the line.
        truth = poses([[0, 0, 0], [1, 0, 0], [2, 0, 0], [3, 0, 0]])
        predicted = poses([[0, 0, 0], [1, 0, 0], [2, 0, 0], [3, 1, 0]], [turn(0), turn(0), turn(0), turn(10)])
        errors = pair_errors(predicted, truth)
        assert float(errors.rotation.median()) == 0  # of 0 0 0 10 10 10 the lower of the two in the middle
        slopes = [math.degrees(math.atan(1 / x)) for x in (3, 2, 1)]
        assert errors.translation.tolist() == pytest.approx([0, 0, slopes[0], 0, slopes[1], slopes[2]], abs=1e-5)
        assert errors.pose.tolist() == pytest.approx([0, 0, slopes[0], 0, slopes[1], slopes[2]], abs=1e-5)


class TestAuc:
    def test_by_hand(self):
        # Below 1, 2, 3 degrees: 1, 2, 2 of 4 errors.
        assert pose_auc(torch.tensor([0.5, 1.5, 3.0, 100.0]), 3) == pytest.approx((1 + 2 + 2) / 4 / 3)

    def test_equals_the_histogram_of_vggt(self):
        errors = 60 * torch.rand(1000, dtype=torch.float64)
        counts = torch.histc(errors, bins=30, min=0, max=30)
        assert pose_auc(errors, 30) == pytest.approx(float(counts.cumsum(0).mean() / len(errors)))

    def test_extremes(self):
        assert pose_auc(torch.zeros(3), 5) == 1 and pose_auc(torch.full((3,), torch.nan), 5) == 0
        with pytest.raises(ValueError, match="needs errors"):
            pose_auc(torch.zeros(0), 5)


class TestTrajectory:
    def test_a_similarity_is_undone(self):
        truth = random_poses(9)
        assert trajectory_error(moved(truth), truth) < 1e-12
        assert max(relative_pose_errors(moved(truth), truth)) < 1e-5

    def test_alignment_does_not_mirror(self):
        points = torch.randn(20, 3, dtype=torch.float64)
        found = align(points, points * torch.tensor([1.0, 1, -1]))
        assert float(torch.linalg.det(found.rotation)) == pytest.approx(1)

    def test_alignment_finds_scale_rotation_and_translation(self):
        points = torch.randn(20, 3, dtype=torch.float64)
        shift = torch.tensor([1.0, 2, 3], dtype=torch.float64)
        found = align(points, 4 * points @ turn(30).T + shift)
        assert found.scale == pytest.approx(4)
        torch.testing.assert_close(found.rotation, turn(30))
        torch.testing.assert_close(found.translation, shift)

    def test_ate_by_hand(self):
        # The best scale of the square is 1 by symmetry, whatever lies above or below it.
        square = [[1.0, 0, 0], [0, 1, 0], [-1, 0, 0], [0, -1, 0]]
        raised = [[1.0, 0, 0.1], [0, 1, -0.1], [-1, 0, 0.1], [0, -1, -0.1]]
        scale = 1 / 1.01
        expected = math.sqrt((1 - scale) ** 2 + (0.1 * scale) ** 2)
        assert trajectory_error(poses(raised), poses(square)) == pytest.approx(expected)

    def test_rpe_by_hand(self):
        line = [[float(i), 0, 0] for i in range(4)]
        rotations = [turn(0), turn(0), turn(3), turn(3)]
        translation, rotation = relative_pose_errors(poses(line, rotations), poses(line))
        assert rotation == pytest.approx(3 / math.sqrt(3))
        # Seen from the camera that is turned by 3 degrees the next one lies 3 degrees aside.
        assert translation == pytest.approx(2 * math.sin(math.radians(1.5)) / math.sqrt(3))


class TestDepth:
    def test_one_scale_a_scene(self):
        truth = 1 + torch.rand(3, 4, 5)
        errors = depth_errors(truth / 7, truth)
        assert errors.absrel < 1e-6 and errors.delta == 1 and errors.scale == pytest.approx(7, rel=1e-5)

    def test_by_hand(self):
        truth = torch.tensor([[[1.0, 2.0, 4.0, 0.0, torch.inf]]])
        predicted = torch.tensor([[[1.0, 2.0, 8.0, 3.0, 3.0]]])
        errors = depth_errors(predicted, truth)
        assert errors == (pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0)
        assert depth_errors(2 * predicted, truth, alignment="none").absrel == pytest.approx((1 + 1 + 3) / 3)

    def test_what_is_no_depth_is_infinitely_wrong(self):
        errors = depth_errors(torch.tensor([[[1.0, torch.nan]]]), torch.ones(1, 1, 2))
        assert errors.absrel == math.inf and errors.delta == 0.5

    def test_the_scale_is_the_median_of_the_ratios(self):
        truth = torch.tensor([[[1.0, 1.0, 1.0, 100.0, 1.2]]])
        errors = depth_errors(0.5 * torch.ones(1, 1, 5), truth)
        assert errors.scale == 2
        assert errors.absrel == pytest.approx((0.99 + 0.2 / 1.2) / 5)
        assert errors.delta == pytest.approx(4 / 5)  # 1.2 and its inverse are below 1.25, 100 is not

    def test_no_truth_is_refused(self):
        with pytest.raises(ValueError, match="no pixel"):
            depth_errors(torch.ones(1, 2, 2), torch.zeros(1, 2, 2))


class TestPoints:
    def test_by_hand(self):
        truth = torch.tensor([[0.0, 0, 0], [1, 0, 0]])
        predicted = torch.tensor([[0.0, 0, 0], [0, 0, 3], [0, 0, 6]])
        errors = point_errors(predicted, truth)
        assert errors.accuracy == pytest.approx(3) and errors.completeness == pytest.approx(0.5)
        assert errors.accuracy_median == pytest.approx(3)
        far = torch.cat([predicted, torch.tensor([[0.0, 0, 1000]])])
        assert point_errors(far, truth).accuracy > 200 and point_errors(far, truth).accuracy_median == pytest.approx(3)
        assert point_errors(far, truth).completeness_median == 0

    def test_more_points_than_fit_a_block_of_distances(self):
        truth = torch.rand(2500, 3, dtype=torch.float64)
        shift = torch.tensor([0, 0, 1e-4], dtype=torch.float64)  # far less than from a point to the next
        assert point_errors(truth + shift, truth) == pytest.approx((1e-4,) * 4, rel=1e-2)

    def test_shapes_are_checked(self):
        with pytest.raises(ValueError, match="predicted points must be"):
            point_errors(torch.zeros(0, 3), torch.zeros(2, 3))


class TestInterval:
    def test_covers_the_mean_about_as_often_as_it_says(self):
        generator = torch.Generator().manual_seed(1)
        samples = torch.randn(200, 30, generator=generator).tolist()
        hits = sum(
            interval.low <= 0 <= interval.high for interval in (mean_interval(s, resamples=400) for s in samples)
        )
        assert 0.88 <= hits / 200 <= 0.99

    def test_is_the_same_each_time_and_refuses_what_is_no_number(self):
        assert mean_interval([1.0, 2, 4]) == mean_interval([1.0, 2, 4])
        assert str(mean_interval([0.5, 0.5])) == "0.500 [0.500, 0.500]"
        with pytest.raises(ValueError, match="finite"):
            mean_interval([1.0, math.nan])

    def test_a_ratio_of_paired_values_is_certain_where_their_means_are_not(self):
        dense = [0.1, 0.5, 0.9, 0.3]
        assert ratio_interval([0.8 * x for x in dense], dense) == pytest.approx((0.8, 0.8, 0.8, 4))
        swapped = ratio_interval([0.5, 0.1, 0.3, 0.9], dense)
        assert swapped.mean == pytest.approx(1) and swapped.low < 0.7 and swapped.high > 1.4

    def test_a_ratio_by_hand(self):
        # Of two scenes a sample holds the first twice, each once (twice as likely) or the second twice.
        assert ratio_interval([1.0, 1.0], [1.0, 4.0]) == pytest.approx((0.4, 0.25, 1.0, 2))
        with pytest.raises(ValueError, match="two values of each scene"):
            ratio_interval([1.0], [1.0, 2.0])
        with pytest.raises(ValueError, match="mean 0"):
            ratio_interval([1.0], [0.0])
