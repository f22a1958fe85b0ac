"""The rendered walk: its depth, poses and covisibility agree with a ray caster that is written here once more."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from svggt_kernels.demo.flat import CEILING, WHITE, Box, Flat, Material, build_flat
from svggt_kernels.demo.render import Renderer
from svggt_kernels.demo.walk import _overlap, walk

HEIGHT, WIDTH, SEED = 126, 168, 0


@pytest.fixture(scope="module")
def walked():
    return walk(48, HEIGHT, WIDTH, SEED)


@pytest.fixture(scope="module")
def corners():
    """Lowest and highest corners of every box of the flat, each `[K, 3]`."""
    flat = build_flat(np.random.default_rng(SEED))
    return np.stack([box.corners for box in flat.boxes], axis=1)


def first_hits(eye, rays, corners):
    """Returns how many lengths of each ray `[n, 3]` lie before the first box, in float64 and without any culling."""
    with np.errstate(divide="ignore"):
        to_low, to_high = ((corner[:, None] - eye) / rays for corner in corners)
    enter, leave = np.minimum(to_low, to_high).max(-1), np.maximum(to_low, to_high).min(-1)
    return np.where((enter > 0) & (enter <= leave), enter, np.inf).min(0)


def world_rays(walked, frame, rows, columns):
    """Returns the rays of some pixels `[n, 3]` in world axes, of length 1 along the optical axis."""
    pixels = np.stack([columns, rows, np.ones_like(rows)]).astype(float)
    camera = np.linalg.inv(walked.intrinsics.numpy()) @ pixels
    return (walked.poses[frame, :3, :3].numpy() @ camera).T


def world_points(walked, frame, stride):
    """Returns the points `[n, 3]` that a grid of pixels of the frame sees, from its depth."""
    rows, columns = (axis.ravel() for axis in np.mgrid[0:HEIGHT:stride, 0:WIDTH:stride])
    depth = walked.depth[frame].numpy()[rows, columns, None]
    return walked.poses[frame, :3, 3].numpy() + depth * world_rays(walked, frame, rows, columns)


def test_shapes_dtypes_and_ranges(walked):
    assert walked.images.shape == (48, 3, HEIGHT, WIDTH) and walked.images.dtype == torch.float32
    assert walked.depth.shape == (48, HEIGHT, WIDTH) and walked.depth.dtype == torch.float32
    assert walked.images.min() >= 0 and walked.images.max() <= 1
    assert walked.depth.isfinite().all() and walked.depth.min() > 0.3 and walked.depth.max() < 20


@pytest.mark.parametrize("frame", range(0, 48, 7))
def test_depth_is_the_first_hit_of_each_ray(walked, corners, frame):
    rows, columns = (axis.ravel() for axis in np.mgrid[0:HEIGHT:3, 0:WIDTH:3])
    expected = first_hits(walked.poses[frame, :3, 3].numpy(), world_rays(walked, frame, rows, columns), corners)
    error = abs(walked.depth[frame].numpy()[rows, columns] - expected) / expected
    assert np.mean(error > 1e-5) < 0.003  # a ray that grazes an edge may round to either side of it
    assert np.median(error) < 1e-6


def test_a_wall_ahead_is_as_far_as_it_is():
    plain = Material("plain", WHITE, WHITE, 1.0)
    wall = Box(np.array([[3.0, -9.0, -9.0], [3.5, 9.0, 9.0]]), plain, 0)
    renderer = Renderer(Flat(np.array([[0.0, -9.0, 3.0, 9.0]]), [wall], np.zeros((1, 2))))
    pose = np.eye(4)
    pose[:3, :3] = [[0, 0, 1], [-1, 0, 0], [0, -1, 0]]  # columns: right is -y, down is -z, forward is +x
    pose[0, 3] = 0.75
    _, depth = renderer.render(pose, np.array([[40.0, 0, 31.5], [0, 40.0, 23.5], [0, 0, 1]]), 48, 64)
    np.testing.assert_allclose(depth, 2.25, rtol=1e-6)


def test_points_lie_between_floor_and_ceiling_and_both_are_seen(walked):
    height = np.concatenate([world_points(walked, frame, 4)[:, 2] for frame in range(48)])
    assert height.min() > -1e-4 and height.max() < CEILING + 1e-4
    assert np.mean(abs(height) < 1e-4) > 0.1 and np.mean(abs(height - CEILING) < 1e-4) > 0.02


def test_poses_are_rigid_level_and_upright(walked):
    rotation = walked.poses[:, :3, :3]
    torch.testing.assert_close(rotation.mT @ rotation, torch.eye(3, dtype=torch.float64).expand(48, 3, 3))
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(48, dtype=torch.float64))
    assert (walked.poses[:, 3] == torch.tensor([0.0, 0, 0, 1])).all()
    assert (rotation[:, 2, 0] == 0).all(), "the x axis of the camera is level"
    assert (rotation[:, 2, 1] < -0.9).all(), "the y axis of the camera points down"


def test_steps_are_even_and_the_walk_closes(walked):
    eyes = walked.poses[:, :3, 3]
    steps = (eyes.roll(-1, 0) - eyes).norm(dim=1)  # the last one leads back to the first frame
    assert steps.max() < 0.9 and steps.max() < 1.6 * steps.min()


def test_walk_visits_all_rooms_in_order_and_returns(walked):
    rooms, counts = torch.unique_consecutive(walked.room_of_frame, return_counts=True)
    assert rooms.tolist() == [*range(8), 0]
    assert counts[1:-1].min() >= 3
    low, high = walked.rooms[walked.room_of_frame].split(2, dim=1)
    eyes = walked.poses[:, :2, 3]
    assert (eyes > low - 0.11).all() and (eyes < high + 0.11).all()


def test_overlap_and_depth_agree_with_exact_visibility(walked, corners):
    differences = []
    for i, j in itertools.product(range(0, 48, 6), range(0, 48, 6)):
        points, camera = world_points(walked, i, 5), walked.poses[j].numpy()
        x, y, z = walked.intrinsics.numpy() @ camera[:3, :3].T @ (points - camera[:3, 3]).T
        inside = (z > 0) & (abs(x / z - (WIDTH - 1) / 2) < WIDTH / 2) & (abs(y / z - (HEIGHT - 1) / 2) < HEIGHT / 2)
        x, y, z, points = x[inside], y[inside], z[inside], points[inside]
        covered = z * (1 - first_hits(camera[:3, 3], points - camera[:3, 3], corners))  # metres behind what j sees
        seen = covered < np.minimum(0.05 * z, 0.15)
        differences.append(abs(walked.overlap[i, j].item() - seen.sum() / len(inside)))

        visible = covered < 1e-4
        if visible.any():
            row, column = (np.rint(axis / z)[visible].astype(int) for axis in (y, x))
            assert np.median(abs(walked.depth[j].numpy()[row, column] / z[visible] - 1)) < 0.02, (i, j)
    assert max(differences) < 0.05 and np.mean(differences) < 0.005


def test_overlap_needs_depths_within_5_percent_and_15_centimetres():
    walls_at = np.array([8.0, 8.1, 8.3, 2.0, 2.08, 2.25])
    camera = np.array([[10.0, 0, 3.5], [0, 10.0, 2.5], [0, 0, 1]])
    depth, poses = np.tile(walls_at[:, None, None], (1, 6, 8)), np.tile(np.eye(4), (6, 1, 1))
    near = [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    np.testing.assert_array_equal(_overlap(depth, poses, camera), np.kron(np.eye(2), near))


def test_intrinsics_span_the_field_of_view():
    intrinsics = walk(1, 9, 20, field_of_view=90.0).intrinsics.numpy()
    np.testing.assert_allclose(intrinsics, [[10, 0, 9.5], [0, 10, 4], [0, 0, 1]], rtol=1e-12)


def test_overlap_is_full_on_the_diagonal_and_nearly_symmetric(walked):
    overlap = walked.overlap
    assert (overlap.diagonal() == 1).all()
    assert overlap.min() >= 0 and overlap.max() <= 1
    assert (overlap.T[overlap > 0.2] > 0).all()


@pytest.mark.parametrize("seed", range(4))
def test_rooms_are_separate_and_neighbours_connected(seed):
    overlap = walk(48, 42, 56, seed).overlap
    seen = torch.maximum(overlap, overlap.T) > 0.05
    assert 0.15 < seen.float().mean() < 0.45
    around = torch.arange(48)
    assert (torch.maximum(overlap, overlap.T)[around, (around + 1) % 48] > 0.3).all(), (
        "each frame and the next, in a loop"
    )
    assert not seen[:8, 16:36].any(), "the first room and the far side of the flat"


def test_covisible_pairs_are_the_overlaps_above_the_threshold(walked):
    pairs = walked.covisible_pairs(0.1)
    assert pairs.dtype == torch.int64
    seen = torch.zeros(48, 48, dtype=torch.bool)
    seen[pairs[:, 0], pairs[:, 1]] = True
    assert torch.equal(seen, seen.T) and not seen.diagonal().any() and len(pairs) == seen.sum()
    either = torch.maximum(walked.overlap, walked.overlap.T)
    assert torch.equal(seen, (either > 0.1) & ~torch.eye(48, dtype=torch.bool))
    assert len(walked.covisible_pairs(0.3)) < len(pairs) < len(walked.covisible_pairs())


def test_walk_is_deterministic_and_seeds_differ(walked):
    again = walk(48, HEIGHT, WIDTH, SEED)
    for name in ("images", "depth", "poses", "overlap"):
        assert torch.equal(getattr(again, name), getattr(walked, name)), name
    other = walk(2, HEIGHT, WIDTH, SEED + 1)
    assert (other.images[0] - walked.images[0]).abs().mean() > 0.05


def test_no_two_frames_look_alike(walked):
    small = torch.nn.functional.avg_pool2d(walked.images, 7)
    distance = (small[:, None] - small).abs().mean((2, 3, 4))
    assert (distance + torch.eye(48)).min() > 0.02


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 1, 1), (2, 14, 3), (60, 5, 30), (2, 1, 9000)])
def test_any_size_works(frames, height, width):
    walked = walk(frames, height, width)
    assert walked.depth.shape == (frames, height, width) and walked.depth.isfinite().all()
    assert walked.overlap.shape == (frames, frames) and (walked.overlap.diagonal() == 1).all()


@pytest.mark.parametrize(
    "arguments",
    [{"num_frames": 0}, {"height": 0}, {"width": -3}, {"field_of_view": 180.0}, {"field_of_view": float("nan")}],
    ids=str,
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        walk(**arguments)


@pytest.mark.parametrize("threshold", [-0.1, 1.0, float("nan")])
def test_bad_threshold_is_refused(walked, threshold):
    with pytest.raises(ValueError, match="share of pixels"):
        walked.covisible_pairs(threshold)
