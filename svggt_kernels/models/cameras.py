"""Cameras as models and files state them, as poses: rigid motions from camera to world, axes as in OpenCV.

Camera axes: x right, y down, z forward. Everything is computed in float64.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def poses_of_encoding(outputs: Mapping[str, Tensor]) -> Tensor:
    """Return the poses `[S, 4, 4]` of VGGT's `pose_enc`: translation and quaternion (x, y, z, w), world to camera."""
    encoding = outputs["pose_enc"].double()
    return inverse(motion(rotation_of(encoding[..., 3:7]), encoding[..., :3]))


def poses_of_extrinsics(outputs: Mapping[str, Tensor]) -> Tensor:
    """Return the poses `[S, 4, 4]` of `extrinsics`: `[S, 3, 4]` or `[S, 4, 4]`, world to camera."""
    extrinsics = outputs["extrinsics"].double()
    return inverse(motion(extrinsics[..., :3, :3], extrinsics[..., :3, 3]))


def poses_as_they_are(outputs: Mapping[str, Tensor]) -> Tensor:
    """Return `camera_poses`, `[S, 4, 4]`, which are camera to world."""
    return outputs["camera_poses"].double()


def motion(
    rotation: Tensor,  # [..., 3, 3]
    translation: Tensor,  # [..., 3]
) -> Tensor:
    """Return the rigid motions x -> rotation x + translation, `[..., 4, 4]`."""
    top = torch.cat([rotation, translation[..., None]], dim=-1)
    bottom = top.new_tensor([0, 0, 0, 1]).expand(*top.shape[:-2], 1, 4)
    return torch.cat([top, bottom], dim=-2)


def inverse(
    motions: Tensor,  # [..., 4, 4]
) -> Tensor:
    """Return the inverse of rigid motions."""
    rotation = motions[..., :3, :3].mT
    return motion(rotation, -(rotation @ motions[..., :3, 3:])[..., 0])


def rotation_of(
    quaternion: Tensor,  # [..., 4]
) -> Tensor:
    """Return the rotation matrices `[..., 3, 3]` of quaternions (x, y, z, w) of any length but 0."""
    x, y, z, w = F.normalize(quaternion, dim=-1).unbind(-1)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w),
        2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w),
        2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))
