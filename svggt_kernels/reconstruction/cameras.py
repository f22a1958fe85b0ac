"""From the camera of a frame, which a model sees, to the camera of the photo file that the frame was made of.

Axes of cameras are those of OpenCV: x right, y down, z forward. Pixels are counted from the top left corner, so that
the centre of the first is (0.5, 0.5), as in COLMAP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..io.photos import crop_of

# By EXIF orientation, the rotation that turns (x, y) of the upright photo into that of the photo as it is stored.
TURNS = {
    1: ((1, 0), (0, 1)),
    3: ((-1, 0), (0, -1)),
    6: ((0, 1), (-1, 0)),
    8: ((0, -1), (1, 0)),
}


@dataclass(frozen=True, eq=False)
class PhotoCamera:
    """The camera of a photo as its pixels are stored, whatever its EXIF orientation says.

    Attributes:
        size: Width and height of the stored photo.
        pose: Camera to world `[4, 4]`, float64.
        intrinsics: `[3, 3]` in pixels of the stored photo.
        of_frame: `[2, 3]`: a point (x, y, 1) of the frame becomes a point of the stored photo.
    """

    size: tuple[int, int]
    pose: Tensor
    intrinsics: Tensor
    of_frame: Tensor

    def pixels(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return where the camera sees points `[N, 3]` of the world, `[N, 2]`, and their depth `[N]`."""
        seen = (points.double() - self.pose[:3, 3]) @ self.pose[:3, :3] @ self.intrinsics.mT
        return seen[:, :2] / seen[:, 2:], seen[:, 2]


def photo_camera(
    pose: Tensor,
    intrinsics: Tensor,
    frame: tuple[int, int],
    photo: tuple[int, int],
    orientation: int,
) -> PhotoCamera:
    """Return the camera of a photo file.

    Args:
        pose: Of the frame's camera, camera to world `[4, 4]`.
        intrinsics: Of the frame, `[3, 3]`, in its pixels.
        frame: Width and height of the frame.
        photo: Width and height of the upright photo.
        orientation: EXIF orientation by which the stored photo is turned upright, one of `TURNS`.
    """
    crop = crop_of(photo, frame)
    turn = torch.tensor(TURNS[orientation], dtype=torch.float64)
    sides = torch.tensor(photo, dtype=torch.float64)
    # What is counted from the far side in the stored photo begins with that side's length.
    start = -turn.clamp(max=0) @ sides
    offset = torch.tensor([crop.left, crop.top], dtype=torch.float64)
    of_frame = torch.cat([crop.scale * turn, (turn @ offset + start)[:, None]], dim=1)

    focal, centre = intrinsics.double().diagonal()[:2], intrinsics[:2, 2].double()
    stored = torch.eye(3, dtype=torch.float64)
    stored[[0, 1], [0, 1]] = crop.scale * turn.abs() @ focal
    stored[:2, 2] = of_frame[:, :2] @ centre + of_frame[:, 2]
    turned = pose.double().clone()
    turned[:3, :2] = turned[:3, :2] @ turn.mT
    width, height = (turn.abs() @ sides).int().tolist()
    return PhotoCamera((width, height), turned, stored, of_frame)


def turned_as_stored(depth: Tensor, orientation: int) -> Tensor:
    """Return what is `[h, w]` over the upright photo over the photo as it is stored."""
    quarters = {1: 0, 3: 2, 6: 1, 8: 3}[orientation]
    return torch.rot90(depth, quarters)


def mirrored(orientations: Sequence[int]) -> list[int]:
    """Return the places of photos whose EXIF orientation mirrors them, which no camera does."""
    return [place for place, orientation in enumerate(orientations) if orientation not in TURNS]
