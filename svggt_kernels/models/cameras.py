"""Cameras as models and files state them, as poses: rigid motions from camera to world, axes as in OpenCV.

Camera axes: x right, y down, z forward. Everything is computed in float64.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..rigid_motions import inverse, motion, rotation_of


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
