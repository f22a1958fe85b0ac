"""VGGT's encoding of a camera in nine numbers, and the poses and intrinsics that it stands for.

The encoding is of the motion from the world to the camera, where the world is the camera of the reference frame:
translation (3), unit quaternion with its real part last (4), vertical and horizontal field of view in radians (2). A
pose is the inverse motion, camera to world, `[4, 4]`. Camera axes: x right, y down, z forward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...rigid_motions import inverse, motion, rotation_of


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
    return torch.cat([translation, _quaternion(rotation.mT), 2 * half_view.atan()], dim=-1)


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


def _quaternion(rotation: Tensor) -> Tensor:
    """Return the quaternion (x, y, z, w), w of 0 or more, of a rotation matrix `[..., 3, 3]`.

    The outer product of a unit quaternion with itself is linear in the matrix. Each row of the product is the
    quaternion, scaled by one of its entries; the row with the largest entry is the exact one.
    """
    (a, b, c), (d, e, f), (g, h, i) = (row.unbind(-1) for row in rotation.unbind(-2))
    product = [
        1 + a - e - i, b + d, c + g, h - f,
        b + d, 1 - a + e - i, f + h, c - g,
        c + g, f + h, 1 - a - e + i, d - b,
        h - f, c - g, d - b, 1 + a + e + i,
    ]  # fmt: skip
    rows = torch.stack(product, dim=-1).unflatten(-1, (4, 4))
    largest = rows.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None]
    quaternion = F.normalize(rows.take_along_dim(largest, dim=-2)[..., 0, :], dim=-1)
    return torch.where(quaternion[..., 3:] < 0, -quaternion, quaternion)
