"""Rigid motions x -> rotation x + translation, as matrices `[..., 4, 4]`, and the rotations of quaternions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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


def quaternion_of(
    rotation: Tensor,  # [..., 3, 3]
) -> Tensor:
    """Return the quaternions (x, y, z, w) `[..., 4]`, w of 0 or more, of rotation matrices.

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
