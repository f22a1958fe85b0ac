"""Cameras as models state them: poses, which are rigid motions from camera to world, and intrinsics of the frames.

Camera axes as in OpenCV: x right, y down, z forward. Intrinsics are in pixels of the frame, from its top left corner,
so that the centre of the first pixel is (0.5, 0.5). Everything is computed in float64.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
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


def intrinsics_of_encoding(outputs: Mapping[str, Tensor]) -> Tensor:
    """Return the intrinsics `[S, 3, 3]` of VGGT's `pose_enc`.

    It ends with the vertical and the horizontal field of view. The optical axis passes through the middle of the frame.
    """
    view = outputs["pose_enc"][..., 7:9].double()
    size = view.new_tensor(outputs["depth"].shape[-2:])
    return _centred((size / 2 / torch.tan(view / 2)).flip(-1), size)


def intrinsics_as_they_are(outputs: Mapping[str, Tensor]) -> Tensor:
    """Return `intrinsics`, `[S, 3, 3]`."""
    return outputs["intrinsics"].double()


def intrinsics_of_points(outputs: Mapping[str, Tensor]) -> Tensor:
    """Return the intrinsics `[S, 3, 3]` that fit `local_points` `[S, H, W, 3]`, which are in the camera's axes.

    The optical axis passes through the middle of the frame. Each focal length is the one that brings the points closest
    to the middles of their pixels: least squares over the points in front of the camera, in pixels.

    Raises:
        ValueError: If no point of a frame is in front of its camera.
    """
    points = outputs["local_points"].double()
    size = points.new_tensor(points.shape[1:3])
    x, y, depth = points.unbind(-1)
    ahead = (depth > 0) & points.isfinite().all(-1)
    if not ahead.flatten(1).any(1).all():
        raise ValueError("points of every frame must lie in front of its camera, and those of some frame do not")
    depth = depth.where(ahead, 1.0)
    middles = [torch.arange(int(side), device=points.device) + 0.5 - side / 2 for side in size]
    focal = []
    for slopes, places in ((x / depth, middles[1]), (y / depth, middles[0][:, None])):
        slopes = slopes.where(ahead, 0.0)
        focal.append((slopes * places).sum((1, 2)) / slopes.square().sum((1, 2)))
    return _centred(torch.stack(focal, -1), size)


def _centred(focal: Tensor, size: Tensor) -> Tensor:
    """Return the intrinsics of focal lengths `[S, 2]`, x before y, of frames of a height and width."""
    intrinsics = torch.diag_embed(torch.cat([focal, torch.ones_like(focal[:, :1])], -1))
    intrinsics[:, :2, 2] = size.flip(-1) / 2
    return intrinsics


def poses_as_they_are(outputs: Mapping[str, Tensor]) -> Tensor:
    """Return `camera_poses`, `[S, 4, 4]`, which are camera to world."""
    return outputs["camera_poses"].double()
