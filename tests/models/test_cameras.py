"""What models say of cameras, as poses and intrinsics: where a point of the world falls into the frame."""

from __future__ import annotations

import pytest
import torch

from svggt_kernels.demo.model.poses import encode_poses
from svggt_kernels.models import RUNNABLE
from svggt_kernels.models.cameras import (
    intrinsics_as_they_are,
    intrinsics_of_encoding,
    intrinsics_of_points,
    poses_of_encoding,
)

HEIGHT, WIDTH, FOCAL = 28, 42, (50.0, 40.0)
TRUE = torch.tensor([[FOCAL[0], 0, WIDTH / 2], [0, FOCAL[1], HEIGHT / 2], [0, 0, 1]], dtype=torch.float64)


def points_of_pixels(depth: torch.Tensor) -> torch.Tensor:
    """The point `[H, W, 3]` in the camera's axes that the middle of each pixel shows."""
    rows, columns = torch.meshgrid(torch.arange(HEIGHT) + 0.5, torch.arange(WIDTH) + 0.5, indexing="ij")
    x, y = (columns - WIDTH / 2) / FOCAL[0], (rows - HEIGHT / 2) / FOCAL[1]
    return torch.stack([x * depth, y * depth, depth], -1)


def test_an_encoding_is_a_camera_whose_axis_passes_through_the_middle():
    """Poses and intrinsics are those of which the encoding was made."""
    turn = torch.linalg.qr(torch.randn(3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    turn = turn * torch.linalg.det(turn)[:, None, None]
    centre = torch.tensor([[0.0, 0, 0], [1, 2, 3], [-1, 0, 2]], dtype=torch.float64)
    half_view = torch.tensor([HEIGHT / 2 / FOCAL[1], WIDTH / 2 / FOCAL[0]], dtype=torch.float64).expand(3, 2)
    outputs = {"pose_enc": encode_poses(turn, centre, half_view), "depth": torch.ones(3, HEIGHT, WIDTH)}
    poses = poses_of_encoding(outputs)
    torch.testing.assert_close(poses[:, :3, :3], turn)
    torch.testing.assert_close(poses[:, :3, 3], centre)
    torch.testing.assert_close(intrinsics_of_encoding(outputs), TRUE.expand(3, 3, 3))


def test_points_tell_the_camera_that_sees_them():
    generator = torch.Generator().manual_seed(1)
    depth = 1 + torch.rand(2, HEIGHT, WIDTH, generator=generator)
    points = torch.stack([points_of_pixels(one) for one in depth])
    points[0, 3, 4] = torch.tensor([5.0, 5, -1])  # behind the camera
    points[1, 0, 0, 0] = torch.nan
    fitted = intrinsics_of_points({"local_points": points})
    torch.testing.assert_close(fitted, TRUE.expand(2, 3, 3), atol=1e-4, rtol=0)
    points[1, ..., 2] = -1
    with pytest.raises(ValueError, match="must lie in front of its camera"):
        intrinsics_of_points({"local_points": points})


def test_intrinsics_that_are_given():
    assert torch.equal(intrinsics_as_they_are({"intrinsics": TRUE.float()[None]}), TRUE[None])


@pytest.mark.parametrize("name", RUNNABLE)
def test_every_model_says_where_its_weights_are_published(name: str):
    kind = RUNNABLE[name]
    assert (kind.trained is None) == (kind.published.count("/") == 1)
