"""VGGT's encoding of a camera in nine numbers, and the poses and intrinsics that it stands for.

The encoding is of the motion from the world to the camera, where the world is the camera of the reference frame:
translation (3), unit quaternion with its real part last (4), vertical and horizontal field of view in radians (2). A
pose is the inverse motion, camera to world, `[4, 4]`. Camera axes: x right, y down, z forward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...rigid_motions import inverse, motion, quaternion_of, rotation_of


def encode_poses(
    rotation: Tensor,  # [..., 3, 3]
    centre: Tensor,  # [..., 3]
    half_view: Tensor,  # [..., 2]
) -> Tensor:
    """Return the encodings of cameras, `[..., 9]`.

    Args:
        rotation: Camera to world.
        centre: Of the camera, in the world.
        half_view: Tangent of half the vertical and of half the horizontal field of view.
    """
    translation = -(rotation.mT @ centre[..., None])[..., 0]
    return torch.cat([translation, quaternion_of(rotation.mT), 2 * half_view.atan()], dim=-1)


def decode_poses(
    encoding: Tensor,  # [..., 9]
    height: int,
    width: int,
) -> tuple[Tensor, Tensor]:
    """Return poses camera to world `[..., 4, 4]`, and fx, fy, cx, cy in pixels `[..., 4]`, of encodings.

    Args:
        encoding: As VGGT and its relatives give them.
        height: Of the images in pixels; the optical axis passes through their middle.
        width: Likewise.
    """
    translation, quaternion, view = encoding.split([3, 4, 2], dim=-1)
    pose = inverse(motion(rotation_of(quaternion), translation))
    size = view.new_tensor([height, width])
    focal = (size / 2 / torch.tan(view / 2)).flip(-1)
    centre = ((size - 1) / 2).flip(-1).expand_as(focal)
    return pose, torch.cat([focal, centre], dim=-1)
